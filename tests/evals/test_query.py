"""Query rows supervise the answer and nothing else, and their loss is what the scorer reports."""

import dataclasses

import numpy as np
import pytest

import tokenizers
from core import families, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.rows import IGNORED, load_rows
from evals.items import Item
from evals.nll import token_nll
from evals.query import build_query
from evals.scorer import score_items

TOKENIZER = tokenizers.load("bytes")
ITEMS = [
    Item("a", "The chief export of Oz is", (" wool", " emeralds"), 1, {"source": "oz"}),
    Item("b", "2 + 2 = ", ("4", "5"), 0, {}),
    Item("c", "", ("Once", "Twice"), 0, {"source": 3}),
    Item("d", "été " * 20 + "=", (" long",), 0, {}),
]


def supervised(rows, i: int) -> str:
    labels = rows.labels(i)
    return TOKENIZER.decode(labels[labels != IGNORED])


def test_labels_are_exactly_the_answer(tmp_path):
    info = build_query(ITEMS, TOKENIZER, 128, tmp_path / "query")
    rows = load_rows(tmp_path / "query", TOKENIZER.vocab_size, 128)
    assert [supervised(rows, i) for i in range(4)] == [" emeralds", " 4", "Once", " long"]
    for i, item in enumerate(ITEMS):
        ids, labels = rows.ids(i), rows.labels(i)
        kept = labels != IGNORED
        np.testing.assert_array_equal(ids[kept], labels[kept])
        assert TOKENIZER.decode(ids[ids != TOKENIZER.bos]) == item.context + item.answer
    assert rows.column("id") == ["a", "b", "c", "d"]
    assert rows.column("source") == ["oz", None, "3", None]
    assert rows.tokenizer == TOKENIZER.fingerprint
    assert info["rows"] == 4 and info["truncated_items"] == 0


def test_no_source_no_column(tmp_path):
    build_query(ITEMS[1:2], TOKENIZER, 128, tmp_path / "query")
    assert load_rows(tmp_path / "query").columns == ["id"]


def test_all_choices_are_rows_of_their_item(tmp_path):
    info = build_query(ITEMS, TOKENIZER, 128, tmp_path / "query", choices="all")
    rows = load_rows(tmp_path / "query", TOKENIZER.vocab_size, 128)
    expected = [" wool", " emeralds", " 4", " 5", "Once", "Twice", " long"]
    assert [supervised(rows, i) for i in range(7)] == expected
    assert rows.column("item") == list("aabbccd")
    assert rows.column("choice") == [0, 1, 0, 1, 0, 1, 0]
    assert rows.column("gold") == [False, True, True, False, True, False, True]
    assert rows.column("id") == ["a/0", "a/1", "b/0", "b/1", "c/0", "c/1", "d/0"]
    assert rows.column("source") == ["oz", "oz", None, None, "3", "3", None]
    assert info["rows"] == 7 and info["choices"] == "all"


def test_the_choices_of_an_item_keep_the_same_context(tmp_path):
    info = build_query(ITEMS, TOKENIZER, 20, tmp_path / "query", choices="all")
    rows = load_rows(tmp_path / "query")
    assert info["truncated_items"] == 2
    contexts = [TOKENIZER.decode(ids[labels == IGNORED]) for ids, labels in
                ((rows.ids(i), rows.labels(i)) for i in range(2))]  # fmt: skip
    assert contexts == ["xport of Oz is"[-11:]] * 2
    assert rows.lengths[:2].tolist() == [16, 20]
    with pytest.raises(InputError, match="'a'.*9 tokens.*at most 8"):
        build_query(ITEMS, TOKENIZER, 9, tmp_path / "short", choices="all")


def test_long_contexts_lose_their_beginning(tmp_path):
    info = build_query(ITEMS, TOKENIZER, 20, tmp_path / "query")
    rows = load_rows(tmp_path / "query")
    assert info["truncated_items"] == 2 and rows.lengths.max() == 20
    assert [supervised(rows, i) for i in range(4)] == [" emeralds", " 4", "Once", " long"]
    assert TOKENIZER.decode(rows.ids(0)) == "ort of Oz is emeralds"[-20:]


def test_an_answer_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(InputError, match="'a'.*9 tokens.*at most 8"):
        build_query(ITEMS, TOKENIZER, 9, tmp_path / "query")
    assert not (tmp_path / "query").exists()


def test_the_answer_may_have_to_end(tmp_path):
    build_query(ITEMS, TOKENIZER, 20, tmp_path / "query", add_eos=True)
    rows = load_rows(tmp_path / "query")
    for i, item in enumerate(ITEMS):
        assert rows.labels(i)[-1] == TOKENIZER.eos
        assert supervised(rows, i).strip() == f"{item.answer}<|endoftext|>".strip()
    with pytest.raises(InputError, match="no EOS"):
        build_query(ITEMS, dataclasses.replace(TOKENIZER, eos=None), 20, tmp_path / "x", True)


def test_no_items(tmp_path):
    with pytest.raises(InputError, match="empty"):
        build_query([], TOKENIZER, 20, tmp_path / "query")


def test_a_rows_loss_is_the_scorers_logprob(tmp_path):
    config = ModelConfig(
        family="gpt2", vocab_size=258, context=128, width=16, layers=1, heads=2, mlp_width=32,
        head_dim=8, init_std=0.3,
    )  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=3)
    loaded = Loaded(config, params, None, "fingerprint")
    results = score_items(loaded, TOKENIZER, ITEMS, Execution(), 256)
    for choices in ("gold", "all"):
        folder = tmp_path / choices
        build_query(ITEMS, TOKENIZER, config.context, folder, choices=choices)
        rows = load_rows(folder, config.vocab_size, config.context)
        nll_NT = token_nll(loaded, rows, Execution(), 256)
        expected = [result.answer_logprob for result in results]
        if choices == "all":
            expected = [logprob for result in results for logprob in result.logprobs]
        np.testing.assert_allclose(-np.nansum(nll_NT, axis=1), expected, rtol=1e-5)
