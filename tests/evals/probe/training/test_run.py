"""Probes of a small model: what must be found is found, what cannot be is not, and bits repeat."""

import jax
import numpy as np
import pytest

from core import model, ranks, taps
from core.classification import best_threshold, measure
from core.config import Execution
from core.errors import InputError
from evals.probe import fit
from evals.probe.activations import read
from evals.probe.corpus import from_text, truth
from evals.probe.run import Settings, plan, run_probes, sites
from evals.probe.target import token

EXECUTION = Execution()
ALL = (taps.Tap("embed", -1), taps.Tap("resid_post", 0), taps.Tap("resid_post", 1))


@pytest.fixture(scope="module")
def corpus(text, tokenizer):
    return from_text(text, tokenizer, 32)


@pytest.fixture(scope="module")
def ask(corpus, tokenizer):
    def ask(letter: str = "x", **changes):
        settings = Settings(samples=150, eval_tokens=400, batch_tokens=640, **changes)
        target = token(letter, tokenizer)
        truth_S = truth(corpus, target, settings.task, tokenizer, None)
        return plan(corpus, target, truth_S, settings), settings

    return ask


@pytest.fixture(scope="module")
def judged(ask, loaded, tokenizer):
    """Every layer, asked which token comes next."""
    planned, settings = ask()
    return run_probes(loaded, tokenizer, "here", "", planned, ALL, settings, EXECUTION)


@pytest.fixture(scope="module")
def place_N(ask):
    return ask()[0].samples.place_N


def read_places(loaded, corpus, place_N, tokenizer, batch_tokens=640):
    return read(loaded, EXECUTION, corpus, place_N, ALL, batch_tokens, np.ones(len(place_N), bool),
                token("x", tokenizer))  # fmt: skip


def test_reads_what_the_model_computes(loaded, corpus, place_N, tokenizer, close):
    found = read_places(loaded, corpus, place_N, tokenizer)
    assert found.kept_N.all() and found.skipped == 0 and found.batches > 1
    ids_BT = np.zeros((len(corpus.lengths), 32), np.int32)
    for i, length in enumerate(corpus.lengths):
        ids_BT[i, :length] = corpus.ids(i)
    variables = {"params": loaded.params}
    whole = jax.jit(taps.read, static_argnums=(0, 1, 4))(
        loaded.config, EXECUTION, variables, ids_BT, ALL
    )
    at = np.divmod(place_N, 32)
    close(found.x_LND, np.stack([np.asarray(x)[at] for x in whole]))
    logits_BTV = jax.jit(model.logits, static_argnums=(0, 1))(
        loaded.config, EXECUTION, variables, ids_BT
    )
    p_BTV = jax.nn.softmax(logits_BTV)
    close(found.own_N, np.asarray(p_BTV)[at][:, ord("x")])


def test_finds_what_is_there(judged):
    """x comes behind most q: a token's own state says so, as does a table of bigrams."""
    for probe in judged.probes:
        metrics = probe.about["metrics"]
        assert metrics["balanced_accuracy"] > 0.85 and metrics["auroc"] > 0.9
        low, high = probe.about["intervals"]["balanced_accuracy"]
        assert 0.8 < low <= metrics["balanced_accuracy"] <= high <= 1
        assert metrics["tn"] + metrics["fp"] + metrics["fn"] + metrics["tp"] == 400
        assert probe.about["fit"]["converged"] and probe.about["fit"]["c"] in fit.GRID
    assert judged.probes[0].about["metrics"]["auroc"] > 0.95
    assert judged.baselines["current_token"]["balanced_accuracy"] > 0.95
    assert judged.baselines["majority"]["balanced_accuracy"] == 0.5
    assert judged.baselines["majority"]["accuracy"] > 0.7
    assert 0.2 < judged.baselines["own_probability"]["auroc"] < 1, "random weights know little"
    assert judged.counts["train"]["samples"] == 300


def test_no_choice_has_seen_the_test_part(ask, judged, loaded, corpus, tokenizer, close):
    """Scaling is of training, the threshold of validation, the measures of the test part."""
    samples = ask()[0].samples
    x_LND = read_places(loaded, corpus, samples.place_N, tokenizer).x_LND
    train, check, test = (samples.split_N == part for part in range(3))
    for probe, x_ND in zip(judged.probes, x_LND, strict=True):
        close(probe.tensors["mean"], x_ND[train].mean(0, dtype=np.float64))
        close(probe.tensors["std"], x_ND[train].std(0, dtype=np.float64))
        p_N, about = probe.probability(x_ND), probe.about
        assert probe.threshold == best_threshold(p_N[check], samples.positive_N[check])
        found = measure(p_N[test], samples.positive_N[test], probe.threshold)
        assert found == {name: about["metrics"][name] for name in found}
        # scikit-learn's objective, at the C that was chosen: its gradient is zero.
        z_ND = (x_ND[train] - probe.tensors["mean"]) / probe.tensors["std"]
        off_N = p_N[train] - samples.positive_N[train]
        gradient_D = probe.tensors["coef"] + about["fit"]["c"] * off_N @ z_ND
        assert np.abs(gradient_D).max() < 1e-4 and abs(off_N.sum()) < 1e-2


def test_the_token_at_hand_is_in_its_embedding(ask, loaded, tokenizer):
    planned, settings = ask("c", task="current")
    found = run_probes(loaded, tokenizer, "", "", planned, ALL, settings, EXECUTION)
    assert found.probes[0].about["metrics"]["balanced_accuracy"] > 0.98
    assert found.probes[0].about["metrics"]["auroc"] > 0.99
    assert "own_probability" not in found.baselines
    assert found.baselines["current_token"]["auroc"] == 1


def test_the_same_bits_again_alone_and_in_another_company(ask, judged, loaded, tokenizer):
    planned, settings = ask()
    again = run_probes(loaded, tokenizer, "here", "", planned, ALL, settings, EXECUTION)
    for one, two in zip(judged.probes, again.probes, strict=True):
        assert one.about == two.about
        assert all((one.tensors[name] == two.tensors[name]).all() for name in one.tensors)
    alone = run_probes(loaded, tokenizer, "here", "", planned, ALL[1:2], settings, EXECUTION)
    expected = judged.probes[1].about["metrics"]
    assert alone.probes[0].about["metrics"]["auroc"] == pytest.approx(expected["auroc"], abs=1e-4)


def test_a_planted_direction_is_found_and_noise_is_not():
    random = np.random.default_rng(0)
    x_LND = random.normal(size=(2, 1800, 20)).astype(np.float32) * 7 + 3
    positive_N = (x_LND[0, :, 4] - x_LND[0, :, 9]) > 5  # in layer 0 alone
    train, check, test = slice(0, 900), slice(900, 1350), slice(1350, 1800)
    data = (x_LND[:, train], positive_N[train], np.ones(900))
    judge = (x_LND[:, check], positive_N[check])
    for probes in (fit.linear(*data, fit.GRID, *judge), fit.mlp(*data, *judge, seed=0)):
        p_LN = [fit.probability(p.tensors, x_LND[i, test]) for i, p in enumerate(probes)]
        found, nothing = (ranks.auc(p_N, positive_N[test]) for p_N in p_LN)
        assert found > 0.97 and abs(nothing - 0.5) < 0.1
        assert all(x.dtype == np.float32 for p in probes for x in p.tensors.values())
    weights_D = fit.linear(*data, [1e-1], *judge)[0].tensors["coef"]
    assert set(np.argsort(-np.abs(weights_D))[:2]) == {4, 9}


def test_an_mlp_finds_what_no_plane_parts():
    random = np.random.default_rng(0)
    x_LND = random.normal(size=(1, 900, 4)).astype(np.float32)
    positive_N = x_LND[0, :, 0] * x_LND[0, :, 1] > 0
    data = (x_LND[:, :600], positive_N[:600], np.ones(600))
    judge = (x_LND[:, 600:], positive_N[600:])
    (line,), (net,) = fit.linear(*data, [1.0], *judge), fit.mlp(*data, *judge, seed=0)
    right = [((fit.probability(p.tensors, x_LND[0, 600:]) > 0.5) == positive_N[600:]).mean()
             for p in (line, net)]  # fmt: skip
    assert right[0] < 0.65 and right[1] > 0.85
    again = fit.mlp(*data, *judge, seed=0)[0]
    assert all((again.tensors[name] == net.tensors[name]).all() for name in net.tensors)


def test_scaling_of_constant_features():
    x_LND = np.full((1, 5, 2), 3.0, np.float32)
    x_LND[0, :, 1] = [1, 2, 3, 4, 5]
    mean_LD, std_LD = fit.scaling(x_LND)
    assert mean_LD.tolist() == [[3, 3]] and std_LD[0, 0] == 1
    assert std_LD[0, 1] == pytest.approx(2**0.5)


def test_batches_that_are_not_finite_are_skipped(loaded, corpus, place_N, tokenizer):
    """A token without a finite embedding spoils the batch that reads it, and no other."""
    params = jax.tree.map(np.array, loaded.params)
    row_N = place_N // 32
    params["embed"]["wte"][ord("z")] = np.nan
    spoiled = corpus._replace(ids_S=np.where(corpus.row_S == row_N[0], ord("z"), corpus.ids_S))
    found = read_places(loaded._replace(params=params), spoiled, place_N, tokenizer, 64)
    assert found.skipped == 1 < found.batches
    assert not found.kept_N[row_N == row_N[0]].any()
    assert found.kept_N.mean() > 0.9
    assert np.isfinite(found.x_LND[:, found.kept_N]).all()
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), loaded.params)
    with pytest.raises(InputError, match="not finite in every batch"):
        read_places(loaded._replace(params=broken), corpus, place_N, tokenizer)


def test_memory_is_asked_first(loaded, corpus, place_N, tokenizer, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 64)
    with pytest.raises(InputError, match=r"lower --samples or --eval-tokens"):
        read_places(loaded, corpus, place_N, tokenizer)


def test_layers(loaded):
    config = loaded.config

    def names(text, site="resid_post"):
        return [str(tap) for tap in sites(text, site, config)]

    assert names("all") == ["embed", "resid_post.0", "resid_post.1"] == names("auto")
    assert names("1,embed,1") == ["embed", "resid_post.1"]
    assert names("auto", "mlp_out") == ["mlp_out.0", "mlp_out.1"]
    for text, site in (("2", "resid_post"), ("x", "resid_post"), ("embed", "mlp_in")):
        with pytest.raises(InputError):
            sites(text, site, config)
    for text in ("", "1,,0", "-1", "resid_post.1"):
        with pytest.raises(InputError, match=r"is no layer; give auto, all, or numbers"):
            sites(text, "resid_post", config)
