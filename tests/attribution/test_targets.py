"""Which matrices are collected: every one of all families, by name, by head, in both layouts."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import gradients
from attribution.projection import Projection
from attribution.rules import Pair
from attribution.targets import (
    EMBEDDING,
    HEAD,
    Spec,
    coverage,
    features,
    flatten,
    targets,
    unflatten,
    width,
)
from core import adapter, families, model, schema
from core.config import Execution
from core.errors import InputError
from core.hf import convert
from core.loss import NLL, Objective

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = ["gpt2_tiny", "gpt2_tiny_untied", "gemma3_tiny", "neox_tiny"]
FULL = Projection(0)
EVERYTHING = Spec(FULL, modules=("*",))


@pytest.fixture(scope="module")
def opened(tiny):
    """(config, float64 parameters, ids, labels, gradients of each row) of a golden model."""

    @functools.cache
    def read(name: str):
        config, params = convert.import_hf(GOLDEN / name)
        random = np.random.default_rng(0)
        ids_BT = random.integers(1, config.vocab_size, (2, 9), np.int32)
        labels_BT = ids_BT.copy()
        labels_BT[0, :4] = labels_BT[1, 7:] = -100
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
            grads = each_row(tiny, config, wide, ids_BT, labels_BT, NLL)
        return config, wide, ids_BT, labels_BT, grads

    return read


def each_row(tiny, config, params, ids_BT, labels_BT, objective):
    """The gradient of each row's loss in all parameters, by jax.grad of the plain loss."""

    def loss(params, ids_T, labels_T):
        found = model.token_losses(
            config, Execution("float64"), {"params": params}, ids_T[None], labels_T[None], objective
        )
        return found.sum()

    return tiny.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(params, ids_BT, labels_BT)


def matrix_of(grads, target):
    """[L,B,O,I] of a target from the gradients [B,L,I,O] of the parameters."""
    if not target.stacked:
        return schema.get(grads, target.sink)[None]
    return jnp.transpose(schema.get(grads, f"{target.site.path}/w"), (1, 0, 3, 2))


@pytest.mark.parametrize("name", MODELS)
def test_every_matrix_of_every_family(tiny, opened, close, name, x64):
    """Embedding and output matrix, too; a tied one's gradient is the sum of both its uses."""
    config, params, ids_BT, labels_BT, grads = opened(name)
    found = targets(config, EVERYTHING)
    assert [t.sink for t in found if not t.stacked] == [EMBEDDING] + [HEAD] * (not config.tied)
    got_BD, _ = tiny.jit(
        functools.partial(gradients.example_gradients, config, Execution("float64"), EVERYTHING)
    )({"params": params}, {}, ids_BT, labels_BT)
    expected = {t.sink: matrix_of(grads, t) for t in found}
    close(got_BD, flatten(config, EVERYTHING, expected), "float64")
    close(unflatten(config, EVERYTHING, got_BD), expected, "float64")


@pytest.mark.parametrize("name", ["gpt2_tiny", "gpt2_tiny_untied"])
def test_projected_tables_are_projections_of_the_whole_gradient(tiny, opened, close, name, x64):
    config, params, ids_BT, labels_BT, grads = opened(name)
    spec = Spec(Projection(3), modules=("wte", "lm_head", "*c_fc"))
    aux = gradients.projections(config, spec)
    got_BD, _ = tiny.jit(
        functools.partial(gradients.example_gradients, config, Execution("float64"), spec)
    )({"params": params}, aux, ids_BT, labels_BT)
    projected = {
        t.sink: jnp.einsum(
            "LBOI,LOP,LIQ->LBPQ",
            matrix_of(grads, t),
            *(m.astype("float64") for m in aux[t.sink][:2]),
        )
        for t in targets(config, spec)
    }
    close(got_BD, flatten(config, spec, projected), "float64")


@pytest.mark.parametrize("name", ["gpt2_tiny", "gemma3_tiny", "neox_tiny"])
def test_heads_split_the_attention_and_keep_every_entry(tiny, opened, close, name, x64):
    config, params, ids_BT, labels_BT, grads = opened(name)
    plain, split = Spec(FULL), Spec(FULL, heads=True)
    tree = {t.sink: matrix_of(grads, t) for t in targets(config, plain)}
    flat_BD = np.asarray(flatten(config, split, tree))
    close(unflatten(config, split, jnp.asarray(flat_BD)), tree, 0)
    named = {f.name: f for f in features(config, split)}
    assert any(".head_1" in n for n in named) and len(flat_BD[0]) == width(config, plain)
    # A head's share of a projection is the projection of its rows with matrices of its own.
    spec = Spec(Projection(3), heads=True)
    aux = gradients.projections(config, spec)
    got_BD, _ = tiny.jit(
        functools.partial(gradients.example_gradients, config, Execution("float64"), spec)
    )({"params": params}, aux, ids_BT, labels_BT)
    for target in (t for t in targets(config, spec) if t.rows):
        place = next(f for f in features(config, spec) if f.name == target.names(1)[1])
        head_BRI = matrix_of(grads, target)[1][:, np.array(target.rows[1])]
        left_OP, right_IP = aux[target.sink].left_OP[1, 1], aux[target.sink].right_IP[1]
        expected_BPQ = np.einsum("BRI,RP,IQ->BPQ", *map(np.asarray, (head_BRI, left_OP, right_IP)))
        part_BD = got_BD[:, place.offset : place.offset + 9]
        close(part_BD, expected_BPQ.reshape(2, 9), "float64")


def test_heads_are_those_of_the_attention(tiny, opened, x64):
    """Zeroing the columns that one head's output goes into takes the gradient of its rows away."""
    config, params, ids_BT, labels_BT, _ = opened("gpt2_tiny")
    k = config.head_dim
    w_LIO = params["blocks"]["attn_c_proj"]["w"].at[:, k : 2 * k].set(0)
    blocks = {**params["blocks"], "attn_c_proj": {**params["blocks"]["attn_c_proj"], "w": w_LIO}}
    grads = each_row(tiny, config, {**params, "blocks": blocks}, ids_BT, labels_BT, NLL)
    target = next(t for t in targets(config, Spec(FULL, heads=True)) if t.rows)
    g_LBOI = np.asarray(matrix_of(grads, target))
    assert not g_LBOI[:, :, np.array(target.rows[1])].any()
    assert g_LBOI[:, :, np.array(target.rows[0])].any(axis=(1, 2, 3)).all()


def test_objectives(tiny, opened, close, x64):
    """Against their definitions on whole logits; gradients of features follow the objective."""
    config, params, ids_BT, labels_BT, _ = opened("gpt2_tiny")
    variables, run = {"params": params}, Execution("float64", loss_chunk=5)
    z_BTV = model.logits(config, run, variables, ids_BT)[:, :-1]
    logp_BTV = np.asarray(jax.nn.log_softmax(z_BTV))
    y_BT = np.maximum(labels_BT[:, 1:], 0)
    mask_BT = labels_BT[:, 1:] != -100
    logp_BT = np.take_along_axis(logp_BTV, y_BT[..., None], -1)[..., 0]
    expected = {
        Objective("log-odds"): -(logp_BT - np.log1p(-np.exp(logp_BT))),
        Objective("nll", 0.1): -0.9 * logp_BT - 0.1 * logp_BTV.mean(-1),
    }
    for objective, losses_BT in expected.items():
        found_BT = model.token_losses(config, run, variables, ids_BT, labels_BT, objective)
        close(found_BT[:, 1:], losses_BT * mask_BT, "float64")
        spec = Spec(FULL, objective=objective, modules=("h.1.mlp.c_fc",))
        got_BD, totals_B = tiny.jit(
            functools.partial(gradients.example_gradients, config, run, spec)
        )(variables, {}, ids_BT, labels_BT, jnp.array([1.0, -2.0]))
        grads = each_row(tiny, config, params, ids_BT, labels_BT, objective)
        g_BOI = matrix_of(grads, targets(config, spec)[0])[1]
        close(got_BD, (g_BOI * jnp.array([1.0, -2.0])[:, None, None]).reshape(2, -1), "float64")
        close(totals_B, (losses_BT * mask_BT).sum(1), "float64")


def test_kl_to_the_base(tiny, opened, close, x64):
    config, params, ids_BT, labels_BT, _ = opened("gpt2_tiny")
    spec = adapter.LoraSpec(2, 4.0, ("c_fc",))
    factors = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), adapter.init(spec, config, 0))
    random = np.random.default_rng(1)
    factors = jax.tree.map(lambda x: x + random.normal(0, 0.3, x.shape), factors)
    variables = {"params": params, "lora": adapter.collection(spec, config, factors)}
    run, kl = Execution("float64"), Objective("kl")
    logp, base = (
        np.asarray(jax.nn.log_softmax(model.logits(config, run, v, ids_BT)))[:, :-1]
        for v in (variables, {"params": params})
    )
    expected_BT = (np.exp(logp) * (logp - base)).sum(-1) * (labels_BT[:, 1:] != -100)
    found_BT = model.token_losses(config, run, variables, ids_BT, labels_BT, kl)
    close(found_BT[:, 1:], expected_BT, "float64")
    at_base = model.token_losses(config, run, {"params": params}, ids_BT, labels_BT, kl)
    assert not np.asarray(at_base).any()


def test_globs(tiny):
    config = tiny.config
    names = [f.name for f in features(config, Spec(FULL, modules=("*mlp*",), exclude=("h.1.*",)))]
    assert names == [f"h.{i}.mlp.{n}" for i in (0, 2) for n in ("c_fc", "c_proj")]
    assert features(config, Spec(FULL, modules=("wte",)))[0].shape == (61, 12)
    for spec in (Spec(FULL, modules=("nothing",)), Spec(FULL, exclude=("*",))):
        with pytest.raises(InputError, match="leaves no module of wte|leaves no module of h"):
            targets(config, spec)
    lora = adapter.LoraSpec(2, 4.0, ("c_fc",))
    with pytest.raises(InputError, match="no heads"):
        targets(config, Spec(FULL, adapter=lora, heads=True))


def test_coverage_of_everything(tiny):
    rows = families.rows(tiny.config)
    matrices = [r for r in rows if r.path.endswith("/w") or r.path == EMBEDDING]
    sizes = {r.path: np.prod(schema.full_shape(r, 3)) for r in rows}
    share = sum(sizes[r.path] for r in matrices) / sum(sizes.values())
    found = coverage(tiny.config, Spec(FULL, modules=("*",)))
    assert found == {"parameters": share, "matmul_flops": 1.0}
    untied = coverage(tiny.untied, Spec(FULL, modules=("*",)))
    assert untied["matmul_flops"] == 1.0


def test_a_global_sketch_is_the_sum_of_the_sites(tiny, close, x64):
    params, (ids_BT, labels_BT) = tiny.params(dtype="float64"), tiny.batch([9, 7])
    specs = [Spec(Projection(3, target=target)) for target in ("site", "global")]
    run = Execution("float64")
    found = []
    for spec in specs:
        aux = gradients.projections(tiny.config, spec)
        one = functools.partial(gradients.example_gradients, tiny.config, run, spec)
        found.append(tiny.jit(one)({"params": params}, aux, ids_BT, labels_BT)[0])
    close(found[1], found[0].reshape(2, -1, 9).sum(1), "float64")
    assert features(tiny.config, specs[1]) == [("global", 0, (3, 3))]


def test_specs_come_back_from_json(tiny):
    lora = adapter.LoraSpec(2, 4.0, ("c_fc",), layers=(0, 2))
    spec = Spec(
        Projection(4, "bergson-normal", seed=3), True, "mean", lora, Objective("nll", 0.1),
        ("*mlp*",), ("h.0.*",), False, ("adam", "abc"),
    )  # fmt: skip
    for s in (spec, Spec()):
        assert Spec.from_json(s.to_json(), "store") == s
    for change in ({"projection": {**Spec().projection.to_json(), "version": 0}}, {"loss2": 1}):
        with pytest.raises(InputError, match="make it again"):
            Spec.from_json({**Spec().to_json(), **change}, "store")


def test_pairs_of_heads_are_their_own(tiny):
    spec = Spec(Projection(4), heads=True)
    pair = gradients.projections(tiny.config, spec)["blocks/attn_c_attn/weight"]
    assert isinstance(pair, Pair) and pair.left_OP.shape == (3, 2, 18, 4)
    assert not np.array_equal(pair.left_OP[0, 0], pair.left_OP[0, 1])
