"""Splits from local folders, from users' files and from a Hub that is played by a function."""

import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core.errors import InputError
from evals.tasks.catalogue import catalogue
from evals.tasks.data import load_split
from evals.tasks.task import Task

ROWS = [
    {"q": "Wo? ß", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answer": 1},
    {"q": "x", "choices": {"text": ["c"], "label": ["1"]}, "answer": 0},
    {"q": "", "choices": {"text": [], "label": []}, "answer": 0},
]


def task(config: str | None = None, dataset: str = "org/name") -> Task:
    return Task("mine", "loglikelihood", dataset, "test", config)


def write(path, rows=ROWS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ("small", "org__name/small/test.jsonl"),
        ("small", "org__name/small/test.parquet"),
        ("small", "org__name/small/test-00000-of-00001.parquet"),
        ("default", "org__name/default/test.jsonl"),
        ("default", "org__name/test.jsonl"),
        (None, "org__name/default/test.parquet"),
        (None, "org__name/test.jsonl"),
    ],
)
def test_local_layouts(tmp_path, config, path):
    write(tmp_path / path)
    found = load_split(task(config=config), "test", tmp_path)
    assert found.rows == ROWS and found.origin == str(tmp_path / path)


def test_rows_hash_alike_in_any_file(tmp_path):
    """jsonl, parquet, parts, another order of keys; but not other rows or another order of rows."""

    def sha(name, *files):
        for file, rows in files:
            write(tmp_path / name / "org__name" / file, rows)
        return load_split(task(), "test", tmp_path / name).sha256

    reordered = [dict(reversed(row.items())) for row in ROWS]
    alike = {
        sha("jsonl", ("test.jsonl", ROWS)),
        sha("keys", ("test.jsonl", reordered)),
        sha("parquet", ("test.parquet", ROWS)),
        sha("parts", ("test-00000-of-00002.parquet", ROWS[:1]),
            ("test-00001-of-00002.parquet", ROWS[1:])),
    }  # fmt: skip
    assert len(alike) == 1
    others = {sha("fewer", ("test.jsonl", ROWS[:2])), sha("turned", ("test.jsonl", ROWS[::-1]))}
    assert len(alike | others) == 3


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "org__name/test.parquet")
    before = load_split(task(), "test", tmp_path)
    write(path, ROWS[:1])
    after = load_split(task(), "test", tmp_path)
    assert after.rows == ROWS[:1] and after.sha256 != before.sha256


def test_plain_files(tmp_path):
    """arithmetic: one file a configuration, which holds the evaluated split and no other."""
    arithmetic = catalogue()[0]["arithmetic_2da"]
    row = {"context": "Q: What is 1 plus 2?\n\nA:", "completion": " 3"}
    write(tmp_path / "EleutherAI__arithmetic/two_digit_addition.jsonl", [row])
    assert load_split(arithmetic, "validation", tmp_path).rows == [row]
    with pytest.raises(InputError, match="no split 'train'; all it has is taken for 'validation'"):
        load_split(arithmetic, "train", tmp_path)
    with pytest.raises(InputError, match="provide EleutherAI__arithmetic/two_digit_subtraction.js"):
        load_split(catalogue()[0]["arithmetic_2ds"], "validation", tmp_path)


def test_a_users_own_files(tmp_path):
    path = write(tmp_path / "items.jsonl")
    one = task(dataset=str(path))
    assert load_split(one, "test").rows == ROWS
    with pytest.raises(InputError, match="items.jsonl has no split 'train'; all it has is taken"):
        load_split(one, "train")
    for split in ("test", "train"):
        write(tmp_path / f"folder/{split}.jsonl", ROWS if split == "test" else ROWS[:1])
    folder = task(dataset=str(tmp_path / "folder"))
    assert [len(load_split(folder, split).rows) for split in ("test", "train")] == [3, 1]
    with pytest.raises(InputError, match=r"\(it has: test, train\); provide .*er/default/dev.js"):
        load_split(folder, "dev")
    with pytest.raises(InputError, match="nowhere.jsonl cannot be read"):
        load_split(task(dataset=str(tmp_path / "nowhere.jsonl")), "test")


def test_products():
    probe = catalogue()[0]["mul_probes_star"]
    found = load_split(probe, probe.split)
    assert len(found.rows) == probe.size == 81
    assert {(r["a"], r["b"]): r["c"] for r in found.rows} == {
        (a, b): a * b for a in range(1, 10) for b in range(1, 10)
    }
    assert found.sha256 == load_split(probe, probe.split).sha256
    with pytest.raises(InputError, match="taproot/products has no split 'train'"):
        load_split(probe, "train")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test.jsonl": b'{"q": 1}\n\n[1]\n'}, "test.jsonl line 3 is no JSON object"),
        ({"test.jsonl": b'{"q": 1}\n{"q": '}, "test.jsonl line 2 is not JSON"),
        ({"test.jsonl": b'{"q": "\xff"}'}, "test.jsonl line 1 is not JSON"),
        ({"test.jsonl": b"\n"}, "test.jsonl holds no items"),
        ({"test.parquet": b"PAR1"}, "test.parquet cannot be read as parquet"),
        ({"test.jsonl": b"{}", "test.parquet": b""}, "test.jsonl, test.parquet, which are not one"),
        ({"test-00001-of-00002.parquet": b""}, "leave one file, or all parts of one"),
        ({"test-00000-of-00002.parquet": b""}, "leave one file, or all parts of one"),
        ({"dev.jsonl": b"", "train-00000-of-00001.parquet": b"", "README.md": b""},
         "mine: {folder} has no split 'test' (it has: dev, train); provide "
         "org__name/default/test.jsonl (or .parquet) in a folder given as --data"),
        ({}, "has no split 'test' (it has: none)"),
    ],
)  # fmt: skip
def test_local_files_amiss(tmp_path, files, message):
    folder = tmp_path / "org__name"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        load_split(task(), "test", tmp_path)
    assert message.format(folder=folder) in str(refused.value)


def test_no_data_folder(tmp_path):
    with pytest.raises(InputError, match="data folder .*nowhere does not exist"):
        load_split(task(), "test", tmp_path / "nowhere")


def test_a_configuration_is_never_another(tmp_path):
    """Files beside the folders of configurations are not every configuration's."""
    write(tmp_path / "org__name/test.jsonl")
    with pytest.raises(InputError, match="provide org__name/small/test.jsonl"):
        load_split(task(config="small"), "test", tmp_path)


def test_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*args, **keys):
        asked.append((args, keys))
        features = datasets.Features(
            {"q": datasets.Value("string"), "answer": datasets.ClassLabel(names=["A", "B"])}
        )
        return datasets.Dataset.from_list([{"q": "x", "answer": 1}], features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = load_split(task(config="small"), "test", tmp_path)
    assert asked.pop() == (("org/name", "small"), {"split": "test"})
    assert found.rows == [{"q": "x", "answer": 1}]
    assert found.origin == "hub:org/name@small/test"
    write(tmp_path / "org__name/small/test.jsonl", [{"answer": 1, "q": "x"}])
    assert load_split(task(config="small"), "test", tmp_path).sha256 == found.sha256
    load_split(catalogue()[0]["arithmetic_1dc"], "validation")
    address = "hf://datasets/EleutherAI/arithmetic/data/single_digit_three_ops.jsonl"
    assert asked == [(("json",), {"data_files": address, "split": "train"})]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'org/name' on the Hub\nand more"),
        FileNotFoundError("Dataset 'org/name' doesn't exist on the Hub"),
        ValueError("Unknown split \"test\". Should be one of ['train']."),
        OSError("no space left"),
    ],
)
def test_hub_errors_say_what_to_provide(monkeypatch, error):
    def load_dataset(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError) as refused:
        load_split(task(config="small"), "test")
    message = str(refused.value)
    assert str(error).split("\n")[0] in message and "\n" not in message
    assert message.startswith("mine: dataset org/name cannot be had from the Hub")
    assert message.endswith("provide org__name/small/test.jsonl (or .parquet) in a folder given as "
                            "--data")  # fmt: skip
