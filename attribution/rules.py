"""What a sink emits: statistics of the per-example gradient G = sum_t g_t x_t^T of one site.

Dims: B examples, T tokens, I inputs, O outputs, P/Q projected outputs/inputs.

G is [O,I], or [O,I+1] with the bias gradient sum_t g_t as last column (x extended by a one), as
Bergson orients it. A sink's backward rule sees every x and g of a batch, and the losses of the
examples are summed, never averaged, so each statistic belongs to one example alone.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Pair(NamedTuple):
    """Projection matrices of one site; `right_IP` has a last row more with the bias column."""

    left_OP: jax.Array
    right_IP: jax.Array


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    wide = np.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(equation, *operands, preferred_element_type=wide)


def _project_inputs(x_BTI: jax.Array, pair: Pair) -> jax.Array:
    right_IP = pair.right_IP.astype(x_BTI.dtype)
    inputs = x_BTI.shape[-1]
    y_BTQ = x_BTI @ right_IP[:inputs]
    return y_BTQ + right_IP[inputs][None, None] if len(right_IP) > inputs else y_BTQ


@dataclasses.dataclass(frozen=True)
class Project:
    """P_left G P_right^T as [B,P,Q], without forming G: (g P_left)^T (x P_right)."""

    def save(self, x_BTI: jax.Array, aux: Pair) -> jax.Array:
        return _project_inputs(x_BTI, aux)

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTP = g_BTO @ aux.left_OP.astype(g_BTO.dtype)
        return _einsum("BTP,BTQ->BPQ", g_BTP, saved)


@dataclasses.dataclass(frozen=True)
class ProjectTokens(Project):
    """The summands of `Project` for every position, [B,T,P,Q]; they add up to it."""

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTP = g_BTO @ aux.left_OP.astype(g_BTO.dtype)
        return _einsum("BTP,BTQ->BTPQ", g_BTP, saved)


@dataclasses.dataclass(frozen=True)
class Full:
    """G itself, [B,O,I(+1)]."""

    bias: bool = False

    def save(self, x_BTI: jax.Array, aux: None) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: None, g_BTO: jax.Array) -> jax.Array:
        del aux
        G_BOI = _einsum("BTO,BTI->BOI", g_BTO, saved)
        if not self.bias:
            return G_BOI
        column_BO = g_BTO.astype(G_BOI.dtype).sum(1)
        return jnp.concatenate([G_BOI, column_BO[..., None]], axis=-1)


@dataclasses.dataclass(frozen=True)
class SquaredNorm:
    """||G||_F^2 as [B], without forming G: sum over token pairs of (x_t.x_s)(g_t.g_s)."""

    bias: bool = False

    def save(self, x_BTI: jax.Array, aux: None) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: None, g_BTO: jax.Array) -> jax.Array:
        del aux
        xx_BTS = _einsum("BTI,BSI->BTS", saved, saved)
        gg_BTS = _einsum("BTO,BSO->BTS", g_BTO, g_BTO)
        return ((xx_BTS + 1 if self.bias else xx_BTS) * gg_BTS).sum((1, 2))
