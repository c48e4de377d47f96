"""Every sink rule against per-example gradients taken by vmap(grad), which knows no sink."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import gradients, rules, targets
from attribution.projection import Projection
from attribution.targets import Spec
from core import model, schema
from core.config import Execution
from core.linear import Sink

LENGTHS = [14, 9, 5]


@dataclasses.dataclass(frozen=True)
class Together:
    """Several rules at one sink: what one emits cannot depend on the others."""

    rules: tuple[Any, ...]

    def save(self, x_BTI, aux):
        return tuple(rule.save(x_BTI, a) for rule, a in zip(self.rules, aux, strict=True))

    def emit(self, saved, aux, g_BTO):
        parts = zip(self.rules, saved, aux, strict=True)
        return tuple(rule.emit(s, a, g_BTO) for rule, s, a in parts)


RULES = [
    ("project", False), ("project", True), ("tokens", False), ("tokens", True),
    ("full", False), ("full", True), ("norm", False), ("norm", True),
]  # fmt: skip
P = 4


def rule_of(name, bias):
    made = {"project": rules.Project(), "tokens": rules.ProjectTokens(),
            "full": rules.Full(bias), "norm": rules.SquaredNorm(bias)}  # fmt: skip
    return made[name]


def catch_all(tiny, config, execution, params, ids_BT, labels_BT):
    """{(rule, bias): {site path: [L,B,...]}} from one backward pass."""
    wide, (b, t), layers = params["embed"]["wte"].dtype, ids_BT.shape, config.layers
    specs = [Spec(Projection(P), bias) for bias in (False, True)]
    pairs = {spec.include_bias: gradients.projections(config, spec) for spec in specs}
    aux, outs = {}, {}
    for site in targets.sites(config):
        shapes = {
            "project": lambda i, o: (P, P), "tokens": lambda i, o: (t, P, P),
            "full": lambda i, o: (o, i), "norm": lambda i, o: (),
        }  # fmt: skip
        sink = f"{site.path}/weight"
        aux[sink] = tuple(
            pairs[bias][sink] if name in ("project", "tokens") else None for name, bias in RULES
        )
        outs[sink] = tuple(
            jnp.zeros((layers, b, *shapes[name](site.inputs + bias, site.outputs)), wide)
            for name, bias in RULES
        )
    rule = Together(tuple(rule_of(*each) for each in RULES))
    weights_BT = gradients.example_weights(labels_BT, "sum", wide)
    run = tiny.jit(gradients.catch, static_argnums=(0, 1, 3))
    batch = (ids_BT, labels_BT, weights_BT)
    caught, _ = run(config, execution, {"params": params}, rule, aux, outs, *batch)
    return {each: {sink.removesuffix("/weight"): np.asarray(v[k]) for sink, v in caught.items()}
            for k, each in enumerate(RULES)}, pairs  # fmt: skip


@functools.cache
def plain_gradients(tiny, config, dtype):
    ids_BT, labels_BT = map(jnp.asarray, tiny.batch(LENGTHS))
    return tiny.plain_gradients(config, tiny.params(config, dtype=dtype), ids_BT, labels_BT, True)


@pytest.mark.parametrize("remat", [False, True], ids=["keep", "remat"])
@pytest.mark.parametrize("layers", ["scan", "unrolled"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_rule_is_vmap_grad(tiny, relative, dtype, layers, remat):
    with jax.enable_x64(dtype == "float64"):
        config = dataclasses.replace(tiny.config, layers=2)
        params = tiny.params(config, dtype=dtype)
        ids_BT, labels_BT = map(jnp.asarray, tiny.batch(LENGTHS))
        execution = Execution(dtype, layers, remat)
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        caught, pairs = catch_all(tiny, config, execution, params, ids_BT, labels_BT)
        plain = plain_gradients(tiny, config, dtype)
        assert len(plain) == len(targets.sites(config)) == 4
        for bias in (False, True):
            for path, g_BLOI in plain.items():
                g_LBOI = np.swapaxes(g_BLOI if bias else g_BLOI[..., :-1], 0, 1)
                pair = pairs[bias][f"{path}/weight"]
                left_LOP, right_LIP = (np.asarray(m, dtype) for m in pair[:2])
                p_LBPQ = np.einsum("LBOI,LOP,LIQ->LBPQ", g_LBOI, left_LOP, right_LIP)
                each = {name: caught[name, bias][path] for name, with_bias in RULES[::2]}
                assert relative(each["full"], g_LBOI) < tolerance
                assert relative(each["project"], p_LBPQ) < tolerance
                assert relative(each["norm"], (g_LBOI**2).sum((-1, -2))) < tolerance
                assert relative(each["tokens"].sum(2), p_LBPQ) < tolerance


def test_tokens_after_the_last_label_emit_nothing(tiny):
    ids_BT, labels_BT = map(jnp.asarray, tiny.batch(LENGTHS))
    caught, _ = catch_all(tiny, tiny.config, Execution(), tiny.params(), ids_BT, labels_BT)
    for p_LBTPQ in caught["tokens", True].values():
        for b, n in enumerate(LENGTHS):
            assert not p_LBTPQ[:, b, n - 1 :].any()  # the last token predicts nothing
            # A masked prompt matters too: later tokens attend to it in the layers above.
            assert p_LBTPQ[:-1, b, : n - 1].any((-1, -2)).all()


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_sinks_on_lora_factors_are_vmap_grad(tiny, relative, x64, layers):
    config, params, rank = tiny.config, tiny.params(dtype="float64"), 3
    execution = Execution("float64", layers, remat=True)
    ids_BT, labels_BT = map(jnp.asarray, tiny.batch(LENGTHS))
    random, b = np.random.default_rng(5), len(LENGTHS)
    lora, zeros = {}, {}
    for site in targets.sites(config):
        sizes = {"a": (site.inputs, rank), "b": (rank, site.outputs)}
        for name, size in sizes.items():
            value = random.normal(0, 0.3, (config.layers, *size))
            schema.put(lora, f"{site.path}/{name}", jnp.asarray(value))
            out = jnp.zeros((config.layers, b, *size[::-1]))
            schema.put(zeros, f"{site.path}/lora_{name}", out)
        schema.put(lora, f"{site.path}/scale", jnp.full(config.layers, 1.7))

    def loss(lora, sinks, ids_BT, labels_BT):
        variables = {"params": params, "lora": lora, "sinks": sinks}
        weights_BT = jnp.ones(ids_BT.shape)
        return model.weighted_loss(config, execution, variables, ids_BT, labels_BT, weights_BT)[0]

    def caught(zeros):
        sinks = jax.tree.map(lambda out: Sink(rules.Full(), None, out), zeros)
        return loss(lora, sinks, ids_BT, labels_BT)

    def alone(lora, ids_T, labels_T):
        return loss(lora, {}, ids_T[None], labels_T[None])

    found = tiny.jit(jax.grad(caught))(zeros)
    plain = tiny.jit(jax.vmap(jax.grad(alone), (None, 0, 0)))(lora, ids_BT, labels_BT)
    for site in targets.sites(config):
        for name in "ab":
            g_LBOI = schema.get(found, f"{site.path}/lora_{name}")
            g_BLIO = schema.get(plain, f"{site.path}/{name}")
            assert relative(g_LBOI, jnp.transpose(g_BLIO, (1, 0, 3, 2))) < 1e-12


def test_a_sink_changes_no_loss_and_no_other_gradient(tiny, x64):
    """An identity: the parameters' gradient is bit for bit what it is without it."""
    config, params = tiny.config, tiny.params(dtype="float64")
    ids_BT, labels_BT = map(jnp.asarray, tiny.batch(LENGTHS))
    outs = {s.path: jnp.zeros((config.layers, len(LENGTHS))) for s in targets.sites(config)}
    sinks: dict[str, Any] = {}
    for path, out in outs.items():
        schema.put(sinks, f"{path}/weight", Sink(rules.SquaredNorm(), None, out))

    def loss(params, sinks):
        variables = {"params": params, "sinks": sinks}
        execution, weights_BT = Execution("float64"), jnp.ones(ids_BT.shape)
        return model.weighted_loss(config, execution, variables, ids_BT, labels_BT, weights_BT)[0]

    with_sinks = tiny.jit(jax.value_and_grad(lambda p: loss(p, sinks)))(params)
    without = tiny.jit(jax.value_and_grad(lambda p: loss(p, {})))(params)
    for a, b in zip(jax.tree.leaves(with_sinks), jax.tree.leaves(without), strict=True):
        np.testing.assert_array_equal(a, b)
