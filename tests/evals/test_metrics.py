"""Metrics of items, tasks and groups against values computed by hand."""

import math
import random
import statistics

import numpy as np
import pytest

from evals import metrics
from evals.tasks.task import Doc, ExactMatch, Filter, Group, Task

GSM8K = Task(
    "gsm8k",
    "generate",
    filters=(
        Filter("strict-match", r"#### (\-?[0-9\.\,]+)"),
        Filter("flexible-extract", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    ),
    exact_match=ExactMatch((",", r"\$", r"(?s).*#### ", r"\.$"), ignore_case=True),
    metrics=("exact_match",),
)


def choice_task(*names: str) -> Task:
    return Task("choices", "multiple_choice", metrics=names)


def choice_doc(*choices: str, gold: int = 0) -> Doc:
    return Doc(0, {}, ("prompt",), choices, gold)


def test_each_accuracy_has_its_own_length():
    # per character -1, -1.25; per byte -0.5, -1.25; per token -2, -0.625
    doc, scores = choice_doc("éé", "four"), [(-2.0, True), (-5.0, False)]
    task = choice_task("acc", "acc_norm", "acc_bytes", "acc_tok")
    found = metrics.doc_metrics(task, doc, scores, (1, 8))["none"]
    assert found.values == {"acc": 1, "acc_norm": 1, "acc_bytes": 1, "acc_tok": 0}
    assert found.margins == {"acc": 3, "acc_norm": 0.25, "acc_bytes": 0.75, "acc_tok": 1.375}
    assert found.answer_logprob == -2.0
    # bytes and characters differ where a choice is not ASCII
    wide = metrics.doc_metrics(task, choice_doc("éé", "abc"), [(-4, False), (-5, False)], (1, 1))
    assert wide["none"].values == {"acc": 1, "acc_norm": 0, "acc_bytes": 1, "acc_tok": 1}


@pytest.mark.parametrize("gold", [0, 1])
def test_the_first_of_equals_is_chosen(gold):
    scores = [(-1.0, False), (-1.0, False), (-3.0, False)]
    doc = choice_doc("a", "b", "c", gold=gold)
    found = metrics.doc_metrics(choice_task("acc"), doc, scores)
    assert found["none"].values == {"acc": float(gold == 0)}
    assert metrics.close_calls([found]) == {"acc": {"close": 1, "ties": 1}}


def test_several_prompts_need_no_choices():
    doc = Doc(0, {}, ("The cat", "The dog"), (), 1, " barks")
    found = metrics.doc_metrics(choice_task("acc"), doc, [(-2, False), (-1.9995, False)])
    assert found["none"].values == {"acc": 1.0}
    assert metrics.close_calls([found]) == {"acc": {"close": 1, "ties": 0}}


def test_a_continuation_is_right_if_greedy_and_windows_add_up():
    task = Task("lambada", "loglikelihood", metrics=("perplexity", "acc"))
    found = metrics.doc_metrics(task, Doc(0, {}, ("p",), target=" x"), [(-2.5, True)])["none"]
    assert found.values == {"perplexity": -2.5, "acc": 1.0} and found.answer_logprob == -2.5
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = Task("wikitext", "rolling", metrics=names)
    counted = " é b\n\nc "  # blanks at the ends make two empty words
    windows = [(-4.0, False), (-3.0, True)]
    found = metrics.doc_metrics(task, Doc(0, {}, (), target="other", counted=counted), windows)
    assert found["none"].values == {
        "word_perplexity": (-7.0, 5),
        "byte_perplexity": (-7.0, 9),
        "bits_per_byte": (-7.0, 9),
    }
    summary = metrics.aggregate(task, [found, found])
    assert summary["word_perplexity,none"] == pytest.approx(math.exp(7 / 5))
    assert summary["bits_per_byte,none"] == pytest.approx(7 / 9 / math.log(2))
    assert summary["byte_perplexity_stderr,none"] == "N/A"


@pytest.mark.parametrize(
    "text,strict,flexible,right",
    [
        ("2+2 = <<2+2=4>>4.\n#### 42", "42", "42", (1, 1)),
        ("#### 42.", "42.", "42.", (1, 1)),
        ("####42", "[invalid]", "42", (0, 1)),
        ("#### 7\n#### $42", "7", "$42", (0, 1)),
        ("#### 42\n#### 7", "42", "7", (1, 0)),
        ("It is 42 ...", "[invalid]", "...", (0, 0)),
        ("", "[invalid]", "[invalid]", (0, 0)),
    ],
)
def test_answers_are_read_out_of_texts(text, strict, flexible, right):
    doc = Doc(0, {}, ("q",), target="so it is 42\n#### 42")
    found = metrics.generated_metrics(GSM8K, doc, text)
    assert list(found) == metrics.filters(GSM8K) == ["strict-match", "flexible-extract"]
    assert tuple(one.extracted for one in found.values()) == (strict, flexible)
    assert tuple(one.values["exact_match"] for one in found.values()) == right


def test_what_an_exact_match_ignores():
    assert metrics.exact_match(ExactMatch(), "Yes", "yes") == 0
    assert metrics.exact_match(ExactMatch(ignore_case=True), "Yes", "yes") == 1
    # in this order: what the second pattern finds is there only after the first
    assert metrics.exact_match(ExactMatch((",", "^12")), "1,2 x", " x") == 1
    assert metrics.exact_match(ExactMatch(("^12", ",")), "1,2 x", " x") == 0
    plain = Task("copy", "generate", metrics=("exact_match",))
    found = metrics.generated_metrics(plain, Doc(0, {}, ("q",), target=" x"), " x")
    assert found["none"] == metrics.Measured({"exact_match": 1.0}, " x")


def test_task_results_have_the_keys_and_standard_errors_of_the_harness():
    items = [
        metrics.doc_metrics(choice_task("acc"), choice_doc("a", "b"), [(x, False), (-1, False)])
        for x in (0, 0, 0, -2)
    ]
    assert metrics.aggregate(choice_task("acc"), items) == {
        "acc,none": 0.75,
        "acc_stderr,none": pytest.approx(0.25, rel=1e-14),
    }
    assert metrics.aggregate(choice_task("acc"), items[:1])["acc_stderr,none"] == "N/A"
    doc = Doc(0, {}, ("q",), target="#### 1")
    texts = [metrics.generated_metrics(GSM8K, doc, text) for text in ("#### 1", "11 or 1")]
    summary = metrics.aggregate(GSM8K, texts)
    assert list(summary) == [
        "exact_match,strict-match", "exact_match_stderr,strict-match",
        "exact_match,flexible-extract", "exact_match_stderr,flexible-extract",
    ]  # fmt: skip
    assert list(summary.values()) == [0.5, 0.5, 1.0, 0.0]


def test_perplexity_and_its_bootstrap(monkeypatch):
    task = Task("lambada", "loglikelihood", metrics=("perplexity",))
    logprobs = [-random.Random(7).expovariate(0.5 + i) for i in range(13)]
    items = [metrics.doc_metrics(task, Doc(0, {}, ("p",)), [(x, False)]) for x in logprobs]
    means = []
    for chunk in range(2):
        rng = random.Random(chunk)
        means += [statistics.fmean(rng.choices(logprobs, k=13)) for _ in range(1000)]
    expected = statistics.stdev(math.exp(-mean) for mean in means)
    summary = metrics.aggregate(task, items, 2000)
    assert summary["perplexity,none"] == pytest.approx(math.exp(-sum(logprobs) / 13), rel=1e-14)
    assert summary["perplexity_stderr,none"] == pytest.approx(expected, rel=1e-12, abs=0)
    monkeypatch.setattr(metrics, "BLOCK", 40)  # blocks change nothing
    assert metrics.aggregate(task, items, 2000) == summary
    assert metrics.aggregate(task, items, 0)["perplexity_stderr,none"] == "N/A"
    assert metrics.aggregate(task, items[:1], 2000)["perplexity_stderr,none"] == "N/A"
    hopeless = metrics.doc_metrics(task, Doc(0, {}, ("p",)), [(-1e4, False)])
    assert metrics.aggregate(task, [hopeless])["perplexity,none"] == math.inf


def test_groups_weigh_tasks_by_size_and_pool_their_errors():
    members = {"all": ["some", "c"], "some": ["a", "b", "c"]}
    assert metrics.leaves("all", members) == ["a", "b", "c"]
    assert metrics.leaves("a", members) == ["a"]
    columns = {"a": [1, 0, 0, 1], "b": [1, 1, 0], "c": [0, 0, 0, 0, 1]}
    results = [
        {"sample_len": len(x), "acc,none": np.mean(x),
         "acc_stderr,none": statistics.stdev(x) / math.sqrt(len(x))}
        for x in columns.values()
    ]  # fmt: skip
    found = metrics.aggregate_group(Group("all", ("some", "c"), ("acc",), "All"), results)
    within = sum((len(x) - 1) * statistics.variance(x) for x in columns.values())
    assert found == {
        "alias": "All",
        "name": "all",
        "sample_len": 12,
        "acc,none": pytest.approx(5 / 12, rel=1e-14),
        "acc_stderr,none": pytest.approx(math.sqrt(within / 9 / 12), rel=1e-14),
        "sample_count": {"acc,none": 12},
    }
    one = {"sample_len": 1, "acc,none": 1.0, "acc_stderr,none": "N/A"}
    found = metrics.aggregate_group(Group("all", (), ("acc",)), [*results, one])
    assert found["acc_stderr,none"] == "N/A" and found["acc,none"] == pytest.approx(6 / 13)
    assert metrics.aggregate_group(Group("tag", ()), results) == {"alias": "tag", "name": "tag"}


def test_intervals_are_of_shares_only():
    result = {"sample_len": 20, "acc,none": 0.0, "acc_stderr,none": 0.0, "perplexity,none": 9.0}
    ((key, (low, high)),) = metrics.intervals(result).items()
    assert key == "acc,none" and low == 0 and 0.15 < high < 0.17
