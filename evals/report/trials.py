"""Did the scores predict what retraining does? The report's part on `attribute validate`.

Every protocol gets its table, and a row of dots with intervals, the scores beside their controls:
a number means something only against what random rows, lengths or losses reach. LDS also gets the
retrains themselves, predicted against measured; removals get the query's loss by share removed,
with the spread of random removals.

Dims: M retrains, F shares removed, R random removals.
"""

import numpy as np

from core.page.text import count, esc, figure, num, shortened, signed, table
from evals.report.charts import (
    WIDTH,
    Scale,
    band,
    chart,
    line,
    mark,
    padded,
    path,
    spread,
    text,
    x_axis,
    y_axis,
)
from evals.report.validation import SCORES, Line, Removals, Validation

LDS = "Rank correlation of predicted and measured loss"
WORDS = {  # of each protocol: heading, axis, and what was done
    "drop": (
        "Does the sum of scores predict the loss without those rows?", LDS,
        "Retrained with {share} of the rows left out at random: does the query's loss rise as the "
        "scores of what was removed say? 1 is perfect, 0 is chance.",
    ),
    "half": (
        "Does the sum of scores predict the loss with half of the rows?", LDS,
        "Retrained with {share} of the rows left out at random: does the query's loss follow the "
        "scores of what was removed? 1 is perfect, 0 is chance.",
    ),
    "tail": (
        "What does it cost to lose the best rows?", "More loss than without random rows",
        "Retrained without the top {share} of each ranking, and without as many random rows: how "
        "much more does the query's loss rise, in nats?",
    ),
    "weight-step": (
        "Does weighing rows by their scores help?", "Loss taken away by a unit step",
        "Retrained with each row's weight raised by its score, and lowered: steps of {share}.",
    ),
    "recall": (
        "Are the rows that state a fact found?", "Mean reciprocal rank",
        "Each query asks for a fact that some row states; 1 puts such a row first each time.",
    ),
    "mislabelled": (
        "Are mislabelled rows found?", "Area under the ROC curve",
        "How often a mislabelled row is more suspicious than a clean one; 0.5 is chance.",
    ),
}  # fmt: skip


def section(validations: list[Validation], several: bool) -> str:
    """The part of the page; several: whether rankings must be told apart by name."""
    if not validations:
        return ""
    bodies = "".join(_validation(v, v.name if several else "") for v in validations)
    return f"<h2>Are the scores true?</h2>{bodies}"


def _validation(v: Validation, name: str) -> str:
    heading, axis, said = WORDS[v.protocol]
    heading = f"{name}: {heading}" if name else heading
    statistic = v.headline[0].statistic.replace("lds", "LDS")
    chart = dots(f"{axis} ({statistic})", v.headline)
    charts = figure(chart, "Lines are 95% intervals; grey dots are controls.")
    if v.scatter is not None:
        of = ", of the mean over queries" if v.facts.get("of_each_query") else ""
        drawn = scatter(*v.scatter, turned=v.facts.get("scores_times") == -1)
        charts += figure(drawn, f"Each dot is a retrain{of}.")
    if v.removals is not None:
        note = "Thin lines: the top of a control's ranking. Grey dots: random removals."
        charts += figure(removals(v.shares, v.removals), note)
    return (
        f"<h3>{esc(heading)}</h3><p>{esc(said.format(share=_shares(v.shares)))} {esc(_how(v))}</p>"
        f'<div class="pair">{charts}</div>{_table(v)}'
    )


def _shares(shares: tuple[float, ...]) -> str:
    *first, last = [f"{100 * share:g}%" for share in shares] or ["a part"]
    return " or ".join(filter(None, [", ".join(first), last]))


def _how(v: Validation) -> str:
    facts, parts = v.facts, []
    if v.scatter is not None:
        parts.append(
            f"{count(len(v.scatter[0]), 'retrain')} of {count(facts.get('seeds', 1), 'seed')}."
        )
    loss = facts.get("query_loss")
    if isinstance(loss, dict) and loss.get("before") and loss.get("after"):
        before, after = num(loss["before"]), num(loss["after"])
        parts.append(f"Training takes the query's loss from {before} to {after} nats per token.")
    if facts.get("same_query") is False:
        parts.append("The scores are of another query than the one that was measured.")
    return " ".join(parts)


def _table(v: Validation) -> str:
    statistics = list(dict.fromkeys(x.statistic for x in v.lines))
    if len(statistics) == 1:  # all of it is drawn
        return ""
    cells = {(x.method, x.statistic): _cell(x) for x in v.lines}
    methods = dict.fromkeys(x.method for x in v.lines)
    rows = [[m, *(cells.get((m, statistic), "") for statistic in statistics)] for m in methods]
    return table(["Ranking", *statistics], rows)


def _cell(x: Line) -> str:
    ends = "" if x.interval is None else f" ({num(x.interval[0], 2)} to {num(x.interval[1], 2)})"
    return f"{num(x.estimate, 2)}{ends}"


def _colour(method: str) -> str:
    return "c-rel" if method == SCORES else "c-other"


def dots(axis: str, lines: list[Line]) -> str:
    """One statistic of all rankings, with intervals."""
    left, right, row, top = 92, WIDTH - 56, 27, 14
    lines = [x for x in lines if x.estimate is not None]
    bottom = top + row * len(lines)
    values = [v for x in lines for v in (x.estimate or 0.0, *(x.interval or ()))]
    scale = padded([*values, 0.0], left, right)
    parts = x_axis(scale, top, bottom, axis, 5)
    parts.append(line(scale(0), top - 4, scale(0), bottom, "zero"))
    for index, x in enumerate(lines):
        y, at = top + row * index + row / 2, scale(x.estimate or 0.0)
        kind = "label strong" if x.method == SCORES else "label"
        parts.append(text(0, y + 4, shortened(x.method, 14), kind))
        parts.append(text(WIDTH, y + 4, num(x.estimate, 2), "value", "end"))
        shape, said = "", f"{x.method}\n{x.statistic} {num(x.estimate)}"
        if x.interval is not None:
            low, high = x.interval
            shape = line(scale(low), y, scale(high), y, "interval")
            said += f"\n95% interval {num(low)} to {num(high)}"
        shape += f'<circle class="dot" cx="{at}" cy="{y}" r="5"/>'
        parts.append(mark(said, shape, _colour(x.method)))
    desc = "; ".join(f"{x.method}: {num(x.estimate)}" for x in lines)
    return chart("half", axis, desc or "no numbers", (WIDTH, bottom + 42), parts)


def scatter(predicted_M: np.ndarray, measured_M: np.ndarray, turned: bool) -> str:
    """Retrains: what the removed rows' scores add up to, and what the loss did.

    turned: `predicted_M` has the other sign than the file, so that a positive score helps.
    """
    left, right, top, bottom = 58, WIDTH - 12, 30, 260
    x = padded(predicted_M.tolist(), left, right)
    y = padded(measured_M.tolist(), bottom, top)
    total = "minus the sum" if turned else "sum"
    parts = x_axis(x, top, bottom, f"{total} of the removed rows' scores", 6)
    parts += y_axis(y, left, right, "increase of the query's loss, nats per token")
    for predicted, measured in zip(predicted_M.tolist(), measured_M.tolist(), strict=True):
        shape = f'<circle class="dot point" cx="{x(predicted)}" cy="{y(measured)}" r="3.5"/>'
        label = f"measured {signed(measured)} nats\n{total} of scores {signed(predicted)}"
        parts.append(mark(label, shape, "c-rel"))
    desc = f"{len(predicted_M)} retrains; see the table for their rank correlation."
    return chart("half", "Predicted and measured", desc, (WIDTH, bottom + 42), parts)


def removals(shares: tuple[float, ...], found: Removals) -> str:
    """The query's loss by share removed: top and bottom of the ranking, controls, random rows."""
    left, right, top, bottom = 58, WIDTH - 112, 30, 260
    x = Scale(-0.25, len(shares) - 0.75, left, right)
    own = {"top": ("c-rel", found.top), "bottom": ("c-bottom", found.bottom)}
    everything = [*found.top.values(), found.bottom[SCORES], found.random_FR.ravel()]
    y = padded([0.0, *np.concatenate(everything).tolist()], bottom, top)
    parts = y_axis(y, left, right, "increase of the query's loss, nats per token")
    parts.append(line(left, y(0), right, y(0), "zero"))
    xs = [x(i) for i in range(len(shares))]
    for at, share in zip(xs, shares, strict=True):
        parts.append(text(at, bottom + 16, f"{100 * share:g}%", "tick", "middle"))
    parts.append(text((left + right) / 2, bottom + 35, "rows removed", "axis", "middle"))
    for method, values_F in found.top.items():
        if method != SCORES:
            drawn = path(xs, [y(v) for v in values_F], "thin")
            drawn += "".join(
                line(at - 4, y(v), at + 4, y(v), "interval thin")
                for at, v in zip(xs, values_F, strict=True)
            )
            parts.append(f'<g class="c-other">{drawn}</g>')
    mean_F = found.random_FR.mean(1)
    circles = "".join(
        f'<circle class="seed" cx="{at}" cy="{y(v)}" r="3"/>'
        for at, values_R in zip(xs, found.random_FR, strict=True)
        for v in values_R
    )
    parts.append(f'<g class="c-other">{circles}{path(xs, [y(v) for v in mean_F], "chance")}</g>')
    ends, names = [y(float(mean_F[-1]))], [("random", "c-other")]
    for side, (colour, of_method) in own.items():
        values_F = of_method[SCORES]
        drawn = path(xs, [y(v) for v in values_F], "curve")
        drawn += "".join(
            f'<circle class="dot" cx="{at}" cy="{y(v)}" r="4.5"/>'
            for at, v in zip(xs, values_F, strict=True)
        )
        parts.append(f'<g class="{colour}">{drawn}</g>')
        ends.append(y(float(values_F[-1])))
        names.append((f"without {side}", colour))
    for (name, colour), at in zip(names, spread(ends, 15, top, bottom), strict=True):
        parts.append(text(right + 7, at + 4, name, f"end {colour}"))
    said = []
    for i, share in enumerate(shares):
        values = [f"without the {side}: {signed(f[SCORES][i])}" for side, (_, f) in own.items()]
        low, high = found.random_FR[i].min(), found.random_FR[i].max()
        values.append(f"without random rows: {signed(mean_F[i])} ({num(low)} to {num(high)})")
        values += [f"top by {m}: {signed(f[i])}" for m, f in found.top.items() if m != SCORES]
        said.append(f"{100 * share:g}% removed: " + ", ".join(values))
        label = "\n".join([f"{100 * share:g}% removed", *values])
        shape = band(x(i - 0.25), x(i + 0.25), top, bottom, xs[i])
        parts.append(mark(label, shape, "band"))
    return chart("half", "Loss after removal", "; ".join(said), (WIDTH, bottom + 42), parts)
