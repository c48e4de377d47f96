"""Generation against the model without a cache, against transformers, and against plain numpy."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import attention, generate, model
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError
from core.inference import token_losses
from core.sampling import GREEDY, Sampling, _largest, choose, row_keys

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
FOLDERS = (
    "gpt2_tiny", "gpt2_tiny_untied", "gemma3_tiny", "gemma3_tiny_mqa", "neox_tiny",
    "neox_tiny_sequential",
)  # fmt: skip
SCAN = Execution(layers="scan")


@functools.cache
def load(name: str, adapter: str | None = None):
    return load_model(GOLDEN / name, GOLDEN / adapter if adapter else None)


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "generated.npz", allow_pickle=False) as file:
        return dict(file)


def prompts_of(name: str) -> list[np.ndarray]:
    golden = expected(name)
    return [p[:n] for p, n in zip(golden["prompts"], golden["lengths"], strict=True)]


def completions(name: str, new_tokens: int, prompts=None, **options):
    """Of every prompt that is not finished, in their order."""
    loaded = load(name)
    prompts = prompts_of(name) if prompts is None else prompts
    found = generate.generate(loaded.config, SCAN, loaded.variables, prompts, new_tokens, **options)
    by_index = dict(pair for batch in found for pair in batch)
    return [by_index[i] for i in sorted(by_index)]


# ------------------------------------------------------------------------------------- the cache


def cached_logits(loaded, execution, variables, ids_BT, lengths_B) -> list[np.ndarray]:
    """Logits [B,V] after the prompts, and after each token that follows, up to the last place.

    A row at its end reads its last token again.
    """
    tokens = ids_BT.shape[1]
    read = jax.jit(generate.read, static_argnums=(0, 1, 3))
    step = jax.jit(generate.step, static_argnums=(0, 1))
    padded_BT = np.where(np.arange(tokens)[None] < lengths_B[:, None], ids_BT, 0)
    weights = generate.unstack(loaded.config, execution, variables)
    prompts = (padded_BT[:, : lengths_B.max()], lengths_B)
    caches, logits_BV = read(loaded.config, execution, weights, tokens, *prompts)
    found = [logits_BV]
    for n in range(tokens - int(lengths_B.min())):
        at_B1 = np.minimum(lengths_B + n, tokens - 1)[:, None]
        new_B1 = np.take_along_axis(ids_BT, at_B1, axis=1)
        caches, logits_BV = step(loaded.config, execution, weights, caches, new_B1, at_B1)
        found.append(logits_BV)
    return [np.asarray(x_BV) for x_BV in found]


whole_logits = jax.jit(model.logits, static_argnums=(0, 1))


def both_ways(loaded, execution, variables) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N,B,V] of every step to the context's edge: with the cache and without."""
    config = loaded.config
    lengths_B = np.array([2, 13, 7], np.int32)
    ids_BT = np.random.default_rng(3).integers(0, config.vocab_size, (3, config.context), np.int32)
    whole_BTV = np.asarray(whole_logits(config, execution, variables, ids_BT))
    cached_NBV = np.stack(cached_logits(loaded, execution, variables, ids_BT, lengths_B))
    at_NB = np.minimum(lengths_B[None] + np.arange(len(cached_NBV))[:, None], config.context) - 1
    return cached_NBV, whole_BTV[np.arange(3)[None], at_NB]


def compare(loaded, execution, variables) -> float:
    """Of all steps, the largest difference relative to the step's largest logit."""
    cached_NBV, whole_NBV = both_ways(loaded, execution, variables)
    return (np.abs(cached_NBV - whole_NBV).max((1, 2)) / np.abs(whole_NBV).max((1, 2))).max()


@pytest.mark.parametrize("name", FOLDERS)
def test_every_step_equals_the_model_without_a_cache(name):
    """Rows of several lengths, over the windows, to the last place of the context."""
    loaded = load(name)
    assert compare(loaded, SCAN, loaded.variables) <= 1e-5


@pytest.mark.parametrize("name", ["gpt2_tiny", "gemma3_tiny", "neox_tiny"])
def test_an_adapter_counts_in_every_step(name):
    loaded = load(name, f"{name}_lora")
    assert "lora" in loaded.variables
    assert compare(loaded, SCAN, loaded.variables) <= 1e-5
    with_adapter, base = (
        whole_logits(loaded.config, SCAN, variables, np.ones((3, loaded.config.context), np.int32))
        for variables in (loaded.variables, {"params": loaded.params})
    )
    assert np.abs(with_adapter - base).max() > 1e-3


def test_every_step_in_float64(x64):
    loaded = load("gemma3_tiny")
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded.variables)
    assert compare(loaded, Execution("float64", "scan"), variables) <= 1e-12


def test_every_step_in_bfloat16():
    """Both ways round differently, but equally far from float32."""
    loaded = load("gemma3_tiny")
    exact_NBV = both_ways(loaded, SCAN, loaded.variables)[1]
    rounded = both_ways(loaded, Execution("bfloat16", "scan"), loaded.variables)
    cached, whole = (np.abs(found_NBV - exact_NBV).mean() for found_NBV in rounded)
    assert whole > 1e-3 and 0.8 < cached / whole < 1.25


@pytest.mark.parametrize("slots", [1, 4, 7, 16])
def test_slots_hold_what_a_list_says(slots):
    """Filled from prompts of several lengths, then written one by one, wrapping around."""
    lengths, tokens = (1, 4, 5, 11), 16
    held = [[-1] * slots for _ in lengths]
    for row, length in zip(held, lengths, strict=True):
        for position in range(length):
            row[position % slots] = position
    newest_B1 = jnp.array(lengths)[:, None] - 1
    k_BTGK = np.broadcast_to(np.arange(tokens)[None, :, None, None], (4, tokens, 2, 3)) * 1.0
    cache = attention.fill(jnp.asarray(k_BTGK), jnp.asarray(k_BTGK), newest_B1[:, 0] + 1, slots)
    assert cache["k"].shape == (4, 2, 3, slots) and cache["v"].shape == (4, 2, slots, 3)
    for n in range(2 * slots + 1):
        found_BS = np.maximum(attention.slot_positions(newest_B1 + n, slots), -1)
        np.testing.assert_array_equal(found_BS, held)
        if n == 0:
            full_BS = np.array(held) >= 0
            for stored_BS in (cache["k"][:, 1, 2], cache["v"][:, 1, :, 2]):
                np.testing.assert_array_equal(np.asarray(stored_BS)[full_BS],
                                              np.array(held)[full_BS])  # fmt: skip
        for row, length in zip(held, lengths, strict=True):
            row[(length + n) % slots] = length + n


def test_sliding_layers_keep_their_window_only():
    config = load("gemma3_tiny").config
    assert generate.cache_slots(config, 40) == [7, 7, 40, 7]
    assert generate.cache_slots(config, 5) == [5, 5, 5, 5]
    assert generate.cache_slots(load("gpt2_tiny").config, 40) == [40] * 3


def prefilled(name: str, rows: int, tokens: int, new_tokens: int = 1000):
    """State after prompts of 5 tokens, what decode takes beside it, and what prefill took."""
    loaded = load(name)
    ids_BT = np.random.default_rng(0).integers(0, 100, (rows, 5), np.int32)
    weights = generate.unstack(loaded.config, SCAN, loaded.variables)
    arguments = (loaded.config, SCAN, GREEDY, weights)
    read = (ids_BT, np.full(rows, 5, np.int32), np.arange(rows, dtype=np.int32),
            row_keys(0, range(rows)), np.int32(new_tokens))  # fmt: skip
    state, _ = generate.prefill(
        *arguments, generate.blank(loaded.config, SCAN, rows, tokens), *read
    )
    return arguments, state, (np.array([-1], np.int32), np.zeros(rows, bool)), read


@pytest.mark.parametrize("rows", [1, 3])
def test_the_cache_is_written_in_place(rows):
    """No copy of any layer's cache: the temporary memory is smaller than one."""
    arguments, state, more, read = prefilled("gpt2_tiny", rows, 1024)
    smallest = min(x.nbytes for x in jax.tree.leaves(state.caches))
    for program, given in ((generate.decode, more), (generate.prefill, read)):
        analysis: Any = program.lower(*arguments, state, *given).compile().memory_analysis()
        assert analysis.temp_size_in_bytes < smallest


def test_prefill_forms_logits_of_the_last_tokens_only():
    loaded = load("gpt2_tiny")
    weights = generate.unstack(loaded.config, SCAN, loaded.variables)
    read = functools.partial(generate.read, loaded.config, SCAN, weights, 24)
    written = str(jax.make_jaxpr(read)(np.zeros((3, 20), np.int32), np.full(3, 9, np.int32)))
    vocabulary = loaded.config.vocab_size
    assert f"[3,1,{vocabulary}]" in written and f"20,{vocabulary}]" not in written


# ---------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", FOLDERS)
def test_greedy_tokens_are_those_of_transformers(name):
    wanted_BN = expected(name)["tokens"]
    found = completions(name, wanted_BN.shape[1], batch=2)  # a row is used twice
    np.testing.assert_array_equal([completion.ids for completion in found], wanted_BN)
    assert {completion.reason for completion in found} == {"length"}


def test_log_probabilities_are_the_models_own(close):
    """Before temperature and filters, by the forward pass over the whole text."""
    name, prompts = "neox_tiny", prompts_of("neox_tiny")
    loaded = load(name)
    found = completions(name, 9, sampling=Sampling(0.7, 5, 0.8), seed=3)
    for prompt, completion in zip(prompts, found, strict=True):
        ids_1T = np.concatenate([prompt, completion.ids])[None]
        losses_1T = token_losses(loaded.config, SCAN, loaded.variables, ids_1T, ids_1T)
        close(completion.logprobs, -np.asarray(losses_1T)[0, len(prompt) :])


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.3, 20, 0.9)], ids=["greedy", "drawn"])
def test_a_completion_does_not_depend_on_its_batch(sampling):
    """Nor on what else is in it; a draw is of the seed, the prompt's index and the position."""
    options = {"sampling": sampling, "seed": 5}
    found = completions("neox_tiny", 20, **options)
    alone = completions("neox_tiny", 20, batch=1, **options)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
    others = [np.arange(1, 20), prompts_of("neox_tiny")[1], np.array([7])]
    again = completions("neox_tiny", 20, others, **options)
    np.testing.assert_array_equal(again[1].ids, found[1].ids)
    assert any((again[i].ids != found[i].ids).any() for i in (0, 2))


def test_equal_prompts_are_drawn_apart_and_other_seeds_differ():
    same = [prompts_of("neox_tiny")[0]] * 3
    found = [c.ids for c in completions("neox_tiny", 20, same, sampling=Sampling(1.0))]
    assert len({tuple(ids) for ids in found}) == 3
    other = [c.ids for c in completions("neox_tiny", 20, same, sampling=Sampling(1.0), seed=1)]
    assert {tuple(ids) for ids in found}.isdisjoint(tuple(ids) for ids in other)
    again = [c.ids for c in completions("neox_tiny", 20, same, sampling=Sampling(1.0))]
    np.testing.assert_array_equal(found, again)


def distribution(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """What should be drawn from, in float64, token by token."""
    z = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-z, kind="stable")
    p = np.exp(z - z.max())
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    total = 0.0
    for token in order:
        if total >= sampling.top_p:
            p[token] = 0
        total += p[token]
    return p / p.sum()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(1.0), Sampling(0.5), Sampling(2.0, top_k=4), Sampling(1.0, top_p=0.7),
     Sampling(1.5, 6, 0.8), Sampling(1.0, top_p=1e-6), Sampling(1.0, top_k=1), Sampling(1.0, 99)],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_distribution(sampling):
    draws = 20_000
    logits = np.random.default_rng(1).normal(0, 1.5, 12).astype(np.float32)
    rows = row_keys(7, range(draws // 2))
    logits_BV = jnp.broadcast_to(jnp.asarray(logits)[None], (draws // 2, 12))
    draw = jax.jit(choose, static_argnums=1)
    drawn = [draw(logits_BV, sampling, rows, np.full(draws // 2, at, np.int32)) for at in (3, 4)]
    assert (
        (np.asarray(drawn[0].ids) != np.asarray(drawn[1].ids)).any()
        or sampling.top_k == 1
        or (sampling.top_p < 0.1)
    )
    counts = np.bincount(np.concatenate([d.ids for d in drawn]), minlength=12)
    p = distribution(logits, sampling)
    assert counts[p == 0].sum() == 0 and (counts[p > 1e-3] > 0).all()
    kept = p > 0
    chi_square = ((counts[kept] - draws * p[kept]) ** 2 / (draws * p[kept])).sum()
    freedom = kept.sum() - 1
    assert chi_square <= freedom + 4 * np.sqrt(2 * freedom) + 4  # beyond four deviations
    logp = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(drawn[0].logprobs, logp[np.asarray(drawn[0].ids)], atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 8, 11, 12])
def test_a_filter_keeps_the_largest_and_their_equals(k):
    """Of both signs, zeros, masked ones and ties."""
    draw = np.random.default_rng(k)
    z_BV = np.round(draw.normal(0, 2, (50, 12)), 1).astype(np.float32) + 0
    z_BV[:, 3] = attention.MASKED
    kept_BV = np.asarray(_largest(jnp.asarray(z_BV), jnp.ones((50, 12)), k))
    least_B1 = -np.sort(-z_BV, axis=-1)[:, k - 1 : k]
    np.testing.assert_array_equal(kept_BV, z_BV >= least_B1)


# ------------------------------------------------------------------------------------ how it ends


def test_a_stop_id_ends_its_row_and_no_other():
    wanted_BN = expected("gpt2_tiny")["tokens"]
    stop = int(wanted_BN[0, 7])
    found = completions("gpt2_tiny", 24, stops=(stop, 3))
    for completion, whole_N in zip(found, wanted_BN, strict=True):
        at = np.flatnonzero(np.isin(whole_N, (stop, 3)))
        end = at[0] + 1 if len(at) else 24
        assert completion.reason == ("stop_id" if len(at) else "length")
        np.testing.assert_array_equal(completion.ids, whole_N[:end])
        assert completion.logprobs.shape == completion.ids.shape
    assert {c.reason for c in found} == {"stop_id", "length"}


def test_a_text_ends_where_it_is_said_to():
    """By the shortest beginning that is said to have ended, whenever the host looks."""
    wanted_BN = expected("gpt2_tiny")["tokens"]

    def ends(ids: np.ndarray) -> int | None:
        at = np.flatnonzero(ids == wanted_BN[1, 5])
        return int(at[0]) + 1 if len(at) else None

    found = completions("gpt2_tiny", 24, ends=ends)
    for completion, whole_N in zip(found, wanted_BN, strict=True):
        end = ends(whole_N)
        assert completion.reason == ("stop_string" if end else "length")
        np.testing.assert_array_equal(completion.ids, whole_N[:end])
    # What comes first wins, and the stop id itself is no part of the text that is asked about.
    stop = int(wanted_BN[1, 6])
    assert completions("gpt2_tiny", 24, ends=ends, stops=[stop])[1].reason == "stop_string"
    first = int(wanted_BN[1, 4])
    assert completions("gpt2_tiny", 24, ends=ends, stops=[first])[1].reason == "stop_id"
    same = completions("gpt2_tiny", 24, ends=ends, stops=[int(wanted_BN[1, 5])])[1]
    assert same.reason == "stop_id"


@pytest.fixture
def calls(monkeypatch):
    """Of each call of a program, its name and, of `decode`, the rows without a text."""
    seen: list[tuple[str, int]] = []

    def watch(name: str) -> None:
        program = getattr(generate, name)

        def watched(*arguments):
            seen.append((name, int(arguments[-1].sum()) if name == "decode" else 0))
            return program(*arguments)

        monkeypatch.setattr(generate, name, watched)

    watch("prefill")
    watch("decode")
    return seen


def test_nothing_is_decoded_once_every_row_has_ended(calls):
    def decoded(new_tokens, **options):
        calls.clear()
        found = completions("gpt2_tiny", new_tokens, **options)
        return found, sum(name == "decode" for name, _ in calls)

    wanted_BN = expected("gpt2_tiny")["tokens"]
    found, count = decoded(24, stops=wanted_BN[:, 0].tolist())
    assert count == 0 and all(len(c.ids) == 1 and c.reason == "stop_id" for c in found)
    assert decoded(1)[1] == 0
    assert decoded(24, ends=lambda ids: 2 if len(ids) > 1 else None)[1] == 1
    assert decoded(24)[1] == 2
    assert decoded(24, finished={0: 24, 1: 1, 2: 5})[1] == 0


def test_decoding_ends_early_inside_a_call():
    arguments, state, (none, busy_R), _ = prefilled("gpt2_tiny", 2, 64)
    copy = functools.partial(jax.tree.map, jnp.copy)
    _, free = generate.decode(*arguments, copy(state), none, busy_R)
    stops = np.asarray(free.ids)[:, 2]  # by the third token both rows have ended
    _, found = generate.decode(*arguments, copy(state), stops, busy_R)
    assert not np.asarray(found.ids)[:, 3:].any()
    limited = copy(state)._replace(last_R1=jnp.array([[7], [8]]))  # two and three more
    after, found = generate.decode(*arguments, limited, none, busy_R)
    np.testing.assert_array_equal(np.asarray(after.positions_R1)[:, 0], [7, 8])
    np.testing.assert_array_equal(np.asarray(found.ids)[:, :2], np.asarray(free.ids)[:, :2])
    assert np.asarray(free.ids)[:, 3].any() and not np.asarray(found.ids)[:, 3:].any()


MANY = [(np.arange(n) * 7 + n) % 100 for n in (4, 14, 12, 15, 7, 5, 8, 2, 9, 14, 6, 3)]
ENDING: dict[str, Any] = {"sampling": Sampling(1.2, 40), "seed": 2, "stops": range(9), "batch": 3}


def test_a_row_that_is_free_takes_the_next_prompt(calls):
    """No row idles while a prompt waits, and each text is what it is alone in a batch."""
    found = completions("gpt2_tiny", 33, MANY, **ENDING)
    assert len({len(c.ids) // generate.STEPS for c in found}) > 1  # they end at several looks
    names = [name for name, _ in calls]
    last = len(names) - names[::-1].index("prefill")
    idle = [rows for name, rows in calls[:last] if name == "decode"]
    assert idle and not any(idle) and sum(rows for _, rows in calls[last:]) > 0
    alone = completions("gpt2_tiny", 33, MANY, **{**ENDING, "batch": 1})
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)


def test_interrupted_anywhere_the_rest_is_the_same_to_the_last_bit():
    """Also where only some of those that ended together were kept."""
    loaded = load("gpt2_tiny")

    def run(finished):
        return list(generate.generate(loaded.config, SCAN, loaded.variables, MANY, 33,
                                      finished=finished, **ENDING))  # fmt: skip

    whole = [pair for group in run({}) for pair in group]
    by_index = dict(whole)
    assert [i for i, _ in whole] != sorted(by_index, key=lambda i: (-len(MANY[i]), i))
    for kept in range(len(MANY) + 1):
        finished = {i: len(completion.ids) for i, completion in whole[:kept]}
        rest = [pair for group in run(finished) for pair in group]
        assert [i for i, _ in rest] == [i for i, _ in whole[kept:]]
        for i, completion in rest:
            assert completion.reason == by_index[i].reason
            assert completion.ids.tobytes() == by_index[i].ids.tobytes()
            assert completion.logprobs.tobytes() == by_index[i].logprobs.tobytes()


def test_few_programs_whatever_the_lengths():
    """One to read prompts for each bucket and height of a group, one to decode; any seed."""
    prompts = [np.arange(1, n + 1) % 50 for n in range(1, 41)]
    programs: list[Any] = [generate.prefill, generate.decode]
    before = [program._cache_size() for program in programs]
    for seed in (1, 2):
        completions("gpt2_tiny", 5, prompts, seed=seed, sampling=Sampling(0.9))
    made = [p._cache_size() - was for p, was in zip(programs, before, strict=True)]
    assert made == [2, 1]  # prompts of up to 32 tokens, and of more


def test_buckets_and_groups():
    assert [generate.bucket(n, 1000) for n in (1, 32, 33, 64, 65, 600)] == [32, 32, 64, 64, 128,
                                                                            1000]  # fmt: skip
    assert generate.heights(32, 64, 1) == (1, 16) and generate.heights(32, 6, 1) == (1, 6)
    assert generate.heights(1024, 64, 1) == (1, 1) and generate.heights(256, 64, 8) == (8, 16)
    group = functools.partial(generate.next_group, rows=64, devices=1, largest=1000)
    assert group(100, 9) == (4, 4, 128) and group(100, 2) == (2, 4, 128)
    assert group(100, 1) == (1, 1, 128) and group(20, 7) == (1, 1, 32)
    assert generate.next_group(20, 3, 16, 8, 1000) == (3, 8, 32)


def test_the_last_place_of_the_context_can_be_reached():
    config = load("gpt2_tiny").config
    prompt = np.arange(10) % 9
    (found,) = completions("gpt2_tiny", config.context - 10, [prompt])
    ids_1T = np.concatenate([prompt, found.ids]).astype(np.int32)[None]
    logits = whole_logits(config, SCAN, load("gpt2_tiny").variables, ids_1T)
    np.testing.assert_array_equal(np.asarray(logits)[0, 9:-1].argmax(-1), found.ids)


@pytest.mark.parametrize(
    "prompt, options, wanted",
    [
        ([], {}, "prompt 2 has no tokens"),
        ([131], {}, "outside the model's vocabulary of 131"),
        ([-1], {}, "outside the model's vocabulary"),
        ([1] * 50, {}, "prompt 2 has 50 tokens; with 9 new ones they exceed"),
        ([1], {"sampling": Sampling(-1.0)}, "temperature"),
        ([1], {"sampling": Sampling(float("nan"))}, "temperature"),
        ([1], {"sampling": Sampling(float("inf"))}, "temperature"),
        ([1], {"sampling": Sampling(1.0, -1)}, "top_k"),
        ([1], {"sampling": Sampling(1.0, 0, 0.0)}, "top_p"),
        ([1], {"sampling": Sampling(1.0, 0, 1.1)}, "top_p"),
    ],
    ids=range(10),
)
def test_bad_input_is_named_before_any_work(prompt, options, wanted, monkeypatch):
    monkeypatch.setattr(generate, "unstack", None)
    with pytest.raises(InputError, match=wanted):
        completions("gpt2_tiny", 9, [np.array([1]), np.array(prompt, np.int32)], **options)


DEVICES = """
import sys
from pathlib import Path
import jax, numpy as np
from core import generate
from core.checkpoint import load_model
from core.config import Execution
from core.sampling import Sampling

loaded = load_model(sys.argv[1])
with np.load(Path(sys.argv[1]) / "generated.npz") as golden:
    prompts = [p[:n] for p, n in zip(golden["prompts"], golden["lengths"])] * 4
results = {}
how = (loaded.config, Execution(layers="scan"), loaded.variables, prompts)
for batch in generate.generate(*how, 12, Sampling(1.0, 30, 0.9), batch=4):
    for i, completion in batch:
        results[f"ids {i}"], results[f"logprobs {i}"] = completion.ids, completion.logprobs
np.savez(sys.argv[2], **results)
print(jax.device_count())
"""


def test_eight_devices_equal_one(tmp_path, close):
    found = []
    for devices in (1, 8):
        out = tmp_path / f"{devices}.npz"
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        process = subprocess.run(
            [sys.executable, "-c", DEVICES, str(GOLDEN / "gemma3_tiny"), str(out)],
            env={**os.environ, "XLA_FLAGS": flags}, cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stderr
        assert process.stdout.split()[-1] == str(devices)
        with np.load(out) as file:
            found.append(dict(file))
    one, eight = found
    assert one.keys() == eight.keys() and len(one) == 2 * 12
    for name in one:
        if "ids" in name:
            np.testing.assert_array_equal(one[name], eight[name])
    close(eight, one)
