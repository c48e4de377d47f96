"""The report's lists: what the first and last chunks say, and how everything was made."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from core.files import jsonable
from core.page.text import count, decode, esc, num, table, typeset
from evals.report import tokens
from evals.report.data import Report, Run, Shown

PREVIEW = 180


def chunks(report: Report) -> str:
    pool = report.pools[0]
    if not report.shown:
        return ""
    present = {str(pool.source_N[chunk.index]) for chunk in report.shown}
    names = [source for source in pool.sources if source in present]
    buttons = ""
    if len(names) > 1:
        buttons = '<button type="button" data-source="" aria-pressed="true">All sources</button>'
        buttons += "".join(
            f'<button type="button" data-source="{esc(name)}" aria-pressed="false">{esc(name)}'
            "</button>"
            for name in names
        )
        buttons = f'<div role="group" aria-label="Show chunks of">{buttons}</div>'
    full = tokens.limit(report.texts.values())
    columns = ""
    for end, label in (("top", "Most helpful"), ("bottom", "Least helpful")):
        items = "".join(_chunk(report, shown, full) for shown in report.shown if shown.end == end)
        columns += f'<div><h3>{label}</h3><ol class="chunks">{items}</ol></div>'
    note = "To see text here, name the rows (and the tokenizer) in the report's spec."
    if report.texts:
        marked = "Line ends and tabs" if full else "Line ends, tabs and repeated blanks"
        note = (
            f"Open a chunk to read it. {marked} are marked; hidden characters and bytes that are "
            "no text are named."
        )
    legend = ""
    if full and report.token_scores:
        alignment, higher_helps = report.token_scores.alignment, pool.higher_helps
        legend = tokens.legend(full, alignment, higher_helps)
    opener = '<button type="button" id="expand">Open all</button>' if report.texts else ""
    asked = "What in the training text moved the query?" if full else "What do the chunks say?"
    return (
        f"<h2>{asked}</h2><p>{note}</p>"
        f'{legend}<div class="tools" hidden>{buttons}{opener}</div>'
        f'<div class="columns">{columns}</div>'
    )


def _chunk(report: Report, shown: Shown, full: float) -> str:
    pool, index = report.pools[0], shown.index
    source, row = str(pool.source_N[index]), int(pool.row_N[index])
    chip = "c-rel" if source in report.relevant else "c-other"
    named = f'<span class="chip {chip}">{esc(source)}</span>' if len(pool.sources) > 1 else ""
    facts = (
        f'<span class="rank">#{index + 1:,}</span><span class="score">{num(pool.score_N[index])}'
        f'</span>{named}<span class="size">{count(int(pool.length_N[index]), "token")}, '
        f"row {row:,}</span>"
    )
    hidden = ' class="extra" hidden' if shown.extra else ""
    if row in report.texts:
        text = decode(report.texts[row].data)
        preview = esc(" ".join(text[: 2 * PREVIEW].split())[:PREVIEW])
        body, opened = f'<pre dir="auto">{typeset(text)}</pre>', ""
        if full:
            length = int(pool.length_N[index])
            body = tokens.block(report.texts[row], full, pool.higher_helps, row, length)
            opened = " open" if index in (0, len(pool.row_N) - 1) else ""
        facts = (
            f'<details{opened}><summary>{facts}<span class="preview" dir="auto">{preview}</span>'
            f"</summary>{body}</details>"
        )
    else:
        facts = f'<div class="bare">{facts}</div>'
    return f'<li data-source="{esc(source)}"{hidden}>{facts}</li>'


def origin(report: Report) -> str:
    spec, pool = report.spec, report.pools[0]
    model = spec.get("model")
    facts = dict(model) if isinstance(model, dict) else {"model": model} if model else {}
    facts |= {k: v for k, v in _flat(pool.info) if isinstance(v, str | int | float)}
    facts = {k: f"{v:,}" if type(v) is int and v > 9999 else v for k, v in facts.items()}
    runs = [arm.runs[0] for arm in report.arms if arm.runs]
    settings = table(["Setting", "Value"], list(facts.items()), "facts")
    tables = [f"<h3>Model and scores</h3>{settings}"] if settings else []
    if len(runs) > 1:
        head = ["Option that differs", *(run.name for run in runs)]
        differing = _differing(runs)
        same = len(set(dict(_flat(runs[0].options))) - {row[0] for row in differing})
        tables.append(
            f"<h3>What differs between the arms</h3>{table(head, differing, 'facts')}"
            f'<p class="note">First seed of each arm; the other {count(same, "option")} agree.</p>'
        )
    parts = [f'<div class="pair">{"".join(f"<div>{part}</div>" for part in tables)}</div>']
    documents: list[tuple[str, Any]] = [("Scores: info.json", pool.info)]
    run = runs[0] if runs else report.pretraining
    if run:
        documents += [(f"Options of {run.name}", run.options), (f"Machine of {run.name}", run.env)]
    documents.append(("Spec of this report", spec))
    for label, document in documents:
        if document:
            body = json.dumps(jsonable(document), indent=2, ensure_ascii=False)
            parts.append(
                f"<details><summary>{esc(label)}</summary><pre>{esc(body)}</pre></details>"
            )
    commands = ""
    if spec.get("commands"):
        items = "".join(
            f"<li><pre><code>{esc(command)}</code></pre>"
            '<button type="button" class="copy" hidden>Copy</button></li>'
            for command in spec["commands"]
        )
        commands = f'<h3>Commands to run it again</h3><ol class="commands">{items}</ol>'
    return f"<h2>How was this made?</h2>{''.join(parts)}{commands}"


def _flat(value: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Leaves of nested objects with dotted names."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))


def _differing(runs: Sequence[Run]) -> list[list[Any]]:
    flat = [dict(_flat(run.options)) for run in runs]
    names = dict.fromkeys(name for options in flat for name in options)
    rows = [[name, *(options.get(name, "–") for options in flat)] for name in names]
    return [row for row in rows if any(value != row[1] for value in row[2:])]
