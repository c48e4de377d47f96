"""Retrains against training written out by hand, and what the bank keeps of them."""

from typing import Any

import jax
import numpy as np
import pytest

from attribution.magic.functional import functional
from attribution.validation.bank import Bank
from attribution.validation.protocols import Problem, lds, weight_step
from core import model
from core.config import Execution
from core.errors import InputError
from core.rows import load_rows, pad_batch, training_batches
from training.loop import Settings
from training.optim import Optim

LENGTHS = [9, 6, 12, 7, 16, 11, 5, 13, 8, 10]
OPTIM = Optim("sgd", 0.002, "constant", clip=0)  # gentle: effects of rows nearly add up
EXECUTION, TOKENS = Execution("float64", "scan"), 64
pytestmark = pytest.mark.usefixtures("quick")
STEPS, BATCH = 3, 4  # the third batch begins the second epoch


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bank")
    rows = tiny.rows(folder / "rows", LENGTHS, seed=1)
    query = tiny.rows(folder / "query", [7, 12, 9], seed=2)
    return rows, query


@pytest.fixture
def bank(tiny, world, tmp_path, x64):
    loaded = tiny.loaded()._replace(params=tiny.params(dtype="float64"))
    rows, query = world
    settings = Settings(STEPS, BATCH)
    return Bank(tmp_path, loaded, rows, each(query), settings, OPTIM, EXECUTION, TOKENS)


def each(query):
    return functional(query, "each", "nll")


@pytest.fixture(scope="module")
def plain(tiny):
    """(token losses, gradient of their weighted sum) that know no weights inside the model."""

    def losses(params, ids_BT, labels_BT):
        return model.token_losses(tiny.config, EXECUTION, {"params": params}, ids_BT, labels_BT)

    def total(params, ids_BT, labels_BT, weights_BT):
        return (weights_BT * losses(params, ids_BT, labels_BT)).sum()

    return tiny.jit(losses), tiny.jit(jax.grad(total))


def query_losses(losses, params, query):
    batch = pad_batch(query, np.arange(len(query)), 16)
    return np.asarray(losses(params, batch.ids_BT, batch.labels_BT)).sum(1) / query.trained


def by_hand(plain, params, rows, query, weights_NT, seed):
    """SGD on sum(w nll) / D with D of the whole batch."""
    losses, gradient = plain
    batches = training_batches(rows, BATCH, seed)
    for _ in range(STEPS):
        batch = next(batches)
        grads = gradient(params, batch.ids_BT, batch.labels_BT, weights_NT[batch.rows_B])
        rate = OPTIM.lr / float((batch.labels_BT[:, 1:] != -100).sum())
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)
    return query_losses(losses, params, query)


def test_removed_rows_and_tokens_equal_training_by_hand(tiny, world, bank, plain, close):
    rows, query = world
    params = tiny.params(dtype="float64")
    removed_N = np.ones(len(rows))
    removed_N[[2, 5, 6]] = 0
    tokens_NT = np.random.default_rng(0).random((len(rows), 16))
    found_MQ = bank.losses([np.ones(len(rows)), removed_N, tokens_NT], [3])
    weights = [np.ones((10, 16)), np.broadcast_to(removed_N[:, None], (10, 16)), tokens_NT]
    expected_MQ = np.stack([by_hand(plain, params, rows, query, w, 3) for w in weights])
    close(found_MQ, expected_MQ, "float64")
    effects_MQ = found_MQ[1:] - found_MQ[0]
    assert np.abs(effects_MQ).min() > 1e-7  # the tolerance above could not hide what is measured


def test_weight_0_everywhere_stays_at_the_start(tiny, world, bank, plain, close):
    rows, query = world
    start_Q = query_losses(plain[0], tiny.params(dtype="float64"), query)
    close(bank.before(), start_Q, "float64")
    nothing_Q, all_Q = bank.losses([np.zeros(len(rows)), np.ones(len(rows))])
    close(nothing_Q, start_Q, "float64")
    assert np.abs(all_Q - start_Q).min() > 1e-5


def test_a_killed_bank_goes_on_and_ends_the_same(world, bank, monkeypatch):
    rows, _ = world
    weights = [np.where(np.arange(len(rows)) == m, 0, 1).astype(np.float32) for m in range(4)]
    done = []
    retrain = Bank.retrain

    def counted(self, *of):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(of)
        return retrain(self, *of)

    monkeypatch.setattr(Bank, "retrain", counted)
    with pytest.raises(KeyboardInterrupt):
        bank.losses(weights, [0, 1])
    files = {f: f.read_bytes() for f in bank.folder.glob("*.npy")}
    assert len(files) == 3
    done.clear()
    with pytest.raises(KeyboardInterrupt):
        bank.losses(weights, [0, 1])
    done.clear()
    found_MQ = bank.losses(weights, [0, 1])
    assert len(done) == 2 and all(f.read_bytes() == content for f, content in files.items())
    for file in bank.folder.glob("*.npy"):
        file.unlink()
    done.clear()
    monkeypatch.setattr(Bank, "retrain", retrain)
    np.testing.assert_array_equal(bank.losses(weights, [0, 1]), found_MQ)  # bit for bit
    single_2MQ = [bank.losses(weights, [seed]) for seed in (0, 1)]
    np.testing.assert_allclose(np.mean(single_2MQ, 0), found_MQ, rtol=1e-14)
    assert (single_2MQ[0] != single_2MQ[1]).any()


def test_other_settings_have_other_places(tiny, world, tmp_path):
    rows, query = world
    loaded = tiny.loaded()

    def folder(loaded=loaded, rows=rows, query=query, settings=None, optim=OPTIM):
        settings = settings or Settings(3, 4)
        asked = each(query)
        return Bank(tmp_path, loaded, rows, asked, settings, optim, EXECUTION, TOKENS).folder

    others = [
        folder(loaded=tiny.loaded(seed=1)),
        folder(rows=rows.take(range(9))),
        folder(query=query.take([0, 1])),
        folder(settings=Settings(4, 4)),
        folder(settings=Settings(3, 2)),
        folder(optim=Optim("sgd", 0.25, "constant", clip=0)),
    ]
    assert len({folder(), *others}) == 7
    assert folder() == folder(rows=load_rows(rows.path), settings=Settings(3, 4, save_every=7))


def test_refusals(tiny, world, tmp_path, bank):
    rows, query = world
    with pytest.raises(InputError, match="--accumulate"):
        settings = Settings(3, 4, 3)
        Bank(tmp_path, tiny.loaded(), rows, each(query), settings, OPTIM, EXECUTION, TOKENS)
    start = bank.course(0)._start
    start["embed"]["wte"] = start["embed"]["wte"] * np.nan
    with pytest.raises(InputError, match="lower --lr"):
        bank.losses([np.ones(10)])
    assert not list(bank.folder.glob("*.npy"))


def test_true_effects_have_an_lds_of_one(world, bank):
    """Scores that are what leaving a row out does, by the bank itself; and the same, negated."""
    n = len(world[0])
    losses_MQ = bank.losses([np.ones(n), *(1 - np.eye(n))])
    effect_NQ = losses_MQ[1:] - losses_MQ[0]
    noise_NQ = np.random.default_rng(0).normal(size=(n, 3))
    methods = {"scores": effect_NQ, "negated": -effect_NQ, "noise": noise_NQ}
    for columns in (3, 1):
        found = {k: x if columns == 3 else x.mean(1, keepdims=True) for k, x in methods.items()}
        result = lds(Problem(found, np.full(3, 1 / 3), bank.losses, 0), 0.2, 25)
        line: Any = {line.method: line.estimate for line in result.lines}
        assert line["scores"] > 0.99
        assert line["negated"] == pytest.approx(-line["scores"], abs=1e-12)
        assert abs(line["noise"]) < 0.5
    steps = 0.01 * np.eye(n)
    low_NQ, high_NQ = np.split(bank.losses([*(1 - steps), *(1 + steps)]), 2)
    derivative = Problem({"scores": (low_NQ - high_NQ) / 0.02}, np.full(3, 1 / 3), bank.losses, 0)
    gain, slope, correlation = weight_step(derivative, [0.05]).lines
    assert gain.estimate and gain.interval and gain.interval[0] > 0
    assert slope.estimate == pytest.approx(1, abs=1e-3)
    assert correlation.estimate == pytest.approx(1, abs=1e-6)
