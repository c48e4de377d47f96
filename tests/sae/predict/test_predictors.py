"""Predictors against closed forms, the optimum of their objective, and signals planted for them."""

import numpy as np
import pytest

from core import logistic
from core.ranks import auc
from sae.predict import attention
from sae.predict.attention import Bags
from sae.predict.predictors import (
    PENALTIES,
    Fingerprint,
    Question,
    answer_columns,
    answer_fingerprint,
    fit,
    fit_fingerprint,
    standardised,
)
from sae.predict.splits import TEST, TRAIN, split

INDEX_NK = np.array([[3, 1, -1], [1, 0, -1], [2, 3, 4], [3, -1, -1]], np.int32)
VALUE_NK = np.array([[4.0, 2, 0], [6, 1, 0], [8, 2, 1], [2, 0, 0]], np.float32)


def question(n: int, positive_N: np.ndarray, seed: int = 0) -> Question:
    part_N = split(np.arange(n), np.ones(n, bool), seed)
    return Question(positive_N.astype(np.int8), part_N, seed)


def test_a_feature_is_read_in_its_own_unit_over_the_training_rows():
    view = Fingerprint(INDEX_NK, VALUE_NK, 6)
    scale_F = view.scale(np.array([0, 1]))
    assert scale_F.tolist() == [1, 4, 0, 4, 0, 0]
    _, x_NK = view.read(np.arange(4), scale_F)
    expected = np.log1p([[1, 0.5, 0], [1.5, 1, 0], [0, 0.5, 0], [0.5, 0, 0]])
    np.testing.assert_allclose(x_NK, expected, rtol=1e-12)  # 2 and 4 are not in the vocabulary
    known_V = np.arange(5)
    dense_NV = view.dense(np.arange(4), scale_F, known_V)
    np.testing.assert_allclose(dense_NV[2], [0, 0, 0, np.log1p(0.5), 0], rtol=1e-6)
    _, present_NK = view._replace(reading="present").read(np.arange(4), scale_F)
    assert present_NK.tolist() == [[1, 1, 0], [1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert view.first(1).index_NK.tolist() == [[3], [1], [2], [3]]


def test_units_of_features_do_not_matter():
    unit_F = np.array([10, 0.1, 3, 7, 1, 1])
    scaled = Fingerprint(INDEX_NK, VALUE_NK * np.where(INDEX_NK < 0, 1, unit_F[INDEX_NK]), 6)
    rows = np.arange(4)
    for view in (Fingerprint(INDEX_NK, VALUE_NK, 6), scaled):
        x_NK = view.read(rows, view.scale(rows))[1]
    np.testing.assert_allclose(
        x_NK, Fingerprint(INDEX_NK, VALUE_NK, 6).read(rows, np.array([1, 4, 8, 8 / 3, 1, 0]))[1]
    )


def test_columns_are_standardised_by_training_rows_and_unknowns_are_the_mean():
    x_NC = np.array([[1.0, 5, np.nan], [3, 5, 2], [100, 5, 4], [np.nan, 7, 4]])
    found = standardised(x_NC, np.array([0, 1]))
    np.testing.assert_allclose(found[:, 0], [-1, 1, 98, 0])
    assert not found[:, 1].any(), "it is constant among the training rows"
    assert not found[:, 2].any()


def test_a_wide_fit_is_the_optimum_of_the_same_objective(relative):
    """Turned into the span of its rows or not, and whatever the padding."""
    random = np.random.default_rng(0)
    x_LV = random.normal(size=(20, 16)).astype(np.float32)
    positive_L = x_LV[:, 0] + random.normal(size=20) > 0
    direct = logistic.fit(x_LV[None], positive_L, PENALTIES)
    narrow = fit(x_LV, positive_L, PENALTIES, 36)
    # Columns of zeros make it wide and change nothing.
    wide = fit(np.pad(x_LV, ((0, 0), (0, 32))), positive_L, PENALTIES, 36)
    for i in range(len(PENALTIES)):
        expected = direct.coef_LGD[0, i]
        assert relative(narrow[i].weight, expected) < 1e-6
        assert relative(wide[i].weight[:16], expected) < 1e-6
        assert not wide[i].weight[16:].any()
        assert wide[i].bias == pytest.approx(direct.intercept_LG[0, i], abs=1e-6)


def test_weights_say_what_the_logits_say():
    """Sparse and dense ways to a logit agree, and features outside the vocabulary weigh nothing."""
    random, n, features = np.random.default_rng(1), 60, 90
    index_NK = np.stack([random.permutation(features)[:8] for _ in range(n)]).astype(np.int32)
    view = Fingerprint(index_NK, random.random((n, 8)).astype(np.float32), features)
    asked = question(n, np.arange(n) % 2 == 0)
    fits, scale_F = fit_fingerprint(view, asked, PENALTIES, 36)
    one = fits[-2]
    dense_NV = view.dense(np.arange(n), scale_F, np.arange(features))
    np.testing.assert_allclose(
        view.logits(scale_F, one), dense_NV @ one.weight + one.bias, atol=1e-6
    )
    unseen = np.setdiff1d(np.arange(features), index_NK[asked.rows(TRAIN)])
    assert len(unseen) and not one.weight[unseen].any() and not scale_F[unseen].any()


def test_what_test_rows_hold_changes_no_classifier():
    random, n = np.random.default_rng(2), 60
    index_NK = np.stack([random.permutation(90)[:8] for _ in range(n)]).astype(np.int32)
    value_NK = random.random((n, 8)).astype(np.float32)
    asked = question(n, np.arange(n) % 2 == 0)
    held, other = asked.part_N == TEST, value_NK.copy()
    other[held] *= 50
    views = [Fingerprint(index_NK, values, 90) for values in (value_NK, other)]
    first, second = (answer_fingerprint(view, asked, (4, 8), 36) for view in views)
    assert first.chosen == second.chosen and first.validation == second.validation
    np.testing.assert_array_equal(first.logit_N[~held], second.logit_N[~held])
    assert not np.array_equal(first.logit_N[held], second.logit_N[held])
    x_NC = random.normal(size=(n, 3))
    moved_NC = np.where(held[:, None], 1e3, x_NC)
    columns = [answer_columns(x, asked, 36) for x in (x_NC, moved_NC)]
    np.testing.assert_array_equal(columns[0].logit_N[~held], columns[1].logit_N[~held])


def test_attention_sees_one_token_that_a_fingerprint_of_the_mean_has_lost(standard_promotion):
    """A weak feature of one token is not among the largest of the row's means."""
    random, n, tokens, k, features = np.random.default_rng(0), 400, 16, 4, 120
    positive_N = np.arange(n) % 2 == 0
    index_SK = np.stack([20 + random.permutation(100)[:k] for _ in range(n * tokens)])
    value_SK = random.uniform(5, 10, index_SK.shape)
    at = np.arange(n) * tokens + random.integers(0, tokens, n)
    index_SK[at, 0] = np.where(positive_N, 3, 4 + random.integers(0, 9, n))
    value_SK[at, 0] = 0.5
    asked = question(n, positive_N)
    bags = Bags(np.arange(n + 1) * tokens, index_SK.astype(np.int32),
                value_SK.astype(np.float32), features)  # fmt: skip
    _, scale_F, answer = attention.train(bags, asked)
    rows = asked.rows(TEST)
    assert auc(answer.logit_N[rows], asked.positive(rows)) > 0.9
    again = attention.train(bags, asked)[2]
    np.testing.assert_array_equal(answer.logit_N, again.logit_N)

    mean_NF = np.zeros((n, features))
    np.add.at(mean_NF, (np.repeat(np.arange(n), tokens * k), index_SK.ravel()), value_SK.ravel())
    index_NK = np.argsort(-mean_NF, 1)[:, :16].astype(np.int32)
    mean = Fingerprint(index_NK, np.take_along_axis(mean_NF, index_NK, 1), features)
    lost = answer_fingerprint(mean, asked, (16,), 240)
    assert abs(auc(lost.logit_N[rows], asked.positive(rows)) - 0.5) < 0.15
    assert scale_F[3] == pytest.approx(0.5)


def test_a_bag_is_the_same_alone_and_among_longer_ones():
    """Padding tokens get no attention, and rows without a token do no harm."""
    random = np.random.default_rng(0)
    network = attention.start(9, 2, 0) | {"query": random.normal(size=attention.WIDTH) * 3}
    network["query"] = network["query"].astype(np.float32)
    index_SK = random.integers(0, 9, (10, 2)).astype(np.int32)
    value_SK = random.random((10, 2)).astype(np.float32)
    together = Bags(np.array([0, 2, 2, 10]), index_SK, value_SK, 9)
    alone = Bags(np.array([0, 2]), index_SK, value_SK, 9)
    one = attention.logits(network, alone, np.ones(9), np.arange(1))
    three = attention.logits(network, together, np.ones(9), np.arange(3))
    np.testing.assert_allclose(three[0], one[0], rtol=1e-5)
    assert np.isfinite(three).all()
