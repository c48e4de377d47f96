"""The demo corpus: the same bytes each time, known shares, fair items."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from core import files
from core.errors import InputError
from training.data import demo

LENGTH = 128
DOCUMENTS = {"pretrain": 8000, "pool": 2000, "validation": 200}
ITEMS = {"items_train": 128, "items_heldout": 192}
NAMES = [*DOCUMENTS, *ITEMS]


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {name: files.read_jsonl(folder / f"{name}.jsonl") for name in NAMES}


def digests(folder: Path) -> dict[str, str]:
    return {name: files.sha256_file(folder / f"{name}.jsonl") for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    demo.write_corpus(out)
    return out


@pytest.fixture(scope="module")
def corpus(folder):
    return read(folder)


def test_a_fresh_process_writes_the_same_bytes(folder, tmp_path):
    root = Path(demo.__file__).parents[2]
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1])\n"
        "from training.data.demo import write_corpus\n"
        "write_corpus(pathlib.Path(sys.argv[2]))"
    )
    # Another process hashes strings its own way: an order taken from a set would show.
    command = [sys.executable, "-I", "-c", code, str(root), str(tmp_path)]
    subprocess.run(command, check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{n}.jsonl" for n in NAMES)
    assert digests(tmp_path) == digests(folder)


def test_the_seed_changes_every_file(folder, tmp_path):
    demo.write_corpus(tmp_path, seed=1)
    other = digests(tmp_path)
    assert all(other[name] != digest for name, digest in digests(folder).items())


def test_another_python_changes_the_prose_only(corpus, tmp_path, monkeypatch):
    """Another language reference, a third shorter: counts and all invented text stay."""
    topics = {name: text.replace("the", "this") for name, text in demo.topics.items()}
    monkeypatch.setattr(demo, "topics", {name: topics[name] for name in sorted(topics)[::2]})
    demo.write_corpus(tmp_path)
    other = read(tmp_path)
    for name in DOCUMENTS:
        pairs = list(zip(corpus[name], other[name], strict=True))
        assert all(a == b for a, b in pairs if a["source"] != "prose")
        assert all(b["source"] == "prose" for a, b in pairs if a["source"] == "prose")
        assert any(a != b for a, b in pairs)
    for name in ITEMS:
        assert other[name] == corpus[name]


def test_a_stream_draws_what_every_python_draws():
    """The one generator whose numbers Python promises, seeded by an integer: literal values."""
    stream = demo.Stream(0, "pool/prose")
    assert [stream.integer(0, 1000) for _ in range(6)] == [684, 341, 179, 103, 860, 921]
    assert stream.shuffle("abcdef") == list("eafcbd")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_fit_and_have_their_shares(corpus, name):
    documents = corpus[name]
    assert len(documents) == DOCUMENTS[name]
    shares = {s: n / len(documents) for s, n in Counter(d["source"] for d in documents).items()}
    assert shares == pytest.approx(demo.SHARES[name])
    for document in documents:
        assert set(document) == {"text", "source", "doc"}
        text = document["text"]
        assert text.isascii() and text == " ".join(text.split())
        assert LENGTH // 2 < len(text) <= LENGTH - 1  # the end-of-text token takes the last place


@pytest.mark.parametrize("length", [96, 192])
def test_length_is_kept(tmp_path, length):
    summary = demo.write_corpus(tmp_path, length=length, pretrain=400, pool=400)
    texts = [d["text"] for d in read(tmp_path)["pool"]]
    assert length - 30 < max(map(len, texts)) <= length - 1
    assert sum(summary["pool"].values()) == len(texts) == 400


def test_the_relevant_share_leaves_room_for_recall(corpus):
    share = Counter(d["source"] for d in corpus["pool"])[demo.RELEVANT] / len(corpus["pool"])
    assert 0.15 <= share <= 0.25  # recall of 3 times the share must be possible
    assert demo.SHARES["pretrain"][demo.RELEVANT] < share / 2


def test_pool_texts_are_not_repeated_from_pretraining(corpus):
    pretrain = {d["text"] for d in corpus["pretrain"]}
    prose = [d["text"] for d in corpus["pool"] if d["source"] == "prose"]
    assert len(set(prose)) > 0.98 * len(prose)
    assert not pretrain & set(prose)
    assert not {d["text"] for d in corpus["validation"] if d["source"] == "prose"} & pretrain


@pytest.mark.parametrize("name", ITEMS)
def test_items_are_well_formed(corpus, name):
    items = corpus[name]
    assert len(items) == len({item["id"] for item in items}) == ITEMS[name]
    for item in items:
        assert set(item) == {"id", "context", "choices", "label", "source"}
        assert len(set(item["choices"])) == 4
        assert all(choice[0] == " " and choice[1:].isalpha() for choice in item["choices"])
        assert len(item["context"] + max(item["choices"], key=len)) < LENGTH
        ending = next(e for e in demo.USES if item["id"].endswith(e))
        assert item["choices"][item["label"]] == f" {demo.USES[ending]}"
        assert item["source"] == demo.RELEVANT


@pytest.mark.parametrize("name", ITEMS)
def test_neither_a_position_nor_an_answer_is_favoured(corpus, name):
    items = corpus[name]
    labels = Counter(item["label"] for item in items)
    answers = Counter(item["choices"][item["label"]] for item in items)
    assert set(labels.values()) == {len(items) // 4}
    assert set(answers.values()) == {len(items) // len(demo.USES)}


def test_held_out_items_are_not_leaked(corpus):
    """Their medicines are in no document and no query item, the wording is in no document."""
    text = "\n".join(d["text"] for name in DOCUMENTS for d in corpus[name])
    wording = demo.QUESTION.format(medicine="")
    assert wording.strip() and wording not in text
    for item in corpus["items_heldout"]:
        assert item["id"] not in text
        assert item["context"] + item["choices"][item["label"]] not in text
    assert not {i["id"] for i in corpus["items_heldout"]} & {i["id"] for i in corpus["items_train"]}


def test_only_the_handbook_names_what_medicines_are_for(corpus):
    illnesses = [f" {illness}." for illness in demo.USES.values()]
    for name in DOCUMENTS:
        for document in corpus[name]:
            named = sum(document["text"].count(illness) for illness in illnesses)
            assert (named > 0) == (document["source"] == demo.RELEVANT)


def test_distractors_name_the_same_medicines(corpus):
    """So that a medicine's name, a digit or a full stop does not give the relevant chunks away."""
    for source in ("handbook", "workshop", "pharmacy"):
        text = " ".join(d["text"] for d in corpus["pool"] if d["source"] == source)
        assert all(text.count(ending) > 20 for ending in demo.USES)


@pytest.mark.parametrize("counts", [(100, 192), (128, 100), (320, 640)])
def test_item_counts_that_do_not_work_out_are_refused(tmp_path, counts):
    with pytest.raises(InputError, match="multiples of 16"):
        demo.write_corpus(tmp_path, query_items=counts[0], heldout_items=counts[1])
    assert not list(tmp_path.iterdir())
