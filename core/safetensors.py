"""The safetensors format: named arrays behind a JSON header, nothing executable.

    uint64 n, little endian | n bytes of JSON | data
    JSON = {name: {"dtype", "shape", "data_offsets": [begin, end)}, "__metadata__": {str: str}}

Reading maps the file and copies nothing; `blocks` walks a tensor and gives its pages back, so that
a file larger than memory can be read through. The data must be covered exactly, without holes or
overlaps, as the reference implementation demands; whatever is wrong is named. Writing follows its
conventions (order of tensors, padding of the header), so equal tensors give equal bytes. A folder
holds one file, or shards and an index that says which tensor is where.
"""

import itertools
import json
import math
import mmap
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from core import files
from core.errors import InputError

# In the order of the reference implementation, which writes the last of these first.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
_ORDER = {dtype: place for place, dtype in enumerate(reversed(DTYPES.values()))}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the reference implementation's limit
MAX_DIMENSIONS = 64  # numpy's limit
METADATA = "__metadata__"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 2**19  # bytes; transposing more rows than that holds at once misses the cache
ROWS = 16  # that `gathered` reads before it gives pages back

Tensors = dict[str, np.ndarray]


class Lazy(NamedTuple):
    """A tensor made when it is written, so that an export holds one tensor at a time."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    make: Callable[[], ArrayLike]


def read(path: files.PathLike) -> Tensors:
    """A file's tensors, in file order, as read-only arrays over the mapped file.

    Raises InputError, naming the file and the tensor, for anything but a valid file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
        raise InputError(f"{path} cannot be read as safetensors ({error})") from error
    if len(data) < 8:
        raise InputError(f"{path} is no safetensors file: it holds {len(data)} bytes")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER:
        raise InputError(
            f"{path} is no safetensors file: its header would take {length} bytes, the format "
            f"allows {MAX_HEADER}"
        )
    start = 8 + length
    if start > len(data):
        raise InputError(
            f"{path} is truncated: its header ends at byte {start}, the file at {len(data)}; "
            "download or copy it again"
        )
    header = _json(data[8:start], f"the header of {path}")
    _strings(header.pop(METADATA, {}), f"{METADATA} of {path}")
    entries = [_entry(name, value, path) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    end = 0
    for entry in entries:
        if entry.begin != end:
            fault = "overlaps the tensor" if entry.begin < end else "leaves a hole"
            raise InputError(
                f"{path}: tensor {entry.name!r} {fault} before it (it begins at byte "
                f"{entry.begin}, not {end}); the file is damaged"
            )
        end = entry.end
        if start + end > len(data):
            raise InputError(
                f"{path} is truncated: tensor {entry.name!r} ends at byte {start + end}, the file "
                f"at {len(data)}; download or copy it again"
            )
    if start + end != len(data):
        raise InputError(
            f"{path}: {len(data) - start - end} bytes follow the last tensor; the file is damaged"
        )
    return {
        e.name: np.frombuffer(data, e.dtype, math.prod(e.shape), start + e.begin).reshape(e.shape)
        for e in entries
    }


def metadata(path: files.PathLike) -> dict[str, str]:
    """The texts in the header of a file that `read` accepts; {} where it holds none."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = _json(file.read(length), f"the header of {path}")
    return _strings(header.get(METADATA, {}), f"{METADATA} of {path}")


def read_folder(folder: files.PathLike) -> Tensors:
    """The tensors of `model.safetensors`, or of the shards `model.safetensors.index.json` lists.

    The index and the shards must agree: every name in exactly the one shard it is listed under.
    """
    folder = Path(folder)
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() or not index.exists():
        return read(single)
    try:
        content = _json(index.read_bytes(), str(index))
        here = {path.name for path in folder.iterdir() if path.is_file()}
    except OSError as error:
        raise InputError(f"{index} cannot be read ({error})") from error
    places = _strings(content.get("weight_map"), f"weight_map of {index}")
    tensors: Tensors = {}
    for shard in sorted(set(places.values())):
        path = folder / shard
        if shard not in here:
            raise InputError(f"{index} lists {shard!r}, which is not a file in {folder}")
        for name, tensor in read(path).items():
            if name not in places:
                raise InputError(f"{path}: tensor {name!r} is not listed in {index.name}")
            if name in tensors or places[name] != shard:
                raise InputError(
                    f"{path}: tensor {name!r} is in this shard, {index.name} lists it under "
                    f"{places[name]!r}; delete the stale shard or correct the index"
                )
            tensors[name] = tensor
    if missing := sorted(places.keys() - tensors.keys()):
        raise InputError(
            f"{index} lists tensor {missing[0]!r} under {places[missing[0]]!r}, which does not "
            "hold it; download or copy that shard again"
        )
    return tensors


def blocks(tensor: np.ndarray, size: int = BLOCK) -> Iterator[tuple[slice, np.ndarray]]:
    """Slices of a tensor's first axis and what lies there, about `size` bytes at a time.

    When the next one is asked for, the mapped pages of the last go back to the system; another
    look at them reads the file again. Any array will do; only mapped ones have pages to give.
    """
    rows = max(1, size * len(tensor) // max(tensor.nbytes, 1))
    for start in range(0, len(tensor), rows):
        part = slice(start, start + rows)
        yield part, tensor[part]
        # From the beginning, because a fault maps some pages before the one it asks for.
        _release(tensor[: part.stop])


def copied(tensor: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A tensor in memory and in `dtype`; none of its pages stays mapped."""
    copy = np.empty(tensor.shape, dtype)
    for part, block in blocks(tensor):
        copy[part] = block
    return copy


def gathered(tensor: np.ndarray, ids: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """Rows of a tensor, as `copied` gives all of it."""
    flat = ids.reshape(-1)
    rows = np.empty((len(flat), *tensor.shape[1:]), dtype)
    for start in range(0, len(flat), ROWS):
        part = slice(start, start + ROWS)
        rows[part] = tensor[flat[part]]
        _release(tensor)  # a fault may map megabytes around the row it asks for
    return rows.reshape(*ids.shape, *tensor.shape[1:])


def _release(array: np.ndarray) -> None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    mapped = base.obj if isinstance(base, memoryview) else None
    if isinstance(mapped, mmap.mmap) and array.size:
        low, high = np.lib.array_utils.byte_bounds(array)
        origin = np.lib.array_utils.byte_bounds(np.frombuffer(mapped, np.uint8))[0]
        start = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_DONTNEED, start, high - origin - start)


def write(
    path: files.PathLike,
    tensors: Mapping[str, ArrayLike | Lazy],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `path` atomically, one tensor at a time; any memory layout is written row-major.

    metadata: strings for the header; {"format": "pt"} is what the field's readers ask for.
    """
    items = [
        (name, value if isinstance(value, Lazy) else _lazy(value))
        for name, value in tensors.items()
    ]
    for name, lazy in items:
        if name == METADATA or np.dtype(lazy.dtype) not in _ORDER:
            raise InputError(f"{path} cannot hold a tensor {name!r} of dtype {lazy.dtype}")
    items.sort(key=lambda item: (_ORDER[np.dtype(item[1].dtype)], item[0]))
    ends = itertools.accumulate(
        (math.prod(lazy.shape) * np.dtype(lazy.dtype).itemsize for _, lazy in items), initial=0
    )
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for (name, lazy), span in zip(items, itertools.pairwise(ends), strict=True):
        dtype = _NAMES[np.dtype(lazy.dtype)]
        header[name] = {"dtype": dtype, "shape": list(lazy.shape), "data_offsets": list(span)}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise InputError(f"{path} cannot hold a header of {len(text)} bytes (limit {MAX_HEADER})")
    with files.atomic(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, lazy in items:
            array = np.asarray(lazy.make())
            if array.shape != tuple(lazy.shape) or array.dtype != lazy.dtype:
                raise ValueError(
                    f"tensor {name!r} was announced as {np.dtype(lazy.dtype)}{tuple(lazy.shape)} "
                    f"and came as {array.dtype}{array.shape}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_folder(
    folder: files.PathLike,
    tensors: Mapping[str, Lazy],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: float = math.inf,
) -> None:
    """Write `model.safetensors`, or shards of `shard_bytes` at most and their index.

    Names and index are transformers'. A tensor of more than `shard_bytes` is a shard of its own.
    """
    folder = Path(folder)
    sizes = {n: math.prod(t.shape) * np.dtype(t.dtype).itemsize for n, t in tensors.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + size > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write(folder / SINGLE, tensors, metadata)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / file, {name: tensors[name] for name in names}, metadata)
        places |= dict.fromkeys(names, file)
    total = {"total_size": sum(sizes.values())}
    files.write_json(
        folder / INDEX, {"metadata": total, "weight_map": dict(sorted(places.items()))}
    )


def _lazy(value: ArrayLike) -> Lazy:
    array = np.asarray(value)
    return Lazy(array.shape, array.dtype, lambda: array)


class _Entry(NamedTuple):
    """One line of a header; offsets count bytes from the start of the data."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _entry(name: str, value: Any, path: Path) -> _Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where} needs exactly dtype, shape and data_offsets in the header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{where} has dtype {_short(dtype)}; known: {', '.join(DTYPES)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise InputError(
            f"{where} has shape {_short(shape)}; expected a list of at most {MAX_DIMENSIONS} sizes"
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise InputError(f"{where} has data_offsets {_short(offsets)}; expected [begin, end]")
    if math.prod(max(size, 1) for size in shape) * DTYPES[dtype].itemsize > sys.maxsize:
        raise InputError(f"{where} has shape {_short(shape)}, which no memory holds")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        raise InputError(
            f"{where} takes {offsets[1] - offsets[0]} bytes, its shape {shape} in {dtype} {needed}"
        )
    return _Entry(name, DTYPES[dtype], tuple(shape), *offsets)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _sizes(value: Any) -> bool:
    # `type`, because True is an int too.
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _strings(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise InputError(f"{where} is not a JSON object of strings")
    return value


def _json(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object; a key given twice is an error, where `json` would keep the last."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{where} holds {twice!r} twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); the file is damaged") from error
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object; the file is damaged")
    return value
