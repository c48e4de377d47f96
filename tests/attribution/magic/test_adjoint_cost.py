"""What a step walked backwards holds, by XLA's own account, and the shape of its benchmark."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from click.testing import CliRunner

from attribution.magic import adjoint as adjoints
from attribution.magic import bench
from cli import cli
from core.config import Execution, ModelConfig
from core.errors import InputError
from training.optim import Optim
from training.step import Recipe, initial

WORDS = ModelConfig("gemma3", 20_011, 64, 80, 1, 2, 32, 8)
LAYERS = ModelConfig("gemma3", 64, 64, 16, 6, 2, 64, 8, window=16, sliding=(True, False) * 3)
SGD = Optim("sgd", schedule="constant", clip=0.0)
ADAMW = Optim("adamw", schedule="constant", clip=0.0, eps_root=1e-8)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def held(monkeypatch, config, optim, **execution):
    """Of a backward step, in training steps."""
    monkeypatch.setitem(bench.PRESETS, "tiny", config)
    chosen = Execution(layers="scan", loss_chunk=16, **execution)
    return bench.bench("tiny", 2, 64, 1, optim, 0, False, chosen)["memory_ratios"]["backward_1"]


def test_a_large_vocabulary_adds_little(monkeypatch):
    """The head's derivative, its direction and one chunk's logits, as the bar has it: <= 1.6."""
    assert held(monkeypatch, WORDS, SGD) <= 1.6


def test_a_blocks_arrays_are_not_all_held_with_their_tangents(monkeypatch):
    assert held(monkeypatch, LAYERS, SGD) <= 1.3


def test_the_plain_way_gives_the_same(x64, close, tiny):
    ids_BT, labels_BT = tiny.batch([9, 12])
    config = dataclasses.replace(tiny.config, layers=1)
    recipe = Recipe(config, Execution("float64"), ADAMW, 3)
    params = tiny.params(config, dtype="float64")
    random = np.random.default_rng(0)
    state = initial(recipe, params)
    state = state._replace(opt_state=jax.tree.map(lambda x: x + x.dtype.type(1), state.opt_state))
    arrays = (ids_BT[None], labels_BT[None], random.normal(size=(1, 2, 12)))
    ids, labels, weights = map(jax.numpy.asarray, arrays)
    batch = (ids, labels, weights)
    _, grads, _ = adjoints.forward_step(recipe, state, *batch)
    grown = jax.tree.map(lambda x: random.normal(size=(2, *x.shape)), params)
    adjoint = adjoints.last(state, jax.tree.map(jax.numpy.asarray, grown))
    plain = jax.jit(bench.reverse_step, static_argnums=0)(recipe, state, adjoint, *batch)
    close(adjoints.backward_step(recipe, state, grads, adjoint, *batch), plain, 1e-9)


def test_the_result_has_every_number(monkeypatch, tiny, tmp_path):
    monkeypatch.setitem(bench.PRESETS, "tiny", dataclasses.replace(tiny.config, layers=1))
    file = tmp_path / "out.json"
    options = "--batch 2 --length 8 --queries 2 --repeats 1 --reverse --out".split()
    command = ["bench", "magic", *options, str(file)]
    shown = CliRunner().invoke(cli, command, catch_exceptions=False).output
    result = json.loads(file.read_text())
    names = {"train", "backward_1", "backward_2", "reverse_1"}
    for key in ("held_bytes", "memory_ratios", "compile_seconds", "seconds", "cpu_seconds"):
        assert set(result[key]) == names
        assert all(value > 0 for value in result[key].values())
    whole = result["seconds"]["train"]
    for name in names - {"train"}:
        assert name in shown
        queries = int(name[-1])
        assert result["ratios"][name] == pytest.approx(result["seconds"][name] / whole)
        assert result["per_query"][name] == pytest.approx(result["ratios"][name] / queries)


def test_impossible_sizes_are_refused():
    with pytest.raises(InputError, match="--length must be 2 to 1024"):
        bench.bench("tiny", 2, 1025, 1, SGD, 0, False, Execution())
