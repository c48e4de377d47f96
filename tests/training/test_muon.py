"""Muon against singular values, step by step on a model's parameters, and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import checkpoint, families, schema
from core.config import Execution, ModelConfig
from core.rows import load_rows, save_rows
from core.rundir import open_run
from training.loop import Settings, train
from training.muon import orthogonalise
from training.optim import Optim, build

pytestmark = pytest.mark.usefixtures("standard_promotion")
LAYERS = 2
ROWS = [
    schema.Row("embed/wte", (7, 4), (None, None), "wte.weight"),
    schema.Row("blocks/w", (4, 6), (None, None), "h.{l}.weight"),
    schema.Row("blocks/b", (6,), (None,), "h.{l}.bias"),
]
MUON = Optim("muon", 0.1, "constant", momentum=0.9, clip=0.0, eps_root=1e-6)


def by_singular_values(x_IO):
    """The quintic of Newton-Schulz, five times on each singular value."""
    u_IK, s_K, v_KO = np.linalg.svd(x_IO, full_matrices=False)
    s_K = s_K / np.sqrt((s_K**2).sum())
    for _ in range(5):
        s_K = 3.4445 * s_K - 4.7750 * s_K**3 + 2.0315 * s_K**5
    return (u_IK * s_K) @ v_KO


def tree(seed, dtype="float64"):
    rng, shapes = np.random.default_rng(seed), schema.abstract(ROWS, LAYERS)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_singular_values_are_pushed_towards_one(x64, close, dtype):
    rng = np.random.default_rng(0)
    x_LIO = rng.normal(size=(3, 4, 6))
    x_LIO[2] *= 1e-5
    expected_LIO = np.stack([by_singular_values(x_IO) for x_IO in x_LIO])
    found_LIO = orthogonalise(jnp.asarray(x_LIO, dtype))
    assert found_LIO.dtype == dtype
    close(found_LIO, expected_LIO, dtype)
    close(orthogonalise(jnp.asarray(x_LIO.swapaxes(1, 2), dtype)).mT, expected_LIO, dtype)
    close(orthogonalise(jnp.asarray(x_LIO[0], dtype)), expected_LIO[0], dtype)
    assert 0.3 < np.linalg.svd(found_LIO)[1].min() and np.linalg.svd(found_LIO)[1].max() < 1.3


def test_three_steps(x64, close):
    """Momentum and its look ahead, decay beside it, each layer its own; AdamW for the vectors."""
    optim = Optim("muon", 0.1, "constant", momentum=0.9, clip=0.0, weight_decay=0.5, decay=("*",))
    adamw = Optim("adamw", 0.1, "constant", clip=0.0, weight_decay=0.5, decay=("*",))
    (muon, other), params = (build(o, 10, ROWS) for o in (optim, adamw)), tree(0)
    state, others = muon.init(params), other.init(params)
    move, other_move = jax.jit(muon.update), jax.jit(other.update)
    trace = jax.tree.map(np.zeros_like, params)
    for step in range(3):
        grads = tree(step + 1)
        updates, state = move(grads, state, params)
        vectors, others = other_move(grads, others, params)
        trace = jax.tree.map(lambda m, g: 0.9 * m + g, trace, grads)
        for row in ROWS:
            found, x, g, m = (schema.get(t, row.path) for t in (updates, params, grads, trace))
            if len(row.shape) == 2:
                ahead_LIO = np.asarray(g + 0.9 * m).reshape(-1, *row.shape)
                turned = np.stack([by_singular_values(x_IO) for x_IO in ahead_LIO])
                scale = 0.2 * np.sqrt(max(row.shape))
                expected = -0.1 * (scale * turned.reshape(found.shape) + 0.5 * x)
            else:
                expected = schema.get(vectors, row.path)
            close(found, expected, 1e-12)


def test_derivatives(x64):
    """The pullback of an update is the transpose of central differences, also for many at once."""
    transformation, params = build(MUON, 10, ROWS), tree(0)
    state = jax.jit(transformation.update)(tree(1), transformation.init(params), params)[1]
    grads, along, h = tree(2), tree(3), 1e-6

    @jax.jit
    def move(grads):
        return transformation.update(grads, state, params)[0]

    def shifted(by):
        return move(jax.tree.map(lambda g, d: g + by * d, grads, along))

    def dot(one, other):
        return sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))

    onto = [tree(4), tree(5)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *onto)
    (pulled,) = jax.jit(jax.vmap(jax.vjp(move, grads)[1]))(stacked)
    slope = jax.tree.map(lambda a, b: (a - b) / (2 * h), shifted(h), shifted(-h))
    for number, one in enumerate(onto):
        found = dot([x[number] for x in jax.tree.leaves(pulled)], jax.tree.leaves(along))
        assert found == pytest.approx(dot(*map(jax.tree.leaves, (one, slope))), rel=1e-8)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_zero_gradient_moves_nothing_and_has_a_derivative(x64, dtype):
    params = tree(0, dtype)
    zero = jax.tree.map(jnp.zeros_like, params)
    transformation = build(MUON, 10, ROWS)
    state = transformation.init(params)
    move = jax.jit(lambda grads: transformation.update(grads, state, params)[0])
    updates, pull = jax.vjp(move, zero)
    assert all(x.dtype == dtype and not x.any() for x in jax.tree.leaves(updates))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(pull(params)))


def test_a_run_goes_on_from_a_checkpoint_with_the_same_bits(tmp_path):
    config, rng = ModelConfig("gpt2", 7, 5, 4, 1, 2, 8, 2), np.random.default_rng(0)
    save_rows(tmp_path / "rows", [rng.integers(0, 7, 5) for _ in range(8)])
    rows = load_rows(tmp_path / "rows", 7, 5)
    params = schema.init(families.rows(config), config.layers, 0)

    def trained(name, *ends):
        for steps in ends:
            with open_run(tmp_path / name, "train lm", {}) as run:
                run.inputs(rows=rows.sha)
                settings = Settings(steps, 4, save_every=2)
                summary = train(run, config, params, rows, settings, MUON, Execution())
        return summary["model"]

    assert trained("whole", 4) == trained("halves", 2, 4) != checkpoint.fingerprint(config, params)
