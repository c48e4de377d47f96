"""Is model A better than model B? Their runs over the same items, compared item by item.

    difference[s, i] = A - B of a metric,    s: pairs of runs (seeds of training), i: items

The interval resamples items and seeds (`evals.statistics`). One pair of runs tests a metric that is
0 or 1 exactly (McNemar); any other question takes the p-value of the same resamples, since items of
several seeds are not independent pairs. McNemar is then told for each pair, and never added up.

A task's verdict is on its primary metric, after Holm's correction over all tasks; groups are a
family of their own. The other metrics are told without a verdict.

Dims: S pairs of runs, I items.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import read_json, read_jsonl
from core.progress import Progress
from evals.metrics import CLOSE, SHARES, leaves, margin
from evals.statistics import holm, mcnemar, paired_test

LEVEL = 0.05
LOGPROB = "answer_logprob"  # nats of the right answer
ITEMS = "items"  # the task of an `eval run --items` folder


class Sheet(NamedTuple):
    """A task of one run, by item: contents, prompts, and by metric the values and margins."""

    contents: dict[Any, Any]
    prompts: dict[Any, Any]
    values: dict[str, dict[Any, float]]
    margins: dict[str, dict[Any, float]]


class Run(NamedTuple):
    folder: Path
    results: dict[str, Any]
    sheets: dict[str, Sheet]


class Columns(NamedTuple):
    """A metric of both arms; close and tied: in either arm, in any of its runs."""

    a_SI: np.ndarray
    b_SI: np.ndarray
    close_I: np.ndarray
    tied_I: np.ndarray


class Pair(NamedTuple):
    """A task of both arms over the same items; reworded: items whose prompts differ."""

    metrics: dict[str, Columns]
    reworded: int


def compare(
    a: Sequence[Path], b: Sequence[Path], resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """Compare the runs in folders `a` with those in `b`; several are seeds, paired by order.

    Returns {"a", "b", "resamples", "seed", "rows", "left_out"}; a row is a metric of a task or of
    a group, with "verdict" "A higher", "B higher" or "no difference shown" for the primary one,
    else None. InputError if items, examples or limits differ, or nothing is common to all runs.
    """
    if len(a) != len(b) or not a:
        raise InputError(f"{len(a)} runs cannot be paired with {len(b)}; give A and B one run for "
                         "each seed, in the same order")  # fmt: skip
    runs = [read_run(Path(folder)) for folder in (*a, *b)]
    every = dict.fromkeys(task for run in runs for task in run.sheets)
    tasks = [task for task in every if all(task in run.sheets for run in runs)]
    if not tasks:
        raise InputError(f"{runs[0].folder} and {runs[-1].folder} have no task in common")
    _same_settings(runs, tasks)
    pairs = {task: _pair(task, runs) for task in tasks}
    groups, members = runs[0].results.get("groups", {}), runs[0].results.get("group_subtasks", {})
    pooled = {
        group: _pool([pairs[leaf] for leaf in leaves(group, members)])
        for group in groups
        if all(leaf in pairs for leaf in leaves(group, members))
    }
    rows = []
    with Progress(len(pairs) + len(pooled), "compare", "tasks") as bar:
        for family in (pairs, pooled):
            found = []
            for name, pair in family.items():
                found += _rows(name, pair, family is pooled, resamples, seed)
                bar.update(1)
            _judge([row for row in found if row["primary"]])
            rows += found
    return {
        "a": [str(run.folder) for run in runs[: len(a)]],
        "b": [str(run.folder) for run in runs[len(a) :]],
        "resamples": resamples,
        "seed": seed,
        "rows": rows,
        "left_out": [name for name in (*every, *groups) if name not in pairs | pooled],
    }


def read_run(folder: Path) -> Run:
    """A run folder: samples_<task>.jsonl of benchmarks, or the items.jsonl of an items file."""
    found = {path.stem.removeprefix("samples_"): (path, _samples)
             for path in sorted(folder.glob("samples_*.jsonl"))}  # fmt: skip
    if (folder / "items.jsonl").exists():
        found[ITEMS] = folder / "items.jsonl", _items
    if not found:
        raise InputError(f"{folder} holds neither samples_*.jsonl nor items.jsonl; name the "
                         "folders of two eval runs")  # fmt: skip
    results = folder / "results.json"
    return Run(
        folder,
        read_json(results) if results.exists() else {},
        {task: _read(path, reader) for task, (path, reader) in found.items()},
    )


def _read(path: Path, reader: Callable[[Sheet, dict[str, Any]], None]) -> Sheet:
    sheet = Sheet({}, {}, {}, {})
    for number, line in enumerate(read_jsonl(path), 1):
        try:
            reader(sheet, line)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} line {number} is not what eval run writes ({error!r}); "
                             "run it again") from None  # fmt: skip
        except ValueError as error:
            raise InputError(f"{path} line {number}: {error}; run eval again") from None
    return sheet


def _samples(sheet: Sheet, line: dict[str, Any]) -> None:
    item, name = line["doc_id"], line["filter"]
    sheet.contents[item], sheet.prompts[item] = line["doc_hash"], line["prompt_hash"]
    for metric in line["metrics"]:
        if metric in SHARES:
            _put(sheet, item, metric if name == "none" else f"{metric},{name}", line[metric],
                 line.get("margins", {}).get(metric, math.inf))  # fmt: skip
    if line.get(LOGPROB) is not None:
        _put(sheet, item, LOGPROB, line[LOGPROB], math.inf)


def _items(sheet: Sheet, line: dict[str, Any]) -> None:
    item, logprobs = line["id"], np.array(line["logprobs"])
    sheet.contents[item] = sheet.prompts[item] = line["label"], line["lengths"]
    if line["acc"] is not None:
        _put(sheet, item, "acc", line["acc"], margin(logprobs))
        _put(sheet, item, "acc_norm", line["acc_norm"], margin(logprobs / line["lengths"]))
    _put(sheet, item, LOGPROB, line[LOGPROB], math.inf)


def _put(sheet: Sheet, item: Any, metric: str, value: float, lead: float | None) -> None:
    values = sheet.values.setdefault(metric, {})
    if item in values:
        raise ValueError(f"item {item!r} has {metric} twice")
    values[item] = float(value)
    sheet.margins.setdefault(metric, {})[item] = math.inf if lead is None else lead


def _same_settings(runs: Sequence[Run], tasks: Sequence[str]) -> None:
    first = runs[0]
    for key, what in (("n-shot", "examples before each item"), ("n-samples", "items")):
        for run in runs[1:]:
            told, others = (each.results.get(key, {}) for each in (first, run))
            for task in tasks:
                if task in told and task in others and told[task] != others[task]:
                    raise InputError(
                        f"task {task} has other {what} in {first.folder} ({told[task]}) than in "
                        f"{run.folder} ({others[task]}); run both with the same options"
                    )


def _pair(task: str, runs: Sequence[Run]) -> Pair:
    sheets = [run.sheets[task] for run in runs]
    first, half = sheets[0], len(runs) // 2
    for run, sheet in zip(runs, sheets, strict=True):
        unpaired = sorted(map(str, first.contents.keys() ^ sheet.contents.keys()))
        if unpaired:
            raise InputError(
                f"task {task}: item {unpaired[0]} is in only one of {runs[0].folder} and "
                f"{run.folder} ({len(unpaired)} such items); run both over the same items"
            )
        for item, content in first.contents.items():
            if sheet.contents[item] != content:
                raise InputError(
                    f"task {task}: item {item} has other contents in {run.folder} than in "
                    f"{runs[0].folder}; run both over the same data"
                )
    ids = list(first.contents)
    metrics = {}
    for metric in first.values:
        if all(sheet.values.get(metric, {}).keys() == first.contents.keys() for sheet in sheets):
            x_SI = np.array([[sheet.values[metric][i] for i in ids] for sheet in sheets])
            lead_SI = np.array([[sheet.margins[metric][i] for i in ids] for sheet in sheets])
            close_I, tied_I = np.any(lead_SI < CLOSE, 0), np.any(lead_SI == 0, 0)
            metrics[metric] = Columns(x_SI[:half], x_SI[half:], close_I, tied_I)
    reworded = sum(any(sheet.prompts[i] != first.prompts[i] for sheet in sheets) for i in ids)
    return Pair(metrics, reworded)


def _pool(pairs: Sequence[Pair]) -> Pair:
    """All items of several tasks as one: what weighting the tasks by size comes to."""
    metrics = {}
    for metric in pairs[0].metrics:
        if all(metric in pair.metrics for pair in pairs):
            found = zip(*(pair.metrics[metric] for pair in pairs), strict=True)
            metrics[metric] = Columns(*(np.concatenate(x, -1) for x in found))
    return Pair(metrics, sum(pair.reworded for pair in pairs))


def _rows(name: str, pair: Pair, group: bool, resamples: int, seed: int) -> list[dict[str, Any]]:
    known = [m for m in ("acc_norm", "acc", *pair.metrics) if m in pair.metrics]
    rows = []
    for metric, (a_SI, b_SI, close_I, tied_I) in pair.metrics.items():
        interval, p = paired_test(a_SI - b_SI, resamples, seed)
        tests = None
        if metric.partition(",")[0] in SHARES:
            only_S2 = np.stack([(a_SI > b_SI).sum(1), (b_SI > a_SI).sum(1)], 1).tolist()
            tests = [{"a_only": x, "b_only": y, "p": mcnemar(x, y)} for x, y in only_S2]
        exact = tests is not None and len(tests) == 1
        rows.append({
            "task": name,
            "group": group,
            "metric": metric,
            "primary": metric == known[0],
            "items": a_SI.shape[1],
            "seeds": a_SI.shape[0],
            "a": float(a_SI.mean()),
            "b": float(b_SI.mean()),
            "difference": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "mcnemar": tests,
            "test": "McNemar" if exact else "bootstrap",
            "p": tests[0]["p"] if tests and exact else p,
            "p_holm": None,
            "verdict": None,
            "close": int(close_I.sum()),
            "ties": int(tied_I.sum()),
            "reworded": pair.reworded,
        })  # fmt: skip
    return rows


def _judge(rows: Sequence[dict[str, Any]]) -> None:
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        higher = "A higher" if row["difference"] > 0 else "B higher"
        row |= {"p_holm": p, "verdict": higher if p < LEVEL else "no difference shown"}


HEAD = ("task", "metric", "items", "A", "B", "A - B", "95 % interval", "only A:B", "p", "p Holm",
        "close", "ties", "verdict")  # fmt: skip
LEFT = ("task", "metric", "verdict")


def table(result: dict[str, Any]) -> str:
    """The comparison for people: aligned columns, then what they mean."""
    rows = result["rows"]
    cells = [HEAD, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for arm in "AB":
        lines += [f"{arm}: {folder}" for folder in result[arm.lower()]]
    lines.append("")
    for row in cells:
        padded = [
            cell.ljust(width) if head in LEFT else cell.rjust(width)
            for head, cell, width in zip(HEAD, row, widths, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, "", *_notes(result)]) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    tests = row["mcnemar"] or []
    only = ":".join(str(sum(test[side] for test in tests)) for side in ("a_only", "b_only"))
    compared = row["metric"] in SHARES
    return (
        row["task"] + (" (group)" if row["group"] else ""),
        row["metric"],
        str(row["items"]),
        f"{row['a']:.4f}",
        f"{row['b']:.4f}",
        f"{row['difference']:+.4f}",
        f"[{row['low']:+.4f}, {row['high']:+.4f}]",
        only if tests else "",
        f"{row['p']:.2g}",
        "" if row["p_holm"] is None else f"{row['p_holm']:.2g}",
        str(row["close"]) if compared else "",
        str(row["ties"]) if compared else "",
        row["verdict"] or "",
    )


def _notes(result: dict[str, Any]) -> list[str]:
    rows, seeds = result["rows"], len(result["a"])
    over = "items" if seeds == 1 else f"items and the {seeds} pairs of runs"
    p = "McNemar's exact test of what is 0 or 1, else of the same resamples"
    notes = [
        f"interval: {result['resamples']} paired bootstrap resamples of {over}; p: "
        + (p if seeds == 1 else "of the same resamples"),
        "verdict: of each task's first metric of acc_norm, acc and the others, at "
        f"{LEVEL} after Holm's correction over tasks (groups apart)",
        f"only A:B: items that one arm alone has right{' (all runs)' if seeds > 1 else ''}; close: "
        f"decided by less than {CLOSE} in A or B, ties among them; {LOGPROB}: nats",
    ]
    if seeds == 1:
        notes.append("one pair of runs says nothing about other seeds of training")
    elif seeds < 5:
        notes.append(f"{seeds} seeds are few: the interval may be too narrow")
    reworded = {row["task"]: row["reworded"] for row in rows if row["reworded"]}
    if reworded:
        told = ", ".join(f"{task} {n}" for task, n in reworded.items())
        notes.append(f"other prompts for the same items: {told}")
    if result["left_out"]:
        notes.append(f"not in all runs, left out: {', '.join(result['left_out'])}")
    return notes
