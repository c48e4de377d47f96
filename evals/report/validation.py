"""What `attribute validate` measured, read from its `validation.json`.

Dims: M retrains, F shares removed, R random removals.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import read_json

SCORES = "scores"  # what the file calls the ranking that is put to the test
# The statistic of each protocol that one looks at first; of several shares the first.
HEADLINES = {
    "drop": "lds",
    "half": "lds",
    "tail": "QLD",
    "weight-step": "gain",
    "recall": "MRR",
    "mislabelled": "AUC",
}


class Line(NamedTuple):
    """One number of the table, with the ends of its 95 % interval where it has one."""

    method: str
    statistic: str
    estimate: float | None
    interval: tuple[float, float] | None


class Removals(NamedTuple):
    """Increase of the query's loss [F] by what was removed; random_FR, one a draw."""

    top: dict[str, np.ndarray]
    bottom: dict[str, np.ndarray]
    random_FR: np.ndarray


class Validation(NamedTuple):
    """One `validation.json`. name: of the ranking. scatter: predicted [M] and measured [M]."""

    name: str
    protocol: str
    shares: tuple[float, ...]
    lines: list[Line]
    scatter: tuple[np.ndarray, np.ndarray] | None
    removals: Removals | None
    facts: dict[str, Any]

    @property
    def headline(self) -> list[Line]:
        """What is drawn of the table: one line a method."""
        statistic = HEADLINES[self.protocol]
        found = [x for x in self.lines if x.statistic.startswith(statistic)]
        return [x for x in found if x.statistic == found[0].statistic]


def find(folder: Path) -> list[Path]:
    """The results of validations that lie in a scores folder."""
    patterns = ("validation.json", "validation/*.json", "validation/*/validation.json")
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [file for file in files if _is_validation(read_json(file))]


def _is_validation(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == "taproot-validation"


def load(file: Path, name: str) -> Validation:
    """Read a `validation.json`."""
    content = read_json(file)
    if not _is_validation(content) or content.get("protocol") not in HEADLINES:
        raise InputError(f"{file} is no result of `attribute validate`; name its validation.json")
    try:
        found = _read(content, name)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"{file} lacks what its protocol gives ({error!r}); validate again"
        ) from error
    if not any(x.method == SCORES for x in found.headline):
        raise InputError(f"{file} has no line for the scores in its table; validate again")
    return found


def _read(content: dict[str, Any], name: str) -> Validation:
    def ends(interval: Any) -> tuple[float, float] | None:
        return None if interval is None else (float(interval[0]), float(interval[1]))

    lines = [
        Line(
            str(entry["method"]),
            str(entry["statistic"]),
            None if entry["estimate"] is None else float(entry["estimate"]),
            ends(entry["interval"]),
        )
        for entry in content["table"]
    ]
    shares = tuple(float(share) for share in content["fractions"])
    scatter = removals = None
    if content["protocol"] in ("drop", "half"):
        points = content["points"]
        measured_M = _numbers(points["measured"])
        scatter = (_numbers(points["predicted"][SCORES], measured_M.shape), measured_M)
    if content["protocol"] == "tail":
        sides = {k: v for k, v in content["increase"].items() if k != "random"}
        top, bottom = (
            {method: _numbers(side[end], (len(shares),)) for method, side in sides.items()}
            for end in ("top", "bottom")
        )
        draws = content["increase"]["random"]
        removals = Removals(top, bottom, _numbers(draws, (len(shares), len(draws[0]))))
        removals.top[SCORES]
    return Validation(name, content["protocol"], shares, lines, scatter, removals, content)


def _numbers(values: Any, shape: tuple[int, ...] | None = None) -> np.ndarray:
    array = np.array(values, np.float64)
    if not array.size or not np.isfinite(array).all() or shape not in (None, array.shape):
        raise ValueError(f"{list(array.shape)} numbers, some missing")
    return array


def summary(validations: list[Validation]) -> list[dict[str, Any]]:
    """The numbers that are drawn, for `summary.json`."""
    return [
        {
            "scores": v.name,
            "protocol": v.protocol,
            "statistic": v.headline[0].statistic,
            "methods": {x.method: [x.estimate, *(x.interval or ())] for x in v.headline},
        }
        for v in validations
        if v.headline
    ]
