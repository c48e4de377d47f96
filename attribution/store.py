"""Gradient features of many rows: computed on the fly, or kept in a store.

Dims: N rows, B rows of a batch, D features.

A store is `gradients.npy` [N,D] float32 in row order, `losses.npy` [N], and `info.json` with the
layout of D and the hashes of everything the numbers depend on. Building streams: memory is a few
batches whatever N is, and a killed build continues with the batch it was at.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from attribution import gradients
from attribution.gradients import Spec
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, read_json, write_json
from core.inference import overlapped, placer
from core.memmap import FilledArray, open_array
from core.progress import Progress
from core.rows import Batch, Plan, Rows
from core.rundir import Run
from core.sharding import make_mesh, replicated


class Features(NamedTuple):
    """One batch: rows_B (-1 = padding), features [B,D] on the device, summed losses [B]."""

    rows_B: np.ndarray
    features_BD: jax.Array | np.ndarray
    losses_B: jax.Array | np.ndarray


class Pass:
    """The gradient pass over rows as a source of `Features` batches."""

    def __init__(
        self, loaded: Loaded, rows: Rows, spec: Spec, execution: Execution, batch_tokens: int
    ):
        self.loaded, self.rows, self.spec, self.execution = loaded, rows, spec, execution
        self.plan = Plan(rows, batch_tokens, jax.device_count())
        everywhere = replicated(make_mesh())
        self.aux = jax.device_put(gradients.projections(loaded.config, spec), everywhere)
        self._variables = jax.device_put(loaded.variables, everywhere)
        self._place = placer()

    def compute(self, batch: Batch) -> Features:
        features_BD, losses_B = gradients.example_gradients(
            self.loaded.config, self.execution, self.spec, self._variables, self.aux,
            *self._place(batch),
        )  # fmt: skip
        return Features(batch.rows_B, features_BD, losses_B)

    @property
    def hashes(self) -> dict[str, Any]:
        return {
            "model": self.loaded.fingerprint,
            "tokenizer": self.rows.tokenizer,
            "rows": self.rows.sha,
        }


class Store:
    """A finished store, memory-mapped; also a source of `Features` batches."""

    def __init__(self, path: PathLike):
        self.path = Path(path)
        if not (self.path / "info.json").exists():
            raise InputError(f"{path} is not a finished gradient store; run `attribute build`")
        self.info = read_json(self.path / "info.json")
        if not isinstance(self.info, dict) or self.info.get("format") != "taproot-gradients":
            raise InputError(f"{path} is not a gradient store; make one with `attribute build`")
        self.losses = open_array(self.path / "losses.npy")
        n, width = open_array(self.path / "gradients.npy").shape
        if (n, width) != (self.info["rows_count"], self.info["width"]):
            raise InputError(f"{path}: gradients.npy does not fit info.json; build it again")
        self.rows_path = Path(self.info["rows_path"])
        size = max(1, 2**24 // width)
        self.plan = [np.arange(start, min(start + size, n)) for start in range(0, n, size)]

    def compute(self, rows_B: Any) -> Features:
        part = slice(int(rows_B[0]), int(rows_B[-1]) + 1)
        array = open_array(self.path / "gradients.npy")  # one mapping would keep every page it read
        return Features(rows_B, array[part], self.losses[part])

    def check(self, spec: Spec, fingerprint: str) -> None:
        """Raise unless this store was made with this model and these settings."""
        if self.info["model"] != fingerprint:
            raise InputError(f"store {self.path} was made with another model "
                             f"({self.info['model'][:12]}, not {fingerprint[:12]}); "
                             "build it again with this one")  # fmt: skip
        if self.info["spec"] != spec.to_json():
            raise InputError(f"store {self.path} was made with {self.info['spec']}, not with "
                             f"{spec.to_json()}; use the same options")  # fmt: skip

    def check_rows(self, rows: Rows) -> None:
        """Raise unless `rows` are still what the store was built from."""
        if self.info["rows"] != rows.sha:
            raise InputError(f"{rows.path} has changed since store {self.path} was built from it; "
                             "build the store again")  # fmt: skip

    @property
    def hashes(self) -> dict[str, Any]:
        return {key: self.info[key] for key in ("model", "tokenizer", "rows")}


def is_store(path: PathLike) -> bool:
    return (Path(path) / "gradients.npy").exists()


def rows_before(source: Pass | Store, batch: int) -> int:
    """How many rows the batches before number `batch` hold."""
    plan = source.plan.batches if isinstance(source, Pass) else [(c, 0) for c in source.plan]
    return sum(int((chosen >= 0).sum()) for chosen, _ in plan[:batch])


def batches(source: Pass | Store, compute: Any, start: int = 0) -> Iterator[Any]:
    """(batch, compute(Features) on the host) for each batch of a source, from number `start`."""
    return overlapped(source.plan, lambda batch: compute(source.compute(batch)), start)


def check_finite(rows: Rows, rows_B: np.ndarray, values_B: np.ndarray) -> None:
    """Raise for the first row whose value, made of its gradient, is NaN or infinite."""
    bad_B = (rows_B >= 0) & ~np.isfinite(values_B)
    if bad_B.any():
        raise InputError(f"{rows.path} row {rows_B[bad_B.argmax()]} has a gradient that is not "
                         "finite; check the model's weights, or use --dtype float32")  # fmt: skip


def build(run: Run, source: Pass) -> dict[str, Any]:
    """Fill the store in `run`'s folder; continues a killed build. Returns its `info.json`."""
    config, n = source.loaded.config, len(source.rows)
    run.inputs(**source.hashes, devices=jax.device_count())  # they decide the batches' sizes
    width = gradients.width(config, source.spec)
    store = FilledArray(run.path / "gradients.npy", (n, width))
    losses = FilledArray(run.path / "losses.npy", (n,))
    start = min(store.next_batch, losses.next_batch)
    store.next_batch = losses.next_batch = start
    with Progress(n, "attribute build", "row", rows_before(source, start)) as bar:
        for _, out in batches(source, lambda features: features, start):
            check_finite(source.rows, out.rows_B, out.features_BD.sum(1))
            store.write(out.rows_B, out.features_BD)
            losses.write(out.rows_B, out.losses_B)
            bar.update(int((out.rows_B >= 0).sum()))
    store.finish()
    losses.finish()
    info = {
        "format": "taproot-gradients",
        "rows_count": n,
        "width": width,
        "dtype": "float32",
        "spec": source.spec.to_json(),
        "sites": [f._asdict() for f in gradients.features(config, source.spec)],
        "coverage": gradients.coverage(config, source.spec),
        "rows_path": str(source.rows.path),
        **source.hashes,
    }
    write_json(run.path / "info.json", info)
    return info
