"""Files are whole or absent, whatever goes wrong; JSON lines survive a kill."""

import contextlib
import errno
import json
import os
import resource
import signal

import jax.numpy as jnp
import numpy as np
import pytest

from core import files
from core.errors import InputError


@pytest.fixture
def full_disk(monkeypatch):
    """Make a call of the operating system fail as on a full disk."""

    def fail(name):
        def call(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, name, call)

    return fail


@contextlib.contextmanager
def small_files():
    """No file of this process may grow past 4 kB: a real failing write, without a full disk.

    Around the writes only: pytest's own output may be a file.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)


WRITES = {
    "bytes": lambda path: files.write_bytes(path, b"x" * 9000),
    "text": lambda path: files.write_text(path, "x" * 9000),
    "json": lambda path: files.write_json(path, ["x" * 9000]),
    "jsonl": lambda path: files.write_jsonl(path, ["x" * 9000]),
    "npy": lambda path: files.write_npy(path, np.zeros(9000)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_failing_write_leaves_the_old_file(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for place in (path, tmp_path / "new"):
        with pytest.raises(OSError), small_files():
            write(place)
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("call", ["fsync", "replace", "chmod"])
def test_a_failure_at_any_point_leaves_the_old_file(call, tmp_path, full_disk):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    full_disk(call)
    with pytest.raises(OSError):
        files.write_bytes(path, b"new")
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_an_error_in_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), files.atomic(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_atomic_folder(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(RuntimeError), files.atomic_folder(path) as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert not os.listdir(tmp_path)
    for content in "12":
        with files.atomic_folder(path) as folder:
            (folder / content).write_text(content)
        assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == [content]
    with pytest.raises(RuntimeError), files.atomic_folder(path):
        raise RuntimeError
    assert os.listdir(tmp_path) == ["folder"] and os.listdir(path) == ["2"]


def test_json_round_trip(tmp_path):
    """Numbers of every library, paths and keys become plain JSON; what is not finite, null."""
    value = {
        "a": np.float32(0.5), "b": jnp.asarray(2), "c": np.array([[1, 2]]), 4: (True, None),
        "d": float("nan"), "e": [np.float64("inf"), jnp.float32(float("-inf"))], "f": tmp_path,
        "g": jnp.bfloat16(1.5), "h": "ü\n", "i": np.bool_(True),
    }  # fmt: skip
    plain = {
        "a": 0.5, "b": 2, "c": [[1, 2]], "4": [True, None], "d": None, "e": [None, None],
        "f": str(tmp_path), "g": 1.5, "h": "ü\n", "i": True,
    }  # fmt: skip
    files.write_json(tmp_path / "deep" / "file.json", value)
    assert files.read_json(tmp_path / "deep" / "file.json") == plain
    files.write_jsonl(tmp_path / "lines", [value, 1])
    files.append_jsonl(tmp_path / "lines", [[], value])
    assert files.read_jsonl(tmp_path / "lines") == [plain, 1, [], plain]
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "file.json", object())


def test_half_a_surrogate_pair_is_written(tmp_path):
    text = json.loads('"a\\ud83d"')
    files.write_json(tmp_path / "file", text)
    files.append_jsonl(tmp_path / "lines", [text])
    assert files.read_json(tmp_path / "file") == files.read_jsonl(tmp_path / "lines")[0] == "a?"


@pytest.mark.parametrize("kept", range(1, 13))
def test_a_torn_last_line_is_left_out(tmp_path, kept):
    """A kill may cut the last line anywhere, inside a character too."""
    first, last = '{"a": 1}\n', '{"b": "ü"}\n'.encode()
    (tmp_path / "lines").write_bytes(first.encode() + last[:kept])
    whole = [{"a": 1}] + ([{"b": "ü"}] if kept >= len(last) - 1 else [])
    assert files.read_jsonl(tmp_path / "lines") == whole


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "lines").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(InputError, match="lines line 2 is not JSON"):
        files.read_jsonl(tmp_path / "lines")
    (tmp_path / "lines").write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(InputError, match="lines line 2 is not JSON"):
        files.read_jsonl(tmp_path / "lines")
    for read in (files.read_json, files.read_npy, files.read_npz):
        with pytest.raises(InputError, match="lines"):
            read(tmp_path / "lines")
        with pytest.raises(InputError, match="missing"):
            read(tmp_path / "missing")
    with pytest.raises(InputError, match="missing does not exist"):
        files.read_jsonl(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"\xff{}")
    with pytest.raises(InputError, match="file is not JSON"):
        files.read_json(tmp_path / "file")


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=np.array([{}], object))
    with pytest.raises(InputError, match="a.npy cannot be read"):
        files.read_npy(tmp_path / "a.npy")
    with pytest.raises(InputError, match="a.npz cannot be read"):
        files.read_npz(tmp_path / "a.npz")


def test_arrays_round_trip(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    files.write_npy(tmp_path / "a.npy", array)
    found = files.read_npy(tmp_path / "a.npy")
    assert found.dtype == array.dtype and (found == array).all()


def test_sha256_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223")
