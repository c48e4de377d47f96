"""Causal attention as explicit batched matmuls, rotary positions, and the key-value cache.

Dims: B batch, T query tokens, S key tokens or cache slots, H heads, G key-value heads, R heads of
one G, K head width. Plain XLA operations only, so every derivative of every order exists (fused
kernels have no second one).

The cache is the `cache` collection of a block. Empty but mutable, it receives the keys and values
of the tokens just seen; filled, one token per row is written into it and attends to it. Slot s of
S holds the newest position p with p % S == s, so a cache of `window` slots is a ring that forgets
what a sliding layer may no longer see. It lies as the two products read it, keys [B,G,K,S] and
values [B,G,S,K]: turning it anew for each token costs ten times the products.

The `tree` collection makes a row a packed forest of texts that share beginnings: its tokens lie in
depth-first order, `ends` [B,T] says where the subtree of each ends, and token i sees token j iff
j <= i < ends[j]. Positions are depths, by which a sliding layer's window is measured. With the
collection `prefix` (`k` and `v`, [1,P,G,K] a layer), the first `tree/prefix` of P tokens stand at
positions 0, 1, ... before every row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from core.schema import Params

MASKED = -1e30
CACHE, TREE, PREFIX = "cache", "tree", "prefix"
# Of a tree at once, at least: many scores are never formed, the others stay in a CPU's cache.
QUERIES = 64


class Rotation(NamedTuple):
    """cos and sin of every position's angles, [B,T,K/2] (B = 1: the same for every row)."""

    cos: jax.Array
    sin: jax.Array


def rotation(positions_BT: jax.Array, dim: int, theta: float, dtype: jnp.dtype) -> Rotation:
    """Angles p * theta^(-2i/dim), i < dim/2, computed in float32 (float64 under it), then cast.

    RoPE, arXiv 2104.09864. transformers casts cos and sin to the activations' dtype as well.
    """
    wide = np.promote_types(dtype, jnp.float32)
    # Rounded to float32 where transformers rounds: a third of the exact frequencies would differ in
    # the last bit, which is up to 4e-3 radian at position 32,000.
    exponent_K = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power_K = (theta ** exponent_K.astype(np.float64)).astype(np.float32)
    frequency_K = jnp.asarray(1 / power_K, wide)
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
    # Head-major copies make each product one plain batched matmul; XLA's CPU backward pass of the
    # einsum over interleaved heads costs about twice as much.
    k_BGKS, v_BGSK = jnp.transpose(k_BSGK, (0, 2, 3, 1)), jnp.swapaxes(v_BSGK, 1, 2)
    return _attention(q_BTHK, k_BGKS, v_BGSK, visible_TS[None], scale)


def _attention(
    q_BTHK: jax.Array, k_BGKS: jax.Array, v_BGSK: jax.Array, visible_BTS: jax.Array, scale: float
) -> jax.Array:
    b, t, h, k = q_BTHK.shape
    g = k_BGKS.shape[1]
    wide = np.promote_types(q_BTHK.dtype, jnp.float32)
    # Heads that share keys are more rows of the same matmul, so no key is copied.
    q_BGRTK = jnp.swapaxes(q_BTHK, 1, 2).reshape(b, g, h // g * t, k)
    s_BGRTS = jnp.matmul(q_BGRTK * scale, k_BGKS, preferred_element_type=wide)
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
    if block.has_variable(TREE, "ends"):
        return _attend_tree(block, q_BTHK, k_BTGK, v_BTGK, positions_BT, scale, window)
    return causal_attention(q_BTHK, k_BTGK, v_BTGK, scale, window)


def _attend_tree(
    block: nn.Module,
    q_BTHK: jax.Array,
    k_BTGK: jax.Array,
    v_BTGK: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    window: jax.Array | None,
) -> jax.Array:
    ends_BT = block.get_variable(TREE, "ends")
    tokens_T = jnp.arange(ends_BT.shape[1], dtype=ends_BT.dtype)
    visible_BTS = (tokens_T[:, None] >= tokens_T[None])[None]
    visible_BTS &= tokens_T[None, :, None] < ends_BT[:, None]
    at_BS, k_BSGK, v_BSGK = positions_BT, k_BTGK, v_BTGK
    if block.has_variable(PREFIX, "k"):
        b, t = ends_BT.shape
        first_1PGK = block.get_variable(PREFIX, "k"), block.get_variable(PREFIX, "v")
        p = first_1PGK[0].shape[1]
        at_1P = jnp.arange(p, dtype=positions_BT.dtype)[None]
        seen_1P = at_1P < block.get_variable(TREE, "prefix")
        visible_BTS = jnp.concatenate(
            [jnp.broadcast_to(seen_1P[:, None], (b, t, p)), visible_BTS], axis=2
        )
        at_BS = jnp.concatenate([jnp.broadcast_to(at_1P, (b, p)), at_BS], axis=1)
        k_BSGK, v_BSGK = (
            jnp.concatenate([jnp.broadcast_to(x, (b, *x.shape[1:])), own], axis=1)
            for x, own in zip(first_1PGK, (k_BTGK, v_BTGK), strict=True)
        )
    if window is not None:
        visible_BTS &= positions_BT[:, :, None] - at_BS[:, None] < window
    k_BGKS, v_BGSK = jnp.transpose(k_BSGK, (0, 2, 3, 1)), jnp.swapaxes(v_BSGK, 1, 2)
    t, before = ends_BT.shape[1], k_BSGK.shape[1] - ends_BT.shape[1]
    size = max(QUERIES, -(-t // 4))
    parts = []
    for start in range(0, t, size):
        stop = min(start + size, t)
        some, seen = slice(start, stop), slice(0, before + stop)
        visible_BQS = visible_BTS[:, some, seen]
        parts.append(
            _attention(q_BTHK[:, some], k_BGKS[..., seen], v_BGSK[:, :, seen], visible_BQS, scale)
        )
    return jnp.concatenate(parts, axis=1)


def _attend_cached(
    block: nn.Module,
    q_B1HK: jax.Array,
    k_B1GK: jax.Array,
    v_B1GK: jax.Array,
    positions_B1: jax.Array,
    scale: float,
) -> jax.Array:
    k_BGKS, v_BGSK = block.get_variable(CACHE, "k"), block.get_variable(CACHE, "v")
    slots = v_BGSK.shape[2]
    # Heads by index, too: a write of one slice XLA repeats inside its reader, and copies the cache.
    rows_B1, heads_1G = jnp.arange(v_BGSK.shape[0])[:, None], jnp.arange(v_BGSK.shape[1])[None]
    k_BGKS = k_BGKS.at[rows_B1, heads_1G, :, positions_B1 % slots].set(k_B1GK[:, 0])
    v_BGSK = v_BGSK.at[rows_B1, heads_1G, positions_B1 % slots].set(v_B1GK[:, 0])
    block.put_variable(CACHE, "k", k_BGKS)
    block.put_variable(CACHE, "v", v_BGSK)
    visible_B1S = slot_positions(positions_B1, slots)[:, None] >= 0
    return _attention(q_B1HK, k_BGKS, v_BGSK, visible_B1S, scale)


def slot_positions(newest_B1: jax.Array, slots: int) -> jax.Array:
    """[B,S]: the position each slot holds once `newest_B1` is written; negative = still empty."""
    return newest_B1 - (newest_B1 - jnp.arange(slots, dtype=newest_B1.dtype)[None]) % slots


def fill(k_BTGK: jax.Array, v_BTGK: jax.Array, lengths_B: jax.Array, slots: int) -> Params:
    """Keys and values of right-padded prompts as a cache of `slots` slots.

    lengths_B: tokens of each row before its padding. Empty slots hold anything; they are masked.
    """
    at_BS = jnp.maximum(slot_positions(lengths_B[:, None] - 1, slots), 0)
    k_BSGK, v_BSGK = (
        jnp.take_along_axis(seen_BTGK, at_BS[..., None, None], axis=1)
        for seen_BTGK in (k_BTGK, v_BTGK)
    )
    return {"k": jnp.transpose(k_BSGK, (0, 2, 3, 1)), "v": jnp.swapaxes(v_BSGK, 1, 2)}
