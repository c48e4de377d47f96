"""What a feature writes: the output tokens it promotes, and the features that write alike.

    effect on a token = (g * W_dec[i]) @ head[token],    cosine = W_dec[i] . W_dec[j] / |..| |..|

The effect is the direct one on the logits, in their unit for one unit of the feature, through the
gain g of the final norm alone: what later layers make of it, and the size that the norm divides by,
are left out. Only a direction of the residual stream has one. Blocks of features meet blocks of the
vocabulary, so that all of them times all of it never exist at once.

Dims: F features, K features asked about, R of them at once, D width, V vocabulary, E ends kept.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families, model
from core.checkpoint import Loaded
from core.layers import RMSNorm
from core.model import full_precision
from core.progress import Progress
from core.taps import EMBED, Tap
from sae import topk
from sae.coder import Sae
from sae.pooling import NUMBERS

RESIDUAL = (EMBED, "resid_post", "mlp_out")  # kinds of tap that the residual stream adds up
ENDS, NEAREST = 10, 8
VOCABULARY = 8192  # tokens at once


class Effects(NamedTuple):
    """Token ids and effects [K,E], of the largest, descending, and of the smallest, ascending."""

    up_id: np.ndarray
    up: np.ndarray
    down_id: np.ndarray
    down: np.ndarray


def directions(sae: Sae) -> np.ndarray:
    """What one unit of each feature adds to the output, [F,D]."""
    W_dec_FD = np.asarray(sae.params["W_dec"], np.float32)
    norm_F1 = np.linalg.norm(W_dec_FD, axis=1, keepdims=True)
    return W_dec_FD / norm_F1 if sae.coder.rescale else W_dec_FD


def effects(loaded: Loaded, writes: Tap, direction_KD: np.ndarray) -> Effects | None:
    """Tokens that directions promote most and least; None where `writes` is no place of the
    residual stream."""
    if writes.kind not in RESIDUAL:
        return None
    params = loaded.variables["params"]
    gain_D = np.asarray(params["final_norm"]["g"], np.float32)
    if issubclass(families.of(loaded.config).FinalNorm, RMSNorm):
        gain_D = 1 + gain_D
    head_VD = model.head(loaded.config, params)
    k, v = len(direction_KD), head_VD.shape[0]
    rows, ends = max(1, NUMBERS // VOCABULARY), min(ENDS, v)
    found = Effects(*(np.zeros((k, ends), t) for t in (np.int32, np.float32) * 2))
    with Progress(k, "sae dashboard effects", "feature") as bar:
        for start in range(0, k, rows):
            here = slice(start, start + rows)
            part_RD = jnp.asarray(direction_KD[here] * gain_D)
            shape = len(part_RD), ends
            held = ((jnp.full(shape, -jnp.inf), jnp.zeros(shape, jnp.int32)),) * 2
            for first in range(0, v, VOCABULARY):
                head_BD = jnp.asarray(head_VD[first : first + VOCABULARY], jnp.float32)
                held = _further(held, part_RD, head_BD, jnp.asarray(first, jnp.int32))
            (up, up_id), (down, down_id) = held
            for array, part_RE in zip(found, (up_id, up, down_id, -down), strict=True):
                array[here] = part_RE
            bar.update(len(part_RD))
    return found


Best = tuple[jax.Array, jax.Array]


@jax.jit
@full_precision
def _further(
    held: tuple[Best, Best], part_RD: jax.Array, head_BD: jax.Array, first: jax.Array
) -> tuple[Best, Best]:
    """The largest values, of z and of -z, among those held and those of more tokens."""
    z_RB = jnp.einsum("RD,BD->RB", part_RD, head_BD)

    def best(held: Best, z_RB: jax.Array) -> Best:
        ends = held[0].shape[1]
        value_RE, index_RE = topk.top_k(z_RB, min(ends, z_RB.shape[1]))
        value_RX = jnp.concatenate([held[0], value_RE], 1)
        index_RX = jnp.concatenate([held[1], index_RE + first], 1)
        value_RE, at_RE = jax.lax.top_k(value_RX, ends)
        return value_RE, jnp.take_along_axis(index_RX, at_RE, 1)

    return best(held[0], z_RB), best(held[1], -z_RB)


def neighbours(direction_FD: np.ndarray, asked_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features whose directions are nearest to those of `asked_K`, int32 [K,E], and cosines."""
    f = len(direction_FD)
    norm_F1 = np.linalg.norm(direction_FD, axis=1, keepdims=True)
    unit_FD = jnp.asarray(direction_FD / np.where(norm_F1 > 0, norm_F1, 1))
    near, rows = min(NEAREST, f - 1), max(1, NUMBERS // f)
    index_KE, cosine_KE = (np.zeros((len(asked_K), near), t) for t in (np.int32, np.float32))
    with Progress(len(asked_K), "sae dashboard neighbours", "feature") as bar:
        for start in range(0, len(asked_K), rows):
            here = slice(start, start + rows)
            asked_R = jnp.asarray(asked_K[here].astype(np.int32))
            cosine_KE[here], index_KE[here] = _nearest(near, unit_FD, asked_R)
            bar.update(len(asked_R))
    return index_KE, cosine_KE


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def _nearest(near: int, unit_FD: jax.Array, asked_R: jax.Array) -> Best:
    cosine_RF = jnp.einsum("RD,FD->RF", jnp.take(unit_FD, asked_R, axis=0), unit_FD)
    feature_RF = jax.lax.broadcasted_iota(jnp.int32, cosine_RF.shape, 1)
    return topk.top_k(jnp.where(feature_RF == asked_R[:, None], -jnp.inf, cosine_RF), near)
