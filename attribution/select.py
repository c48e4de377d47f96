"""Choosing rows by score: the top, the bottom, and random controls of the same cost.

What a folder of scores holds is read here for everyone, and turned: gradient products are positive
for proponents, MAGIC's derivatives of a query loss negative, and the folder says which.

Arms are compared fairly only when they train on equally many tokens, so every strategy but `top`
meets the token budget of the top k: `bottom` and `random` take rows until it is met, and
`matched-random` also takes as many rows from each of the top's length bins as the top did.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from attribution.diagnostics import ranking
from core.errors import InputError
from core.files import PathLike, read_json, read_npy
from core.rows import Rows, save_rows

Strategy = Literal["top", "bottom", "random", "matched-random"]
BINS = 5
POSITIVE, NEGATIVE = "positive = proponent", "negative = proponent"
TURN = {POSITIVE: 1.0, NEGATIVE: -1.0}


def choose(
    scores_N: np.ndarray, trained_N: np.ndarray, k: int, strategy: Strategy, seed: int
) -> np.ndarray:
    """Row numbers in increasing order, of the rows that have a score.

    scores_N: larger = stronger proponent; NaN in rows that were no candidates. trained_N:
    supervised tokens of each row.
    """
    scored = np.flatnonzero(~np.isnan(scores_N))
    if len(scored) < len(scores_N):
        return scored[choose(scores_N[scored], trained_N[scored], k, strategy, seed)]
    if not 1 <= k <= len(scores_N):
        raise InputError(f"--k {k} is not between 1 and the number of scored rows, {len(scores_N)}")
    order = ranking(scores_N, seed)
    top = order[:k]
    if strategy == "top":
        return np.sort(top)
    generator = np.random.default_rng([seed, 1])
    budget = int(trained_N[top].sum())
    if strategy == "bottom":
        return np.sort(_fill(order[::-1], trained_N, budget))
    shuffled = generator.permutation(len(scores_N))
    if strategy == "random":
        return np.sort(_fill(shuffled, trained_N, budget))
    edges = np.unique(np.quantile(trained_N[top], np.linspace(0, 1, BINS + 1)))
    inside_N = (trained_N >= edges[0]) & (trained_N <= edges[-1])
    bin_N = np.where(inside_N, np.searchsorted(edges[1:-1], trained_N, side="right"), -1)
    chosen = [
        _match(shuffled[bin_N[shuffled] == b], trained_N, top[bin_N[top] == b])
        for b in np.unique(bin_N[top])
    ]
    return np.sort(np.concatenate(chosen))


def _fill(order: np.ndarray, trained_N: np.ndarray, budget: int) -> np.ndarray:
    """The shortest start of `order` that reaches the budget, or stops closer just before it."""
    total = np.cumsum(trained_N[order])
    n = int(np.searchsorted(total, budget))
    if n >= len(order):
        return order
    before = total[n - 1] if n else 0
    return order[: n + (total[n] - budget <= budget - before or n == 0)]


def read_info(folder: PathLike) -> dict[str, Any]:
    """`info.json` of a folder of scores."""
    info = read_json(Path(folder) / "info.json")
    if not isinstance(info, dict) or info.get("format") != "taproot-scores":
        raise InputError(
            f"{folder} holds no scores; give the folder of a finished `attribute score`"
        )
    return info


class Proponents(NamedTuple):
    """Scores [N] or [N,Q], float64, of any method: larger = stronger proponent.

    Rows that were no candidates hold NaN. turn: what the file's scores were multiplied by.
    """

    info: dict[str, Any]
    scores: np.ndarray
    turn: float

    @property
    def mean_N(self) -> np.ndarray:
        """Over the queries."""
        return self.scores if self.scores.ndim == 1 else self.scores.mean(1)


def read_proponents(folder: PathLike, rows: Rows) -> Proponents:
    """The scores of `rows`; raises unless they are of these rows, finite, and have a known sign."""
    folder = Path(folder)
    info, file = read_info(folder), folder / "scores.npy"
    pool = info.get("pool") or {}
    if pool.get("rows") != rows.sha:
        raise InputError(f"{folder} scored {pool.get('path')}, whose rows differ from {rows.path}; "
                         "give the rows that were scored")  # fmt: skip
    turn = turn_of(folder, info)
    scores = read_npy(file)
    if scores.shape[:1] != (len(rows),) or scores.ndim > 2 or scores.dtype.kind != "f":
        raise InputError(f"{file} holds {scores.dtype} {list(scores.shape)}, not a number for each "
                         f"of {len(rows)} rows; score them again")  # fmt: skip
    require_finite(file, info, scores, absent=bool(info.get("candidates")))
    return Proponents(info, turn * scores.astype(np.float64), turn)


def turn_of(folder: PathLike, info: dict[str, Any]) -> float:
    """What a folder's scores are multiplied by to be larger for stronger proponents."""
    turn = TURN.get(str(info.get("sign")).split(" (")[0])
    if turn is None:
        raise InputError(f"{Path(folder) / 'info.json'} has the sign {info.get('sign')!r}, which "
                         f"is none of {', '.join(TURN)}; score the rows again")  # fmt: skip
    return turn


def require_finite(
    file: Path, info: dict[str, Any], scores: np.ndarray, absent: bool = False
) -> None:
    """Raise InputError for a score [R,...] that is not finite. absent: NaN stands for no score."""
    wrong = np.isinf(scores) if absent else ~np.isfinite(scores)
    if not wrong.any():
        return
    row, why = int(np.argwhere(wrong)[0, 0]), (info.get("trust") or {}).get("reasons") or []
    said = f" ({why[0]})" if why else ""
    raise InputError(f"{file}: the score of row {row} is not finite{said}; score all rows again")


def _match(order: np.ndarray, trained_N: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The start of `order`, as many rows as `like`, but for a few swaps that equal the tokens.

    What is left is at most half a row's difference in length, since `like` is among `order`.
    """
    inside, outside = order[: len(like)].copy(), order[len(like) :].copy()
    surplus = int(trained_N[inside].sum() - trained_N[like].sum())
    while surplus and len(outside):
        outside = outside[np.argsort(trained_N[outside], kind="stable")]
        lengths = trained_N[outside]
        wanted = trained_N[inside] - surplus  # in place of each row inside
        above = np.minimum(np.searchsorted(lengths, wanted), len(outside) - 1)
        below = np.maximum(above - 1, 0)
        near = np.where(lengths[above] - wanted < wanted - lengths[below], above, below)
        i = int(np.abs(lengths[near] - wanted).argmin())
        left = int(lengths[near[i]] - wanted[i])
        if abs(left) >= abs(surplus):
            break
        inside[i], outside[near[i]] = outside[near[i]], inside[i]
        surplus = left
    return inside


def select(
    scores_folder: PathLike, rows: Rows, k: int, strategy: Strategy, seed: int, out: PathLike
) -> dict[str, Any]:
    """Write the chosen rows as a rows folder with `selection.json` inside; returns the latter."""
    found = read_proponents(scores_folder, rows)
    indices = choose(found.mean_N, rows.trained, k, strategy, seed)
    selection = {
        "strategy": strategy,
        "k": k,
        "seed": seed,
        "rows": len(indices),
        "trained_tokens": int(rows.trained[indices].sum()),
        "sha256": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        "scores": str(scores_folder),
        "pool": str(rows.path),
        "indices": indices.tolist(),
    }
    chosen, scores = rows.take(indices), found.turn * found.mean_N[indices]  # as in the file
    columns = {name: chosen.column(name) or [] for name in rows.columns}
    save_rows(
        out,
        [chosen.ids(i) for i in range(len(chosen))],
        [chosen.labels(i) for i in range(len(chosen))],
        columns | {"pool_row": indices.tolist(), "score": scores.tolist()},
        rows.tokenizer,
        {"selection": {key: selection[key] for key in selection if key != "indices"}},
        {"selection.json": selection},
    )
    return selection
