"""What a generated token costs, against reading all weights once and against having no cache.

Dims: B rows, T prompt tokens, I inputs, O outputs, D width, V vocabulary.

A step reads every matrix once for B rows, so its floor is the chain of those products alone, on the
same arrays with the same B. Without a cache, every token costs a forward pass over all tokens. The
programs run in one process, in turn, on random weights; medians are compared.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import families, generate, model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.generate import STEPS, State, Weights
from core.presets import PRESETS
from core.sampling import GREEDY, row_keys

CLOCKS = {"": time.perf_counter, "_cpu": time.process_time}


@functools.partial(jax.jit, static_argnums=0)
@model.full_precision
def floor(config: ModelConfig, weights: Weights, x_BD: jax.Array) -> jax.Array:
    """The products of a step: every matrix of every layer, each fed by the last, and the head."""
    y_BO = x_BD
    for layer in weights.layers:
        for site in schema.sites(families.rows(config)):
            w_IO = schema.get({"blocks": layer["params"]}, f"{site.path}/w")
            repeats = -(-w_IO.shape[0] // y_BO.shape[1])
            y_BO = jnp.tile(y_BO, (1, repeats))[:, : w_IO.shape[0]] @ w_IO
    return model.head_logits(y_BO[:, None, : x_BD.shape[1]], weights.head_VD)


@functools.partial(jax.jit, static_argnums=(0, 1))
@model.full_precision
def uncached(
    config: ModelConfig, execution: Execution, variables: model.Variables, ids_BT: jax.Array
) -> jax.Array:
    """The likeliest next token [B] by a forward pass over all tokens: a step without a cache."""
    h_BTD = model.hidden(config, execution, variables, ids_BT)
    logits_B1V = model.head_logits(h_BTD[:, -1:], model.head(config, variables["params"]))
    return logits_B1V[:, 0].argmax(-1)


def bench(
    preset: str,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    repeats: int,
    execution: Execution,
) -> dict[str, Any]:
    """Median seconds, tokens/s and ratios of greedy decoding; bytes; what compiling costs.

    new_tokens is rounded up to the first token and whole calls of `STEPS`. `_cpu` is the time of
    the processors, which tells more than the clock on a busy machine. programs: how many prompts of
    all lengths up to this one need, that of decoding included.
    """
    config = PRESETS[preset]
    calls = max(-(-(new_tokens - 1) // STEPS), 1)
    tokens = prompt_length + 1 + calls * STEPS
    if tokens > config.context or min(batch, prompt_length, new_tokens, repeats) < 1:
        raise InputError(f"--prompt-length and --new-tokens, rounded up to {1 + calls * STEPS}, "
                         f"must be positive and fit {config.context} tokens")  # fmt: skip
    variables = {"params": schema.init(families.rows(config), config.layers, seed=0)}
    weights = generate.unstack(config, execution, variables)
    ids_BT = jax.random.randint(jax.random.key(1), (batch, tokens), 0, config.vocab_size)
    x_BD = jnp.ones((batch, config.width), execution.compute_dtype)
    state = generate.blank(config, execution, batch, tokens)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.caches))
    rows = jnp.arange(batch)
    prompt = (ids_BT[:, :prompt_length], jnp.full(batch, prompt_length), rows,
              row_keys(0, range(batch)), jnp.int32(tokens))  # fmt: skip
    more = (jnp.array([-1]), jnp.zeros(batch, bool))
    compile_seconds: dict[str, float] = {}

    def compiled(name: str, function: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        program = function.lower(*arguments).compile()
        compile_seconds[name] = time.perf_counter() - began
        return program

    how = (config, execution)
    prefill = compiled("prefill", generate.prefill, *how, GREEDY, weights, state, *prompt)
    decode = compiled("decode", generate.decode, *how, GREEDY, weights, state, *more)
    chain = compiled("floor", floor, config, weights, x_BD)
    whole = compiled("uncached", uncached, *how, variables, ids_BT)

    def decode_all(state: State) -> tuple[State, Any]:
        for _ in range(calls):
            state, chosen = decode(weights, state, *more)
        return state, chosen

    # name: (what runs, steps in it); decoding starts from what prefilling left.
    programs: dict[str, tuple[Callable[[State], tuple[State, Any]], int]] = {
        "prefill": (lambda state: prefill(weights, state, *prompt), 1),
        "decode": (decode_all, calls * STEPS),
        "floor": (lambda state: (state, chain(weights, x_BD)), 1),
        "uncached": (lambda state: (state, whole(variables, ids_BT)), 1),
    }
    times: dict[str, list[float]] = {f"{name}{clock}": [] for name in programs for clock in CLOCKS}
    for repeat in range(repeats + 1):
        for name, (run, steps) in programs.items():
            before = [clock() for clock in CLOCKS.values()]
            state, _ = jax.block_until_ready(run(state))
            for (suffix, clock), was in zip(CLOCKS.items(), before, strict=True):
                if repeat:  # the first is a warm-up
                    times[name + suffix].append((clock() - was) / steps)
    median = {name: float(np.median(values)) for name, values in times.items()}
    matrices = [x for x in jax.tree.leaves((weights.layers, weights.head_VD)) if x.ndim == 2]
    read = sum(x.nbytes for x in matrices)
    widths = {generate.bucket(n, config.context) for n in range(1, prompt_length + 1)}
    return {
        "preset": preset,
        "batch": batch,
        "prompt_length": prompt_length,
        "new_tokens": 1 + calls * STEPS,
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(config.layers)},
        "seconds": median,
        "tokens_per_second": {
            "prefill": batch * prompt_length / median["prefill"],
            "decode": batch / median["decode"],
            "uncached": batch / median["uncached"],
        },
        "ratios": {
            "decode_to_floor": median["decode"] / median["floor"],
            "decode_to_floor_cpu": median["decode_cpu"] / max(median["floor_cpu"], 1e-9),
            "uncached_to_decode": median["uncached"] / median["decode"],
        },
        "bytes": {
            "weights_read": read,
            "cache": cache_bytes,
            "prefill_temp": prefill.memory_analysis().temp_size_in_bytes,
            "decode_temp": decode.memory_analysis().temp_size_in_bytes,
        },
        "floor_bytes_per_second": read / median["floor"],
        "compile_seconds": compile_seconds,
        "programs": 1 + sum(len({*generate.heights(width, batch, 1)}) for width in widths),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: one line a program."""
    seconds, rates, ratios = (result[key] for key in ("seconds", "tokens_per_second", "ratios"))
    mib = {name: size / 2**20 for name, size in result["bytes"].items()}
    lines = [
        f"{result['preset']}: batch {result['batch']}, {result['prompt_length']} tokens + "
        f"{result['new_tokens']} new, {result['execution']['dtype']}, {result['device']}, "
        f"jax {result['jax']}",
        f"{'program':16} {'seconds':>9} {'cpu':>9} {'tokens/s':>10} {'compile':>8}",
    ]
    for name, compiling in result["compile_seconds"].items():
        rate = f"{rates[name]:10,.1f}" if name in rates else " " * 10
        lines.append(f"{name:16} {seconds[name]:9.4f} {seconds[name + '_cpu']:9.4f} {rate} "
                     f"{compiling:8.1f}")  # fmt: skip
    lines += [
        f"decode / floor: {ratios['decode_to_floor']:.2f} ({ratios['decode_to_floor_cpu']:.2f} of "
        f"processor time); uncached / decode: {ratios['uncached_to_decode']:.1f}",
        f"floor: {mib['weights_read']:,.0f} MiB of weights at "
        f"{result['floor_bytes_per_second'] / 1e9:.1f} GB/s; cache {mib['cache']:,.1f} MiB",
        f"temporary MiB: prefill {mib['prefill_temp']:,.1f}, decode {mib['decode_temp']:,.1f}; "
        f"programs for all lengths up to {result['prompt_length']}: {result['programs']}",
    ]
    return "\n".join(lines)
