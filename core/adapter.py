"""LoRA adapters: which sites have one, its factors, and what they add to the model.

Dims: L layers, I inputs, O outputs, R rank.

    y = x W + scale (x A) B,    scale = alpha / R   (rank-stabilised: alpha / sqrt R)

Hu et al., arXiv 2106.09685; rsLoRA arXiv 2312.03732. `core.linear.Linear` computes it from the
`lora` collection. Factors are stacked by layer like the weights they belong to; where a layer is
no target they are zero, with scale zero, which training leaves so, and no file holds them. Each
factor is a `schema.Row`, so its name in a file, its sharding and its decay follow as usual.
"""

import dataclasses
import hashlib
import re
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families
from core.config import ModelConfig
from core.errors import InputError
from core.schema import Params, Row, Site, get, put, sites

ALL_LINEAR = "all-linear"
PREFIX = "base_model.model."  # of every name in a PEFT file


@dataclasses.dataclass(frozen=True)
class LoraSpec:
    """What an adapter is, as PEFT spells it.

    targets: a tuple of module names, each exact or what follows a dot (`c_proj`, `attn.c_proj`);
        or a regular expression for the whole name (`transformer.h.0.attn.c_attn`); or `all-linear`.
    layers: among what a tuple names by its end, only these layers; None = all.
    dropout: rate on the adapter's input while training. rslora: scale alpha / sqrt(rank).
    """

    rank: int
    alpha: float
    targets: str | tuple[str, ...]
    dropout: float = 0.0
    rslora: bool = False
    layers: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Hit(NamedTuple):
    """A site with an adapter, and for each layer whether it has one there."""

    site: Site
    layers: tuple[bool, ...]


class Adapter(NamedTuple):
    """An adapter in memory.

    factors: {"blocks": {site: {"a": [L,I,R], "b": [L,R,O]}}}, float32.
    base: fingerprint of the model it belongs to, None where its folder does not say.
    model: where that model is, or its name on a hub.
    """

    spec: LoraSpec
    factors: Params
    base: str | None = None
    model: str | None = None


def module_name(config: ModelConfig, site: Site) -> str:
    """The site's name in a Hugging Face model; `{l}` stands for the layer."""
    return families.of(config).PREFIX + site.name


def attention_targets(config: ModelConfig) -> tuple[str, ...]:
    """The attention projections of a family, by the ends of their names: the usual targets."""
    pattern, every = families.of(config).ATTENTION, sites(families.rows(config))
    names = [site.name for site in every if re.fullmatch(pattern, site.name.format(l=0))]
    return tuple(name.split("{l}.")[1] for name in names)


def parse_targets(text: str) -> str | tuple[str, ...]:
    """`q_proj,v_proj` as names; what holds more than word characters and dots, as it is."""
    plain = text != ALL_LINEAR and re.fullmatch(r"[\w.,]+", text)
    return tuple(name for name in text.split(",") if name) if plain else text


def hits(spec: LoraSpec, config: ModelConfig) -> list[Hit]:
    """The sites that get an adapter, in schema order; InputError when there is none."""
    every = sites(families.rows(config))
    found = []
    for site in every:
        name = module_name(config, site)
        layers = tuple(_is_hit(spec, name.format(l=i), i) for i in range(config.layers))
        found += [Hit(site, layers)] if any(layers) else []
    if not found:
        names = ", ".join(module_name(config, site).format(l="*") for site in every)
        raise InputError(
            f"the adapter's targets {spec.targets!r} name no linear map of this "
            f"{config.layers}-layer {config.family} model; it has {names}"
        )
    return found


def _is_hit(spec: LoraSpec, name: str, layer: int) -> bool:
    if isinstance(spec.targets, str):
        try:
            return spec.targets == ALL_LINEAR or bool(re.fullmatch(spec.targets, name))
        except re.error as error:
            raise InputError(
                f"the adapter's targets {spec.targets!r} are no regular expression ({error})"
            ) from error
    if name in spec.targets:
        return True
    return (spec.layers is None or layer in spec.layers) and any(
        name.endswith(f".{target}") for target in spec.targets
    )


def rows(spec: LoraSpec, config: ModelConfig) -> list[Row]:
    """One row per factor; `hf` is its name in a PEFT file, which holds it transposed."""
    axes = {row.path: row.axes for row in families.rows(config)}
    found = []
    for site, _ in hits(spec, config):
        inputs, outputs = axes[f"{site.path}/w"]
        name = PREFIX + module_name(config, site)
        found += [
            Row(f"{site.path}/a", (site.inputs, spec.rank), (inputs, None),
                f"{name}.lora_A.weight", transpose=True),
            Row(f"{site.path}/b", (spec.rank, site.outputs), (None, outputs),
                f"{name}.lora_B.weight", transpose=True, init="zeros"),
        ]  # fmt: skip
    return found


def size(spec: LoraSpec, config: ModelConfig) -> int:
    """The number of parameters; layers without an adapter do not count."""
    found = hits(spec, config)
    return sum(spec.rank * (s.inputs + s.outputs) * sum(layers) for s, layers in found)


def init(spec: LoraSpec, config: ModelConfig, seed: int) -> Params:
    """Factors to train from: A uniform in +-1/sqrt(I), as PEFT draws it, B zero.

    Each matrix draws from its own stream, named by its module, whatever else is a target. Names of
    targets that name nothing raise, where a foreign adapter may carry some.
    """
    for target in spec.targets if isinstance(spec.targets, tuple) else ():
        hits(dataclasses.replace(spec, targets=(target,)), config)
    root, factors = jax.random.key(seed), {}

    def draw(name: str, shape_IR: tuple[int, int]) -> jax.Array:
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        return jax.random.uniform(key, shape_IR, jnp.float32, -1, 1) * shape_IR[0] ** -0.5

    for site, layers in hits(spec, config):
        name, shape_IR = f"{module_name(config, site)}.lora_A", (site.inputs, spec.rank)
        a_LIR = [
            draw(name.format(l=layer), shape_IR) if hit else jnp.zeros(shape_IR, jnp.float32)
            for layer, hit in enumerate(layers)
        ]
        put(factors, f"{site.path}/a", jnp.stack(a_LIR))
        b_LRO = jnp.zeros((config.layers, spec.rank, site.outputs), jnp.float32)
        put(factors, f"{site.path}/b", b_LRO)
    return factors


def collection(spec: LoraSpec, config: ModelConfig, factors: Params) -> Params:
    """The `lora` collection: each site's a, b, scale [L] and, where there is dropout, its rate."""
    tree: Params = {}
    for site, layers in hits(spec, config):
        leaves = get(factors, site.path)
        leaves = {**leaves, "scale": spec.scale * np.array(layers, leaves["a"].dtype)}
        if spec.dropout:
            leaves["dropout"] = np.full(config.layers, spec.dropout, np.float32)
        put(tree, site.path, {name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    return tree


def merge(config: ModelConfig, params: Params, adapter: Adapter) -> Params:
    """The parameters of a plain model that computes the same: W + scale A B, on the host."""
    merged: Params = jax.tree.map(lambda x: x, params)  # new dicts, the same arrays
    for site, layers in hits(adapter.spec, config):
        w_LIO = np.array(get(params, f"{site.path}/w"), np.float32)
        a_LIR, b_LRO = (np.asarray(get(adapter.factors, f"{site.path}/{name}")) for name in "ab")
        for layer in np.flatnonzero(layers):
            w_LIO[layer] += np.float32(adapter.spec.scale) * (a_LIR[layer] @ b_LRO[layer])
        put(merged, f"{site.path}/w", w_LIO)
    return merged


def fingerprint(config: ModelConfig, adapter: Adapter) -> str:
    """A hash of the base model's fingerprint and of everything that the adapter adds to it."""
    digest = hashlib.sha256(str(adapter.base).encode())
    for site, layers in hits(adapter.spec, config):
        digest.update(f"{site.path} {layers} {adapter.spec.scale!r}".encode())
        for name in "ab":
            factor = np.asarray(get(adapter.factors, f"{site.path}/{name}"))
            digest.update(np.ascontiguousarray(factor).data)
    return digest.hexdigest()


def slots(spec: LoraSpec, config: ModelConfig) -> dict[str, tuple[Row, int]]:
    """Every tensor of a PEFT file by name, with its row and layer."""
    layers = [hit.layers for hit in hits(spec, config) for _ in "ab"]
    return {
        row.hf.format(l=layer): (row, layer)
        for row, hit in zip(rows(spec, config), layers, strict=True)
        for layer in range(config.layers)
        if hit[layer]
    }
