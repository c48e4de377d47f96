"""What a benchmark is: where its items lie, how they are put to a model, what counts as right.

A `Task` is plain data, read from a small TOML (or JSON) file (`evals.tasks.catalogue`); its texts
are templates (`evals.tasks.template`) over the columns of an item. Nothing in it is code. The rules
that the fields stand for are those of lm-evaluation-harness 0.4.13.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["multiple_choice", "loglikelihood", "rolling", "generate"]
METRICS: dict[Kind, tuple[str, ...]] = {
    "multiple_choice": ("acc", "acc_norm", "acc_bytes", "acc_tok"),
    "loglikelihood": ("acc", "perplexity"),
    "rolling": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
    "generate": ("exact_match",),
}
# Of the pool's n examples: n drawn anew for every item; n + 1 drawn and the item itself, or the
# last, left out; the first n in file order.
Sampler = Literal["random", "random_but_self", "first"]


class Filter(NamedTuple):
    """How an answer is read out of a generated text: a match of `regex` (see `evals.metrics`).

    select: 0 the first match, -1 the last; of several groups the first that is not empty.
    """

    name: str
    regex: str
    select: int = 0


@dataclass(frozen=True)
class ExactMatch:
    """What two answers may differ in: matches of `ignore`, deleted in this order, and case."""

    ignore: tuple[str, ...] = ()
    ignore_case: bool = False


@dataclass(frozen=True)
class QueryForm:
    """How an item is written as a query for attribution, where that is not the benchmark's form.

    answer: index (or label, see `Task.labels`) of the right one of `choices`; the supervised text
    is `choices[answer]` behind `delimiter`.
    """

    prompt: str
    choices: str | tuple[str, ...]
    delimiter: str = " "


@dataclass(frozen=True)
class Task:
    """One benchmark. Strings marked T are templates over an item's columns and `fields`.

    dataset, config: a name on the Hub and its configuration, which are also the local folders
        `<org>__<name>/<config>/`; or, in a custom task, a .jsonl/.parquet file or folder beside it.
    files: T over {config}; the one file, within the Hub's repository, that holds `split`.
    split: what is evaluated. pool: the split that examples ("shots") are drawn from. size: items of
        the real split, for listings. A dataset "taproot/..." is made by `evals.tasks.data` itself.
    fields: T by name, evaluated in order, each may use those before it.
    prompt: T, or several T, one a choice, which then share the continuation `target`.
    choices: T of a list, or a T for each. labels: T of a list or plain labels; answer: T, the right
        one of `labels`, or without them its index from 0.
    target: T; of loglikelihood with its leading blank, of generate the gold answer, of rolling the
        text. counted: T; rolling only, whose words and bytes are counted.
    delimiter: between prompt and choice (and between a shot's prompt and its answer).
    prefix: how every answer begins; part of the prompt.
    shots: None: 0 unless asked for; 0: never any; else the default. examples: the pool itself.
    until, new_tokens, filters, exact_match: of generate.
    alias: what tables call it within its group.
    """

    name: str
    kind: Kind
    dataset: str = ""
    split: str = ""
    config: str | None = None
    files: str | None = None
    pool: str | None = None
    size: int | None = None
    fields: dict[str, str] = field(default_factory=dict)
    description: str = ""
    prompt: str | tuple[str, ...] = ""
    choices: str | tuple[str, ...] | None = None
    labels: str | tuple[str, ...] | None = None
    answer: str | None = None
    target: str | None = None
    counted: str | None = None
    delimiter: str = " "
    shot_delimiter: str = "\n\n"
    prefix: str = ""
    shots: int | None = None
    sampler: Sampler = "random"
    examples: tuple[dict[str, Any], ...] | None = None
    until: tuple[str, ...] = ()
    new_tokens: int = 256
    filters: tuple[Filter, ...] = ()
    exact_match: ExactMatch = ExactMatch()
    metrics: tuple[str, ...] = ("acc",)
    version: float = 1.0
    query: QueryForm | None = None
    alias: str = ""
    where: str = ""  # the file, for messages


class Group(NamedTuple):
    """Tasks (or groups) reported together: `metrics` are means weighted by size; () = none."""

    name: str
    members: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    alias: str = ""
    version: float = 1.0


class Doc(NamedTuple):
    """An item of a benchmark, rendered (see `evals.tasks.prompts`).

    row: its columns. prompts: one, or one for each choice. choices: without the delimiter. gold:
    index of the right one, None for other kinds. target: text of the other kinds (and of several
    prompts). counted: see `Task.counted`.
    """

    index: int
    row: dict[str, Any]
    prompts: tuple[str, ...]
    choices: tuple[str, ...] = ()
    gold: int | None = None
    target: str = ""
    counted: str = ""


class Question(NamedTuple):
    """What is asked of the model for an item: a continuation of each context.

    A generate task has one context and no continuation, a rolling one no context and the text.
    """

    doc: Doc
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
