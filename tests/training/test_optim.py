"""Schedules by table, where weight decay falls, and the optimizers' arithmetic."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from core import adapter, families, schema
from core.config import ModelConfig
from core.errors import InputError
from training.optim import (
    Optim,
    build,
    clip_by_global_norm,
    decayed,
    learning_rate,
    scale_by_adam,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")
GPT2 = ModelConfig("gpt2", 50257, 1024, 768, 12, 12, 3072, 64)
COSINE = [1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4)), 0]
SCHEDULES = {
    # name: (settings, steps, learning rate of each step)
    "constant": ({"schedule": "constant"}, 3, [1, 1, 1]),
    "linear": ({"schedule": "linear", "end": 0.0}, 4, [1, 0.75, 0.5, 0.25, 0, 0]),
    "linear to a share": ({"schedule": "linear", "end": 0.5}, 4, [1, 0.875, 0.75, 0.625, 0.5]),
    "cosine": ({"end": 0.0}, 4, COSINE),
    "cosine to a share": ({"end": 0.2}, 4, [0.2 + 0.8 * x for x in COSINE]),
    "warm-up": ({"warmup": 4, "end": 0.0}, 8, [0.25, 0.5, 0.75, *COSINE]),
    "one step of warm-up": ({"warmup": 1, "schedule": "constant"}, 3, [1, 1, 1]),
    "warm-up, linear": ({"warmup": 2, "schedule": "linear", "end": 0.0}, 4, [0.5, 1, 1, 0.5, 0]),
    "warm-up only": ({"warmup": 3, "schedule": "constant"}, 3, [1 / 3, 2 / 3, 1]),
    "one step": ({}, 1, [1]),
    "polynomial": (
        {"schedule": "polynomial", "power": 2.0, "end": 0.2},
        4,
        [1, 0.2 + 0.8 * 0.75**2, 0.4, 0.25],
    ),
    "warm-up from nothing": ({"warmup": 2, "start": 0.0, "schedule": "constant"}, 4, [0, 0.5, 1]),
}
# Of Bergson 2.5.1's MAGIC, 8 steps: settings, peak, rates.
BERGSON = {
    "linear": (
        {"schedule": "linear", "end": 0.0},
        0.05,
        [0.05, 0.04375, 0.0375, 0.03125, 0.025, 0.01875, 0.0125, 0.00625],
    ),
    "polynomial": (
        {"schedule": "polynomial", "end": 0.1, "warmup": 2, "start": 5e-4},
        2e-3,
        [1e-6, 1.0005e-3, 2e-3, 1.7e-3, 1.4e-3, 1.1e-3, 8e-4, 5e-4],
    ),
}


@pytest.mark.parametrize("settings,steps,expected", SCHEDULES.values(), ids=SCHEDULES)
def test_schedules(settings, steps, expected):
    rate = learning_rate(Optim(lr=0.3, **settings), steps)
    if settings.get("warmup") == 4:  # the peak is reached at the end of warm-up, then kept once
        expected = [0.25, 0.5, 0.75, 1, *COSINE]
    found = [np.asarray(rate(step)) for step in range(len(expected))]
    np.testing.assert_allclose(found, 0.3 * np.array(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("settings, lr, expected", BERGSON.values(), ids=BERGSON)
def test_the_schedules_are_bergsons(x64, settings, lr, expected):
    rate = learning_rate(Optim(lr=lr, **settings), 8)
    found = [np.asarray(rate(step)) for step in range(8)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_decay_falls_on_matrices_only():
    """GPT-2 124M has 148 tensors, of which 50 are matrices: 2 embeddings and 4 in each layer."""
    rows = families.rows(GPT2)
    mask = decayed(rows)
    counts = {True: 0, False: 0}
    for row in rows:
        counts[schema.get(mask, row.path)] += GPT2.layers if row.stacked else 1
        assert schema.get(mask, row.path) == row.path.endswith(("/w", "wte", "wpe")), row.path
    assert counts == {True: 50, False: 98}
    assert len(jax.tree.leaves(mask)) == len(rows)


def test_decay_falls_on_what_is_named():
    """Names as Hugging Face has them; the number of a layer is any."""

    def named(*globs, rows=SMALL):
        mask = decayed(rows, globs)
        return {row.hf for row in rows if schema.get(mask, row.path)}

    assert named("*") == {row.hf for row in SMALL}
    mlp = {row.hf for row in SMALL if ".mlp." in row.hf}
    assert len(mlp) == 4
    assert named("*.mlp.*") == named("transformer.h.*.mlp.*") == mlp
    both = {f"transformer.h.{{l}}.mlp.{name}.weight" for name in ("c_fc", "c_proj")}
    assert named("*.mlp.c_fc.weight", "transformer.h.?.mlp.c_proj.weight") == both
    spec = adapter.LoraSpec(2, 2.0, ("c_fc",))
    factors = adapter.rows(spec, TINY)
    assert named("*.lora_A.weight", rows=factors) == {factors[0].hf}
    with pytest.raises(InputError, match=r"'transformer.h.0.mlp.c_fc.weight' names no parameter.*"
                                         r"transformer.h.\*.mlp.c_fc.weight"):  # fmt: skip
        named("*", "transformer.h.0.mlp.c_fc.weight")


TINY = ModelConfig("gpt2", 7, 5, 4, 2, 2, 8, 2)
SMALL = families.rows(TINY)


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = schema.abstract(SMALL, 2)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)


def applied(optim, grads, params):
    transformation = build(optim, 10, SMALL)
    return transformation.update(grads, transformation.init(params), params)[0]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_decay_is_decoupled_in_adamw_and_absent_from_vectors(name, close):
    settings = {"name": name, "lr": 0.1, "schedule": "constant", "clip": 0.0}
    params, zero = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    updates = applied(Optim(weight_decay=0.5, **settings), zero, params)
    mask = decayed(SMALL)
    expected = jax.tree.map(lambda p, m: p * (-0.1 * 0.5 * m), params, mask)
    close(updates, expected)


def test_sgd(close):
    grads, params = tree(1), tree(0)
    optim = Optim("sgd", 0.1, "constant", clip=0.0)
    close(applied(optim, grads, params), jax.tree.map(lambda g: -0.1 * g, grads))


def test_clip_bounds_the_global_norm():
    grads, params = tree(1), tree(0)
    optim = Optim("sgd", 1.0, "constant", clip=0.25)
    updates = jax.tree.leaves(applied(optim, grads, params))
    norm = math.sqrt(sum(float((u**2).sum()) for u in updates))
    assert norm == pytest.approx(0.25, rel=1e-5)


def test_clip_is_the_identity_around_zero(close):
    """All of a batch may be unsupervised; a norm's own derivative is infinite there."""
    clip, zero_D = clip_by_global_norm(0.25), jnp.zeros(3)
    found_D, pull = jax.vjp(lambda g_D: clip.update(g_D, clip.init(g_D))[0], zero_D)
    close(found_D, zero_D)
    close(pull(zero_D + 2)[0], zero_D + 2)


def test_adamw_first_step_is_the_sign(close):
    """With bias correction the first update is lr * g / (|g| + eps)."""
    grads, params = tree(1), tree(0)
    updates = applied(Optim(lr=0.1, schedule="constant", clip=0.0), grads, params)
    close(updates, jax.tree.map(lambda g: -0.1 * g / (jnp.abs(g) + 1e-8), grads))


@pytest.mark.parametrize(
    "settings,message",
    [({"lr": 0.0}, "--lr"), ({"lr": float("nan")}, "--lr"), ({"lr": -1.0}, "--lr"),
     ({"warmup": 11}, "--warmup 11 does not fit into 10"), ({"warmup": -1}, "--warmup"),
     ({"start": 0.5}, "--start 0.5"), ({"start": 1.5, "warmup": 2}, "--start 1.5"),
     ({"power": 0.0, "schedule": "polynomial"}, "--power 0.0"), ({"power": 2.0}, "not of cosine"),
     ({"momentum": 0.9}, "--beta1 for adamw"), ({"nesterov": True, "name": "sgd"}, "--nesterov"),
     ({"nesterov": True, "name": "muon", "momentum": 0.9}, "--nesterov")],
)  # fmt: skip
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        Optim(**settings).check(10)


@pytest.mark.parametrize("eps_root", [0.0, 1e-8])
def test_adam_is_optax_s_and_differentiable_where_no_gradient_was(eps_root):
    ours, theirs = (f(0.9, 0.95, 1e-8, eps_root) for f in (scale_by_adam, optax.scale_by_adam))
    params = {"w": jnp.zeros((4, 3))}
    state, other = ours.init(params), theirs.init(params)
    for seed in range(3):
        grads = {"w": jax.random.normal(jax.random.key(seed), (4, 3)).at[0].set(0)}
        before = state
        updates, state = ours.update(grads, state)
        expected, other = theirs.update(grads, other)
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (expected, other))

    def summed(grads):
        found: Any = ours.update(grads, before)[0]
        return found["w"].sum()

    derivative = jax.grad(summed)(grads)["w"]
    # Where m and v are 0, the update is m / (sqrt(eps_root) + eps) to first order.
    slope = 0.1 / (1 - 0.9**3) / (eps_root**0.5 + 1e-8)
    assert np.isfinite(derivative).all()
    np.testing.assert_allclose(derivative[0], slope, rtol=1e-5)
