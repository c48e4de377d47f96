"""What training an SAE reports: lines of `metrics.jsonl` and TensorBoard.

A line is about the steps since the line before, its window. Their sums are float64, and explained
variance is that of all their tokens together (N of them, t the target):

    1 - sum |y - t|^2 / (sum |t|^2 - |sum t|^2 / N)
"""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core.files import append_jsonl, read_jsonl, write_jsonl
from sae.training.step import DENSE, Metrics

Sums = dict[str, np.ndarray]


class Log:
    """Of one SAE. sums: those of the window that is open, for a checkpoint to hold.

    dead and dense are numbers of features: silent at the window's end, fired on more than a tenth
    of its tokens. Losses, l0 and grad_norm are means over its steps. A step's metrics stay on the
    device until the next one's come, so the device never waits for the host.
    """

    def __init__(self, folder: Path, start: int, batch: int, sums: Sums):
        from tensorboardX import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file, self.batch, self.sums = folder / "metrics.jsonl", batch, sums
        kept = [m for m in read_jsonl(self.file) if m["step"] <= start] if start else []
        write_jsonl(self.file, kept)
        self.last: dict[str, Any] = kept[-1] if kept else {}
        self.board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self.pending: tuple[int, Metrics] | None = None
        self.lines: list[dict[str, Any]] = []
        self.since: tuple[int, float] | None = None

    def step(self, step: int, metrics: Metrics) -> None:
        """Take in a step; raises FloatingPointError where the one before went wrong."""
        self._read()
        self.pending = (step, metrics)

    def line(self, step: int, lr: float) -> None:
        """End the window at this step, the last one taken in."""
        self._read()
        sums, self.sums = self.sums, {}
        steps = int(sums["steps"])
        rows = steps * self.batch
        losses = {name: sums[name] / steps for name in sums if name.startswith("loss/")}
        variance = sums["squares"] - (sums["total_O"] ** 2).sum() / rows
        found = {
            "loss": sum(losses.values()),
            **losses,
            "l0": sums["l0"] / steps,
            "explained_variance": 1 - sums["errors"] / max(variance, 1e-30),
            "grad_norm": sums["grad_norm"] / steps,
        }
        self.last = {"step": step, **{name: float(value) for name, value in found.items()}}
        self.last |= {
            "dead": int(sums["dead"]),
            "dense": int((sums["fires_F"] > DENSE * rows).sum()),
        }
        self.last |= {"lr": lr, "tokens": step * self.batch, **self._speed(step)}
        self.lines.append(self.last)
        for name, value in self.last.items():
            if name != "step" and np.isfinite(value):
                self.board.add_scalar(f"train/{name}", value, step)

    def flush(self) -> None:
        self._read()
        append_jsonl(self.file, self.lines)
        self.lines = []

    def close(self) -> None:
        self.board.close()

    def _speed(self, step: int) -> dict[str, int]:
        """Tokens a second since the first line; nothing there, where compilation is in it."""
        now = time.monotonic()
        if self.since is None:
            self.since = (step, now)
            return {}
        return {
            "tokens_per_second": round((step - self.since[0]) * self.batch / (now - self.since[1]))
        }

    def _read(self) -> None:
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        losses = {f"loss/{name}": value for name, value in metrics.losses.items()}
        found = jax.device_get({**metrics._asdict(), **losses})
        del found["losses"]
        for name in (*losses, "grad_norm"):
            if not np.isfinite(found[name]):
                self.flush()
                what = f"{self.file.parent.name}: {name.replace('/', ' ')}"
                raise FloatingPointError(f"{what} is {found[name]} at step {step}")
        for name, value in {**found, "steps": 1}.items():
            before = self.sums.get(name, 0.0) if name != "dead" else 0.0  # it is a count as it is
            self.sums[name] = before + np.asarray(value, np.float64)
