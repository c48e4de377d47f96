"""The scorer against the definition: the full log-softmax of one sequence at a time."""

import dataclasses
import functools
import json
import math
import random

import jax
import numpy as np
import pytest

import tokenizers
from core import families, model, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from evals.items import Item, Prompt
from evals.scorer import Inputs, ItemResult, run_eval, score_items, summarise

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


def prompts(seed: int, n: int) -> list[Prompt]:
    """Many that repeat, begin and end like each other."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        ids = np.array([draw.randrange(3) for _ in range(draw.randint(2, 7))], np.int32)
        made.append(Prompt(ids, draw.randint(1, len(ids) - 1)))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_every_prediction_is_asked_where_its_prefix_is_read(seed):
    asked = prompts(seed, 60)
    inputs = Inputs(asked, batch_tokens=16)
    for prompt, (row, places) in zip(asked, inputs.places, strict=True):
        predictions = list(inputs.asked[row])
        found = [predictions[place] for place in places]
        assert [token for _, token in found] == prompt.ids[prompt.start :].tolist()
        for t, (position, _) in enumerate(found, prompt.start):
            assert inputs.ids[row][: position + 1].tolist() == prompt.ids[:t].tolist()
    read = [tuple(ids) for ids in inputs.ids]
    assert not any(a != b and b[: len(a)] == a for a in read for b in read)
    assert len(set(read)) == len(read)


def test_batches_hold_every_input_once_with_its_questions():
    inputs = Inputs(prompts(7, 60), batch_tokens=16)
    seen = []
    for k in range(len(inputs)):
        batch = inputs[k]
        for b, row in enumerate(batch.rows_B):
            asked = list(zip(batch.at_BK[b], batch.targets_BK[b], strict=True))
            real = [pair for pair in asked if pair[1] != -100]
            assert real == ([] if row < 0 else list(inputs.asked[row]))
            if row >= 0:
                seen.append(row)
                assert (batch.ids_BT[b, : inputs.lengths[row]] == inputs.ids[row]).all()
    assert sorted(seen) == list(range(len(inputs.ids)))


def test_letters_of_a_question_cost_one_row():
    asked = [Prompt(np.array([5, 6, 7, letter], np.int32), 3) for letter in (1, 2, 3, 4)]
    inputs = Inputs(asked, batch_tokens=64)
    assert [ids.tolist() for ids in inputs.ids] == [[5, 6, 7]]


def test_one_shape_and_so_one_compilation_a_length():
    inputs = Inputs(prompts(9, 200), batch_tokens=16)
    shapes = {(inputs[k].ids_BT.shape, inputs[k].at_BK.shape) for k in range(len(inputs))}
    assert len(shapes) == len({shape[1] for shape, _ in shapes})


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
