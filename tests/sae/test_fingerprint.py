"""A folder of fingerprints: right by rows read alone, resumable, checked on both ends."""

import dataclasses
import json
import re
import shutil
import threading

import jax
import numpy as np
import pytest

from core import distributed, families, schema, taps
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.memmap import FilledArray
from core.rows import Plan, load_rows, save_rows
from core.rundir import open_run
from sae import coder, fingerprint, pooling
from sae.coder import About, Coder, Sae
from sae.fingerprint import Settings, read_fingerprints
from sae.places import places_of
from sae.pooling import STATISTICS, Spec

BOS, D, F, N = 1, 8, 24, 18
CONFIG = ModelConfig("gpt2", 32, 24, D, 3, 2, 16, 4, bos=BOS, init_std=0.3)
EXECUTION = Execution(layers="scan")
TAP = taps.Tap("resid_post", 1)
SETTINGS = Settings(k=12, token_k=3, batch_tokens=64)
CODER = Coder("jumprelu", D, F, D)


def make_sae(width: int = D, tap: str | None = str(TAP)) -> Sae:
    rng = np.random.default_rng(3)
    params = {
        "W_enc": rng.normal(size=(width, F)), "b_enc": rng.normal(size=F),
        "W_dec": rng.normal(size=(F, width)), "b_dec": np.zeros(width),
        "threshold": rng.uniform(0.5, 3, F),
    }  # fmt: skip
    params = {name: value.astype(np.float32) for name, value in params.items()}
    described = dataclasses.replace(CODER, d_in=width, d_out=width)
    about = About(tap, tap, None, "an SAE", "saelens", {})
    return Sae(described, params, about, coder.fingerprint(described, params))


SAE = make_sae()


@pytest.fixture(scope="module")
def loaded():
    return Loaded(CONFIG, schema.init(families.rows(CONFIG), CONFIG.layers, 0), None, "a model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Every second row begins with BOS; in one it comes twice, and counts the second time."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    ids = [rng.integers(2, 32, n) for n in [*rng.integers(4, 25, N - 1), 2]]
    for row in ids[1::2]:
        row[0] = BOS
    ids[-1][:] = BOS
    save_rows(folder / "rows", ids, tokenizer="a tokenizer")
    return load_rows(folder / "rows", 32, 24)


def make(folder, loaded, rows, settings=SETTINGS, sae=SAE):
    with open_run(folder, "sae fingerprint", {}) as run:
        summary = fingerprint.fingerprint(run, loaded, rows, sae, TAP, settings, EXECUTION)
        run.finish()
    return summary


@pytest.fixture(scope="module")
def made(loaded, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "out"
    return folder, make(folder, loaded, rows)


def arrays(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


def test_every_row_is_what_it_is_alone(loaded, rows, made, close):
    """In no batch of other rows, with another padding."""
    folder, summary = made
    found = read_fingerprints(folder)
    variables, spec = {"params": loaded.params}, Spec(CODER, 12, 3)
    alone = jax.jit(lambda x_BTD, mask_BT: pooling.pool(spec, SAE.params, x_BTD, mask_BT))
    read = jax.jit(lambda ids_BT: taps.read(CONFIG, EXECUTION, variables, ids_BT, (TAP,))[0])
    begins = np.array([rows.ids(i)[0] == BOS for i in range(N)])
    lengths_N = rows.lengths - begins
    assert found.tokens is not None and len(found) == N
    np.testing.assert_array_equal(found.lengths_N, lengths_N)
    assert found.info["rows"] == {"path": str(rows.path), "sha": rows.sha, "count": N}
    for i in range(N):
        wide_1T = np.pad(rows.ids(i), (0, 24 - rows.lengths[i]))[None]  # one shape for all
        mask_1T = np.arange(24)[None] < rows.lengths[i]
        mask_1T[0, 0] &= not begins[i]
        expected = jax.device_get(alone(read(wide_1T), mask_1T))
        for of in ("mean", "max"):
            np.testing.assert_array_equal(found.index[of][i], expected[f"{of}_index"][0])
            close(found.value[of][i], expected[f"{of}_value"][0])
        close(found.statistics_NS[i], expected["statistics"][0])
        close(found.hidden_mean_ND[i], expected["hidden_mean"][0])
        part = slice(*found.tokens.offsets_N[i : i + 2])
        np.testing.assert_array_equal(found.tokens.index_MJ[part], expected["token_index"][mask_1T])
        close(found.tokens.value_MJ[part], expected["token_value"][mask_1T])
    assert 1 < found.statistics_NS[:, STATISTICS.index("l0_mean")].mean() < F / 2
    assert summary["rows"] == N and summary["tokens"] == lengths_N.sum()
    assert 0.9 < summary["kept"] <= 1 + 1e-6
    l0_N = found.statistics_NS[:, STATISTICS.index("l0_mean")]
    assert summary["l0"] == pytest.approx(l0_N @ lengths_N / lengths_N.sum())


@pytest.mark.parametrize("writes", [1, 15, 26])
def test_a_killed_run_goes_on_to_the_same_bytes(loaded, rows, made, tmp_path, monkeypatch, writes):
    """The kill comes between two arrays of a batch; what was flushed stands, the rest is redone."""
    write, left = FilledArray.write, [writes]

    def until(self, rows_B, values):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        write(self, rows_B, values)
        self.flush()

    monkeypatch.setattr(FilledArray, "write", until)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out", loaded, rows)
    with pytest.raises(InputError, match="no finished fingerprints"):
        read_fingerprints(tmp_path / "out")
    left[0] = 10_000
    assert make(tmp_path / "out", loaded, rows) == made[1]
    again = len(Plan(rows, 64)) - writes // 8  # batches that not all eight arrays had
    assert again >= 2 and 10_000 - left[0] == 8 * again
    assert arrays(tmp_path / "out") == arrays(made[0])


def test_two_processes_make_what_one_makes(loaded, rows, made, tmp_path, monkeypatch, close):
    """Their batches differ, so float32's tolerance."""
    here = threading.local()
    monkeypatch.setattr(distributed, "place", lambda: (getattr(here, "number", 0), 2))
    monkeypatch.setattr(distributed, "session", lambda: "together")
    plain = dataclasses.replace(SETTINGS, token_k=0)
    found = {}

    def process(number):
        here.number = number
        found[number] = make(tmp_path / "out", loaded, rows, plain)

    threads = [threading.Thread(target=process, args=[number]) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] and found[0] == pytest.approx(made[1])
    both, one = read_fingerprints(tmp_path / "out"), read_fingerprints(made[0])
    assert both.tokens is None and both.info["pooling"] == ["mean", "max"]
    for of in ("mean", "max"):
        np.testing.assert_array_equal(both.index[of], one.index[of])
        close(both.value[of], one.value[of])
    close(both.hidden_mean_ND, one.hidden_mean_ND)
    with pytest.raises(InputError, match="--token-k works in one process"):
        make(tmp_path / "other", loaded, rows)
    assert not (tmp_path / "other").exists()


def test_what_does_not_fit_is_refused_before_work(loaded, rows, tmp_path):
    assert places_of(SAE, None, loaded.config).reads == TAP
    assert places_of(make_sae(tap=None), "mlp_out.2", loaded.config).reads == taps.Tap("mlp_out", 2)
    for sae, name, wanted in (
        (SAE, "resid_post.2", "are of resid_post.2, but .* was trained on resid_post.1"),
        (make_sae(D + 2), None, f"width {D}, but the SAE an SAE reads {D + 2}"),
        (make_sae(tap=None), None, "does not say which activation it reads; give --site"),
        (make_sae(tap="resid_post.7"), None, "the model has layers 0 to 2"),
    ):
        with pytest.raises(InputError, match=wanted):
            places_of(sae, name, loaded.config)
    for settings, wanted in (
        (Settings(k=F + 1), "--k 25 is more than the 24 features"),
        (Settings(k=2, token_k=F + 1), "--token-k 25 is more than the 24 features"),
    ):
        with pytest.raises(InputError, match=wanted):
            make(tmp_path / "out", loaded, rows, settings)
    assert not (tmp_path / "out").exists()


def test_another_sae_does_not_go_on(loaded, rows, made):
    other = SAE._replace(fingerprint="another")
    with pytest.raises(InputError, match="input sae="):
        make(made[0], loaded, rows, sae=other)


def test_activations_that_are_not_finite_are_named_by_row(loaded, rows, tmp_path):
    params = jax.tree.map(np.array, loaded.params)
    params["embed"]["wte"][5] = np.inf
    with pytest.raises(InputError, match="activations or features that are not finite") as error:
        make(tmp_path / "out", loaded._replace(params=params), rows)
    number = re.search(r"rows row (\d+) has", str(error.value))
    assert number and 5 in rows.ids(int(number[1]))
    broken = loaded._replace(params=jax.tree.map(lambda x: np.full_like(x, np.nan), params))
    with pytest.raises(InputError, match="not finite"):
        make(tmp_path / "broken", broken, rows)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("what", ["format", "key", "count", "index", "shape", "missing", "offsets"])
def test_a_damaged_folder_is_refused(made, tmp_path, what):
    folder = tmp_path / "out"
    shutil.copytree(made[0], folder)
    info = json.loads((folder / "info.json").read_text())
    if what == "format":
        info["format"] = "taproot-scores"
    elif what == "key":
        del info["sae"]
    elif what == "count":
        info["rows"]["count"] += 1
    elif what == "index":
        index = np.load(folder / "max_index.npy")
        index[3, 2] = F
        np.save(folder / "max_index.npy", index)
    elif what == "shape":
        np.save(folder / "statistics.npy", np.zeros((N, 9), np.float32))
    elif what == "offsets":
        np.save(folder / "lengths.npy", np.load(folder / "lengths.npy") + 1)
    else:
        (folder / "mean_value.npy").unlink()
    (folder / "info.json").write_text(json.dumps(info))
    with pytest.raises(InputError, match="not describe|not fit|cannot be opened|does not exist"):
        read_fingerprints(folder)
