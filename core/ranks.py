"""Rank statistics: correlation, retrieval, separation, and how sure one may be of them.

Dims: N candidates, R bootstrap draws, K units drawn.

Ties take their mean rank throughout (Kendall 1945), so that a method that scores everything alike
is as good as chance and no better. Intervals are percentiles of the bootstrap (Efron 1979).
"""

from collections.abc import Callable

import numpy as np

DRAWS = 1000


def ranks(x_N: np.ndarray) -> np.ndarray:
    """From 1 for the smallest; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(x_N, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def spearman(x_N: np.ndarray, y_N: np.ndarray) -> float | None:
    """Rank correlation; None when one side is constant."""
    return pearson(ranks(np.asarray(x_N, np.float64)), ranks(np.asarray(y_N, np.float64)))


def pearson(x_N: np.ndarray, y_N: np.ndarray) -> float | None:
    """Linear correlation; None when one side is constant."""
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return None
    return float(np.corrcoef(x_N, y_N)[0, 1])


def auc(scores_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Chance that a positive scores above a negative, half of ties counted (area under the ROC).

    The Mann-Whitney statistic; NaN unless there are both kinds.
    """
    positive_N = np.asarray(positive_N, bool)
    n, m = int(positive_N.sum()), int((~positive_N).sum())
    if not n or not m:
        return float("nan")
    return float((ranks(scores_N)[positive_N].sum() - n * (n + 1) / 2) / (n * m))


def places(scores_N: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """Places of the candidates `gold` in the ranking from the highest score, 1 = first, sorted."""
    return np.sort(ranks(-np.asarray(scores_N, np.float64))[gold])


def reciprocal_rank(places_G: np.ndarray) -> float:
    """1 / place of the best gold candidate; its mean over queries is the MRR."""
    return float(1 / places_G[0])


def recall(places_G: np.ndarray, k: int, strict: bool = False) -> float:
    """Whether any gold candidate is among the first k; strict: whether all of them are."""
    return float(places_G[-1 if strict else 0] <= k)


def bootstrap(
    statistic: Callable[[np.ndarray], float | None], n: int, seed: int = 0, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of `statistic(chosen)`, chosen [K=n] of n units with replacement.

    Draws on which the statistic is None are left out. None for fewer than two units.
    """
    if n < 2:
        return None
    chosen_RK = np.random.default_rng([seed, n]).integers(0, n, (DRAWS, n))
    values = [v for v in map(statistic, chosen_RK) if v is not None and np.isfinite(v)]
    if not values:
        return None
    low, high = np.quantile(values, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)
