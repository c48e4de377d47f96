"""Activations of a language model, read from rows: streamed, shuffled for training, or cached.

For training a row always meets the same rows in its batch, so its activations have the same bits
in every epoch and out of a cache. Those batches come in a new order every epoch; about `buffer`
tokens of them, a chunk, are read at once, and the chunk's tokens are served in a random order.

Dims: B rows of a batch, T tokens of a row, M tokens of a chunk, N tokens served, D width of a tap.
"""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from core import taps
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import read_json, require_space, write_json
from core.inference import overlapped
from core.memmap import FilledArray, open_array
from core.model import full_precision
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead
from core.sharding import local_mesh, over_rows, place, replicated
from core.taps import Tap


def counted(ids_BT: np.ndarray, lengths_B: np.ndarray, bos: int | None) -> np.ndarray:
    """bool [B,T]: the tokens that count, which are all but padding and a BOS that begins a row.

    lengths_B: tokens of each row, 0 for a row that is all padding. bos: `ModelConfig.bos`.
    """
    mask_BT = np.arange(ids_BT.shape[1])[None] < lengths_B[:, None]
    if bos is not None:
        mask_BT[:, 0] &= ids_BT[:, 0] != bos
    return mask_BT


def row_counts(rows: Rows, bos: int | None) -> np.ndarray:
    """How many tokens of each row count, int64 [rows]."""
    if bos is None:
        return rows.lengths
    return rows.lengths - np.array([bool(rows.ids(i)[0] == bos) for i in range(len(rows))])


_read = jax.jit(full_precision(taps.read), static_argnums=(0, 1, 4))


class Reader:
    """The model up to the last layer wanted, on all local devices. widths: D of each tap."""

    def __init__(self, loaded: Loaded, execution: Execution, rows: Rows, wanted: tuple[Tap, ...]):
        self.rows, self.wanted, self.model = rows, wanted, loaded.fingerprint
        self.widths = tuple(taps.width(loaded.config, tap) for tap in wanted)
        self.bos, self.execution = loaded.config.bos, execution
        mesh, layers = local_mesh(), max(1, *(tap.layer + 1 for tap in wanted))
        self.config, variables = taps.first(loaded.config, loaded.variables, layers)
        self.variables = jax.device_put(variables, replicated(mesh))
        self.over_rows = over_rows(mesh)

    def compute(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The taps [B,T,D] of a batch, on the devices and in the compute dtype."""
        ids_BT = place(batch.ids_BT, self.over_rows)
        return _read(self.config, self.execution, self.variables, ids_BT, self.wanted)

    def mask(self, batch: Batch) -> np.ndarray:
        """Which tokens [B,T] of a batch of `rows` count."""
        lengths_B = np.where(batch.rows_B < 0, 0, self.rows.lengths[batch.rows_B])
        return counted(batch.ids_BT, lengths_B, self.bos)

    def stream(
        self, batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, tuple[np.ndarray, ...], np.ndarray]]:
        """Each batch, its taps [B,T,D] on the host, and which of its tokens [B,T] count."""
        for batch, found in overlapped(batches, self.compute):
            yield batch, found, self.mask(batch)

    @functools.cached_property
    def counts(self) -> np.ndarray:
        return row_counts(self.rows, self.bos)


class Batches:
    """All rows in batches fixed by the rows: of one length bucket, in random order within it."""

    def __init__(self, reader: Reader, batch_tokens: int):
        rows, per_row = reader.rows, reader.counts
        self.order = np.random.default_rng(0).permutation(len(rows))
        self.plan = Plan(rows.take(self.order), batch_tokens, jax.local_device_count())
        self.batch_tokens = batch_tokens
        self.per_row, self.ends = per_row, np.cumsum(per_row)
        self.counts = np.array([per_row[self.rows(k)].sum() for k in range(len(self.plan))])
        self.tokens = int(self.ends[-1])

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> Batch:
        batch = self.plan[k]
        return batch._replace(rows_B=np.where(batch.rows_B < 0, -1, self.order[batch.rows_B]))

    def rows(self, k: int) -> np.ndarray:
        """Which rows are in batch k, in their order there."""
        chosen_B = self.plan.batches[k][0]
        return self.order[chosen_B[chosen_B >= 0]]

    def places(self, k: int) -> np.ndarray:
        """Where the counted tokens of batch k stand among those of all rows in order."""
        chosen = self.rows(k)
        ends, counts = self.ends[chosen].tolist(), self.per_row[chosen].tolist()
        return np.concatenate([np.arange(e - n, e) for e, n in zip(ends, counts, strict=True)])


class Cache:
    """The counted tokens of all rows on disk: for each tap `TAP.npy`, [tokens, D] in row order.

    It holds them in the dtype the model computed in, bit for bit (bfloat16, which the file format
    has no name for, as uint16), and says in `info.json` what they are of; those of anything else
    raise InputError. Filling it goes on where it was killed.
    """

    def __init__(self, folder: Path, reader: Reader, batches: Batches):
        self.folder, self.reader, self.batches = folder, reader, batches
        self.dtype = reader.execution.compute_dtype
        self.paths = [folder / f"{tap}.npy" for tap in reader.wanted]

    def fill(self) -> None:
        """Make what is missing; InputError if it is another's folder, or the disk is full."""
        self._claim()
        stored = "float32" if self.dtype == np.float32 else "uint16"
        arrays = [
            FilledArray(path, (self.batches.tokens, d), stored)
            for path, d in zip(self.paths, self.reader.widths, strict=True)
        ]
        start = min(array.next_batch for array in arrays)
        for array in arrays:
            array.next_batch = start
        done = int(self.batches.counts[:start].sum())
        label = f"activations {self.folder.name}"
        with Progress(self.batches.tokens, label, "token", done) as bar:
            found = self.reader.stream(read_ahead(self.batches, start))
            for k, (_, values, mask_BT) in enumerate(found, start):
                for array, value_BTD in zip(arrays, values, strict=True):
                    array.write(self.batches.places(k), value_BTD[mask_BT].view(stored))
                bar.update(int(self.batches.counts[k]))
        for array in arrays:
            array.close()

    def _claim(self) -> None:
        reader, mark = self.reader, self.folder / "info.json"
        info = {
            "format": "taproot-activations",
            "model": reader.model,
            "rows": reader.rows.sha,
            "sites": [str(tap) for tap in reader.wanted],
            "dtype": str(self.dtype),
            "layers": reader.execution.layers,  # this and the next two may change the last bit
            "batch_tokens": self.batches.batch_tokens,
            "devices": jax.local_device_count(),
        }
        if mark.exists():
            old = read_json(mark)
            for key, value in info.items():
                if (held := old.get(key)) != value:
                    raise InputError(f"{self.folder} holds activations of {key} {held!r}, now it "
                                     f"is {value!r}; give another --cache, or delete what is there"
                                     )  # fmt: skip
            return
        if self.folder.exists() and any(f.suffix != ".tmp" for f in self.folder.iterdir()):
            raise InputError(f"{self.folder} is no cache of activations; give another --cache")
        self.folder.mkdir(parents=True, exist_ok=True)
        size = self.batches.tokens * sum(reader.widths) * self.dtype.itemsize
        require_space(self.folder, size)
        write_json(mark, info)

    def read(self, k: int) -> tuple[np.ndarray, ...]:
        """The counted tokens [n,D] of batch k, per tap."""
        places = self.batches.places(k)
        # A mapping kept would keep every page that was read.
        return tuple(open_array(path)[places].view(self.dtype) for path in self.paths)


class Shuffle:
    """Counted tokens in a random order, as batches for training.

    Which tokens batch s holds is a function of (rows, batch_tokens, seed, buffer, size, s): every
    token once an epoch, epochs end to end. A token with a value that is not finite is left out, and
    another one of its chunk served twice; `skipped` counts them.
    """

    def __init__(
        self,
        reader: Reader,
        batch_tokens: int,
        buffer: int,
        seed: int,
        cache: Path | None = None,
    ):
        self.reader, self.buffer, self.seed = reader, buffer, seed
        self.source = Batches(reader, batch_tokens)
        self.cache = Cache(cache, reader, self.source) if cache else None
        if self.cache is not None:
            self.cache.fill()
        self.tokens, self.skipped = self.source.tokens, 0

    def batches(self, size: int, start: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
        """Batch number `start` and all after it, endlessly: the taps [N,D] of N = `size` tokens."""
        epoch, skip = divmod(start * size, self.tokens)
        rest = self._empty(0)
        while True:
            for c, numbers in enumerate(self._chunks(epoch)):
                if skip >= (held := int(self.source.counts[numbers].sum())):
                    skip -= held
                    continue
                taps_MD, order_M, bad = self._chunk(numbers, [self.seed, epoch, c])
                if not skip:  # else they were counted before the run was stopped
                    self.skipped += bad
                order_M, skip = order_M[skip:], 0
                *full, left = np.split(order_M, range(size - len(rest[0]), len(order_M) + 1, size))
                for part_N in full:
                    yield _joined(rest, taps_MD, part_N)
                    rest = self._empty(0)
                rest = _joined(rest, taps_MD, left)
                del taps_MD  # the next chunk needs its memory
            epoch += 1

    def _chunks(self, epoch: int) -> list[np.ndarray]:
        """Numbers of the batches that are read together, of each chunk of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
        counts = self.source.counts[order]
        chunk = (np.cumsum(counts) - counts) // self.buffer
        return np.split(order, np.flatnonzero(np.diff(chunk)) + 1)

    def _chunk(
        self, numbers: np.ndarray, seed: list[int]
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray, int]:
        """The taps [M,D] of some batches, the order [M] to serve them in, and how many are bad."""
        taps_MD = self._empty(int(self.source.counts[numbers].sum()))
        finite_M = np.empty(len(taps_MD[0]), bool)
        at = 0
        for values in self._read(numbers):
            here = slice(at, at := at + len(values[0]))
            for tap_MD, value_ND in zip(taps_MD, values, strict=True):
                tap_MD[here] = value_ND
            finite_M[here] = np.all([np.isfinite(value_ND).all(1) for value_ND in values], 0)
        order_M = np.random.default_rng(seed).permutation(len(finite_M))
        good = order_M[finite_M[order_M]]
        if not len(good):
            names = ", ".join(map(str, self.reader.wanted))
            raise InputError(f"none of {len(order_M)} tokens of {self.reader.rows.path} has finite "
                             f"activations at {names}; compute in float32, or look at the model"
                             )  # fmt: skip
        return taps_MD, np.resize(good, len(order_M)), len(order_M) - len(good)

    def _read(self, numbers: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
        if self.cache is not None:
            yield from map(self.cache.read, numbers)
            return
        for _, values, mask_BT in self.reader.stream(self.source[k] for k in numbers):
            yield tuple(value_BTD[mask_BT] for value_BTD in values)

    def _empty(self, tokens: int) -> tuple[np.ndarray, ...]:
        dtype = self.reader.execution.compute_dtype
        return tuple(np.empty((tokens, d), dtype) for d in self.reader.widths)


def _joined(
    rest: tuple[np.ndarray, ...], taps_MD: tuple[np.ndarray, ...], part_N: np.ndarray
) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate([r, x.take(part_N, 0)]) for r, x in zip(rest, taps_MD, strict=True))
