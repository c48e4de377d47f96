"""Statistics of the report against closed forms, brute force and known coverage."""

import itertools
import math

import numpy as np
import pytest

from evals.statistics import (
    Interval,
    holm,
    mcnemar,
    mean_stderr,
    paired_bootstrap,
    paired_test,
    ranking_auc,
    recall_at_k,
    recall_curve,
    wilson,
)


def test_mean_stderr_is_the_textbook_one():
    mean, stderr = mean_stderr(np.array([1, 2, 3, 4]))
    assert mean == 2.5
    assert stderr == pytest.approx(math.sqrt(5 / 3) / 2, rel=1e-14)


def test_mean_stderr_of_one_value_is_unknown_and_of_none_is_an_error():
    mean, stderr = mean_stderr(np.array([7.0]))
    assert mean == 7.0 and math.isnan(stderr)
    with pytest.raises(ValueError, match="at least one"):
        mean_stderr(np.array([]))


def test_interval_is_deterministic_and_the_mean_is_exact():
    difference_SI = np.random.default_rng(3).normal(0.3, 1, (3, 50))
    first, again = paired_bootstrap(difference_SI), paired_bootstrap(difference_SI)
    assert isinstance(first, Interval) and first == again
    assert first.mean == difference_SI.mean()
    assert first.low < first.mean < first.high
    assert paired_bootstrap(difference_SI, seed=1) != first


def test_interval_equals_the_exact_bootstrap_distribution():
    # 2 seeds and 3 items: all 2^2 * 3^3 equally likely resamples can be listed
    difference_SI = np.array([[0.0, 1.0, 5.0], [2.0, -3.0, 4.0]])
    means = [
        difference_SI[np.ix_(seeds, items)].mean()
        for seeds in itertools.product(range(2), repeat=2)
        for items in itertools.product(range(3), repeat=3)
    ]
    interval = paired_bootstrap(difference_SI, resamples=200_000)
    assert interval.low == np.quantile(means, 0.025, method="inverted_cdf")
    assert interval.high == np.quantile(means, 0.975, method="inverted_cdf")


def test_width_matches_the_two_variance_components():
    rng = np.random.default_rng(0)
    seeds, items = 40, 400
    difference_SI = rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 2.0, (1, items))
    stderr = math.sqrt(difference_SI.mean(1).var() / seeds + difference_SI.mean(0).var() / items)
    interval = paired_bootstrap(difference_SI)
    assert (interval.high - interval.low) / 2 == pytest.approx(1.96 * stderr, rel=0.04)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    trials, covered = 300, 0
    for trial in range(trials):
        difference_SI = 0.2 + rng.normal(0, 0.1, (12, 1)) + rng.normal(0, 1, (1, 60))
        difference_SI = difference_SI + rng.normal(0, 0.3, (12, 60))
        interval = paired_bootstrap(difference_SI, resamples=400, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.90 <= covered / trials <= 0.98


def test_shift_and_sign_carry_over():
    difference_SI = np.random.default_rng(5).normal(size=(4, 30))
    plain = paired_bootstrap(difference_SI)
    assert paired_bootstrap(difference_SI + 2) == pytest.approx([v + 2 for v in plain])
    flipped = paired_bootstrap(-difference_SI)
    assert flipped == pytest.approx([-plain.mean, -plain.high, -plain.low])


def test_blocks_do_not_limit_the_number_of_items():
    interval = paired_bootstrap(np.ones((2, 5_000_000)), resamples=3)
    assert interval == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("bad", [np.ones(3), np.ones((0, 3)), np.ones((2, 0)), np.ones((1, 2, 3))])
def test_wrong_shapes_are_refused(bad):
    with pytest.raises(ValueError, match="shape"):
        paired_bootstrap(bad)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="finite"):
        paired_bootstrap(np.array([[1.0, np.nan]]))


def test_p_agrees_with_the_interval_and_is_uniform_without_a_difference():
    rng = np.random.default_rng(4)
    found = [paired_test(rng.normal(size=(1, 60)), 400, seed=trial) for trial in range(300)]
    for interval, p in found:
        if not 0.04 < p < 0.06:
            assert (p < 0.05) == (interval.low > 0 or interval.high < 0)
    for level in (0.1, 0.5, 0.9):  # within three standard errors
        share = np.mean([p <= level for _, p in found])
        assert abs(share - level) < 3 * math.sqrt(level * (1 - level) / 300) + 0.01


def test_p_is_never_more_certain_than_the_data_allow():
    assert paired_test(np.ones((1, 50)), 999)[1] == 2 / 1000
    assert paired_test(np.ones((1, 5)), 999)[1] == 2 / 2**5
    assert paired_test(np.zeros((2, 50)), 999)[1] == 1


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(10, 2) == mcnemar(2, 10) == 0.03857421875
    assert mcnemar(0, 0) == mcnemar(3, 3) == mcnemar(1, 0) == 1
    assert mcnemar(5, 0) == 2 / 2**5
    for b in range(8):  # every way in which 7 discordant items may fall
        ways = [sum(side) for side in itertools.product((0, 1), repeat=7)]
        extreme = sum(abs(way - 3.5) >= abs(b - 3.5) for way in ways)
        assert mcnemar(b, 7 - b) == extreme / len(ways)
    assert 0 < mcnemar(4900, 5142) < 0.02


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == [0.03, 0.06, 0.06, 0.02]
    assert holm([0.6, 0.5]) == [1, 1]
    assert holm([0.3]) == [0.3] and holm([]) == []


def test_wilson_interval():
    # 9 of 10: (p + z^2/2n -+ z sqrt(pq/n + z^2/4n^2)) / (1 + z^2/n), worked out with z = 1.96
    assert wilson(0.9, 10) == pytest.approx((0.5958500, 0.9821238), abs=1e-6)
    low, high = wilson(0, 20)
    assert low == 0 and high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-6)
    assert wilson(1, 20) == pytest.approx((1 - high, 1))


def test_recall_curve_counts_what_was_found():
    relevant_N = np.array([1, 0, 1, 1, 0], bool)
    np.testing.assert_allclose(recall_curve(relevant_N), [1 / 3, 1 / 3, 2 / 3, 1, 1])
    assert recall_at_k(relevant_N, 3) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="relevant"):
        recall_curve(np.zeros(4, bool))


def test_auc_is_the_share_of_ordered_pairs():
    relevant_N = np.random.default_rng(2).random(40) < 0.3
    places = np.arange(40)
    before = places[relevant_N][:, None] < places[~relevant_N][None, :]
    assert ranking_auc(relevant_N) == pytest.approx(before.mean(), rel=1e-14)
    assert ranking_auc(np.array([True, False])) == 1.0
    assert math.isnan(ranking_auc(np.ones(3, bool)))
