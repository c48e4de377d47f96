"""`sae encode`: a file of activations in, features and reconstructions out."""

import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from core import files
from core.errors import InputError
from sae import coder as coders
from sae import encode as module
from sae import formats
from sae.encode import encode

GOLDEN = Path(__file__).parents[1] / "golden" / "sae" / "formats"
SCOPE = GOLDEN / "gemma_scope/google/gemma-scope-2-270m-pt"
RESIDUAL = SCOPE / "resid_post/layer_12_width_16k_l0_medium"
CROSS = SCOPE / "crosscoder/layer_5_9_12_width_64k_l0_medium"


@pytest.fixture
def residual():
    return formats.load_one(RESIDUAL)


def run(sae, x, folder: Path) -> dict[str, np.ndarray]:
    np.save(folder / "x.npy", x)
    summary = encode(sae, folder / "x.npy", folder / "out.npz")
    result = files.read_npz(folder / "out.npz")
    f = result["activations"]
    assert summary["features"] * summary["vectors"] == f.size
    assert summary["l0"] == pytest.approx(np.count_nonzero(f) / summary["vectors"])
    assert sorted(path.name for path in folder.iterdir()) == ["out.npz", "x.npy"]
    with zipfile.ZipFile(folder / "out.npz") as archive:
        sizes = {Path(info.filename).stem: info.file_size for info in archive.infolist()}
    assert sizes == {name: 128 + value.nbytes for name, value in result.items()}
    return result


@pytest.mark.parametrize(
    "folder",
    [RESIDUAL, CROSS, GOLDEN / "saelens/jumprelu_heads", GOLDEN / "saelens/transcoder"],
    ids=lambda folder: folder.name,
)
def test_numbers_of_the_formats_tools(folder, tmp_path, close):
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    result = run(formats.load(folder), expected["x"], tmp_path)
    assert all(value.dtype == np.float32 for value in result.values())
    close(result["activations"], expected["activations"], 2e-5)
    close(result["reconstruction"], expected["reconstruction"], 5e-5)


@pytest.mark.parametrize("block", [32 * 4 * 3, 1])
def test_blocks_and_axes_in_front(residual, block, monkeypatch, tmp_path, close):
    x = np.random.default_rng(0).normal(size=(5, 2, 12)).astype(np.float32)
    f, y = coders.reconstruct(residual.coder, residual.params, jnp.asarray(x))
    monkeypatch.setattr(module, "BLOCK", block)
    result = run(residual, x, tmp_path)
    close((result["activations"], result["reconstruction"]), (f, y), 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_precisions_of_the_file(residual, dtype, tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 12)).astype(dtype)
    half = run(residual, x, tmp_path)
    whole = run(residual, x.astype(np.float32), tmp_path)
    assert all(np.array_equal(half[name], whole[name]) for name in whole)


def test_no_vectors(residual, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 12), np.float32))
    encode(residual, tmp_path / "x.npy", tmp_path / "out.npz")
    assert files.read_npz(tmp_path / "out.npz")["activations"].shape == (0, 32)


@pytest.mark.parametrize(
    ("folder", "x", "message"),
    [
        (RESIDUAL, np.zeros((4, 13), "f4"), "width 13, but the SAE .* reads 12 of resid_post.12"),
        (RESIDUAL, np.zeros((4, 12), "i4"), "holds int32; save the activations as float32"),
        (
            CROSS,
            np.zeros((4, 12), "f4"),
            r"\[4, 12\].* 3 layers, 12\] of resid_post.5, resid_post.9",
        ),
        (CROSS, np.zeros((3, 2, 12), "f4"), "stack these layers in this order"),
    ],
)
def test_activations_of_another_site(folder, x, message, tmp_path):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=message):
        encode(formats.load(folder), tmp_path / "x.npy", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_numbers_that_are_not_finite(residual, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BLOCK", 32 * 4 * 3)
    x = np.zeros((10, 12), np.float32)
    x[7, 3] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match="vector 7 holds NaN or infinity"):
        encode(residual, tmp_path / "x.npy", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]


def test_a_result_larger_than_the_disk(residual, monkeypatch, tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((10**6, 12), np.float16))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2 * 10**8))
    with pytest.raises(InputError, match="needs 0.241 GB and its disk has 0.2 free"):
        encode(residual, tmp_path / "x.npy", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["x.npy"]
