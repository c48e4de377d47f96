"""Byte-level BPE (GPT-2, GPT-NeoX and Pythia), run by tiktoken with the ids of Hugging Face.

A vocabulary file lists merges (a, b), and its tokenizer merges listed neighbours, first listed
first. tiktoken knows no pairs: it merges the neighbours whose concatenation has the lowest id, and
takes a word that is a token at once. Both do the same exactly when every token's own bytes merge to
that token: before x and y meet as neighbours, nothing has merged across the edges of x + y, so
those bytes went through the same states as they do alone, and alone they have one last pair. A
token that fails this (`unreachable`) is never produced, and is kept from tiktoken.
"""

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers.base import Cutter, Ids, Tokenizer, fingerprint
from tokenizers.files import TokenizerError, check_ids, is_text, parse_object, parse_text
from tokenizers.nfc import nfc
from tokenizers.roles import ENDOFTEXT, Roles, read_roles, roles_config

if TYPE_CHECKING:
    import tiktoken

# GPT-2's 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+ as tiktoken
# writes it, possessive where that changes nothing but the speed.
WORD = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# tiktoken panics on a million whitespace characters in a row: its regex backtracks over them.
MAX_BLANKS = 500_000
LONG_RUN = re.compile(rf"(?<!\s)\s{{{MAX_BLANKS},}}")

# Files spell a byte as one printable character: itself, or the next one from U+0100 on.
_PRINTABLE = [b for b in range(256) if chr(b).isprintable() and b != ord(" ")]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class Vocabulary(NamedTuple):
    """What the files say, in their own spelling of bytes; added and control tokens are as is."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    raw: dict[str, int]  # always cut out of the text, before it is normalised
    added: dict[str, int]  # after, e.g. NeoX's runs of spaces
    control: dict[str, int]
    nfc: bool
    add_bos: bool


@dataclass(frozen=True)
class TextEncoder:
    """Plain text to ids: normalise, cut out the added tokens, give the rest to tiktoken."""

    encoding: "tiktoken.Encoding"
    added: Cutter
    nfc: bool

    def __call__(self, text: str) -> Ids:
        if self.nfc:
            text = nfc(text)
        if len(text) > MAX_BLANKS and (run := LONG_RUN.search(text)):
            raise TokenizerError(
                f"a text of {len(text)} characters has {MAX_BLANKS} or more whitespace"
                f" characters in a row from character {run.start()} on: shorten the run"
            )
        return self.added.encode(text, self.encoding.encode_ordinary)


def build(name: str, files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    """The tokenizer in files {name: content}; folder only names them in errors.

    files: one of vocab.bpe + encoder.json, vocab.json + merges.txt, tokenizer.json, and what
    `files.BESIDE` lists. Raises TokenizerError on anything that could change an id unnoticed.
    """
    import tiktoken

    if "tokenizer.json" in files:
        source = folder / "tokenizer.json"
        vocabulary = _from_tokenizer_json(source, files["tokenizer.json"])
    else:
        merges_name = "vocab.bpe" if "vocab.bpe" in files else "merges.txt"
        source = folder / ("encoder.json" if "encoder.json" in files else "vocab.json")
        vocabulary = _from_two_files(source, folder / merges_name, files)
    ids, control = vocabulary.ids, vocabulary.control
    if ENDOFTEXT in ids:
        control.setdefault(ENDOFTEXT, ids[ENDOFTEXT])
    literal = vocabulary.raw | vocabulary.added | control
    for token, i in literal.items():
        if ids.get(token, i) != i:
            raise TokenizerError(
                f"{source}: token {token!r} has id {ids.get(token)} in the vocabulary but {i}"
                " among the added tokens: fetch it again"
            )
    known = ids | literal
    check_ids(source, known)
    end = ENDOFTEXT if ENDOFTEXT in control else None
    roles = read_roles(folder, files, known, control, Roles(end, end, None, vocabulary.add_bos))
    control |= {t: known[t] for t in (roles.bos, roles.eos, roles.pad) if t is not None}

    ranks = _ranks(source, vocabulary)
    literal |= control
    pieces = {i: _bytes_of(t) or t.encode() for t, i in ids.items() if t not in literal}
    pieces |= {i: token.encode() for token, i in literal.items()}
    kept = {n: files[n] for n in files if n not in ("config.json", "special_tokens_map.json")}
    return Tokenizer(
        name=name,
        fingerprint=fingerprint(
            "byte-level BPE",
            vocabulary.nfc,
            *(
                sorted(m.items())
                for m in (ranks, vocabulary.raw, vocabulary.added, control, pieces)
            ),
        ),
        bos=None if roles.bos is None else known[roles.bos],
        eos=None if roles.eos is None else known[roles.eos],
        pad=None if roles.pad is None else known[roles.pad],
        add_bos=roles.add_bos,
        control=control,
        pieces=pieces,
        encode_text=TextEncoder(
            tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks=ranks, special_tokens={}),
            Cutter(vocabulary.added),
            vocabulary.nfc,
        ),
        files=kept | {"tokenizer_config.json": roles_config(folder, files, roles)},
        added=vocabulary.raw,
    )


def _bytes_of(token: str) -> bytes | None:
    """The bytes that a token of the vocabulary spells, None if it is not spelt in bytes."""
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError:
        return None


def _ranks(source: Path, vocabulary: Vocabulary) -> dict[bytes, int]:
    """tiktoken's table: the single bytes and every reachable merge, with their ids."""
    ids = vocabulary.ids
    single = {BYTE_OF[t]: i for t, i in ids.items() if t in BYTE_OF}
    if absent := set(range(256)) - single.keys() - NEVER_IN_UTF8:
        raise TokenizerError(
            f"{source} has no token for byte 0x{min(absent):02x}: text with it cannot be encoded;"
            " train the tokenizer with the full byte alphabet"
        )
    ranks = {bytes([b]): i for b, i in single.items()}
    pairs: list[tuple[bytes, bytes]] = []
    last = -1
    for left, right in vocabulary.merges:
        i = ids.get(left + right)
        a, b = _bytes_of(left), _bytes_of(right)
        if i is None or not a or not b or a not in ranks or b not in ranks:
            raise TokenizerError(
                f"{source}: merge {left!r} + {right!r} names a token that is not in the vocabulary"
                " or that no earlier merge makes: do the merges belong to another vocabulary?"
            )
        if i <= last:
            raise TokenizerError(
                f"{source}: ids do not rise in the order of the merges ({left + right!r} has id"
                f" {i}, the merge before it {last}): such a vocabulary is not supported"
            )
        ranks[a + b] = last = i
        pairs.append((a, b))
    for token in unreachable(pairs):
        del ranks[token]
    return ranks


def unreachable(pairs: Sequence[tuple[bytes, bytes]]) -> Set[bytes]:
    """Tokens a + b whose own bytes, merged by pairs in order, do not end as that one token.

    A part must be a byte or an earlier a + b. The last state would be [a, b]; undoing the later of
    the merges that made the two neighbours gives the neighbours at that edge before it. If some
    such neighbours are listed earlier than the merge that took one of them away, they merged
    instead. Of equal merges the leftmost comes first.
    """
    rank = {a + b: n for n, (a, b) in enumerate(pairs)}
    lost: set[bytes] = set()
    for a, b in pairs:
        if a in lost or b in lost or not _meet(a, b, pairs, rank):
            lost.add(a + b)
    return lost


def _meet(
    x: bytes, y: bytes, pairs: Sequence[tuple[bytes, bytes]], rank: Mapping[bytes, int]
) -> bool:
    """Whether no earlier merge crosses the edge between x and y."""
    limit = rank[x + y]
    while True:
        across = rank.get(x + y, limit)
        if across < limit and pairs[across] == (x, y):
            return False
        of_x, of_y = rank.get(x, -1), rank.get(y, -1)  # -1: a byte, there from the start
        if of_x > of_y:
            limit, x = of_x, pairs[of_x][1]
        elif of_y >= 0:
            limit, y = of_y + 1, pairs[of_y][0]  # + 1: an equal merge at the edge is further left
        else:
            return True


def _from_two_files(source: Path, merges: Path, files: Mapping[str, bytes]) -> Vocabulary:
    """GPT-2's own layout, under OpenAI's or Hugging Face's names."""
    lines = parse_text(merges, files[merges.name]).split("\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r")
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, blank, right = line.partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(
                f"{merges}, line {number}: {line!r} is not a merge: expected two tokens"
            )
        pairs.append((left, right))
    name = "added_tokens.json"
    control = parse_object(source.with_name(name), files.get(name, b"{}"))
    return Vocabulary(
        parse_object(source, files[source.name]), pairs, {}, {}, control, nfc=False, add_bos=False
    )


def _from_tokenizer_json(source: Path, content: bytes) -> Vocabulary:
    """The tokenizer.json of Hugging Face, if all its components are known here."""
    data = parse_object(source, content)
    try:
        return _from_components(source, data)
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(
            f"{source} is not laid out as a tokenizer.json ({type(error).__name__}: {error}): fetch"
            " it again, or pass another file"
        ) from None


def _from_components(source: Path, data: dict[str, Any]) -> Vocabulary:
    def require(supported: bool, what: str, value: Any) -> None:
        if not supported:
            raise TokenizerError(
                f"{source}: {what} {json.dumps(value)[:80]} is not supported: only byte-level BPE"
                " as in GPT-2 and GPT-NeoX, or with byte_fallback as in Gemma, is"
            )

    model, normalizer, words = data["model"], data.get("normalizer"), data.get("pre_tokenizer")
    require(model.get("type", "BPE") == "BPE", "model type", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        require(not model.get(option), f"model option {option}", model.get(option))
    require(normalizer in (None, {"type": "NFC"}), "normalizer", normalizer)
    require(
        words is not None
        and words["type"] == "ByteLevel"
        and words["add_prefix_space"] is False
        and words.get("use_regex", True) is True,
        "pre_tokenizer",
        words,
    )
    decoder = data.get("decoder")
    require(decoder is None or decoder["type"] == "ByteLevel", "decoder", decoder)

    after = data.get("post_processor")
    add_bos = False
    if after is not None and after["type"] == "TemplateProcessing":
        added_at = ["SpecialToken" in item for item in after["single"]]
        require(added_at in ([False], [True, False]), "post_processor", after["single"])
        add_bos = added_at[0]
    else:
        require(after is None or after["type"] == "ByteLevel", "post_processor", after)

    raw: dict[str, int] = {}
    added: dict[str, int] = {}
    control: dict[str, int] = {}
    for token in data.get("added_tokens") or ():
        for option in ("single_word", "lstrip", "rstrip"):
            require(not token.get(option), f"added token with {option}", token)
        require(is_text(token["content"]), "added token", token)
        always = raw if token.get("normalized") is False else added
        (control if token["special"] else always)[token["content"]] = token["id"]

    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    for merge in merges:
        if [type(part) for part in merge] != [str, str]:
            raise TokenizerError(f"{source}: merge {merge!r} is not two tokens: fetch it again")
    pairs = [(left, right) for left, right in merges]
    vocab = dict(model["vocab"].items())
    return Vocabulary(vocab, pairs, raw, added, control, normalizer is not None, add_bos)
