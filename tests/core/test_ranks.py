"""Rank statistics against closed forms, and intervals against what they must cover."""

import numpy as np
import pytest

from core.ranks import (
    auc,
    bootstrap,
    pearson,
    places,
    ranks,
    recall,
    reciprocal_rank,
    spearman,
)


def test_rank_correlation_with_ties():
    assert ranks(np.array([3.0, 1, 3, 2])).tolist() == [3.5, 1, 3.5, 2]
    # Mean ranks 1.5 1.5 3 4 and 1 2.5 2.5 4: covariance 3.75, variances 4.5 each.
    assert spearman(np.array([1, 1, 2, 3]), np.array([5, 6, 6, 7])) == pytest.approx(3.75 / 4.5)
    x_N = np.random.default_rng(0).normal(size=50)
    assert spearman(x_N, np.exp(x_N)) == pytest.approx(1)
    assert spearman(x_N, -(x_N**3)) == pytest.approx(-1)
    assert spearman(x_N, np.zeros(50)) is None
    # Without ties: 1 - 6 sum d^2 / (n (n^2 - 1)).
    y_N = np.random.default_rng(1).permutation(50)
    d_N = ranks(x_N) - ranks(y_N)
    assert spearman(x_N, y_N) == pytest.approx(1 - 6 * (d_N**2).sum() / (50 * (50**2 - 1)))
    assert pearson(x_N, 2 * x_N + 1) == pytest.approx(1)


def test_auc_counts_pairs():
    random = np.random.default_rng(0)
    scores_N = random.integers(0, 6, 40).astype(float)
    positive_N = random.random(40) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores_N[positive_N] for n in scores_N[~positive_N]]
    assert auc(scores_N, positive_N) == pytest.approx(np.mean(pairs))
    assert auc(-scores_N, positive_N) == pytest.approx(1 - np.mean(pairs))
    assert np.isnan(auc(scores_N, np.zeros(40, bool)))


def test_places_of_the_gold():
    scores_N = np.array([0.1, 0.9, 0.5, 0.5, 0.7])
    assert places(scores_N, np.array([0, 1])).tolist() == [1, 5]
    assert places(scores_N, np.array([3])).tolist() == [3.5]  # third or fourth
    assert places(np.zeros(5), np.array([2])).tolist() == [3]  # no better than chance
    found = places(scores_N, np.array([3, 4]))
    assert reciprocal_rank(found) == 1 / 2
    assert (recall(found, 1), recall(found, 2), recall(found, 3)) == (0, 1, 1)
    assert (recall(found, 3, strict=True), recall(found, 4, strict=True)) == (0, 1)


def test_intervals_are_seeded_and_cover_the_truth():
    def interval(x_N, seed):
        return bootstrap(lambda chosen: x_N[chosen].mean(), len(x_N), seed) or (0, 0)

    draws_MN = np.random.default_rng(0).normal(size=(100, 60))
    covered = [low < 0 < high for low, high in (interval(x_N, 0) for x_N in draws_MN)]
    assert 88 <= sum(covered) <= 99
    low, high = interval(draws_MN[0], 0)
    # Of a mean: mean +- 1.96 sd / sqrt n, to the bootstrap's own noise.
    assert (high - low) / 2 == pytest.approx(1.96 * draws_MN[0].std() / 60**0.5, rel=0.1)
    assert (low, high) == interval(draws_MN[0], 0) != interval(draws_MN[0], 1)
    assert bootstrap(lambda chosen: 1.0, 1) is None
    assert bootstrap(lambda chosen: None, 5) is None
