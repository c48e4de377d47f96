"""What the projected per-example pass costs, against plain training and the naive way.

Dims: B batch, T tokens, N matmul parameters, A attention FLOPs.

All four programs run in one process on the same batch with the same execution settings, in turn,
and medians are compared, so a noisy machine spoils all of them alike. FLOPs of a token: forward
2N + A, training 6N + 3A; the projected pass forms no weight gradient and adds the projections,
4N + 3A + pi, which is the floor of its ratio.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attribution import gradients
from attribution.gradients import Spec
from attribution.projection import Projection
from core import families, model, schema
from core.attention import causal_attention
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.layers import activation, layer_norm
from core.presets import PRESETS


def bench(
    preset: str,
    batch: int,
    length: int,
    projection_dim: int,
    repeats: int,
    naive: bool,
    parts: bool,
    execution: Execution,
) -> dict[str, Any]:
    """Median times as ratios to value-and-grad of all parameters, tokens/s, temporary bytes."""
    config = PRESETS[preset]
    if not 2 <= length <= config.context or min(batch, repeats, projection_dim) < 1:
        raise InputError(f"--length must be 2 to {config.context}; --batch, --repeats and "
                         "--projection-dim positive")  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)
    ids_BT = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    spec = Spec(Projection(projection_dim))
    aux = gradients.projections(config, spec)
    programs = _programs(config, execution, spec, batch, length)
    if not naive:
        del programs["vmap_grad"]
    compiled, seconds = {}, {name: [] for name in programs}
    arguments: dict[str, tuple[Any, ...]] = {name: (params, aux, ids_BT) for name in programs}
    if parts:
        for name, (function, inputs) in _parts(config, execution, batch, length).items():
            programs[name], arguments[name], seconds[name] = function, inputs, []
    for name, function in programs.items():
        with jax.default_matmul_precision("highest"):  # as the projected pass has it
            compiled[name] = jax.jit(function).lower(*arguments[name]).compile()
        jax.block_until_ready(compiled[name](*arguments[name]))
    for _ in range(repeats):
        for name, function in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(function(*arguments[name]))
            seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(values)) for name, values in seconds.items()}
    whole = median["value_and_grad"]
    main = [name for name in median if ":" not in name]
    result = {
        "preset": preset,
        "batch": batch,
        "length": length,
        "projection_dim": projection_dim,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(config.layers)},
        "seconds": {name: median[name] for name in main},
        "ratios": {name: median[name] / whole for name in main if name != "value_and_grad"},
        "tokens_per_second": {name: batch * length / median[name] for name in main},
        "temp_bytes": {name: compiled[name].memory_analysis().temp_size_in_bytes for name in main},
        "flop_floor": flop_floor(config, length, projection_dim),
    }
    if parts:
        each = {name: median[name] for name in median if ":" in name}
        times = {name: int(name.split(":")[1]) * value for name, value in each.items()}
        result["parts"] = {**times, "sum": sum(times.values())}
        result["ratios"]["value_and_grad_to_parts"] = whole / sum(times.values())
    return result


def _programs(
    config: ModelConfig, execution: Execution, spec: Spec, batch: int, length: int
) -> dict[str, Callable[..., Any]]:
    weights_BT = jnp.ones((batch, length), jnp.float32)

    def loss(params: schema.Params, ids_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        return model.weighted_loss(
            config, execution, {"params": params}, ids_BT, ids_BT, weights_BT
        )[0]

    def forward(params: schema.Params, aux: Any, ids_BT: jax.Array) -> jax.Array:
        return loss(params, ids_BT, weights_BT)

    def value_and_grad(params: schema.Params, aux: Any, ids_BT: jax.Array) -> Any:
        return jax.value_and_grad(loss)(params, ids_BT, weights_BT)

    def projected(params: schema.Params, aux: Any, ids_BT: jax.Array) -> Any:
        return gradients.example_gradients(
            config, execution, spec, {"params": params}, aux, ids_BT, ids_BT
        )

    def vmap_grad(params: schema.Params, aux: Any, ids_BT: jax.Array) -> Any:
        def one(blocks: Any, ids_T: jax.Array) -> jax.Array:
            return loss({**params, "blocks": blocks}, ids_T[None], weights_BT[:1])

        grads: Any = jax.vmap(jax.grad(one), (None, 0))(params["blocks"], ids_BT)
        out = {}
        for site in gradients.sites(config):
            w_BLIO = schema.get({"blocks": grads}, f"{site.path}/w")
            left_LOP, right_LIP = aux[f"{site.path}/weight"]
            out[site.path] = jnp.einsum("BLIO,LOP,LIQ->BLPQ", w_BLIO, left_LOP, right_LIP)
        return out

    return {
        "forward": forward,
        "value_and_grad": value_and_grad,
        "projected": projected,
        "vmap_grad": vmap_grad,
    }


def flop_floor(config: ModelConfig, length: int, p: int) -> float:
    """(4N + 3A + pi) / (6N + 3A), FLOPs of one token; attention counted in full."""
    sites = gradients.sites(config)
    n = config.layers * sum(s.inputs * s.outputs for s in sites)
    n += config.vocab_size * config.width
    a = 4 * config.layers * length * config.heads * config.head_dim
    pi = 2 * config.layers * sum((s.inputs + s.outputs) * p + p * p for s in sites)
    return (4 * n + 3 * a + pi) / (6 * n + 3 * a)


def _parts(
    config: ModelConfig, execution: Execution, batch: int, length: int
) -> dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]]:
    """The pieces of a training step, each alone: name:count -> (value-and-grad, inputs)."""
    d, f, v, layers = config.width, config.mlp_width, config.vocab_size, config.layers
    shape_BT, key = (batch, length), jax.random.key(2)
    dtype = execution.compute_dtype

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, dtype)

    def both(function: Callable[..., jax.Array], *inputs: jax.Array) -> Any:
        """Forward and every gradient, for a random cotangent."""
        cotangent = jax.random.normal(key, jax.eval_shape(function, *inputs).shape, dtype)

        def run(cotangent: jax.Array, *inputs: jax.Array) -> Any:
            value, pull = jax.vjp(function, *inputs)
            return value, pull(cotangent)

        return run, (cotangent, *inputs)

    heads = (*shape_BT, config.heads, config.head_dim)
    linears = {
        f"{s.name.format(l='l')}:{layers}": both(
            lambda x_BTI, w_IO: x_BTI @ w_IO, draw(*shape_BT, s.inputs), draw(s.inputs, s.outputs)
        )
        for s in gradients.sites(config)
    }
    targets_BT = jax.random.randint(key, shape_BT, 0, v)
    chunk = execution.tokens_per_chunk(v)
    weights_BT = jnp.ones(shape_BT, jnp.float32)

    def head(h_BTD: jax.Array, w_VD: jax.Array) -> Any:
        def loss(h_BTD: jax.Array, w_VD: jax.Array) -> jax.Array:
            out: Any = model.loss.weighted_nll(h_BTD, w_VD, targets_BT, weights_BT, chunk)
            return out[0]

        return jax.value_and_grad(loss, (0, 1))(h_BTD, w_VD)

    return {
        **linears,
        f"attention:{layers}": both(
            lambda q, k, v: causal_attention(q, k, v, config.head_dim**-0.5),
            draw(*heads), draw(*heads), draw(*heads),
        ),
        f"norm:{2 * layers + 1}": both(
            lambda x, g, b: layer_norm(x, g, b, config.norm_eps),
            draw(*shape_BT, d), draw(d), draw(d),
        ),
        f"activation:{layers}": both(activation(config.activation), draw(*shape_BT, f)),
        "head:1": (head, (draw(*shape_BT, d), draw(v, d))),
        "embedding:1": both(lambda w_VD: w_VD[targets_BT], draw(v, d)),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for people: one line a program."""
    lines = [
        f"{result['preset']}: batch {result['batch']} x {result['length']} tokens, "
        f"projection {result['projection_dim']}, {result['device']}, jax {result['jax']}",
        f"{'program':16} {'seconds':>9} {'tokens/s':>10} {'ratio':>7} {'temp MiB':>9}",
    ]
    for name, seconds in result["seconds"].items():
        lines.append(
            f"{name:16} {seconds:9.4f} {result['tokens_per_second'][name]:10,.0f} "
            f"{result['ratios'].get(name, 1):7.3f} {result['temp_bytes'][name] / 2**20:9.1f}"
        )
    lines.append(f"FLOP floor of projected / value_and_grad: {result['flop_floor']:.3f}")
    for name, seconds in result.get("parts", {}).items():
        lines.append(f"  part {name:24} {seconds:9.4f}")
    if "parts" in result:
        lines.append(f"value_and_grad / sum of parts: "
                     f"{result['ratios']['value_and_grad_to_parts']:.2f}")  # fmt: skip
    return "\n".join(lines)
