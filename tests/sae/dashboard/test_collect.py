"""What is collected of features, against one array of all of them, and what they write."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import model, rundir, taps
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError
from core.rows import pad_batch
from core.taps import Tap
from sae.coder import About, Coder, Sae, encode
from sae.dashboard import build, collect, decoder
from sae.dashboard.build import Settings
from sae.dashboard.collect import AROUND, BINS, KEPT, LEVELS, OTHERS, TOP, Collector
from sae.dashboard.view import DENSE
from sae.predict.classifier import Classifier
from sae.predict.predictors import Linear

GOLDEN = Path(__file__).parents[2] / "golden"
LENGTHS = [5, 24, 3, 17, 20, 9, 24, 12] * 8
TAP, F = Tap("resid_post", 1), 40


@pytest.fixture(scope="module")
def rows(rows_of):
    return rows_of(LENGTHS)


def sae_of(coder: Coder, tap: str | None = str(TAP), tap_out: str | None = None) -> Sae:
    rng = np.random.default_rng(1)
    shapes = {"W_enc": (coder.d_in, coder.d_sae), "W_dec": (coder.d_sae, coder.d_out),
              "b_enc": (coder.d_sae,), "b_dec": (coder.d_out,)}  # fmt: skip
    params = {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}
    params["b_enc"][-1] = -1e4  # never active
    return Sae(coder, params, About(tap, tap_out, "tiny", "made up", "saelens", {}), "f" * 64)


@pytest.fixture(scope="module")
def sae():
    return sae_of(Coder("topk", 14, F, 14, k=6))


@pytest.fixture(scope="module")
def truth(loaded, rows, sae):
    """Features [R,T,F] of all rows, NaN where a token does not count."""
    ids_BT = jnp.asarray(pad_batch(rows, np.arange(len(rows)), 24).ids_BT)
    (x_BTD,) = taps.read(loaded.config, Execution(), loaded.variables, ids_BT, (TAP,))
    f_BTF = np.array(encode(sae.coder, sae.params, x_BTD))
    counts = np.arange(24) < rows.lengths[:, None]
    counts[::2, 0] = False
    return np.where(counts[:, :, None], f_BTF, np.nan)


def collector(folder, loaded, rows, sae, batch_tokens=128):
    folder.mkdir(exist_ok=True)
    return Collector(folder, loaded, rows, sae, TAP, Execution(), batch_tokens)


def test_activity(loaded, rows, sae, truth, tmp_path, monkeypatch):
    """Whatever the pieces that tokens are encoded in."""
    monkeypatch.setattr(collect, "NUMBERS", F * 128)  # 128 tokens at once
    found = collector(tmp_path, loaded, rows, sae, 1000).activity()
    assert found.tokens == np.isfinite(truth[:, :, 0]).sum() == sum(LENGTHS) - len(LENGTHS) // 2
    np.testing.assert_array_equal(found.active_F, (truth > 0).sum((0, 1)))
    np.testing.assert_allclose(found.max_F, np.nanmax(truth, (0, 1)), rtol=1e-5)
    np.testing.assert_allclose(found.total_F, np.nansum(truth, (0, 1)), rtol=1e-5)
    mean_F = np.nansum(truth, (0, 1)) / np.maximum((truth > 0).sum((0, 1)), 1)
    np.testing.assert_allclose(found.mean_F, mean_F, rtol=1e-5)
    assert found.density_F[-1] == found.mean_F[-1] == 0


def test_features_of_a_batch_never_exist_at_once(loaded, sae, monkeypatch):
    monkeypatch.setattr(collect, "NUMBERS", F * 128)
    args = (loaded.config, Execution(), TAP, sae.coder, loaded.variables, dict(sae.params),
            jnp.zeros((40, 24), jnp.int32), jnp.ones((40, 24), bool))  # fmt: skip
    more = jnp.zeros(3, jnp.int32), jnp.ones(3)
    for program, given in ((collect.activity, args), (collect.strongest, (*args, *more))):
        text = str(jax.make_jaxpr(program, static_argnums=range(4))(*given))
        shapes = re.findall(rf"\[([\d,]+),{F}\]", text)
        assert max(np.prod([*map(int, shape.split(","))]) for shape in shapes) == 128


def test_features_of_either_sign_count_by_size(sae):
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 14)).astype(np.float32))
    counted_BT = jnp.asarray(np.arange(5) < np.array([[5], [2]]))
    coder = dataclasses.replace(sae.coder, architecture="abstopk")
    _, f_PCF = collect.over_tokens(
        coder, sae.params, x_BTD, counted_BT, lambda carry, f_CF: (carry, f_CF), 0
    )
    expected = np.abs(np.asarray(encode(coder, sae.params, x_BTD)))
    expected[1, 2:] = 0
    np.testing.assert_allclose(f_PCF.reshape(-1, F)[:10], expected.reshape(10, F), rtol=1e-6)
    assert ((expected > 0).sum(2) == 6).sum() == 7


@pytest.fixture(scope="module")
def found(loaded, rows, sae, truth, tmp_path_factory):
    chosen_N = np.flatnonzero((truth > 0).any((0, 1)))[::3]
    made = collector(tmp_path_factory.mktemp("found"), loaded, rows, sae)
    return made.contexts(chosen_N, np.nanmax(truth, (0, 1)))


def test_histograms(found, truth):
    top_F = np.nanmax(truth, (0, 1))
    for feature, counts in zip(found.chosen_N, found.histogram_NH, strict=True):
        values = truth[:, :, feature][truth[:, :, feature] > 0]
        assert counts.sum() == len(values)
        expected = np.histogram(values, BINS, (0, top_F[feature]))[0]
        assert np.abs(counts - expected).sum() <= 2  # the edge of a bin, rounded otherwise
        assert counts[-1] >= 1


def test_contexts_are_the_strongest_rows_and_some_of_lower_levels(found, truth, rows):
    assert found.row_NK.shape == (len(found.chosen_N), KEPT)
    several = 0
    for n, feature in enumerate(found.chosen_N):
        best_R = np.nan_to_num(truth[:, :, feature]).max(1)
        order = np.argsort(-best_R, kind="stable")[: min(TOP, (best_R > 0).sum())].tolist()
        assert found.row_NK[n, : len(order)].tolist() == order
        level_R = np.minimum(best_R * LEVELS / best_R.max(), LEVELS - 1).astype(int)
        for shelf in range(LEVELS - 1):
            start = TOP + OTHERS * shelf
            rest = found.row_NK[n, start : start + OTHERS]
            rest = rest[rest >= 0]
            several += len(rest)
            assert len(set(rest.tolist())) == len(rest) and not set(rest.tolist()) & {*order}
            assert (level_R[rest] == LEVELS - 2 - shelf).all()
        for k in np.flatnonzero(found.row_NK[n] >= 0).tolist():
            row = found.row_NK[n, k]
            place = int(np.nan_to_num(truth[row, :, feature]).argmax())
            assert found.place_NK[n, k] == place
            at = np.arange(place - AROUND, place + AROUND + 1)
            inside = (at >= 0) & (at < rows.lengths[row])
            expected = np.where(inside, truth[row, at.clip(0, 23), feature], np.nan)
            np.testing.assert_allclose(found.value_NKW[n, k], expected, rtol=1e-5, atol=1e-6)
            ids = np.where(inside, rows.ids(int(row))[at.clip(0, rows.lengths[row] - 1)], -1)
            np.testing.assert_array_equal(found.id_NKW[n, k], ids)
    assert several > 10
    assert np.isnan(found.value_NKW[found.id_NKW == 0]).any()  # a BOS was met


def test_batches_do_not_matter(loaded, rows, sae, found, truth, tmp_path, close):
    one = collector(tmp_path, loaded, rows, sae, 4096)
    again = one.contexts(found.chosen_N, np.nanmax(truth, (0, 1)))
    for name in ("row_NK", "place_NK", "id_NKW", "histogram_NH"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    close(np.nan_to_num(again.value_NKW), np.nan_to_num(found.value_NKW))


def test_equal_rows_go_by_number():
    n, rows = 1, np.array([[9], [4], [-1], [7]])
    state = {"row": np.full((KEPT, n), -1), "place": np.zeros((KEPT, n), np.int32),
             "window": np.zeros((KEPT, n, 2 * AROUND + 1), np.float32)}  # fmt: skip
    window = np.ones((4, n, 2 * AROUND + 1), np.float32)
    places = np.zeros((4, n), np.int32)
    state |= collect.kept(state, rows, places, window, np.arange(10), np.ones(n))
    assert state["row"][:4, 0].tolist() == [4, 7, 9, -1]
    state |= collect.kept(state, rows[:1] * 0 + 5, places[:1], window[:1], np.arange(10),
                          np.ones(n))  # fmt: skip
    assert state["row"][:5, 0].tolist() == [4, 5, 7, 9, -1]
    assert (state["row"][TOP:] == -1).all()


@pytest.mark.parametrize("golden", ["gpt2_tiny", "gpt2_tiny_untied", "gemma3_tiny"])
def test_effects_are_the_head_times_the_gained_direction(golden, monkeypatch):
    monkeypatch.setattr(decoder, "VOCABULARY", 24)
    monkeypatch.setattr(decoder, "NUMBERS", 24 * 7)
    loaded = load_model(GOLDEN / golden)
    params = loaded.variables["params"]
    direction_KD = np.random.default_rng(0).normal(size=(20, loaded.config.width))
    direction_KD = direction_KD.astype(np.float32)
    found = decoder.effects(loaded, Tap("resid_post", 0), direction_KD)
    gain = np.asarray(params["final_norm"]["g"], np.float64) + ("gemma" in golden)
    head_VD = np.asarray(model.head(loaded.config, params), np.float64)
    z_KV = (direction_KD * gain) @ head_VD.T
    assert found is not None
    for ids, values, sign in ((found.up_id, found.up, 1), (found.down_id, found.down, -1)):
        np.testing.assert_allclose(values, np.take_along_axis(z_KV, ids, 1), rtol=1e-4, atol=1e-6)
        expected = -sign * np.sort(-sign * z_KV, 1)[:, : decoder.ENDS]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    assert decoder.effects(loaded, Tap("attn_out", 0), direction_KD) is None


def test_neighbours(monkeypatch):
    monkeypatch.setattr(decoder, "NUMBERS", 30 * 4)
    direction_FD = np.random.default_rng(0).normal(size=(30, 6)).astype(np.float32)
    direction_FD[3] = 0
    direction_FD[7] = 5 * direction_FD[2]
    asked = np.array([2, 3, 11, 12, 29])
    near, cosine = decoder.neighbours(direction_FD, asked)
    assert near[0, 0] == 7 and cosine[0, 0] == pytest.approx(1, abs=1e-6)
    unit = direction_FD / np.maximum(np.linalg.norm(direction_FD, axis=1, keepdims=True), 1e-9)
    all_KF = unit[asked] @ unit.T
    all_KF[np.arange(5), asked] = -np.inf
    np.testing.assert_allclose(cosine, -np.sort(-all_KF, 1)[:, : decoder.NEAREST], atol=1e-6)
    assert not (near == asked[:, None]).any()


def test_directions_are_of_one_unit_of_the_feature():
    coder = Coder("topk", 14, F, 14, k=6, rescale=True)
    norms = np.linalg.norm(decoder.directions(sae_of(coder)), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)


FEW = Settings(features=8, batch_tokens=128)


def make(folder, loaded, rows, sae, settings=FEW, **more):
    with rundir.open_run(folder, "sae dashboard", {"out": str(folder)}) as run:
        return build.dashboard(run, loaded, rows, sae, TAP, None, settings, Execution(), **more)


def classifier_of(weight_F, **needs):
    about = {"needs": needs, "sha256": "c" * 64, "linear": "mean"}
    return Classifier(about, Linear(weight_F, 0.0), np.ones(F))


def test_goes_on_where_it_was_killed(loaded, rows, sae, tmp_path, monkeypatch):
    """Bit-identical page and numbers after ends in the middle of either pass."""
    monkeypatch.setattr(collect, "SAVE_EVERY", 1)
    whole = make(tmp_path / "whole", loaded, rows, sae)
    opened, writes = collect.atomic, []

    def die_after(limit):
        def atomic(file):
            if len(writes) == limit:
                raise KeyboardInterrupt
            writes.append(file.name)
            return opened(file)

        return atomic

    for limit in (2, 9, 14):
        monkeypatch.setattr(collect, "atomic", die_after(limit))
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "killed", loaded, rows, sae)
    monkeypatch.setattr(collect, "atomic", opened)
    assert make(tmp_path / "killed", loaded, rows, sae) == whole
    assert {*writes} == {"activity.npz", "contexts.npz"}
    for name in (build.PAGE, build.FEATURES):
        again, once = (tmp_path / folder / name for folder in ("killed", "whole"))
        assert again.read_bytes() == once.read_bytes()


def test_the_interesting_features(loaded, rows, sae, truth, tmp_path):
    """By weight with a classifier, else by maximum among those not dense; none that is dead."""
    density_F = (truth > 0).sum((0, 1)) / np.isfinite(truth[:, :, 0]).sum()
    top_F = np.nanmax(truth, (0, 1))
    rare = [f for f in np.argsort(-top_F, kind="stable").tolist() if 0 < density_F[f] < DENSE]
    assert len(rare) > 8 > 0 and density_F.max() > DENSE
    settings = Settings(features=8, also=(F - 1, rare[-1]), batch_tokens=128)
    summary = make(tmp_path / "plain", loaded, rows, sae, settings)
    numbers = np.load(tmp_path / "plain" / build.FEATURES)
    assert numbers["shown"].tolist() == sorted({*rare[:8], rare[-1]})
    assert summary["dead"] == (density_F == 0).sum() and summary["shown"] == 9
    assert "weight" not in numbers
    weight_F = np.zeros(F)
    weight_F[[3, 5, 9, F - 1]] = 1.0, -2.0, 0.5, 9.0
    made = classifier_of(weight_F, sae=sae.fingerprint, tap=str(TAP), exclude=["padding"])
    make(tmp_path / "told", loaded, rows, sae, Settings(2, batch_tokens=128), classifier=made)
    numbers = np.load(tmp_path / "told" / build.FEATURES)
    assert numbers["shown"].tolist() == [3, 5]
    np.testing.assert_array_equal(numbers["weight"], weight_F)


def test_an_sae_that_is_dead_has_a_page(loaded, rows, tmp_path):
    sae = sae_of(Coder("standard", 14, F, 14))
    sae.params["b_enc"][:] = -1e4
    summary = make(tmp_path / "run", loaded, rows, sae)
    assert (summary["dead"], summary["shown"]) == (F, 0)
    assert (tmp_path / "run" / build.PAGE).stat().st_size == summary["bytes"]


def test_refusals(loaded, rows, sae, tmp_path):
    with pytest.raises(InputError, match="--feature 40: made up has features 0 to 39"):
        make(tmp_path / "a", loaded, rows, sae, Settings(also=(40,)))
    with pytest.raises(InputError, match="made up has sae fffffff"):
        other = classifier_of(np.zeros(F), sae="0" * 64)
        make(tmp_path / "b", loaded, rows, sae, classifier=other)
    broken = loaded._replace(params=jax.tree.map(lambda x: x * np.nan, loaded.params))
    with pytest.raises(InputError, match="features of row .* are not finite"):
        make(tmp_path / "c", broken, rows, sae)
    with pytest.raises(InputError, match="width 14, but the SAE made up reads 12"):
        make(tmp_path / "d", loaded, rows, sae_of(Coder("standard", 12, F, 12)))
    assert not any((tmp_path / name).exists() for name in "abd")
