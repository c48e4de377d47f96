"""Conjugate gradients: inverse-curvature products beyond the Kronecker approximation.

Dims: B examples, T tokens, D width, L layers, I inputs (+1 with the bias), O outputs, Q queries.

For each query gradient q, (H + D) x = q is solved with H the Gauss-Newton matrix of some rows,

    H v = mean_n J_n^T (d^2 loss_n / dh^2) J_n v,      h the final hidden states, J = dh/dtheta,

one product by `jvp` of the model, `jvp` of the loss's derivative (so the Hessian in h is exact) and
`vjp` of the model; D is the damping of the Kronecker factors, which give the start and the
preconditioner (ASTRA, arXiv 2507.14740, whose `cg` solver this is). J is over the sites alone.
"""

import functools
import hashlib
import json
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import exact
from attribution.curvature import kronecker, moments
from attribution.curvature.kronecker import Factors, Inverse
from attribution.gradients import example_weights
from attribution.targets import Spec, Tree
from core import model, safetensors, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import PathLike, dumps
from core.inference import placer
from core.progress import Progress
from core.rows import Plan, Rows, read_ahead
from core.schema import Params


class Settings(NamedTuple):
    """documents: how many rows, at most, the Gauss-Newton matrix is of; drawn by `seed`."""

    steps: int = 20
    documents: int = 256
    seed: int = 0
    inversion: Literal["damped", "absolute"] = "damped"
    damping: float = 0.1


class State(NamedTuple):
    """Solutions x, residuals r = q - (H + D) x, directions, and <r, M r> with the preconditioner M.

    norms_Q: |r| / |q|.
    """

    x: Tree
    residual: Tree
    direction: Tree
    rz_Q: jax.Array
    norms_Q: jax.Array


class Refined(NamedTuple):
    """x by sink, [L,Q,O,I(+1)], and |q - (H + D) x| / |q| at the start and after each step."""

    tree: Tree
    norms_SQ: np.ndarray


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "spec"), donate_argnames=("sums",)
)
@model.full_precision
def add_product(
    config: ModelConfig,
    execution: Execution,
    spec: Spec,
    variables: model.Variables,
    tree: Tree,
    sums: Tree,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
) -> Tree:
    """`sums` and a batch's sum_n H_n v, for every v of `tree`, [L,Q,O,I(+1)] by sink.

    The model runs once; each query costs a forward and a backward pass along it.
    """
    moments.sites(config, spec)  # raises for what has no such curvature
    head_VD = model.head(config, variables["params"])
    weights_BT = example_weights(labels_BT, spec.loss, np.promote_types(head_VD.dtype, jnp.float32))
    shifted_BT = jnp.pad(weights_BT[:, 1:], ((0, 0), (0, 1)))
    targets_BT, chunk = model.targets(labels_BT), execution.tokens_per_chunk(config.vocab_size)

    def hidden(part: Params) -> jax.Array:
        return model.hidden(config, execution, exact.moved(variables, part), ids_BT)

    def slope(h_BTD: jax.Array) -> jax.Array:
        def total(h_BTD: jax.Array) -> jax.Array:
            out: Any = model.loss.weighted_nll(h_BTD, head_VD, targets_BT, shifted_BT, chunk)
            return out[0]

        return jax.grad(total)(h_BTD)

    held = exact.leaves(config, spec, variables)
    h_BTD, push = jax.linearize(hidden, held)
    pull = jax.linear_transpose(push, held)

    def one(tangent: Params) -> Params:
        dslope_BTD = jax.jvp(slope, (h_BTD,), (push(tangent),))[1]
        return pull(dslope_BTD)[0]

    products = jax.lax.map(one, exact.tangents(config, spec, tree))
    return jax.tree.map(jnp.add, sums, exact.directions(config, spec, products))


def _dot(u: Tree, v: Tree) -> jax.Array:
    """Inner products [Q]."""
    each = jax.tree.map(
        lambda u_LQOI, v_LQOI: jnp.einsum("LQOI,LQOI->Q", u_LQOI, v_LQOI, precision="highest"), u, v
    )
    return jax.tree.reduce(jnp.add, each)


def _moved(x: Tree, by_Q: jax.Array, v: Tree) -> Tree:
    """x + by * v, query by query."""
    return jax.tree.map(lambda x_LQOI, v_LQOI: x_LQOI + by_Q[None, :, None, None] * v_LQOI, x, v)


def _ratio(a_Q: jax.Array, b_Q: jax.Array) -> jax.Array:
    """a / b, 0 where b is not positive: such a query stays where it is."""
    return jnp.where(b_Q > 0, a_Q / jnp.where(b_Q > 0, b_Q, 1), 0)


def _norms(residual: Tree, query: Tree) -> jax.Array:
    return jnp.sqrt(_ratio(_dot(residual, residual), _dot(query, query)))


@jax.jit
def _begin(inverse: Inverse, query: Tree, x: Tree, product: Tree) -> State:
    residual = jax.tree.map(jnp.subtract, query, product)
    direction = kronecker.multiply(inverse, residual)
    norms_Q = _norms(residual, query)
    return State(x, residual, direction, _dot(residual, direction), norms_Q)


@jax.jit
def _advance(inverse: Inverse, query: Tree, state: State, product: Tree) -> State:
    """One step; product: (H + D) times the direction."""
    length_Q = _ratio(state.rz_Q, _dot(state.direction, product))
    x = _moved(state.x, length_Q, state.direction)
    residual = _moved(state.residual, -length_Q, product)
    z = kronecker.multiply(inverse, residual)
    rz_Q = _dot(residual, z)
    direction = _moved(z, _ratio(rz_Q, state.rz_Q), state.direction)
    return State(x, residual, direction, rz_Q, _norms(residual, query))


@jax.jit
def _damped(sums: Tree, documents: int, damping: Tree, v: Tree) -> Tree:
    """(H + D) v."""
    return {
        sink: sums[sink] / documents + damping[sink][:, None, None, None] * v[sink] for sink in v
    }


def _hash(tree: Tree) -> str:
    digest = hashlib.sha256()
    for sink in sorted(tree):
        digest.update(sink.encode() + np.ascontiguousarray(tree[sink]).tobytes())
    return digest.hexdigest()


def refine(
    folder: PathLike,
    loaded: Loaded,
    rows: Rows,
    spec: Spec,
    execution: Execution,
    batch_tokens: int,
    factors: Factors,
    query: Tree,
    settings: Settings,
) -> Refined:
    """Solve for all queries from the factors' solution; `folder` keeps the state of a killed run.

    query: gradients by sink, [L,Q,O,I(+1)]. rows: of the loss whose curvature is meant.
    """
    if settings.inversion not in ("damped", "absolute"):
        raise InputError(f"conjugate gradients solve a damped system, not {settings.inversion!r}; "
                         "use --inversion damped or absolute")  # fmt: skip
    factors.check(spec, loaded.fingerprint)
    count = min(settings.documents, len(rows))
    chosen = np.random.default_rng(settings.seed).permutation(len(rows))[:count]
    rows = rows.take(np.sort(chosen))
    plan = Plan(rows, batch_tokens, jax.device_count())
    everywhere, place = sharding.replicated(sharding.make_mesh()), placer()
    variables = jax.device_put(loaded.variables, everywhere)
    inverse = kronecker.inverse(factors, settings.inversion, settings.damping)
    inverse, query = jax.device_put((inverse, query), everywhere)
    relative = settings.inversion == "damped"
    damping = {
        sink: jnp.asarray([settings.damping * (float(layer.mean()) if relative else 1)
                           for layer in values_LOI])
        for sink, values_LOI in factors.values.items()
    }  # fmt: skip

    def product(v: Tree) -> Tree:
        sums = jax.tree.map(jnp.zeros_like, v)
        for batch in read_ahead(plan):
            sums = add_product(loaded.config, execution, spec, variables, v, sums, *place(batch))
        return _damped(sums, count, damping, v)

    made_of = {
        "model": loaded.fingerprint,
        "rows": rows.sha,
        "factors": dumps(factors.info),
        "settings": dumps(settings._asdict()),
        "batches": f"{batch_tokens} tokens on {jax.device_count()} devices",
        "query": _hash(query),
    }
    file = Path(folder) / "conjugate.safetensors"
    if file.exists():
        held = safetensors.metadata(file)
        norms = json.loads(held.pop("norms"))
        if held != made_of:
            raise InputError(f"{folder} holds solutions of something else; use another folder")
        like = State(query, query, query, jnp.zeros(0), jnp.zeros(0))
        state = jax.device_put(kronecker.read_tree(file, like), everywhere)
    else:
        x = kronecker.multiply(inverse, query)
        state = _begin(inverse, query, x, product(x))
        norms = [state.norms_Q.tolist()]
    saved = time.monotonic()
    with Progress(settings.steps, "conjugate gradients", "step", len(norms) - 1) as bar:
        while len(norms) <= settings.steps:
            state = _advance(inverse, query, state, product(state.direction))
            norms.append(state.norms_Q.tolist())
            bar.update(1, residual=f"{max(norms[-1]):.3g}")
            if len(norms) > settings.steps or time.monotonic() - saved > 60:
                kronecker.write_tree(file, state, {**made_of, "norms": json.dumps(norms)})
                saved = time.monotonic()
    return Refined(state.x, np.array(norms))
