"""What the seeds' predictions say of every predictor, with intervals, and the table of it.

Dims: N rows, T test rows of a seed, M measures, R draws of documents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.command import columns
from core.files import jsonable, read_json, read_npz
from sae.predict import resampling

PREFIX = "fingerprint "
BEST, SHUFFLED = f"{PREFIX}best", "shuffled"
SHUFFLES = tuple(f"{SHUFFLED} {i}" for i in range(4))  # one alone moves by several hundredths
MEASURES = resampling.Measured._fields


def judge(folder: Path, seeds: Sequence[int], document_N: np.ndarray) -> list[dict[str, Any]]:
    """What results say of every predictor, from the seeds' predictions.

    document_N: number of each row's document, see `classify.run_seed` for the files. None in
    place of a value that there is not, such as the correlation of a constant.
    """
    counts_RG = resampling.draws(int(document_N.max()) + 1)
    told = [read_json(folder / f"predictions-{seed}.json") for seed in seeds]
    drawn = []
    for seed, answers in zip(seeds, told, strict=True):
        arrays = read_npz(folder / f"predictions-{seed}.npz")
        drawn.append(_measured(arrays, list(answers), document_N[arrays["row"]], counts_RG))
    mean = {name: np.mean([one[name] for one in drawn], 0) for name in drawn[0]}  # over seeds

    def estimates(values_MR: np.ndarray) -> dict[str, Any]:
        pairs = zip(MEASURES, values_MR, strict=True)
        return jsonable({name: resampling.estimate(x_R)._asdict() for name, x_R in pairs})

    rows = []
    for name, values_MR in mean.items():
        row = {"name": name, **estimates(values_MR)}
        row["seeds"] = [{**answers.get(name, {}), "auroc": float(one[name][0, 0])}
                        for answers, one in zip(told, drawn, strict=True)]  # fmt: skip
        if name not in (BEST, SHUFFLED):
            row["best_less_this"] = estimates(mean[BEST] - values_MR)
        rows.append(row)
    return rows


def _measured(
    arrays: dict[str, np.ndarray], names: list[str], document_T: np.ndarray, counts_RG: np.ndarray
) -> dict[str, np.ndarray]:
    """Measures of each predictor in one seed, under every draw, [M,R]."""

    def measure(name: str, of: str = "") -> np.ndarray:
        truth = arrays[f"{of}label"], arrays[f"{of}score"]
        return np.stack(resampling.measure(arrays[name], *truth, document_T, counts_RG))

    found = {name: measure(name) for name in names if name not in SHUFFLES}
    return found | {SHUFFLED: np.mean([measure(name, f"{name} ") for name in SHUFFLES], 0)}


HEAD = ("predictor", "AUROC", "95 %", "AP", "Spearman", "best less this", "95 %", "verdict")


def table(results: dict[str, Any]) -> str:
    """The comparison for people: a line for each predictor, then what was asked of whom."""
    lines = [HEAD, *(_cells(row) for row in results["predictors"])]
    return "\n".join([columns(lines), "", *_notes(results)])


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "missing" in row:
        return (row["name"], "n/a", *[""] * (len(HEAD) - 2))
    less = row["best_less_this"]["auroc"] if "best_less_this" in row else None
    return (
        row["name"],
        _number(row["auroc"]["value"], ".3f"),
        _ends(row["auroc"], ".3f"),
        _number(row["ap"]["value"], ".3f"),
        _number(row["spearman"]["value"], "+.3f"),
        *((_number(less["value"], "+.3f"), _ends(less, "+.3f"), shows(less)) if less else [""] * 3),
    )


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else f"{value:{form}}"


def _ends(estimate: dict[str, float | None], form: str) -> str:
    return f"[{_number(estimate['low'], form)}, {_number(estimate['high'], form)}]"


def shows(difference: dict[str, float | None]) -> str:
    """What an interval of best less another shows."""
    low, high = difference["low"], difference["high"]
    if low is not None and low > 0:
        return "best is better"
    return "best is worse" if high is not None and high < 0 else "no difference shown"


def _notes(results: dict[str, Any]) -> list[str]:
    label, split = results["label"], results["split"]
    best = next(row for row in results["predictors"] if row["name"] == BEST)
    chosen = [seed["predictor"].removeprefix(PREFIX) for seed in best["seeds"]]
    share = label["positives"] / (label["positives"] + label["negatives"])
    return [
        f"label {label['rule']}: {label['told']}; {label['positives']:,} and "
        f"{label['negatives']:,} rows, so AP is {share:.3f} by chance",
        f"split by {split['by']}: {split['documents']:,} documents, 60 / 20 / 20, seeds "
        f"{', '.join(map(str, split['seeds']))}; Spearman with the score over all test rows",
        f"best: the highest AUROC on validation rows, by seed: {', '.join(chosen)}; shuffled: the "
        f"same {len(SHUFFLES)} times with shuffled classes, chance if all is honest",
        f"interval: {results['interval']}",
        *(f"{row['name']}: {row['missing']}" for row in results["predictors"] if "missing" in row),
        *results["warnings"],
    ]
