"""Choosing rows by score: the top, the bottom, and random controls of the same cost.

Arms are compared fairly only when they train on equally many tokens, so every strategy but `top`
and `bottom` fills the token budget of the top k: `random` draws rows until it is met, and
`matched-random` also draws from the top's length bins, row for row.
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
    """Row numbers in increasing order. trained_N: supervised tokens of each row."""
    if not 1 <= k <= len(scores_N):
        raise InputError(f"--k {k} is not between 1 and the number of rows, {len(scores_N)}")
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
    edges = np.unique(np.quantile(trained_N[top], np.linspace(0, 1, BINS + 1))[1:-1])
    bin_N = np.searchsorted(edges, trained_N, side="right")
    chosen: list[np.ndarray] = []
    for b in np.unique(bin_N[top]):
        members = shuffled[bin_N[shuffled] == b]
        share = int(trained_N[top[bin_N[top] == b]].sum())
        chosen.append(_fill(members, trained_N, share))
    return np.sort(np.concatenate(chosen))


def _fill(order: np.ndarray, trained_N: np.ndarray, budget: int) -> np.ndarray:
    """The shortest start of `order` that reaches the budget, or stops closer just before it."""
    total = np.cumsum(trained_N[order])
    n = int(np.searchsorted(total, budget))
    if n >= len(order):
        return order
    before = total[n - 1] if n else 0
    return order[: n + (total[n] - budget <= budget - before or n == 0)]


def select(
    scores_folder: PathLike, rows: Rows, k: int, strategy: Strategy, seed: int, out: PathLike
) -> dict[str, Any]:
    """Write the chosen rows as a rows folder with `selection.json` inside; returns the latter."""
    folder = Path(scores_folder)
    info = read_json(folder / "info.json")
    scores = read_npy(folder / "scores.npy")
    if info["pool"]["rows"] != rows.sha:
        raise InputError(f"{folder} scored {info['pool']['path']}, whose rows differ from "
                         f"{rows.path}; give the rows that were scored")  # fmt: skip
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
