"""Named activations of the blocks: read them, or run the model with one of them replaced.

    embed          what the embedding puts out        [D]
    mlp_in.{L}     what the mlp of layer L reads, after its norm
    mlp_out.{L}    what it adds to the residual stream (Gemma: after the norm behind it)
    attn_out.{L}   what the output projection of the attention reads, heads joined    [H K]
    resid_post.{L} the residual stream behind layer L; the last layer's too is before the final norm

Layers count from 0. These are the hook points that published sparse autoencoders name (Gemma Scope
2, SAELens). transformers' `hidden_states[L + 1]` is resid_post.L of all layers but the last.

Dims: B batch, T tokens, D width, L layers, H heads, K head width.
"""

import dataclasses
import re
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from core.config import Execution, ModelConfig
from core.errors import InputError
from core.linear import SPLICE, SPLICED, TAPS
from core.model import EMBEDDED, STACKED, Decoder, Variables
from core.schema import Params

EMBED = "embed"
KINDS = ("resid_post", "mlp_out", "attn_out", "mlp_in")


class Tap(NamedTuple):
    """A named activation; layer -1 is before all layers."""

    kind: str
    layer: int

    def __str__(self) -> str:
        return self.kind if self.kind == EMBED else f"{self.kind}.{self.layer}"


def parse(text: str, config: ModelConfig | None = None) -> Tap:
    """The tap of a name such as `resid_post.12`; InputError if the model has none of that name."""
    if text == EMBED:
        return Tap(EMBED, -1)
    found = re.fullmatch(rf"({'|'.join(KINDS)})\.(\d+)", text)
    if not found:
        raise InputError(f"site {text!r} is unknown; give {EMBED}, or a layer of "
                         f"{', '.join(KINDS)}, such as resid_post.0")  # fmt: skip
    tap = Tap(found[1], int(found[2]))
    if config is not None and tap.layer >= config.layers:
        raise InputError(f"site {text}: the model has layers 0 to {config.layers - 1}")
    return tap


def width(config: ModelConfig, tap: Tap) -> int:
    """Features of the activation."""
    return config.heads * config.head_dim if tap.kind == "attn_out" else config.width


def first(config: ModelConfig, variables: Variables, layers: int) -> tuple[ModelConfig, Variables]:
    """The model that ends behind its first `layers` layers."""
    cut = dataclasses.replace(config, layers=layers, sliding=config.sliding[:layers])

    def shorter(name: str, tree: Params) -> Params:
        if name not in STACKED or "blocks" not in tree:
            return tree
        return {**tree, "blocks": jax.tree.map(lambda x_L: x_L[:layers], tree["blocks"])}

    return cut, {name: shorter(name, tree) for name, tree in variables.items()}


def read(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    taps: tuple[Tap, ...],
) -> tuple[jax.Array, ...]:
    """The activations [B,T,D] in the compute dtype; layers behind the last one asked for are not
    run."""
    layers = max(1, *(tap.layer + 1 for tap in taps))
    config, variables = first(config, variables, layers)
    return run(config, execution, variables, ids_BT, taps)[1]


def run(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    taps: tuple[Tap, ...],
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(final hidden states [B,T,D], the activations [B,T,D] on the way)."""
    h_BTD, seen = Decoder(config, execution).apply(variables, ids_BT, mutable=[TAPS])
    held = cast(dict[str, Any], seen)[TAPS]
    blocks = held["blocks"]
    found = (held[EMBEDDED] if t.kind == EMBED else blocks[t.kind][t.layer] for t in taps)
    return cast(jax.Array, h_BTD), tuple(found)


def spliced(config: ModelConfig, variables: Variables, tap: Tap, value_BTD: jax.Array) -> Variables:
    """Variables with which the model runs on with `value_BTD` in the place of its own activation.

    For any function of `core.model` and of this module, of ids [B,T].
    """
    if tap.kind == EMBED:
        here, value = {EMBEDDED: jnp.array(True)}, {EMBEDDED: value_BTD}
    else:
        layers = jnp.arange(config.layers)
        here = {"blocks": {tap.kind: layers == tap.layer}}
        value = {"blocks": {tap.kind: value_BTD}}
    return {**variables, SPLICE: here, SPLICED: value}
