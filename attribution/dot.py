"""Sinks that score examples and tokens on given directions, so that no gradient is stored.

Dims: B examples, T tokens, L layers, Q directions, I inputs, O outputs, P projected, D features.

With G = sum_t g_t x_t^T the gradient of one site and D_q a direction's part there,

    <G, D_q> = sum_t g_t^T D_q x_t,

so either G is formed for a moment and met by all directions, O I (T + Q) products an example, or
each token's g_t and x_t meet each direction, O I T Q. Token t's summand is the part of the score
that passes through position t (the gradient side). Positions without a label have one as well:
what they hold is read by later ones. In a projection's P x P features a token costs P P Q.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import gradients, rules
from attribution.gradients import Aux
from attribution.rules import Pair
from attribution.targets import (
    Spec,
    Tree,
    flatten,
    order,
    shape_of,
    targets,
    unflatten,
)
from core import model
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.linear import Rule


class Directions(NamedTuple):
    """One site's part of Q directions, [Q,O,I(+1)]; with a `pair`, of projected gradients."""

    d_QOI: jax.Array
    pair: Pair | None = None


def _einsum(equation: str, *operands: jax.Array) -> jax.Array:
    wide = np.promote_types(operands[0].dtype, jnp.float32)
    return jnp.einsum(equation, *operands, preferred_element_type=wide)


@dataclasses.dataclass(frozen=True)
class Dot:
    """<G, D_q> as [B,Q], or its summands over positions, [B,T,Q]."""

    tokens: bool = False

    def save(self, x_BTI: jax.Array, aux: Directions) -> jax.Array:
        return x_BTI if aux.pair is None else rules.Project().save(x_BTI, aux.pair)

    def emit(self, saved: jax.Array, aux: Directions, g_BTO: jax.Array) -> jax.Array:
        if aux.pair is not None:
            g_BTO = g_BTO @ aux.pair.left_OP.astype(g_BTO.dtype)
        if aux.d_QOI.shape[-1] > saved.shape[-1]:  # a bias column: x is extended by a one
            saved = jnp.pad(saved, ((0, 0), (0, 0), (0, 1)), constant_values=1)
        (t, o), (q, _, i) = g_BTO.shape[1:], aux.d_QOI.shape
        if not self.tokens and (t + q) * i * o < t * q * (i + 1) * o:
            G_BOI = _einsum("BTO,BTI->BOI", g_BTO, saved)
            return _einsum("BOI,QOI->BQ", G_BOI, aux.d_QOI.astype(G_BOI.dtype))

        def summands(d_OI: jax.Array) -> jax.Array:
            dx_BTO = _einsum("BTI,OI->BTO", saved, d_OI.astype(saved.dtype))
            return (dx_BTO * g_BTO.astype(dx_BTO.dtype)).sum(-1)

        # One direction after the other: what is held does not grow with their number.
        scores_BTQ = jnp.moveaxis(jax.lax.map(summands, aux.d_QOI), 0, -1)
        return scores_BTQ if self.tokens else scores_BTQ.sum(1)


@dataclasses.dataclass(frozen=True)
class Both:
    """What two rules emit, as a pair; so are `aux` and `out`."""

    first: Rule
    second: Rule

    def save(self, x_BTI: jax.Array, aux: Any) -> Any:
        return self.first.save(x_BTI, aux[0]), self.second.save(x_BTI, aux[1])

    def emit(self, saved: Any, aux: Any, g_BTO: jax.Array) -> Any:
        return self.first.emit(saved[0], aux[0], g_BTO), self.second.emit(saved[1], aux[1], g_BTO)


@functools.partial(jax.jit, static_argnames=("config", "spec"))
def by_sink(config: ModelConfig, spec: Spec, directions_QD: jax.Array) -> Tree:
    """Directions among the features as [L,Q,O,I] or [L,Q,P,P] by sink; 0 where not collected."""
    found, p, q = targets(config, spec), spec.projection.dim, len(directions_QD)
    if not p:
        return unflatten(config, spec, directions_QD)
    if spec.projection.target == "global":  # every site adds to the same features
        d_QPP = directions_QD.reshape(q, p, p)
        parts = {(t.sink, layer): d_QPP for t, layer in order(config, found)}
    else:
        split = jnp.moveaxis(directions_QD.reshape(q, -1, p, p), 1, 0)
        places = [(t.sink, layer) for t, layer in order(config, found)]
        parts = dict(zip(places, split, strict=True))
    zero_QPP = jnp.zeros((q, p, p), directions_QD.dtype)
    return {
        t.sink: jnp.stack([parts.get((t.sink, i), zero_QPP) for i in range(len(t.layers))])
        for t in found
    }


def check_tokens(config: ModelConfig, spec: Spec, aux: Aux) -> None:
    """Raise for what has no scores by position."""
    for target in targets(config, spec):
        pair = aux.get(target.sink)
        plain = pair is None or (isinstance(pair, Pair) and pair.bias_OP is None)
        if not target.stacked or target.rows or not plain:
            raise InputError(
                f"{target.site.name.format(l=0)} has no scores by position when it is an embedding "
                "or an output matrix, split by heads, normalised, or densely sketched; leave such "
                "options out, or use --exact with --token-side loss"
            )


def _total(caught: list[jax.Array]) -> jax.Array:
    """The sum over sites and, the leading axis, layers."""
    return functools.reduce(jnp.add, [out.sum(0) for out in caught])


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec", "tokens"))
@model.full_precision
def scores(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    tree: Tree,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    advantages_B: jax.Array | None = None,
    *,
    tokens: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """(scores [B,Q], or [B,T,Q] by position; summed token losses [B]) on unprojected directions.

    tree: [L,Q,O,I(+1)] by sink, 0 in layers that are not collected.
    """
    wide = np.promote_types(variables["params"]["embed"]["wte"].dtype, jnp.float32)
    found = targets(config, spec)
    q = tree[found[0].sink].shape[1]
    shape = (*ids_BT.shape, q) if tokens else (ids_BT.shape[0], q)
    aux: Aux = {t.sink: Directions(tree[t.sink]) for t in found}
    outs = {t.sink: jnp.zeros((len(t.layers), *shape), wide) for t in found}
    caught, loss_BT = gradients.catch(
        config, execution, variables, Dot(tokens), aux, outs, ids_BT, labels_BT,
        gradients.example_weights(labels_BT, spec.loss, wide, advantages_B), spec.objective,
    )  # fmt: skip
    return _total([caught[t.sink] for t in found]), loss_BT.sum(1)


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
@model.full_precision
def features_and_tokens(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    aux: Aux,
    tree: Tree,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    advantages_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(features [B,D], scores by position [B,T,Q], summed token losses [B]) of one pass.

    aux: from `gradients.projections`. tree: directions from `by_sink`.
    """
    wide = np.promote_types(variables["params"]["embed"]["wte"].dtype, jnp.float32)
    found, b = targets(config, spec), ids_BT.shape[0]
    q = tree[found[0].sink].shape[1]
    firsts = [jnp.zeros((len(t.layers), b, *shape_of(spec, t)), wide) for t in found]
    seconds = [jnp.zeros((len(t.layers), *ids_BT.shape, q), wide) for t in found]
    rule: dict[str, Rule] = {t.sink: Both(gradients.rule_of(spec, t), Dot(True)) for t in found}
    both = {s: (aux.get(s), Directions(tree[s], aux.get(s))) for s in rule}
    outs = dict(zip(rule, zip(firsts, seconds, strict=True), strict=True))
    caught, loss_BT = gradients.catch(
        config, execution, variables, rule, both, outs, ids_BT, labels_BT,
        gradients.example_weights(labels_BT, spec.loss, wide, advantages_B), spec.objective,
    )  # fmt: skip
    features_BD = flatten(config, spec, {s: pair[0] for s, pair in caught.items()})
    return features_BD, _total([pair[1] for pair in caught.values()]), loss_BT.sum(1)
