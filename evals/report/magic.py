"""What a report says of a MAGIC run: whether to trust it, what it cost the query, how it trained.

A score is the derivative of the query's loss in the weight of a training token, so a negative one
helps. The verdict is the run's own (`trust` in its `info.json`), except that scores which are not
finite are never trusted.
"""

from pathlib import Path
from typing import Any

import numpy as np

from core.page.text import (
    Markup,
    count,
    esc,
    figure,
    num,
    shortened,
    signed,
    table,
)
from evals.report.charts import Series, learning
from evals.report.data import Curve, Document, Magic, Pool, Verdict
from evals.report.toptokens import Strongest
from evals.report.validation import SCORES, Line, Validation

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD", "muon": "Muon"}
KINDS = {"trusted": "yes", "doubtful": "unclear", "not to be trusted": "no"}
SMOOTH = 0.9  # the metasmoothness that the run's own verdict asks for


def verdict(magic: Magic, found: Strongest | None, query: str | None) -> Verdict:
    """The run's own verdict in a sentence. found: the strongest tokens; query: what to call it."""
    info = magic.info
    silent = {"verdict": "doubtful", "reasons": ["The run does not say whether to trust it."]}
    trust = _part(info, "trust") or silent
    said, reasons = str(trust.get("verdict")), [str(r) for r in trust.get("reasons") or []]
    missing = found.missing if found else 0
    if magic.missing or missing:
        said = "not to be trusted"
        rows = f"{magic.missing:,} of {count(magic.rows, 'row')}"
        reasons.append(f"{rows} and {count(missing, 'token')} have no finite score.")
    name = str(_optim(info).get("name"))
    steps = count(int(info.get("steps") or 0), "step")
    done = f"{steps} of {OPTIMIZERS.get(name, name)} on {count(magic.rows, 'row')}"
    of = f"the loss on {query}" if query else "the query's loss"
    before, after = _losses(info)
    if before is None or after is None:
        sentence = f"{done} left no finite loss of the query."
    else:
        verb = "lowered" if after <= before else "raised"
        change = f"{num(abs(before - after))} nats, from {num(before)} to {num(after)}"
        sentence = f"{done} {verb} {of} by {change}."
    what = "the training rows" if info.get("target") == "example" else "the training tokens"
    if found and found.finite:
        what = f"{found.finite:,} training tokens"
    kind = KINDS.get(said, "unclear")
    return Verdict(kind, f"Scores are {said}", sentence, _method(info, what), tuple(reasons))


def _method(info: dict[str, Any], what: str) -> str:
    path = _part(info, "query").get("path")
    name = Path(str(path)).name if path else "the query"
    asked = "margin of the right answers" if info.get("query_loss") == "margin" else "loss"
    if info.get("query_mode") == "each":
        asked = f"the {asked} of each of {info.get('queries')} queries in {name}"
        shown = " This page shows the mean of all."
    else:
        asked, shown = f"the mean {asked} of the rows in {name}", ""
    control = ", minus that of the control," if info.get("control") else ""
    return (
        f"MAGIC differentiated {asked}{control} through every step of training, back to the "
        f"weights of {what}.{shown} A negative score helps: more weight on it would have lowered "
        "the query's loss."
    )


def _part(info: dict[str, Any], key: str) -> dict[str, Any]:
    value = info.get(key)
    return value if isinstance(value, dict) else {}


def _optim(info: dict[str, Any]) -> dict[str, Any]:
    return _part(_part(info, "training"), "optim")


def _losses(info: dict[str, Any]) -> tuple[float | None, float | None]:
    losses = _part(info, "losses")
    return losses.get("before"), losses.get("after")


def figures(
    magic: Magic, pool: Pool, found: Strongest | None, validations: list[Validation]
) -> list[tuple[str, str, str, str]]:
    """Value, unit, name and note of each of the headline's numbers."""
    info, (before, after) = magic.info, _losses(magic.info)
    drop = None if before is None or after is None else after - before
    change = "–" if drop is None else signed(drop)
    ends = f"{num(before)} to {num(after)}"
    numbers = [(change, "" if drop is None else "nats", "change of the query's loss", ends)]
    lds = _lds(validations)
    if lds:
        ends = "" if lds.interval is None else f"{num(lds.interval[0])} to {num(lds.interval[1])}"
        numbers.append((num(lds.estimate), "", "LDS: rank correlation with retraining", ends))
    smooth = _part(info, "metasmoothness").get("smoothness")
    note = "not measured" if smooth is None else f"at least {SMOOTH} to be trusted"
    numbers.append((num(smooth), "", "metasmoothness", note))
    moved = _part(info, "displacement")
    if moved.get("relative") is not None:
        share = f"{num(100 * moved['relative'], 2)}%"
        numbers.append((share, "", "of their length parameters moved", f"by {num(moved['l2'])}"))
    if found:
        numbers.append((f"{found.finite:,}", "", "tokens scored", f"in {count(magic.rows, 'row')}"))
    else:
        numbers.append((f"{len(pool.score_N):,}", "", "rows scored", f"of {magic.rows:,}"))
    return numbers


def _lds(validations: list[Validation]) -> Line | None:
    found = [x for v in validations if v.protocol in ("drop", "half") for x in v.headline]
    return next((x for x in found if x.method == SCORES), None)


def curves(magic: Magic) -> str:
    """The part of the page on training: its loss, the query's before and after, its settings."""
    before, after = _losses(magic.info)
    chart = ""
    if len(magic.loss.y):
        ends = [(0, before), (magic.info.get("steps"), after)]
        ends = [] if magic.info.get("query_loss") == "margin" else ends  # is no loss of a token
        known = [(step, loss) for step, loss in ends if step is not None and loss is not None]
        dots = Curve(*np.array(known, np.float64).reshape(-1, 2).T)
        series = [Series("training", "c-base", [magic.loss])]
        note = "Thin: each step's batch. Thick: its running mean. Dots: the query before and after."
        chart = figure(learning("Loss while training", series, dots, "query"), note)
    settings = _settings(magic.info)
    if not chart and not settings:
        return ""
    return (
        "<h2>How did training go?</h2><p>The run that the scores are derivatives of. A query whose "
        "loss hardly moves has little to attribute.</p>"
        f'<div class="pair">{chart}<div>{settings}</div></div>'
    )


def _settings(info: dict[str, Any]) -> str:
    optim, training = _optim(info), _part(info, "training")
    batches, execution = _part(training, "settings"), _part(training, "execution")
    name = optim.get("name")
    keys = ["lr", "schedule", "warmup", "weight_decay", "clip"]
    keys += ["eps_root"] if name == "adamw" else ["momentum"]
    rows = [("optimizer", OPTIMIZERS.get(str(name), name)), *((k, optim.get(k)) for k in keys)]
    rows += [(key, batches.get(key)) for key in ("batch", "shuffle")]
    rows += [("steps", info.get("steps")), ("dtype", execution.get("dtype"))]
    words = {True: "yes", False: "no"}
    shown = [[k.replace("_", " "), words[v] if isinstance(v, bool) else v]
             for k, v in rows if v is not None]  # fmt: skip
    return table(["Setting", "Value"], shown, "facts")


def documents(magic: Magic) -> str:
    """The part of the page on documents inside packed rows, where they were asked for."""
    if not magic.documents:
        return ""
    helping = [document for document in magic.documents if document.score < 0]
    hurting = [document for document in magic.documents[::-1] if document.score > 0]
    lists = "".join(
        f"<h3>{label}</h3>{_documents(found) or none}"
        for label, found, none in (
            ("Documents that help most", helping, '<p class="note">No document helps.</p>'),
            ("Documents that hurt most", hurting, '<p class="note">No document hurts.</p>'),
        )
    )
    return (
        "<h2>Which documents are strongest?</h2><p>The scores of a document's tokens, in all rows "
        f"that hold a part of it, added up.</p>{lists}"
    )


def _documents(found: list[Document]) -> str:
    rows = [
        [
            Markup(f'<span class="around" dir="auto">{esc(" ".join(d.opening.split()))}</span>'),
            shortened(d.name, 24),
            f"{d.number:,}",
            f"{d.tokens:,}",
            signed(d.score),
            f"{d.row:,}",
        ]
        for d in found
    ]
    return table(["Document begins", "From", "Number", "Tokens", "Score", "Row"], rows, "top")
