"""What a score run leaves for people and for the next tool: one line a row, and a summary."""

from pathlib import Path
from typing import Any

import numpy as np

from core.files import atomic, dumps, write_json
from core.rows import Rows


def ranking(scores_N: np.ndarray, seed: int = 0) -> np.ndarray:
    """Row numbers from the highest score down; ties in a seeded random order."""
    ties_N = np.random.default_rng(seed).permutation(len(scores_N))
    return np.lexsort((ties_N, -scores_N))


def diagnose(
    folder: Path, rows: Rows, scores: np.ndarray, norms_N: np.ndarray, losses_N: np.ndarray
) -> dict[str, Any]:
    """Write `row_diagnostics.jsonl` and `summary.json` beside the scores; returns the summary.

    scores: [N], or [N,Q] with a column per query, of which the mean over queries is ranked.
    """
    scores_N = np.asarray(scores if scores.ndim == 1 else scores.mean(1), np.float64)
    order = ranking(scores_N)
    rank_N = np.empty(len(order), np.int64)
    rank_N[order] = np.arange(len(order))
    names = [name for name in rows.columns if name in ("id", "doc", "source")]
    provenance = {name: rows.column(name) or [] for name in names}

    def line(i: int) -> dict[str, Any]:
        return {
            "row": i,
            "score": float(scores_N[i]),
            "rank": int(rank_N[i]),
            "percentile": 100 * (1 - (rank_N[i] + 0.5) / len(order)),
            "length": int(rows.lengths[i]),
            "trained": int(rows.trained[i]),
            "norm": float(norms_N[i]),
            "loss": float(losses_N[i]) / int(rows.trained[i]),
            "source": None,
            **{name: values[i] for name, values in provenance.items()},
        }

    with atomic(folder / "row_diagnostics.jsonl") as file:
        for i in range(len(order)):
            file.write(f"{dumps(line(i))}\n".encode())
    summary = {
        "rows": len(order),
        "score": _statistics(scores_N),
        "correlation": {
            "length": _spearman(scores_N, rows.lengths),
            "norm": _spearman(scores_N, norms_N),
            "loss": _spearman(scores_N, losses_N / rows.trained),
        },
        "top": [line(i) for i in order[:10]],
        "bottom": [line(i) for i in order[-10:][::-1]],
    }
    if "source" in provenance:
        source_N = [str(s) for s in provenance["source"]]
        found, which_N = np.unique(source_N, return_inverse=True)
        by_source = np.argsort(which_N, kind="stable")
        groups = np.split(scores_N[by_source], np.cumsum(np.bincount(which_N))[:-1])
        summary["sources"] = {
            str(name): {"rows": len(group), **_statistics(group)}
            for name, group in zip(found, groups, strict=True)
        }
    write_json(folder / "summary.json", summary)
    return summary


def _statistics(x_N: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(x_N, (0.05, 0.5, 0.95))
    return {"mean": x_N.mean(), "sd": x_N.std(), "p5": low, "median": median, "p95": high}


def _spearman(x_N: np.ndarray, y_N: np.ndarray) -> float | None:
    """Rank correlation; None when one side is constant. Ties take their mean rank."""
    x_N, y_N = (_ranks(np.asarray(a, np.float64)) for a in (x_N, y_N))
    if x_N.std() == 0 or y_N.std() == 0:
        return None
    return float(np.corrcoef(x_N, y_N)[0, 1])


def _ranks(x_N: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
