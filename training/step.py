"""The one training step: a weight for every token, a denominator fixed by the batch.

Dims: A micro-batches, B rows of one, T tokens.

    loss = sum_bt w_bt nll_bt / D,    D = number of supervised tokens of the whole batch

D never depends on w, so that w = 1 is plain training, any other w is masking, unlearning or a
policy gradient, and the derivative of the step in w is MAGIC. Micro-batches add numerators and
are divided once, so accumulation changes nothing but memory.

What is trained is all parameters, or an adapter's factors over a frozen base. An adapter's dropout
is keyed by (run, step, micro-batch): a resume draws the same masks, another accumulation others.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from core import adapter, families, model
from core.adapter import LoraSpec
from core.config import Execution, ModelConfig
from core.schema import Params, Row
from training.optim import Optim, build


class State(NamedTuple):
    """Everything a step changes. `step` counts finished steps; `params` is what is trained."""

    step: jax.Array
    params: Params
    opt_state: Any


class Metrics(NamedTuple):
    """Of one step, before its update: weighted loss (nats per token), gradient norm, tokens."""

    loss: jax.Array
    grad_norm: jax.Array
    tokens: jax.Array


class Recipe(NamedTuple):
    """All that is static about a step; hashable, so one recipe compiles once.

    lora: train an adapter of this kind and leave the model's parameters as they are.
    """

    config: ModelConfig
    execution: Execution
    optim: Optim
    steps: int
    lora: LoraSpec | None = None

    def rows(self) -> list[Row]:
        """Of what is trained."""
        return adapter.rows(self.lora, self.config) if self.lora else families.rows(self.config)

    def optimizer(self) -> optax.GradientTransformation:
        return build(self.optim, self.steps, self.rows())

    def variables(self, params: Params, frozen: Params | None) -> model.Variables:
        """The model's collections, from what is trained and, for an adapter, its base."""
        if self.lora is None:
            return {"params": params}
        assert frozen is not None
        return {"params": frozen, "lora": adapter.collection(self.lora, self.config, params)}


def initial(recipe: Recipe, params: Params) -> State:
    return State(jnp.zeros((), jnp.int32), params, recipe.optimizer().init(params))


def supervised(labels: jax.Array) -> jax.Array:
    """Number of supervised tokens, float32; the first token of a row is never one."""
    return (labels[..., 1:] != model.loss.IGNORED).sum().astype(jnp.float32)


def micro_keys(dropout: jax.Array | None, micros: int) -> jax.Array | None:
    """Keys [A] of a step's micro-batches."""
    if dropout is None:
        return None
    return jax.vmap(jax.random.fold_in, (None, 0))(dropout, jnp.arange(micros))


def loss_and_grad(
    recipe: Recipe, params: Params, frozen: Params | None, *micro: Any
) -> tuple[tuple[jax.Array, jax.Array], Params]:
    """((sum of weight * nll, nll [B,T]), gradient of the sum) of one micro-batch.

    micro: its ids, labels, weights [B,T] and key. frozen: see `gradients`.
    """

    def loss(params: Params) -> tuple[jax.Array, jax.Array]:
        variables = recipe.variables(params, frozen)
        return model.weighted_loss(recipe.config, recipe.execution, variables, *micro)

    return jax.value_and_grad(loss, has_aux=True)(params)


def gradients(
    recipe: Recipe,
    params: Params,
    ids_ABT: jax.Array,
    labels_ABT: jax.Array,
    weights_ABT: jax.Array,
    frozen: Params | None = None,
    dropout: jax.Array | None = None,
) -> tuple[Params, jax.Array]:
    """(gradient of the loss, loss), accumulated over the micro-batches.

    frozen: the base's parameters when `params` are an adapter's factors. dropout: the step's key.
    """
    micros = (ids_ABT, labels_ABT, weights_ABT, micro_keys(dropout, ids_ABT.shape[0]))

    def value_and_grad(params: Params, *micro: Any) -> tuple[jax.Array, Params]:
        (total, _), grads = loss_and_grad(recipe, params, frozen, *micro)
        return total, grads

    if ids_ABT.shape[0] == 1:
        total, grads = value_and_grad(params, *jax.tree.map(lambda x: x[0], micros))
    else:

        def add(carry: tuple[jax.Array, Params], micro: Any):
            return jax.tree.map(jnp.add, carry, value_and_grad(params, *micro)), None

        zero = (jnp.zeros((), weights_ABT.dtype), jax.tree.map(jnp.zeros_like, params))
        (total, grads), _ = jax.lax.scan(add, zero, micros)
    scale = 1 / jnp.maximum(supervised(labels_ABT), 1).astype(total.dtype)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), total * scale


def update(recipe: Recipe, state: State, grads: Params) -> State:
    """The optimizer's part of a step: clipping, moments, decay, the move."""
    updates, opt_state = recipe.optimizer().update(grads, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    return State(state.step + 1, params, opt_state)


def dropout_key(state: State, key: jax.Array | None) -> jax.Array | None:
    """Of the step that `state` is before, from the run's key."""
    return None if key is None else jax.random.fold_in(key, state.step)


def step(
    recipe: Recipe,
    state: State,
    ids_ABT: jax.Array,
    labels_ABT: jax.Array,
    weights_ABT: jax.Array,
    frozen: Params | None = None,
    key: jax.Array | None = None,
) -> tuple[State, Params, Metrics]:
    """One optimizer step on a batch of A micro-batches, and the gradient that it was made of.

    weights: label-aligned. frozen: see `gradients`. key: of the run, for dropout; without one there
    is none.
    """
    dropout = dropout_key(state, key)
    grads, loss = gradients(recipe, state.params, ids_ABT, labels_ABT, weights_ABT, frozen, dropout)
    norm = jnp.asarray(optax.tree.norm(grads))
    return update(recipe, state, grads), grads, Metrics(loss, norm, supervised(labels_ABT))


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def train_step(recipe: Recipe, state: State, *given: Any) -> tuple[State, Metrics]:
    """`step`, compiled, in place of the state; given: as there, from the ids on."""
    state, _, metrics = step(recipe, state, *given)
    return state, metrics
