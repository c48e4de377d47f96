"""Scores along directions as large as the model, of which nothing is stored or projected.

Dims: N pool rows, L layers, Q directions, I inputs, O outputs, B rows of a batch, T tokens.

A direction is a tree [L,Q,O,I(+1)] by sink, such as queries' gradients, perhaps preconditioned.
One is followed forward (`attribution.exact`); several meet each row's gradient in sinks
(`attribution.dot`), where the model is run once for all of them. Both are exact.
"""

import functools
import time
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attribution import dot, exact
from attribution.outputs import Arrays, Scored, about, aligned, fill, folder_of, publish
from attribution.score import check_query
from attribution.store import Pass
from attribution.targets import Tree, targets, width
from core import distributed
from core.errors import InputError
from core.inference import overlapped
from core.progress import Progress
from core.rows import read_ahead
from core.rundir import Run

LARGEST = 16e9  # bytes of directions on a device
Mode = Literal["mean", "max", "each"]
Side = Literal["gradient", "loss"]


def check(source: Pass, mode: Mode, tokens: Side | None) -> None:
    """Raise for what an unprojected direction cannot score."""
    if source.spec.projection.dim or source.spec.normalizer:
        raise InputError("exact scores take gradients as they are; use --projection-dim 0 and no "
                         "--normalizer")  # fmt: skip
    if tokens and mode == "max":
        raise InputError("--tokens needs --mode mean or each: the greatest score's query differs "
                         "from row to row")  # fmt: skip
    if tokens == "gradient":
        dot.check_tokens(source.loaded.config, source.spec, source.aux)


def query_tree(source: Pass, keep_apart: bool) -> Tree:
    """The queries' unprojected gradients [L,Q,O,I(+1)] by sink, or their mean, Q = 1."""
    config, spec, n = source.loaded.config, source.spec, len(source.rows)
    size = 4 * width(config, spec) * (n if keep_apart else 1)
    if size > LARGEST:
        raise InputError(f"{n if keep_apart else 1} unprojected gradients need {size / 1e9:.0f} GB;"
                         " use --mode mean, a smaller --query-batch, or --modules")  # fmt: skip
    return _each(source) if keep_apart else _mean(source)


@jax.jit
def _sum(tree: Tree, other: Tree, factor: float) -> Tree:
    return jax.tree.map(lambda a, b: a + factor * b, tree, other)


@jax.jit
def _mean_of(total: Tree, n: int) -> tuple[Tree, jax.Array]:
    """(total / n, its largest absolute entry)."""
    mean = jax.tree.map(lambda x: x / n, total)
    return mean, jnp.max(jnp.array([jnp.abs(x).max() for x in jax.tree.leaves(mean)]))


@functools.partial(jax.jit, static_argnames=("mode", "by_token", "tokens"))
def _values(
    scores: jax.Array, losses: jax.Array, mode: Mode, by_token: bool, tokens: bool
) -> dict[str, jax.Array]:
    """A batch's columns, of scores [B,T,Q] or [B,Q] and losses [B,T] or [B]."""
    scores_BQ = scores.sum(1) if by_token else scores
    values = {
        "scores": scores_BQ if mode == "each" else scores_BQ.max(-1),
        "losses": losses if losses.ndim == 1 else losses.sum(1),
    }
    if tokens:
        values["token_scores"] = scores if mode == "each" else scores[..., 0]
    return values


def _mean(source: Pass) -> Tree:
    total: Tree | None = None
    with Progress(len(source.rows), "query gradients", "row") as bar:
        for batch in source.plan:
            rows_B, arguments = source.inputs(batch)
            found = exact.summed_gradient(
                source.loaded.config, source.execution, source.spec, source.variables, *arguments
            )
            total = found if total is None else _sum(total, found, 1.0)
            bar.update(int((rows_B >= 0).sum()))
    assert total is not None
    mean, largest = _mean_of(total, len(source.rows))
    if not np.isfinite(largest):
        raise InputError(f"{source.rows.path} has a gradient that is not finite; check the model's "
                         "weights, or use --dtype float32")  # fmt: skip
    return mean


def _each(source: Pass) -> Tree:
    config, spec = source.loaded.config, source.spec
    kept_QD = np.zeros((len(source.rows), width(config, spec)), np.float32)
    with Progress(len(source.rows), "query gradients", "row") as bar:
        for _, (rows_B, features_BD, _) in overlapped(read_ahead(source.plan), source.compute):
            check_query(source.rows, rows_B, np.abs(features_BD).max(-1))
            real_B = rows_B >= 0
            kept_QD[rows_B[real_B]] = features_BD[real_B]
            bar.update(int(real_B.sum()))
    return dot.by_sink(config, spec, jnp.asarray(kept_QD))


def fill_directions(
    folder: Path, pool: Pass, scored: Scored, tree: Tree, mode: Mode, tokens: Side | None = None
) -> Arrays:
    """`scores`, [N,Q] for `each`, `losses` and perhaps `token_scores` of rows; resumable.

    tree: 0 in layers that are not collected. pool: unprojected, see `check`.
    """
    config, spec = pool.loaded.config, pool.spec
    source: Any = scored.source(pool)
    found = targets(config, spec)
    several = tree[found[0].sink].shape[1]
    # Sinks that meet directions sit at the blocks' linear maps only.
    forward = tokens == "loss" or (not tokens and several == 1)
    forward = forward or not all(target.stacked for target in found)
    q = (several,) if mode == "each" else ()
    columns: dict[str, tuple[int, ...]] = {"scores": q, "losses": ()}
    if tokens:
        columns["token_scores"] = (int(scored.rows.lengths.max()), *q)
    along: Any = exact.tangents(config, spec, tree) if forward else tree
    along = jax.device_put(along, jax.tree.leaves(pool.variables)[0].sharding)
    how = config, pool.execution, spec, pool.variables, along

    def compute(batch: Any) -> tuple[np.ndarray, Any]:
        rows_B, arguments = source.inputs(batch)
        if forward:
            scores, losses = exact.token_scores(*how, *arguments)
        else:
            scores, losses = dot.scores(*how, *arguments, tokens=bool(tokens))
        by_token = forward or bool(tokens)
        return rows_B, _values(scores, losses, mode, by_token, bool(tokens))

    return fill(folder, source, scored, columns, compute)


def score_exact(
    run: Run,
    pool: Pass,
    query: Pass,
    scored: Scored,
    mode: Mode = "mean",
    tokens: Side | None = None,
    query_batch: int = 0,
    control: Pass | None = None,
) -> dict[str, Any]:
    """<g, mean_j q_j>, <g, q_j>, or the greatest of them, of unprojected gradients; resumable.

    query_batch: queries held at once where they are kept apart, one pass over the pool each; 0 =
    as many as fit. Returns `summary.json`.
    """
    began = time.monotonic()
    check(pool, mode, tokens)
    if control is not None and mode != "mean":
        raise InputError("--control is taken off the mean query; use --mode mean")
    run.inputs(pool=pool.hashes, query=query.hashes, control=control and control.hashes,
               candidates=scored.sha, **distributed.layout())  # fmt: skip
    config, spec, n = query.loaded.config, query.spec, len(query.rows)
    size = n if mode == "mean" else query_batch or max(1, int(LARGEST / (4 * width(config, spec))))
    starts = range(0, n, size)
    folder, parts = folder_of(run, scored, len(starts)), []
    for number, start in enumerate(starts):
        rows = query.rows.take(range(start, min(start + size, n)))
        tree = query_tree(query.of(rows), mode != "mean")
        if control is not None:
            tree = _sum(tree, query_tree(control, False), -1.0)
        where = folder / f"slice-{number}" if len(starts) > 1 else folder
        parts.append(fill_directions(where, pool, scored, tree, mode, tokens))
    info = {
        "settings": {"exact": True, "mode": mode, "tokens": tokens},
        "formula": "<g, mean_j q_j>" if mode == "mean" else "<g, q_j>",
        **aligned(tokens),
        **about(scored, pool, query, control),
        "seconds": time.monotonic() - began,
    }
    return publish(run, scored, parts, mode, info)
