"""Which rows count as proponents: the rule that turns scores into two classes.

    top:S       the share S of the highest scores against all the rest
    quantile:S  the share S of the highest against the share S of the lowest, the middle left out

The same predictor differs by .1 of AUROC between the two, so results always say which it was.
Rows of one score are ranked by their numbers, the first one highest.

Dims: N rows.
"""

from typing import Literal, NamedTuple

import numpy as np

from core.errors import InputError

Kind = Literal["top", "quantile"]
LARGEST: dict[Kind, float] = {"top": 1.0, "quantile": 0.5}
TIES = "rows of one score are ranked by their numbers, the first one highest"


class Rule(NamedTuple):
    kind: Kind
    share: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.share:g}"

    @property
    def told(self) -> str:
        """The rule in words, for results and tables."""
        share = f"{100 * self.share:g} %"
        other = {"top": "all the rest", "quantile": f"the lowest {share}, the middle left out"}
        return f"the highest {share} of the scores against {other[self.kind]}"


class Labels(NamedTuple):
    """label_N int8: 1 = proponent, 0 = not, -1 = left out.

    tied: rows of the score at a border between classes, which only their numbers placed.
    """

    label_N: np.ndarray
    tied: int


def parse(text: str) -> Rule:
    """`top:0.25` or `quantile:0.25`; InputError for anything else."""
    kind, _, share = text.partition(":")
    try:
        rule = Rule("quantile" if kind == "quantile" else "top", float(share))
        if kind == rule.kind and 0 < rule.share <= LARGEST[rule.kind] and rule.share < 1:
            return rule
    except ValueError:
        pass
    raise InputError(f"--label {text} is no label rule; give top:0.25 (the top quarter against the "
                     "rest) or quantile:0.25 (the top against the bottom quarter)")  # fmt: skip


def label(rule: Rule, scores_N: np.ndarray) -> Labels:
    """Classes of the rows by their scores, larger = stronger proponent, NaN = not scored.

    Raises InputError where the rule leaves a class empty, or the scores rank nothing.
    """
    scored = np.flatnonzero(np.isfinite(scores_N))
    k = round(rule.share * len(scored))
    high, low = k, k if rule.kind == "quantile" else len(scored) - k
    if not high or not low:
        raise InputError(f"--label {rule} of {len(scored)} scored rows leaves a class empty; give "
                         "another share, or score more rows")  # fmt: skip
    if np.ptp(scores_N[scored]) == 0:
        raise InputError(f"all {len(scored)} scores are {scores_N[scored[0]]:g}; there is no rank "
                         "to predict, give the scores of another query")  # fmt: skip
    order = scored[np.argsort(-scores_N[scored], kind="stable")]
    label_N = np.full(len(scores_N), -1, np.int8)
    label_N[order[:high]] = 1
    label_N[order[len(order) - low :]] = 0
    at_border = [
        scores_N[order[at]]
        for at in (high, len(order) - low)
        if at < len(order) and scores_N[order[at - 1]] == scores_N[order[at]]
    ]
    return Labels(label_N, int(np.isin(scores_N[scored], at_border).sum()))
