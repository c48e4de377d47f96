"""The folder that a MAGIC run leaves: scores for tools, and what to think of them for people.

Dims: N rows, T tokens of the longest, Q queries, M documents.

`scores.npy` [N] or [N,Q], `per_token_scores.npy` [N,T] or [N,T,Q] (label-aligned: entry t belongs
to predicting token t, entry 0 is 0), `document_scores.npy` [M] or [M,Q] with `documents.jsonl`,
`info.json`, `row_diagnostics.jsonl` and `summary.json`. Negative = proponent.
"""

import dataclasses
from typing import Any

import numpy as np

from attribution.diagnostics import diagnose
from attribution.magic import documents as packed
from attribution.magic.functional import Functional
from attribution.magic.trust import Facts, trust
from attribution.magic.walk import Found, Settings
from attribution.select import NEGATIVE, TURN
from core.checkpoint import Loaded
from core.files import write_json, write_jsonl, write_npy
from core.rows import Rows
from core.rundir import Run
from training.course import Course

TOKENS = "per_token_scores.npy"


def publish(
    run: Run,
    loaded: Loaded,
    course: Course,
    functional: Functional,
    settings: Settings,
    found: Found,
    asked: dict[str, Any],
    smoothness: dict[str, Any] | None,
    documents: packed.Documents | None,
) -> dict[str, Any]:
    """Write all of it; returns `info.json`.

    loaded: the model that training began with. asked: `query_mode`, `query_loss`, and `replay` of
    an earlier run, if it is one.
    """
    recipe, rows = course.recipe, course.rows
    alone = asked["query_mode"] == "mean"

    def save(name: str, scores: np.ndarray) -> None:
        write_npy(run.path / name, (scores[..., 0] if alone else scores).astype(np.float32))

    scores_NQ = found.scores
    if settings.target != "example":
        scores_NQ = found.scores.sum(1, dtype=np.float64)
        save(TOKENS, found.scores)
    save("scores.npy", scores_NQ)
    if documents is not None:
        save("document_scores.npy", packed.credit(documents, rows, found.scores))
        write_jsonl(run.path / "documents.jsonl", packed.lines(documents, rows))
    before, after = functional.mean(found.before_Q), functional.mean(found.after_Q)
    dropout = recipe.lora.dropout if recipe.lora else 0.0
    measured = None if smoothness is None else smoothness["smoothness"]
    facts = Facts(
        bool(np.isfinite(found.scores).all()), recipe.optim.name, recipe.optim.eps_root,
        before - after, found.displacement["relative"], measured,
        bool(dropout), recipe.execution.dtype, course.steps,
        asked.get("replay", {}).get("difference", 0.0),
    )  # fmt: skip
    tokens = {"file": TOKENS, "alignment": "label"}
    known = {
        "format": "taproot-scores",
        "method": "magic",
        "sign": f"{NEGATIVE} (d query loss / d token weight)",
        "pool": {"path": str(rows.path), "rows": rows.sha, "model": loaded.fingerprint},
        **dict(zip(("query", "control"), map(_about, functional.parts), strict=False)),
        "queries": len(functional.names),
        **asked,
        "tokenizer": loaded.tokenizer and str(loaded.tokenizer),
        "target": settings.target,
        **({} if settings.target == "example" else {"tokens": tokens}),
        "training": {
            "settings": dataclasses.asdict(course.settings),
            "optim": dataclasses.asdict(recipe.optim),
            "execution": dataclasses.asdict(recipe.execution),
            "lora": recipe.lora and dataclasses.asdict(recipe.lora),
        },
        "steps": course.steps,
        "losses": {"before": before, "after": after},
        "loss_drop": before - after,
        "displacement": found.displacement,
        "metasmoothness": smoothness,
        "trust": trust(facts)._asdict(),
    }
    if not alone:
        of_each = zip(functional.names, found.before_Q, found.after_Q, strict=True)
        known["losses"]["each"] = [
            {"query": name, "before": float(x), "after": float(y)} for name, x, y in of_each
        ]
    write_json(run.path / "info.json", known)
    diagnose(run.path, rows, scores_NQ, None, None, TURN[NEGATIVE])
    return known


def _about(rows: Rows) -> dict[str, Any]:
    return {"path": str(rows.path), "rows": rows.sha}
