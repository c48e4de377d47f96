"""Scores along given directions, forward mode and sinks, against gradients formed in full.

The reference is reverse mode in float64: each row's gradient of its token losses, weighted at
random, so that an error in any one token shows.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import dot, exact, gradients, rules, targets
from attribution.projection import Projection
from attribution.targets import Spec, Tree
from core import adapter, model
from core.adapter import LoraSpec
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
QUICK = Execution("float64", "scan")
LORA = LoraSpec(2, 3.0, ("c_attn", "mlp.c_proj"), layers=(1,))
FULL = Spec(Projection(0))
Q = 3


def directions(config, spec) -> Tree:
    """Random, and zero in layers without a target."""
    random, tree = np.random.default_rng(5), {}
    for target in targets.targets(config, spec):
        o, i = target.site.outputs, target.site.inputs + (spec.include_bias and target.site.bias)
        d_LQOI = random.normal(size=(len(target.layers), Q, o, i))
        tree[target.sink] = jnp.asarray(d_LQOI * np.array(target.layers)[:, None, None, None])
    return tree


class Case:
    """A model in float64, rows, and directions; what is computed of them is computed once."""

    def __init__(self, tiny, config, variables, spec, lengths):
        self.config, self.spec, self.variables = config, spec, variables
        self.batch = tuple(map(jnp.asarray, tiny.batch(lengths, 3)))
        self.tree = directions(config, spec)
        self.tangents = exact.tangents(config, spec, self.tree)
        how = config, QUICK, spec, variables
        self.forward = tiny.jit(functools.partial(exact.token_scores, *how))
        self.dot = tiny.jit(functools.partial(dot.scores, *how), static_argnames="tokens")
        self.reverse = tiny.jit(jax.vmap(jax.grad(self._loss), (None, 0, 0, 0)))

    def _loss(self, part, ids_T, labels_T, weights_T):
        moved = exact.moved(self.variables, part)
        batch = ids_T[None], labels_T[None]
        return (model.token_losses(self.config, QUICK, moved, *batch) * weights_T[None]).sum()

    def by_gradients(self, random_BT=1.0) -> np.ndarray:
        """[B,Q]: the example's inner products, each token's part times a number."""
        weights_BT = gradients.example_weights(self.batch[1], self.spec.loss, jnp.float64)
        part = exact.leaves(self.config, self.spec, self.variables)
        grads = self.reverse(part, *self.batch, weights_BT * random_BT)
        pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(self.tangents), strict=True)
        parts = [np.tensordot(g, t, (range(1, g.ndim), range(1, t.ndim))) for g, t in pairs]
        return np.sum(parts, axis=0)

    @functools.cached_property
    def token_scores(self):
        return self.forward(self.tangents, *self.batch)[0]


def make(name: str, tiny) -> Case:
    if name.endswith("_tiny"):
        loaded = load_model(GOLDEN / name)
        params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), loaded.params)
        return Case(tiny, loaded.config, {"params": params}, FULL, [9, 5])
    config, spec = tiny.config, FULL
    variables = {"params": tiny.params(dtype="float64")}
    if name == "tables":  # embedding, with both its uses, and one layer's site
        spec = spec._replace(modules=("wte", "h.1.mlp.c_fc"))
    elif name == "lora":
        random = np.random.default_rng(6)  # `b` starts at zero
        factors = adapter.init(LORA, config, 4)
        factors = jax.tree.map(lambda x: np.float64(x) + random.normal(0, 0.1, x.shape), factors)
        variables["lora"] = adapter.collection(LORA, config, factors)
        spec = spec._replace(adapter=LORA)
    else:
        spec = spec._replace(include_bias=True, loss="mean")
    return Case(tiny, config, variables, spec, [11, 3, 14, 7])


@pytest.fixture(
    scope="module", params=["bias", "lora", "tables", "gpt2_tiny", "gemma3_tiny", "neox_tiny"]
)
def case(request, tiny):
    with jax.enable_x64(True):
        yield make(request.param, tiny)


@pytest.fixture(scope="module")
def plain(tiny):
    with jax.enable_x64(True):
        yield make("bias", tiny)


def test_tokens_scores_are_inner_products_with_gradients(case, close):
    random_BT = jnp.asarray(np.random.default_rng(7).normal(size=case.batch[0].shape))
    expected_BQ = case.by_gradients(random_BT)
    close((case.token_scores * random_BT[..., None]).sum(1), expected_BQ, "float64")


def test_sinks_score_examples_alike(case, close):
    if "embed/wte" in case.tree:
        with pytest.raises(InputError, match="Dot statistics of an embedding are not supported"):
            case.dot(case.tree, *case.batch)
        return
    scores_BQ, losses_B = case.dot(case.tree, *case.batch)
    close(scores_BQ, case.by_gradients(), "float64")
    close(scores_BQ, case.token_scores.sum(1), "float64")
    close(losses_B, case.forward(case.tangents, *case.batch)[1].sum(1), "float64")


def test_positions_add_up_to_the_example(plain, close):
    scores_BTQ, _ = plain.dot(plain.tree, *plain.batch, tokens=True)
    close(scores_BTQ.sum(1), plain.by_gradients(), "float64")
    prompt_BT = np.asarray(plain.batch[1]) == -100
    assert np.abs(np.asarray(scores_BTQ)[1, : prompt_BT[1].argmin()]).min() > 0  # read later on


def test_one_direction_is_a_column_of_several(plain, close):
    for q in range(Q):
        tangent = jax.tree.map(lambda x, q=q: x[q : q + 1], plain.tangents)
        alone_BT1, _ = plain.forward(tangent, *plain.batch)
        close(alone_BT1[..., 0], plain.token_scores[..., q], "float64")
        tree = {sink: d_LQOI[:, q : q + 1] for sink, d_LQOI in plain.tree.items()}
        alone_B1, _ = plain.dot(tree, *plain.batch)
        close(alone_B1[:, 0], plain.token_scores[..., q].sum(1), "float64")


def test_padding_and_the_batch_change_nothing(plain, close):
    pad = ((0, 1), (0, 5))
    ids_BT, labels_BT = plain.batch
    wide = jnp.pad(ids_BT, pad), jnp.pad(labels_BT, pad, constant_values=-100)
    b, t = ids_BT.shape
    padded_BTQ = np.asarray(plain.forward(plain.tangents, *wide)[0])
    close(padded_BTQ[:b, :t], plain.token_scores, "float64")
    assert not padded_BTQ[b:].any() and not padded_BTQ[:, t:].any()


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("projected", [False, True])
def test_the_rule_contracts_each_examples_gradient(tiny, close, x64, tokens, queries, projected):
    """For every shape: formed G, met tokens, projected ones, and the bias column."""
    random = np.random.default_rng(8)
    x_BTI, g_BTO = (jnp.asarray(random.normal(size=(2, 5, n))) for n in (4, 6))
    pair = None
    if projected:
        pair = rules.Pair(*(jnp.asarray(random.normal(size=shape)) for shape in ((6, 3), (5, 3))))
    G_BTOI = np.einsum("BTO,BTI->BTOI", g_BTO, np.pad(x_BTI, ((0, 0), (0, 0), (0, 1)),
                                                      constant_values=1))  # fmt: skip
    if pair is not None:
        G_BTOI = np.einsum("BTOI,OP,IR->BTPR", G_BTOI, *map(np.asarray, pair[:2]))
    d_QOI = jnp.asarray(random.normal(size=(queries, *G_BTOI.shape[2:])))
    rule, aux = dot.Dot(tokens), dot.Directions(d_QOI, pair)
    found = rule.emit(rule.save(x_BTI, aux), aux, g_BTO)
    expected_BTQ = np.einsum("BTOI,QOI->BTQ", G_BTOI, d_QOI)
    close(found, expected_BTQ if tokens else expected_BTQ.sum(1), "float64")
