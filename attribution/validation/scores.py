"""What a folder of scores holds, read for validation: by row, or by supervised token.

Dims: N units (rows, or the supervised tokens of all rows in order), R rows, T tokens, Q queries, C
columns (Q, or 1 for scores of all queries together).

Nothing here works on a score before `attribution.select` has turned it: a larger value is a
stronger proponent, of every method.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attribution.magic.functional import Functional, choices, functional
from attribution.select import read_info, read_proponents, require_finite
from core.errors import InputError
from core.files import PathLike, read_npy, sha256_file
from core.rows import IGNORED, Rows


class Tokens(NamedTuple):
    """The supervised tokens of rows: their rows [N], their places in these [N], and (R, T)."""

    rows_N: np.ndarray
    places_N: np.ndarray
    shape: tuple[int, int]

    def weights(self, weights_N: np.ndarray) -> np.ndarray:
        """Weights [R,T] of all tokens, of which those that are not supervised mean nothing."""
        weights_RT = np.ones(self.shape, weights_N.dtype)
        weights_RT[self.rows_N, self.places_N] = weights_N
        return weights_RT


class Scores(NamedTuple):
    """Scores [N,C], larger = stronger proponent, and what a scores folder knows of its rows.

    sign: what the file's scores were multiplied by. loss: `sum` or `mean`, of a query's tokens in
    what was scored; queries weigh alike in a mean of means. same_query: the query is the scored
    one, if any. self_influence: each row was scored on itself. norms, losses [N]: of gradients and
    of rows (summed over tokens), where the folder holds them. tokens: where the units are tokens.
    """

    scores_NC: np.ndarray
    sign: float
    loss: str
    same_query: bool
    self_influence: bool
    norms_N: np.ndarray | None
    losses_N: np.ndarray | None
    sha: str
    tokens: Tokens | None = None


def asked(info: dict[str, Any], query: Rows, control: Rows | None) -> tuple[Functional, Rows]:
    """What scores are about, by query, and a row that stands for each: of choices the right one.

    info: of the scores; those that do not say it are about losses.
    """
    if control is not None and control.sha != info["control"]["rows"]:
        raise InputError(f"{control.path} has changed since it was the scores' control; put it "
                         "back, or score again")  # fmt: skip
    kind, texts = info.get("query_loss", "nll"), query
    if kind == "margin":
        texts = query.take([gold for gold, _ in choices(query).values()])
    return functional(query, "each", kind, control), texts


def read_scores(folder: PathLike, rows: Rows, query: Rows, queries: int) -> Scores:
    """The scores of `rows`; raises unless all have one, of this query where it has a column.

    queries: how many `query` asks.
    """
    folder = Path(folder)
    found = read_proponents(folder, rows)
    info, scores, file = found.info, found.scores, folder / "scores.npy"
    require_finite(file, info, scores)
    of = info.get("query") or {}
    self_influence = (info.get("settings") or {}).get("mode") == "self"
    same_query = self_influence or of.get("rows") == query.sha
    if scores.ndim == 2 and not same_query:
        raise InputError(f"{folder} has scores for each row of {of.get('path')}, whose rows "
                         f"differ from {query.path}; give the query of the scores")  # fmt: skip
    if scores.ndim == 2 and scores.shape[1] != queries:
        raise InputError(f"{file} has {scores.shape[1]} columns for {queries} queries; score the "
                         "rows again")  # fmt: skip
    mean = (info.get("spec") or {}).get("loss") == "mean" or info.get("query_loss") == "margin"
    sides = {name: folder / f"{name}.npy" for name in ("norms", "losses")}
    held = {name: read_npy(side) if side.exists() else None for name, side in sides.items()}
    for name, values in held.items():
        if values is not None and values.shape != (len(rows),):
            raise InputError(f"{sides[name]} does not fit {rows.path}; score the rows again")
    return Scores(
        scores.reshape(len(rows), -1),
        found.turn,
        "mean" if mean else "sum",
        same_query,
        self_influence,
        held["norms"],
        held["losses"],
        sha256_file(file),
    )


def of_tokens(folder: PathLike, scored: Scores, rows: Rows) -> Scores:
    """The folder's scores of supervised tokens, beside those of rows, `scored`."""
    folder = Path(folder)
    info = read_info(folder)
    known = info.get("tokens") or {}
    file = folder / known.get("file", "token_scores.npy")
    if not file.exists():
        raise InputError(f"{folder} holds no scores of tokens; score with --tokens, or with "
                         "`attribute magic --target token`")  # fmt: skip
    if known.get("alignment") != "label":
        raise InputError(f"{file} credits a token with what passes through its position, later "
                         "tokens' losses included, and no token's weight takes that away; score "
                         "with --exact --tokens --token-side loss")  # fmt: skip
    scores, shape = read_npy(file), (len(rows), int(rows.lengths.max()))
    columns = scored.scores_NC.shape[1]
    if scores.shape not in (shape, (*shape, columns)):
        raise InputError(f"{file} is {list(scores.shape)}, not a number for each token of "
                         f"{rows.path} ({list(shape)}); score them again")  # fmt: skip
    require_finite(file, info, scores)
    trained = [np.flatnonzero(rows.labels(i)[1:] != IGNORED) + 1 for i in range(len(rows))]
    of_rows_N = np.repeat(np.arange(len(rows)), [len(places) for places in trained])
    tokens = Tokens(of_rows_N, np.concatenate(trained), shape)
    scores_NC = scores[tokens.rows_N, tokens.places_N].reshape(len(of_rows_N), -1)
    return scored._replace(
        scores_NC=scored.sign * scores_NC.astype(np.float64),
        norms_N=None,
        losses_N=None,
        sha=sha256_file(file),
        tokens=tokens,
    )
