"""The per-example gradient pass: one backward, no weight gradient, every site at once.

Dims: B examples, T tokens, L layers, P projected, D features of an example.

Differentiating the summed loss with respect to the sinks alone gives every example's gradient
statistic. An example's features are its sites' gradients, flattened row-major and concatenated in
the model's module order (layer by layer).
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import rules
from attribution.projection import VERSION, Projection, pair
from core import families, model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.linear import Rule, Sink

Aux = dict[str, Any]


class Spec(NamedTuple):
    """What is collected. loss: an example's loss is the `sum` or `mean` of its token losses."""

    projection: Projection = Projection()
    include_bias: bool = False
    loss: Literal["sum", "mean"] = "sum"

    def to_json(self) -> dict[str, Any]:
        projection = {**self.projection._asdict(), "version": VERSION}
        return {**self._asdict(), "projection": projection}


class Feature(NamedTuple):
    """Where one site's gradient stands among an example's features."""

    name: str
    offset: int
    shape: tuple[int, int]


def sites(config: ModelConfig) -> list[schema.Site]:
    return schema.sites(families.rows(config))


def features(config: ModelConfig, spec: Spec) -> list[Feature]:
    """The layout of an example's features, in module order."""
    layout, offset, p = [], 0, spec.projection.dim
    for layer in range(config.layers):
        for site in sites(config):
            inputs = site.inputs + (spec.include_bias and site.bias)
            shape = (p, p) if p else (site.outputs, inputs)
            layout.append(Feature(site.name.format(l=layer), offset, shape))
            offset += shape[0] * shape[1]
    return layout


def width(config: ModelConfig, spec: Spec) -> int:
    """D, the number of features of an example."""
    last = features(config, spec)[-1]
    return last.offset + last.shape[0] * last.shape[1]


def coverage(config: ModelConfig) -> dict[str, float]:
    """Share of the parameters, and of a token's matmul FLOPs, that the sites stand for."""
    covered = config.layers * sum(s.inputs * s.outputs for s in sites(config))
    rows = families.rows(config)
    total = sum(size_of(schema.full_shape(row, config.layers)) for row in rows)
    return {
        "parameters": covered / total,
        "matmul_flops": covered / (covered + config.vocab_size * config.width),
    }


def size_of(shape: tuple[int, ...]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def projections(config: ModelConfig, spec: Spec) -> Aux:
    """The projection matrices of every site by path; empty when unprojected."""
    if spec.projection.dim < 0:
        raise InputError(f"--projection-dim must not be negative, got {spec.projection.dim}")
    if spec.projection.dim == 0:
        return {}
    return {
        site.path: pair(spec.projection, site, config.layers, spec.include_bias)
        for site in sites(config)
    }


def _sinks(config: ModelConfig, rule: Rule, aux: Aux, outs: Aux) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for site in sites(config):
        schema.put(tree, f"{site.path}/weight", Sink(rule, aux.get(site.path), outs[site.path]))
    return tree


def catch(
    config: ModelConfig,
    execution: Execution,
    params: schema.Params,
    rule: Rule,
    aux: Aux,
    outs: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    weights_BT: jax.Array,
) -> tuple[Aux, jax.Array]:
    """Run one backward pass into sinks: (statistics by site path, token losses [B,T]).

    outs: zeros in the shape of each site's statistic, with a leading layer axis.
    """

    def loss(outs: Aux) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "sinks": _sinks(config, rule, aux, outs)}
        return model.weighted_loss(config, execution, variables, ids_BT, labels_BT, weights_BT)

    return jax.grad(loss, has_aux=True)(outs)


def example_weights(labels_BT: jax.Array, loss: str, dtype: Any = jnp.float32) -> jax.Array:
    """The weight of each token in its example's loss, [B,T]."""
    mask_BT = (labels_BT != model.loss.IGNORED).at[:, 0].set(False).astype(dtype)
    if loss == "mean":
        mask_BT = mask_BT / jnp.maximum(mask_BT.sum(1, keepdims=True), 1)
    return mask_BT


@functools.partial(jax.jit, static_argnames=("config", "execution", "spec"))
def example_gradients(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    params: schema.Params,
    aux: Aux,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(features float32 [B,D], summed token loss float32 [B]) of every example of a batch.

    aux: from `projections`. A padding row (all labels -100) has zero features.
    """
    b, layers = ids_BT.shape[0], config.layers
    wide = np.promote_types(params["embed"]["wte"].dtype, jnp.float32)
    rule = rules.Project() if spec.projection.dim else rules.Full(spec.include_bias)
    layout = zip(sites(config), features(config, spec), strict=False)  # the first layer's share
    outs = {site.path: jnp.zeros((layers, b, *f.shape), wide) for site, f in layout}
    weights_BT = example_weights(labels_BT, spec.loss, wide)
    with jax.default_matmul_precision("highest"):  # no TF32: neighbours differ in the third digit
        caught, nll_BT = catch(
            config, execution, params, rule, aux, outs, ids_BT, labels_BT, weights_BT
        )
    parts = [caught[s.path].reshape(layers, b, -1).swapaxes(0, 1) for s in sites(config)]
    return jnp.concatenate(parts, axis=-1).reshape(b, -1), nll_BT.sum(1)
