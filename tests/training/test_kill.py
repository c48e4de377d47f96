"""`train lm` as a process, killed at random moments or told to stop: bit-identical in the end.

A run that was never disturbed is the reference: same final parameters, same metrics.
"""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from core.checkpoint import load_model
from core.files import read_json, read_jsonl
from core.rows import save_rows

CLI = str(Path(__file__).parents[2] / "cli.py")
MODEL = {"vocab_size": 64, "context": 24, "width": 16, "layers": 2, "heads": 2}
STEPS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    save_rows(folder / "rows", [rng.integers(0, 64, 24) for _ in range(40)])
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


def start(inputs, out) -> subprocess.Popen[str]:
    command = [
        sys.executable, CLI, "train", "lm", "--config", str(inputs / "model.json"),
        "--rows", str(inputs / "rows"), "--out", str(out), "--steps", str(STEPS), "--batch", "4",
        "--save-every", "3", "--layers", "scan",
    ]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    message = process.communicate(timeout=120)[1]
    return process.returncode, message


def saved(out) -> list[int]:
    """Steps whose checkpoint is in place."""
    if not (out / "ckpt").exists():
        return []
    return sorted(int(f.name) for f in (out / "ckpt").iterdir() if f.name.isdigit())


def await_checkpoint(process: subprocess.Popen[str], out, after: int = 0) -> None:
    while not (steps := saved(out)) or steps[-1] <= after:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def outcome(out):
    assert read_json(out / "DONE")["steps"] == STEPS
    assert not any((out / name).exists() for name in ("PREEMPTED", "FAILED"))
    lines = read_jsonl(out / "metrics.jsonl")
    for line in lines:
        line.pop("tokens_per_second", None)
    return jax.device_get(load_model(out).params), lines


@pytest.fixture(scope="module")
def whole(inputs):
    assert finish(start(inputs, inputs / "whole"))[0] == 0
    return outcome(inputs / "whole")


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one[0], other[0])
    assert one[1] == other[1]


def test_killed_twice_at_random_moments(inputs, whole, tmp_path):
    out, moments = tmp_path / "run", []
    for _ in range(2):
        before = saved(out)[-1] if saved(out) else 0
        process = start(inputs, out)
        await_checkpoint(process, out, before)
        moments.append(random.uniform(0, 0.4))
        time.sleep(moments[-1])
        process.kill()
        assert finish(process)[0] in (-signal.SIGKILL, 0), moments
    assert finish(start(inputs, out))[0] == 0, moments
    same(outcome(out), whole)
    assert [m["step"] for m in whole[1] if "loss" in m] == [*range(1, STEPS + 1)]
    litter = [str(f) for f in out.rglob("*") if "tmp" in f.name]
    assert not litter, f"killed {moments} s after a checkpoint: {litter}"


def test_told_to_stop_and_continued(inputs, whole, tmp_path):
    out = tmp_path / "run"
    process = start(inputs, out)
    await_checkpoint(process, out)
    process.send_signal(signal.SIGTERM)
    code, message = finish(process)
    assert code == 75, message
    stopped = read_json(out / "PREEMPTED")["step"]
    assert saved(out)[-1] == stopped and f"stopped after step {stopped} of {STEPS}" in message
    assert not (out / "DONE").exists() and not (out / "model").exists()
    assert finish(start(inputs, out))[0] == 0
    same(outcome(out), whole)
