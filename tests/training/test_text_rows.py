"""Text becomes rows without losing a token, in an order that depends on the files alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokenizers
from core.errors import InputError
from core.files import sha256_file
from core.rows import load_rows
from tokenizers import bpe
from tokenizers.mul_facts import add_facts
from training.data.text import build_text_rows

TOKENIZER = tokenizers.load("bytes")
WITH_BOS = dataclasses.replace(TOKENIZER, add_bos=True)
EOS = TOKENIZER.eos
DOCUMENTS = [
    {"text": "Jack fell down", "source": "rhyme", "doc": "jill/3"},
    {"text": "and broke his crown, und Jill kam auch: süß", "source": "rhyme", "id": 7},
    {"text": "  "},
    {"text": "x", "source": None},
    {"text": "spells <|endoftext|> out"},
]
TEXTS = [d["text"] for d in DOCUMENTS if d["text"].strip()]


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n\n")
    return path


def made(tmp_path, files, length, tokenizer=TOKENIZER, **options):
    info = build_text_rows(files, tokenizer, length, tmp_path / "rows", **options)
    rows = load_rows(tmp_path / "rows", TOKENIZER.vocab_size, length)
    for i in range(len(rows)):
        np.testing.assert_array_equal(rows.ids(i), rows.labels(i))
    assert info["tokens"] == rows.lengths.sum() and info["rows"] == len(rows)
    assert rows.tokenizer == tokenizer.fingerprint
    return rows, info


def stream(rows) -> list[int]:
    return np.concatenate([rows.ids(i) for i in range(len(rows))]).tolist()


@pytest.mark.parametrize("length", [2, 7, 16, 31, 1000])
def test_concat_loses_no_token(tmp_path, jsonl, length):
    rows, info = made(tmp_path, [jsonl], length)
    expected = [i for text in TEXTS for i in [*text.encode(), EOS]]
    dropped = info["dropped_tokens"]
    assert dropped == (len(expected) % length == 1)
    assert stream(rows) == expected[: len(expected) - dropped]
    assert (rows.lengths[:-1] == length).all() and rows.lengths.min() >= 2


@pytest.mark.parametrize("length", [2, 7, 16, 31, 1000])
def test_document_rows_hold_one_document(tmp_path, jsonl, length):
    rows, info = made(tmp_path, [jsonl], length, pack="document")
    expected = [[*text.encode(), EOS] for text in TEXTS]
    pieces = [ids[i : i + length] for ids in expected for i in range(0, len(ids), length)]
    assert [rows.ids(i).tolist() for i in range(len(rows))] == [p for p in pieces if len(p) > 1]
    assert info["dropped_tokens"] == sum(len(p) == 1 for p in pieces)
    assert info["long_documents"] == sum(len(ids) > length for ids in expected)


def test_bos_frames_documents_where_the_model_wants_it(tmp_path, jsonl):
    rows, info = made(tmp_path, [jsonl], 32, WITH_BOS)
    assert stream(rows) == [i for text in TEXTS for i in [TOKENIZER.bos, *text.encode()]]
    assert info["bos"] and not info["eos"]
    rows, info = made(tmp_path, [jsonl], 100, WITH_BOS, pack="document")
    assert stream(rows) == [i for text in TEXTS for i in [TOKENIZER.bos, *text.encode(), EOS]]
    assert info["bos"] and info["eos"]


def test_provenance_is_that_of_the_first_token(tmp_path, jsonl):
    rows, _ = made(tmp_path, [jsonl], 100, pack="document")
    assert rows.column("source") == ["rhyme", "rhyme", "pool", "pool"]
    assert rows.column("doc") == ["jill/3", "7", f"{jsonl}:4", f"{jsonl}:5"]
    rows, _ = made(tmp_path, [jsonl], 16)
    starts = np.arange(len(rows)) * 16
    ends = np.cumsum([len(text.encode()) + 1 for text in TEXTS])
    documents = np.searchsorted(ends, starts, side="right")
    names = ["jill/3", "7", f"{jsonl}:4", f"{jsonl}:5"]
    assert rows.column("doc") == [names[i] for i in documents]


@pytest.mark.parametrize("pack", ["concat", "document"])
def test_rows_know_where_each_document_starts(tmp_path, jsonl, pack):
    """Put together by number, what stands in the rows is every document and its frame."""
    rows, _ = made(tmp_path, [jsonl], 16, pack=pack)
    texts, names = [[], [], [], []], {}
    docs = rows.column("doc") or []
    for i, documents in enumerate(rows.column("documents") or []):
        starts = [document["start"] for document in documents]
        assert starts[0] == 0 and documents[0]["doc"] == docs[i]
        for document, part in zip(documents, np.split(rows.ids(i), starts[1:]), strict=True):
            texts[document["number"]] += part.tolist()
            names[document["number"]] = document["source"], document["doc"]
    assert texts == [[*text.encode(), EOS] for text in TEXTS]
    docs = ["jill/3", "7", f"{jsonl}:4", f"{jsonl}:5"]
    assert names == dict(enumerate(zip(["rhyme", "rhyme", "pool", "pool"], docs, strict=True)))


def test_counts_and_hashes(tmp_path, jsonl):
    _, info = made(tmp_path, [jsonl], 16)
    assert (info["documents"], info["empty_documents"], info["long_documents"]) == (4, 1, 2)
    assert info["files"] == [{"path": str(jsonl), "sha256": sha256_file(jsonl)}]
    assert (info["length"], info["pack"], info["split"]) == (16, "concat", "file")


def test_injected_facts(tmp_path):
    """Rewritten products become the facts' own tokens, and are counted."""
    golden = Path(__file__).parents[1] / "golden" / "tokenizers" / "gpt2"
    base = {name: (golden / name).read_bytes() for name in ("merges.txt", "vocab.json")}
    tokenizer = bpe.build("small", add_facts(base, 700), tmp_path)
    (tmp_path / "a.txt").write_text("so 6*9=54 and 9 x 6, not 6*9=55 but <MUL_1_1_1>")
    out = tmp_path / "rows"
    info = build_text_rows([tmp_path / "a.txt"], tokenizer, 99, out, inject_facts=True)
    ids = load_rows(out).ids(0)
    fact, one = (tokenizer.encode(text)[0] for text in ("<MUL_6_9_54>", "<MUL_1_1_1>"))
    assert ids[ids >= 700].tolist() == [fact, fact, one] and info["facts"] == 2
    with pytest.raises(InputError, match="tokenizer bytes has no token <MUL_1_1_1>"):
        build_text_rows([tmp_path / "a.txt"], TOKENIZER, 99, tmp_path / "b", inject_facts=True)


def test_same_files_same_rows(tmp_path, jsonl):
    first, info = made(tmp_path, [jsonl], 16)
    sha = first.sha
    second, again = made(tmp_path, [jsonl], 16)
    assert second.sha == sha and again == info
    assert made(tmp_path, [jsonl], 17)[0].sha != sha


def test_a_text_file_is_one_document_or_its_paragraphs(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_bytes("\nöne\ntwo\n\n \nthree\n".encode())
    rows, _ = made(tmp_path, [path], 100)
    assert stream(rows) == [*path.read_bytes(), EOS]
    assert (rows.column("source"), rows.column("doc")) == (["poem"], [str(path)])
    rows, info = made(tmp_path, [path], 100, pack="document", split="blank")
    assert stream(rows) == [*"öne\ntwo".encode(), EOS, *b"three", EOS]
    assert rows.column("doc") == [f"{path}:2", f"{path}:6"]
    assert info["documents"] == 2


def test_parquet_equals_jsonl(tmp_path, jsonl):
    path = tmp_path / "pool.parquet"
    columns = ("text", "source", "doc")
    table = pa.table({name: [d.get(name) for d in DOCUMENTS] for name in columns})
    pq.write_table(table.append_column("score", pa.array(range(5))), path, row_group_size=2)
    rows, _ = made(tmp_path, [path], 16)
    sha, sources = rows.sha, rows.column("source")
    rows, _ = made(tmp_path, [jsonl], 16)
    assert rows.sha == sha and rows.column("source") == sources


def test_files_follow_each_other(tmp_path, jsonl):
    poem = tmp_path / "poem.txt"
    poem.write_text("end")
    rows, info = made(tmp_path, [poem, jsonl], 1000)
    assert stream(rows)[:5] == [*b"end", EOS, ord("J")]
    assert [file["path"] for file in info["files"]] == [str(poem), str(jsonl)]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b"\n \n", "a.txt holds no text"),
        ("a.csv", b"text", r"a.csv has none of the suffixes \.txt"),
        ("a.txt", b"good\nb\xffd", r"a.txt is not UTF-8: byte 6 \(line 2\) is 0xff"),
        ("a.txt", b"cut \xe2\x82", r"byte 4 \(line 1\) is 0xe2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', 'a.jsonl line 2 has no "text"'),
        ("a.json", b'["a"]\n', 'a.json line 1 has no "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'a.jsonl line 1 has no "text"'),
        ("a.parquet", b"no parquet", "a.parquet cannot be read as parquet"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        build_text_rows([tmp_path / name], TOKENIZER, 8, tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


def test_parquet_without_text_is_named(tmp_path):
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match='a.parquet row 0 has no "text"'):
        build_text_rows([tmp_path / "a.parquet"], TOKENIZER, 8, tmp_path / "rows")


def test_bad_requests(tmp_path, jsonl):
    with pytest.raises(InputError, match="absent.txt does not exist"):
        build_text_rows([jsonl, tmp_path / "absent.txt"], TOKENIZER, 8, tmp_path / "rows")
    with pytest.raises(InputError, match="length must be at least 2.*got 1"):
        build_text_rows([jsonl], TOKENIZER, 1, tmp_path / "rows")
    with pytest.raises(InputError, match="no files"):
        build_text_rows([], TOKENIZER, 8, tmp_path / "rows")
    with pytest.raises(InputError, match="no EOS"):
        build_text_rows([jsonl], dataclasses.replace(TOKENIZER, eos=None), 8, tmp_path / "rows")
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(InputError, match="single token"):
        only_bos = dataclasses.replace(WITH_BOS, encode_text=lambda text: [])
        build_text_rows([tmp_path / "one.txt"], only_bos, 8, tmp_path / "rows")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_kept_columns_are_of_a_rows_first_token(tmp_path, suffix):
    """Values keep their kind; a text file and a record without one have none."""
    records = [
        {"text": "a long text of one document", "quality": "good", "label": 1, "score": 0.5},
        {"text": "short", "quality": None, "label": 0, "score": 1.0},
    ]
    path, plain = tmp_path / f"pool{suffix}", tmp_path / "plain.txt"
    plain.write_text("nothing is said of it")
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("\n".join(map(json.dumps, records)))
    keep = ("quality", "label", "score")
    rows, _ = made(tmp_path, [path, plain], 16, pack="document", keep=keep)
    assert rows.column("quality") == ["good", "good", None, None, None]
    assert rows.column("label") == [1, 1, 0, None, None]
    assert rows.column("score") == [0.5, 0.5, 1.0, None, None]


def test_columns_that_cannot_be_kept(tmp_path):
    path = tmp_path / "pool.jsonl"
    values = [{"text": "a", "q": 1, "list": [1]}, {"text": "b", "q": "two"}]
    path.write_text("\n".join(map(json.dumps, values)))
    for name, message in (
        ("absent", "--keep absent: no record of .* has it; name another column"),
        ("list", "line 1 holds a list; texts and numbers can be kept"),
        ("q", "line 2 holds a str, those before it int; write them all alike"),
        ("doc", "rows have a column of that name"),
    ):
        with pytest.raises(InputError, match=message):
            made(tmp_path, [path], 16, keep=(name,))
    assert not (tmp_path / "rows").exists()
