"""Benchmark items: a context, its choices and the right one; and the tokens they become.

An items file is JSON lines: {"context": str, "choices": [str, ...], "label": int, "id"?: str, ...}.
A choice carries the blank that joins it to the context, as in " 12".

Context and choice are tokenised together, as a model meets them in running text, and cut where the
context alone would end. Blanks at the end of the context move to the choice first, because most
tokenizers put a blank at the start of the next token (the rules of lm-evaluation-harness 0.4.13,
`TemplateLM._encode_pair`). A whole text is scored in windows (its `loglikelihood_rolling`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike, parse_object
from tokenizers import Tokenizer


class Item(NamedTuple):
    """One question; `extra` holds the line's other keys, such as "source"."""

    id: str
    context: str
    choices: tuple[str, ...]
    label: int
    extra: dict[str, Any]

    @property
    def answer(self) -> str:
        return self.choices[self.label]


def read_items(path: PathLike) -> list[Item]:
    """Read an items file; InputError names the file, line and field of the first bad one.

    Items without an id get their line number.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"items file {path} cannot be read ({error.strerror})") from None
    items: dict[str, Item] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            item = _parse(line, f"{path} line {number}", str(number))
            if item.id in items:
                raise InputError(f"{path} line {number}: id {item.id!r} is used twice; ids pair "
                                 "the items of two runs, so make them unique")  # fmt: skip
            items[item.id] = item
    if not items:
        raise InputError(f"{path} holds no items")
    return list(items.values())


def _parse(line: bytes, where: str, default_id: str) -> Item:
    fields = parse_object(line, where)

    def take(name: str, what: str, good: Callable[[Any], bool]) -> Any:
        if name not in fields:
            raise InputError(f"{where}: {name!r} is missing; it must be {what}")
        value = fields.pop(name)
        if not good(value):
            raise InputError(f"{where}: {name!r} must be {what}, got {value!r}")
        return value

    def texts(value: Any) -> bool:
        # Lengths normalise scores, so a choice needs a character besides its joining blank.
        strings = isinstance(value, list) and all(isinstance(choice, str) for choice in value)
        return strings and bool(value) and all(map(characters, value))

    fields.setdefault("id", default_id)
    context = take("context", "a string", lambda value: isinstance(value, str))
    choices = take("choices", 'a list of non-empty strings, such as [" 12", " 7"]', texts)
    label = take("label", f"the right choice's index, 0 to {len(choices) - 1}",
                 lambda value: type(value) is int and 0 <= value < len(choices))  # fmt: skip
    name = take("id", "a string or an integer", lambda value: type(value) in (str, int))
    return Item(str(name), context, tuple(choices), label, fields)


def characters(choice: str) -> int:
    """Unicode characters of a choice without its joining blank: the length `acc_norm` uses."""
    return len(choice.removeprefix(" "))


class Prompt(NamedTuple):
    """Tokens of a context and its continuation, which begins at `start` >= 1.

    alone: the continuation had to be tokenised by itself.
    """

    ids: np.ndarray
    start: int
    alone: bool = False


def encode(tokenizer: Tokenizer, text: str, add_bos: bool | None = None) -> np.ndarray:
    """int32 [T]: the ids of a text, after BOS if the tokenizer asks for it.

    Text that spells a control token is that token, so rendered chat templates work, and a text that
    begins with BOS gets no second one. add_bos: whether BOS comes first, whatever the tokenizer
    says; InputError if it has none.
    """
    ids = tokenizer.encode(text, special=True)
    if add_bos and tokenizer.bos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no BOS to add; leave --add-bos out")
    if tokenizer.bos is None or not (tokenizer.add_bos if add_bos is None else add_bos):
        return ids
    return _after(tokenizer.bos, ids)


def _after(first: int, ids: np.ndarray) -> np.ndarray:
    """The ids after `first`, which is not put there twice."""
    if len(ids) and ids[0] == first:
        return ids
    return np.concatenate([np.array([first], np.int32), ids])


def _beginning(tokenizer: Tokenizer) -> int:
    """BOS or EOS, what a first token is predicted from."""
    first = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    if first is None:
        raise InputError(f"tokenizer {tokenizer.name} has neither BOS nor EOS to stand for an "
                         "empty context; give every item a context")  # fmt: skip
    return first


def tokenise(
    tokenizer: Tokenizer,
    context: str,
    continuations: Sequence[str],
    add_bos: bool | None = None,
) -> list[Prompt]:
    """One prompt for each continuation of a context; see `encode` for BOS.

    An empty context stands for a lone BOS (or EOS), whatever add_bos says, since the first token
    must be predicted from something. A continuation that merges into the context's last token would
    be left without tokens, so it is tokenised alone.
    """
    words = context.rstrip()
    blanks = context[len(words) :]
    first = None if words else _beginning(tokenizer)

    def begun(text: str) -> np.ndarray:
        if first is None:
            return encode(tokenizer, text, add_bos)
        return _after(first, tokenizer.encode(text, special=True))

    context_ids = begun(words)
    prompts = []
    for continuation in continuations:
        tail = begun(words + blanks + continuation)[len(context_ids) :]
        alone = not len(tail)
        if alone:
            tail = tokenizer.encode(blanks + continuation, special=True)
        prompts.append(Prompt(np.concatenate([context_ids, tail]), len(context_ids), alone))
    return prompts


def rolling(
    tokenizer: Tokenizer, text: str, length: int, add_bos: bool | None = None
) -> list[Prompt]:
    """A text in windows that predict each of its tokens once, none for an empty text.

    Windows follow each other and predict `length` tokens from one token before them; the last takes
    as much of the text before it as fits. The first begins with BOS (or EOS), and if `encode` put a
    BOS into the text too, that one is predicted: the harness's numbers are with two of them.
    """
    if not text:
        return []
    ids = encode(tokenizer, text, add_bos)
    prompts = [Prompt(np.concatenate([[_beginning(tokenizer)], ids[:length]], dtype=np.int32), 1)]
    for at in range(length, len(ids), length):
        end = min(at + length, len(ids))
        begin = end - length - 1
        prompts.append(Prompt(ids[begin:end], at - begin))
    return prompts


class Context(NamedTuple):
    """What a text is generated from; `cut` tokens before `ids` did not fit."""

    ids: np.ndarray
    cut: int


def read_context(
    tokenizer: Tokenizer, text: str, room: int, add_bos: bool | None = None
) -> Context:
    """The last `room` >= 1 tokens of a text (see `encode`); an empty one is a lone BOS (or EOS)."""
    ids = encode(tokenizer, text, add_bos)
    if not len(ids):
        ids = np.array([_beginning(tokenizer)], np.int32)
    cut = max(len(ids) - room, 0)
    return Context(ids[cut:], cut)


def keep_last(prompt: Prompt, size: int, where: str) -> Prompt:
    """The prompt's last `size` tokens; InputError unless one is left before the continuation."""
    excess = max(len(prompt.ids) - size, 0)
    if excess >= prompt.start:
        raise InputError(
            f"{where} has a choice of {len(prompt.ids) - prompt.start} tokens where at most "
            f"{size - 1} fit; shorten it or use a longer length or context"
        )
    return prompt._replace(ids=prompt.ids[excess:], start=prompt.start - excess)
