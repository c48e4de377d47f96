"""What a score run says about its rows, against computation by hand."""

import numpy as np
import pytest

from attribution.diagnostics import diagnose, ranking
from core.files import read_json, read_jsonl

LENGTHS = [6, 12, 9, 15]
SCORES = np.array([0.5, -1.0, 2.0, 0.25], np.float32)


def test_rank_percentile_and_statistics_by_hand(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS, source=["x", "y", "x", None], doc=[7, 7, 8, 9])
    norms_N, losses_N = np.array([1.0, 4, 2, 3]), rows.trained * np.array([1.0, 2, 3, 4])
    summary = diagnose(tmp_path, rows, SCORES, norms_N, losses_N)
    lines = read_jsonl(tmp_path / "row_diagnostics.jsonl")
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert [line["score"] for line in lines] == [0.5, -1.0, 2.0, 0.25]
    assert [line["rank"] for line in lines] == [1, 3, 0, 2]
    assert [line["percentile"] for line in lines] == [62.5, 12.5, 87.5, 37.5]
    assert [line["length"] for line in lines] == LENGTHS
    assert [line["trained"] for line in lines] == [5, 8, 8, 10]  # every second has a prompt
    assert [line["norm"] for line in lines] == [1, 4, 2, 3]
    assert [line["loss"] for line in lines] == [1, 2, 3, 4]
    assert [line["source"] for line in lines] == ["x", "y", "x", None]
    assert [line["doc"] for line in lines] == [7, 7, 8, 9]
    assert summary == read_json(tmp_path / "summary.json")
    assert summary["rows"] == 4
    assert summary["score"]["mean"] == pytest.approx(0.4375)
    assert summary["score"]["sd"] == pytest.approx((1.328125 - 0.4375**2) ** 0.5)
    assert summary["score"]["median"] == pytest.approx(0.375)
    # Ranks of the scores 3 1 4 2, of the lengths 1 3 2 4: 1 - 6 (4 + 4 + 4 + 4) / 60.
    assert summary["correlation"]["length"] == pytest.approx(1 - 6 * 16 / 60)
    # Of the norms 1 4 2 3: 1 - 6 (4 + 9 + 4 + 1) / 60. Of the losses 1 2 3 4: squares 4 1 1 4.
    assert summary["correlation"]["norm"] == pytest.approx(1 - 6 * 18 / 60)
    assert summary["correlation"]["loss"] == pytest.approx(1 - 6 * 10 / 60)
    assert [line["row"] for line in summary["top"]] == [2, 0, 3, 1]
    assert [line["row"] for line in summary["bottom"]] == [1, 3, 0, 2]
    assert {name: s["rows"] for name, s in summary["sources"].items()} == {
        "None": 1,
        "x": 2,
        "y": 1,
    }
    assert summary["sources"]["x"]["mean"] == pytest.approx(1.25)
    assert summary["sources"]["y"]["median"] == pytest.approx(-1)


def test_rows_without_provenance_and_a_score_for_each_query(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    ones_N = np.ones(4)
    summary = diagnose(tmp_path, rows, np.stack([SCORES, SCORES + 1], 1), ones_N, ones_N)
    assert [line["row"] for line in summary["top"]] == [2, 0, 3, 1]
    assert summary["top"][0]["score"] == 2.5 and summary["top"][0]["source"] is None
    assert summary["correlation"]["norm"] is None  # constant: there is none
    assert "sources" not in summary


def test_rows_that_were_not_scored_are_left_out(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", [*LENGTHS, 7], source=["x", "y", "x", "y", "z"])
    scores_N, losses_N = np.append(SCORES, np.nan), np.append(np.arange(4.0), np.nan)
    summary = diagnose(tmp_path, rows, scores_N, None, losses_N)
    whole = tiny.rows(tmp_path / "whole", LENGTHS, source=["x", "y", "x", "y"])
    assert summary == diagnose(tmp_path / "whole", whole, SCORES, None, losses_N[:4])
    assert [line["row"] for line in read_jsonl(tmp_path / "row_diagnostics.jsonl")] == [0, 1, 2, 3]
    assert summary["rows"] == 4 and set(summary["sources"]) == {"x", "y"}
    assert summary["correlation"]["norm"] is None and summary["top"][0]["norm"] is None


def test_derivatives_are_ranked_from_the_most_negative(tiny, tmp_path):
    """Scores stay as they are in the file; places and correlations are of proponents."""
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    losses_N = rows.trained * np.array([1.0, 2, 3, 4])
    plain = diagnose(tmp_path, rows, SCORES, None, losses_N)
    lines = read_jsonl(tmp_path / "row_diagnostics.jsonl")
    turned = diagnose(tmp_path, rows, -SCORES, None, losses_N, turn=-1.0)
    again = read_jsonl(tmp_path / "row_diagnostics.jsonl")
    assert [line["rank"] for line in again] == [line["rank"] for line in lines] == [1, 3, 0, 2]
    assert [line["percentile"] for line in again] == [line["percentile"] for line in lines]
    assert [line["score"] for line in again] == [-line["score"] for line in lines]
    assert turned["correlation"] == plain["correlation"]
    assert [line["row"] for line in turned["top"]] == [2, 0, 3, 1]
    assert turned["score"]["mean"] == -plain["score"]["mean"]


def test_scores_that_overflowed_are_left_out(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", LENGTHS, source=list("xyxy"))
    summary = diagnose(tmp_path, rows, np.array([np.inf, 1, np.nan, 2.0]), None, None)
    assert summary["rows"] == 2 and [line["row"] for line in summary["top"]] == [3, 1]
    assert summary["top"][0]["loss"] is None and summary["correlation"]["loss"] is None
    none = diagnose(tmp_path, rows, np.full(4, np.nan), None, None)
    assert none["rows"] == 0 and none["top"] == [] and none["score"]["mean"] is None
    assert none["correlation"] == {"length": None, "norm": None, "loss": None}


def test_ranking_is_a_permutation_from_the_top_down():
    scores_N = np.random.default_rng(0).integers(0, 5, 200).astype(np.float64)
    order = ranking(scores_N, seed=4)
    assert sorted(order.tolist()) == list(range(200))
    assert (np.diff(scores_N[order]) <= 0).all()
    np.testing.assert_array_equal(order, ranking(scores_N, seed=4))
    assert order.tolist() != ranking(scores_N, seed=5).tolist()
