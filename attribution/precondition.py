"""Preconditioners: the autocorrelation of gradients, site by site, and its damped inverses.

Dims: B examples, S sites (of all layers), E = P*P features of one site, D = S*E.

    H_s = mean_n vec(G_ns) vec(G_ns)^T,    H_s^-power with H_s + lambda_s I for H_s

Clean damping is relative to the mean eigenvalue, lambda = c tr(H)/E. The research notes' formula
took c mean|H_ij| over all entries, up to E times less when H is nearly diagonal.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import InputError

LARGEST = 4096


def check_size(projection_dim: int) -> None:
    """Raise when H would not fit: it needs (P*P)^2 numbers for every site."""
    if projection_dim == 0 or projection_dim**2 > LARGEST:
        limit = int(LARGEST**0.5)
        raise InputError("--precondition needs a projected gradient; use --projection-dim "
                         f"between 1 and {limit}, or --precondition none")  # fmt: skip


@jax.jit
def add_autocorrelation(h_SEE: jax.Array, features_BD: jax.Array) -> jax.Array:
    """H plus the sum over a batch of vec(G) vec(G)^T; padding rows are zero and add nothing."""
    b, (s, e, _) = features_BD.shape[0], h_SEE.shape
    f_BSE = features_BD.reshape(b, s, e)
    return h_SEE + jnp.einsum("BSE,BSF->SEF", f_BSE, f_BSE, precision="highest")


def inverse_power(
    h_SEE: np.ndarray,
    power: float,
    damping: float,
    relative_to: Literal["eigenvalue", "entry"] = "eigenvalue",
) -> np.ndarray:
    """(H + lambda I)^-power of every site, computed in float64, returned as float32 [S,E,E].

    damping: c, relative to the mean eigenvalue or to the mean absolute entry of each H_s.
    A site whose gradients are all zero gets zero.
    """
    out = np.empty(h_SEE.shape, np.float32)
    for s, h_EE in enumerate(np.asarray(h_SEE, np.float64)):
        mean = np.trace(h_EE) / len(h_EE) if relative_to == "eigenvalue" else np.abs(h_EE).mean()
        if mean == 0:
            out[s] = 0
            continue
        values_E, vectors_EE = np.linalg.eigh((h_EE + h_EE.T) / 2)
        damped_E = np.maximum(values_E, 0) + damping * mean
        if damped_E.min() <= 1e-12 * damped_E.max():
            raise InputError("the preconditioner is singular; use a larger --damping")
        out[s] = (vectors_EE * damped_E**-power) @ vectors_EE.T
    return out


def apply(matrix_SEE: jax.Array, features_BD: jax.Array) -> jax.Array:
    """Each site's block of the features times its (symmetric) matrix, [B,D]."""
    b, (s, e, _) = features_BD.shape[0], matrix_SEE.shape
    f_BSE = features_BD.reshape(b, s, e)
    return jnp.einsum("SEF,BSF->BSE", matrix_SEE, f_BSE, precision="highest").reshape(b, -1)
