"""Rows on disk: round trip, every kind of bad row by name, batches that cover each row once."""

import datasets
import numpy as np
import pyarrow as pa
import pytest

from core import rows as rows_module
from core.errors import InputError
from core.files import read_json
from core.rows import (
    Plan,
    TrainingBatches,
    bucket,
    load_rows,
    read_ahead,
    same_tokenizer,
    save_rows,
)
from core.rows import training_batches as batches


def some(lengths=(5, 1 + 16, 40, 3, 17, 2, 64, 33), seed=0):
    """ids and labels; about a third unsupervised, the second label always supervised."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 100, n).astype(np.int32) for n in lengths]
    labels = [np.where(rng.random(len(row)) < 0.3, -100, row) for row in ids]
    for row, label in zip(ids, labels, strict=True):
        label[1] = row[1]
    return ids, labels


@pytest.fixture
def saved(tmp_path):
    ids, labels = some()
    save_rows(tmp_path / "rows", ids, labels, {"source": list("abcdefgh")}, "f" * 64, {"note": 1})
    return load_rows(tmp_path / "rows", 100, 64, "f" * 64), ids, labels


def test_round_trip(saved, tmp_path):
    rows, ids, labels = saved
    assert len(rows) == 8 and rows.columns == ["source"]
    for i in range(8):
        for found, expected in ((rows.ids(i), ids[i]), (rows.labels(i), labels[i])):
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, expected)
    assert rows.lengths.tolist() == [len(row) for row in ids]
    assert rows.trained.tolist() == [(label[1:] != -100).sum() for label in labels]
    assert rows.column("source") == list("abcdefgh") and rows.column("doc") is None
    assert rows.tokenizer == "f" * 64
    info = read_json(tmp_path / "rows" / "rows.json")
    assert (info["rows"], info["tokens"], info["note"]) == (8, sum(map(len, ids)), 1)


def test_labels_default_to_every_token(tmp_path):
    ids, _ = some()
    save_rows(tmp_path / "rows", ids)
    rows = load_rows(tmp_path / "rows")
    np.testing.assert_array_equal(rows.labels(2), ids[2])
    assert rows.trained.tolist() == [len(row) - 1 for row in ids]


def test_sha_is_of_content_and_order(saved, tmp_path):
    rows, ids, labels = saved
    save_rows(tmp_path / "same", ids, labels)
    assert load_rows(tmp_path / "same").sha == rows.sha
    assert rows.take(range(8)).sha == rows.sha
    assert rows.take(range(8)[::-1]).sha != rows.sha
    labels[3][2] = -100
    ids[3][2] = 7
    save_rows(tmp_path / "other", ids, labels)
    assert load_rows(tmp_path / "other").sha != rows.sha


def test_take_follows_the_given_order(saved):
    rows, ids, labels = saved
    taken = rows.take([6, 0, 6]).take([2, 1])
    assert [taken.ids(i).tolist() for i in (0, 1)] == [ids[6].tolist(), ids[0].tolist()]
    assert taken.trained.tolist() == [(labels[i][1:] != -100).sum() for i in (6, 0)]
    assert taken.column("source") == ["g", "a"]


def test_datasets_of_other_tools(tmp_path):
    """Other integer and list types, several Arrow pieces and an indices mapping read the same."""
    ids, labels = some()

    def part(a, b):
        long, short = pa.list_(pa.int64()), pa.large_list(pa.int16())
        columns = {
            "labels": pa.array([x.tolist() for x in labels[a:b]], long),
            "input_ids": pa.array([x.tolist() for x in ids[a:b]], short),
        }
        return datasets.Dataset(pa.table(columns))

    parts = [part(0, 3), part(3, 4), part(4, 8)]
    datasets.concatenate_datasets(parts).select([7, 1, 4, 0]).save_to_disk(tmp_path / "picked")
    datasets.concatenate_datasets(parts).save_to_disk(tmp_path / "rows", num_shards=3)
    rows = load_rows(tmp_path / "rows", 100)
    assert [rows.ids(i).tolist() for i in range(8)] == [x.tolist() for x in ids]
    assert [rows.labels(i).tolist() for i in range(8)] == [x.tolist() for x in labels]
    assert rows.trained.tolist() == [(label[1:] != -100).sum() for label in labels]
    assert rows.tokenizer is None
    picked = load_rows(tmp_path / "picked", 100)
    assert picked.sha == rows.take([7, 1, 4, 0]).sha


GOOD = [[1, 2, 3], [4, 5]]
BAD = {
    "no input_ids": ({"tokens": GOOD, "labels": GOOD}, "no column 'input_ids'"),
    "no labels": ({"input_ids": GOOD}, "no column 'labels'.*labels = input_ids"),
    "text": ({"input_ids": ["ab", "c"], "labels": GOOD}, "'input_ids' .*list of integers"),
    "fractions": ({"input_ids": GOOD, "labels": [[0.5] * 3, [1.0] * 2]}, "'labels' .*integers"),
    "a missing row": ({"input_ids": [[1, 2, 3], None], "labels": GOOD}, "missing values"),
    "a missing id": ({"input_ids": GOOD, "labels": [[1, None, 3], [4, 5]]}, "'labels' .*missing"),
    "no rows": ({"input_ids": [], "labels": []}, "has no rows|cannot be read"),
    "empty": ({"input_ids": [[1, 2], []], "labels": [[1, 2], []]}, "row 1 is empty"),
    "ragged": ({"input_ids": GOOD, "labels": [[1, 2, 3], [4]]}, "row 1 has labels of another len"),
    "unsupervised": ({"input_ids": GOOD, "labels": [[1, 2, 3], [4, -100]]}, "row 1 has no superv"),
    "one token": ({"input_ids": [[1, 2], [7]], "labels": [[1, 2], [7]]}, "row 1 has no supervised"),
    "too long": ({"input_ids": [[1] * 5, [1] * 9], "labels": [[1] * 5, [1] * 9]}, "row 1 has 9"),
    "id too large": ({"input_ids": [[1, 2], [3, 100]], "labels": [[1, 2], [3, 4]]},
                     "row 1: input_ids holds token id 100, outside .* 100"),
    "negative id": ({"input_ids": [[1, 2], [3, -100]], "labels": [[1, 2], [3, 4]]},
                    "row 1: input_ids holds token id -100"),
    "label too large": ({"input_ids": GOOD, "labels": [[1, 2, 3], [4, 2**31 - 1]]},
                        "row 1: labels holds token id 2147483647"),
    "negative label": ({"input_ids": GOOD, "labels": [[1, -1, 3], [4, 5]]},
                       "row 0: labels holds token id -1"),
}  # fmt: skip


@pytest.mark.parametrize("columns,message", BAD.values(), ids=BAD)
def test_bad_rows_are_named(tmp_path, columns, message):
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match=message):
        load_rows(tmp_path / "rows", 100, 8)


def test_bad_rows_in_a_later_piece(tmp_path):
    """The row number counts from the first Arrow piece."""
    good = datasets.Dataset.from_dict({"input_ids": GOOD, "labels": GOOD})
    bad = datasets.Dataset.from_dict({"input_ids": [[1, 2], [1, 2]], "labels": [[1, 2], [1, -7]]})
    datasets.concatenate_datasets([good, bad]).save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match="row 3: labels holds token id -7"):
        load_rows(tmp_path / "rows")


def test_bad_folders_are_named(tmp_path, saved):
    with pytest.raises(InputError, match="nowhere does not exist"):
        load_rows(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not a rows folder"):
        load_rows(tmp_path)
    with pytest.raises(InputError, match="another tokenizer"):
        load_rows(tmp_path / "rows", tokenizer="e" * 64)
    save_rows(tmp_path / "other", GOOD, tokenizer="e" * 64)  # pyright: ignore
    save_rows(tmp_path / "unknown", GOOD)  # pyright: ignore
    same_tokenizer(saved[0], load_rows(tmp_path / "unknown"))
    with pytest.raises(InputError, match="different tokenizers"):
        same_tokenizer(saved[0], load_rows(tmp_path / "other"))
    next((tmp_path / "rows").glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        load_rows(tmp_path / "rows")


def test_save_rows_refuses(tmp_path):
    with pytest.raises(InputError, match="no rows to write"):
        save_rows(tmp_path / "rows", [])
    ids = [np.arange(3), np.arange(2)]
    with pytest.raises(InputError, match="differ in length"):
        save_rows(tmp_path / "rows", ids, ids[::-1])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("batch_tokens,multiple", [(1, 1), (64, 1), (100, 3), (10**6, 8)])
def test_plan_covers_every_row_once(tmp_path, batch_tokens, multiple):
    lengths = np.random.default_rng(1).integers(2, 65, 50)
    ids, labels = some(lengths, 2)
    save_rows(tmp_path / "rows", ids, labels)
    rows = load_rows(tmp_path / "rows")
    plan = Plan(rows, batch_tokens, multiple)
    seen, shapes = [], {}
    for k in range(len(plan)):
        batch = plan[k]
        b, t = batch.ids_BT.shape
        assert b % multiple == 0 and (b - multiple) * t < max(batch_tokens, t)
        shapes.setdefault(t, set()).add(b)
        for place, row in enumerate(batch.rows_B):
            n = rows.lengths[row] if row >= 0 else 0
            assert not batch.ids_BT[place, n:].any()
            assert (batch.labels_BT[place, n:] == -100).all()
            if row >= 0:
                np.testing.assert_array_equal(batch.ids_BT[place, :n], ids[row])
                np.testing.assert_array_equal(batch.labels_BT[place, :n], labels[row])
                seen.append(int(row))
        assert batch.trained == sum(rows.trained[r] for r in batch.rows_B if r >= 0)
    assert sorted(seen) == list(range(50))
    assert all(len(sizes) == 1 for sizes in shapes.values()), "one shape for each padded length"
    again = Plan(load_rows(tmp_path / "rows"), batch_tokens, multiple)
    assert all((a == b).all() for (a, _), (b, _) in zip(plan.batches, again.batches, strict=True))


def test_buckets():
    """Little padding in few shapes, never more than the longest row."""
    sizes = [bucket(n, 1024) for n in range(1, 1025)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    assert all(n <= size <= max(16, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert bucket(700, 700) == 700 and bucket(3, 5) == 5


@pytest.mark.parametrize("start", [0, 1, 3, 9, 10])
def test_read_ahead_starts_anywhere(start):
    assert list(read_ahead(list(range(10)), start)) == list(range(start, 10))


def taken(rows, n, batch=3, seed=0, start=0):
    source = batches(rows, batch, seed, start)
    return [next(source) for _ in range(n)]


def test_training_batches_resume_at_any_step(saved):
    rows = saved[0]
    whole = taken(rows, 12)
    for start in range(12):
        for found, expected in zip(taken(rows, 2, start=start), whole[start:], strict=False):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_epochs_cover_all_rows(saved, batch):
    """Every 8 draws in a row are the 8 rows, in another order each epoch and for each seed."""
    rows = saved[0]

    def order(seed):
        drawn = taken(rows, -(-40 // batch), batch, seed)
        return np.concatenate([b.rows_B for b in drawn])[:40].reshape(5, 8)

    epochs = order(0)
    assert (np.sort(epochs, axis=1) == np.arange(8)).all()
    assert len({tuple(e) for e in epochs.tolist()}) == 5
    assert (order(0) == epochs).all() and (order(1) != epochs).any()


def test_training_batches_hold_the_rows(saved):
    rows, ids, labels = saved
    for batch in taken(rows, 6):
        longest = max(len(ids[r]) for r in batch.rows_B)
        assert batch.ids_BT.shape == (3, rows_module.bucket(longest, 64))
        for place, r in enumerate(batch.rows_B):
            n = len(ids[r])
            np.testing.assert_array_equal(batch.ids_BT[place, :n], ids[r])
            np.testing.assert_array_equal(batch.labels_BT[place, :n], labels[r])
            assert (batch.labels_BT[place, n:] == -100).all()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("drawn", [8, 16, 20, 24])
def test_training_batches_are_walked_backwards_and_end(saved, drawn, shuffle):
    """Each epoch holds every row once; after the last row drawn come empty ones."""
    rows, source = saved[0], TrainingBatches(saved[0], 3, 5, shuffle, drawn)
    assert len(source) == -(-drawn // 3)
    ahead = [source[s] for s in range(len(source))]
    for s in reversed(range(len(source))):
        again = TrainingBatches(rows, 3, 5, shuffle, drawn)[s]
        for a, b in zip(ahead[s], again, strict=True):
            np.testing.assert_array_equal(a, b)
    order = np.concatenate([batch.rows_B for batch in ahead])
    assert (order[:drawn] >= 0).all() and (order[drawn:] == -1).all()
    for start in range(0, drawn, 8):
        epoch = order[start : min(start + 8, drawn)]
        assert len(set(epoch.tolist())) == len(epoch)
        assert shuffle or epoch.tolist() == list(range(len(epoch)))
    for place in np.flatnonzero(ahead[-1].rows_B < 0):
        assert (ahead[-1].labels_BT[place] == -100).all() and not ahead[-1].ids_BT[place].any()
    assert list(read_ahead(source, len(source))) == []
    # An end changes nothing before it.
    endless = TrainingBatches(rows, 3, 5, shuffle)
    for s in range(drawn // 3):
        np.testing.assert_array_equal(ahead[s].ids_BT, endless[s].ids_BT)
