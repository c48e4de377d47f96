"""The k largest against numpy's stable sort, on one device and on several."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.sharding import make_mesh
from sae import topk

# One stage, then two: divisible and not; all features; one.
SIZES = [(40, 5), (40, 40), (512, 64), (256, 1), (1024, 4), (1000, 3), (2500, 7), (7, 1)]


def rows(kind: str, features: int) -> np.ndarray:
    rng = np.random.default_rng(features)
    values = {
        "different": rng.normal(size=(3, 2, features)),
        "negative": -rng.exponential(size=(3, 2, features)),
        "tied": rng.integers(-1, 2, (3, 2, features)),
        "few": np.maximum(rng.normal(size=(3, 2, features)) - 3, 0),
        "equal": np.ones((3, 2, features)),
        "infinite": np.where(rng.random((3, 2, features)) < 0.999, -np.inf, np.inf),
    }
    return values[kind].astype(np.float32)


def stable(h: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-h, axis=-1, kind="stable")[..., :k]


@pytest.mark.parametrize("features,k", SIZES)
def test_exactly_the_largest_and_of_equals_the_first(features, k):
    assert (features < topk.FEATURES_EACH * k) == (features in (40, 512, 7))
    best = jax.jit(functools.partial(topk.top_k, k=k))
    among = jax.jit(functools.partial(topk.selected, k=k))
    for kind in ("different", "negative", "tied", "few", "equal", "infinite"):
        h = rows(kind, features)
        index = stable(h, k)
        found_values, found_index = best(h)
        np.testing.assert_array_equal(found_index, index, kind)
        np.testing.assert_array_equal(found_values, np.take_along_axis(h, index, -1), kind)
        expected = np.zeros(h.shape, bool)
        np.put_along_axis(expected, index, True, -1)
        np.testing.assert_array_equal(among(h), expected, kind)
    assert found_index.dtype == np.int32


@pytest.mark.parametrize("features,k", [(40, 5), (2500, 7)])
def test_one_row(features, k):
    h = rows("tied", features)[0, 0]
    np.testing.assert_array_equal(topk.top_k(jnp.asarray(h), k)[1], stable(h, k))


def test_nan_is_among_the_largest():
    h = rows("different", 40)
    h[..., 7] = np.nan
    assert (topk.top_k(jnp.asarray(h), 3)[1][..., 0] == 7).all()
    assert topk.selected(jnp.asarray(h), 3)[..., 7].all()


def test_gradients_reach_what_was_chosen():
    h = rows("different", 1024)
    grad = jax.grad(lambda h: (topk.top_k(h, 4)[0] ** 2).sum())(jnp.asarray(h))
    np.testing.assert_allclose(grad, np.where(topk.selected(jnp.asarray(h), 4), 2 * h, 0))


def test_features_are_not_sorted():
    """XLA makes a sort of a top-k of which only the last is used."""
    for features, k in ((512, 64), (2560, 10)):
        h = jnp.zeros((3, features))
        text = jax.jit(functools.partial(topk.selected, k=k)).lower(h).compile().as_text() or ""
        sorted_ = [line for line in text.splitlines() if " sort(" in line]
        assert all(f"[3,{k}]" in line for line in sorted_), sorted_  # the groups' order


def test_a_mesh_of_one_device():
    h = rows("tied", 40)
    np.testing.assert_array_equal(topk.top_k(jnp.asarray(h), 6, make_mesh())[1], stable(h, 6))


SCRIPT = """
import functools, sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from core.sharding import make_mesh
from sae import topk

with np.load(sys.argv[1]) as file:
    h, mesh, found = file["h"], make_mesh(data=2, model=4), {}
for name, x, where in (("even", h, ("data", None, "model")), ("odd", h[:3], (None, None, "model")),
                       ("row", h[0, 0], ("model",))):
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*where)))
    for k in (4, 1500):
        run = jax.jit(functools.partial(topk.top_k, k=k, mesh=mesh)).lower(x).compile()
        found[f"{name}/{k}"] = np.asarray(run(x)[1])
        gathers = [line for line in run.as_text().splitlines() if " all-gather(" in line]
        assert gathers and (k > 4 or not any(",4096]" in line for line in gathers)), gathers
np.savez(sys.argv[2], **found)
"""


def test_over_devices_as_on_one(tmp_path):
    """k less and more than a device's features, rows that divide and that do not; all ties."""
    h = np.random.default_rng(0).integers(-3, 4, (4, 2, 4096)).astype(np.float32)
    np.savez(tmp_path / "in.npz", h=h)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", SCRIPT, tmp_path / "in.npz", tmp_path / "out.npz"]
    root = Path(topk.__file__).parents[1]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": flags}, cwd=root)
    with np.load(tmp_path / "out.npz") as found:
        for k in (4, 1500):
            np.testing.assert_array_equal(found[f"even/{k}"], stable(h, k))
            np.testing.assert_array_equal(found[f"odd/{k}"], stable(h[:3], k))
            np.testing.assert_array_equal(found[f"row/{k}"], stable(h[0, 0], k))
