"""What fingerprints and a training step of an SAE cost beside the model's forward pass.

Weights are random, and thresholds such that about `L0` features are active at a token. All programs
run in one process on the same batch, in turn, and medians are compared, so a noisy machine spoils
all of them alike. The forward pass ends behind the layer that the SAE reads; it never meets the
output matrix, so a small vocabulary stands for the model's.

Dims: B rows, T tokens, D width, F features, N tokens of a batch.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from core import families, schema, taps
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.model import full_precision
from core.presets import PRESETS
from core.taps import Tap
from core.timing import alternate
from sae import pooling, topk
from sae.coder import Coder, decode, encode, preactivations
from sae.pooling import STATISTICS, Spec
from sae.training import step
from sae.training.losses import Objective
from sae.training.step import Recipe

VOCABULARY = 16_384
L0 = 60  # of Gemma Scope's SAEs of medium sparsity
SAMPLE = 256  # tokens that the thresholds are set on
K, TOKEN_K = 256, 16  # features kept of a row, and of a token
BAR = 1.25  # for forward pass and fingerprint together, of the forward pass


def bench(
    preset: str,
    layer: int,
    features: int,
    batch: int,
    length: int,
    repeats: int,
    execution: Execution,
) -> dict[str, Any]:
    """Median times, their ratios to the forward pass, tokens/s, temporary bytes; of the processors'
    time too, which tells more than the clock on a busy machine.

    forward: to the layer's output. fingerprint: that and all that `sae.pooling.pool` keeps; tokens:
    with features of every token besides. pool, encode, decode: of the batch's activations. top_k,
    top_k_xla: of pooled features, ours and jax's. train_step: of a JumpReLU SAE on the batch.
    """
    config = PRESETS[preset]
    if not 0 <= layer < config.layers or not 1 <= length <= config.context:
        raise InputError(f"{preset} has layers 0 to {config.layers - 1} and a context of "
                         f"{config.context}; give such a --layer and --length")  # fmt: skip
    if min(batch, repeats) < 1 or features < K:
        raise InputError(f"--batch and --repeats must be positive, --width at least {K}")
    config = dataclasses.replace(config, vocab_size=VOCABULARY)
    programs = _programs(config, execution, Tap("resid_post", layer), features, batch, length)
    compiled: dict[str, Any] = {}
    for name, (function, arguments) in programs.items():
        compiled[name] = jax.jit(full_precision(function)).lower(*arguments).compile()
    runs: dict[str, Callable[[], Any]] = {
        name: functools.partial(f, *programs[name][1]) for name, f in compiled.items()
    }
    found = runs["fingerprint"]()
    runs["train_step"] = _training(features, runs["forward"]())
    seconds, cpu = alternate(runs, repeats)
    ratios, ratios_cpu = (
        {name: value / max(of["forward"], 1e-9) for name, value in of.items()}
        for of in (seconds, cpu)
    )
    return {
        "preset": preset,
        "layer": layer,
        "features": features,
        "batch": batch,
        "length": length,
        "l0": float(found["statistics"][:, STATISTICS.index("l0_mean")].mean()),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(layer + 1)},
        "seconds": seconds,
        "cpu_seconds": cpu,
        "ratios": ratios,
        "ratios_cpu": ratios_cpu,
        "tokens_per_second": {name: batch * length / value for name, value in seconds.items()},
        "temp_bytes": {n: f.memory_analysis().temp_size_in_bytes for n, f in compiled.items()},
        "bar": BAR,
        "within_bar": ratios["fingerprint"] <= BAR,
    }


def _programs(
    config: ModelConfig, execution: Execution, tap: Tap, features: int, batch: int, length: int
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions and what they are given, by name."""
    coder = Coder("jumprelu", config.width, features, config.width)
    config, variables = taps.first(
        config, {"params": schema.init(families.rows(config), config.layers, seed=0)}, tap.layer + 1
    )
    ids_BT = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    counted_BT = jnp.ones((batch, length), bool).at[:, 0].set(False)

    def forward(variables: Any, ids_BT: jax.Array) -> jax.Array:
        return taps.read(config, execution, variables, ids_BT, (tap,))[0]

    def fingerprint(spec: Spec, variables: Any, params: Any, ids_BT: jax.Array) -> Any:
        return pooling.pool(spec, params, forward(variables, ids_BT), counted_BT)

    x_BTD = jax.jit(full_precision(forward))(variables, ids_BT)
    x_ND = x_BTD.reshape(-1, config.width).astype(jnp.float32)
    params = _parameters(coder, x_ND[:SAMPLE])
    f_NF = jax.jit(functools.partial(encode, coder))(params, x_ND)
    f_BF = f_NF.reshape(batch, length, features).mean(1)
    spec = Spec(coder, K)
    whole = variables, params, ids_BT
    return {
        "forward": (forward, (variables, ids_BT)),
        "fingerprint": (functools.partial(fingerprint, spec), whole),
        "tokens": (functools.partial(fingerprint, spec._replace(token_k=TOKEN_K)), whole),
        "pool": (functools.partial(pooling.pool, spec), (params, x_BTD, counted_BT)),
        "encode": (functools.partial(encode, coder), (params, x_ND)),
        "decode": (functools.partial(decode, coder), (params, f_NF, x_ND)),
        "top_k": (lambda f_BF: topk.top_k(f_BF, K), (f_BF,)),
        "top_k_xla": (lambda f_BF: jax.lax.top_k(f_BF, K), (f_BF,)),
    }


def _parameters(coder: Coder, sample_ND: jax.Array) -> dict[str, jax.Array]:
    W_enc_DF = jax.random.normal(jax.random.key(2), (coder.d_in, coder.d_sae))
    W_enc_DF /= jnp.linalg.norm(W_enc_DF, axis=0, keepdims=True)
    zeros_F, b_dec = jnp.zeros(coder.d_sae), jnp.zeros(coder.d_out)
    params = {"W_enc": W_enc_DF, "b_enc": zeros_F, "W_dec": W_enc_DF.T, "b_dec": b_dec}
    h_NF = preactivations(coder, params, sample_ND)
    threshold = jnp.quantile(h_NF, 1 - L0 / coder.d_sae)
    return {**params, "threshold": jnp.full(coder.d_sae, jnp.maximum(threshold, 0))}


def _training(features: int, x_BTD: jax.Array) -> Callable[[], Any]:
    """Steps that go on from each other, for each takes the state of the one before."""
    x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
    objective = Objective("jumprelu", sparsity=1.0)
    recipe = Recipe(objective, x_ND.shape[1], features, x_ND.shape[1], steps=10_000)
    state = step.initial(recipe, x_ND[:SAMPLE], seed=0)

    def run() -> Any:
        nonlocal state
        state, metrics = step.train_step(recipe, state, x_ND)
        return state.step, metrics

    return run


def table(result: dict[str, Any]) -> str:
    """The result for people: one line a program."""
    lines = [
        f"{result['preset']}: layer {result['layer']}, {result['features']:,} features, L0 "
        f"{result['l0']:.0f}, batch {result['batch']} x {result['length']} tokens, "
        f"{result['execution']['dtype']}, {result['device']}, jax {result['jax']}",
        f"{'program':12} {'seconds':>9} {'tokens/s':>10} {'ratio':>7} {'by cpu':>7} "
        f"{'temp MiB':>9}",
    ]
    for name, seconds in result["seconds"].items():
        temp = result["temp_bytes"].get(name)
        lines.append(
            f"{name:12} {seconds:9.4f} {result['tokens_per_second'][name]:10,.0f} "
            f"{result['ratios'][name]:7.3f} {result['ratios_cpu'][name]:7.3f} "
            + ("" if temp is None else f"{temp / 2**20:9.1f}")
        )
    kept = "within" if result["within_bar"] else "ABOVE"
    lines.append(f"fingerprint / forward: {kept} the bar of {result['bar']}")
    return "\n".join(lines)
