"""The shape of what the benchmark of generation returns; its times are not judged here."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cli as door
from core import generate, model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.families import rows
from core.presets import PRESETS
from evals import bench

TINY = ModelConfig("gpt_neox", 50, 64, 8, 2, 2, 16, 4, tied=False, rotary_dim=2)


def test_result_has_every_number(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    result = bench.bench("tiny", 2, 20, 18, 2, Execution())
    programs = {"prefill", "decode", "floor", "uncached"}
    assert set(result["compile_seconds"]) == programs and result["programs"] == 3
    assert set(result["seconds"]) == {*programs, *(f"{name}_cpu" for name in programs)}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    seconds, rates, ratios = (result[n] for n in ("seconds", "tokens_per_second", "ratios"))
    assert result["new_tokens"] == 1 + 2 * generate.STEPS
    assert rates["prefill"] == pytest.approx(2 * 20 / seconds["prefill"])
    assert rates["decode"] == pytest.approx(2 / seconds["decode"])
    assert ratios["decode_to_floor"] == pytest.approx(seconds["decode"] / seconds["floor"])
    assert ratios["uncached_to_decode"] == pytest.approx(seconds["uncached"] / seconds["decode"])
    # Of a layer: query_key_value 8x24, dense 8x8, and the mlp 8x16 twice; the head 50x8.
    assert result["bytes"]["weights_read"] == 4 * (2 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 50 * 8)
    assert (
        result["bytes"]["cache"] == 4 * 2 * 2 * 2 * (20 + 33) * 8
    )  # keys and values, layers, rows
    shown = bench.table(result)
    assert all(name in shown for name in programs)


def test_the_floor_multiplies_by_every_matrix():
    """It depends on each of them, and with identities it hands the input through to the head."""
    params = schema.init(rows(TINY), TINY.layers, seed=0)
    weights = generate.unstack(TINY, Execution(), {"params": params})
    x_BD = jnp.ones((3, 8))

    def total(weights):
        return bench.floor(TINY, weights, x_BD).sum()

    slopes = jax.grad(total)(weights)
    for layer in slopes.layers:
        for name in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"):
            assert np.abs(layer["params"][name]["w"]).max() > 0
    ones = weights._replace(
        layers=[jax.tree.map(lambda x: jnp.eye(*x.shape) if x.ndim == 2 else x, layer)
                for layer in weights.layers]
    )  # fmt: skip
    expected = model.head_logits(x_BD[:, None], weights.head_VD)
    np.testing.assert_allclose(bench.floor(TINY, ones, x_BD), expected, rtol=1e-6)


@pytest.mark.parametrize("batch, prompt, new, repeats", [
    (0, 16, 8, 1), (2, 0, 8, 1), (2, 1000, 30, 1), (2, 8, 0, 1), (2, 8, 8, 0),
])  # fmt: skip
def test_impossible_sizes_are_refused(batch, prompt, new, repeats):
    with pytest.raises(InputError, match="--prompt-length and --new-tokens"):
        bench.bench("tiny", batch, prompt, new, repeats, Execution())


def test_presets_are_those_of_the_command_line_and_of_the_published_sizes():
    def parameters(name):
        config = PRESETS[name]
        config.check(name)
        tree = schema.abstract(rows(config), config.layers)
        return sum(x.size for x in jax.tree.leaves(tree))

    for command in ("generate", "attribution"):
        (option,) = (p for p in door.bench_group.commands[command].params if p.name == "preset")
        choice: Any = option.type
        assert list(choice.choices) == list(PRESETS)
    assert parameters("gpt2-124m") == 124_439_808
    assert parameters("gemma3-270m") == 268_098_176
    assert parameters("pythia-160m") == 162_322_944
