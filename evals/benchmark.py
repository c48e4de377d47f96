"""Benchmarks from tasks to numbers: what is asked, the answers, and how they count.

Planning needs no model: items are read, rendered with their examples and tokenised, all in the
order of lm-evaluation-harness 0.4.13, whose numbers come out. Then every log-probability of every
task is asked for in one go (`evals.scorer`), so that equal requests are answered once, and texts
are generated (`evals.generation`). What was cut or tokenised otherwise is counted, and nothing is
left out.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.progress import Progress
from evals import metrics
from evals.generation import Answer, answers, default_stops, end_of_turn
from evals.items import Prompt, keep_last, read_context, rolling, tokenise
from evals.metrics import Measured
from evals.scorer import Score, score_prompts
from evals.store import Store
from evals.tasks import prompts
from evals.tasks.data import Split, load_split
from evals.tasks.task import Doc, Question, Task
from tokenizers import Tokenizer
from tokenizers.templates import Template


@dataclass(frozen=True)
class Settings:
    """How benchmarks are asked; the defaults are the harness's.

    data: folder of local datasets. shots: by task name, "" for all others; absent: the task's own.
    limit: the first so many items of each task, or below 1 that share of them. seed: of the choice
    of examples. template: chat template; then multiturn: examples are turns of their own, and
    system: what the system says. max_length: tokens read and predicted; None: the model's context.
    add_bos: None: as the tokenizer says. new_tokens: of generated answers; None: the task's.
    turn_end: with a template, its end of turn ends an answer even where the model does not say so.
    bootstrap: resamples of a perplexity's standard error.
    """

    data: Path | None = None
    shots: Mapping[str, int] = dataclasses.field(default_factory=dict)
    limit: float | None = None
    seed: int = 1234
    template: Template | None = None
    multiturn: bool = True
    system: str | None = None
    max_length: int | None = None
    add_bos: bool | None = None
    new_tokens: int | None = None
    turn_end: bool = True
    bootstrap: int = 100_000

    def length(self, context: int) -> int:
        """Tokens read and predicted, of a model that reads `context` tokens."""
        return min(self.max_length or context, context)

    def options(self, task: Task) -> prompts.Options:
        shots = self.shots.get(task.name, self.shots.get(""))
        return prompts.Options(shots, self.seed, self.template, self.multiturn, self.system)


class Asked(NamedTuple):
    """A task's items as the model reads them.

    shots: examples before each. splits: what was read. size: items of the whole split. prompts: of
    each question, one a continuation (rolling: one a window; generate: one without any). truncated:
    tokens of each question that did not fit; alone: its continuations that were tokenised alone.
    """

    task: Task
    shots: int
    size: int
    splits: dict[str, Split]
    questions: list[Question]
    prompts: list[list[Prompt]]
    truncated: list[int]
    alone: list[int]
    warnings: list[str]

    @property
    def fingerprint(self) -> str:
        """sha256 of the task and the data that it reads."""
        task = dataclasses.replace(self.task, where="")
        content = [str(task), *(f"{n} {s.sha256}" for n, s in self.splits.items())]
        return hashlib.sha256("\n".join(content).encode()).hexdigest()


class Judged(NamedTuple):
    """A task's outcome. answers: of each question. of_items: its metrics, by filter.

    summary: the harness's keys ("acc,none", "acc_stderr,none") and their values.
    """

    asked: Asked
    answers: list[list[Score]] | list[Answer]
    of_items: list[dict[str, Measured]]
    summary: dict[str, Any]


def ask(
    tasks: Sequence[Task], tokenizer: Tokenizer, context: int, settings: Settings
) -> list[Asked]:
    """Plan: every task's items, rendered and tokenised for a model that reads `context` tokens."""
    length = settings.length(context)
    with Progress(len(tasks), "plan", "tasks") as bar:
        found = []
        for task in tasks:
            found.append(_ask(task, tokenizer, length, settings))
            bar.update(1)
    return found


def _ask(task: Task, tokenizer: Tokenizer, length: int, settings: Settings) -> Asked:
    options = settings.options(task)
    shots = prompts.shots(task, options)
    split = load_split(task, task.split, settings.data)
    splits, size = {task.split: split}, len(split.rows)
    examples = _examples(task, splits, settings) if shots else []
    docs = prompts.render_docs(task, split.rows[: limited(settings.limit, size)], split.origin)
    questions, warnings = prompts.questions(task, docs, examples, options)
    found: list[list[Prompt]] = []
    truncated, alone = [], []
    for question in questions:
        kept, cut = _tokenise(task, question, tokenizer, length, settings)
        found.append(kept)
        truncated.append(cut)
        alone.append(sum(prompt.alone for prompt in kept))
    return Asked(task, shots, size, splits, questions, found, truncated, alone, warnings)


def _examples(task: Task, splits: dict[str, Split], settings: Settings) -> list[Doc]:
    """What examples are drawn from; a split that is read for them joins `splits`."""
    if task.examples is not None:
        return prompts.render_docs(task, task.examples, task.where)
    if task.pool is None:
        raise InputError(f"task {task.name} has no examples to show; leave --num-fewshot out")
    if task.pool not in splits:
        splits[task.pool] = load_split(task, task.pool, settings.data)
    return prompts.render_docs(task, splits[task.pool].rows, splits[task.pool].origin)


def _tokenise(
    task: Task, question: Question, tokenizer: Tokenizer, length: int, settings: Settings
) -> tuple[list[Prompt], int]:
    """A question's prompts as they are read, and the most tokens that one of them lost."""
    contexts, continuations, bos = question.contexts, question.continuations, settings.add_bos
    where = f"task {task.name}, item {question.doc.index}"
    if task.kind == "rolling":
        return rolling(tokenizer, continuations[0], length, bos), 0
    if task.kind == "generate":
        room = length - new_tokens(task, settings)
        if room < 1:
            raise InputError(f"{where}: {new_tokens(task, settings)} new tokens leave no room for "
                             f"its context in {length}; ask for fewer")  # fmt: skip
        ids, cut = read_context(tokenizer, contexts[0], room, bos)
        return [Prompt(ids, len(ids))], cut
    if len({*contexts}) == 1:
        whole = tokenise(tokenizer, contexts[0], continuations, bos)
    else:
        pairs = zip(contexts, continuations, strict=True)
        whole = [tokenise(tokenizer, context, [text], bos)[0] for context, text in pairs]
    kept = [keep_last(prompt, length + 1, where) for prompt in whole]
    cut = max(len(a.ids) - len(b.ids) for a, b in zip(whole, kept, strict=True))
    return kept, cut


def new_tokens(task: Task, settings: Settings) -> int:
    """The most tokens of a generated answer."""
    return settings.new_tokens or task.new_tokens


def limited(limit: float | None, size: int) -> int:
    """How many of `size` items a limit leaves: the first so many, or below 1 that share of them."""
    if limit is None:
        return size
    return min(size, int(-(-size * limit // 1)) if limit < 1 else int(limit))


def requests(asked: Sequence[Asked]) -> list[Prompt]:
    """The prompts of all tasks in a row."""
    return [prompt for a in asked for of_question in a.prompts for prompt in of_question]


def deal(asked: Sequence[Asked], scores: Sequence[Score]) -> dict[str, list[list[Score]]]:
    """The scores of `requests`, by task and question."""
    left = iter(scores)
    return {
        a.task.name: [list(itertools.islice(left, len(of_question))) for of_question in a.prompts]
        for a in asked
    }


def answer(
    asked: Sequence[Asked],
    loaded: Loaded,
    tokenizer: Tokenizer,
    settings: Settings,
    execution: Execution,
    batch_tokens: int,
    batch: int,
    store: Store,
    label: str = "eval",
) -> list[list[list[Score]] | list[Answer]]:
    """What the model says to every question of every task, in their order.

    batch: texts generated at a time. store: answers known already, and where new ones go.
    """
    scored = [a for a in asked if a.task.kind != "generate"]
    scores = score_prompts(loaded, requests(scored), execution, batch_tokens, label, store)
    by_task: dict[str, Any] = deal(scored, scores)
    ids, strings = default_stops(loaded, tokenizer), ()
    if settings.template and settings.turn_end:
        turn_ids, strings = end_of_turn(tokenizer, settings.template)
        ids = (*ids, *turn_ids)
    for a in asked:
        if a.task.kind == "generate":
            by_task[a.task.name] = answers(
                loaded, tokenizer, [prompt.ids for (prompt,) in a.prompts],
                (*a.task.until, *strings), new_tokens(a.task, settings), ids, execution, batch,
                f"{label} {a.task.name}", store,
            )  # fmt: skip
    return [by_task[a.task.name] for a in asked]


def judge(asked: Asked, found: list[list[Score]] | list[Answer], settings: Settings) -> Judged:
    """Metrics of a task's items, and their means with standard errors."""
    task = asked.task
    of_items = []
    for question, prompts_of, one in zip(asked.questions, asked.prompts, found, strict=True):
        if isinstance(one, Answer):
            of_items.append(metrics.generated_metrics(task, question.doc, one.text))
        else:
            tokens = [len(prompt.ids) - prompt.start for prompt in prompts_of]
            of_items.append(metrics.doc_metrics(task, question.doc, one, tokens))
    summary = metrics.aggregate(task, of_items, settings.bootstrap)
    return Judged(asked, found, of_items, summary)
