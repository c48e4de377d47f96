"""The commands of `sae`, one after the other in a small world, and what they refuse."""

import json

import numpy as np
import pytest

from core.files import read_json, read_npz

MODEL = ("--model", "runs/base")
POOL = ("--rows", "rows/pool")
TRAIN = (*MODEL, *POOL, "--width", 16, "--k", 4, "--batch", 32, "--tokens", 640)


@pytest.fixture(scope="module")
def trained(chained, run):
    """The folder of the chain with SAEs of two sites in it, and what training printed."""
    folder, _ = chained
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        line = ("sae", "train", *TRAIN, "--site", "resid_post.0", "--site", "mlp_in.1:mlp_out.1")
        return folder, run(*line, "--out", "saes")


@pytest.fixture
def world(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    return trained[0]


SAE = ("--sae", "saes", "--sae-id", "resid_post.0_batchtopk_16")


def test_trains_in_one_pass(trained):
    lines = trained[1].splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "saes/resid_post.0_batchtopk_16",
        "saes/mlp_in.1-mlp_out.1_batchtopk_16",
    ]
    assert all("step 20" in line and "explained_variance" in line for line in lines)


def test_from_an_sae_to_a_selection(world, run, refuse):
    """Judged, fingerprinted, asked for attribution, applied; the selection trains a model."""
    assert "ce_score" in run("sae", "eval", *MODEL, *POOL, *SAE, "--out", "eval/sae")
    transcoder = ("--sae", "saes", "--sae-id", "mlp_in.1-mlp_out.1_batchtopk_16")
    run("sae", "eval", *MODEL, *POOL, *transcoder, "--out", "eval/transcoder")
    results = read_json(world / "eval/transcoder/results.json")
    assert (results["reads"], results["writes"]) == ("mlp_in.1", "mlp_out.1")
    made = run("sae", "fingerprint", *MODEL, *POOL, *SAE, "--k", 8, "--token-k", 2, "--out", "fp")
    assert "rows 17" in made
    line = ("sae", "classify", "--fingerprints", "fp", "--scores", "scores", "--label", "top:0.5")
    printed = run(*line, "--seeds", 2, "--out", "classifier")
    names = {row.split("  ")[0] for row in printed.splitlines()}
    assert {"fingerprint mean", "statistics", "hidden mean", "length", "loss", "shuffled"} <= names
    line = ("sae", "apply", "--classifier", "classifier", *MODEL, *POOL, "--k", 4)
    assert "rows 17" in run(*line, "--out", "ranked")
    train = ("--steps", 1, "--batch", 2, "--lr", 0.01)
    run("train", "lm", *MODEL, "--rows", "ranked/selected", *train, "--out", "runs/ranked")
    again = run("attribute", "select", "ranked", *POOL, "--k", 4, "--out", "again")
    assert "rows 4" in again
    best = [read_json(world / name / "selection.json") for name in ("again", "ranked/selected")]
    assert best[0]["sha256"] == best[1]["sha256"]
    line = ("sae", "dashboard", *MODEL, *POOL, *SAE, "--classifier", "classifier")
    assert "features 16" in run(*line, "--features", 4, "--out", "dashboard")
    assert (world / "dashboard/dashboard.html").stat().st_size > 20_000
    message = refuse("sae", "apply", "--classifier", "classifier", "--model", "runs/top", *POOL,
                     "--out", "other")  # fmt: skip
    assert "model" in message and not (world / "other").exists()


def test_the_same_command_again_changes_nothing(world, run):
    line = ("sae", "fingerprint", *MODEL, *POOL, *SAE, "--k", 4, "--out", "twice")
    run(*line)
    before = (world / "twice/mean_index.npy").stat().st_mtime_ns
    assert "already done" in run(*line)
    assert (world / "twice/mean_index.npy").stat().st_mtime_ns == before


def test_encode(world, run, refuse):
    np.save("x.npy", np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32))
    assert "vectors 5" in run("sae", "encode", *SAE, "--activations", "x.npy", "--out", "f.npz")
    found = read_npz("f.npz")
    assert found["activations"].shape == (5, 16) and found["reconstruction"].shape == (5, 8)
    np.save("wide.npy", np.ones((5, 9), np.float32))
    message = refuse("sae", "encode", *SAE, "--activations", "wide.npy", "--out", "g.npz")
    assert "9" in message and "8" in message and not (world / "g.npz").exists()


def test_refusals(world, refuse):
    """Before any work, by name, and nothing is left behind."""
    fingerprint = ("sae", "fingerprint", *MODEL, *POOL)
    assert "with --sae-id: mlp_in.1" in refuse(*fingerprint, "--sae", "saes", "--out", "no")
    message = refuse(*fingerprint, *SAE, "--site", "resid_post.1", "--out", "no")
    assert "resid_post.1" in message and "resid_post.0" in message
    message = refuse(*fingerprint, *SAE, "--site", "attn_in.0", "--out", "no")
    assert "'attn_in.0' is unknown" in message
    message = refuse(*fingerprint, *SAE, "--k", 99, "--out", "no")
    assert "99" in message and "16" in message
    message = refuse("sae", "train", *TRAIN, "--site", "resid_post.7", "--out", "no")
    assert "the model has layers 0 to 1" in message
    message = refuse("sae", "train", *MODEL, *POOL, "--site", "resid_post.0", "--batch", 4096,
                     "--out", "no")  # fmt: skip
    assert "fill no step of 4096; lower --batch" in message
    message = refuse("sae", "train", *TRAIN, "--site", "resid_post.0", "--architecture", "topk",
                     "--k", 17, "--out", "no")  # fmt: skip
    assert "17" in message and "16 features" in message
    message = refuse("sae", "train", *TRAIN, "--site", "mlp_in.1:", "--out", "no")
    assert "site '' is unknown" in message
    message = refuse("sae", "train", *TRAIN, *("--site", "embed") * 2, "--out", "no")
    assert "embed_batchtopk_16 is asked for twice" in message
    assert not (world / "no").exists()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("jumprelu", "--k 4", "--k is of --architecture topk, abstopk, batchtopk, matryoshka"),
        ("topk", "--sparsity 0", "--sparsity is of --architecture jumprelu, standard, gated"),
        ("topk", "--prefix 4", "--prefix is of --architecture matryoshka, not of topk"),
        ("gated", "--target-l0 4", "--target-l0 is of --architecture jumprelu, not of gated"),
        ("jumprelu", "--target-l0 4", "--target-l0 is of --l0-loss quadratic"),
        ("jumprelu", "--l0-loss quadratic", "give how many features shall be active, --target-l0"),
        ("gated", "--sparsity 0", "sparsity coefficient 0, so nothing makes it sparse"),
        ("topk", "--k-start 8", "--k-start and --k-warmup belong together"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(world, refuse, kind, options, said):
    line = ("sae", "train", *MODEL, *POOL, "--site", "embed", "--batch", 32, "--tokens", 64)
    assert said in refuse(*line, "--architecture", kind, *options.split(), "--out", "no")
    assert not (world / "no").exists()


def test_a_model_is_no_sae(world, refuse):
    message = refuse("sae", "eval", *MODEL, *POOL, "--sae", "runs/base", "--out", "no")
    assert "is it an SAE's" in message and len(message) < 500


def test_a_spoilt_sae_is_named(world, refuse, tmp_path):
    import shutil

    spoilt = tmp_path / "spoilt"
    shutil.copytree(world / "saes/resid_post.0_batchtopk_16", spoilt)
    config = json.loads((spoilt / "cfg.json").read_text())
    (spoilt / "cfg.json").write_text(json.dumps({**config, "architecture": "hopfield"}))
    message = refuse("sae", "eval", *MODEL, *POOL, "--sae", spoilt, "--out", "no")
    assert "hopfield" in message and "known" in message
