"""Protocols that put scores to the test.

Dims: N units (rows, or supervised tokens), Q queries, C columns (Q, or 1: all queries as one), M
subsets, E step sizes.

    lds          mean_q Spearman_m( sum of the scores of the units removed in m,  L_q(m) - L_q )
    tail         QLD = L(without the top k) - mean over random k of L(without them)
    weight step  (L(w = 1 - e z) - L(w = 1 + e z)) / 2e,  z the scores less their mean, by their sd
    recall       places of the rows that state what a query asks: MRR, recall
    mislabelled  AUC of finding mislabelled rows by their scores

with L the query's loss after training (`attribution.validation.bank`). The first is the linear
datamodeling score of Park et al., arXiv 2303.14186: a kept unit's score counts as much as a removed
one's with the other sign, which changes no ranks. 1 % removed with one seed measures the local
linear response (MAGIC, arXiv 2504.16430), 50 % with several seeds the average model's. Scores are
proponents by size here (`attribution.validation.scores`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from attribution.diagnostics import ranking
from core import ranks
from core.errors import InputError
from core.rows import Rows

FIRST = (1, 10, 100)  # places that recall is measured at
NOTHING = np.zeros(0, np.int64)


class Line(NamedTuple):
    """One number of the table; `values` are what it is the mean of, one a query."""

    method: str
    statistic: str
    estimate: float | None
    interval: tuple[float, float] | None = None
    values: list[float | None] | None = None


class Result(NamedTuple):
    """What a protocol found. details: for a report. subsets: what each retrain left out."""

    lines: list[Line]
    details: dict[str, Any]
    subsets: list[dict[str, Any]]


class Problem(NamedTuple):
    """methods: scores [N,C] by name. share_Q: of each query in the mean query, adds up to 1.

    retrain: the units' weights, an array [N] each -> query losses [M,Q].
    """

    methods: dict[str, np.ndarray]
    share_Q: np.ndarray
    retrain: Callable[[Sequence[np.ndarray]], np.ndarray]
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        n, c = next(iter(self.methods.values())).shape
        return n, c

    def random_sets(self, k: int, count: int) -> list[np.ndarray]:
        """Sets of k units; a larger count begins with the same ones."""
        n = self.shape[0]
        return [
            np.sort(np.random.default_rng([self.seed, 1, m]).choice(n, k, replace=False))
            for m in range(count)
        ]

    def without(self, removed_K: np.ndarray) -> np.ndarray:
        weights_N = np.ones(self.shape[0], np.float32)
        weights_N[removed_K] = 0
        return weights_N


def removed(fraction: float, n: int) -> int:
    """How many of n units a fraction stands for, at least one."""
    k = max(round(fraction * n), 1)
    if k >= n:
        raise InputError(f"--fraction {fraction} of {n} leaves nothing to train on; give a "
                         "smaller one")  # fmt: skip
    return k


def percent(fraction: float) -> str:
    return f"{100 * fraction:g}%"


def mean_line(
    method: str, statistic: str, values_Q: Sequence[float | None], share_Q: np.ndarray, seed: int
) -> Line:
    """Weighted mean over the queries that have a value, with a bootstrap over them."""
    known = np.array([i for i, value in enumerate(values_Q) if value is not None], np.int64)

    def mean(chosen: np.ndarray) -> float | None:
        return _mean(values_Q, share_Q, known[chosen])

    if not len(known):
        return Line(method, statistic, None, None, list(values_Q))
    interval = ranks.bootstrap(mean, len(known), seed)
    return Line(method, statistic, mean(np.arange(len(known))), interval, list(values_Q))


def lds(problem: Problem, fraction: float, count: int) -> Result:
    """Linear datamodeling score over `count` random subsets without `fraction` of the units.

    Queries are asked about the same retrains, so the interval is of both drawn anew.
    """
    n, columns = problem.shape
    sets = problem.random_sets(removed(fraction, n), count)
    losses_MQ = problem.retrain([problem.without(s) for s in (NOTHING, *sets)])
    base_Q, increase_MQ = losses_MQ[0], losses_MQ[1:] - losses_MQ[0]
    together_M = increase_MQ @ problem.share_Q
    increase_MC = together_M[:, None] if columns == 1 else increase_MQ
    share_C = np.ones(1) if columns == 1 else problem.share_Q
    lines, points = [], {}
    for name, scores_NC in problem.methods.items():
        predicted_MC = np.stack([scores_NC[s].sum(0) for s in sets])
        points[name] = predicted_MC.mean(1)
        rhos = functools.partial(_rhos, predicted_MC, increase_MC)
        random = np.random.default_rng([problem.seed, 3])

        def mean(chosen_M: np.ndarray, rhos: Any = rhos, random: Any = random) -> float | None:
            return _mean(rhos(chosen_M), share_C, random.integers(0, columns, columns))

        rho_C = rhos(np.arange(count))
        estimate = _mean(rho_C, share_C, np.arange(columns))
        interval = None if estimate is None else ranks.bootstrap(mean, count, problem.seed)
        lines.append(Line(name, "lds", estimate, interval, rho_C))
    details = {
        "base_losses": base_Q,
        "points": {"measured": together_M, "predicted": points},
    }
    subsets = [{"name": f"random {m}", "removed": s} for m, s in enumerate(sets)]
    return Result(lines, details, subsets)


def _rhos(
    predicted_MC: np.ndarray, increase_MC: np.ndarray, chosen_M: np.ndarray
) -> list[float | None]:
    """Rank correlation of every column over the chosen retrains."""
    columns = range(predicted_MC.shape[1])
    return [ranks.spearman(predicted_MC[chosen_M, c], increase_MC[chosen_M, c]) for c in columns]


def _mean(
    values_C: Sequence[float | None], share_C: np.ndarray, chosen: np.ndarray
) -> float | None:
    """Weighted mean of the chosen values that there are."""
    known = [c for c in chosen if values_C[c] is not None]
    share_K = share_C[known]
    return (
        float(np.array([values_C[c] for c in known]) @ share_K / share_K.sum()) if known else None
    )


def tail(problem: Problem, fractions: Sequence[float], count: int) -> Result:
    """Loss after removing each method's top or bottom, against `count` random removals.

    With a column for each query, each query has its own top, whose removal it alone is asked about.
    """
    n, columns = problem.shape
    methods = {name: x for name, x in problem.methods.items() if name != "random"}
    subsets: list[dict[str, Any]] = [{"name": "none", "fraction": 0.0, "removed": NOTHING}]
    for fraction in fractions:
        k = removed(fraction, n)
        sets = {f"random {m}": s for m, s in enumerate(problem.random_sets(k, count))}
        for name, scores_NC in methods.items():
            for c in range(columns):
                order = ranking(scores_NC[:, c], problem.seed)
                of = f" for query {c}" if columns > 1 else ""
                sets[f"{name}: top{of}"] = np.sort(order[:k])
                sets[f"{name}: bottom{of}"] = np.sort(order[-k:])
        subsets += [{"name": name, "fraction": fraction, "removed": s} for name, s in sets.items()]
    losses_MQ = problem.retrain([problem.without(s["removed"]) for s in subsets])
    increases = iter(losses_MQ[1:] - losses_MQ[0])
    lines, how = [], (problem.share_Q, problem.seed)
    curves: dict[str, dict[str, list[float]]] = {m: {"top": [], "bottom": []} for m in methods}
    random = []
    for at in map(percent, fractions):
        random_RQ = np.stack([next(increases) for _ in range(count)])
        random.append(random_RQ @ problem.share_Q)
        lines.append(mean_line("random", f"increase {at}", random_RQ.mean(0).tolist(), *how))
        for name in methods:
            own_C2Q = np.stack([(next(increases), next(increases)) for _ in range(columns)])
            own_2Q = own_C2Q[0] if columns == 1 else np.einsum("QEQ->EQ", own_C2Q)
            lines += _tail_lines(problem, name, at, own_2Q[0], random_RQ)
            for curve, side_Q in zip(curves[name].values(), own_2Q, strict=True):
                curve.append(float(side_Q @ problem.share_Q))
    details = {"base_losses": losses_MQ[0], "increase": {**curves, "random": random}}
    return Result(lines, details, subsets)


def _tail_lines(
    problem: Problem, name: str, at: str, top_Q: np.ndarray, random_RQ: np.ndarray
) -> list[Line]:
    how = (problem.share_Q, problem.seed)
    qld = mean_line(name, f"QLD {at}", (top_Q - random_RQ.mean(0)).tolist(), *how)
    if len(top_Q) == 1:  # one query: what is uncertain is what random rows do
        qld = qld._replace(interval=ranks.bootstrap(
            lambda chosen: float(top_Q[0] - random_RQ[chosen, 0].mean()), len(random_RQ),
            problem.seed,
        ))  # fmt: skip
    return [mean_line(name, f"increase {at}", top_Q.tolist(), *how), qld]


def weight_step(problem: Problem, sizes: Sequence[float]) -> Result:
    """Step the weights along each method's scores, both ways, by each of `sizes`.

    gain: decrease of the query's loss per unit of step. slope: measured over predicted decrease,
    by least squares; 1 for scores that are derivatives of the loss, of either sign and any size for
    others. correlation: of the two; -1 is a wrong sign.
    """
    steps_E = np.array(sorted({sign * size for size in sizes for sign in (-1, 1)}))
    scores = {name: scores_NC.mean(1) for name, scores_NC in problem.methods.items()}
    moved = {
        name: (scores_N - scores_N.mean()) / scores_N.std()
        for name, scores_N in scores.items()
        if np.ptp(scores_N)
    }
    weights = [1 + e * z_N for z_N in moved.values() for e in steps_E]
    losses_MQ = problem.retrain([problem.without(NOTHING), *weights])
    decreases = iter(np.split(losses_MQ[0] - losses_MQ[1:], max(len(moved), 1)))
    lines, points = [], {}
    for name, scores_N in scores.items():
        if name not in moved:
            lines.append(Line(name, "gain", None))
            continue
        decrease_EQ = next(decreases)
        predicted_E, measured_E = steps_E * (moved[name] @ scores_N), decrease_EQ @ problem.share_Q
        gain_Q = steps_E @ decrease_EQ / (steps_E @ steps_E)
        slope = float(measured_E @ predicted_E / (predicted_E @ predicted_E))
        lines += [
            mean_line(name, "gain", gain_Q.tolist(), problem.share_Q, problem.seed),
            Line(name, "slope", slope),
            Line(name, "correlation", ranks.pearson(predicted_E, measured_E)),
        ]
        points[name] = {"step": steps_E, "predicted": predicted_E, "measured": measured_E}
    return Result(lines, {"base_losses": losses_MQ[0], "points": points}, [])


def gold_rows(rows: Rows, query: Rows) -> list[np.ndarray]:
    """For each query the rows that state what it asks.

    The query's column `gold` names them by the rows' `id` (row numbers, if rows have none); or
    rows and query share a column `fact`. InputError for a query that has none.
    """
    column, shared = query.column("gold"), rows.column("fact")
    if column is not None:
        names = rows.column("id") or list(range(len(rows)))
        asked = [value if isinstance(value, list) else [value] for value in column]
    elif shared is not None and query.column("fact") is not None:
        names, asked = shared, [[value] for value in query.column("fact") or []]
    else:
        raise InputError(f"recall needs the rows that state each query: a column 'gold' in "
                         f"{query.path}, or a column 'fact' there and in {rows.path}")  # fmt: skip
    where: dict[Any, list[int]] = {}
    for i, name in enumerate(names):
        where.setdefault(name, []).append(i)
    found = []
    for j, wanted in enumerate(asked):
        unknown = [name for name in wanted if name is None or name not in where]
        if unknown or not wanted:
            raise InputError(f"{query.path} row {j} asks for {unknown or 'nothing'}, which no row "
                             f"of {rows.path} is; drop the query or correct it")  # fmt: skip
        found.append(np.array([i for name in wanted for i in where[name]]))
    return found


def recall(problem: Problem, gold: Sequence[np.ndarray]) -> Result:
    """Mean reciprocal rank, recall among the first k (any gold row), and strict recall (all)."""
    n, _ = problem.shape
    lines, places = [], {}
    for name, scores_NC in problem.methods.items():
        places[name] = [ranks.places(scores_NC[:, c], rows) for c, rows in enumerate(gold)]
        of_queries = {"MRR": [ranks.reciprocal_rank(p) for p in places[name]]}
        for k in (k for k in FIRST if k < n):
            of_queries[f"recall@{k}"] = [ranks.recall(p, k) for p in places[name]]
            of_queries[f"strict@{k}"] = [ranks.recall(p, k, strict=True) for p in places[name]]
        lines += [
            mean_line(name, statistic, values, problem.share_Q, problem.seed)
            for statistic, values in of_queries.items()
        ]
    best = {name: [float(p[0]) for p in found] for name, found in places.items()}
    return Result(lines, {"gold": list(gold), "best_place": best}, [])


def marked_rows(rows: Rows) -> np.ndarray:
    """Which rows [N] the column `mislabelled` marks; InputError unless some are and some not."""
    wrong_N = np.array([bool(mark) for mark in rows.column("mislabelled") or [False]])
    if wrong_N.all() or not wrong_N.any():
        raise InputError(f"{rows.path} has no column 'mislabelled' with both true and false; mark "
                         "the rows whose labels are wrong")  # fmt: skip
    return wrong_N


def mislabelled(problem: Problem, wrong_N: np.ndarray, self_influence: bool) -> Result:
    """AUC of finding the mislabelled rows.

    They should be opponents of a clean query, and high in loss, gradient norm and self-influence.
    """
    lines = []
    for name, scores_NC in problem.methods.items():
        similar = name in ("bm25", "embedding") or (name == "scores" and not self_influence)
        suspicion_N = scores_NC.mean(1) * (-1 if similar else 1)

        def area(chosen: np.ndarray, suspicion_N: np.ndarray = suspicion_N) -> float:
            return ranks.auc(suspicion_N[chosen], wrong_N[chosen])

        interval = ranks.bootstrap(area, len(wrong_N), problem.seed)
        lines.append(Line(name, "AUC", ranks.auc(suspicion_N, wrong_N), interval))
    return Result(lines, {"mislabelled": int(wrong_N.sum())}, [])
