"""Arrays filled batch by batch: a kill between any two writes, a full disk, a damaged file."""

import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from core.errors import InputError
from core.files import read_json, read_npy, sha256_file
from core.memmap import FilledArray, Parts, checksum

N, D = 10, 3
BATCHES = [np.array([7, 2, -1]), np.array([0, 1, 9]), np.array([3, 4, 5]), np.array([8, 6, -1])]


def values(rows_B):
    return np.stack([np.full(D, row, np.float32) for row in rows_B])


def test_filled_in_any_order(tmp_path):
    array = FilledArray(tmp_path / "deep" / "a.npy", (N, D))
    for rows_B in BATCHES:
        array.write(rows_B, values(rows_B))
    found = array.finish()
    np.testing.assert_array_equal(found, values(range(N)))
    assert not found.flags.writeable
    np.testing.assert_array_equal(read_npy(tmp_path / "deep" / "a.npy"), values(range(N)))
    assert FilledArray(tmp_path / "deep" / "a.npy", (N, D)).next_batch == len(BATCHES)


KILLED = """
import os, signal, sys
import numpy as np
from core.memmap import FilledArray, Parts, checksum
array = FilledArray(sys.argv[1], (10, 3))
for batch in eval(sys.argv[2])[array.next_batch:]:
    rows_B = np.array(batch)
    array.write(rows_B, np.stack([np.full(3, row, np.float32) for row in rows_B]))
    if "flush" in sys.argv:
        array.flush()
    os.kill(os.getpid(), signal.SIGKILL)
array.finish()
"""


@pytest.mark.parametrize("mode", ["flush", "no flush"])
def test_killed_after_every_batch(tmp_path, mode):
    """What the journal counts is in the file; what it does not is simply written again."""
    path = tmp_path / "a.npy"
    command = [sys.executable, "-c", KILLED, str(path), str([b.tolist() for b in BATCHES]), mode]
    for finished in range(1, 3):
        assert subprocess.run(command, env=os.environ).returncode == -signal.SIGKILL
        assert read_json(tmp_path / "a.journal.json")["batches"] == finished * (mode == "flush")
    array = FilledArray(path, (N, D))
    for rows_B in BATCHES[array.next_batch :]:
        array.write(rows_B, values(rows_B))
    np.testing.assert_array_equal(array.finish(), values(range(N)))


def test_a_full_disk_is_named_before_any_work(tmp_path):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, old[1]))
    try:
        with pytest.raises(InputError, match=r"a.npy cannot be made .* needs 0.04 GB"):
            FilledArray(tmp_path / "a.npy", (10**6, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert not os.listdir(tmp_path)


def test_disk_space_is_claimed_at_the_start(tmp_path):
    FilledArray(tmp_path / "a.npy", (10**5, 10))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 4 * 10**6


def test_another_shape_is_refused(tmp_path):
    FilledArray(tmp_path / "a.npy", (N, D))
    for shape, dtype in (((N, D + 1), "float32"), ((N, D), "float16")):
        with pytest.raises(InputError, match="a.npy is .* expected"):
            FilledArray(tmp_path / "a.npy", shape, dtype)


def test_a_damaged_array_is_named(tmp_path):
    FilledArray(tmp_path / "a.npy", (N, D)).finish()
    os.truncate(tmp_path / "a.npy", 140)
    with pytest.raises(InputError, match="a.npy cannot be opened"):
        FilledArray(tmp_path / "a.npy", (N, D))


def test_a_deleted_array_begins_anew(tmp_path):
    """An old journal says nothing about a new array, even when a kill comes between the two."""
    array = FilledArray(tmp_path / "a.npy", (N, D))
    array.write(BATCHES[0], values(BATCHES[0]))
    array.finish()
    (tmp_path / "a.npy").unlink()
    assert FilledArray(tmp_path / "a.npy", (N, D)).next_batch == 0
    (tmp_path / "a.journal.json").unlink()  # killed before the new journal was written
    assert FilledArray(tmp_path / "a.npy", (N, D)).next_batch == 0


def test_a_finished_array_keeps_its_checksum(tmp_path):
    """Written once more, as after a kill between two arrays of one run, it stays as it is."""
    path = tmp_path / "a.npy"
    array = FilledArray(path, (N, D))
    assert checksum(path) is None
    for rows_B in BATCHES:
        array.write(rows_B, values(rows_B))
    assert array.close() == [sha256_file(path)] == [checksum(path)]
    again = FilledArray(path, (N, D))
    again.write(np.arange(N), np.zeros((N, D), np.float32))
    assert again.close() == [sha256_file(path)]
    np.testing.assert_array_equal(read_npy(path), values(range(N)))


def test_parts_read_as_one_array(tmp_path):
    whole = values(range(N))
    paths = [tmp_path / f"{i}.npy" for i in range(3)]
    for path, (start, stop) in zip(paths, [(0, 4), (4, 5), (5, N)], strict=True):
        np.save(path, whole[start:stop])
    parts = Parts(paths)
    assert parts.shape == (N, D)
    for start in range(N):
        for stop in range(start + 1, N + 2):
            np.testing.assert_array_equal(parts[start:stop], whole[start:stop])
