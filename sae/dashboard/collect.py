"""What each feature of an SAE does over many rows: how often, how strongly, and where.

The model reads the rows twice. The first pass counts and adds up every feature. Then it is known
which features are wanted and how strong each gets, so the second can fill their histograms, 50 bins
from 0 to the largest activation, and keep the rows to show: a row counts with its strongest token,
the strongest `TOP` rows are kept, and of the rest, by level, some that chance chooses. What chance
chooses depends on the rows alone, so nothing here depends on batches beyond rounding.

Dims: B rows, T tokens, D width, F features, N wanted features, C tokens encoded at once, H bins,
K rows kept of a feature, W tokens around the strongest.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import taps
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import atomic, read_npz
from core.inference import overlapped
from core.model import Variables, full_precision
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead
from core.sharding import local_mesh, place, replicated
from core.taps import Tap
from sae.activations import Reader
from sae.coder import Coder, Params, Sae, encode
from sae.pooling import NUMBERS

BINS = 50
TOP, OTHERS = 20, 3  # rows kept: the strongest, and of each lower level
LEVELS = 4  # equal parts of 0 to the largest activation
# Where they stand among the rows kept, and of which level they are (None: of any).
SHELVES = ((0, TOP, None), *((TOP + OTHERS * i, OTHERS, LEVELS - 2 - i) for i in range(LEVELS - 1)))
KEPT = TOP + OTHERS * (LEVELS - 1)
AROUND = 10  # tokens before and behind the strongest
SAVE_EVERY = 50  # batches

State = dict[str, np.ndarray]
Step = Callable[[Any, jax.Array], tuple[Any, Any]]


class Activity(NamedTuple):
    """Of every feature: tokens with it, the sum of its activations, the largest; and all tokens."""

    tokens: int
    active_F: np.ndarray
    total_F: np.ndarray
    max_F: np.ndarray

    @property
    def density_F(self) -> np.ndarray:
        return self.active_F / max(self.tokens, 1)

    @property
    def mean_F(self) -> np.ndarray:
        """Mean activation where it is active."""
        return self.total_F / np.maximum(self.active_F, 1)


class Contexts(NamedTuple):
    """Of wanted features: tokens in each bin, and rows, -1 = none, with the place of the strongest
    token; ids (-1: beyond the row) and activations (NaN: a token that does not count) around it.

    Rows in the order of `SHELVES`: the strongest, descending, then some of each lower level.
    """

    chosen_N: np.ndarray
    histogram_NH: np.ndarray
    row_NK: np.ndarray
    place_NK: np.ndarray
    id_NKW: np.ndarray
    value_NKW: np.ndarray


def over_tokens(
    coder: Coder, params: Params, x_BTD: jax.Array, counted_BT: jax.Array, step: Step, start: Any
) -> tuple[Any, Any]:
    """`jax.lax.scan` of step(carry, f_CF) over the features of all tokens, C at a time.

    Features are 0 where a token does not count; those of abstopk are taken by their size.
    """
    m, d = counted_BT.size, x_BTD.shape[-1]
    c = min(max(128, NUMBERS // coder.d_sae), m)
    pad = ((0, -m % c), (0, 0))
    x_MD = jnp.pad(x_BTD.reshape(m, d), pad)
    counted_M1 = jnp.pad(counted_BT.reshape(m, 1), pad)

    def part(carry: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        f_CF = encode(coder, params, given[0])
        f_CF = jnp.abs(f_CF) if coder.architecture == "abstopk" else f_CF
        return step(carry, jnp.where(given[1], f_CF, 0))

    return jax.lax.scan(part, start, (x_MD.reshape(-1, c, d), counted_M1.reshape(-1, c, 1)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@full_precision
def activity(
    config: ModelConfig,
    execution: Execution,
    tap: Tap,
    coder: Coder,
    variables: Variables,
    params: Params,
    ids_BT: jax.Array,
    counted_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """Active tokens int32, sum and largest activation [F] of a batch's tokens."""
    (x_BTD,) = taps.read(config, execution, variables, ids_BT, (tap,))

    def step(carry: Any, f_CF: jax.Array) -> tuple[Any, None]:
        active_F, total_F, max_F = carry
        sums = active_F + (f_CF > 0).sum(0), total_F + f_CF.sum(0)
        return (*sums, jnp.maximum(max_F, f_CF.max(0))), None

    zeros = jnp.zeros(coder.d_sae, params["W_dec"].dtype)
    start = (jnp.zeros(coder.d_sae, jnp.int32), zeros, zeros)
    return over_tokens(coder, params, x_BTD, counted_BT, step, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@full_precision
def strongest(
    config: ModelConfig,
    execution: Execution,
    tap: Tap,
    coder: Coder,
    variables: Variables,
    params: Params,
    ids_BT: jax.Array,
    counted_BT: jax.Array,
    chosen_N: jax.Array,
    max_N: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of chosen features: histogram int32 [N,H] of a batch's tokens, place [B,N] of each row's
    strongest token, the first among equals, and the activations [B,N,W] around it."""
    (x_BTD,) = taps.read(config, execution, variables, ids_BT, (tap,))
    (b, t), n = counted_BT.shape, len(chosen_N)

    def step(histogram_NH: jax.Array, f_CF: jax.Array) -> tuple[jax.Array, jax.Array]:
        f_CN = jnp.take(f_CF, chosen_N, axis=1)
        bin_CN = (f_CN * (BINS / max_N)[None]).astype(jnp.int32).clip(max=BINS - 1)
        feature_CN = jax.lax.broadcasted_iota(jnp.int32, bin_CN.shape, 1)
        active_CN = (f_CN > 0).astype(jnp.int32)
        return histogram_NH.at[feature_CN, bin_CN].add(active_CN), f_CN

    start = jnp.zeros((n, BINS), jnp.int32)
    histogram_NH, f_PCN = over_tokens(coder, params, x_BTD, counted_BT, step, start)
    f_BTN = f_PCN.reshape(-1, n)[: b * t].reshape(b, t, n)
    place_BN = f_BTN.argmax(1).astype(jnp.int32)
    around_W = jnp.arange(-AROUND, AROUND + 1, dtype=jnp.int32)
    at_BWN = place_BN[:, None] + around_W[None, :, None]
    inside_BWN = (at_BWN >= 0) & (at_BWN < t)
    window_BWN = jnp.take_along_axis(f_BTN, at_BWN.clip(0, t - 1), axis=1)
    return histogram_NH, place_BN, jnp.swapaxes(jnp.where(inside_BWN, window_BWN, 0), 1, 2)


class Collector:
    """The two passes over the rows; each goes on where it was killed, from its file in `folder`."""

    def __init__(
        self,
        folder: Path,
        loaded: Loaded,
        rows: Rows,
        sae: Sae,
        tap: Tap,
        execution: Execution,
        batch_tokens: int,
    ):
        self.folder, self.rows, self.coder = folder, rows, sae.coder
        self.reader = Reader(loaded, execution, rows, (tap,))
        self.plan = Plan(rows, batch_tokens, jax.local_device_count())
        self.params = jax.device_put(dict(sae.params), replicated(local_mesh()))
        self.known = (self.reader.config, execution, tap, sae.coder, self.reader.variables,
                      self.params)  # fmt: skip

    def activity(self) -> Activity:
        """The first pass; InputError if features are not finite."""
        f = self.coder.d_sae
        state = {"active": np.zeros(f, np.int64), "total": np.zeros(f), "max": np.zeros(f)}
        for batch, found in self._pass("activity", state, activity):
            active_F, total_F, max_F = (np.asarray(a_F, np.float64) for a_F in found)
            if not np.isfinite(total_F).all():
                raise InputError(f"{self.rows.path}: features of row {batch.rows_B[0]}, or of "
                                 "others in its batch, are not finite; compute in float32, or look "
                                 "at the model")  # fmt: skip
            state["active"] += active_F.astype(np.int64)
            state["total"] += total_F
            np.maximum(state["max"], max_F, out=state["max"])
        tokens = int(self.reader.counts.sum())
        return Activity(tokens, state["active"], state["total"], state["max"])

    def contexts(self, chosen_N: np.ndarray, max_F: np.ndarray) -> Contexts:
        """The second pass, of chosen features, all of them active somewhere."""
        n, max_N = len(chosen_N), max_F[chosen_N].astype(np.float32)
        state = {
            "histogram": np.zeros((n, BINS), np.int64),
            "row": np.full((KEPT, n), -1, np.int64),
            "place": np.zeros((KEPT, n), np.int32),
            "window": np.zeros((KEPT, n, 2 * AROUND + 1), np.float32),
        }
        more = jnp.asarray(chosen_N.astype(np.int32)), jnp.asarray(max_N)
        chance_R = np.random.default_rng(0).permutation(len(self.rows))

        def find(*given: Any) -> Any:
            return strongest(*given, *more)

        found = self._pass("contexts", state, find) if n else ()
        for batch, (histogram_NH, place_BN, window_BNW) in found:
            state["histogram"] += histogram_NH
            row_BN = np.broadcast_to(batch.rows_B[:, None], place_BN.shape)
            state |= kept(state, row_BN, place_BN, window_BNW, chance_R, max_N)
        row_NK = state["row"].T.copy()
        again_NK = (row_NK[:, :, None] == row_NK[:, None, :TOP]).any(2)
        row_NK[:, TOP:][again_NK[:, TOP:]] = -1
        place_NK, window_NKW = state["place"].T, state["window"].swapaxes(0, 1)
        around = self._around(row_NK, place_NK, window_NKW)
        return Contexts(chosen_N, state["histogram"], row_NK, place_NK, *around)

    def _around(
        self, row_NK: np.ndarray, place_NK: np.ndarray, window_NKW: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids, -1 beyond the row, and activations, NaN where a token does not count."""
        id_NKW, value_NKW = np.full(window_NKW.shape, -1, np.int32), window_NKW.copy()
        for n, k in np.argwhere(row_NK >= 0).tolist():
            ids, first = self.rows.ids(int(row_NK[n, k])), int(place_NK[n, k]) - AROUND
            here = slice(max(first, 0), min(first + 2 * AROUND + 1, len(ids)))
            id_NKW[n, k, here.start - first : here.stop - first] = ids[here]
            if here.start == 0 and ids[0] == self.reader.bos:
                value_NKW[n, k, -first] = np.nan
        return id_NKW, np.where(id_NKW >= 0, value_NKW, np.nan)

    def _pass(
        self, name: str, state: State, compute: Callable[..., Any]
    ) -> Iterator[tuple[Batch, Any]]:
        """Each batch and what `compute` finds in it. `state` is kept now and then, with what the
        caller made of the batches so far, and begins as it was kept."""
        file, lengths = self.folder / f"{name}.npz", self.rows.lengths
        done = 0
        if file.exists():
            held = read_npz(file)
            done = int(held.pop("batches"))
            state |= held

        def found(batch: Batch) -> Any:
            arrays = (batch.ids_BT, self.reader.mask(batch))
            return compute(*self.known, *(place(a_BT, self.reader.over_rows) for a_BT in arrays))

        sizes = [int(lengths[chosen_B[chosen_B >= 0]].sum()) for chosen_B, _ in self.plan.batches]
        with Progress(sum(sizes), f"sae dashboard {name}", "token", sum(sizes[:done])) as bar:
            for k, pair in enumerate(overlapped(read_ahead(self.plan, done), found), done + 1):
                yield pair
                if k % SAVE_EVERY == 0 or k == len(self.plan):
                    save(file, {"batches": np.array(k), **state})
                bar.update(sizes[k - 1])


def save(file: Path, arrays: State) -> None:
    with atomic(file) as opened:
        np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]


def kept(
    state: State,
    row_BN: np.ndarray,
    place_BN: np.ndarray,
    window_BNW: np.ndarray,
    chance_R: np.ndarray,
    max_N: np.ndarray,
) -> State:
    """What stays on each shelf when the rows of a batch are added; equals go by their row.

    row_BN: -1 where there is none. chance_R: a random number of each row, lowest stays.
    """
    pool = {
        "row": np.concatenate([state["row"], row_BN]),
        "place": np.concatenate([state["place"], place_BN]),
        "window": np.concatenate([state["window"], window_BNW]),
    }
    value = pool["window"][:, :, AROUND].astype(np.float64)
    level = np.minimum(value * (LEVELS / max_N), LEVELS - 1).astype(int)
    picks, missing = [], []
    for first, size, wanted in SHELVES:
        at = np.r_[first : first + size, KEPT : len(value)]
        fits = (value[at] > 0) & (pool["row"][at] >= 0)
        key = -value[at]
        if wanted is not None:
            fits &= level[at] == wanted
            key = chance_R[pool["row"][at]].astype(np.float64)
        key = np.where(fits, key, np.inf)
        order = np.lexsort((pool["row"][at], key), axis=0)[:size]
        picks.append(at[order])
        missing.append(np.isinf(np.take_along_axis(key, order, 0)))
    pick_KN, missing_KN = np.concatenate(picks), np.concatenate(missing)
    out = {name: np.take_along_axis(pool[name], pick_KN, 0) for name in ("row", "place")}
    out["window"] = np.take_along_axis(pool["window"], pick_KN[:, :, None], 0)
    for name, nothing in (("row", -1), ("place", 0), ("window", 0)):
        out[name][missing_KN] = nothing
    return out
