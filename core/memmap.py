"""Arrays larger than memory that are filled batch by batch and survive a kill.

The file is an ordinary `.npy`, its disk space is claimed before the first write (so a full disk
is an error at the start, not a crash in the middle), and a small journal says how many batches
are safely in it, at the end with a checksum. Batches come in a fixed order; a resumed run begins
at `next_batch`. Of several processes (`core.distributed`) each fills a file of its own.
"""

import os
import time
from pathlib import Path

import numpy as np

from core import distributed
from core.errors import InputError
from core.files import PathLike, atomic, read_json, sha256_file, write_json


class FilledArray:
    """[N, ...] on disk; `write` rows of batch after batch, then `finish`.

    path, shape, and row numbers are of the whole array, also where a process fills only its share.
    """

    def __init__(self, path: PathLike, shape: tuple[int, ...], dtype: str = "float32"):
        self.whole, self.shape = Path(path), shape
        self.share = distributed.share(shape[0])
        self.path = distributed.part(self.whole)
        self.journal = journal_of(self.path)
        self.next_batch, self.sha256 = 0, None
        held = self.path if self.path.exists() else self.whole  # the parts have been joined
        if held.exists() and self.journal.exists():
            journal = read_json(self.journal)
            self.next_batch, self.sha256 = journal["batches"], journal.get("sha256")
            self.array = open_array(held, "r+")
            expected = shape if held == self.whole else (len(self.share), *shape[1:])
            if self.array.shape != expected or self.array.dtype != np.dtype(dtype):
                raise InputError(f"{held} is {self.array.shape} {self.array.dtype}, expected "
                                 f"{expected} {dtype}; delete the folder and run again"
                                 )  # fmt: skip
        else:
            self._claim((len(self.share), *shape[1:]), np.dtype(dtype))
        self.flushed = time.monotonic()

    def _claim(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        temporary = self.path.with_suffix(".tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.journal.unlink(missing_ok=True)  # it may speak of an array that was deleted
            array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            offset = array.offset
            array.flush()
            del array
            with open(temporary, "r+b") as file:
                size = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            write_json(self.journal, {"batches": 0})
        except OSError as error:
            temporary.unlink(missing_ok=True)
            need = dtype.itemsize * int(np.prod(shape, dtype=np.int64)) / 1e9
            raise InputError(f"{self.path} cannot be made ({error.strerror}); it needs {need:.3g} "
                             "GB of free disk") from error  # fmt: skip
        self.array = open_array(self.path, "r+")

    def write(self, rows_B: np.ndarray, values: np.ndarray) -> None:
        """Store the values of one batch; a row number of -1 is padding and skipped."""
        real_B = rows_B >= 0
        if self.sha256 is None:  # else it is closed, and these are the same values once more
            self.array[rows_B[real_B] - self.share.start] = values[real_B]
        self.next_batch += 1
        if time.monotonic() - self.flushed > 5:
            self.flush()

    def flush(self) -> None:
        if self.sha256 is None:
            self.array.flush()
            self.array = open_array(self.path, "r+")  # lets go of the pages of the old mapping
            write_json(self.journal, {"batches": self.next_batch})
        self.flushed = time.monotonic()

    def close(self) -> list[str]:
        """End the writing; returns the checksums of all processes' parts, when all are closed."""
        if self.sha256 is None:
            self.array.flush()
            self.sha256 = sha256_file(self.path)
            write_json(self.journal, {"batches": self.next_batch, "sha256": self.sha256})
        del self.array
        return [distributed.wait(lambda p=p: checksum(p)) for p in distributed.parts(self.whole)]

    def finish(self) -> np.memmap:
        """Close, join all processes' parts in one file, and return the whole array, read-only."""
        self.close()
        if self.path != self.whole and distributed.first():
            parts = distributed.parts(self.whole)
            if not self.whole.exists():
                self._join([open_array(part) for part in parts])
            for part in parts:
                part.unlink(missing_ok=True)
        distributed.wait(self.whole.exists)
        return open_array(self.whole)

    def _join(self, arrays: list[np.memmap]) -> None:
        header = {**np.lib.format.header_data_from_array_1_0(arrays[0]), "shape": self.shape}
        with atomic(self.whole) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for array in arrays:
                file.write(array.data)


def journal_of(path: Path) -> Path:
    return path.with_suffix(".journal.json")


def checksum(path: Path) -> str | None:
    """sha256 of a finished array, from its journal; None before."""
    journal = journal_of(path)
    return read_json(journal).get("sha256") if journal.exists() else None


class Parts:
    """Arrays [n, ...] of several files, read as one [N, ...] by ranges of rows."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        shapes = [open_array(path).shape for path in paths]
        self.ends = np.cumsum([shape[0] for shape in shapes])
        self.shape = (int(self.ends[-1]), *shapes[0][1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        """The rows of a slice without step, from one file or, where it ends, from several."""
        start, stop, _ = rows.indices(self.shape[0])
        found = []
        # A mapping kept would keep every page that was read.
        for i in range(np.searchsorted(self.ends, start, "right"), len(self.paths)):
            before = int(self.ends[i - 1]) if i else 0
            if stop <= before:
                break
            found.append(open_array(self.paths[i])[max(start - before, 0) : stop - before])
        return found[0] if len(found) == 1 else np.concatenate(found)


def open_array(path: PathLike, mode: str = "r") -> np.memmap:
    """Memory-map a `.npy` file without reading it."""
    try:
        array = np.lib.format.open_memmap(path, "r")  # refuses a file that was cut short; r+ would
        if mode != "r":  # fill it up with zeros
            array = np.lib.format.open_memmap(path, mode)  # pyright: ignore[reportArgumentType]
        return array
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give an array that numpy saved (.npy)") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened as an array ({error}); it must be a whole .npy "
                         "file") from error  # fmt: skip
