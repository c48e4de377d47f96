"""Plans: what is read, that it is read once, and that every question meets its own context."""

import random

import numpy as np
import pytest

from evals.items import Prompt
from evals.packing import LENGTHS, Trie, best_fit, prefixes
from evals.plan import Plan

VOCABULARY = 50


def draw(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, VOCABULARY, n).astype(np.int32)


def alike(seed: int) -> list[Prompt]:
    """Many that repeat, begin and end like each other."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(80):
        ids = rng.integers(0, 3, rng.integers(2, 8)).astype(np.int32)
        made.append(Prompt(ids, int(rng.integers(1, len(ids)))))
    return made


def choices(rng: np.random.Generator, context: np.ndarray, n: int, most: int) -> list[Prompt]:
    tails = [draw(rng, int(rng.integers(1, most))) for _ in range(n)]
    return [Prompt(np.concatenate([context, tail]), len(context)) for tail in tails]


def exam(seed: int) -> list[Prompt]:
    """Subjects of some questions behind long examples, and some questions without any."""
    rng = np.random.default_rng(seed)
    made = []
    for examples in (draw(rng, 300), draw(rng, 210), draw(rng, 0)):
        for _ in range(50):
            question = np.concatenate([examples, draw(rng, int(rng.integers(5, 60)))])
            made += choices(rng, question, 4, int(rng.choice([2, 12])))
    return made


def long(seed: int) -> list[Prompt]:
    """Trees longer than a row, whole texts, and many endings of one text."""
    rng = np.random.default_rng(seed)
    texts = [Prompt(draw(rng, n), 1) for n in (2, 129, 400, 700)]
    return [*texts, *choices(rng, draw(rng, 90), 60, 40), *choices(rng, draw(rng, 600), 9, 100)]


KINDS = {"alike": alike, "exam": exam, "long": long}
EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
@pytest.mark.parametrize("devices,tokens", [(1, 1000), (3, 1)])
def test_every_question_is_asked_behind_its_own_context(kind, devices, tokens):
    """What a token sees, in depth-first order, is the text of its prompt up to it."""
    asked = KINDS[kind](0)
    plan = Plan(asked, tokens, devices, chunk=7)
    answered = []
    for k in range(len(plan)):
        batch = plan[k]
        shape, rows = batch.shape, batch.shape.rows // devices
        assert batch.ids_BT.shape == (shape.rows, shape.length) and shape.rows % devices == 0
        prefix = plan.prefixes[batch.prefix] if shape.prefix else np.zeros(0, np.int32)
        assert len(prefix) <= shape.prefix
        tokens_T = np.arange(shape.length)
        ends = [*batch.firsts[1:], len(batch.tokens)]
        for p, a, b in zip(batch.prompts, batch.firsts, ends, strict=True):
            answered.append(p)
            ids, start = asked[p].ids, asked[p].start
            np.testing.assert_array_equal(batch.tokens[a:b], ids[start:])
            entries, columns = batch.entries[a:b], batch.columns[a:b]
            chunk = entries // 7
            targets = batch.targets_nCK[chunk, entries % 7, columns]
            np.testing.assert_array_equal(targets, ids[start:])
            device = chunk // shape.chunks
            assert (chunk % shape.chunks < batch.live[device]).all()
            at = batch.at_nC[chunk, entries % 7] + device * rows * shape.length
            for t, place in enumerate(at.tolist(), start):
                row, i = divmod(place, shape.length)
                sees = (tokens_T <= i) & (i < batch.ends_BT[row])
                read = np.concatenate([prefix, batch.ids_BT[row, sees]])
                np.testing.assert_array_equal(read, ids[:t])
                where = batch.positions_BT[row, sees]
                np.testing.assert_array_equal(where, np.arange(len(prefix), t))
        assert sorted(plan.numbers(k)) == sorted(batch.prompts.tolist())
    assert sorted(answered) == list(range(len(asked)))


def test_padding_sees_something():
    """A softmax over nothing would be NaN."""
    batch = Plan(alike(0), 1000)[0]
    assert (batch.ends_BT > np.arange(batch.shape.length)[None]).all()


@EACH
def test_does_not_depend_on_the_order(kind):
    asked = KINDS[kind](1)
    shuffled = random.Random(0).sample(asked, len(asked))
    plans = [Plan(prompts, 1000) for prompts in (asked, shuffled)]
    assert plans[0].shapes == plans[1].shapes and len(plans[0]) == len(plans[1])
    for k in range(len(plans[0])):
        for one, other in zip(plans[0][k][:6], plans[1][k][:6], strict=True):
            np.testing.assert_array_equal(one, other)


def read(plan: Plan) -> int:
    """Tokens that rows and prefixes hold."""
    held = sum(
        int((plan.trie.lengths[row.sequences] - row.begins).sum())
        for _, _, rows in plan.batches
        for row in rows
    )
    return held + sum(map(len, plan.prefixes))


@pytest.mark.parametrize("kind,more", [("alike", 0), ("exam", 0.01), ("long", 0.15)])
def test_what_is_shared_is_read_once(kind, more):
    """Each node of the trie once; where rows part one tree, its trunk again."""
    asked = KINDS[kind](2)
    nodes = {tuple(p.ids[:n].tolist()) for p in asked for n in range(1, len(p.ids))}
    assert len(nodes) == Trie(asked).sums[-1]
    assert len(nodes) <= read(Plan(asked, 1000)) <= (1 + more) * len(nodes)


def test_letters_of_a_question_cost_one_position():
    question = np.array([5, 6, 7], np.int32)
    asked = [Prompt(np.append(question, letter).astype(np.int32), 3) for letter in (1, 2, 3, 4)]
    plan = Plan(asked, 1000)
    batch = plan[0]
    assert read(plan) == 3 and {*batch.entries} == {0} and sorted(batch.columns) == [0, 1, 2, 3]


def test_examples_that_questions_share_are_cut_off():
    asked = exam(3)
    plan = Plan(asked, 1000)
    assert sorted(map(len, plan.prefixes)) == [210, 300]
    assert {shape.prefix for shape in plan.shapes} == {0, 256, 512}
    # No row is long enough to hold the examples and more than a few questions.
    assert sum(s.rows * s.length for s, _, _ in plan.batches) < 1.4 * Trie(asked).sums[-1]


def test_a_prefix_ends_before_the_first_question_about_it():
    asked = exam(4)
    first = asked[0].ids
    asked.append(Prompt(first, 151))
    trie = Trie(asked)
    found = {depth for a, b, depth in prefixes(trie) if (trie.ids[a][:80] == first[:80]).all()}
    assert found == {150}


def test_few_shapes_for_many_prompts():
    rng = np.random.default_rng(5)
    asked = []
    for _ in range(600):
        asked += choices(rng, draw(rng, int(rng.integers(1, 300))), 4, 30)
    plan = Plan(asked, 4096)
    assert len(plan.shapes) <= 4
    held = sum(s.rows * s.length for s, _, _ in plan.batches)
    assert held < 1.25 * plan.trie.sums[-1]
    assert all(s.rows * s.length <= 4096 and s.length in LENGTHS for s in plan.shapes)


def test_a_row_may_be_longer_than_every_text():
    """Four long endings of a long text are one tree, though no model need read so many tokens."""
    rng = np.random.default_rng(6)
    context = draw(rng, 400)
    plan = Plan([Prompt(np.concatenate([context, draw(rng, 80)]), 400) for _ in range(4)], 1000)
    assert [shape.length for shape in plan.shapes] == [768] and read(plan) == 400 + 4 * 79


def test_batches_of_known_prompts_are_left_out():
    plan = Plan(exam(7), 1000)
    some = {p for k in (0, 2) for p in plan.numbers(k)}
    left = plan.without(some - {plan.numbers(2)[0]})
    kept = [k for k in range(len(plan)) if k != 0]
    assert [left.numbers(k) for k in range(len(left))] == [plan.numbers(k) for k in kept]
    assert not len(plan.without({p for k in range(len(plan)) for p in plan.numbers(k)}))


def test_no_prompts_make_no_batches():
    assert not len(Plan([], 1000)) and not Plan([], 1000).shapes


@pytest.mark.parametrize("seed", range(3))
def test_best_fit_fills_bins(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 60, 300).tolist()
    bins = best_fit(sizes, lambda size: 100)
    assert sorted(i for _, items in bins for i in items) == list(range(300))
    assert all(sum(sizes[i] for i in items) <= room == 100 for room, items in bins)
    assert len(bins) <= 1.03 * sum(sizes) / 100 + 1
