"""Influence functions with Kronecker-factored curvature: <g, H^-1 q> of unprojected gradients.

Grosse et al. (arXiv 2308.03296): the queries' gradients meet the inverse of the EK-FAC (or K-FAC,
TKFAC, Shampoo) curvature once, and then every row of the pool by forward-mode differentiation or
in sinks, so that no gradient of the pool is stored. With `cg_steps` the solution is refined on
Gauss-Newton products (`curvature.conjugate`), the closest to MAGIC of the published ones.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from attribution import directions
from attribution.curvature import conjugate, kronecker
from attribution.directions import Mode, Side
from attribution.outputs import Scored, about, aligned, publish
from attribution.store import Pass
from core.errors import InputError
from core.rows import Rows
from core.rundir import Run


def _solved(inversion: kronecker.Inversion) -> Literal["damped", "absolute"]:
    if inversion == "damped" or inversion == "absolute":
        return inversion
    raise InputError(f"conjugate gradients solve a damped system, not {inversion}; use --inversion "
                     "damped or absolute")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    """fit: how the factors are fitted. cg_documents: rows of the Gauss-Newton matrix at most."""

    fit: kronecker.Settings = kronecker.Settings()
    inversion: kronecker.Inversion = "damped"
    damping: float = 0.1
    cg_steps: int = 0
    cg_documents: int = 256
    mode: Mode = "mean"
    tokens: Side | None = None


def ekfac(
    run: Run, pool: Pass, query: Pass, fit_rows: Rows, settings: Settings, factors: Path | None
) -> dict[str, Any]:
    """Score every row of the pool; continues a killed run. Returns `summary.json`.

    factors: folder of the fit, to be made or used again; default: in the run's own.
    """
    began, scored = time.monotonic(), Scored(pool.rows)
    directions.check(query, settings.mode, settings.tokens)
    solved = _solved(settings.inversion) if settings.cg_steps else None
    run.inputs(pool=pool.hashes, query=query.hashes, fit=fit_rows.sha)
    how = (query.loaded, fit_rows, query.spec, query.execution, query.batch_tokens)
    fitted = kronecker.fit(factors or run.path / "factors", *how, settings.fit)
    fitted.check(query.spec, query.loaded.fingerprint)
    gradients = directions.query_tree(query, settings.mode != "mean")
    info: dict[str, Any] = {"settings": dataclasses.asdict(settings), "formula": "<g, H^-1 q>"}
    if solved:
        asked = conjugate.Settings(
            settings.cg_steps, settings.cg_documents, settings.fit.seed, solved,
            settings.damping,
        )  # fmt: skip
        tree, norms_SQ = conjugate.refine(run.path, *how, fitted, gradients, asked)
        info |= {"cg_residuals": norms_SQ.mean(1).tolist()}
    else:
        tree = kronecker.apply(fitted, gradients, settings.inversion, settings.damping)
    part = directions.fill_directions(run.path, pool, scored, tree, settings.mode, settings.tokens)
    info |= aligned(settings.tokens) | about(scored, pool, query, None)
    info |= {"seconds": time.monotonic() - began}
    return publish(run, scored, [part], settings.mode, info)
