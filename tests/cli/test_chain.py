"""The commands one after another, as a person types them, and all of them again."""

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import load_model
from core.files import read_json, read_jsonl
from core.progress import Progress
from core.rows import load_rows

HF = Path(__file__).parents[1] / "golden" / "gpt2_tiny"


def test_each_command_says_in_one_line_what_it_made_under_the_name_that_was_typed(chain):
    folder, printed = chain
    for line, said in printed.items():
        assert str(folder) not in said
        if line[0] != "report":
            out = line[line.index("--out") + 1]
            assert re.fullmatch(rf"{out}: \S.*\n", said), said
    assert printed["report", "scores"].endswith("\nscores/report/report.html\n")


def test_nothing_but_the_outputs_is_left(chain):
    folder, _ = chain
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    kept = {"texts.jsonl", "items.jsonl", "model.json"}
    made = {"rows", "runs", "deep", "eval", "store", "scores", "from_store", "subsets", "hf",
            "model"}  # fmt: skip
    assert {path.name for path in folder.iterdir()} == kept | made


def test_rows_and_store_give_the_same_scores(chain, close):
    folder, _ = chain
    scores = [np.load(folder / name / "scores.npy") for name in ("scores", "from_store")]
    assert len(np.unique(scores[0])) > 1
    close(scores[1], scores[0])


def test_the_four_subsets_are_what_their_names_say(chain):
    folder, _ = chain
    scores, pool = np.load(folder / "scores/scores.npy"), load_rows(folder / "rows/pool")
    chosen = {s: read_json(folder / f"subsets/{s}/selection.json")["indices"] for s in STRATEGIES}
    order = np.argsort(-scores)
    assert chosen["top"] == sorted(order[:4].tolist())
    assert set(chosen["bottom"]) == set(order[-len(chosen["bottom"]) :].tolist())
    budget = pool.trained[chosen["top"]].sum()
    for strategy, rows in chosen.items():
        assert len(set(rows)) == len(rows)
        assert abs(pool.trained[rows].sum() - budget) <= pool.trained.max()
        subset = load_rows(folder / f"subsets/{strategy}")
        for place, row in enumerate(rows):
            np.testing.assert_array_equal(subset.ids(place), pool.ids(row))


def test_run_model_folder_and_hugging_face_folder_are_one_model(chain, run, tmp_path, close):
    folder, _ = chain
    losses = []
    for place in ("runs/base", "runs/base/model", "model", "hf"):
        out = tmp_path / f"{len(losses)}.npy"
        run("eval", "nll", "--model", folder / place, "--rows", "rows/pool", "--out", out)
        losses.append(np.load(out))
        np.testing.assert_array_equal(losses[-1], losses[0])
    fingerprints = {load_model(folder / place).fingerprint for place in ("runs/base", "model")}
    assert len(fingerprints) == 1


def test_every_finished_command_says_so_and_changes_nothing(chain, run):
    folder, printed = chain
    files = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    for line in printed:
        if line[0] != "report":
            assert "already" in run(*line)
    after = [path for path in folder.rglob("*") if path.is_file()]
    assert sorted(after) == sorted(files)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content
        assert path.stat().st_mtime_ns == time or path.name == "LOCK"


ROWS = "--tokenizer bytes --length 32 --out".split()
STRATEGIES = ("top", "bottom", "random", "matched-random")
CHANGED = {
    ("data", "text"): ("--length", "32", "31"),
    ("data", "query"): ("--length", "32", "31"),
    ("train", "lm"): ("--lr", "0.01", "0.02"),
    ("eval", "nll"): ("--rows", "rows/pool", "rows/query"),
    ("eval", "run"): ("--items", "items.jsonl", "texts.jsonl"),
    ("attribute", "build"): ("--projection-dim", "4", "5"),
    ("attribute", "score"): ("--projection-dim", "4", "5"),
    ("attribute", "select"): ("--k", "4", "5"),
}


@pytest.mark.parametrize("name", CHANGED, ids=" ".join)
def test_a_changed_option_is_refused_by_name_with_both_values(chain, refuse, name):
    _, printed = chain
    option, old, new = CHANGED[name]
    line = list(next(line for line in printed if line[:2] == name))
    line[line.index(option) + 1] = new
    said = refuse(*line)
    assert option.strip("-").replace("-", "_") in said and old in said and new in said


def test_another_command_does_not_write_into_a_folder_that_is_taken(chain, refuse):
    _, printed = chain
    build = list(next(line for line in printed if line[1] == "build"))
    assert "'attribute score'" in refuse(*build[:-1], "scores")
    assert "not ours" in refuse(*build[:-1], "rows")
    assert "'data text'" in refuse("data", "query", "items.jsonl", *ROWS, "rows/pool")
    assert "not ours" in refuse("convert", "import", "hf", "--out", "runs")


def test_a_folder_of_hugging_face_is_a_model_and_survives_a_round_trip(run, tmp_path):
    run("convert", "import", HF, "--out", tmp_path / "model")
    run("convert", "export", tmp_path / "model", "--out", tmp_path / "hf")
    prints = {load_model(place).fingerprint for place in (HF, tmp_path / "model", tmp_path / "hf")}
    assert len(prints) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_training_goes_on_to_the_same_end(
    chain, run, refuse, outputs, tmp_path, monkeypatch, number
):
    folder, printed = chain
    line = list(next(line for line in printed if line[:2] == ("train", "lm")))
    line[-1] = str(tmp_path / "run")
    update = Progress.update
    with monkeypatch.context() as patch:

        def stop(bar: Progress, *arguments: int, **fields: object) -> None:
            update(bar, *arguments, **fields)
            if bar.done == 1:
                signal.raise_signal(number)

        patch.setattr(Progress, "update", stop)
        said = refuse(*line, code=75)
    assert "again" in said and (tmp_path / "run/PREEMPTED").exists()
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) < 4
    run(*line)
    assert not (tmp_path / "run/PREEMPTED").exists()
    assert outputs(tmp_path / "run") == outputs(folder / "runs/base")


def test_beginning_anew_replaces_the_run_only_once_the_input_is_found_good(
    chain, run, refuse, outputs, tmp_path
):
    _, printed = chain
    line = list(next(line for line in printed if line[:2] == ("train", "lm")))
    line[-1] = str(tmp_path / "run")
    run(*line)
    was = outputs(tmp_path / "run")
    anew = [*line, "--resume", "never"]
    assert "--warmup 9" in refuse(*anew, "--warmup", 9)
    assert outputs(tmp_path / "run") == was and "already" in run(*line)
    run(*anew, "--lr", "0.02")
    assert outputs(tmp_path / "run")["model"] != was["model"]
    options = json.loads((tmp_path / "run/config.json").read_text())["options"]
    assert options["lr"] == 0.02 and "resume" not in options
