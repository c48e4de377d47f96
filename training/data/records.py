"""Files of records, one after the other and few at a time: JSON lines and parquet.

A record is a JSON object; `source` and `doc` (or `id`) in it say where it is from.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import InputError

JSONL = (".jsonl", ".json")  # both: one object a line
PARQUET = ".parquet"
BATCH = 1024  # records of a parquet file held at once


class Record(NamedTuple):
    """An object ({} for what is none), its place in the file for people and as a number, and the
    bytes of the file read so far."""

    value: dict[str, Any]
    where: str
    number: int
    end: int


def check_files(paths: Sequence[Path], suffixes: Sequence[str]) -> None:
    """Raise InputError unless each path is a file with something in it and a known suffix."""
    if not paths:
        raise InputError("no files to tokenise; name at least one")
    for path in paths:
        if path.suffix not in suffixes:
            raise InputError(f"{path} has none of the suffixes {', '.join(suffixes)}")
        if not path.is_file():
            raise InputError(f"{path} does not exist or is no file")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")


def read_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number, line with its newline, offset of its end in bytes) of a UTF-8 file."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} is not UTF-8: byte {offset + error.start} (line {number}) is "
                    f"0x{line[error.start]:02x}; convert the file to UTF-8"
                ) from None
            offset += len(line)
            yield number, text, offset


def read_records(path: Path, names: Sequence[str]) -> Iterator[Record]:
    """The records of a file; names: the columns of a parquet file that are needed, if there."""
    return _read_parquet(path, names) if path.suffix == PARQUET else _read_jsonl(path)


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line, end in read_lines(path):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} line {number} is not JSON ({error}); write one object a line"
            ) from None
        yield _record(value, f"line {number}", number, end)


def _read_parquet(path: Path, names: Sequence[str]) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in names if name in file.schema_arrow.names]
            rows, size, number = file.metadata.num_rows, path.stat().st_size, 0
            for batch in file.iter_batches(BATCH, columns=names):
                for value in batch.to_pylist():
                    end = size * (number + 1) // rows
                    yield _record(value, f"row {number}", number, end)
                    number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error


def _record(value: Any, where: str, number: int, end: int) -> Record:
    return Record(value if isinstance(value, dict) else {}, where, number, end)


ORIGIN = ("source", "doc", "id")


def origin(path: Path, record: Record) -> tuple[str, str]:
    """The record's source, by default the file's name without suffix, and its doc."""
    source, doc, other = (record.value.get(name) for name in ORIGIN)
    names = (doc, other, f"{path}:{record.number}")
    found = next(name for name in names if name is not None)
    return path.stem if source is None else str(source), str(found)


KINDS = (bool, int, float, str)  # of values that a column can keep
MADE = ("input_ids", "labels", "source", "doc", "documents")  # columns that rows have anyway


class Kept:
    """Columns of records that their rows keep: texts, numbers or truth values, or none.

    What a column holds is what its first value is; another kind later is an InputError, as is a
    column that no record has.
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str]):
        self.kinds: dict[str, type] = {}
        for name in names:
            if name in MADE:
                raise InputError(f"--keep {name}: rows have a column of that name; leave it out")
            self.kinds[name] = self._first(paths, name)

    def _first(self, paths: Sequence[Path], name: str) -> type:
        for path in paths:
            for record in read_records(path, [name]) if path.suffix in (*JSONL, PARQUET) else ():
                if (value := record.value.get(name)) is not None:
                    if type(value) not in KINDS:
                        raise InputError(f"--keep {name}: {path} {record.where} holds a "
                                         f"{type(value).__name__}; texts and numbers can be kept"
                                         )  # fmt: skip
                    return type(value)
        raise InputError(f"--keep {name}: no record of {paths[0]} has it; name another column")

    @property
    def types(self) -> dict[str, str]:
        """As pyarrow names them."""
        arrow = {bool: "bool", int: "int64", float: "float64", str: "string"}
        return {name: arrow[kind] for name, kind in self.kinds.items()}

    def of(self, path: Path, record: Record) -> dict[str, Any]:
        """What a record has in the columns, None where it has nothing."""
        found = {}
        for name, kind in self.kinds.items():
            value = record.value.get(name)
            if type(value) is int and kind is float:
                value = float(value)
            if value is not None and type(value) is not kind:
                raise InputError(f"--keep {name}: {path} {record.where} holds a "
                                 f"{type(value).__name__}, those before it {kind.__name__}; "
                                 "write them all alike")  # fmt: skip
            found[name] = value
        return found
