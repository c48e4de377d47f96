"""`attribute magic` from end to end: what it leaves, what reads it, and what it refuses."""

import shutil

import click.testing
import jax
import numpy as np
import pytest

from attribution.commands.magic import magic
from attribution.commands.select import select
from attribution.magic.walk import Walk
from cli import cli
from core.checkpoint import load_model, save_model
from core.command import Door, Group
from core.config import Execution
from core.errors import InputError
from core.files import read_json, read_jsonl, read_npy, write_json
from core.inference import batch_losses
from core.rows import Plan, load_rows, save_rows

LENGTHS = [12, 7, 12, 9, 12, 10, 5]
PLAIN = "--lr 0.1 --batch 3 --epochs 2 --layers scan --batch-tokens 64 --no-metasmoothness".split()
FILES = {"LOCK", "DONE", "config.json", "env.json", "inputs.json", "manifest.json", "metrics.jsonl",
         "info.json", "scores.npy", "row_diagnostics.jsonl", "summary.json", "model"}  # fmt: skip
KEYS = {"format", "method", "sign", "pool", "query", "queries", "query_mode", "query_loss",
        "tokenizer", "target", "tokens", "training", "steps", "losses", "loss_drop",
        "displacement", "metasmoothness", "trust"}  # fmt: skip

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def world(runs, tmp_path_factory):
    """A model; rows whose documents go over their borders; query rows that are choices."""
    root = tmp_path_factory.mktemp("command")
    loaded = runs.loaded("gpt2")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), loaded.params)
    save_model(root / "model", loaded.config, params)
    random = np.random.default_rng(0)

    def rows(name, lengths, columns=None, tokenizer="a" * 64):
        ids = [random.integers(1, 23, n) for n in lengths]
        save_rows(root / name, ids, None, columns, tokenizer)

    documents = [[i] * (n // 2) + [i + 1] * (n - n // 2) for i, n in enumerate(LENGTHS)]
    rows("rows", LENGTHS, {"doc_ids": documents})
    rows("plain", LENGTHS)
    rows("query", [8, 12, 6], {"id": list("abc")})
    rows("unlike", [5], None, "b" * 64)
    save_rows(root / "unlabelled", [np.arange(4)], [np.full(4, -100)])
    rows("choices", [8, 12, 6], {"item": ["x"] * 3, "gold": [0, 1, 0]})
    return root


@pytest.fixture(scope="module")
def run(world):
    """Run the command; (exit code, stdout, stderr)."""
    door = Door(lambda path, _: load_rows(path, 24, 12), lambda *_: 0)
    group = Group("attribute")
    group.add_command(magic)
    group.add_command(select)

    def run(out, *options, rows="rows", query="query"):
        line = ["magic", "--model", world / "model", "--rows", world / rows,
                "--query", world / query, "--out", out, *PLAIN, *options]  # fmt: skip
        return invoke(line)

    def invoke(line):
        result = click.testing.CliRunner().invoke(group, [str(part) for part in line], obj=door)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    run.invoke = invoke
    return run


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    """The folder of a run of one query, credited to documents too, and what was printed."""
    out = tmp_path_factory.mktemp("made") / "out"
    with jax.numpy_dtype_promotion("standard"):
        code, printed, _ = run(out, "--target", "document")
    assert code == 0
    return out, printed


def test_what_a_run_leaves(made, world, close):
    out, printed = made
    names = {file.name for file in out.iterdir()}
    assert names == FILES | {"per_token_scores.npy", "document_scores.npy", "documents.jsonl"}
    tokens_NT, scores_N = read_npy(out / "per_token_scores.npy"), read_npy(out / "scores.npy")
    assert tokens_NT.shape == (7, 12) and scores_N.shape == (7,)
    assert {tokens_NT.dtype, scores_N.dtype} == {np.dtype("float32")}
    assert (tokens_NT[:, 0] == 0).all() and (tokens_NT[1, 7:] == 0).all()
    close(scores_N, tokens_NT.sum(1), 1e-6)
    documents_M, lines = read_npy(out / "document_scores.npy"), read_jsonl(out / "documents.jsonl")
    assert documents_M.shape == (8,) and [line["number"] for line in lines] == [*range(8)]
    close(documents_M[0], tokens_NT[0, :6].sum(), 1e-6)
    close(documents_M[1], tokens_NT[0, 6:].sum() + tokens_NT[1, :3].sum(), 1e-6)
    ranks = [line["rank"] for line in read_jsonl(out / "row_diagnostics.jsonl")]
    assert np.argsort(ranks).tolist() == np.argsort(scores_N).tolist()
    assert "loss_drop" in printed and "verdict" in printed
    steps = read_jsonl(out / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5]
    assert all({"loss", "lr", "grad_norm", "tokens"} <= line.keys() for line in steps)


def test_what_it_says_of_itself(made, world):
    out, _ = made
    info, rows = read_json(out / "info.json"), load_rows(world / "rows")
    assert info.keys() == KEYS
    assert (info["format"], info["method"]) == ("taproot-scores", "magic")
    assert info["sign"] == "negative = proponent (d query loss / d token weight)"
    loaded = load_model(world / "model")
    assert info["pool"] == {
        "path": str(world / "rows"), "rows": rows.sha, "model": loaded.fingerprint
    }  # fmt: skip
    assert info["tokens"] == {"file": "per_token_scores.npy", "alignment": "label"}
    training = info["training"]
    assert training["settings"]["drawn"] == 14 and training["settings"]["batch"] == 3
    assert (training["optim"]["name"], training["optim"]["lr"]) == ("sgd", 0.1)
    assert info["steps"] == 5 and info["queries"] == 1 and info["metasmoothness"] is None
    losses = info["losses"]
    assert info["loss_drop"] == losses["before"] - losses["after"]
    assert info["displacement"]["relative"] > 1e-3
    assert info["trust"]["verdict"] in ("trusted", "doubtful", "not to be trusted")
    # The model it leaves is the one it speaks of.
    query = load_rows(world / "query")
    for folder, known in ((world / "model", "before"), (out, "after")):
        model = load_model(folder)
        batches = batch_losses(model.config, Execution(layers="scan"), {"params": model.params},
                               Plan(query, 64))  # fmt: skip
        loss = sum(float(x.sum()) for _, x in batches) / query.trained.sum()
        assert loss == pytest.approx(losses[known], rel=1e-6)


def test_select_takes_the_most_negative(made, world, run, tmp_path):
    out, _ = made
    line = ["select", out, "--rows", world / "rows", "--k", 2, "--out", tmp_path / "top"]
    assert run.invoke(line)[0] == 0
    scores = read_npy(out / "scores.npy")
    chosen = read_json(tmp_path / "top" / "selection.json")["indices"]
    assert chosen == sorted(np.argsort(scores)[:2].tolist())


def test_the_same_command_again_changes_nothing(made, run, monkeypatch):
    out, _ = made
    monkeypatch.setattr(Walk, "__init__", None)
    code, printed, _ = run(out, "--target", "document")
    assert code == 0 and "already done" in printed
    code, _, error = run(out, "--target", "document", "--seed", "1")
    assert code == 2 and "seed" in error


def test_each_query_by_rows(made, run, tmp_path, world, close):
    """Its mean by tokens is the mean query."""
    code, _, _ = run(tmp_path / "each", "--query-mode", "each", "--target", "example",
                     "--query-batch", "1")  # fmt: skip
    assert code == 0
    assert {file.name for file in (tmp_path / "each").iterdir()} == FILES
    scores_NQ = read_npy(tmp_path / "each" / "scores.npy")
    assert scores_NQ.shape == (7, 3)
    info = read_json(tmp_path / "each" / "info.json")
    assert info["queries"] == 3 and info["target"] == "example" and "tokens" not in info
    assert [line["query"] for line in info["losses"]["each"]] == ["a", "b", "c"]
    trained = load_rows(world / "query").trained
    close(scores_NQ @ (trained / trained.sum()), read_npy(made[0] / "scores.npy"))
    assert info["losses"]["after"] == pytest.approx(
        read_json(made[0] / "info.json")["losses"]["after"]
    )


def test_margins_and_contrast(made, run, tmp_path, world, close):
    """The query less a control that is the query itself is nothing."""
    code, _, _ = run(tmp_path / "margin", "--query-loss", "margin", query="choices")
    assert code == 0
    info = read_json(tmp_path / "margin" / "info.json")
    assert info["query_loss"] == "margin" and info["query"]["rows"] == (
        load_rows(world / "choices").sha
    )
    code, _, _ = run(tmp_path / "contrast", "--control", world / "query")
    assert code == 0
    info = read_json(tmp_path / "contrast" / "info.json")
    assert info["control"] == {
        "path": str(world / "query"), "rows": load_rows(world / "query").sha
    }  # fmt: skip
    found, plain = (
        np.abs(read_npy(folder / "scores.npy")).max() for folder in (tmp_path / "contrast", made[0])
    )
    assert found < 1e-5 * plain and abs(info["losses"]["after"]) < 1e-6


def test_another_precision_is_close(made, run, tmp_path, close):
    try:
        assert run(tmp_path / "double", "--dtype", "float64")[0] == 0
    finally:
        jax.config.update("jax_enable_x64", False)
    found, expected = (
        read_npy(folder / "per_token_scores.npy") for folder in (tmp_path / "double", made[0])
    )
    close(found, expected)


def test_no_eps_root_is_warned_of(run, tmp_path, monkeypatch):
    def enough(*_):
        raise InputError("enough")

    monkeypatch.setattr(Walk, "__init__", enough)
    options = [tmp_path / "out", "--optimizer", "adamw", "--eps-root"]
    code, _, error = run(*options, "0")
    assert code == 2 and "--eps-root 0: the derivative of 1 / sqrt(v)" in error
    assert "sqrt(v)" not in run(*options, "1e-8")[2]
    assert "sqrt(v)" not in run(tmp_path / "out", "--eps-root", "0")[2]
    lora = ["--lora-rank", "2", "--lora-dropout", "0.1"]
    assert "one draw of its masks" in run(tmp_path / "out", *lora)[2]


@pytest.mark.parametrize(
    "options, rows, query, message",
    [
        (["--dtype", "bfloat16"], "rows", "query", "mostly rounding; use float32, or --force"),
        (["--optimizer", "lion"], "rows", "query", "'lion' is not one of"),
        (["--target", "document"], "plain", "query", "does not say which document"),
        (["--query-loss", "margin"], "rows", "query", "no column 'item'"),
        (["--accumulate", "2"], "rows", "query", "--accumulate"),
        (["--steps", "9", "--lr", "0"], "rows", "query", "--lr"),
        (["--nesterov"], "rows", "query", "--nesterov"),
        (["--decay", "nothing"], "rows", "query", "--decay 'nothing'"),
        (["--control", "nowhere"], "rows", "query", "nowhere does not exist"),
        ([], "rows", "unlabelled", "row 0 has no supervised label"),
        ([], "rows", "unlike", "different tokenizers"),
    ],
)
def test_bad_input_ends_before_work(run, tmp_path, monkeypatch, options, rows, query, message):
    monkeypatch.setattr(Walk, "go", None)
    code, printed, errors = run(tmp_path / "out", *options, rows=rows, query=query)
    [error] = [line for line in errors.splitlines() if line.startswith("Error: ")]
    assert code == 2 and not printed and message in error
    assert not (tmp_path / "out").exists()


def test_states_larger_than_the_disk_are_refused(run, tmp_path, monkeypatch):
    """Before training; in memory, or with fewer of them, the same run has room."""
    usage, margin = shutil.disk_usage(tmp_path), 2**24

    def free(size):
        found = usage._replace(free=margin + size)
        monkeypatch.setattr("core.files.shutil.disk_usage", lambda _: found)

    free(130_000)
    monkeypatch.setattr(Walk, "go", None)
    options = ["--save-mode", "all", "--optimizer", "adamw"]
    code, _, error = run(tmp_path / "out", *options, "--memory-gb", "0")
    assert code == 2 and "GB and its disk has" in error and not (tmp_path / "out").exists()
    with pytest.raises(TypeError):  # past all checks
        run(tmp_path / "out", *options)


def test_a_finished_run_is_walked_back(run, world, tmp_path):
    """As it was: its rows in its order, its optimizer, and the end that it had."""
    shutil.copytree(world / "plain", tmp_path / "rows")
    line = ["train", "lm", "--model", world / "model", "--rows", tmp_path / "rows", "--lr", 0.1,
            "--optimizer", "sgd", "--clip", 0, "--schedule", "constant", "--batch", 3, "--steps", 4,
            "--layers", "scan", "--out", tmp_path / "trained"]  # fmt: skip
    trained = click.testing.CliRunner().invoke(cli, [str(part) for part in line])
    assert trained.exit_code == 0, trained.output
    line = ["magic", "--run", tmp_path / "trained", "--query", world / "query", "--batch-tokens",
            64, "--no-metasmoothness", "--out"]  # fmt: skip
    assert run.invoke([*line, tmp_path / "back"])[0] == 0
    info = read_json(tmp_path / "back" / "info.json")
    assert info["replay"]["difference"] < 1e-6 and info["steps"] == 4
    assert info["training"]["optim"]["lr"] == 0.1 and info["training"]["settings"]["drawn"] is None
    losses = [
        [line["loss"] for line in read_jsonl(tmp_path / name / "metrics.jsonl") if "loss" in line]
        for name in ("trained", "back")
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    code, _, error = run.invoke([*line, tmp_path / "other", "--lr", 0.2])
    assert code == 2 and "leave --lr out" in error
    shutil.rmtree(tmp_path / "rows")
    shutil.copytree(world / "query", tmp_path / "rows")
    code, _, error = run.invoke([*line, tmp_path / "other"])
    assert code == 2 and "has changed since" in error and not (tmp_path / "other").exists()
    code, _, error = run.invoke([*line, tmp_path / "other", "--run", tmp_path / "back"])
    assert code == 2 and "no finished run of `train lm`" in error


def test_a_tokenizer_of_another_kind_costs_the_texts_alone(world, tmp_path):
    shutil.copytree(world / "model", tmp_path / "model")
    words = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    write_json(tmp_path / "model" / "tokenizer" / "tokenizer.json", words)
    for name in ("plain", "query"):
        rows = load_rows(world / name)
        save_rows(tmp_path / name, [rows.ids(i) for i in range(len(rows))])
    line = ["attribute", "magic", "--model", tmp_path / "model", "--rows", tmp_path / "plain",
            "--query", tmp_path / "query", "--out", tmp_path / "out", *PLAIN]  # fmt: skip
    result = click.testing.CliRunner().invoke(cli, [str(part) for part in line])
    assert result.exit_code == 0, result.output
    assert "WordLevel" in result.stderr and "show no text" in result.stderr
    assert read_json(tmp_path / "out" / "info.json")["tokenizer"] is None
    assert (tmp_path / "out" / "report.html").exists()
