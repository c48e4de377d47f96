"""Text from a model: one pass over the prompts, then one token a step from a key-value cache.

Dims: B rows, T prompt tokens of the longest row, N new tokens, S cache slots or stop ids, V
vocabulary, D width.

Prompts are aligned on the left and padded on the right, so a row's positions never depend on its
neighbours; lengths are rounded up to a few buckets, and a program is compiled per bucket. A step is
bound by reading the weights: layers run unrolled over weights that were unstacked and cast once,
whatever `Execution` says of layers, since a scan would copy each slice first. A sliding layer's
cache is a ring of `window` slots.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

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

    def check(self) -> None:
        """Raise InputError for what is no distribution."""
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise InputError(f"top_k must be 0 or more and top_p above 0, up to 1; got {self.top_k}"
                             f" and {self.top_p}")  # fmt: skip


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


class Chosen(NamedTuple):
    """Tokens and their log-probabilities under the model itself: no temperature, no filters."""

    ids: jax.Array
    logprobs: jax.Array


class Completion(NamedTuple):
    """What followed a prompt: ids int32 [N] up to and with what ended it, logprobs float32 [N]."""

    ids: np.ndarray
    logprobs: np.ndarray
    reason: Literal["stop_id", "stop_string", "length"]


# Of a row's new tokens, how many make up a text that has ended other than by a stop id; None while
# it has not. Its answer must not change when more tokens follow.
Ends = Callable[[np.ndarray], int | None]


@functools.partial(jax.jit, static_argnums=(0, 1))
def unstack(config: ModelConfig, execution: Execution, variables: model.Variables) -> Weights:
    """Lay out `variables` (params, and lora if any) for decoding."""
    params, dtype = variables["params"], execution.compute_dtype
    stacked = {"params": params["blocks"]}
    if "lora" in variables:
        stacked["lora"] = variables["lora"]["blocks"]

    def layer(number: int, x: jax.Array) -> jax.Array:
        x = x[number]
        return x.astype(dtype) if x.ndim == 2 else x

    return Weights(
        params["embed"],
        [jax.tree.map(functools.partial(layer, n), stacked) for n in range(config.layers)],
        params["final_norm"],
        model.head(config, params).astype(dtype),
    )


def cache_slots(config: ModelConfig, tokens: int) -> list[int]:
    """Slots of each layer's cache for texts of up to `tokens` tokens."""
    sliding = config.sliding or (False,) * config.layers
    return [min(config.window, tokens) if near else tokens for near in sliding]


def forward(
    config: ModelConfig,
    execution: Execution,
    weights: Weights,
    caches: list[schema.Params],
    ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> tuple[list[schema.Params], jax.Array]:
    """(what each layer's `CACHE` then holds, final hidden states [B,T,D]); see `core.attention`."""
    family, dtype = families.of(config), execution.compute_dtype
    embed, block = family.Embed(config, dtype), family.Block(config)
    x_BTD = embed.apply({"params": weights.embed}, ids_BT, positions_BT)
    places, kinds = family.places(config, positions_BT, dtype), family.kinds(config)
    held = []
    for n, (layer, cache) in enumerate(zip(weights.layers, caches, strict=True)):
        kind = None if kinds is None else kinds[n]
        x_BTD, new = block.apply(layer | {CACHE: cache}, x_BTD, places, kind, mutable=[CACHE])
        held.append(new[CACHE])
    return held, family.FinalNorm(config.norm_eps).apply({"params": weights.final_norm}, x_BTD)


def read(
    config: ModelConfig,
    execution: Execution,
    weights: Weights,
    tokens: int,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
) -> tuple[list[schema.Params], jax.Array]:
    """(caches for texts of `tokens` tokens, logits float32 [B,V] after each row's last token)."""
    empty: list[schema.Params] = [{}] * config.layers
    positions_1T = jnp.arange(ids_BT.shape[1])[None]
    seen, h_BTD = forward(config, execution, weights, empty, ids_BT, positions_1T)
    caches = [
        fill(layer["k"], layer["v"], lengths_B, slots)
        for layer, slots in zip(seen, cache_slots(config, tokens), strict=True)
    ]
    last_B1D = jnp.take_along_axis(h_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return caches, model.head_logits(last_B1D, weights.head_VD)[:, 0]


def step(
    config: ModelConfig,
    execution: Execution,
    weights: Weights,
    caches: list[schema.Params],
    ids_B1: jax.Array,
    positions_B1: jax.Array,
) -> tuple[list[schema.Params], jax.Array]:
    """Read one token a row: (caches that hold it, logits float32 [B,V] of what follows)."""
    caches, h_B1D = forward(config, execution, weights, caches, ids_B1, positions_B1)
    return caches, model.head_logits(h_B1D, weights.head_VD)[:, 0]


def row_keys(seed: int, rows_B: Sequence[int]) -> jax.Array:
    """The stream of each row: of the seed and the row's number, whatever its batch."""
    root = jax.random.key(seed)
    return jax.vmap(functools.partial(jax.random.fold_in, root))(np.array(rows_B, np.uint32))


def choose(
    logits_BV: jax.Array, sampling: Sampling, keys_B: jax.Array, positions_B: jax.Array
) -> Chosen:
    """The token [B] that comes to stand at `positions_B`, drawn from (row's key, position).

    top_k keeps the k most likely tokens, top_p the fewest most likely ones whose probabilities
    reach it; either way also what equals the last of them.
    """
    if sampling.temperature == 0:
        ids_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        z_BV = logits_BV / sampling.temperature
        if 0 < sampling.top_k < z_BV.shape[1]:
            kept_BV = _largest(z_BV, jnp.ones_like(z_BV), sampling.top_k)
            z_BV = jnp.where(kept_BV, z_BV, MASKED)
        if sampling.top_p < 1:
            kept_BV = _largest(z_BV, jax.nn.softmax(z_BV, axis=-1), sampling.top_p)
            z_BV = jnp.where(kept_BV, z_BV, MASKED)
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, positions_B)
        ids_B = jax.vmap(jax.random.categorical)(keys_B, z_BV).astype(jnp.int32)
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    return Chosen(ids_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1))


def _largest(z_BV: jax.Array, weights_BV: jax.Array, need: float) -> jax.Array:
    """bool [B,V]: the fewest largest values, and their equals, whose weights sum to `need`.

    The least of them is found bit by bit, since floats are in the order of their bits once those of
    negative ones are flipped: 32 passes, on a CPU a tenth of the time of sorting a vocabulary.
    """
    bits_BV = jax.lax.bitcast_convert_type(z_BV.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)

    def next_bit(n: jax.Array, least_B1: jax.Array) -> jax.Array:
        more_B1 = least_B1 | (sign >> n.astype(jnp.uint32))
        reached = jnp.where(bits_BV >= more_B1, weights_BV, 0).sum(-1, keepdims=True) >= need
        return jnp.where(reached, more_B1, least_B1)

    return bits_BV >= jax.lax.fori_loop(0, 32, next_bit, jnp.zeros_like(bits_BV[:, :1]))


def _is_stop(ids_B: jax.Array, stops_S: jax.Array) -> jax.Array:
    return (ids_B[:, None] == stops_S[None]).any(-1)


@functools.partial(jax.jit, static_argnames=("config", "execution", "sampling", "tokens"))
@model.full_precision
def prefill(
    config: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    weights: Weights,
    tokens: int,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    keys_B: jax.Array,
    stops_S: jax.Array,
    done_B: jax.Array,
) -> tuple[State, Chosen]:
    """Read prompts, padded on the right, and choose the first token [B] of each.

    tokens: room in the caches, prompts included. done_B: rows that only fill the batch.
    """
    caches, logits_BV = read(config, execution, weights, tokens, ids_BT, lengths_B)
    first = choose(logits_BV, sampling, keys_B, lengths_B)
    done_B = done_B | _is_stop(first.ids, stops_S)
    return State(caches, first.ids[:, None], lengths_B[:, None], done_B), first


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "sampling"), donate_argnames="state"
)
@model.full_precision
def decode(
    config: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    weights: Weights,
    state: State,
    keys_B: jax.Array,
    stops_S: jax.Array,
    steps: jax.Array,
) -> tuple[State, Chosen]:
    """Up to `steps` <= STEPS more tokens a row: (state, chosen [B,STEPS]).

    Ends early when every row is done; what a done row gets is to be ignored.
    """
    rows = state.ids_B1.shape[0]
    wide = np.promote_types(execution.compute_dtype, jnp.float32)

    def body(carry: tuple[jax.Array, State, Chosen]) -> tuple[jax.Array, State, Chosen]:
        n, state, written = carry
        caches, logits_BV = step(
            config, execution, weights, state.caches, state.ids_B1, state.positions_B1
        )
        at_B = state.positions_B1[:, 0] + 1
        new = choose(logits_BV, sampling, keys_B, at_B)
        # A done row stays where it is: its cache has no room for more.
        at_B = jnp.where(state.done_B, at_B - 1, at_B)
        done_B = state.done_B | _is_stop(new.ids, stops_S)
        written = jax.tree.map(lambda all_BN, x_B: all_BN.at[:, n].set(x_B), written, new)
        return n + 1, State(caches, new.ids[:, None], at_B[:, None], done_B), written

    def unfinished(carry: tuple[jax.Array, State, Chosen]) -> jax.Array:
        return (carry[0] < steps) & ~carry[1].done_B.all()

    blank = Chosen(jnp.zeros((rows, STEPS), jnp.int32), jnp.zeros((rows, STEPS), wide))
    _, state, written = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, blank))
    return state, written


def bucket(tokens: int, largest: int) -> int:
    """`tokens` rounded up to a power of two, but not beyond `largest`."""
    return min(max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), largest)


def batches(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """Prompts of like length together, longest first: indices into `lengths`."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + batch] for i in range(0, len(order), batch)]


def check_prompts(config: ModelConfig, prompts: Sequence[np.ndarray], new_tokens: int) -> None:
    """Raise InputError, naming the prompt, for one that the model cannot continue."""
    for number, ids in enumerate(prompts, 1):
        if not len(ids):
            raise InputError(f"prompt {number} has no tokens, and the tokenizer adds no BOS; give "
                             "it text")  # fmt: skip
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            raise InputError(f"prompt {number} holds a token id outside the model's vocabulary of "
                             f"{config.vocab_size}; use the model's own tokenizer")  # fmt: skip
        if len(ids) + new_tokens > config.context:
            raise InputError(
                f"prompt {number} has {len(ids)} tokens; with {new_tokens} new ones they exceed "
                f"the model's context of {config.context}; shorten it or ask for fewer"
            )


def generate(
    config: ModelConfig,
    execution: Execution,
    variables: model.Variables,
    prompts: Sequence[np.ndarray],
    new_tokens: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    stops: Sequence[int] = (),
    ends: Ends = lambda ids: None,
    batch: int = 8,
    skip: int = 0,
) -> Iterator[list[tuple[int, Completion]]]:
    """Up to `new_tokens` >= 1 tokens after each prompt (int32 [T]): batches of (index, completion).

    stops: ids that end a text. ends: see `Ends`; asked every few steps. skip: batches to leave out.
    A completion depends on its own prompt, the seed and its index, beyond rounding.
    Raises InputError as `check_prompts` does.
    """
    sampling.check()
    check_prompts(config, prompts, new_tokens)
    mesh = sharding.make_mesh()
    weights = unstack(config, execution, jax.device_put(variables, sharding.replicated(mesh)))
    size = min(batch, 1 << (len(prompts) - 1).bit_length())  # the same for all: fewer programs
    size += -size % mesh.size
    stops_S, over_rows = np.array([*stops] or [-1], np.int32), sharding.over_rows(mesh)

    def complete(chosen: list[int]) -> list[Completion]:
        lengths_B = np.ones(size, np.int32)
        lengths_B[: len(chosen)] = [len(prompts[i]) for i in chosen]
        width = bucket(int(lengths_B.max()), config.context)
        ids_BT = np.zeros((size, width), np.int32)
        for b, i in enumerate(chosen):
            ids_BT[b, : lengths_B[b]] = prompts[i]
        keys_B = jax.device_put(row_keys(seed, chosen + [0] * (size - len(chosen))), over_rows)
        done_B = np.arange(size) >= len(chosen)
        ids_BT, lengths_B = (sharding.place(x, over_rows) for x in (ids_BT, lengths_B))
        state, first = prefill(
            config, execution, sampling, weights, min(width + new_tokens, config.context),
            ids_BT, lengths_B, keys_B, stops_S, sharding.place(done_B, over_rows),
        )  # fmt: skip
        ids_BN, logprobs_BN = (np.asarray(x_B)[:, None] for x_B in first)
        while True:
            done_B = np.array(state.done_B)
            for b in np.flatnonzero(~done_B):
                done_B[b] = ends(ids_BN[b]) is not None
            n = min(new_tokens - ids_BN.shape[1], STEPS)
            if n == 0 or done_B.all():
                break
            state = state._replace(done_B=sharding.place(done_B, over_rows))
            state, more = decode(
                config, execution, sampling, weights, state, keys_B, stops_S, np.int32(n)
            )
            ids_BN = np.concatenate([ids_BN, np.asarray(more.ids)[:, :n]], axis=1)
            logprobs_BN = np.concatenate([logprobs_BN, np.asarray(more.logprobs)[:, :n]], axis=1)
        rows = range(len(chosen))
        return [_completion(ids_BN[b], logprobs_BN[b], stops_S, ends) for b in rows]

    for chosen in batches([len(ids) for ids in prompts], batch)[skip:]:
        yield list(zip(chosen, complete(chosen), strict=True))


def _completion(
    ids_N: np.ndarray, logprobs_N: np.ndarray, stops_S: np.ndarray, ends: Ends
) -> Completion:
    """Cut at the first stop id, or before it where the text ended otherwise."""
    stopped = np.flatnonzero(np.isin(ids_N, stops_S))
    text = ids_N[: stopped[0]] if len(stopped) else ids_N
    if (end := ends(text)) is not None:
        return Completion(ids_N[:end], logprobs_N[:end], "stop_string")
    end = len(text) + bool(len(stopped))
    return Completion(ids_N[:end], logprobs_N[:end], "stop_id" if len(stopped) else "length")
