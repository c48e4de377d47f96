"""Which tokens are served, once each and resumable at any batch; caches; bad values."""

import shutil

import jax
import numpy as np
import pytest

from core import families, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.memmap import FilledArray, checksum
from core.rows import Plan, load_rows, pad_batch, read_ahead, save_rows
from core.taps import Tap
from sae.activations import Reader, Shuffle, counted

BOS = 1
CONFIG = ModelConfig("gpt2", 32, 24, 8, 2, 2, 16, 4, bos=BOS)
EXECUTION = Execution(layers="scan")
WANTED = (Tap("resid_post", 1), Tap("mlp_in", 0))
SIZE = 7  # tokens of a training batch


@pytest.fixture(scope="module")
def loaded():
    return Loaded(CONFIG, schema.init(families.rows(CONFIG), CONFIG.layers, 0), None, "a model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Some rows begin with BOS, some hold it elsewhere, one is nothing else."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 32, n) for n in rng.integers(4, 25, 30)]
    for row in ids[::2]:
        row[0] = BOS
    save_rows(folder / "rows", [*ids, np.array([BOS, BOS])])
    return load_rows(folder / "rows", 32, 24)


@pytest.fixture(scope="module")
def reader(loaded, rows):
    return Reader(loaded, EXECUTION, rows, WANTED)


def shuffle(reader, batch_tokens=64, buffer=60, seed=0, cache=None):
    return Shuffle(reader, batch_tokens, buffer, seed, cache)


def served(found, count, start=0, size=SIZE):
    batches = found.batches(size, start)
    return [next(batches) for _ in range(count)]


def everything(reader):
    """Every counted token's activations in row order, from one batch of all rows."""
    batch = pad_batch(reader.rows, np.arange(len(reader.rows)), 24)
    mask_BT = (batch.labels_BT != -100) & ~((batch.ids_BT == BOS) & (np.arange(24) == 0))
    return [np.asarray(x)[mask_BT] for x in reader.compute(batch)]


@pytest.fixture(scope="module")
def whole(reader):
    return everything(reader)


def test_what_counts():
    ids_BT = np.array([[BOS, 5, BOS, 0], [5, 6, 0, 0], [0, 0, 0, 0]])
    lengths_B = np.array([4, 2, 0])
    mask_BT = counted(ids_BT, lengths_B, BOS)
    assert mask_BT.tolist() == [[False, True, True, True], [True, True, False, False], [False] * 4]
    assert counted(ids_BT, lengths_B, None).sum(1).tolist() == [4, 2, 0]


def test_streamed_tokens_are_those_of_one_batch(reader, whole, close):
    """Padding and batches change nothing but rounding."""
    plan, ends, seen = Plan(reader.rows, 64), np.cumsum(reader.counts), 0
    for batch, values, mask_BT in reader.stream(read_ahead(plan)):
        assert [x.shape for x in values] == [(*batch.ids_BT.shape, 8)] * 2
        for i in np.flatnonzero(mask_BT.any(1)):
            found = [x[i, mask_BT[i]] for x in values]
            end = ends[batch.rows_B[i]]
            close(found, [x[end - len(found[0]) : end] for x in whole])
            seen += len(found[0])
    assert seen == ends[-1] == len(whole[0])


def which(values_ND, whole):
    """Number of the first counted token with these activations; some rows begin alike."""
    same = np.abs(values_ND[:, None] - whole[0][None]).max(-1) < 1e-5
    assert same.any(1).all()
    return same.argmax(1)


@pytest.mark.parametrize(("batch_tokens", "buffer"), [(64, 60), (400, 10**6)])
def test_every_token_once_an_epoch(reader, whole, close, batch_tokens, buffer):
    """Whatever is read at once; epochs lie end to end, and each has another order."""
    source, total = shuffle(reader, batch_tokens, buffer), len(whole[0])
    assert source.tokens == total
    first, second = (np.concatenate(x) for x in zip(*served(source, 125), strict=True))
    order = which(first, whole)
    close(second, whole[1][order])
    epochs = [order[:total], order[total : 2 * total]]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.sort(which(whole[0], whole)))
    assert (epochs[0] != epochs[1]).mean() > 0.9 and (np.diff(epochs[0]) != 1).mean() > 0.9


@pytest.mark.parametrize(("size", "starts"), [(SIZE, (1, 8, 9, 40, 61, 89)), (1000, (1, 2))])
def test_any_batch_can_be_the_first(reader, size, starts):
    """A batch may span chunks, and epochs."""
    first = served(shuffle(reader), 90 * SIZE // size + 3, size=size)
    for start in starts:
        again = served(shuffle(reader), len(first) - start, start, size)
        np.testing.assert_array_equal(again, first[start:])
    assert not np.array_equal(served(shuffle(reader, seed=1), 1, size=size), first[:1])


def test_a_cache_gives_the_same_bits(reader, tmp_path):
    """Also one that was killed while it was filled; a second use computes nothing."""
    direct = served(shuffle(reader), 80)
    np.testing.assert_array_equal(served(shuffle(reader, cache=tmp_path / "a"), 80), direct)
    again = shuffle(reader, cache=tmp_path / "a")
    again.reader.__dict__["compute"] = None
    try:
        np.testing.assert_array_equal(served(again, 80), direct)
    finally:
        del again.reader.__dict__["compute"]
    array = np.load(tmp_path / "a" / "resid_post.1.npy")
    assert array.shape == (again.tokens, 8) and array.dtype == np.float32


def test_a_cache_is_in_row_order(reader, whole, tmp_path, close):
    shuffle(reader, cache=tmp_path / "a")
    close([np.load(tmp_path / "a" / f"{tap}.npy") for tap in WANTED], whole)


def test_a_bfloat16_cache_gives_the_same_bits(loaded, rows, tmp_path):
    reader = Reader(loaded, Execution("bfloat16", "scan"), rows, WANTED[:1])
    (direct,) = served(shuffle(reader), 1)
    (found,) = served(shuffle(reader, cache=tmp_path / "a"), 1)
    assert found[0].dtype == direct[0].dtype == jax.numpy.bfloat16
    np.testing.assert_array_equal(found[0].view(np.uint16), direct[0].view(np.uint16))


class Killed(BaseException):
    pass


def test_a_cache_is_filled_from_where_it_stopped(reader, tmp_path, monkeypatch):
    write, calls = FilledArray.write, []

    def until(self, rows_B, values):
        calls.append(self.path.stem)
        if len(calls) == 6:
            raise Killed
        write(self, rows_B, values)
        self.flush()

    monkeypatch.setattr(FilledArray, "write", until)
    with pytest.raises(Killed):
        shuffle(reader, cache=tmp_path / "a")
    source = shuffle(reader, cache=tmp_path / "a").source
    assert len(calls) - 6 == 2 * (len(source) - 2)  # the third batch was half written
    shuffle(reader, cache=tmp_path / "b")
    for tap in WANTED:
        one, other = (checksum(tmp_path / name / f"{tap}.npy") for name in "ab")
        assert one == other is not None


def test_another_cache_is_refused(loaded, reader, rows, tmp_path):
    shuffle(reader, cache=tmp_path / "a")
    others = {
        "model": Reader(loaded._replace(fingerprint="other"), EXECUTION, rows, WANTED),
        "rows": Reader(loaded, EXECUTION, rows.take(range(9)), WANTED),
        "sites": Reader(loaded, EXECUTION, rows, WANTED[:1]),
        "dtype": Reader(loaded, Execution("bfloat16", "scan"), rows, WANTED),
    }
    for key, other in others.items():
        with pytest.raises(InputError, match=f"holds activations of {key} .* --cache"):
            shuffle(other, cache=tmp_path / "a")
    with pytest.raises(InputError, match="batch_tokens 64, now it is 32"):
        shuffle(reader, 32, cache=tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").touch()
    with pytest.raises(InputError, match="b is no cache"):
        shuffle(reader, cache=tmp_path / "b")


def test_a_full_disk_is_named_before_any_work(reader, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=2**24))
    with pytest.raises(InputError, match="free some"):
        shuffle(reader, cache=tmp_path / "a")
    assert not [*(tmp_path / "a").iterdir()]


def broken(loaded, rows, ids):
    """A model whose embedding of some tokens is infinite."""
    wte = np.array(loaded.params["embed"]["wte"])
    wte[ids] = np.inf
    embed = {**loaded.params["embed"], "wte": wte}
    return Reader(loaded._replace(params={**loaded.params, "embed": embed}), EXECUTION, rows,
                  (Tap("embed", -1),))  # fmt: skip


def test_bad_values_are_left_out_and_counted_once(loaded, rows):
    """Also by a run that is stopped within a chunk, keeps the count and goes on."""
    bad = sum(int((rows.ids(i) == 7).sum()) for i in range(len(rows)))
    source = shuffle(broken(loaded, rows, [7]))
    steps = source.tokens // SIZE
    batches = served(source, steps)
    assert bad > 0 and np.isfinite(batches).all() and source.skipped == bad
    before, after = (shuffle(broken(loaded, rows, [7])) for _ in range(2))
    served(before, 20)
    assert 0 < before.skipped < bad
    after.skipped = before.skipped
    np.testing.assert_array_equal(served(after, steps - 20, 20), batches[20:])
    assert after.skipped == bad


def test_nothing_but_bad_values_is_refused(loaded, rows):
    with pytest.raises(InputError, match=r"none of \d+ tokens .* finite activations at embed"):
        served(shuffle(broken(loaded, rows, slice(None))), 1)
