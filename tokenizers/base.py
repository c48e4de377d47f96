"""What every tokenizer is: a table of pieces, a function for plain text, and control tokens.

A kind (bytes, byte-level BPE, Gemma) is a function that builds a `Tokenizer`, not a subclass of it.
Control tokens such as <|endoftext|> are cut out of the text before that function sees it, longest
first, and only on request: by default text that spells one is ordinary text. Added tokens are cut
out in the same pass, and always.
"""

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from tokenizers.files import TokenizerError, write_files

Ids = Sequence[int] | np.ndarray


class Cutter:
    """Cuts listed strings out of a text, leftmost then longest, and encodes what lies between."""

    def __init__(self, tokens: Mapping[str, int]):
        self.tokens = tokens
        try:
            self.pattern = re.compile(f"({_any_of(sorted(tokens)) if tokens else '(?!)'})")
        except RecursionError:
            raise TokenizerError(
                f"of {len(tokens)} added tokens hundreds begin one another: leave some out"
            ) from None

    def encode(self, text: str, between: Callable[[str], Ids], as_text: Container[str] = ()) -> Ids:
        """Ids of text; `between` encodes what is not a token. A token in as_text stays text, and
        so does whatever overlaps it."""
        parts = self.pattern.split(text)  # text, token, text, ..., token, text
        if len(parts) == 1:
            return between(text)
        chunks: list[Ids] = []
        rest = parts[0]
        for token, following in zip(parts[1::2], parts[2::2], strict=True):
            if token in as_text:
                rest += token + following
                continue
            if rest:
                chunks.append(between(rest))
            chunks.append((self.tokens[token],))
            rest = following
        if rest:
            chunks.append(between(rest))
        if any(isinstance(chunk, np.ndarray) for chunk in chunks):
            return np.concatenate([_as_array(chunk) for chunk in chunks])
        return list(itertools.chain.from_iterable(chunks))


def _any_of(tokens: Sequence[str]) -> str:
    """A pattern for the longest of tokens, which are sorted; shared beginnings are read once."""
    head = os.path.commonprefix([tokens[0], tokens[-1]])
    rest = [token[len(head) :] for token in tokens]
    ends = rest[0] == ""
    groups = itertools.groupby(rest[ends:], key=lambda token: token[0])
    branches = "|".join(_any_of(list(group)) for _, group in groups)
    return re.escape(head) + (f"(?:{branches}){'?' * ends}" if branches else "")


def _as_array(ids: Ids) -> np.ndarray:
    return ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int32, len(ids))


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to token ids and back.

    name is for people. fingerprint is a sha256 over all that decides which ids a text gets and
    which bytes an id stands for: equal for equal tokenizers, in whatever layout and place their
    files are. bos, eos, pad and add_bos, which say how ids are used, are not part of it.
    encode_text gives a sequence of ids, or an int32 array [T].
    """

    name: str
    fingerprint: str
    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool  # the model expects bos first; `encode` leaves adding it to the caller
    control: Mapping[str, int] = field(repr=False)
    pieces: Mapping[int, bytes] = field(repr=False)
    encode_text: Callable[[str], Ids] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)  # what `save` writes
    added: Mapping[str, int] = field(default_factory=dict, repr=False)  # cut out of every text

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest id + 1. A model's embedding may have more rows."""
        return max(self.pieces) + 1

    @functools.cached_property
    def _cutter(self) -> Cutter:
        return Cutter({**self.control, **self.added})

    @functools.cached_property
    def _pieces(self) -> dict[int, bytes]:
        return dict(self.pieces)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids, int32 [T]. special: text that spells a control token becomes that token.

        Lone surrogates, which UTF-8 cannot represent, become U+FFFD.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if special or self.added:
            as_text = () if special else self.control.keys() - self.added.keys()
            return _as_array(self._cutter.encode(text, self.encode_text, as_text))
        return _as_array(self.encode_text(text))

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes of ids [T]; not always UTF-8, since a token may end inside a character.

        Raises TokenizerError on an id that no token has.
        """
        try:
            return b"".join([self._pieces[i] for i in np.asarray(ids).tolist()])
        except KeyError as error:
            raise TokenizerError(
                f"tokenizer {self.name} has no token {error}, only {len(self.pieces)} tokens with"
                f" ids 0 to {self.vocab_size - 1}: do the ids come from another tokenizer?"
            ) from None

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids [T], with U+FFFD for what is not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        """Write the files from which `tokenizers.load(folder)` gives this tokenizer again.

        Raises TokenizerError if the folder holds another tokenizer in another layout.
        """
        write_files(Path(folder), self.files)


def fingerprint(*parts: object) -> str:
    """sha256 hex of parts made of tuples, lists, str, bytes, int and bool, all in a fixed order."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()
