"""`convert import`, `export` and `check` on every family's tiny model."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from core import files, safetensors
from core.checkpoint import load_model
from core.hf import convert

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ("gpt2_tiny", "gemma3_tiny", "neox_tiny")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_there_and_back(run, model):
    source = GOLDEN / model
    run("convert", "import", source, "--out", "model")
    said = run("convert", "export", "model", "--out", "hf", "--shard-size", "1e-5")
    assert said.startswith("hf: logits_error ") and "greedy 4" in said
    original, found = (safetensors.read_folder(folder) for folder in (source, "hf"))
    assert found.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert len(list(Path("hf").glob("model-*-of-*.safetensors"))) > 1
    assert run("convert", "check", "hf").removeprefix("hf") == said.removeprefix("hf")


@pytest.mark.parametrize("model", MODELS)
def test_weights_may_be_stored_narrow(run, model):
    """Everybody else gets them as float32, with the same fingerprint as the rounded ones."""
    run("convert", "import", GOLDEN / model, "--out", "model", "--dtype", "bfloat16")
    run("convert", "export", "model", "--out", "hf", "--dtype", "bfloat16")
    assert {t.dtype for t in safetensors.read_folder("hf").values()} == {np.dtype("bfloat16")}
    loaded, narrow = load_model("model"), load_model("model", dtype="bfloat16")
    rounded = convert.import_hf(GOLDEN / model, "bfloat16")[1]
    wte = rounded["embed"]["wte"]
    np.testing.assert_array_equal(narrow.params["embed"]["wte"], wte)
    np.testing.assert_array_equal(loaded.params["embed"]["wte"], wte.astype(np.float32))
    assert loaded.params["embed"]["wte"].dtype == np.float32
    assert loaded.fingerprint == narrow.fingerprint == load_model("hf").fingerprint


def test_padding_is_cut_off_on_request(run, refuse):
    shutil.copytree(GOLDEN / "gpt2_tiny", "padded")
    config = files.read_json("padded/config.json")
    files.write_json("padded/config.json", config | {"vocab_size": 120})
    said = refuse("convert", "import", "padded", "--out", "model")
    assert "131 rows; cut off padding rows with `convert import --trim-vocab`" in said
    assert "--trim-vocab" in refuse("convert", "check", "padded")
    assert not Path("model").exists()
    said = run("convert", "import", "padded", "--out", "model", "--trim-vocab")
    assert "trimmed_rows 11" in said
    assert load_model("model").config.vocab_size == 120


def test_check_says_what_is_wrong(run, refuse):
    shutil.copytree(GOLDEN / "gpt2_tiny", "hf")
    assert "tokens 9" in run("convert", "check", "hf", "--tokens", "9")
    name = "transformer.h.0.attn.c_attn.bias"
    tensors = safetensors.read_folder("hf")
    bad = tensors | {name: np.full_like(tensors[name], np.nan)}
    safetensors.write("hf/model.safetensors", bad)
    assert f"tensor '{name}' holds NaN" in refuse("convert", "check", "hf")
    shutil.copy(GOLDEN / "tokenizers" / "neox" / "tokenizer.json", "hf")
    safetensors.write("hf/model.safetensors", tensors)
    assert "the model a vocabulary of 131" in refuse("convert", "check", "hf")
    assert "does not exist" in refuse("convert", "check", "nowhere")
