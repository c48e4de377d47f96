"""Whole runs: accumulation, resume, and what a run refuses.

Runs that are killed, told to stop, or on several devices are in test_kill.py and test_devices.py.
"""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import checkpoint, families, model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError, Preempted
from core.files import read_json, read_jsonl
from core.rows import load_rows, pad_batch, save_rows
from core.rundir import open_run
from training import loop
from training.loop import Settings, train
from training.optim import Optim

CONFIG = ModelConfig("gpt2", 32, 16, 8, 2, 2, 16, 4)
SETTINGS = Settings(6, batch=8, save_every=2, eval_every=3)
SGD = Optim("sgd", lr=0.3, warmup=2, momentum=0.9)
EXECUTION = Execution(layers="scan")
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    save_rows(folder / "rows", [rng.integers(0, 32, n) for n in rng.integers(4, 17, 20)])
    return load_rows(folder / "rows", 32, 16)


def fit(path, rows, settings=SETTINGS, optim=SGD, validation=None, fresh=False, **options):
    """`train lm` from Python; returns (summary, final parameters, metrics)."""
    with open_run(path, "train lm", {"seed": 0, **options}, fresh) as run:
        if not run.done:
            run.inputs(rows=rows.sha)
            params = schema.init(families.rows(CONFIG), CONFIG.layers, 0)
            summary = train(run, CONFIG, params, rows, settings, optim, EXECUTION, None, validation)
            run.finish(**summary)
    params = jax.device_get(checkpoint.load_model(path).params)
    return read_json(path / "DONE"), params, metrics(path)


def metrics(path):
    """All but the timing."""
    lines = read_jsonl(path / "metrics.jsonl")
    return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in lines]


def same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, rows):
    with jax.numpy_dtype_promotion("standard"):
        return fit(tmp_path_factory.mktemp("run") / "whole", rows, validation=rows)


def test_metrics(whole, rows):
    """A line for each step, the validation loss after its own step's line."""
    summary, _, lines = whole
    assert [(m["step"], "val_loss" in m) for m in lines] == [
        (1, False), (2, False), (3, False), (3, True), (4, False), (5, False), (6, False),
        (6, True),
    ]  # fmt: skip
    steps = [m for m in lines if "loss" in m]
    assert steps[0]["lr"] == pytest.approx(0.15) and steps[1]["lr"] == pytest.approx(0.3)
    assert steps[-1]["tokens"] > 6 * 8 * 3 and summary["loss"] == steps[-1]["loss"]
    losses = [m["val_loss"] for m in lines if "val_loss" in m]
    assert losses[1] < losses[0] < np.log(32) + 0.1
    assert summary["steps"] == 6


def test_validation_loss_is_the_mean_over_tokens(whole, rows):
    batch = pad_batch(rows, np.arange(len(rows)), 16)
    arrays = (jnp.asarray(batch.ids_BT), jnp.asarray(batch.labels_BT))
    nll_BT = model.token_losses(CONFIG, EXECUTION, {"params": whole[1]}, *arrays)
    assert whole[2][-1]["val_loss"] == pytest.approx(float(nll_BT.sum() / batch.trained), rel=1e-5)


def test_same_run_same_bits(whole, rows, tmp_path):
    same(fit(tmp_path / "again", rows, validation=rows), whole)


def test_accumulation_changes_no_run(whole, rows, tmp_path, close):
    settings = dataclasses.replace(SETTINGS, accumulate=8)
    _, params, lines = fit(tmp_path / "run", rows, settings, validation=rows)
    close(params, whole[1])
    for m, expected in zip(lines, whole[2], strict=True):
        assert m == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_stopped_and_resumed(whole, rows, tmp_path, monkeypatch, at):
    """A run that is told to stop after any step goes on bit-identical."""
    steps = 0

    def step_and_ask(*args):
        nonlocal steps
        steps += 1
        if steps == at:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step_and_ask)
    with pytest.raises(Preempted, match=f"after step {at} of 6"):
        fit(tmp_path / "run", rows, validation=rows)
    assert read_json(tmp_path / "run" / "PREEMPTED") == {"step": at}
    assert [m["step"] for m in metrics(tmp_path / "run") if "loss" in m] == [*range(1, at + 1)]
    same(fit(tmp_path / "run", rows, validation=rows), whole)
    assert steps == 6 and not (tmp_path / "run" / "PREEMPTED").exists()


def test_crashed_before_the_final_model(whole, rows, tmp_path, monkeypatch):
    """All steps done, the model not yet written: no step is done again."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_model", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "run", rows, validation=rows)
    monkeypatch.setattr(loop, "train_step", None)
    same(fit(tmp_path / "run", rows, validation=rows), whole)


def test_crashed_after_metrics_before_checkpoint(whole, rows, tmp_path, monkeypatch):
    """Steps that are logged but not saved are done again and logged once."""
    save = loop._Saver.save

    def crash(self, step, state):
        if step == 4:
            raise ZeroDivisionError
        save(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Saver, "save", crash)
        with pytest.raises(ZeroDivisionError):
            fit(tmp_path / "run", rows, validation=rows)
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    with open(tmp_path / "run" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 5, "lo')  # and a kill in the middle of a line
    same(fit(tmp_path / "run", rows, validation=rows), whole)


def test_the_callers_parameters_survive(rows, tmp_path):
    """Training works in place on its own copy."""
    params = schema.init(families.rows(CONFIG), CONFIG.layers, 0)
    before = jax.tree.map(np.array, params)
    with open_run(tmp_path / "run", "train lm", {}) as run:
        run.inputs()
        train(run, CONFIG, params, rows, SETTINGS, SGD, EXECUTION)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_a_loss_that_is_not_finite_fails_the_run(rows, tmp_path):
    optim = Optim("sgd", lr=99.0, clip=0.0, schedule="constant")
    with pytest.raises(InputError, match=r"(nan|inf).* at step \d.*lower --lr"):
        fit(tmp_path / "run", rows, dataclasses.replace(SETTINGS, steps=200), optim)
    failed = read_json(tmp_path / "run" / "FAILED")["error"]
    step = int(failed.rsplit(" ", 1)[1])
    assert [m["step"] for m in metrics(tmp_path / "run")] == list(range(1, step))
    assert not (tmp_path / "run" / "DONE").exists()
    with pytest.raises(InputError, match="without a final model"):
        checkpoint.load_model(tmp_path / "run")


def test_refused_on_resume(rows, tmp_path):
    fit(tmp_path / "run", rows)
    with pytest.raises(InputError, match="option lr=None, now it is 0.1"):
        fit(tmp_path / "run", rows, lr=0.1)
    (tmp_path / "run" / "DONE").unlink()
    with pytest.raises(InputError, match="input rows="):
        fit(tmp_path / "run", rows.take(range(10)))
    fit(tmp_path / "run", rows.take(range(10)), fresh=True, lr=0.1)


def test_only_the_last_checkpoints_are_kept(rows, tmp_path):
    fit(tmp_path / "run", rows, dataclasses.replace(SETTINGS, save_every=1, keep=3))
    kept = {f.name for f in (tmp_path / "run" / "ckpt").iterdir() if f.name.isdigit()}
    assert kept == {"4", "5", "6"}


@pytest.mark.parametrize(
    "change,devices,message",
    [
        ({"steps": 0}, 1, "--steps must be at least 1"),
        ({"save_every": 0}, 1, "--save-every must be at least 1"),
        ({"accumulate": 3}, 1, "--batch 8 does not divide into --accumulate 3"),
        ({"model_parallel": 2}, 1, "--model-parallel 2 does not divide 1 device"),
        ({"model_parallel": 0}, 8, "--model-parallel 0 does not divide 8 device"),
        ({"model_parallel": 3}, 8, "--model-parallel 3 does not divide 8 device"),
        ({"accumulate": 2}, 8, "micro-batches of 4 rows do not divide over 8 devices"),
        ({"batch": 12}, 8, "micro-batches of 12 rows do not divide over 8 devices"),
    ],
)
def test_bad_settings_are_named(change, devices, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SETTINGS, **change).check(devices)
