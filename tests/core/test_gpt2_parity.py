"""GPT-2 against transformers: logits, token losses and every parameter's gradient.

The expected numbers are made by tests/golden/make_gpt2.py.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import convert, model
from core.config import Execution

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5  # of the largest entry of what is compared
EXECUTIONS = {
    "unrolled": Execution(layers="unrolled"),
    "unrolled, remat": Execution(layers="unrolled", remat=True),
    "scan": Execution(layers="scan"),
    "scan, remat": Execution(layers="scan", remat=True),
}


@pytest.fixture(scope="module", params=["gpt2_tiny", "gpt2_tiny_untied"])
def golden(request):
    """(config, params, expected arrays)."""
    folder = GOLDEN / request.param
    with np.load(folder / "expected.npz", allow_pickle=False) as file:
        return *convert.import_hf(folder), dict(file)


def relative(found, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("execution", EXECUTIONS.values(), ids=EXECUTIONS.keys())
def test_logits(golden, execution):
    config, params, expected = golden
    forward = jax.jit(functools.partial(model.logits, config, execution))
    found_BTV = np.array(forward({"params": params}, jnp.asarray(expected["ids"])))
    padding_BT = np.arange(found_BTV.shape[1])[None] >= expected["lengths"][:, None]
    found_BTV[padding_BT] = 0
    assert relative(found_BTV, expected["logits"]) <= TOLERANCE
    best = expected["logits"][~padding_BT].argmax(-1)
    assert (found_BTV[~padding_BT].argmax(-1) == best).all()


def plain(config, execution, params, ids_BT, labels_BT):
    losses_BT = model.token_losses(config, execution, {"params": params}, ids_BT, labels_BT)
    return losses_BT.sum(), losses_BT


def weighted(config, execution, params, ids_BT, labels_BT):
    ones_BT = jnp.ones(ids_BT.shape)
    return model.weighted_loss(config, execution, {"params": params}, ids_BT, labels_BT, ones_BT)


CHUNKED = Execution(layers="scan", loss_chunk=16)
ROUTES = {f"plain, {name}": (plain, execution) for name, execution in EXECUTIONS.items()} | {
    "plain, loss in chunks": (plain, CHUNKED),
    "weighted": (weighted, EXECUTIONS["unrolled"]),
    "weighted, loss in chunks": (weighted, CHUNKED),
}


@pytest.mark.parametrize("route,execution", ROUTES.values(), ids=ROUTES.keys())
def test_losses_and_gradients(golden, route, execution):
    config, params, expected = golden
    loss = functools.partial(route, config, execution)
    ids_BT, labels_BT = jnp.asarray(expected["ids"]), jnp.asarray(expected["labels"])
    (total, losses_BT), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params, ids_BT, labels_BT
    )
    assert relative(losses_BT, expected["losses"]) <= TOLERANCE
    assert (np.asarray(losses_BT)[expected["losses"] == 0] == 0).all()
    np.testing.assert_allclose(total, expected["losses"].sum(), rtol=TOLERANCE)
    named = {name: slot.view(gradients) for name, slot in convert.slots(config).items()}
    wanted = {k.removeprefix("grad/"): v for k, v in expected.items() if k.startswith("grad/")}
    assert named.keys() == wanted.keys()
    errors = {name: relative(named[name], value) for name, value in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= TOLERANCE, f"{worst}: {errors[worst]:.1e}"
