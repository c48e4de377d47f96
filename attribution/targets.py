"""What is collected of an example's gradient: which matrices, and where each one's entries stand.

Dims: B examples, L layers, I inputs, O outputs, P projected, D features of an example.

The matrices are the linear maps of the blocks, or the two factors of each map that has an adapter;
by name also the embedding and the output matrix. A gradient is kept in one of two forms: as a
tree by sink, stacked over layers as the sinks emit it, or as flat features: row-major and in the
model's module order, embedding, layer by layer, output matrix, under Hugging Face's names.
"""

import dataclasses
import functools
import json
import operator
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution.projection import Projection
from core import adapter as adapters
from core import families, schema
from core.adapter import LoraSpec
from core.config import ModelConfig
from core.errors import InputError
from core.files import dumps, jsonable
from core.loss import NLL, Objective

Tree = dict[str, Any]  # by Target.sink: [L,B,O,I(+1)], L = 1 for embedding and output matrix


class Spec(NamedTuple):
    """What is collected, of which loss, and how it is put.

    loss: an example's loss is the `sum` or `mean` of its token losses, each one an `objective`.
    adapter: collect the gradients of an adapter's factors instead of the weights'.
    modules: globs of the names to collect; () = the linear maps of the blocks. With a glob, the
        embedding (a tied one with both its uses) and the output matrix are among the names.
    exclude: globs of names to leave out. heads: split the attention's outputs by head.
    normalizer: kind and hash of the second moments that gradients are divided by.
    """

    projection: Projection = Projection()
    include_bias: bool = False
    loss: Literal["sum", "mean"] = "sum"
    adapter: LoraSpec | None = None
    objective: Objective = NLL
    modules: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    heads: bool = False
    normalizer: tuple[Literal["adam", "adafactor"], str] | None = None

    def to_json(self) -> dict[str, Any]:
        lora = self.adapter and jsonable(dataclasses.asdict(self.adapter))
        found = {**self._asdict(), "projection": self.projection.to_json(), "adapter": lora}
        return json.loads(dumps(found | {"objective": self.objective._asdict()}))

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> "Spec":
        """The spec that `to_json` wrote, of this version's matrices."""

        def several(value: Any) -> Any:
            return tuple(value) if isinstance(value, list) else value

        try:
            of = dict(fields["projection"])
            version = of.pop("version")
            lora = fields["adapter"]
            spec = cls(**{
                **{name: several(value) for name, value in fields.items()},
                "projection": Projection(**of),
                "objective": Objective(**fields["objective"]),
                "adapter": lora and LoraSpec(**{n: several(v) for n, v in lora.items()}),
            })  # fmt: skip
        except (KeyError, TypeError) as error:
            raise InputError(f"{where}: its spec cannot be read ({error}); make it again") from None
        if version != spec.projection.to_json()["version"]:
            raise InputError(f"{where} has random projections of version {version}; make it again")
        return spec


class Feature(NamedTuple):
    """Where one site's gradient stands among an example's features."""

    name: str
    offset: int
    shape: tuple[int, int]


class Target(NamedTuple):
    """A matrix whose gradient is caught: its place in the `sinks` collection, its name and size.

    layers: of those that the matrix is stacked over, the ones that are collected. rows: the outputs
    of each head, where they are split.
    """

    sink: str
    site: schema.Site
    layers: tuple[bool, ...]
    rows: tuple[tuple[int, ...], ...] = ()

    @property
    def stacked(self) -> bool:
        return self.sink.startswith("blocks/")

    @property
    def head_names(self) -> list[str]:
        return [f"{self.site.name}.head_{i}" for i in range(len(self.rows))]

    def names(self, layer: int) -> list[str]:
        return [name.format(l=layer) for name in self.head_names or [self.site.name]]


EMBEDDING, HEAD = "embed/wte", "head"


def sites(config: ModelConfig) -> list[schema.Site]:
    return schema.sites(families.rows(config))


def targets(config: ModelConfig, spec: Spec) -> list[Target]:
    """What is collected, in module order; a factor is named as PEFT names it, and has no bias."""
    found, names = [], []
    for target in _every(config, spec):
        layers = []
        for layer in range(len(target.layers)):
            name = target.site.name.format(l=layer)
            names.append(name)
            wanted = not spec.modules or any(fnmatchcase(name, glob) for glob in spec.modules)
            left_out = any(fnmatchcase(name, glob) for glob in spec.exclude)
            layers.append(target.layers[layer] and wanted and not left_out)
        found += [target._replace(layers=tuple(layers))] if any(layers) else []
    if not found:
        asked = [f"--modules {glob}" for glob in spec.modules]
        asked += [f"--exclude {glob}" for glob in spec.exclude]
        raise InputError(f"{' '.join(asked)} leaves no module of {', '.join(names)}; change it")
    return found


def _every(config: ModelConfig, spec: Spec) -> list[Target]:
    every = (True,) * config.layers
    if spec.adapter is None:
        rows = families.of(config).heads(config) if spec.heads else {}
        blocks = [Target(f"{s.path}/weight", s, every, rows.get(s.path, ())) for s in sites(config)]
        if not spec.modules:
            return blocks
        ends = {row.path: _table(config, row) for row in families.rows(config)}
        last = [] if config.tied else [ends[HEAD]]
        return [ends[EMBEDDING], *blocks, *last]
    if spec.heads:
        raise InputError("an adapter's factors have no heads to split; leave --heads out")
    found = []
    for site, layers in adapters.hits(spec.adapter, config):
        sizes = {"a": (site.inputs, spec.adapter.rank), "b": (spec.adapter.rank, site.outputs)}
        for factor, (inputs, outputs) in sizes.items():
            name = f"{site.name}.lora_{factor.upper()}"
            matrix = schema.Site(f"{site.path}/{factor}", name, inputs, outputs, bias=False)
            found.append(Target(f"{site.path}/lora_{factor}", matrix, layers))
    return found


def _table(config: ModelConfig, row: schema.Row) -> Target:
    """The embedding or the output matrix, as a site of [vocabulary, width]."""
    name = row.hf.removeprefix(families.of(config).PREFIX).removesuffix(".weight")
    site = schema.Site(row.path, name, config.width, config.vocab_size, bias=False)
    return Target(row.path, site, (True,))


def features(config: ModelConfig, spec: Spec) -> list[Feature]:
    """The layout of an example's features, in module order; one feature for a global sketch."""
    if spec.projection.target == "global":
        return [Feature("global", 0, spec.projection.shape)]
    layout, offset = [], 0
    for target, layer in order(config, targets(config, spec)):
        for name in target.names(layer):
            shape = shape_of(spec, target)
            layout.append(Feature(name, offset, shape))
            offset += shape[0] * shape[1]
    return layout


def order(config: ModelConfig, found: list[Target]) -> Iterator[tuple[Target, int]]:
    """(target, layer) of all that is collected: embedding, layer by layer, output matrix."""
    before = [(t, 0) for t in found if t.sink == EMBEDDING]
    after = [(t, 0) for t in found if t.sink == HEAD]
    blocks = [(t, i) for i in range(config.layers) for t in found if t.stacked and t.layers[i]]
    return iter([*before, *blocks, *after])


def shape_of(spec: Spec, target: Target) -> tuple[int, int]:
    """Of one feature: a site's, or each of its heads'."""
    p, site = spec.projection.dim, target.site
    if p:
        return (p, p)
    outputs = len(target.rows[0]) if target.rows else site.outputs
    return outputs, site.inputs + (spec.include_bias and site.bias)


def width(config: ModelConfig, spec: Spec) -> int:
    """D, the number of features of an example."""
    last = features(config, spec)[-1]
    return last.offset + last.shape[0] * last.shape[1]


def flatten(config: ModelConfig, spec: Spec, tree: Tree) -> jax.Array:
    """Gradients by sink, [L,B,...] each, as features [B,D] in module order."""
    found = targets(config, spec)
    if spec.projection.target == "global":
        parts = [tree[t.sink][np.array(t.layers)].sum(0) for t in found]
        return functools.reduce(operator.add, parts).reshape(parts[0].shape[0], -1)
    b = next(iter(tree.values())).shape[1]
    blocks = [t for t in found if t.stacked]
    parts = [_by_rows(t, tree[t.sink]) for t in blocks if not spec.projection.dim]
    parts = parts or [tree[t.sink] for t in blocks]
    flat = [part.reshape(config.layers, b, -1).swapaxes(0, 1) for part in parts]
    features_BD = jnp.concatenate(flat, axis=-1).reshape(b, -1) if flat else jnp.zeros((b, 0))
    if not all(all(t.layers) for t in blocks):
        hit = [t.layers[layer] for layer in range(config.layers) for t in blocks]
        sizes = [part.shape[-1] for part in flat] * config.layers
        features_BD = features_BD[:, np.flatnonzero(np.repeat(hit, sizes))]
    ends = {t.sink: tree[t.sink].reshape(b, -1) for t in found if not t.stacked}
    first, last = ([ends[name]] if name in ends else [] for name in (EMBEDDING, HEAD))
    whole = [*first, features_BD, *last]
    return jnp.concatenate([part.astype(features_BD.dtype) for part in whole], axis=-1)


def unflatten(config: ModelConfig, spec: Spec, features_BD: jax.Array) -> Tree:
    """Unprojected features [B,D] as gradients by sink, [L,B,O,I(+1)]; 0 where not collected."""
    assert spec.projection.dim == 0
    found, b = targets(config, spec), features_BD.shape[0]
    tree: Tree = {}
    offset = 0
    for target, layer in order(config, found):
        heads, (o, i) = max(len(target.rows), 1), shape_of(spec, target)
        part_BOI = features_BD[:, offset : offset + heads * o * i].reshape(b, heads * o, i)
        offset += heads * o * i
        if target.rows:
            part_BOI = part_BOI[:, np.argsort(np.concatenate(target.rows))]
        parts = tree.setdefault(target.sink, [jnp.zeros_like(part_BOI)] * len(target.layers))
        parts[layer] = part_BOI
    return {sink: jnp.stack(parts) for sink, parts in tree.items()}


def _by_rows(target: Target, g_LBOI: jax.Array) -> jax.Array:
    return g_LBOI[:, :, np.concatenate(target.rows)] if target.rows else g_LBOI


def coverage(config: ModelConfig, spec: Spec) -> dict[str, float]:
    """Share of the parameters, and of a token's matmul FLOPs, that the sites stand for."""
    found = targets(config, spec)
    sizes = {t.sink: sum(t.layers) * t.site.inputs * t.site.outputs for t in found}
    total = sum(size_of(schema.full_shape(row, config.layers)) for row in families.rows(config))
    matmul = config.layers * sum(s.inputs * s.outputs for s in sites(config))
    matmul += config.vocab_size * config.width
    covered = sum(sizes.values())
    multiplied = covered if config.tied else covered - sizes.get(EMBEDDING, 0)
    added = covered if spec.adapter else 0
    return {
        "parameters": covered / (total + added),
        "matmul_flops": multiplied / (matmul + added),
    }


def size_of(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)
