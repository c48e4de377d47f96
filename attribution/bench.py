"""What attribution's passes cost, against plain training and the naive way.

Dims: B batch, T tokens, N matmul parameters, A attention FLOPs.

All programs run in one process on the same batch with the same execution settings, in turn, and
medians are compared, so a noisy machine spoils all of them alike. FLOPs of a token: forward
2N + A, training 6N + 3A; the projected pass forms no weight gradient and adds the projections,
4N + 3A + pi, which is the floor of its ratio. `ekfac_fit` is the two passes of an EK-FAC fit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attribution import dot, exact, gradients
from attribution.curvature import moments
from attribution.curvature.moments import Moments, Positions, RuleName
from attribution.projection import Projection
from attribution.targets import Spec, sites, targets, width
from core import families, model, schema
from core.attention import causal_attention
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.layers import activation, layer_norm
from core.presets import PRESETS
from core.timing import alternate

PROGRAMS = ("forward", "value_and_grad", "projected", "global_sketch", "token_scores",
            "exact_scores", "kfac", "ekfac_correction", "vmap_grad")  # fmt: skip


class Program(NamedTuple):
    """A function to be timed, and what it is given."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def bench(
    preset: str,
    batch: int,
    length: int,
    projection_dims: Sequence[int],
    repeats: int,
    names: Sequence[str],
    parts: bool,
    execution: Execution,
) -> dict[str, Any]:
    """Median times as ratios to value-and-grad of all parameters, tokens/s, temporary bytes.

    names: of `PROGRAMS`, what to time; value_and_grad always is.
    """
    config = PRESETS[preset]
    if not 2 <= length <= config.context or min(batch, repeats, *projection_dims) < 1:
        raise InputError(f"--length must be 2 to {config.context}; --batch, --repeats and "
                         "--projection-dim positive")  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)  # one, for all programs
    ids_BT = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    wanted = [name for name in PROGRAMS if name in (*names, "value_and_grad")]
    programs: dict[str, Program] = {}
    for name in wanted:
        programs |= _program(name, config, execution, params, ids_BT, projection_dims)
    if parts:
        programs |= _parts(config, execution, batch, length)
    compiled: dict[str, Any] = {}
    for name, (function, arguments) in programs.items():
        with jax.default_matmul_precision("highest"):  # as the attribution passes have it
            compiled[name] = jax.jit(function).lower(*arguments).compile()
    runs = {name: functools.partial(f, *programs[name].arguments) for name, f in compiled.items()}
    median, cpu = alternate(runs, repeats)
    main = [name for name in median if ":" not in name]
    times = {name: median[name] for name in main}
    if {"kfac", "ekfac_correction"} <= times.keys():
        times["ekfac_fit"] = times["kfac"] + times["ekfac_correction"]
    whole = median["value_and_grad"]
    result = {
        "preset": preset,
        "batch": batch,
        "length": length,
        "projection_dims": [*projection_dims],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(config.layers)},
        "seconds": times,
        "cpu_seconds": {name: cpu[name] for name in main},
        "ratios": {name: value / whole for name, value in times.items()},
        "tokens_per_second": {name: batch * length / value for name, value in times.items()},
        "temp_bytes": {name: compiled[name].memory_analysis().temp_size_in_bytes for name in main},
        "flop_floor": {str(p): flop_floor(config, length, p) for p in projection_dims},
    }
    if parts:
        each = {name: median[name] for name in median if ":" in name}
        of = {name: int(name.split(":")[1]) * value for name, value in each.items()}
        result["parts"] = {**of, "sum": sum(of.values())}
        result["value_and_grad_to_parts"] = whole / sum(of.values())
    return result


def _program(
    name: str,
    config: ModelConfig,
    execution: Execution,
    params: schema.Params,
    ids_BT: jax.Array,
    dims: Sequence[int],
) -> dict[str, Program]:
    """The programs of one name: one for each projection, or one."""
    batch, length = ids_BT.shape
    weights_BT = jnp.ones((batch, length), jnp.float32)
    plain = Spec(Projection(0))

    def loss(params: schema.Params, ids_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
        return model.weighted_loss(
            config, execution, {"params": params}, ids_BT, ids_BT, weights_BT
        )[0]

    def projected(spec: Spec) -> Program:
        def run(params: schema.Params, aux: Any, ids_BT: jax.Array) -> Any:
            variables = {"params": params}
            return gradients.example_gradients(
                config, execution, spec, variables, aux, ids_BT, ids_BT
            )

        return Program(run, (params, gradients.projections(config, spec), ids_BT))

    if name == "forward":
        return {name: Program(loss, (params, ids_BT, weights_BT))}
    if name == "value_and_grad":
        return {name: Program(jax.value_and_grad(loss), (params, ids_BT, weights_BT))}
    if name == "projected":
        return {f"{name}_{p}": projected(Spec(Projection(p))) for p in dims}
    if name == "global_sketch":
        return {f"{name}_{dims[0]}": projected(Spec(Projection(dims[0], target="global")))}
    if name == "token_scores":
        spec = Spec(Projection(dims[0]))
        aux = gradients.projections(config, spec)
        direction_1D = jax.random.normal(jax.random.key(2), (1, width(config, spec)))
        tree = dot.by_sink(config, spec, direction_1D)

        def token_scores(params: schema.Params, aux: Any, tree: Any, ids_BT: jax.Array) -> Any:
            return dot.features_and_tokens(
                config, execution, spec, {"params": params}, aux, tree, ids_BT, ids_BT
            )

        return {f"{name}_{dims[0]}": Program(token_scores, (params, aux, tree, ids_BT))}
    if name == "exact_scores":
        held = exact.leaves(config, plain, {"params": params})
        along = jax.tree.map(lambda x: jnp.ones((1, *x.shape), x.dtype), held)

        def exact_scores(params: schema.Params, along: Any, ids_BT: jax.Array) -> Any:
            variables = {"params": params}
            return exact.token_scores(config, execution, plain, variables, along, ids_BT, ids_BT)

        return {name: Program(exact_scores, (params, along, ids_BT))}
    if name in ("kfac", "ekfac_correction"):
        rule: RuleName = "kfac" if name == "kfac" else "corrections"
        sums, squares = (moments.zeros(config, plain, of) for of in (rule, "kfac"))
        bases = {s: Moments(*(jnp.ones(x.shape) for x in both)) for s, both in squares.items()}
        rows_B = jnp.arange(batch, dtype=jnp.int32)
        rest = Positions(ids_BT, ids_BT, jnp.full(batch, length, jnp.int32), rows_B)

        def curvature(params: schema.Params, bases: Any, sums: Any, rest: Positions) -> Any:
            return moments.accumulate(
                config, execution, plain, rule, {"params": params}, bases, sums, rest, None
            )

        return {name: Program(curvature, (params, None if name == "kfac" else bases, sums, rest))}
    spec = Spec(Projection(dims[0]))

    def vmap_grad(params: schema.Params, aux: Any, ids_BT: jax.Array) -> Any:
        def one(blocks: Any, ids_T: jax.Array) -> jax.Array:
            return loss({**params, "blocks": blocks}, ids_T[None], weights_BT[:1])

        grads: Any = jax.vmap(jax.grad(one), (None, 0))(params["blocks"], ids_BT)
        out = {}
        for target in targets(config, spec):
            w_BLIO = schema.get({"blocks": grads}, f"{target.site.path}/w")
            left_LOP, right_LIP = aux[target.sink][:2]
            out[target.sink] = jnp.einsum("BLIO,LOP,LIQ->BLPQ", w_BLIO, left_LOP, right_LIP)
        return out

    return {name: Program(vmap_grad, (params, gradients.projections(config, spec), ids_BT))}


def flop_floor(config: ModelConfig, length: int, p: int) -> float:
    """(4N + 3A + pi) / (6N + 3A), FLOPs of one token; attention counted in full."""
    maps = sites(config)
    n = config.layers * sum(s.inputs * s.outputs for s in maps)
    n += config.vocab_size * config.width
    a = 4 * config.layers * length * config.heads * config.head_dim
    pi = 2 * config.layers * sum((s.inputs + s.outputs) * p + p * p for s in maps)
    return (4 * n + 3 * a + pi) / (6 * n + 3 * a)


def _parts(
    config: ModelConfig, execution: Execution, batch: int, length: int
) -> dict[str, Program]:
    """The pieces of a training step, each alone, as name:count; value and every gradient."""
    d, f, v, layers = config.width, config.mlp_width, config.vocab_size, config.layers
    shape_BT, key = (batch, length), jax.random.key(2)
    dtype = execution.compute_dtype

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(key, shape, dtype)

    def both(function: Callable[..., jax.Array], *inputs: jax.Array) -> Program:
        """Forward and every gradient, for a random cotangent."""
        cotangent = jax.random.normal(key, jax.eval_shape(function, *inputs).shape, dtype)

        def run(cotangent: jax.Array, *inputs: jax.Array) -> Any:
            value, pull = jax.vjp(function, *inputs)
            return value, pull(cotangent)

        return Program(run, (cotangent, *inputs))

    heads = (*shape_BT, config.heads, config.head_dim)
    linears = {
        f"{s.name.format(l='l')}:{layers}": both(
            lambda x_BTI, w_IO: x_BTI @ w_IO, draw(*shape_BT, s.inputs), draw(s.inputs, s.outputs)
        )
        for s in sites(config)
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
        "head:1": Program(head, (draw(*shape_BT, d), draw(v, d))),
        "embedding:1": both(lambda w_VD: w_VD[targets_BT], draw(v, d)),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The result for people: one line a program."""
    dims = ", ".join(map(str, result["projection_dims"]))
    lines = [
        f"{result['preset']}: batch {result['batch']} x {result['length']} tokens, "
        f"projection {dims}, {result['device']}, jax {result['jax']}",
        f"{'program':18} {'seconds':>9} {'tokens/s':>10} {'ratio':>7} {'temp MiB':>9}",
    ]
    for name, seconds in result["seconds"].items():
        temp = result["temp_bytes"].get(name)
        lines.append(
            f"{name:18} {seconds:9.4f} {result['tokens_per_second'][name]:10,.0f} "
            f"{result['ratios'][name]:7.3f} " + (f"{temp / 2**20:9.1f}" if temp else "")
        )
    floors = ", ".join(f"{floor:.3f} (P = {p})" for p, floor in result["flop_floor"].items())
    lines.append(f"FLOP floor of projected / value_and_grad: {floors}")
    for name, seconds in result.get("parts", {}).items():
        lines.append(f"  part {name:24} {seconds:9.4f}")
    if "parts" in result:
        lines.append(f"value_and_grad / sum of parts: {result['value_and_grad_to_parts']:.2f}")
    return "\n".join(lines)
