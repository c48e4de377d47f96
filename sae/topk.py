"""The k largest of many features, exactly; among equals the lowest index wins.

In two stages where features are many and k small: of groups of neighbours, the k with the largest
maxima hold all k (any other group has k elements before its best, one in each of these), and are
searched in the order of their features, so that equals keep theirs. Over devices likewise: each
finds the k largest of its own features, and only these are gathered.

Dims: N rows (any leading axes), F features, K chosen, G groups, W features of a group.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Two stages from this many features for each chosen one. How many times their processor time XLA's
# own takes (jax 0.10.2 on a CPU, 2^24 normally distributed float32):
#     k            8    16    32    64   128   256
#     F  4,096  1.68  1.23  0.96  0.80  0.78  0.75
#     F  8,192  2.23  1.52  1.22  0.87  0.82  0.78
#     F 16,384  1.98  1.88  1.45  1.11  0.93  0.78
#     F 65,536  3.00  2.54  1.91  1.78  1.40  1.10
# A full sort takes a hundred times as long, and counting, bit by bit, how many are larger, six.
FEATURES_EACH = 256


def top_k(h_NF: jax.Array, k: int, mesh: Mesh | None = None) -> tuple[jax.Array, jax.Array]:
    """Values [N,K], descending, and their indices int32 [N,K].

    mesh: where F is split over the axis `model`, and the first axis over `data` if it divides. To
    be given whenever h is split: what XLA makes of its own top-k then gathers all of h.
    """
    if mesh is None:
        return _top_k(h_NF, k)
    features = h_NF.shape[-1] // mesh.shape["model"]

    def per_device(h_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
        values_NK, index_NK = _top_k(h_NF, min(k, features))
        if mesh.shape["model"] == 1:
            return values_NK, index_NK
        index_NK += jax.lax.axis_index("model") * features
        gather = functools.partial(
            jax.lax.all_gather, axis_name="model", axis=h_NF.ndim - 1, tiled=True
        )
        return _best(gather(values_NK), gather(index_NK), k)

    rows: list[str | None] = [None] * (h_NF.ndim - 1)
    if rows and h_NF.shape[0] % mesh.shape["data"] == 0:
        rows[0] = "data"
    split, whole = PartitionSpec(*rows, "model"), PartitionSpec(*rows)
    # jax cannot tell that after the gathering all devices of `model` compute the same.
    spread = jax.shard_map(
        per_device, mesh=mesh, in_specs=split, out_specs=(whole, whole), check_vma=False
    )
    return spread(h_NF)


def selected(h_NF: jax.Array, k: int, mesh: Mesh | None = None) -> jax.Array:
    """bool [N,F]: whether a feature is among the k largest of its row; mesh as in `top_k`.

    By comparison with the last of them, which each device does for its own features.
    """
    # Without the barriers, XLA may compute h twice, rounded otherwise; and it sorts all features
    # to take the one in place k.
    h_NF = jax.lax.optimization_barrier(jax.lax.stop_gradient(h_NF))
    values_NK, index_NK = jax.lax.optimization_barrier(top_k(h_NF, k, mesh))
    last_N1, at_N1 = values_NK[..., -1:], index_NK[..., -1:]
    place_NF = jax.lax.broadcasted_iota(at_N1.dtype, h_NF.shape, h_NF.ndim - 1)
    return ~((h_NF < last_N1) | ((h_NF == last_N1) & (place_NF > at_N1)))


def _top_k(h_NF: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    features = h_NF.shape[-1]
    if features < FEATURES_EACH * k:
        return jax.lax.top_k(h_NF, k)
    # The stages search G and k W candidates; their sum is smallest with G = sqrt(k F).
    width = features // 2 ** round(math.log2(math.sqrt(k * features)))
    padding = [(0, 0)] * (h_NF.ndim - 1) + [(0, -features % width)]
    h_NGW = jnp.pad(h_NF, padding, constant_values=-jnp.inf)
    h_NGW = h_NGW.reshape(*h_NF.shape[:-1], -1, width)
    group_NK1 = jnp.sort(jax.lax.top_k(h_NGW.max(-1), k)[1], -1)[..., None]
    values_NKW = jnp.take_along_axis(h_NGW, group_NK1, -2)
    place_NKW = jax.lax.broadcasted_iota(group_NK1.dtype, values_NKW.shape, values_NKW.ndim - 1)
    index_NKW = group_NK1 * width + place_NKW
    candidates = (*h_NF.shape[:-1], k * width)
    return _best(values_NKW.reshape(candidates), index_NKW.reshape(candidates), k)


def _best(values_NC: jax.Array, index_NC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of candidates that stand, equals at least, in the order of their features."""
    values_NK, at_NK = jax.lax.top_k(values_NC, k)
    return values_NK, jnp.take_along_axis(index_NC, at_NK, -1)
