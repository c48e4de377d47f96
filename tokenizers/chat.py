"""Conversations to text and to token ids with labels on what the assistant wrote.

`render` writes a conversation with a `templates.Template` and notes which characters are trained:
each assistant content and its end-of-turn token, so that a model learns to stop, and on request the
newline that follows. `encode` tokenises that text once, as a whole, and trains every token that
overlaps such a span. Where a token's characters are follows from the byte lengths of the tokens; if
these do not add up to the text, the conversation is refused rather than labelled by guess.

Contents that spell a control token become that token, as with Hugging Face's templates.
"""

import functools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenizers.base import Tokenizer
from tokenizers.files import TokenizerError
from tokenizers.templates import Template

UNTRAINED = -100

Messages = Sequence[Mapping[str, Any]]  # each with "role" and "content"


class ChatError(TokenizerError):
    """A conversation that no template can render; says which message, and what to do."""


class Unaligned(TokenizerError):
    """A text whose tokens cannot be traced back to its characters."""


class Rendered(NamedTuple):
    """A conversation's text and its trained characters, [start, end) each, in order."""

    text: str
    spans: list[tuple[int, int]]


class Encoded(NamedTuple):
    """Token ids and labels, int32 [T]: a token's own id where it is trained, else -100."""

    input_ids: np.ndarray
    labels: np.ndarray
    cut: int  # tokens beyond the length


def render(
    messages: Messages,
    template: Template,
    add_generation_prompt: bool = False,
    train_newline: bool = False,
) -> Rendered:
    """The conversation as text, BOS included, and the characters to train.

    add_generation_prompt: end with the header of an assistant's turn. train_newline: also train the
    newline after an assistant's end of turn, as TRL does. Raises ChatError unless the messages are
    an optional system message, then user and assistant in turns, all with a string as content.
    """
    _check(messages, template)
    text, spans = template.bos, []
    folded = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "system" and template.system == "folded":
            folded = content + "\n\n"
            continue
        if template.trim:
            content = content.strip()
        text += template.headers[role]
        start = len(text)
        text += folded + content + template.ends[role]
        folded = ""
        end = len(text)
        if role == "user" or template.last_newline or number < len(messages) - 1:
            text += "\n"
        if role == "assistant":
            spans.append((start, len(text) if train_newline else end))
    if add_generation_prompt:
        text += template.headers["assistant"]
    return Rendered(text, spans)


def _check(messages: Messages, template: Template) -> None:
    if not messages:
        raise ChatError("the conversation is empty: give it a user message or leave it out")
    system = messages[0].get("role") == "system"
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        where = f"message {number}"
        if role not in ("system", "user", "assistant"):
            raise ChatError(
                f"{where} has the role {role!r}: rename it to system, user or assistant, or leave"
                " the conversation out"
            )
        if not isinstance(content, str):
            raise ChatError(
                f"{where} ({role}) has no string as content but {type(content).__name__}: only"
                " text can be rendered"
            )
        expected = ("user", "assistant")[(number - system) % 2]
        if role == "system" and number == 0:
            if template.system == "refused":
                raise ChatError(
                    f"{where}: chat template {template.name} has no system role: put the text into"
                    " the first user message, or use the template gemma"
                )
        elif role != expected:
            before = messages[number - 1]["role"] if number else "the beginning"
            raise ChatError(
                f"{where} is of {role} after {before} where {expected} was due: turns must"
                " alternate, user first; merge or reorder them, or leave the conversation out"
            )
    if len(messages) == system:
        raise ChatError("the conversation has only a system message: add a user message")


def encode(
    tokenizer: Tokenizer,
    messages: Messages,
    template: Template,
    length: int | None = None,
    train_newline: bool = False,
) -> Encoded:
    """Ids and labels of a conversation, its first `length` tokens; see `render`.

    Raises ChatError as `render` does, and Unaligned if the tokens do not spell the text, as where a
    tokenizer cannot tell two characters apart. Labels may all be -100: when nothing is left to
    train, or nothing was.
    """
    text, spans = render(messages, template, train_newline=train_newline)
    ids = tokenizer.encode(text, special=True)
    bounds = _bounds(tokenizer, text, ids, [place for span in spans for place in span])
    ends_T = np.cumsum(_widths(tokenizer)[ids])
    starts_T = np.concatenate([[0], ends_T[:-1]])
    trained_T = np.zeros(len(ids), bool)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        first = np.searchsorted(ends_T, start, side="right")
        trained_T[first : np.searchsorted(starts_T, end, side="left")] = True
    labels = np.where(trained_T, ids, UNTRAINED).astype(np.int32)
    cut = 0 if length is None else max(len(ids) - length, 0)
    return Encoded(ids[: len(ids) - cut], labels[: len(ids) - cut], cut)


def _bounds(tokenizer: Tokenizer, text: str, ids: np.ndarray, places: list[int]) -> list[int]:
    """Where the characters at `places` begin among the bytes that the tokens spell.

    These are the text's own bytes unless the tokenizer normalises. Then each part of the text
    between two places is put through it alone, which says how long the part became.
    """
    decoded = tokenizer.decode_bytes(ids)
    parts = [text[a:b] for a, b in _pairs([0, *places, len(text)])]
    try:
        spelt = [part.encode() for part in parts]
    except UnicodeEncodeError:
        raise Unaligned("half of a surrogate pair, which has no bytes: remove it") from None
    if b"".join(spelt) != decoded:
        spelt = [tokenizer.decode_bytes(tokenizer.encode(part, special=True)) for part in parts]
        if b"".join(spelt) != decoded or not _same_text(decoded, text):
            raise Unaligned(
                f"the tokens of {tokenizer.name} do not spell the text of the conversation: it has"
                " characters that this tokenizer changes"
            )
    return np.cumsum([len(part) for part in spelt])[:-1].tolist()


def _pairs(values: list[int]) -> Iterator[tuple[int, int]]:
    return zip(values[:-1], values[1:], strict=True)


def _same_text(decoded: bytes, text: str) -> bool:
    """Whether the two differ at most by canonical composition."""
    normal = functools.partial(unicodedata.normalize, "NFC")
    return normal(decoded.decode("utf-8", "replace")) == normal(text)


@functools.lru_cache(maxsize=4)
def _widths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of each id [V], 0 for an id without a token."""
    widths_V = np.zeros(tokenizer.vocab_size, np.int64)
    for i, piece in tokenizer.pieces.items():
        widths_V[i] = len(piece)
    return widths_V
