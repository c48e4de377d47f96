"""Damped inverse powers of autocorrelations, and which sizes are refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from attribution import precondition
from core.errors import InputError


def random_h(sites=3, size=6, rank=4):
    random = np.random.default_rng(0)
    f_SNE = random.normal(size=(sites, rank, size)) * np.array([1, 10, 0.1])[:, None, None]
    return np.einsum("SNE,SNF->SEF", f_SNE, f_SNE)


@pytest.mark.parametrize("relative_to", ["eigenvalue", "entry"])
def test_inverse_is_of_the_matrix_damped_by_its_own_scale(relative, relative_to):
    h_SEE = random_h()
    inverse = precondition.inverse_power(h_SEE, 1.0, 0.1, relative_to)
    half = precondition.inverse_power(h_SEE, 0.5, 0.1, relative_to)
    for s, h_EE in enumerate(h_SEE):
        mean = {"eigenvalue": np.trace(h_EE) / 6, "entry": np.abs(h_EE).mean()}[relative_to]
        expected = np.linalg.inv(h_EE + 0.1 * mean * np.eye(6))
        assert relative(inverse[s], expected) < 1e-6
        assert relative(half[s].astype(np.float64) @ half[s], expected) < 1e-6


def test_the_two_dampings_differ_most_for_a_diagonal():
    """mean|H_ij| of a diagonal H is E times less than its mean eigenvalue."""
    h_SEE = 5 * np.eye(8)[None]
    by_eigenvalue = precondition.inverse_power(h_SEE, 1.0, 0.1, "eigenvalue")[0]
    by_entry = precondition.inverse_power(h_SEE, 1.0, 0.1, "entry")[0]
    np.testing.assert_allclose(np.diag(by_eigenvalue), 1 / (5 * 1.1), rtol=1e-6)
    np.testing.assert_allclose(np.diag(by_entry), 1 / (5 * (1 + 0.1 / 8)), rtol=1e-6)


def test_scale_of_a_site_does_not_change_its_share_of_damping(relative):
    h_SEE = random_h()
    inverse = precondition.inverse_power(h_SEE, 1.0, 0.1)
    scaled = precondition.inverse_power(100 * h_SEE, 1.0, 0.1)
    assert relative(100 * scaled, inverse) < 1e-6


def test_site_without_gradients_is_left_out_and_singular_is_refused():
    h_SEE = random_h()
    h_SEE[1] = 0
    assert not precondition.inverse_power(h_SEE, 1.0, 0.1)[1].any()
    with pytest.raises(InputError, match="larger --damping"):
        precondition.inverse_power(h_SEE, 1.0, 0.0)


def test_autocorrelation_adds_up_over_batches(relative):
    f_BD = np.random.default_rng(1).normal(size=(10, 3 * 4)).astype(np.float32)
    f_BD[7:] = 0  # padding
    h_SEE = jnp.zeros((3, 4, 4), jnp.float32)
    for part in np.split(f_BD, [2, 5]):
        h_SEE = precondition.add_autocorrelation(h_SEE, part)
    for s in range(3):
        f_NE = f_BD.reshape(10, 3, 4)[:, s]
        assert relative(h_SEE[s], f_NE.T @ f_NE) < 1e-6
    applied = precondition.apply(h_SEE, jnp.asarray(f_BD)).reshape(10, 3, 4)
    expected = np.stack([f_BD.reshape(10, 3, 4)[:, s] @ np.asarray(h_SEE[s]) for s in range(3)], 1)
    assert relative(applied, expected) < 1e-6


@pytest.mark.parametrize("dim", [0, 65, 1000])
def test_size_that_cannot_be_inverted_is_refused_with_a_remedy(dim):
    with pytest.raises(InputError, match="between 1 and 64, or --precondition none"):
        precondition.check_size(dim)


def test_sizes_that_fit_pass():
    for dim in (1, 16, 64):
        precondition.check_size(dim)
