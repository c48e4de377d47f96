"""Predicting a class of rows from numbers: logistic regression on what each predictor sees.

A fingerprint is sparse, so a row's features are read as

    x_f = log(1 + v_f / s_f),    s_f = mean v_f over the training rows that have f

in the feature's own unit, with long tails drawn in, and a feature that one row has counting no more
than one that all have. Features that no training row has are not in the vocabulary and read 0.
Other predictors are columns, less their mean over the training rows and divided by their deviation.
The penalty C, and how many of the largest features are kept, are those of the best AUROC on the
validation rows; of equals the smaller.

Dims: N rows, L rows a fit learns from, K features of a fingerprint, F all features of the SAE,
V features any row has, C columns, P rows of a fit with padding.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from core import logistic
from core.ranks import auc
from sae.predict.splits import TRAIN, VALIDATION

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
COLUMNS = 16  # at least, of a fit: a few columns compile once, whatever their number
SPAN = 2048  # rows up to which their eigenvectors cost less than they save
BLOCK = 2**20  # entries of fingerprints whose logits are made at once

Reading = Literal["value", "present"]


class Question(NamedTuple):
    """What a predictor is asked: classes int8 [N], -1 = none, and parts of the rows int8 [N]."""

    label_N: np.ndarray
    part_N: np.ndarray
    seed: int

    def rows(self, part: int) -> np.ndarray:
        """Numbers of the labelled rows of a part."""
        return np.flatnonzero((self.part_N == part) & (self.label_N >= 0))

    def positive(self, rows_L: np.ndarray) -> np.ndarray:
        return self.label_N[rows_L] == 1

    def validation(self, logit_N: np.ndarray) -> float:
        """AUROC on the validation rows."""
        rows_L = self.rows(VALIDATION)
        return auc(logit_N[rows_L], self.positive(rows_L))


class Answer(NamedTuple):
    """Logits of all rows [N], AUROC on the validation rows, and what was chosen on them."""

    logit_N: np.ndarray
    validation: float
    chosen: dict[str, Any]


class Linear(NamedTuple):
    """logit = bias + sum of weight times feature; weights are of columns [C] or features [F]."""

    weight: np.ndarray
    bias: float


class Fingerprint(NamedTuple):
    """The largest features of every row, [N,K], -1 = none; present: read x_f as 1."""

    index_NK: np.ndarray
    value_NK: np.ndarray
    features: int
    reading: Reading = "value"

    def first(self, k: int) -> "Fingerprint":
        return self._replace(index_NK=self.index_NK[:, :k], value_NK=self.value_NK[:, :k])

    def scale(self, rows_L: np.ndarray) -> np.ndarray:
        """s_f [F] over these rows, 0 outside their vocabulary."""
        return typical([(self.index_NK[rows_L], self.value_NK[rows_L])], self.features)

    def read(self, rows_B: np.ndarray, scale_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Feature numbers (0 for none) and x, both [B,K]."""
        index_BK, value_BK = self.index_NK[rows_B], self.value_NK[rows_B]
        x_BK = compressed(index_BK, value_BK, scale_F)
        return index_BK.clip(min=0), (x_BK > 0) * 1.0 if self.reading == "present" else x_BK

    def dense(self, rows_L: np.ndarray, scale_F: np.ndarray, known_V: np.ndarray) -> np.ndarray:
        """x of the features known_V, ascending, float32 [L,V]."""
        index_LK, x_LK = self.read(rows_L, scale_F)
        out_LV = np.zeros((len(rows_L), len(known_V)), np.float32)
        row_L1 = np.arange(len(rows_L))[:, None]
        np.add.at(out_LV, (row_L1, np.searchsorted(known_V, index_LK)), x_LK)
        return out_LV

    def logits(self, scale_F: np.ndarray, linear: Linear) -> np.ndarray:
        """Of every row, float64 [N]."""
        n, k = self.index_NK.shape
        size, out_N = max(1, BLOCK // k), np.zeros(n)
        for start in range(0, n, size):
            rows_B = np.arange(start, min(start + size, n))
            index_BK, x_BK = self.read(rows_B, scale_F)
            out_N[rows_B] = linear.bias + (linear.weight[index_BK] * x_BK).sum(1)
        return out_N


def typical(blocks: Iterable[tuple[np.ndarray, np.ndarray]], features: int) -> np.ndarray:
    """Mean value of every feature where it is active, float64 [F]; 0 where it never is.

    blocks: feature numbers, -1 = none, and their values.
    """
    count_F, sum_F = np.zeros(features), np.zeros(features)
    for index, value in blocks:
        active = index >= 0
        count_F += np.bincount(index[active], minlength=features)
        sum_F += np.bincount(index[active], value[active].astype(np.float64), features)
    return sum_F / np.maximum(count_F, 1)


def compressed(index: np.ndarray, value: np.ndarray, scale_F: np.ndarray) -> np.ndarray:
    """x of entries of any shape, float64; 0 for no feature and for those outside the vocabulary."""
    scale = np.where(index >= 0, scale_F[index], 0)
    return np.where(scale > 0, np.log1p(value / np.where(scale > 0, scale, 1)), 0)


def standardised(x_NC: np.ndarray, rows_L: np.ndarray) -> np.ndarray:
    """Columns in deviations from the mean, both over rows_L; unknown (NaN) reads as the mean."""
    known_LC = np.isfinite(x_NC[rows_L])
    x_LC = np.where(known_LC, x_NC[rows_L], 0).astype(np.float64)
    count_C = np.maximum(known_LC.sum(0), 1)
    mean_C = x_LC.sum(0) / count_C
    spread_C = np.sqrt((known_LC * (x_LC - mean_C) ** 2).sum(0) / count_C)
    # A constant column has rounding left of it at most.
    spread_C = np.where(spread_C > 1e-9 * np.abs(mean_C), spread_C, np.inf)
    return np.where(np.isfinite(x_NC), (x_NC - mean_C) / spread_C, 0)


def fit(
    x_LV: np.ndarray, positive_L: np.ndarray, penalties: Sequence[float], size: int
) -> list[Linear]:
    """Logistic regressions of one set of rows, one for each penalty C.

    size: rows the fit is padded to with rows of no weight, so that several sets compile once.
    Where there are more features than that, some rows are first turned into their own span, in
    which the optimum lies (the representer theorem): an isometry, so the penalty is the same.
    """
    pad, width = size - len(x_LV), x_LV.shape[1]
    x_PV = np.pad(x_LV, ((0, pad), (0, max(0, COLUMNS - width))))
    positive_P, weights_P = np.pad(positive_L, (0, pad)), np.pad(np.ones(len(x_LV)), (0, pad))
    if x_PV.shape[1] <= size or size > SPAN:
        found = logistic.fit(x_PV[None], positive_P, penalties, weights_P)
        weight_GV = found.coef_LGD[0]
    else:
        wide_PV = x_PV.astype(np.float64)
        value_P, vector_PP = np.linalg.eigh(np.einsum("PV,QV->PQ", wide_PV, wide_PV, optimize=True))
        kept_P = value_P > 1e-12 * value_P[-1]
        root_P = np.sqrt(np.where(kept_P, value_P, 1))
        turned_PP = vector_PP * np.where(kept_P, root_P, 0)
        found = logistic.fit(turned_PP[None], positive_P, penalties, weights_P)
        along_GP = found.coef_LGD[0] * kept_P / root_P @ vector_PP.T
        weight_GV = along_GP @ wide_PV
    weight_GV = weight_GV[:, :width]
    biases = found.intercept_LG[0].tolist()
    return [Linear(weight, bias) for weight, bias in zip(weight_GV, biases, strict=True)]


def answer_columns(x_NC: np.ndarray, question: Question, size: int) -> Answer:
    """Logistic regression on standardised columns."""
    rows_L = question.rows(TRAIN)
    x_NC = standardised(x_NC, rows_L)
    fits = fit(x_NC[rows_L], question.positive(rows_L), PENALTIES, size)
    settings = [{"C": c} for c in PENALTIES]
    return _best(question, fits, settings, lambda one: x_NC @ one.weight + one.bias)


def answer_fingerprint(
    fingerprint: Fingerprint, question: Question, ks: Sequence[int], size: int
) -> Answer:
    """Logistic regression on fingerprints of the k largest features, k one of ks."""
    answers = []
    for k in ks:
        view = fingerprint.first(k)
        fits, scale_F = fit_fingerprint(view, question, PENALTIES, size)
        settings = [{"C": c, "k": k} for c in PENALTIES]
        logits = functools.partial(view.logits, scale_F)
        answers.append(_best(question, fits, settings, logits))
    return max(answers, key=lambda answer: answer.validation)


def fit_fingerprint(
    fingerprint: Fingerprint, question: Question, penalties: Sequence[float], size: int
) -> tuple[list[Linear], np.ndarray]:
    """A classifier for each penalty, with weights [F], and the vocabulary's scale [F]."""
    rows_L = question.rows(TRAIN)
    scale_F = fingerprint.scale(rows_L)
    # Of all rows: columns that the training rows lack keep the weight 0, and one shape for all.
    known_V = np.unique(fingerprint.index_NK.clip(min=0))
    x_LV = fingerprint.dense(rows_L, scale_F, known_V)
    fits = []
    for one in fit(x_LV, question.positive(rows_L), penalties, size):
        weight_F = np.zeros(fingerprint.features)
        weight_F[known_V] = one.weight
        fits.append(one._replace(weight=weight_F))
    return fits, scale_F


def _best(
    question: Question,
    fits: Sequence[Linear],
    settings: Sequence[dict[str, Any]],
    logits: Callable[[Linear], np.ndarray],
) -> Answer:
    answers = [
        Answer(logit_N := logits(one), question.validation(logit_N), setting)
        for one, setting in zip(fits, settings, strict=True)
    ]
    return max(answers, key=lambda answer: answer.validation)  # the first of equals
