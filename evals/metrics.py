"""What an item and a task score: the metrics, standard errors and keys of lm-eval-harness 0.4.13.

With l_i the log-probability of choice i, and the first of equals chosen:

    acc: argmax l_i = gold;   acc_norm, acc_bytes, acc_tok: l_i per character, UTF-8 byte, token
    perplexity = exp(-mean l);   word_perplexity = exp(-sum l / sum words);   bits_per_byte

The harness gives no more than that. Here every choice also has its margin, the lead of the best
over the second best in what is compared (below `CLOSE`, rounding may have decided; 0 is a tie), and
every share of right answers a 95 % interval.

Dims: R resamples of a block, I items.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.statistics import mean_stderr, wilson
from evals.tasks.task import Doc, ExactMatch, Filter, Group, Task

INVALID = "[invalid]"  # what a filter that matches nothing extracts
UNKNOWN = "N/A"
# Metrics that are 0 or 1 for an item.
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_tok", "exact_match")
# Lead of the best choice below which rounding may have decided.
CLOSE = 1e-3
# Numbers drawn at a time: 1 MB, which stays in the cache of one core.
BLOCK = 1 << 17


class Measured(NamedTuple):
    """An item's metrics by one filter.

    values: of an item, by metric; (nats, words or bytes) where the sums are divided. extracted:
    from a generated text. answer_logprob: of the right answer, nats; None of a generated one.
    margins: of the metrics that compare choices, in the unit compared; infinite for one choice.
    """

    values: dict[str, Any]
    extracted: str | None = None
    answer_logprob: float | None = None
    margins: Mapping[str, float] = {}


def filters(task: Task) -> list[str]:
    """Names of the ways in which an answer is read; "none" where it is taken as it is."""
    return [one.name for one in task.filters] or ["none"]


def doc_metrics(
    task: Task, doc: Doc, scores: Sequence[tuple[float, bool]], tokens: Sequence[int] = ()
) -> dict[str, Measured]:
    """Metrics of an item from its scores: of each choice, of the text, or of each of its windows.

    scores: log-probability in nats, and whether greedy decoding would write the same.
    tokens: of each choice, for acc_tok.
    """
    logprobs = [logprob for logprob, _ in scores]
    if task.kind == "multiple_choice":
        assert doc.gold is not None
        compared = {metric: _per_unit(metric, logprobs, doc, tokens) for metric in task.metrics}
        values = {metric: float(np.argmax(x) == doc.gold) for metric, x in compared.items()}
        margins = {metric: margin(x) for metric, x in compared.items()}
        return {"none": Measured(values, None, logprobs[doc.gold], margins)}
    total = sum(logprobs)
    units = {
        "acc": float(all(greedy for _, greedy in scores)),
        "perplexity": total,
        "word_perplexity": (total, len(re.split(r"\s+", doc.counted))),
        "byte_perplexity": (total, len(doc.counted.encode())),
        "bits_per_byte": (total, len(doc.counted.encode())),
    }
    return {"none": Measured({metric: units[metric] for metric in task.metrics}, None, total)}


def _per_unit(
    metric: str, logprobs: Sequence[float], doc: Doc, tokens: Sequence[int]
) -> np.ndarray:
    """What a metric compares, by choice."""
    if metric == "acc":
        return np.array(logprobs)
    lengths = {
        "acc_norm": [len(choice) for choice in doc.choices],
        "acc_bytes": [len(choice.encode()) for choice in doc.choices],
        "acc_tok": tokens,
    }
    return np.divide(logprobs, np.array(lengths[metric], np.float64))


def margin(values: Sequence[float] | np.ndarray) -> float:
    """How far the greatest value leads the next; infinite for a single one."""
    best = np.sort(values)[-2:]
    return float(best[1] - best[0]) if len(best) == 2 else math.inf


def generated_metrics(task: Task, doc: Doc, text: str) -> dict[str, Measured]:
    """Metrics of a generated answer by filter: is what is read out of it the right answer?"""
    found = {one.name: extract(one, text) for one in task.filters} or {"none": text}
    return {
        name: Measured({"exact_match": exact_match(task.exact_match, answer, doc.target)}, answer)
        for name, answer in found.items()
    }


def extract(one: Filter, text: str) -> str:
    """The selected match of a filter, without blanks around it; `INVALID` if there is none."""
    matches = re.findall(one.regex, text)
    if not matches:
        return INVALID
    match = matches[one.select]
    if isinstance(match, tuple):
        match = next(filter(None, match), INVALID)
    return match.strip()


def exact_match(rule: ExactMatch, answer: str, gold: str) -> float:
    """1 if both are the same but for what the rule ignores, else 0."""
    for regex in rule.ignore:
        answer, gold = re.sub(regex, "", answer), re.sub(regex, "", gold)
    return float(answer.lower() == gold.lower() if rule.ignore_case else answer == gold)


def aggregate(
    task: Task, items: Sequence[Mapping[str, Measured]], bootstrap: int = 100_000
) -> dict[str, Any]:
    """The harness's numbers for a task: "acc,none", "acc_stderr,none", ...; "N/A": not known.

    bootstrap: resamples of a perplexity's standard error; 0: it is not known.
    """
    summary: dict[str, Any] = {}
    for name in filters(task):
        for metric in items[0][name].values:
            column = [item[name].values[metric] for item in items]
            mean, stderr = _aggregate(metric, column, bootstrap)
            summary |= {f"{metric},{name}": mean, f"{metric}_stderr,{name}": stderr}
    return summary


def _aggregate(metric: str, column: list[Any], bootstrap: int) -> tuple[float, float | str]:
    if metric in SHARES:
        mean, stderr = mean_stderr(np.array(column))
        return mean, stderr if len(column) > 1 else UNKNOWN
    if metric == "perplexity":
        known = bootstrap and len(column) > 1
        stderr = perplexity_stderr(column, bootstrap) if known else UNKNOWN
        return _exp(-sum(column) / len(column)), stderr
    logprobs, units = zip(*column, strict=True)
    nats = -sum(logprobs) / sum(units)
    return nats / math.log(2) if metric == "bits_per_byte" else _exp(nats), UNKNOWN


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 709 else math.inf


def perplexity_stderr(logprobs: Sequence[float], resamples: int) -> float:
    """Standard deviation of exp(-mean) over resamples of the items, as the harness draws them.

    A thousand resamples in a row come from `random.Random(i)`, for i = 0, 1, ...; numpy's generator
    gives the same numbers when seeded with a list.
    """
    x_I = np.array(logprobs)
    chunk, rows = min(1000, resamples), max(1, BLOCK // x_I.size)
    means = []
    for i in range(resamples // chunk):
        rng = np.random.RandomState([i])
        for start in range(0, chunk, rows):
            place_RI = rng.random_sample((min(rows, chunk - start), x_I.size))
            place_RI *= x_I.size
            means.append(x_I[place_RI.astype(np.intp)].mean(1))
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.exp(-np.concatenate(means)).std(ddof=1))


def leaves(name: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group, through groups of groups, each once; a task's own name.

    members: of every group by name, as "group_subtasks" of results.json.
    """
    if name not in members:
        return [name]
    return list(dict.fromkeys(leaf for child in members[name] for leaf in leaves(child, members)))


def aggregate_group(group: Group, of_leaves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A group's means over all items of its tasks, as the harness gives them.

    of_leaves: the results of all tasks below it (see `leaves`), with "sample_len". With n items and
    standard error s of a task, the group's is sqrt(sum (n-1) n s^2 / (sum n - tasks) / sum n), and
    not known where a task's is not.
    """
    summary: dict[str, Any] = {"alias": group.alias or group.name, "name": group.name}
    if not group.metrics:
        return summary
    summary["sample_len"] = sum(leaf["sample_len"] for leaf in of_leaves)
    counts: dict[str, int] = {}
    for key in dict.fromkeys(key for leaf in of_leaves for key in leaf):
        metric, _, name = key.partition(",")
        if metric not in group.metrics:
            continue
        measured = [leaf for leaf in of_leaves if key in leaf]
        sizes = [leaf["sample_len"] for leaf in measured]
        total = counts[key] = sum(sizes)
        stderrs = [leaf[f"{metric}_stderr,{name}"] for leaf in measured]
        summary[key] = sum(leaf[key] * n for leaf, n in zip(measured, sizes, strict=True)) / total
        summary[f"{metric}_stderr,{name}"] = UNKNOWN
        if UNKNOWN not in stderrs:
            spread = sum((n - 1) * s**2 * n for s, n in zip(stderrs, sizes, strict=True))
            variance = spread / (total - len(sizes)) / total
            summary[f"{metric}_stderr,{name}"] = math.sqrt(variance)
    return summary | {"sample_count": counts}


def aggregate_groups(
    groups: Sequence[Group], of_tasks: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Results of the groups that have metrics, from those of their tasks; see `aggregate_group`."""
    members = {group.name: group.members for group in groups}
    return {
        group.name: aggregate_group(group, [of_tasks[leaf] for leaf in leaves(group.name, members)])
        for group in groups
        if group.metrics
    }


def intervals(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """95 % intervals (Wilson) of a task's or a group's shares of right answers, by key."""
    keys = [key for key in result if key.partition(",")[0] in SHARES]
    return {key: list(wilson(result[key], result["sample_len"])) for key in keys}


def close_calls(items: Sequence[Mapping[str, Measured]]) -> dict[str, dict[str, int]]:
    """How many items each metric decides by less than `CLOSE`, and how many of them are ties."""
    found = {}
    for metric in items[0]["none"].margins if "none" in items[0] else ():
        margins = [item["none"].margins[metric] for item in items]
        found[metric] = {"close": sum(x < CLOSE for x in margins), "ties": margins.count(0.0)}
    return found
