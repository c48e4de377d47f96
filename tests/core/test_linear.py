"""The linear site's adapters: a no-op at b = 0, equal to the merged weights otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import families, model, schema
from core.config import Execution, ModelConfig

CONFIG = ModelConfig("gpt2", 32, 12, 8, 2, 2, 16, 4)
SITES = schema.sites(families.rows(CONFIG))
IDS_BT = np.random.default_rng(0).integers(0, 32, (2, 10), np.int32)
pytestmark = pytest.mark.usefixtures("x64")


def params():
    rng = np.random.default_rng(1)
    shapes = schema.abstract(families.rows(CONFIG), CONFIG.layers)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape)), shapes)


def adapters(sites, rank=3, empty=False):
    """A random adapter of each site, stacked by layer; `empty` has b = 0."""
    rng, tree = np.random.default_rng(2), {}
    for site in sites:
        a_LIR = jnp.asarray(rng.normal(size=(CONFIG.layers, site.inputs, rank)))
        b_LRO = jnp.asarray(rng.normal(size=(CONFIG.layers, rank, site.outputs)) * (not empty))
        scale_L = jnp.full((CONFIG.layers,), 0.3)
        schema.put(tree, site.path, {"a": a_LIR, "b": b_LRO, "scale": scale_L})
    return tree


@functools.partial(jax.jit, static_argnums=0)
def losses(execution, variables):
    return model.token_losses(
        CONFIG, execution, variables, jnp.asarray(IDS_BT), jnp.asarray(IDS_BT)
    )


EXECUTIONS = pytest.mark.parametrize(
    "execution",
    [Execution("float64", "scan"), Execution("float64", "unrolled", remat=True)],
    ids=["scan", "unrolled, remat"],
)


@EXECUTIONS
def test_an_empty_adapter_changes_no_bit(execution):
    variables = {"params": params(), "lora": adapters(SITES, empty=True)}
    found, expected = losses(execution, variables), losses(execution, {"params": params()})
    np.testing.assert_array_equal(found, expected)


@EXECUTIONS
@pytest.mark.parametrize("sites", [SITES, SITES[1:2]], ids=["every site", "one site"])
def test_an_adapter_equals_merged_weights(execution, sites, close):
    lora, merged = adapters(sites), params()
    for site in sites:
        adapter, weight = schema.get(lora, site.path), schema.get(merged, site.path)
        product_LIO = jnp.einsum("LIR,LRO->LIO", adapter["a"], adapter["b"])
        schema.put(merged, f"{site.path}/w", weight["w"] + 0.3 * product_LIO)
    found = losses(execution, {"params": params(), "lora": lora})
    close(found, losses(execution, {"params": merged}), "float64")
    assert (np.asarray(found) != losses(execution, {"params": params()}))[:, 1:].all()


def test_adapter_gradients_are_those_of_the_merged_weight(close):
    """dL/da = scale dL/dW b^T and dL/db = scale a^T dL/dW, for every site and layer."""
    execution, lora, merged = Execution("float64", "scan"), adapters(SITES), params()
    for site in SITES:
        adapter, weight = schema.get(lora, site.path), schema.get(merged, site.path)
        product_LIO = jnp.einsum("LIR,LRO->LIO", adapter["a"], adapter["b"])
        schema.put(merged, f"{site.path}/w", weight["w"] + 0.3 * product_LIO)
    found = jax.grad(lambda x: losses(execution, {"params": params(), "lora": x}).sum())(lora)
    dense = jax.grad(lambda x: losses(execution, {"params": x}).sum())(merged)
    for site in SITES:
        adapter, g_LIO = schema.get(lora, site.path), schema.get(dense, f"{site.path}/w")
        expected = {
            "a": 0.3 * jnp.einsum("LIO,LRO->LIR", g_LIO, adapter["b"]),
            "b": 0.3 * jnp.einsum("LIR,LIO->LRO", adapter["a"], g_LIO),
        }
        got = schema.get(found, site.path)
        close({name: got[name] for name in "ab"}, expected, "float64")
