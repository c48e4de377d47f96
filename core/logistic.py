"""Logistic regression with an L2 penalty, many problems in one compiled call.

    minimise  1/2 |w|^2 + C sum_n s_n log(1 + exp(-y_n (w x_n + b))),    y = +-1, b free

scikit-learn's objective, by Newton's method with a backtracking line search: its step also tells
how far the coefficients still are from the optimum, in their own unit. Conjugate gradients find
the step from products with the Hessian (Lin, Weng & Keerthi, "Trust Region Newton Method for
Large-Scale Logistic Regression", 2008); where a large C makes it too ill-conditioned for them, it
is formed and factorised. All of it in float64, whatever jax is set to: on separable data the
curvature of what is told apart for sure is below float32.

Dims: L problems with the same labels (layers), G values of C, N samples, D features.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from core.errors import InputError

DENSE = 2048  # features up to which the Hessian may be formed
STEP = 1e-5  # of a coefficient, the last: what is left then is smaller still
ITERATIONS = 100
HALVINGS = 40  # of a step
PRODUCTS = 100  # with the Hessian, for one step of conjugate gradients
RESIDUAL = 1e-3  # of a step, relative to the gradient

Weighting = Literal["none", "balanced", "sqrt"]


class Fit(NamedTuple):
    """Coefficients [L,G,D] and intercepts [L,G], float64, and how each fit ended, all [L,G].

    iterations: Newton steps. gradient: largest entry of the objective's gradient at the end.
    """

    coef_LGD: np.ndarray
    intercept_LG: np.ndarray
    iterations_LG: np.ndarray
    converged_LG: np.ndarray
    gradient_LG: np.ndarray


def fit(
    x_LND: ArrayLike,
    positive_N: ArrayLike,
    c: ArrayLike,
    weights_N: ArrayLike | None = None,
) -> Fit:
    """Fit every problem for every C; a fit starts where that of the C before it ended.

    x_LND: best standardised, any float dtype; problems are solved one after the other, so that
    each has the numbers it would have alone. c: [G], or of each problem [L,G], best ascending.
    weights_N: s, default 1.
    Raises InputError for labels of one kind, and for features that are not finite.
    """
    positive_N = np.asarray(positive_N, bool)
    n = len(positive_N)
    weights_N = np.ones(n) if weights_N is None else np.asarray(weights_N, np.float64)
    if not 0 < positive_N.sum() < n:
        kind = "positive" if positive_N.any() else "negative"
        raise InputError(f"all {n} samples are {kind}; a classifier needs both kinds")
    with jax.enable_x64(True):
        x_LND, c_G = jnp.asarray(x_LND), np.asarray(c, np.float64)
        c_LG = np.broadcast_to(c_G, (len(x_LND), c_G.shape[-1]))
        found = _fit(x_LND.shape[-1] <= DENSE, PRODUCTS, x_LND, positive_N, weights_N, c_LG)
        found = Fit(*(np.asarray(part) for part in found))
    if not np.isfinite(found.coef_LGD).all():
        raise InputError("the features hold values that are not finite; leave those samples out")
    return found


def class_weights(positive_N: ArrayLike, rule: Weighting, cap: float = 5.0) -> np.ndarray:
    """Weight of every sample, float64.

    balanced: N / (2 samples of its kind), scikit-learn's. sqrt: of a positive the root of
    negatives / positives, `cap` at most; of a negative 1.
    """
    positive_N = np.asarray(positive_N, bool)
    n, m = max(int(positive_N.sum()), 1), max(int((~positive_N).sum()), 1)
    yes, no = {
        "none": (1.0, 1.0),
        "balanced": (len(positive_N) / (2 * n), len(positive_N) / (2 * m)),
        "sqrt": (min(cap, (m / n) ** 0.5), 1.0),
    }[rule]
    return np.where(positive_N, yes, no)


def probability(logit: ArrayLike) -> np.ndarray:
    """1 / (1 + exp(-logit)), float64, without overflow."""
    return np.exp(-np.logaddexp(0, -np.asarray(logit, np.float64)))


class _State(NamedTuple):
    """Weights and, last, the intercept [D+1]; margins' logits [N]; the last step's largest move."""

    w_E: jax.Array
    logit_N: jax.Array
    move: jax.Array
    iteration: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit(
    dense: bool,
    products: int,
    x_LND: jax.Array,
    positive_N: ArrayLike,
    weights_N: ArrayLike,
    c_LG: ArrayLike,
) -> tuple[jax.Array, ...]:
    sign_N = jnp.where(jnp.asarray(positive_N), 1.0, -1.0)

    def problem(given: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        x_ND, c_G = given[0].astype(jnp.float64), given[1]
        one = functools.partial(_newton, dense, products, x_ND, sign_N, jnp.asarray(weights_N))
        start = jnp.zeros(x_ND.shape[1] + 1, jnp.float64)
        return jax.lax.scan(one, start, c_G)[1]

    w_LGE, *ended = jax.lax.map(problem, (x_LND, jnp.asarray(c_LG)))
    return w_LGE[..., :-1], w_LGE[..., -1], *ended


def _newton(
    dense: bool,
    products: int,
    x_ND: jax.Array,
    sign_N: jax.Array,
    weights_N: jax.Array,
    start_E: jax.Array,
    c: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The optimum for one C, as `lax.scan` carries it on, and what is told of it."""
    weights_N = c * weights_N
    penalty_E = jnp.ones_like(start_E).at[-1].set(0.0)

    def product(w_E: jax.Array) -> jax.Array:
        return jnp.einsum("ND,D->N", x_ND, w_E[:-1]) + w_E[-1]

    def transposed(v_N: jax.Array) -> jax.Array:
        return jnp.append(jnp.einsum("ND,N->D", x_ND, v_N), v_N.sum())

    def objective(w_E: jax.Array, logit_N: jax.Array) -> jax.Array:
        return (
            0.5 * (penalty_E * w_E**2).sum()
            + (weights_N * jnp.logaddexp(0.0, -sign_N * logit_N)).sum()
        )

    def gradient(w_E: jax.Array, logit_N: jax.Array) -> jax.Array:
        return penalty_E * w_E - transposed(weights_N * sign_N * jax.nn.sigmoid(-sign_N * logit_N))

    def direction(g_E: jax.Array, logit_N: jax.Array) -> jax.Array:
        curve_N = weights_N * jax.nn.sigmoid(logit_N) * jax.nn.sigmoid(-logit_N)
        # The free intercept's curvature may underflow where all samples are told apart for sure.
        ridge_E = penalty_E.at[-1].set(1e-12)

        def hessian(v_E: jax.Array) -> jax.Array:
            return ridge_E * v_E + transposed(curve_N * product(v_E))

        def factorised() -> jax.Array:
            edge_E = transposed(curve_N)
            h_DD = jnp.einsum("ND,NE->DE", x_ND * curve_N[:, None], x_ND)
            h_EE = jnp.block([[h_DD, edge_E[:-1, None]], [edge_E[None]]]) + jnp.diag(ridge_E)
            return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(h_EE), g_E)

        diagonal_E = ridge_E + jnp.append(jnp.einsum("ND,N->D", x_ND**2, curve_N), curve_N.sum())
        d_E, _ = jax.scipy.sparse.linalg.cg(
            hessian, g_E, tol=RESIDUAL, maxiter=products, M=lambda v_E: v_E / diagonal_E
        )
        if not dense:
            return d_E
        left = jnp.linalg.norm(hessian(d_E) - g_E)
        met = left <= 2 * RESIDUAL * jnp.linalg.norm(g_E)
        return jax.lax.cond(met, lambda: d_E, factorised)

    def step(state: _State) -> _State:
        w_E, logit_N = state.w_E, state.logit_N
        g_E = gradient(w_E, logit_N)
        d_E = direction(g_E, logit_N)
        along_N, slope, now = product(d_E), (g_E * d_E).sum(), objective(w_E, logit_N)

        def worse(trial: tuple[jax.Array, jax.Array]) -> jax.Array:
            size, halvings = trial
            then = objective(w_E - size * d_E, logit_N - size * along_N)
            return (then > now - 1e-4 * size * slope) & (halvings < HALVINGS)

        first = (jnp.ones((), jnp.float64), jnp.zeros((), jnp.int32))
        size, _ = jax.lax.while_loop(worse, lambda trial: (trial[0] / 2, trial[1] + 1), first)
        w_E = w_E - size * d_E
        return _State(w_E, product(w_E), jnp.abs(d_E).max(), state.iteration + 1)

    def goes_on(state: _State) -> jax.Array:
        return (state.move > STEP) & (state.iteration < ITERATIONS)

    first = _State(start_E, product(start_E), jnp.array(jnp.inf), jnp.zeros((), jnp.int32))
    end = jax.lax.while_loop(goes_on, step, first)
    g = jnp.abs(gradient(end.w_E, end.logit_N)).max()
    return end.w_E, (end.w_E, end.iteration, end.move <= STEP, g)
