"""A store of answers survives kills and company, gives back the bits it took, and knows its own."""

import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from core.errors import InputError
from evals import store
from evals.store import VERSION, Store, default_path, generation_key, prompt_key

ABOUT = {"model": "abc", "tokenizer": "def", "dtype": "float32"}
ANSWERS = {f"key{i}": [-1.5 * i, i % 2 == 0] for i in range(4)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "answers.jsonl"


def known(store: Store) -> dict:
    assert not store.before.keys() & store.since.keys()
    return store.before | store.since


def test_what_was_added_is_read_again(path):
    first = Store(path, ABOUT)
    assert known(first) == {} and first.size == path.stat().st_size
    first.add(ANSWERS.items())
    assert first.before == {} and first.since == ANSWERS
    again = Store(path, ABOUT)
    assert again.before == ANSWERS and again.since == {} and again.size == path.stat().st_size
    header, *lines = [json.loads(line) for line in path.read_text().split("\n") if line]
    assert header == {"format": "taproot-answers", "version": VERSION, **ABOUT}
    assert lines == [{"key": key, "value": value} for key, value in ANSWERS.items()]


def test_a_resumed_run_finds_the_same_before(path):
    Store(path, ABOUT).add([("old", [1.0, True])])
    run = Store(path, ABOUT)
    run.add([("new", [2.0, False]), ("old", [9.0, False])])
    resumed = Store(path, ABOUT, run.size)
    assert (resumed.before, resumed.since, resumed.size) == (run.before, run.since, run.size)
    assert resumed.before == {"old": [1.0, True]} and resumed.since == {"new": [2.0, False]}
    resumed.add([("new", [3.0, True]), ("newer", [4.0, True])])
    later = Store(path, ABOUT, run.size)
    assert later.since == resumed.since == {"new": [2.0, False], "newer": [4.0, True]}


def test_a_file_shorter_than_it_was_is_what_there_is(path):
    run = Store(path, ABOUT)
    assert Store(path, ABOUT, run.size + 1000).size == run.size


def test_a_kill_in_the_middle_of_a_write_costs_that_answer_only(path):
    Store(path, ABOUT).add([*ANSWERS.items()])
    last, whole = {"last": {"ids": [1, 2], "reason": "stop"}}, path.read_bytes()
    Store(path, ABOUT).add(last.items())
    written = path.read_bytes()
    for end in range(len(whole), len(written) + 1):
        path.write_bytes(written[:end])
        survived = last if end >= len(written) - 1 else {}  # all but the newline is all
        store = Store(path, ABOUT)
        assert store.before == {**ANSWERS, **survived} and store.size == end
        store.add([("next", [0.25, True])])
        resumed = Store(path, ABOUT, store.size)
        assert resumed.before == store.before and resumed.since == {"next": [0.25, True]}


def test_a_kill_while_the_file_begins(path):
    Store(path, ABOUT)
    header = path.read_bytes()
    for end in range(len(header) + 1):
        path.write_bytes(header[:end])
        Store(path, ABOUT).add(ANSWERS.items())
        assert Store(path, ABOUT).before == ANSWERS


def test_lines_that_are_no_answers_are_skipped(path):
    Store(path, ABOUT).add(ANSWERS.items())
    junk = (b"\xff\xfe", b"[1]", b'{"key": 3, "value": 1}', b'{"key": "x"}', b"[" * 10**5, b'{"key')
    with open(path, "ab") as file:
        file.write(b"\n".join(junk))
    Store(path, ABOUT).add([("next", [1.0, True])])
    assert Store(path, ABOUT).before == {**ANSWERS, "next": [1.0, True]}


def fill(path: Path, name: str) -> None:
    store = Store(path, ABOUT)
    for i in range(100):
        store.add((f"{name}{i}.{j}", ["x" * 500, j]) for j in range(8))


def test_two_processes_share_a_file(path):
    Store(path, ABOUT)
    fork = multiprocessing.get_context("spawn")
    writers = [fork.Process(target=fill, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    expected = {f"{n}{i}.{j}": ["x" * 500, j] for n in "ab" for i in range(100) for j in range(8)}
    assert Store(path, ABOUT).before == expected


def test_numbers_come_back_to_the_bit(path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**64, 2000, np.uint64).view(np.float64)
    values = [*bits[np.isfinite(bits)].tolist(), -0.0, 5e-324, 0.1, -math.inf]
    singles = rng.standard_normal(100).astype(np.float32)
    store = Store(path, ABOUT)
    store.add([("all", values), ("one", [singles[0], np.bool_(True), np.arange(3)])])
    store.add((str(i), value) for i, value in enumerate(singles))
    for answers in (store.since, Store(path, ABOUT).before):
        assert np.array(answers["all"]).tobytes() == np.array(values).tobytes()
        assert answers["one"] == [float(singles[0]), True, [0, 1, 2]]
        read = np.array([answers[str(i)] for i in range(100)], np.float32)
        assert read.tobytes() == singles.tobytes()


def test_answers_of_another_model_are_refused(path, tmp_path):
    Store(path, ABOUT).add(ANSWERS.items())
    with pytest.raises(InputError, match=r"answers.jsonl holds answers of another dtype; name"):
        Store(path, {**ABOUT, "dtype": "bfloat16"})
    with pytest.raises(InputError, match="of another length and model;"):
        Store(path, {**ABOUT, "model": "xyz", "length": 512})
    assert Store(path, {**dict(reversed(ABOUT.items()))}).before == ANSWERS
    for content in (b"notes\n", b"notes", b'{"key": "a", "value": 1}\n', b"\x00" * 9, b"[]\n"):
        (tmp_path / "notes").write_bytes(content)
        with pytest.raises(InputError, match="notes is no file of answers; name another"):
            Store(tmp_path / "notes", ABOUT)
        assert (tmp_path / "notes").read_bytes() == content


def test_a_place_that_cannot_be_used_is_named(path, tmp_path, monkeypatch):
    for place in (tmp_path, tmp_path / "file" / "inside"):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(InputError, match="answers cannot be kept in .*; free some space"):
            Store(place, ABOUT)
    store = Store(path, ABOUT)
    monkeypatch.setattr("evals.store.os.write", lambda handle, data: len(data) - 1)
    with pytest.raises(InputError, match="the disk is full"):
        store.add(ANSWERS.items())
    assert store.since == {}


def test_nothing_is_kept_nowhere(tmp_path):
    store = Store(None, ABOUT)
    store.add(ANSWERS.items())
    assert known(store) == {} and store.size == 0


def test_adding_reaches_the_disk_once_a_call(path, monkeypatch):
    store = Store(path, ABOUT)
    synced = []
    monkeypatch.setattr("evals.store.os.fsync", synced.append)
    store.add(ANSWERS.items())
    store.add([])
    assert len(synced) == 1


def test_a_benchmarks_worth_of_answers_is_read_at_once(path):
    answers = {prompt_key([i], 1): [-i / 7, False] for i in range(60_000)}
    Store(path, ABOUT).add(answers.items())
    began = time.perf_counter()
    assert Store(path, ABOUT).before == answers
    assert time.perf_counter() - began < 2  # 0.2 s where nothing else runs


def test_keys_hold_all_that_an_answer_depends_on():
    ids = np.arange(5)
    key = prompt_key(ids, 2)
    assert len(key) == 32 and int(key, 16) >= 0
    assert key == prompt_key([0, 1, 2, 3, 4], 2) == prompt_key(ids.astype(np.int32), 2)
    greedy = generation_key(ids, 8, (1, 2), ("\n",))
    assert greedy == generation_key(ids.tolist(), 8, [2, 1, 1], ["\n"])
    others = {
        greedy,
        prompt_key(ids, 3),
        prompt_key(ids[:4], 2),
        prompt_key(ids[::-1], 2),
        generation_key(ids, 9, (1, 2), ("\n",)),
        generation_key(ids, 8, (1,), ("\n",)),
        generation_key(ids, 8, (1, 2), ()),
        generation_key(ids[:4], 8, (1, 2), ("\n",)),
    }
    assert len({key, *others}) == 9


def test_each_model_has_its_file_in_the_cache(monkeypatch):
    monkeypatch.setenv("TAPROOT_CACHE", "")
    assert default_path(ABOUT) is None
    monkeypatch.setenv("TAPROOT_CACHE", "/x")
    path = default_path(ABOUT)
    assert path is not None and path.parent == Path("/x/answers") and len(path.stem) == 16
    assert path.suffix == ".jsonl" and path == default_path(dict(reversed(ABOUT.items())))
    assert path != default_path({**ABOUT, "dtype": "bfloat16"})
    monkeypatch.setattr(store, "VERSION", VERSION + 1)
    assert path != default_path(ABOUT)
