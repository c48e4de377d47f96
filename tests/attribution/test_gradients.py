"""The per-example pass: parity with transformers, layout, and what must not change a result."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import gradients, targets
from attribution.projection import Projection
from attribution.targets import Spec
from core.config import Execution
from core.hf.convert import import_hf

ROOT = Path(__file__).parents[2]
MODELS = (
    "gpt2_tiny", "gpt2_tiny_untied", "gemma3_tiny", "gemma3_tiny_mqa", "neox_tiny",
    "neox_tiny_sequential",
)  # fmt: skip
LENGTHS = [17, 9, 26, 13, 5, 21]
FULL, PROJECTED = Spec(Projection(0)), Spec(Projection(4))


@pytest.fixture(scope="module")
def run(tiny):
    """(features [B,D], losses [B]) of a batch as numpy arrays."""

    @functools.cache
    def compiled(config, execution, spec):
        return tiny.jit(functools.partial(gradients.example_gradients, config, execution, spec))

    def run(config, params, spec, ids_BT, labels_BT, execution=None):
        execution = execution or Execution(str(params["embed"]["wte"].dtype))
        aux = gradients.projections(config, spec)
        batch = jnp.asarray(ids_BT), jnp.asarray(labels_BT)
        out = compiled(config, execution, spec)({"params": params}, aux, *batch)
        return tuple(np.asarray(x) for x in out)

    return run


@pytest.mark.parametrize("bias", [False, True], ids=["weight", "bias"])
@pytest.mark.parametrize("name", MODELS)
def test_features_are_those_of_transformers(run, relative, name, bias):
    """Values, order, orientation and names, against gradients that transformers made."""
    folder = ROOT / "tests" / "golden" / name
    config, params = import_hf(folder)
    spec = Spec(Projection(0), include_bias=bias)
    with np.load(folder / "expected.npz") as expected:
        features_BD, losses_B = run(config, params, spec, expected["ids"], expected["labels"])
        layout = targets.features(config, spec)
        modules = [key.split("/")[1] for key in expected if key.startswith("example_grad/")]
        modules = [name.removesuffix(".weight") for name in modules if name.endswith(".weight")]
        assert [f.name for f in layout] == modules
        assert relative(losses_B, expected["losses"].sum(1)) < 1e-5
        for f in layout:
            g_BOI = expected[f"example_grad/{f.name}.weight"]
            if bias and not name.startswith("gemma3"):  # which has none
                column_BO = expected[f"example_grad/{f.name}.bias"]
                g_BOI = np.concatenate([g_BOI, column_BO[..., None]], axis=-1)
            assert f.shape == g_BOI.shape[1:]
            size = f.shape[0] * f.shape[1]
            ours_BD = features_BD[:, f.offset : f.offset + size]
            assert relative(ours_BD.reshape(g_BOI.shape), g_BOI) < 1e-5
    assert features_BD.shape[1] == targets.width(config, spec) == layout[-1].offset + size


def test_layout_is_without_gaps(tiny):
    for spec in (FULL, PROJECTED, Spec(Projection(0), include_bias=True)):
        end = 0
        for feature in targets.features(tiny.config, spec):
            assert feature.offset == end
            end += feature.shape[0] * feature.shape[1]
        assert end == targets.width(tiny.config, spec)


@pytest.mark.parametrize("spec", [FULL, PROJECTED], ids=["full", "projected"])
def test_batch_size_and_padding_change_nothing(run, tiny, relative, x64, spec):
    config, params = tiny.config, tiny.params(dtype="float64")
    ids_BT, labels_BT = tiny.batch(LENGTHS)
    together_BD, losses_B = run(config, params, spec, ids_BT, labels_BT)
    for b, n in enumerate(LENGTHS[:2]):
        alone = run(config, params, spec, ids_BT[b : b + 1, :n], labels_BT[b : b + 1, :n])
        assert relative(alone[0][0], together_BD[b]) < 1e-12
        assert relative(alone[1][0], losses_B[b]) < 1e-12
    longer = run(config, params, spec, *tiny.batch(LENGTHS, length=40))
    assert relative(longer[0], together_BD) < 1e-12
    # What stands under the padding is of no account either.
    ids_BT[labels_BT == -100] = np.where(ids_BT == 0, 7, ids_BT)[labels_BT == -100]
    assert relative(run(config, params, spec, ids_BT, labels_BT)[0], together_BD) < 1e-12


@pytest.mark.parametrize("spec", [FULL, PROJECTED], ids=["full", "projected"])
def test_padding_rows_are_exactly_zero(run, tiny, spec):
    ids_BT, labels_BT = tiny.batch(LENGTHS)
    labels_BT[[1, 4]] = -100
    features_BD, losses_B = run(tiny.config, tiny.params(), spec, ids_BT, labels_BT)
    assert not features_BD[[1, 4]].any() and not losses_B[[1, 4]].any()
    assert features_BD[[0, 2, 3, 5]].any(1).all()


def test_execution_changes_nothing_but_rounding(run, tiny, relative):
    config, params, batch = tiny.config, tiny.params(), tiny.batch(LENGTHS)
    expected = run(config, params, PROJECTED, *batch)[0]
    for execution in (Execution(layers="scan", remat=True), Execution(loss_chunk=20)):
        found = run(config, params, PROJECTED, *batch, execution=execution)[0]
        assert relative(found, expected) < 1e-5
    half = run(config, params, PROJECTED, *batch, execution=Execution("bfloat16"))[0]
    cosine_B = (half * expected).sum(1)
    cosine_B /= np.linalg.norm(half, axis=1) * np.linalg.norm(expected, axis=1)
    assert half.dtype == np.float32 and cosine_B.min() > 0.999


def test_mean_loss_divides_by_the_supervised_tokens(run, tiny, relative, x64):
    config, params, (ids_BT, labels_BT) = (
        tiny.config,
        tiny.params(dtype="float64"),
        tiny.batch([13, 8]),
    )
    summed = run(config, params, FULL, ids_BT, labels_BT)
    mean = run(config, params, FULL._replace(loss="mean"), ids_BT, labels_BT)
    count_B = (labels_BT[:, 1:] != -100).sum(1)
    assert relative(mean[0] * count_B[:, None], summed[0]) < 1e-12
    np.testing.assert_array_equal(mean[1], summed[1])  # the reported loss is the sum either way


def test_first_label_is_never_used(run, tiny):
    ids_BT, labels_BT = tiny.batch([13, 8])
    expected = run(tiny.config, tiny.params(), PROJECTED, ids_BT, labels_BT)[0]
    labels_BT[:, 0] = -100
    found = run(tiny.config, tiny.params(), PROJECTED, ids_BT, labels_BT)[0]
    np.testing.assert_array_equal(found, expected)


def test_coverage_counts_the_sites(tiny):
    share = targets.coverage(tiny.config, FULL)
    c = tiny.config
    blocks = c.layers * (4 * c.width**2 + 2 * c.width * c.mlp_width)
    total = sum(x.size for x in jax.tree.leaves(tiny.params()))
    assert share["parameters"] == blocks / total
    assert share["matmul_flops"] == blocks / (blocks + c.vocab_size * c.width)


MANY_DEVICES = """
import sys
import jax, numpy as np
from attribution.targets import Spec
from attribution.projection import Projection
from attribution.store import Pass, batches
from core.checkpoint import load_model
from core.config import Execution
from core.rows import load_rows

model, rows, out = sys.argv[1:]
source = Pass(load_model(model), load_rows(rows), Spec(Projection(4)), Execution(), 128)
features_ND = np.zeros((len(source.rows), 3 * 4 * 16), np.float32)
for _, found in batches(source, lambda features: features):
    real_B = found.rows_B >= 0
    features_ND[found.rows_B[real_B]] = found.features_BD[real_B]
np.savez(out, devices=jax.device_count(), features=features_ND)
"""


def test_eight_devices_are_one(tiny, relative, tmp_path):
    """1e-5: the devices see other batches, so float32 sums round otherwise."""
    folder = ROOT / "tests" / "golden" / "gpt2_tiny"
    tiny.rows(tmp_path / "rows", [17, 9, 26, 13, 5, 21, 30, 8, 8, 11, 24])
    found = {}
    for devices in (1, 8):
        quick = " ".join(f"--{name}={value}" for name, value in tiny.quick.items())
        flags = f"{quick} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        out = tmp_path / f"{devices}.npz"
        command = [sys.executable, "-c", MANY_DEVICES, folder, tmp_path / "rows", out]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        with np.load(out) as file:
            assert file["devices"] == devices
            found[devices] = file["features"]
    assert found[1].any(1).all()
    assert relative(found[8], found[1]) < 1e-5
