"""Query rows supervise the answer and nothing else, and their loss is what the scorer reports."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest

import tokenizers
from core import families, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.rows import IGNORED, load_rows
from evals.items import Item, tokenise
from evals.nll import token_nll
from evals.query import build_query, build_task_query
from evals.scorer import score_items
from evals.tasks.catalogue import select
from tokenizers.templates import template

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


CHAT = tokenizers.load(Path(__file__).parents[1] / "golden/chat/tokenizer")
WINOGRANDE = [
    {"sentence": "Ann thanked Sue because _ had won.", "option1": "Ann", "option2": "Sue",
     "answer": "2"},
    {"sentence": "The key did not fit the lock; _'s teeth were worn.", "option1": "The key",
     "option2": "the lock", "answer": "1"},
    {"sentence": "Bob paid Tim, so _ was rich.", "option1": "Bob", "option2": "Tim",
     "answer": "2"},
]  # fmt: skip
ARC = [
    {"id": "Mercury_7", "question": "What melts?", "choices": {"text": ["fire", "ice", "rust"],
     "label": ["1", "2", "3"]}, "answerKey": "2"},
    {"id": "NYSEDREGENTS_4", "question": "What is cold?",
     "choices": {"text": ["steam", "lava", "fire", "snow"], "label": ["A", "B", "C", "D"]},
     "answerKey": "D"},
]  # fmt: skip
GSM8K = [{"question": "Two and two?", "answer": "2+2=4\n#### 4"}]
PIQA = [{"goal": "To dry hands,", "sol1": "use a towel.", "sol2": "use a lamp.", "label": 0}]
FILES = {
    "allenai__winogrande/winogrande_xl/train": WINOGRANDE,
    "allenai__winogrande/winogrande_xl/validation": [dict(WINOGRANDE[1], answer="2")],
    "allenai__ai2_arc/ARC-Challenge/train": ARC,
    "openai__gsm8k/main/train": GSM8K,
    "baber__piqa/default/train": PIQA,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of splits; only winogrande has the one that it is evaluated on."""
    folder = tmp_path_factory.mktemp("data")
    for name, lines in FILES.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make(out, data, names: str, n: int = 250, length: int = 256, tokenizer=TOKENIZER, **kwargs):
    """The rows of a query of the tasks' training splits, and its `rows.json`."""
    tasks = select([names]).tasks
    info = build_task_query(tasks, tokenizer, "train", n, length, out, data, **kwargs)
    return load_rows(out, tokenizer.vocab_size, length), info


def halves(rows, i: int, tokenizer=TOKENIZER) -> tuple[str, str]:
    """What is read and what is supervised of a row."""
    ids, labels = rows.ids(i), rows.labels(i)
    start = int(np.argmax(labels != IGNORED))
    assert (labels[:start] == IGNORED).all() and (labels[start:] == ids[start:]).all()
    begin = int(tokenizer.add_bos and ids[0] == tokenizer.bos)
    return tokenizer.decode(ids[begin:start]), tokenizer.decode(ids[start:])


def test_examples_of_benchmarks_are_questions_and_answers(tmp_path, data):
    rows, info = make(tmp_path / "query", data, "winogrande,arc_challenge")
    assert [halves(rows, i) for i in range(4)] == [
        ("Ann thanked Sue because _ had won.\nOptions: Ann, Sue\nAnswer:", " Sue"),
        ("Bob paid Tim, so _ was rich.\nOptions: Bob, Tim\nAnswer:", " Tim"),
        ("Question: What melts?\nA. fire\nB. ice\nC. rust\nAnswer:", " B"),
        ("Question: What is cold?\nA. steam\nB. lava\nC. fire\nD. snow\nAnswer:", " D"),
    ]
    tasks = ["winogrande"] * 2 + ["arc_challenge"] * 2
    assert rows.column("id") == [
        "winogrande/0", "winogrande/2", "arc_challenge/0", "arc_challenge/1",
    ]  # fmt: skip
    assert rows.column("task") == rows.column("source") == tasks
    assert rows.column("item") == ["0", "2", "Mercury_7", "NYSEDREGENTS_4"]
    assert rows.column("gold") == [1, 1, 1, 3]
    assert rows.tokenizer == TOKENIZER.fingerprint
    assert info["rows"] == 4 and info["truncated_items"] == info["alone_choices"] == 0
    assert info["split"] == "train" and info["n"] == 250 and info["template"] is None


def test_a_question_of_the_evaluated_split_is_left_out(tmp_path, data):
    _, info = make(tmp_path / "query", data, "winogrande,arc_challenge")
    counts = info["tasks"]
    assert info["left_out"] == counts["winogrande"]["left_out"] == 1  # whatever its answer is
    assert counts["winogrande"]["rows"] == 2 and counts["winogrande"]["available"] == 3
    assert counts["arc_challenge"]["left_out"] is None  # its test split is not there to tell
    assert counts["arc_challenge"]["rows"] == counts["arc_challenge"]["available"] == 2
    assert all(len(count["sha256"]) == 64 for count in counts.values())
    for seed in range(5):  # another takes its place
        rows, _ = make(tmp_path / str(seed), data, "winogrande", n=2, seed=seed)
        assert rows.column("item") == ["0", "2"]


@pytest.mark.parametrize("seed", range(3))
def test_examples_are_drawn_by_the_seed_and_keep_their_order(tmp_path, seed):
    lines = [dict(ARC[0], id=f"x{i}", question=f"{i}?") for i in range(40)]
    path = tmp_path / "allenai__ai2_arc/ARC-Challenge/train.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows, info = make(tmp_path / "query", tmp_path, "arc_challenge", n=5, seed=seed)
    chosen = sorted(random.Random(seed).sample(range(40), 5))
    assert rows.column("item") == [f"x{i}" for i in chosen]
    assert rows.column("id") == [f"arc_challenge/{i}" for i in chosen]
    assert info["tasks"]["arc_challenge"]["available"] == 40 and info["seed"] == seed


def test_a_split_that_is_evaluated_chooses_no_training_data(tmp_path):
    """Refused by its name alone, before anything is read."""
    out = tmp_path / "query"

    def refused(names: str, split: str, match: str) -> None:
        with pytest.raises(InputError, match=match):
            build_task_query(select([names]).tasks, TOKENIZER, split, 9, 256, out, tmp_path)

    refused("winogrande", "validation", "winogrande is evaluated on.*'validation'.*its 'train' may")
    refused("mmlu", "test", "mmlu_.* is evaluated on .*'test'.*its 'dev' may")
    refused("lambada_openai", "test", "lambada_openai is evaluated on .*no other, so leave it out")
    for slices in ("validation[:5]", "train+validation", "../validation"):
        refused("winogrande", slices, "is no split's name")
    refused("arc_easy,wikitext", "train", "wikitext has texts and no answers; .*`data text`")
    assert not out.exists()


def test_what_is_generated_and_what_has_no_form_of_its_own(tmp_path, data):
    rows, _ = make(tmp_path / "query", data, "gsm8k,piqa")
    assert halves(rows, 0) == ("Question: Two and two?\nAnswer:", " 2+2=4\n#### 4")
    assert rows.column("gold") == [None, 0]
    (asked,) = tokenise(TOKENIZER, "Question: To dry hands,\nAnswer:", [" use a towel."])
    assert rows.ids(1).tolist() == asked.ids.tolist()
    assert (rows.labels(1) != IGNORED).sum() == len(asked.ids) - asked.start
    rows, _ = make(tmp_path / "texts", data, "gsm8k")
    assert rows.columns == ["id", "task", "item", "source"]


def test_long_questions_lose_their_beginning(tmp_path, data):
    names, length = "winogrande,arc_challenge", 60
    whole, _ = make(tmp_path / "whole", data, names)
    rows, info = make(tmp_path / "query", data, names, length=length)
    assert info["truncated_items"] == (whole.lengths > length).sum() == 2
    assert rows.lengths.tolist() == np.minimum(whole.lengths, length).tolist()
    for i in range(4):
        assert rows.ids(i).tolist() == whole.ids(i)[-length:].tolist()
        assert rows.labels(i).tolist() == whole.labels(i)[-length:].tolist()
    with pytest.raises(InputError, match="example 'winogrande/0' has a choice of 4 tokens where"):
        make(tmp_path / "short", data, "winogrande", length=4)


def test_an_example_may_have_to_end(tmp_path, data):
    rows, info = make(tmp_path / "query", data, "arc_challenge", add_eos=True)
    assert [halves(rows, i)[1] for i in range(2)] == [" B<|endoftext|>", " D<|endoftext|>"]
    assert info["add_eos"]
    tokenizer = dataclasses.replace(TOKENIZER, eos=None)
    with pytest.raises(InputError, match="no EOS"):
        make(tmp_path / "none", data, "arc_challenge", tokenizer=tokenizer, add_eos=True)


@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize(
    "name, user, assistant, end",
    [
        (
            "gemma",
            "<bos><start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
            "<end_of_turn>",
        ),
        ("tulu", "<|user|>\n", "\n<|assistant|>\n", "<|endoftext|>"),
    ],
)
def test_an_example_may_be_a_conversation(tmp_path, data, name, user, assistant, end, add_eos):
    rows, info = make(
        tmp_path / "query", data, "winogrande,gsm8k", tokenizer=CHAT, length=512,
        template=template(CHAT, name), add_eos=add_eos,
    )  # fmt: skip
    asked = "Ann thanked Sue because _ had won.\nOptions: Ann, Sue\nAnswer:"
    end = end if add_eos else ""
    assert halves(rows, 0, CHAT) == (f"{user}{asked}{assistant}", f"Sue{end}")
    assert halves(rows, 2, CHAT)[1] == f"2+2=4\n#### 4{end}"
    assert info["template"] == name and info["rows"] == 3
