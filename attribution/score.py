"""Influence scores of pool rows on a query: inner products of preconditioned gradients.

Dims: N pool rows, Q queries, B rows of a batch, D features, S sites, E features of a site.

With g a pool gradient, q_j the query gradients and H their (or the pool's) autocorrelation:

    clean, plain:      score = <g, H^-1 mean_j q_j>
    clean, unit norm:  score = <u(H^-1/2 g), mean_j u(H^-1/2 q_j)>,   u(x) = x / |x|
    notes:             score = <u(g), u((H + .1 mean|H_ij|)^-1 mean_j u(q_j))>

`clean` with unit norm is the cosine in the metric H^-1 (TrackStar, arXiv 2410.17413); `notes` is
the one-sided form of the research notes. `max` and `each` keep the q_j apart. Positive scores are
proponents: a step along the row's gradient lowers the query's loss.
"""

import dataclasses
import functools
import time
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import gradients, precondition
from attribution.diagnostics import diagnose
from attribution.store import Features, Pass, Store, batches, check_finite, rows_before
from core.errors import InputError
from core.files import atomic, read_npz, write_json
from core.memmap import FilledArray
from core.progress import Progress
from core.rows import Rows, read_ahead
from core.rundir import Run

LARGEST_QUERY = 4e9  # bytes of query gradients held at once
FORMULAS = {
    ("clean", False): "<g, H^-1 mean_j q_j>",
    ("clean", True): "<u(H^-1/2 g), mean_j u(H^-1/2 q_j)>, u(x) = x/|x|",
    ("notes", False): "<g, (H + c mean|H_ij| I)^-1 mean_j q_j>",
    ("notes", True): "<u(g), u((H + c mean|H_ij| I)^-1 mean_j u(q_j))>, u(x) = x/|x|",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """mixed = 0.99 H_query + 0.01 H_pool, as in the notes."""

    mode: Literal["mean", "max", "each"] = "mean"
    preconditioner: Literal["none", "query", "pool", "mixed"] = "none"
    damping: float = 0.1
    unit_norm: bool = False
    convention: Literal["clean", "notes"] = "clean"


class Direction(NamedTuple):
    """What pool features meet: directions [Q,D] and, two-sided, H^-1/2 for the pool side."""

    query_QD: jax.Array
    root_SEE: jax.Array | None


def _unit(x_BD: jax.Array) -> jax.Array:
    """x / |x|, zero for zero. Scaled first: the squares of tiny gradients underflow."""
    largest_B1 = jnp.abs(x_BD).max(-1, keepdims=True)
    x_BD = x_BD / jnp.where(largest_B1 > 0, largest_B1, 1)
    return x_BD / jnp.maximum(jnp.linalg.norm(x_BD, axis=-1, keepdims=True), 1)


@functools.partial(jax.jit, static_argnames="unit_norm")
def _query_batch(features_BD: jax.Array, unit_norm: bool) -> tuple[jax.Array, jax.Array]:
    """(features, of unit length if wanted; the largest absolute feature of each row)."""
    largest_B = jnp.abs(features_BD).max(-1)
    return _unit(features_BD) if unit_norm else features_BD, largest_B


def query_features(source: Pass, keep_apart: bool, unit_norm: bool) -> np.ndarray:
    """Query gradients [Q,D] in row order, or their mean [1,D] when they need not stay apart."""
    n, width = len(source.rows), gradients.width(source.loaded.config, source.spec)
    if keep_apart and 4 * n * width > LARGEST_QUERY:
        raise InputError(
            f"{n} query gradients of {width:,} features need {4e-9 * n * width:.0f} GB; lower "
            "--projection-dim (0 is unprojected) or use fewer queries"
        )
    kept_QD = np.zeros((n, width), np.float32) if keep_apart else np.zeros((1, width))

    def compute(out: Features) -> tuple[np.ndarray, Any]:
        return out.rows_B, _query_batch(out.features_BD, unit_norm and not keep_apart)

    with Progress(n, "query gradients", "row") as bar:
        for _, (rows_B, (features_BD, largest_B)) in batches(source, compute):
            check_finite(source.rows, rows_B, largest_B)
            real_B = rows_B >= 0
            if (dead_B := real_B & (largest_B == 0)).any():
                row = rows_B[dead_B.argmax()]
                raise InputError(f"{source.rows.path} row {row} has a zero gradient; drop it")
            if keep_apart:
                kept_QD[rows_B[real_B]] = features_BD[real_B]
            else:
                kept_QD += features_BD[real_B].sum(0, dtype=np.float64)
            bar.update(int(real_B.sum()))
    return kept_QD if keep_apart else (kept_QD / n).astype(np.float32)


def pool_autocorrelation(run: Run, source: Pass | Store, sites: int) -> np.ndarray:
    """H of the pool [S,E,E], in one pass that saves its state every minute and resumes."""
    file = run.path / "autocorrelation.npz"  # h: the sum so far; batches, rows: what is in it
    state = read_npz(file) if file.exists() else {"h": None, "batches": 0, "rows": 0}
    h_SEE, start, seen = state["h"], int(state["batches"]), int(state["rows"])
    saved = time.monotonic()
    with Progress(len(source.plan), "pool autocorrelation", "batch", start) as bar:
        for number, batch in enumerate(read_ahead(source.plan, start), start + 1):
            out = source.compute(batch)
            if h_SEE is None:
                e = out.features_BD.shape[1] // sites
                h_SEE = jnp.zeros((sites, e, e), jnp.float32)
            h_SEE = precondition.add_autocorrelation(h_SEE, out.features_BD)
            seen += int((out.rows_B >= 0).sum())
            bar.update(1)
            if number == len(source.plan) or time.monotonic() - saved > 60:
                with atomic(file) as stream:
                    np.savez(stream, h=np.asarray(h_SEE), batches=number, rows=seen)
                saved = time.monotonic()
    if not np.isfinite(h_SEE).all():
        raise InputError("a pool row has a gradient that is not finite; check the model's weights, "
                         "or use --dtype float32")  # fmt: skip
    return np.asarray(h_SEE) / seen


def directions(settings: Settings, query_QD: np.ndarray, h_SEE: np.ndarray | None) -> Direction:
    """Precondition, normalise and aggregate the query gradients as `settings` say."""
    queries = jnp.asarray(query_QD)
    mean = settings.mode == "mean"
    if h_SEE is None:
        if not mean:  # the mean was taken, of unit vectors where wanted, as they came
            queries = _unit(queries) if settings.unit_norm else queries
        if settings.convention == "notes" and settings.unit_norm:
            queries = _unit(queries)
        return Direction(queries, None)
    if settings.convention == "notes":
        queries = _unit(queries) if settings.unit_norm else queries
        queries = queries.mean(0, keepdims=True) if mean else queries
        inverse = precondition.inverse_power(h_SEE, 1.0, settings.damping, "entry")
        queries = precondition.apply(jnp.asarray(inverse), queries)
        return Direction(_unit(queries) if settings.unit_norm else queries, None)
    power = 0.5 if settings.unit_norm else 1.0
    inverse_SEE = jnp.asarray(precondition.inverse_power(h_SEE, power, settings.damping))
    queries = precondition.apply(inverse_SEE, queries)
    queries = _unit(queries) if settings.unit_norm else queries
    queries = queries.mean(0, keepdims=True) if mean else queries
    return Direction(queries, inverse_SEE if settings.unit_norm else None)


@functools.partial(jax.jit, static_argnames=("mode", "unit_norm"))
def batch_scores(
    direction: Direction, features_BD: jax.Array, mode: str, unit_norm: bool
) -> tuple[jax.Array, jax.Array]:
    """(scores [B], or [B,Q] for `each`; raw gradient norms [B]) of one batch."""
    norms_B = jnp.linalg.norm(features_BD, axis=-1)
    if direction.root_SEE is not None:
        features_BD = precondition.apply(direction.root_SEE, features_BD)
    if unit_norm:
        features_BD = _unit(features_BD)
    scores_BQ = jnp.matmul(features_BD, direction.query_QD.T, precision="highest")
    if mode == "each":
        return scores_BQ, norms_B
    return scores_BQ.max(-1), norms_B


def score(
    run: Run, pool: Pass | Store, query: Pass, settings: Settings, pool_rows: Rows
) -> dict[str, Any]:
    """Score every pool row into `run`'s folder; continues a killed run. Returns `summary.json`."""
    config, spec = query.loaded.config, query.spec
    n, n_query = len(pool_rows), len(query.rows)
    began = time.monotonic()
    if settings.preconditioner != "none":
        precondition.check_size(spec.projection.dim)
    # The number of devices decides the batches' sizes, so a resume needs the same.
    run.inputs(pool=pool.hashes, query=query.hashes, devices=jax.device_count())
    apart = settings.mode != "mean" or settings.preconditioner != "none"
    query_QD = query_features(query, apart, settings.unit_norm)
    n_sites = len(gradients.features(config, spec))
    h_SEE = None
    if settings.preconditioner in ("query", "mixed"):
        e = query_QD.shape[1] // n_sites
        zero_SEE = jnp.zeros((n_sites, e, e), jnp.float32)
        h_SEE = np.asarray(precondition.add_autocorrelation(zero_SEE, query_QD)) / n_query
    if settings.preconditioner in ("pool", "mixed"):
        h_pool_SEE = pool_autocorrelation(run, pool, n_sites)
        h_SEE = h_pool_SEE if h_SEE is None else 0.99 * h_SEE + 0.01 * h_pool_SEE
    direction = directions(settings, query_QD, h_SEE)

    shape = (n, n_query) if settings.mode == "each" else (n,)
    scores = FilledArray(run.path / "scores.npy", shape)
    columns = {name: FilledArray(run.path / f"{name}.npy", (n,)) for name in ("norms", "losses")}
    arrays = [scores, *columns.values()]
    start = min(array.next_batch for array in arrays)
    for array in arrays:
        array.next_batch = start

    def compute(features: Features) -> tuple[np.ndarray, Any, Any]:
        out = batch_scores(direction, features.features_BD, settings.mode, settings.unit_norm)
        return (features.rows_B, out, features.losses_B)

    with Progress(n, "attribute score", "row", rows_before(pool, start)) as bar:
        for _, (rows_B, (scores_B, norms_B), losses_B) in batches(pool, compute, start):
            check_finite(pool_rows, rows_B, norms_B)
            for array, values in zip(arrays, (scores_B, norms_B, losses_B), strict=True):
                array.write(rows_B, values)
            bar.update(int((rows_B >= 0).sum()))
    values, norms, losses = (array.finish() for array in arrays)
    info = {
        "format": "taproot-scores",
        "sign": "positive = proponent (gradient inner product)",
        "settings": dataclasses.asdict(settings),
        "formula": FORMULAS[settings.convention, settings.unit_norm],
        "spec": spec.to_json(),
        "coverage": gradients.coverage(config, spec),
        "queries": n_query,
        "tokenizer": query.loaded.tokenizer and str(query.loaded.tokenizer),
        "pool": {"path": str(pool_rows.path), **pool.hashes},
        "query": {"path": str(query.rows.path), **query.hashes},
        "seconds": time.monotonic() - began,
    }
    write_json(run.path / "info.json", info)
    return diagnose(run.path, pool_rows, values, norms, losses)
