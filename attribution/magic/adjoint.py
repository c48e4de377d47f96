"""One step of training walked backwards: what its tokens did to the end, and what its start did.

Dims: Q queries, A micro-batches, B rows of one, T tokens.

Let lambda be the derivative of a query's loss in the state after a step, and h the optimizer:

    (lambda', u) = VJP of h at (state, g) applied to lambda     u: the derivative in the gradient
    score_bt     = <grad nll_bt, u> / D
    lambda'_theta += H u,                                         H: the Hessian of the step's loss

The tangent of (gradient, token losses) along u / D holds both the score and H u, so one evaluation
in forward-over-reverse mode gives a micro-batch's part (MAGIC, arXiv 2504.16430, has the
recurrence; reverse-over-reverse needs the same products but keeps more, see docs/benchmarks.md).
Queries share all that does not depend on u.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from core import model
from core.schema import Params
from training.step import (
    Metrics,
    Recipe,
    State,
    dropout_key,
    loss_and_grad,
    micro_keys,
    step,
    supervised,
    update,
)


class Adjoint(NamedTuple):
    """The derivative of Q query losses in a state: [Q, ...] of each parameter and of each
    floating-point leaf of the optimizer's state, in the order of `jax.tree.leaves`."""

    params: Params
    moments: list[jax.Array]


def _is_moment(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def of_queries(leaf: jax.Array) -> jax.sharding.Sharding:
    """Where [Q, *leaf] lies: split over devices as the leaf is."""
    where = leaf.sharding
    if isinstance(where, NamedSharding):
        return NamedSharding(where.mesh, PartitionSpec(None, *where.spec))
    return where


def zeros(queries: int, leaf: jax.Array) -> jax.Array:
    """Zeros [Q, *shape of the leaf]."""
    return jnp.zeros((queries, *leaf.shape), leaf.dtype, device=of_queries(leaf))


def last(state: State, gradients: Params) -> Adjoint:
    """At the end of training, from the queries' gradients there [Q, ...]."""
    q = jax.tree.leaves(gradients)[0].shape[0]
    moments = [x for x in jax.tree.leaves(state.opt_state) if _is_moment(x)]
    return Adjoint(gradients, [zeros(q, x) for x in moments])


@functools.partial(jax.jit, static_argnames=("recipe",))
@model.full_precision
def forward_step(recipe: Recipe, state: State, *given: Any) -> tuple[State, Params | None, Metrics]:
    """`training.step.step`, with its gradient where `backward_step` needs it; leaves its state."""
    state, grads, metrics = step(recipe, state, *given)
    return state, None if recipe.optim.linear else grads, metrics


def backward_step(
    recipe: Recipe, state: State, grads: Params | None, adjoint: Adjoint, *given: Any
) -> tuple[Adjoint, jax.Array]:
    """(derivatives in the state before the step, scores [Q,A,B,T]), label-aligned.

    state, grads: before the step, and its gradient (`forward_step`). adjoint: after the step; its
    memory is taken. given: as for `training.step.step`, from the ids on. Two programs, as XLA would
    hold what each needs throughout the other.
    """
    adjoint, u = through_update(recipe, state, grads, adjoint)
    return through_gradient(recipe, state, adjoint, u, *given)


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("adjoint",))
@model.full_precision
def through_update(
    recipe: Recipe, state: State, grads: Params | None, adjoint: Adjoint
) -> tuple[Adjoint, Params]:
    """(derivatives in the state with the gradient held fixed, u)."""
    if grads is None:  # the update is linear: where it is differentiated does not matter
        grads = jax.tree.map(jnp.zeros_like, state.params)
    move, moments = moving(recipe, state)
    _, pull = jax.vjp(move, state.params, moments, grads)
    along_params, along_moments, u = over_queries(pull, adjoint)
    return Adjoint(along_params, along_moments), u


def moving(recipe: Recipe, state: State) -> tuple[Callable[..., Adjoint], list[jax.Array]]:
    """((parameters, moments, gradient) -> those after the update, the moments before it)."""
    leaves, structure = jax.tree.flatten(state.opt_state)

    def move(params: Params, moments: list[jax.Array], grads: Params) -> Adjoint:
        rest = iter(moments)
        opt_state = structure.unflatten([next(rest) if _is_moment(x) else x for x in leaves])
        after = update(recipe, State(state.step, params, opt_state), grads)
        return Adjoint(after.params, [x for x in jax.tree.leaves(after.opt_state) if _is_moment(x)])

    return move, [x for x in leaves if _is_moment(x)]


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("adjoint",))
@model.full_precision
def through_gradient(
    recipe: Recipe,
    state: State,
    adjoint: Adjoint,
    u: Params,
    ids_ABT: jax.Array,
    labels_ABT: jax.Array,
    weights_ABT: jax.Array,
    frozen: Params | None = None,
    key: jax.Array | None = None,
) -> tuple[Adjoint, jax.Array]:
    """`adjoint` with H u added, and the scores."""
    # A tangent stands beside every array kept. To keep of a block its products alone halves them
    # again and costs no matmul; and a loop over blocks keeps XLA from computing all of them again
    # at once. Unrolled, a small model on CPU took 2.3 times the memory and no less time.
    how = recipe.execution
    how = dataclasses.replace(
        how,
        remat=how.remat or "products",
        layers="scan" if how.layers == "auto" else how.layers,
    )
    recipe = recipe._replace(execution=how)
    scale = 1 / jnp.maximum(supervised(labels_ABT), 1)
    keys_A = micro_keys(dropout_key(state, key), ids_ABT.shape[0])
    micros = (ids_ABT, labels_ABT, weights_ABT, keys_A)

    def tangents(micro: Any) -> tuple[Params, jax.Array]:
        def gradient_and_losses(params: Params) -> tuple[Params, jax.Array]:
            (_, nll_BT), grads = loss_and_grad(recipe, params, frozen, *micro)
            return grads, nll_BT

        def along(u: Params) -> tuple[Params, jax.Array]:
            tangent = jax.jvp(gradient_and_losses, (state.params,), (u,))[1]
            return jax.tree.map(lambda x: x * scale.astype(x.dtype), tangent)

        return over_queries(along, u)

    if ids_ABT.shape[0] == 1:
        moved, scores_QBT = tangents(jax.tree.map(lambda x: x[0], micros))
        params = jax.tree.map(jnp.add, adjoint.params, moved)
        return Adjoint(params, adjoint.moments), scores_QBT[:, None]

    def add(params: Params, micro: Any) -> tuple[Params, jax.Array]:
        moved, scores_QBT = tangents(micro)
        return jax.tree.map(jnp.add, params, moved), scores_QBT

    params, scores_AQBT = jax.lax.scan(add, adjoint.params, micros)
    return Adjoint(params, adjoint.moments), jnp.swapaxes(scores_AQBT, 0, 1)


def over_queries(function: Any, tree: Any) -> Any:
    """`jax.vmap`; a single query is spared the extra axis, with which matmuls are slower."""
    if jax.tree.leaves(tree)[0].shape[0] > 1:
        return jax.vmap(function)(tree)
    one = function(jax.tree.map(lambda x: x[0], tree))
    return jax.tree.map(lambda x: x[None], one)
