"""Random projections of a site's gradient, P_left G P_right^T, seeded by the site's name.

Dims: L layers, I inputs, O outputs, P projected, M densely sketched.

Entries have variance 1/P (Johnson-Lindenstrauss: E[P^T P] = I), so inner products keep their
expectation; Bergson's older `row_norm` scale gives each projection row unit length instead, which
weighs sites by their shape. A matrix depends on (kind, seed, site name, side) alone: not on the
model, the other sites, or the device.

Target `global` is one P x P sketch of all sites, the sum of their projections: entries of
different sites are independent, so cross terms vanish on average. Its rows are Kronecker products,
and its cost that of the two-sided projection. Bergson's global sketch, of M = `dim`, has dense
rows, which cost M products for every entry of every gradient.
"""

import hashlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import philox
from attribution.rules import Pair
from core.errors import InputError
from core.schema import Site

VERSION = 1
LARGEST_SKETCH = 4e9  # bytes of a dense global sketch
BLOCK = 2**27  # entries of one of its random blocks, in Bergson's layout


class Projection(NamedTuple):
    """dim 0 = unprojected. Hashable, stored with every artefact it shaped. shape: of a feature.

    kind: `bergson-*` are Bergson's own Philox matrices, bit for bit; seed 0 is its unseeded one.
    """

    dim: int = 16
    kind: Literal["rademacher", "normal", "bergson-rademacher", "bergson-normal"] = "rademacher"
    scale: Literal["jl", "row_norm"] = "jl"
    seed: int = 0
    target: Literal["site", "global"] = "site"

    @property
    def bergson(self) -> bool:
        return self.kind.startswith("bergson-")

    @property
    def entries(self) -> Literal["rademacher", "normal"]:
        return "normal" if self.kind.endswith("normal") else "rademacher"

    @property
    def shape(self) -> tuple[int, int]:
        return (1, self.dim) if self.dense else (self.dim, self.dim)

    @property
    def dense(self) -> bool:
        """Whether it is one dense sketch of all sites, as Bergson has it."""
        return self.bergson and self.target == "global"

    def to_json(self) -> dict[str, Any]:
        version = 2 if self.bergson else VERSION
        return {**self._asdict(), "version": version}


def matrix(projection: Projection, name: str, size: int) -> jax.Array:
    """[size, P] for one side of one site, e.g. name `h.0.attn.c_attn/left`."""
    if projection.bergson:
        m_PI = philox.matrix(
            _identifier(projection, name), projection.dim, size, projection.entries
        )
        m_IP = jnp.asarray(m_PI.T)
    else:
        m_IP = _own(projection, name, size)
    if projection.scale == "row_norm":
        return m_IP / jnp.linalg.norm(m_IP, axis=0, keepdims=True)
    return m_IP / np.float32(projection.dim**0.5)


def _own(projection: Projection, name: str, size: int) -> jax.Array:
    digest = hashlib.sha256(f"{VERSION}/{projection.seed}/{name}".encode()).digest()
    words = jnp.array([int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)], jnp.uint32)
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    shape = (size, projection.dim)
    if projection.kind == "normal":
        return jax.random.normal(key, shape, jnp.float32)
    # a float32 half: jax.random.rademacher draws other bits where float64 is enabled
    heads_IP = jax.random.bernoulli(key, jnp.float32(0.5), shape)
    return 2 * heads_IP.astype(jnp.float32) - 1


def _identifier(projection: Projection, name: str) -> str:
    return f"{name}/seed{projection.seed}" if projection.seed else name


def pair(projection: Projection, site: Site, layers: int, bias: bool) -> Pair:
    """Both matrices of a site for all layers: left [L,O,P], right [L,I(+1),P]."""
    names = [site.name.format(l=layer) for layer in range(layers)]
    inputs = site.inputs + (bias and site.bias)
    return Pair(
        jnp.stack([matrix(projection, f"{name}/left", site.outputs) for name in names]),
        jnp.stack([matrix(projection, f"{name}/right", inputs) for name in names]),
    )


def dense(projection: Projection, site: Site, layers: int, bias: bool) -> jax.Array:
    """Bergson's global sketch of a site, [L,M,O,I(+1)]; entries have variance 1/M."""
    m, inputs = projection.dim, site.inputs + (bias and site.bias)
    size = site.outputs * inputs
    if 4 * m * size * layers > LARGEST_SKETCH:
        raise InputError(f"a dense sketch of {site.name} takes {4e-9 * m * size * layers:.0f} GB; "
                         "use --projection rademacher with --projection-target global, or a lower "
                         "--projection-dim")  # fmt: skip
    step = max(1, BLOCK // m)
    out = np.empty((layers, m, size), np.float32)
    for layer in range(layers):
        for start in range(0, size, step):
            name = _identifier(projection, f"{site.name.format(l=layer)}/single")
            width = min(step, size - start)
            part_MI = philox.matrix(f"{name}/{start}", m, width, projection.entries)
            out[layer, :, start : start + width] = part_MI
    return jnp.asarray(out.reshape(layers, m, site.outputs, inputs) / np.float32(m**0.5))
