"""Rows on disk and the batches made from them.

A rows folder is a Hugging Face dataset saved to disk with `input_ids` and `labels` (label-aligned:
labels[t] is what position t should turn out to be, -100 = unsupervised) and optional provenance
columns; tools that pre-tokenise this way read and write the same folders. Beside it stands
`rows.json` with the tokenizer's fingerprint and a checksum. Columns stay memory-mapped.
"""

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike, atomic_folder, read_json, write_json

IGNORED = -100
SIDECAR = "rows.json"
LISTS = ("input_ids", "labels")
HELD_TOKENS = 2**22  # that `write_rows` gathers before it writes them


class Ragged:
    """A list column as memory-mapped pieces: values and row offsets of each Arrow chunk."""

    def __init__(self, column: Any, name: str, where: PathLike):
        import pyarrow as pa

        self.pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for chunk in column.chunks:
            is_list = pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type)
            if not is_list or not pa.types.is_integer(chunk.type.value_type):
                raise InputError(
                    f"{where}: column {name!r} is {chunk.type}; it must be a list of integers"
                )
            if chunk.null_count or chunk.values.null_count:
                raise InputError(f"{where}: column {name!r} has missing values; fill them in")
            self.pieces.append((chunk.values.to_numpy(), chunk.offsets.to_numpy()))
        counts = [len(offsets) - 1 for _, offsets in self.pieces]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        parts = [np.diff(offsets) for _, offsets in self.pieces]
        self.lengths = np.concatenate(parts or [np.zeros(0)]).astype(np.int64)

    def __getitem__(self, i: int) -> np.ndarray:
        piece = int(np.searchsorted(self.starts, i, side="right")) - 1
        values, offsets = self.pieces[piece]
        j = i - self.starts[piece]
        return values[offsets[j] : offsets[j + 1]]


class Rows:
    """Validated rows; index with `ids(i)` and `labels(i)`, int32 [T]."""

    def __init__(
        self, path: Path, table: Any, ids: Ragged, labels: Ragged, index: np.ndarray, info: dict
    ):
        self.path, self.info, self.index = path, info, index
        self._table, self._ids, self._labels = table, ids, labels
        self.lengths = ids.lengths[index]

    def __len__(self) -> int:
        return len(self.index)

    def ids(self, i: int) -> np.ndarray:
        return self._ids[int(self.index[i])].astype(np.int32)

    def labels(self, i: int) -> np.ndarray:
        return self._labels[int(self.index[i])].astype(np.int32)

    @functools.cached_property
    def trained(self) -> np.ndarray:
        """Supervised tokens of each row, int64 [N]; the first token is never one."""
        counts = [_supervised(values, offsets) for values, offsets in self._labels.pieces]
        return np.concatenate(counts)[self.index]

    @property
    def columns(self) -> list[str]:
        return [n for n in self._table.column_names if n not in LISTS]

    def column(self, name: str) -> list[Any] | None:
        """A provenance column as a list, or None when the rows have no such column."""
        if name not in self._table.column_names:
            return None
        return self._table.column(name).take(self.index).to_pylist()

    @property
    def tokenizer(self) -> str | None:
        """Fingerprint of the tokenizer that made the ids, when it was recorded."""
        return self.info.get("tokenizer")

    @functools.cached_property
    def sha(self) -> str:
        """sha256 over every row's ids and labels, in order."""
        digest = hashlib.sha256()
        for i in range(len(self)):
            ids = self.ids(i)
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
            digest.update(self.labels(i).tobytes())
        return digest.hexdigest()

    def take(self, indices: Sequence[int] | np.ndarray) -> "Rows":
        chosen = self.index[np.asarray(indices, np.int64)]
        return Rows(self.path, self._table, self._ids, self._labels, chosen, self.info)


def _supervised(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Count of labels[1:] != -100 of every row of one piece."""
    total = np.concatenate([[0], np.cumsum(values != IGNORED)])
    firsts = np.minimum(offsets[:-1] + 1, offsets[1:])  # an empty row counts nothing
    return (total[offsets[1:]] - total[firsts]).astype(np.int64)


def load_rows(
    path: PathLike,
    vocab_size: int | None = None,
    context: int | None = None,
    tokenizer: str | None = None,
) -> Rows:
    """Open a rows folder and check every row; InputError names the first bad one.

    vocab_size, context, tokenizer (its fingerprint): of the model the rows are for; ids and
    lengths must fit, and a recorded tokenizer must be this one.
    """
    import datasets

    path = Path(path)
    if not path.exists():
        raise InputError(f"rows folder {path} does not exist")
    if not (path / "dataset_info.json").exists():
        raise InputError(
            f"{path} is not a rows folder (no dataset_info.json); make one with `data text` or "
            "`data query`, or save a Hugging Face dataset with input_ids and labels to disk"
        )
    try:
        dataset = datasets.Dataset.load_from_disk(str(path))
        table: Any = dataset.with_format("arrow")[:]
    except Exception as error:  # the library raises many kinds for a damaged folder
        raise InputError(f"rows folder {path} cannot be read ({error}); make it again") from error
    for name in LISTS:
        if name not in table.column_names:
            remedy = "add labels = input_ids to train on every token" if name == "labels" else ""
            found = ", ".join(table.column_names)
            raise InputError(f"{path} has no column {name!r} (found: {found}) {remedy}".strip())
    if table.num_rows == 0:
        raise InputError(f"{path} has no rows")
    ids = Ragged(table.column("input_ids"), "input_ids", path)
    labels = Ragged(table.column("labels"), "labels", path)
    info = read_json(path / SIDECAR) if (path / SIDECAR).exists() else {}
    rows = Rows(path, table, ids, labels, np.arange(table.num_rows), info)
    if tokenizer and rows.tokenizer and rows.tokenizer != tokenizer:
        raise InputError(f"{path} was made with another tokenizer ({rows.tokenizer[:12]}) than the "
                         f"model's ({tokenizer[:12]}); tokenise it again")  # fmt: skip
    _check(rows, ids, labels, vocab_size, context)
    return rows


def _check(
    rows: Rows, ids: Ragged, labels: Ragged, vocab_size: int | None, context: int | None
) -> None:
    def fail(bad: np.ndarray, what: str, remedy: str) -> None:
        if bad.any():
            first = int(np.argmax(bad))
            raise InputError(f"{rows.path} row {first} {what.format(first)}; {remedy}")

    fail(ids.lengths == 0, "is empty", "drop empty rows")
    fail(ids.lengths != labels.lengths, "has labels of another length than input_ids",
         "make them equal, with -100 where a token is not supervised")  # fmt: skip
    fail(rows.trained == 0, "has no supervised label after its first token (all are -100)",
         "drop it or supervise a token")  # fmt: skip
    if context is not None and (ids.lengths > context).any():
        first = int(np.argmax(ids.lengths > context))
        raise InputError(
            f"{rows.path} row {first} has {ids.lengths[first]} tokens, more than the model's "
            f"context of {context}; make the rows again with --length {context} or less"
        )
    top = np.inf if vocab_size is None else vocab_size
    for column, name, low in ((ids, "input_ids", 0), (labels, "labels", IGNORED)):
        for start, (values, offsets) in zip(column.starts[:-1], column.pieces, strict=True):
            used = values[offsets[0] : offsets[-1]]
            if not len(used) or (used.min() >= max(low, 0) and used.max() < top):
                continue
            bad = (used < low) | (used >= top) | ((used < 0) & (used != low))
            if not bad.any():
                continue
            at = int(np.argmax(bad)) + offsets[0]
            row = int(start + np.searchsorted(offsets, at, side="right") - 1)
            size = f"outside the model's vocabulary of {vocab_size}" if vocab_size else "negative"
            raise InputError(
                f"{rows.path} row {row}: {name} holds token id {values[at]}, {size}; "
                "tokenise with the model's own tokenizer"
            )


class Row(NamedTuple):
    """Ids and labels [T] of one row, and its provenance."""

    ids: np.ndarray
    labels: np.ndarray
    columns: Mapping[str, Any]


def save_rows(
    path: PathLike,
    input_ids: Sequence[np.ndarray],
    labels: Sequence[np.ndarray] | None = None,
    columns: dict[str, list[Any]] | None = None,
    tokenizer: str | None = None,
    info: dict[str, Any] | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a rows folder atomically; returns its `rows.json`.

    labels None = every token supervised. info: more keys of `rows.json`. extra: further JSON
    files by name.
    """
    import pyarrow as pa

    labels, columns = input_ids if labels is None else labels, columns or {}
    if len(labels) != len(input_ids):
        raise InputError(f"{path}: labels and input_ids differ in length; label every token")
    types = {name: pa.array(values).type for name, values in columns.items()}
    rows = (
        Row(ids, labels[i], {name: values[i] for name, values in columns.items()})
        for i, ids in enumerate(input_ids)
    )
    return write_rows(path, rows, types, tokenizer, lambda: info or {}, extra)


def write_rows(
    path: PathLike,
    rows: Iterable[Row],
    types: Mapping[str, Any],
    tokenizer: str | None = None,
    info: Callable[[], dict[str, Any]] = dict,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`save_rows` for rows that come one by one; holds few of them in memory.

    types: of the columns, as pyarrow names them. info is called when all rows have come.
    """
    import datasets
    import pyarrow as pa

    with atomic_folder(path) as folder:
        spilled = folder / "spilled.arrow"
        _spill(path, spilled, rows, types)
        with pa.memory_map(str(spilled)) as file:
            table = pa.ipc.open_stream(file).read_all()
            columns = {name: Ragged(table.column(name), name, path) for name in LISTS}
            sidecar = {
                "format": "rows",
                "rows": table.num_rows,
                "tokens": int(columns["input_ids"].lengths.sum()),
                "tokenizer": tokenizer,
                "sha256": _checksum(columns.values()),
                **info(),
            }
            bars = datasets.is_progress_bar_enabled()
            datasets.disable_progress_bars()
            try:
                dataset = datasets.Dataset(table, fingerprint=sidecar["sha256"][:16])
                dataset.save_to_disk(str(folder))
            finally:
                if bars:
                    datasets.enable_progress_bars()
        spilled.unlink()
        for name, content in {SIDECAR: sidecar, **(extra or {})}.items():
            write_json(folder / name, content)
    return sidecar


def _spill(path: PathLike, file: Path, rows: Iterable[Row], types: Mapping[str, Any]) -> None:
    """Write the rows into an Arrow stream, many at a time."""
    import pyarrow as pa

    tokens = pa.list_(pa.int32())
    schema = pa.schema({**dict.fromkeys(LISTS, tokens), **types})

    def ragged(values: list[np.ndarray]) -> pa.Array:
        offsets = np.concatenate([[0], np.cumsum([len(v) for v in values])])
        flat = np.concatenate([np.asarray(v, np.int32) for v in values])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat))

    def batch(part: list[Row]) -> pa.RecordBatch:
        arrays = [ragged([row.ids for row in part]), ragged([row.labels for row in part])]
        arrays += [pa.array([r.columns[name] for r in part], kind) for name, kind in types.items()]
        return pa.record_batch(arrays, schema)

    part: list[Row] = []
    held, some = 0, False
    with pa.ipc.new_stream(str(file), schema) as stream:
        for row in rows:
            if len(row.ids) != len(row.labels):
                raise InputError(
                    f"{path}: labels and input_ids differ in length; label every token"
                )
            some = True
            part.append(row)
            held += len(row.ids) + 64  # what a row without tokens costs, roughly
            if held > HELD_TOKENS:
                stream.write_batch(batch(part))
                part, held = [], 0
        if part:
            stream.write_batch(batch(part))
    if not some:
        raise InputError(f"{path}: there are no rows to write; the input is empty")


def _checksum(columns: Iterable[Ragged]) -> str:
    """sha256 over the offsets and the values of each column."""
    digest = hashlib.sha256()
    for column in columns:
        offsets = np.concatenate([[0], np.cumsum(column.lengths)])
        wide = offsets[-1] > np.iinfo(np.int32).max
        digest.update(offsets.astype(np.int64 if wide else np.int32).tobytes())
        for values, ends in column.pieces:
            digest.update(values[ends[0] : ends[-1]].data)
    return digest.hexdigest()


def same_tokenizer(first: Rows, second: Rows) -> None:
    """Raise when both record a tokenizer and the two differ."""
    if first.tokenizer and second.tokenizer and first.tokenizer != second.tokenizer:
        raise InputError(
            f"{first.path} and {second.path} were made with different tokenizers "
            f"({first.tokenizer[:12]} and {second.tokenizer[:12]}); tokenise both with one"
        )


class Batch(NamedTuple):
    """Rows padded to one length. B rows, T tokens; `rows_B` is -1 for padding rows."""

    ids_BT: np.ndarray
    labels_BT: np.ndarray
    rows_B: np.ndarray

    @property
    def trained(self) -> int:
        return int((self.labels_BT[:, 1:] != IGNORED).sum())


def pad_batch(rows: Rows, chosen: np.ndarray, length: int) -> Batch:
    """Rows `chosen` [B] (-1 = an empty row) padded on the right with id 0 and label -100."""
    ids_BT = np.zeros((len(chosen), length), np.int32)
    labels_BT = np.full((len(chosen), length), IGNORED, np.int32)
    for place, i in enumerate(chosen):
        if i >= 0:
            ids, labels = rows.ids(i), rows.labels(i)
            ids_BT[place, : len(ids)] = ids
            labels_BT[place, : len(labels)] = labels
    return Batch(ids_BT, labels_BT, chosen.astype(np.int64))


def bucket(length: int, longest: int) -> int:
    """The padded length: the next of 16, 24, 32, 48, 64, 96, ... or the longest row itself."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


class Plan:
    """Which rows form which batch: sorted by length, one shape per bucket, fixed by the rows."""

    def __init__(self, rows: Rows, batch_tokens: int, multiple: int = 1):
        self.rows = rows
        longest = int(rows.lengths.max())
        buckets = np.array([bucket(int(n), longest) for n in range(longest + 1)])[rows.lengths]
        self.batches: list[tuple[np.ndarray, int]] = []
        for length in sorted(set(buckets.tolist()), reverse=True):
            members = np.flatnonzero(buckets == length)
            size = min(max(batch_tokens // length, 1), len(members))
            size = -(-size // multiple) * multiple
            for start in range(0, len(members), size):
                chosen = np.full(size, -1, np.int64)
                part = members[start : start + size]
                chosen[: len(part)] = part
                self.batches.append((chosen, length))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Batch:
        chosen, length = self.batches[k]
        return pad_batch(self.rows, chosen, length)


def read_ahead(source: Any, start: int = 0) -> Iterator[Any]:
    """Iterate a random-access source from `start`, loading ahead in grain's threads."""
    import grain

    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    if start >= len(source):
        return iter(())
    return iter(grain.MapDataset.source(source)[start:].to_iter_dataset(options))


class TrainingBatches:
    """Batches [batch, T] of training as a random-access source; every epoch is shuffled anew.

    Batch number s is a function of (rows, batch, seed, shuffle, s) alone, so a run resumes anywhere
    and may be walked backwards. drawn: rows in all, after which empty ones fill the last batch;
    None: endless. Without `shuffle` an epoch has the rows' own order.
    """

    def __init__(
        self, rows: Rows, batch: int, seed: int, shuffle: bool = True, drawn: int | None = None
    ):
        import grain

        self.rows, self.size = rows, batch
        self.longest = int(rows.lengths.max())
        order = grain.MapDataset.range(len(rows))
        order = order.seed(seed).shuffle() if shuffle else order
        # Endless to any purpose; grain's own endless repeat overflows at a batch of one.
        self.order: Any = order.repeat(2**62 // len(rows))
        self.end = len(self.order) if drawn is None else drawn

    def __len__(self) -> int:
        return (self.end + self.size - 1) // self.size

    def __getitem__(self, s: int) -> Batch:
        places = range(s * self.size, (s + 1) * self.size)
        chosen = np.array([self.order[i] if i < self.end else -1 for i in places], np.int64)
        length = bucket(int(self.rows.lengths[chosen[chosen >= 0]].max()), self.longest)
        return pad_batch(self.rows, chosen, length)


def training_batches(rows: Rows, batch: int, seed: int, start: int = 0) -> Iterator[Batch]:
    """Endless shuffled batches from number `start`, see `TrainingBatches`."""
    return read_ahead(TrainingBatches(rows, batch, seed), start)
