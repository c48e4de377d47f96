"""Predicting from an SAE fingerprint whether attribution ranks a row high.

One forward pass and a small classifier in place of a gradient pass, if it is any good: so every
predictor is asked the same, on rows of documents it has not seen, beside what is known without an
SAE: length, loss, statistics, the mean hidden state, quality scores. For each seed the pool is
split anew (`splits`); everything a predictor learns or chooses is of the training and
validation rows (`predictors`, `attention`). `best` is, in each seed, the fingerprint's
predictor with the highest validation AUROC; `shuffled` is that one again, some times, with classes
shuffled among the rows of each part, and must not do better than chance. Results are means over
seeds of measures on each seed's test rows, with intervals over documents (`resampling`).

Dims: N rows, T test rows of a seed, C columns.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import atomic, write_json
from core.progress import Progress
from sae.fingerprint import Fingerprints
from sae.predict import attention, classifier, labels, predictors, resampling, splits, verdict
from sae.predict.baselines import Pool
from sae.predict.classifier import NETWORK, Classifier
from sae.predict.labels import Rule
from sae.predict.predictors import Answer, Question
from sae.predict.verdict import BEST, PREFIX, SHUFFLES


@dataclasses.dataclass(frozen=True)
class Settings:
    """label: which rows are proponents. seeds: of splits and networks. ks: how many features of a
    fingerprint count, one of them chosen on validation rows; (): as many as there are."""

    label: Rule = Rule("top", 0.25)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    ks: tuple[int, ...] = ()


class Inputs(NamedTuple):
    """Everything that is the same for all seeds. size: of `predictors.fit`."""

    fingerprints: Fingerprints
    pool: Pool
    settings: Settings
    ks: tuple[int, ...]
    labels: labels.Labels
    document_N: np.ndarray
    questions: tuple[Question, ...]
    size: int


def prepare(fingerprints: Fingerprints, pool: Pool, settings: Settings) -> Inputs:
    """All checks, before any work."""
    info = fingerprints.info
    if info["rows"]["sha"] != pool.sha:
        raise InputError(f"{fingerprints.path} is of {info['rows']['path']}, whose rows are not "
                         f"those that were scored, {pool.about['rows']['path']}; fingerprint those"
                         )  # fmt: skip
    if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
        raise InputError(f"--seeds {settings.seeds} must be one or more different numbers")
    ks = tuple(sorted(settings.ks)) or (info["k"],)
    if ks[-1] > info["k"]:
        raise InputError(f"--k {ks[-1]} is more than the {info['k']} features of a row that "
                         f"{fingerprints.path} keeps; give less, or fingerprint with more"
                         )  # fmt: skip
    scored_N = np.isfinite(pool.scores_N)
    found = labels.label(settings.label, pool.scores_N)
    document_N = splits.documents(pool.documents, len(scored_N))
    document_N = np.unique(np.where(scored_N, document_N, -1), return_inverse=True)[1]
    document_N = document_N - int(not scored_N.all())  # those without a scored row: -1
    questions = []
    for seed in settings.seeds:
        part_N = splits.split(document_N, scored_N, seed)
        splits.require_both(found.label_N, part_N, seed)
        questions.append(Question(found.label_N, part_N, seed))
    size = max(len(question.rows(splits.TRAIN)) for question in questions)
    return Inputs(fingerprints, pool, settings, ks, found, document_N, tuple(questions), size)


def asked(inputs: Inputs) -> dict[str, Callable[[Question], Answer]]:
    """Every predictor there is, the fingerprint's first, by the name it has in results."""
    found: dict[str, Callable[[Question], Answer]] = {}
    for name, view in classifier.readings(inputs.fingerprints).items():
        found[f"{PREFIX}{name}"] = functools.partial(
            predictors.answer_fingerprint, view, ks=inputs.ks, size=inputs.size
        )
    bags = classifier.bags(inputs.fingerprints, inputs.fingerprints.info["k"])
    found[f"{PREFIX}{NETWORK}"] = lambda question: attention.train(bags, question)[2]
    known = {
        "statistics": inputs.fingerprints.statistics_NS,
        "hidden mean": inputs.fingerprints.hidden_mean_ND,
    } | inputs.pool.columns
    for name, x_NC in known.items():
        if not isinstance(x_NC, str):
            found[name] = functools.partial(predictors.answer_columns, x_NC, size=inputs.size)
    return found


def shuffled(question: Question, actual_N: np.ndarray, i: int) -> tuple[Question, np.ndarray]:
    """The classes and scores of other rows of the same part; shuffle number i."""
    order_N = np.arange(len(actual_N))
    random = np.random.default_rng([question.seed, 0x5FF, i])
    for part in splits.PARTS:
        rows = np.flatnonzero(question.part_N == part)
        order_N[rows] = random.permutation(rows)
    return question._replace(label_N=question.label_N[order_N]), actual_N[order_N]


def run_seed(folder: Path, inputs: Inputs, question: Question, bar: Progress) -> None:
    """Ask every predictor; leaves `predictions-SEED.npz`, and last `predictions-SEED.json`."""
    test_T = np.flatnonzero(question.part_N == splits.TEST)
    arrays = {
        "row": test_T,
        "label": question.label_N[test_T],
        "score": inputs.pool.scores_N[test_T],
    }
    told: dict[str, Any] = {}

    def ask(name: str, one: Callable[[Question], Answer], question: Question) -> None:
        answer = one(question)
        arrays[name] = answer.logit_N[test_T]
        told[name] = {"validation": answer.validation, "chosen": answer.chosen}
        bar.update(1, seed=question.seed, predictor=name)

    known = asked(inputs)
    for name, one in known.items():
        ask(name, one, question)
    best = max((n for n in known if n.startswith(PREFIX)), key=lambda n: told[n]["validation"])
    arrays[BEST], told[BEST] = arrays[best], told[best] | {"predictor": best}
    for i, name in enumerate(SHUFFLES):
        other, actual_N = shuffled(question, inputs.pool.scores_N, i)
        ask(name, known[best], other)
        arrays |= {f"{name} label": other.label_N[test_T], f"{name} score": actual_N[test_T]}
    with atomic(folder / f"predictions-{question.seed}.npz") as file:
        np.savez(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
    write_json(folder / f"predictions-{question.seed}.json", told)


def final(inputs: Inputs, rows: Sequence[dict[str, Any]]) -> Classifier:
    """One fit on all labelled rows, of the kinds that did best on the seeds' validation rows.

    Hyperparameters are the lower medians of those the seeds chose, so no rows are held back.
    """
    label_N, info = inputs.labels.label_N, inputs.fingerprints.info
    part_N = np.where(label_N >= 0, splits.TRAIN, -1).astype(np.int8)
    question = Question(label_N, part_N, inputs.settings.seeds[0])
    found = {row["name"].removeprefix(PREFIX): row["seeds"] for row in rows
             if row["name"].startswith(PREFIX) and row["name"] != BEST}  # fmt: skip
    ranked = sorted(found, key=lambda n: -np.mean([seed["validation"] for seed in found[n]]))
    kind, linear = ranked[0], next(name for name in ranked if name != NETWORK)
    chosen = {
        name: {key: median_low(seed["chosen"][key] for seed in found[name])
               for key in found[name][0]["chosen"]}
        for name in dict.fromkeys((kind, linear))
    }  # fmt: skip
    view = classifier.readings(inputs.fingerprints)[linear].first(chosen[linear]["k"])
    fits, scale_F = predictors.fit_fingerprint(
        view, question, [chosen[linear]["C"]], len(question.rows(splits.TRAIN))
    )
    about = {
        "kind": kind,
        "linear": linear,
        "chosen": chosen,
        "k": chosen[linear]["k"] if kind == linear else info["k"],
        "features": info["sae"]["d_sae"],
        "needs": classifier.needs(info, kind),
        "sae": info["sae"],
        "label": str(inputs.settings.label),
        "trained_on": {"labelled": len(question.rows(splits.TRAIN)), **inputs.pool.about},
    }
    made = Classifier(about, fits[0], scale_F)
    if kind != NETWORK:
        return made
    network, wide_F, _ = attention.train(
        classifier.bags(inputs.fingerprints, info["k"]), question, chosen[NETWORK]["epochs"]
    )
    return made._replace(network=network, network_scale_F=wide_F)


def classify(
    folder: Path, fingerprints: Fingerprints, pool: Pool, settings: Settings
) -> dict[str, Any]:
    """Ask all predictors for all seeds; writes and returns `results.json`, and the classifier.

    A seed whose predictions are there already is not asked again. Raises InputError, before work,
    for fingerprints of other rows, too few documents, and a label rule that leaves a class empty.
    """
    inputs = prepare(fingerprints, pool, settings)
    todo = [q for q in inputs.questions if not (folder / f"predictions-{q.seed}.json").exists()]
    each = len(asked(inputs)) + len(SHUFFLES)
    done = each * (len(inputs.questions) - len(todo))
    with Progress(each * len(inputs.questions), "sae classify", "fit", done) as bar:
        for question in todo:
            run_seed(folder, inputs, question, bar)
    missing = {n: why for n, why in pool.columns.items() if isinstance(why, str)}
    rows = verdict.judge(folder, settings.seeds, inputs.document_N)
    rows += [{"name": name, "missing": why} for name, why in missing.items()]
    made = final(inputs, rows)
    classifier.save(folder, made)
    results = describe(inputs) | {"classifier": made.about, "predictors": rows}
    write_json(folder / "results.json", results)
    return results


def describe(inputs: Inputs) -> dict[str, Any]:
    """What was asked, of what, and how it is measured."""
    info, rule, label_N = inputs.fingerprints.info, inputs.settings.label, inputs.labels.label_N
    by_document, scored_N = inputs.pool.documents is not None, np.isfinite(inputs.pool.scores_N)
    return {
        "format": "taproot-classification",
        "label": {
            "rule": str(rule),
            "told": rule.told,
            "ties": labels.TIES,
            "tied": inputs.labels.tied,
            "positives": int((label_N == 1).sum()),
            "negatives": int((label_N == 0).sum()),
            "left_out": int((scored_N & (label_N < 0)).sum()),
            "not_scored": int((~scored_N).sum()),
        },
        "split": {
            "by": "doc" if by_document else "row",
            "documents": int(inputs.document_N.max()) + 1,
            "seeds": list(inputs.settings.seeds),
            "rows": [
                {name: int((question.part_N == part).sum())
                 for part, name in zip(splits.PARTS, splits.NAMES, strict=True)}
                for question in inputs.questions
            ],
        },
        "warnings": [] if by_document else [
            "the rows have no doc column, so rows of one document may be in training and test"
        ],
        "fingerprints": {key: info.get(key)
                         for key in ("sae", "model", "tap", "pooling", "k", "token_k", "exclude")},
        "unknown": {name: int((~np.isfinite(x_NC[scored_N, 0])).sum())
                    for name, x_NC in inputs.pool.columns.items() if not isinstance(x_NC, str)},
        **inputs.pool.about,
        "scores_sha": hashlib.sha256(inputs.pool.scores_N.astype("<f8").tobytes()).hexdigest(),
        "interval": "95 %, percentiles of the mean over seeds of the measure on each seed's test "
                    f"rows, over {resampling.DRAWS} draws of documents with replacement, the same "
                    "for all seeds and predictors",
    }  # fmt: skip
