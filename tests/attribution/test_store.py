"""The gradient store: right rows, honest refusals, and kills that leave no trace."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from attribution import gradients, targets
from attribution.projection import Projection
from attribution.store import Features, Pass, Store, batches, build, export, is_store
from attribution.targets import Spec
from core.checkpoint import save_model
from core.config import Execution
from core.errors import InputError
from core.rundir import open_run

ROOT = Path(__file__).parents[2]
LENGTHS = [17, 9, 13, 5, 21, 24, 8, 8, 11, 24, 2]
SPEC = Spec(Projection(4))


def make(tiny, folder, rows, spec=SPEC, seed=0, batch_tokens=96, dtype="float32"):
    with open_run(folder, "attribute build", {}) as run:
        source = Pass(tiny.loaded(seed=seed), rows, spec, Execution(), batch_tokens)
        return build(run, source, dtype)


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


@pytest.mark.parametrize("dtype,largest", [("bfloat16", 3.3895e38), ("float16", 65504.0)])
def test_narrow_numbers(tiny, tmp_path, monkeypatch, dtype, largest):
    """Rounded once, clipped to what the dtype holds, and float32 again for whoever reads them."""
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    source = Pass(tiny.loaded(), rows, SPEC, Execution(), 96)
    shape = (len(LENGTHS), targets.width(tiny.config, SPEC))
    given_ND = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
    given_ND[3, :2] = [3.4028e38, -3.4028e38]  # round to infinity in either dtype

    def compute(batch):
        return Features(batch.rows_B, given_ND[batch.rows_B], np.zeros(len(batch.rows_B)))

    monkeypatch.setattr(source, "compute", compute)
    with open_run(tmp_path / "store", "attribute build", {}) as run:
        build(run, source, dtype)
    store = Store(tmp_path / "store")
    found_ND = np.concatenate([out.features_BD for _, out in batches(store, lambda out: out)])
    assert found_ND.dtype == np.float32
    np.testing.assert_allclose(found_ND[3, :2], [largest, -largest], rtol=1e-4)
    half_step = 2.0 ** -(jax.numpy.finfo(dtype).nmant + 1)
    np.testing.assert_allclose(found_ND[4:], given_ND[4:], half_step, atol=1e-7)
    assert (tmp_path / "store" / "gradients.npy").stat().st_size == 128 + 2 * given_ND.size


def test_advantages_scale_losses(tiny, relative, tmp_path):
    lengths, factors = [9, 13, 5, 11], [0.5, -2.0, 0.0, 3.0]
    plain = tiny.rows(tmp_path / "plain", lengths)
    rows = tiny.rows(tmp_path / "rows", lengths, advantage=factors)
    make(tiny, tmp_path / "store", plain)
    make(tiny, tmp_path / "scaled", rows)
    plain_ND, scaled_ND = (np.load(tmp_path / n / "gradients.npy") for n in ("store", "scaled"))
    assert relative(scaled_ND, plain_ND * np.array(factors)[:, None]) < 1e-5
    Store(tmp_path / "scaled").check_rows(rows)
    with pytest.raises(InputError, match="plain has changed"):
        Store(tmp_path / "scaled").check_rows(plain)
    broken = tiny.rows(tmp_path / "broken", [5, 6], advantage=[1.0, None])
    with pytest.raises(InputError, match="'advantage' is not all finite numbers"):
        Pass(tiny.loaded(), broken, SPEC, Execution(), 96)


def test_a_flipped_bit_is_found(tiny, tmp_path):
    make(tiny, tmp_path / "store", tiny.rows(tmp_path / "rows", LENGTHS))
    Store(tmp_path / "store").verify()
    file = tmp_path / "store" / "gradients.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(InputError, match="gradients.npy is damaged"):
        Store(tmp_path / "store").verify()
    (tmp_path / "store" / "gradients.journal.json").write_text('{"batches": 2}')
    with pytest.raises(InputError, match="does not fit"):
        Store(tmp_path / "store")


def test_export_is_what_bergson_reads(tiny, tmp_path):
    """Its `load_gradients` maps gradients.bin, without a header, as base_dtype; modules' columns
    stand in the order of grad_sizes."""
    make(tiny, tmp_path / "store", tiny.rows(tmp_path / "rows", LENGTHS), dtype="float16")
    (tmp_path / "index").mkdir()
    export(Store(tmp_path / "store"), tmp_path / "index")
    info = json.loads((tmp_path / "index" / "info.json").read_text())
    shape = info["num_grads"], sum(info["grad_sizes"].values())
    found_ND = np.memmap(tmp_path / "index" / "gradients.bin", info["base_dtype"], "r", shape=shape)
    stored_ND = np.load(tmp_path / "store" / "gradients.npy")
    np.testing.assert_array_equal(found_ND, stored_ND)
    assert found_ND.dtype == np.float16 and info["num_items"] == len(LENGTHS)
    assert list(info["grad_sizes"])[:2] == ["h.0.attn.c_attn", "h.0.attn.c_proj"]


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
    need = 4 * len(LENGTHS) * targets.width(tiny.config, SPEC) / 1e9
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
    """Runs `cli.py` with arguments, in one process or several with some devices each; kills all
    without warning when the journal of the last says so."""

    def __init__(
        self, cache: Path, journal: Path, quick: dict, processes: int = 1, devices: int = 1
    ):
        self.journal, self.processes = journal, processes
        quick = {**quick, "xla_force_host_platform_device_count": devices}
        flags = " ".join(f"--{name}={value}" for name, value in quick.items())
        self.environment = {
            **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
            "JAX_COMPILATION_CACHE_DIR": str(cache / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }  # fmt: skip

    def start(self, *command) -> list[subprocess.Popen]:
        found = {}
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"127.0.0.1:{free.getsockname()[1]}"
            found = {"TAPROOT_COORDINATOR": address, "TAPROOT_PROCESSES": str(self.processes)}
        return [
            subprocess.Popen(
                [sys.executable, *map(str, command)], cwd=ROOT,
                env={**self.environment, **found, "TAPROOT_PROCESS": str(number)},
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for number in range(self.processes)
        ]  # fmt: skip

    def batches(self) -> int:
        return json.loads(self.journal.read_text())["batches"] if self.journal.exists() else 0

    def kill_after(self, batches: int, *arguments) -> None:
        started = self.start("-c", SLOWLY, *arguments)
        while self.batches() < batches:
            assert all(p.poll() is None for p in started), "ended before it was killed"
            time.sleep(0.003)
        for process in started:
            process.send_signal(signal.SIGKILL)
        assert all(process.wait() == -signal.SIGKILL for process in started)

    def finish(self, *arguments) -> None:
        for process in self.start("cli.py", *arguments):
            assert process.wait() == 0


@pytest.fixture(scope="module")
def on_disk(tiny, tmp_path_factory):
    """A model folder, a pool of many small batches, a query, and the pool's store."""
    folder = tmp_path_factory.mktemp("inputs")
    save_model(folder / "model", tiny.config, tiny.params())
    lengths = np.random.default_rng(3).choice([18, 21, 24, 34, 40], 100).tolist()
    tiny.rows(folder / "pool", lengths)
    tiny.rows(folder / "query", [40, 37, 38], seed=5)
    Killed(folder, folder, tiny.quick).finish(
        "attribute", "build", *of_pool(folder, folder / "store")
    )
    return folder


def of_pool(folder: Path, out: Path) -> list[Any]:
    return ["--model", folder / "model", "--rows", folder / "pool", "--projection-dim", 4,
            "--batch-tokens", 96, "--out", out]  # fmt: skip


def test_killed_builds_end_with_the_same_bytes(tiny, on_disk, tmp_path):
    broken, options = tmp_path / "broken", of_pool(on_disk, tmp_path / "broken")
    cli = Killed(on_disk, broken / "gradients.journal.json", tiny.quick)
    random = np.random.default_rng()
    for first, last in ((1, 12), (13, 24)):
        at = int(random.integers(first, last))
        cli.kill_after(at, "attribute", "build", *options)
        assert at <= cli.batches() < 30 and not (broken / "info.json").exists()
    cli.finish("attribute", "build", *options)
    for name in ("gradients.npy", "losses.npy", "info.json"):
        assert (broken / name).read_bytes() == (on_disk / "store" / name).read_bytes()
    assert (broken / "DONE").exists()


def test_two_killed_processes_build_the_store_of_one(tiny, on_disk, tmp_path, relative):
    """On four simulated devices each, so that batches are split and padded otherwise."""
    out, one = tmp_path / "store", Store(on_disk / "store")
    cli = Killed(on_disk, out / "gradients-00002-of-00002.journal.json", tiny.quick, 2, devices=4)
    cli.kill_after(2, "attribute", "build", *of_pool(on_disk, out))
    assert not (out / "info.json").exists()
    cli.finish("attribute", "build", *of_pool(on_disk, out))
    two = Store(out)
    two.verify()
    assert [file.name for file in two.array.paths] == [
        "gradients-00001-of-00002.npy", "gradients-00002-of-00002.npy"
    ]  # fmt: skip
    assert relative(two.array[0:100], one.array[0:100]) < 1e-6
    assert relative(two.losses, one.losses) < 1e-6
    assert two.hashes == one.hashes and (out / "DONE").exists()


def test_killed_scores_end_with_the_same_bytes(tiny, on_disk, tmp_path):
    options = ["--model", on_disk / "model", "--pool", on_disk / "pool", "--query",
               on_disk / "query", "--projection-dim", 4, "--batch-tokens", 96, "--precondition",
               "mixed", "--unit-norm"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    cli = Killed(on_disk, broken / "scores.journal.json", tiny.quick)
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
