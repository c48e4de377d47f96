"""Every bad input ends in one line that names the thing, exit code 2, and nothing on the disk."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from core import families, files, safetensors, schema
from core.checkpoint import save_model
from core.families import read_config
from core.files import read_json, write_json
from tokenizers import load

HF = Path(__file__).parents[1] / "golden" / "gpt2_tiny"
ROWS = "--tokenizer bytes --length 32 --out out".split()
# At a constant rate, trainings of any length share one program, compiled once.
TRAIN = "train lm --config model.json --rows rows --schedule constant --out out".split()
CONTINUE = "train lm --model model --rows rows --out out --steps 1".split()
NLL = "eval nll --model model --rows rows --out out.npy".split()
EVAL = "eval run --model model --items items.jsonl --out out".split()
BUILD = "attribute build --model model --rows rows --projection-dim 2 --out out".split()
SCORE = "attribute score --model model --pool rows --query query --projection-dim 2 --out out"
SELECT = "attribute select scores --rows rows --k 2 --out out".split()
MAGIC = "attribute magic --model model --rows rows --query query --out out".split()
REPORT = "report spec.json --out out".split()
BENCH = "bench attribution --out out.json".split()
IMPORT = "convert import hf --out out".split()


@pytest.fixture(scope="module")
def good(tmp_path_factory, write_world, run):
    """A folder in which every command above would succeed."""
    folder = tmp_path_factory.mktemp("good")
    write_world(folder)
    config = read_config(folder / "model.json")
    params = schema.init(families.rows(config), config.layers, 0)
    save_model(folder / "model", config, params, load("bytes"))
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    run("data", "text", "texts.jsonl", *ROWS[:-1], "rows")
    run("data", "query", "items.jsonl", *ROWS[:-1], "query")
    run(*BUILD[:-1], "store")
    run(*SCORE.split()[:-1], "scores")
    shutil.copytree(HF, folder / "hf")
    write_json(folder / "spec.json", {"scores": "scores"})
    patch.undo()
    return folder


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    """A copy of it, to spoil, as the current folder."""
    folder = tmp_path / "world"
    shutil.copytree(good, folder)
    monkeypatch.chdir(folder)
    # The store knows its rows by their absolute path.
    info = (folder / "store/info.json").read_text()
    (folder / "store/info.json").write_text(info.replace(str(good), str(folder)))
    return folder


def listing(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(world, refuse):
    """The line with which a command refuses, having changed nothing."""

    def refused(*arguments: object) -> str:
        before = listing(world)
        said = refuse(*arguments)
        assert listing(world) == before
        assert str(world) not in said  # paths as they were typed
        return said

    return refused


def spoil(path: str, **changes: object) -> None:
    """Change keys of a JSON object; None deletes one."""
    content = {**read_json(path), **changes}
    write_json(path, {key: value for key, value in content.items() if value is not None})


def saved(columns: dict[str, Any]) -> None:
    """Any columns as rows; what another tool may have written."""
    shutil.rmtree("rows")
    datasets.Dataset.from_dict(columns).save_to_disk("rows")


def rows_of(*pairs: tuple[list[int], list[int]]) -> None:
    ids, labels = zip(*pairs, strict=True)
    saved({"input_ids": ids, "labels": labels})


GOOD_ROW = ([1, 2, 3], [1, 2, 3])
BAD_ROWS = {
    "id outside the vocabulary": (([1, 258], [1, 258]), ("row 1", "258", "vocabulary of 258")),
    "negative id": (([1, -3], [1, -3]), ("row 1", "-3")),
    "empty": (([], []), ("row 1", "empty", "drop")),
    "nothing supervised": (([1, 2], [-100, -100]), ("row 1", "supervise")),
    "only the first supervised": (([1, 2], [1, -100]), ("row 1", "supervise")),
    "longer than the context": (([1] * 33, [1] * 33), ("row 1", "33", "context of 32")),
    "labels of another length": (([1, 2], [1, 2, 3]), ("row 1", "another length")),
}


@pytest.mark.parametrize(
    "command", [CONTINUE, TRAIN, NLL, BUILD, MAGIC], ids=lambda c: " ".join(c[:2])
)
@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named(refused, bad, command):
    row, wanted = BAD_ROWS[bad]
    rows_of(GOOD_ROW, row)
    said = refused(*command)
    assert "rows row 1" in said and all(part in said for part in wanted)


@pytest.mark.parametrize(
    "spoiled, wanted",
    [
        (lambda: saved({"input_ids": [[1, 2]]}), "no column 'labels'"),
        (lambda: saved({"labels": [[1, 2]]}), "no column 'input_ids'"),
        (lambda: saved({"input_ids": ["a"], "labels": [[1]]}), "list of integers"),
        (lambda: saved({"input_ids": [], "labels": []}), "rows cannot be read"),
        (lambda: shutil.rmtree("rows"), "rows does not exist"),
        (lambda: os.unlink("rows/dataset_info.json"), "not a rows folder"),
        (lambda: Path("rows/data-00000-of-00001.arrow").write_bytes(b"x"), "cannot be read"),
        (lambda: Path("rows/rows.json").write_text("{"), "rows.json is not JSON"),
        (lambda: (shutil.rmtree("rows"), Path("rows").write_text("")), "rows"),
    ],
    ids=range(9),
)
def test_a_folder_that_holds_no_rows_is_named(refused, capfd, spoiled, wanted):
    spoiled()
    assert wanted in refused(*NLL)
    assert wanted in refused(*BUILD)


MODELS = {
    "missing": (lambda: shutil.rmtree("model"), "model does not exist"),
    "file": (lambda: (shutil.rmtree("model"), Path("model").write_text("")), "no config.json"),
    "no config": (lambda: os.unlink("model/config.json"), "no config.json"),
    "config no JSON": (lambda: Path("model/config.json").write_text("{"), "is not JSON"),
    "config a list": (lambda: Path("model/config.json").write_text("[]"), "no JSON object"),
    "config a folder": (
        lambda: (os.unlink("model/config.json"), os.mkdir("model/config.json")),
        "model/config.json cannot be read",
    ),
    "no fingerprint": (lambda: spoil("model/config.json", fingerprint=None), "fingerprint"),
    "no weights": (
        lambda: os.unlink("model/params.safetensors"),
        "params.safetensors does not exist",
    ),
    "other weights": (
        lambda: spoil("model/config.json", model={**read_json("model.json"), "layers": 3}),
        "'blocks/attn_c_attn/b' has shape (2, 24), the config asks for (3, 24)",
    ),
    "unknown key": (
        lambda: spoil("model/config.json", model={**read_json("model.json"), "depth": 3}),
        "unknown model config key 'depth'",
    ),
    "run without model": (
        lambda: write_json("model/config.json", {"command": "train lm", "options": {}}),
        "run its command again",
    ),
    "tokenizer gone bad": (
        lambda: (shutil.rmtree("model/tokenizer"), os.mkdir("model/tokenizer")),
        "holds no tokenizer",
    ),
}


@pytest.mark.parametrize("command", [CONTINUE, NLL, EVAL, BUILD, SCORE.split()],
                         ids=lambda c: " ".join(c[:2]))  # fmt: skip
@pytest.mark.parametrize("bad", MODELS)
def test_a_bad_model_is_named(refused, bad, command):
    spoiled, wanted = MODELS[bad]
    spoiled()
    assert wanted in refused(*command)


def header(edit) -> None:
    """Rewrite the JSON header of hf/model.safetensors, padded to its old length or longer."""
    path = Path("hf/model.safetensors")
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    content = json.loads(data[8 : 8 + size])
    edit(content)
    text = json.dumps(content).encode().ljust(size)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def tensors(edit) -> None:
    """Write hf/model.safetensors anew with an edited dictionary of arrays."""
    found = {name: np.array(value) for name, value in safetensors.read_folder("hf").items()}
    edit(found)
    safetensors.write("hf/model.safetensors", found, {"format": "pt"})


def cut(size: int) -> None:
    path = Path("hf/model.safetensors")
    path.write_bytes(path.read_bytes()[:size])


NORM = "transformer.ln_f.weight"
WEIGHTS = {
    "no weights": (lambda: os.unlink("hf/model.safetensors"), "no model.safetensors"),
    "empty file": (lambda: cut(0), "model.safetensors"),
    "header cut": (lambda: cut(100), "truncated"),
    "data cut": (lambda: cut(-5), "truncated"),
    "overlap": (
        lambda: header(lambda h: h[NORM].update(data_offsets=[0, h[NORM]["shape"][0] * 4])),
        "overlap",
    ),
    "header no JSON": (
        lambda: Path("hf/model.safetensors").write_bytes(struct.pack("<Q", 2) + b"xx"),
        "not JSON",
    ),
    "missing tensor": (lambda: tensors(lambda t: t.pop(NORM)), NORM),
    "extra tensor": (lambda: tensors(lambda t: t.update(other=np.zeros(3, "f4"))), "'other'"),
    "another shape": (
        lambda: tensors(lambda t: t.update({NORM: np.zeros(3, "f4")})), "[3]",
    ),
    "not finite": (lambda: tensors(lambda t: t[NORM].fill(np.nan)), "NaN"),
    "another family": (lambda: spoil("hf/config.json", model_type="bert"), "'bert'"),
    "unknown key": (lambda: spoil("hf/config.json", rope=1), "'rope'"),
    "missing key": (lambda: spoil("hf/config.json", n_layer=None), "'n_layer'"),
}  # fmt: skip


@pytest.mark.parametrize("bad", WEIGHTS)
def test_bad_weights_are_named(refused, bad):
    spoiled, wanted = WEIGHTS[bad]
    spoiled()
    said = refused(*IMPORT)
    assert wanted in said and "hf" in said


def test_a_truncated_model_is_named(refused, world):
    weights = world / "model/params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert "model/params.safetensors is truncated" in refused(*NLL)


OPTIONS = [
    (TRAIN, "--steps 0"), (TRAIN, "--steps -1"), (TRAIN, "--lr nan"), (TRAIN, "--lr inf"),
    (TRAIN, "--lr 0"), (TRAIN, "--lr x"), (TRAIN, "--batch 0"), (TRAIN, "--accumulate 0"),
    (TRAIN, "--accumulate 3"), (TRAIN, "--warmup 9999"), (TRAIN, "--clip nan"),
    (TRAIN, "--beta2 1"), (TRAIN, "--momentum -1"), (TRAIN, "--weight-decay -1"),
    (TRAIN, "--end 2"), (TRAIN, "--seed -1"), (TRAIN, "--keep 0"), (TRAIN, "--save-every 0"),
    (TRAIN, "--eval-every -2"), (TRAIN, "--loss-chunk -1"), (TRAIN, "--model-parallel 7"),
    (TRAIN, "--dtype int8"), (NLL, "--batch-tokens -5"), (EVAL, "--batch-tokens 0"),
    (BUILD, "--projection-dim -1"), (BUILD, "--batch-tokens 0"), (SCORE.split(), "--damping -1"),
    (SCORE.split(), "--damping nan"), (SELECT, "--k 0"), (SELECT, "--k 99"), (SELECT, "--seed -1"),
    (["data", "text", "texts.jsonl", *ROWS], "--length 1"),
    (["data", "text", "texts.jsonl", *ROWS], "--tokenizer nosuch"),
    (["data", "query", "items.jsonl", *ROWS], "--length 1"),
    (BENCH, "--length 1"), (BENCH, "--batch 0"),
    (BENCH, "--length 99999"), (BENCH, "--projection-dim -1"), (TRAIN, "--nosuch 1"),
]  # fmt: skip


@pytest.mark.parametrize("command, option", OPTIONS,
                         ids=[f"{c[1]} {option}" for c, option in OPTIONS])  # fmt: skip
def test_an_option_out_of_range_is_named(refused, command, option):
    name, value = option.split()
    said = refused(*command, name, value)
    assert name in said or value in said


def test_the_largest_seed_works(world, run):
    seed = ["--seed", 2**32 - 1]
    run(*TRAIN, "--steps", 1, *seed)
    run(*with_out(SELECT, "subset"), "--strategy", "random", *seed)
    run(*with_out(SCORE.split(), "new"), "--projection-seed", 2**32 - 1)


CONFIGS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[]", "no JSON object"),
    "unknown key": ({"depth": 3}, "'depth'"),
    "missing key": ({"width": None}, "'width' is missing"),
    "text": ({"width": "8"}, "width must be of type int, got '8'"),
    "bool": ({"layers": True}, "layers must be of type int, got True"),
    "fraction": ({"heads": 0.5}, "heads must be of type int"),
    "zero": ({"layers": 0}, "layers must be positive"),
    "indivisible": ({"width": 9}, "width 9"),
    "activation": ({"activation": "tanh"}, "'tanh'"),
    "family": ({"family": "rnn"}, "'rnn'"),
    "epsilon": ({"norm_eps": "small"}, "norm_eps must be"),
}


@pytest.mark.parametrize("bad", CONFIGS)
def test_a_bad_model_config_is_named(refused, bad):
    content, wanted = CONFIGS[bad]
    if isinstance(content, str):
        Path("model.json").write_text(content)
    else:
        spoil("model.json", **content)
        if content.get("width", 0) is None:
            write_json("model.json", {"vocab_size": 258, "context": 32, "layers": 2, "heads": 2})
    assert wanted in refused(*TRAIN)


def test_a_missing_file_and_a_folder_for_a_file_are_named(refused, world):
    os.mkdir("folder")
    for path in ("nosuch", "folder"):
        text = f"{path}.txt"
        if path == "folder":
            os.mkdir(text)
        assert text in refused("data", "text", text, *ROWS)
        assert path in refused("data", "query", path, *ROWS)
        assert path in refused(*EVAL, "--items", path)
        assert path in refused("train", "lm", "--config", path, "--rows", "rows", "--out", "out")
        assert path in refused(*TRAIN, "--tokenizer", path)
        assert path in refused("convert", "import", path, "--out", "out")
        assert path in refused("convert", "export", path, "--out", "out")
        assert path in refused("attribute", "select", path, "--rows", "rows", "--k", 1)
        assert path in refused(*SCORE.split(), "--query", path)
        assert path in refused(*SCORE.split(), "--pool", path)
        assert path in refused("report", path)
        assert path in refused("run", path)


def test_train_needs_one_start(refused):
    for start in ([], ["--model", "model", "--config", "model.json"]):
        said = refused("train", "lm", *start, "--rows", "rows", "--out", "out")
        assert "--model" in said and "--config" in said


def test_train_names_optimizer_options_that_do_not_fit(refused):
    assert "transformer.wte.weight" in refused(*TRAIN, "--decay", "wte.weight")
    assert "--warmup" in refused(*TRAIN, "--start", "0.5")
    assert "sgd and muon" in refused(*TRAIN, "--momentum", "0.9")


ITEMS = {
    "not JSON": ("{", "line 1 is not JSON"),
    "no object": ("3", "no JSON object"),
    "no label": ('{"context": "a", "choices": [" b"]}', "'label' is missing"),
    "label": ('{"context": "a", "choices": [" b"], "label": 1}', "'label'"),
    "nothing": ("", "no items"),
    "not text": ("\xff", "line 1"),
    "long answer": (
        json.dumps({"context": "a", "choices": ["b" * 50], "label": 0}), "shorten it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", ITEMS)
def test_a_bad_items_file_is_named(refused, bad):
    content, wanted = ITEMS[bad]
    Path("items.jsonl").write_bytes(content.encode("latin-1"))
    assert wanted in refused("data", "query", "items.jsonl", *ROWS)
    assert wanted in refused(*EVAL)


TEXTS = {
    "empty": (b"", "is empty"),
    "blank": (b'{"text": " "}\n', "no text"),
    "not JSON": (b"x\n", "line 1 is not JSON"),
    "no text": (b'{"body": "a"}\n', 'no "text"'),
    "not UTF-8": (b'{"text": "\xff"}\n', "not UTF-8"),
}


@pytest.mark.parametrize("bad", TEXTS)
def test_a_bad_text_file_is_named(refused, bad):
    content, wanted = TEXTS[bad]
    Path("texts.jsonl").write_bytes(content)
    said = refused("data", "text", "texts.jsonl", *ROWS)
    assert wanted in said and "texts.jsonl" in said


def other_tokenizer(name: str) -> None:
    spoil(f"{name}/rows.json", tokenizer="f" * 64)


def test_different_tokenizers_are_named(refused):
    other_tokenizer("query")
    assert "query was made with another tokenizer" in refused(*SCORE.split())
    shutil.rmtree("model/tokenizer")  # a model that cannot tell
    said = refused(*SCORE.split())
    assert "rows" in said and "query" in said and "different tokenizers" in said


@pytest.mark.parametrize("command", [EVAL, ["generate", "--model", "model", "--prompt", "a"]])
def test_a_tokenizer_larger_than_the_model_is_named(refused, command):
    larger = Path(__file__).parents[1] / "golden" / "tokenizers" / "gpt2"
    said = refused(*command, "--tokenizer", str(larger))
    assert "the tokenizer has token 511, the model a vocabulary of 258" in said


def test_rows_of_another_tokenizer_than_the_models_are_named(refused):
    other_tokenizer("rows")
    for command in (CONTINUE, NLL, BUILD, SCORE.split()):
        assert "rows was made with another tokenizer" in refused(*command)


def test_a_store_must_fit_model_rows_and_options(refused, world, run):
    score = [*SCORE.split(), "--pool", "store"]
    assert "'dim': 3" in refused(*score, "--projection-dim", 3)
    shutil.copytree("rows", "kept")
    rows_of(GOOD_ROW)
    assert "rows has changed" in refused(*score)
    shutil.rmtree("rows")
    assert "rows" in refused(*score)
    shutil.copytree("kept", "rows")
    config = read_config("model.json")
    shutil.rmtree("model")
    params = schema.init(families.rows(config), config.layers, 1)
    save_model("model", config, params, load("bytes"))
    assert "another model" in refused(*score)


@pytest.mark.parametrize("name", ["gradients.npy", "losses.npy", "info.json"])
def test_a_damaged_store_is_named(refused, name):
    score = [*SCORE.split(), "--pool", "store"]
    for content in (b"", b"{}", Path(f"store/{name}").read_bytes()[:90]):
        Path(f"store/{name}").write_bytes(content)
        assert "store" in refused(*score)


def test_an_array_of_pickles_is_never_opened(refused, world):
    from_store = [*SCORE.split(), "--pool", "store"]
    for name, command in {"scores/scores.npy": SELECT, "store/gradients.npy": from_store}.items():
        np.save(name, np.array([{}], object), allow_pickle=True)
        assert name in refused(*command)


def test_scores_must_fit_the_rows(refused):
    assert "differ" in refused("attribute", "select", "scores", "--rows", "query", "--k", 1)
    np.save("scores/scores.npy", np.zeros(3, np.float32))
    assert "scores.npy" in refused(*SELECT)
    for folder in ("store", "rows"):
        assert folder in refused("attribute", "select", folder, "--rows", "rows", "--k", 1)


SPECS = {
    "not JSON": ("{", "is not JSON"),
    "a list": ([], "JSON object"),
    "no scores": ({}, "needs `scores`"),
    "unknown key": ({"scores": "scores", "armz": {}}, "'armz'"),
    "scores missing": ({"scores": "nosuch"}, "nosuch"),
    "rows missing": ({"scores": "scores", "rows": "nosuch", "tokenizer": "bytes"}, "nosuch"),
    "eval missing": ({"scores": "scores", "arms": {"top": [{"eval": "nosuch"}]}}, "nosuch"),
    "run missing": ({"scores": "scores", "pretraining": "nosuch"}, "nosuch"),
    "k": ({"scores": "scores", "k": 999}, "999"),
}


@pytest.mark.parametrize("bad", SPECS)
def test_a_bad_report_spec_is_named(refused, bad):
    content, wanted = SPECS[bad]
    Path("spec.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert wanted in refused(*REPORT)


def test_a_report_does_not_replace_the_summary_of_the_scores(refused, run):
    shutil.copy("spec.json", "scores/spec.json")
    spoil("scores/spec.json", scores=".")
    assert "scores/summary.json is not a report's" in refused("report", "scores/spec.json")
    run(*REPORT)
    run(*REPORT)  # its own it does


RECORDS = {
    "not JSON": ("{", "is not JSON"),
    "a model config": ({"width": 3}, "records no command"),
    "no text": ({"command": 3, "options": {}}, "records no command"),
    "unknown command": ({"command": "train nosuch", "options": {}}, "'train nosuch'"),
    "a group": ({"command": "train", "options": {}}, "'train'"),
    "itself": ({"command": "run", "options": {"config": "spec.json"}}, "'run'"),
    "unknown option": ({"command": "train lm", "options": {"lrr": 1}}, "'lrr'"),
    "missing option": ({"command": "train lm", "options": {}}, "--rows"),
    "bad value": ({"command": "train lm", "options": {"rows": "r", "out": "o", "lr": "x"}}, "lr"),
    "bad kind": ({"command": "train lm", "options": {"rows": "r", "out": "o", "lr": [1]}}, "kind"),
}


@pytest.mark.parametrize("bad", RECORDS)
def test_a_bad_record_is_named(refused, bad):
    content, wanted = RECORDS[bad]
    Path("spec.json").write_text(content if isinstance(content, str) else json.dumps(content))
    assert wanted in refused("run", "spec.json")


WRITERS = [
    ["data", "text", "texts.jsonl", *ROWS], ["data", "query", "items.jsonl", *ROWS],
    ["data", "demo", "--out", "out"], TRAIN, NLL, EVAL, BUILD, SCORE.split(), SELECT, REPORT,
    BENCH, IMPORT, "convert export model --out out".split(),
]  # fmt: skip


def with_out(command: Sequence[str], out: str) -> list[str]:
    return [*command, "--out", out]


@pytest.mark.parametrize("command", WRITERS, ids=lambda c: " ".join(c[:2]))
def test_an_out_that_cannot_be_written_is_named(refused, command):
    end = Path(command[command.index("--out") + 1]).suffix
    Path("file").write_text("")
    said = refused(*with_out(command, f"file/new/out{end}"))
    assert "file" in said
    if not end:
        assert "file" in refused(*with_out(command, "file"))


FOLDERS = [c for c in WRITERS if c not in (NLL, BENCH, REPORT)]


@pytest.mark.parametrize("command", FOLDERS, ids=lambda c: " ".join(c[:2]))
def test_a_folder_that_is_not_ours_stays(refused, command):
    os.mkdir("mine")
    Path("mine/notes.txt").write_text("x")
    assert "mine" in refused(*with_out(command, "mine"))
    write_json("mine/config.json", {"model_type": "gpt2"})
    write_json("mine/command.json", [])
    assert "mine" in refused(*with_out(command, "mine"))


def test_a_file_that_is_not_ours_stays(refused):
    np.save("mine.npy", np.zeros(3))
    assert "not ours" in refused(*with_out(NLL, "mine.npy"))
    write_json("other.json", {})
    assert "not ours" in refused(*with_out(NLL, "other.npy"))
    assert ".npy" in refused(*with_out(NLL, "out.txt"))
    os.mkdir("folder.npy")
    assert "folder" in refused(*with_out(NLL, "folder.npy"))
    assert "folder" in refused(*with_out(BENCH, "folder.npy"))


FULL = [c for c in WRITERS if c not in (REPORT, BENCH, ["data", "demo", "--out", "out"])]


@pytest.mark.parametrize("command", FULL, ids=lambda c: " ".join(c[:2]))
def test_a_full_disk_leaves_nothing_and_the_command_can_be_repeated(
    refused, run, command, monkeypatch
):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    command = [*command, "--steps", "1"] if command is TRAIN else command
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        said = refused(*command)
    assert "disk is full" in said or "No space left" in said
    assert command[command.index("--out") + 1] in said
    run(*command)


def test_a_checkpoint_that_would_not_fit_is_not_begun(refuse, run, monkeypatch, world):
    """Orbax, which writes the checkpoints, tells of a full disk in pages, from several threads."""
    command = [*TRAIN, "--steps", "2", "--save-every", "1"]
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(".")
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
        said = refuse(*command)
        assert "out/ckpt" in said and "free some" in said
        assert "new" in refuse(*IMPORT[:-1], "new") and not Path("new").exists()
    assert not list(Path("out/ckpt").iterdir())
    run(*command)


@pytest.mark.parametrize("command", [TRAIN, BUILD, SCORE.split()], ids=lambda c: c[1])
def test_after_a_failed_start_the_corrected_command_may_use_the_folder(
    refused, run, command, world
):
    Path("rows/rows.json").rename("aside.json")
    Path("rows/rows.json").write_text("{")
    refused(*command)
    refused(*with_out(command, "deep/er/out"))
    Path("aside.json").rename("rows/rows.json")
    # A kill -9 in the middle of a start leaves its records.
    os.mkdir("out")
    config = {"taproot": 1, "command": " ".join(command[:2]), "options": {"seed": 7}}
    write_json("out/config.json", config)
    write_json("out/inputs.json", {"rows": "other"})
    Path("out/LOCK").write_text("")
    extra = ["--steps", "1"] if command is TRAIN else []
    run(*command, *extra)
    assert read_json("out/config.json")["options"]["out"] == str(world / "out")


def test_an_empty_folder_may_be_named(run, world):
    for command in ([*TRAIN, "--steps", "1"], ["data", "text", "texts.jsonl", *ROWS]):
        os.mkdir("empty")
        run(*with_out(command, "empty"))
        shutil.rmtree("empty")


def test_changed_input_is_refused_on_a_resume(refused, run):
    run(*BUILD)
    os.unlink("out/DONE")
    rows_of(GOOD_ROW, GOOD_ROW)
    said = refused(*BUILD)
    assert "input rows=" in said and "out" in said


def test_two_processes_do_not_write_into_one_folder(refused, run, world):
    from core.rundir import open_run

    with open_run("busy", "attribute build", {}):
        os.mkdir("busy/work")
        write_json("busy/config.json", {"taproot": 1, "command": "attribute build", "options": {}})
        with pytest.raises(ValueError, match="in use"):
            open_run("busy", "attribute build", {})
    assert Path("busy/work").exists()


def test_a_diverged_training_says_so_and_a_corrected_one_begins_anew(refuse, run, world):
    diverge = "--steps 4 --optimizer sgd --clip 0 --lr 99 --weight-decay 1e30".split()
    said = refuse(*TRAIN, *diverge)
    assert "--resume never" in said and Path("out/FAILED").exists()
    run(*TRAIN, "--steps", "1", "--resume", "never")
    assert Path("out/DONE").exists() and not Path("out/FAILED").exists()


@pytest.mark.parametrize("command", [EVAL, NLL, BUILD, TRAIN], ids=lambda c: " ".join(c[:2]))
def test_an_interrupt_prints_no_traceback_and_leaves_nothing(world, refuse, command, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("core.checkpoint.families.rows", interrupt)
    before = listing(world)
    assert "interrupted" in refuse(*command, code=130)
    assert listing(world) == before
