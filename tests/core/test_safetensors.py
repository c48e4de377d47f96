"""The safetensors reader and writer against the format and the reference implementation's bytes."""

import json
import re
import struct
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from core import safetensors
from core.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape=(2,), dtype="F32", at=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


# What safetensors 0.8.0 writes for one tensor of each dtype, given in the opposite order.
REFERENCE_HEADER = (
    '{"__metadata__":{"format":"pt"},"U64":{"dtype":"U64","shape":[2],"data_offsets":[0,16]},'
    '"I64":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},'
    '"F64":{"dtype":"F64","shape":[2],"data_offsets":[32,48]},'
    '"F32":{"dtype":"F32","shape":[2],"data_offsets":[48,56]},'
    '"U32":{"dtype":"U32","shape":[2],"data_offsets":[56,64]},'
    '"I32":{"dtype":"I32","shape":[2],"data_offsets":[64,72]},'
    '"BF16":{"dtype":"BF16","shape":[2],"data_offsets":[72,76]},'
    '"F16":{"dtype":"F16","shape":[2],"data_offsets":[76,80]},'
    '"U16":{"dtype":"U16","shape":[2],"data_offsets":[80,84]},'
    '"I16":{"dtype":"I16","shape":[2],"data_offsets":[84,88]},'
    '"I8":{"dtype":"I8","shape":[2],"data_offsets":[88,90]},'
    '"U8":{"dtype":"U8","shape":[2],"data_offsets":[90,92]},'
    '"BOOL":{"dtype":"BOOL","shape":[2],"data_offsets":[92,94]}}'
)


def test_header_is_the_reference_implementations(tmp_path):
    tensors = {name: np.ones(2, dtype) for name, dtype in safetensors.DTYPES.items()}
    safetensors.write(tmp_path / "a", tensors, {"format": "pt"})
    written = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", written[:8])
    assert length % 8 == 0
    assert written[8 : 8 + length].rstrip(b" ").decode() == REFERENCE_HEADER
    assert written[8 + length :].startswith(b"".join([struct.pack("<Q", 1)] * 4))


def test_small_files_are_the_reference_implementations(tmp_path):
    """Names beyond ASCII, no elements, no dimensions, no tensors."""
    safetensors.write(tmp_path / "a", {"é": np.float32(0), "e": np.zeros((0, 3), np.float32)})
    assert (tmp_path / "a").read_bytes() == (
        b'p\x00\x00\x00\x00\x00\x00\x00{"e":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},'
        b'"\xc3\xa9":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}   \x00\x00\x00\x00'
    )
    safetensors.write(tmp_path / "b", {})
    assert (tmp_path / "b").read_bytes() == b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "
    assert {name: t.shape for name, t in safetensors.read(tmp_path / "a").items()} == {
        "e": (0, 3),
        "é": (),
    }
    assert safetensors.read(tmp_path / "b") == {}


@pytest.mark.parametrize("model", ["gpt2_tiny", "gpt2_tiny_untied"])
def test_a_file_of_transformers_is_rewritten_byte_for_byte(tmp_path, model):
    source = GOLDEN / model / "model.safetensors"
    safetensors.write(tmp_path / "copy", safetensors.read(source), {"format": "pt"})
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()


def test_round_trip_of_any_layout(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tensors = {
        "plain": x,
        "transposed": x.T,
        "strided": x[:, ::2, ::-1],
        "broadcast": np.broadcast_to(x[0, 0], (5, 4)),
        "bfloat16": x.astype(ml_dtypes.bfloat16).T,
        "jax": jnp.asarray(x),
        "lazy": safetensors.Lazy((4, 3, 2), "float32", lambda: x.T),
        "scalar": np.float64(0.1),
        "bool": x > 3,
        "nan": np.array([np.nan, np.inf, -0.0], np.float16),
    }
    safetensors.write(tmp_path / "file", tensors)
    found = safetensors.read(tmp_path / "file")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        value = np.asarray(value.make() if isinstance(value, safetensors.Lazy) else value)
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name
    assert list(found) == sorted(found, key=lambda name: (-found[name].itemsize, name != "scalar"))


def test_reading_copies_nothing_and_allows_no_writing(tmp_path):
    safetensors.write(tmp_path / "file", {"x": np.zeros(2**20, np.float32)})
    tracemalloc.start()
    x = safetensors.read(tmp_path / "file")["x"]
    assert tracemalloc.get_traced_memory()[1] < 2**18
    tracemalloc.stop()
    assert not x.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1


def resident_file_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def test_blocks_cover_a_tensor_and_give_its_pages_back(tmp_path):
    x = np.arange(2**23, dtype=np.float32).reshape(2**13, 2**10)  # 32 MiB
    safetensors.write(tmp_path / "file", {"x": x})
    mapped = safetensors.read(tmp_path / "file")["x"]
    before, most, covered = resident_file_bytes(), 0, 0
    for part, block in safetensors.blocks(mapped):
        assert part.start == covered and block.nbytes == safetensors.BLOCK
        np.testing.assert_array_equal(block, x[part])
        most, covered = max(most, resident_file_bytes()), part.stop
    assert covered == len(x)
    assert most - before < 2**23
    np.testing.assert_array_equal(mapped, x)  # pages given back come again
    assert resident_file_bytes() - before > 2**24
    np.testing.assert_array_equal(safetensors.copied(mapped, np.float32), x)
    assert resident_file_bytes() - before < 2**23
    ids = np.array([[5, 8191], [0, 5]])
    np.testing.assert_array_equal(safetensors.gathered(mapped, ids, np.float32), x[ids])


@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 0), (7, 2**18), (3, 5, 2)])
def test_blocks_of_any_array(shape):
    x = np.random.default_rng(0).normal(size=shape)
    seen = np.zeros(len(x))
    for part, block in safetensors.blocks(x):
        seen[part] += 1
        np.testing.assert_array_equal(block, x[part])
    assert (seen == 1).all()
    np.testing.assert_array_equal(safetensors.copied(x, "f4"), x.astype("f4"))
    np.testing.assert_array_equal(safetensors.copied(x.T, "f4"), x.T.astype("f4"))


def test_writing_holds_one_lazy_tensor_at_a_time(tmp_path):
    size = 2**18
    tensors = {
        f"t{i}": safetensors.Lazy((size,), "float32", lambda i=i: np.full(size, i, np.float32))
        for i in range(8)
    }
    tracemalloc.start()
    safetensors.write(tmp_path / "file", tensors)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * 4 * size
    assert [t[-1] for t in safetensors.read(tmp_path / "file").values()] == list(range(8))


def test_failed_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    safetensors.write(path, {"x": np.ones(3)})
    before = path.read_bytes()
    for wrong in (np.ones(4), np.ones(3, np.float32), np.ones((3, 1))):
        lazy = safetensors.Lazy((3,), "float64", lambda wrong=wrong: wrong)
        with pytest.raises(ValueError, match="'x' was announced as float64"):
            safetensors.write(path, {"a": np.ones(2), "x": lazy})
    for name, dtype in (("x", ">f4"), ("x", "complex64"), ("x", "U3"), ("__metadata__", "f4")):
        with pytest.raises(InputError, match=f"{name!r} of dtype"):
            safetensors.write(path, {name: np.zeros(2, dtype)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


MALFORMED = {
    "empty": (b"", "cannot be read as safetensors"),
    "short": (b"1234567", "holds 7 bytes"),
    "header beyond the file": (struct.pack("<Q", 50) + b"{}", "truncated: its header ends"),
    "header too long": (struct.pack("<Q", 10**8 + 1) + b"{}", "would take 100000001 bytes"),
    "a pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aK\x01s.", "no safetensors file"),
    "not json": (raw(b"{oops}"), "is not JSON"),
    "not utf-8": (raw(b'{"\xff": 1}'), "is not JSON"),
    "nested json": (raw(b"[" * 100_000), "is not JSON"),
    "a list": (raw([1]), "is not a JSON object"),
    "duplicate tensor": (
        raw(b'{"w":' + json.dumps(entry()).encode() + b',"w":1}', bytes(8)),
        "holds 'w' twice",
    ),
    "duplicate key": (
        raw(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "holds 'dtype' twice",
    ),
    "metadata not strings": (raw({"__metadata__": {"step": 3}}), "__metadata__"),
    "entry a number": (raw({"w": 3}), "'w' needs exactly"),
    "entry without dtype": (raw({"w": {"shape": [], "data_offsets": [0, 4]}}), "'w' needs exactly"),
    "entry with more": (raw({"w": entry() | {"order": "F"}}, bytes(8)), "'w' needs exactly"),
    "unknown dtype": (raw({"w": entry(dtype="F128")}, bytes(8)), "'w' has dtype 'F128'"),
    "dtype not a string": (raw({"w": entry(dtype=["F32"])}, bytes(8)), "'w' has dtype"),  # type: ignore
    "negative size": (raw({"w": entry((-2, -1))}, bytes(8)), "'w' has shape [-2, -1]"),
    "fractional size": (raw({"w": entry((2.0,))}, bytes(8)), "'w' has shape [2.0]"),
    "boolean size": (raw({"w": entry((True, 2))}, bytes(8)), "'w' has shape [True, 2]"),
    "shape a number": (raw({"w": entry() | {"shape": 2}}, bytes(8)), "'w' has shape 2"),
    "size not shape": (
        raw({"w": entry((3,))}, bytes(8)),
        "'w' takes 8 bytes, its shape [3] in F32",
    ),
    "size not dtype": (raw({"w": entry(dtype="F16")}, bytes(8)), "'w' takes 8 bytes"),
    "huge shape": (raw({"w": entry((2**40, 2**40))}, bytes(8)), "'w' has shape [1099511627776"),
    "no elements, sizes beyond counting": (
        raw({"w": entry((0, 2**40, 2**40), at=(0, 0))}),
        "which no memory holds",
    ),
    "many dimensions": (raw({"w": entry((1,) * 65, at=(0, 4))}, bytes(4)), "at most 64 sizes"),
    "long numbers": (raw(b'{"w":' + b"9" * 5000 + b"}"), "is not JSON"),
    "offset beyond the file": (
        raw({"v": entry(), "w": entry(at=(8, 2**62))}, bytes(8)),
        "takes 4611686018427387896 bytes",
    ),
    "three offsets": (raw({"w": entry(at=(0, 8, 8))}, bytes(8)), "'w' has data_offsets"),
    "negative offset": (raw({"w": entry(at=(-8, 0))}, bytes(8)), "'w' has data_offsets"),
    "offsets reversed": (raw({"w": entry(at=(8, 0))}, bytes(8)), "'w' takes -8 bytes"),
    "truncated": (raw({"w": entry()}, bytes(7)), "truncated: tensor 'w'"),
    "hole at the start": (raw({"w": entry(at=(8, 16))}, bytes(16)), "'w' leaves a hole"),
    "hole": (
        raw({"v": entry(), "w": entry(at=(16, 24))}, bytes(24)),
        "'w' leaves a hole before it",
    ),
    "overlap": (raw({"v": entry(), "w": entry(at=(4, 12))}, bytes(12)), "'w' overlaps the tensor"),
    "same place": (raw({"v": entry(), "w": entry()}, bytes(8)), "'w' overlaps the tensor"),
    "bytes left over": (raw({"w": entry()}, bytes(9)), "1 bytes follow the last tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_named(tmp_path, case):
    content, message = MALFORMED[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        safetensors.read(path)
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        safetensors.read(tmp_path / "nowhere")
    with pytest.raises(InputError, match="cannot be read"):
        safetensors.read(tmp_path)


def test_damaged_files_never_raise_anything_else(tmp_path):
    """Every truncation and a thousand damaged bytes: an array or an InputError."""
    path = tmp_path / "file"
    safetensors.write(path, {"a": np.ones((2, 2), np.float32), "b": np.ones(3, np.int8)})
    good = path.read_bytes()
    header = len(good) - 19
    random = np.random.default_rng(0)
    damaged = [good[:length] for length in range(len(good))]
    for _ in range(1000):
        at, byte = random.integers(header), random.integers(256)
        damaged.append(good[:at] + bytes([byte]) + good[at + 1 :])
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            assert all(isinstance(t.sum(), np.generic) for t in safetensors.read(path).values())
        except InputError:
            refused += 1
    assert refused >= len(good) + 500


def shards(folder: Path, weight_map: object, **files: dict) -> None:
    for name, tensors in files.items():
        safetensors.write(folder / f"{name}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


X, Y = np.arange(3.0), np.arange(4.0)
ONE, TWO = "one.safetensors", "two.safetensors"


def test_shards_are_read_as_one(tmp_path):
    shards(tmp_path, {"y": TWO, "x": ONE}, one={"x": X}, two={"y": Y})
    found = safetensors.read_folder(tmp_path)
    assert {name: t.tolist() for name, t in found.items()} == {"x": X.tolist(), "y": Y.tolist()}


def test_single_file_wins_over_an_index(tmp_path):
    shards(tmp_path, {"y": "gone.safetensors"}, model={"x": X})
    assert list(safetensors.read_folder(tmp_path)) == ["x"]


SHARDS = {
    "missing file": ({"x": ONE, "y": TWO}, {"one": {"x": X}}, "'two.safetensors', which is not"),
    "missing tensor": (
        {"x": ONE, "y": TWO, "z": TWO},
        {"one": {"x": X}, "two": {"y": Y}},
        "tensor 'z' under 'two.safetensors', which does not hold it",
    ),
    "unlisted tensor": (
        {"x": ONE},
        {"one": {"x": X, "y": Y}},
        "tensor 'y' is not listed",
    ),
    "in two shards": (
        {"x": ONE, "y": TWO},
        {"one": {"x": X}, "two": {"x": X, "y": Y}},
        "two.safetensors: tensor 'x' is in this shard",
    ),
    "in two shards, first stale": (
        {"x": TWO, "y": ONE},
        {"one": {"x": X, "y": Y}, "two": {"x": X}},
        "one.safetensors: tensor 'x' is in this shard",
    ),
    "outside": ({"x": "../one.safetensors"}, {}, "'../one.safetensors', which is not a file in"),
    "outside, through a folder": ({"x": "../model/one.safetensors"}, {}, "which is not a file in"),
    "absolute": ({"x": "/etc/hostname"}, {}, "'/etc/hostname', which is not a file in"),
    "a folder": ({"x": "."}, {}, "'.', which is not a file in"),
    "too long a name": ({"x": "x" * 5000}, {}, "which is not a file in"),
    "a name no file can have": ({"x": "a\0b"}, {}, "which is not a file in"),
    "map not strings": ({"x": 1}, {}, "weight_map of"),
    "map a list": ([], {}, "weight_map of"),
    "no map": (None, {}, "weight_map of"),
}


@pytest.mark.parametrize("case", SHARDS)
def test_index_and_shards_must_agree(tmp_path, case):
    weight_map, content, message = SHARDS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.write(tmp_path / ONE, {"x": X})
    shards(folder, weight_map, **content)
    with pytest.raises(InputError, match=re.escape(message)):
        safetensors.read_folder(folder)


def test_index_with_a_name_twice_is_refused(tmp_path):
    safetensors.write(tmp_path / ONE, {"x": X})
    index = '{"weight_map": {"x": "one.safetensors", "x": "one.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="holds 'x' twice"):
        safetensors.read_folder(tmp_path)
