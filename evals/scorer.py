"""Multiple choice by log-probability: which continuation does the model find most likely?

    logprob(choice) = sum_t log p(choice_t | context, choice_<t)
    acc: the choice of greatest logprob;  acc_norm: of greatest logprob / characters of the choice

Definitions follow lm-evaluation-harness 0.4.13; its mixed-length grouping bug is not repeated.

Position p of a causal model sees ids[:p + 1] only. So an input that is the beginning of another is
read there: the four letters of an exam question cost one row. And only hidden states that predict a
choice's token meet the output matrix: no other logits are formed.

Dims: B rows, T tokens, K predictions asked of a row, D width, V vocabulary.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from core import loss, model, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import PathLike, write_json, write_jsonl
from core.model import Variables
from core.progress import Progress
from core.rows import IGNORED, Plan, Rows, read_ahead
from evals.items import Item, Prompt, characters, keep_last, tokenise
from evals.statistics import mean_stderr
from tokenizers import Tokenizer

# Nats between the two best choices below which rounding may decide (reported, never hidden).
CLOSE = 1e-3


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
        best = sorted(self.logprobs)[-2:]
        return len(best) == 2 and best[1] - best[0] < CLOSE

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
    kept = [[keep_last(p, size, item) for p in f] for f, item in zip(found, items, strict=True)]
    for item, prompts in zip(items, kept, strict=True):
        top = max(int(p.ids.max()) for p in prompts)
        if top >= loaded.config.vocab_size:
            raise InputError(
                f"item {item.id!r}: tokenizer {tokenizer.name} gives id {top}, outside the model's "
                f"vocabulary of {loaded.config.vocab_size}; use the model's own tokenizer"
            )
    every = [prompt for prompts in kept for prompt in prompts]
    scores = iter(prompt_logprobs(loaded, every, execution, batch_tokens, label))
    return [
        ItemResult(
            id=item.id,
            label=item.label,
            logprobs=tuple(next(scores) for _ in after),
            lengths=tuple(map(characters, item.choices)),
            tokens=tuple(len(p.ids) - p.start for p in after),
            truncated=sum(len(p.ids) > size for p in before),
            alone=sum(p.alone for p in before),
        )
        for item, before, after in zip(items, found, kept, strict=True)
    ]


class Batch(NamedTuple):
    """Inputs and what is asked of them: `targets` after position `at`; rows_B -1 = padding."""

    ids_BT: np.ndarray
    at_BK: np.ndarray
    targets_BK: np.ndarray
    rows_B: np.ndarray


class Inputs:
    """The token sequences that must be read, each once, to score all prompts; a batch source.

    Their order and batches depend on the set of prompts, not on its order.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_tokens: int):
        self.ids: list[np.ndarray] = []
        self.asked: list[dict[tuple[int, int], int]] = []  # (position, token) -> place
        self.places: list[tuple[int, list[int]]] = [(0, [])] * len(prompts)
        # Big-endian bytes sort like the ids; descending, an input follows those it begins.
        keys = [prompt.ids[:-1].astype(">i4").tobytes() for prompt in prompts]
        longest = b""
        for i in sorted(range(len(prompts)), key=keys.__getitem__, reverse=True):
            ids, start, _ = prompts[i]
            if not longest.startswith(keys[i]):
                longest = keys[i]
                self.ids.append(ids[:-1])
                self.asked.append({})
            asked, wanted = self.asked[-1], enumerate(ids[start:].tolist(), start - 1)
            self.places[i] = len(self.ids) - 1, [asked.setdefault(w, len(asked)) for w in wanted]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.plan = Plan(cast(Rows, self), batch_tokens, jax.device_count())
        self.most: dict[int, int] = {}  # K of each padded length
        for chosen, length in self.plan.batches:
            counts = [len(self.asked[i]) for i in chosen if i >= 0]
            self.most[length] = max(self.most.get(length, 0), *counts)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> Batch:
        chosen, length = self.plan.batches[k]
        shape = (len(chosen), self.most[length])
        ids_BT = np.zeros((len(chosen), length), np.int32)
        at_BK, targets_BK = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32)
        for b, i in enumerate(chosen):
            if i >= 0:
                ids_BT[b, : self.lengths[i]] = self.ids[i]
                at_BK[b, : len(self.asked[i])], targets_BK[b, : len(self.asked[i])] = zip(
                    *self.asked[i], strict=True
                )
        return Batch(ids_BT, at_BK, targets_BK, chosen)


@functools.partial(jax.jit, static_argnames=("config", "execution"))
@model.full_precision
def asked_losses(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    at_BK: jax.Array,
    targets_BK: jax.Array,
) -> jax.Array:
    """-log p(targets[k] | ids[: at[k] + 1]) in nats, float32 [B,K]; 0 where the target is -100."""
    h_BTD = model.hidden(config, execution, variables, ids_BT)
    h_BKD = jnp.take_along_axis(h_BTD, at_BK[..., None], axis=1)
    chunk = execution.tokens_per_chunk(config.vocab_size)
    w_VD = model.head(config, variables["params"])
    return loss.token_nll(h_BKD, w_VD, targets_BK, chunk)


def prompt_logprobs(
    loaded: Loaded, prompts: Sequence[Prompt], execution: Execution, batch_tokens: int, label: str
) -> list[float]:
    """log p(continuation | context) of each prompt in nats, summed over its tokens."""
    inputs, mesh = Inputs(prompts, batch_tokens), sharding.make_mesh()
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))
    nll: list[np.ndarray] = [np.zeros(0)] * len(inputs.ids)
    with Progress(int(inputs.lengths.sum()), label, "tokens") as bar:
        for batch in read_ahead(inputs):
            arrays = (sharding.place(x, sharding.over_rows(mesh)) for x in batch[:3])
            nll_BK = np.asarray(asked_losses(loaded.config, execution, variables, *arrays))
            if not np.isfinite(nll_BK).all():
                raise InputError(
                    f"model {loaded.fingerprint[:12]} gives log-probabilities that are not finite; "
                    "its weights are damaged or it diverged"
                )
            real = batch.rows_B >= 0
            for i, nll_K in zip(batch.rows_B[real], nll_BK[real], strict=True):
                nll[i] = nll_K
            bar.update(int(inputs.lengths[batch.rows_B[real]].sum()))
    return [-float(nll[i][places].sum(dtype=np.float64)) for i, places in inputs.places]


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
