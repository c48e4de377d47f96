"""The one training step: accumulation, the denominator, token weights, memory, donation."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core import families, model, schema
from core.config import Execution, ModelConfig
from training.optim import Optim, decayed
from training.step import Recipe, gradients, initial, supervised, train_step

CONFIG = ModelConfig("gpt2", 32, 12, 8, 2, 2, 16, 4)
OPTIM = Optim(lr=1e-2, warmup=2, weight_decay=0.1, clip=0.5)
RECIPE = Recipe(CONFIG, Execution("float64", "scan"), OPTIM, 6)
pytestmark = pytest.mark.usefixtures("standard_promotion")


def params():
    rng = np.random.default_rng(1)
    shapes = schema.abstract(families.rows(CONFIG), CONFIG.layers)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), shapes)


def batch(a=1, b=8, t=10, seed=0):
    """ids and labels [A,B,T], unit weights; the micro-batches differ in supervised tokens."""
    rng = np.random.default_rng(seed)
    ids_BT = rng.integers(0, CONFIG.vocab_size, (b, t), np.int32)
    labels_BT = np.where(rng.random((b, t)) < np.linspace(0, 0.8, b)[:, None], -100, ids_BT)
    shape = (a, b // a, t)
    labels_BT = labels_BT.astype(np.int32)
    return ids_BT.reshape(shape), labels_BT.reshape(shape), np.ones(shape)


grads_of = functools.partial(jax.jit, static_argnums=0)(gradients)


def full_loss(params, ids_BT, labels_BT):
    """The mean over supervised tokens, from all logits at once."""
    z_BTV = model.logits(CONFIG, RECIPE.execution, {"params": params}, ids_BT)
    p_BTV = jax.nn.log_softmax(z_BTV[:, :-1])
    y_BT = labels_BT[:, 1:]
    nll_BT = -jnp.take_along_axis(p_BTV, jnp.maximum(y_BT, 0)[..., None], -1)[..., 0]
    return jnp.where(y_BT == -100, 0, nll_BT).sum() / (y_BT != -100).sum()


@pytest.mark.parametrize("micro", [2, 8])
def test_accumulation_changes_nothing(micro, x64, close):
    close(grads_of(RECIPE, params(), *batch(micro)), grads_of(RECIPE, params(), *batch()),
          "float64")  # fmt: skip


def test_unit_weights_are_plain_training(x64, close):
    """Six steps equal a loop of optax on the mean loss, written out by hand."""
    names = {"w", "wte", "wpe"}
    mask = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params())

    def rate(step):
        if step < 2:
            return 1e-2 * (step + 1) / 2
        return 1e-2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 4)))

    rates = jnp.asarray([rate(step) for step in range(6)])
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-8),
        optax.add_decayed_weights(0.1, mask),
        optax.scale_by_learning_rate(lambda step: rates[step]),
    )
    theirs, memory = params(), optimizer.init(params())
    value_and_grad = jax.jit(jax.value_and_grad(full_loss))
    state = initial(RECIPE, params())
    for step in range(6):
        ids_ABT, labels_ABT, weights_ABT = batch(seed=step)
        loss, grads = value_and_grad(theirs, ids_ABT[0], labels_ABT[0])
        updates, memory = optimizer.update(grads, memory, theirs)
        theirs = optax.apply_updates(theirs, updates)
        state, metrics = train_step(RECIPE, state, ids_ABT, labels_ABT, weights_ABT)
        # optax counts its schedule and Adam's bias correction in float32.
        close(metrics.loss, loss, 1e-8)
        close(metrics.grad_norm, optax.tree.norm(grads), 1e-8)
        assert metrics.tokens == (labels_ABT[..., 1:] != -100).sum()
    assert state.step == 6
    close(state.params, theirs, 1e-6)


def test_the_denominator_does_not_depend_on_the_weights(x64, close):
    """The gradient is linear in the weights, so -1 is ascent and 0 drops a token's numerator."""
    ids, labels, ones = batch()
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=ones.shape), rng.normal(size=ones.shape)

    def grads(weights):
        return grads_of(RECIPE, params(), ids, labels, weights)

    close(grads(-ones), jax.tree.map(jnp.negative, grads(ones)), 0.0)
    together = jax.tree.map(lambda a, b: 2 * a - b, grads(first), grads(second))
    close(grads(2 * first - second), together, "float64")
    some = np.where(rng.random(ones.shape) < 0.5, 1.0, 0.0)
    kept = np.where(some > 0, labels, -100).astype(np.int32)
    share = float(supervised(jnp.asarray(kept))) / float(supervised(jnp.asarray(labels)))
    (alone, _), (masked, _) = grads_of(RECIPE, params(), ids, kept, ones), grads(some)
    close(masked, jax.tree.map(lambda g: g * share, alone), "float64")


def test_weights_of_unsupervised_tokens_are_ignored(x64, close):
    ids, labels, ones = batch()
    other = np.where(labels == -100, np.nan, ones)
    other[..., 0] = np.nan  # the first token is never predicted
    close(grads_of(RECIPE, params(), ids, labels, other),
          grads_of(RECIPE, params(), ids, labels, ones), 0.0)  # fmt: skip


def test_weight_minus_one_ascends(x64):
    ids, labels, ones = batch()
    before = float(full_loss(params(), ids[0], labels[0]))
    for sign in (1, -1):
        state, metrics = train_step(RECIPE, initial(RECIPE, params()), ids, labels, sign * ones)
        assert float(metrics.loss) == pytest.approx(sign * before)
        assert sign * (float(full_loss(state.params, ids[0], labels[0])) - before) < 0


def test_a_batch_without_labels_changes_nothing_but_decay(x64, close):
    ids, labels, ones = batch()
    nothing = np.full_like(labels, -100)
    state, metrics = train_step(RECIPE, initial(RECIPE, params()), ids, nothing, ones)
    assert (metrics.loss, metrics.grad_norm, metrics.tokens) == (0, 0, 0)
    shrunk = jax.tree.map(
        lambda x, matrix: x * (1 - 0.1 * 5e-3 * matrix), params(), decayed(families.rows(CONFIG))
    )
    close(state.params, shrunk, 1e-8)


def test_float32_step_is_close_to_float64(close):
    """One step of sgd; the gradient of the mean loss within float32's tolerance."""
    arrays = batch(2)
    with jax.enable_x64(True):
        expected = jax.device_get(grads_of(RECIPE, params(), *arrays))
    recipe = RECIPE._replace(execution=Execution("float32", "scan"))
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), jax.device_get(params()))
    found = grads_of(recipe, low, *arrays[:2], arrays[2].astype(np.float32))
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    flat, flat64 = (
        np.concatenate([np.ravel(g) for g in jax.tree.leaves(t)]) for t in (found, expected)
    )
    close(flat, flat64)


def test_the_step_never_holds_all_logits():
    config = dataclasses.replace(CONFIG, vocab_size=4096, context=64)
    recipe = Recipe(config, Execution("bfloat16", "scan", loss_chunk=32), OPTIM, 6)
    state = jax.eval_shape(lambda: initial(recipe, schema.init(families.rows(config), 2, 0)))
    ids = jax.ShapeDtypeStruct((2, 4, 64), jnp.int32)
    weights = jax.ShapeDtypeStruct((2, 4, 64), jnp.float32)
    text = train_step.lower(recipe, state, ids, ids, weights).compile().as_text() or ""
    shapes = re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", text)
    assert max(math.prod(map(int, s.split(","))) for s in shapes) <= 2 * 32 * 4096


def test_the_state_is_donated_and_the_callers_arrays_are_not(x64):
    """The step updates in place; what came from the host, and shares its memory, is left alone."""
    host = jax.device_get(params())
    copy = jax.tree.map(np.copy, host)
    state = initial(RECIPE, jax.tree.map(jnp.asarray, host))
    train_step(RECIPE, state, *batch())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    jax.tree.map(np.testing.assert_array_equal, host, copy)
