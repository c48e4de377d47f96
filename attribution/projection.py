"""Random projections of a site's gradient, P_left G P_right^T, seeded by the site's name.

Dims: L layers, I inputs, O outputs, P projected.

Entries have variance 1/P (Johnson-Lindenstrauss: E[P^T P] = I), so inner products keep their
expectation; Bergson's older `row_norm` scale gives each projection row unit length instead, which
weighs sites by their shape. A matrix depends on (seed, site name, side) alone: not on the model,
the other sites, or the device.
"""

import hashlib
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from attribution.rules import Pair
from core.schema import Site

VERSION = 1


class Projection(NamedTuple):
    """dim 0 = unprojected. Hashable, stored with every artefact it shaped."""

    dim: int = 16
    kind: Literal["rademacher", "normal"] = "rademacher"
    scale: Literal["jl", "row_norm"] = "jl"
    seed: int = 0


def matrix(projection: Projection, name: str, size: int) -> jax.Array:
    """[size, P] for one side of one site, e.g. name `h.0.attn.c_attn/left`."""
    digest = hashlib.sha256(f"{VERSION}/{projection.seed}/{name}".encode()).digest()
    words = jnp.array([int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)], jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    shape = (size, projection.dim)
    if projection.kind == "normal":
        m_IP = jax.random.normal(key, shape, jnp.float32)
    else:  # a float32 half: jax.random.rademacher draws other bits where float64 is enabled
        heads_IP = jax.random.bernoulli(key, jnp.float32(0.5), shape)
        m_IP = 2 * heads_IP.astype(jnp.float32) - 1
    if projection.scale == "row_norm":
        return m_IP / jnp.linalg.norm(m_IP, axis=0, keepdims=True)
    return m_IP / projection.dim**0.5


def pair(projection: Projection, site: Site, layers: int, bias: bool) -> Pair:
    """Both matrices of a site for all layers: left [L,O,P], right [L,I(+1),P]."""
    names = [site.name.format(l=layer) for layer in range(layers)]
    inputs = site.inputs + (bias and site.bias)
    return Pair(
        jnp.stack([matrix(projection, f"{name}/left", site.outputs) for name in names]),
        jnp.stack([matrix(projection, f"{name}/right", inputs) for name in names]),
    )
