"""Which tokens count, what is true of them, and that no document is in two parts."""

import dataclasses

import numpy as np
import pytest

from core.errors import InputError
from core.rows import load_rows, save_rows
from evals.probe.corpus import (
    FEWEST,
    SHARES,
    column_labels,
    from_rows,
    from_text,
    sample,
    save,
    split,
    truth,
)
from evals.probe.target import token


@pytest.fixture(scope="module")
def corpus(text, tokenizer):
    return from_text(text, tokenizer, 32)


@pytest.fixture(scope="module")
def asked(corpus, tokenizer):
    target = token("x", tokenizer)
    return target, truth(corpus, target, "next", tokenizer, None)


def test_text_keeps_every_token(text, corpus, tokenizer, tmp_path):
    assert tokenizer.decode(corpus.ids_S) == text.read_text() and corpus.by == "document"
    assert len(corpus.ids_S) % 32 != 1, "else a token would be left out, as below"
    assert (corpus.lengths[:-1] == 32).all() and corpus.lengths[-1] <= 32
    # A document goes up to the blank lines behind it.
    for unit in range(3):
        part = tokenizer.decode(corpus.ids_S[corpus.unit_S == unit])
        assert part.endswith("\n\n") and "\n" not in part[:-2]
    assert corpus.unit_S.max() + 1 == 60
    # Cached as rows, it comes back the same.
    save(corpus, tmp_path / "rows", tokenizer)
    again = from_rows(load_rows(tmp_path / "rows"))
    assert again.sha256 == corpus.sha256 and again.by == corpus.by


def test_bos_begins_every_row_and_never_counts(text, tokenizer):
    wants = dataclasses.replace(tokenizer, add_bos=True)
    corpus = from_text(text, wants, 32)
    assert (corpus.ids_S[corpus.starts[:-1]] == tokenizer.bos).all()
    assert tokenizer.decode(corpus.ids_S[corpus.ids_S != tokenizer.bos]) == text.read_text()
    answers_S = truth(corpus, token("x", tokenizer), "next", wants, None)
    assert (answers_S[corpus.ids_S == tokenizer.bos] == -1).all()


def test_few_documents_are_split_by_rows(text, tokenizer, tmp_path):
    file = tmp_path / "one.txt"
    file.write_text(text.read_text().replace("\n\n", " ")[: 90 * 32 + 1])
    corpus = from_text(file, tokenizer, 32)
    assert len(corpus.ids_S) == 90 * 32, "a row of one token predicts nothing"
    assert corpus.by == "row" and corpus.unit_S.max() + 1 == len(corpus.lengths)
    save(corpus, tmp_path / "rows", tokenizer)
    assert from_rows(load_rows(tmp_path / "rows")).by == "row"


def test_truth(corpus, tokenizer):
    target = token("x", tokenizer)
    next_S = truth(corpus, target, "next", tokenizer, None)
    now_S = truth(corpus, target, "current", tokenizer, None)
    ends = corpus.starts[1:] - 1
    assert (next_S[ends] == -1).all() and (now_S == (corpus.ids_S == ord("x"))).all()
    inside = np.setdiff1d(np.arange(len(next_S)), ends)
    assert (next_S[inside] == now_S[inside + 1]).all()
    assert set(corpus.ids_S[next_S == 1].tolist()) == {ord("q")}


def test_no_document_is_in_two_parts(corpus, asked):
    split_S = split(corpus, asked[1], 0)
    parts = [set(corpus.unit_S[split_S == part].tolist()) for part in range(3)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    counted = split_S[asked[1] >= 0]
    assert np.bincount(counted) / len(counted) == pytest.approx(SHARES, abs=0.02)
    np.testing.assert_array_equal(split_S, split(corpus, asked[1], 0))
    assert (split_S != split(corpus, asked[1], 1)).any()


def test_samples(corpus, asked):
    target, truth_S = asked
    split_S = split(corpus, truth_S, 0)
    found = sample(corpus, truth_S, split_S, target, 40, True, 300, 0)
    assert (np.diff(found.place_N) > 0).all()
    assert (found.split_N == split_S[found.place_N]).all()
    assert (found.positive_N == (truth_S[found.place_N] == 1)).all()
    assert (truth_S[found.place_N] >= 0).all()
    train = found.split_N == 0
    assert train.sum() == 80 and found.positive_N[train].sum() == 40
    # What is judged comes as it comes.
    shares = [found.positive_N[found.split_N == part].mean() for part in (1, 2)]
    assert [(found.split_N == part).sum() for part in (1, 2)] == [300, 300]
    assert shares == pytest.approx([(truth_S[truth_S >= 0] == 1).mean()] * 2, abs=0.05)
    # Forty positives stand in few rows, and no more rows are read.
    rows = np.unique(np.searchsorted(corpus.starts, found.place_N[train], side="right"))
    assert len(rows) < 40
    natural = sample(corpus, truth_S, split_S, target, 100, False, 300, 0)
    train = natural.split_N == 0
    assert train.sum() == 200 and natural.positive_N[train].mean() < 0.25
    everything = sample(corpus, truth_S, split_S, target, 10**6, True, 10**6, 0)
    train = everything.split_N == 0
    assert everything.positive_N[train].sum() == (~everything.positive_N[train]).sum()


def test_too_few_cases_are_refused(corpus, tokenizer):
    def ask(letter: str):
        target = token(letter, tokenizer)
        truth_S = truth(corpus, target, "next", tokenizer, None)
        return sample(corpus, truth_S, split(corpus, truth_S, 0), target, 100, True, 1000, 0)

    with pytest.raises(InputError, match="no positive case of target 'z'"):
        ask("z")
    truth_S = np.zeros(len(corpus.ids_S), np.int8)
    truth_S[:4] = 1
    target = token("a", tokenizer)
    with pytest.raises(InputError, match=f"positive cases in the .* part and needs {FEWEST}"):
        sample(corpus, truth_S, split(corpus, truth_S, 0), target, 100, True, 1000, 0)


def test_labels_of_a_column(tmp_path):
    ids = [np.arange(n) for n in (3, 4)]
    columns = {
        "good": [True, False],
        "each": [[0, 1, -1], [1, 0, 1, 0]],
        "short": [[0], [1]],
        "text": ["yes", "no"],
    }
    save_rows(tmp_path / "rows", ids, columns=columns)
    rows = load_rows(tmp_path / "rows")
    assert column_labels(rows, "good")[0].tolist() == [1, 1, 1, 0, 0, 0, 0]
    labels_S, listed = column_labels(rows, "each")
    assert labels_S.tolist() == [0, 1, -1, 1, 0, 1, 0] and listed
    for name, said in (("short", "1 labels for 3"), ("text", "'yes'"), ("none", "no column")):
        with pytest.raises(InputError, match=said):
            column_labels(rows, name)


def test_documents_of_packed_rows(tmp_path):
    """Rows that several documents share, as `data text` packs them: tokens know their own."""
    inside = [[{"start": 0, "number": 0}, {"start": 2, "number": 1}],
              *([{"start": 0, "number": i}] for i in range(1, 12))]  # fmt: skip
    save_rows(tmp_path / "rows", [np.arange(4)] * 12, columns={"documents": inside})
    corpus = from_rows(load_rows(tmp_path / "rows"))
    assert corpus.unit_S[:10].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 2, 2] and corpus.by == "document"
    save_rows(tmp_path / "named", [np.arange(4)] * 12, columns={"doc": list("aabbccddeeff")})
    assert from_rows(load_rows(tmp_path / "named")).by == "row"  # six documents are too few
