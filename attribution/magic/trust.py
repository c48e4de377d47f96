"""Whether a MAGIC run's scores are to be trusted, in words, from what the run knows of itself.

Scores are derivatives at w = 1. They say what retraining without a token does as far as training
is smooth in the weights, computed exactly, and moves the model at all: three things that can be
looked at without one retrain, and that `attribute validate` measures with many.
"""

from typing import NamedTuple

# Runs of the literature with a metasmoothness of 0.88 or less had an LDS of at most 0.17, those
# with 0.98 or more one of 0.43 to 0.98: needed, but not enough (Bergson's table for GPT-2).
SMOOTH = 0.9
# Between the two our own study (docs/magic.md) has an LDS of 0.80.
VERY_SMOOTH = 0.95
# The same study: 0.88 with 1e-17 or none, 0.95 and more from here on.
EPS_ROOT = 1e-10
# Our choice: a change of 1 % in the probability of a token.
LOSS_DROP = 0.01
# Our choice: far below the 1e-3 and more of runs whose loss falls visibly.
DISPLACEMENT = 1e-4
# Our choice: a replay that ends further off, by its share of the run's way, is another training.
REPLAY = 0.01

REMEDIES = "a larger --eps-root or --batch, a smaller --lr or fewer steps"


class Facts(NamedTuple):
    """Of one run. loss_drop: of the query, nats. displacement: ||end - start|| / ||start||.

    smoothness: None where it was not measured, or has no value. dropout: on in training. replay:
    how far from the end of an earlier run its replay ended, as a share of that run's displacement.
    """

    finite: bool
    optimizer: str
    eps_root: float
    loss_drop: float
    displacement: float
    smoothness: float | None
    dropout: bool
    dtype: str
    steps: int
    replay: float = 0.0


class Trust(NamedTuple):
    """verdict: `trusted`, `doubtful` or `not to be trusted`. reasons: sentences, worst first."""

    verdict: str
    reasons: list[str]


def trust(facts: Facts) -> Trust:
    """The worst of all reasons decides."""
    adaptive, adam = facts.optimizer != "sgd", facts.optimizer == "adamw"
    root = f"--eps-root {facts.eps_root:g}"
    wrong, doubts = [], []
    if not facts.finite:
        wrong.append(
            f"Some scores are not finite: the derivative overflowed within {facts.steps} steps"
            + (f" ({root}: where a gradient is near 0, 1 / sqrt(v) has none)" if adaptive else "")
            + f"; try {REMEDIES}."
        )
    if facts.smoothness is not None and facts.smoothness < SMOOTH:
        wrong.append(
            f"Metasmoothness is {facts.smoothness:.2f}, below {SMOOTH}: the end of training is not "
            f"smooth in the weights, and derivatives predict retraining badly; try {REMEDIES}."
        )
    if facts.dtype == "bfloat16":
        wrong.append("Derivatives through bfloat16 steps are mostly rounding; use --dtype float32.")
    if facts.replay > REPLAY:
        wrong.append(
            f"The replay ended {100 * facts.replay:.1g} % of the way from where the run had ended: "
            "the scores are about another training; replay on the same kind of machine, or train "
            "in float32."
        )
    if facts.smoothness is not None and SMOOTH <= facts.smoothness < VERY_SMOOTH:
        doubts.append(
            f"Metasmoothness is {facts.smoothness:.2f}, below {VERY_SMOOTH}: derivatives may "
            f"predict retraining only roughly; try {REMEDIES}."
        )
    if adam and facts.eps_root < EPS_ROOT:
        doubts.append(
            f"With {root} the derivative of 1 / sqrt(v) is nearly unbounded where v is near 0; "
            "1e-8 to 1e-6 make it smooth: look at how much the model still learns."
        )
    if adaptive and facts.smoothness is None:
        doubts.append(
            f"Whether {facts.optimizer} with {root} is smooth in the weights was not measured; run "
            "`attribute metasmoothness`."
        )
    if facts.loss_drop < 0:
        doubts.append(
            f"The query's loss rose by {-facts.loss_drop:.3g} nats: the scores explain a training "
            "that did not teach the query."
        )
    barely = [
        f"the query's loss fell by {facts.loss_drop:.2g} nats"
        if 0 <= facts.loss_drop < LOSS_DROP
        else "",
        f"parameters moved by {facts.displacement:.1g} of their length"
        if facts.displacement < DISPLACEMENT
        else "",
    ]
    if any(barely):
        cause = f", {root} and --lr" if adaptive and facts.eps_root else ", --lr and the steps"
        doubts.append(
            f"The model barely trained ({' and '.join(filter(None, barely))}): training so close "
            "to linear is predicted well by any derivative, which says little about one that "
            f"learns; look at{cause.removeprefix(',')}."
        )
    if facts.dropout:
        doubts.append(
            "Dropout was on: the scores are about one draw of its masks, and in measurements of "
            "others did not predict retraining; use --dropout 0."
        )
    verdict = "not to be trusted" if wrong else "doubtful" if doubts else "trusted"
    return Trust(verdict, wrong + doubts)


def smoothness_in_words(smoothness: float | None) -> str:
    """One sentence about a metasmoothness; None: it has no value."""
    if smoothness is None:
        return "a training ended in numbers that are not finite, or no parameter moved at all"
    if smoothness >= SMOOTH:
        return (
            f"training is smooth in the weights of its rows (at least {SMOOTH}), as MAGIC's scores "
            "need; that they predict retraining is for `attribute validate` to say"
        )
    return (
        f"MAGIC's first-order scores will predict retraining badly (below {SMOOTH}); what helps: "
        f"{REMEDIES}"
    )
