"""Rows of a benchmark to items, and items to what a model is asked, with examples before them.

An item's prompt stands behind the description and the examples ("shots"); asked is how likely each
continuation is, or to go on. One generator per task draws the examples item by item in file order,
so an item's do not depend on how many items follow. With a chat template the description is what
the system says, the examples are turns or stand before the question, and a prefix begins the
assistant's turn. The rules are those of lm-evaluation-harness 0.4.13, whose prompts come out
character by character.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from core.errors import InputError
from evals.tasks.task import Doc, Question, Task
from evals.tasks.template import render
from tokenizers import chat
from tokenizers.templates import Template

Shot = tuple[str, str]  # what is asked, what is answered


class Options(NamedTuple):
    """How the items of a task are asked.

    num_fewshot: examples before each; None: the task's own. seed: of their choice. template: chat
    template, or plain text. multiturn: with a template, examples are turns of their own. system:
    said before the description.
    """

    num_fewshot: int | None = None
    seed: int = 1234
    template: Template | None = None
    multiturn: bool = True
    system: str | None = None


def render_docs(task: Task, rows: Iterable[Mapping[str, Any]], where: str) -> list[Doc]:
    """The items in the rows of a split; `where`, its file, is for messages.

    InputError, with the item's number from 0, for a row that lacks a column the task reads, has no
    choices or a wrong answer or none (as in splits that are not published), or an empty text to
    predict.
    """
    return [_doc(task, n, dict(row), f"{where} item {n}") for n, row in enumerate(rows)]


def _doc(task: Task, index: int, row: dict[str, Any], where: str) -> Doc:
    fields = dict(row)
    for name, template in task.fields.items():
        fields[name] = render(template, fields, where)
    templates = (task.prompt,) if isinstance(task.prompt, str) else task.prompt
    prompts, one = _texts(templates, fields, where), isinstance(task.prompt, str)
    choices = () if task.choices is None else _texts(task.choices, fields, where)
    (target,) = ("",) if task.target is None else _texts((task.target,), fields, where)
    (counted,) = ("",) if task.counted is None else _texts((task.counted,), fields, where)
    chosen = task.kind == "multiple_choice"
    predicted = choices if chosen and one else (target,)
    if not predicted:
        raise InputError(f"{where} has no choices; leave it out")
    if task.kind != "rolling" and not all(predicted):
        raise InputError(f"{where} has an empty text where one is to be predicted; leave it out, "
                         "or evaluate a split whose answers are published")  # fmt: skip
    gold = _gold(task, len(choices if one else prompts), fields, where) if chosen else None
    return Doc(index, row, prompts, choices, gold, target, counted)


def _gold(task: Task, choices: int, fields: Mapping[str, Any], where: str) -> int:
    labels = tuple(map(str, range(choices)))
    if task.labels is not None:
        labels = _texts(task.labels, fields, where) if isinstance(task.labels, str) else task.labels
    if len(labels) != choices:
        raise InputError(f"{where} has {choices} choices and the labels {', '.join(labels)}; "
                         "correct the row")  # fmt: skip
    answer = None if task.answer is None else render(task.answer, fields, where)
    if str(answer) not in labels:
        raise InputError(f"{where}: the answer {answer!r} is none of {', '.join(labels)}; correct "
                         "it, or evaluate a split whose answers are published")  # fmt: skip
    return labels.index(str(answer))


def _texts(
    templates: str | Sequence[str], fields: Mapping[str, Any], where: str
) -> tuple[str, ...]:
    """The texts of some templates, or of one that gives a list."""
    if isinstance(templates, str):
        values = render(templates, fields, where)
    else:
        values = [render(template, fields, where) for template in templates]
    if not isinstance(values, list) or not all(isinstance(v, str | int | float) for v in values):
        raise InputError(f"{where}: {values!r} stands where texts are read; correct the row")
    return tuple(map(str, values))


def shots(task: Task, options: Options) -> int:
    """Examples before each item; what a task fixes at 0 is not changed."""
    if options.num_fewshot is None or task.shots == 0 or task.kind == "rolling":
        return task.shots or 0
    return options.num_fewshot


def questions(
    task: Task, docs: Sequence[Doc], pool: Sequence[Doc], options: Options
) -> tuple[list[Question], list[str]]:
    """What is asked for each of the docs, which are the first of their split, and warnings.

    pool: what examples are drawn from, read only if there are any (`shots`). InputError if there
    are too few of them.
    """
    count, rng = shots(task, options), random.Random(options.seed)
    fewest = count + (count > 0 and task.sampler == "random_but_self")
    if len(pool) < fewest:
        raise InputError(f"task {task.name}: {count} examples are drawn from {fewest} or more, and "
                         f"there are {len(pool)}; ask for fewer")  # fmt: skip
    found = []
    for doc in docs:
        drawn = _draw(task, count, doc, pool, rng) if count else ()
        found.append(_question(task, doc, [_shot(task, example) for example in drawn], options))
    return found, _warnings(task, options)


def _draw(
    task: Task, count: int, doc: Doc, pool: Sequence[Doc], rng: random.Random
) -> Sequence[Doc]:
    if task.sampler == "first":
        return pool[:count]
    if task.sampler == "random":
        return rng.sample(pool, count)
    drawn = [other for other in rng.sample(pool, count + 1) if other.row != doc.row]
    if len(drawn) < count:
        others = [other for other in pool if other.row != doc.row]
        if len(others) < count:
            raise InputError(f"task {task.name}: all but {len(others)} examples are item "
                             f"{doc.index} itself; ask for fewer than {count}")  # fmt: skip
        drawn = rng.sample(others, count)
    return drawn[:count]


def _shot(task: Task, doc: Doc) -> Shot:
    prompt, answer = doc.prompts[0], doc.target
    if doc.gold is not None and isinstance(task.prompt, str):
        answer = doc.choices[doc.gold]
    elif doc.gold is not None:
        prompt = doc.prompts[doc.gold]
    return prompt, _joined(task.prefix, answer, " ")


def _joined(left: str, right: str, between: str) -> str:
    """Both, with `between` if neither is empty and no whitespace meets there."""
    if not left or not right or left[-1].isspace() or right[0].isspace():
        return left + right
    return left + between + right


def _question(task: Task, doc: Doc, before: Sequence[Shot], options: Options) -> Question:
    if task.kind == "rolling":
        return Question(doc, (), (doc.target,))
    contexts = tuple(_context(task, before, prompt, options) for prompt in doc.prompts)
    if task.kind == "generate":
        return Question(doc, contexts, ())
    if task.kind == "loglikelihood":
        return Question(doc, contexts, (doc.target,))
    delimiter = task.delimiter
    if options.template and (not task.prefix or task.prefix[-1].isspace()):
        delimiter = ""
    if isinstance(task.prompt, str):
        contexts *= len(doc.choices)
        return Question(doc, contexts, tuple(delimiter + choice for choice in doc.choices))
    return Question(doc, contexts, (delimiter + doc.target,) * len(contexts))


def _context(task: Task, before: Sequence[Shot], prompt: str, options: Options) -> str:
    system = _joined(options.system or "", task.description, task.shot_delimiter)
    template = options.template
    if template is None:
        return system + _plain(task, before) + _joined(prompt, task.prefix, task.delimiter)
    messages = []
    if system and template.system != "refused":
        messages.append({"role": "system", "content": system})
    if options.multiturn:
        for asked, answered in before:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
    else:
        prompt = _plain(task, before) + prompt
    messages.append({"role": "user", "content": prompt})
    text = chat.render(messages, template, add_generation_prompt=True).text
    return text + (task.prefix.strip() if template.trim else task.prefix)


def _plain(task: Task, before: Sequence[Shot]) -> str:
    """Examples as running text; whitespace that is there joins a prefix, but never an answer."""
    between = task.delimiter
    return "".join(
        (_joined(asked, answered, between) if task.prefix else asked + between + answered)
        + task.shot_delimiter
        for asked, answered in before
    )


def _warnings(task: Task, options: Options) -> list[str]:
    found = []
    template = options.template
    if template and template.system == "refused" and (options.system or task.description):
        found.append(
            f"task {task.name}: chat template {template.name} has no system role, so the "
            "description and what the system says are LEFT OUT of every prompt"
        )
    if task.prefix[-1:].isspace():
        found.append(
            f"task {task.name}: the prefix {task.prefix!r} ends in whitespace, where an answer "
            "begins with other tokens than in running text; leave it out"
        )
    return found
