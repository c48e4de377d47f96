"""The decoder and its losses: causality, invariance to batch and padding, equal executions.

In float64, so that a property either holds to 1e-12 or is broken.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import families, model, schema
from core.config import Execution, ModelConfig

CONFIG = ModelConfig("gpt2", 48, 16, 12, 2, 2, 20, 6)
SCAN = Execution("float64", "scan")
EXECUTIONS = {
    "scan": SCAN,
    "unrolled": Execution("float64", "unrolled"),
    "scan, remat": Execution("float64", "scan", remat=True),
    "unrolled, remat": Execution("float64", "unrolled", remat=True),
    "scan, small chunks": Execution("float64", "scan", loss_chunk=5),
}
pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def made() -> schema.Params:
    """Random float64 parameters, biases and norms included."""
    rng = np.random.default_rng(0)
    shapes = schema.abstract(families.rows(CONFIG), CONFIG.layers)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape)), shapes)


def batch(rows: int = 4, tokens: int = 12):
    """ids and labels [B,T]; row i ends i tokens early and has holes in its labels."""
    rng = np.random.default_rng(1)
    ids_BT = rng.integers(0, CONFIG.vocab_size, (rows, tokens), np.int32)
    labels_BT = np.where(rng.random((rows, tokens)) < 0.3, -100, ids_BT).astype(np.int32)
    for i in range(rows):
        ids_BT[i, tokens - i :] = 0
        labels_BT[i, tokens - i :] = -100
    return ids_BT, labels_BT


@functools.partial(jax.jit, static_argnums=(0, 1))
def plain(config, execution, params, ids_BT, labels_BT, weights_BT):
    """(token losses, gradient of their weighted sum)."""

    def loss(params):
        nll_BT = model.token_losses(config, execution, {"params": params}, ids_BT, labels_BT)
        return (weights_BT * nll_BT).sum(), nll_BT

    (_, nll_BT), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return nll_BT, grads


@functools.partial(jax.jit, static_argnums=(0, 1))
def weighted(config, execution, params, ids_BT, labels_BT, weights_BT):
    """The same through the loss that knows its weights."""

    def loss(params):
        return model.weighted_loss(
            config, execution, {"params": params}, ids_BT, labels_BT, weights_BT
        )

    (_, nll_BT), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return nll_BT, grads


def run(route, ids_BT, labels_BT, weights_BT=None, execution=SCAN):
    weights_BT = np.ones(ids_BT.shape) if weights_BT is None else weights_BT
    return route(CONFIG, execution, made(), ids_BT, labels_BT, weights_BT)


ROUTES = pytest.mark.parametrize("route", [plain, weighted], ids=["plain", "weighted"])
TWO = pytest.mark.parametrize("name", ["scan", "unrolled, remat"])


@TWO
def test_causality_by_gradient(name):
    """Logits of position t depend on the input of every position up to t and of none after it."""
    ids_BT = jnp.asarray(batch(2, 8)[0])

    def scalars(wpe_CD, params):
        params = {**params, "embed": {**params["embed"], "wpe": wpe_CD}}
        return (model.logits(CONFIG, EXECUTIONS[name], {"params": params}, ids_BT) ** 2).sum((0, 2))

    # The position table is an input of each position alone.
    gradient = jax.jit(jax.jacrev(scalars))(made()["embed"]["wpe"], made())
    reach_TC = np.abs(gradient).sum(-1)
    assert (reach_TC[np.triu_indices(8, 1, 16)] == 0).all()
    assert (reach_TC[np.tril_indices(8, 0, 16)] > 0).all()


def test_losses_see_only_earlier_ids():
    """Changing id s under fixed labels changes every loss after s and none up to it."""
    ids_BT = np.repeat(batch(1, 10)[0], 10, 0)
    others_BT = (ids_BT + np.eye(10, dtype=np.int32)) % CONFIG.vocab_size
    nll_BT, changed_BT = (np.asarray(run(plain, x, ids_BT)[0]) for x in (ids_BT, others_BT))
    np.testing.assert_array_equal(changed_BT != nll_BT, np.triu(np.ones((10, 10), bool), 1))


@pytest.mark.parametrize(
    "route,name",
    [
        (weighted, "scan"),
        (weighted, "unrolled"),
        (plain, "scan, remat"),
        (weighted, "unrolled, remat"),
        (plain, "scan, small chunks"),
    ],
)
def test_executions_are_equal(route, name, close):
    ids_BT, labels_BT = batch()
    weights_BT = np.random.default_rng(2).normal(size=ids_BT.shape)
    expected = run(plain, ids_BT, labels_BT, weights_BT)
    found = run(route, ids_BT, labels_BT, weights_BT, EXECUTIONS[name])
    close(found, expected, "float64")


@ROUTES
def test_losses_are_label_aligned(route, close):
    """Entry t is -log softmax of the logits at t-1; entry 0 and unsupervised entries are 0."""
    ids_BT, labels_BT = batch()
    z_BTV = model.logits(CONFIG, SCAN, {"params": made()}, jnp.asarray(ids_BT))
    p_BTV = np.exp(z_BTV) / np.exp(z_BTV).sum(-1, keepdims=True)
    rows, columns = np.nonzero(labels_BT[:, 1:] != -100)
    expected_BT = np.zeros(ids_BT.shape)
    expected_BT[rows, columns + 1] = -np.log(p_BTV[rows, columns, labels_BT[rows, columns + 1]])
    close(run(route, ids_BT, labels_BT)[0], expected_BT, "float64")


@ROUTES
def test_batch_size_invariance(route, close):
    ids_BT, labels_BT = batch()
    alone = [run(route, ids_BT[i : i + 1], labels_BT[i : i + 1]) for i in range(4)]
    nll_BT, grads = run(route, ids_BT, labels_BT)
    close(nll_BT, np.concatenate([nll for nll, _ in alone]), "float64")
    total = jax.tree.map(lambda *parts: sum(parts), *(grads for _, grads in alone))
    close(grads, total, "float64")


@ROUTES
def test_padding_invariance(route, close):
    """Neither padding tokens nor padding rows change a loss or a gradient."""
    ids_BT, labels_BT = batch()
    pad = ((0, 3), (0, 4))
    nll_BT, grads = run(route, ids_BT, labels_BT)
    wide_BT, wide_grads = run(
        route, np.pad(ids_BT, pad), np.pad(labels_BT, pad, constant_values=-100)
    )
    close(wide_BT, np.pad(nll_BT, pad), "float64")
    close(wide_grads, grads, "float64")


@TWO
def test_taps(name, close):
    """Every site's input and every block's output, stacked by layer, in any execution."""
    ids_BT, weights = jnp.asarray(batch(2, 8)[0]), made()
    decoder = model.Decoder(CONFIG, EXECUTIONS[name])
    seen: Any = decoder.apply({"params": weights}, ids_BT, mutable=["taps"])[1]
    blocks = seen["taps"]["blocks"]
    names = ("attn_c_attn", "attn_c_proj", "mlp_c_fc", "mlp_c_proj")
    d, f = (2, 2, 8, CONFIG.width), (2, 2, 8, CONFIG.mlp_width)
    assert [blocks[n]["in"].shape for n in names] == [d, d, d, f]
    assert blocks["resid_post"].shape == d
    x_BTD = weights["embed"]["wte"][ids_BT] + weights["embed"]["wpe"][None, :8]
    for layer in range(CONFIG.layers):
        w = jax.tree.map(lambda x, i=layer: x[i], weights["blocks"])
        inputs = {n: blocks[n]["in"][layer] for n in names}
        close(inputs["attn_c_attn"], norm(x_BTD, w["ln_1"]), "float64")
        x_BTD = x_BTD + inputs["attn_c_proj"] @ w["attn_c_proj"]["w"] + b(w["attn_c_proj"])
        close(inputs["mlp_c_fc"], norm(x_BTD, w["ln_2"]), "float64")
        up_BTF = inputs["mlp_c_fc"] @ w["mlp_c_fc"]["w"] + b(w["mlp_c_fc"])
        close(inputs["mlp_c_proj"], jax.nn.gelu(up_BTF), "float64")
        x_BTD = x_BTD + inputs["mlp_c_proj"] @ w["mlp_c_proj"]["w"] + b(w["mlp_c_proj"])
        close(blocks["resid_post"][layer], x_BTD, "float64")
    hidden_BTD = model.hidden(CONFIG, EXECUTIONS[name], {"params": weights}, ids_BT)
    close(hidden_BTD, norm(x_BTD, weights["final_norm"]), "float64")


def b(site):
    return site["b"][None, None]


def norm(x_BTD, w):
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    scale_BT1 = 1 / jnp.sqrt((x_BTD**2).mean(-1, keepdims=True) + CONFIG.norm_eps)
    return x_BTD * scale_BT1 * w["g"][None, None] + w["b"][None, None]


def test_bfloat16_is_close_to_float32(close):
    """Compute in bfloat16, losses in float32: within bfloat16's tolerance and without a bias."""
    params = jax.tree.map(lambda x: x.astype(jnp.float32), made())
    ids_BT = np.random.default_rng(3).integers(0, 48, (64, 16), np.int32)
    ones_BT = np.ones(ids_BT.shape, np.float32)
    (nll_BT, grads), (nll32_BT, grads32) = (
        weighted(CONFIG, Execution(dtype, "scan"), params, ids_BT, ids_BT, ones_BT)
        for dtype in ("bfloat16", "float32")
    )
    assert {x.dtype for x in jax.tree.leaves((nll_BT, grads))} == {jnp.dtype("float32")}
    close(nll_BT, nll32_BT, "bfloat16")
    # Rounding errors of single losses cancel: the mean is ten times nearer than the tolerance.
    assert abs((nll_BT - nll32_BT).mean()) <= 2e-3 * nll32_BT.mean()
    flat, flat32 = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (grads, grads32)
    )
    assert np.linalg.norm(flat - flat32) <= 2e-2 * np.linalg.norm(flat32)
