"""One validation: a scores folder, its controls, a protocol, and the table that comes of them.

It leaves `validation.json` (all of it, with the points and curves of a report), `validation.csv`
(the table) and `subsets.json` (what each retrain went without, and its file in the bank).
"""

import csv
import dataclasses
import io
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from attribution.validation import protocols
from attribution.validation.bank import Bank
from attribution.validation.protocols import Line, Problem, Result
from attribution.validation.scores import Scores
from core.command import columns
from core.errors import InputError
from core.files import dumps, write_json, write_text
from core.rows import Rows
from core.rundir import Run

Protocol = Literal["drop", "half", "tail", "weight-step", "recall", "mislabelled"]
RETRAINING = ("drop", "half", "tail", "weight-step")
FRACTIONS = {"drop": (0.01,), "half": (0.5,), "tail": (0.01,), "weight-step": (0.05, 0.1)}
COUNTS = {"drop": 100, "half": 100, "tail": 10}


@dataclasses.dataclass(frozen=True)
class Settings:
    """fractions: of the units removed, or the sizes of a weight step. count: of random subsets.

    seeds: retrains that are averaged, with `seed` and those after it.
    """

    protocol: Protocol
    fractions: tuple[float, ...]
    count: int
    seeds: int = 1
    seed: int = 0


def settings_of(
    protocol: Protocol, fractions: Sequence[float], count: int | None, seeds: int, seed: int
) -> Settings:
    """With the protocol's own fractions and count where none are given."""
    chosen = tuple(fractions) or FRACTIONS.get(protocol, ())
    return Settings(protocol, chosen, count or COUNTS.get(protocol, 0), seeds, seed)


def ask(settings: Settings, scored: Scores, rows: Rows, query: Rows) -> Callable[[Problem], Result]:
    """The protocol, ready to run; raises for what it cannot be run on, before any work."""
    n, columns = scored.scores_NC.shape
    fractions, count = settings.fractions, settings.count
    if scored.tokens and settings.protocol not in RETRAINING:
        raise InputError(f"--protocol {settings.protocol} is about rows; leave --units token out")
    if settings.protocol == "recall":
        if columns != len(query):
            raise InputError("recall needs scores of each query; score with --mode each")
        gold = protocols.gold_rows(rows, query)
        return lambda problem: protocols.recall(problem, gold)
    if settings.protocol == "mislabelled":
        wrong_N = protocols.marked_rows(rows)
        return lambda problem: protocols.mislabelled(problem, wrong_N, scored.self_influence)
    if settings.protocol == "weight-step":
        return lambda problem: protocols.weight_step(problem, fractions)
    for fraction in fractions:
        protocols.removed(fraction, n)
    if settings.protocol == "tail":
        return lambda problem: protocols.tail(problem, fractions, count)
    if len(fractions) != 1:
        raise InputError(f"--protocol {settings.protocol} takes one --fraction; give one")
    if count < 3:
        raise InputError(f"--count {count} subsets have no ranking; take at least 3")
    return lambda problem: protocols.lds(problem, fractions[0], count)


def validate(
    run: Run,
    settings: Settings,
    protocol: Callable[[Problem], Result],
    scored: Scores,
    methods: dict[str, np.ndarray],
    query: Rows,
    bank: Bank | None,
) -> dict[str, Any]:
    """Work through a protocol into `run`'s folder; continues a killed one. Returns the result.

    methods: `scored` and the controls. query: a row for each. bank: None for the protocols that
    train nothing.
    """
    began = time.monotonic()
    (n, columns), tokens = scored.scores_NC.shape, scored.tokens
    # Summed losses make the mean query a mean over tokens; else each query counts the same.
    share_Q = query.trained if columns == 1 and scored.loss == "sum" else np.ones(len(query))
    share_Q = share_Q / share_Q.sum()
    seeds = range(settings.seed, settings.seed + settings.seeds)

    def of_rows(weights_N: np.ndarray) -> np.ndarray:
        return tokens.weights(weights_N) if tokens else weights_N

    def retrain(weights: Sequence[np.ndarray]) -> np.ndarray:
        assert bank is not None
        return bank.losses([of_rows(weights_N) for weights_N in weights], seeds)

    problem = Problem(methods, share_Q, retrain, settings.seed)
    result = protocol(problem)
    trained = {}
    if bank is not None:
        losses = {"before": bank.before(), "after": result.details["base_losses"]}
        means = {name: float(x_Q @ share_Q) for name, x_Q in losses.items()}
        trained = {
            "bank": bank.folder,
            "training": bank.setting["settings"] | bank.setting["optim"],
            "query_loss": means,
            "loss_drop": means["before"] - means["after"],
        }
        for subset in result.subsets:
            removed_K = subset["removed"]
            weights = of_rows(problem.without(removed_K))
            subset["files"] = [bank.file(weights, seed).name for seed in seeds]
            if tokens:  # [row, place] of each
                subset["removed"] = np.stack([tokens.rows_N, tokens.places_N], 1)[removed_K]
    content = {
        "format": "taproot-validation",
        **dataclasses.asdict(settings),
        "units": "token" if tokens else "row",
        "rows": tokens.shape[0] if tokens else n,
        "queries": len(query),
        "of_each_query": columns > 1,
        "same_query": scored.same_query,
        "scores_times": scored.sign,
        **trained,
        "table": [line._asdict() for line in result.lines],
        **result.details,
        "seconds": time.monotonic() - began,
    }
    text = "".join(f"{',' if i else ''}\n {dumps(s)}" for i, s in enumerate(result.subsets))
    write_text(run.path / "subsets.json", f"[{text}\n]\n")
    write_text(run.path / "validation.csv", comma_separated(result.lines))
    write_json(run.path / "validation.json", content)
    return content


def comma_separated(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "statistic", "estimate", "low", "high"])
    for line in lines:
        writer.writerow([line.method, line.statistic, line.estimate, *(line.interval or ("", ""))])
    return text.getvalue()


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Methods down, statistics across, with 95 % intervals: for people."""
    statistics = list(dict.fromkeys(line["statistic"] for line in lines))
    cells = {(line["method"], line["statistic"]): cell(line) for line in lines}
    rows = [["", *statistics]]
    for method in dict.fromkeys(line["method"] for line in lines):
        rows.append([method, *(cells.get((method, name), "") for name in statistics)])
    return columns(rows)


def cell(line: dict[str, Any]) -> str:
    if line["estimate"] is None:
        return "-"
    text = f"{line['estimate']:.3g}"
    if line["interval"] is None:
        return text
    low, high = line["interval"]
    return f"{text} [{low:.3g}, {high:.3g}]"
