"""Scores through whole trainings against those that Bergson computed, on models it gets right."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import attribution.magic.functional
import core.rows
from attribution.magic.functional import functional
from attribution.magic.walk import Settings as Way
from attribution.magic.walk import Walk
from core.config import Execution
from core.rows import load_rows, save_rows
from training.course import Course
from training.loop import Settings
from training.optim import Optim, learning_rate

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

SGD = Optim("sgd", lr=0.05, schedule="linear", end=0.0, clip=0.0)
ADAMW = Optim(
    "adamw", lr=2e-3, schedule="polynomial", warmup=2, start=1e-3, end=0.1, weight_decay=0.01,
    b1=0.9, b2=0.95, eps_root=1e-8, clip=0.0, decay=("*",),
)  # fmt: skip
VARIANTS = {
    "sgd_momentum": dataclasses.replace(SGD, momentum=0.9, weight_decay=0.1, decay=("*",)),
    "sgd_clip": dataclasses.replace(SGD, clip=0.5),
    "adamw": ADAMW,
    "muon": dataclasses.replace(ADAMW, name="muon", momentum=0.95, b1=0.95, weight_decay=0.0),
}
# Each compiles programs of its own, so few are tried; the golden numbers have all of both models.
CASES = [
    ("gpt2", "sgd_momentum", "each"), ("gpt2", "muon", "mean"),
    ("gemma3", "sgd_clip", "mean"), ("gemma3", "adamw", "each"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """All batches are padded alike, so that a program compiles once."""
    for module in (core.rows, attribution.magic.functional):
        monkeypatch.setattr(module, "bucket", lambda length, longest: 24)


@pytest.fixture(scope="module")
def rows(bergson, tmp_path_factory):
    """(training rows in Bergson's order, a copy for each epoch; query rows)."""
    folder = tmp_path_factory.mktemp("rows")
    pool, order = bergson.rows("train", folder / "pool"), bergson.arrays("magic")["order"]
    ids, labels = ([part(n) for n in order.tolist()] for part in (pool.ids, pool.labels))
    save_rows(folder / "train", ids, labels)
    train = load_rows(folder / "train", bergson.config.vocab_size, bergson.config.context)
    return train, bergson.rows("query", folder / "query")


@pytest.mark.parametrize("bergson, variant, mode", CASES, indirect=["bergson"])
def test_scores(bergson, rows, relative, tmp_path, variant, mode):
    """The mean query is the queries' own mean, by supervised tokens."""
    (train, query), optim = rows, VARIANTS[variant]
    expected = bergson.parts("magic", variant)
    settings = Settings(5, batch=4, shuffle=False)
    rate = learning_rate(optim, settings.steps)(jnp.arange(settings.steps))
    assert relative(rate, expected["lr"]) < 1e-6
    course = Course(bergson.loaded, train, settings, optim, Execution("float64", "scan"))
    found = Walk(tmp_path, course, functional(query, mode, "nll"), Way(save_mode="all")).go()
    share_Q = query.trained / query.trained.sum() if mode == "each" else np.ones(1)
    assert relative(share_Q @ found.after_Q, expected["loss"]) < 1e-6
    scores_NTQ = np.zeros((*expected["tokens"].shape, len(share_Q)))
    np.add.at(scores_NTQ, bergson.arrays("magic")["order"], found.scores)
    assert relative(scores_NTQ @ share_Q, expected["tokens"]) < 1e-4
    if mode == "each":
        assert relative(scores_NTQ.sum(1), expected["queries"]) < 1e-4
