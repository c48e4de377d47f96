"""All families against transformers: logits, token losses, every parameter's gradient, bfloat16.

The expected numbers are made by tests/golden/make_families.py.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import attention, families, files, model
from core.config import Execution
from core.hf import convert

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = (
    "gpt2_tiny", "gpt2_tiny_untied", "gemma3_tiny", "gemma3_tiny_mqa", "neox_tiny",
    "neox_tiny_sequential",
)  # fmt: skip
TOLERANCE = 1e-5  # of the largest entry of what is compared


@pytest.fixture(scope="module", params=FOLDERS)
def golden(request):
    """(config, params, expected arrays, transformers' own errors in bfloat16)."""
    folder = GOLDEN / request.param
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        return *convert.import_hf(folder), dict(file), files.read_json(folder / "bfloat16.json")


def relative(found, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def real(expected) -> np.ndarray:
    """[B,T]: what is not padding."""
    return np.arange(expected["ids"].shape[1])[None] < expected["lengths"][:, None]


@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_logits(golden, layers):
    config, params, expected, _ = golden
    forward = jax.jit(functools.partial(model.logits, config, Execution(layers=layers)))
    found_BTV = np.asarray(forward({"params": params}, jnp.asarray(expected["ids"])))
    found_NV, expected_NV = found_BTV[real(expected)], expected["logits"][real(expected)]
    assert relative(found_NV, expected_NV) <= TOLERANCE
    assert (found_NV.argmax(-1) == expected_NV.argmax(-1)).all()


def plain(config, execution, params, ids_BT, labels_BT):
    losses_BT = model.token_losses(config, execution, {"params": params}, ids_BT, labels_BT)
    return losses_BT.sum(), losses_BT


def weighted(config, execution, params, ids_BT, labels_BT):
    ones_BT = jnp.ones(ids_BT.shape)
    return model.weighted_loss(config, execution, {"params": params}, ids_BT, labels_BT, ones_BT)


# Every pair of choices occurs; all combinations would compile for minutes.
ROUTES = {
    "plain, unrolled": (plain, Execution(layers="unrolled")),
    "plain, scan, remat, chunks": (plain, Execution(layers="scan", remat=True, loss_chunk=16)),
    "weighted, unrolled, remat": (weighted, Execution(layers="unrolled", remat=True)),
    "weighted, scan, chunks": (weighted, Execution(layers="scan", loss_chunk=16)),
}


@pytest.mark.parametrize("route,execution", ROUTES.values(), ids=ROUTES.keys())
def test_losses_and_gradients(golden, route, execution):
    config, params, expected, _ = golden
    loss = functools.partial(route, config, execution)
    ids_BT, labels_BT = jnp.asarray(expected["ids"]), jnp.asarray(expected["labels"])
    derive = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, losses_BT), gradients = derive(params, ids_BT, labels_BT)
    assert relative(losses_BT, expected["losses"]) <= TOLERANCE
    assert (np.asarray(losses_BT)[expected["losses"] == 0] == 0).all()
    np.testing.assert_allclose(total, expected["losses"].sum(), rtol=TOLERANCE)
    named = {name: slot.view(gradients) for name, slot in convert.slots(config).items()}
    wanted = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    assert named.keys() == wanted.keys()
    errors = {name: relative(named[name], value) for name, value in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"


def test_bfloat16_is_as_close_as_that_of_transformers(golden):
    """Rounding is not reproducible, its size is: mean |bfloat16 - float32| of logits and losses."""
    config, params, expected, theirs = golden
    execution = Execution("bfloat16", layers="scan")

    @jax.jit
    def forward(params, ids_BT, labels_BT):
        return {
            "logits": model.logits(config, execution, {"params": params}, ids_BT),
            "losses": plain(config, execution, params, ids_BT, labels_BT)[1],
        }

    ours = forward(params, jnp.asarray(expected["ids"]), jnp.asarray(expected["labels"]))
    places = {"logits": real(expected), "losses": expected["losses"] != 0}
    for name, place_BT in places.items():
        error = np.abs(np.asarray(ours[name]) - expected[name])[place_BT].mean()
        # Far below would mean that nothing was computed in bfloat16.
        assert 0.2 * theirs[name] < error < 1.5 * theirs[name], (name, error, theirs[name])


@pytest.mark.parametrize("path", sorted((GOLDEN / "transformers4").iterdir()), ids=lambda p: p.stem)
def test_both_spellings_of_a_config_are_one_model(path):
    assert families.read_config(path) == families.read_config(GOLDEN / path.stem / "config.json")


@pytest.mark.parametrize("name", ["10000/256", "1000000/256", "10000/16"])
def test_rotary_frequencies_are_rounded_as_those_of_transformers(x64, name):
    """The last bit counts far from the start; torch's own power is not always rounded correctly."""
    with np.load(GOLDEN / "rotary.npz") as file:
        expected_K = file[name].astype(np.float64)
    theta, dim = (int(part) for part in name.split("/"))
    found = attention.rotation(jnp.ones((1, 1), jnp.int32), dim, float(theta), jnp.dtype("float64"))
    same_K = np.abs(np.asarray(found.sin)[0, 0] / np.sin(expected_K) - 1) < 1e-12
    assert same_K.mean() > 0.99
