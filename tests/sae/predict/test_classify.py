"""`sae classify` finds what was planted, nothing where nothing is, and looks at no test row."""

import shutil

import jax
import numpy as np
import pytest

from core import ranks
from core.errors import InputError
from core.files import read_json, read_npz
from sae.fingerprint import read_fingerprints
from sae.predict import classifier, labels, resampling, splits, verdict
from sae.predict.baselines import pool
from sae.predict.classify import Settings, classify, describe, prepare, shuffled
from sae.predict.predictors import answer_fingerprint
from tests.sae.predict import planted

N = planted.DOCUMENTS * planted.EACH
SETTINGS = Settings(seeds=(0, 1))
QUALITIES = [["poor", "average", "Good", None][i * 7 % 11 % 4] for i in range(N)]
LOSSES = [{"row": i, "loss": float(i * 37 % 101)} for i in range(N)]


def test_label_rules():
    scores_N = np.array([5.0, 1, np.nan, 3, 4, 2, 0, 7, 6])
    assert labels.label(labels.parse("top:0.25"), scores_N).label_N.tolist() == [
        0, 0, -1, 0, 0, 0, 0, 1, 1
    ]  # fmt: skip
    quantile = labels.parse("quantile:0.25")
    assert labels.label(quantile, scores_N).label_N.tolist() == [-1, 0, -1, -1, -1, -1, 0, 1, 1]
    assert str(quantile) == "quantile:0.25" and "middle left out" in quantile.told
    tied = labels.label(labels.parse("top:0.5"), np.array([1.0, 2, 2, 2]))
    assert tied.label_N.tolist() == [0, 1, 1, 0] and tied.tied == 3
    for text in ("top", "top:1", "top:0", "top:nan", "quantile:0.6", "best:0.1", "top:x"):
        with pytest.raises(InputError, match="no label rule"):
            labels.parse(text)
    with pytest.raises(InputError, match="leaves a class empty"):
        labels.label(labels.parse("top:0.01"), scores_N)
    with pytest.raises(InputError, match="no rank to predict"):
        labels.label(labels.parse("top:0.5"), np.ones(8))


def test_documents_never_straddle():
    names = [f"d{i // 3}" for i in range(30)]
    document_N = splits.documents([*names, None, None], 32)
    assert len(set(document_N.tolist())) == 12 and document_N[30] != document_N[31]
    used_N = np.arange(32) != 4
    found = [splits.split(document_N, used_N, seed) for seed in range(5)]
    for part_N in found:
        assert part_N[4] == -1
        for document in range(12):
            assert len(set(part_N[(document_N == document) & used_N].tolist())) == 1
        assert [len(set(document_N[part_N == part])) for part in splits.PARTS] == [8, 2, 2]
    assert len({part_N.tobytes() for part_N in found}) == 5
    with pytest.raises(InputError, match="2 documents"):
        splits.split(np.arange(9) // 5, np.ones(9, bool), 0)


def test_weights_count_rows_as_repeats_do():
    random, n = np.random.default_rng(0), 40
    scores_N = random.integers(0, 12, n).astype(float)  # with ties
    actual_N = scores_N + random.integers(-4, 5, n)
    label_N = random.integers(-1, 2, n)
    document_N = np.arange(n) // 4
    counts_RG = resampling.draws(10, count=20)
    found = resampling.measure(scores_N, label_N, actual_N, document_N, counts_RG)
    for r, counts_G in enumerate(counts_RG):
        chosen = np.repeat(np.arange(n), counts_G[document_N])
        kept = chosen[label_N[chosen] >= 0]
        positive, score = label_N[kept] == 1, scores_N[kept]
        assert found.auroc[r] == pytest.approx(ranks.auc(score, positive))
        assert found.spearman[r] == pytest.approx(
            ranks.spearman(scores_N[chosen], actual_N[chosen])
        )
        # The mean over positives of the share of positives among rows at least as high.
        precisions = [positive[score >= s].mean() for s in score[positive]]
        assert found.ap[r] == pytest.approx(np.mean(precisions))
    assert counts_RG[0].tolist() == [1] * 10 and (counts_RG.sum(1) == 10).all()


def test_a_constant_predictor_is_chance_and_has_no_correlation():
    n, counts_RG = 12, resampling.draws(12, count=50)
    found = resampling.measure(np.ones(n), np.arange(n) % 2, np.arange(n), np.arange(n), counts_RG)
    assert np.isnan(resampling.estimate(found.spearman)).all()
    assert resampling.estimate(found.auroc) == (0.5, 0.5, 0.5)
    assert found.ap[0] == 0.5


def test_intervals_cover():
    """Of AUROCs whose truth is known, about 95 % lie within; rows of a document go together."""
    covered = 0
    for trial in range(100):
        random = np.random.default_rng(trial)
        document_N = np.repeat(np.arange(60), 3)
        shift_N = random.integers(0, 2, 60)[document_N]  # a document is of one class
        scores_N = shift_N + random.normal(size=60)[document_N]
        counts_RG = resampling.draws(60, count=200)
        auroc = resampling.measure(scores_N, shift_N, scores_N, document_N, counts_RG).auroc
        estimate = resampling.estimate(auroc)
        covered += estimate.low <= 0.7602 <= estimate.high  # Phi(1 / sqrt 2)
    assert 88 <= covered <= 99


@pytest.fixture(scope="module", autouse=True)
def optax_promotion():
    """As `standard_promotion`, around the fixtures below too."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Rows, their fingerprints, the scores planted in them, and the best one could know."""
    path = tmp_path_factory.mktemp("planted")
    rows = planted.rows(path / "rows", quality=QUALITIES)
    has_NS = planted.presence(N)
    known_N = has_NS.sum(1).astype(float)
    scores_N = known_N + 0.7 * np.random.default_rng(3).normal(size=N)
    found = planted.fingerprints(path / "fingerprints", rows, has_NS)
    return rows, found, scores_N, known_N


@pytest.fixture(scope="module")
def results(pools, tmp_path_factory):
    rows, found, scores_N, _ = pools
    folder = tmp_path_factory.mktemp("classified")
    told = classify(folder, found, pool(rows, scores_N, LOSSES, ["quality"]), SETTINGS)
    return folder, {row["name"]: row for row in told["predictors"]}, told


def test_what_was_planted_is_found(pools, results):
    _, _, scores_N, known_N = pools
    folder, rows, told = results
    label_N = labels.label(SETTINGS.label, scores_N).label_N
    possible = ranks.auc(known_N, label_N == 1)
    best = rows[verdict.BEST]
    assert possible > 0.85 and best["auroc"]["value"] > possible - 0.06
    assert best["auroc"]["low"] <= possible
    assert best["spearman"]["value"] > 0.6
    noise = ("length", "loss", "statistics", "hidden mean", "quality quality")
    for name in noise:
        less = rows[name]["best_less_this"]
        for measure in verdict.MEASURES:
            assert less[measure]["low"] > 0, (name, measure)
        assert less["auroc"]["value"] == pytest.approx(
            best["auroc"]["value"] - rows[name]["auroc"]["value"]
        )
        assert abs(rows[name]["auroc"]["value"] - 0.5) < 0.2
    assert abs(rows[verdict.SHUFFLED]["auroc"]["value"] - 0.5) < 0.2  # of few rows, see below
    assert {name for name in rows if name.startswith(verdict.PREFIX)} == {
        f"{verdict.PREFIX}{name}" for name in ("mean", "max", "binary", "network", "best")
    }
    assert told == read_json(folder / "results.json")
    assert told["unknown"] == {"length": 0, "loss": 0, "quality quality": QUALITIES.count(None)}


def test_shuffled_classes_are_not_learned(pools):
    rows, found, scores_N, _ = pools
    inputs = prepare(found, pool(rows, scores_N, []), Settings(seeds=tuple(range(12))))
    view, aurocs = classifier.readings(found)["mean"], []
    for question in inputs.questions:
        other, actual_N = shuffled(question, scores_N, 0)
        for part in splits.PARTS:
            members = question.part_N == part
            assert sorted(actual_N[members]) == sorted(scores_N[members])
        answer = answer_fingerprint(view, other, inputs.ks, inputs.size)
        tested = other.rows(splits.TEST)
        aurocs.append(ranks.auc(answer.logit_N[tested], other.positive(tested)))
    assert abs(np.mean(aurocs) - 0.5) < 4 * 0.11 / 12**0.5, "0.11 is the deviation of one"


def test_the_best_is_chosen_on_validation_rows(results):
    folder, rows, _ = results
    for i, seed in enumerate(SETTINGS.seeds):
        arrays = read_npz(folder / f"predictions-{seed}.npz")
        chosen = rows[verdict.BEST]["seeds"][i]["predictor"]
        np.testing.assert_array_equal(arrays[verdict.BEST], arrays[chosen])
        validations = [row["seeds"][i]["validation"] for name, row in rows.items()
                       if name.startswith(verdict.PREFIX)]  # fmt: skip
        assert rows[chosen]["seeds"][i]["validation"] == max(validations)
        # Test rows of a seed: 10 of 50 documents.
        assert len(arrays["row"]) == 40 and (np.bincount(arrays["row"] // 4) % 4 == 0).all()
        assert rows[chosen]["seeds"][i]["auroc"] == pytest.approx(
            ranks.auc(arrays[chosen], arrays["label"] == 1)
        )


def test_the_table_says_what_was_asked(results):
    lacking = {"name": "loss", "missing": "not recorded; do so"}
    constant = results[1]["length"] | {"spearman": dict.fromkeys(("value", "low", "high"))}
    told = results[2] | {"predictors": [*results[2]["predictors"], lacking, constant]}
    table = verdict.table(told)
    for text in (
        "top:0.25: the highest 25 % of the scores against all the rest",
        "50 and 150 rows, so AP is 0.250 by chance",
        "split by doc: 50 documents",
        "hidden mean",
        "best is better",
        verdict.SHUFFLED,
        "loss: not recorded; do so",
    ):
        assert text in table, text


def test_weights_of_the_classifier_are_those_of_what_was_planted(results):
    made = classifier.load(results[0])
    assert set(np.argsort(-made.linear.weight)[: planted.SIGNAL]) == set(range(planted.SIGNAL))
    assert made.about["label"] == "top:0.25" and made.about["kind"] in made.about["chosen"]


def test_a_killed_run_goes_on_and_ends_the_same(pools, results, tmp_path):
    rows, found, scores_N, _ = pools
    folder = tmp_path / "again"
    shutil.copytree(results[0], folder)
    for name in ("results.json", classifier.FILE, "predictions-1.json"):
        (folder / name).unlink()
    (folder / "predictions-1.npz").write_text("cut")
    kept = (folder / "predictions-0.npz").stat().st_mtime_ns
    classify(folder, found, pool(rows, scores_N, LOSSES, ["quality"]), SETTINGS)
    assert (folder / "predictions-0.npz").stat().st_mtime_ns == kept
    for name in ("results.json", classifier.FILE, "predictions-1.json"):
        assert (folder / name).read_bytes() == (results[0] / name).read_bytes(), name
    one, two = (read_npz(f / "predictions-1.npz") for f in (folder, results[0]))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


def test_who_wrote_a_row_tells_nothing(tmp_path):
    """Scores are the documents' own; each has a feature. Only rows split as such would show it."""
    document_N = np.repeat(np.arange(planted.DOCUMENTS), planted.EACH)
    scores_N = np.random.default_rng(0).normal(size=planted.DOCUMENTS)[document_N]
    settings, aurocs = Settings(labels.parse("quantile:0.5"), (0,)), []
    for named in (True, False):
        rows = planted.rows(tmp_path / f"rows{named}", named=named)
        has_NS, path = np.zeros((N, 1), bool), tmp_path / f"found{named}"
        found = planted.fingerprints(path, rows, has_NS, tokens=False)
        inputs = prepare(found, pool(rows, scores_N, []), settings)
        assert len(describe(inputs)["warnings"]) == (not named)
        view = classifier.readings(found)["mean"].first(1)._replace(index_NK=document_N[:, None])
        (question,) = inputs.questions
        answer = answer_fingerprint(view, question, (1,), inputs.size)
        tested = question.rows(splits.TEST)
        aurocs.append(ranks.auc(answer.logit_N[tested], question.positive(tested)))
    assert aurocs[0] == 0.5, "no test row has a feature of the vocabulary"
    assert aurocs[1] > 0.9


def test_rows_that_were_no_candidates_are_left_out(pools):
    rows, found, scores_N, _ = pools
    scores_N = np.where(np.arange(N) % 8 < 6, scores_N, np.nan)  # half of every other document
    given = pool(rows, scores_N, [])
    assert "`attribute score`" in given.columns["loss"]
    inputs = prepare(found, given, Settings(labels.parse("quantile:0.3"), (3,), (8, 24)))
    told = describe(inputs)["label"]
    assert told | {"told": ""} == {
        "rule": "quantile:0.3", "told": "", "ties": labels.TIES, "tied": 0,
        "positives": 45, "negatives": 45, "left_out": 60, "not_scored": 50,
    }  # fmt: skip
    (question,) = inputs.questions
    assert (question.part_N == -1).tolist() == np.isnan(scores_N).tolist()
    assert inputs.size == len(question.rows(splits.TRAIN)) < (question.part_N == splits.TRAIN).sum()
    view = classifier.readings(found)["mean"]
    answer = answer_fingerprint(view, question, inputs.ks, 120)
    each = [answer_fingerprint(view, question, (k,), 120) for k in inputs.ks]
    assert answer.validation == max(one.validation for one in each)
    assert answer.chosen in [one.chosen for one in each]


def test_refusals(pools, tmp_path):
    rows, found, scores_N, _ = pools
    other = planted.rows(tmp_path / "other", seed=1)
    given = pool(rows, scores_N, [])
    cases = {
        "not those that were scored": (pool(other, scores_N, []), SETTINGS),
        "--k 25 is more than the 24": (given, Settings(seeds=(0,), ks=(4, 25))),
        "different numbers": (given, Settings(seeds=(1, 1))),
        "part of seed 0 has no proponents": (given, Settings(labels.parse("top:0.005"), (0,))),
        "no rank to predict": (pool(rows, np.zeros(N), []), SETTINGS),
        "2 documents": (given._replace(documents=["a", "b"] * (N // 2)), SETTINGS),
    }
    for message, (bad, settings) in cases.items():
        with pytest.raises(InputError, match=message):
            classify(tmp_path, found, bad, settings)
    assert {f.name for f in tmp_path.iterdir()} == {"other"}, "nothing is written before"
    with pytest.raises(InputError, match="no column 'rank'"):
        pool(rows, scores_N, [], ["rank"])
    with pytest.raises(InputError, match="what is no quality.*'d0'"):
        pool(rows, scores_N, [], ["doc"])
    with pytest.raises(InputError, match="no finished fingerprints"):
        read_fingerprints(tmp_path)
    with pytest.raises(InputError, match="holds no classifier"):
        classifier.load(tmp_path)


def test_a_quality_of_a_known_name_is_compared_with_unasked(tmp_path):
    rows = planted.rows(tmp_path / "rows", quality=QUALITIES)
    for asked in ([], ["quality"]):
        assert "quality quality" in pool(rows, np.zeros(len(rows)), [], asked).columns
    plain = planted.rows(tmp_path / "plain")
    assert [*pool(plain, np.zeros(len(plain)), []).columns] == ["length", "loss"]
