"""What Kronecker-factored curvature needs of a batch: sums of every site in one backward pass.

Dims: B examples, T tokens, L layers, I inputs (+1 with the bias), O outputs, N any.

With x_t, g_t a site's inputs and output gradients, G_n = sum_t g_t x_t^T of document n:

    kfac     A = sum x x^T                 S = sum g g^T
    tkfac    A = sum_n tr(S_n) A_n         S = sum_n tr(A_n) S_n
    shampoo  A = sum_n G_n^T G_n           S = sum_n G_n G_n^T

over the positions that predict a token, whether it is supervised or not; and for given eigenvectors
the corrected eigenvalues of EK-FAC (arXiv 1806.03884), sum_n (Q_G^T G_n Q_A)^2. All are sums over
documents, never over batches, so batching changes nothing (TKFAC and Shampoo are also defined over
batches elsewhere, which is not the same).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution.curvature import fisher
from attribution.gradients import example_weights
from attribution.rules import Full
from attribution.targets import Spec, Target, Tree, targets
from core import model, schema
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.linear import Rule, Sink
from core.loss import NLL

PANEL = 256  # columns of a symmetric product made at once
LARGEST = 2**26  # numbers in the gradients of the examples held at once


class Moments(NamedTuple):
    """What belongs to the A and to the S of a site.

    As a sum over positions, only the upper triangle is right (see `gram`).
    """

    inputs_II: jax.Array
    outputs_OO: jax.Array


SIDES = Moments._fields


def gram(x_NI: jax.Array) -> jax.Array:
    """The upper triangle of x^T x, a panel of rows at a time: little over half of the products."""
    n = x_NI.shape[1]
    wide = np.promote_types(x_NI.dtype, jnp.float32)
    panels = [
        jnp.pad(
            jnp.matmul(x_NI[:, s : s + PANEL].T, x_NI[:, s:], preferred_element_type=wide),
            ((0, 0), (s, 0)),
        )
        for s in range(0, n, PANEL)
    ]
    return jnp.concatenate(panels)


def _flat(x_BTI: jax.Array) -> jax.Array:
    return x_BTI.reshape(-1, x_BTI.shape[-1])


def _scaled_gram(x_BTI: jax.Array, scale_BT: jax.Array, bias: bool) -> jax.Array:
    """sum of scale^2 x x^T, x extended by a one with the bias."""
    scale_BT = scale_BT.astype(x_BTI.dtype)
    x_NI = _flat(x_BTI * scale_BT[..., None])
    gram_II = gram(x_NI)
    if not bias:
        return gram_II
    scale_N = scale_BT.reshape(-1)
    wide = gram_II.dtype
    column_I = jnp.matmul(scale_N[None], x_NI, preferred_element_type=wide)[0]
    corner = jnp.square(scale_N.astype(wide)).sum()
    gram_II = jnp.pad(gram_II, ((0, 1), (0, 1)))
    return gram_II.at[:-1, -1].set(column_I).at[-1, -1].set(corner)


@dataclasses.dataclass(frozen=True)
class Kfac:
    """A in the forward pass already, so that no x is kept for it."""

    bias: bool

    def save(self, x_BTI: jax.Array, aux: jax.Array) -> jax.Array:
        return _scaled_gram(x_BTI, aux, self.bias)

    def emit(self, saved: jax.Array, aux: jax.Array, g_BTO: jax.Array) -> Moments:
        del aux
        return Moments(saved, gram(_flat(g_BTO)))


@dataclasses.dataclass(frozen=True)
class Tkfac:
    """A_n and S_n weighted by each other's trace, per document."""

    bias: bool

    def save(self, x_BTI: jax.Array, aux: jax.Array) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: jax.Array, g_BTO: jax.Array) -> Moments:
        wide = np.promote_types(g_BTO.dtype, jnp.float32)
        square_BT = jnp.square(saved.astype(wide)).sum(-1) + int(self.bias)
        inputs_B1 = (aux.astype(wide) * square_BT).sum(1, keepdims=True)
        outputs_B1 = jnp.square(g_BTO.astype(wide)).sum((1, 2))[:, None]
        g_BTO = g_BTO * jnp.sqrt(inputs_B1).astype(g_BTO.dtype)[..., None]
        scale_BT = aux.astype(wide) * jnp.sqrt(outputs_B1)
        return Moments(_scaled_gram(saved, scale_BT, self.bias), gram(_flat(g_BTO)))


def _over_examples(function: Callable[..., Any], size: int, *arrays_B: jax.Array) -> Any:
    """The sum of function(part of the examples), so many at once that `size` each fits."""
    b = arrays_B[0].shape[0]
    parts = next(n for n in range(1, b + 1) if b % n == 0 and (b // n * size <= LARGEST or n == b))
    if parts == 1:
        return function(*arrays_B)
    # Every part takes some examples of each device.
    split = [jnp.swapaxes(x.reshape(b // parts, parts, *x.shape[1:]), 0, 1) for x in arrays_B]

    def add(total: Any, part: list[jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*part)), None

    zero = jax.tree.map(
        lambda out: jnp.zeros(out.shape, out.dtype),
        jax.eval_shape(function, *(x[0] for x in split)),
    )
    return jax.lax.scan(add, zero, split)[0]


@dataclasses.dataclass(frozen=True)
class Shampoo:
    bias: bool

    def save(self, x_BTI: jax.Array, aux: jax.Array) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: jax.Array, g_BTO: jax.Array) -> Moments:
        del aux

        def moments(x_BTI: jax.Array, g_BTO: jax.Array) -> Moments:
            G_BOI = Full(self.bias).emit(x_BTI, None, g_BTO)
            return Moments(gram(_flat(G_BOI)), gram(_flat(jnp.swapaxes(G_BOI, 1, 2))))

        return _over_examples(moments, saved.shape[-1] * g_BTO.shape[-1], saved, g_BTO)


@dataclasses.dataclass(frozen=True)
class Correction:
    """sum_n (Q_G^T G_n Q_A)^2; each side is turned before or after G_n is made, as is cheaper."""

    bias: bool

    def save(self, x_BTI: jax.Array, aux: Moments) -> jax.Array:
        del aux
        return x_BTI

    def emit(self, saved: jax.Array, aux: Moments, g_BTO: jax.Array) -> jax.Array:
        t, i = saved.shape[1:]
        o = g_BTO.shape[-1]
        inputs_II = aux.inputs_II.astype(saved.dtype)
        outputs_OO = aux.outputs_OO.astype(saved.dtype)
        if early := t <= o:
            saved = saved @ inputs_II[:i]
            saved = saved + inputs_II[i][None, None] if self.bias else saved
        if t <= i:
            g_BTO = g_BTO @ outputs_OO

        def squares(x_BTI: jax.Array, g_BTO: jax.Array) -> jax.Array:
            G_BOI = Full(self.bias and not early).emit(x_BTI, None, g_BTO)
            if t > i:
                G_BOI = jnp.einsum("OP,BOI->BPI", outputs_OO.astype(G_BOI.dtype), G_BOI)
            if not early:
                G_BOI = G_BOI @ inputs_II.astype(G_BOI.dtype)
            return jnp.square(G_BOI).sum(0)

        return _over_examples(squares, i * o, saved, g_BTO)


RuleName = Literal["kfac", "tkfac", "shampoo", "corrections"]
RULES: dict[str, Callable[[bool], Rule]] = {
    "kfac": Kfac, "tkfac": Tkfac, "shampoo": Shampoo, "corrections": Correction,
}  # fmt: skip


class Positions(NamedTuple):
    """A batch: ids and labels [B,T], lengths and numbers of its rows [B] (0 and -1 = padding)."""

    ids_BT: jax.Array
    labels_BT: jax.Array
    lengths_B: jax.Array
    rows_B: jax.Array


def sites(config: ModelConfig, spec: Spec) -> list[Target]:
    """The targets, when all have a Kronecker-factored curvature; InputError otherwise."""
    found = targets(config, spec)
    for target in found:
        if not target.stacked:
            raise InputError(f"{target.site.name} has no Kronecker factors, which would be of the "
                             "vocabulary's size; leave it out with --exclude")  # fmt: skip
    if spec.objective != NLL or spec.normalizer is not None:
        raise InputError("curvature is of plain gradients of the negative log-likelihood; leave "
                         "--loss log-odds or kl, smoothing and --normalizer out")  # fmt: skip
    return found


def _bias(spec: Spec, target: Target) -> bool:
    return spec.include_bias and target.site.bias


def _sizes(spec: Spec, target: Target) -> tuple[int, int]:
    """(outputs, inputs) of a site, the inputs with the one of the bias."""
    return target.site.outputs, target.site.inputs + _bias(spec, target)


@functools.partial(
    jax.jit,
    static_argnames=("config", "execution", "spec", "rule"),
    donate_argnames=("sums",),
)
@model.full_precision
def accumulate(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    rule: RuleName,
    variables: model.Variables,
    bases: Tree | None,
    sums: Tree,
    batch: Positions,
    seed: jax.Array | None,
) -> Tree:
    """`sums` and a batch's statistics of every site: `Moments`, or of `corrections` [L,O,I].

    bases: the eigenvectors that corrections need, by sink. seed: of labels drawn from the model,
    uint32; None = the batch's own labels (the empirical Fisher).

    One forward and one backward pass. The derivative of a document's loss, when it is a mean over
    n labels, is divided by sqrt(n): its outer product is then the mean loss's Hessian.
    """
    t = batch.ids_BT.shape[1]
    mask_BT = (jnp.arange(1, t + 1, dtype=jnp.int32)[None] < batch.lengths_B[:, None]).astype(
        jnp.float32
    )
    mask_LBT = jnp.broadcast_to(mask_BT, (config.layers, *mask_BT.shape))
    found = sites(config, spec)

    def hidden(outs: Tree) -> jax.Array:
        sinks: Tree = {}
        for target in found:
            aux = mask_LBT if bases is None else bases[target.sink]
            sink = Sink(RULES[rule](_bias(spec, target)), aux, outs[target.sink])
            schema.put(sinks, target.sink, sink)
        return model.hidden(config, execution, {**variables, "sinks": sinks}, batch.ids_BT)

    h_BTD, pull = jax.vjp(hidden, jax.tree.map(jnp.zeros_like, sums))
    head_VD = model.head(config, variables["params"])
    wide = np.promote_types(head_VD.dtype, jnp.float32)
    weights_BT = jnp.sqrt(example_weights(batch.labels_BT, spec.loss, wide))
    weights_BT = jnp.pad(weights_BT[:, 1:], ((0, 0), (0, 1)))
    chunk = execution.tokens_per_chunk(config.vocab_size)
    if seed is not None:
        uniform_BT = fisher.uniforms(seed, batch.rows_B, t)
        dh_BTD = fisher.sampled(h_BTD, head_VD, uniform_BT, weights_BT, chunk)
    else:
        targets_BT = model.targets(batch.labels_BT)
        dh_BTD = fisher.empirical(h_BTD, head_VD, targets_BT, weights_BT, chunk)
    return jax.tree.map(jnp.add, sums, pull(dh_BTD)[0])


def zeros(config: ModelConfig, spec: Spec, rule: RuleName) -> Tree:
    """Sums to start from, float32, with a leading layer axis."""
    tree: Tree = {}
    for target in sites(config, spec):
        o, i = _sizes(spec, target)
        shapes = [(o, i)] if rule == "corrections" else [(i, i), (o, o)]
        arrays = [jnp.zeros((config.layers, *shape), jnp.float32) for shape in shapes]
        tree[target.sink] = arrays[0] if rule == "corrections" else Moments(*arrays)
    return tree
