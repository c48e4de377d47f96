"""Chunked cross-entropy against the plain formula: values, gradients, second order, memory."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import loss

B, T, D, V = 3, 10, 6, 17
CHUNKS = [1, 4, 7, 12, B * T, 1000]  # of positions; most divide nothing


def problem(dtype: Any = np.float64):
    """(hidden, head, weights), targets: signed and zero weights, masked targets, a masked row."""
    rng = np.random.default_rng(0)
    hidden_BTD, head_VD = rng.normal(size=(B, T, D)), rng.normal(size=(V, D))
    weights_BT = rng.normal(size=(B, T)) * (rng.random((B, T)) < 0.8)
    targets_BT = np.where(rng.random((B, T)) < 0.4, -100, rng.integers(0, V, (B, T)))
    targets_BT[1] = -100
    arrays = tuple(jnp.asarray(x, dtype) for x in (hidden_BTD, head_VD, weights_BT))
    return arrays, jnp.asarray(targets_BT, jnp.int32)


def full(hidden_BTD, head_VD, weights_BT, targets_BT):
    p_BTV = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", hidden_BTD, head_VD))
    y_BT1 = jnp.maximum(targets_BT, 0)[..., None]
    nll_BT = jnp.where(targets_BT == -100, 0, -jnp.take_along_axis(p_BTV, y_BT1, -1)[..., 0])
    return (weights_BT * nll_BT).sum(), nll_BT


def plain(hidden_BTD, head_VD, weights_BT, targets_BT, chunk):
    nll_BT = loss.token_nll(hidden_BTD, head_VD, targets_BT, chunk)
    return (weights_BT * nll_BT).sum(), nll_BT


def weighted(hidden_BTD, head_VD, weights_BT, targets_BT, chunk):
    return loss.weighted_nll(hidden_BTD, head_VD, targets_BT, weights_BT, chunk)


ROUTES = pytest.mark.parametrize("route", [plain, weighted], ids=["token_nll", "weighted_nll"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(route, chunk, arrays, targets_BT):
    """((total, nll), gradients in hidden, head and weights)."""
    function = route if chunk is None else functools.partial(route, chunk=chunk)
    return jax.value_and_grad(function, (0, 1, 2), has_aux=True)(*arrays, targets_BT)


@ROUTES
@pytest.mark.parametrize("chunk", CHUNKS)
def test_values_and_gradients(route, chunk, x64, close):
    problems = problem()
    close(results(route, chunk, *problems), results(full, None, *problems), "float64")


@ROUTES
@pytest.mark.parametrize("chunk", [4, 1000])
def test_each_argument_alone(route, chunk, x64, close):
    """A gradient does not depend on which others are asked for (the head's is then not formed)."""
    arrays, targets_BT = problem()
    expected = results(full, None, arrays, targets_BT)[1]
    for i in range(3):
        gradient = jax.grad(functools.partial(route, chunk=chunk), i, has_aux=True)
        close(gradient(*arrays, targets_BT)[0], expected[i], "float64")


@ROUTES
@pytest.mark.parametrize("chunk", [4, 1000])
def test_forward_over_reverse(route, chunk, x64, close):
    """jvp(grad), the second derivative MAGIC takes, is exact in every argument."""
    arrays, targets_BT = problem()
    tangents = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(1).normal(size=x.shape)),
                            arrays)  # fmt: skip

    def second(function):
        gradient = jax.grad(lambda *a: function(*a, targets_BT)[0], (0, 1, 2))
        return jax.jit(lambda: jax.jvp(gradient, arrays, tangents))()

    close(second(functools.partial(route, chunk=chunk)), second(full), "float64")


def test_every_order_of_token_nll(x64, close):
    """The plain route is differentiable in forward mode and in reverse over reverse."""
    arrays, targets_BT = problem()
    directions_BT = jnp.asarray(np.random.default_rng(2).normal(size=(B, T)))

    def orders(function):
        def token_losses(hidden_BTD):
            return function(hidden_BTD, *arrays[1:], targets_BT)[1]

        def once(hidden_BTD):
            return jax.grad(lambda h: (directions_BT * token_losses(h)).sum())(hidden_BTD)

        return jax.jvp(token_losses, arrays[:1], arrays[:1]), jax.grad(
            lambda h: (once(h) ** 2).sum()
        )(arrays[0])

    close(orders(functools.partial(plain, chunk=4)), orders(full), "float64")


@pytest.mark.parametrize("chunk", [4, 12, 1000])
def test_compared(chunk, x64, close):
    """The losses of each of several hidden states, and how far each is from the first."""
    (hidden_BTD, head_VD, weights_BT), targets_BT = problem()
    hidden_SBTD = jnp.stack([hidden_BTD, hidden_BTD * 0.5, hidden_BTD[::-1]])
    compared = jax.jit(loss.compared, static_argnums=3)
    nll_SBT, kl_SBT = compared(hidden_SBTD, head_VD, targets_BT, chunk)
    logp_SBTV = np.asarray(jax.nn.log_softmax(jnp.einsum("SBTD,VD->SBTV", hidden_SBTD, head_VD)))
    difference_SBTV = logp_SBTV[:1] - logp_SBTV
    expected_SBT = (np.exp(logp_SBTV[:1]) * difference_SBTV).sum(-1)
    close(kl_SBT, np.where(targets_BT == -100, 0, expected_SBT), "float64")
    for nll_BT, state_BTD in zip(nll_SBT, hidden_SBTD, strict=True):
        close(nll_BT, full(state_BTD, head_VD, weights_BT, targets_BT)[1], "float64")
    assert (np.asarray(kl_SBT[0]) == 0).all() and np.asarray(kl_SBT[1:]).max() > 0.01


@pytest.mark.parametrize("chunk", [4, 1000])
def test_no_reverse_derivative_through_the_token_losses(chunk):
    (hidden_BTD, head_VD, weights_BT), targets_BT = problem(np.float32)

    def wrong(hidden_BTD: jax.Array) -> jax.Array:
        outputs: Any = weighted(hidden_BTD, head_VD, weights_BT, targets_BT, chunk)
        return outputs[1].sum()

    with pytest.raises(TypeError, match="use token_nll"):
        jax.grad(wrong)(hidden_BTD)


@ROUTES
def test_unsupervised_chunks_are_skipped(route, x64, close):
    """Every row's supervised positions fill the first chunks, so NaN elsewhere is never met."""
    (hidden_BTD, head_VD, weights_BT), _ = problem()
    targets_BT = np.full((B, T), -100, np.int32)
    for row, places in enumerate(([0, 9], [4, 5], [7, 2])):
        targets_BT[row, places] = [3, 16]
    broken_BTD = jnp.where((targets_BT == -100)[..., None], jnp.nan, hidden_BTD)
    arrays = (broken_BTD, head_VD, weights_BT)
    found = results(route, B * 2, arrays, jnp.asarray(targets_BT))
    arrays = (hidden_BTD, head_VD, weights_BT)
    close(found, results(full, None, arrays, jnp.asarray(targets_BT)), "float64")


@ROUTES
@pytest.mark.parametrize("chunk", [4, 1000])
def test_nothing_supervised(route, chunk):
    arrays, targets_BT = problem(np.float32)
    (total, nll_BT), gradients = results(route, chunk, arrays, jnp.full_like(targets_BT, -100))
    assert all(not np.asarray(x).any() for x in (total, nll_BT, *gradients))


def test_large_logits_stay_finite():
    """The largest logit is taken out before the exponential."""
    (hidden_BTD, head_VD, weights_BT), targets_BT = problem(np.float32)
    arrays = (hidden_BTD * 1e4, head_VD, weights_BT)
    for route in (plain, weighted):
        for value in jax.tree.leaves(results(route, 4, arrays, targets_BT)):
            assert np.isfinite(value).all()


@ROUTES
def test_bfloat16(route):
    """Low-precision operands, float32 losses: as near as rounding the inputs, and unbiased."""
    rng = np.random.default_rng(3)
    hidden_BTD, head_VD = rng.normal(size=(16, 64, 32)), rng.normal(size=(128, 32)) / 4
    targets_BT = jnp.asarray(rng.integers(0, 128, (16, 64)), jnp.int32)
    weights_BT = jnp.ones((16, 64), jnp.float32)
    head_VD = jnp.asarray(head_VD, jnp.float32)
    found, expected = (
        results(route, 100, (jnp.asarray(hidden_BTD, dtype), head_VD, weights_BT), targets_BT)
        for dtype in (jnp.bfloat16, jnp.float32)
    )
    (_, nll_BT), gradients = found
    (_, nll32_BT), gradients32 = expected
    assert nll_BT.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16, jnp.float32, jnp.float32]
    difference_BT = np.asarray(nll_BT - nll32_BT)
    assert abs(difference_BT.mean()) <= 4 * difference_BT.std() / 32
    for g, g32 in zip(gradients, gradients32, strict=True):
        g, g32 = np.asarray(g, np.float64), np.asarray(g32, np.float64)
        assert np.linalg.norm(g - g32) <= 1e-2 * np.linalg.norm(g32)


@ROUTES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_the_program_never_holds_all_logits(route, dtype):
    """No array of the compiled gradient, in any dtype, is larger than two chunks of logits."""
    b, t, d, v, chunk = 4, 512, 16, 8192, 128
    arguments = (
        jax.ShapeDtypeStruct((b, t, d), dtype),
        jax.ShapeDtypeStruct((v, d), jnp.float32),
        jax.ShapeDtypeStruct((b, t), jnp.float32),
    )
    targets_BT = jax.ShapeDtypeStruct((b, t), jnp.int32)
    compiled = results.lower(route, chunk, arguments, targets_BT).compile()
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text() or "")
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert chunk * v <= largest <= 2 * chunk * v < b * t * v / 4
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 4 * b * t * v / 3
