"""What chosen features reconstruct, and its gradients: for every SAE that ranks its features.

    y_g = sum over chosen features f of range g of v_f W_dec[f],    v = relu(s W_enc + b_enc)

or without the ReLU. There are two ways, equal but for rounding. `dense` masks the features and
multiplies matrices: it splits over devices by features without gathering them, and adds in a fixed
order on accelerators. `sparse` reads and changes only the chosen rows of the matrices, also
backwards, in place of four products of [N,D] and [D,F], which on a CPU are most of a step.

Dims: N rows, D width in, F features, O width out, G ranges of features, C chunks of N pairs.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from sae import topk

SIGN = np.uint32(1 << 31)


class Choice(NamedTuple):
    """Which features count, and how.

    rank_NF: what they are chosen by. now: how many of every row are, or of the batch; `most` is
    its static bound. bounds: where the ranges of features end. relu: negative ones are zero.
    """

    rank_NF: jax.Array
    now: jax.Array
    most: int
    of_batch: bool = False
    bounds: tuple[int, ...] = ()
    relu: bool = True

    def ends(self) -> tuple[int, ...]:
        return self.bounds or self.rank_NF.shape[-1:]


class Chosen(NamedTuple):
    """y_GNO; in how many rows each feature is active, int32 [F]; the smallest positive rank among
    the active ones, inf if there are none."""

    y_GNO: jax.Array
    fires_F: jax.Array
    smallest: jax.Array


def dense(choice: Choice, h_NF: jax.Array, W_dec_FO: jax.Array) -> Chosen:
    """From the pre-activations h, through all features."""
    mask_NF = largest(choice.rank_NF, choice.now, choice.of_batch)
    f_NF = jnp.where(mask_NF, jax.nn.relu(h_NF) if choice.relu else h_NF, 0)
    starts = (0, *choice.ends()[:-1])
    parts = [
        jnp.einsum("NF,FO->NO", f_NF[:, a:b], W_dec_FO[a:b])
        for a, b in zip(starts, choice.ends(), strict=True)
    ]
    active_NF = f_NF != 0
    ranks_NF = jnp.where(active_NF & (choice.rank_NF > 0), choice.rank_NF, jnp.inf)
    return Chosen(jnp.stack(parts), active_NF.sum(0, dtype=jnp.int32), ranks_NF.min())


def largest(rank_NF: jax.Array, now: jax.Array, of_batch: bool = False) -> jax.Array:
    """bool [N,F]: the `now` largest of every row, or of the batch; of equals, the first.

    The least of them is found bit by bit, for floats are in the order of their bits once those of
    negative ones are flipped: 32 passes that only count, so `now` may be traced, nothing is
    sorted, and devices that hold some of the features exchange counts alone.
    """
    # Behind the barrier, or XLA may compute the ranks once more for later, rounded otherwise.
    rank_NF = jax.lax.optimization_barrier(jax.lax.stop_gradient(rank_NF))
    bits_NF = jax.lax.bitcast_convert_type(rank_NF, jnp.uint32)
    bits_NF = jnp.where(bits_NF >= SIGN, ~bits_NF, bits_NF | SIGN)
    axes = (0, 1) if of_batch else (1,)
    least = _least(bits_NF, now, axes)
    above_NF, equal_NF = bits_NF > least, bits_NF == least
    left = now - _count(above_NF, axes)

    def first_ones(equal_NF: jax.Array) -> jax.Array:
        place_NF = jax.lax.broadcasted_iota(jnp.uint32, equal_NF.shape, 1)
        if of_batch:
            row_NF = jax.lax.broadcasted_iota(jnp.uint32, equal_NF.shape, 0)
            place_NF += row_NF * jnp.uint32(equal_NF.shape[1])
        early_NF = jnp.where(equal_NF, ~place_NF, 0)
        return equal_NF & (early_NF >= _least(early_NF, left, axes))

    tied = (_count(equal_NF, axes) > left).any()
    equal_NF = jax.lax.cond(tied, first_ones, lambda equal_NF: equal_NF, equal_NF)
    return (above_NF | equal_NF) & (now > 0)


def _least(bits_NF: jax.Array, now: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """The largest number that `now` of these reach, along the axes."""

    def next_bit(n: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (SIGN >> n.astype(jnp.uint32))
        return jnp.where(_count(bits_NF >= more, axes) >= now, more, least)

    start = jnp.zeros_like(bits_NF.max(axes, keepdims=True))
    return jax.lax.fori_loop(0, 32, next_bit, start)


def _count(mask_NF: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return mask_NF.sum(axes, keepdims=True, dtype=jnp.int32)


def sparse(
    choice: Choice,
    h_NF: jax.Array,
    s_ND: jax.Array,
    W_enc_DF: jax.Array,
    b_enc_F: jax.Array,
    W_dec_FO: jax.Array,
) -> Chosen:
    """The same from the encoder's input s and its parameters; h are its values, which pass no
    gradient here."""
    n, features = h_NF.shape
    rank_NF, h_NF = jax.lax.stop_gradient((choice.rank_NF, h_NF))
    if choice.of_batch:
        _, index_1M = topk.top_k(rank_NF.reshape(1, -1), choice.most)
        index_M = jnp.pad(index_1M[0], (0, -choice.most % n))
        last = choice.now
    else:
        _, index_NK = topk.top_k(rank_NF, choice.most)
        index_M = (index_NK + jnp.arange(n, dtype=jnp.int32)[:, None] * features).T.reshape(-1)
        last = choice.now * n
    counts_M = jnp.arange(len(index_M), dtype=jnp.int32) < last
    v_M = jnp.where(counts_M, h_NF.reshape(-1)[index_M], 0)
    v_M = jax.nn.relu(v_M) if choice.relu else v_M
    row_M, feature_M = index_M // features, index_M % features
    pairs = Pairs(v_M.reshape(-1, n), row_M.reshape(-1, n), feature_M.reshape(-1, n), -(-last // n))
    maps = (W_enc_DF, b_enc_F, W_dec_FO)
    y_GNO = cast(jax.Array, _reconstruct(choice.ends(), *maps, s_ND, pairs))
    active_M = v_M != 0
    ranks_M = rank_NF.reshape(-1)[index_M]
    smallest = jnp.where(active_M & (ranks_M > 0), ranks_M, jnp.inf).min()
    fires_F = jnp.zeros(features, jnp.int32).at[feature_M].add(active_M.astype(jnp.int32))
    return Chosen(y_GNO, fires_F, smallest)


class Pairs(NamedTuple):
    """Chosen (row, feature), in chunks of N so that the widest array is [N,O]; value 0 = none.

    chunks: how many of them hold anything.
    """

    v_CN: jax.Array
    row_CN: jax.Array
    feature_CN: jax.Array
    chunks: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reconstruct(
    ends: tuple[int, ...],
    W_enc_DF: jax.Array,
    b_enc_F: jax.Array,
    W_dec_FO: jax.Array,
    s_ND: jax.Array,
    pairs: Pairs,
) -> jax.Array:
    """y [G,N,O]; the encoder is an argument because of the gradient."""
    n = len(s_ND)

    def add(c: jax.Array, y_SO: jax.Array) -> jax.Array:
        feature_N = pairs.feature_CN[c]
        slot_N = _range(ends, feature_N) * n + pairs.row_CN[c]
        return y_SO.at[slot_N].add(pairs.v_CN[c][:, None] * W_dec_FO[feature_N])

    start = jnp.zeros((len(ends) * n, W_dec_FO.shape[1]), W_dec_FO.dtype)
    y_SO = jax.lax.fori_loop(0, pairs.chunks, add, start)
    return y_SO.reshape(len(ends), n, -1)


def _forward(ends: tuple[int, ...], *given: Any):
    return _reconstruct(ends, *given), given


def _backward(ends: tuple[int, ...], given: tuple, g_GNO: jax.Array):
    W_enc_DF, b_enc_F, W_dec_FO, s_ND, pairs = given
    n, g_SO = len(s_ND), g_GNO.reshape(-1, g_GNO.shape[-1])

    def add(c: jax.Array, sums: tuple) -> tuple:
        enc_FD, b_F, dec_FO = sums
        v_N, row_N, feature_N = pairs.v_CN[c], pairs.row_CN[c], pairs.feature_CN[c]
        g_NO = g_SO[_range(ends, feature_N) * n + row_N]
        dv_N = jnp.where(v_N != 0, (g_NO * W_dec_FO[feature_N]).sum(1), 0)
        return (
            enc_FD.at[feature_N].add(dv_N[:, None] * s_ND[row_N]),
            b_F.at[feature_N].add(dv_N),
            dec_FO.at[feature_N].add(v_N[:, None] * g_NO),
        )

    start = (jnp.zeros_like(W_enc_DF.T), jnp.zeros_like(b_enc_F), jnp.zeros_like(W_dec_FO))
    enc_FD, b_F, dec_FO = jax.lax.fori_loop(0, pairs.chunks, add, start)
    return enc_FD.T, b_F, dec_FO, None, None


_reconstruct.defvjp(_forward, _backward)


def _range(ends: tuple[int, ...], feature_N: jax.Array) -> jax.Array:
    """Which range a feature is in."""
    inner = jnp.asarray(ends[:-1], jnp.int32)
    return (feature_N[:, None] >= inner[None]).sum(1, dtype=jnp.int32)
