"""Fingerprints of a batch of rows: what an SAE's features are over the tokens that count.

    mean_F = 1/n sum_t f_tF,   max_F = max_t f_tF;   of each the K largest

The mean is taken before the K largest are: a feature that is weak at every token may be among
them. Features [tokens,F] exist for `chunk` tokens at a time: whole rows together where they are
short, a long row in pieces with a running sum and maximum. What a row gets depends on chunk, batch
and padding by rounding only.

Dims: B rows, T tokens, D width of the activation, F features, K kept, S statistics; G groups of R
rows, P pieces of C tokens.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core import taps
from core.config import Execution, ModelConfig
from core.model import Variables, full_precision
from core.taps import Tap
from sae import topk
from sae.coder import Coder, Params, encode

# None is of the reconstruction: a decoder costs what the encoder does, and a transcoder's is of
# something else.
STATISTICS = (
    "tokens",  # that count: length explains much of all that follows
    "l0_mean",  # features active at a token
    "l0_sd",  # over the row's tokens
    "l0_max",
    "l1_mean",  # sum of a token's features
    "largest",  # feature at any token
    "features",  # different ones, active at some token
    "top10_share",  # what the ten largest means have of the sum of all means
    "entropy",  # of the means as a distribution, in nats
    "hidden_norm",  # mean length of the activation itself
)
TOP = 10
NUMBERS = 2**23  # of f that a device holds at once, 32 MiB: more saves a CPU nothing


class Spec(NamedTuple):
    """What is pooled. token_k: features kept of every token as well; 0 = none.

    chunk: tokens that a device encodes at once, 0 = by `NUMBERS`. mesh: over whose `data` the rows
    are split, and over whose `model` perhaps the features (`sae.coder.shardings`).
    """

    coder: Coder
    k: int = 256
    token_k: int = 0
    chunk: int = 0
    mesh: Mesh | None = None


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@full_precision
def fingerprints(
    config: ModelConfig,
    execution: Execution,
    tap: Tap,
    spec: Spec,
    variables: Variables,
    params: Params,
    ids_BT: jax.Array,
    counted_BT: jax.Array,
) -> dict[str, jax.Array]:
    """`pool` of the model's activations at a tap; layers behind it are not run."""
    (x_BTD,) = taps.read(config, execution, variables, ids_BT, (tap,))
    return pool(spec, params, x_BTD, counted_BT)


def pool(
    spec: Spec, params: Params, x_BTD: jax.Array, counted_BT: jax.Array
) -> dict[str, jax.Array]:
    """What is kept of each row, by the name of the file that keeps it.

    mean_value, max_value [B,K] descending, and mean_index, max_index int32 [B,K], lowest index
    first among equals, 0 and -1 where fewer than K features are active; statistics [B,S], see
    `STATISTICS`; hidden_mean [B,D]. With token_k also token_value, token_index [B,T,token_k], which
    mean nothing where counted_BT is False. A row without a token that counts is zeros and -1.
    Features of abstopk, which may be negative, are taken by their size.
    """
    (b, t), devices = counted_BT.shape, spec.mesh.shape["data"] if spec.mesh else 1
    chunk = spec.chunk or max(128, NUMBERS // spec.coder.d_sae)
    pieces = -(-t // chunk)
    c = -(-t // pieces)
    groups = -(-b // (devices * max(1, chunk // c)))
    r = -(-b // (groups * devices)) * devices

    def grid(x_BT: jax.Array) -> jax.Array:
        """[G,P,R,C,...]; a group takes every G-th row, so that rows stay on their devices."""
        rest = ((0, 0),) * (x_BT.ndim - 2)
        x_BT = jnp.pad(x_BT, ((0, r * groups - b), (0, c * pieces - t), *rest))
        x_RGPC = x_BT.reshape(r, groups, pieces, c, *x_BT.shape[2:])
        return jnp.moveaxis(x_RGPC, (1, 2), (0, 1))

    def one(group: tuple[jax.Array, jax.Array]) -> dict[str, jax.Array]:
        return _pool_group(spec, params, *group)

    out = jax.lax.map(one, (grid(x_BTD), grid(counted_BT)))
    out = {k: jnp.swapaxes(x_GR, 0, 1).reshape(-1, *x_GR.shape[2:])[:b] for k, x_GR in out.items()}
    return {k: x_B[:, :t] if k.startswith("token") else x_B for k, x_B in out.items()}


def _pool_group(
    spec: Spec, params: Params, x_PRCD: jax.Array, counted_PRC: jax.Array
) -> dict[str, jax.Array]:
    coder, wide = spec.coder, params["W_dec"].dtype

    def piece(sums: tuple[jax.Array, ...], given: tuple[jax.Array, jax.Array]) -> Any:
        x_RCD, counted_RC1 = given[0].astype(wide), given[1][..., None]
        f_RCF = encode(coder, params, x_RCD, spec.mesh)
        f_RCF = jnp.abs(f_RCF) if coder.architecture == "abstopk" else f_RCF
        f_RCF, x_RCD = (jnp.where(counted_RC1, y, 0) for y in (f_RCF, x_RCD))
        sum_RF, max_RF, hidden_RD = sums
        sums = sum_RF + f_RCF.sum(1), jnp.maximum(max_RF, f_RCF.max(1)), hidden_RD + x_RCD.sum(1)
        tokens = {"l0": (f_RCF > 0).sum(-1).astype(wide), "norm": jnp.linalg.norm(x_RCD, axis=-1)}
        if spec.token_k:
            tokens |= _largest("token", f_RCF, spec.token_k, spec.mesh)
        return sums, tokens

    r, d = x_PRCD.shape[1], x_PRCD.shape[-1]
    zeros = tuple(jnp.zeros((r, width), wide) for width in (coder.d_sae, coder.d_sae, d))
    (sum_RF, max_RF, hidden_RD), tokens = jax.lax.scan(piece, zeros, (x_PRCD, counted_PRC))
    tokens["counted"] = counted_PRC.astype(wide)
    tokens = {
        name: jnp.swapaxes(x_PR, 0, 1).reshape(r, -1, *x_PR.shape[3:])
        for name, x_PR in tokens.items()
    }
    n_R1 = jnp.maximum(tokens["counted"].sum(1, keepdims=True), 1)
    mean_RF = sum_RF / n_R1
    # More than asked for, perhaps: the statistics want the ten largest.
    mean = _largest("mean", mean_RF, max(spec.k, min(TOP, coder.d_sae)), spec.mesh)
    statistics_RS = _statistics(
        tokens.pop("counted"), tokens.pop("l0"), tokens.pop("norm"), mean_RF,
        mean["mean_value"][:, :TOP].sum(1), max_RF,
    )  # fmt: skip
    return {
        **{name: x_RK[:, : spec.k] for name, x_RK in mean.items()},
        **_largest("max", max_RF, spec.k, spec.mesh),
        "statistics": statistics_RS,
        "hidden_mean": hidden_RD / n_R1,
        **tokens,
    }


def _largest(name: str, f_RF: jax.Array, k: int, mesh: Mesh | None) -> dict[str, jax.Array]:
    """The k largest features, without those that are not active."""
    value_RK, index_RK = topk.top_k(f_RF, k, mesh)
    return {f"{name}_value": value_RK, f"{name}_index": jnp.where(value_RK > 0, index_RK, -1)}


def _statistics(
    counted_RT: jax.Array,
    l0_RT: jax.Array,
    norm_RT: jax.Array,
    mean_RF: jax.Array,
    top_R: jax.Array,
    max_RF: jax.Array,
) -> jax.Array:
    """[R,S]. What a token has is zero where it does not count; top_R: sum of the `TOP` means."""
    count_R = counted_RT.sum(1)
    n_R = jnp.maximum(count_R, 1)
    l0_R = l0_RT.sum(1) / n_R
    apart_RT = jnp.where(counted_RT > 0, l0_RT - l0_R[:, None], 0)
    mass_R = mean_RF.sum(1)
    some_R = jnp.where(mass_R > 0, mass_R, 1)
    share_RF = mean_RF / some_R[:, None]
    logs_RF = jnp.log(jnp.where(share_RF > 0, share_RF, 1))
    statistics = {
        "tokens": count_R,
        "l0_mean": l0_R,
        "l0_sd": jnp.sqrt((apart_RT**2).sum(1) / n_R),
        "l0_max": l0_RT.max(1),
        "l1_mean": mass_R,
        "largest": max_RF.max(1),
        "features": (max_RF > 0).sum(1).astype(mean_RF.dtype),
        "top10_share": top_R / some_R,
        "entropy": -(share_RF * logs_RF).sum(1),
        "hidden_norm": norm_RT.sum(1) / n_R,
    }
    return jnp.stack([statistics[name] for name in STATISTICS], 1)
