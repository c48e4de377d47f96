"""`attribute validate` from end to end: what it leaves, reuses and refuses."""

import csv
import dataclasses
import re

import click.testing
import numpy as np
import pytest

from attribution.commands.recorded import recorded
from attribution.commands.validate import validate
from attribution.magic.functional import functional
from attribution.select import NEGATIVE
from attribution.validation.bank import Bank
from attribution.validation.scores import Tokens, asked, of_tokens, read_scores
from core import adapter
from core.adapter import LoraSpec
from core.checkpoint import load_model, save_model
from core.command import Door, Group
from core.config import Execution
from core.errors import InputError
from core.files import jsonable, read_json, write_json, write_npy
from core.rows import load_rows, save_rows
from training.loop import Settings
from training.optim import Optim

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

    def run(scores, out, *options, rows="rows", query="query", model="model", train=TRAIN):
        line = ["validate", world / scores, "--model", world / model, "--rows", world / rows,
                "--query", world / query, *train, *options]  # fmt: skip
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
    losses = content["query_loss"]
    assert content["units"] == "row" and content["loss_drop"] == losses["before"] - losses["after"]
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


HELD = (Settings(3, 4, shuffle=False, drawn=10), Optim("sgd", 0.02, "constant", clip=0))


@pytest.fixture(scope="module")
def magic(world):
    """A folder as MAGIC leaves it; a token's score is what its weight does, by retraining."""
    rows, query, loaded = (
        *map(load_rows, (world / "rows", world / "query")),
        load_model(world / "model"),
    )
    execution = Execution("float32", "scan")
    bank = Bank(world / "truth", loaded, rows, functional(query, "each", "nll"), *HELD,
                execution, 8192)  # fmt: skip
    shape = (len(rows), int(rows.lengths.max()))
    places = [(i, t) for i in range(len(rows)) for t in range(1, rows.lengths[i])]
    places = [(i, t) for i, t in places if rows.labels(i)[t] >= 0]
    weights = np.ones((1 + len(places), *shape), np.float32)
    for n, (i, t) in enumerate(places, 1):
        weights[n, i, t] = 0
    losses_MQ = bank.losses(list(weights))
    scores_NTQ = np.zeros((*shape, len(query)), np.float32)
    scores_NTQ[*np.array(places).T] = losses_MQ[0] - losses_MQ[1:]
    folder = world / "derivatives"
    write_npy(folder / "per_token_scores.npy", scores_NTQ)
    write_npy(folder / "scores.npy", scores_NTQ.sum(1))
    training = dict(zip(("settings", "optim"), map(dataclasses.asdict, HELD), strict=True))
    info = {
        "format": "taproot-scores", "sign": f"{NEGATIVE} (d query loss / d token weight)",
        "pool": {"path": str(rows.path), "rows": rows.sha, "model": loaded.fingerprint},
        "query": {"path": str(query.path), "rows": query.sha}, "query_loss": "nll",
        "tokens": {"file": "per_token_scores.npy", "alignment": "label"},
        "training": training | {"execution": dataclasses.asdict(execution)},
    }  # fmt: skip
    write_json(folder / "info.json", info)
    return folder


def test_derivatives_are_put_to_the_test_in_their_own_training(run, magic, tmp_path):
    small = ["--fraction", "0.2", "--count", "12", "--no-controls", "--bank", tmp_path / "bank"]
    assert run("derivatives", tmp_path / "rows", *small, train=[])[0] == 0
    content = read_json(tmp_path / "rows" / "validation.json")
    assert content["scores_times"] == -1
    [line] = content["table"]
    assert len(line["values"]) == 3 and line["interval"][0] <= line["estimate"]
    assert line["estimate"] > 0.9  # proponents are negative, and what they do adds up
    held, used = dataclasses.asdict(HELD[0]) | dataclasses.asdict(HELD[1]), content["training"]
    assert used == {name: jsonable(held[name]) for name in used}
    assert used["drawn"] == 10 and not used["shuffle"]
    # The same said again, in part, is the same training.
    said = ["--batch", "4", "--epochs", "1", "--no-shuffle", "--lr", "0.02"]
    assert run("derivatives", tmp_path / "said", *small, train=said)[0] == 0
    assert read_json(tmp_path / "said" / "validation.json")["table"] == content["table"]
    assert len(list((tmp_path / "bank").iterdir())) == 1


@pytest.mark.parametrize(
    "train, message",
    [
        (["--lr", "0.3"], "--lr 0.3 is not what .* \\(0.02\\)"),
        (["--shuffle"], "--shuffle True"),
        (["--batch", "4", "--epochs", "2"], "--epochs 2"),
        (["--optimizer", "adamw"], "--optimizer adamw .* \\(sgd\\)"),
        (["--seed", "1"], "--seed 1"),
        (["--remat"], "--remat True"),
    ],
)
def test_another_training_is_refused(run, magic, tmp_path, train, message):
    code, _, [error] = run("derivatives", tmp_path / "o", train=train)
    assert code == 2 and re.search(message, error) and "leave --" in error


def test_another_model_is_refused(run, magic, world, tiny, tmp_path):
    save_model(world / "other-model", tiny.config, tiny.params(seed=1))
    code, _, [error] = run("derivatives", tmp_path / "o", model="other-model", train=[])
    assert code == 2 and "another model than --model" in error


def test_an_adapter_that_was_begun_is_begun_again(magic, world, close):
    """A new one is a function of its kind and the run's seed; a given one is as it was."""
    info, spec = read_json(magic / "info.json"), LoraSpec(2, 4.0, ("c_attn",))
    info["training"]["lora"] = dataclasses.asdict(spec)
    loaded, context = load_model(world / "model"), click.Context(validate)
    found = recorded(context, {"scores": magic}, jsonable(info))
    assert found and found[:2] == HELD
    start = found.start(loaded)
    assert start.adapter.spec == spec
    close(start.adapter.factors, adapter.init(spec, loaded.config, HELD[0].seed), 0.0)
    factors = adapter.init(spec, loaded.config, 7)
    held = loaded._replace(adapter=adapter.Adapter(spec, factors))
    assert found.start(held).adapter.factors is factors


def test_tokens_are_removed_one_by_one(run, magic, world, tmp_path):
    options = ["--units", "token", "--fraction", "0.1", "--bank", tmp_path / "bank"]
    count = ["--count", "12"]
    assert run("derivatives", tmp_path / "drop", *options, *count, train=[])[0] == 0
    found = table(tmp_path / "drop")
    assert [method for method, _ in found] == ["scores", "random", "loss", "row"]
    assert found["scores", "lds"] > 0.95 > max(found["random", "lds"], found["row", "lds"])
    rows = load_rows(world / "rows")
    subsets = read_json(tmp_path / "drop" / "subsets.json")
    assert {len(s["removed"]) for s in subsets} == {round(0.1 * rows.trained.sum())}
    assert all(t and rows.labels(i)[t] >= 0 for s in subsets for i, t in s["removed"])
    for protocol, few in (("tail", ["--count", "2"]), ("weight-step", [])):
        how = ["--protocol", protocol, "--no-controls", *few]
        assert run("derivatives", None, *options, *how, train=[])[0] == 0
    step = table(magic / "validation" / "weight-step-token")
    assert step["scores", "slope"] == pytest.approx(1, abs=0.1)  # they are derivatives
    assert table(magic / "validation" / "tail-token")["scores", "QLD 10%"] > 0
    content = read_json(tmp_path / "drop" / "validation.json")
    assert content["units"] == "token" and content["rows"] == 10
    [error] = run("derivatives", None, *options, "--protocol", "recall", train=[])[2]
    assert "--units token" in error


def test_token_scores_must_be_of_what_a_weight_removes(run, magic, world, tmp_path):
    assert "no scores of tokens" in run("each", tmp_path / "o", "--units", "token")[2][0]
    rows, query = load_rows(world / "rows"), load_rows(world / "query")
    scored = read_scores(magic, rows, query, 3)
    by_token = of_tokens(magic, scored, rows)
    assert by_token.scores_NC.shape == (rows.trained.sum(), 3)
    assert isinstance(by_token.tokens, Tokens)
    sums_RC = np.zeros((10, 3))
    np.add.at(sums_RC, by_token.tokens.rows_N, by_token.scores_NC)
    np.testing.assert_allclose(sums_RC, scored.scores_NC, rtol=1e-4, atol=1e-6)
    info = read_json(magic / "info.json")
    by_position = tmp_path / "position"
    write_json(by_position / "info.json", info | {"tokens": {"alignment": "position"}})
    write_npy(by_position / "token_scores.npy", np.zeros((10, 16), np.float32))
    with pytest.raises(InputError, match="no token's weight takes that away; .*token-side loss"):
        of_tokens(by_position, scored, rows)
    write_json(by_position / "info.json", info | {"tokens": {"alignment": "label"}})
    write_npy(by_position / "token_scores.npy", np.zeros((10, 15), np.float32))
    with pytest.raises(InputError, match="not a number for each token"):
        of_tokens(by_position, scored, rows)


def test_margins_are_asked_by_item(tiny, tmp_path):
    choices = tiny.rows(tmp_path / "q", [5, 6, 7, 8], item=list("aabb"), gold=[0, 1, 1, 0])
    found, texts = asked({"query_loss": "margin"}, choices, None)
    assert found.names == ["a", "b"] and texts.index.tolist() == [1, 2]
    found, texts = asked({}, choices, None)
    assert len(found.names) == 4 and texts is choices
    control = choices.take([1])
    found, _ = asked({"control": {"rows": control.sha}}, choices, control)
    losses_R = np.append(choices.trained * np.arange(4.0), control.trained * 2.0)
    np.testing.assert_allclose(found.of(losses_R)[0], [-2, -1, 0, 1])
    with pytest.raises(InputError, match="has changed"):
        asked({"control": {"rows": "of another time"}}, choices, control)
