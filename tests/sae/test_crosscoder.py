"""Crosscoders against SAELens, pair of layers by pair of layers (tests/golden/make_sae.py)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import InputError
from sae import crosscoder
from sae.crosscoder import Crosscoder

GOLDEN = Path(__file__).parents[1] / "golden" / "sae" / "inference.npz"
CODER = Crosscoder(layers=3, width=12, features=48)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        start = "crosscoder/"
        return {n.removeprefix(start): jnp.asarray(file[n]) for n in file if n.startswith(start)}


@pytest.fixture(scope="module")
def params(golden):
    return {name: golden[name] for name in crosscoder.shapes(CODER)}


@pytest.mark.parametrize("skip", [False, True])
def test_as_saelens(skip, golden, params):
    if skip:
        params = params | {"W_skip": golden["W_skip"]}
    crosscoder.check(CODER, params, "golden")
    f = crosscoder.encode(params, golden["x"])
    np.testing.assert_array_equal(np.asarray(f) != 0, golden["acts"] != 0)
    assert np.abs(f - golden["acts"]).max() <= 2e-5 * max(1, np.abs(golden["acts"]).max())
    y, expected = crosscoder.decode(params, f, golden["x"]), golden["recon" + "_skip" * skip]
    assert np.abs(y - expected).max() <= 5e-5 * max(1, np.abs(expected).max())


def test_rows_do_not_know_of_each_other(golden, params, close):
    x = golden["x"]
    f = crosscoder.encode(params, x)
    y = crosscoder.decode(params, f, x)
    one = crosscoder.encode(params, x[1])
    close((one, crosscoder.decode(params, one, x[1])), (f[1], y[1]))
    tall = crosscoder.encode(params, x.reshape(2, 2, 3, 12))
    close(tall.reshape(f.shape), f)


def test_a_feature_at_its_threshold_is_off(golden, params):
    at = params | {"W_enc": np.zeros_like(params["W_enc"]), "b_enc": params["threshold"]}
    assert not crosscoder.encode(at, golden["x"]).any()
    above = at | {"b_enc": np.nextafter(params["threshold"], np.float32(2))}
    assert crosscoder.encode(above, golden["x"]).all()


def test_what_makes_no_crosscoder_is_refused(golden, params):
    bad = params | {"W_dec": np.swapaxes(params["W_dec"], 1, 2)}
    with pytest.raises(InputError, match=r"^here: W_dec is \[3, 3, 48, 12\], not \[3, 48, 3, 12\]"):
        crosscoder.check(CODER, bad, "here")
    with pytest.raises(InputError, match="^here: no tensor 'threshold'"):
        crosscoder.check(CODER, {n: v for n, v in params.items() if n != "threshold"}, "here")
    with pytest.raises(InputError, match=r"W_skip is \[12, 12\], not \[3, 12, 12\]"):
        crosscoder.check(CODER, params | {"W_skip": np.eye(12)}, "here")
    with pytest.raises(InputError, match=r"shape \[4, 2, 12\] do not end in .* 3 layers of width"):
        crosscoder.encode(params, golden["x"][:, :2])
