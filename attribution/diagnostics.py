"""What a score run leaves for people and for the next tool: one line a row, and a summary."""

from pathlib import Path
from typing import Any

import numpy as np

from core.files import atomic, dumps, write_json
from core.ranks import spearman
from core.rows import Rows


def ranking(scores_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """Row numbers from the highest score down; ties in a seeded random order."""
    ties_N = np.random.default_rng(seed).permutation(len(scores_N))
    return np.lexsort((ties_N, -scores_N))


def diagnose(
    folder: Path,
    rows: Rows,
    scores: np.ndarray,
    norms_N: np.ndarray | None,
    losses_N: np.ndarray | None,
    turn: float = 1.0,
) -> dict[str, Any]:
    """Write `row_diagnostics.jsonl` and `summary.json` beside the scores; returns the summary.

    scores: [N], or [N,Q] with a column per query, of which the mean over queries is ranked; they
    are written as they are. turn: times a score, larger = stronger proponent, which ranks and
    correlations are of. Rows that were not scored hold NaN, as scores that overflowed may, and are
    left out. losses_N: sums over a row's supervised tokens.
    """
    scores_N = np.asarray(scores if scores.ndim == 1 else scores.mean(1), np.float64)
    scored_K = np.flatnonzero(np.isfinite(scores_N))
    order_K = scored_K[ranking(turn * scores_N[scored_K])]
    rank_N = np.zeros(len(scores_N), np.int64)
    rank_N[order_K] = np.arange(len(order_K))
    names = [name for name in rows.columns if name in ("id", "doc", "source")]
    provenance = {name: rows.column(name) or [] for name in names}

    def line(i: int) -> dict[str, Any]:
        return {
            "row": i,
            "score": float(scores_N[i]),
            "rank": int(rank_N[i]),
            "percentile": 100 * (1 - (rank_N[i] + 0.5) / len(order_K)),
            "length": int(rows.lengths[i]),
            "trained": int(rows.trained[i]),
            "norm": None if norms_N is None else float(norms_N[i]),
            "loss": None if losses_N is None else float(losses_N[i]) / int(rows.trained[i]),
            "source": None,
            **{name: values[i] for name, values in provenance.items()},
        }

    def correlation(values_N: np.ndarray | None) -> float | None:
        if values_N is None or not len(scored_K):
            return None
        return spearman(turn * scores_N[scored_K], values_N[scored_K])

    with atomic(folder / "row_diagnostics.jsonl") as file:
        for i in scored_K.tolist():
            file.write(f"{dumps(line(i))}\n".encode())
    summary = {
        "rows": len(order_K),
        "score": _statistics(scores_N[scored_K]),
        "correlation": {
            "length": correlation(rows.lengths),
            "norm": correlation(norms_N),
            "loss": correlation(None if losses_N is None else losses_N / rows.trained),
        },
        "top": [line(i) for i in order_K[:10].tolist()],
        "bottom": [line(i) for i in order_K[-10:][::-1].tolist()],
    }
    if "source" in provenance and len(scored_K):
        source_K = [str(provenance["source"][i]) for i in scored_K]
        found, which_K = np.unique(source_K, return_inverse=True)
        by_source = np.argsort(which_K, kind="stable")
        groups = np.split(scores_N[scored_K[by_source]], np.cumsum(np.bincount(which_K))[:-1])
        summary["sources"] = {
            str(name): {"rows": len(group), **_statistics(group)}
            for name, group in zip(found, groups, strict=True)
        }
    write_json(folder / "summary.json", summary)
    return summary


def _statistics(x_N: np.ndarray) -> dict[str, float | None]:
    if not len(x_N):
        return dict.fromkeys(("mean", "sd", "p5", "median", "p95"))
    low, median, high = np.quantile(x_N, (0.05, 0.5, 0.95))
    return {"mean": x_N.mean(), "sd": x_N.std(), "p5": low, "median": median, "p95": high}
