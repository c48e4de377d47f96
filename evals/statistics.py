"""The statistics of a data-selection experiment: means, paired intervals and retrieval measures.

Two arms that share seeds and items are compared by the mean of their per-item difference. Both the
seeds and the items are samples, so the interval resamples both (a two-level paired bootstrap):

    mean* = (1 / S I) sum_si  m_s n_i  difference[s, i],    m ~ resampled seeds, n ~ resampled items

Resampling counts (m, n) instead of gathered copies makes a block of resamples one matrix product.
The interval errs on the wide side: noise of single (seed, item) cells counts up to three times
(Owen, "The pigeonhole bootstrap", 2007).

Dimension key: S seeds, I items, R resamples in a block, N chunks.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BLOCK_ELEMENTS = 1 << 22


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval, all in the unit of the data."""

    mean: float
    low: float
    high: float


def mean_stderr(x: np.ndarray) -> tuple[float, float]:
    """Mean of `x` and its standard error with n-1 degrees of freedom (NaN for one value)."""
    x = np.asarray(x, np.float64).ravel()
    if x.size == 0:
        raise ValueError("mean_stderr needs at least one value")
    stderr = float(x.std(ddof=1)) / math.sqrt(x.size) if x.size > 1 else math.nan
    return float(x.mean()), stderr


def paired_bootstrap(difference_SI: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Interval:
    """95 % percentile interval of the mean difference, over seeds and items.

    `difference_SI` is arm A minus arm B for each shared seed and item; the values of a single arm
    give that arm's own interval. With one seed the interval covers the choice of items only.
    The same data, `resamples` and `seed` give the same interval, bit for bit.
    """
    return paired_test(difference_SI, resamples, seed)[0]


def paired_test(
    difference_SI: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[Interval, float]:
    """The interval of `paired_bootstrap` and, of the same resamples, a two-sided p-value.

    p tells how far out among the resampled means zero lies; it agrees with the interval and is at
    least 2 / (resamples + 1) (Davison & Hinkley, "Bootstrap Methods and their Application", 1997).
    Nor is it below 2 / 2^items, what as many equal signs show: few items resample too well.
    """
    means_R = _resampled_means(difference_SI, resamples, seed)
    low, high = np.quantile(means_R, (0.025, 0.975))
    beyond = min((means_R <= 0).sum(), (means_R >= 0).sum())
    least = 0.5 ** np.shape(difference_SI)[1]
    p = min(1.0, 2 * max(float(beyond + 1) / (resamples + 1), least))
    return Interval(float(np.mean(difference_SI, dtype=np.float64)), float(low), float(high)), p


def _resampled_means(difference_SI: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    difference_SI = np.asarray(difference_SI, np.float64)
    if difference_SI.ndim != 2 or difference_SI.size == 0:
        raise ValueError(f"expected differences [seeds, items], got shape {difference_SI.shape}")
    if not np.isfinite(difference_SI).all():
        raise ValueError("the differences hold a value that is not finite")
    n_seeds, n_items = difference_SI.shape
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK_ELEMENTS // n_items)
    means = []
    for start in range(0, resamples, block):
        n = min(block, resamples - start)
        seeds_RS = _resampled_counts(rng, n, n_seeds)
        items_RI = _resampled_counts(rng, n, n_items)
        means.append(np.einsum("RI,RI->R", seeds_RS @ difference_SI, items_RI))
    return np.concatenate(means) / difference_SI.size


def _resampled_counts(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """How often each of `n` things is drawn when `n` are drawn with replacement: [R, n]."""
    drawn_RN = rng.integers(n, size=(resamples, n))
    drawn_RN += n * np.arange(resamples)[:, None]
    counts = np.bincount(drawn_RN.ravel(), minlength=resamples * n)
    return counts.reshape(resamples, n).astype(np.float64)


def mcnemar(a_only: int, b_only: int) -> float:
    """Exact two-sided p that A and B are right equally often (McNemar, 1947).

    Of the items that only one of them has right, each side has half by chance: a binomial test.
    Items are taken as independent, so those of several seeds must not be added up.
    """
    n = a_only + b_only
    ways = tail = 1
    for k in range(min(a_only, b_only)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for testing all of them: the chance of any false finding is kept.

    The k-th smallest of n, from 0, times n - k, and no less than those before it (Holm, "A simple
    sequentially rejective multiple test procedure", 1979). Valid however the tests depend.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for k, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = adjusted[i] = max(least, min(1.0, (len(p) - k) * p[i]))
    return adjusted


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of `n` items (Wilson, 1927).

    Unlike the bootstrap it is not empty at 0 and 1, and it covers as often as it says for small n
    (Brown, Cai & DasGupta, "Interval Estimation for a Binomial Proportion", 2001).
    """
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def recall_curve(relevant_N: np.ndarray) -> np.ndarray:
    """Share of all relevant chunks found among the first 1, 2, ... N of a ranking, best first."""
    found_N = np.cumsum(np.asarray(relevant_N, np.float64))
    if found_N.size == 0 or found_N[-1] == 0:
        raise ValueError("a recall curve needs at least one relevant chunk")
    return found_N / found_N[-1]


def recall_at_k(relevant_N: np.ndarray, k: int) -> float:
    """Share of all relevant chunks among the first `k`; at most k / (number of relevant)."""
    return float(recall_curve(relevant_N)[k - 1])


def ranking_auc(relevant_N: np.ndarray) -> float:
    """Probability that a relevant chunk stands before an irrelevant one (0.5 by chance)."""
    relevant_N = np.asarray(relevant_N, bool)
    irrelevant_after_N = np.cumsum(~relevant_N[::-1])[::-1]
    pairs = relevant_N.sum() * (~relevant_N).sum()
    return float(irrelevant_after_N[relevant_N].sum() / pairs) if pairs else math.nan
