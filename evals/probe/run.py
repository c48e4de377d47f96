"""Probes of some layers from rows or a text: sampled, read, fitted, judged beside baselines.

Dims: L taps, N samples, D width, V vocabulary.

Every probe stands beside what would look as good without it: saying "no" always; a table of what
follows each token (so much needs no context); the same probe for random labels of token types,
whose lead is its selectivity (Hewitt & Liang 2019); and the model's own probability of the target.
Thresholds are chosen on validation, measures are of the test part, intervals draw its documents.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from core import logistic, taps
from core.checkpoint import Loaded
from core.classification import TOLD, best_threshold, intervals, measure
from core.config import Execution
from core.errors import InputError
from core.logistic import Weighting
from core.taps import Tap
from evals.probe import activations, fit
from evals.probe.corpus import SPLITS, Corpus, Samples, Task, sample, split
from evals.probe.file import Probe
from evals.probe.target import Target
from tokenizers import Tokenizer

SMOOTHING = 1.0  # samples of the average kind that every token type starts with
RULE = "best balanced accuracy on validation; among equals nearest 0.5"
TRAIN, VALIDATION, TEST = range(3)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How probes are trained; see the options of `probe train`."""

    task: Task = "next"
    kind: Literal["linear", "mlp"] = "linear"
    samples: int = 2000
    sampling: Literal["balanced", "natural"] = "balanced"
    eval_tokens: int = 10_000
    weighting: Weighting = "none"
    cap: float = 5.0
    c: float | None = None
    seed: int = 0
    batch_tokens: int = 8192


class Plan(NamedTuple):
    """All that is fixed before the model runs: who is asked what, by `evals.probe.corpus`."""

    corpus: Corpus
    target: Target
    truth_S: np.ndarray
    split_S: np.ndarray
    samples: Samples

    @property
    def ids_N(self) -> np.ndarray:
        return self.corpus.ids_S[self.samples.place_N]


class Judged(NamedTuple):
    """The probes by tap, and what they are compared with: measures by name of the baseline."""

    probes: list[Probe]
    baselines: dict[str, dict[str, Any]]
    counts: dict[str, Any]


def plan(corpus: Corpus, target: Target, truth_S: np.ndarray, settings: Settings) -> Plan:
    """Split and sample; InputError for a text without enough cases."""
    split_S = split(corpus, truth_S, settings.seed)
    balanced = settings.sampling == "balanced"
    samples = sample(corpus, truth_S, split_S, target, settings.samples, balanced,
                     settings.eval_tokens, settings.seed)  # fmt: skip
    return Plan(corpus, target, truth_S, split_S, samples)


def run_probes(
    loaded: Loaded,
    tokenizer: Tokenizer,
    model: str,
    adapter: str,
    planned: Plan,
    at: tuple[Tap, ...],
    settings: Settings,
    execution: Execution,
) -> Judged:
    """Read all taps in one pass over the rows, fit all probes, judge them.

    model, adapter ("" for none): where they are, for whoever uses the files.
    """
    corpus, (place_N, positive_N, split_N) = planned.corpus, planned.samples
    asks_own = settings.task == "next" and planned.target.kind != "label"
    read = activations.read(loaded, execution, corpus, place_N, at, settings.batch_tokens,
                            split_N != TRAIN, planned.target if asks_own else None)  # fmt: skip
    parts = [np.flatnonzero(read.kept_N & (split_N == part)) for part in range(len(SPLITS))]
    for name, part in zip(SPLITS, parts, strict=True):
        if not 0 < positive_N[part].sum() < len(part):
            raise InputError(f"of the {name} part only batches that are not finite are left "
                             f"({read.skipped} skipped); use --dtype float32")  # fmt: skip
    x_of = [read.x_LND[:, part] for part in parts]
    y_of = [positive_N[part] for part in parts]
    weights_N = logistic.class_weights(y_of[TRAIN], settings.weighting, settings.cap)
    grid = fit.GRID if settings.c is None else (settings.c,)
    lines = fit.linear(x_of[TRAIN], y_of[TRAIN], weights_N, grid, x_of[VALIDATION],
                       y_of[VALIDATION])  # fmt: skip
    found = lines
    if settings.kind == "mlp":
        found = fit.mlp(x_of[TRAIN], y_of[TRAIN], weights_N, x_of[VALIDATION], y_of[VALIDATION],
                        settings.seed)  # fmt: skip
    controls = _controls(planned, settings, x_of, parts, lines)
    unit_N = corpus.unit_S[place_N[parts[TEST]]]
    counts = _counts(planned, read, parts)
    probes = []
    for layer, tap in enumerate(at):
        of_linear = _judge(lines[layer].tensors, layer, x_of, y_of)
        told = _judge(found[layer].tensors, layer, x_of, y_of) if found is not lines else of_linear
        p_N = fit.probability(found[layer].tensors, x_of[TEST][layer])
        limits = intervals(p_N, y_of[TEST], told["threshold"], unit_N, seed=settings.seed)
        control = controls[layer]
        if control is not None:
            lead = of_linear["balanced_accuracy"] - control["balanced_accuracy"]
            control = {**control, "selectivity": lead}
        beside = {"random_labels": control}
        if settings.kind == "mlp":
            beside["linear"] = of_linear
        about = _about(loaded, tokenizer, planned, tap, settings, execution)
        about |= {"model": model, "adapter": adapter}
        about |= {
            "fit": found[layer].how,
            "counts": counts,
            "threshold": told["threshold"],
            "metrics": told,
            "intervals": {name: limits[name] for name in TOLD},
            "interval_of": f"{corpus.by}s",
            "controls": beside,
        }
        probes.append(Probe(found[layer].tensors, about))
    return Judged(probes, _baselines(planned, parts, y_of, read.own_N, asks_own), counts)


def _judge(
    tensors: fit.Tensors, layer: int, x_of: Sequence[np.ndarray], y_of: Sequence[np.ndarray]
) -> dict[str, Any]:
    p_of = [fit.probability(tensors, x_LND[layer]) for x_LND in x_of[VALIDATION:]]
    return _measured(p_of[0], p_of[1], y_of)


def _measured(
    validation_N: np.ndarray, test_N: np.ndarray, y_of: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Measures of the test part at the threshold that validation chose."""
    threshold = best_threshold(validation_N, y_of[VALIDATION])
    assert threshold is not None, "both kinds are there"
    before = measure(validation_N, y_of[VALIDATION], threshold)
    return {
        **measure(test_N, y_of[TEST], threshold),
        "validation": {name: before[name] for name in TOLD},
    }


def _controls(
    planned: Plan,
    settings: Settings,
    x_of: Sequence[np.ndarray],
    parts: Sequence[np.ndarray],
    lines: Sequence[fit.Fitted],
) -> list[dict[str, Any] | None]:
    """Linear probes, as regular as the real ones, for labels thrown once for every token type."""
    coin_V = np.random.default_rng([settings.seed, 3]).random(int(planned.corpus.ids_S.max()) + 1)
    y_of = [coin_V[planned.ids_N[part]] < 0.5 for part in parts]
    if not all(0 < y_N.sum() < len(y_N) for y_N in y_of):
        return [None] * len(lines)
    c_L1 = [[line.how["c"]] for line in lines]
    ones_N = np.ones(len(parts[TRAIN]))
    found = fit.linear(x_of[TRAIN], y_of[TRAIN], ones_N, c_L1, x_of[VALIDATION], y_of[VALIDATION])
    told = [_judge(one.tensors, layer, x_of, y_of) for layer, one in enumerate(found)]
    return [{name: one[name] for name in ("balanced_accuracy", "auroc")} for one in told]


def _baselines(
    planned: Plan,
    parts: Sequence[np.ndarray],
    y_of: Sequence[np.ndarray],
    own_N: np.ndarray,
    asks_own: bool,
) -> dict[str, dict[str, Any]]:
    test = y_of[TEST]
    majority = float(max(test.mean(), 1 - test.mean()))
    found = {"majority": {"balanced_accuracy": 0.5, "auroc": 0.5, "accuracy": majority}}
    table_V = _table(planned)
    table_of = [table_V[planned.ids_N[part]] for part in parts]
    found["current_token"] = _measured(table_of[VALIDATION], table_of[TEST], y_of)
    own_of = [own_N[part] for part in parts]
    if asks_own and all(np.isfinite(p_N).all() for p_N in own_of[VALIDATION:]):
        found["own_probability"] = _measured(own_of[VALIDATION], own_of[TEST], y_of)
    return found


def _table(planned: Plan) -> np.ndarray:
    """p(yes | the token alone) [V], smoothed, from every token of the training part."""
    mine_S = (planned.split_S == TRAIN) & (planned.truth_S >= 0)
    size = int(planned.corpus.ids_S.max()) + 1
    ids_S, yes_S = planned.corpus.ids_S[mine_S], planned.truth_S[mine_S] == 1
    all_V = np.bincount(ids_S, minlength=size)
    yes_V = np.bincount(ids_S, yes_S.astype(np.float64), minlength=size)
    return (yes_V + SMOOTHING * yes_S.mean()) / (all_V + SMOOTHING)


def _counts(planned: Plan, read: activations.Read, parts: Sequence[np.ndarray]) -> dict[str, Any]:
    positive_N = planned.samples.positive_N
    unit_N = planned.corpus.unit_S[planned.samples.place_N]
    of_parts = {
        name: {
            "samples": len(part),
            "positives": int(positive_N[part].sum()),
            f"{planned.corpus.by}s": len(np.unique(unit_N[part])),
        }
        for name, part in zip(SPLITS, parts, strict=True)
    }
    counted = planned.truth_S >= 0
    prevalence = float((planned.truth_S[counted] == 1).mean())
    return {**of_parts, "tokens": int(counted.sum()), "prevalence": prevalence,
            "batches": read.batches, "skipped_batches": read.skipped}  # fmt: skip


def _about(
    loaded: Loaded,
    tokenizer: Tokenizer,
    planned: Plan,
    tap: Tap,
    settings: Settings,
    execution: Execution,
) -> dict[str, Any]:
    """What a probe file says besides how well it did."""
    target, corpus = planned.target, planned.corpus
    here = "t" if settings.task == "current" else "t + 1"
    return {
        "kind": settings.kind,
        "model_fingerprint": loaded.fingerprint,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "tap": str(tap),
        "layer": tap.layer,
        "indexing": "layers from 0; resid_post.L is the residual stream behind layer L, that of "
        "the last one too before the final norm (hidden_states[L + 1] of all others)",
        "task": settings.task,
        "rule": f"position t tells of token {here}",
        "target": {"kind": target.kind, "text": target.text, "ids": target.ids.tolist()},
        "dtype": execution.dtype,
        "context": int(corpus.lengths.max()),
        "data": {"split_by": corpus.by, "split_seed": settings.seed, "sha256": corpus.sha256},
        "sampling": settings.sampling,
        "weighting": settings.weighting,
        "weight_cap": settings.cap,
        "threshold_rule": RULE,
    }


def sites(text: str, site: str, config: Any) -> tuple[Tap, ...]:
    """The taps of --layers: auto, all, or numbers and `embed`, separated by commas.

    auto: the embedding, the first layer, the quartiles and the last; all: the embedding and every
    layer. The embedding goes with resid_post alone.
    """
    last = config.layers - 1
    if text in ("auto", "all"):
        quartiles = {0, config.layers // 4, config.layers // 2, 3 * config.layers // 4, last}
        layers = sorted(quartiles) if text == "auto" else range(config.layers)
        names = [*(["embed"] if site == "resid_post" else []), *map(str, layers)]
    else:
        names = list(dict.fromkeys(part.strip() for part in text.split(",")))
        for name in names:
            if name != taps.EMBED and not name.isdecimal():
                raise InputError(f"{name!r} is no layer; give auto, all, or numbers from 0 and "
                                 "embed, separated by commas")  # fmt: skip
    if site != "resid_post" and taps.EMBED in names:
        raise InputError(f"layer embed is of the residual stream; leave it out with --site {site}")
    found = [taps.parse(n if n == taps.EMBED else f"{site}.{n}", config) for n in names]
    return tuple(sorted(found, key=lambda tap: tap.layer))
