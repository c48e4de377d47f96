"""`probe train`, `sweep` and `view` as typed: files, repeats, and every refusal in one line."""

import json
import re
import shutil
from pathlib import Path

import click.testing
import numpy as np
import pytest

import cli
import tokenizers
from core import safetensors
from core.checkpoint import load_model, save_model
from core.command import Group
from core.config import Execution
from core.files import read_json
from core.rows import save_rows
from evals import bench_probe
from evals.probe.commands import probe_group
from evals.probe.file import load_probe, require_match, save_probe
from evals.probe.run import Settings
from evals.probe.view import open_probes, view

DOOR = Group("t", commands={"probe": probe_group})


@pytest.fixture(scope="module")
def invoke(model_folder, text):
    def invoke(*arguments: object, training: bool = True) -> click.testing.Result:
        asked = ["--model", model_folder, "--text", text, "--samples", 100, "--eval-tokens", 300,
                 "--batch-tokens", 640, "--context", 32] if training else []  # fmt: skip
        words = [str(word) for word in ("probe", arguments[0], *asked, *arguments[1:])]
        return click.testing.CliRunner().invoke(DOOR, words, obj=cli.door())

    return invoke


@pytest.fixture(scope="module")
def refuse(invoke):
    """The line with which a command ends; nothing is left behind."""

    def refuse(*arguments: object, training: bool = True) -> str:
        result = invoke(*arguments, training=training)
        assert result.exit_code == 2, result.output
        if "--out" in arguments:
            assert not Path(str(arguments[arguments.index("--out") + 1])).exists()
        return result.stderr

    return refuse


@pytest.fixture(scope="module")
def swept(invoke, tmp_path_factory):
    out = tmp_path_factory.mktemp("probe") / "sweep"
    result = invoke("sweep", "--target", "x", "--layers", "all", "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.stdout


def contents(folder: Path) -> dict[str, bytes]:
    timed = ("events.", "env.json", "manifest.json", "config.json", "LOCK", "DONE")
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*"))
            if f.is_file() and not f.name.startswith(timed)}  # fmt: skip


def test_sweep_writes_what_it_found(swept):
    out, said = swept
    results = read_json(out / "results.json")
    names = ["embed", "resid_post.0", "resid_post.1"]
    assert [layer["tap"] for layer in results["layers"]] == names
    assert set(results["baselines"]) == {"majority", "current_token", "own_probability"}
    rows = said.splitlines()
    assert rows[0].split()[:2] == ["balanced", "acc"]
    assert [row.split()[0] for row in rows[1:4]] == names
    assert "100 positive" in said and "% of" in said
    for layer in results["layers"]:
        probe = load_probe(out / layer["file"])
        assert probe.about["metrics"] == layer["metrics"]
        assert probe.threshold == layer["threshold"] and probe.about["layer"] == layer["layer"]
        assert probe.about["metrics"]["threshold"] == probe.threshold
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [-1, 0, 1]
    assert list(lines[0])[:7] == ["step", "tap", "probe/balanced_accuracy", "probe/tn", "probe/fp",
                                  "probe/fn", "probe/tp"]  # fmt: skip
    assert len(list(out.glob("events.out.tfevents.*"))) == 1
    curve = (out / "curve.svg").read_text()
    assert curve.count("<circle") == 3 and "nan" not in curve
    assert not re.search(r'[yV"]\s?=?"?-\d', curve)


def test_the_same_bytes_after_a_kill(swept, invoke, tmp_path):
    """A run that was killed goes on from its tokenised rows and ends with the same files."""
    out, _ = swept
    again = tmp_path / "again"
    shutil.copytree(out, again)
    for name in ("DONE", "manifest.json", "results.json", "metrics.jsonl", "curve.svg"):
        (again / name).unlink()
    shutil.rmtree(again / "layers")
    result = invoke("sweep", "--target", "x", "--layers", "all", "--out", again)
    assert result.exit_code == 0, result.output
    assert contents(again) == contents(out)
    result = invoke("sweep", "--target", "x", "--layers", "all", "--out", again)
    assert "already done" in result.stdout
    result = invoke("sweep", "--target", "a", "--layers", "all", "--out", again)
    assert result.exit_code == 2 and "option target='x'" in result.stderr


def test_one_layer_alone(swept, invoke, tmp_path):
    result = invoke("train", "--target", "x", "--layer", "0", "--probe", "mlp", "--dtype",
                    "bfloat16", "--weighting", "sqrt", "--sampling", "natural",
                    "--out", tmp_path / "one")  # fmt: skip
    assert result.exit_code == 0, result.output
    probe = load_probe(tmp_path / "one" / "probe.safetensors")
    assert probe.about["kind"] == "mlp" and probe.about["dtype"] == "bfloat16"
    assert all(x.dtype == np.float32 for x in probe.tensors.values())
    assert "linear" in probe.about["controls"] and "  linear" in result.stdout
    assert probe.about["metrics"]["auroc"] > 0.9


def test_rows_with_labels(invoke, model_folder, refuse, tmp_path, tokenizer):
    """A column says of each row, or of each token, what is so; packed by whoever made the rows."""
    random = np.random.default_rng(0)
    good = (random.random(60) < 0.5).tolist()
    ids = [random.choice(list(b"abcX" if one else b"abcd"), 30) for one in good]
    each = [(row == ord("a")).astype(int).tolist() for row in ids]
    save_rows(tmp_path / "rows", ids, columns={"good": good, "each": each},
              tokenizer=tokenizer.fingerprint)  # fmt: skip
    asked = ("--model", model_folder, "--rows", tmp_path / "rows", "--layer", "1", "--samples", 200,
             "--eval-tokens", 200, "--out", tmp_path / "out")  # fmt: skip
    result = invoke("train", *asked, "--label", "each", "--site", "attn_out", training=False)
    assert result.exit_code == 0, result.output
    about = load_probe(tmp_path / "out" / "probe.safetensors").about
    assert (about["tap"], about["task"], about["target"]["kind"]) == ("attn_out.1", "next", "label")
    assert about["data"]["split_by"] == "row" and about["counts"]["prevalence"] < 0.35
    shutil.rmtree(tmp_path / "out")
    result = invoke("train", *asked, "--label", "good", training=False)
    assert result.exit_code == 0, result.output
    probe = load_probe(tmp_path / "out" / "probe.safetensors")
    assert probe.about["task"] == "current" and "own_probability" not in result.stdout
    # Of the whole row, an X says it at once.
    assert probe.about["metrics"]["ap"] > 0.6
    shutil.rmtree(tmp_path / "out")
    assert "no column 'bad'" in refuse("train", *asked, "--label", "bad", training=False)
    line = ("train", *asked, "--label", "good", "--context", 8)
    assert "leave it out with --rows" in refuse(*line, training=False)


def test_view_reads_all_from_the_files(swept, invoke, text, tmp_path, loaded, tokenizer):
    out, _ = swept
    page = tmp_path / "page.html"
    result = invoke("view", out, "--text", text, "--out", page, "--tokens", 200, training=False)
    assert result.exit_code == 0, result.output
    assert "layers 3, tokens 200" in result.stdout and page.stat().st_size < 200_000
    probes = open_probes(out)
    own = load_model(probes[0].about["model"])
    shown = view(out, probes, own, tokenizer, text, 200, 640)
    assert shown.p_LT.shape == (3, 200) and shown.p_LT.dtype == np.float32
    assert b"".join(shown.tokens) == text.read_bytes()[:200]
    letters = text.read_text()
    for t in range(199):
        expected = -1 if t % 32 == 31 else letters[t + 1] == "x"
        assert shown.truth_T[t] == expected
    # The embedding of a letter and its place say much alike wherever it stands.
    behind_q = np.array([letter == "q" for letter in letters[:200]])
    assert shown.p_LT[0, behind_q].min() > shown.p_LT[0, ~behind_q].mean()
    assert len(open_probes(out / "layers" / "embed.safetensors")) == 1


def test_a_probe_speaks_of_its_own_model_only(swept, invoke, refuse, text, tmp_path, loaded):
    out, _ = swept
    probe = load_probe(out / "layers" / "resid_post.0.safetensors")
    other = {**loaded.params, "embed": {
        name: x * 2 for name, x in loaded.params["embed"].items()}}  # fmt: skip
    save_model(tmp_path / "other", loaded.config, other, tokenizers.load("bytes"))
    said = refuse("view", out, "--text", text, "--out", tmp_path / "p.html", "--model",
                  tmp_path / "other", training=False)  # fmt: skip
    assert "is a probe of model" in said
    own = load_model(probe.about["model"])
    gpt2 = tokenizers.load(Path(__file__).parents[3] / "golden" / "tokenizers" / "gpt2")
    with pytest.raises(ValueError, match="another tokenizer"):
        require_match(probe, own, gpt2, "probe")
    assert "must end in .html" in refuse("view", out, "--text", text, "--out", tmp_path / "p.txt",
                                         training=False)  # fmt: skip
    assert "holds no probe" in refuse("view", tmp_path, "--text", text, "--out",
                                      tmp_path / "p.html", training=False)  # fmt: skip


def test_damaged_probe_files(swept, tmp_path):
    file = tmp_path / "probe.safetensors"
    probe = load_probe(swept[0] / "layers" / "embed.safetensors")
    again = probe._replace(about={k: v for k, v in probe.about.items() if k != "format"})
    save_probe(file, again)
    assert load_probe(file).about == probe.about
    changes = {
        "threshold": (None, "has no threshold"),
        "tap": ("elsewhere.3", "elsewhere"),
        "schema": (7, "schema 7"),
        "format": ("another", "is no probe"),
        "kind": ("forest", "forest"),
        "task": ("past", "what it predicts"),
        "target": ("x", "what it predicts"),
        "metrics": (None, "no metrics"),
        "model": (None, "does not say its model"),
    }
    for name, (value, said) in changes.items():
        save_probe(file, probe._replace(about={**probe.about, name: value}))
        with pytest.raises(ValueError, match=said):
            load_probe(file)
    tensors = {
        "mean": probe.tensors["mean"][:3],
        "std": probe.tensors["std"].astype(np.float64),
        "coef": np.full_like(probe.tensors["coef"], np.nan),
        "more": np.zeros(2, np.float32),
    }
    for name, x in tensors.items():
        save_probe(file, probe._replace(tensors={**probe.tensors, name: x}))
        with pytest.raises(ValueError, match="expected finite|a linear probe holds"):
            load_probe(file)
    safetensors.write(file, dict(probe.tensors))
    with pytest.raises(ValueError, match="is no probe"):
        load_probe(file)


def test_bench_compares_a_sweep_with_one_layer(loaded, monkeypatch):
    monkeypatch.setitem(bench_probe.PRESETS, "two", loaded.config)
    settings = Settings(samples=100, eval_tokens=300, batch_tokens=640)
    result = bench_probe.bench("two", 100, 32, settings, 1, Execution())
    assert result["layers"] == {"single": 1, "sweep": 3} and result["ratio"] > 0
    assert result["tokens"] <= 3200 and result["samples"] == 800
    assert "sweep / single" in bench_probe.table(result)


def test_refusals(refuse, text, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "no positive case of target 'Z'" in refuse("sweep", "--target", "Z", *out)
    assert "' x' is 2 tokens" in refuse("sweep", "--target", " x", *out)
    assert "layers 0 to 1" in refuse("train", "--target", "x", "--layer", "2", *out)
    assert "use `probe sweep`" in refuse("train", "--target", "x", "--layer", "0,1", *out)
    assert "nothing was given" in refuse("sweep", *out)
    assert "give one of" in refuse("sweep", "--target", "x", "--regex", "x", *out)
    assert "matches every token" in refuse("sweep", "--regex", "", *out)
    assert "names a column of --rows" in refuse("sweep", "--label", "", *out)
    assert "names a column of --rows" in refuse("sweep", "--label", "good", *out)
    assert "raise --eval-tokens" in refuse("sweep", "--target", "x", *out, "--eval-tokens", 20)
    assert "give 2 to 32" in refuse("sweep", "--target", "x", *out, "--context", 64)
    (tmp_path / "empty.txt").write_text(" \n")
    assert "holds no text" in refuse("sweep", "--target", "x", *out, "--text",
                                     tmp_path / "empty.txt")  # fmt: skip
