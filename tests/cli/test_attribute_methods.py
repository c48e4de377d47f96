"""The methods of `attribute` as a person types them, on the small world's model."""

import json

import numpy as np
import pytest

from core.files import read_json
from core.memmap import open_array

POOL = "--pool rows/pool --query rows/query".split()
MODEL = "--model runs/base".split()
RUN = "--run runs/base".split()
# command: what it is given beside pool and query
METHODS = {
    "trackstar": [*MODEL, "--projection-dim", "2"],
    "ekfac": [*MODEL, "--cg-steps", "1", "--tokens", "--modules", "*mlp*"],
    "trak": [*MODEL, "--projection-dim", "2", "--members", "2"],
    "less": [*RUN, "--modules", "*c_fc"],
    "source": [*RUN, "--segments", "2", "--modules", "*c_fc"],
}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_leaves_scores(chain, run, tmp_path, method):
    out = tmp_path / method
    line = ["attribute", method, *METHODS[method], *POOL, "--out", out]
    assert run(*line).startswith(f"{out}: rows 17, mean ")
    scores, info = open_array(out / "scores.npy"), read_json(out / "info.json")
    assert scores.shape == (17,) and scores.dtype == np.float32 and len(np.unique(scores)) > 1
    assert info["sign"].startswith("positive = proponent")
    assert 0 < info["coverage"]["parameters"] < 1
    assert not (out / "parts").exists()
    assert len((out / "row_diagnostics.jsonl").read_text().splitlines()) == 17
    if method == "ekfac":
        tokens_NT = open_array(out / "token_scores.npy")
        np.testing.assert_allclose(np.nansum(tokens_NT, 1), scores, rtol=1e-4, atol=1e-9)
        assert info["cg_residuals"][-1] < info["cg_residuals"][0]
        assert info["tokens"]["alignment"] == "label"
        run("report", out)
    assert "already done" in run(*line)


def test_a_method_needs_what_it_is_of(chain, refuse, tmp_path):
    out = ["--out", tmp_path / "out"]
    line = refuse("attribute", "less", "--run", "model", *POOL, *out)
    assert line.endswith("model is no finished run of `train lm`; give its --out folder")
    line = refuse("attribute", "source", *RUN, *POOL, "--segments", "3", *out)
    assert "--segments 3 does not divide the run's 2 checkpoints (steps [2, 4])" in line
    line = refuse("attribute", "ekfac", *MODEL, *POOL, "--modules", "none*", *out)
    assert line.startswith("Error: --modules none* leaves no module of ")
    line = refuse("attribute", "score", *MODEL, *POOL, "--objective", "kl", *out)
    assert "give --adapter" in line
    line = refuse("attribute", "score", *MODEL, *POOL, "--normalizer", "hf/model.pt", *out)
    assert "is a pickle" in line
    assert not (tmp_path / "out").exists()


def test_a_run_is_its_own_normaliser(chain, run, tmp_path):
    """Adam's moments divide the gradients; the settings are part of what is recorded."""
    line = ["attribute", "score", *MODEL, *POOL, "--projection-dim", "2"]
    run(*line, "--out", tmp_path / "plain")
    run(*line, "--normalizer", "runs/base", "--out", tmp_path / "adam")
    plain, adam = (open_array(tmp_path / name / "scores.npy") for name in ("plain", "adam"))
    assert np.abs(np.corrcoef(plain, adam)[0, 1]) < 0.9999
    assert read_json(tmp_path / "adam/info.json")["spec"]["normalizer"][0] == "adam"


def test_texts_find_rows_of_a_store(chain, run, tmp_path):
    asked = ["attribute", "query", "store", *MODEL, "--text", "the cat sat", "--top-k", "3"]
    found = json.loads(run(*asked, "--json").splitlines()[0])
    assert [hit["rank"] for hit in found["hits"]] == [1, 2, 3]
    assert "the cat" in run(*asked)
    run("attribute", "export", "store", "--out", tmp_path / "index")
    held = open_array("store/gradients.npy")
    assert (tmp_path / "index/gradients.bin").read_bytes() == held.tobytes()


def test_scores_are_put_to_the_test(chain, run, tmp_path):
    line = [
        "attribute",
        "validate",
        "scores",
        *MODEL,
        "--rows",
        "rows/pool",
        "--query",
        "rows/query",
        "--count",
        "3",
        "--fraction",
        "0.2",
        "--steps",
        "1",
        "--batch",
        "4",
    ]
    said = run(*line, "--out", tmp_path / "v", "--bank", tmp_path / "bank")
    assert all(name in said for name in ("scores", "random", "bm25", "length"))
    assert read_json(tmp_path / "v/validation.json")["format"] == "taproot-validation"
