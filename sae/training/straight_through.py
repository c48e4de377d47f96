"""The jump at a threshold, with the gradients that training wants of it.

    step(h)     = [h > t]      d/dt = -(1 / w) rect((h - t) / w)
    JumpReLU(h) = h [h > t]    d/dt = -(t / w) rect((h - t) / w)

The true derivative in t is zero almost everywhere. These are those of the expectation over a batch,
estimated with a rectangular kernel of bandwidth w (Rajamanoharan et al. 2024, arXiv 2407.14435).
With `to_input` the pre-activation gets the same with the other sign, besides its own derivative
(Anthropic's Circuits Update of January 2025); without it the threshold alone does. Each is written
as its value plus a difference of zero that has the wanted derivative.
Dims: N rows, F features.
"""

import jax
import jax.numpy as jnp


def step(h_NF: jax.Array, t_F: jax.Array, bandwidth: float, to_input: bool) -> jax.Array:
    """1 where h is above the threshold, else 0."""
    near_NF = jnp.abs(h_NF - t_F[None]) < bandwidth / 2
    slope_NF = jax.lax.stop_gradient(jnp.where(near_NF, 1 / bandwidth, 0.0))
    moved_NF = h_NF if to_input else jax.lax.stop_gradient(h_NF)
    line_NF = slope_NF * (moved_NF - t_F[None])
    return _above(h_NF, t_F) + _zero(line_NF)


def jump_relu(h_NF: jax.Array, t_F: jax.Array, bandwidth: float, to_input: bool) -> jax.Array:
    """h where it is above the threshold, else 0; thresholds are 0 or more."""
    size_F = jax.lax.stop_gradient(t_F)
    return h_NF * _above(h_NF, t_F) + size_F[None] * _zero(step(h_NF, t_F, bandwidth, to_input))


def _above(h_NF: jax.Array, t_F: jax.Array) -> jax.Array:
    return (h_NF > t_F[None]).astype(h_NF.dtype)


def _zero(x_NF: jax.Array) -> jax.Array:
    """Zero, with the derivative of x."""
    return x_NF - jax.lax.stop_gradient(x_NF)
