"""A classifier that was saved ranks another pool, and what it writes is a folder of scores."""

import dataclasses

import jax
import numpy as np
import pytest

from attribution.diagnostics import diagnose
from attribution.select import read_proponents, select
from core import families, ranks, safetensors, schema
from core.checkpoint import Loaded, fingerprint
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import read_json
from core.rows import load_rows
from core.rundir import open_run
from core.taps import parse
from evals.report.data import load_pool
from sae.coder import About, Coder, Sae
from sae.coder import fingerprint as sae_fingerprint
from sae.fingerprint import Settings as Kept
from sae.fingerprint import fingerprint as fingerprint_rows
from sae.fingerprint import read_fingerprints
from sae.predict import classifier
from sae.predict.apply import Lent, apply, publish
from sae.predict.baselines import pool
from sae.predict.classifier import NETWORK, Classifier
from sae.predict.classify import Settings, final, prepare
from tests.sae.predict import planted

N = planted.DOCUMENTS * planted.EACH
CHOSEN = {"mean": {"C": 0.1, "k": 8}, "binary": {"C": 0.1, "k": 12}, NETWORK: {"epochs": 40}}


@pytest.fixture(scope="module", autouse=True)
def optax_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def make(found, rows, scores_N, kind: str) -> Classifier:
    """A final fit of a kind, as if it had been the best."""
    inputs = prepare(found, pool(rows, scores_N, []), Settings(seeds=(0,)))
    told = [{"name": f"fingerprint {name}",
             "seeds": [{"validation": float(name == kind), "chosen": chosen}]}
            for name, chosen in CHOSEN.items()]  # fmt: skip
    return final(inputs, told)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two pools with their fingerprints and scores; features mean the same in both."""
    path = tmp_path_factory.mktemp("pools")
    both = []
    for seed in (0, 1):
        rows = planted.rows(path / f"rows{seed}", seed)
        has_NS = planted.presence(N, seed)
        found = planted.fingerprints(path / f"found{seed}", rows, has_NS)
        both.append((rows, found, has_NS.sum(1) + 0.3 * np.random.default_rng(seed).normal(size=N)))
    return both


@pytest.fixture(scope="module")
def classifiers(two):
    rows, found, scores_N = two[0]
    return {kind: make(found, rows, scores_N, kind) for kind in CHOSEN}


@pytest.mark.parametrize("kind", CHOSEN)
def test_another_pool_is_ranked_and_selected_from(two, classifiers, tmp_path, kind):
    (_, found, _), (other_rows, other, truth_N) = two
    made = classifiers[kind]
    classifier.save(tmp_path, made)
    loaded = classifier.load(tmp_path)
    assert loaded.about == made.about | {"format": "taproot-classifier"} | {
        "sha256": loaded.about["sha256"]
    }
    for pool_of in (found, other):
        np.testing.assert_array_equal(
            classifier.scores(loaded, pool_of), classifier.scores(made, pool_of)
        )
    out = tmp_path / "out"
    out.mkdir()
    summary = publish(out, other_rows, loaded, other, diagnose)
    proponents = read_proponents(out, other_rows)
    assert proponents.turn == 1 and summary["rows"] == N
    best_quarter = truth_N >= np.quantile(truth_N, 0.75)
    assert ranks.auc(proponents.mean_N, best_quarter) > (0.65 if kind == NETWORK else 0.9)
    select(out, other_rows, 20, "top", 0, tmp_path / "selected")
    chosen = load_rows(tmp_path / "selected")
    best = np.sort(np.argsort(-proponents.mean_N, kind="stable")[:20])
    assert chosen.column("pool_row") == best.tolist()
    np.testing.assert_array_equal(chosen.ids(0), other_rows.ids(best[0]))
    assert len(load_pool(out, "pool").score_N) == N  # what the page reads


def test_refusals(two, classifiers, tmp_path):
    (rows, found, _), (_, other, _) = two
    made = classifiers["binary"]

    def seen(**info):
        return dataclasses.replace(found, info=found.info | info)

    sae = found.info["sae"] | {"fingerprint": "t" * 64}
    cases = {
        "has sae tttttttttttt": seen(sae=sae),
        "has model nnnnnnnnnnnn": seen(model="n" * 64),
        "has tap resid_post.2": seen(tap="resid_post.2"),
        "has exclude": seen(exclude=[]),
        "keeps 11 features.* --k 12": seen(k=11),
    }
    for message, bad in cases.items():
        with pytest.raises(InputError, match=message):
            classifier.scores(made, bad)
    classifier.scores(made, seen(token_k=0))  # of which it knows nothing
    with pytest.raises(InputError, match="has token_k 0"):
        classifier.scores(classifiers[NETWORK], seen(token_k=0))
    with pytest.raises(InputError, match="rows differ"):
        publish(tmp_path, rows, made, other, diagnose)
    assert not list(tmp_path.iterdir())

    classifier.save(tmp_path, made)
    file = tmp_path / classifier.FILE
    tensors = {name: np.array(x) for name, x in safetensors.read(file).items()}
    about = safetensors.metadata(file)["about"]
    for broken in (
        {},
        {"about": "{}"},
        {"about": about.replace('"features": 300', '"features": 9')},
    ):
        safetensors.write(file, tensors, broken)
        with pytest.raises(InputError, match="no classifier of ours"):
            classifier.load(tmp_path)


@pytest.fixture(scope="module")
def real():
    """A model and an SAE of its last layer, both random."""
    config = ModelConfig("gpt2", 64, 24, 16, 1, 2, 32, 8)
    params = schema.init(families.rows(config), 1, 0)
    loaded = Loaded(config, params, None, fingerprint(config, params))
    random = np.random.default_rng(0)
    coder = Coder("topk", 16, 48, 16, k=4)
    weights = {
        "W_enc": random.normal(size=(16, 48)).astype(np.float32),
        "b_enc": np.zeros(48, np.float32),
        "W_dec": random.normal(size=(48, 16)).astype(np.float32),
        "b_dec": np.zeros(16, np.float32),
    }
    about = About("resid_post.0", "resid_post.0", None, "random", "saelens", {})
    return loaded, Sae(coder, weights, about, sae_fingerprint(coder, weights))


def test_the_command_fingerprints_scores_and_selects(real, tmp_path, monkeypatch):
    """From a model, rows and a classifier; killed in the middle it goes on."""
    loaded, sae = real
    rows, larger = (planted.rows(tmp_path / name, seed) for seed, name in enumerate("ab"))

    with open_run(tmp_path / "found", "sae fingerprint", {}) as run:
        tap = parse("resid_post.0", loaded.config)
        fingerprint_rows(run, loaded, rows, sae, tap, Kept(12, 0, 512), Execution())
        run.finish()
    found = read_fingerprints(tmp_path / "found")
    truth = found.statistics_NS[:, 4].astype(np.float64)  # any function of the features
    made = make(found, rows, truth, "mean")

    def go(out, k=30, sae=sae, loaded=loaded):
        with open_run(tmp_path / out, "sae apply", {"k": k}) as run:
            lent = Lent(diagnose, select)
            summary = apply(run, made, loaded, sae, larger, k, lent, Execution(), 512)
            run.finish()
        return summary

    assert go("out")["rows"] == N
    chosen = load_rows(tmp_path / "out" / "selected", loaded.config.vocab_size, 24)
    assert len(chosen) == 30 and read_proponents(tmp_path / "out", larger).turn == 1
    assert read_json(tmp_path / "out" / "info.json")["method"] == "sae-classifier"

    with monkeypatch.context() as patch:
        patch.setattr("sae.predict.apply.publish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go("again")
    go("again")
    one, two = (tmp_path / name / "scores.npy" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()

    with pytest.raises(InputError, match="--k 201 is more than the 200 rows"):
        go("refused", k=201)
    with pytest.raises(InputError, match="random has sae"):
        go("refused", sae=sae._replace(fingerprint="t" * 64))
    with pytest.raises(InputError, match="the model has model"):
        go("refused", loaded=loaded._replace(fingerprint="n" * 64))
    assert not (tmp_path / "refused").exists()
