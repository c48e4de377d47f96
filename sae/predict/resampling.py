"""How well a score ranks, and how sure one may be: a bootstrap over documents, all draws at once.

A draw takes G documents with replacement, and every row counts as often as its document was drawn
(Efron 1979; Cameron, Gelbach & Miller, "Bootstrap-based improvements for inference with clustered
errors", 2008). The same draws serve every predictor and every seed's test rows, so differences
are paired and rows that several seeds test are not taken for new ones. A weight of 2 is the same
as the row twice: the measures below equal those of `core.ranks` on repeated rows.

Dims: R draws, of which the first is the sample itself, G documents, N rows, U distinct scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from core.classification import weighted
from core.ranks import DRAWS

LEVEL = 0.95
HELD = 2**22  # weights of a block of draws


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


def draws(documents: int, seed: int = 0, count: int = DRAWS) -> np.ndarray:
    """How often each document is drawn, int32 [R,G]; the first row is all ones."""
    random = np.random.default_rng([seed, documents])
    share_G = np.full(documents, 1 / documents)
    drawn_RG = random.multinomial(documents, share_G, count).astype(np.int32)
    return np.concatenate([np.ones((1, documents), np.int32), drawn_RG])


def estimate(values_R: np.ndarray) -> Estimate:
    """Of a measure over draws: the first is the sample's; draws without a value are left out."""
    known = values_R[1:][np.isfinite(values_R[1:])]
    ends = np.quantile(known, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) if len(known) else (np.nan,) * 2
    return Estimate(float(values_R[0]), float(ends[0]), float(ends[1]))


class Measured(NamedTuple):
    """Measures of one score over draws, all [R]; NaN in draws that lack a class or all spread."""

    auroc: np.ndarray
    ap: np.ndarray
    spearman: np.ndarray


def measure(
    scores_N: np.ndarray,
    label_N: np.ndarray,
    actual_N: np.ndarray,
    document_N: np.ndarray,
    counts_RG: np.ndarray,
) -> Measured:
    """Measures of predicted scores of test rows, under every draw of documents.

    AUROC and AP are over rows with a label (1 or 0, -1 = none), Spearman's correlation with the
    actual score over all. document_N: into the columns of counts_RG.
    """
    labelled = label_N >= 0
    kinds = (scores_N[labelled], label_N[labelled] == 1, document_N[labelled])
    size = max(1, HELD // max(len(scores_N), 1))
    blocks = []
    for start in range(0, len(counts_RG), size):
        weights_RG = counts_RG[start : start + size].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            rho_R = spearman(scores_N, actual_N, weights_RG[:, document_N])
        blocks.append(
            (weighted(*kinds, weights_RG, "auroc"), weighted(*kinds, weights_RG, "ap"), rho_R)
        )
    return Measured(*(np.concatenate(parts) for parts in zip(*blocks, strict=True)))


def spearman(x_N: np.ndarray, y_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    """Rank correlation, ties at their mean rank, [R]."""
    mass_R1 = weights_RN.sum(1, keepdims=True)

    def centred(values_N: np.ndarray) -> np.ndarray:
        total_RU = _by_score(values_N)(weights_RN)
        rank_RU = total_RU.cumsum(1) - total_RU / 2  # less one half: the mean goes anyway
        rank_RN = rank_RU[:, np.unique(values_N, return_inverse=True)[1]]
        return rank_RN - mass_R1 / 2

    a_RN, b_RN = centred(x_N), centred(y_N)
    products = [np.einsum("RN,RN,RN->R", weights_RN, p, q)
                for p, q in ((a_RN, b_RN), (a_RN, a_RN), (b_RN, b_RN))]  # fmt: skip
    return products[0] / np.sqrt(products[1] * products[2])


def _by_score(scores_N: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """[R,N] -> [R,U]: sums over rows of one score, lowest score first."""
    order_N = np.argsort(scores_N, kind="stable")
    ordered_N = scores_N[order_N]
    starts_U = np.flatnonzero(np.r_[True, ordered_N[1:] != ordered_N[:-1]])
    return lambda values_RN: np.add.reduceat(values_RN[:, order_N], starts_U, axis=1)
