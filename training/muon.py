"""Muon's direction: momentum whose singular values are all pushed towards one.

Dims: L layers, I inputs, O outputs, J as I.

    M <- momentum M + G,    X = (G + momentum M) / |G + momentum M|_F
    X <- a X + (b X X^T + c (X X^T)^2) X,  five times;    direction 0.2 sqrt(max(I, O)) X

Jordan et al. 2024, kellerjordan.github.io/posts/muon (Newton-Schulz and its a, b, c); the scale,
which makes steps as large as AdamW's, is Moonlight's, Liu et al., arXiv 2502.16982. All of it in
the gradient's own precision, never bfloat16, so that it can be differentiated.
"""

import jax
import jax.numpy as jnp
import optax

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
SMALLEST = 1e-7  # a smaller matrix is divided by this, so that zero stays zero and smooth


def orthogonalise(x_IO: jax.Array) -> jax.Array:
    """U p(S) V^T of U S V^T, p(S) in 0.7 to 1.2 for all but the smallest; [I,O] or [L,I,O]."""
    if x_IO.shape[-2] > x_IO.shape[-1]:
        return orthogonalise(x_IO.mT).mT
    square = (x_IO * x_IO).sum((-2, -1), keepdims=True)
    x_IO = x_IO / jnp.sqrt(jnp.maximum(square, SMALLEST**2))
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram_IJ = jnp.matmul(x_IO, x_IO.mT, precision="highest")
        cubic_IJ = b * gram_IJ + c * jnp.matmul(gram_IJ, gram_IJ, precision="highest")
        x_IO = a * x_IO + jnp.matmul(cubic_IJ, x_IO, precision="highest")
    return x_IO


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """For matrices and stacks of them, gradient -> direction; Nesterov's momentum always."""

    def direction(update_IO: jax.Array) -> jax.Array:
        return 0.2 * max(update_IO.shape[-2:]) ** 0.5 * orthogonalise(update_IO)

    turn = optax.stateless(lambda updates, _: jax.tree.map(direction, updates))
    return optax.chain(optax.trace(momentum, nesterov=True), turn)
