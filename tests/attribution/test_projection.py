"""Projection matrices: what they depend on, and what they keep."""

import jax
import numpy as np
import pytest

from attribution.projection import Projection, matrix, pair
from core.errors import InputError
from core.schema import Site

KINDS = ["rademacher", "normal"]
NAME = "h.3.attn.c_attn/left"


@pytest.mark.parametrize("kind", KINDS)
def test_depends_on_seed_name_and_side_alone(kind):
    expected = np.asarray(matrix(Projection(8, kind), NAME, 30))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(matrix(Projection(8, kind), NAME, 30), expected)
    jax.random.normal(jax.random.key(9))  # nobody else's draws matter
    np.testing.assert_array_equal(matrix(Projection(8, kind), NAME, 30), expected)
    others = [
        matrix(Projection(8, kind, seed=1), NAME, 30),
        matrix(Projection(8, kind), "h.3.attn.c_attn/right", 30),
        matrix(Projection(8, kind), "h.4.attn.c_attn/left", 30),
    ]
    for other in others:
        # Independent signs: about half of them agree.
        assert 0.3 < (np.sign(other) == np.sign(expected)).mean() < 0.7


def test_a_site_is_the_same_in_a_model_of_other_depth():
    site = Site("blocks/mlp_c_fc", "h.{l}.mlp.c_fc", 10, 14, True)
    shallow, deep = (pair(Projection(4), site, layers, False) for layers in (2, 5))
    for a, b in zip(shallow[:2], deep[:2], strict=True):
        np.testing.assert_array_equal(a, b[:2])
        assert len(np.unique(np.asarray(b), axis=0)) == 5  # layers differ
    assert deep.left_OP.shape == (5, 14, 4) and deep.right_IP.shape == (5, 10, 4)
    assert pair(Projection(4), site, 5, True).right_IP.shape == (5, 11, 4)
    no_bias = site._replace(bias=False)
    assert pair(Projection(4), no_bias, 5, True).right_IP.shape == (5, 10, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_entries_have_variance_one_over_p(kind):
    p, size = 16, 4000
    m_IP = np.asarray(matrix(Projection(p, kind), NAME, size))
    assert m_IP.dtype == np.float32
    # Standard errors: 1/sqrt(n) of the mean, at most sqrt(2/n) of the variance; five of them.
    n = p * size
    assert abs(m_IP.mean() * p**0.5) < 5 / n**0.5
    assert abs(p * m_IP.var() - 1) < 5 * (2 / n) ** 0.5
    if kind == "rademacher":
        np.testing.assert_array_equal(np.unique(m_IP), np.array([-0.25, 0.25], np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_keep_their_expectation(kind):
    """Two-sided: E <L^T X R, L^T Y R> = <X, Y>, over many seeds, within five standard errors."""
    random = np.random.default_rng(0)
    x_OI = random.normal(size=(12, 9))
    y_OI = x_OI + random.normal(size=(12, 9))
    exact, found = (x_OI * y_OI).sum(), []
    for seed in range(400):
        projection = Projection(6, kind, seed=seed)
        left_OP = np.asarray(matrix(projection, "h.0/left", 12), np.float64)
        right_IP = np.asarray(matrix(projection, "h.0/right", 9), np.float64)
        found.append(((left_OP.T @ x_OI @ right_IP) * (left_OP.T @ y_OI @ right_IP)).sum())
    standard_error = np.std(found) / len(found) ** 0.5
    assert standard_error < 0.1 * exact  # or the bound says nothing
    assert abs(np.mean(found) - exact) < 5 * standard_error


@pytest.mark.parametrize("kind", KINDS)
def test_row_norm_gives_every_direction_unit_length(kind):
    m_IP = np.asarray(matrix(Projection(5, kind, "row_norm"), NAME, 33))
    np.testing.assert_allclose(np.linalg.norm(m_IP, axis=0), 1, rtol=1e-6)
    jl_IP = np.asarray(matrix(Projection(5, kind), NAME, 33))
    np.testing.assert_allclose(m_IP, jl_IP / np.linalg.norm(jl_IP, axis=0), rtol=1e-5)


def test_negative_size_is_refused(tiny):
    from attribution.gradients import projections
    from attribution.targets import Spec

    with pytest.raises(InputError, match="projection-dim"):
        projections(tiny.config, Spec(Projection(-1)))
    assert projections(tiny.config, Spec(Projection(0))) == {}
