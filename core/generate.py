"""Text from a model: prompts are read in groups, then one token a step from a key-value cache.

Dims: R rows of the running state, B rows of a group of prompts, T tokens of its longest prompt, N
new tokens, S cache slots or stop ids, V vocabulary, D width.

A prompt takes a row as soon as one is free (continuous batching, as in Orca, OSDI 2022): every
`STEPS` steps the host looks for texts that have ended. Prompts are aligned on the left, so a row's
positions never depend on its neighbours. Groups come in a few widths and two heights, caches in
one size: few programs. A step is bound by reading the weights: layers run unrolled over weights
that were unstacked and cast once, whatever `Execution` says of layers, since a scan would copy each
slice first. A sliding layer's cache is a ring of `window` slots.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families, model, schema, sharding
from core.attention import CACHE, fill
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.sampling import GREEDY, Chosen, Sampling, choose, row_keys

SMALLEST_BUCKET = 32  # tokens
STEPS = 16  # between two looks of the host at what was written
# Tokens of a group for each device: as many as keep its arithmetic busy, padding included.
GROUP_TOKENS = 512


class Weights(NamedTuple):
    """A model laid out for decoding: layers apart, matrices in the compute dtype."""

    embed: schema.Params
    layers: list[model.Variables]
    final_norm: schema.Params
    head_VD: jax.Array


class State(NamedTuple):
    """Between two steps. `ids_R1` at `positions_R1` is written but not yet read by the model.

    last_R1: the position of the last token a row may get. keys_R: see `core.sampling.row_keys`.
    """

    caches: list[schema.Params]
    ids_R1: jax.Array
    positions_R1: jax.Array
    last_R1: jax.Array
    keys_R: jax.Array


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


def _is_stop(ids_B: jax.Array, stops_S: jax.Array) -> jax.Array:
    return (ids_B[:, None] == stops_S[None]).any(-1)


def blank(config: ModelConfig, execution: Execution, rows: int, tokens: int) -> State:
    """A state of free rows, with room for texts of up to `tokens` tokens."""

    def cache(slots: int) -> schema.Params:
        k_RGKS = jnp.zeros((rows, config.groups, config.head_dim, slots), execution.compute_dtype)
        return {"k": k_RGKS, "v": jnp.swapaxes(k_RGKS, 2, 3)}

    caches = [cache(slots) for slots in cache_slots(config, tokens)]
    ids, positions, last = (jnp.zeros((rows, 1), jnp.int32) for _ in range(3))  # each is donated
    return State(caches, ids, positions, last, row_keys(0, range(rows)))


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "sampling"), donate_argnames="state"
)
@model.full_precision
def prefill(
    config: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    weights: Weights,
    state: State,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    rows_B: jax.Array,
    keys_B: jax.Array,
    new_tokens: jax.Array,
) -> tuple[State, Chosen]:
    """Read prompts, padded on the right, into `rows_B` of the state; the first token [B] of each.

    rows_B: one that the state has not belongs to a prompt that only fills the group.
    """
    caches, logits_BV = read(config, execution, weights, ids_BT.shape[1], ids_BT, lengths_B)
    first = choose(logits_BV, sampling, keys_B, lengths_B)
    at_B1 = lengths_B[:, None]
    group = State(caches, first.ids[:, None], at_B1, at_B1 + new_tokens - 1, keys_B)

    def put(held: jax.Array, new: jax.Array) -> jax.Array:
        # What lies behind the prompts' slots is of texts that have ended; it is masked.
        return held.at[(rows_B, *map(slice, new.shape[1:]))].set(new, mode="drop")

    return jax.tree.map(put, state, group), first


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
    stops_S: jax.Array,
    done_R: jax.Array,
) -> tuple[State, Chosen]:
    """Up to STEPS more tokens a row: (state, chosen [R,STEPS]).

    done_R: rows without a text that goes on. Ends early when every row is done; what a row gets
    behind a stop id or its last token is to be ignored.
    """
    rows = state.ids_R1.shape[0]
    wide = np.promote_types(execution.compute_dtype, jnp.float32)

    def body(
        carry: tuple[jax.Array, State, jax.Array, Chosen],
    ) -> tuple[jax.Array, State, jax.Array, Chosen]:
        n, state, done_R, written = carry
        caches, logits_RV = step(
            config, execution, weights, state.caches, state.ids_R1, state.positions_R1
        )
        at_R1 = state.positions_R1 + 1
        new = choose(logits_RV, sampling, state.keys_R, at_R1[:, 0])
        written = jax.tree.map(lambda all_RN, x_R: all_RN.at[:, n].set(x_R), written, new)
        # A done row stays where it is: its cache has no room for more.
        at_R1 = jnp.where(done_R[:, None], state.positions_R1, at_R1)
        stopped_R = (new.ids[:, None] == stops_S[None]).any(-1)
        done_R = done_R | stopped_R | (at_R1 >= state.last_R1)[:, 0]
        state = state._replace(caches=caches, ids_R1=new.ids[:, None], positions_R1=at_R1)
        return n + 1, state, done_R, written

    def unfinished(carry: tuple[jax.Array, State, jax.Array, Chosen]) -> jax.Array:
        return (carry[0] < STEPS) & ~carry[2].all()

    nothing = Chosen(jnp.zeros((rows, STEPS), jnp.int32), jnp.zeros((rows, STEPS), wide))
    begin = (jnp.int32(0), state, done_R, nothing)
    _, state, _, written = jax.lax.while_loop(unfinished, body, begin)
    return state, written


def bucket(tokens: int, largest: int) -> int:
    """`tokens` rounded up to a power of two, but not beyond `largest`."""
    return min(max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), largest)


def heights(width: int, rows: int, devices: int) -> tuple[int, int]:
    """Rows of a small and of a large group of prompts of up to `width` tokens."""
    return devices, devices * max(min(GROUP_TOKENS // width, rows // devices), 1)


def next_group(
    longest: int, ready: int, rows: int, devices: int, largest: int
) -> tuple[int, int, int]:
    """(prompts to read at once, rows, width) of `ready` ones of up to `longest` tokens.

    A large group where at least half of it is used, else a small one.
    """
    width = bucket(longest, largest)
    small, large = heights(width, rows, devices)
    height = large if 2 * ready >= large else small
    return min(ready, height), height, width


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


class Row(NamedTuple):
    """A text under way: the index of its prompt, ids int32 [N] and logprobs float32 [N] so far."""

    index: int
    ids: np.ndarray = np.zeros(0, np.int32)
    logprobs: np.ndarray = np.zeros(0, np.float32)


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
    finished: Mapping[int, int] = {},
) -> Iterator[list[tuple[int, Completion]]]:
    """Up to `new_tokens` >= 1 tokens after each of >= 1 prompts (int32 [T]).

    Yields (index, completion) of those that end together.

    stops: ids that end a text. ends: see `Ends`; asked every few steps. batch: texts at a time.
    A completion depends on its own prompt, the seed and its index, beyond rounding.

    finished: of completions that an interrupted call gave, index: tokens. They are left out but
    keep their place in the schedule, so all others are read in the same group, row and step, and
    are the same to the last bit.

    Raises InputError as `check_prompts` does.
    """
    sampling.check()
    check_prompts(config, prompts, new_tokens)
    mesh = sharding.local_mesh()
    over_rows = sharding.over_rows(mesh)
    weights = unstack(config, execution, jax.device_put(variables, sharding.replicated(mesh)))
    size = min(batch, 1 << (len(prompts) - 1).bit_length())
    size += -size % mesh.size
    stops_S = np.array([*stops] or [-1], np.int32)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)))
    room = min(bucket(len(prompts[waiting[0]]), config.context) + new_tokens, config.context)
    empty = jax.jit(blank, static_argnums=(0, 1, 2, 3), out_shardings=over_rows)
    state = empty(config, execution, size, room)
    rows: dict[int, Row] = {}
    absent: dict[int, int] = {}  # rows of what is finished: for how many tokens they stay taken
    while waiting or rows:
        free = [r for r in range(size) if r not in rows and r not in absent]
        if waiting and free:
            count, height, width = next_group(
                len(prompts[waiting[0]]), min(len(free), len(waiting)), size, mesh.size,
                config.context,
            )  # fmt: skip
            chosen = dict(zip(free[:count], (waiting.popleft() for _ in range(count)), strict=True))
            absent |= {r: finished[i] - 1 for r, i in chosen.items() if finished.get(i, 1) > 1}
            rows |= {r: Row(i) for r, i in chosen.items() if i not in finished}
            place = {r: b for b, r in enumerate(chosen) if r in rows}
            if not place:
                continue
            group = _group({r: prompts[i] for r, i in chosen.items()}, height, width, size)
            keys_B = row_keys(seed, [*chosen.values()] + [0] * (height - count))
            state, first = prefill(
                config, execution, sampling, weights, state,
                *(sharding.place(x, over_rows) for x in group), jax.device_put(keys_B, over_rows),
                np.int32(new_tokens),
            )  # fmt: skip
            ids_BN, logprobs_BN = (np.asarray(x_B)[:, None] for x_B in first)
        else:
            absent = {r: left - STEPS for r, left in absent.items() if left > STEPS}
            place = {r: r for r in rows}
            if not place:
                continue
            done_R = sharding.place(np.array([r not in rows for r in range(size)]), over_rows)
            state, more = decode(config, execution, sampling, weights, state, stops_S, done_R)
            ids_BN, logprobs_BN = map(np.asarray, more)
        ended = []
        for r, b in place.items():
            i, ids_N, logprobs_N = rows[r]
            row = rows[r] = Row(
                i,
                np.concatenate([ids_N, ids_BN[b]])[:new_tokens],
                np.concatenate([logprobs_N, logprobs_BN[b]])[:new_tokens],
            )
            if completion := _completion(row, new_tokens, stops_S, ends):
                ended.append((i, completion))
                del rows[r]
        if ended:
            yield ended


def _group(
    prompts: Mapping[int, np.ndarray], height: int, width: int, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids int32 [B,T], lengths [B], rows [B]) of prompts by their row of the state."""
    ids_BT, lengths_B = np.zeros((height, width), np.int32), np.ones(height, np.int32)
    rows_B = np.full(height, rows, np.int32)
    for b, (r, ids) in enumerate(prompts.items()):
        ids_BT[b, : len(ids)], lengths_B[b], rows_B[b] = ids, len(ids), r
    return ids_BT, lengths_B, rows_B


def _completion(row: Row, new_tokens: int, stops_S: np.ndarray, ends: Ends) -> Completion | None:
    """Cut at the first stop id, or before it where the text ended otherwise; None: it goes on."""
    stopped = np.flatnonzero(np.isin(row.ids, stops_S))
    text = row.ids[: stopped[0]] if len(stopped) else row.ids
    end, reason = ends(text), "stop_string"
    if end is None and len(stopped):
        end, reason = len(text) + 1, "stop_id"
    elif end is None and len(text) == new_tokens:
        end, reason = new_tokens, "length"
    return None if end is None else Completion(row.ids[:end], row.logprobs[:end], reason)
