"""Causal attention as explicit batched matmuls, rotary positions, and the key-value cache.

Dims: B batch, T query tokens, S key tokens or cache slots, H heads, G key-value heads, R heads of
one G, K head width. Plain XLA operations only, so every derivative of every order exists (fused
kernels have no second one).

The cache is the `cache` collection of a block. Empty but mutable, it receives the keys and values
of the tokens just seen; filled, one token per row is written into it and attends to it. Slot s of
S holds the newest position p with p % S == s, so a cache of `window` slots is a ring that forgets
what a sliding layer may no longer see.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

MASKED = -1e30
CACHE = "cache"


class Rotation(NamedTuple):
    """cos and sin of every position's angles, [B,T,K/2] (B = 1: the same for every row)."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BT: jax.Array, dim: int, theta: float, dtype: jnp.dtype) -> Rotation:
    """Angles p * theta^(-2i/dim), i < dim/2, computed in float32 (float64 under it), then cast.

    RoPE, arXiv 2104.09864. transformers casts cos and sin to the activations' dtype as well.
    """
    wide = np.promote_types(dtype, jnp.float32)
    frequency_K = jnp.asarray(1.0 / theta ** (np.arange(0, dim, 2) / dim), wide)
    angle_BTK = positions_BT.astype(wide)[..., None] * frequency_K[None, None]
    return Rotation(jnp.cos(angle_BTK).astype(dtype), jnp.sin(angle_BTK).astype(dtype))


def rotate(x_BTHK: jax.Array, by: Rotation) -> jax.Array:
    """Turn the first 2 * by.cos.shape[-1] features of each head, halves paired (`rotate_half`)."""
    half = by.cos.shape[-1]
    cos, sin = by.cos[:, :, None], by.sin[:, :, None]
    a, b, rest = x_BTHK[..., :half], x_BTHK[..., half : 2 * half], x_BTHK[..., 2 * half :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def causal_attention(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGK: jax.Array,
    scale: float,
    window: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale q k^T + mask) v -> [B,T,H,K], T = S; softmax in float32.

    window: a scalar; a query sees that many keys at most, its own included.
    """
    tokens = jnp.arange(q_BTHK.shape[1])
    age_TS = tokens[:, None] - tokens[None, :]
    visible_TS = age_TS >= 0 if window is None else (age_TS >= 0) & (age_TS < window)
    return _attention(q_BTHK, k_BSGK, v_BSGK, visible_TS[None], scale)


def _attention(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGK: jax.Array, visible_BTS: jax.Array, scale: float
) -> jax.Array:
    b, t, h, k = q_BTHK.shape
    g = k_BSGK.shape[2]
    wide = np.promote_types(q_BTHK.dtype, jnp.float32)
    # Head-major copies make each product one plain batched matmul; XLA's CPU backward pass of the
    # einsum over interleaved heads costs about twice as much. Heads that share keys are more rows
    # of the same matmul, so no key is copied.
    q_BGRTK = jnp.swapaxes(q_BTHK, 1, 2).reshape(b, g, h // g * t, k)
    k_BGSK, v_BGSK = jnp.swapaxes(k_BSGK, 1, 2), jnp.swapaxes(v_BSGK, 1, 2)
    s_BGRTS = jnp.matmul(q_BGRTK * scale, jnp.swapaxes(k_BGSK, 2, 3), preferred_element_type=wide)
    s_BGRTS = s_BGRTS.reshape(b, g, h // g, t, -1)
    p_BGRTS = jax.nn.softmax(jnp.where(visible_BTS[:, None, None], s_BGRTS, MASKED), axis=-1)
    p_BGRTS = p_BGRTS.astype(v_BGSK.dtype).reshape(b, g, h // g * t, -1)
    return jnp.swapaxes(jnp.matmul(p_BGRTS, v_BGSK).reshape(b, h, t, k), 1, 2)


def attend(
    block: nn.Module,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    window: jax.Array | None = None,
) -> jax.Array:
    """A block's attention over the tokens at hand or, with a filled cache, over what it holds."""
    if block.has_variable(CACHE, "k"):
        return _attend_cached(block, q_BTHK, k_BTGK, v_BTGK, positions_BT, scale)
    if block.is_mutable_collection(CACHE):
        block.put_variable(CACHE, "k", k_BTGK)
        block.put_variable(CACHE, "v", v_BTGK)
    return causal_attention(q_BTHK, k_BTGK, v_BTGK, scale, window)


def _attend_cached(
    block: nn.Module,
    q_B1HK: jax.Array,
    k_B1GK: jax.Array,
    v_B1GK: jax.Array,
    positions_B1: jax.Array,
    scale: float,
) -> jax.Array:
    rows_B = jnp.arange(q_B1HK.shape[0])
    held = {}
    for name, new_B1GK in (("k", k_B1GK), ("v", v_B1GK)):
        old_BSGK = block.get_variable(CACHE, name)
        slots_B = positions_B1[:, 0] % old_BSGK.shape[1]
        held[name] = old_BSGK.at[rows_B, slots_B].set(new_B1GK[:, 0])
        block.put_variable(CACHE, name, held[name])
    slots = held["k"].shape[1]
    visible_B1S = slot_positions(positions_B1, slots)[:, None] >= 0
    return _attention(q_B1HK, held["k"], held["v"], visible_B1S, scale)


def slot_positions(newest_B1: jax.Array, slots: int) -> jax.Array:
    """[B,S]: the position each slot holds once `newest_B1` is written; negative = still empty."""
    return newest_B1 - (newest_B1 - jnp.arange(slots)[None]) % slots


def fill(seen_BTGK: jax.Array, lengths_B: jax.Array, slots: int) -> jax.Array:
    """Keys or values of right-padded prompts as a cache [B,S,G,K] of `slots` slots.

    lengths_B: tokens of each row before its padding. Empty slots hold anything; they are masked.
    """
    at_BS = jnp.maximum(slot_positions(lengths_B[:, None] - 1, slots), 0)
    return jnp.take_along_axis(seen_BTGK, at_BS[..., None, None], axis=1)
