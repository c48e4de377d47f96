"""Strict jax for every test, the browser, and the one table of tolerances."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is what most tests wait for; so compiled, programs compute the same a little slower.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
os.environ["TAPROOT_CACHE"] = ""  # no tokenizer table comes from, or goes to, a user's folder

import jax
import numpy as np
import pytest

from tests.browser import browser as browser

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Relative error: max |difference| / max |expected|. Never widened without a reason beside it.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget compiled programs now and then: each takes memory maps, of which Linux allows a
    process 65,530, and beyond them compiling ends in a segmentation fault."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """For tests that run optax, whose code mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def relative():
    """Largest |difference| over largest |expected| of two arrays."""
    return relative_error


def relative_error(value, expected) -> float:
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape, f"{value.shape} against {expected.shape}"
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300))


@pytest.fixture(scope="session")
def close():
    """Assert that two trees agree leaf by leaf, within a tolerance of the table or a number."""
    return assert_close


def assert_close(found, expected, tolerance: str | float = "float32") -> None:
    limit = TOLERANCE[tolerance] if isinstance(tolerance, str) else tolerance
    errors = jax.tree.map(relative_error, found, expected)
    worst, error = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda leaf: leaf[1])
    assert error <= limit, f"{jax.tree_util.keystr(worst) or 'value'}: {error:.1e} > {limit:.0e}"
