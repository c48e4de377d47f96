"""Whole runs: what they write, stopped and killed ones, several SAEs in one pass, refusals."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from core import families, safetensors, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError, Preempted
from core.files import read_json, read_jsonl
from core.rows import load_rows, save_rows
from core.rundir import open_run
from core.taps import Tap
from sae import formats
from sae.activations import Reader, Shuffle
from sae.coder import reconstruct
from sae.training import run as train
from sae.training.log import Log
from sae.training.losses import Objective
from sae.training.run import Job, Settings
from sae.training.step import Metrics, Recipe

BOS = 1
CONFIG = ModelConfig("gpt2", 32, 24, 8, 2, 2, 16, 4, bos=BOS)
EXECUTION = Execution(layers="scan")
STEPS = 12
RESID, IN, OUT = Tap("resid_post", 1), Tap("mlp_in", 1), Tap("mlp_out", 1)
TOP = Recipe(Objective("topk", k=3), 8, 24, 8, STEPS, lr=0.01, dead_tokens=100)
ACROSS = Recipe(
    Objective("batchtopk", k=3, centred=False), 8, 16, 8, STEPS, True, lr=0.01, dead_tokens=100
)
TOPK = Objective("topk", k=3, centred=False)
JOBS = [Job("resid", RESID, RESID, TOP), Job("across", IN, OUT, ACROSS)]
SETTINGS = Settings(
    tokens=360, batch=30, buffer=100, batch_tokens=192, log_every=5, save_every=4
)  # fmt: skip
pytestmark = pytest.mark.usefixtures("standard_promotion")


def make_rows(path):
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32, n) for n in rng.integers(4, 25, 20)]
    for row in ids:
        row[0] = BOS
    save_rows(path, ids)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    make_rows(folder / "rows")
    return load_rows(folder / "rows", 32, 24)


def model():
    params = schema.init(families.rows(CONFIG), CONFIG.layers, 0)
    return Loaded(CONFIG, jax.tree.map(lambda x: 5 * x, params), None, "its fingerprint")


@pytest.fixture(scope="module")
def loaded():
    return model()


def fit(path, loaded, rows, jobs=JOBS, settings=SETTINGS):
    """`sae train` from Python; returns (summary, SAEs, metrics) without what takes time."""
    with open_run(path, "sae train", {}) as run:
        if not run.done:
            run.inputs(rows=rows.sha)
            run.finish(**train.train(run, loaded, rows, jobs, settings, EXECUTION, "tiny"))
    summary = read_json(path / "DONE")
    for found in summary["saes"].values():
        found.pop("tokens_per_second", None)
    saes = {job.name: formats.load(path / job.name) for job in jobs}
    return summary, saes, {job.name: metrics(path, job.name) for job in jobs}


def metrics(path, name):
    lines = read_jsonl(path / "logs" / name / "metrics.jsonl")
    return [{k: v for k, v in m.items() if k != "tokens_per_second"} for m in lines]


def same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    for name in one[1]:
        assert one[1][name].fingerprint == other[1][name].fingerprint


@pytest.fixture(scope="module")
def whole(tmp_path_factory, loaded, rows):
    with jax.numpy_dtype_promotion("standard"):
        return fit(tmp_path_factory.mktemp("run") / "whole", loaded, rows)


def test_what_a_run_writes(whole, rows):
    summary, saes, lines = whole
    assert SETTINGS.steps(10**6) == dataclasses.replace(SETTINGS, tokens=None).steps(389) == STEPS
    assert (summary["steps"], summary["tokens"], summary["skipped"]) == (STEPS, 360, 0)
    top, across = saes["resid"], saes["across"]
    assert (top.coder.architecture, top.coder.k, top.coder.d_sae) == ("topk", 3, 24)
    assert (across.coder.architecture, across.coder.transcoder) == ("jumprelu", True)
    assert (top.about.tap_in, top.about.tap_out) == ("resid_post.1", "resid_post.1")
    assert (across.about.tap_in, across.about.tap_out) == ("mlp_in.1", "mlp_out.1")
    assert top.about.model == "tiny" and top.about.extra["prepend_bos"]
    assert top.about.extra["model_fingerprint"] == "its fingerprint"
    assert {name: found["fingerprint"] for name, found in summary["saes"].items()} == {
        name: sae.fingerprint for name, sae in saes.items()
    }
    for name, found in lines.items():
        assert [m["step"] for m in found] == [5, 10, 12]
        assert [m["tokens"] for m in found] == [150, 300, 360]
        assert found[-1]["lr"] < found[0]["lr"] == pytest.approx(0.01)
        assert found[-1]["explained_variance"] > found[0]["explained_variance"]
        terms = [value for key, value in found[0].items() if key.startswith("loss/")]
        assert found[0]["loss"] == pytest.approx(sum(terms))
        assert found[-1] == {k: v for k, v in summary["saes"][name].items() if k != "fingerprint"}
    assert [m["l0"] for m in lines["resid"]] == pytest.approx([3] * 3)


def test_the_saes_read_raw_activations(whole, loaded, rows):
    """What they explain of the rows is what training said in the end, or more."""
    reader = Reader(loaded, EXECUTION, rows, (IN, OUT, RESID))
    x_ND, t_NO, r_ND = next(Shuffle(reader, 64, 10**6, 0).batches(240))
    for name, source, target in (("resid", r_ND, r_ND), ("across", x_ND, t_NO)):
        sae = whole[1][name]
        y_NO = np.asarray(reconstruct(sae.coder, sae.params, jax.numpy.asarray(source))[1])
        found = 1 - ((y_NO - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum()
        logged = whole[2][name][-1]["explained_variance"]
        assert found == pytest.approx(logged, abs=0.1), name


@pytest.mark.parametrize("at", [1, 4, 7])
def test_stopped_and_resumed(whole, loaded, rows, tmp_path, monkeypatch, at):
    """Told to stop after any step, also within a window, a run goes on bit-identical."""
    calls = 0

    def step_and_ask(*args):
        nonlocal calls
        calls += 1
        if calls == 2 * at:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", step_and_ask)
    with pytest.raises(Preempted, match=f"after step {at} of 12"):
        fit(tmp_path / "run", loaded, rows)
    assert read_json(tmp_path / "run" / "PREEMPTED") == {"step": at}
    assert [m["step"] for m in metrics(tmp_path / "run", "resid")] == [5] * (at >= 5)
    same(fit(tmp_path / "run", loaded, rows), whole)
    assert calls == 2 * STEPS


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
import test_run as tests
from core.rows import load_rows
from sae.training import run as train
save, saves = train.safetensors.write, 0
def dying(*args):
    global saves
    saves += 1
    if saves == 2:
        os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
train.safetensors.write = dying
tests.fit(tests.Path(sys.argv[3]) / "run", tests.model(), load_rows(sys.argv[4], 32, 24))
"""


def alone(script, *arguments, **environment):
    """Run a script that may import this module in a process of its own."""
    here = Path(__file__)
    command = [sys.executable, "-c", script, str(here.parent), str(here.parents[3]), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_killed_while_it_saves(whole, loaded, rows, tmp_path):
    """The checkpoint before is whole, and the run goes on from it bit-identical."""
    process = alone(KILLED, str(tmp_path), str(rows.path))
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert safetensors.metadata(tmp_path / "run" / "state.safetensors")["step"] == "4"
    same(fit(tmp_path / "run", loaded, rows), whole)


DEVICES = """
import sys
sys.path[:0] = sys.argv[1:3]
import dataclasses, jax
import test_run as tests
from core.rows import load_rows
assert jax.device_count() == 4
settings = dataclasses.replace(tests.SETTINGS, model_parallel=2)
rows = load_rows(sys.argv[4], 32, 24)
tests.fit(tests.Path(sys.argv[3]) / "run", tests.model(), rows, settings=settings)
"""


def test_four_devices(whole, rows, tmp_path, close):
    """Split over rows and over features, a run differs in rounding alone."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    process = alone(DEVICES, str(tmp_path), str(rows.path), XLA_FLAGS=flags)
    assert process.returncode == 0, process.stderr
    for name, sae in whole[1].items():
        close(formats.load(tmp_path / "run" / name).params, dict(sae.params))


def test_ended_before_it_was_marked_as_done(whole, loaded, rows, tmp_path):
    fit(tmp_path / "run", loaded, rows)
    (tmp_path / "run" / "DONE").unlink()
    same(fit(tmp_path / "run", loaded, rows), whole)


def test_two_in_one_pass_are_each_alone(whole, loaded, rows, tmp_path):
    for job in JOBS:
        summary, saes, lines = fit(tmp_path / job.name, loaded, rows, [job])
        assert saes[job.name].fingerprint == whole[1][job.name].fingerprint
        assert lines[job.name] == whole[2][job.name]
        assert [*summary["saes"]] == [job.name]


def test_a_cache_changes_no_bit(whole, loaded, rows, tmp_path):
    settings = dataclasses.replace(SETTINGS, cache=tmp_path / "cache")
    same(fit(tmp_path / "run", loaded, rows, settings=settings), whole)


def test_a_loss_that_is_not_finite(loaded, rows, tmp_path, monkeypatch):
    def diverging(*args):
        state, found = train_step(*args)
        if int(state.step) == 6:
            found = found._replace(losses={**found.losses, "mse": jax.numpy.array(np.nan)})
        return state, found

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(InputError, match=r"resid: loss mse is nan at step 6; .* lower --lr"):
        fit(tmp_path / "run", loaded, rows)
    assert "step 6" in read_json(tmp_path / "run" / "FAILED")["error"]
    assert safetensors.metadata(tmp_path / "run" / "state.safetensors")["step"] == "4"
    assert [m["step"] for m in metrics(tmp_path / "run", "resid")] == [5]


@pytest.mark.parametrize(
    ("jobs", "settings", "message"),
    [
        ([JOBS[0], JOBS[0]], SETTINGS, "resid is asked for twice"),
        ([JOBS[0]._replace(name="../x")], SETTINGS, "cannot be the name"),
        ([JOBS[0]._replace(name="logs")], SETTINGS, "cannot be the name"),
        (JOBS, dataclasses.replace(SETTINGS, tokens=29), "fill no step of 30; lower --batch"),
        (JOBS, dataclasses.replace(SETTINGS, save_every=0), "--save-every must be"),
        (JOBS, dataclasses.replace(SETTINGS, model_parallel=2), "--model-parallel 2 does not"),
        ([Job("topk", IN, OUT, dataclasses.replace(ACROSS, objective=TOPK))], SETTINGS,
         "topk: the SAELens format has no topk transcoder"),
        ([JOBS[0]._replace(recipe=dataclasses.replace(TOP, d_sae=2**50))], SETTINGS,
         r"need .* GB .* narrower"),
    ],
)  # fmt: skip
def test_refused_before_any_work(loaded, rows, tmp_path, jobs, settings, message):
    settings = dataclasses.replace(settings, cache=tmp_path / "cache")
    with pytest.raises(InputError, match=message):
        fit(tmp_path / "run", loaded, rows, jobs, settings)
    assert not [*tmp_path.iterdir()]


def test_explained_variance_is_of_the_whole_window(tmp_path):
    """Of all steps' tokens together, about their common mean and not each step's own."""
    rng = np.random.default_rng(0)
    log = Log(tmp_path, 0, 16, {})
    t_SNO = rng.normal(size=(7, 16, 3)) + 30 + 5 * rng.normal(size=(7, 1, 1))
    y_SNO = t_SNO + 0.5 * rng.normal(size=t_SNO.shape)
    for step, (t_NO, y_NO) in enumerate(zip(t_SNO, y_SNO, strict=True), 1):
        fires_F = np.array([16, 2 * (step % 2), 0])
        values: Any = dict(
            losses={"mse": np.float32(2), "aux": np.float32(step)}, grad_norm=np.float32(1),
            l0=fires_F.sum() / 16, dead=np.int32(step), dense=np.float32(0),
            errors=((y_NO - t_NO) ** 2).sum(), squares=(t_NO**2).sum(), total_O=t_NO.sum(0),
            fires_F=fires_F,
        )  # fmt: skip
        log.step(step, Metrics(**values))
    log.line(7, 0.5)
    log.close()
    t_NO, y_NO = t_SNO.reshape(-1, 3), y_SNO.reshape(-1, 3)
    expected = 1 - ((y_NO - t_NO) ** 2).sum() / ((t_NO - t_NO.mean(0)) ** 2).sum()
    assert log.last == pytest.approx({
        "step": 7, "loss": 6, "loss/mse": 2, "loss/aux": 4, "l0": 1 + 8 / 7 / 16, "dead": 7,
        "explained_variance": expected, "dense": 1, "grad_norm": 1, "lr": 0.5, "tokens": 112,
    })  # fmt: skip
