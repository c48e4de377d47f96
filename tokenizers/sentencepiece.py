"""SentencePiece's `tokenizer.model`: BPE with byte fallback, no normalisation, as Gemma's is.

The file is a protocol buffer (ModelProto); its numbers for fields are SentencePiece's. The best
neighbours to merge are those that spell the piece with the highest score. User-defined pieces are
cut out of the text, control pieces are never found in it.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from tokenizers.files import TokenizerError
from tokenizers.roles import Roles
from tokenizers.table import SPACE, Vocabulary

_FLOAT = struct.Struct("<f")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def read(source: Path, content: bytes) -> Vocabulary:
    """Raises TokenizerError on what is damaged, or would change ids and is not supported."""
    try:
        return _vocabulary(source, content)
    except (IndexError, struct.error, UnicodeDecodeError, _Malformed) as error:
        raise TokenizerError(
            f"{source} is no intact SentencePiece model ({error}): fetch it again"
        ) from None


class _Malformed(Exception):
    pass


def _varint(content: bytes, at: int) -> tuple[int, int]:
    if content[at] < 128:  # nearly all
        return content[at], at + 1
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise _Malformed("a number of more than ten bytes")


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field, value) of a message."""
    at, end = 0, len(content)
    while at < end:
        key, at = _varint(content, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(content, at)
        else:
            if kind == 2:
                size, at = _varint(content, at)
            else:
                size = {1: 8, 5: 4}.get(kind, end)  # no other kind is in use
            value, at = content[at : at + size], at + size
            if at > end:
                raise _Malformed("it ends inside a field")
        yield key >> 3, value


def _message(content: int | bytes) -> dict[int, int | bytes]:
    """The last value of each field."""
    if not isinstance(content, bytes):
        raise _Malformed("a number where a message belongs")
    return dict(_fields(content))


def _piece(content: int | bytes) -> tuple[str, float, int]:
    """Text, score, type."""
    if not isinstance(content, bytes):
        raise _Malformed("a number where a piece belongs")
    rest = content[content[1] + 2 :]  # of nearly all: text, score and perhaps a type, in this order
    if content[0] == 0x0A and rest[0] == 0x15 and content[1] < 128:
        if len(rest) == 5 or (len(rest) == 7 and rest[5] == 0x18 and rest[6] < 128):
            kind = NORMAL if len(rest) == 5 else rest[6]
            return content[2 : content[1] + 2].decode(), _FLOAT.unpack_from(rest, 1)[0], kind
    fields = _message(content)
    text, score, kind = fields.get(1), fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise _Malformed("a piece without text, score or type")
    return text.decode(), _FLOAT.unpack(score)[0], kind


def _vocabulary(source: Path, content: bytes) -> Vocabulary:
    def require(supported: bool, what: str) -> None:
        if not supported:
            raise TokenizerError(
                f"{source}: {what} is not supported: only BPE with byte fallback and without"
                " normalisation, as Gemma's, is; pass a tokenizer.json"
            )

    raw: list[int | bytes] = []
    parts: dict[int, dict[int, int | bytes]] = {2: {}, 3: {}, 5: {}}  # trainer, to and from normal
    for field, value in _fields(content):
        if field == 1:
            raw.append(value)
        elif field in parts:
            parts[field] |= _message(value)
    trainer, normalizer, denormalizer = parts.values()
    if not raw:
        raise _Malformed("it has no pieces")
    require(trainer.get(3, 1) == BPE, f"model type {trainer.get(3, 1)}")
    require(bool(trainer.get(35)), "a model without byte_fallback")
    require(not normalizer.get(2) and not denormalizer.get(2), "a normalisation charsmap")
    require(not normalizer.get(3, 1), "add_dummy_prefix")
    require(not normalizer.get(4, 1), "remove_extra_whitespaces")
    require(bool(normalizer.get(5, 1)), "escape_whitespaces turned off")

    pieces = [_piece(value) for value in raw]
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    if len(ids) < len(pieces) or "" in ids:
        raise _Malformed("a piece is empty or there twice")
    decoded, by_type = {}, {kind: {} for kind in range(1, 7)}
    for i, (text, score, kind) in enumerate(pieces):
        if kind not in by_type:
            raise _Malformed(f"piece {text!r} is of type {kind}")
        decoded[i] = text.replace(SPACE, " ").encode()
        by_type[kind][text] = (score, i)
    require(not by_type[UNUSED], f"unused piece {next(iter(by_type[UNUSED]), None)!r}")
    byte_ids = []
    for b in range(256):
        text = f"<0x{b:02X}>"
        if text not in by_type[BYTE]:
            raise TokenizerError(f"{source} has no byte piece {text}: fetch it again")
        byte_ids.append(by_type[BYTE][text][1])
        decoded[byte_ids[b]] = bytes([b])

    # Text has no real spaces once they are escaped, so a piece with one is never found.
    normal = {t: v for t, v in by_type[NORMAL].items() if " " not in t}
    longer = sorted((-score, i, t) for t, (score, i) in normal.items() if len(t) > 1)
    for (score, _, one), (other_score, _, other) in zip(longer, longer[1:], strict=False):
        if not score < other_score:
            raise TokenizerError(
                f"{source}: pieces {one!r} and {other!r} have the same score, or none: which of"
                " them merges first would depend on where they stand; that is not supported"
            )
    control = {t: i for kind in (CONTROL, UNKNOWN) for t, (_, i) in by_type[kind].items()}
    frozen = {
        t.replace(SPACE, " "): i for t, (_, i) in by_type[USER_DEFINED].items() if " " not in t
    }

    def role(field: int, default: bytes) -> str | None:
        name = trainer.get(field, default)
        text = name.decode() if isinstance(name, bytes) else ""
        return text if text in by_type[CONTROL] else None

    return Vocabulary(
        pieces=decoded,
        byte_ids=byte_ids,
        characters={t.replace(SPACE, " "): i for t, (_, i) in normal.items() if len(t) == 1},
        merged=[(text.replace(SPACE, " "), i) for _, i, text in longer],
        frozen=frozen,
        added={},
        control=control,
        roles=Roles(role(46, b"<s>"), role(47, b"</s>"), role(48, b"<pad>"), add_bos=True),
    )
