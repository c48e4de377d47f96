"""What a sink emits: statistics of the per-example gradient G = sum_t g_t x_t^T of one site.

Dims: B examples, T tokens, I inputs, O outputs, P/Q projected outputs/inputs, H heads, M sketch.

G is [O,I], or [O,I+1] with the bias gradient sum_t g_t as last column (x extended by a one), as
Bergson orients it. A sink's backward rule sees every x and g of a batch, and the losses of the
examples are summed, never averaged, so each statistic belongs to one example alone. Rules of a
lookup, for an embedding [O = vocabulary, I], are given row numbers x_BT and the rows' gradients,
[B,T,I], as g.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import InputError
from core.linear import Rule


class Pair(NamedTuple):
    """Projection matrices of one site; `right_IP` has a last row more with the bias column.

    bias_OP: the left matrix of the bias column, where another than `left_OP`.
    """

    left_OP: jax.Array
    right_IP: jax.Array
    bias_OP: jax.Array | None = None


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    wide = np.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(equation, *operands, preferred_element_type=wide)


def _project_inputs(x_BTI: jax.Array, pair: Pair) -> jax.Array:
    right_IP = pair.right_IP.astype(x_BTI.dtype)
    inputs = x_BTI.shape[-1]
    y_BTQ = x_BTI @ right_IP[:inputs]
    if len(right_IP) == inputs or pair.bias_OP is not None:
        return y_BTQ
    return y_BTQ + right_IP[inputs][None, None]


@dataclasses.dataclass(frozen=True)
class Project:
    """P_left G P_right^T as [B,P,Q], without forming G: (g P_left)^T (x P_right)."""

    def save(self, x_BTI: jax.Array, aux: Pair) -> jax.Array:
        return _project_inputs(x_BTI, aux)

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTP = g_BTO @ aux.left_OP.astype(g_BTO.dtype)
        out_BPQ = _einsum("BTP,BTQ->BPQ", g_BTP, saved)
        if aux.bias_OP is None:
            return out_BPQ
        column_BP = g_BTO.sum(1) @ aux.bias_OP.astype(g_BTO.dtype)
        return out_BPQ + _einsum("BP,Q->BPQ", column_BP, aux.right_IP[-1].astype(g_BTO.dtype))


@dataclasses.dataclass(frozen=True)
class ProjectTokens(Project):
    """The summands of `Project` for every position, [B,T,P,Q]; they add up to it."""

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTP = g_BTO @ aux.left_OP.astype(g_BTO.dtype)
        return _einsum("BTP,BTQ->BTPQ", g_BTP, saved)


@dataclasses.dataclass(frozen=True)
class ProjectHeads(Project):
    """`Project` for each head's rows of G, [B,H,P,Q], with a left matrix [R,P] of its own.

    rows: the R outputs of each head. `left_OP` is [H,R,P].
    """

    rows: tuple[tuple[int, ...], ...]

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTHR = g_BTO[..., np.array(self.rows)]
        g_BTHP = jnp.einsum("BTHR,HRP->BTHP", g_BTHR, aux.left_OP.astype(g_BTO.dtype))
        return _einsum("BTHP,BTQ->BHPQ", g_BTHP, saved)


@dataclasses.dataclass(frozen=True)
class Full:
    """G itself, [B,O,I(+1)]; times aux [O,I(+1)] where there is one (a normaliser's)."""

    bias: bool = False

    def save(self, x_BTI: jax.Array, aux: jax.Array | None) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: jax.Array | None, g_BTO: jax.Array) -> jax.Array:
        G_BOI = _einsum("BTO,BTI->BOI", g_BTO, saved)
        if self.bias:
            column_BO = g_BTO.astype(G_BOI.dtype).sum(1)
            G_BOI = jnp.concatenate([G_BOI, column_BO[..., None]], axis=-1)
        return G_BOI if aux is None else G_BOI * aux[None]


class Normalised(NamedTuple):
    """Projection matrices, and what G is multiplied by, entry by entry, before."""

    pair: Pair
    scale_OI: jax.Array


@dataclasses.dataclass(frozen=True)
class ProjectFull(Full):
    """P_left (G * scale) P_right^T as [B,P,Q]: an entrywise scale leaves no way around G."""

    def emit(self, saved: jax.Array, aux: Normalised, g_BTO: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
        G_BOI = super().emit(saved, aux.scale_OI, g_BTO)
        return jnp.einsum("BOI,OP,IQ->BPQ", G_BOI, aux.pair.left_OP, aux.pair.right_IP)


@dataclasses.dataclass(frozen=True)
class Sketch(Full):
    """A dense sketch <R_m, G> as [B,M], aux R [M,O,I(+1)]; forms G, and costs M times its size."""

    def emit(self, saved: jax.Array, aux: jax.Array, g_BTO: jax.Array) -> jax.Array:
        G_BOI = super().emit(saved, None, g_BTO)
        return jnp.einsum("BOI,MOI->BM", G_BOI, aux)


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


@dataclasses.dataclass(frozen=True)
class ProjectLookup:
    """`Project` of a lookup: its x_t^T P_left is a row of P_left."""

    def save(self, x_BTI: jax.Array, aux: Pair) -> jax.Array:
        return aux.left_OP[x_BTI]

    def emit(self, saved: jax.Array, aux: Pair, g_BTO: jax.Array) -> jax.Array:
        g_BTQ = g_BTO @ aux.right_IP.astype(g_BTO.dtype)
        return _einsum("BTP,BTQ->BPQ", saved.astype(g_BTO.dtype), g_BTQ)


@dataclasses.dataclass(frozen=True)
class FullLookup:
    """`Full` of a lookup in a table of so many rows: each token's gradient added to its row."""

    rows: int

    def save(self, x_BTI: jax.Array, aux: jax.Array | None) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: jax.Array | None, g_BTO: jax.Array) -> jax.Array:
        b, _, i = g_BTO.shape
        wide = np.promote_types(g_BTO.dtype, jnp.float32)
        at_B1 = jnp.arange(b)[:, None]
        G_BOI = jnp.zeros((b, self.rows, i), wide).at[at_B1, saved].add(g_BTO.astype(wide))
        return G_BOI if aux is None else G_BOI * aux[None]


def of_lookup(rule: Rule, rows: int) -> Rule:
    """The rule that emits for an embedding of so many rows what `rule` emits for a product."""
    if isinstance(rule, Project) and not isinstance(rule, ProjectTokens):
        return ProjectLookup()
    if type(rule) is Full:
        return FullLookup(rows)
    raise InputError(f"{type(rule).__name__} statistics of an embedding are not supported; leave "
                     "it out with --exclude, or score with --exact")  # fmt: skip
