"""A scores folder as something to validate: the rows it scored, and which sign is a proponent.

Dims: N rows, Q queries, C columns (Q, or 1 for scores of all queries together).

Influence scores are gradient products, positive = proponent; MAGIC scores are derivatives of the
query loss, negative = proponent. The folder says which, and nothing here works on a score before
`read_scores` has turned it: a larger value is a stronger proponent, of every method.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from attribution.select import read_info
from core.errors import InputError
from core.files import PathLike, read_npy, sha256_file
from core.rows import Rows

TURN = {"positive = proponent": 1.0, "negative = proponent": -1.0}


class Scores(NamedTuple):
    """Scores [N,C], larger = stronger proponent, and what a scores folder knows of its rows.

    sign: what the file's scores were multiplied by. loss: `sum` or `mean`, of a query's tokens in
    what was scored. same_query: the query is the scored one, if any. self_influence: each row was
    scored on itself. norms, losses [N]: of gradients and of rows (summed over tokens), where the
    folder holds them.
    """

    scores_NC: np.ndarray
    sign: float
    loss: str
    same_query: bool
    self_influence: bool
    norms_N: np.ndarray | None
    losses_N: np.ndarray | None
    sha: str


def read_scores(folder: PathLike, rows: Rows, query: Rows) -> Scores:
    """The scores of `rows`; raises unless they are of these rows, finite, and have a known sign."""
    folder = Path(folder)
    info = read_info(folder)
    pool, asked = (info.get(name) or {} for name in ("pool", "query"))
    if pool.get("rows") != rows.sha:
        raise InputError(f"{folder} scored {pool.get('path')}, whose rows differ from {rows.path}; "
                         "give the rows that were scored")  # fmt: skip
    turn = TURN.get(str(info.get("sign")).split(" (")[0])
    if turn is None:
        raise InputError(f"{folder / 'info.json'} has the sign {info.get('sign')!r}, which is none "
                         f"of {', '.join(TURN)}; score the rows again")  # fmt: skip
    file = folder / "scores.npy"
    scores = read_npy(file)
    if scores.shape[:1] != (len(rows),) or scores.ndim > 2 or scores.dtype.kind != "f":
        raise InputError(f"{file} holds {scores.dtype} {list(scores.shape)}, not a number for each "
                         f"of {len(rows)} rows; score them again")  # fmt: skip
    if not np.isfinite(scores).all():
        row = int(np.argwhere(~np.isfinite(scores))[0, 0])
        raise InputError(f"{file}: the score of row {row} is not finite; score all rows again")
    self_influence = (info.get("settings") or {}).get("mode") == "self"
    same_query = self_influence or asked.get("rows") == query.sha
    if scores.ndim == 2 and not same_query:
        raise InputError(f"{folder} has scores for each row of {asked.get('path')}, whose rows "
                         f"differ from {query.path}; give the query of the scores")  # fmt: skip
    if scores.ndim == 2 and scores.shape[1] != len(query):
        raise InputError(f"{file} has {scores.shape[1]} columns for {len(query)} queries; score "
                         "the rows again")  # fmt: skip
    scores_NC = turn * scores.reshape(len(rows), -1).astype(np.float64)
    sides = {name: folder / f"{name}.npy" for name in ("norms", "losses")}
    found = {name: read_npy(side) if side.exists() else None for name, side in sides.items()}
    for name, values in found.items():
        if values is not None and values.shape != (len(rows),):
            raise InputError(f"{sides[name]} does not fit {rows.path}; score the rows again")
    return Scores(
        scores_NC,
        turn,
        "mean" if (info.get("spec") or {}).get("loss") == "mean" else "sum",
        same_query,
        self_influence,
        found["norms"],
        found["losses"],
        sha256_file(file),
    )
