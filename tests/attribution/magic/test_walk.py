"""Scores are derivatives: against retraining with other weights, in float64."""

import dataclasses

import numpy as np
import pytest

from tests.attribution.magic.conftest import LORA, T
from training.optim import Optim

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

SGD = Optim("sgd", lr=0.1, schedule="linear", end=0.0, clip=0.0)
ADAMW = Optim("adamw", lr=3e-3, schedule="cosine", end=0.1, clip=0.0, eps_root=1e-6)
MUON = Optim("muon", lr=3e-3, schedule="polynomial", power=2.0, clip=0.0, eps_root=1e-6,
             momentum=0.95)  # fmt: skip


def change(optim: Optim, **fields) -> Optim:
    return dataclasses.replace(optim, **fields)


EXACT = {
    "sgd": ("gpt2", SGD, {}),
    "momentum": ("gpt2", change(SGD, momentum=0.9, weight_decay=0.1), {}),
    "nesterov, accumulated": (
        "gemma3", change(SGD, momentum=0.9, nesterov=True), {"batch": 4, "accumulate": 2}
    ),
    "sgd, clipped": ("gpt_neox", change(SGD, clip=0.5), {}),
    "adamw": ("gpt2", change(ADAMW, weight_decay=0.1, warmup=2), {}),
    "adamw, clipped, accumulated": (
        "gemma3", change(ADAMW, weight_decay=1.0, decay=("*",), clip=0.5),
        {"batch": 4, "accumulate": 2},
    ),
    "adamw, neox": ("gpt_neox", change(ADAMW, weight_decay=1.0), {}),
    "muon": ("gpt2", change(MUON, weight_decay=1.0), {}),
    "muon, gemma": ("gemma3", MUON, {}),
    "adapter": ("gpt2", ADAMW, {"lora": LORA}),
    "adapter with dropout": ("gemma3", ADAMW, {"lora": dataclasses.replace(LORA, dropout=0.3)}),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_scores_are_derivatives_of_retraining(runs, tmp_path, name):
    family, optim, how = EXACT[name]
    course = runs.course(family, optim, **how)
    found = runs.walk(tmp_path, course, "each").go()
    random, h = np.random.default_rng(0), 1e-5
    shape = (len(runs.rows), T)
    one_token = np.zeros(shape)
    one_token[3, 5] = 1
    for direction_NT in (random.normal(size=shape), random.normal(size=shape), one_token):
        ahead_Q, behind_Q = (
            runs.query_losses(course, 1 + sign * h * direction_NT, "each") for sign in (1, -1)
        )
        expected_Q = (ahead_Q - behind_Q) / (2 * h)
        found_Q = np.einsum("NT,NTQ->Q", direction_NT, found.scores)
        error = np.abs(found_Q - expected_Q).max() / np.abs(expected_Q).max()
        print(name, error)
        assert error <= 1e-6
