"""Training an adapter: what moves, what does not, dropout, whole runs and their resumption."""

import dataclasses
import functools
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenizers
from core import adapter, checkpoint, families, model, schema, sharding
from core.adapter import Adapter, LoraSpec
from core.config import Execution, ModelConfig
from core.errors import Preempted
from core.files import read_json, read_jsonl
from core.linear import Linear, Sink
from core.rows import load_rows, save_rows
from core.rundir import open_run
from training import loop
from training.loop import Settings, train
from training.optim import Optim
from training.step import Recipe, State, gradients, initial, train_step

CONFIG = ModelConfig("gpt2", 258, 16, 8, 2, 2, 16, 4)
EXECUTION = Execution(layers="scan")
SGD = Optim("sgd", lr=0.3, schedule="constant", clip=0.0)
# Attention in both layers; one layer only of the mlp's first matrix.
SPEC = LoraSpec(3, 6.0, r".*\.attn\.c_attn|.*\.h\.1\.mlp\.c_fc")
DROPOUT = dataclasses.replace(SPEC, dropout=0.25)
RECIPE = Recipe(CONFIG, EXECUTION, SGD, 0, SPEC)
pytestmark = pytest.mark.usefixtures("standard_promotion")


@functools.cache
def base():
    """Random everywhere, on the host."""
    rng, shapes = np.random.default_rng(1), schema.abstract(families.rows(CONFIG), CONFIG.layers)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def factors(scale=0.3, spec=SPEC):
    """Neither factor zero where there is an adapter."""
    made = adapter.init(spec, CONFIG, 0)
    for row, layer in adapter.slots(spec, CONFIG).values():
        if row.path.endswith("/b"):
            draw = np.random.default_rng(layer).normal(0, scale, row.shape)
            leaf = schema.get(made, row.path).at[layer].set(draw.astype(np.float32))
            schema.put(made, row.path, leaf)
    return made


def batch(a=1, b=4, t=12, seed=0):
    rng = np.random.default_rng(seed)
    ids_ABT = rng.integers(0, CONFIG.vocab_size, (a, b, t), np.int32)
    return ids_ABT, ids_ABT, np.ones(ids_ABT.shape, np.float32)


def step(state, recipe=RECIPE, key=None, arrays=None):
    frozen = jax.tree.map(jnp.asarray, base())
    return train_step(recipe, state, *(arrays or batch()), frozen, key), frozen


def moved(before, after):
    """{factor: which layers of which have changed}, as {"attn_c_attn/a": [True, ...], ...}."""
    pairs = {}
    for row in RECIPE.rows():
        old, new = (np.asarray(schema.get(tree, row.path)) for tree in (before, after))
        pairs[row.path.removeprefix("blocks/")] = (old != new).any((1, 2)).tolist()
    return pairs


def test_b_moves_first_and_then_both():
    """With B = 0, A has no gradient; a layer without an adapter never has one."""
    start = adapter.init(SPEC, CONFIG, 0)
    (state, _), _ = step(initial(RECIPE, jax.tree.map(jnp.array, start)))
    once = jax.tree.map(np.array, state.params)
    assert moved(start, once) == {
        "attn_c_attn/a": [False, False], "attn_c_attn/b": [True, True],
        "mlp_c_fc/a": [False, False], "mlp_c_fc/b": [False, True],
    }  # fmt: skip
    (state, _), _ = step(state)
    assert moved(once, state.params) == {
        "attn_c_attn/a": [True, True], "attn_c_attn/b": [True, True],
        "mlp_c_fc/a": [False, True], "mlp_c_fc/b": [False, True],
    }  # fmt: skip
    assert not state.params["blocks"]["mlp_c_fc"]["a"][0].any()


def test_the_base_stays_and_is_the_callers():
    state = initial(RECIPE, factors())
    (after, _), frozen = step(state)
    jax.tree.map(np.testing.assert_array_equal, frozen, base())
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))  # the factors are donated
    sizes = [x.size for x in jax.tree.leaves(after.opt_state)]
    assert sum(sizes) <= len(sizes)  # the optimizer holds nothing of the base's size


def test_no_gradient_of_the_base_is_formed():
    """By the sizes of the products in the program; a weight's gradient has the weight's."""
    ids_ABT, *rest = (jnp.asarray(x) for x in batch())
    frozen, found = jax.tree.map(jnp.asarray, base()), {}
    for recipe, params in ((RECIPE, factors()), (RECIPE._replace(lora=None), frozen)):
        state = initial(recipe, params)
        extra = () if recipe.lora is None else (frozen,)
        text = train_step.lower(recipe, state, ids_ABT, *rest, *extra).as_text()
        products = re.findall(r"dot_general.*-> tensor<([\dx]+)xf32>", text)
        found[recipe.lora] = {tuple(sorted(map(int, shape.split("x")))) for shape in products}
    weights = {(8, 24), (8, 8), (8, 16), (8, 258)}
    assert weights <= found[None] and not weights & found[SPEC]
    assert {(3, 8), (3, 24), (3, 16)} <= found[SPEC]


def test_a_step_is_the_gradient_of_the_factors(close, x64):
    """Accumulated over micro-batches, against the derivative of the mean loss."""
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (base(), factors()))
    recipe = RECIPE._replace(execution=Execution("float64", "scan"))
    ids_ABT, labels_ABT, weights_ABT = batch(2)
    arrays = (ids_ABT, labels_ABT, weights_ABT.astype(np.float64))

    def loss(params):
        nll_BT = model.token_losses(
            CONFIG, recipe.execution, recipe.variables(params, wide[0]),
            jnp.asarray(ids_ABT.reshape(8, 12)), jnp.asarray(labels_ABT.reshape(8, 12)),
        )  # fmt: skip
        return nll_BT.sum() / (8 * 11)

    value, grads = jax.jit(jax.value_and_grad(loss))(wide[1])
    found, total = jax.jit(gradients, static_argnums=0)(recipe, wide[1], *arrays, wide[0])
    close((total, found), (value, grads), "float64")


def test_decay_falls_on_both_factors():
    optim = dataclasses.replace(SGD, lr=0.1, weight_decay=0.5)
    recipe = RECIPE._replace(optim=optim)
    ids, labels, ones = batch()
    arrays = (ids, np.full_like(labels, -100), ones)
    (state, _), _ = step(initial(recipe, factors()), recipe, arrays=arrays)
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, 0.95 * old, rtol=1e-6),
        state.params, factors(),
    )  # fmt: skip


# -------------------------------------------------------------------------------------- dropout


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A sink that emits what the adapter was given."""

    def save(self, x_BTI, aux):
        del aux
        return x_BTI

    def emit(self, saved, aux, g_BTO):
        del aux, g_BTO
        return saved


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec, key):
    """What each layer's c_attn adapter is given, [L,B,T,I]."""
    ids_BT = jnp.asarray(batch()[0][0])
    variables = {"params": jax.tree.map(jnp.asarray, base()),
                 "lora": adapter.collection(spec, CONFIG, factors())}  # fmt: skip

    def loss(out_LBTI):
        sinks = {"blocks": {"attn_c_attn": {"lora_a": Sink(Inputs(), None, out_LBTI)}}}
        weights_BT = jnp.ones(ids_BT.shape)
        return model.weighted_loss(
            CONFIG, EXECUTION, {**variables, "sinks": sinks}, ids_BT, ids_BT, weights_BT, key
        )[0]

    return jax.grad(loss)(jnp.zeros((CONFIG.layers, *ids_BT.shape, CONFIG.width)))


def test_dropout_draws_for_every_layer_row_place_and_key():
    whole_LBTI = np.asarray(inputs(DROPOUT, None))
    some_LBTI = np.asarray(inputs(DROPOUT, jax.random.key(0)))
    kept_LBTI = some_LBTI != 0
    assert kept_LBTI.mean() == pytest.approx(0.75, abs=0.05)
    first = kept_LBTI[0]  # of the first layer, what is not dropped is as it was, over 0.75
    np.testing.assert_allclose(some_LBTI[0][first], whole_LBTI[0][first] / 0.75, rtol=1e-6)
    for other in (kept_LBTI[1], np.roll(first, 1, 0), np.roll(first, 1, 1)):
        assert 0.5 < (first == other).mean() < 0.75  # two draws agree with 0.75^2 + 0.25^2
    np.testing.assert_array_equal(inputs(DROPOUT, jax.random.key(0)), some_LBTI)
    assert (np.asarray(inputs(DROPOUT, jax.random.key(1))) != some_LBTI).any()
    np.testing.assert_array_equal(inputs(SPEC, jax.random.key(0)), whole_LBTI)  # rate 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_is_unbiased(dtype):
    """The mean over draws is what it is without, for a rate that bfloat16 would round."""
    x_BTI = jnp.ones((1, 64, 32), dtype)
    eye = jnp.eye(32)
    lora = {"a": eye, "b": eye, "scale": jnp.ones(()), "dropout": jnp.float32(0.05)}
    variables = {"params": {"w": jnp.zeros((32, 32))}, "lora": lora}
    linear = Linear(32, bias=False)

    @jax.jit
    @jax.vmap
    def draw(key):
        return linear.apply(variables, x_BTI, rngs={"dropout": key})

    y_KBTO = np.asarray(draw(jax.random.split(jax.random.key(0), 200)), np.float32)
    kept = (y_KBTO != 0).mean()
    assert kept == pytest.approx(0.95, abs=5 * (0.95 * 0.05 / y_KBTO.size) ** 0.5)
    assert y_KBTO.max() == pytest.approx(1 / 0.95, rel=4e-3 if dtype == "bfloat16" else 1e-6)
    assert (np.asarray(linear.apply(variables, x_BTI)) == 1).all()  # without a key, none


def test_dropout_is_keyed_by_step_and_micro_batch():
    recipe, key = RECIPE._replace(lora=DROPOUT), jax.random.key(3)
    frozen = jax.tree.map(jnp.asarray, base())

    def loss(at, key, arrays):
        state = initial(recipe, factors())
        state = State(jnp.int32(at), *state[1:])
        return float(train_step(recipe, state, *arrays, frozen, key)[1].loss)

    one = batch()
    assert loss(0, key, one) == loss(0, key, one)
    others = [loss(1, key, one), loss(0, jax.random.key(4), one)]
    assert len({loss(0, key, one), *others}) == 3
    twice = tuple(np.concatenate([x, x]) for x in one)  # the same rows in two micro-batches
    assert loss(0, key, twice) != pytest.approx(loss(0, key, one), rel=1e-6)


# ----------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder with a base model, its fingerprint, rows)."""
    folder = tmp_path_factory.mktemp("lora")
    mark = checkpoint.save_model(folder / "base", CONFIG, base(), tokenizers.load("bytes"))
    rng = np.random.default_rng(0)
    save_rows(folder / "rows", [rng.integers(0, 258, n) for n in rng.integers(4, 17, 20)])
    return folder, mark, load_rows(folder / "rows", 258, 16)


def held(place) -> Adapter:
    found = checkpoint.load_model(place).adapter
    assert found is not None
    return found


ADAM = Optim(lr=1e-2, warmup=2, weight_decay=0.1)


def fit(path, world, spec=DROPOUT, steps=6, start=None, **options):
    """`train lm --lora-rank`; returns (summary, final factors, metrics)."""
    folder, mark, rows = world
    settings = Settings(steps, batch=8, accumulate=2, save_every=2, eval_every=3)
    made = Adapter(spec, start or adapter.init(spec, CONFIG, 0), mark, str(folder / "base"))
    with open_run(path, "train lm", options) as run:
        if not run.done:
            run.inputs(rows=rows.sha)
            summary = train(run, CONFIG, base(), rows, settings, ADAM, EXECUTION,
                            tokenizers.load("bytes"), rows, made)  # fmt: skip
            run.finish(**summary)
    lines = [{k: v for k, v in m.items() if k != "tokens_per_second"}
             for m in read_jsonl(path / "metrics.jsonl")]  # fmt: skip
    return read_json(path / "DONE"), held(path).factors, lines


def same(one, other):
    assert one[0] == other[0] and one[2] == other[2]
    jax.tree.map(np.testing.assert_array_equal, one[1], other[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, world):
    with jax.numpy_dtype_promotion("standard"):
        path = tmp_path_factory.mktemp("run") / "whole"
        return path, fit(path, world)


def test_a_finished_run_is_its_base_with_the_adapter(whole, world, close):
    path, (summary, trained, lines) = whole
    folder, mark, rows = world
    loaded = checkpoint.load_model(path)
    assert loaded.fingerprint == summary["model"] != mark
    assert summary["adapter_parameters"] == 3 * (2 * (8 + 24) + (8 + 16))
    assert loaded.tokenizer == path / "adapter" and not (path / "model").exists()
    jax.tree.map(np.testing.assert_array_equal, loaded.params, base())
    assert adapter.hits(held(path).spec, CONFIG) == adapter.hits(DROPOUT, CONFIG)
    assert held(path).spec.dropout == 0.25 and held(path).base == mark
    for other in (path, path / "adapter"):
        attached = checkpoint.load_model(folder / "base", other)
        assert attached.fingerprint == loaded.fingerprint
    losses = [m["val_loss"] for m in lines if "val_loss" in m]
    found = loop.mean_loss(CONFIG, EXECUTION, loaded.variables, rows)
    assert found == pytest.approx(losses[-1], rel=1e-6)  # and so measured without dropout
    assert trained["blocks"].keys() == {"attn_c_attn", "mlp_c_fc"}


@pytest.mark.parametrize("at", [1, 4])
def test_stopped_and_resumed_with_dropout(whole, world, tmp_path, monkeypatch, at):
    steps = 0

    def step_and_ask(*args):
        nonlocal steps
        steps += 1
        if steps == at:
            signal.raise_signal(signal.SIGTERM)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", step_and_ask)
    with pytest.raises(Preempted, match=f"after step {at} of 6"):
        fit(tmp_path / "run", world)
    same(fit(tmp_path / "run", world), whole[1])
    assert steps == 6


def test_the_seed_of_a_run_decides_its_masks(whole, world, tmp_path):
    again = fit(tmp_path / "again", world)
    same(again, whole[1])
    without = fit(tmp_path / "without", world, SPEC)
    assert without[2][0]["loss"] == pytest.approx(again[2][0]["loss"], rel=1e-6)  # B = 0: none yet
    assert without[2][2]["loss"] != again[2][2]["loss"]


def test_an_adapter_is_trained_on(whole, world, tmp_path):
    """It starts where the other ended, with an optimizer of its own."""
    before = whole[1][1]
    summary, after, lines = fit(tmp_path / "more", world, start=before, steps=2)
    assert summary["model"] != whole[1][0]["model"]
    assert lines[0]["loss"] < whole[1][2][0]["loss"]
    assert moved(before, after)["attn_c_attn/a"] == [True, True]


def test_the_factors_are_laid_out_like_their_weight():
    mesh = sharding.make_mesh()
    where = sharding.parameter_shardings(RECIPE.rows(), CONFIG.layers, mesh)["blocks"]
    axes = {f"{site}/{name}": leaf.spec for site, x in where.items() for name, leaf in x.items()}
    spec = jax.sharding.PartitionSpec
    assert axes == {
        "attn_c_attn/a": spec(None, None, None), "attn_c_attn/b": spec(None, None, "model"),
        "mlp_c_fc/a": spec(None, None, None), "mlp_c_fc/b": spec(None, None, "model"),
    }  # fmt: skip
