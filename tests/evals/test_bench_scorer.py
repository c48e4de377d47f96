"""The shape of what the benchmark of the scorer returns, and that its plain route is right."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from core import families, model, schema
from core.config import Execution
from evals import bench_scorer
from evals.bench_scorer import CASES, Case, Plain, bench, requests, table

SMALL = dataclasses.replace(
    bench_scorer.BODY, vocab_size=60, width=16, layers=2, heads=2, mlp_width=32, head_dim=8,
    window=20, sliding=(True, False), init_std=0.5,
)  # fmt: skip
EXECUTION = Execution()


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_scorer, "BODY", SMALL)


def test_result_has_every_number(small):
    case = Case(60, 4)
    result = bench([case], 512, 2, EXECUTION)
    (found,) = result["cases"]
    assert found["requests"] == len(requests(case)) == 4 + 4 + 2 + 4
    assert set(found["seconds"]) == {"ours", "ours_cpu", "plain", "plain_cpu"}
    for name in ("ours", "plain"):
        assert found["requests_per_second"][name] == pytest.approx(14 / found["seconds"][name])
        assert found["compilations"][name] >= 1 and found["temp_bytes"][name] > 0
        assert 0 < found["compile_seconds"][name]
    assert found["ratio"] == pytest.approx(found["seconds"]["plain"] / found["seconds"]["ours"])
    assert found["tokens"]["ours"] < found["tokens"]["plain"]
    # A greedy flag that is never true would agree with anything.
    assert 0 < found["greedy"] < 14
    assert found["largest_difference"] < 1e-4 and found["greedy_mismatches"] == 0
    shown = table(result)
    assert case.name in shown and "DISAGREE" not in shown
    found["greedy_mismatches"] = 1
    assert "DISAGREE" in table(result)


def test_the_plain_route_equals_brute_force(small, close):
    params = schema.init(families.rows(SMALL), SMALL.layers, seed=0)
    asked = requests(Case(60, 5))
    route = Plain(SMALL, EXECUTION, {"params": params})
    plan = route.plan(asked)
    assert len(route.compile(plan)) == len({arrays[0].shape for _, arrays in plan})
    longest = max(len(prompt.ids) for prompt in asked) - 1
    full = jax.jit(lambda ids_BT: model.logits(SMALL, EXECUTION, {"params": params}, ids_BT))
    scores, expected = route.run(plan), []
    for prompt, score in zip(asked, scores, strict=True):
        ids_BT = np.zeros((1, longest), np.int32)
        ids_BT[0, : len(prompt.ids) - 1] = prompt.ids[:-1]
        z_TV = np.asarray(full(ids_BT)[0], np.float64)[prompt.start - 1 : len(prompt.ids) - 1]
        logp_TV = z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))
        wanted = prompt.ids[prompt.start :]
        expected.append(logp_TV[range(len(wanted)), wanted].sum())
        assert score.greedy == (logp_TV.argmax(-1) == wanted).all()
    close(np.array([score.logprob for score in scores]), np.array(expected))


@pytest.mark.parametrize("case", CASES)
def test_requests_are_like_those_of_benchmarks(case):
    made = requests(case)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(made, requests(case), strict=True))
    assert all(0 < p.start < len(p.ids) <= bench_scorer.BODY.context for p in made)
    assert all(p.ids.min() >= 0 and p.ids.max() < case.vocab for p in made)
    contexts = [key for key, _ in itertools.groupby(made, lambda p: p.ids[: p.start].tobytes())]
    assert len(contexts) == case.documents
    beginnings = {p.ids[:9].tobytes() for p in made}
    assert len(beginnings) == case.documents // (case.shared or 1)
