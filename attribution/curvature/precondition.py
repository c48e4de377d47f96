"""Preconditioners: the autocorrelation of gradients and its regularised inverses.

Dims: B examples, S sites (of all layers), E = P*P features of one site, D = S*E.

    H_s = mean_n vec(G_ns) vec(G_ns)^T,    H_s^-power = V diag(m(l)^power) V^T

with l the eigenvalues of H_s and m what `multipliers` makes of them. A sketch shared by all sites
is the case S = 1, E = D. Damping is relative to the mean eigenvalue; the research notes' formula
took c mean|H_ij| over all entries, up to E times less when H is nearly diagonal.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from attribution.projection import Projection
from core.errors import InputError

LARGEST = 4096
Inversion = Literal["damped", "absolute", "pseudo", "tikhonov"]
METHODS = get_args(Inversion)


def check_size(projection: Projection) -> None:
    """Raise when H would not fit: it needs E^2 numbers, of a site or of a global sketch."""
    if not 0 < math.prod(projection.shape) <= LARGEST:
        limit = LARGEST if projection.dense else int(LARGEST**0.5)
        raise InputError("a preconditioner needs projected gradients; use --projection-dim "
                         f"between 1 and {limit}, or --precondition none")  # fmt: skip


@jax.jit
def add_autocorrelation(h_SEE: jax.Array, features_BD: jax.Array) -> jax.Array:
    """H plus the sum over a batch of vec(G) vec(G)^T; padding rows are zero and add nothing."""
    b, (s, e, _) = features_BD.shape[0], h_SEE.shape
    f_BSE = features_BD.reshape(b, s, e)
    return h_SEE + jnp.einsum("BSE,BSF->SEF", f_BSE, f_BSE, precision="highest")


def multipliers(values_E: np.ndarray, method: Inversion, damping: float) -> np.ndarray:
    """What replaces each eigenvalue l >= 0 in the inverse; float64, of any shape.

    With c the damping and d = c mean(l):  damped 1/(l + d),  absolute 1/(l + c),
    pseudo 1/l where l > d and 0 elsewhere,  tikhonov l/(l^2 + d^2).
    Negative l are rounding and count as 0; a spectrum of zeros alone gets zeros.
    """
    values_E = np.maximum(np.asarray(values_E, np.float64), 0)
    if method not in METHODS:
        raise InputError(f"unknown inversion {method!r}; use one of {', '.join(METHODS)}")
    if not values_E.any():
        return values_E
    shift = damping if method == "absolute" else damping * values_E.mean()
    if method == "pseudo":
        return np.divide(1, values_E, out=np.zeros_like(values_E), where=values_E > shift)
    if method == "tikhonov":
        square_E = values_E**2 + shift**2
        return np.divide(values_E, square_E, out=np.zeros_like(values_E), where=square_E > 0)
    return reciprocals(values_E + shift)


def reciprocals(damped_E: np.ndarray) -> np.ndarray:
    """1 / damped eigenvalues; raises when the least is nothing beside the largest."""
    if damped_E.min() <= 1e-12 * damped_E.max():
        raise InputError("the preconditioner is singular; use a larger --damping")
    return 1 / damped_E


def inverse_power(
    h_SEE: np.ndarray,
    power: float,
    damping: float,
    method: Inversion = "damped",
    relative_to: Literal["eigenvalue", "entry"] = "eigenvalue",
) -> np.ndarray:
    """H^-power of every site, regularised, computed in float64, returned as float32 [S,E,E].

    damping: c of `multipliers`; with `entry`, H + c mean|H_ij| I is what is inverted.
    A site whose gradients are all zero gets zero.
    """
    out = np.empty(h_SEE.shape, np.float32)
    for s, h_EE in enumerate(np.asarray(h_SEE, np.float64)):
        values_E, vectors_EE = np.linalg.eigh((h_EE + h_EE.T) / 2)
        if relative_to == "entry":
            found_E = multipliers(values_E, "absolute", damping * float(np.abs(h_EE).mean()))
        else:
            found_E = multipliers(values_E, method, damping)
        out[s] = (vectors_EE * found_E**power) @ vectors_EE.T
    return out


def apply(matrix_SEE: jax.Array, features_BD: jax.Array) -> jax.Array:
    """Each site's block of the features times its (symmetric) matrix, [B,D]."""
    b, (s, e, _) = features_BD.shape[0], matrix_SEE.shape
    f_BSE = features_BD.reshape(b, s, e)
    return jnp.einsum("SEF,BSF->BSE", matrix_SEE, f_BSE, precision="highest").reshape(b, -1)


def mixing_weight(
    query_values: np.ndarray, pool_values: np.ndarray, components: int = 1000
) -> float:
    """lambda at which lambda H_query and (1 - lambda) H_pool cross at one of their eigenvalues.

    Both spectra, of all sites together, are sorted; at number `components`, or at the last that the
    pool's gradients span, lambda = l_pool / (l_query + l_pool). The directions above it, which the
    queries share as examples of one task, then count for less. TrackStar, arXiv 2410.17413, A.1.3.
    """
    query, pool = (
        np.sort(np.maximum(values, 0), axis=None)[::-1] for values in (query_values, pool_values)
    )
    spanned = int((pool > 1e-12 * pool[0]).sum())
    if spanned == 0:
        raise InputError("all gradients of the pool are zero; use other rows, or another model")
    k = min(components, spanned) - 1
    return float(pool[k] / (query[k] + pool[k]))


def mix(
    h_query_SEE: np.ndarray, h_pool_SEE: np.ndarray, components: int = 1000
) -> tuple[np.ndarray, float]:
    """(lambda H_query + (1 - lambda) H_pool, lambda), lambda from `mixing_weight`."""
    query, pool = (np.linalg.eigvalsh(np.asarray(h, np.float64)) for h in (h_query_SEE, h_pool_SEE))
    weight = mixing_weight(query, pool, components)
    return weight * h_query_SEE + (1 - weight) * h_pool_SEE, weight
