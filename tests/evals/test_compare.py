"""Comparisons of two models' runs: pairing, tests, verdicts, and what is refused."""

import numpy as np
import pytest

from core.errors import InputError
from core.files import write_json, write_jsonl
from evals.compare import compare, table
from evals.scorer import ItemResult
from evals.statistics import mcnemar, paired_bootstrap


def line(item, **values):
    """A line of samples_<task>.jsonl; `filter`, `margins` and the like replace the defaults."""
    fields = {"filter": "none", "doc_hash": f"doc {item}", "prompt_hash": f"prompt {item}"}
    metrics = [name for name in values if name in ("acc", "acc_norm", "exact_match", "perplexity")]
    return {"doc_id": item, **fields, "metrics": metrics, **values}


@pytest.fixture
def run(tmp_path):
    """Write a run folder: run(name, results, task=lines, ...)."""

    def write(name, results=None, **tasks):
        for task, lines in tasks.items():
            write_jsonl(tmp_path / name / f"samples_{task}.jsonl", lines)
        if results is not None:
            write_json(tmp_path / name / "results.json", results)
        return tmp_path / name

    return write


def right(values, start=0):
    """Lines of items that are right (1) or wrong (0)."""
    return [line(start + i, acc=value) for i, value in enumerate(values)]


def rows(result):
    return {(row["task"], row["metric"]): row for row in result["rows"]}


def test_one_pair_of_runs(run):
    # A alone has 10 items right, B alone 2, and 4 are right in both
    a = [line(i, acc=float(i < 14), answer_logprob=-1.0 - i % 3) for i in range(16)]
    b = [line(i, acc=float(i >= 10), answer_logprob=-2.0 - i % 3) for i in range(16)]
    result = compare([run("a", x=a)], [run("b", x=list(reversed(b)))], resamples=2000)
    row = rows(result)["x", "acc"]
    assert (row["a"], row["b"], row["difference"]) == (14 / 16, 6 / 16, 0.5)
    assert row["mcnemar"] == [{"a_only": 10, "b_only": 2, "p": 0.03857421875}]
    assert row["test"] == "McNemar" and row["p"] == row["p_holm"] == 0.03857421875
    assert row["primary"] and row["verdict"] == "A higher"
    difference = [[x["acc"] - y["acc"] for x, y in zip(a, b, strict=True)]]
    interval = paired_bootstrap(np.array(difference), 2000)
    assert (row["difference"], row["low"], row["high"]) == interval
    nats = rows(result)["x", "answer_logprob"]
    assert (nats["difference"], nats["low"], nats["high"]) == (1, 1, 1)
    assert nats["test"] == "bootstrap" and nats["mcnemar"] is None
    assert not nats["primary"] and nats["verdict"] is nats["p_holm"] is None
    swapped = rows(compare([run("b")], [run("a")], resamples=2000))["x", "acc"]
    assert swapped["verdict"] == "B higher" and swapped["difference"] == -0.5


def test_several_seeds_are_paired_by_order_and_never_added_up(run):
    draws = np.random.default_rng(0).integers(0, 2, (2, 3, 40))
    a, b = ([run(f"{arm}{s}", x=right(draws[k, s])) for s in range(3)]
            for k, arm in enumerate("ab"))  # fmt: skip
    result = compare(a, b)
    row = rows(result)["x", "acc"]
    interval = paired_bootstrap(draws[0] - draws[1].astype(float))
    assert (row["difference"], row["low"], row["high"]) == interval
    assert row["seeds"] == 3 and row["test"] == "bootstrap"
    counts = [(int((x > y).sum()), int((y > x).sum())) for x, y in zip(*draws, strict=True)]
    assert [(test["a_only"], test["b_only"]) for test in row["mcnemar"]] == counts
    assert [test["p"] for test in row["mcnemar"]] == [mcnemar(*pair) for pair in counts]
    assert "3 seeds are few" in table(result)


def test_verdicts_are_corrected_over_tasks_and_over_groups(run):
    members = {"g": ["x", "y"], "all": ["g", "z"], "tag": ["x"]}
    results = {"groups": {"g": {}, "all": {}}, "group_subtasks": members}
    better, same = [1] * 12, [0] * 2 + [1] * 10
    a = run("a", results, x=right(better), y=right([1] * 6), z=right([0, 1]))
    b = run("b", results, x=right(same), y=right([0] * 6), z=right([0, 1]))
    result = compare([a], [b], resamples=200)
    found = {row["task"]: row for row in result["rows"]}
    assert [found[t]["p"] for t in "xyz"] == [0.5, 0.03125, 1]
    assert [found[t]["p_holm"] for t in "xyz"] == [1, 0.09375, 1]
    assert found["y"]["verdict"] == "no difference shown"
    # the pooled items: 8 of 18 and 8 of 20 are decided, all for A
    assert found["g"]["items"] == 18 and found["g"]["difference"] == pytest.approx(8 / 18)
    assert found["all"]["items"] == 20 and found["all"]["mcnemar"][0]["a_only"] == 8
    assert found["g"]["p_holm"] == found["all"]["p_holm"] == 2 * 2 / 2**8
    assert found["g"]["group"] and not found["x"]["group"] and "tag" not in found


def test_the_primary_metric_and_what_nearly_equal_choices_decide(run):
    def lines(*leads):
        return [
            line(i, acc=1.0, acc_norm=1.0, margins={"acc": 1.0, "acc_norm": lead})
            for i, lead in enumerate(leads)
        ]

    a, b = run("a", x=lines(0.0, 1, 2e-3, 1)), run("b", x=lines(1, 9e-4, 1, None))
    found = rows(compare([a], [b], resamples=10))
    assert found["x", "acc_norm"]["primary"] and not found["x", "acc"]["primary"]
    assert (found["x", "acc_norm"]["close"], found["x", "acc_norm"]["ties"]) == (2, 1)
    assert (found["x", "acc"]["close"], found["x", "acc"]["ties"]) == (0, 0)


def test_filters_are_metrics_of_their_own(run):
    def lines(strict, loose):
        named = {"strict": strict, "loose": loose}
        return [line(i, filter=name, exact_match=x[i]) for name, x in named.items() for i in (0, 1)]

    a, b = run("a", x=lines([1, 0], [1, 1])), run("b", x=lines([0, 0], [1, 1]))
    found = rows(compare([a], [b], resamples=10))
    assert [key for _, key in found] == ["exact_match,strict", "exact_match,loose"]
    assert found["x", "exact_match,strict"]["difference"] == 0.5
    assert found["x", "exact_match,strict"]["primary"]


def test_runs_over_items_files(tmp_path):
    for arm, first in (("a", -1.0), ("b", -3.0)):
        items = [
            ItemResult("p", 0, (first, -2.0), (2, 4), (1, 1)),
            ItemResult("q", 1, (-1.0, first), (1, 1), (1, 1)),
        ]
        write_jsonl(tmp_path / arm / "items.jsonl", [item.to_json() for item in items])
    found = rows(compare([tmp_path / "a"], [tmp_path / "b"], resamples=10))
    assert [key for _, key in found] == ["acc", "acc_norm", "answer_logprob"]
    assert found["items", "acc"]["difference"] == 0.5
    assert (found["items", "acc"]["close"], found["items", "acc"]["ties"]) == (1, 1)
    assert found["items", "acc_norm"]["ties"] == 2  # -1 / 2 is -2 / 4
    assert found["items", "answer_logprob"]["difference"] == 2.0


def test_the_table_tells_everything(run):
    a = run("a", x=right([1] * 8), left=right([1]), y=[line(0, acc=1, prompt_hash="other")])
    b = run("b", x=right([0] * 8), y=right([0]))
    lines = table(compare([a], [b], resamples=100)).splitlines()
    assert lines[:2] == [f"A: {a}", f"B: {b}"]
    head = next(text for text in lines if text.startswith("task"))
    row = next(text for text in lines if text.startswith("x"))
    assert row.split() == ["x", "acc", "8", "1.0000", "0.0000", "+1.0000", "[+1.0000,", "+1.0000]",
                           "8:0", "0.0078", "0.016", "0", "0", "A", "higher"]  # fmt: skip
    assert head.index("verdict") == row.index("A higher")
    assert "other prompts for the same items: y 1" in lines
    assert "not in all runs, left out: left" in lines


def shots(n):
    return {"n-shot": {"x": n}}


@pytest.mark.parametrize(
    "first,second,message",
    [
        (dict(x=right([1, 0])), dict(x=right([1])), "item 1 is in only one of .*a and .*b"),
        (dict(x=right([1])), dict(x=[line(0, acc=1) | {"doc_hash": "?"}]), "item 0 has other con"),
        (dict(x=right([1])), dict(y=right([1])), "no task in common"),
        (dict(x=right([1])), {}, "holds neither samples"),
        (dict(x=right([1]) * 2), dict(x=right([1])), "line 2: item 0 has acc twice"),
        (dict(x=[{"doc_id": 0}]), dict(x=right([1])), "samples_x.jsonl line 1 is not what"),
        (dict(x=[line(0, acc="1.0e")]), dict(x=right([1])), "samples_x.jsonl line 1"),
        (dict(results=shots(0), x=right([1])), dict(results=shots(5), x=right([1])),
         r"task x has other examples before each item in .*a \(0\) than in .*b \(5\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(run, first, second, message):
    with pytest.raises(InputError, match=message):
        compare([run("a", **first)], [run("b", **second)])


def test_arms_of_different_sizes_are_refused(run):
    a = run("a", x=right([1]))
    with pytest.raises(InputError, match="2 runs cannot be paired with 1"):
        compare([a, a], [a])
    with pytest.raises(InputError, match="0 runs"):
        compare([], [])
