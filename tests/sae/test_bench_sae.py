"""The shape of what the SAE benchmark returns, and that its programs do what it says."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from core import presets
from core.config import Execution
from core.errors import InputError
from core.files import dumps
from sae import bench as benchmark
from sae.bench import bench, table

EXECUTION = Execution(layers="scan")
SMALL = dataclasses.replace(
    presets.PRESETS["gemma3-tiny"], width=16, layers=2, heads=2, mlp_width=32, head_dim=8,
    window=8, sliding=(True, False), vocab_size=97,
)  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    """(what is returned; what was run, by name)."""
    runs, medians = {}, benchmark.alternate

    def seen(given, repeats):
        runs.update(given)
        return medians(given, repeats)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PRESETS", {"small": SMALL})
        patch.setattr(benchmark, "VOCABULARY", 50)
        patch.setattr(benchmark, "SAMPLE", 32)
        patch.setattr(benchmark, "alternate", seen)
        with jax.numpy_dtype_promotion("standard"):  # for optax, whose code mixes dtypes
            return bench("small", 0, 512, 4, 16, 2, EXECUTION), runs


@pytest.fixture
def result(measured):
    return measured[0]


def test_result_has_every_number(result):
    names = {"forward", "fingerprint", "tokens", "pool", "encode", "decode", "top_k", "top_k_xla"}
    assert set(result["seconds"]) == set(result["cpu_seconds"]) == names | {"train_step"}
    assert set(result["temp_bytes"]) == names
    for name, seconds in result["seconds"].items():
        assert seconds > 0
        assert result["tokens_per_second"][name] == pytest.approx(64 / seconds)
        assert result["ratios"][name] == pytest.approx(seconds / result["seconds"]["forward"])
    assert result["within_bar"] == (result["ratios"]["fingerprint"] <= 1.25)
    assert json.loads(dumps(result))["preset"] == "small"
    assert 30 < result["l0"] < 120  # as many features are active as was asked for, about


def test_table_says_whether_the_bar_holds(result):
    for ratio, words in ((1.1, "within the bar of 1.25"), (1.4, "ABOVE the bar")):
        assert words in table({**result, "within_bar": ratio <= 1.25})
    assert all(name in table(result) for name in result["seconds"])


def test_programs_are_what_they_are_called(measured, close, standard_promotion):
    """The fingerprint program is the pool program on what the forward program returns."""
    _, runs = measured
    out = {name: run() for name, run in runs.items() if name != "train_step"}
    x_BTD, f_NF = np.asarray(out["forward"]), np.asarray(out["encode"])
    assert x_BTD.shape == (4, 16, 16) and f_NF.shape == (64, 512)
    close(runs["pool"].args[1], x_BTD)
    close(out["fingerprint"], out["pool"])
    assert out["tokens"].keys() - out["fingerprint"].keys() == {"token_index", "token_value"}
    np.testing.assert_array_equal(out["top_k"][1], out["top_k_xla"][1])
    mean_BF = f_NF.reshape(4, 16, -1)[:, 1:].mean(1)  # a row's first token stands for BOS
    close(out["fingerprint"]["mean_value"], -np.sort(-mean_BF)[:, :256])
    assert int(runs["train_step"]()[0]) + 1 == int(runs["train_step"]()[0])


@pytest.mark.parametrize(
    ("layer", "features", "batch", "length"),
    [(2, 512, 4, 16), (0, 512, 4, 9999), (0, 512, 0, 16), (0, 100, 4, 16)],
)
def test_what_cannot_be_measured_is_refused(monkeypatch, layer, features, batch, length):
    monkeypatch.setattr(benchmark, "PRESETS", {"small": SMALL})
    with pytest.raises(InputError, match="--layer and --length|--batch and --repeats"):
        bench("small", layer, features, batch, length, 2, EXECUTION)
