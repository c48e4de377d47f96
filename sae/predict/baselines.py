"""What is known of rows without an SAE: their scores, and what else might predict those.

Dims: N rows, C columns of a predictor.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.rows import Rows

# The words of Magpie's judges, as ranks; numbers are taken as they are.
# Names under which Magpie, SmolTalk and others publish qualities: compared with unasked.
KNOWN = ("quality", "input_quality", "reward", "instruct_reward", "reward_model_score")
QUALITY = {"very poor": 1.0, "poor": 2.0, "average": 3.0, "good": 4.0, "excellent": 5.0}


class Pool(NamedTuple):
    """What is known of the rows without an SAE.

    scores_N: larger = stronger proponent, NaN = not scored. columns: numbers [N,C] by the name of
    the baseline, or why there are none. documents: names, or None. sha: of the rows. about: what
    results say of rows and scores.
    """

    scores_N: np.ndarray
    columns: dict[str, np.ndarray | str]
    documents: Sequence[Any] | None
    sha: str
    about: dict[str, Any]


def pool(
    rows: Rows,
    scores_N: np.ndarray,
    diagnostics: Sequence[dict[str, Any]],
    quality: Sequence[str] = (),
    **about: Any,
) -> Pool:
    """diagnostics: the lines of a score folder's `row_diagnostics.jsonl`.

    quality: columns; without any, those of the rows whose name is `KNOWN`.
    """
    loss_N = np.full(len(rows), np.nan)
    for line in diagnostics:
        if line.get("loss") is not None:
            loss_N[line["row"]] = line["loss"]
    lacking = "not recorded; score the rows with `attribute score`, which records losses"
    columns: dict[str, np.ndarray | str] = {
        "length": rows.lengths[:, None].astype(np.float64),
        "loss": loss_N[:, None] if np.isfinite(loss_N).any() else lacking,
    }
    for name in quality or [name for name in KNOWN if name in rows.columns]:
        values = rows.column(name)
        if values is None:
            raise InputError(f"{rows.path} has no column {name!r} (found: "
                             f"{', '.join(rows.columns)}); give another --quality")  # fmt: skip
        value_N = _quality(values, name)
        columns[f"quality {name}"] = np.stack([value_N, np.isnan(value_N)], 1)
    about = {"rows": {"path": str(rows.path), "sha": rows.sha, "count": len(rows)}, **about}
    names = rows.column("doc") or []
    documents = names if any(name is not None for name in names) else None
    return Pool(scores_N, columns, documents, rows.sha, about)


def _quality(values: Sequence[Any], name: str) -> np.ndarray:
    """Numbers [N], NaN for rows without one."""

    def number(value: Any) -> float:
        if value is None:
            return np.nan
        known = QUALITY.get(str(value).strip().lower())
        return float(value) if known is None else known

    try:
        value_N = np.array([number(value) for value in values])
        if not np.isinf(value_N).any():
            return value_N
        error = "infinite"
    except (TypeError, ValueError) as problem:
        error = problem
    raise InputError(f"--quality {name} holds what is no quality ({error}); give a column of "
                     f"numbers or of {', '.join(QUALITY)}")  # fmt: skip
