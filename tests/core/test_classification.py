"""Measures of classifiers: scikit-learn's numbers, hand-made cases, intervals that cover."""

import json
import time
from pathlib import Path

import numpy as np
import pytest

from core import ranks
from core.classification import BINS, MEASURES, best_threshold, difference, intervals, measure
from core.logistic import probability

GOLDEN = Path(__file__).parents[1] / "golden" / "probe"
CASES = [c for c in json.loads((GOLDEN / "expected.json").read_text()) if "measures" in c]


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "data.npz") as file:
        return dict(file)


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['c']}-{c['weights']}")
def test_equals_scikit_learn(case, data):
    x_ND, positive_N = data["rare_x"][600:].astype(np.float64), data["rare_positive"][600:]
    p_N = probability(x_ND @ np.array(case["coef"]) + case["intercept"])
    stepped_N = np.round(p_N * 20) / 20
    for scores_N, expected in zip((p_N, p_N, stepped_N), case["measures"], strict=True):
        found = measure(scores_N, positive_N, expected["threshold"])
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-6), name
        assert found["n"] == 600 and found["positives"] == positive_N.sum()


def test_the_good_ranking_with_the_useless_threshold():
    """What the notes warn of: at 0.5 a constant no, at the chosen threshold a good answer."""
    random = np.random.default_rng(0)
    positive_N = random.random(2000) < 0.05
    p_N = probability(random.normal(size=2000) + 2.5 * positive_N - 6)
    assert measure(p_N, positive_N)["balanced_accuracy"] < 0.55
    assert measure(p_N, positive_N)["accuracy"] >= 0.93
    chosen = best_threshold(p_N, positive_N)
    assert chosen is not None and measure(p_N, positive_N, chosen)["balanced_accuracy"] > 0.85


def test_threshold_is_the_best_and_nearest():
    random = np.random.default_rng(1)
    for _ in range(20):
        p_N, positive_N = np.round(random.random(40), 1), random.random(40) < 0.3
        chosen = best_threshold(p_N, positive_N)
        assert chosen is not None

        def accuracy(threshold, p_N=p_N, positive_N=positive_N):
            return measure(p_N, positive_N, threshold)["balanced_accuracy"]

        best = max(accuracy(t) for t in np.linspace(0, 1, 101))
        assert accuracy(chosen) == pytest.approx(best)
    assert best_threshold([0.1, 0.9], [False, True]) == 0.5
    assert best_threshold([0.1, 0.3], [False, True]) == 0.2
    # 0.25 and 0.7 do equally well.
    assert best_threshold([0.2, 0.3, 0.6, 0.8], [False, True, False, True]) == pytest.approx(0.7)


def test_calibration_error_by_hand():
    random = np.random.default_rng(2)
    p_N = random.random(300)
    positive_N = random.random(300) < p_N**2
    error = 0.0
    for b in range(BINS):
        inside_N = (p_N > b / BINS) & (p_N <= (b + 1) / BINS)
        if inside_N.any():
            error += abs(p_N[inside_N].mean() - positive_N[inside_N].mean()) * inside_N.mean()
    assert measure(p_N, positive_N)["ece"] == pytest.approx(error)


def test_degenerate_data_is_none():
    for positive in (False, True):
        found = measure([0.2, 0.7, 0.7], [positive] * 3)
        assert {found[n] for n in ("auroc", "ap", "balanced_accuracy", "mcc", "f1")} == {None}
        assert found["brier"] is not None and found["accuracy"] is not None
        assert best_threshold([0.2, 0.7], [positive] * 2) is None
        limits = intervals([0.2, 0.7, 0.7], [positive] * 3, names=("auroc", "accuracy"))
        assert limits["auroc"] is None and limits["accuracy"] is not None
    nothing = measure([], [])
    assert nothing["n"] == 0 and {nothing[name] for name in MEASURES} == {None}
    assert intervals([0.5, 0.2], [1, 0], groups_N=["a", "a"])["auroc"] is None
    assert difference([0.5], [0.5], [True]) == (None, None)
    scores = measure([-3.0, 5.0], [False, True], 0.0)
    assert scores["brier"] is scores["ece"] is None and scores["auroc"] == 1
    assert measure([0.3] * 4, [0, 1, 0, 1])["auroc"] == 0.5
    with pytest.raises(ValueError, match="not finite"):
        measure([np.nan], [True])


def test_interval_is_that_of_drawn_copies():
    """Weights say what the copies of drawn groups say, for every measure and with ties."""
    random = np.random.default_rng(3)
    n = 60
    groups_N = random.integers(0, 12, n)
    groups_N = np.unique(groups_N, return_inverse=True)[1]
    p_N = np.round(random.random(n), 1)
    positive_N = random.random(n) < p_N
    found = intervals(p_N, positive_N, 0.35, groups_N, MEASURES, draws=40, seed=5)
    count = int(groups_N.max()) + 1
    chosen_RJ = np.random.default_rng([5, count]).integers(0, count, (40, count))
    copies = [np.concatenate([np.flatnonzero(groups_N == g) for g in row]) for row in chosen_RJ]
    measured = [measure(p_N[index], positive_N[index], 0.35) for index in copies]
    for name in MEASURES:
        low, high = np.quantile([m[name] for m in measured], (0.025, 0.975))
        assert found[name] == pytest.approx((low, high), abs=1e-12), name


def test_intervals_cover_and_differences_pair():
    random = np.random.default_rng(4)
    covered = 0
    for seed in range(100):
        positive_N = random.random(120) < 0.3
        p_N = random.normal(size=120) + positive_N  # AUROC = Phi(1 / sqrt 2)
        limits = intervals(p_N, positive_N, names=("auroc",), draws=200, seed=seed)["auroc"]
        assert limits is not None
        covered += limits[0] <= 0.76025 <= limits[1]
    assert covered >= 86  # of 100; 95 % would fall below with a chance of 1e-4
    q_N = p_N + 0.01 * random.normal(size=120)
    apart, limits = difference(p_N, q_N, positive_N)
    assert apart == pytest.approx(ranks.auc(p_N, positive_N) - ranks.auc(q_N, positive_N))
    one = intervals(p_N, positive_N, names=("auroc",))["auroc"]
    assert limits is not None and one is not None
    assert limits[1] - limits[0] < 0.2 * (one[1] - one[0])  # what both share cancels


def test_whole_groups_are_drawn():
    """Copies of a sample in its document are no news: the interval stays as wide."""
    random = np.random.default_rng(6)
    positive_N = random.random(80) < 0.4
    p_N = random.normal(size=80) + positive_N
    once = intervals(p_N, positive_N, groups_N=np.arange(80))
    again = intervals(np.repeat(p_N, 5), np.repeat(positive_N, 5), groups_N=np.arange(80).repeat(5))
    loose = intervals(np.repeat(p_N, 5), np.repeat(positive_N, 5))
    assert again["auroc"] == pytest.approx(once["auroc"])
    width = {id(x): x["auroc"][1] - x["auroc"][0] for x in (once, loose) if x["auroc"]}
    assert width[id(loose)] < 0.6 * width[id(once)]


def test_a_thousand_draws_of_five_thousand_samples():
    random = np.random.default_rng(7)
    p_N = random.random(5000)
    start = time.process_time()
    intervals(p_N, random.random(5000) < p_N * 0.1)
    assert time.process_time() - start < 4  # two seconds, on a machine with nothing else to do
