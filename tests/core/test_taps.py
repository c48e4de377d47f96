"""Named activations against transformers' own hooks, and models that run on from other ones."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import model, taps
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError
from core.taps import Tap

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("gemma3_tiny", "gpt2_tiny", "neox_tiny", "neox_tiny_sequential")
read = jax.jit(model.full_precision(taps.read), static_argnums=(0, 1, 4))
logits = jax.jit(model.full_precision(model.logits), static_argnums=(0, 1))


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Configuration, variables, ids and what transformers saw."""
    folder = GOLDEN / request.param
    loaded = load_model(folder)
    ids_BT = jnp.asarray(np.load(folder / "expected.npz")["ids"][:2])
    return loaded.config, loaded.variables, ids_BT, np.load(folder / "taps.npz")


def names(config):
    layers = range(config.layers)
    return (taps.EMBED, *(f"{kind}.{layer}" for kind in taps.KINDS for layer in layers))


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_every_place_of_every_layer(case, layers, close):
    """The last layer's residual stream, too, is what its hook sees, before the final norm."""
    config, variables, ids_BT, seen = case
    places = tuple(taps.parse(name, config) for name in names(config))
    found = read(config, Execution(layers=layers), variables, ids_BT, places)
    assert {*map(str, places)} == {n for n in seen if n != "last_hidden_state" and "spl" not in n}
    for tap, x_BTD in zip(places, found, strict=True):
        assert x_BTD.shape[-1] == taps.width(config, tap)
        close(x_BTD, seen[str(tap)])
    last = seen[f"resid_post.{config.layers - 1}"]
    assert np.abs(last - seen["last_hidden_state"]).max() > 0.1


def test_one_place_alone_is_the_same(case, close):
    """What reads fewer layers reads the same."""
    config, variables, ids_BT, seen = case
    for name in (taps.EMBED, "mlp_out.0", "attn_out.1"):
        (x_BTD,) = read(config, Execution(), variables, ids_BT, (taps.parse(name),))
        close(x_BTD, seen[name])


def test_layers_behind_are_not_run(case):
    """Their weights take no part: not-a-number in them changes nothing."""
    config, variables, ids_BT, seen = case
    blocks = jax.tree.map(
        lambda x_L: np.concatenate([x_L[:1], np.full_like(x_L[1:], np.nan)]),
        variables["params"]["blocks"],
    )
    broken = {"params": {**variables["params"], "blocks": blocks}}
    (x_BTD,) = read(config, Execution(), broken, ids_BT, (Tap("resid_post", 0),))
    assert np.isfinite(x_BTD).all() and x_BTD.shape == seen["resid_post.0"].shape


def test_spliced(case, close):
    """Logits when an activation is turned around, as transformers' hooks give them."""
    config, variables, ids_BT, seen = case
    spliced = [name for name in seen if name.startswith("spliced.")]
    assert len(spliced) == 5
    plain_BV = logits(config, Execution(), variables, ids_BT)[:, -1]
    for name in spliced:
        tap = taps.parse(name.removeprefix("spliced."), config)
        other = jnp.asarray(seen[str(tap)][..., ::-1].copy())
        there = taps.spliced(config, variables, tap, other)
        found_BV = logits(config, Execution(), there, ids_BT)[:, -1]
        close(found_BV, seen[name])
        assert np.abs(found_BV - plain_BV).max() > 1e-3
        same = taps.spliced(config, variables, tap, jnp.asarray(seen[str(tap)]))
        close(logits(config, Execution(), same, ids_BT)[:, -1], plain_BV)


def test_names():
    config = dataclasses.replace(load_model(GOLDEN / "gpt2_tiny").config, layers=12)
    assert taps.parse("attn_out.11", config) == Tap("attn_out", 11)
    assert str(taps.parse("embed")) == "embed" and str(Tap("mlp_in", 3)) == "mlp_in.3"
    with pytest.raises(InputError, match="'resid_mid.3' is unknown; give embed, or a layer of"):
        taps.parse("resid_mid.3", config)
    with pytest.raises(InputError, match="'resid_post' is unknown"):
        taps.parse("resid_post", config)
    with pytest.raises(InputError, match="resid_post.12: the model has layers 0 to 11"):
        taps.parse("resid_post.12", config)
