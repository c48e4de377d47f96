"""The doctor finds what is wrong and nothing else: every check is shown a fault and its absence."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from attribution import doctor, gradients
from attribution.commands.doctor import doctor as command
from attribution.doctor_rows import Special, open_rows, row_findings, score_findings
from attribution.targets import Feature
from core.checkpoint import save_model
from core.command import Door
from core.errors import InputError
from core.files import write_json, write_jsonl, write_npy
from core.rows import load_rows, save_rows

BOS, EOS, PAD = 3, 4, 5
SPECIAL = Special(BOS, EOS, PAD, add_bos=True)
SOUND = [[BOS, 10 + i, 20 + i, 30, EOS] for i in range(12)]


def rows_of(path, ids, labels=None):
    ids = [np.array(row, np.int32) for row in ids]
    save_rows(path, ids, None if labels is None else [np.array(x, np.int32) for x in labels])
    return open_rows(path)


def verdicts(found):
    return {finding.check: finding.verdict for finding in found}


def test_sound_rows_pass(tiny, tmp_path):
    found, sound = row_findings(rows_of(tmp_path / "rows", SOUND), tiny.config, SPECIAL)
    assert set(verdicts(found).values()) == {"ok"}
    assert not any(finding.remedy for finding in found)
    assert sound.tolist() == list(range(12))


@pytest.mark.parametrize(
    ("change", "check", "verdict", "value", "usable"),
    [
        ({3: [BOS] + [7] * 40}, "context", "bad", 1, False),
        ({3: [BOS, 61, EOS]}, "vocabulary", "bad", 1, False),
        ({3: SOUND[5], 7: SOUND[5]}, "duplicates", "warn", 2, True),
        ({3: [BOS, BOS, 9, EOS]}, "bos", "warn", 1 / 12, True),
        ({i: [BOS, *SOUND[i]] for i in range(7)}, "bos", "bad", 7 / 12, True),
        ({i: SOUND[i][1:] for i in range(12)}, "bos", "bad", 0, True),
        ({3: SOUND[3][1:]}, "bos", "warn", 11 / 12, True),
        ({3: [*SOUND[3], EOS, EOS]}, "trained padding", "bad", 2 / 50, True),
        ({3: [*SOUND[3], PAD, PAD, PAD]}, "trained padding", "bad", 2 / 51, True),
        ({}, "trained padding", "ok", 0, True),
    ],
)
def test_faults_of_rows(tiny, tmp_path, change, check, verdict, value, usable):
    ids = [change.get(i, row) for i, row in enumerate(SOUND)]
    found, sound = row_findings(rows_of(tmp_path / "rows", ids), tiny.config, SPECIAL)
    finding = next(f for f in found if f.check == check)
    assert finding.verdict == verdict and finding.value == pytest.approx(value)
    assert bool(finding.remedy) == (verdict != "ok")
    assert (3 in sound) == usable
    others = {name: v for name, v in verdicts(found).items() if name != check}
    assert set(others.values()) == {"ok"}


def test_masks_and_labels(tiny, tmp_path):
    long = [[BOS, *range(6, 36), EOS] for _ in range(5)]
    for i, row in enumerate(long):
        row[1] = 40 + i
    labels = [list(row) for row in long]
    labels[0] = [-100] * len(long[0])  # nothing to train on
    labels[1] = [-100] * (len(long[1]) - 1) + [EOS]  # one token: a template cut short
    found, sound = row_findings(rows_of(tmp_path / "rows", long, labels), tiny.config, SPECIAL)
    assert verdicts(found)["masked rows"] == "bad"
    assert "the first is row 0" in next(f.said for f in found if f.check == "masked rows")
    nearly = next(f for f in found if f.check == "nearly masked rows")
    assert (nearly.verdict, nearly.value) == ("warn", 1)
    assert sound.tolist() == [1, 2, 3, 4]
    # Short answers of a whole query set are no accident.
    answers = [[-100] * (len(row) - 1) + [EOS] for row in long]
    found, _ = row_findings(rows_of(tmp_path / "query", long, answers), tiny.config, SPECIAL)
    assert verdicts(found)["nearly masked rows"] == "ok"


def test_padding_that_is_not_trained_is_fine(tiny, tmp_path):
    ids = [[*row, EOS, EOS] for row in SOUND]
    labels = [[*row, -100, -100] for row in SOUND]
    found, _ = row_findings(rows_of(tmp_path / "rows", ids, labels), tiny.config, SPECIAL)
    assert verdicts(found)["trained padding"] == "ok"


def test_a_folder_that_holds_no_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_rows(tmp_path / "nowhere")
    write_json(tmp_path / "dataset_info.json", {})
    with pytest.raises(InputError, match="cannot be read"):
        open_rows(tmp_path)


def scores_folder(folder, rows, scores, **columns):
    write_npy(folder / "scores.npy", np.asarray(scores, np.float32))
    facts = {"length": rows.lengths, "trained": rows.trained, **columns}
    facts = {name: np.asarray(values, np.float64).tolist() for name, values in facts.items()}
    lines = [{name: values[i] for name, values in facts.items()} for i in range(len(rows))]
    write_jsonl(folder / "row_diagnostics.jsonl", lines)
    info = {
        "format": "taproot-scores",
        "pool": {"path": str(rows.path), "rows": rows.sha},
        "settings": {"unit_norm": False},
        "spec": {"loss": "sum"},
    }
    write_json(folder / "info.json", info)


def test_scores_that_rank_by_something_else(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", [5, 8, 11, 14, 17, 20, 23, 24])
    random = np.random.default_rng(0)
    norm_N, loss_N = random.permutation(8), np.array([1, -1, 2, -2, 3, -3, 4, -4])
    scores_folder(tmp_path / "a", rows, rows.lengths**2.0, norm=norm_N, loss=loss_N)
    found = {finding.check: finding for finding in score_findings(tmp_path / "a", rows)}
    assert found["score by length"].verdict == "warn"
    assert found["score by length"].value == pytest.approx(1)
    assert "--loss mean" in found["score by length"].remedy
    assert found["score by loss"].verdict == "ok" and abs(found["score by loss"].value or 1) < 0.5
    scores_folder(tmp_path / "b", rows, -norm_N, norm=norm_N, loss=loss_N)
    found = {finding.check: finding for finding in score_findings(tmp_path / "b", rows)}
    assert found["score by norm"].value == pytest.approx(-1)
    assert (
        found["score by norm"].verdict == "warn" and "--unit-norm" in found["score by norm"].remedy
    )


def test_scores_that_rank_nothing_or_were_of_other_rows(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", [5, 8, 11])
    scores_folder(tmp_path / "a", rows, [0, 0, 0], norm=[1, 2, 3], loss=[1, 2, 3])
    assert verdicts(score_findings(tmp_path / "a", rows)) == {"scores": "bad"}
    scores_folder(tmp_path / "b", rows, [0, np.inf, 1], norm=[1, 2, 3], loss=[1, 2, 3])
    assert verdicts(score_findings(tmp_path / "b", rows)) == {"scores": "bad"}
    other = tiny.rows(tmp_path / "other", [5, 8, 12])
    with pytest.raises(InputError, match="give the rows that were scored"):
        score_findings(tmp_path / "a", other)


def test_rows_without_a_score_are_left_out(tiny, tmp_path):
    rows = tiny.rows(tmp_path / "rows", [5, 8, 11, 14])
    columns = {"norm": [1, 2, np.nan, 4], "loss": [2, 1, np.nan, 3]}
    scores_folder(tmp_path / "a", rows, [3, 2, np.nan, 1], **columns)
    found = {finding.check: finding for finding in score_findings(tmp_path / "a", rows)}
    assert found["scores"].said.startswith("3 of 4 rows")
    assert found["score by norm"].value == pytest.approx(-1)
    scores_folder(tmp_path / "b", rows, [3, 2, 0, 1], norm=[np.nan] * 4, loss=[2, 1, 4, 3])
    found = {finding.check: finding for finding in score_findings(tmp_path / "b", rows)}
    assert "score by norm" not in found and "score by loss" in found


class Fake:
    """A gradient pass in numpy, and the ways in which a real one may be wrong."""

    def __init__(self, fault: str = ""):
        self.fault, self.calls = fault, 0
        self.table_VD = np.random.default_rng(1).normal(size=(61, 32)).astype(np.float32)

    def __call__(self, batch):
        self.calls += 1
        weights_BT = (batch.labels_BT != -100).astype(np.float32)
        features_BD = np.einsum("BT,BTD->BD", weights_BT, self.table_VD[batch.ids_BT])
        scale = {
            "batch": 1 + 0.01 * len(batch.rows_B),
            "padding": 1 + 0.001 * batch.ids_BT.shape[1],
            "random": 1 + 0.1 * self.calls,
        }.get(self.fault, 1.0)
        losses_B = weights_BT.sum(1)
        if self.fault == "nan":
            features_BD[batch.rows_B == 2] = np.nan
        if self.fault == "noise":
            noise_BD = np.random.default_rng(2).normal(size=features_BD.shape)
            features_BD = features_BD + 20 * noise_BD.astype(np.float32)
        return np.float32(scale) * features_BD, losses_B


@pytest.mark.parametrize(
    ("fault", "other", "dtype", "wrong"),
    [
        ("", "", "float32", {}),
        ("batch", "", "float32", {"batch size": "bad"}),
        ("padding", "", "float32", {"padding": "bad"}),
        ("random", "", "float32", {"repeatability": "bad", "batch size": "bad", "padding": "bad"}),
        ("nan", "", "float32", {"gradients": "bad"}),
        ("", "noise", "float32", {}),
        ("", "noise", "bfloat16", {"precision": "bad"}),
        ("", "nan", "bfloat16", {"precision": "bad"}),
    ],
)
def test_faults_of_gradients(tiny, tmp_path, fault, other, dtype, wrong):
    rows = tiny.rows(tmp_path / "rows", [17, 9, 24, 13, 5, 21, 19, 8])
    names = np.arange(100, 108)
    found, features_ND = doctor.check_gradients(Fake(fault), Fake(other), dtype, rows, names, 96)
    assert {check: v for check, v in verdicts(found).items() if v != "ok"} == wrong
    assert features_ND.shape == (8 - (fault == "nan"), 32)
    if fault == "nan":
        assert "row 102" in next(f.said for f in found if f.check == "gradients")
    if not fault:
        value = next(f.value for f in found if f.check == "precision")
        assert value == pytest.approx(1) if not other else value is not None and value < 0.9


def test_sites_that_get_no_gradient():
    layout = [Feature("h.0.a", 0, (2, 2)), Feature("h.0.b", 4, (2, 2))]
    features_ND = np.ones((3, 8), np.float32)
    assert doctor.check_sites(layout, features_ND, False).verdict == "ok"
    features_ND[:, 4:] = 0
    finding = doctor.check_sites(layout, features_ND, True)
    assert finding.verdict == "warn" and "h.0.b" in finding.said and "adapter" in finding.remedy
    assert doctor.check_sites(layout, 0 * features_ND, False).verdict == "bad"


def test_the_spectrum_is_that_of_the_autocorrelation():
    x_NE = np.random.default_rng(0).normal(size=(6, 9)) * np.arange(1, 10)
    values_E = np.linalg.eigvalsh(x_NE.T @ x_NE / 6)
    mean = values_E.mean()
    found = doctor._spectrum(x_NE, damping=1.5)
    assert found.stable_rank == pytest.approx(values_E.sum() / values_E.max())
    assert found.top == pytest.approx(values_E.max() / mean)
    below = values_E[values_E < 1.5 * mean].sum() / values_E.sum()
    assert 0 < below < 1 and found.below == pytest.approx(below)


def test_damping_is_weighed_against_spectrum_and_rows():
    layout = [Feature("h.0.a", 0, (4, 4)), Feature("h.0.b", 16, (4, 4))]
    features_ND = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)

    def check(n_rows: int, damping: float) -> dict[str, Any]:
        found = doctor.check_damping(layout, features_ND, n_rows, damping)
        return {finding.check: finding for finding in found}

    assert {f.verdict for f in check(1000, 0.1).values()} == {"ok"}
    few = check(10, 0.1)["preconditioner"]
    assert few.verdict == "warn" and few.value == pytest.approx(10 / 16)
    assert "--projection-dim 3" in few.remedy and "16 rows" in few.remedy
    assert check(10, 0.0)["damping"].verdict == "bad"
    assert check(1000, 100.0)["damping"].verdict == "warn"
    assert "everything" in check(1000, 100.0)["damping"].remedy
    assert doctor.check_damping(layout, 0 * features_ND, 8, 0.1) == []


def run_command(*args: str):
    door = Door(lambda path, loaded: load_rows(path), lambda name, loaded: None)
    return CliRunner().invoke(command, [*args, "--layers", "scan"], obj=door)


def test_the_command_from_end_to_end(tiny, tmp_path, monkeypatch):
    quick = tiny.jit(gradients.example_gradients, static_argnums=(0, 1, 2))
    monkeypatch.setattr(gradients, "example_gradients", quick)
    loaded = tiny.loaded(dataclasses.replace(tiny.config, layers=1))
    save_model(tmp_path / "model", loaded.config, loaded.params)
    tiny.rows(tmp_path / "rows", [17, 9, 24, 13, 5, 21, 19, 8])
    model, rows = str(tmp_path / "model"), str(tmp_path / "rows")
    options = ("--model", model, "--rows", rows, "--projection-dim", "4", "--sample", "6")
    result = run_command(*options, "--json", "--out", str(tmp_path / "out.json"))
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out.json").read_text())
    values = {check["check"]: check["value"] for check in found["checks"]}
    assert found["verdict"] == "warn"  # eight rows for sixteen features
    assert {c["check"] for c in found["checks"] if c["verdict"] == "warn"} == {"preconditioner"}
    assert values["repeatability"] == 0
    assert 0 <= values["batch size"] < 1e-5 and 0 <= values["padding"] < 1e-5
    assert 0.99 < values["precision"] <= 1
    assert 0 < values["matmul precision"] < 1e-5


def test_the_command_says_what_is_broken_before_any_pass(tiny, tmp_path):
    loaded = tiny.loaded()
    weight = np.array(loaded.params["blocks"]["mlp_c_fc"]["w"])
    weight[1, 0, 0] = np.nan
    loaded.params["blocks"]["mlp_c_fc"]["w"] = weight
    save_model(tmp_path / "model", loaded.config, loaded.params)
    tiny.rows(tmp_path / "rows", [17, 9, 24])
    result = run_command("--model", str(tmp_path / "model"), "--rows", str(tmp_path / "rows"))
    assert result.exit_code == 1, result.output
    assert "bad   weights" in result.stdout and "blocks/mlp_c_fc/w" in result.stdout
    assert "-> convert or train the model again" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("1 bad")
