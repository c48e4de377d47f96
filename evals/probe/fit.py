"""Probes of all layers at once: a linear map or a small network on standardised activations.

    linear   logit = w z + b                          C chosen on validation (core.logistic)
    mlp      logit = v relu(z U + c) + b              Adam, the epoch that does best on validation

z = (x - mean) / std with mean and std of the training samples alone. "Best" is by AUROC, which
asks for no threshold. Probes are float32 whatever the model computes in (Alain & Bengio 2016).

Dims: L layers, N training samples, M validation samples, D width, H hidden, G values of C.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from core import logistic, ranks
from core.errors import InputError
from core.model import full_precision
from core.progress import Progress

GRID = (1e-4, 1e-3, 1e-2, 1e-1)
HIDDEN, RATE, BATCH = 128, 1e-3, 128
EPOCHS, PATIENCE = 60, 8  # at most; without a better one

Tensors = dict[str, np.ndarray]


class Fitted(NamedTuple):
    """One layer's probe: its tensors, float32 (see `probability`), and how it was found."""

    tensors: Tensors
    how: dict[str, Any]


def scaling(x_LND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation [L,D] float32; of a feature that never changes it is 1."""
    mean_LD = x_LND.mean(1, dtype=np.float64)
    std_LD = np.stack([x_ND.std(0, dtype=np.float64) for x_ND in x_LND])
    std_LD = np.where(std_LD > 1e-6 * np.abs(mean_LD), std_LD, 1)
    return mean_LD.astype(np.float32), std_LD.astype(np.float32)


def probability(tensors: Tensors, x_ND: np.ndarray) -> np.ndarray:
    """What a probe says of activations [N,D]: p [N] float64, NaN where they are not finite."""
    wide = {name: x.astype(np.float64) for name, x in tensors.items()}
    first = wide["hidden"] if "hidden" in wide else wide["coef"][:, None]
    # The scaling goes into the first matrix: the activations are many, it is one.
    first = first / wide["std"][:, None]
    y_NH = x_ND.astype(np.float64) @ first - wide["mean"] @ first
    if "hidden" in wide:
        y_NH = (np.maximum(y_NH + wide["hidden_bias"], 0) @ wide["coef"])[:, None]
    return logistic.probability(y_NH[:, 0] + wide["intercept"])


def linear(
    x_LND: np.ndarray,
    positive_N: np.ndarray,
    weights_N: np.ndarray,
    grid: ArrayLike,
    x_LMD: np.ndarray,
    positive_M: np.ndarray,
) -> list[Fitted]:
    """Logistic regressions of every layer and C in one compiled call; the best C of each layer.

    grid: values of C [G], or of each layer [L,G].
    """
    grid_LG = np.broadcast_to(np.asarray(grid, np.float64), (len(x_LND), np.shape(grid)[-1]))
    mean_LD, std_LD = scaling(x_LND)
    z_LND = (x_LND - mean_LD[:, None]) / std_LD[:, None]
    found = logistic.fit(z_LND, positive_N, grid_LG, weights_N)
    probes = []
    for layer, (mean_D, std_D) in enumerate(zip(mean_LD, std_LD, strict=True)):
        tried: list[tuple[float, Fitted]] = []
        for g, c in enumerate(grid_LG[layer]):
            tensors = {
                "mean": mean_D,
                "std": std_D,
                "coef": found.coef_LGD[layer, g].astype(np.float32),
                "intercept": found.intercept_LG[layer, g].astype(np.float32),
            }
            score = ranks.auc(probability(tensors, x_LMD[layer]), positive_M)
            how = {
                "solver": "newton",
                "c": float(c),
                "converged": bool(found.converged_LG[layer, g]),
                "iterations": int(found.iterations_LG[layer, g]),
                "gradient": float(found.gradient_LG[layer, g]),
            }
            tried.append((score, Fitted(tensors, how)))
        probes.append(max(tried, key=lambda pair: pair[0])[1])
    return probes


def mlp(
    x_LND: np.ndarray,
    positive_N: np.ndarray,
    weights_N: np.ndarray,
    x_LMD: np.ndarray,
    positive_M: np.ndarray,
    seed: int,
) -> list[Fitted]:
    """One hidden layer for every layer's activations, all trained side by side."""
    mean_LD, std_LD = scaling(x_LND)
    z_LND = jnp.asarray((x_LND - mean_LD[:, None]) / std_LD[:, None])
    labels_N, weights_N = positive_N.astype(np.float32), weights_N.astype(np.float32)
    layers, n, width = x_LND.shape
    rng = np.random.default_rng([seed, 2])
    params = {
        "hidden": rng.normal(0, (2 / width) ** 0.5, (width, HIDDEN)),
        "hidden_bias": np.zeros(HIDDEN),
        "coef": rng.normal(0, HIDDEN**-0.5, HIDDEN),
        "intercept": np.zeros(()),
    }
    # The same start and the same order of samples in every layer.
    stacked = {k: jnp.asarray(np.stack([v] * layers), jnp.float32) for k, v in params.items()}
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        state = jax.vmap(optax.adam(RATE).init)(stacked)
    size = min(BATCH, n)
    best: list[tuple[float, int, Tensors]] = [(-1.0, 0, {})] * layers
    with Progress(EPOCHS, "mlp probes", "epochs") as bar:
        for epoch in range(1, EPOCHS + 1):
            order = rng.permutation(n)[: n // size * size].reshape(-1, size)
            stacked, state = _epoch(stacked, state, z_LND, labels_N, weights_N, order)
            host = jax.device_get(stacked)
            for layer in range(layers):
                tensors = {k: np.asarray(v[layer]) for k, v in host.items()}
                tensors |= {"mean": mean_LD[layer], "std": std_LD[layer]}
                score = ranks.auc(probability(tensors, x_LMD[layer]), positive_M)
                if score > best[layer][0]:
                    best[layer] = (score, epoch, tensors)
            bar.update(1)
            if epoch - max(at for _, at, _ in best) >= PATIENCE:
                break
    if not all(tensors for _, _, tensors in best):
        raise InputError("an mlp probe diverged; use --probe linear")
    how = {"solver": "adam", "rate": RATE, "hidden": HIDDEN, "batch": size}
    return [Fitted(tensors, {**how, "epoch": at}) for _, at, tensors in best]


@jax.jit
@full_precision
def _epoch(
    params: Any, state: Any, z_LND: Any, labels_N: Any, weights_N: Any, order_JB: Any
) -> tuple[Any, Any]:
    """One pass over the training samples in batches [J,B]."""

    def loss(one: Any, z_BD: jax.Array, y_B: jax.Array, s_B: jax.Array) -> jax.Array:
        h_BH = jax.nn.relu(jnp.einsum("BD,DH->BH", z_BD, one["hidden"]) + one["hidden_bias"][None])
        logit_B = jnp.einsum("BH,H->B", h_BH, one["coef"]) + one["intercept"]
        return (s_B * optax.sigmoid_binary_cross_entropy(logit_B, y_B)).mean()

    def step(carried: tuple[Any, Any], index_B: jax.Array) -> tuple[tuple[Any, Any], None]:
        one, memory = carried
        gradient = jax.vmap(jax.grad(loss), (0, 0, None, None))(
            one, z_LND[:, index_B], labels_N[index_B], weights_N[index_B]
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, memory = jax.vmap(optax.adam(RATE).update)(gradient, memory)
            return (optax.apply_updates(one, updates), memory), None

    return jax.lax.scan(step, (params, state), order_JB)[0]
