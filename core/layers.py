"""Norms and activations shared by the families.

Dims: B batch, T tokens, D width (the last axis, whatever stands before it).
"""

from collections.abc import Callable

import jax
from flax import linen as nn

from core.errors import InputError


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * g + b over the last axis, in float32, biased variance."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        g_D = self.param("g", nn.initializers.ones, (x_BTD.shape[-1],))
        b_D = self.param("b", nn.initializers.zeros, (x_BTD.shape[-1],))
        return layer_norm(x_BTD, g_D, b_D, self.eps)


def layer_norm(x_BTD: jax.Array, g_D: jax.Array, b_D: jax.Array, eps: float) -> jax.Array:
    x32_BTD = x_BTD.astype(g_D.dtype)
    centred_BTD = x32_BTD - x32_BTD.mean(-1, keepdims=True)
    scale_BT1 = jax.lax.rsqrt((centred_BTD**2).mean(-1, keepdims=True) + eps)
    return (centred_BTD * scale_BT1 * g_D[None, None] + b_D[None, None]).astype(x_BTD.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + g) over the last axis, in float32; g starts at zero."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        g_D = self.param("g", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(g_D.dtype)
        scale = jax.lax.rsqrt((wide**2).mean(-1, keepdims=True) + self.eps)
        return (wide * scale * (1 + g_D).reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    known = {
        "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
        "gelu": lambda x: jax.nn.gelu(x, approximate=False),
        "relu": jax.nn.relu,
        "silu": jax.nn.silu,
    }
    if name not in known:
        raise InputError(f"activation {name!r} is unknown; known: {', '.join(known)}")
    return known[name]
