"""Expected coefficients and measures of classifiers with rare positives, from scikit-learn.

    python -P tests/golden/make_probe.py     rewrites probe/

Dims: N samples, D features. probe/data.npz holds x [N, D] float32 and positive [N] by problem:

    rare       features of very different sizes, about one positive in twelve
    separable  a plane tells the kinds apart with room to spare
    constant   as rare, standardised, with two features that never change

and the fits of `probe/expected.json` (problem, C, weights): coef, intercept, and of `rare` the
measures on its second half by probability and by scores in steps of 0.05, which tie. Two of
scikit-learn's solvers must agree on every fit.
"""

import json
from pathlib import Path

import numpy as np
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

HERE = Path(__file__).parent / "probe"


def problems() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    n, d = 1200, 16
    x_ND = random.normal(size=(n, d)) * np.exp(random.normal(size=d))
    rare_N = x_ND @ random.normal(size=d) * 0.5 - 5.0 + random.logistic(size=n) > 0
    x_ND = ((x_ND - x_ND[:600].mean(0)) / x_ND[:600].std(0)).astype(np.float32)
    constant_ND = x_ND.copy()
    constant_ND[:, 3], constant_ND[:, 11] = 0, 1
    s_ND = random.normal(size=(200, 6)).astype(np.float32)
    side_N = s_ND[:, 0] - s_ND[:, 1] > 0
    s_ND[:, 0] += np.where(side_N, 1, -1)
    return {
        "rare": (x_ND, rare_N),
        "separable": (s_ND, side_N),
        "constant": (constant_ND, rare_N),
    }


def weights(positive_N: np.ndarray, rule: str) -> np.ndarray:
    counts = np.bincount(positive_N)
    if rule == "balanced":
        return (len(positive_N) / (2 * counts))[positive_N.astype(int)]
    ratio = min(5.0, (counts[0] / counts[1]) ** 0.5)
    return np.where(positive_N, ratio if rule == "sqrt" else 1.0, 1.0)


def fit(x_ND, positive_N, c: float, rule: str) -> LogisticRegression:
    found = []
    for solver in ("lbfgs", "newton-cholesky"):
        model = LogisticRegression(C=c, tol=1e-10, max_iter=100_000, solver=solver)
        model.fit(x_ND.astype(np.float64), positive_N, weights(positive_N, rule))
        found.append(np.append(model.coef_, model.intercept_))
    apart = np.abs(found[0] - found[1]).max() / max(1.0, np.abs(found[0]).max())
    assert apart < 2e-5, (c, rule, apart)
    return model


def measures(p_N: np.ndarray, positive_N: np.ndarray, threshold: float) -> dict:
    called_N = p_N >= threshold
    counts = metrics.confusion_matrix(positive_N, called_N).ravel().tolist()
    return {
        "threshold": threshold,
        **dict(zip(("tn", "fp", "fn", "tp"), counts, strict=True)),
        "accuracy": metrics.accuracy_score(positive_N, called_N),
        "majority_accuracy": float(max(positive_N.mean(), 1 - positive_N.mean())),
        "balanced_accuracy": metrics.balanced_accuracy_score(positive_N, called_N),
        "auroc": metrics.roc_auc_score(positive_N, p_N),
        "ap": metrics.average_precision_score(positive_N, p_N),
        "f1": metrics.f1_score(positive_N, called_N),
        "mcc": metrics.matthews_corrcoef(positive_N, called_N),
        "log_loss": metrics.log_loss(positive_N, p_N),
        "brier": metrics.brier_score_loss(positive_N, p_N),
    }


def main() -> None:
    HERE.mkdir(exist_ok=True)
    arrays, expected = {}, []
    for name, (x_ND, positive_N) in problems().items():
        arrays[f"{name}_x"], arrays[f"{name}_positive"] = x_ND, positive_N
        strengths = (1e-3, 1.0, 1e4) if name == "separable" else (1e-3, 1.0)
        train = slice(0, 600)
        for c in strengths:
            for rule in ("none", "balanced", "sqrt") if name == "rare" else ("none",):
                model = fit(x_ND[train], positive_N[train], c, rule)
                case = {
                    "problem": name,
                    "c": c,
                    "weights": rule,
                    "coef": model.coef_[0].tolist(),
                    "intercept": model.intercept_[0],
                }
                if name == "rare":
                    p_N = model.predict_proba(x_ND[600:].astype(np.float64))[:, 1]
                    stepped_N = np.round(p_N * 20) / 20
                    case["measures"] = [
                        measures(p_N, positive_N[600:], 0.5),
                        measures(p_N, positive_N[600:], 0.1),
                        measures(stepped_N, positive_N[600:], 0.25),
                    ]
                expected.append(case)
    np.savez_compressed(HERE / "data.npz", **arrays)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


main()
