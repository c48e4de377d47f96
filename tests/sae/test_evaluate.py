"""The figures of an SAE against their formulas, and the model that runs on what it says."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import model, rundir, taps
from core.config import Execution
from core.errors import InputError
from core.rows import pad_batch
from core.taps import Tap
from sae import evaluate, metrics
from sae.coder import About, Coder, Sae, encode, reconstruct
from sae.metrics import Totals
from sae.places import places_of

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (9, 24, 5, 17, 24, 3)


def random_sae(coder: Coder, tap: str | None, tap_out: str | None = None, seed: int = 0) -> Sae:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (coder.d_in, coder.d_sae), "W_dec": (coder.d_sae, coder.d_out),
              "b_enc": (coder.d_sae,), "b_dec": (coder.d_out,)}  # fmt: skip
    params = {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in shapes.items()}
    return Sae(coder, params, About(tap, tap_out, None, "made up", "saelens", {}), "f" * 64)


def identity(width: int, tap: str) -> Sae:
    """Loses nothing: every feature is a direction or its opposite."""
    coder = Coder("standard", width, 2 * width, width)
    eye = np.eye(width, dtype=np.float32)
    both = np.concatenate([eye, -eye])
    zeros = {"b_enc": np.zeros(2 * width, np.float32), "b_dec": np.zeros(width, np.float32)}
    about = About(tap, None, None, "made up", "saelens", {})
    return Sae(coder, {"W_enc": both.T, "W_dec": both, **zeros}, about, "0" * 64)


@pytest.fixture(scope="module")
def rows(rows_of):
    return rows_of(LENGTHS)


def run_eval(folder, loaded, rows, sae, site=None, batch_tokens=64):
    places = places_of(sae, site, loaded.config)
    with rundir.open_run(folder, "sae eval", {"batch": batch_tokens}) as run:
        run.inputs()
        return evaluate.evaluate(run, loaded, rows, sae, places, Execution(), batch_tokens)


def read(loaded, rows, *wanted):
    ids_BT = jnp.asarray(pad_batch(rows, np.arange(len(rows)), 24).ids_BT)
    return taps.read(loaded.config, Execution(), loaded.variables, ids_BT, wanted)


def counted(rows, x_BTD):
    """The activations of tokens that count, [N,D]."""
    starts = (int(rows.ids(i)[0] == 0) for i in range(len(rows)))
    parts = [x_BTD[i, start : LENGTHS[i]] for i, start in enumerate(starts)]
    return np.concatenate(parts)


def test_figures_are_of_all_tokens_together(monkeypatch):
    """Against float64 sums over everything at once, whatever the pieces are."""
    coder = Coder("topk", 12, 40, 12, k=3)
    sae, rng = random_sae(coder, None), np.random.default_rng(1)
    x_ND = (rng.normal(size=(50, 12)) * 2 + 5).astype(np.float32)
    counts_N = rng.random(50) < 0.8
    monkeypatch.setattr(metrics, "TOKENS", 16)
    totals = Totals(40, 12)
    for part in (slice(0, 20), slice(20, 50)):
        found = metrics.figures(
            coder, sae.params, jnp.asarray(x_ND[part]), jnp.asarray(x_ND[part]),
            jnp.asarray(counts_N[part]),
        )  # fmt: skip
        totals.add(jax.device_get(found), counts_N[part])
    f_NF, y_ND = reconstruct(coder, sae.params, jnp.asarray(x_ND))
    x, y, f = (np.asarray(a, np.float64)[counts_N] for a in (x_ND, y_ND, f_NF))
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
    share_F = (f != 0).mean(0)
    expected = {
        "tokens": len(x),
        "explained_variance": 1 - ((x - y) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(),
        "mse": ((x - y) ** 2).sum(1).mean(),
        "cosine": ((x * y).sum(1) / norms[0] / norms[1]).mean(),
        "l2_ratio": (norms[1] / norms[0]).mean(),
        "relative_reconstruction_bias": (y**2).sum() / (x * y).sum(),
        "l0": (f != 0).sum(1).mean(),
        "l1": np.abs(f).sum(1).mean(),
        "features": 40,
        "dead": (share_F == 0).sum(),
        "dense_1": (share_F > 0.01).sum(),
        "dense_10": (share_F > 0.1).sum(),
    }
    found = totals.results()
    assert found.keys() == expected.keys() and 0 < found["dead"] < 40
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    np.testing.assert_allclose(totals.density_F, share_F)


@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.2", "attn_out.0"])
def test_what_loses_nothing_costs_nothing(loaded, rows, tmp_path, site):
    found = run_eval(tmp_path / "run", loaded, rows, identity(14, site))
    assert found["explained_variance"] == pytest.approx(1, abs=1e-6)
    assert found["ce_sae"] == pytest.approx(found["ce_clean"], abs=1e-5)
    assert found["kl_sae"] == pytest.approx(0, abs=1e-5)
    assert found["ce_score"] == pytest.approx(1, abs=1e-3) and found["kl_zero"] > 1e-3
    assert found["tokens"] == sum(LENGTHS) - 3


def test_losses_are_of_the_model_with_the_sae_in_it(loaded, rows, tmp_path):
    """Row by row, with numpy's softmax of spliced logits; the BOS keeps its activation."""
    config, tap = loaded.config, Tap("resid_post", 1)
    sae = random_sae(Coder("standard", 14, 30, 14), str(tap))
    batch = pad_batch(rows, np.arange(len(rows)), 24)
    ids_BT = jnp.asarray(batch.ids_BT)
    (x_BTD,) = taps.read(config, Execution(), loaded.variables, ids_BT, (tap,))
    y_BTD = np.array(reconstruct(sae.coder, sae.params, x_BTD)[1])
    y_BTD[::2, 0] = np.asarray(x_BTD)[::2, 0]
    logp = []
    for value in (x_BTD, jnp.asarray(y_BTD), jnp.zeros_like(x_BTD)):
        there = taps.spliced(config, loaded.variables, tap, value)
        z = np.asarray(model.logits(config, Execution(), there, ids_BT), np.float64)[:, :-1]
        logp.append(z - np.log(np.exp(z).sum(-1, keepdims=True)))
    real = batch.labels_BT[:, 1:] >= 0
    b, t = np.nonzero(real)
    nll = [-lp[b, t, batch.ids_BT[b, t + 1]] for lp in logp]
    kl = [(np.exp(logp[0]) * (logp[0] - other)).sum(-1)[real] for other in logp[1:]]
    mean = np.mean([*nll, *kl], axis=1)
    found = run_eval(tmp_path / "run", loaded, rows, sae)
    for name, value in zip(evaluate.LOSSES, mean, strict=True):
        assert found[name] == pytest.approx(value, abs=1e-5), name
    clean, told, zero = mean[:3]
    assert found["ce_score"] == pytest.approx((zero - told) / (zero - clean), rel=1e-3)


def test_a_transcoder_stands_for_what_it_writes(loaded, rows, tmp_path):
    coder = Coder("standard", 14, 30, 14, transcoder=True)
    sae = random_sae(coder, "mlp_in.1", "mlp_out.1")
    found = run_eval(tmp_path / "run", loaded, rows, sae)
    assert (found["reads"], found["writes"]) == ("mlp_in.1", "mlp_out.1")
    x, t = (counted(rows, x) for x in read(loaded, rows, Tap("mlp_in", 1), Tap("mlp_out", 1)))
    f, y = reconstruct(coder, sae.params, jnp.asarray(x))
    ev = 1 - ((t - y) ** 2).sum() / ((t - t.mean(0)) ** 2).sum()
    assert found["explained_variance"] == pytest.approx(float(ev), rel=1e-4)
    assert found["l0"] == pytest.approx(float((f != 0).sum(1).mean()), rel=1e-6)


def test_goes_on_where_it_was_killed(loaded, rows, tmp_path, monkeypatch):
    """Bit-identical results after an end in the middle, of other sums kept on the way."""
    sae = random_sae(Coder("topk", 14, 30, 14, k=4), "resid_post.0")
    monkeypatch.setattr(evaluate, "SAVE_EVERY", 1)
    whole = run_eval(tmp_path / "whole", loaded, rows, sae, batch_tokens=24)
    save, saved = evaluate._save, []

    def save_and_die(file, batches, *sums):
        save(file, batches, *sums)
        saved.append(batches)
        if batches == 2 and len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        run_eval(tmp_path / "killed", loaded, rows, sae, batch_tokens=24)
    assert run_eval(tmp_path / "killed", loaded, rows, sae, batch_tokens=24) == whole
    assert saved[2] == 3  # it did not begin anew
    for name in ("results.json", "density.npy"):
        again, once = (tmp_path / folder / name for folder in ("killed", "whole"))
        assert again.read_bytes() == once.read_bytes()


def test_density_is_the_share_of_tokens(loaded, rows, tmp_path):
    sae = random_sae(Coder("topk", 14, 30, 14, k=4), "embed")
    run_eval(tmp_path / "run", loaded, rows, sae)
    (x_BTD,) = read(loaded, rows, Tap("embed", -1))
    f_NF = np.asarray(encode(sae.coder, sae.params, jnp.asarray(counted(rows, x_BTD))))
    np.testing.assert_allclose(np.load(tmp_path / "run/density.npy"), (f_NF > 0).mean(0), rtol=1e-6)


def test_refusals(loaded, rows, tmp_path):
    config = loaded.config
    wide = random_sae(Coder("standard", 16, 30, 16), "resid_post.0")
    with pytest.raises(InputError, match="width 14, but the SAE made up reads 16"):
        places_of(wide, None, config)
    fits = random_sae(Coder("standard", 14, 30, 14), "resid_post.0")
    with pytest.raises(InputError, match="are of mlp_out.1, but .* on resid_post.0"):
        places_of(fits, "mlp_out.1", config)
    with pytest.raises(InputError, match="resid_post.7: the model has layers 0 to 2"):
        places_of(random_sae(fits.coder, "resid_post.7"), None, config)
    with pytest.raises(InputError, match="give --site"):
        places_of(random_sae(fits.coder, None), None, config)
    broken = loaded._replace(params=jax.tree.map(lambda x: x * np.nan, loaded.params))
    with pytest.raises(InputError, match=r"of row \d+, or of others in its batch, is not finite"):
        run_eval(tmp_path / "run", broken, rows, fits)
