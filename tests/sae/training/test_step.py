"""Training steps: what they keep, what they learn, and the SAE that comes out."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import InputError
from sae import coder
from sae.training import losses, step
from sae.training.losses import AuxK, Batch, Objective
from sae.training.step import Recipe, finished, initial, train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")  # optax mixes dtypes
TRUE, WIDTH, ROWS, STEPS = 24, 16, 128, 400


def planted(steps):
    """(directions [24,16], batches [steps,128,16]): three of the directions in every row."""
    rng = np.random.default_rng(0)
    directions_FD = rng.normal(size=(TRUE, WIDTH))
    directions_FD /= np.linalg.norm(directions_FD, axis=1, keepdims=True)
    active = rng.random((steps, ROWS, TRUE)).argsort(-1) < 3
    weights = active * rng.uniform(1, 2, active.shape)
    return directions_FD, (weights @ directions_FD + 0.5).astype(np.float32)


def train(recipe, batches, state=None):
    state = initial(recipe, batches[0], 0) if state is None else state
    history = []
    for x_ND in batches:
        state, metrics = train_step(recipe, state, x_ND)
        history.append(metrics)
    return state, jax.device_get(history)


def explained(metrics):
    """Share of the variance of a step's batch."""
    variance = metrics.squares - (metrics.total_O**2).sum() / ROWS
    return 1 - metrics.errors / variance


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_the_first_reconstruction_is_not_too_loud(kind):
    """Half of all features are active, and together they say no more than there is."""
    _, (x_ND,) = planted(1)
    given = Recipe(Objective(kind, sparsity=1e-6), WIDTH, 16 * WIDTH, WIDTH, 10)
    _, (metrics,) = train(given, [x_ND])
    assert metrics.l0 > 4 * WIDTH and 0.2 < explained(metrics) < 1


def test_few_steps_have_a_higher_rate():
    """Of what must travel; a long run has the published one."""
    jump, top = Objective("jumprelu", sparsity=1.0), Objective("topk", k=4)
    runs = (jump, STEPS), (jump, 10**6), (jump, 4000), (top, 10)
    recipes = [Recipe(goal, 8, 2**14, 8, steps, decay=0.0) for goal, steps in runs]
    rates = [float(given.rate(jnp.int32(0))) for given in recipes]
    assert rates == pytest.approx([1e-3, 7e-5, 2.5e-4, 2e-4])


def recipe(objective, lr: float | None = 5e-3, **settings):
    return Recipe(objective, WIDTH, 32, WIDTH, STEPS, lr=lr, **settings)


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def trained(request):
    goal = {
        "topk": Objective("topk", k=3, k_start=8),
        "jumprelu": Objective("jumprelu", sparsity=0.5, bandwidth=0.5),
    }[request.param]
    warm = {"k_warmup": 100} if goal.k_start else {"sparsity_warmup": 100}
    given = recipe(goal, warmup=20, dead_tokens=20 * ROWS, **warm)
    directions_FD, batches = planted(STEPS)
    with jax.numpy_dtype_promotion("standard"):
        return given, directions_FD, batches, *train(given, batches)


def test_planted_features_are_found(trained):
    given, directions_FD, _, state, history = trained
    cosine = np.abs(directions_FD @ np.asarray(state.params["W_dec"]).T).max(1)
    assert cosine.mean() > 0.9
    told = [explained(metrics) for metrics in history]
    assert np.mean(told[-20:]) > 0.8 > 0.7 > np.mean(told[:20])
    if given.objective.kind == "topk":
        assert history[0].l0 > 6 and history[-1].l0 <= 3  # k came down


def test_rows_of_the_decoder_keep_their_norm(trained):
    _, _, _, state, _ = trained
    assert np.allclose(np.linalg.norm(state.params["W_dec"], axis=1), 1, atol=1e-6)
    if "threshold" in state.params:
        assert (np.asarray(state.params["threshold"]) >= 0).all()
    along = step.across(jnp.asarray(state.params["W_dec"] + 1), state.params["W_dec"])
    assert np.abs((along * state.params["W_dec"]).sum(1)).max() < 1e-5


def test_the_same_again_to_the_bit_and_from_the_middle(trained):
    given, _, batches, _, _ = trained
    first, _ = train(given, batches[:6])
    first = jax.device_get(first)
    middle, _ = train(given, batches[:3])
    saved = jax.tree.map(lambda x: np.array(x), middle)  # as from a file
    second, _ = train(given, batches[3:6], jax.tree.map(jnp.asarray, saved))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), first, second))
    avals = jax.tree.map(lambda x: x.aval, (initial(given, batches[0], 0), middle))
    assert avals[0] == avals[1]  # weak types too, or the second step would compile again


def test_metrics_add_up_over_batches(trained, relative):
    """To the explained variance of what comes out, about the mean of all rows."""
    given, _, batches, state, _ = trained
    state, saw, said, history = jax.tree.map(jnp.copy, state), [], [], []
    for x_ND in batches[:2]:
        made, params = finished(given, state)
        saw.append(x_ND)
        said.append(coder.reconstruct(made, params, jnp.asarray(x_ND))[1])
        state, metrics = train_step(given, state, x_ND)
        history.append(jax.device_get(metrics))
    x_ND, y_ND = np.concatenate(saw).astype(float), np.concatenate(said).astype(float)
    errors, squares, total_D = (
        np.sum([np.asarray(getattr(m, name), float) for m in history], axis=0)
        for name in ("errors", "squares", "total_O")
    )
    explained = 1 - errors / (squares - (total_D**2).sum() / len(x_ND))
    expected = 1 - ((x_ND - y_ND) ** 2).sum() / ((x_ND - x_ND.mean(0)) ** 2).sum()
    assert 0.5 < expected < 1 and relative(explained, expected) < 1e-5


def test_dead_features_revive():
    """Half of the features begin so low that they are never chosen: only AuxK reaches them."""
    _, batches = planted(60)
    revived = {}
    for coefficient in (0.0, 1.0):
        given = recipe(Objective("topk", k=3, aux=AuxK(coefficient)), dead_tokens=2 * ROWS)
        state = initial(given, batches[0], 0)
        state.params["b_enc"] = state.params["b_enc"].at[16:].set(-3.0)
        _, history = train(given, batches, state)
        assert history[4].dead >= 16
        fires_F = np.sum([metrics.fires_F for metrics in history[-10:]], axis=0)
        revived[coefficient] = int((fires_F[16:] > 0).sum())
    assert revived[0.0] == 0 and revived[1.0] > 8, revived


NONE = AuxK(0)
KINDS = {
    "gated": Objective("gated", sparsity=1),
    "jumprelu": Objective("jumprelu", sparsity=1, centred=False),
    "topk": Objective("topk", k=3, rescale=True, aux=NONE),
    "batchtopk": Objective("batchtopk", k=2.5, rescale=True, aux=NONE),
    "matryoshka": Objective("matryoshka", k=3, widths=(8, 32), aux=NONE),
    "transcoder": Objective("topk", k=3, centred=False, aux=NONE),
}


@pytest.mark.parametrize("name", KINDS)
def test_finished_does_to_raw_what_training_did_to_scaled(name, relative):
    """Rows that are not unit and biases away from zero, so that every fold matters."""
    goal, rng = KINDS[name], np.random.default_rng(0)
    other = name == "transcoder"
    given = Recipe(goal, WIDTH, 32, 10 if other else WIDTH, 9, transcoder=other, unit_norm=False)
    x_ND, y_NO = (rng.normal(size=(20, d)).astype(np.float32) + 1 for d in (WIDTH, given.d_out))
    target_NO, scale, target_scale = (y_NO, 0.3, 4.0) if other else (x_ND, 0.3, 0.3)
    state = initial(given, scale * x_ND, 0, target_scale * target_NO)
    for leaf in state.params:
        noise = rng.normal(size=state.params[leaf].shape).astype(np.float32)
        state.params[leaf] += 0.2 * (np.abs(noise) if leaf == "threshold" else noise)
    batch = Batch(
        jnp.asarray(scale * x_ND), jnp.asarray(target_scale * target_NO), jnp.zeros(32, bool)
    )
    _, outcome = losses.loss(goal, state.params, batch)
    below = np.nextafter(outcome.smallest, 0, dtype=np.float32) * np.float32(1 - 1e-5)
    state = state._replace(threshold=jnp.asarray(below))
    made, params = finished(given, state, scale, target_scale if other else None)
    coder.check(made, params, name)
    f_NF, found_NO = coder.reconstruct(made, params, jnp.asarray(x_ND))
    assert np.array_equal((np.asarray(f_NF) != 0).sum(0), outcome.fires_F)
    assert relative(found_NO * target_scale, outcome.y_NO) < 1e-5
    assert made.architecture == {"batchtopk": "jumprelu", "matryoshka": "jumprelu"}.get(
        name, goal.kind
    )


def test_the_start():
    given = recipe(Objective("topk", k=3))
    x_ND = planted(1)[1][0]
    state, again, other = (jax.device_get(initial(given, x_ND, seed)) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), state, again))
    assert not np.array_equal(state.params["W_dec"], other.params["W_dec"])
    assert np.array_equal(state.params["W_enc"], state.params["W_dec"].T)
    away_ND = x_ND - state.params["b_dec"]  # at the median, the unit vectors to it cancel
    units_ND = away_ND / np.linalg.norm(away_ND, axis=1, keepdims=True)
    assert np.linalg.norm(units_ND.mean(0)) < 1e-4
    assert not np.allclose(state.params["b_dec"], x_ND.mean(0), atol=1e-4)


def test_an_uncentred_encoder_starts_at_its_median():
    x_ND = planted(1)[1][0]
    params = initial(recipe(Objective("topk", k=3, centred=False)), x_ND, 0).params
    at_F = step.geometric_median(x_ND) @ params["W_enc"] + params["b_enc"]
    assert np.abs(at_F).max() < 1e-5 < np.abs(params["b_enc"]).max()


def test_schedules():
    given = recipe(Objective("batchtopk", k=3, k_start=8), lr=None, warmup=10, k_warmup=4,
                   sparsity_warmup=5)  # fmt: skip
    top = 2e-4 / (32 / 2**14) ** 0.5
    rates = [float(given.rate(jnp.asarray(s))) / top for s in (0, 9, 200, 319, 360, 399)]
    assert np.allclose(rates, [0.1, 1, 1, 1, 0.5, 1 / 80])
    phases = [given.phase(jnp.asarray(s)) for s in (0, 1, 4, 9)]
    assert np.allclose([float(p.sparsity) for p in phases], [0.2, 0.4, 1, 1])
    assert np.allclose([float(p.extra) for p in phases], [1, 0.75, 0, 0])
    assert step.following(jnp.float32(0), jnp.float32(0.5)) == 0.5  # the first counts in full
    assert step.following(jnp.float32(0.7), jnp.float32(np.inf)) == np.float32(0.7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"transcoder": True}, "cannot be subtracted"),
        ({"d_out": 10}, "that is a transcoder"),
        ({"k_warmup": 5}, "both or neither"),
        ({"warmup": STEPS + 1}, "does not fit"),
        ({"dead_tokens": 0}, "dead_tokens"),
        ({"objective": Objective("topk", k=33)}, "32 features"),
    ],
)
def test_bad_recipes(change, words):
    fields = {"objective": Objective("topk", k=3), "d_in": WIDTH, "d_sae": 32, "d_out": WIDTH}
    with pytest.raises(InputError, match=words):
        Recipe(**(fields | {"steps": STEPS} | change)).check()


# Steps on one device, where chosen rows are added up, and on a mesh that splits rows and features.
SCRIPT = """
import jax, numpy as np
from core import sharding
from jax.sharding import PartitionSpec
from core.errors import InputError
from sae.training import step
from sae.training.losses import Objective
from sae.training.step import Recipe, initial, shardings, train_step
mesh = sharding.make_mesh(2, 2)
x_ND = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
goals = [Objective("matryoshka", k=3, widths=(8, 32)), Objective("jumprelu", sparsity=.1)]
for goal in goals:
    recipe = Recipe(goal, 8, 32, 8, 9, lr=1e-3, dead_tokens=32)
    one = initial(recipe, x_ND, 0)
    one = one._replace(silent_F=one.silent_F.at[5:9].set(32))
    four = jax.device_put(jax.tree.map(np.asarray, one), shardings(recipe, mesh))
    one, expected = train_step(recipe, one, x_ND)
    rows = jax.device_put(x_ND, sharding.over_rows(mesh))
    text = step._train_step.lower(recipe, False, four, rows, rows).compile().as_text()
    gathered = [line for line in text.splitlines() if " all-gather(" in line and ",32]" in line]
    assert not gathered, gathered
    four, found = train_step(recipe, four, rows)
    assert four.params["W_enc"].sharding.spec == PartitionSpec(None, "model")
    pairs = zip(jax.tree.leaves((one.opt_state, one[3:], expected)),
                jax.tree.leaves((four.opt_state, four[3:], found)), strict=True)
    for a, b in pairs:
        a, b = np.asarray(a, float), np.asarray(b, float)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), (a, b)
try:
    shardings(Recipe(Objective("topk", k=3), 8, 33, 8, 9), mesh)
except InputError as error:
    print(error)
"""


def test_four_devices_equal_one():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[3], capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("33 features do not divide")
