"""Losses and gradients of every kind of SAE: SAELens's numbers, and what they should do besides."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import InputError
from sae.training import chosen, losses
from sae.training.losses import OPENAI, Batch, Objective, Phase
from sae.training.step import following

GOLDEN = Path(__file__).parents[2] / "golden" / "sae" / "train"
CASES = sorted(GOLDEN.glob("*.npz"))
NAMES = {
    "mse": "mse_loss", "l1": "l1_loss", "l0": "l0_loss", "pre_act": "pre_act_loss",
    "aux": "auxiliary_reconstruction_loss",
}  # fmt: skip
loss_and_grad = jax.jit(
    jax.value_and_grad(losses.loss, argnums=1, has_aux=True), static_argnums=(0, 3)
)
largest = jax.jit(chosen.largest, static_argnums=2)


def objective(about):
    """Of SAELens's configuration; where it is silent, with the defaults of 6.54."""
    kind, c = about["arch"].removesuffix("_batchtopk"), about["cfg"]
    return Objective(
        kind, k=c.get("k", 0), rescale=c.get("rescale_acts_by_decoder_norm", kind in losses.RANKED),
        sparsity=sum(about["coefficients"].values()), p=c.get("lp_norm", 1.0),
        l0=c.get("jumprelu_sparsity_loss_mode", "step"), target_l0=c.get("target_l0") or 0.0,
        bandwidth=c.get("jumprelu_bandwidth", 0.05), to_input=c.get("jumprelu_ste_to_input", False),
        pre_act=c.get("pre_act_loss_coefficient") or 0.0,
        widths=tuple(c.get("matryoshka_widths", ())),
        aux_by_prefix=c.get("use_matryoshka_aux_loss", False),
    )  # fmt: skip


def problem(d_in=6, d_sae=20, d_out=6, rows=8, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "W_enc": rng.normal(size=(d_in, d_sae)), "W_dec": rng.normal(size=(d_sae, d_out)),
        "b_dec": rng.normal(size=d_out), "b_enc": rng.normal(size=d_sae),
    }  # fmt: skip
    params = {name: jnp.asarray(value, jnp.float32) for name, value in params.items()}
    x_ND, y_NO = (jnp.asarray(rng.normal(size=(rows, d)), jnp.float32) for d in (d_in, d_out))
    return params, Batch(x_ND, y_NO, jnp.asarray(rng.random(d_sae) < 0.5))


def test_there_are_cases():
    assert len(CASES) >= 15, f"{len(CASES)} cases in {GOLDEN}"


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_saelens(case, relative):
    with np.load(case) as file:
        golden = dict(file)
    goal = objective(json.loads(case.with_suffix(".json").read_text()))
    params = {
        name.removeprefix("param."): jnp.asarray(value, jnp.float32)
        for name, value in golden.items()
        if name.startswith("param.") and name != "param.topk_threshold"
    }
    x_ND = jnp.asarray(golden["x"], jnp.float32)
    batch = Batch(x_ND, x_ND, jnp.asarray(golden["dead_mask"]))
    # Both ways of adding up chosen features; once more is a compilation, so not in every case.
    ways = [False, True] if case.stem in ("topk_few_dead", "matryoshka_aux") else []
    for sparse in ways or [False]:
        (total, outcome), grads = loss_and_grad(goal, params, batch, sparse)
        assert relative(total, golden["total_loss"]) < 2e-5
        found = {
            f"loss.{NAMES.get(name) or 'inner_mse_loss_' + name.removeprefix('mse_')}": value
            for name, value in outcome.terms.items()
        }
        assert found.keys() == {name for name in golden if name.startswith("loss.")}
        for name, value in found.items():
            assert abs(value - golden[name]) <= 2e-5 * max(1, golden[name]), name
        assert relative(outcome.y_NO, golden["sae_out"]) < 5e-5
        assert np.array_equal(outcome.fires_F, (golden["acts"] != 0).sum(0))
        for name in params:
            assert relative(grads[name], golden[f"grad.{name}"]) < 1e-4, name
        if "after.topk_threshold" in golden:
            before = jnp.asarray(golden["param.topk_threshold"], jnp.float32)
            after = following(before, outcome.smallest)
            assert relative(after, golden["after.topk_threshold"]) < 1e-6


def test_both_ways_agree_while_k_comes_down(close):
    """A transcoder, whose k stands between its start and its end."""
    params, batch = problem(d_out=5)
    goal = Objective("batchtopk", k=2, k_start=6, centred=False)
    batch = batch._replace(phase=Phase(1.0, jnp.float32(0.5)))
    dense, sparse = (loss_and_grad(goal, params, batch, way) for way in (False, True))
    (total, outcome), grads = dense
    (_, other), others = sparse
    assert total == sum(outcome.terms.values()) and outcome.smallest == other.smallest
    close((outcome[:3], grads), (other[:3], others), 2e-6)
    h_NF = batch.x_ND @ params["W_enc"] + params["b_enc"][None]
    chosen_NF = largest(h_NF, jnp.int32(4 * 8), True) & (h_NF > 0)
    assert np.array_equal(outcome.fires_F, chosen_NF.sum(0))


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("now", [0, 1, 5, 12])
def test_largest_takes_the_first_of_equals(of_batch, now):
    rng = np.random.default_rng(now)
    rank_NF = rng.integers(-3, 3, (7, 12)).astype(np.float32)
    rank_NF[2] = -np.inf
    lines = rank_NF.reshape(1, -1) if of_batch else rank_NF
    expected = np.zeros_like(lines, bool)
    np.put_along_axis(expected, np.argsort(-lines, axis=1, kind="stable")[:, :now], True, 1)
    found = largest(jnp.asarray(rank_NF), jnp.int32(now), of_batch)
    assert np.array_equal(found, expected.reshape(7, 12))


def test_auxk_as_published(relative):
    """By hand: the three largest dead features, rectified, over what is left over's variance."""
    params, batch = problem()
    params["b_enc"] -= 2
    goal = Objective("topk", k=3, centred=False, aux=OPENAI)
    (_, outcome), _ = loss_and_grad(goal, params, batch, False)
    left_NO = np.asarray(batch.target_NO - outcome.y_NO)
    params = {name: np.asarray(value) for name, value in params.items()}
    h_NF = np.asarray(batch.x_ND) @ params["W_enc"] + params["b_enc"]
    dead_F = np.asarray(batch.dead_F)
    cut_N1 = np.sort(np.where(dead_F, h_NF, -np.inf), axis=1)[:, -3:-2]
    v_NF = np.where(dead_F & (h_NF >= cut_N1), h_NF, 0)

    assert (v_NF < 0).any() and dead_F.sum() > 3
    parts = np.maximum(v_NF, 0) @ params["W_dec"] - left_NO, left_NO - left_NO.mean(0)
    apart, spread = ((a_NO**2).sum(1).mean() for a_NO in parts)
    assert relative(outcome.terms["aux"], apart / spread / 32) < 1e-5


def test_gradients_are_derivatives(x64):
    """The gated losses, smooth almost everywhere, by central differences in float64."""
    params, batch = problem()
    rng = np.random.default_rng(1)
    bias_F = params.pop("b_enc")
    params |= {"b_gate": bias_F, "b_mag": bias_F, "r_mag": 0.1 * bias_F}
    params = jax.tree.map(lambda x: x.astype(float), params)
    batch = Batch(batch.x_ND.astype(float), batch.target_NO.astype(float), batch.dead_F)
    goal = Objective("gated", sparsity=0.3)
    way = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in params.items()}

    def total(share):
        moved = {name: params[name] + share * way[name] for name in params}
        return loss_and_grad(goal, moved, batch, False)

    slope = sum((total(0.0)[1][name] * way[name]).sum() for name in params)
    step = 1e-6
    difference = (total(step)[0][0] - total(-step)[0][0]) / (2 * step)
    assert abs(difference - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (Objective("topk"), "k is 0"),
        (Objective("topk", k=21), "20 features"),
        (Objective("topk", k=2.5), "whole number"),
        (Objective("batchtopk", k=8, k_start=4), "comes down"),
        (Objective("standard"), "sparsity coefficient 0"),
        (Objective("standard", sparsity=1, rescale=True), "leave it out"),
        (Objective("jumprelu", sparsity=1, l0="quadratic"), "target"),
        (Objective("batchtopk", k=2, widths=(5, 20)), "prefixes"),
        (Objective("matryoshka", k=2, widths=(5, 10)), "end at the 20"),
        (Objective("matryoshka", k=2, widths=(10, 10, 20)), "must rise"),
    ],
)
def test_bad_objectives(goal, words):
    with pytest.raises(InputError, match=words):
        goal.check(20)
