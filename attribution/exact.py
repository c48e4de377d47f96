"""Exact inner products with every row's and every token's gradient, in one forward-mode pass.

Dims: L layers, Q directions, I inputs, O outputs, B examples, T tokens.

The inner product of the gradient of a loss with a direction q is the loss's derivative along q,

    <grad l_bt, q> = d/de l_bt(theta + e q),

so `jax.jvp` of all token losses gives each token's exact score and, summed, each example's: no
projection, no stored gradient, and activations of one layer at a time. Entry t is what predicting
token t contributes (the loss side, as Grosse et al., arXiv 2308.03296, divide a score); the sinks
of `attribution.dot` divide the same score over the positions that the gradient passes through.
"""

import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from attribution.gradients import example_weights
from attribution.targets import Spec, Target, Tree, targets
from core import model, schema
from core.config import Execution, ModelConfig
from core.schema import Params


def _paths(spec: Spec, target: Target) -> list[str]:
    """Where the variables are that the target's gradient is of: a matrix and perhaps its bias."""
    path = target.site.path
    if spec.adapter is not None:
        return [f"lora/{path}"]
    if not target.stacked:
        return [f"params/{path}"]
    bias = spec.include_bias and target.site.bias
    return [f"params/{path}/w", *([f"params/{path}/b"] if bias else [])]


def leaves(config: ModelConfig, spec: Spec, variables: model.Variables) -> Params:
    """The variables that are collected, in a tree of their own."""
    found: Params = {}
    for target in targets(config, spec):
        for path in _paths(spec, target):
            schema.put(found, path, schema.get(variables, path))
    return found


@functools.partial(jax.jit, static_argnames=("config", "spec"))
def tangents(config: ModelConfig, spec: Spec, tree: Tree) -> Params:
    """Directions [L,Q,O,I(+1)] by sink as tangents of `leaves`: [Q, *shape of the leaf] each."""
    found: Params = {}
    for target in targets(config, spec):
        paths, inputs = _paths(spec, target), target.site.inputs
        d_LQOI = _masked(target, tree[target.sink])
        if target.stacked:
            schema.put(found, paths[0], jnp.transpose(d_LQOI[..., :inputs], (1, 0, 3, 2)))
        else:  # embedding and output matrix lie as [O,I]
            schema.put(found, paths[0], d_LQOI[0])
        if len(paths) > 1:
            schema.put(found, paths[1], jnp.swapaxes(d_LQOI[..., inputs], 0, 1))
    return found


def directions(config: ModelConfig, spec: Spec, tangents: Params) -> Tree:
    """The inverse of `tangents`; 0 in layers that are not collected."""
    tree: Tree = {}
    for target in targets(config, spec):
        parts = [schema.get(tangents, path) for path in _paths(spec, target)]
        d_LQOI = jnp.transpose(parts[0], (1, 0, 3, 2)) if target.stacked else parts[0][None]
        if len(parts) > 1:
            d_LQOI = jnp.concatenate([d_LQOI, jnp.swapaxes(parts[1], 0, 1)[..., None]], -1)
        tree[target.sink] = _masked(target, d_LQOI)
    return tree


def _masked(target: Target, d_LQOI: jax.Array) -> jax.Array:
    keep_L = np.array(target.layers)
    return d_LQOI if keep_L.all() else jnp.where(keep_L[:, None, None, None], d_LQOI, 0)


def moved(variables: model.Variables, part: Params) -> model.Variables:
    """`variables` with the leaves of `part` in place of theirs."""
    new = {k: moved(variables[k], v) if isinstance(v, dict) else v for k, v in part.items()}
    return {**variables, **new}


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
@model.full_precision
def token_scores(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    tangents: Params,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    advantages_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(scores [B,T,Q], token losses [B,T]), label-aligned; scores sum over T to the example's.

    tangents: of Q directions, see `tangents`. All go through one evaluation of the model, to which
    each adds about two more.
    """

    def losses(part: Params) -> jax.Array:
        there = moved(variables, part)
        return model.token_losses(config, execution, there, ids_BT, labels_BT, spec.objective)

    def along(tangent: Params) -> tuple[jax.Array, jax.Array]:
        return jax.jvp(losses, (leaves(config, spec, variables),), (tangent,))

    if jax.tree.leaves(tangents)[0].shape[0] == 1:
        loss_BT, change_BT = along(jax.tree.map(lambda x: x[0], tangents))
        change_BTQ = change_BT[..., None]
    else:
        loss_BT, change_BTQ = jax.vmap(along, out_axes=(None, -1))(tangents)
    weights_BT = example_weights(labels_BT, spec.loss, change_BTQ.dtype, advantages_B)
    return weights_BT[..., None] * change_BTQ, loss_BT


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
@model.full_precision
def summed_gradient(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    advantages_B: jax.Array | None = None,
) -> Tree:
    """The sum of the examples' gradients, unprojected, [L,1,O,I(+1)] by sink."""

    def loss(part: Params) -> jax.Array:
        weights_BT = example_weights(labels_BT, spec.loss, advantages_B=advantages_B)
        there = moved(variables, part)
        return model.weighted_loss(
            config, execution, there, ids_BT, labels_BT, weights_BT, objective=spec.objective
        )[0]

    found = cast(Params, jax.grad(loss)(leaves(config, spec, variables)))
    return directions(config, spec, jax.tree.map(lambda x: x[None], found))
