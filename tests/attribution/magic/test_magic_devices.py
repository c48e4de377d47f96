"""A walk on eight simulated devices, by data and model, against one device."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from core.checkpoint import load_model, save_model
from core.config import Execution
from training.course import Course
from training.loop import Settings
from training.optim import Optim

OPTIM = Optim("adamw", lr=3e-3, schedule="constant", warmup=2, clip=0.5, eps_root=1e-6)
# Over devices the states come from the disk, and a walk that is killed on its way back goes on to
# the same bits.
SCRIPT = """
import sys
from pathlib import Path
import jax, numpy as np
jax.config.update("jax_enable_x64", True)
from attribution.magic import walk
from attribution.magic.functional import functional
from core.checkpoint import load_model
from core.config import Execution
from core.rows import load_rows
from training.course import Course
from training.loop import Settings
from training.optim import Optim

root, out = Path(sys.argv[1]), Path(sys.argv[2])
rows, query = (load_rows(root / name, 24, 12) for name in ("rows", "query"))
walk.SAVE_SECONDS, backward, calls = 0, walk.backward_step, []
assert jax.device_count() == 8
settings = Settings(4, 8, 2, model_parallel=2, drawn=28)
course = Course(load_model(out), rows, settings, OPTIM, Execution("float64", "scan"))


def go(name):
    (out / name).mkdir(exist_ok=True)
    asked, way = functional(query, "mean", "nll"), walk.Settings(budget=0, batch_tokens=64)
    return walk.Walk(out / name, course, asked, way).go().scores


def killed(*of, **named):
    calls.append(of)
    if len(calls) == 3:
        raise KeyboardInterrupt
    return backward(*of, **named)


whole, walk.backward_step = go("whole"), killed
try:
    go("killed")
except KeyboardInterrupt:
    again = go("killed")
assert len(calls) == 5 and (again == whole).all()
np.save(out / "scores.npy", whole)
"""


def test_eight_devices_equal_one(runs, tmp_path, close, standard_promotion, x64):
    save_model(tmp_path, *runs.loaded("gpt2")[:2])
    loaded = load_model(tmp_path)
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.replace("OPTIM,", f"{OPTIM!r},"),
         str(runs.rows.path.parent), str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": flags}, cwd=Path(__file__).parents[3],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    settings = Settings(4, 8, drawn=28)
    course = Course(loaded, runs.rows, settings, OPTIM, Execution("float64", "scan"))
    (tmp_path / "one").mkdir()
    expected = runs.walk(tmp_path / "one", course).go().scores
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    close(np.load(tmp_path / "scores.npy"), expected, 1e-10)
