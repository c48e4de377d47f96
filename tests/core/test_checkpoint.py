"""Model folders: round trip, fingerprint, and damaged folders by name."""

import json
import os
import shutil

import jax
import numpy as np
import pytest

import tokenizers
from core import families, safetensors, schema
from core.checkpoint import WEIGHTS, fingerprint, load_model, save_model
from core.config import ModelConfig
from core.errors import InputError

CONFIG = ModelConfig("gpt2", 30, 8, 8, 2, 2, 16, 4, bos=1)
PARAMS = schema.init(families.rows(CONFIG), CONFIG.layers, 0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    return folder, save_model(folder, CONFIG, PARAMS, tokenizers.load("bytes"))


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


def test_round_trip(saved):
    folder, mark = saved
    loaded = load_model(folder)
    assert loaded.config == CONFIG and loaded.fingerprint == mark == fingerprint(CONFIG, PARAMS)
    assert loaded.tokenizer == folder / "tokenizer"
    assert tokenizers.load(folder / "tokenizer").fingerprint == tokenizers.load("bytes").fingerprint
    jax.tree.map(np.testing.assert_array_equal, loaded.params, PARAMS)


def test_the_fingerprint_is_of_architecture_and_weights(saved):
    moved = jax.tree.map(np.array, PARAMS)
    moved["blocks"]["mlp_c_fc"]["b"][1, 3] += 1e-6
    other = ModelConfig(**changed(norm_eps=1e-6))
    assert len({saved[1], fingerprint(CONFIG, moved), fingerprint(other, PARAMS)}) == 3
    assert fingerprint(CONFIG, jax.tree.map(np.asarray, PARAMS)) == saved[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_and_loaded_dtypes(tmp_path, dtype):
    """What bfloat16 holds comes back as float32 exactly; the fingerprint is of the values."""
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    mark = save_model(tmp_path / "model", CONFIG, params)
    wide = load_model(tmp_path / "model")
    assert wide.fingerprint == mark == fingerprint(CONFIG, wide.params)
    jax.tree.map(np.testing.assert_array_equal, wide.params, params)
    assert {x.dtype for x in jax.tree.leaves(wide.params)} == {np.dtype(np.float32)}
    narrow = load_model(tmp_path / "model", dtype="bfloat16").params
    assert {str(x.dtype) for x in jax.tree.leaves(narrow)} == {"bfloat16"}


def test_saving_replaces_and_leaves_nothing_else(copy):
    mark = save_model(copy, CONFIG, jax.tree.map(lambda x: 2 * x, PARAMS))
    loaded = load_model(copy)
    assert loaded.fingerprint == mark and loaded.tokenizer is None
    assert [f.name for f in copy.parent.iterdir()] == ["model"]


def recast(folder, dtype):
    tensors = {name: np.array(x, dtype) for name, x in safetensors.read(folder / WEIGHTS).items()}
    safetensors.write(folder / WEIGHTS, tensors)


def edit(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


def changed(**fields):
    return {**CONFIG.to_json(), **fields}


DAMAGE = {
    "no folder": (shutil.rmtree, "model does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "torn config": (lambda f: (f / "config.json").write_text('{"ki'), "config.json is not JSON"),
    "list config": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "no fingerprint": (lambda f: edit(f, fingerprint=None), "has no fingerprint"),
    "no architecture": (lambda f: edit(f, model={}), "is missing"),
    "no parameters": (lambda f: (f / WEIGHTS).unlink(), "params.safetensors does not exist"),
    "cut short": (lambda f: os.truncate(f / WEIGHTS, 5000), "params.safetensors is truncated"),
    "whole numbers": (lambda f: recast(f, np.int32), "'embed/wte' holds int32, not floating"),
    "other sizes": (lambda f: edit(f, model=changed(vocab_size=31)), "'embed/wte' has shape"),
    "more layers": (lambda f: edit(f, model=changed(layers=3)), "'blocks/.*' has shape"),
    "another head": (lambda f: edit(f, model=changed(tied=False)), "parameter 'head'"),
    "unfinished run": (lambda f: edit(f, command="train lm"), "without a final model"),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(InputError, match=message):
        load_model(copy)


def test_parameters_of_another_architecture_are_not_saved(tmp_path):
    with pytest.raises(KeyError):
        save_model(tmp_path / "model", CONFIG, {"embed": PARAMS["embed"]})
    assert not any(tmp_path.iterdir())
