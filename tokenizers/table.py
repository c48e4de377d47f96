"""BPE over characters with byte fallback (SentencePiece's, and Gemma's), run by tiktoken.

Dims: R ranks, T tokens, K ranks that stand for bytes, V tokens of the vocabulary.

tiktoken merges bytes; here characters are what merges, and one that has no token becomes the tokens
of its bytes. So ranks are not ids: the first are the 256 bytes, then come the beginnings of the
UTF-8 of every known character and these characters, which puts characters together before anything
else merges, then what is always a token of its own, then the merged tokens, best first. An array
maps ranks to ids. A space is spelt U+2581 in the files and is one byte here; the two are the same
character to these tokenizers.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenizers.base import Cutter, Ids
from tokenizers.roles import Roles

if TYPE_CHECKING:
    import tiktoken

SPACE = "\u2581"


class Vocabulary(NamedTuple):
    """What a file says. Strings have spaces as spaces, except those of `added` and `control`."""

    pieces: dict[int, bytes]  # what each id decodes to
    byte_ids: list[int]  # of <0x00> to <0xFF>
    characters: dict[str, int]
    merged: list[tuple[str, int]]  # every token that merges make, best first
    frozen: dict[str, int]  # always cut out of the text once U+2581 is a space
    added: dict[str, int]  # always cut out before that
    control: dict[str, int]
    roles: Roles  # unless a file beside says otherwise


class Table(NamedTuple):
    """tiktoken's table and what comes before and after it; only arrays and plain values."""

    pattern: str
    tokens: bytes  # one after the other
    ends_R: np.ndarray  # int32
    ids_R: np.ndarray  # int32; -1 - k: the bytes in row k of fallback_K4
    fallback_K4: np.ndarray  # int32, -1 where there are fewer than four bytes
    frozen: dict[str, int]


class Pieces(Mapping[int, bytes]):
    """The bytes of each id, taken out of one string on first use."""

    def __init__(self, ids_V: np.ndarray, joined: bytes, ends_V: np.ndarray):
        self._ids_V, self._joined, self._ends_V = ids_V, joined, ends_V

    @functools.cached_property
    def _dict(self) -> dict[int, bytes]:
        return dict(zip(self._ids_V.tolist(), split(self._joined, self._ends_V), strict=True))

    def __getitem__(self, i: int) -> bytes:
        return self._dict[i]

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids_V.tolist())

    def __len__(self) -> int:
        return len(self._ids_V)

    def __or__(self, more: Mapping[int, bytes]) -> dict[int, bytes]:
        return {**self._dict, **more}

    def __reduce__(self):
        return Pieces, (self._ids_V, self._joined, self._ends_V)


def split(joined: bytes, ends: np.ndarray) -> list[bytes]:
    stops = ends.tolist()
    return [joined[a:b] for a, b in zip([0, *stops], stops, strict=False)]


def ends_of(parts: Sequence[bytes]) -> np.ndarray:
    return np.cumsum([len(part) for part in parts], dtype=np.int32)


class TextEncoder:
    """Plain text to ids. Pickles without what tiktoken makes of the table."""

    def __init__(self, table: Table):
        self.table = table

    def __reduce__(self):
        return TextEncoder, (self.table,)

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        return encoding(self.table.pattern, split(self.table.tokens, self.table.ends_R))

    @functools.cached_property
    def _frozen(self) -> Cutter:
        return Cutter(self.table.frozen)

    def __call__(self, text: str) -> Ids:
        text = text.replace(SPACE, " ")
        return self._frozen.encode(text, self._merged) if self.table.frozen else self._merged(text)

    def _merged(self, text: str) -> np.ndarray:
        ranks_T = self._encoding.encode_to_numpy(text, disallowed_special=())
        ids_T = self.table.ids_R[ranks_T]
        unknown_T = ids_T < 0
        if not unknown_T.any():
            return ids_T
        sizes_T = np.ones(len(ids_T), np.int64)
        sizes_T[unknown_T] = (self.table.fallback_K4 >= 0).sum(1)[-1 - ids_T[unknown_T]]
        ids = np.repeat(ids_T, sizes_T)
        nth = np.arange(len(ids)) - np.repeat(np.cumsum(sizes_T) - sizes_T, sizes_T)
        bytes_of = ids < 0
        ids[bytes_of] = self.table.fallback_K4[-1 - ids[bytes_of], nth[bytes_of]]
        return ids


def encoding(pattern: str, tokens: Sequence[bytes]) -> "tiktoken.Encoding":
    """tiktoken for tokens in order of rank. Its numpy route looks for special tokens at every
    character unless there are some to look for; the one here is never allowed, so never found."""
    import tiktoken

    ranks = dict(zip(tokens, range(len(tokens)), strict=True))
    return tiktoken.Encoding(
        "table", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"\0taproot\0": len(ranks)}
    )


def build(vocabulary: Vocabulary, unsure: bool) -> tuple[Table, dict[str, int]]:
    """The table, and what is left of `added` for the caller to cut out.

    Runs of one character that are always tokens, such as newlines, are cut by tiktoken's own regex.
    It also cuts before spaces, where no token has a space inside. unsure: some of merged may be out
    of reach of merges.
    """
    runs, frozen, added = _runs(vocabulary)
    never = "".join(c for c, (first, _) in runs.items() if first == 1)
    cut = re.compile(f"[{re.escape(never)}]" if never else "(?!)").search
    merged = [(token, i) for token, i in vocabulary.merged if not cut(token)]
    splits = not any(" " in token.lstrip(" ") for token, _ in merged)
    if not splits and " " in runs:
        first, last = runs.pop(" ")
        frozen |= {" " * n: vocabulary.frozen[" " * n] for n in range(first, last + 1)}
    always = vocabulary.added | vocabulary.frozen
    run_ids = {c * n: always[c * n] for c, (a, b) in runs.items() for n in range(a, b + 1)}

    characters = vocabulary.characters | {t: i for t, i in run_ids.items() if len(t) == 1}
    known = set("".join(token for token, _ in merged)).union(characters)
    ids: list[int] = []
    fallback: list[list[int]] = []

    def id_of(token: bytes, i: int | None = None) -> int:
        if i is not None:
            return i
        spelt = [vocabulary.byte_ids[b] for b in token.replace(b" ", SPACE.encode())]
        fallback.append(spelt + [-1] * (4 - len(spelt)))
        return -len(fallback)

    tokens = [bytes([b]) for b in range(256)]
    ids += [id_of(t, characters.get(chr(b)) if b < 128 else None) for b, t in enumerate(tokens)]
    wide = [(c, c.encode()) for c in sorted(known) if ord(c) >= 128]
    starts = sorted({u[:n] for _, u in wide for n in range(2, len(u))})
    tokens += starts + [u for _, u in wide]
    ids += [id_of(start) for start in starts] + [id_of(u, characters.get(c)) for c, u in wide]
    longer = {t: i for t, i in run_ids.items() if len(t) > 1}
    merged = [*longer.items(), *((token, i) for token, i in merged if token not in longer)]
    pattern = _pattern(runs, splits)
    merged_tokens = [token.encode() for token, _ in merged]
    keep = _reached(tokens, merged_tokens, known) if unsure else np.ones(len(merged), bool)
    keep[: len(longer)] = True
    tokens += [token for token, kept in zip(merged_tokens, keep.tolist(), strict=True) if kept]
    ids += [i for (_, i), kept in zip(merged, keep.tolist(), strict=True) if kept]
    ids_R, fallback_K4 = np.array(ids, np.int32), np.array(fallback or [[-1] * 4], np.int32)
    table = Table(pattern, b"".join(tokens), ends_of(tokens), ids_R, fallback_K4, frozen)
    return table, added


def _runs(
    vocabulary: Vocabulary,
) -> tuple[dict[str, tuple[int, int]], dict[str, int], dict[str, int]]:
    """{character: (shortest, longest)} of runs that a regex can cut, and other frozen and added.

    All lengths between the two must be there, from 1 on, or from 2 for spaces; and the character
    must be in no other token that is cut, so that the order of cutting does not matter.
    """
    cut = [vocabulary.frozen, vocabulary.added, vocabulary.control]
    mixed = {c for tokens in cut for t in tokens if len(set(t)) > 1 for c in t}
    runs = {}
    for n, tokens in enumerate(cut[:2]):
        for c in {t[0] for t in tokens} - mixed - ({" ", SPACE} if n else set()):
            lengths = sorted(len(t) for t in tokens if t[0] == c)
            alone = not any(t[0] == c for other in cut if other is not tokens for t in other)
            first = 2 if c == " " and lengths[0] == 2 else 1
            if alone and lengths == list(range(first, lengths[-1] + 1)):
                runs[c] = (first, lengths[-1])
    frozen, added = ({t: i for t, i in m.items() if t[0] not in runs} for m in cut[:2])
    return runs, frozen, added


def _pattern(runs: Mapping[str, tuple[int, int]], splits: bool) -> str:
    """Words for tiktoken; without look-around, so that its regex takes linear time."""

    def escaped(c: str) -> str:
        return rf"\x{{{ord(c):x}}}"

    parts = [rf"{escaped(c)}{{{first},{last}}}" for c, (first, last) in runs.items()]
    not_in_words = "".join(escaped(c) for c in runs if c != " ")
    if " " in runs and runs[" "][0] == 2:
        parts.append(rf"\x20?[^\x20{not_in_words}]+|\x20")
    elif splits and " " not in runs:
        parts.append(rf"\x20*[^\x20{not_in_words}]+|\x20+")
    elif runs:
        parts.append(f"[^{''.join(map(escaped, runs))}]+")
    else:
        parts.append("(?s:.+)")
    return "|".join(parts)


def _reached(base: Sequence[bytes], merged: Sequence[bytes], known: set[str]) -> np.ndarray:
    """Which of merged their own bytes merge to.

    tiktoken takes a word that is in its table at once, so each is written with a character that no
    token has behind it; then it must come out whole at the place where it stands.
    """
    stop = next(c for c in map(chr, range(0x10FFFF, 0, -1)) if c not in known)
    words = encoding(f"[^{stop}]*{stop}", [*base, *merged])
    text = b"".join([token + stop.encode() for token in merged]).decode()
    ranks_T = words.encode_to_numpy(text, disallowed_special=())
    sizes_R = np.array([len(token) for token in [*base, *merged]])
    starts_T = np.cumsum(sizes_R[ranks_T]) - sizes_R[ranks_T]
    sizes = sizes_R[len(base) :] + len(stop.encode())
    places = np.cumsum(sizes) - sizes
    at = np.searchsorted(starts_T, places)
    return (ranks_T[at] == np.arange(len(merged)) + len(base)) & (starts_T[at] == places)
