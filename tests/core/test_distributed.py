"""Several processes: who has which rows, and arrays, numbers and run folders put together.

Threads stand for the processes here; tests/attribution/test_store.py starts real ones.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from core import distributed
from core.errors import InputError
from core.files import read_npy
from core.memmap import FilledArray
from core.rundir import open_run

COUNT = 3


@pytest.fixture
def processes(monkeypatch):
    """Call a function in every process at once; returns what it returned in each."""
    here = threading.local()
    monkeypatch.setattr(distributed, "place", lambda: (here.number, COUNT))

    def call(function):
        def one(number):
            here.number = number
            return function(number)

        with ThreadPoolExecutor(COUNT) as pool:
            return list(pool.map(one, range(COUNT)))

    return call


def test_every_row_has_one_process(processes):
    for n in (COUNT, 10, 11):
        shares = processes(lambda _, n=n: distributed.share(n))
        assert [i for share in shares for i in share] == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    with pytest.raises(InputError, match="2 rows are too few for 3 processes"):
        processes(lambda _: distributed.share(2))


def test_arrays_are_filled_in_parts_and_joined(processes, tmp_path):
    """Also by processes that were killed before the end, or right after the parts were joined."""
    expected = np.arange(20, dtype=np.float32).reshape(10, 2)

    def fill(number):
        array = FilledArray(tmp_path / "a.npy", (10, 2))
        assert array.next_batch == (0 if number else first)
        for rows_B in np.array_split(np.array(array.share), 2)[array.next_batch :]:
            rows_B = np.append(rows_B, -1)
            array.write(rows_B, expected[rows_B])
        return array.finish()

    def killed(number):
        if number == 0:
            array = FilledArray(tmp_path / "a.npy", (10, 2))
            array.write(np.arange(2), expected[:2])
            array.flush()

    first = 1
    processes(killed)
    for found in processes(fill):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), expected)
    assert [file.name for file in tmp_path.glob("*.npy")] == ["a.npy"]

    def again(_):
        array = FilledArray(tmp_path / "a.npy", (10, 2))
        assert array.next_batch == 2
        return array.finish()

    for found in processes(again):
        np.testing.assert_array_equal(found, expected)


def test_numbers_are_gathered_in_order(processes, tmp_path):
    file = tmp_path / "sum.npz"
    for found in processes(lambda i: distributed.gather(file, rows=np.int64(i), h=np.ones(2) * i)):
        assert [int(part["rows"]) for part in found] == [0, 1, 2]
        np.testing.assert_array_equal(sum(part["h"] for part in found), [3, 3])
    assert sorted(f.name for f in tmp_path.iterdir())[1] == "sum-00002-of-00003.npz"


def test_one_process_writes_nothing_to_gather(tmp_path):
    assert distributed.gather(tmp_path / "a.npz", x=np.ones(1)) == [{"x": np.ones(1)}]
    assert distributed.part(tmp_path / "a.npz") == tmp_path / "a.npz" and not list(
        tmp_path.iterdir()
    )


def test_the_first_process_leads_a_run(processes, monkeypatch, tmp_path):
    """The others begin when it has recorded, and end when it has."""
    ended = []

    def work(number, rows="a", session="1"):
        monkeypatch.setattr(distributed, "session", lambda: session)
        with open_run(tmp_path / "run", "build", {"x": 1}) as run:
            if run.done:
                return "done"
            run.inputs(rows=rows)
            assert (run.path / "inputs.json").exists()
            (run.path / f"work{number}").touch()
            if number == 0:
                threading.Event().wait(0.2)
                ended.append(number)
            run.finish()
            ended.append(number)
            return run.status

    assert processes(work) == ["DONE"] * COUNT and ended[0] == 0
    assert processes(work) == ["done"] * COUNT
    (tmp_path / "run" / "DONE").unlink()
    with pytest.raises(InputError, match="input rows="):
        processes(lambda number: work(number, "b", "2") if number == 0 else None)
    (tmp_path / "run" / "LOCK").write_text("3")  # as this start's first process leaves it
    with pytest.raises(InputError, match="input rows="):
        processes(lambda number: work(number, "b", "3") if number == 1 else None)


@pytest.mark.parametrize("given,message", [
    ({}, "TAPROOT_PROCESSES='' is not a number"),
    ({"TAPROOT_PROCESSES": "2", "TAPROOT_PROCESS": "two"}, "TAPROOT_PROCESS='two' is not a number"),
    ({"TAPROOT_PROCESSES": "2", "TAPROOT_PROCESS": "2"}, "count from 0"),
])  # fmt: skip
def test_a_start_that_names_no_process_is_refused(monkeypatch, given, message):
    distributed.start()  # alone: nothing to join
    for name, value in {"TAPROOT_COORDINATOR": "localhost:1", **given}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        distributed.start()
