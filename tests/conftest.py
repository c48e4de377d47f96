"""Strict jax for every test, and the one table of tolerances."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Relative error: max |difference| / max |expected|. Never widened without a reason beside it.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


def relative_error(value, expected) -> float:
    """Largest |difference| over largest |expected| of two arrays."""
    import numpy as np

    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape, f"{value.shape} against {expected.shape}"
    return float(np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300))
