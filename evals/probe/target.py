"""What a probe is asked about: one token, the tokens that match a pattern, or a column's labels."""

import re
from typing import Literal, NamedTuple

import numpy as np

from core.errors import InputError
from tokenizers import Tokenizer

NEAREST = 5  # alternatives that are offered


class Target(NamedTuple):
    """ids [K] int32: the tokens meant; none for a column of labels."""

    kind: Literal["token", "regex", "label"]
    text: str
    ids: np.ndarray

    def __str__(self) -> str:
        return f"{'target' if self.kind == 'token' else self.kind} {self.text!r}"


def token(text: str, tokenizer: Tokenizer) -> Target:
    """The one token that `text` is; InputError with what there is instead if it is none or many."""
    ids = tokenizer.encode(text)
    if len(ids) == 1:
        return Target("token", text, ids.astype(np.int32))
    if not len(ids):
        raise InputError("--target is empty; give the text of one token")
    pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
    others = [text[1:] if text.startswith(" ") else f" {text}", *_near(text, tokenizer)]
    single = [t for t in dict.fromkeys(others) if t and len(tokenizer.encode(t)) == 1][:NEAREST]
    remedy = f"; single tokens near it: {', '.join(map(repr, single))}" if single else ""
    raise InputError(f"--target {text!r} is {len(ids)} tokens ({pieces}){remedy}; give one of "
                     "them, or several tokens with --regex")  # fmt: skip


def _near(text: str, tokenizer: Tokenizer) -> list[str]:
    """Tokens that differ in case or spaces, or continue the text, or begin it, in this order."""
    bare = text.strip().lower()
    found: list[tuple[int, int, str]] = []
    for piece in _texts(tokenizer).values():
        near = piece.strip().lower()
        if near and bare:
            kind = 0 if near == bare else 1 if near.startswith(bare) else 2
            if kind < 2 or bare.startswith(near):
                found.append((kind, abs(len(near) - len(bare)), piece))
    return [piece for _, _, piece in sorted(found)]


def regex(pattern: str, tokenizer: Tokenizer) -> Target:
    """The tokens, control tokens left out, in whose text the pattern is found."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise InputError(f"--regex {pattern!r} is no regular expression ({error})") from error
    texts = _texts(tokenizer)
    ids = [i for i, text in texts.items() if compiled.search(text)]
    if not ids or len(ids) == len(texts):
        which = "every token" if ids else "no token"
        raise InputError(f"--regex {pattern!r} matches {which} of tokenizer {tokenizer.name}; "
                         "a space before a word is part of its token")  # fmt: skip
    return Target("regex", pattern, np.array(sorted(ids), np.int32))


def _texts(tokenizer: Tokenizer) -> dict[int, str]:
    control = set(tokenizer.control.values())
    return {
        i: piece.decode("utf-8", "replace")
        for i, piece in tokenizer.pieces.items()
        if i not in control
    }
