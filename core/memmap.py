"""Arrays larger than memory that are filled batch by batch and survive a kill.

The file is an ordinary `.npy`, its disk space is claimed before the first write (so a full disk
is an error at the start, not a crash in the middle), and a small journal says how many batches
are safely in it. Batches come in a fixed order; a resumed run begins at `next_batch`.
"""

import os
import time
from pathlib import Path

import numpy as np

from core.errors import InputError
from core.files import PathLike, read_json, write_json


class FilledArray:
    """[N, ...] on disk; `write` rows of batch after batch, then `finish`."""

    def __init__(self, path: PathLike, shape: tuple[int, ...], dtype: str = "float32"):
        self.path = Path(path)
        self.journal = self.path.with_suffix(".journal.json")
        self.next_batch = 0
        if self.path.exists() and self.journal.exists():
            self.next_batch = read_json(self.journal)["batches"]
            self.array = open_array(self.path, "r+")
            if self.array.shape != shape or self.array.dtype != np.dtype(dtype):
                raise InputError(f"{self.path} is {self.array.shape} {self.array.dtype}, expected "
                                 f"{shape} {dtype}; delete the folder and run again")  # fmt: skip
        else:
            self._claim(shape, np.dtype(dtype))
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
        self.array[rows_B[real_B]] = values[real_B]
        self.next_batch += 1
        if time.monotonic() - self.flushed > 5:
            self.flush()

    def flush(self) -> None:
        self.array.flush()
        self.array = open_array(self.path, "r+")  # lets go of the pages of the old mapping
        write_json(self.journal, {"batches": self.next_batch})
        self.flushed = time.monotonic()

    def finish(self) -> np.ndarray:
        """Flush for good; returns the array, read-only."""
        self.flush()
        del self.array
        return open_array(self.path, "r")


def open_array(path: PathLike, mode: str = "r") -> np.memmap:
    """Memory-map a `.npy` file without reading it."""
    try:
        array = np.lib.format.open_memmap(path, "r")  # refuses a file that was cut short; r+ would
        if mode != "r":  # fill it up with zeros
            array = np.lib.format.open_memmap(path, mode)  # pyright: ignore[reportArgumentType]
        return array
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened as an array ({error})") from error
