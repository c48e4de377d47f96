"""Ranking a pool by its fingerprints alone, in the place of attribution.

What comes out is a folder of scores as `attribute score` writes them, larger = stronger proponent,
so that whatever selects, reports or compares by score reads it: `scores.npy` float32 [N],
`info.json`, and what `Door` lends of the room of attribution. Beside them the fingerprints.

Dims: N rows.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import taps
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import write_json, write_npy
from core.rows import Rows
from core.rundir import Run, open_run
from sae import fingerprint
from sae.coder import Sae
from sae.fingerprint import Fingerprints, Settings
from sae.predict import classifier
from sae.predict.classifier import Classifier

METHOD = "sae-classifier"
SIGN = "positive = proponent (logit of a classifier of SAE fingerprints)"


class Lent(NamedTuple):
    """diagnose: `attribution.diagnostics.diagnose`. select: `attribution.select.select`."""

    diagnose: Callable[..., dict[str, Any]]
    select: Callable[..., dict[str, Any]]


def apply(
    run: Run,
    made: Classifier,
    loaded: Loaded,
    sae: Sae,
    rows: Rows,
    k: int | None,
    lent: Lent,
    execution: Execution,
    batch_tokens: int,
) -> dict[str, Any]:
    """Fingerprint the rows, score them, and with k write the k best as rows into `selected`.

    Continues a killed run. Returns the summary of the scores. Raises InputError, before work, for
    another model or SAE than the classifier's, and for k beyond the number of rows.
    """
    if k is not None and k > len(rows):
        raise InputError(f"--k {k} is more than the {len(rows)} rows of {rows.path}; give less")
    classifier.require_same(made, "the model", model=loaded.fingerprint)
    classifier.require_same(made, sae.about.origin, sae=sae.fingerprint)
    about = made.about
    tap = taps.parse(about["needs"]["tap"], loaded.config)
    settings = Settings(about["k"], about["needs"].get("token_k", 0), batch_tokens)
    run.inputs(model=loaded.fingerprint, rows=rows.sha, sae=sae.fingerprint, classifier=about)
    folder = run.path / "fingerprints"
    with open_run(folder, "sae fingerprint", dataclasses.asdict(settings)) as inner:
        if not inner.done:
            fingerprint.fingerprint(inner, loaded, rows, sae, tap, settings, execution)
            inner.finish()
    found = fingerprint.read_fingerprints(folder)
    summary = publish(run.path, rows, made, found, lent.diagnose)
    if k is not None:
        lent.select(run.path, rows, k, "top", 0, run.path / "selected")
    return summary


def publish(
    folder: Path,
    rows: Rows,
    made: Classifier,
    found: Fingerprints,
    diagnose: Callable[..., dict[str, Any]],
) -> dict[str, Any]:
    """Score the rows by their fingerprints into a folder of scores; returns its summary."""
    if found.info["rows"]["sha"] != rows.sha:
        raise InputError(f"{found.path} is of {found.info['rows']['path']}, whose rows differ from "
                         f"{rows.path}; fingerprint these")  # fmt: skip
    scores_N = classifier.scores(made, found).astype(np.float32)
    write_npy(folder / "scores.npy", scores_N)
    info = {
        "format": "taproot-scores",
        "method": METHOD,
        "sign": SIGN,
        "pool": {"path": str(rows.path), "rows": rows.sha, "model": found.info["model"]},
        "classifier": made.about,
    }
    write_json(folder / "info.json", info)
    return diagnose(folder, rows, scores_N, None, None)
