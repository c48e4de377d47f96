"""The per-example gradient pass: one backward, no weight gradient, every site at once.

Dims: B examples, T tokens, L layers, I inputs, O outputs, P projected, D features of an example.

Differentiating the summed loss with respect to the sinks alone gives every example's gradient
statistic of every matrix that `attribution.targets` lists.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attribution import normalizer as normalizer_
from attribution import rules
from attribution.normalizer import Adafactor, Adam
from attribution.projection import Projection, dense, pair
from attribution.rules import Normalised, Pair
from attribution.targets import EMBEDDING, HEAD, Spec, Target, flatten, targets
from core import model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.linear import Rule, Sink
from core.loss import NLL, Objective

Aux = dict[str, Any]


def projections(config: ModelConfig, spec: Spec, normalizer: Adam | Adafactor | None = None) -> Aux:
    """What the rules of every sink need: random matrices, and scales of a normaliser.

    Adafactor's factors go into the matrices, where they cost nothing. Adam's scale G entry by
    entry, so that G is formed.
    """
    projection = spec.projection
    if projection.dim < 0:
        raise InputError(f"--projection-dim must not be negative, got {projection.dim}")
    if (normalizer is None) != (spec.normalizer is None):
        raise InputError("the spec and the normaliser differ; give the same --normalizer")
    if projection.target == "global" and (projection.dim == 0 or spec.heads):
        raise InputError("a global sketch needs --projection-dim, and has no heads; leave --heads "
                         "out or use --projection-target site")  # fmt: skip
    if (projection.dense or spec.heads) and normalizer is not None:
        raise InputError("heads and dense sketches are not normalised; leave --normalizer out")
    made = {t.sink: _aux(projection, t, spec.include_bias) for t in targets(config, spec)}
    if normalizer is None:
        return made if projection.dim else {}
    if isinstance(normalizer, Adam):
        scales = {sink: jnp.asarray(x) for sink, x in normalizer_.divide(normalizer).items()}
        return {s: Normalised(m, scales[s]) if m else scales[s] for s, m in made.items()}
    return {sink: _factored(m, normalizer, sink) for sink, m in made.items()}


def _aux(projection: Projection, target: Target, bias: bool) -> Any:
    depth, site = len(target.layers), target.site
    if projection.dim == 0:
        return None
    if projection.dense:
        return dense(projection, site, depth, bias)
    if not target.rows:
        return pair(projection, site, depth, bias)
    left_LHOP = jnp.stack(
        [
            pair(projection, site._replace(name=name, outputs=len(rows)), depth, bias).left_OP
            for name, rows in zip(target.head_names, target.rows, strict=True)
        ],
        axis=1,
    )
    return Pair(left_LHOP, pair(projection, site, depth, bias).right_IP)


def _factored(aux: Pair | None, normalizer: Adafactor, sink: str) -> Any:
    """Adafactor's scales as part of the matrices, or of G where there are none."""
    g_LO, x_LI, bias_LO = normalizer_.scales(normalizer, sink)
    if aux is None:
        scale_LOI = g_LO[..., None] * x_LI[:, None]
        parts = [scale_LOI] if bias_LO is None else [scale_LOI, bias_LO[..., None]]
        return jnp.concatenate(parts, -1)
    right_LIP = aux.right_IP.at[:, : x_LI.shape[1]].multiply(x_LI[..., None])
    bias_LOP = None if bias_LO is None else aux.left_OP * bias_LO[..., None]
    return Pair(aux.left_OP * g_LO[..., None], right_LIP, bias_LOP)


def rule_of(spec: Spec, target: Target) -> Rule:
    """What the target's sink emits for `example_gradients`."""
    bias = spec.include_bias and target.site.bias
    if spec.projection.dim == 0:
        return rules.Full(bias)
    if spec.projection.dense:
        return rules.Sketch(bias)
    if spec.normalizer is not None and spec.normalizer[0] == "adam":
        return rules.ProjectFull(bias)
    return rules.ProjectHeads(target.rows) if target.rows else rules.Project()


def catch(
    config: ModelConfig,
    execution: Execution,
    variables: model.Variables,
    rule: Rule | dict[str, Rule],
    aux: Aux,
    outs: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    objective: Objective = NLL,
) -> tuple[Aux, jax.Array]:
    """Run one backward pass into sinks: (statistics by sink, token losses [B,T]).

    rule: of all sinks, or of each. outs: zeros in the shape of each sink's statistic, with a
    leading layer axis (of size 1 for the embedding and the output matrix); aux: likewise, or
    nothing for a rule that needs none.
    """

    def loss(outs: Aux) -> tuple[jax.Array, jax.Array]:
        sinks: Aux = {}
        for place, out in outs.items():
            of = rule[place] if isinstance(rule, dict) else rule
            sink = Sink(of, aux.get(place), out)
            if place not in (EMBEDDING, HEAD):
                schema.put(sinks, place, sink)
                continue
            sink = dataclasses.replace(sink, **_unstacked(aux.get(place), out))
            if place == EMBEDDING:
                lookup = rules.of_lookup(of, config.vocab_size)
                schema.put(sinks, place, dataclasses.replace(sink, rule=lookup))
            if place == HEAD or config.tied:  # a tied matrix's two uses add up in one statistic
                sinks[HEAD] = sink
        caught = {**variables, "sinks": sinks}
        return model.weighted_loss(
            config, execution, caught, ids_BT, labels_BT, weights_BT, objective=objective
        )

    return jax.grad(loss, has_aux=True)(outs)


def _unstacked(aux: Any, out: Any) -> dict[str, Any]:
    return {"aux": jax.tree.map(lambda x: x[0], aux), "out": jax.tree.map(lambda x: x[0], out)}


def example_weights(
    labels_BT: jax.Array,
    loss: str,
    dtype: Any = jnp.float32,
    advantages_B: jax.Array | None = None,
) -> jax.Array:
    """The weight of each token in its example's loss, times the example's factor, [B,T]."""
    mask_BT = (labels_BT != model.loss.IGNORED).at[:, 0].set(False).astype(dtype)
    if loss == "mean":
        mask_BT = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return mask_BT if advantages_B is None else mask_BT * advantages_B.astype(dtype)[:, None]


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
@model.full_precision
def example_gradients(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    aux: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    advantages_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(features float32 [B,D], summed token loss float32 [B]) of every example of a batch.

    aux: from `projections`. advantages_B: factors of the examples' losses. A padding row (all
    labels -100) has zero features.
    """
    b, found = ids_BT.shape[0], targets(config, spec)
    wide = np.promote_types(variables["params"]["embed"]["wte"].dtype, jnp.float32)
    outs = {t.sink: jnp.zeros((len(t.layers), b, *_emitted(spec, t)), wide) for t in found}
    weights_BT = example_weights(labels_BT, spec.loss, wide, advantages_B)
    caught, nll_BT = catch(
        config, execution, variables, {t.sink: rule_of(spec, t) for t in found}, aux, outs, ids_BT,
        labels_BT, weights_BT, spec.objective,
    )  # fmt: skip
    return flatten(config, spec, caught), nll_BT.sum(1)


def _emitted(spec: Spec, target: Target) -> tuple[int, ...]:
    """The shape of an example's statistic."""
    p, site = spec.projection.dim, target.site
    if spec.projection.dense:
        return (p,)
    if p:
        return (len(target.rows), p, p) if target.rows else (p, p)
    return site.outputs, site.inputs + (spec.include_bias and site.bias)
