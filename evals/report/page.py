"""The report page: one HTML file with its style, script and charts inside, readable offline.

Everything that comes from disk passes `esc` or `typeset`. The page's content policy forbids any
request and any script but its own, so even a missed escape could neither run nor call out.
"""

import re
from pathlib import Path

import numpy as np

from core.page.shell import document
from core.page.text import count, duration, esc, figure, num, percent, signed, table
from evals.report import magic as of_magic
from evals.report import toptokens, trials
from evals.report.charts import Dot, Series, intervals, learning, recall, ridges, score_axis
from evals.report.data import Arm, Report, Verdict
from evals.report.lists import chunks, origin

COLOURS = {"top": "c-top", "random": "c-random", "bottom": "c-bottom", "base": "c-base"}
MOST_STRIPS, MOST_LISTED = 8, 20
MAGIC_FIRST = ("arms", "chunks", "tokens", "documents", "validation", "curves")


def page(report: Report) -> str:
    """The whole page as HTML text."""
    sections = {
        "arms": ("Arms", _arms(report)),
        "scores": ("Scores", _scores(report)),
        "recall": ("Recall", _recall(report)),
        "validation": ("Validation", _validation(report)),
        "curves": ("Learning curves", _curves(report)),
        "chunks": ("Chunks", chunks(report)),
        "tokens": ("Tokens", toptokens.section(report.strongest)),
        "documents": ("Documents", of_magic.documents(report.magic) if report.magic else ""),
        "origin": ("Provenance", origin(report)),
    }
    first = MAGIC_FIRST if report.magic else ()
    order = [*first, *(name for name in sections if name not in first)]
    sections = [(name, *sections[name]) for name in order if sections[name][1]]
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label, _ in sections)
    bodies = "".join(f'<section id="{name}">{body}</section>' for name, _, body in sections)
    unnamed = "Per-token attribution with MAGIC" if report.magic else "Data attribution report"
    title = esc(report.spec.get("title") or unnamed)
    main = f"{_headline(report, title)}\n{bodies}"
    here = Path(__file__).parent
    style = (here / "page.css").read_text("utf-8")
    script = (here / "page.js").read_text("utf-8")
    return document(title, main, style, script, nav=links)


def _headline(report: Report, title: str) -> str:
    verdict = report.verdict
    figures = _figures(report)
    cells = "".join(
        f"<div><dt>{esc(name)}</dt><dd><b>{esc(value)}<i> {esc(unit)}</i></b>"
        f"<small>{esc(note)}</small></dd></div>"
        for value, unit, name, note in figures
    )
    # Large type must not break "held-out" at its hyphen.
    lead = re.sub(r"\S+-\S+", r'<span class="whole">\g<0></span>', esc(verdict.sentence))
    return (
        f'<section class="verdict v-{verdict.kind}"><h1>{title}</h1>'
        f'<p class="word">{esc(verdict.word)}</p><p class="lead">{lead}</p>'
        f'<p class="method">{esc(verdict.method)}</p>{_reasons(verdict)}'
        f'<dl class="figures">{cells}</dl></section>'
    )


def _reasons(verdict: Verdict) -> str:
    lines = "".join(f"<li>{esc(reason)}</li>" for reason in verdict.reasons)
    return f'<ul class="reasons">{lines}</ul>' if lines else ""


def _figures(report: Report) -> list[tuple[str, str, str, str]]:
    """Value, unit, name and note of each of the headline's numbers."""
    summary, magic, figures = report.summary, report.magic, []
    for d in report.differences:
        if (d.better, d.worse) in (("top", "random"), ("random", "bottom")):
            mean, low, high = d.interval
            name = f"{_arm_name(report, d.better)} minus {_arm_name(report, d.worse).lower()}"
            figures.append((signed(mean), "nats", name, f"{signed(low)} to {signed(high)}"))
    if summary["precision_at_k"] is not None:
        pool = f"{percent(summary['relevant_share'])} of the pool"
        best = f"{percent(summary['best_recall_at_k'])} possible at this k"
        share, found = percent(summary["precision_at_k"]), percent(summary["recall_at_k"])
        figures.append((share, "", f"of the top {report.k:,} relevant", pool))
        figures.append((found, "", "of relevant chunks found", best))
    if magic:
        figures += of_magic.figures(magic, report.pools[0], report.strongest, report.validations)
    else:
        sources = f"from {count(len(report.pools[0].sources), 'source')}"
        figures.append((f"{summary['chunks']:,}", "", "chunks scored", sources))
    if summary["seconds"] is not None:
        peak = "" if summary["peak_gb"] is None else f"{num(summary['peak_gb'])} GB peak memory"
        figures.append((duration(summary["seconds"]), "", "wall time", peak))
    return figures


def _arm_name(report: Report, name: str) -> str:
    if name == "base":
        return "Base"
    k = f" {report.k:,}" if report.k and name in ("top", "random", "bottom") else ""
    return f"{name[:1].upper()}{name[1:]}{k}"


def _colour(report: Report, name: str) -> str:
    others = [arm.name for arm in report.arms if arm.name not in COLOURS]
    return COLOURS.get(name) or f"c-alt{others.index(name) % 2}"


def _arms(report: Report) -> str:
    evaluated = [*report.arms, *([report.base] if report.base else [])]
    if not evaluated:
        return ""
    dots = [
        Dot(
            _arm_name(report, arm.name),
            _colour(report, arm.name),
            report.intervals[arm.name],
            list(zip(arm.seeds, arm.logprob_SI.mean(1).tolist(), strict=True))
            if arm is not report.base
            else [],
        )
        for arm in evaluated
    ]
    chart = intervals("Held-out answers", "log-probability of the right answer, nats", dots)
    figures = figure(chart, "Log-probability of the right answer; further right is better.")
    if report.differences:
        paired = [
            Dot(
                f"{d.better.capitalize()} − {d.worse}",
                _colour(report, d.better if d.better != "random" else d.worse),
                d.interval,
                list(zip(_arm(report, d.better).seeds, d.seed_means, strict=True)),
            )
            for d in report.differences
        ]
        chart = intervals("Paired differences", "difference, nats per answer", paired, zero=True)
        figures += figure(chart, "Differences, paired by item and seed.")
    rows = [
        [
            _arm_name(report, arm.name),
            f"{len(arm.seeds)}",
            num(report.intervals[arm.name].mean),
            f"{num(report.intervals[arm.name].low)} to {num(report.intervals[arm.name].high)}",
            percent(float(arm.acc_SI.mean())) if np.isfinite(arm.acc_SI).all() else "–",
            _tokens_text(arm),
            num(float(np.mean([run.loss.y[-1] for run in arm.runs if len(run.loss.y)])))
            if any(len(run.loss.y) for run in arm.runs)
            else "–",
        ]
        for arm in evaluated
    ]
    head = ["Arm", "Seeds", "Mean, nats", "95% interval", "Accuracy", "Tokens trained", "Last loss"]
    note = (
        "Large dots are means, lines 95% intervals over items and seeds, small dots single seeds. "
        "An arm's own interval includes how much the items differ from each other; a paired "
        "difference does not, so the differences decide."
    )
    return (
        f"<h2>Did the selected chunks teach more?</h2><p>{note}</p>"
        f'<div class="pair">{figures}</div>{table(head, rows)}{_caution(report)}'
    )


def _arm(report: Report, name: str) -> Arm:
    return next(arm for arm in report.arms if arm.name == name)


def _tokens(arm: Arm) -> list[int]:
    return [run.tokens for run in arm.runs if run.tokens is not None]


def _tokens_text(arm: Arm) -> str:
    tokens = _tokens(arm)
    if not tokens:
        return "–"
    least, most = min(tokens), max(tokens)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _caution(report: Report) -> str:
    tokens = [n for arm in report.arms for n in _tokens(arm)]
    steps = [len(run.loss.step) for arm in report.arms for run in arm.runs]
    # Runs end with a whole step, so budgets that are equal meet to within one.
    if not tokens or max(tokens) - min(tokens) <= max(tokens) / max(1, *steps):
        return ""
    return (
        '<p class="caution">The runs did not see the same number of tokens '
        f"({min(tokens):,} to {max(tokens):,}), so part of a difference may be a difference in "
        "compute.</p>"
    )


def _scores(report: Report) -> str:
    pool, k = report.pools[0], report.k
    if not len(pool.score_N):
        return ""
    sizes = pool.sources
    largest = sorted(sizes, key=lambda source: (source not in report.relevant, -sizes[source]))
    strips = [source for source in sizes if source in largest[:MOST_STRIPS]]
    listed = [source for source in sizes if source in largest[:MOST_LISTED]]
    charts = ridges(pool, strips, report.relevant, k, 960)
    charts += ridges(pool, strips, report.relevant, k, 400)
    note = "Strips are scaled to their own tallest bar; ticks below mark single chunks."
    if len(strips) < len(sizes):
        note += f" The {len(strips)} main sources of {len(sizes):,} are drawn."
    low, high = score_axis(pool, k)
    if pool.score_N.min() < low or pool.score_N.max() > high:
        note += " The outermost bars also hold what lies beyond the axis."
    if report.relevant:
        note += " Blue sources teach the query."
    head = ["Source", "Chunks", "Of pool", "Median score", "Mean tokens"]
    head += [f"In top {k:,}", f"Of top {k:,}", f"Of bottom {k:,}"] if k else []
    rows = []
    for source in listed:
        place = pool.source_N == source
        row = [source, f"{sizes[source]:,}", percent(sizes[source] / len(place))]
        row += [num(float(np.median(pool.score_N[place]))), f"{pool.length_N[place].mean():,.0f}"]
        if k:
            row += [f"{int(place[:k].sum()):,}", percent(float(place[:k].mean()))]
            row += [percent(float(place[-k:].mean()))]
        rows.append(row)
    rows = rows if k or len(sizes) > 1 else []  # the chart says it all
    length = ", by source." if len(sizes) > 1 else "."
    if k:
        length += (
            f" Mean length is {pool.length_N[:k].mean():,.0f} tokens in the top {k:,}, "
            f"{pool.length_N.mean():,.0f} in the pool and {pool.length_N[-k:].mean():,.0f} in the "
            f"bottom {k:,}: a large gap would mean that the score partly ranks by length."
        )
    return (
        f"<h2>Where do the scores lie?</h2><p>Influence score of each chunk{length}</p>"
        f"{figure(charts, note)}{table(head, rows)}"
    )


def _recall(report: Report) -> str:
    if not report.relevant:
        return ""
    pool, k = report.pools[0], report.k
    relevant_N = np.isin(pool.source_N, report.relevant)
    total, n_relevant = len(relevant_N), int(relevant_N.sum())
    parts = (k / 4, k / 2, k, 2 * k, 4 * k) if k else (total * p for p in (0.01, 0.05, 0.1, 0.2))
    stops = [round(part) for part in parts]
    rows = []
    for stop in sorted({min(max(stop, 1), total) for stop in stops}):
        found = int(relevant_N[:stop].sum())
        lift = found / stop / (n_relevant / total)
        mean = [f"{stop:,}", f"{found:,}", percent(found / stop), percent(found / n_relevant)]
        rows.append([*mean, f"{num(lift, 2)}×"])
    auc = report.summary["auc"]
    text = (
        f"{count(n_relevant, 'chunk')} of {total:,} come from the relevant "
        f"{'sources' if len(report.relevant) > 1 else 'source'} "
        f"({', '.join(report.relevant)}). The ranking never saw these labels."
    )
    if auc is not None:
        text += f" A relevant chunk outranks an irrelevant one with probability {num(auc)} (AUC)."
    head = ["First", "Relevant", "Precision", "Recall", "Against chance"]
    note = "Dotted: the best possible order. Dashed: a random one."
    chart = figure(recall(report.pools, report.relevant, k), note)
    return (
        f"<h2>Does the ranking find the relevant sources?</h2><p>{esc(text)}</p>"
        f'<div class="pair">{chart}{table(head, rows)}</div>'
    )


def _validation(report: Report) -> str:
    return trials.section(report.validations, several=len(report.pools) > 1)


def _curves(report: Report) -> str:
    if report.magic and not report.arms:
        return of_magic.curves(report.magic)
    figures = ""
    if report.pretraining and len(report.pretraining.loss.y):
        run = report.pretraining
        chart = learning(
            "Pretraining loss", [Series("training", "c-base", [run.loss])], run.val_loss
        )
        figures += figure(chart, "Pretraining of the checkpoint that all arms start from.")
    series = [
        Series(_arm_name(report, arm.name), _colour(report, arm.name), [r.loss for r in arm.runs])
        for arm in report.arms
    ]
    if any(len(curve.y) for s in series for curve in s.curves):
        chart = learning("Training loss of the arms", series)
        note = "The arms. Each sees other text, so a lower training loss alone proves nothing."
        figures += figure(chart, note)
    if not figures:
        return ""
    note = "Thin lines are single runs, thick lines running means over all seeds."
    return f'<h2>How did training go?</h2><p>{note}</p><div class="pair">{figures}</div>'
