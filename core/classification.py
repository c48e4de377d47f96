"""How well scores tell two kinds of samples apart, and how sure one may be of it.

Every measure is computed from a weight for each group of samples, many weightings at a time: one
for the measure itself, how often a group was drawn for its bootstrap (Efron 1979; groups, because
samples of one document are not independent: Davison & Hinkley 1997, section 3.8). Scores are
sorted once. Definitions are scikit-learn's: ties in AUROC count half (Hanley & McNeil 1982), those
in average precision are one step; MCC of a constant answer is 0. What needs both kinds, or
probabilities, is None without them.

Dims: N samples, J groups, R weightings, U runs of samples, C values.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

BINS = 15  # of the calibration error (Guo et al., "On Calibration of Modern Neural Networks", 2017)
BLOCK = 2**21  # weights held at once
FEW = 8  # entries of a matrix for each sample, up to which a product is the faster sum
COUNTS = ("tn", "fp", "fn", "tp")
MEASURES = ("balanced_accuracy", "auroc", "ap", "accuracy", "mcc", "f1", "brier", "log_loss", "ece")
TOLD = MEASURES[:3]  # those given an interval


class Scored(NamedTuple):
    """Samples by ascending score, and the group of each.

    firsts_U: where runs of samples begin that one threshold need not part: those of one score, and
    negatives with no positive between them.
    """

    p_N: np.ndarray
    positive_N: np.ndarray
    group_N: np.ndarray
    firsts_U: np.ndarray
    threshold: float


def measure(p_N: ArrayLike, positive_N: ArrayLike, threshold: float = 0.5) -> dict[str, Any]:
    """Counts (n, positives, tn, fp, fn, tp), prevalence, majority_accuracy and all `MEASURES`.

    p_N: probabilities, or any scores, of which brier, log_loss and ece are then None. A sample is
    called positive from `threshold` up.
    """
    scored = _sort(p_N, positive_N, threshold)
    n, positives = len(scored.p_N), int(scored.positive_N.sum())
    once = np.ones((1, 1))
    found = {name: _measured(scored, once, name)[0] for name in MEASURES if n}
    prevalence = positives / n if n else float("nan")
    return {
        "n": n,
        "positives": positives,
        "prevalence": _known(prevalence),
        "majority_accuracy": _known(max(prevalence, 1 - prevalence)),
        "threshold": float(threshold),
        **{name: int(count) for name, (count,) in zip(COUNTS, _counts(scored, once), strict=True)},
        **{name: _known(found.get(name, float("nan"))) for name in MEASURES},
    }


def best_threshold(p_N: ArrayLike, positive_N: ArrayLike) -> float | None:
    """The threshold of the best balanced accuracy; among equals the one nearest 0.5.

    0.5 itself where it does as well, else halfway between two scores. None without both kinds.
    """
    p_N, positive_N, _, firsts_U, _ = _sort(p_N, positive_N, 0.5)
    positives = int(positive_N.sum())
    negatives = len(p_N) - positives
    if not positives or not negatives:
        return None
    high_U = p_N[firsts_U]
    low_U = np.append(high_U[:1], p_N[firsts_U[1:] - 1])
    below_U = np.append(0, np.cumsum(positive_N))[firsts_U]
    # In whole numbers, so that equals are equal: sensitivity + specificity, times both counts.
    sum_U = (positives - below_U) * negatives + (firsts_U - below_U) * positives
    best = np.flatnonzero(sum_U == sum_U.max())
    at = np.where((low_U < 0.5) & (high_U >= 0.5), 0.5, (low_U + high_U) / 2)[best]
    return float(at[np.argmin(np.abs(at - 0.5))])


def intervals(
    p_N: ArrayLike,
    positive_N: ArrayLike,
    threshold: float = 0.5,
    groups_N: ArrayLike | None = None,
    names: Sequence[str] = TOLD,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float] | None]:
    """95 % percentile interval of measures, over `draws` resamples of whole groups.

    groups_N: any labels; None: every sample is one. Draws without one of the kinds are left out.
    None for a measure of fewer than two groups.
    """
    groups = _numbered(np.size(p_N), groups_N)
    scored = _sort(p_N, positive_N, threshold, groups)
    drawn = {name: [] for name in names}
    for weights_RJ in _draws(groups, draws, seed):
        for name in names:
            drawn[name].append(_measured(scored, weights_RJ, name))
    return {name: _interval(values) for name, values in drawn.items()}


def difference(
    p_N: ArrayLike,
    q_N: ArrayLike,
    positive_N: ArrayLike,
    name: str = "auroc",
    thresholds: tuple[float, float] = (0.5, 0.5),
    groups_N: ArrayLike | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float | None, tuple[float, float] | None]:
    """A measure of scores p less that of q, and its interval over the same resamples for both."""
    groups = _numbered(np.size(p_N), groups_N)
    one = _sort(p_N, positive_N, thresholds[0], groups)
    two = _sort(q_N, positive_N, thresholds[1], groups)

    def less(weights_RJ: np.ndarray) -> np.ndarray:
        return _measured(one, weights_RJ, name) - _measured(two, weights_RJ, name)

    if not len(groups):
        return None, None
    drawn = [less(weights_RJ) for weights_RJ in _draws(groups, draws, seed)]
    return _known(less(np.ones((1, int(groups.max()) + 1)))[0]), _interval(drawn)


def weighted(
    p_N: ArrayLike,
    positive_N: ArrayLike,
    groups_N: np.ndarray,
    weights_RJ: np.ndarray,
    name: str,
) -> np.ndarray:
    """A measure [R] under each weighting of the groups, numbered from 0; NaN where undefined.

    For whoever draws groups once for several scores, so that their differences are paired.
    """
    return _measured(_sort(p_N, positive_N, 0.5, groups_N), weights_RJ, name)


def _sort(
    p_N: ArrayLike, positive_N: ArrayLike, threshold: float, groups_N: np.ndarray | None = None
) -> Scored:
    """groups_N: numbers from 0; None: all samples are in one group."""
    p_N, positive_N = np.asarray(p_N, np.float64), np.asarray(positive_N, bool)
    if p_N.shape != positive_N.shape or p_N.ndim != 1:
        raise ValueError(f"{p_N.shape} scores for {positive_N.shape} labels")
    if not np.isfinite(p_N).all():
        raise ValueError("the scores hold a value that is not finite")
    groups_N = np.zeros(len(p_N), np.int64) if groups_N is None else groups_N
    order_N = np.argsort(p_N, kind="stable")
    p_N, positive_N = p_N[order_N], positive_N[order_N]
    firsts_U = np.flatnonzero(np.concatenate([np.ones(min(len(p_N), 1), bool), np.diff(p_N) > 0]))
    if len(p_N):
        some_U = np.maximum.reduceat(positive_N, firsts_U)
        firsts_U = firsts_U[some_U | np.append(True, some_U[:-1])]
    return Scored(p_N, positive_N, groups_N[order_N], firsts_U, threshold)


def _sums(scored: Scored, weights_RJ: np.ndarray, values_CN: np.ndarray) -> np.ndarray:
    """Weighted sums [R,C] of values over the samples."""
    size = weights_RJ.shape[1]
    of_groups_CJ = np.stack([np.bincount(scored.group_N, row_N, size) for row_N in values_CN])
    return np.einsum("RJ,CJ->RC", weights_RJ, of_groups_CJ, optimize=True)


def _runs(scored: Scored, weights_RJ: np.ndarray, mask_N: np.ndarray) -> np.ndarray:
    """Weight [R,U] of the masked samples in each run."""
    size, groups = len(scored.firsts_U), weights_RJ.shape[1]
    run_N = np.repeat(np.arange(size), np.diff([*scored.firsts_U, len(mask_N)]))[mask_N]
    group_N = scored.group_N[mask_N]
    if groups * size <= FEW * len(mask_N):
        cells = np.bincount(group_N * size + run_N, minlength=groups * size)
        return weights_RJ @ cells.reshape(groups, size)
    sums_RU = np.zeros((len(weights_RJ), size))
    runs, starts = np.unique(run_N, return_index=True)
    if len(runs):
        sums_RU[:, runs] = np.add.reduceat(weights_RJ[:, group_N], starts, 1)
    return sums_RU


def _counts(scored: Scored, weights_RJ: np.ndarray) -> np.ndarray:
    """tn, fp, fn, tp by weighting, [4,R]."""
    called_N, positive_N = scored.p_N >= scored.threshold, scored.positive_N
    kinds = (~called_N & ~positive_N, called_N & ~positive_N, ~called_N & positive_N,
             called_N & positive_N)  # fmt: skip
    return _sums(scored, weights_RJ, np.stack(kinds)).T


def _measured(scored: Scored, weights_RJ: np.ndarray, name: str) -> np.ndarray:
    """A measure for every weighting [R], NaN where it is undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if name in ("auroc", "ap"):
            return _ranked(scored, weights_RJ, name)
        if name in ("brier", "log_loss", "ece"):
            return _calibration(scored, weights_RJ, name)
        tn, fp, fn, tp = _counts(scored, weights_RJ)
        both = ((tn + fp) > 0) & ((fn + tp) > 0)
        if name == "accuracy":
            return (tn + tp) / (tn + fp + fn + tp)
        if name == "balanced_accuracy":
            return (tp / (tp + fn) + tn / (tn + fp)) / 2
        if name == "f1":
            return np.where(both, 2 * tp / (2 * tp + fp + fn), np.nan)
        assert name == "mcc", name
        root = np.sqrt(tp + fp) * np.sqrt(tp + fn) * np.sqrt(tn + fp) * np.sqrt(tn + fn)
        found = np.where(root > 0, (tp * tn - fp * fn) / np.where(root > 0, root, 1), 0.0)
        return np.where(both, found, np.nan)


def _ranked(scored: Scored, weights_RJ: np.ndarray, name: str) -> np.ndarray:
    positives_RU = _runs(scored, weights_RJ, scored.positive_N)
    negatives_RU = _runs(scored, weights_RJ, ~scored.positive_N)
    positives, negatives = positives_RU.sum(1), negatives_RU.sum(1)
    if name == "auroc":
        below_RU = np.cumsum(negatives_RU, 1) - negatives_RU / 2
        return np.einsum("RU,RU->R", positives_RU, below_RU) / (positives * negatives)
    found_RU = np.cumsum(positives_RU[:, ::-1], 1)[:, ::-1]
    called_RU = found_RU + np.cumsum(negatives_RU[:, ::-1], 1)[:, ::-1]
    precision_RU = found_RU / np.where(called_RU > 0, called_RU, 1)
    found = np.einsum("RU,RU->R", positives_RU, precision_RU) / positives
    return np.where(negatives > 0, found, np.nan)


def _calibration(scored: Scored, weights_RJ: np.ndarray, name: str) -> np.ndarray:
    p_N, y_N = scored.p_N, scored.positive_N.astype(np.float64)
    if p_N[0] < 0 or p_N[-1] > 1:
        return np.full(len(weights_RJ), np.nan)
    if name == "ece":
        bin_N = np.clip(np.ceil(p_N * BINS) - 1, 0, BINS - 1)
        values_CN = (p_N - y_N) * (bin_N == np.arange(BINS)[:, None])
    elif name == "brier":
        values_CN = ((p_N - y_N) ** 2)[None]
    else:
        told_N = np.where(scored.positive_N, p_N, 1 - p_N)
        values_CN = -np.log(np.clip(told_N, np.finfo(np.float64).eps, 1))[None]
    total = _sums(scored, weights_RJ, np.ones((1, len(p_N))))[:, 0]
    return np.abs(_sums(scored, weights_RJ, values_CN)).sum(1) / total


def _numbered(n: int, groups_N: ArrayLike | None) -> np.ndarray:
    """Groups as numbers from 0; None: every sample is one."""
    return np.arange(n) if groups_N is None else np.unique(groups_N, return_inverse=True)[1]


def _draws(groups_N: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each group is drawn, [R,J], in blocks; nothing for fewer than two groups."""
    count = int(groups_N.max()) + 1 if len(groups_N) else 0
    if count < 2:
        return
    rng = np.random.default_rng([seed, count])
    block = max(1, BLOCK // len(groups_N))
    for start in range(0, draws, block):
        chosen_RJ = rng.integers(0, count, (min(block, draws - start), count))
        chosen_RJ += count * np.arange(len(chosen_RJ))[:, None]
        times_RJ = np.bincount(chosen_RJ.ravel(), minlength=chosen_RJ.size).reshape(-1, count)
        yield times_RJ.astype(np.float64)


def _interval(drawn: list[np.ndarray]) -> tuple[float, float] | None:
    values = np.concatenate([*drawn, np.zeros(0)])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
