"""The demo corpus: the same bytes each time, known shares, fair items."""

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from core import files
from core.errors import InputError
from training.data import demo

LENGTH = 128
DOCUMENTS = {"pretrain": 8000, "pool": 2000, "validation": 200}
ITEMS = {"items_train": 128, "items_heldout": 192}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    summary = demo.write_corpus(out)
    return {name: files.read_jsonl(out / f"{name}.jsonl") for name in DOCUMENTS | ITEMS} | {
        "summary": summary
    }


def digests(out: Path) -> dict[str, str]:
    return {path.name: files.sha256_file(path) for path in sorted(out.iterdir())}


def test_fresh_processes_write_the_same_bytes(tmp_path):
    code = "import sys, pathlib; from training.data.demo import write_corpus as write\n"
    code += "write(pathlib.Path(sys.argv[1]), pretrain=400, pool=200)"
    root = Path(demo.__file__).parents[2]
    for name in ("a", "b"):
        # -I drops PYTHONHASHSEED and the folder alike, so each process hashes strings its own way.
        run = f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"
        subprocess.run([sys.executable, "-I", "-c", run, str(tmp_path / name)], check=True)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 5


def test_seed_changes_everything(tmp_path):
    for seed in (0, 1):
        demo.write_corpus(tmp_path / str(seed), seed, pretrain=400, pool=200)
    first, second = digests(tmp_path / "0"), digests(tmp_path / "1")
    assert all(first[name] != second[name] for name in first)


def test_another_python_changes_prose_only(corpus, tmp_path, monkeypatch):
    """Another Python has another language reference: counts and invented text stay."""
    topics = {name: text.replace("the", "this") for name, text in demo.topics.items()}
    for name in sorted(topics)[::3]:
        del topics[name]
    monkeypatch.setattr(demo, "topics", topics)
    assert demo.write_corpus(tmp_path) == corpus["summary"]
    for name in DOCUMENTS:
        mine, other = corpus[name], files.read_jsonl(tmp_path / f"{name}.jsonl")
        assert mine != other
        for a, b in zip(mine, other, strict=True):
            assert a == b or a["source"] == b["source"] == "prose"
    for name in ITEMS:
        assert files.read_jsonl(tmp_path / f"{name}.jsonl") == corpus[name]


def test_random_is_the_promised_generator():
    """The numbers themselves, from the Mersenne twister seeded by the stream's name."""
    assert hashlib.sha256(str(demo.Stream(0, "pool/ward").random()).encode()).hexdigest()
    draw = demo.Stream(0, "pool/ward")
    assert [draw.integer(0, 100) for _ in range(5)] == [
        demo.Stream(0, "pool/ward").integer(0, 100)
    ] + [None] * 4


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_fit_and_have_their_shares(corpus, name):
    documents = corpus[name]
    counts = Counter(d["source"] for d in documents)
    assert len(documents) == DOCUMENTS[name] and counts == corpus["summary"][name]
    for source, share in demo.SHARES[name].items():
        assert counts[source] == pytest.approx(share * len(documents))
    for document in documents:
        assert set(document) == {"text", "source", "doc"}
        assert document["text"].isascii() and document["text"] == document["text"].strip()
        assert LENGTH // 3 < len(document["text"]) <= LENGTH - 1
