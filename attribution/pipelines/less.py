"""LESS (arXiv 2402.04333): what a row would do to an adapter under Adam, at several checkpoints.

Dims: N pool rows, Q queries, C checkpoints, B rows of a batch, D features.

    score(n, q) = sum_c eta_c cos(Gamma(g_n; c), grad_q(c)),
    Gamma(g) = m' / (1 - b1^t) / (sqrt(v' / (1 - b2^t)) + eps),
    m' = b1 m + (1 - b1) g,   v' = b2 v + (1 - b2) g^2

Gamma is the update that Adam, with the moments it had at the checkpoint, would make for the row
alone; eta is the mean learning rate up to there. An adapter is small enough for whole gradients, so
nothing is projected.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attribution import score
from attribution.outputs import PARTS, Scored, about, fill, publish, together
from attribution.pipelines.trajectory import Point, Trajectory, by_sink
from attribution.store import Pass
from attribution.targets import flatten, width
from core.checkpoint import Loaded
from core.errors import InputError
from core.rows import Rows
from core.rundir import Run
from training.optim import Optim

LARGEST = 8e9  # bytes of gradients held at once


@functools.partial(jax.jit, static_argnames="optim")
def update(
    features_BD: jax.Array, first_D: jax.Array, second_D: jax.Array, step: int, optim: Optim
) -> jax.Array:
    """Adam's next update for each row's gradient alone, without learning rate, [B,D]."""
    first_BD = optim.b1 * first_D[None] + (1 - optim.b1) * features_BD
    second_BD = optim.b2 * second_D[None] + (1 - optim.b2) * features_BD**2
    first_BD = first_BD / (1 - optim.b1 ** (step + 1))
    second_BD = second_BD / (1 - optim.b2 ** (step + 1))
    return first_BD / (jnp.sqrt(second_BD + optim.eps_root) + optim.eps)


@jax.jit
def _cosines(updates_BD: jax.Array, query_QD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cosines with queries of unit length [B,Q], lengths [B])."""
    norms_B = jnp.linalg.norm(updates_BD, axis=-1)
    unit_BD = updates_BD / jnp.maximum(norms_B, 1e-30)[:, None]
    return jnp.matmul(unit_BD, query_QD.T, precision="highest"), norms_B


def less(
    run: Run,
    trajectory: Trajectory,
    pool_rows: Rows,
    query_rows: Rows,
    source: Callable[[Loaded, Rows], Pass],
    mode: str,
) -> dict[str, Any]:
    """Score every row of the pool; continues a killed run. Returns `summary.json`.

    source: the pass over rows at a checkpoint's model, unprojected.
    """
    if trajectory.optim.name != "adamw":
        raise InputError("LESS uses Adam's moments; give a run with --optimizer adamw")
    began, scored = time.monotonic(), Scored(pool_rows)
    _check_size(
        source(trajectory.at(0).loaded, pool_rows), 1 if mode == "mean" else len(query_rows)
    )
    run.inputs(pool=pool_rows.sha, query=query_rows.sha, **trajectory.hashes())
    total: dict[str, np.ndarray] = {}
    last: tuple[Pass, Pass] | None = None
    for number in range(len(trajectory.steps)):
        point = trajectory.at(number)
        pool, query = source(point.loaded, pool_rows), source(point.loaded, query_rows)
        found = _checkpoint(run, trajectory.optim, point, pool, query, scored, mode)
        eta = float(point.rates.mean())
        parts = {"scores": eta * found["scores"], "norms": found["norms"]}
        total = {k: total.get(k, 0) + v for k, v in (parts | {"losses": found["losses"]}).items()}
        last = pool, query
    assert last is not None
    scores_NQ, count = total["scores"], len(trajectory.steps)
    arrays = {"scores": together(scores_NQ, mode)}
    arrays |= {k: (total[k] / count).astype(np.float32) for k in ("norms", "losses")}
    info = {
        "settings": {"mode": mode, "checkpoints": trajectory.steps},
        "formula": "sum_c eta_c cos(Gamma(g), grad q)",
        **about(scored, *last, None),
        "seconds": time.monotonic() - began,
    }
    return publish(run, scored, [arrays], mode, info)


def _check_size(pool: Pass, queries: int) -> None:
    """Raise when a batch of whole gradients, or the queries', would not fit."""
    features = width(pool.loaded.config, pool.spec)
    held = max(queries, max(len(chosen) for chosen, _ in pool.plan.batches))
    if 4 * held * features > LARGEST:
        raise InputError(f"{held} gradients of {features:,} features need "
                         f"{4e-9 * held * features:.0f} GB; lower --batch-tokens, use --mode mean "
                         "or --modules, or train an adapter")  # fmt: skip


def _checkpoint(
    run: Run, optim: Optim, point: Point, pool: Pass, query: Pass, scored: Scored, mode: str
) -> dict[str, np.ndarray]:
    """Cosines [N,Q] (of the mean unit query, Q = 1, where only the mean is asked for)."""
    config, spec = point.loaded.config, pool.spec
    assert point.first is not None and point.second is not None
    first_D, second_D = (
        flatten(config, spec, by_sink(spec, point.loaded, moment))[0]
        for moment in (point.first, point.second)
    )
    apart = "mean" if mode == "mean" else "each"
    query_QD = score.query_features(query, score.Settings(apart, unit_norm=True))
    unit_QD = jnp.asarray(query_QD, jnp.float32)
    if apart == "each":
        unit_QD = unit_QD / jnp.linalg.norm(unit_QD, axis=-1, keepdims=True)

    def compute(batch: Any) -> tuple[np.ndarray, Any]:
        rows_B, features_BD, losses_B = pool.compute(batch)
        updates_BD = update(features_BD, first_D, second_D, point.step, optim)
        cosines_BQ, norms_B = _cosines(updates_BD, unit_QD)
        return rows_B, {"scores": cosines_BQ, "norms": norms_B, "losses": losses_B}

    columns: dict[str, tuple[int, ...]] = {"scores": unit_QD.shape[:1], "norms": (), "losses": ()}
    folder = run.path / PARTS / f"checkpoint-{point.step}"
    return fill(folder, pool, scored, columns, compute)
