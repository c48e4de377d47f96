"""Gradients, plain and projected, against those that Bergson computed."""

import functools

import numpy as np
import pytest

from attribution import gradients
from attribution import normalizer as normalizers
from attribution.projection import Projection, matrix
from attribution.targets import Spec, features, targets
from core.config import Execution
from core.loss import Objective

PLAIN = Projection(0)
SMALL = Projection(4, "bergson-rademacher")


@pytest.fixture(scope="module")
def passes(tiny, bergson):
    """{feature name: [N, ...]} of a split's rows, in Bergson's names."""

    def run(spec: Spec, split: str = "train", count: int | None = None):
        ids_BT, labels_BT = (x[:count] for x in bergson.batch(split))
        moments = None
        if spec.normalizer is not None:
            path = bergson.folder / "normalizers.npz"
            found = targets(bergson.config, spec)
            kind = spec.normalizer[0]
            moments = normalizers.load(path, bergson.config, found, spec.include_bias, kind)
        aux = gradients.projections(bergson.config, spec, moments)
        one = tiny.jit(
            functools.partial(gradients.example_gradients, bergson.config, Execution(), spec)
        )
        features_BD, losses_B = one(bergson.loaded.variables, aux, ids_BT, labels_BT)
        found = {
            f.name: np.asarray(features_BD)[:, f.offset : f.offset + np.prod(f.shape)]
            for f in features(bergson.config, spec)
        }
        return found, np.asarray(losses_B)

    return run


def flat(parts):
    return {name: x.reshape(len(x), -1) for name, x in parts.items()}


KINDS = {
    "mean": Spec(PLAIN, loss="mean"),
    "bias": Spec(PLAIN, include_bias=True),
    "log_odds": Spec(PLAIN, objective=Objective("log-odds")),
    "smooth": Spec(PLAIN, objective=Objective("nll", 0.1)),
    "adam": Spec(PLAIN, include_bias=True, normalizer=("adam", "")),
    "adafactor": Spec(PLAIN, include_bias=True, normalizer=("adafactor", "")),
}


def test_gradients_and_losses(passes, bergson, close):
    found, losses_B = passes(Spec(PLAIN))
    expected = flat(bergson.parts("gradients", "sum/train"))
    assert [*found] == [*expected]  # names and order of the features
    close(found, expected)
    close(losses_B, bergson.arrays("gradients")["loss/sum"])


@pytest.mark.parametrize("kind", KINDS)
def test_other_gradients(passes, bergson, close, kind):
    found, _ = passes(KINDS[kind], count=2)
    close(found, flat(bergson.parts("gradients", kind)))


RUNS = {
    "rademacher": Spec(SMALL),
    "normal": Spec(SMALL._replace(kind="bergson-normal")),
    "seed7": Spec(SMALL._replace(seed=7)),
    "bias": Spec(SMALL, include_bias=True),
    "row_norm": Spec(SMALL._replace(scale="row_norm")),
    "adam": Spec(SMALL, normalizer=("adam", "")),
    "adafactor": Spec(SMALL, normalizer=("adafactor", "")),
}


@pytest.mark.parametrize("run", RUNS)
def test_projected_gradients(passes, bergson, close, run):
    found, _ = passes(RUNS[run])
    close(found, bergson.parts("projected", f"{run}/train"))


def test_global_sketch(passes, bergson, close):
    found, _ = passes(Spec(SMALL._replace(dim=16, target="global")), "query")
    close(found["global"], bergson.parts("projected", "global")["query"])


def test_matrices_are_equal_bit_for_bit(bergson):
    for kind in ("rademacher", "normal"):
        projection = SMALL._replace(kind=f"bergson-{kind}")
        for name, expected_PI in bergson.parts("projected", f"matrix/{kind}").items():
            name, size = name.replace("right_bias", "right"), expected_PI.shape[1]
            found_PI = np.asarray(matrix(projection, name, size)).T
            if kind == "rademacher":
                np.testing.assert_array_equal(found_PI, expected_PI)
            else:  # `log` and `cos` round their own way
                np.testing.assert_allclose(found_PI, expected_PI, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bergson", ["gemma3"], indirect=True)
def test_heads(passes, bergson, close):
    """Gemma's queries: GPT-2's fused map we split by head, Bergson into equal parts."""
    expected = bergson.parts("projected", "heads/train")
    found, _ = passes(Spec(SMALL, modules=("*q_proj",), heads=True))
    close({name: found[name] for name in expected}, expected)
