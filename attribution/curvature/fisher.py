"""The derivative of the losses in the final hidden states, for the true Fisher information.

Dims: B examples, T tokens, D width, V vocabulary, C tokens of a row in a chunk; V = K parts of R.

The Fisher matrix is E[g g^T] with labels y ~ softmax(z), the model's own predictions (with the
data's labels it is the empirical one). A label is the inverse CDF of one uniform number, found in
two levels: first the part of the vocabulary, then the place in it. The number is a function of
(seed, row, position) alone, so batches, padding and devices change no label. Logits are formed
once, a chunk at a time, for the draw and the derivative softmax(z) - onehot(y) together.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from core import model


def uniforms(seed: jax.Array, rows_B: jax.Array, tokens: int) -> jax.Array:
    """Uniform float32 numbers in [0, 1), [B,T], multiples of 2^-24; seed: a uint32."""
    words = jnp.stack([jnp.zeros_like(seed), seed])
    root = jax.random.wrap_key_data(words, impl="threefry2x32")

    def one(row: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.fold_in(root, row), position)
        return (jax.random.bits(key, (), jnp.uint32) >> 8).astype(jnp.float32) * 2**-24

    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    return each(rows_B.astype(jnp.uint32), jnp.arange(tokens, dtype=jnp.uint32))


def _place(cumulated_BCR: jax.Array, below_BC: jax.Array) -> jax.Array:
    """The first place whose cumulated mass exceeds `below`; so it has some of its own."""
    return (cumulated_BCR <= below_BC[..., None]).sum(-1, dtype=jnp.int32)


def draw(mass_BCV: jax.Array, uniform_BC: jax.Array) -> jax.Array:
    """int32 [B,C] in 0..V-1, with probabilities mass / sum(mass), never one without mass."""
    b, c, v = mass_BCV.shape
    r = math.isqrt(v - 1) + 1
    parts = -(-v // r)
    mass_BCKR = jnp.pad(mass_BCV, ((0, 0), (0, 0), (0, parts * r - v))).reshape(b, c, parts, r)
    cumulated_BCK = jnp.cumsum(mass_BCKR.sum(-1), -1)
    whole_BC = cumulated_BCK[..., -1]
    # Rounding must not reach the whole, above which there is nothing.
    below_BC = jnp.minimum(uniform_BC.astype(whole_BC.dtype) * whole_BC,
                           jnp.nextafter(whole_BC, jnp.zeros_like(whole_BC)))  # fmt: skip
    part_BC1 = _place(cumulated_BCK, below_BC)[..., None]
    before_BC1 = jnp.take_along_axis(cumulated_BCK, jnp.maximum(part_BC1 - 1, 0), -1)
    below_BC = below_BC - jnp.where(part_BC1 > 0, before_BC1, 0)[..., 0]
    inside_BCR = jnp.take_along_axis(mass_BCKR, part_BC1[..., None], 2)[:, :, 0]
    inside_BCR = jnp.cumsum(inside_BCR, -1)
    whole_BC = inside_BCR[..., -1]
    below_BC = jnp.minimum(below_BC, jnp.nextafter(whole_BC, jnp.zeros_like(whole_BC)))
    return part_BC1[..., 0] * r + _place(inside_BCR, below_BC)


def empirical(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array,
    chunk: int,
) -> jax.Array:  # fmt: skip
    """d(sum of weight * nll of the targets) / d(hidden), [B,T,D]."""

    def total(hidden_BTD: jax.Array) -> jax.Array:
        out: Any = model.loss.weighted_nll(hidden_BTD, head_VD, targets_BT, weights_BT, chunk)
        return out[0]

    return jax.grad(total)(hidden_BTD)


def sampled(
    hidden_BTD: jax.Array, head_VD: jax.Array, uniform_BT: jax.Array, weights_BT: jax.Array,
    chunk: int,
) -> jax.Array:  # fmt: skip
    """The same for labels drawn at every position with a weight.

    chunk: positions of the batch whose logits are held at once.
    """
    b, t, d = hidden_BTD.shape
    count = -(-b * t // chunk)
    c = -(-t // count)
    count = -(-t // c)

    def split(x_BT: jax.Array) -> jax.Array:
        x_BT = jnp.pad(x_BT, ((0, 0), (0, count * c - t), *((0, 0),) * (x_BT.ndim - 2)))
        return jnp.swapaxes(x_BT.reshape(b, count, c, *x_BT.shape[2:]), 0, 1)

    low_VD = head_VD.astype(hidden_BTD.dtype)

    def one(part: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        h_BCD, u_BC, w_BC = part
        z_BCV = model.head_logits(h_BCD, head_VD)
        e_BCV = jnp.exp(z_BCV - z_BCV.max(-1, keepdims=True))
        y_BC = draw(e_BCV, u_BC)
        p_BCV = (e_BCV * (w_BC / e_BCV.sum(-1))[..., None]).astype(h_BCD.dtype)
        dh_BCD = jnp.einsum("BCV,VD->BCD", p_BCV, low_VD, preferred_element_type=w_BC.dtype)
        return (dh_BCD - w_BC[..., None] * head_VD[y_BC]).astype(h_BCD.dtype)

    dh_nBCD = jax.lax.map(one, (split(hidden_BTD), split(uniform_BT), split(weights_BT)))
    return jnp.swapaxes(dh_nBCD, 0, 1).reshape(b, count * c, d)[:, :t]
