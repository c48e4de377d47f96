"""Benchmark items: a context, its choices and the right one; and the tokens they become.

An items file is JSON lines: {"context": str, "choices": [str, ...], "label": int, "id"?: str, ...}.
A choice carries the blank that joins it to the context, as in " 12".

Context and choice are tokenised together, as a model meets them in running text, and cut where the
context alone would end. Blanks at the end of the context move to the choice first, because most
tokenizers put a blank at the start of the next token (the rules of lm-evaluation-harness 0.4.13,
`TemplateLM._encode_pair`).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike
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
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where} is no JSON object; write context, choices and label")

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


def tokenise(tokenizer: Tokenizer, context: str, continuations: Sequence[str]) -> list[Prompt]:
    """One prompt for each continuation of a context.

    Text that spells a control token is that token, so rendered chat templates work. BOS comes first
    if the tokenizer asks for it and the text does not begin with it. An empty context stands for a
    lone BOS (or EOS), since the first token must be predicted from something. A continuation that
    merges into the context's last token would be left without tokens, so it is tokenised alone.
    """
    words = context.rstrip()
    blanks = context[len(words) :]
    first = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    begin = np.array([] if first is None else [first], np.int32)
    if not words and first is None:
        raise InputError(f"tokenizer {tokenizer.name} has neither BOS nor EOS to stand for an "
                         "empty context; give every item a context")  # fmt: skip

    def encode(text: str) -> np.ndarray:
        ids = tokenizer.encode(text, special=True)
        wanted = (tokenizer.add_bos or not words) and not np.array_equal(ids[:1], begin)
        return np.concatenate([begin, ids]) if wanted else ids

    context_ids = encode(words)
    prompts = []
    for continuation in continuations:
        tail = encode(words + blanks + continuation)[len(context_ids) :]
        alone = not len(tail)
        if alone:
            tail = tokenizer.encode(blanks + continuation, special=True)
        prompts.append(Prompt(np.concatenate([context_ids, tail]), len(context_ids), alone))
    return prompts


def keep_last(prompt: Prompt, size: int, item: Item) -> Prompt:
    """The prompt's last `size` tokens; InputError unless one is left before the continuation."""
    excess = max(len(prompt.ids) - size, 0)
    if excess >= prompt.start:
        raise InputError(
            f"item {item.id!r} has a choice of {len(prompt.ids) - prompt.start} tokens where at "
            f"most {size - 1} fit; shorten it or use a longer length or context"
        )
    return prompt._replace(ids=prompt.ids[excess:], start=prompt.start - excess)
