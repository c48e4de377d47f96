"""The per-example gradient pass: one backward, no weight gradient, every site at once.

Dims: B examples, T tokens, L layers, P projected, D features of an example.

Differentiating the summed loss with respect to the sinks alone gives every example's gradient
statistic. An example's features are its sites' gradients, flattened row-major and concatenated in
the model's module order (layer by layer). The sites are the linear maps of the blocks, or the two
factors of each map that has an adapter.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import rules
from attribution.projection import VERSION, Projection, pair
from core import adapter as adapters
from core import families, model, schema
from core.adapter import LoraSpec
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import jsonable
from core.linear import Rule, Sink

Aux = dict[str, Any]


class Spec(NamedTuple):
    """What is collected. loss: an example's loss is the `sum` or `mean` of its token losses.

    adapter: collect the gradients of an adapter's factors instead of the weights'.
    """

    projection: Projection = Projection()
    include_bias: bool = False
    loss: Literal["sum", "mean"] = "sum"
    adapter: LoraSpec | None = None

    def to_json(self) -> dict[str, Any]:
        projection = {**self.projection._asdict(), "version": VERSION}
        lora = self.adapter and jsonable(dataclasses.asdict(self.adapter))
        return {**self._asdict(), "projection": projection, "adapter": lora}


class Feature(NamedTuple):
    """Where one site's gradient stands among an example's features."""

    name: str
    offset: int
    shape: tuple[int, int]


class Target(NamedTuple):
    """A matrix whose gradient is caught: its place in the `sinks` collection, its name and size."""

    sink: str
    site: schema.Site
    layers: tuple[bool, ...]


def sites(config: ModelConfig) -> list[schema.Site]:
    return schema.sites(families.rows(config))


def targets(config: ModelConfig, spec: Spec) -> list[Target]:
    """What is collected, in module order; a factor is named as PEFT names it, and has no bias."""
    if spec.adapter is None:
        every = (True,) * config.layers
        return [Target(f"{site.path}/weight", site, every) for site in sites(config)]
    found = []
    for site, layers in adapters.hits(spec.adapter, config):
        sizes = {"a": (site.inputs, spec.adapter.rank), "b": (spec.adapter.rank, site.outputs)}
        for factor, (inputs, outputs) in sizes.items():
            name = f"{site.name}.lora_{factor.upper()}"
            matrix = schema.Site(f"{site.path}/{factor}", name, inputs, outputs, bias=False)
            found.append(Target(f"{site.path}/lora_{factor}", matrix, layers))
    return found


def features(config: ModelConfig, spec: Spec) -> list[Feature]:
    """The layout of an example's features, in module order."""
    layout, offset = [], 0
    for layer in range(config.layers):
        for target in targets(config, spec):
            if target.layers[layer]:
                shape = _shape(spec, target.site)
                layout.append(Feature(target.site.name.format(l=layer), offset, shape))
                offset += shape[0] * shape[1]
    return layout


def _shape(spec: Spec, site: schema.Site) -> tuple[int, int]:
    p = spec.projection.dim
    return (p, p) if p else (site.outputs, site.inputs + (spec.include_bias and site.bias))


def width(config: ModelConfig, spec: Spec) -> int:
    """D, the number of features of an example."""
    last = features(config, spec)[-1]
    return last.offset + last.shape[0] * last.shape[1]


def coverage(config: ModelConfig, spec: Spec) -> dict[str, float]:
    """Share of the parameters, and of a token's matmul FLOPs, that the sites stand for."""
    covered = sum(sum(t.layers) * t.site.inputs * t.site.outputs for t in targets(config, spec))
    rows = families.rows(config)
    total = sum(size_of(schema.full_shape(row, config.layers)) for row in rows)
    matmul = config.layers * sum(s.inputs * s.outputs for s in sites(config))
    matmul += config.vocab_size * config.width
    added = covered if spec.adapter else 0
    return {
        "parameters": covered / (total + added),
        "matmul_flops": covered / (matmul + added),
    }


def size_of(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def projections(config: ModelConfig, spec: Spec) -> Aux:
    """The projection matrices of every site by its sink; empty when unprojected."""
    if spec.projection.dim < 0:
        raise InputError(f"--projection-dim must not be negative, got {spec.projection.dim}")
    if spec.projection.dim == 0:
        return {}
    return {
        target.sink: pair(spec.projection, target.site, config.layers, spec.include_bias)
        for target in targets(config, spec)
    }


def catch(
    config: ModelConfig,
    execution: Execution,
    variables: model.Variables,
    rule: Rule,
    aux: Aux,
    outs: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Aux, jax.Array]:
    """Run one backward pass into sinks: (statistics by sink, token losses [B,T]).

    outs: zeros in the shape of each sink's statistic, with a leading layer axis; aux: likewise, or
    nothing for a rule that needs none.
    """

    def loss(outs: Aux) -> tuple[jax.Array, jax.Array]:
        sinks: Aux = {}
        for place, out in outs.items():
            schema.put(sinks, place, Sink(rule, aux.get(place), out))
        caught = {**variables, "sinks": sinks}
        return model.weighted_loss(config, execution, caught, ids_BT, labels_BT, weights_BT)

    return jax.grad(loss, has_aux=True)(outs)


def example_weights(labels_BT: jax.Array, loss: str, dtype: Any = jnp.float32) -> jax.Array:
    """The weight of each token in its example's loss, [B,T]."""
    mask_BT = (labels_BT != model.loss.IGNORED).at[:, 0].set(False).astype(dtype)
    if loss == "mean":
        mask_BT = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return mask_BT


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
@model.full_precision
def example_gradients(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    aux: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(features float32 [B,D], summed token loss float32 [B]) of every example of a batch.

    aux: from `projections`. A padding row (all labels -100) has zero features.
    """
    b, layers, found = ids_BT.shape[0], config.layers, targets(config, spec)
    wide = np.promote_types(variables["params"]["embed"]["wte"].dtype, jnp.float32)
    bias = spec.include_bias and any(t.site.bias for t in found)  # all of a family's sites, or none
    rule = rules.Project() if spec.projection.dim else rules.Full(bias)
    outs = {t.sink: jnp.zeros((layers, b, *_shape(spec, t.site)), wide) for t in found}
    weights_BT = example_weights(labels_BT, spec.loss, wide)
    caught, nll_BT = catch(
        config, execution, variables, rule, aux, outs, ids_BT, labels_BT, weights_BT
    )
    parts = [caught[t.sink].reshape(layers, b, -1).swapaxes(0, 1) for t in found]
    features_BD = jnp.concatenate(parts, axis=-1).reshape(b, -1)
    if not all(all(t.layers) for t in found):  # some layers have no adapter
        hit = [t.layers[layer] for layer in range(layers) for t in found]
        sizes = [size_of(_shape(spec, t.site)) for t in found]
        features_BD = features_BD[:, np.flatnonzero(np.repeat(hit, sizes * layers))]
    return features_BD, nll_BT.sum(1)
