"""Activations of sampled tokens, of all layers from one run of the model.

Dims: B rows, T tokens, P places in a batch, L taps, N samples, D width, E tokens judged, K tokens
of the target.

Nothing is cached on disk: reading again costs a forward pass, keeping costs terabytes. Of each
batch only the sampled places leave the device.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from core import model, sharding, taps
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.inference import overlapped, placer
from core.model import Variables
from core.progress import Progress
from core.rows import Batch, Plan, bucket
from core.taps import Tap
from evals.probe.corpus import Corpus
from evals.probe.target import Target


class Read(NamedTuple):
    """x_LND float32; kept_N: False where the batch was skipped, because it was not finite.

    own_N: the model's own probability of the target behind each token judged, NaN elsewhere.
    """

    x_LND: np.ndarray
    kept_N: np.ndarray
    own_N: np.ndarray
    batches: int
    skipped: int


class _Part(NamedTuple):
    """A batch, where the samples are in it (padded with 0), and which samples they are."""

    batch: Batch
    index_P: np.ndarray
    samples: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@model.full_precision
def activations(
    config: ModelConfig,
    execution: Execution,
    at: tuple[Tap, ...],
    variables: Variables,
    ids_BT: jax.Array,
    index_P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Taps [L,P,D] float32 and final hidden states [P,D], at places of the flattened batch."""
    h_BTD, found = taps.run(config, execution, variables, ids_BT, at)
    picked = [x_BTD.reshape(-1, x_BTD.shape[-1])[index_P] for x_BTD in (h_BTD, *found)]
    return jnp.stack([x_PD.astype(jnp.float32) for x_PD in picked[1:]]), picked[0]


@functools.partial(jax.jit, static_argnums=0)
@model.full_precision
def own_probability(
    config: ModelConfig, variables: Variables, h_PD: jax.Array, ids_K: jax.Array
) -> jax.Array:
    """The model's probability that the next token is one of ids_K, [P]."""
    logits_PV = model.head_logits(h_PD[None], model.head(config, variables["params"]))[0]
    whole = jax.nn.logsumexp(logits_PV, -1)
    return jnp.exp(jax.nn.logsumexp(logits_PV[:, ids_K], -1) - whole)


def read(
    loaded: Loaded,
    execution: Execution,
    corpus: Corpus,
    place_N: np.ndarray,
    at: tuple[Tap, ...],
    batch_tokens: int,
    judged_N: np.ndarray,
    target: Target | None,
) -> Read:
    """Run the model over the rows that hold the places [N], ascending.

    judged_N: the samples whose own probability of `target` is asked for; target None: of none.
    InputError when nothing finite comes, and before it starts when memory will not do.
    """
    width = taps.width(loaded.config, at[0])
    require_memory(
        4 * len(at) * len(place_N) * width, f"{len(place_N):,} samples of {len(at)} taps"
    )
    x_LND = np.zeros((len(at), len(place_N), width), np.float32)
    kept_N, own_N = np.ones(len(place_N), bool), np.full(len(place_N), np.nan)
    variables = jax.device_put(loaded.variables, sharding.replicated(sharding.local_mesh()))
    put, skipped = placer(), 0
    parts, tokens, count = _parts(corpus, place_N, batch_tokens)

    def compute(part: _Part) -> tuple[jax.Array, jax.Array]:
        ids_BT, _ = put(part.batch)
        return activations(loaded.config, execution, at, variables, ids_BT, part.index_P)

    with Progress(tokens, "activations", "tokens") as bar:
        for part, (x_LPD, h_PD) in overlapped(parts, compute):
            mine = part.samples
            x_LPD = x_LPD[:, : len(mine)]
            x_LND[:, mine] = x_LPD
            if not np.isfinite(x_LPD).all():
                kept_N[mine], skipped = False, skipped + 1
            elif target is not None:
                asked = np.flatnonzero(judged_N[mine])
                own_N[mine[asked]] = _own(loaded.config, execution, variables, h_PD[asked], target)
            bar.update(part.batch.ids_BT.size, skipped=skipped)
    if not kept_N.any():
        raise InputError(f"model {loaded.fingerprint[:12]} gives activations that are not finite "
                         "in every batch; use --dtype float32, or another model")  # fmt: skip
    return Read(x_LND, kept_N, own_N, count, skipped)


def _own(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    h_ED: np.ndarray,
    target: Target,
) -> np.ndarray:
    """`own_probability` in pieces of few shapes: few logits are held, little is compiled."""
    size = bucket(len(h_ED), execution.tokens_per_chunk(config.vocab_size))
    found = [np.zeros(0)]
    for start in range(0, len(h_ED), size):
        part_PD = h_ED[start : start + size]
        full_PD = np.zeros((size, h_ED.shape[1]), h_ED.dtype)
        full_PD[: len(part_PD)] = part_PD
        p_P = own_probability(config, variables, full_PD, target.ids)
        found.append(np.asarray(p_P)[: len(part_PD)])
    return np.concatenate(found)


def _parts(
    corpus: Corpus, place_N: np.ndarray, batch_tokens: int
) -> tuple[Iterator[_Part], int, int]:
    """(batches of the rows that are needed, their tokens, their number).

    Batches of one shape have one number of places, padded, and so one program.
    """
    row_N = np.searchsorted(corpus.starts, place_N, side="right") - 1
    needed, firsts = np.unique(row_N, return_index=True)
    lasts = np.append(firsts[1:], len(row_N))
    plan = Plan(cast(Any, _Needed(corpus, needed)), batch_tokens, jax.local_device_count())
    counts = [int((lasts - firsts)[chosen[chosen >= 0]].sum()) for chosen, _ in plan.batches]
    most: dict[tuple[int, int], int] = {}
    for (chosen, length), number in zip(plan.batches, counts, strict=True):
        most[len(chosen), length] = max(number, most.get((len(chosen), length), 0))

    def parts() -> Iterator[_Part]:
        for k in range(len(plan)):
            batch = plan[k]
            shape = batch.ids_BT.shape
            index_P = np.zeros(most[shape], np.int32)
            mine = [np.zeros(0, np.int64)]
            filled = 0
            for b, i in enumerate(batch.rows_B):
                if i >= 0:
                    mine.append(np.arange(int(firsts[i]), int(lasts[i])))
                    offset = place_N[mine[-1]] - corpus.starts[needed[i]]
                    index_P[filled : filled + len(offset)] = b * shape[1] + offset
                    filled += len(offset)
            yield _Part(batch, index_P, np.concatenate(mine))

    tokens = sum(len(chosen) * length for chosen, length in plan.batches)
    return parts(), tokens, len(plan)


class _Needed:
    """The rows of a corpus that are read, as `core.rows.Plan` asks for them."""

    def __init__(self, corpus: Corpus, rows: np.ndarray):
        self.corpus, self.rows = corpus, rows
        self.lengths = corpus.lengths[rows]

    def ids(self, i: int) -> np.ndarray:
        return self.corpus.ids(int(self.rows[i]))

    labels = ids


def require_memory(size: int, what: str) -> None:
    """InputError unless `size` bytes, and as much again to work with, fit into the machine."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * size > whole:
        raise InputError(f"{what} take {size / 1e9:.3g} GB and this machine has {whole / 1e9:.3g}; "
                         "lower --samples or --eval-tokens, or name fewer --layers")  # fmt: skip
