"""Files that are whole or absent.

Every write goes to a temporary name in the same folder, is flushed to disk and renamed, so a kill
or a full disk leaves the old file or none. Nothing is ever unpickled.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from core.errors import InputError

PathLike = str | os.PathLike[str]


@contextlib.contextmanager
def atomic(path: PathLike) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends without an error."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an error.

    An existing `path` is replaced only then; callers decide beforehand whether it may be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def require_space(folder: PathLike, size: int) -> None:
    """Raise InputError unless the disk of an existing folder has `size` bytes and some to spare."""
    free, need = shutil.disk_usage(folder).free, size + 2**24
    if free < need:
        raise InputError(f"{folder} needs {need / 1e9:.3g} GB and its disk has {free / 1e9:.3g} "
                         "free; free some and run the same command again")  # fmt: skip


def write_bytes(path: PathLike, data: bytes) -> None:
    with atomic(path) as file:
        file.write(data)


def write_text(path: PathLike, text: str) -> None:
    """Write UTF-8; half of a surrogate pair, which has no encoding, becomes a question mark."""
    write_bytes(path, text.encode("utf-8", "replace"))


def jsonable(value: Any) -> Any:
    """Plain JSON data from numbers, paths and arrays of any library; NaN and infinities to null."""
    if isinstance(value, dict):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(value: Any, indent: int | None = None) -> str:
    return json.dumps(jsonable(value), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json(path: PathLike, value: Any) -> None:
    write_text(path, dumps(value, indent=2) + "\n")


def write_jsonl(path: PathLike, values: list[Any]) -> None:
    write_text(path, "".join(dumps(value) + "\n" for value in values))


def append_jsonl(path: PathLike, values: list[Any]) -> None:
    """Append lines and flush them; a line cut by a kill is dropped by `read_jsonl`."""
    with open(path, "ab") as file:
        file.write("".join(dumps(value) + "\n" for value in values).encode("utf-8", "replace"))
        file.flush()
        os.fsync(file.fileno())


def write_npy(path: PathLike, array: np.ndarray) -> None:
    with atomic(path) as file:
        np.save(file, array, allow_pickle=False)


def read_npy(path: PathLike) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} cannot be read as a .npy array ({error})") from error


def read_npz(path: PathLike) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read as a .npz file ({error})") from error


def read_json(path: PathLike) -> Any:
    """The content of a JSON file; InputError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read as JSON ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); the file is damaged") from error


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in a line; InputError, beginning with `where`, for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); write one object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is no JSON object; write one object a line")
    return value


def read_jsonl(path: PathLike) -> list[Any]:
    """The objects of a JSON-lines file; a last line cut short by a kill is left out."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    values = []
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path} line {number} is not JSON ({error})") from error
    return values


def sha256_file(path: PathLike) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
