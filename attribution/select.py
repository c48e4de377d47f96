"""Choosing rows by score: the top, the bottom, and random controls of the same cost.

Arms are compared fairly only when they train on equally many tokens, so every strategy but `top`
meets the token budget of the top k: `bottom` and `random` take rows until it is met, and
`matched-random` also takes as many rows from each of the top's length bins as the top did.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from attribution.diagnostics import ranking
from core.errors import InputError
from core.files import PathLike, read_json, read_npy
from core.rows import Rows, save_rows

Strategy = Literal["top", "bottom", "random", "matched-random"]
BINS = 5


def choose(
    scores_N: np.ndarray, trained_N: np.ndarray, k: int, strategy: Strategy, seed: int
) -> np.ndarray:
    """Row numbers in increasing order. trained_N: supervised tokens of each row.

    Of rows that have a score: the others hold NaN where only candidates were scored.
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
    """`info.json` of a folder that `attribute score` made."""
    info = read_json(Path(folder) / "info.json")
    if not isinstance(info, dict) or info.get("format") != "taproot-scores":
        raise InputError(
            f"{folder} holds no scores; give the folder of a finished `attribute score`"
        )
    return info


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
    folder = Path(scores_folder)
    info, scores = read_info(folder), read_npy(folder / "scores.npy")
    if info["pool"]["rows"] != rows.sha:
        raise InputError(f"{folder} scored {info['pool']['path']}, whose rows differ from "
                         f"{rows.path}; give the rows that were scored")  # fmt: skip
    if scores.shape[:1] != (len(rows),) or scores.dtype.kind != "f":
        raise InputError(f"{folder / 'scores.npy'} holds {scores.dtype} {list(scores.shape)}, not "
                         f"a number for each of {len(rows)} rows; score them again")  # fmt: skip
    scores_N = scores if scores.ndim == 1 else scores.mean(1)
    indices = choose(np.asarray(scores_N, np.float64), rows.trained, k, strategy, seed)
    selection = {
        "strategy": strategy,
        "k": k,
        "seed": seed,
        "rows": len(indices),
        "trained_tokens": int(rows.trained[indices].sum()),
        "sha256": hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest(),
        "scores": str(folder),
        "pool": str(rows.path),
        "indices": indices.tolist(),
    }
    chosen = rows.take(indices)
    columns = {name: chosen.column(name) or [] for name in rows.columns}
    save_rows(
        out,
        [chosen.ids(i) for i in range(len(chosen))],
        [chosen.labels(i) for i in range(len(chosen))],
        columns | {"pool_row": indices.tolist(), "score": scores_N[indices].tolist()},
        rows.tokenizer,
        {"selection": {key: selection[key] for key in selection if key != "indices"}},
        {"selection.json": selection},
    )
    return selection
