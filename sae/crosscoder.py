"""Crosscoders and cross-layer transcoders: features of several layers that write to several.

    f_l = JumpReLU(x_l W_enc[l] + b_enc[l])
    y_o = sum_l f_l W_dec[l, :, o] + b_dec[o] (+ x_o W_skip[o])

A crosscoder (Lindsey et al. 2024, transformer-circuits.pub/2024/crosscoders) rebuilds the layers
that it read; a cross-layer transcoder (Ameisen et al. 2025, circuit tracing) writes other
activations, the outputs of MLPs, from their inputs. In Gemma Scope 2, whose files these are, that a
layer only writes to later ones is a matter of zeros in W_dec.

Dims: N rows (any leading axes), L layers, D width, F features of a layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import InputError
from core.model import full_precision

Params = Mapping[str, Any]


class Crosscoder(NamedTuple):
    """What a crosscoder computes, apart from its parameters: widths and how many layers."""

    layers: int
    width: int
    features: int


def shapes(coder: Crosscoder) -> dict[str, tuple[int, ...]]:
    """The tensors that a crosscoder must have; W_skip [L,D,D] is one that it may have besides."""
    L, D, F = coder
    return {
        "W_enc": (L, D, F),
        "b_enc": (L, F),
        "threshold": (L, F),
        "W_dec": (L, F, L, D),
        "b_dec": (L, D),
    }


@full_precision
def encode(params: Params, x_NLD: jax.Array) -> jax.Array:
    """Features f [N,L,F] of the layers' activations x [N,L,D]."""
    h_NLF = jnp.einsum("...LD,LDF->...LF", _checked(params, x_NLD), params["W_enc"])
    h_NLF += jnp.broadcast_to(params["b_enc"], h_NLF.shape)
    threshold_NLF = jnp.broadcast_to(params["threshold"], h_NLF.shape)
    return jnp.where(h_NLF <= threshold_NLF, 0, jax.nn.relu(h_NLF))  # NaN stays NaN


@full_precision
def decode(params: Params, f_NLF: jax.Array, x_NLD: jax.Array) -> jax.Array:
    """y [N,L,D] from the features; x [N,L,D], the encoder's input, feeds the skip."""
    y_NLD = jnp.einsum("...LF,LFOD->...OD", f_NLF, params["W_dec"])
    y_NLD += jnp.broadcast_to(params["b_dec"], y_NLD.shape)
    if "W_skip" in params:
        y_NLD += jnp.einsum("...LD,LDO->...LO", _checked(params, x_NLD), params["W_skip"])
    return y_NLD


def check(coder: Crosscoder, params: Params, where: str) -> None:
    """Raise InputError, naming `where`, unless coder and parameters make a crosscoder."""
    expected = shapes(coder)
    if "W_skip" in params:
        expected["W_skip"] = (coder.layers, coder.width, coder.width)
    for name, shape in expected.items():
        if name not in params:
            raise InputError(f"{where}: no tensor {name!r}; it has {', '.join(sorted(params))}")
        found = tuple(np.shape(params[name]))
        if found != shape:
            remedy = "the layers' files are not of one crosscoder"
            if sorted(found) == sorted(shape):
                remedy = "it looks transposed"
            raise InputError(f"{where}: {name} is {list(found)}, not {list(shape)}; {remedy}")


def _checked(params: Params, x_NLD: jax.Array) -> jax.Array:
    layers, width, _ = params["W_enc"].shape
    if x_NLD.shape[-2:] != (layers, width):
        raise InputError(
            f"activations of shape {list(x_NLD.shape)} do not end in the crosscoder's {layers} "
            f"layers of width {width}; stack those of its layers, in its order"
        )
    return x_NLD.astype(params["W_enc"].dtype)
