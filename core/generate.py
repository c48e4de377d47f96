"""Text from a model: one pass over the prompts, then one token a step from a key-value cache.

Dims: B rows, T prompt tokens of the longest row, S cache slots, V vocabulary, G key-value heads, K
head width.

Prompts are aligned on the left and padded on the right, so a row's positions never depend on its
neighbours; lengths are rounded up to a few buckets, and a program is compiled per bucket. Layers
run unrolled over weights that were unstacked and cast once: a step is bound by reading them, and a
scan would copy each slice first. A sliding layer's cache is a ring of `window` slots.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families, model, schema, sharding
from core.attention import CACHE, MASKED, fill
from core.config import Execution, ModelConfig
from core.errors import InputError

SMALLEST_BUCKET = 32  # tokens
STEPS = 16  # between two looks of the host at what was written


class Sampling(NamedTuple):
    """temperature 0 = greedy. top_k 0 and top_p 1 = off; both filter after the temperature."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


class Weights(NamedTuple):
    """A model laid out for decoding: layers apart, matrices in the compute dtype."""

    embed: schema.Params
    layers: list[model.Variables]
    final_norm: schema.Params
    head_VD: jax.Array


class State(NamedTuple):
    """Between two steps. `ids_B1` at `positions_B1` is written but not yet read by the model."""

    caches: list[schema.Params]
    ids_B1: jax.Array
    positions_B1: jax.Array
    done_B: jax.Array


class Completion(NamedTuple):
    """What followed a prompt. ids [N] int32 ends with the stop id, if one ended it; logprobs [N].

    logprobs are of the model's own distribution, before temperature and filters.
    """

    ids: np.ndarray
    logprobs: np.ndarray
    reason: Literal["stop", "length"]


def unstack(config: ModelConfig, execution: Execution, variables: model.Variables) -> Weights:
    """Lay out `variables` (params, and lora if any) for decoding."""
    params, dtype = variables["params"], execution.compute_dtype
    stacked = {"params": params["blocks"]}
    if "lora" in variables:
        stacked["lora"] = variables["lora"]["blocks"]

    def layer(number: int, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)[number]
        return x.astype(dtype) if x.ndim >= 2 else x

    return Weights(
        params["embed"],
        [jax.tree.map(functools.partial(layer, n), stacked) for n in range(config.layers)],
        params["final_norm"],
        jnp.asarray(model.head(config, params)).astype(dtype),
    )


def cache_slots(config: ModelConfig, tokens: int) -> list[int]:
    """Slots of each layer's cache for texts of up to `tokens` tokens."""
    sliding = config.sliding or (False,) * config.layers
    return [min(config.window, tokens) if near else tokens for near in sliding]


@functools.partial(jax.jit, static_argnames=("config", "execution", "tokens"))
def prefill(
    config: ModelConfig,
    execution: Execution,
    tokens: int,
    variables: model.Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
) -> tuple[list[schema.Params], jax.Array]:
    """(caches for texts of `tokens` tokens, logits float32 [B,V] after each row's last token)."""
    decoder = model.Decoder(config, execution)
    h_BTD, seen = decoder.apply(variables, ids_BT, mutable=[CACHE])
    blocks: Any = seen[CACHE]["blocks"]
    caches = [
        {name: fill(blocks[name][layer], lengths_B, slots) for name in ("k", "v")}
        for layer, slots in enumerate(cache_slots(config, tokens))
    ]
    last_B1D = jnp.take_along_axis(h_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return caches, model.head_logits(last_B1D, model.head(config, variables["params"]))[:, 0]


def step(
    config: ModelConfig,
    execution: Execution,
    weights: Weights,
    caches: list[schema.Params],
    ids_B1: jax.Array,
    positions_B1: jax.Array,
) -> tuple[list[schema.Params], jax.Array]:
    """Read one token a row: (caches that hold it, logits float32 [B,V] of what follows)."""
    family, dtype = families.of(config), execution.compute_dtype
    embed, block = family.Embed(config, dtype), family.Block(config)
    x_B1D = embed.apply({"params": weights.embed}, ids_B1, positions_B1)
    places, kinds = family.places(config, positions_B1, dtype), family.kinds(config)
    held = []
    for n, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True)):
        kind = None if kinds is None else kinds[n]
        x_B1D, new = block.apply(layer | {CACHE: cache}, x_B1D, places, kind, mutable=[CACHE])
        held.append(new[CACHE])
    h_B1D = family.FinalNorm(config.norm_eps).apply({"params": weights.final_norm}, x_B1D)
    return held, model.head_logits(h_B1D, weights.head_VD)[:, 0]


def choose(
    logits_BV: jax.Array, sampling: Sampling, rows_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(next token int32 [B], its log-probability [B]).

    A row's draw depends on (seed, row, position) and nothing else. top_p keeps the smallest set
    of most likely tokens whose probabilities reach it.
    """
    if sampling.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        z_BV = logits_BV / sampling.temperature
        if 0 < sampling.top_k < z_BV.shape[1]:
            least_B = jax.lax.top_k(z_BV, sampling.top_k)[0][:, -1]
            z_BV = jnp.where(z_BV < least_B[:, None], MASKED, z_BV)
        if sampling.top_p < 1:
            sorted_BV = -jnp.sort(-z_BV, axis=-1)
            p_BV = jax.nn.softmax(sorted_BV, axis=-1)
            kept_B = (jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p).sum(-1)
            least_B1 = jnp.take_along_axis(sorted_BV, kept_B[:, None] - 1, axis=-1)
            z_BV = jnp.where(z_BV < least_B1, MASKED, z_BV)
        root = jax.random.key(sampling.seed)
        keys_B = jax.vmap(lambda row, at: jax.random.fold_in(jax.random.fold_in(root, row), at))(
            rows_B, positions_B
        )
        ids_B = jax.vmap(jax.random.categorical)(keys_B, z_BV).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    return ids_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "sampling"), donate_argnames="state"
)
def decode(
    config: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    weights: Weights,
    state: State,
    rows_B: jax.Array,
    stops_S: jax.Array,
    steps: jax.Array,
) -> tuple[State, jax.Array, jax.Array]:
    """Up to `steps` <= STEPS more tokens a row: (state, ids [B,STEPS], logprobs [B,STEPS]).

    Ends early when every row is done; what a done row gets is to be ignored.
    """
    b = state.ids_B1.shape[0]
    ids_BN, logprobs_BN = jnp.zeros((b, STEPS), jnp.int32), jnp.zeros((b, STEPS), jnp.float32)

    def body(carry: tuple[jax.Array, State, jax.Array, jax.Array]):
        n, state, ids_BN, logprobs_BN = carry
        caches, logits_BV = step(
            config, execution, weights, state.caches, state.ids_B1, state.positions_B1
        )
        at_B = state.positions_B1[:, 0] + 1
        ids_B, logprobs_B = choose(logits_BV, sampling, rows_B, at_B)
        done_B = state.done_B | (ids_B[:, None] == stops_S[None]).any(-1)
        # A done row stays where it is: its cache has no room for more.
        next_B = jnp.where(state.done_B, at_B - 1, at_B)
        state = State(caches, ids_B[:, None], next_B[:, None], done_B)
        ids_BN = ids_BN.at[:, n].set(ids_B)
        return n + 1, state, ids_BN, logprobs_BN.at[:, n].set(logprobs_B.astype(jnp.float32))

    def unfinished(carry: tuple[jax.Array, State, jax.Array, jax.Array]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done_B.all()

    start = (jnp.zeros((), jnp.int32), state, ids_BN, logprobs_BN)
    _, state, ids_BN, logprobs_BN = jax.lax.while_loop(unfinished, body, start)
    return state, ids_BN, logprobs_BN


def bucket(tokens: int, largest: int) -> int:
    """`tokens` rounded up to a power of two, but not beyond `largest`."""
    return min(max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), largest)


def batches(lengths: Sequence[int], batch: int, context: int) -> list[list[int]]:
    """Prompts of one bucket together, shortest first: indices into `lengths`."""
    order = sorted(range(len(lengths)), key=lambda i: (bucket(lengths[i], context), i))
    groups: list[list[int]] = []
    for i in order:
        fits = groups and len(groups[-1]) < batch
        if fits and bucket(lengths[groups[-1][0]], context) == bucket(lengths[i], context):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def generate(
    config: ModelConfig,
    execution: Execution,
    variables: model.Variables,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[int] = (),
    ended: Callable[[np.ndarray], bool] = lambda ids: False,
    batch: int = 8,
    skip: int = 0,
) -> Iterator[list[tuple[int, Completion]]]:
    """Up to `new_tokens` tokens after each prompt (int32 [T]), batch by batch: (index, completion).

    stops: ids that end a text. ended: asked of the ids so far, every few steps, whether a text
    ended otherwise (a stop string); it may then hold a few tokens more. skip: batches to leave out.
    Raises InputError for an empty prompt, one with an id the model lacks, or one that leaves no
    room for `new_tokens` within the model's context.
    """
    for i, ids in enumerate(prompts):
        if not len(ids):
            raise InputError(
                f"prompt {i} has no tokens; give it text, or a tokenizer that adds bos"
            )
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise InputError(f"prompt {i} holds a token id outside the model's vocabulary of "
                             f"{config.vocab_size}; use the model's own tokenizer")  # fmt: skip
        if len(ids) + new_tokens > config.context:
            raise InputError(f"prompt {i} has {len(ids)} tokens; with {new_tokens} new ones they "
                             f"exceed the model's context of {config.context}")  # fmt: skip
    lengths = [len(ids) for ids in prompts]
    mesh = sharding.make_mesh()
    variables = jax.device_put(variables, sharding.replicated(mesh))
    weights = unstack(config, execution, variables)
    stops_S = np.array(stops or [-1], np.int32)
    for group in batches(lengths, batch, config.context)[skip:]:
        size = min(batch, 1 << (len(group) - 1).bit_length())
        size += -size % mesh.size
        done = _batch(
            config, execution, sampling, variables, weights, [prompts[i] for i in group], group,
            size, new_tokens, stops_S, ended, sharding.over_rows(mesh),
        )  # fmt: skip
        yield list(zip(group, done, strict=True))


def _batch(
    config: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    variables: model.Variables,
    weights: Weights,
    prompts: list[np.ndarray],
    rows: list[int],
    size: int,
    new_tokens: int,
    stops_S: np.ndarray,
    ended: Callable[[np.ndarray], bool],
    where: jax.sharding.NamedSharding,
) -> list[Completion]:
    width = bucket(max(len(ids) for ids in prompts), config.context)
    tokens = min(width + new_tokens, config.context)
    ids_BT, lengths_B = np.zeros((size, width), np.int32), np.ones(size, np.int32)
    for b, ids in enumerate(prompts):
        ids_BT[b, : len(ids)], lengths_B[b] = ids, len(ids)
    rows_B = np.array(rows + [0] * (size - len(rows)), np.uint32)
    filler_B = np.arange(size) >= len(rows)  # rows that only fill the batch
    ids_BT, lengths_B, rows_B = (sharding.place(x, where) for x in (ids_BT, lengths_B, rows_B))
    caches, logits_BV = prefill(config, execution, tokens, variables, ids_BT, lengths_B)
    first_B, first_logprob_B = _choose(logits_BV, sampling, rows_B, lengths_B)
    done_B = np.asarray((first_B[:, None] == stops_S[None]).any(-1)) | filler_B
    state = State(caches, first_B[:, None], lengths_B[:, None], sharding.place(done_B, where))
    ids_BN, logprobs_BN = np.asarray(first_B)[:, None], np.asarray(first_logprob_B)[:, None]
    while (left := new_tokens - ids_BN.shape[1]) > 0 and not done_B.all():
        n = min(left, STEPS)
        state, more_BN, more_logprobs_BN = decode(
            config, execution, sampling, weights, state, rows_B, stops_S, np.int32(n)
        )
        ids_BN = np.concatenate([ids_BN, np.asarray(more_BN)[:, :n]], axis=1)
        logprobs_BN = np.concatenate([logprobs_BN, np.asarray(more_logprobs_BN)[:, :n]], axis=1)
        done_B = np.array(state.done_B)
        for b in np.flatnonzero(~done_B):
            done_B[b] = ended(ids_BN[b])
        state = state._replace(done_B=sharding.place(done_B, where))
    return [_completion(ids_BN[b], logprobs_BN[b], stops_S) for b in range(len(rows))]


_choose = functools.partial(jax.jit, static_argnums=1)(choose)


def _completion(ids_N: np.ndarray, logprobs_N: np.ndarray, stops_S: np.ndarray) -> Completion:
    at = np.flatnonzero(np.isin(ids_N, stops_S))
    end = at[0] + 1 if len(at) else len(ids_N)
    return Completion(ids_N[:end], logprobs_N[:end], "stop" if len(at) else "length")
