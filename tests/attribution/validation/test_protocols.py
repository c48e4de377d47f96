"""The protocols on a world whose losses are known: rows that each do what they do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attribution.validation import protocols
from attribution.validation.protocols import Problem
from core.errors import InputError
from core.rows import Rows

N, Q = 40, 6
EFFECT_NQ = np.random.default_rng(0).normal(size=(N, Q)) + np.linspace(-1, 1, N)[:, None]
NOISE_NQ = np.random.default_rng(1).normal(size=(N, Q))
SHARE_Q = np.full(Q, 1 / Q)


class World:
    """Additive: weight w of row i lowers the loss of query q by w * effect, from 100."""

    def __init__(self):
        self.asked = []

    def __call__(self, weights):
        self.asked += weights
        return np.stack([100 - w @ EFFECT_NQ for w in weights])


def problem(columns=Q, world=None, share_Q=SHARE_Q, **methods):
    methods = methods or {"scores": EFFECT_NQ, "noise": NOISE_NQ}
    kept = {k: x if columns == Q else x @ share_Q[:, None] for k, x in methods.items()}
    return Problem(kept, share_Q, world or World(), 3)


def by_name(result) -> dict[tuple[str, str], Any]:
    return {(line.method, line.statistic): line for line in result.lines}


@pytest.mark.parametrize("columns", [Q, 1])
def test_lds_of_the_truth_is_one(columns):
    world = World()
    found = protocols.lds(
        problem(columns, world, scores=EFFECT_NQ, wrong=-EFFECT_NQ, noise=NOISE_NQ), 0.1, 60
    )
    line = by_name(found)
    assert line["scores", "lds"].estimate == pytest.approx(1)
    assert line["wrong", "lds"].estimate == pytest.approx(-1)
    assert line["scores", "lds"].interval == pytest.approx((1, 1))
    noise = line["noise", "lds"]
    assert abs(noise.estimate) < 0.3
    assert noise.interval[0] < noise.estimate < noise.interval[1]
    assert len(noise.values) == columns
    # One run with all rows, then four rows less in each; what came before stays with more of them.
    assert [w.sum() for w in world.asked] == [N] + [N - 4] * 60
    more = protocols.lds(problem(columns), 0.1, 70).subsets
    for subset, longer, weights_N in zip(found.subsets, more, world.asked[1:], strict=False):
        np.testing.assert_array_equal(subset["removed"], np.flatnonzero(weights_N == 0))
        np.testing.assert_array_equal(subset["removed"], longer["removed"])
    points = found.details["points"]
    np.testing.assert_allclose(points["measured"], points["predicted"]["scores"], atol=1e-9)


def test_lds_of_kept_rows_is_the_same_number():
    """Sums over kept rows against -loss, as the literature has it."""
    world, mixed_NQ = World(), EFFECT_NQ + 2 * NOISE_NQ
    found = protocols.lds(problem(Q, world, scores=mixed_NQ), 0.5, 30)
    kept_MN = np.stack(world.asked[1:])
    output_MQ, predicted_MQ = -world(world.asked[1:]), kept_MN @ mixed_NQ
    rho_Q = [protocols.ranks.spearman(predicted_MQ[:, q], output_MQ[:, q]) for q in range(Q)]
    line = by_name(found)["scores", "lds"]
    assert line.values == pytest.approx(rho_Q)
    assert line.estimate == pytest.approx(sum(r or 0 for r in rho_Q) / Q)


def test_a_constant_score_has_no_lds():
    line = protocols.lds(problem(scores=np.ones((N, Q))), 0.1, 5).lines[0]
    assert line.estimate is None and line.interval is None


def test_tail_of_each_query():
    found = protocols.tail(problem(), [0.05, 0.1], 8)
    line = by_name(found)
    for fraction, k in (("5%", 2), ("10%", 4)):
        # The largest possible increase of each query: its own strongest rows gone.
        top_Q = np.sort(EFFECT_NQ, axis=0)[-k:].sum(0)
        assert line["scores", f"increase {fraction}"].values == pytest.approx(top_Q)
        drawn = [s["removed"] for s in found.subsets if s["name"].startswith("random")]
        random_RQ = np.stack([EFFECT_NQ[r].sum(0) for r in drawn if len(r) == k])
        qld = line["scores", f"QLD {fraction}"]
        assert qld.values == pytest.approx(top_Q - random_RQ.mean(0))
        assert qld.estimate == pytest.approx(np.mean(qld.values)) and qld.interval[0] > 0
        assert line["random", f"increase {fraction}"].estimate == pytest.approx(random_RQ.mean())
    bottom = [np.sort(EFFECT_NQ, axis=0)[:k].sum(0).mean() for k in (2, 4)]
    assert found.details["increase"]["scores"]["bottom"] == pytest.approx(bottom)
    assert ("random", "QLD 5%") not in line


def test_tail_of_all_queries_together():
    share_Q = np.arange(1.0, Q + 1) / np.arange(1, Q + 1).sum()
    found = protocols.tail(problem(1, share_Q=share_Q, scores=EFFECT_NQ), [0.1], 8)
    top = np.argsort(EFFECT_NQ @ share_Q)[-4:]
    line = by_name(found)["scores", "increase 10%"]
    assert line.values == pytest.approx(EFFECT_NQ[top].sum(0))
    assert line.estimate == pytest.approx(EFFECT_NQ[top].sum(0) @ share_Q)
    assert [len(s["removed"]) for s in found.subsets] == [0] + [4] * 10


def test_tail_of_one_query_is_unsure_about_the_random_rows():
    one = Problem({"scores": EFFECT_NQ[:, :1]}, np.ones(1), lambda w: World()(w)[:, :1], 3)
    qld = by_name(protocols.tail(one, [0.1], 8))["scores", "QLD 10%"]
    assert qld.interval[0] < qld.estimate < qld.interval[1]


@pytest.mark.parametrize("turn", [1, -1])
def test_weight_step_knows_scale_and_sign(turn):
    wrong_NQ = turn * 3 * EFFECT_NQ
    line = by_name(protocols.weight_step(problem(1, scores=wrong_NQ), [0.1, 0.2]))
    assert line["scores", "slope"].estimate == pytest.approx(turn / 3)
    assert line["scores", "correlation"].estimate == pytest.approx(turn)
    effect_N = EFFECT_NQ.mean(1)
    # d loss / d e = -z . effect = -N sd(effect), for the truth's own direction.
    assert line["scores", "gain"].estimate == pytest.approx(turn * N * effect_N.std())
    flat = protocols.weight_step(problem(1, scores=np.ones((N, Q))), [0.1])
    assert [line.estimate for line in flat.lines] == [None]


class Table(Rows):
    """Rows with columns and nothing else."""

    def __len__(self):
        return 3

    def __init__(self, **columns):
        self.path, self.held = Path("rows"), columns

    def column(self, name):
        return self.held.get(name)


def test_gold_by_id_by_number_and_by_fact():
    def gold(rows, query):
        return [g.tolist() for g in protocols.gold_rows(Table(**rows), Table(**query))]

    asked = {"gold": [["c"], ["a", "b"]]}
    assert gold({"id": ["a", "b", "c", "a"]}, asked) == [[2], [0, 3, 1]]
    assert gold({}, {"gold": [2, 0]}) == [[2], [0]]
    assert gold({"fact": ["x", None, "y", "x"]}, {"fact": ["y", "x"]}) == [[2], [0, 3]]
    with pytest.raises(InputError, match="column 'gold'"):
        gold({"id": ["a"]}, {})
    with pytest.raises(InputError, match=r"row 1 asks for \['z'\]"):
        gold({"fact": ["x"]}, {"fact": ["x", "z"]})
    with pytest.raises(InputError, match="row 0 asks for nothing"):
        gold({"id": ["a"]}, {"gold": [[]]})


def test_recall_by_hand():
    scores_NQ = np.stack([np.arange(N), -np.arange(N)], 1).astype(float)
    two = Problem({"scores": scores_NQ, "even": np.ones((N, 2))}, np.full(2, 0.5), World(), 0)
    found = protocols.recall(two, [np.array([38, 5]), np.array([0, 9])])
    line = {key: line.estimate for key, line in by_name(found).items()}
    assert line["scores", "MRR"] == (1 / 2 + 1) / 2
    assert (line["scores", "recall@1"], line["scores", "recall@10"]) == (0.5, 1)
    assert (line["scores", "strict@1"], line["scores", "strict@10"]) == (0, 0.5)
    assert line["even", "MRR"] == pytest.approx(2 / (N + 1)) and line["even", "recall@10"] == 0
    assert ("scores", "recall@100") not in line  # there are not as many rows
    assert found.details["best_place"]["scores"] == [2, 1]


def test_mislabelled_rows_are_opponents_and_have_high_losses():
    wrong_N = np.zeros(N, bool)
    wrong_N[:4] = True
    harm_N1 = np.where(wrong_N, -1.0, 1.0)[:, None] * (1 + np.arange(N)[:, None])
    methods = {"scores": harm_N1, "loss": -harm_N1, "bm25": -harm_N1}
    world = Problem(methods, np.ones(1), World(), 0)
    found = {line.method: line for line in protocols.mislabelled(world, wrong_N, False).lines}
    assert {name: line.estimate for name, line in found.items()} == {
        "scores": 1, "loss": 1, "bm25": 0,
    }  # fmt: skip
    assert found["scores"].interval == (1, 1)
    self_influence = protocols.mislabelled(world, wrong_N, True).lines[0]
    assert self_influence.estimate == 0  # a high self-influence is suspicious, a low one is not
    for marks in (None, [True] * N, [False, None]):
        with pytest.raises(InputError, match="no column 'mislabelled'"):
            protocols.marked_rows(Table(mislabelled=marks))


def test_a_fraction_that_leaves_nothing():
    assert protocols.removed(0.001, 40) == 1 and protocols.removed(0.5, 40) == 20
    with pytest.raises(InputError, match="--fraction 0.9"):
        protocols.removed(0.9, 4)
