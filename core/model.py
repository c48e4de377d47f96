"""The decoder, its losses and its logits.

Dims: B batch, T tokens, D width, V vocabulary.

`variables` is {"params": tree} and, when wanted, the collections `lora`, `sinks`, `taps` that the
linear site understands; arrays of the blocks are stacked on a leading layer axis. Losses are
label-aligned: entry t belongs to predicting token t, and entry 0 is always zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from core import families, loss
from core.attention import CACHE, PREFIX, TREE
from core.config import Execution, ModelConfig
from core.linear import SPLICE, SPLICED, TAPS, catch, tap
from core.loss import NLL, Objective
from core.schema import Params

Variables = dict[str, Any]
EMBEDDED = "embedded"
# Collections whose arrays of the blocks have a leading layer axis.
STACKED = ("params", "lora", "sinks", TAPS, SPLICE, CACHE, PREFIX)
P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """float32 means float32: accelerators would round a matmul's factors to TF32 or bfloat16."""

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return precise


class Decoder(nn.Module):
    """ids [B,T] -> final hidden states [B,T,D], in the compute dtype.

    positions_BT: of the tokens; None = 0, 1, ... in every row.
    """

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(self, ids_BT: jax.Array, positions_BT: jax.Array | None = None) -> jax.Array:
        c, family, dtype = self.config, families.of(self.config), self.execution.compute_dtype
        unroll = self.execution.unroll(c.layers)
        axes: Any = (nn.broadcast, 0)  # of places and kinds

        def layer(block: nn.Module, x_BTD: jax.Array, places: Any, kind: Any):
            x_BTD = block(x_BTD, places, kind)
            return tap(block, "resid_post", x_BTD), None

        if self.execution.remat:
            # Inside a loop the barrier against common-subexpression elimination is not needed;
            # unrolled, XLA would undo the recomputation without it.
            products = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = products if self.execution.remat == "products" else None
            layer = nn.remat(layer, prevent_cse=unroll > 1, policy=policy)
        stack = nn.scan(
            layer,
            variable_axes=dict.fromkeys(STACKED, 0),
            variable_broadcast=[TREE, SPLICED],
            split_rngs={"params": True, "dropout": True},
            in_axes=axes,
            length=c.layers,
            unroll=unroll,
        )
        if positions_BT is None:
            positions_BT = jnp.arange(ids_BT.shape[1])[None]  # the same for every row
        places = family.places(c, positions_BT, dtype)
        x_BTD = tap(self, EMBEDDED, family.Embed(c, dtype, name="embed")(ids_BT, positions_BT))
        x_BTD, _ = stack(family.Block(c, name="blocks"), x_BTD, places, family.kinds(c))
        return family.FinalNorm(c.norm_eps, name="final_norm")(x_BTD)


def head(config: ModelConfig, params: Params) -> jax.Array:
    """The output matrix [V,D]."""
    return params["embed"]["wte"] if config.tied else params["head"]


def hidden(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    dropout: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [B,T,D]. dropout: a key turns on the dropout of an adapter's input."""
    rngs = None if dropout is None else {"dropout": dropout}
    return cast(jax.Array, Decoder(config, execution).apply(variables, ids_BT, rngs=rngs))


class Prefix(NamedTuple):
    """A beginning that rows share: keys and values [L,1,P,G,K]; `length` of its P tokens count."""

    keys: jax.Array
    values: jax.Array
    length: jax.Array


def prefix_of(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_1P: jax.Array,
    length: jax.Array,
) -> Prefix:
    """Read a beginning of `length` tokens, padded on the right."""
    _, seen = Decoder(config, execution).apply(variables, ids_1P, mutable=[CACHE])
    held = cast(Params, seen)[CACHE]["blocks"]
    return Prefix(held["k"], held["v"], length)


def tree_hidden(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    ends_BT: jax.Array,
    prefix: Prefix | None = None,
) -> jax.Array:
    """Final hidden states [B,T,D] of rows of trees (see `core.attention`).

    positions_BT: depths, those of the prefix included. ends_BT: one past the subtree of each token;
    of padding its own place + 1.
    """
    tree: dict[str, jax.Array] = {"ends": ends_BT}
    if prefix is not None:
        tree["prefix"] = prefix.length
        variables = {**variables, PREFIX: {"blocks": {"k": prefix.keys, "v": prefix.values}}}
    variables = {**variables, TREE: {"blocks": tree}}
    return cast(jax.Array, Decoder(config, execution).apply(variables, ids_BT, positions_BT))


def logits(
    config: ModelConfig, execution: Execution, variables: Variables, ids_BT: jax.Array
) -> jax.Array:
    """All logits, float32 [B,T,V]: for tests and short prompts; losses never form them."""
    h_BTD = hidden(config, execution, variables, ids_BT)
    return head_logits(h_BTD, head(config, variables["params"]))


def head_logits(h_BTD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """Logits of hidden states, float32 [B,T,V]."""
    wide = np.promote_types(h_BTD.dtype, jnp.float32)
    head_VD = head_VD.astype(h_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", h_BTD, head_VD, preferred_element_type=wide)


def targets(labels_BT: jax.Array) -> jax.Array:
    """What each position predicts: the labels moved one place left, -100 at the end."""
    return jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=loss.IGNORED)


def _aligned(x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))


def token_losses(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    objective: Objective = NLL,
) -> jax.Array:
    """-log p(labels[t] | ids[<t]) in nats (or another objective), [B,T], 0 where unsupervised.

    Any derivative may be taken of it. `kl` compares a model with an adapter to the model without.
    """
    h_BTD = hidden(config, execution, variables, ids_BT)
    chunk = execution.tokens_per_chunk(config.vocab_size)
    params = variables["params"]
    base_BTD = None
    if objective.kind == "kl":
        base_BTD = jax.lax.stop_gradient(hidden(config, execution, {"params": params}, ids_BT))
    found_BT = loss.token_losses(
        h_BTD, head(config, params), targets(labels_BT), chunk, objective, base_BTD,
        functools.partial(catch, variables.get("sinks", {}).get("head")),
    )  # fmt: skip
    return _aligned(found_BT)


def weighted_loss(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
    dropout: jax.Array | None = None,
    objective: Objective = NLL,
) -> tuple[jax.Array, jax.Array]:
    """(sum of weight * token loss, token losses [B,T]); weights are label-aligned.

    Reverse derivatives go through the sum only (see `core.loss.weighted_nll`).
    """
    if objective != NLL or "head" in variables.get("sinks", {}):
        assert dropout is None
        losses_BT = token_losses(config, execution, variables, ids_BT, labels_BT, objective)
        return (weights_BT * losses_BT).sum(), losses_BT
    h_BTD = hidden(config, execution, variables, ids_BT, dropout)
    chunk = execution.tokens_per_chunk(config.vocab_size)
    shifted_BT = jnp.pad(weights_BT[:, 1:], ((0, 0), (0, 1)))
    w_VD = head(config, variables["params"])
    out = loss.weighted_nll(h_BTD, w_VD, targets(labels_BT), shifted_BT, chunk)
    total, nll_BT = cast(tuple[jax.Array, jax.Array], out)
    return total, _aligned(nll_BT)
