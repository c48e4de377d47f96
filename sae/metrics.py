"""How well an SAE tells activations, as sums over tokens that add up to the figures people quote.

    explained variance = 1 - sum |t - y|^2 / (sum |t|^2 - n |mean t|^2)

of all tokens together, t being what is told (the activation itself, or a transcoder's target) and y
what the SAE says. A mean of ratios, or a variance about zero, would flatter it (SAELens issues 443
and 659), so tokens leave only sums behind, which are added in float64.

Dims: N tokens, D width in, O width out, F features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae.coder import Coder, Params, reconstruct

TOKENS = 1024  # of which all features are held at once


class Figures(NamedTuple):
    """Of each token: what the SAE says, squared lengths, their product, active features.

    Tokens that do not count hold zeros. fired_F, total_O: sums over those that count.
    """

    y_NO: jax.Array
    errors_N: jax.Array
    squares_N: jax.Array
    outputs_N: jax.Array
    products_N: jax.Array
    l0_N: jax.Array
    l1_N: jax.Array
    fired_F: jax.Array
    total_O: jax.Array


def figures(
    coder: Coder, params: Params, x_ND: jax.Array, t_NO: jax.Array, counts_N: jax.Array
) -> Figures:
    """The figures of tokens x whose target is t; features exist for `TOKENS` tokens at a time."""
    n = x_ND.shape[0]
    pad = -n % min(TOKENS, n)

    def parts(a: jax.Array) -> jax.Array:
        a = jnp.pad(a, ((0, pad), *((0, 0),) * (a.ndim - 1)))
        return a.reshape(-1, min(TOKENS, n), *a.shape[1:])

    def part(carry: tuple[jax.Array, jax.Array], given: tuple[jax.Array, ...]):
        x_ND, t_NO, counts_N = given
        t_NO = t_NO.astype(jnp.float32)
        f_NF, y_NO = reconstruct(coder, params, x_ND)
        active_NF = (f_NF != 0) & counts_N[:, None]

        def total(a_NX: jax.Array) -> jax.Array:
            return jnp.where(counts_N, a_NX.sum(-1), 0)

        found = (
            y_NO, total((t_NO - y_NO) ** 2), total(t_NO**2), total(y_NO**2), total(t_NO * y_NO),
            active_NF.sum(-1), total(jnp.abs(f_NF)),
        )  # fmt: skip
        fired_F, total_O = carry
        counted_NO = jnp.where(counts_N[:, None], t_NO, 0)
        return (fired_F + active_NF.sum(0), total_O + counted_NO.sum(0)), found

    start = (jnp.zeros(coder.d_sae, jnp.int32), jnp.zeros(t_NO.shape[1], jnp.float32))
    sums, found = jax.lax.scan(part, start, (parts(x_ND), parts(t_NO), parts(counts_N)))
    y_NO, *sizes = (a.reshape(-1, *a.shape[2:])[:n] for a in found)
    return Figures._make((y_NO, *sizes, *sums))


class Totals:
    """What has been added up so far; `arrays` is all of it, to keep and to start from."""

    SCALARS = 9  # in the order of `results`

    def __init__(self, features: int, width: int, arrays: dict[str, np.ndarray] | None = None):
        self.arrays = arrays or {
            "scalars": np.zeros(self.SCALARS),
            "fired_F": np.zeros(features, np.int64),
            "total_O": np.zeros(width),
        }

    def add(self, found: Figures, counts_N: np.ndarray) -> None:
        """found: on the host."""
        errors, squares, outputs, products, l0, l1 = (
            np.asarray(x_N, np.float64)[counts_N] for x_N in found[1:7]
        )
        with np.errstate(invalid="ignore", divide="ignore"):  # what is zero has no direction
            cosines = np.nan_to_num(products / np.sqrt(squares * outputs))
            ratios = np.nan_to_num(np.sqrt(outputs / squares), posinf=0)
        of_tokens = (errors, squares, outputs, products, cosines, ratios, l0, l1)
        sums = [x_N.sum() for x_N in of_tokens]
        self.arrays["scalars"] += [counts_N.sum(), *sums]
        self.arrays["fired_F"] += np.asarray(found.fired_F, np.int64)
        self.arrays["total_O"] += np.asarray(found.total_O, np.float64)

    def results(self) -> dict[str, Any]:
        """The figures under the names SAELens and SAEBench give them.

        mse and l1 are sums over their axis, mean over tokens; cosine and l2_ratio, |y| / |t|, are
        means over tokens. dead: features that never fired; dense_1, dense_10: that fired on more
        than 1, 10 % of the tokens.
        """
        n, errors, squares, outputs, products, cosines, ratios, l0, l1 = self.arrays["scalars"]
        mean_O, density_F = self.arrays["total_O"] / n, self.arrays["fired_F"] / n
        variance = squares - n * float(mean_O @ mean_O)
        return {
            "tokens": int(n),
            "explained_variance": 1 - errors / variance if variance > 0 else None,
            "mse": errors / n,
            "cosine": cosines / n,
            "l2_ratio": ratios / n,
            "relative_reconstruction_bias": outputs / products if products else None,
            "l0": l0 / n,
            "l1": l1 / n,
            "features": len(density_F),
            "dead": int((density_F == 0).sum()),
            "dense_1": int((density_F > 0.01).sum()),
            "dense_10": int((density_F > 0.1).sum()),
        }

    @property
    def density_F(self) -> np.ndarray:
        """Share of tokens on which each feature fires."""
        return self.arrays["fired_F"] / self.arrays["scalars"][0]
