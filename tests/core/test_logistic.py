"""Logistic regression: scikit-learn's coefficients, and what must hold for any data."""

import json
from pathlib import Path

import numpy as np
import pytest

from core import logistic
from core.errors import InputError
from core.logistic import class_weights, fit, probability

GOLDEN = Path(__file__).parents[1] / "golden" / "probe"
CASES = json.loads((GOLDEN / "expected.json").read_text())
PROBLEMS = {case["problem"]: None for case in CASES}
ATOL = 1e-4  # the issue's; scikit-learn's own solvers differ by up to 2e-5


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "data.npz") as file:
        return dict(file)


@pytest.fixture(params=["factorised", "products"])
def method(request, monkeypatch):
    """Both ways of finding the step."""
    name, value = ("PRODUCTS", 1) if request.param == "factorised" else ("DENSE", 0)
    monkeypatch.setattr(logistic, name, value)


def test_equals_scikit_learn(data, method):
    worst = 0.0
    for problem in PROBLEMS:
        for rule in ("none", "balanced", "sqrt"):
            cases = [x for x in CASES if (x["problem"], x["weights"]) == (problem, rule)]
            if not cases:
                continue
            x_ND, positive_N = data[f"{problem}_x"][:600], data[f"{problem}_positive"][:600]
            weights_N = class_weights(positive_N, rule)
            found = fit(x_ND[None], positive_N, [case["c"] for case in cases], weights_N)
            assert found.converged_LG.all() and (found.iterations_LG < 40).all()
            for g, case in enumerate(cases):
                expected = np.array([*case["coef"], case["intercept"]])
                got = np.append(found.coef_LGD[0, g], found.intercept_LG[0, g])
                error = np.abs(got - expected).max() / max(1, np.abs(expected).max())
                worst = max(worst, error)
                assert error < ATOL, (problem, rule, case["c"], error)
    assert worst < 2e-5, "two of scikit-learn's solvers agree better than this"


def test_optimum_and_batch(data):
    """The gradient vanishes, by its own formula; a problem's numbers do not depend on the others'.

    A feature that never changes has no weight, and the order of C does not matter.
    """
    x_ND, positive_N = data["constant_x"][:300], data["constant_positive"][:300]
    both_LND = np.stack([x_ND, x_ND[::-1]])
    found = fit(both_LND, positive_N, [0.01, 1.0])
    alone = fit(x_ND[None], positive_N, [0.01, 1.0])
    np.testing.assert_array_equal(found.coef_LGD[0], alone.coef_LGD[0])
    np.testing.assert_array_equal(found.intercept_LG[0], alone.intercept_LG[0])
    backwards = fit(x_ND[None], positive_N, [1.0, 0.01])
    np.testing.assert_allclose(backwards.coef_LGD[0, ::-1], alone.coef_LGD[0], atol=1e-7)
    for g, c in enumerate((0.01, 1.0)):
        w_D, b = found.coef_LGD[1, g], found.intercept_LG[1, g]
        off_N = probability(both_LND[1] @ w_D + b) - positive_N
        gradient_D = w_D + c * both_LND[1].astype(np.float64).T @ off_N
        assert max(np.abs(gradient_D).max(), abs(c * off_N.sum())) < 1e-6
        assert found.gradient_LG[1, g] < 1e-6
    assert np.abs(found.coef_LGD[:, :, 3]).max() == 0  # the feature that is 0
    assert np.abs(found.coef_LGD[0, :, 11]).max() < 1e-9  # the one that is 1: the intercept's work


def test_heavy_separable_and_many_features(data):
    """Weights that grow far, and more features than samples, still end at the optimum."""
    x_ND, positive_N = data["separable_x"], data["separable_positive"]
    found = fit(x_ND[None], positive_N, [1e6])
    called_N = x_ND @ found.coef_LGD[0, 0] + found.intercept_LG[0, 0] > 0
    assert found.converged_LG.all() and (called_N == positive_N).all()
    wide_ND = np.random.default_rng(0).normal(size=(40, 70)).astype(np.float32)
    found = fit(wide_ND[None], positive_N[:40], [10.0])
    assert found.converged_LG.all() and found.gradient_LG.max() < 1e-6


def test_weights():
    positive_N = np.array([True] + [False] * 9)
    balanced_N = class_weights(positive_N, "balanced")
    assert balanced_N[0] == 5 and balanced_N[1] == pytest.approx(5 / 9)
    assert class_weights(positive_N, "sqrt").tolist() == [3] + [1] * 9
    assert class_weights(positive_N, "sqrt", 2.0).tolist() == [2] + [1] * 9
    assert class_weights(positive_N, "none").tolist() == [1] * 10
    # A weight of two is a sample given twice.
    random = np.random.default_rng(1)
    x_ND, y_N = random.normal(size=(30, 3)), random.random(30) < 0.4
    once = fit(x_ND[None], y_N, [1.0], np.where(np.arange(30) < 10, 2.0, 1.0))
    twice = fit(np.concatenate([x_ND, x_ND[:10]])[None], np.append(y_N, y_N[:10]), [1.0])
    np.testing.assert_allclose(once.coef_LGD, twice.coef_LGD, atol=1e-8)


def test_probability_of_anything():
    assert probability([-1e4, 0, 1e4]).tolist() == [0, 0.5, 1]


def test_refusals():
    x_LND = np.ones((1, 4, 2), np.float32)
    with pytest.raises(InputError, match="all 4 samples are positive"):
        fit(x_LND, np.ones(4), [1.0])
    with pytest.raises(InputError, match="not finite"):
        fit(x_LND * np.float32(np.nan), [1, 0, 1, 0], [1.0])
