"""The controls: BM25 by hand, embeddings one row at a time, the rest copied."""

import math

import numpy as np
import pytest

from attribution.validation.controls import bm25, controls, embedding
from attribution.validation.scores import Scores
from core import model
from core.config import Execution
from core.rows import load_rows, save_rows

pytestmark = pytest.mark.usefixtures("quick")
HOW = (Execution("float32", "scan"), 64)


def test_bm25_by_hand(tmp_path):
    documents = [[1, 2, 1, 3], [2, 2], [4, 5, 6, 7, 8, 9], [3, 3, 3, 1]]
    queries = [[1, 3], [2, 2, 60]]
    for name, lists in (("rows", documents), ("query", queries)):
        save_rows(tmp_path / name, [np.array(ids) for ids in lists])
    rows, query = load_rows(tmp_path / "rows"), load_rows(tmp_path / "query")
    # Tokens 1, 2 and 3 are in two of four rows each: idf ln(1 + 2.5 / 2.5). Mean length 4.
    idf = math.log(2)
    part = {n: 1.2 * (0.25 + 0.75 * n / 4) for n in (2, 4, 6)}
    expected_NQ = idf * np.array([
        [2 / (2 + part[4]) + 1 / (1 + part[4]), 2 * 1 / (1 + part[4])],
        [0, 2 * 2 / (2 + part[2])],
        [0, 0],
        [1 / (1 + part[4]) + 3 / (3 + part[4]), 0],
    ])  # fmt: skip
    np.testing.assert_allclose(bm25(rows, query, 2), expected_NQ, rtol=1e-12)
    mean_N1 = expected_NQ.mean(1, keepdims=True)
    np.testing.assert_allclose(bm25(rows, query, 1), mean_N1, rtol=1e-12)


def test_rare_tokens_weigh_more_than_common_ones(tmp_path):
    save_rows(tmp_path / "rows", [np.array([1, 2]), np.array([1, 3]), np.array([1, 3])])
    rows = load_rows(tmp_path / "rows")
    scores_N = bm25(rows, rows.take([0]), 1)[:, 0]
    rare, common = math.log(1 + 2.5 / 1.5), math.log(1 + 0.5 / 3.5)
    assert scores_N == pytest.approx(np.array([rare + common, common, common]) / 2.2)


def test_embedding_is_the_cosine_of_mean_hidden_states(tiny, tmp_path, close):
    loaded = tiny.loaded()
    rows = tiny.rows(tmp_path / "rows", [6, 12, 9, 12, 16], seed=1)
    query = tiny.rows(tmp_path / "query", [5, 8], seed=2)
    hidden = tiny.jit(lambda ids_BT: model.hidden(loaded.config, HOW[0], loaded.variables, ids_BT))

    def unit(rows, i):
        padded_1T = np.zeros((1, 20), np.int32)  # causal: padding on the right changes nothing
        padded_1T[0, : len(rows.ids(i))] = rows.ids(i)
        mean_D = np.asarray(hidden(padded_1T))[0, : len(rows.ids(i))].mean(0, dtype=np.float64)
        return mean_D / np.linalg.norm(mean_D)

    expected_NQ = np.array([[unit(rows, i) @ unit(query, j) for j in range(2)] for i in range(5)])
    found_NQ = embedding(loaded, rows, query, 2, *HOW)
    close(found_NQ, expected_NQ)
    close(embedding(loaded, rows, query, 1, *HOW), expected_NQ.mean(1, keepdims=True))
    assert np.abs(embedding(loaded, rows, rows, 5, *HOW).diagonal() - 1).max() < 1e-6


def test_controls_have_the_columns_of_the_scores(tiny, tmp_path):
    loaded = tiny.loaded()
    rows = tiny.rows(tmp_path / "rows", [6, 12, 9, 12, 16], seed=1)
    query = tiny.rows(tmp_path / "query", [5, 8], seed=2)
    norms_N, losses_N = np.arange(5.0), np.arange(5.0, 10)
    for columns in (1, 2):
        scored = Scores(np.zeros((5, columns)), 1, "sum", True, False, norms_N, losses_N, "")
        found = controls(scored, loaded, rows, query, *HOW, seed=0)
        names = ["random", "length", "loss", "gradient norm", "bm25", "embedding"]
        assert list(found) == names
        assert {x.shape for x in found.values()} == {(5, columns)}
        np.testing.assert_array_equal(found["length"][:, -1], rows.trained)
        np.testing.assert_array_equal(found["loss"][:, -1], losses_N / rows.trained)
        np.testing.assert_array_equal(found["gradient norm"][:, 0], norms_N)
    bare = Scores(np.zeros((5, 1)), 1, "sum", True, False, None, None, "")
    assert {"loss", "gradient norm"}.isdisjoint(controls(bare, loaded, rows, query, *HOW, seed=0))
