"""Documents inside packed rows: every supervised token counts once, for its own document."""

import json

import numpy as np
import pytest

import tokenizers
from attribution.magic.documents import credit, documents, lines
from core.errors import InputError
from core.rows import IGNORED, load_rows, save_rows
from training.data.text import build_text_rows

TOKENIZER = tokenizers.load("bytes")
TEXTS = ["Jack fell down", "and broke his crown", "x", "and Jill came tumbling after" * 2]


@pytest.fixture(params=["concat", "document"])
def rows(request, tmp_path):
    file = tmp_path / "pool.jsonl"
    file.write_text(
        "".join(json.dumps({"text": t, "doc": f"d{i}"}) + "\n" for i, t in enumerate(TEXTS))
    )
    build_text_rows([file], TOKENIZER, 16, tmp_path / "rows", request.param)
    return load_rows(tmp_path / "rows")


def scores_of(rows, *queries: int) -> np.ndarray:
    """Random where a token is predicted; what stands elsewhere must not matter."""
    shape = (len(rows), int(rows.lengths.max()) + 3)
    return np.random.default_rng(0).normal(size=(*shape, *queries)).astype(np.float32)


def predicted(rows, shape: tuple[int, ...]) -> np.ndarray:
    mask_NT = np.zeros(shape, bool)
    for i in range(len(rows)):
        mask_NT[i, 1 : rows.lengths[i]] = rows.labels(i)[1:] != IGNORED
    return mask_NT


def test_documents_have_all_of_their_tokens(rows):
    """Each token scores its own id, which tells whose it is; a row's first has no score."""
    found = documents(rows)
    assert [(name["number"], name["doc"]) for name in found.names] == [
        (i, f"d{i}") for i in range(4)
    ]
    scores_NT = np.zeros((len(rows), 16), np.float32)
    firsts = np.zeros(4)
    for i in range(len(rows)):
        scores_NT[i, : rows.lengths[i]] = rows.ids(i)
        firsts[rows.column("documents")[i][0]["number"]] += rows.ids(i)[0]
    whole = np.array([sum(text.encode()) + 256 for text in TEXTS])
    np.testing.assert_array_equal(credit(found, rows, scores_NT), whole - firsts)


@pytest.mark.parametrize("queries", [(), (3,)])
def test_documents_and_rows_have_one_sum(rows, queries):
    scores = scores_of(rows, *queries)
    found = credit(documents(rows), rows, scores)
    assert found.dtype == np.float32 and found.shape == (4, *queries)
    expected = scores[predicted(rows, scores.shape[:2])].sum(0, dtype=np.float64)
    np.testing.assert_allclose(found.sum(0, dtype=np.float64), expected, rtol=1e-6)


def test_lines_say_where_a_document_is(rows):
    found = lines(documents(rows), rows)
    assert [line["doc"] for line in found] == ["d0", "d1", "d2", "d3"]
    for line, text in zip(found, TEXTS, strict=True):
        spans = [rows.ids(row)[start:end] for row, start, end in line["spans"]]
        assert TOKENIZER.decode(np.concatenate(spans)[:-1]) == text
        firsts = sum(start == 0 for _, start, _ in line["spans"])
        assert line["tokens"] == len(text) + 1 - firsts


def test_a_document_is_known_by_every_tokens_number(tmp_path):
    """As Bergson packs: numbers need not begin at 0, and a row's column may be longer than it."""
    ids = [np.arange(1, 7), np.arange(1, 5)]
    labels = [ids[0], np.array([1, -100, 3, 4])]
    save_rows(tmp_path / "rows", ids, labels, {"doc_ids": [[5, 5, 9, 9, 9, 2], [2, 2, 2, 5, 7, 7]]})
    rows = load_rows(tmp_path / "rows")
    found, scores_NT = documents(rows), 10.0 ** np.arange(12).reshape(2, 6)
    assert found.names == [{"number": 2}, {"number": 5}, {"number": 9}]
    np.testing.assert_allclose(credit(found, rows, scores_NT), [1e5 + 1e8, 1e1 + 1e9, 11100.0])
    assert [line["spans"] for line in lines(found, rows)] == [
        [[0, 5, 6], [1, 0, 3]], [[0, 0, 2], [1, 3, 4]], [[0, 2, 5]],
    ]  # fmt: skip


def test_chosen_rows_keep_their_documents(rows):
    taken = rows.take([2, 0])
    whole, part = documents(rows), documents(taken)
    scores_NT = scores_of(rows)
    scores_NT[[i for i in range(len(rows)) if i not in (0, 2)]] = 0
    found = credit(whole, rows, scores_NT)[[name["number"] for name in part.names]]
    np.testing.assert_array_equal(credit(part, taken, scores_NT[[2, 0]]), found)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "does not say which document.*--target example"),
        ({"doc_ids": [[1, 1, 1], [1, 1]]}, "row 1 has 3 tokens.*'doc_ids' does not divide"),
        ({"doc_ids": [[1, 1, 1], None]}, "row 1 .*'doc_ids'"),
        ({"documents": [[{"start": 1, "number": 0}]] * 2}, "row 0 .*'documents'"),
        ({"documents": [[{"start": s, "number": 0} for s in (0, 3)]] * 2}, "row 0 .*'documents'"),
        ({"documents": [[{"start": 0, "number": 0}], None]}, "row 1 .*'documents'"),
    ],
)
def test_rows_without_documents_are_named(tmp_path, columns, message):
    save_rows(tmp_path / "rows", [np.arange(3)] * 2, None, columns)
    with pytest.raises(InputError, match=message):
        documents(load_rows(tmp_path / "rows"))
