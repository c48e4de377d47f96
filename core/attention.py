"""Causal attention as explicit batched matmuls.

Dims: B batch, T query tokens, S key tokens, H heads, K head width. Plain XLA operations only, so
every derivative of every order exists (fused kernels have no second one).
"""

import jax
import jax.numpy as jnp
import numpy as np

MASKED = -1e30


def causal_attention(
    q_BTHK: jax.Array, k_BSHK: jax.Array, v_BSHK: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale q k^T + causal mask) v, softmax in float32 -> [B,T,H,K]."""
    wide = np.promote_types(q_BTHK.dtype, jnp.float32)
    # Head-major copies make each product one plain batched matmul; XLA's CPU backward pass of the
    # einsum over interleaved heads costs about twice as much.
    q_BHTK, k_BHSK, v_BHSK = (jnp.swapaxes(a, 1, 2) for a in (q_BTHK, k_BSHK, v_BSHK))
    s_BHTS = jnp.matmul(q_BHTK * scale, jnp.swapaxes(k_BHSK, 2, 3), preferred_element_type=wide)
    tokens = jnp.arange(q_BTHK.shape[1])
    visible_TS = tokens[:, None] >= tokens[None, :]
    p_BHTS = jax.nn.softmax(jnp.where(visible_TS[None, None], s_BHTS, MASKED), axis=-1)
    return jnp.swapaxes(jnp.matmul(p_BHTS.astype(v_BHSK.dtype), v_BHSK), 1, 2)
