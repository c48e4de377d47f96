"""`attribute validate` from end to end: what it leaves, reuses and refuses."""

import csv

import click.testing
import numpy as np
import pytest

from attribution.commands.validate import validate
from attribution.validation.bank import Bank
from core.checkpoint import save_model
from core.command import Door, Group
from core.files import read_json, write_json, write_npy
from core.rows import load_rows, save_rows

pytestmark = pytest.mark.usefixtures("quick")
LENGTHS = [9, 6, 12, 7, 16, 11, 5, 13, 8, 10]
TRAIN = "--steps 2 --batch 4 --optimizer sgd --lr 0.1 --schedule constant --layers scan".split()
CONTROLS = ["random", "length", "loss", "gradient norm", "bm25", "embedding"]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A model, rows, query, and scores of them with both signs and shapes."""
    root = tmp_path_factory.mktemp("validate")
    save_model(root / "model", tiny.config, tiny.params())
    n = len(LENGTHS)
    rows = tiny.rows(root / "rows", LENGTHS, 1, fact=[*"abcabc", *[None] * 4],
                     mislabelled=[i < 3 for i in range(n)])  # fmt: skip
    query = tiny.rows(root / "query", [7, 12, 9], 2, fact=list("cab"))
    tiny.rows(root / "other", LENGTHS, 3)
    tiny.rows(root / "other-query", [7, 12, 9], 3)
    scores_NQ = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    signs = {"positive": "positive = proponent (gradient inner product)",
             "negative": "negative = proponent (derivative of the query loss)"}  # fmt: skip
    for name, scores, sign in (
        ("each", scores_NQ, "positive"),
        ("magic", -scores_NQ, "negative"),
        ("mean", scores_NQ.mean(1), "positive"),
        ("unsigned", scores_NQ, "none"),
        ("damaged", np.full(n, np.nan, np.float32), "positive"),
    ):
        info = {"format": "taproot-scores", "sign": signs.get(sign), "spec": {"loss": "sum"},
                "pool": {"path": str(rows.path), "rows": rows.sha},
                "query": {"path": str(query.path), "rows": query.sha}}  # fmt: skip
        write_json(root / name / "info.json", info)
        write_npy(root / name / "scores.npy", scores)
    for name in ("norms", "losses"):
        write_npy(root / "each" / f"{name}.npy", np.arange(n, dtype=np.float32) % 4)
    return root


@pytest.fixture
def run(world, tiny):
    """Run the command on scores of the world; (exit code, stdout, error line)."""
    door = Door(
        lambda p, _: load_rows(p, tiny.config.vocab_size, tiny.config.context), lambda *_: 0
    )
    group = Group("attribute")
    group.add_command(validate)

    def run(scores, out, *options, rows="rows", query="query"):
        line = ["validate", world / scores, "--model", world / "model", "--rows", world / rows,
                "--query", world / query, *TRAIN, *options]  # fmt: skip
        line += ["--out", out] if out else []
        result = click.testing.CliRunner().invoke(group, [str(part) for part in line], obj=door)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        errors = [e for e in result.stderr.splitlines() if e.startswith("Error: ")]
        return result.exit_code, result.stdout, errors

    return run


def table(folder):
    """{(method, statistic): estimate} of validation.json, which the .csv repeats."""
    lines = read_json(folder / "validation.json")["table"]
    with open(folder / "validation.csv") as file:
        written = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [line["method"] for line in written]
    for line, row in zip(lines, written, strict=True):
        assert float(row["estimate"]) == pytest.approx(line["estimate"])
        assert [float(row[k]) for k in ("low", "high") if row[k]] == (line["interval"] or [])
    return {(line["method"], line["statistic"]): line["estimate"] for line in lines}


def test_lds_with_controls_and_a_bank_for_other_scores(run, world, tmp_path, monkeypatch):
    bank = ["--bank", tmp_path / "bank", "--fraction", "0.2", "--count", "6"]
    code, printed, _ = run("each", tmp_path / "each", *bank)
    assert code == 0
    found, content = table(tmp_path / "each"), read_json(tmp_path / "each" / "validation.json")
    assert [method for method, _ in found] == ["scores", *CONTROLS]
    assert all(name in printed for name in ("lds", *CONTROLS)) and "drop" in printed
    assert content["of_each_query"] and content["scores_times"] == 1
    assert len(content["table"][0]["values"]) == 3
    assert content["training"]["lr"] == 0.1 and content["training"]["steps"] == 2
    assert len(content["points"]["measured"]) == 6
    assert content["points"]["predicted"].keys() == {"scores", *CONTROLS}
    subsets = read_json(tmp_path / "each" / "subsets.json")
    [folder] = (tmp_path / "bank").iterdir()
    assert [len(s["removed"]) for s in subsets] == [2] * 6
    assert all((folder / name).exists() for s in subsets for name in s["files"])
    assert run("each", tmp_path / "each", *bank)[1].endswith("is already done\n")

    def never(*_):
        raise AssertionError("the bank has it")

    # The other sign of the same scores, said by the folder, is the same result; nothing is trained.
    monkeypatch.setattr(Bank, "retrain", never)
    assert run("magic", tmp_path / "magic", *bank, "--no-controls")[0] == 0
    turned = read_json(tmp_path / "magic" / "validation.json")
    assert turned["scores_times"] == -1
    assert turned["table"] == content["table"][:1]
    assert run("mean", tmp_path / "mean", *bank)[0] == 0
    mean = read_json(tmp_path / "mean" / "validation.json")
    assert not mean["of_each_query"] and len(mean["table"][0]["values"]) == 1
    assert "loss" not in mean["points"]["predicted"]  # that folder holds no losses.npy


@pytest.mark.parametrize("protocol", ["tail", "weight-step"])
def test_the_other_retraining_protocols(run, world, protocol):
    small = ["--fraction", "0.1", "--fraction", "0.2", "--count", "2", "--no-controls"]
    code, printed, _ = run("mean", None, "--protocol", protocol, *small)
    assert code == 0
    place = world / "mean" / "validation"
    found = {statistic for _, statistic in table(place / protocol)}
    assert (place / "bank").is_dir()
    wanted = {
        "tail": {"increase 10%", "QLD 10%", "increase 20%", "QLD 20%"},
        "weight-step": {"gain", "slope", "correlation"},
    }[protocol]
    assert found == wanted and all(name in printed for name in wanted)


def test_known_causes_need_no_training(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Bank, "__init__", None)
    assert run("each", tmp_path / "recall", "--protocol", "recall")[0] == 0
    found = table(tmp_path / "recall")
    assert {statistic for _, statistic in found} == {"MRR", "recall@1", "strict@1"}
    assert run("magic", tmp_path / "marks", "--protocol", "mislabelled", "--no-controls")[0] == 0
    assert 0 <= table(tmp_path / "marks")["scores", "AUC"] <= 1


@pytest.mark.parametrize(
    "scores, options, message",
    [
        ("unsigned", [], "sign"),
        ("damaged", [], "not finite"),
        ("absent", [], "does not exist"),
        ("each", ["--fraction", "0.99"], "leaves nothing"),
        ("each", ["--count", "2"], "at least 3"),
        ("each", ["--fraction", "0.1", "--fraction", "0.2"], "one --fraction"),
        ("each", ["--warmup", "3"], "--warmup 3"),
        ("each", ["--accumulate", "3"], "--accumulate"),
        ("mean", ["--protocol", "recall"], "--mode each"),
    ],
)
def test_bad_input_ends_before_work(run, tmp_path, scores, options, message):
    code, printed, errors = run(scores, tmp_path / "out", *options)
    assert code == 2 and not printed and len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_other_rows_and_queries_are_refused(run, world, tmp_path):
    assert "whose rows differ" in run("each", tmp_path / "o", rows="other")[2][0]
    assert "whose rows differ" in run("each", tmp_path / "o", query="other-query")[2][0]
    [error] = run("each", tmp_path / "o", "--protocol", "mislabelled", rows="other")[2]
    assert "whose rows differ" in error
    save_rows(world / "long", [np.arange(1, 31)])
    assert run("each", tmp_path / "o", query="long")[0] == 2
    options = ["--protocol", "mislabelled", "--no-controls"]
    assert "are of another query" in run("mean", tmp_path / "m", *options, query="other-query")[1]
