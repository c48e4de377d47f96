"""SOURCE (arXiv 2405.12186): influence through a training cut into segments, each one quadratic.

Dims: L layers, Q queries, I inputs, O outputs, S segments, C checkpoints of a segment.

In a segment with curvature eigenvalues s, in the basis of its Kronecker factors, and the sum eta of
its learning rates, gradient descent shrinks a perturbation by exp(-eta s) and answers a row with
(1 - exp(-eta s)) / s. The query's gradient q_S at the end walks back,

    r_l = Q f(s) Q^T q_l,  f(s) = (1 - exp(-eta s)) / s,      q_{l-1} = Q exp(-eta s) Q^T q_l,
    score(n) = sum_l mean_{c in l} <r_l, g_n(theta_c)>.

Under Adam the step's own scale P = 1 / (sqrt(v) + eps) is diagonal, the curvature is not: the walk
back uses s = P diag(H) entry by entry, and r_l = H^-1 ((1 - exp(-eta s)) q_l) with damped EK-FAC.
Nothing is divided by the number of rows. Positive = proponent (Bergson stores the negative).
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import directions
from attribution.curvature import kronecker
from attribution.curvature.kronecker import Factors, Inverse
from attribution.directions import Mode
from attribution.outputs import PARTS, Scored, about, publish
from attribution.pipelines.trajectory import Point, Trajectory, by_sink
from attribution.store import Pass
from attribution.targets import Tree
from core.checkpoint import Loaded
from core.errors import InputError
from core.rows import Rows
from core.rundir import Run


@dataclasses.dataclass(frozen=True)
class Settings:
    """as_sgd: the plain formula whatever the optimizer was. damping: of Adam's inverse only."""

    segments: int = 3
    fit: kronecker.Settings = kronecker.Settings()
    damping: float = 0.1
    as_sgd: bool = False
    mode: Mode = "mean"


class Segment(NamedTuple):
    """Curvature of all its checkpoints together, the sum of its learning rates, and Adam's scale.

    scale: [L,1,O,I(+1)] by sink; None for gradient descent.
    """

    factors: Factors
    eta: float
    scale: Tree | None = None


def walk(segments: Sequence[Segment], query: Tree, damping: float) -> list[Tree]:
    """What each segment's rows meet, r_l [L,Q,O,I(+1)], from the query's gradient at the end."""
    found: list[Tree] = []
    for segment in reversed(segments):
        values = {s: np.maximum(v, 0).astype(np.float64) for s, v in segment.factors.values.items()}
        if segment.scale is None:
            answer = {s: -np.expm1(-segment.eta * v) for s, v in values.items()}
            answer = {
                s: np.where(v > 0, answer[s] / np.where(v > 0, v, 1), segment.eta)
                for s, v in values.items()
            }
            left = {s: np.exp(-segment.eta * v) for s, v in values.items()}
            found.append(kronecker.multiply(_inverse(segment.factors, answer), query))
            query = kronecker.multiply(_inverse(segment.factors, left), query)
            continue
        decay = {
            s: jnp.exp(-segment.eta * scale * _diagonal(segment.factors, s))
            for s, scale in segment.scale.items()
        }
        met = {s: (1 - decay[s]) * q for s, q in query.items()}
        found.append(kronecker.apply(segment.factors, met, "damped", damping))
        query = {s: decay[s] * q for s, q in query.items()}
    return found[::-1]


def _inverse(factors: Factors, multipliers: dict[str, np.ndarray]) -> Inverse:
    as_float = {sink: jnp.asarray(m, jnp.float32) for sink, m in multipliers.items()}
    return Inverse(jax.tree.map(jnp.asarray, factors.vectors), as_float)


def _diagonal(factors: Factors, sink: str) -> jax.Array:
    """diag(H) of a site as [L,1,O,I(+1)]: (Q_G * Q_G) lambda (Q_A * Q_A)^T."""
    inputs_LII, outputs_LOO = (jnp.asarray(v) ** 2 for v in factors.vectors[sink])
    values_LOI = jnp.asarray(np.maximum(factors.values[sink], 0), jnp.float32)
    return (outputs_LOO @ values_LOI @ jnp.swapaxes(inputs_LII, 1, 2))[:, None]


def source(
    run: Run,
    trajectory: Trajectory,
    pool_rows: Rows,
    query_rows: Rows,
    make: Callable[[Loaded, Rows], Pass],
    settings: Settings,
) -> dict[str, Any]:
    """Score every row of the pool; continues a killed run. Returns `summary.json`.

    make: the pass over rows at a checkpoint's model, unprojected.
    """
    count = len(trajectory.steps)
    if trajectory.optim.name == "muon":
        raise InputError("SOURCE has no formula for muon's steps; trace a run of adamw or sgd")
    if settings.segments < 1 or count % settings.segments:
        raise InputError(f"--segments {settings.segments} does not divide the run's {count} "
                         f"checkpoints (steps {trajectory.steps}); choose a divisor")  # fmt: skip
    began, scored = time.monotonic(), Scored(pool_rows)
    run.inputs(pool=pool_rows.sha, query=query_rows.sha, **trajectory.hashes())
    each = count // settings.segments
    parts = [range(number * each, (number + 1) * each) for number in range(settings.segments)]
    pool, query = (make(trajectory.at(count - 1).loaded, rows) for rows in (pool_rows, query_rows))
    directions.check(query, settings.mode, None)
    segments = [_segment(run, trajectory, pool, part, settings) for part in parts]
    gradients = directions.query_tree(query, settings.mode != "mean")
    answers = walk(segments, gradients, settings.damping)
    total: dict[str, np.ndarray] = {}
    for part, tree in zip(parts, answers, strict=True):
        for number in part:
            here = make(trajectory.at(number).loaded, pool_rows)
            folder = run.path / PARTS / f"checkpoint-{number}"
            apart = "mean" if settings.mode == "mean" else "each"
            found = directions.fill_directions(folder, here, scored, tree, apart)
            weights = {"scores": 1 / each, "losses": 1 / count}
            total = {k: total.get(k, 0) + weights[k] * found[k] for k in weights}
    scores = total["scores"].max(-1) if settings.mode == "max" else total["scores"]
    arrays = {"scores": scores.astype(np.float32), "losses": total["losses"].astype(np.float32)}
    info = {
        "settings": {**dataclasses.asdict(settings), "checkpoints": trajectory.steps},
        "formula": "sum_l mean_c <r_l, g(theta_c)>",
        **about(scored, pool, query, None),
        "seconds": time.monotonic() - began,
    }
    return publish(run, scored, [arrays], settings.mode, info)


def _segment(
    run: Run, trajectory: Trajectory, pool: Pass, part: range, settings: Settings
) -> Segment:
    optim = trajectory.optim
    points = [trajectory.at(number) for number in part]
    models = [point.loaded for point in points]
    factors = kronecker.fit(
        run.path / PARTS / f"factors-{part.start}", models, pool.rows, pool.spec, pool.execution,
        pool.batch_tokens, settings.fit,
    )  # fmt: skip
    eta = float(np.concatenate([point.rates for point in points]).sum()) / (1 - optim.momentum)
    if optim.name != "adamw" or settings.as_sgd:
        return Segment(factors, eta)
    return Segment(factors, eta, _scale(pool, trajectory, points))


def _scale(pool: Pass, trajectory: Trajectory, points: Sequence[Point]) -> Tree:
    """Adam's 1 / (sqrt(v) + eps), v debiased and averaged over the segment's checkpoints."""
    optim = trajectory.optim
    sums: Tree | None = None
    for point in points:
        assert point.second is not None
        v = by_sink(pool.spec, point.loaded, point.second)
        v = jax.tree.map(lambda x, t=point.step: x / (1 - optim.b2**t), v)
        sums = v if sums is None else jax.tree.map(jnp.add, sums, v)
    return jax.tree.map(
        lambda x: 1 / (jnp.sqrt(x / len(points) + optim.eps_root) + optim.eps), sums
    )
