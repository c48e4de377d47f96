"""Benchmark items as rows: what attribution asks the training data about.

A row is the context, unsupervised, and an answer, supervised: its loss is the answer's negative
log-probability, the quantity that the scorer reports. Items come from a user's file, or from a
split of benchmarks on which they are not evaluated: training data chosen by what they do to a
question would otherwise be judged by that very question.
"""

import contextlib
import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike
from core.rows import IGNORED, save_rows
from evals.items import Item, Prompt, keep_last, tokenise
from evals.tasks.data import load_split
from evals.tasks.prompts import Options, questions, render_docs
from evals.tasks.task import Doc, Question, Task
from tokenizers import Tokenizer, chat
from tokenizers.templates import Template

Choices = Literal["gold", "all"]


class _Example(NamedTuple):
    """A benchmark's item, what its right answer stands behind, and that answer."""

    doc: Doc
    context: str
    answer: str


class _Entry(NamedTuple):
    """An item's prompts, to be cut alike, and the columns of each; where: its name in errors."""

    where: str
    prompts: list[Prompt]
    columns: list[dict[str, Any]]


def build_query(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    add_eos: bool = False,
    choices: Choices = "gold",
) -> dict[str, Any]:
    """Write the items' rows into the rows folder `out`; returns its `rows.json`.

    length: most tokens of a row; longer contexts are cut on the left, equally for all choices of an
    item, and a choice that does not fit raises InputError. add_eos: the choice must also end.
    Columns: id, and source if any item has one; for `all` also item, choice (from 0) and gold, and
    an id is the item's with the choice's number behind it.
    """
    end = _end(tokenizer, add_eos)
    entries = []
    for item in items:
        wanted = range(len(item.choices)) if choices == "all" else [item.label]
        texts = [item.choices[i] for i in wanted]
        source = item.extra.get("source")
        columns: list[dict[str, Any]] = [
            {"id": item.id, "source": None if source is None else str(source)} for _ in wanted
        ]
        if choices == "all":
            for i, told in zip(wanted, columns, strict=True):
                told |= {"id": f"{item.id}/{i}", "item": item.id, "choice": i,
                         "gold": i == item.label}  # fmt: skip
        prompts = _plain(tokenizer, item.context, texts, end)
        entries.append(_Entry(f"item {item.id!r}", prompts, columns))
    info = {"length": length, "choices": choices, "add_eos": add_eos}
    return _write(out, entries, tokenizer, info)


def build_task_query(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    split: str,
    n: int,
    length: int,
    out: PathLike,
    data: Path | None,
    template: Template | None = None,
    seed: int = 0,
    add_eos: bool = False,
) -> dict[str, Any]:
    """Write a row for each of `n` examples of a split of every task; returns its `rows.json`.

    The examples of a task are drawn by `random.Random(seed)` without replacement and keep their
    order, all of them if there are fewer. Those with a prompt that the task's evaluated split has
    too are left out; their number is None where that split is not at hand. length: as for
    `build_query`. data: as for `load_split`. template: the prompt becomes the user's turn and the
    answer the assistant's. add_eos: the answer must also end, with EOS or the end of the turn.
    Columns: id ("task/index"), task and source (its name), item (the example's own id, else its
    index in the split) and gold (the index of the right choice, null without choices).
    Raises InputError for a split that a task is evaluated on and for a task without answers.
    """
    for task in tasks:
        _check(task, split)
    end = _end(tokenizer, add_eos and template is None)
    entries, counts = [], {}
    for task in tasks:
        examples, counts[task.name] = _draw(task, split, n, data, seed)
        for doc, context, answer in examples:
            if template is None:
                prompts = _plain(tokenizer, context, [answer], end)
            else:
                prompts = [_turns(tokenizer, template, context, answer, add_eos)]
            name = f"{task.name}/{doc.index}"
            told = {"id": name, "task": task.name, "item": str(doc.row.get("id", doc.index)),
                    "gold": doc.gold, "source": task.name}  # fmt: skip
            entries.append(_Entry(f"example {name!r}", prompts, [told]))
    info = {"split": split, "n": n, "seed": seed, "length": length,
            "template": template and template.name, "add_eos": add_eos,
            "left_out": sum(count["left_out"] or 0 for count in counts.values()),
            "tasks": counts}  # fmt: skip
    return _write(out, entries, tokenizer, info)


def _end(tokenizer: Tokenizer, add_eos: bool) -> np.ndarray:
    if add_eos and tokenizer.eos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no EOS to add")
    return np.array([tokenizer.eos] if add_eos else [], np.int32)


def _plain(
    tokenizer: Tokenizer, context: str, answers: Sequence[str], end: np.ndarray
) -> list[Prompt]:
    prompts = tokenise(tokenizer, context, answers)
    return [prompt._replace(ids=np.concatenate([prompt.ids, end])) for prompt in prompts]


def _turns(
    tokenizer: Tokenizer, template: Template, context: str, answer: str, add_end: bool
) -> Prompt:
    """A conversation up to the last token of the answer, or to the end of its turn."""
    turns = [{"role": "user", "content": context}, {"role": "assistant", "content": answer.strip()}]
    encoded = chat.encode(tokenizer, turns, template)
    trained = np.flatnonzero(encoded.labels != IGNORED)  # the last is the end of the turn
    return Prompt(encoded.input_ids[: trained[-1] + add_end], int(trained[0]))


def _write(
    out: PathLike, entries: Sequence[_Entry], tokenizer: Tokenizer, info: dict[str, Any]
) -> dict[str, Any]:
    """Save what is supervised behind what is not; a column in which nothing stands is left out."""
    input_ids, labels, told, truncated, alone = [], [], [], 0, 0
    for where, prompts, columns in entries:
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        cut = len(longest.ids) - len(keep_last(longest, info["length"], where).ids)
        truncated += cut > 0
        for prompt in prompts:
            alone += prompt.alone
            ids = prompt.ids[cut:]
            input_ids.append(ids)
            labels.append(np.where(np.arange(len(ids)) < prompt.start - cut, IGNORED, ids))
        told += columns
    names = [name for name in (told[0] if told else ()) if any(c[name] is not None for c in told)]
    return save_rows(
        out, input_ids, labels, {name: [c[name] for c in told] for name in names},
        tokenizer.fingerprint,
        {"kind": "query", **info, "add_bos": tokenizer.add_bos, "truncated_items": truncated,
         "alone_choices": alone},
    )  # fmt: skip


def _check(task: Task, split: str) -> None:
    if task.kind == "rolling":
        raise InputError(f"task {task.name} has texts and no answers; make rows of them with `data "
                         "text`")  # fmt: skip
    if not re.fullmatch(r"[\w.-]+", split):  # `datasets` also reads "test[:9]" and "train+test"
        raise InputError(f"{split!r} is no split's name; name one whole split, such as 'train'")
    if split == task.split:
        remedy = "it has no other, so leave it out"
        if task.pool not in (None, split):
            remedy = f"its {task.pool!r} may be asked about"
        raise InputError(f"task {task.name} is evaluated on the split {split!r}, which must not "
                         f"choose training data; {remedy}")  # fmt: skip


def _draw(
    task: Task, split: str, n: int, data: Path | None, seed: int
) -> tuple[list[_Example], dict[str, Any]]:
    """The drawn examples of a task, and what `rows.json` says of them."""
    form = task.query
    if form is not None:
        task = dataclasses.replace(
            task, prompt=form.prompt, choices=form.choices, delimiter=form.delimiter, target=None,
            description="", prefix="",
        )  # fmt: skip

    def ask(split: str) -> tuple[list[Question], str]:
        found = load_split(task, split, data)
        docs = render_docs(task, found.rows, found.origin)
        return questions(task, docs, [], Options(num_fewshot=0))[0], found.sha256

    asked, sha = ask(split)
    new, left_out = asked, None
    with contextlib.suppress(InputError):  # not at hand: nothing is known of what they share
        evaluated = {question.contexts for question in ask(task.split)[0]}
        new = [question for question in asked if question.contexts not in evaluated]
        left_out = len(asked) - len(new)
    drawn = sorted(random.Random(seed).sample(range(len(new)), min(n, len(new))))
    told = {"rows": len(drawn), "left_out": left_out, "available": len(asked), "sha256": sha}
    return [_Example(new[i].doc, *_gold(task, new[i])) for i in drawn], told


def _gold(task: Task, question: Question) -> tuple[str, str]:
    """What the right answer stands behind, and the answer with what joins the two."""
    right = question.doc.gold or 0
    answers = question.continuations or (task.delimiter + question.doc.target,)
    return question.contexts[right], answers[right]
