"""Gradient features of many rows: computed on the fly, or kept in a store.

Dims: N rows, B rows of a batch, T tokens, D features.

A store is `gradients.npy` [N,D] in row order, or one such file of each process that built it,
`losses.npy` [N], and `info.json` with the layout of D, the files with their checksums and the
hashes of everything the numbers depend on. Building streams: memory is a few batches whatever N
is, and a killed build continues with the batch it was at. In a narrow dtype numbers are clipped to
its range; whoever reads them gets float32.
"""

import copy
import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import gradients, targets
from attribution.normalizer import Adafactor, Adam
from attribution.targets import Spec
from core import distributed
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, atomic, read_json, require_space, sha256_file, write_json
from core.inference import overlapped, placer
from core.memmap import FilledArray, Parts, checksum, open_array
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead
from core.rundir import Run
from core.sharding import local_mesh, over_rows, place, replicated

# How a dtype stands in a .npy file, whose format has no bfloat16.
ON_DISK = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}


class Features(NamedTuple):
    """One batch: rows_B (-1 = padding), features [B,D] on the device, summed losses [B]."""

    rows_B: np.ndarray
    features_BD: jax.Array | np.ndarray
    losses_B: jax.Array | np.ndarray


class Pass:
    """The gradient pass over rows as a source of `Features` batches.

    split: over this process's share of the rows only; their numbers are those in `rows`.
    """

    def __init__(
        self,
        loaded: Loaded,
        rows: Rows,
        spec: Spec,
        execution: Execution,
        batch_tokens: int,
        normalizer: Adam | Adafactor | None = None,
        split: bool = False,
    ):
        self.loaded, self.spec, self.execution = loaded, spec, execution
        self.batch_tokens, self.split = batch_tokens, split
        mesh = local_mesh()
        self.aux = gradients.projections(loaded.config, spec, normalizer)
        self.aux = jax.device_put(self.aux, replicated(mesh))
        self.variables = jax.device_put(loaded.variables, replicated(mesh))
        self._place, self._over_rows = placer(), over_rows(mesh)
        self._take(rows)

    def of(self, rows: Rows) -> "Pass":
        """The same pass over other rows."""
        other = copy.copy(self)
        other._take(rows)
        return other

    def _take(self, rows: Rows) -> None:
        self.rows = rows
        self.share = distributed.share(len(rows)) if self.split else range(len(rows))
        self.plan = Plan(rows.take(self.share), self.batch_tokens, jax.local_device_count())
        self.advantages = advantages(rows)

    def inputs(self, batch: Batch) -> tuple[np.ndarray, tuple[jax.Array, ...]]:
        """(row numbers [B]; ids, labels and perhaps advantages on the devices) of a batch."""
        rows_B = np.where(batch.rows_B < 0, -1, batch.rows_B + self.share.start)
        arguments = self._place(batch)
        if self.advantages is not None:
            arguments += (place(self.advantages[rows_B], self._over_rows),)
        return rows_B, arguments

    def compute(self, batch: Batch) -> Features:
        rows_B, arguments = self.inputs(batch)
        features_BD, losses_B = gradients.example_gradients(
            self.loaded.config, self.execution, self.spec, self.variables, self.aux, *arguments
        )
        return Features(rows_B, features_BD, losses_B)

    @property
    def hashes(self) -> dict[str, Any]:
        found = {
            "model": self.loaded.fingerprint,
            "tokenizer": self.rows.tokenizer,
            "rows": self.rows.sha,
        }
        if self.advantages is not None:
            found["advantages"] = _sha(self.advantages)
        return found


def advantages(rows: Rows) -> np.ndarray | None:
    """The factor of each row's loss, float32 [N], where the rows have a column `advantage`."""
    column = rows.column("advantage")
    if column is None:
        return None
    try:
        values = np.array(column, np.float32)
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise InputError(f"{rows.path}: column 'advantage' is not all finite numbers; fill it in")
    return values


def _sha(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


class Store:
    """A finished store, memory-mapped; also a source of `Features` batches.

    split: of this process's share of the rows only.
    """

    def __init__(self, path: PathLike, split: bool = False):
        self.path = Path(path)
        if not (self.path / "info.json").exists():
            raise InputError(f"{path} is not a finished gradient store; run `attribute build`")
        self.info = read_json(self.path / "info.json")
        ours = isinstance(self.info, dict) and self.info.get("format") == "taproot-gradients"
        if not ours or "shards" not in self.info:
            raise InputError(f"{path} is not a gradient store; make one with `attribute build`")
        files = [(self.path / s["file"], s["sha256"]) for s in self.info["shards"]]
        self.array = Parts([file for file, _ in files])
        self.losses = open_array(self.path / "losses.npy")
        n, width = self.info["rows_count"], self.info["width"]
        fits = self.array.shape == (n, width) and self.losses.shape == (n,)
        if not fits or any(checksum(file) != sha for file, sha in files):
            raise InputError(f"{path}: gradients.npy does not fit info.json; build it again")
        self.rows_path = Path(self.info["rows_path"])
        self.share = distributed.share(n) if split else range(n)
        size = max(1, 2**24 // width)
        starts = range(self.share.start, self.share.stop, size)
        self.plan = [np.arange(start, min(start + size, self.share.stop)) for start in starts]

    @property
    def spec(self) -> Spec:
        return Spec.from_json(self.info["spec"], f"store {self.path}")

    def read(self, rows: slice) -> np.ndarray:
        """Features of a range of rows, in the dtype they are kept in."""
        return self.array[rows].view(jnp.dtype(self.info["dtype"]))

    def compute(self, rows_B: Any) -> Features:
        part = slice(int(rows_B[0]), int(rows_B[-1]) + 1)
        features_BD = self.read(part)
        if self.info["dtype"] != "float32":
            features_BD = _widen(features_BD)
        return Features(rows_B, features_BD, self.losses[part])

    def verify(self) -> None:
        """Read everything; InputError for the first file that is not what was written."""
        with Progress(len(self.array.paths), "checking", "file") as bar:
            for shard in self.info["shards"]:
                if sha256_file(self.path / shard["file"]) != shard["sha256"]:
                    raise InputError(f"{self.path / shard['file']} is damaged: its sha256 is not "
                                     "that of info.json; build the store again")  # fmt: skip
                bar.update()

    def check(self, spec: Spec, fingerprint: str) -> None:
        """Raise unless this store was made with this model and these settings."""
        self.check_model(fingerprint)
        if self.info["spec"] != spec.to_json():
            raise InputError(f"store {self.path} was made with {self.info['spec']}, not with "
                             f"{spec.to_json()}; use the same options")  # fmt: skip

    def check_model(self, fingerprint: str) -> None:
        if self.info["model"] != fingerprint:
            raise InputError(f"store {self.path} was made with another model "
                             f"({self.info['model'][:12]}, not {fingerprint[:12]}); "
                             "build it again with this one")  # fmt: skip

    def check_rows(self, rows: Rows) -> None:
        """Raise unless `rows` are still what the store was built from."""
        factors = advantages(rows)
        mark = None if factors is None else _sha(factors)
        if self.info["rows"] != rows.sha or self.info.get("advantages") != mark:
            raise InputError(f"{rows.path} has changed since store {self.path} was built from it; "
                             "build the store again")  # fmt: skip

    @property
    def hashes(self) -> dict[str, Any]:
        names = ("model", "tokenizer", "rows", "advantages")
        return {key: self.info[key] for key in names if key in self.info}


def is_store(path: PathLike) -> bool:
    return any(Path(path).glob("gradients*.npy"))


_widen = jax.jit(lambda features_BD: features_BD.astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="dtype")
def _narrow(features_BD: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """(features as they stand on disk; the largest absolute feature of each row)."""
    limit = float(jnp.finfo(dtype).max)
    kept_BD = jnp.clip(features_BD, -limit, limit).astype(dtype)
    if ON_DISK[dtype] != dtype:
        kept_BD = jax.lax.bitcast_convert_type(kept_BD, ON_DISK[dtype])
    return kept_BD, jnp.abs(features_BD).max(-1)


def rows_before(source: Pass | Store, batch: int) -> int:
    """How many rows the batches before number `batch` hold."""
    plan = source.plan.batches if isinstance(source, Pass) else [(c, 0) for c in source.plan]
    return sum(int((chosen >= 0).sum()) for chosen, _ in plan[:batch])


def batches(source: Pass | Store, compute: Any, start: int = 0) -> Iterator[Any]:
    """(batch, compute(Features) on the host) for each batch of a source, from number `start`."""
    batches = read_ahead(source.plan, start)
    return overlapped(batches, lambda batch: compute(source.compute(batch)))


def check_finite(rows: Rows, rows_B: np.ndarray, values_B: np.ndarray) -> None:
    """Raise for the first row whose value, made of its gradient, is NaN or infinite."""
    bad_B = (rows_B >= 0) & ~np.isfinite(values_B)
    if bad_B.any():
        raise InputError(f"{rows.path} row {rows_B[bad_B.argmax()]} has a gradient that is not "
                         "finite; check the model's weights, or use --dtype float32")  # fmt: skip


def build(run: Run, source: Pass, dtype: str = "float32") -> dict[str, Any]:
    """Fill the store in `run`'s folder; continues a killed build. Returns its `info.json`.

    dtype: of the numbers on disk, a key of ON_DISK.
    """
    config, n = source.loaded.config, len(source.rows)
    run.inputs(**source.hashes, **distributed.layout())  # they decide the batches' sizes
    width = targets.width(config, source.spec)
    store = FilledArray(run.path / "gradients.npy", (n, width), ON_DISK[dtype])
    losses = FilledArray(run.path / "losses.npy", (n,))
    start = min(store.next_batch, losses.next_batch)
    store.next_batch = losses.next_batch = start

    def compute(out: Features) -> tuple[Any, ...]:
        return out.rows_B, _narrow(out.features_BD, dtype), out.losses_B

    with Progress(len(source.share), "attribute build", "row", rows_before(source, start)) as bar:
        for _, (rows_B, (kept_BD, largest_B), losses_B) in batches(source, compute, start):
            check_finite(source.rows, rows_B, largest_B)
            store.write(rows_B, kept_BD)
            losses.write(rows_B, losses_B)
            bar.update(int((rows_B >= 0).sum()))
    sums, files = store.close(), distributed.parts(store.whole)
    losses.finish()
    info = {
        "format": "taproot-gradients",
        "rows_count": n,
        "width": width,
        "dtype": dtype,
        "shards": [{"file": f.name, "sha256": s} for f, s in zip(files, sums, strict=True)],
        "spec": source.spec.to_json(),
        "sites": [f._asdict() for f in targets.features(config, source.spec)],
        "coverage": targets.coverage(config, source.spec),
        "rows_path": str(source.rows.path),
        **source.hashes,
    }
    if distributed.first():
        write_json(run.path / "info.json", info)
    return info


def export(store: Store, folder: Path) -> dict[str, Any]:
    """Write a store as an index that Bergson's `load_gradients` opens; returns its `info.json`.

    The numbers follow each other row by row, without a header, modules in the order of grad_sizes.
    """
    n, width = store.array.shape
    require_space(folder, n * width * jnp.dtype(store.info["dtype"]).itemsize)
    with atomic(folder / "gradients.bin") as file, Progress(n, "export", "row") as bar:
        for rows_B in store.plan:
            block_BD = store.array[slice(int(rows_B[0]), int(rows_B[-1]) + 1)]
            file.write(block_BD.data)
            bar.update(len(block_BD))
    info = {
        "attribute_tokens": False,
        "num_items": store.info["rows_count"],
        "num_grads": store.info["rows_count"],
        "grad_sizes": {s["name"]: math.prod(s["shape"]) for s in store.info["sites"]},
        "base_dtype": store.info["dtype"],
    }
    write_json(folder / "info.json", info)
    return info
