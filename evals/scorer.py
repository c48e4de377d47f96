"""Log-probabilities of continuations, and multiple choice by them: which one is the likeliest?

    logprob(choice) = sum_t log p(choice_t | context, choice_<t)
    acc: the choice of greatest logprob;  acc_norm: of greatest logprob / characters of the choice

Definitions follow lm-evaluation-harness 0.4.13; its mixed-length grouping bug is not repeated.

What is read is planned without a model (`evals.plan`), each token that prompts share once, and runs
through few compiled programs (`evals.programs`).
"""

from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from core import distributed, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import PathLike, write_json, write_jsonl
from core.inference import overlapped
from core.model import Variables
from core.progress import Progress
from evals.items import Item, Prompt, characters, keep_last, tokenise
from evals.metrics import CLOSE, margin
from evals.plan import TARGETS, Batch, Plan
from evals.programs import Programs, chunk_size
from evals.statistics import mean_stderr
from evals.store import Store, prompt_key
from tokenizers import Tokenizer


class Score(NamedTuple):
    """log p(continuation | context) in nats; greedy: whether each token of it was the most likely
    one (of equals the lowest)."""

    logprob: float
    greedy: bool


class ItemResult(NamedTuple):
    """One item's score: nats, characters and tokens of each choice, in order.

    truncated: choices whose context was cut on the left; alone: see `evals.items.Prompt`.
    """

    id: str
    label: int
    logprobs: tuple[float, ...]
    lengths: tuple[int, ...]
    tokens: tuple[int, ...]
    truncated: int = 0
    alone: int = 0

    @property
    def pred(self) -> int:
        """The most likely choice; the first of equals."""
        return int(np.argmax(self.logprobs))

    @property
    def pred_norm(self) -> int:
        return int(np.argmax(np.divide(self.logprobs, self.lengths)))

    @property
    def acc(self) -> float | None:
        """1 or 0; None for a single choice, which is right whatever the model does."""
        return float(self.pred == self.label) if len(self.logprobs) > 1 else None

    @property
    def acc_norm(self) -> float | None:
        return float(self.pred_norm == self.label) if len(self.logprobs) > 1 else None

    @property
    def answer_logprob(self) -> float:
        return self.logprobs[self.label]

    @property
    def close(self) -> bool:
        """Whether rounding may have decided between the two best choices."""
        return margin(self.logprobs) < CLOSE

    def to_json(self) -> dict[str, Any]:
        derived = ("pred", "pred_norm", "acc", "acc_norm", "answer_logprob")
        return {**self._asdict(), **{name: getattr(self, name) for name in derived}}


def score_items(
    loaded: Loaded,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    execution: Execution,
    batch_tokens: int,
    label: str = "score",
) -> list[ItemResult]:
    """Score every choice of every item; results are in the order of `items`.

    batch_tokens: tokens of a batch, padding included. label: of the progress line. Contexts are cut
    on the left to what the model can read. InputError on an answer that does not fit and on ids
    outside the model's vocabulary.
    """
    size = loaded.config.context + 1  # the last token is predicted, not read
    found = [tokenise(tokenizer, item.context, item.choices) for item in items]
    kept = [
        [keep_last(p, size, f"item {item.id!r}") for p in prompts]
        for prompts, item in zip(found, items, strict=True)
    ]
    for item, prompts in zip(items, kept, strict=True):
        top = max(int(p.ids.max()) for p in prompts)
        if top >= loaded.config.vocab_size:
            raise InputError(
                f"item {item.id!r}: tokenizer {tokenizer.name} gives id {top}, outside the model's "
                f"vocabulary of {loaded.config.vocab_size}; use the model's own tokenizer"
            )
    every = [prompt for prompts in kept for prompt in prompts]
    scores = iter(score_prompts(loaded, every, execution, batch_tokens, label))
    return [
        ItemResult(
            id=item.id,
            label=item.label,
            logprobs=tuple(next(scores).logprob for _ in after),
            lengths=tuple(map(characters, item.choices)),
            tokens=tuple(len(p.ids) - p.start for p in after),
            truncated=sum(len(p.ids) > size for p in before),
            alone=sum(p.alone for p in before),
        )
        for item, before, after in zip(items, found, kept, strict=True)
    ]


def make_plan(
    prompts: Sequence[Prompt],
    config: ModelConfig,
    execution: Execution,
    batch_tokens: int,
    mesh: Mesh,
) -> Plan:
    """The batches of `prompts` for this model, on these devices."""
    c = config
    weights = c.width * (2 * (c.heads + c.groups) * c.head_dim + 3 * c.mlp_width)
    # Half of all pairs of tokens are formed; a softmax costs some 100 operations for each.
    span = max(4 * weights // (c.heads * (4 * c.head_dim + 100)), 1)
    return Plan(prompts, batch_tokens, mesh.shape["data"], chunk_size(config, execution), span)


def compile_plan(plan: Plan, programs: Programs) -> None:
    """Compile all that `plan` needs and `programs` lacks, in the order of first use."""
    for shape in plan.shapes:
        if shape.prefix:
            programs.get(shape.prefix)
        programs.get(shape)


def run_plan(plan: Plan, programs: Programs, variables: Variables) -> list[Score]:
    """The score of each prompt that was planned."""
    found: dict[int, Score] = {}
    for scored in run_batches(plan, programs, variables):
        found |= scored
    return [found[i] for i in range(len(plan.asked))]


def run_batches(
    plan: Plan, programs: Programs, variables: Variables, known: Set[int] = frozenset()
) -> Iterator[dict[int, Score]]:
    """Scores by the prompt's number, batch by batch; but batches of only `known` ones are left out.

    InputError where a log-probability is not finite.
    """
    held, prefix = -1, None

    def place(array: np.ndarray, split: bool) -> jax.Array:
        where = sharding.over_rows if split else sharding.replicated
        return sharding.place(array, where(programs.mesh))

    def compute(batch: Batch) -> tuple[jax.Array, jax.Array]:
        nonlocal held, prefix
        if batch.prefix != held:
            held, prefix = batch.prefix, None
            if held >= 0:
                given = (place(array, False) for array in plan.prefix(held))
                prefix = programs.get(batch.shape.prefix)(variables, *given)
        rows = (place(array, True) for array in batch.arrays)
        return programs.get(batch.shape)(variables, prefix, *rows)

    left = plan.without(known)
    batches = map(left.__getitem__, range(len(left)))
    for batch, (logprobs_nCK, best_nC) in overlapped(batches, compute):
        logprobs = logprobs_nCK.reshape(-1, TARGETS)[batch.entries, batch.columns]
        if not np.isfinite(logprobs).all():
            raise InputError(
                "the model gives log-probabilities that are not finite; its weights are damaged or "
                "it diverged"
            )
        greedy = best_nC.reshape(-1)[batch.entries] == batch.tokens
        sums = np.add.reduceat(logprobs.astype(np.float64), batch.firsts)
        all_greedy = np.logical_and.reduceat(greedy, batch.firsts)
        scores = map(Score, sums.tolist(), all_greedy.tolist())
        yield dict(zip(batch.prompts.tolist(), scores, strict=True))


def score_prompts(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    execution: Execution,
    batch_tokens: int,
    label: str,
    store: Store | None = None,
) -> list[Score]:
    """The score of each prompt, in their order; those that are equal are planned once.

    batch_tokens: tokens of a batch, padding included. label: of the progress line. store: gives the
    answers that it has and keeps the new ones, batch by batch; several processes share the batches
    and meet in it. InputError where a log-probability is not finite.
    """
    store = store or Store(None, {})
    keys = [prompt_key(prompt.ids, prompt.start) for prompt in prompts]
    found = {key: Score(*store.before[key]) for key in keys if key in store.before}
    left = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
    names, mesh = [*left], sharding.local_mesh()
    plan = make_plan([*left.values()], loaded.config, execution, batch_tokens, mesh)
    plan = plan.part(distributed.split(len(plan)))
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))
    programs = Programs(loaded.config, execution, variables, mesh)
    known = {i: Score(*store.since[key]) for i, key in enumerate(names) if key in store.since}
    found |= {names[i]: score for i, score in known.items()}
    mine = {i for k in range(len(plan)) for i in plan.numbers(k)}
    with Progress(len(mine), label, "prompts", start=len(mine & known.keys())) as bar:
        for scored in run_batches(plan, programs, variables, known.keys()):
            fresh = {names[i]: score for i, score in scored.items() if i not in known}
            store.add(fresh.items())
            found |= fresh
            bar.update(len(fresh))
    store.gather(keys)
    found |= {key: Score(*store.since[key]) for key in names if key not in found}
    return [found[key] for key in keys]


def summarise(results: Sequence[ItemResult]) -> dict[str, Any]:
    """Means with standard errors (n - 1); accuracies are None if an item has a single choice.

    Beside them what may spoil them: items whose two best choices are nearly equal (close_items) or
    whose context was cut (truncated_items), and choices tokenised alone (alone_choices).
    """
    summary: dict[str, Any] = {"items": len(results)}
    for name in ("acc", "acc_norm", "answer_logprob"):
        values = [getattr(result, name) for result in results]
        mean, stderr = (None, None) if None in values else mean_stderr(np.array(values))
        summary |= {name: mean, f"{name}_stderr": stderr}
    summary["close_items"] = sum(result.close for result in results)
    summary["truncated_items"] = sum(result.truncated > 0 for result in results)
    summary["alone_choices"] = sum(result.alone for result in results)
    return summary


def run_eval(
    loaded: Loaded,
    tokenizer: Tokenizer,
    items: Sequence[Item],
    out: PathLike,
    execution: Execution,
    batch_tokens: int,
) -> dict[str, Any]:
    """Score the items into `out`/items.jsonl and `out`/results.json; returns the latter."""
    label = f"eval {Path(out).name}"
    results = score_items(loaded, tokenizer, items, execution, batch_tokens, label)
    summary = summarise(results)
    summary |= {"model": loaded.fingerprint, "tokenizer": tokenizer.fingerprint}
    write_jsonl(Path(out) / "items.jsonl", [result.to_json() for result in results])
    write_json(Path(out) / "results.json", summary)
    return summary
