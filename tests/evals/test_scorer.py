"""The scorer against the definition: the full log-softmax of one sequence at a time."""

import dataclasses
import functools
import json
import math
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
import pytest

import tokenizers
from core import families, loss, model, schema, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from evals import packing, scorer
from evals.items import Item, Prompt
from evals.programs import target_logprobs
from evals.scorer import (
    ItemResult,
    Programs,
    compile_plan,
    make_plan,
    run_eval,
    run_plan,
    score_items,
    score_prompts,
    summarise,
)
from evals.store import Store

TOKENIZER = tokenizers.load("bytes")
CONFIG = ModelConfig(
    family="gpt2", vocab_size=258, context=48, width=32, layers=2, heads=2, mlp_width=64,
    head_dim=16, init_std=0.3,
)  # fmt: skip
EXECUTION = Execution()
ITEMS = [
    Item("letters", "Which?\nAnswer:", (" A", " B", " C", " D"), 2, {}),
    Item("prefixes", "The sea is", (" blue", " bluer", " b", " blue and wide"), 0, {}),
    Item("twins", "The sky is", (" grey", " grey", " red"), 1, {}),
    Item("blanks", "The sun is \n", ("up", "über"), 1, {}),
    Item("empty", "", ("Yes", "No"), 0, {}),
    Item("beyond the context", "long " * 20, ("ago", "since"), 0, {}),
    Item("just fits", "x", ("y" * 48, "z"), 0, {}),
    Item("single", "One", (" only",), 0, {}),
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    params = schema.init(families.rows(CONFIG), CONFIG.layers, seed=1)
    return Loaded(CONFIG, params, None, "fingerprint")


full_logits = jax.jit(functools.partial(model.logits, CONFIG, EXECUTION))


def brute_force(loaded: Loaded, item: Item) -> list[float]:
    words = item.context.rstrip()
    context = list(words.encode()) or [TOKENIZER.bos]
    logprobs = []
    for choice in item.choices:
        continuation = list((item.context[len(words) :] + choice).encode())
        ids = np.array((context + continuation)[-(CONFIG.context + 1) :], np.int32)
        read = np.full((1, CONFIG.context), 7, np.int32)
        read[0, : len(ids) - 1] = ids[:-1]
        logits_TV = np.asarray(full_logits({"params": loaded.params}, read)[0], np.float64)
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        n = len(continuation)
        logprobs.append(float(logp_TV[np.arange(len(ids) - 1), ids[1:]][-n:].sum()))
    return logprobs


def flat(results: list[ItemResult]) -> np.ndarray:
    return np.concatenate([result.logprobs for result in results])


def test_equals_brute_force(loaded):
    results = score_items(loaded, TOKENIZER, ITEMS, EXECUTION, 512)
    assert [result.id for result in results] == [item.id for item in ITEMS]
    for item, result in zip(ITEMS, results, strict=True):
        np.testing.assert_allclose(result.logprobs, brute_force(loaded, item), rtol=1e-5)
        assert result.answer_logprob == result.logprobs[item.label]
    by_id = {result.id: result for result in results}
    assert by_id["blanks"].tokens == (4, 7) and by_id["blanks"].lengths == (2, 4)
    assert by_id["just fits"].tokens == (48, 1) and by_id["just fits"].truncated == 0
    assert by_id["beyond the context"].truncated == 2


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_does_not_depend_on_the_batch_size(loaded, batch_tokens):
    some = flat(score_items(loaded, TOKENIZER, ITEMS, EXECUTION, 512))
    other = flat(score_items(loaded, TOKENIZER, ITEMS, EXECUTION, batch_tokens))
    np.testing.assert_allclose(other, some, rtol=1e-5)


def test_does_not_depend_on_the_loss_chunk(loaded):
    some = flat(score_items(loaded, TOKENIZER, ITEMS, EXECUTION, 512))
    other = flat(score_items(loaded, TOKENIZER, ITEMS, Execution(loss_chunk=3), 512))
    np.testing.assert_allclose(other, some, rtol=1e-5)


def test_does_not_depend_on_the_order_of_items(loaded):
    results = score_items(loaded, TOKENIZER, ITEMS, EXECUTION, 100)
    shuffled = random.Random(0).sample(ITEMS, len(ITEMS))
    again = score_items(loaded, TOKENIZER, shuffled, EXECUTION, 100)
    assert sorted(again) == sorted(results)


FAMILIES = {
    "gpt2": CONFIG,
    "gpt_neox": dataclasses.replace(CONFIG, family="gpt_neox", tied=False, rotary_dim=8),
    "gemma3": dataclasses.replace(
        CONFIG, family="gemma3", kv_heads=1, window=9, sliding=(True, False)
    ),
}


@pytest.fixture(autouse=True)
def short_rows(monkeypatch):
    """A prefix pays for few questions."""
    monkeypatch.setattr(packing, "USUAL", 128)


@functools.cache
def model_of(family: str) -> Loaded:
    config = dataclasses.replace(FAMILIES[family], context=96)
    params = schema.init(families.rows(config), config.layers, seed=2)
    return Loaded(config, params, None, family)


@functools.cache
def exam() -> list[Prompt]:
    """Questions behind examples that are worth a prefix, others without, and a whole text."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> np.ndarray:
        return rng.integers(0, 258, n).astype(np.int32)

    def behind(context: np.ndarray, tails: Iterable[np.ndarray]) -> list[Prompt]:
        return [Prompt(np.concatenate([context, tail]), len(context)) for tail in tails]

    # Of all words one is the likeliest.
    made = [Prompt(draw(96), 1), *behind(draw(30), np.arange(258, dtype=np.int32)[:, None])]
    for examples, questions in ((draw(70), 24), (draw(0), 8)):
        for number in range(questions):
            context = np.concatenate([examples, draw(int(rng.integers(3, 17)))])
            made += behind(context, map(draw, (1, 1, 1, 1) if number % 2 else (9, 1, 4, 4)))
    return made


@functools.cache
def definition(family: str) -> list[tuple[float, bool]]:
    loaded = model_of(family)
    full = jax.jit(functools.partial(model.logits, loaded.config, EXECUTION))

    @functools.cache
    def logits(read: bytes) -> np.ndarray:
        ids = np.frombuffer(read, np.int32)
        read_1T = np.pad(ids, (0, 96 - len(ids)))[None]
        z_TV = np.asarray(full({"params": loaded.params}, read_1T)[0], np.float64)
        return z_TV[: len(ids)]

    found = []
    for ids, start, _ in exam():
        z_TV, after = logits(ids[:-1].tobytes())[start - 1 :], ids[start:]
        logp_TV = z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))
        greedy = bool((z_TV.argmax(-1) == after).all())
        found.append((float(logp_TV[np.arange(len(after)), after].sum()), greedy))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_definition(family, relative):
    """Branches, examples read once as a prefix, windows across both joints, every word asked."""
    loaded, expected = model_of(family), definition(family)
    scores = score_prompts(loaded, exam(), EXECUTION, 512, "test")
    error = relative([s.logprob for s in scores], [logprob for logprob, _ in expected])
    assert error <= 1e-5
    assert [s.greedy for s in scores] == [greedy for _, greedy in expected]
    assert sum(s.greedy for s in scores) >= 1
    plan = make_plan(exam(), loaded.config, EXECUTION, 512, sharding.make_mesh())
    assert {shape.prefix for shape in plan.shapes} == {0, 128}


def test_bfloat16_is_close(relative):
    scores = score_prompts(model_of("gemma3"), exam()[:259], Execution("bfloat16"), 512, "test")
    expected = [logprob for logprob, _ in definition("gemma3")[:259]]
    assert relative([s.logprob for s in scores], expected) <= 2e-2


@pytest.mark.parametrize("vocabulary", [5, 8, 19])
def test_blocks_of_the_vocabulary(vocabulary, monkeypatch, close, x64):
    """Log-probabilities and the lowest of the likeliest ids, wherever equals and targets lie."""
    monkeypatch.setattr(loss, "BLOCK", 8)
    rng = np.random.default_rng(0)
    w_VD, h_CD = (rng.integers(-2, 3, (n, 4)).astype(float) for n in (vocabulary, 20))
    w_VD[-1] = w_VD[1]
    targets_CK = rng.integers(0, vocabulary, (20, 4)).astype(np.int32)
    found_CK, best_C = jax.jit(target_logprobs)(h_CD, w_VD, targets_CK)
    z_CV = h_CD @ w_VD.T
    logp_CV = z_CV - np.log(np.exp(z_CV).sum(-1, keepdims=True))
    close(found_CK, np.take_along_axis(logp_CV, targets_CK, 1), "float64")
    assert ((z_CV == z_CV.max(-1, keepdims=True)).sum(-1) > 1).any()
    assert best_C.tolist() == z_CV.argmax(-1).tolist()


def test_a_plan_runs_again_with_other_weights():
    """Nothing is compiled but what `compile_plan` compiled, in whatever thread."""
    loaded, mesh = model_of("gpt2"), sharding.make_mesh()
    plan = make_plan(exam(), loaded.config, EXECUTION, 512, mesh)
    programs = Programs(loaded.config, EXECUTION, jax.device_put(loaded.variables), mesh)
    thread = threading.Thread(target=compile_plan, args=(plan, programs))
    thread.start()
    first = run_plan(plan, programs, jax.device_put(loaded.variables))
    thread.join()
    assert programs.compilations == len(plan.shapes) + 1
    assert first == score_prompts(loaded, exam(), EXECUTION, 512, "test")
    other = jax.tree.map(lambda x: x * np.float32(0.9), loaded.variables)
    assert run_plan(plan, programs, jax.device_put(other)) != first
    assert run_plan(plan, programs, jax.device_put(loaded.variables)) == first
    assert programs.compilations == len(plan.shapes) + 1


def test_a_store_answers_what_it_knows(tmp_path, monkeypatch):
    """Killed after some batches and started again: the same bits, and only the rest is run."""
    loaded, asked = model_of("gpt2"), exam()
    path = tmp_path / "answers.jsonl"
    half = score_prompts(loaded, asked[:20], EXECUTION, 128, "test", Store(path, {}))
    size = Store(path, {}).size
    whole = score_prompts(loaded, asked, EXECUTION, 128, "test", Store(path, {}))
    assert whole[:20] == half
    added = path.read_bytes()[size:].splitlines(keepends=True)
    path.write_bytes(path.read_bytes()[:size] + b"".join(added[:-6]))
    ran = []
    original = scorer.run_batches

    def counted(plan, programs, variables, known):
        for scored in original(plan, programs, variables, known):
            ran.append(len(scored))
            yield scored

    monkeypatch.setattr(scorer, "run_batches", counted)
    store = Store(path, {}, size)
    left = len(asked) - 20 - len(store.since)
    assert score_prompts(loaded, asked, EXECUTION, 128, "test", store) == whole
    assert left <= sum(ran) < len(asked) - 20
    ran.clear()
    assert score_prompts(loaded, asked, EXECUTION, 128, "test", Store(path, {})) == whole
    assert not ran


def test_nothing_asked_is_nothing():
    assert score_prompts(model_of("gpt2"), [], EXECUTION, 512, "test") == []


def result(label: int, logprobs, lengths, name: str = "x") -> ItemResult:
    return ItemResult(name, label, tuple(logprobs), tuple(lengths), (1,) * len(lengths))


def test_acc_takes_the_sum_and_acc_norm_divides_by_characters():
    item = result(1, [-4.0, -6.0], [4, 12])
    assert (item.pred, item.acc) == (0, 0.0)
    assert (item.pred_norm, item.acc_norm) == (1, 1.0)


def test_the_first_of_equals_wins():
    item = result(1, [-3.0, -2.0, -2.0], [3, 2, 2])
    assert (item.pred, item.pred_norm, item.close) == (1, 0, True)


def test_summary_by_hand():
    results = [
        result(0, [-1.0, -2.0], [1, 1]),
        result(0, [-2.0, -1.0], [1, 1]),
        result(1, [-4.0, -6.0], [4, 12]),
        result(1, [-3.0, -2.0], [1, 1]),
    ]
    summary = summarise(results)
    assert summary["items"] == 4
    assert summary["acc"] == 0.5 and summary["acc_norm"] == 0.75
    assert summary["acc_stderr"] == pytest.approx(math.sqrt((4 * 0.25) / 3 / 4))
    assert summary["acc_norm_stderr"] == pytest.approx(math.sqrt((3 * 0.0625 + 0.5625) / 3 / 4))
    assert summary["answer_logprob"] == -2.75
    deviations = [1.75, 0.75, -3.25, 0.75]
    variance = sum(d * d for d in deviations) / 3
    assert summary["answer_logprob_stderr"] == pytest.approx(math.sqrt(variance / 4))
    assert summary["close_items"] == summary["truncated_items"] == summary["alone_choices"] == 0


def test_a_single_choice_has_no_accuracy():
    summary = summarise([result(0, [-1.0], [1]), result(0, [-1.0, -2.0], [1, 1])])
    assert summary["acc"] is None and summary["acc_norm_stderr"] is None
    assert summary["answer_logprob"] == -1.0


def test_written_files(loaded, tmp_path):
    summary = run_eval(loaded, TOKENIZER, ITEMS[:4], tmp_path, EXECUTION, 512)
    assert json.loads((tmp_path / "results.json").read_text()) == summary
    assert summary["model"] == "fingerprint" and summary["tokenizer"] == TOKENIZER.fingerprint
    lines = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    results = score_items(loaded, TOKENIZER, ITEMS[:4], EXECUTION, 512)
    assert [line["id"] for line in lines] == [item.id for item in ITEMS[:4]]
    for line, expected in zip(lines, results, strict=True):
        assert line == json.loads(json.dumps(expected.to_json()))
        assert line["answer_logprob"] == line["logprobs"][line["label"]]
        assert line["acc"] == float(line["pred"] == line["label"])
        assert line["acc_norm"] == float(line["pred_norm"] == line["label"])


def test_an_answer_longer_than_the_context_is_named(loaded):
    items = [*ITEMS, Item("too long", "x", ("y" * 49,), 0, {})]
    with pytest.raises(InputError, match="'too long'.*49 tokens.*at most 48"):
        score_items(loaded, TOKENIZER, items, EXECUTION, 512)


def test_ids_outside_the_vocabulary_are_named(loaded):
    small = loaded._replace(config=dataclasses.replace(CONFIG, vocab_size=100))
    with pytest.raises(InputError, match="'letters'.*vocabulary of 100"):
        score_items(small, TOKENIZER, ITEMS, EXECUTION, 512)


def test_a_broken_model_is_refused(loaded):
    broken = loaded._replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), loaded.params))
    with pytest.raises(InputError, match="not finite"):
        score_items(broken, TOKENIZER, ITEMS, EXECUTION, 512)


# Scores of the prompts of a file, on all devices and with the weights split over two of them.
ON_DEVICES = """
import sys
import jax, numpy as np
from core import families, schema, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.files import read_json
from evals import packing
from evals.items import Prompt
from evals.scorer import Programs, make_plan, run_plan, score_prompts

packing.USUAL = 128
config = ModelConfig.from_json(read_json(sys.argv[1]), "config")
prompts = [Prompt(np.array(ids, np.int32), start) for ids, start in read_json(sys.argv[2])]
rows, execution = families.rows(config), Execution()
params = schema.init(rows, config.layers, seed=2)
scores = [score_prompts(Loaded(config, params, None, ""), prompts, execution, 512, "")]
mesh = sharding.make_mesh(4, 2)
variables = {"params": jax.device_put(params, sharding.parameter_shardings(rows, 2, mesh))}
plan = make_plan(prompts, config, execution, 512, mesh)
scores.append(run_plan(plan, Programs(config, execution, variables, mesh), variables))
assert {shape.prefix for shape in plan.shapes} == {0, 128} and jax.device_count() == 8
np.save(sys.argv[3], np.array(scores))
"""


def test_eight_devices_equal_one(tmp_path, relative):
    config = model_of("gpt2").config
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    asked = [(ids.tolist(), start) for ids, start, _ in exam()]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    files = [tmp_path / name for name in ("config.json", "prompts.json", "scores.npy")]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", ON_DEVICES, *files], env={**os.environ, "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[2], check=True,
    )  # fmt: skip
    one = np.array(score_prompts(model_of("gpt2"), exam(), EXECUTION, 512, "test"))
    for many in np.load(files[2]):
        assert relative(many[:, 0], one[:, 0]) <= 1e-5
        np.testing.assert_array_equal(many[:, 1], one[:, 1])
