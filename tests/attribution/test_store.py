"""The gradient store: right rows, honest refusals, and kills that leave no trace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from attribution import gradients
from attribution.gradients import Spec
from attribution.projection import Projection
from attribution.store import Pass, Store, batches, build, is_store
from core.checkpoint import save_model
from core.config import Execution
from core.errors import InputError
from core.rundir import open_run

ROOT = Path(__file__).parents[2]
LENGTHS = [17, 9, 13, 5, 21, 24, 8, 8, 11, 24, 2]
SPEC = Spec(Projection(4))


def make(tiny, folder, rows, spec=SPEC, seed=0, batch_tokens=96):
    with open_run(folder, "attribute build", {}) as run:
        return build(run, Pass(tiny.loaded(seed=seed), rows, spec, Execution(), batch_tokens))


def test_rows_stand_where_they_should(tiny, relative, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    info = make(tiny, tmp_path / "store", rows)
    features_ND = np.load(tmp_path / "store" / "gradients.npy")
    losses_N = np.load(tmp_path / "store" / "losses.npy")
    ids_BT, labels_BT = tiny.batch(LENGTHS)
    aux = gradients.projections(tiny.config, SPEC)
    expected_ND, nll_N = gradients.example_gradients(
        tiny.config, Execution(), SPEC, {"params": tiny.params()}, aux, ids_BT, labels_BT
    )
    assert relative(features_ND, expected_ND) < 1e-5
    assert relative(losses_N, nll_N) < 1e-5
    assert (info["rows_count"], info["width"]) == features_ND.shape
    assert [s["name"] for s in info["sites"]][:2] == ["h.0.attn.c_attn", "h.0.attn.c_proj"]
    read = np.zeros_like(features_ND)
    store = Store(tmp_path / "store")
    for _, out in batches(store, lambda features: features):
        read[out.rows_B] = out.features_BD
    np.testing.assert_array_equal(read, features_ND)


def test_batch_tokens_change_nothing(tiny, relative, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    for tokens in (1, 96, 10_000):
        make(tiny, tmp_path / str(tokens), rows, batch_tokens=tokens)
    small, middle, large = (np.load(tmp_path / n / "gradients.npy") for n in ("1", "96", "10000"))
    assert relative(small, large) < 1e-5 and relative(middle, large) < 1e-5


def test_store_of_something_else_is_refused(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    make(tiny, tmp_path / "store", rows)
    store = Store(tmp_path / "store")
    store.check(SPEC, tiny.loaded().fingerprint)
    store.check_rows(rows)
    with pytest.raises(InputError, match="another model"):
        store.check(SPEC, tiny.loaded(seed=1).fingerprint)
    for other in (
        Spec(Projection(5)), Spec(Projection(4, "normal")), Spec(Projection(4, seed=1)),
        Spec(Projection(4, scale="row_norm")), SPEC._replace(include_bias=True),
        SPEC._replace(loss="mean"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="same options"):
            store.check(other, tiny.loaded().fingerprint)
    with pytest.raises(InputError, match="build the store again"):
        store.check_rows(tiny.rows(tmp_path / "other", LENGTHS, seed=1))


def test_unfinished_or_damaged_store_is_refused(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    make(tiny, tmp_path / "store", rows)
    assert is_store(tmp_path / "store") and not is_store(tmp_path / "rows")
    info = tmp_path / "store" / "info.json"
    content = json.loads(info.read_text())
    info.write_text(json.dumps({**content, "rows_count": 3}))
    with pytest.raises(InputError, match="does not fit"):
        Store(tmp_path / "store")
    info.unlink()
    with pytest.raises(InputError, match="not a finished gradient store"):
        Store(tmp_path / "store")


@pytest.mark.parametrize("change", ["rows", "model", "devices"])
def test_resume_on_other_inputs_is_refused(tiny, tmp_path, monkeypatch, change):
    """Other devices make other batches: their number says nothing about which rows are done."""
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    make(tiny, tmp_path / "store", rows)
    other = tiny.rows(tmp_path / "other", LENGTHS, seed=1) if change == "rows" else rows
    source = Pass(tiny.loaded(seed=int(change == "model")), other, SPEC, Execution(), 96)
    if change == "devices":
        monkeypatch.setattr("jax.device_count", lambda: 3)
    with open_run(tmp_path / "store", "attribute build", {}) as run:
        with pytest.raises(InputError, match=f"input {change}="):
            build(run, source)


def test_full_disk_is_told_before_any_work(tiny, tmp_path, monkeypatch):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    need = 4 * len(LENGTHS) * gradients.width(tiny.config, SPEC) / 1e9
    with pytest.raises(InputError, match=f"No space left on device.* {need:.3g} GB"):
        make(tiny, tmp_path / "store", rows)
    assert not list(tmp_path.glob("store/*.npy")) and not list(tmp_path.glob("store/*.tmp"))
    monkeypatch.undo()
    make(tiny, tmp_path / "store", rows)  # once there is room, the same command goes on
    assert np.load(tmp_path / "store" / "gradients.npy").any(1).all()


def test_gradient_that_is_not_finite_is_refused_by_row(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", [9, 12])
    loaded = tiny.loaded()
    token = int(np.setdiff1d(rows.ids(1), rows.ids(0))[0])
    loaded.params["embed"]["wte"] = loaded.params["embed"]["wte"].at[token, 0].set(np.nan)
    untied = loaded._replace(config=tiny.untied)
    untied.params["head"] = tiny.params()["embed"]["wte"]
    source = Pass(untied, rows, SPEC, Execution(), 96)
    with open_run(tmp_path / "store", "attribute build", {}) as run:
        with pytest.raises(InputError, match="row 1 has a gradient that is not finite"):
            build(run, source)
    assert not (tmp_path / "store" / "info.json").exists()


# Every batch is flushed and followed by a pause, so that a kill finds a journal to go on from.
SLOWLY = """
import time
from core.memmap import FilledArray

write = FilledArray.write

def slow(self, rows_B, values):
    write(self, rows_B, values)
    self.flush()
    time.sleep(0.02)

FilledArray.write = slow
from cli import cli
cli()
"""


class Killed:
    """Runs `cli.py` with arguments; kills it without warning when its journal says so."""

    def __init__(self, journal: Path, quick: dict):
        self.journal = journal
        flags = " ".join(f"--{name}={value}" for name, value in quick.items())
        self.environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}

    def batches(self) -> int:
        return json.loads(self.journal.read_text())["batches"] if self.journal.exists() else 0

    def kill_after(self, batches: int, *arguments) -> None:
        command = [sys.executable, "-c", SLOWLY, *map(str, arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stderr=subprocess.DEVNULL
        )
        while self.batches() < batches:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def finish(self, *arguments) -> None:
        command = [sys.executable, "cli.py", *map(str, arguments)]
        subprocess.run(command, cwd=ROOT, env=self.environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def on_disk(tiny, tmp_path_factory):
    """A model folder, a pool of many small batches, and a query."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", tiny.config, tiny.params())
    lengths = np.random.default_rng(3).choice([18, 21, 24, 34, 40], 100).tolist()
    tiny.rows(folder / "pool", lengths)
    tiny.rows(folder / "query", [40, 37, 38], seed=5)
    return folder


def test_killed_builds_end_with_the_same_bytes(tiny, on_disk, tmp_path):
    options = ["--model", on_disk / "model", "--rows", on_disk / "pool", "--projection-dim", 4,
               "--batch-tokens", 96]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli = Killed(broken / "gradients.journal.json", tiny.quick)
    random = np.random.default_rng()
    for first, last in ((1, 12), (13, 24)):
        at = int(random.integers(first, last))
        cli.kill_after(at, "attribute", "build", *options, "--out", broken)
        assert at <= cli.batches() < 30 and not (broken / "info.json").exists()
    cli.finish("attribute", "build", *options, "--out", broken)
    cli.finish("attribute", "build", *options, "--out", whole)
    for name in ("gradients.npy", "losses.npy", "info.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert (broken / "DONE").exists()


def test_killed_scores_end_with_the_same_bytes(tiny, on_disk, tmp_path):
    options = ["--model", on_disk / "model", "--pool", on_disk / "pool", "--query",
               on_disk / "query", "--projection-dim", 4, "--batch-tokens", 96, "--precondition",
               "mixed", "--unit-norm"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli = Killed(broken / "scores.journal.json", tiny.quick)
    random = np.random.default_rng()
    for first, last in ((1, 12), (13, 24)):
        cli.kill_after(
            int(random.integers(first, last)), "attribute", "score", *options, "--out", broken
        )
        assert not (broken / "info.json").exists()
    cli.finish("attribute", "score", *options, "--out", broken)
    cli.finish("attribute", "score", *options, "--out", whole)
    for name in ("scores.npy", "norms.npy", "row_diagnostics.jsonl", "summary.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
