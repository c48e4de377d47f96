"""Regularised inverses of autocorrelations, their mixture, and which sizes are refused."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from attribution.curvature import precondition
from attribution.projection import Projection
from core.errors import InputError

GOLDEN = Path(__file__).parents[2] / "golden" / "bergson"
VALUES = np.array([-1e-9, 0, 0.1, 2, 7.9])
MEAN = 2.0


def random_h(sites=3, size=6, rank=4):
    random = np.random.default_rng(0)
    f_SNE = random.normal(size=(sites, rank, size)) * np.array([1, 10, 0.1])[:, None, None]
    return np.einsum("SNE,SNF->SEF", f_SNE, f_SNE)


@pytest.mark.parametrize("relative_to", ["eigenvalue", "entry"])
def test_inverse_is_of_the_matrix_damped_by_its_own_scale(relative, relative_to):
    h_SEE = random_h()
    inverse = precondition.inverse_power(h_SEE, 1.0, 0.1, relative_to=relative_to)
    half = precondition.inverse_power(h_SEE, 0.5, 0.1, relative_to=relative_to)
    for s, h_EE in enumerate(h_SEE):
        mean = {"eigenvalue": np.trace(h_EE) / 6, "entry": np.abs(h_EE).mean()}[relative_to]
        expected = np.linalg.inv(h_EE + 0.1 * mean * np.eye(6))
        assert relative(inverse[s], expected) < 1e-6
        assert relative(half[s].astype(np.float64) @ half[s], expected) < 1e-6


def test_multipliers_by_their_formulas():
    """With mean eigenvalue 2 and c = 0.1, the damping is 0.2."""
    expected: dict[Any, list[float]] = {
        "damped": [1 / 0.2, 1 / 0.2, 1 / 0.3, 1 / 2.2, 1 / 8.1],
        "absolute": [1 / 0.1, 1 / 0.1, 1 / 0.2, 1 / 2.1, 1 / 8.0],
        "pseudo": [0, 0, 0, 1 / 2, 1 / 7.9],
        "tikhonov": [0, 0, 0.1 / 0.05, 2 / 4.04, 7.9 / (7.9**2 + 0.04)],
    }
    for method, values in expected.items():
        found = precondition.multipliers(VALUES, method, 0.1)
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, values, rtol=1e-12)
        assert not precondition.multipliers(np.zeros((2, 3)), method, 0.1).any()
    grid = precondition.multipliers(VALUES[None].repeat(2, 0), "damped", 0.1)
    np.testing.assert_allclose(grid, [expected["damped"]] * 2, rtol=1e-12)


@pytest.mark.parametrize("method", ["pseudo", "tikhonov"])
def test_without_damping_only_what_has_an_inverse_is_inverted(method):
    np.testing.assert_allclose(
        precondition.multipliers(VALUES, method, 0.0), [0, 0, 10, 1 / 2, 1 / 7.9], rtol=1e-12
    )


@pytest.mark.parametrize("method", ["damped", "absolute", "pseudo", "tikhonov"])
def test_half_a_power_twice_is_the_whole(relative, method):
    h_SEE = random_h()
    whole = precondition.inverse_power(h_SEE, 1.0, 0.1, method)
    half = precondition.inverse_power(h_SEE, 0.5, 0.1, method).astype(np.float64)
    assert relative(half @ half, whole) < 1e-6
    values_E, vectors_EE = np.linalg.eigh(h_SEE[1])
    expected = (vectors_EE * precondition.multipliers(values_E, method, 0.1)) @ vectors_EE.T
    assert relative(whole[1], expected) < 1e-6


def test_unknown_inversion_is_refused():
    with pytest.raises(InputError, match="'entry'; use one of damped, absolute"):
        precondition.inverse_power(random_h(), 1.0, 0.1, "entry")  # pyright: ignore


def test_the_two_dampings_differ_most_for_a_diagonal():
    """mean|H_ij| of a diagonal H is E times less than its mean eigenvalue."""
    h_SEE = 5 * np.eye(8)[None]
    by_eigenvalue = precondition.inverse_power(h_SEE, 1.0, 0.1)[0]
    by_entry = precondition.inverse_power(h_SEE, 1.0, 0.1, relative_to="entry")[0]
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


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_scores_and_mixture_are_bergsons(relative, family):
    folder = GOLDEN / family
    with np.load(folder / "hessians.npz") as hessians, np.load(folder / "projected.npz") as grads:
        names = [k.split("/", 2)[2] for k in hessians if k.startswith("autocorrelation/train/")]
        h = {
            kind: np.stack([hessians[f"autocorrelation/{kind}/{name}"] for name in names])
            for kind in ("train", "query", "mixed")
        }
        train_ND, query_QD = (
            np.concatenate([grads[f"rademacher/{split}/{name}"] for name in names], -1)
            for split in ("train", "query")
        )
        weight = float(hessians["mix_lambda"])
    mixed_SEE, found = precondition.mix(h["query"], h["train"], components=10)
    assert abs(found - weight) < 1e-5
    assert relative(mixed_SEE, h["mixed"]) < 1e-5
    ours_SEE = precondition.add_autocorrelation(jnp.zeros_like(h["train"]), jnp.asarray(train_ND))
    assert relative(ours_SEE / len(train_ND), h["train"]) < 1e-5

    def solved(h_SEE, power, method, features_BD):
        matrix_SEE = jnp.asarray(precondition.inverse_power(h_SEE, power, 0.1, method))
        return np.asarray(precondition.apply(matrix_SEE, jnp.asarray(features_BD)), np.float64)

    def cosines(h_SEE, method):
        units = [solved(h_SEE, 0.5, method, features) for features in (train_ND, query_QD)]
        units = [unit / np.linalg.norm(unit, axis=-1, keepdims=True) for unit in units]
        return units[0] @ units[1].T

    with np.load(folder / "scores.npz") as scores:
        names = {
            "damped": "damped_inverse", "absolute": "absolute_damped_inverse",
            "pseudo": "pseudoinverse", "tikhonov": "tikhonov_filtered",
        }  # fmt: skip
        for method, name in names.items():
            one_sided = train_ND @ solved(h["train"], 1.0, method, query_QD).T
            assert relative(one_sided, scores[f"{name}_onesided"]) < 1e-4
            split = cosines(h["train"], method)
            assert relative(split, scores[f"{name}_split_cosine"]) < 1e-4
        assert relative(cosines(mixed_SEE, "damped"), scores["mixed_split_cosine"]) < 1e-4


def test_mixture_crosses_the_spectra_at_the_component():
    query, pool = np.array([[8.0, 1], [4, 2]]), np.array([[3.0, 0], [0, 1]])
    assert precondition.mixing_weight(query, pool, 1) == 3 / 11
    assert precondition.mixing_weight(query, pool, 2) == 1 / 5
    # Beyond what the pool spans, the last direction that it does.
    assert precondition.mixing_weight(query, pool, 1000) == 1 / 5
    assert precondition.mixing_weight(np.zeros((2, 2)), pool) == 1
    with pytest.raises(InputError, match="all gradients of the pool are zero"):
        precondition.mixing_weight(query, np.zeros((2, 2)))


@pytest.mark.parametrize("target", ["site", "global"])
@pytest.mark.parametrize("dim", [0, 65, 1000])
def test_size_that_cannot_be_inverted_is_refused_with_a_remedy(dim, target):
    with pytest.raises(InputError, match="between 1 and 64, or --precondition none"):
        precondition.check_size(Projection(dim, target=target))


def test_a_dense_sketch_has_a_limit_of_its_own():
    dense = Projection(4096, "bergson-normal", target="global")
    precondition.check_size(dense)
    with pytest.raises(InputError, match="between 1 and 4096"):
        precondition.check_size(dense._replace(dim=4097))


def test_sizes_that_fit_pass():
    for dim in (1, 16, 64):
        precondition.check_size(Projection(dim))
