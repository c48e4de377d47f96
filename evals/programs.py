"""The compiled half of the scorer: rows of a plan in, log-probabilities of what is asked out.

Only positions that something is asked of meet the output matrix, some of them at a time, and of a
chunk's logits only a block of words exists at once. How many chunks are in use is data, so that a
program serves every batch of its shape. Each device works through its own rows.

Dims: B rows, T tokens, n chunks, C positions of a chunk, K targets of a position, N = B T, V
vocabulary, W words of a block, D width.
"""

import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core import loss, model, sharding
from core.config import Execution, ModelConfig
from core.model import Variables
from evals.plan import CHUNK, TARGETS, Shape


def chunk_size(config: ModelConfig, execution: Execution) -> int:
    """Positions whose logits are held at once."""
    return min(CHUNK, execution.tokens_per_chunk(config.vocab_size))


@model.full_precision
def score_rows(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    prefix: model.Prefix | None,
    ids_BT: jax.Array,
    positions_BT: jax.Array,
    ends_BT: jax.Array,
    at_nC: jax.Array,
    targets_nCK: jax.Array,
    live: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(log p of each target in nats, the most likely id of each position) of a device's rows.

    float32 [n,C,K] and int32 [n,C]; of the first live[0] chunks, 0 in the others. See `plan.Batch`.
    """
    h_BTD = model.tree_hidden(config, execution, variables, ids_BT, positions_BT, ends_BT, prefix)
    h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])
    w_VD = model.head(config, variables["params"])
    wide = np.promote_types(h_ND.dtype, jnp.float32)

    def chunk(i: jax.Array, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logprobs_CK, best_C = target_logprobs(h_ND[at_nC[i]], w_VD, targets_nCK[i])
        return out[0].at[i].set(logprobs_CK), out[1].at[i].set(best_C)

    zeros = jnp.zeros(targets_nCK.shape, wide), jnp.zeros(at_nC.shape, jnp.int32)
    return jax.lax.fori_loop(0, live[0], chunk, zeros)


def target_logprobs(
    h_CD: jax.Array, w_VD: jax.Array, targets_CK: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log p of the targets [C,K], the lowest of the most likely ids [C]) after hidden states.

    The vocabulary passes in blocks that stay in a CPU's cache, with a running maximum and sum of
    exponentials: half the time of whole rows of logits, and no copy of the head in another dtype.
    Targets of -1 get any value.
    """
    vocabulary, words = len(w_VD), min(loss.BLOCK, len(w_VD))
    wide = np.promote_types(h_CD.dtype, jnp.float32)

    def block(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top_C, sum_C, best_C, picked_CK = carry
        at = jnp.minimum(i * words, vocabulary - words)  # the last block reaches back
        w_WD = jax.lax.dynamic_slice_in_dim(w_VD, at, words).astype(h_CD.dtype)
        z_CW = jnp.einsum("CD,WD->CW", h_CD, w_WD, preferred_element_type=wide)
        ids_1W = at + jnp.arange(words, dtype=jnp.int32)[None]
        z_CW = jnp.where(ids_1W >= i * words, z_CW, -jnp.inf)
        high_C = z_CW.max(-1)
        # The index of a maximum by a reduction over pairs is several times slower on a CPU.
        first_C = jnp.where(z_CW == high_C[:, None], ids_1W, vocabulary).min(-1)
        best_C = jnp.where(high_C > top_C, first_C, best_C)
        new_C = jnp.maximum(top_C, high_C)
        sum_C = sum_C * jnp.exp(top_C - new_C) + jnp.exp(z_CW - new_C[:, None]).sum(-1)
        local_CK = targets_CK - at
        here_CK = (local_CK >= 0) & (local_CK < words)
        found_CK = jnp.take_along_axis(z_CW, jnp.where(here_CK, local_CK, 0), axis=1)
        # A word of the last block that an earlier one had is -inf in this one.
        picked_CK = jnp.where(here_CK, jnp.maximum(picked_CK, found_CK), picked_CK)
        return new_C, sum_C, best_C, picked_CK

    low_C = jnp.full(len(h_CD), -jnp.inf, wide)
    start = low_C, jnp.zeros_like(low_C), jnp.zeros(len(h_CD), jnp.int32)
    low_CK = jnp.full(targets_CK.shape, -jnp.inf, wide)
    blocks = jnp.int32(-(-vocabulary // words))
    top_C, sum_C, best_C, picked_CK = jax.lax.fori_loop(
        jnp.int32(0), blocks, block, (*start, low_CK)
    )
    return picked_CK - (top_C + jnp.log(sum_C))[:, None], best_C


class Programs:
    """What plans run, compiled: by the shape of a batch, and by the bucket of a prefix.

    A program is compiled when it is first asked for; `compile_plan` asks ahead, from any thread.
    variables: any of the model's, for their shapes and places; later ones must be alike.
    """

    def __init__(self, config: ModelConfig, execution: Execution, variables: Variables, mesh: Mesh):
        self.mesh = mesh
        leaves, tree = jax.tree.flatten(variables)
        like = (jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves)
        self.known = config, execution, mesh, tree, tuple(like)
        self.made: dict[Shape | int, Any] = {}
        self.lock = threading.Lock()

    @property
    def compilations(self) -> int:
        return len(self.made)

    def get(self, what: Shape | int) -> Any:
        """`score_rows` for a shape, `model.prefix_of` for a bucket, of what is not known here."""
        if what not in self.made:
            with self.lock:
                if what not in self.made:
                    self.made[what] = _compiled(*self.known, what)
        return self.made[what]


@functools.lru_cache(maxsize=256)
def _compiled(
    config: ModelConfig,
    execution: Execution,
    mesh: Mesh,
    tree: Any,
    like: tuple[jax.ShapeDtypeStruct, ...],
    what: Shape | int,
) -> Any:
    whole, rows = sharding.replicated(mesh), sharding.over_rows(mesh)
    variables = jax.tree.unflatten(tree, like)

    def ints(where: NamedSharding, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where)

    read = functools.partial(model.full_precision(model.prefix_of), config, execution)
    bucket = what if isinstance(what, int) else what.prefix
    begin = variables, ints(whole, 1, bucket), ints(whole)
    if isinstance(what, int):
        return jax.jit(read, out_shardings=whole).lower(*begin).compile()
    prefix = None
    if bucket:
        prefix = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
            jax.eval_shape(read, *begin),
        )
    of_rows, shared = PartitionSpec("data"), PartitionSpec()
    run = jax.shard_map(
        functools.partial(score_rows, config, execution), mesh=mesh,
        in_specs=(shared, shared, *(of_rows,) * 6), out_specs=of_rows,
        axis_names={"data"}, check_vma=False,
    )  # fmt: skip
    devices = mesh.shape["data"]
    at = (devices * what.chunks, chunk_size(config, execution))
    shapes = [what[:2]] * 3 + [at, (*at, TARGETS), (devices,)]
    given = (ints(rows, *shape) for shape in shapes)
    return jax.jit(run).lower(variables, prefix, *given).compile()
