"""The report's charts: inline SVG written here, so the page needs no library and no network.

A chart is a group of *marks*. A mark can be focused and carries its values in `aria-label`; the
page's script shows them on hover and on keyboard focus. Colours come from the style sheet by class.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from core.page.text import count, esc, num, percent, shortened, signed
from evals.report.data import Curve, Pool
from evals.statistics import Interval, recall_curve

WIDTH = 460
BINS = 44


class Scale(NamedTuple):
    """Maps data `low`..`high` to pixels `start`..`end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the domain, 1, 2 or 5 times a power of ten apart."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


class Dot(NamedTuple):
    """A row of an interval plot: estimate, interval, and one value per seed."""

    label: str
    colour: str
    interval: Interval
    seed_values: Sequence[tuple[int, float]]


class Series(NamedTuple):
    """Curves of one arm (one per seed, same steps) and what to call it."""

    label: str
    colour: str
    curves: Sequence[Curve]


def padded(values: Sequence[float], start: float, end: float, margin: float = 0.06) -> Scale:
    low, high = min(values), max(values)
    room = (high - low) * margin or abs(high) * 0.05 or 1.0
    return Scale(low - room, high + room, start, end)


def chart(kind: str, title: str, desc: str, size: tuple[float, float], parts: list[str]) -> str:
    # role=group, not img: an image hides its children, and here they can be focused and read.
    return (
        f'<svg class="{kind}" viewBox="0 0 {size[0]} {size[1]}" role="group" '
        f'aria-label="{esc(title)}"><title>{esc(title)}</title><desc>{esc(desc)}</desc>'
        f"{''.join(parts)}</svg>"
    )


def mark(label: str, shapes: str, colour: str = "") -> str:
    label = esc(label).replace("\n", "&#10;")
    return (
        f'<g class="mark {colour}" tabindex="0" role="img" aria-label="{label}" data-tip>'
        f"{shapes}</g>"
    )


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{kind}>{esc(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def path(xs: Sequence[float], ys: Sequence[float], kind: str) -> str:
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
    return f'<path class="{kind}" d="M{points}"/>'


def tick_labels(ticks: Sequence[float]) -> tuple[list[str], str]:
    """Tick texts with one number of decimals, and the power of ten taken out of them."""
    largest = max((abs(t) for t in ticks), default=1.0)
    power = math.floor(math.log10(largest)) if largest else 0
    power = power if power < -3 or power > 5 else 0
    values = [t / 10.0**power for t in ticks]
    gaps = [b - a for a, b in zip(values, values[1:], strict=False)]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9)) if gaps else 2
    labels = [f"{v + 0.0:,.{decimals}f}".replace("-", "−") for v in values]
    factor = f"×{num(10.0**power, 1).removeprefix('1×')}" if power else ""
    return labels, factor


def x_axis(scale: Scale, top: float, bottom: float, title: str, about: int = 5) -> list[str]:
    ticks = scale.ticks(about)
    labels, factor = tick_labels(ticks)
    parts = [line(scale(t), top, scale(t), bottom, "grid") for t in ticks]
    parts += [
        text(scale(t), bottom + 16, label, "tick", "middle")
        for t, label in zip(ticks, labels, strict=True)
    ]
    title = f"{title} ({factor})" if factor else title
    middle = (scale.start + scale.end) / 2
    return [*parts, text(middle, bottom + 35, title, "axis", "middle")]


def y_axis(
    scale: Scale, left: float, right: float, title: str, as_percent: bool = False
) -> list[str]:
    ticks = scale.ticks()
    labels, factor = tick_labels(ticks)
    if as_percent:
        labels = [f"{100 * t:.0f}%" for t in ticks]
    parts = [line(left, scale(t), right, scale(t), "grid") for t in ticks]
    parts += [
        text(left - 7, scale(t) + 4, label, "tick", "end")
        for t, label in zip(ticks, labels, strict=True)
    ]
    title = f"{title} ({factor})" if factor else title
    return [*parts, text(0, 12, title, "axis")]


def intervals(title: str, unit: str, dots: Sequence[Dot], zero: bool = False) -> str:
    """Dots with 95 % intervals on a shared axis; small dots are seeds; `zero` draws the null."""
    left, right, row, top = 116, WIDTH - 62, 50, 22
    bottom = top + row * len(dots)
    values = [v for d in dots for v in (*d.interval, *(value for _, value in d.seed_values))]
    scale = padded([*values, 0.0] if zero else values, left, right)
    parts = x_axis(scale, top, bottom, unit, 6)
    parts.append(text(WIDTH, top - 9, "mean", "tick", "end"))
    if zero:
        parts.append(line(scale(0), top - 6, scale(0), bottom, "zero"))
        parts.append(text(scale(0), top - 9, "no difference", "tick", "middle"))
    for dot in dots:
        if dot.colour == "c-base":
            at = scale(dot.interval.mean)
            parts.append(line(at, top, at, bottom, "chance"))
            parts.append(text(at, top - 9, "base", "tick", "middle"))
    for index, dot in enumerate(dots):
        y = top + row * index + row / 2 - 5
        mean, low, high = dot.interval
        show = signed if zero else num
        parts.append(text(0, y + 4, shortened(dot.label, 17), "label"))
        parts.append(text(WIDTH, y + 4, show(mean), "value", "end"))
        for seed, value in dot.seed_values:
            shape = f'<circle class="seed" cx="{scale(value)}" cy="{y + 14}" r="3"/>'
            parts.append(mark(f"{dot.label}\nseed {seed}: {show(value)} nats", shape, dot.colour))
        shape = line(scale(low), y, scale(high), y, "interval")
        shape += f'<circle class="dot" cx="{scale(mean)}" cy="{y}" r="5.5"/>'
        label = f"{dot.label}\nmean {show(mean)} nats\n95% interval {show(low)} to {show(high)}"
        parts.append(mark(label, shape, dot.colour))
    desc = "; ".join(
        f"{d.label}: {num(d.interval.mean)}, 95% interval {num(d.interval.low)} to "
        f"{num(d.interval.high)}"
        for d in dots
    )
    return chart("half", title, desc, (WIDTH, bottom + 42), parts)


def ridges(
    pool: Pool, sources: Sequence[str], relevant: Sequence[str], k: int | None, width: int
) -> str:
    """Score histograms, one strip per source on one axis; what lies past the k-th score is dark.

    The bins start at the k-th score, so the dark bars hold the selected chunks exactly (but for
    ties). The outermost bins also hold what lies beyond the axis; ticks below mark single chunks.
    """
    wide = width > 600
    left, right = (150, width - 132) if wide else (2, width - 2)
    head, height, top = (8, 54, 30) if wide else (26, 46, 34)
    row = head + height + 14
    bottom = top + row * len(sources)
    score_N = pool.score_N
    cut = float(score_N[k - 1]) if k else None
    low, high = score_axis(pool, k)
    step = (high - low) / BINS
    anchor = low if cut is None else cut
    # Scores equal to the cut are selected: shift the edges by a hair to put them on its near side.
    anchor += step * (-1e-6 if pool.higher_helps else 1e-6)
    first, last = math.floor((low - anchor) / step), math.ceil((high - anchor) / step)
    edges = anchor + step * np.arange(first, last + 1)
    scale = Scale(float(edges[0]), float(edges[-1]), left, right)
    help_text = "more helpful →" if pool.higher_helps else "← more helpful"
    title = f"influence score, {help_text}"
    parts = x_axis(scale, top, bottom, title, 8 if wide else 4)
    for index, source in enumerate(sources):
        place = pool.source_N == source
        base = top + row * index + head + height
        clipped = np.clip(score_N[place], edges[0], np.nextafter(edges[-1], -np.inf))
        counts = np.histogram(clipped, edges)[0]
        chosen = int(place[:k].sum()) if k else 0
        tall = height / max(int(counts.max()), 1)
        for start, end, n in zip(edges, edges[1:], counts.tolist(), strict=False):
            if not n:
                continue
            middle = (start + end) / 2
            selected = cut is not None and (middle > cut) == pool.higher_helps
            x, wide_bar = scale(start), scale(end) - scale(start) - 1
            shape = (
                f'<rect class="hit" x="{x}" y="{base - height}" width="{wide_bar + 1:.2f}" '
                f'height="{height}"/><rect class="bar{"" if selected else " faint"}" x="{x}" '
                f'y="{base - n * tall:.1f}" width="{wide_bar:.2f}" height="{n * tall:.1f}"/>'
            )
            label = f"{source}\n{count(n, 'chunk')}\nscore {num(start)} to {num(end)}"
            parts.append(mark(label, shape, "c-rel" if source in relevant else "c-other"))
        ticks = sorted({round(scale(float(s)) * 2) / 2 for s in clipped})
        d = "".join(f"M{x:g} {base + 3}v5" for x in ticks)
        parts.append(f'<path class="rug {"c-rel" if source in relevant else "c-other"}" d="{d}"/>')
        parts.append(line(left, base + 0.5, right, base + 0.5, "base"))
        kind = "label strong" if source in relevant else "label"
        facts = f"{count(int(place.sum()), 'chunk')}, {percent(float(place.mean()))}"
        picked = f"{chosen:,} of top {k:,}" if k else ""
        name = shortened(source, 20)
        if wide:
            parts += [text(0, base - 18, name, kind), text(0, base - 2, facts, "tick")]
            if k:
                parts += [
                    text(width, base - 18, f"{chosen:,}", kind, "end"),
                    text(width, base - 2, f"of the top {k:,}", "tick", "end"),
                ]
        else:
            parts.append(text(left, base - height - 6, name, kind))
            parts.append(text(right, base - height - 6, picked or facts, "tick", "end"))
    if cut is not None and k:
        x = scale(cut)
        parts.append(line(x, top - 8, x, bottom, "cut"))
        near_end = x > (left + right) / 2
        words = f"top {k:,} " + ("≥ " if pool.higher_helps else "≤ ") + num(cut)
        parts.append(text(x, top - 14, words, "cutlabel", "end" if near_end else "start"))
    desc = "; ".join(
        f"{s}: median score {num(float(np.median(score_N[pool.source_N == s])))}" for s in sources
    )
    kind = "wide" if wide else "narrow"
    return chart(kind, "Influence scores by source", desc, (width, bottom + 42), parts)


def score_axis(pool: Pool, k: int | None) -> tuple[float, float]:
    """Ends of the score axis: all scores, unless a few outliers would squeeze the rest."""
    score_N = pool.score_N
    low, high = (float(v) for v in np.quantile(score_N, (0.002, 0.998)))
    spread = high - low
    least, most = float(score_N.min()), float(score_N.max())
    low = least if least > low - spread / 4 else low
    high = most if most < high + spread / 4 else high
    if k:
        low, high = min(low, float(score_N[k - 1])), max(high, float(score_N[k - 1]))
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def recall(pools: Sequence[Pool], relevant: Sequence[str], k: int | None) -> str:
    """Share of relevant chunks found by reading the ranking from the top, against chance."""
    left, right, top, bottom = 44, WIDTH - 12, 30, 290
    total = len(pools[0].score_N)
    curves = {p.name: recall_curve(np.isin(p.source_N, relevant)) for p in pools}
    n_relevant = int(np.isin(pools[0].source_N, relevant).sum())
    x, y = Scale(0, total, left, right), Scale(0, 1, bottom, top)
    parts = x_axis(x, top, bottom, "chunks read, from the top of the ranking", 5)
    parts += y_axis(y, left, right, "relevant chunks found", as_percent=True)
    parts.append(path([x(0), x(n_relevant), x(total)], [y(0), y(1), y(1)], "ideal"))
    parts.append(path([x(0), x(total)], [y(0), y(1)], "chance"))
    parts.append(text(x(total * 0.62), y(0.62) + 18, "chance", "tick"))
    colours = ["c-rel", "c-bottom", "c-alt0", "c-alt1"]
    if k:
        parts += [
            line(x(k), top, x(k), bottom, "cut"),
            text(x(k) + 5, bottom - 7, f"k = {k:,}", "cutlabel"),
        ]
    thin = np.unique(np.concatenate([[1, total], np.linspace(1, total, 240).astype(int)]))
    for index, (name, curve_N) in enumerate(curves.items()):
        ys = [y(0), *(y(float(curve_N[i - 1])) for i in thin)]
        parts.append(
            f'<g class="{colours[index % 4]}">{path([x(0), *map(x, thin)], ys, "curve")}</g>'
        )
        if len(curves) > 1:
            kind = f"end {colours[index % 4]}"
            parts.append(text(right, bottom - 10 - 15 * index, name, kind, "end"))
    stops = sorted({max(1, round(total * i / 20)) for i in range(1, 21)} | ({k} if k else set()))
    for previous, stop in zip([0, *stops], stops, strict=False):
        found = "\n".join(f"{n}: {percent(float(c[stop - 1]))} found" for n, c in curves.items())
        label = f"first {count(stop, 'chunk')}\n{found}\nchance: {percent(stop / total)}"
        shape = band(x(previous), x(stop), top, bottom, x(stop))
        shape += "".join(
            f'<circle class="spot" cx="{x(stop)}" cy="{y(float(c[stop - 1]))}" r="4"/>'
            for c in curves.values()
        )
        parts.append(mark(label, shape, "band c-rel"))
    main = curves[pools[0].name]
    desc = f"Half of the relevant chunks are in the first {int(np.searchsorted(main, 0.5)) + 1:,}."
    title = "Relevant chunks found along the ranking"
    return chart("half", title, desc, (WIDTH, bottom + 42), parts)


def band(start: float, end: float, top: float, bottom: float, at: float) -> str:
    """The shape of a mark that is a strip of the plot; the line at `at` shows when it is."""
    return (
        f'<rect class="hit" x="{start:.1f}" y="{top}" width="{end - start:.1f}" '
        f'height="{bottom - top}"/>{line(at, top, at, bottom, "spot")}'
    )


def learning(
    title: str, series: Sequence[Series], dots: Curve | None = None, of_dots: str = "validation"
) -> str:
    """Training loss against step: thin lines are seeds, thick lines their mean."""
    left, right, top, bottom = 44, WIDTH - 84, 30, 250
    thinned = [(s, [_thin(c) for c in s.curves if len(c.step)]) for s in series]
    thinned = [(s, curves) for s, curves in thinned if curves]
    means = []
    for _, curves in thinned:
        n = min(len(c.y) for c in curves)
        means.append(Curve(curves[0].step[:n], np.mean([c.y[:n] for c in curves], 0)))
    shown = [c for _, curves in thinned for c in curves] + ([dots] if dots and len(dots.y) else [])
    x = Scale(0, max(float(c.step[-1]) for c in shown) or 1.0, left, right)
    y = padded([v for c in shown for v in (float(c.y.min()), float(c.y.max()))], bottom, top)
    parts = x_axis(x, top, bottom, "optimizer step", 4)
    parts += y_axis(y, left, right, "training loss, nats per token")
    for s, curves in thinned:
        thin = [path([x(v) for v in c.step], [y(v) for v in c.y], "thin") for c in curves]
        parts.append(f'<g class="{s.colour}">{"".join(thin)}</g>')
    for (s, _), mean in zip(thinned, means, strict=True):
        drawn = path([x(v) for v in mean.step], [y(v) for v in _smooth(mean.y)], "curve")
        parts.append(f'<g class="{s.colour}">{drawn}</g>')
    names = [(shortened(s.label, 12), s.colour) for s, _ in thinned]
    ends = [y(float(_smooth(m.y)[-1])) for m in means]
    if dots and len(dots.y):
        names.append((of_dots, "c-alt0"))
        ends.append(y(float(dots.y[-1])))
        for step, value in zip(dots.step, dots.y, strict=True):
            shape = f'<circle class="dot" cx="{x(step)}" cy="{y(value)}" r="3.5"/>'
            label = f"{of_dots} loss {num(value)}\nstep {step:,.0f}"
            parts.append(mark(label, shape, "c-alt0"))
    for (name, colour), at in zip(names, spread(ends, 15, top, bottom), strict=True):
        parts.append(text(right + 7, at + 4, name, f"end {colour}"))
    stops = np.unique(np.linspace(0, len(means[0].step) - 1, 16).astype(int))
    previous = x(0)
    for stop in stops:
        step = float(means[0].step[stop])
        values = [
            f"{s.label}: {num(float(np.interp(step, m.step, m.y)))}"
            for (s, _), m in zip(thinned, means, strict=True)
        ]
        shape = band(previous, x(step), top, bottom, x(step))
        parts.append(mark("\n".join([f"step {step:,.0f}", *values]), shape, "band"))
        previous = x(step)
    desc = "; ".join(
        f"{s.label}: from {num(float(m.y[0]))} to {num(float(m.y[-1]))}"
        for (s, _), m in zip(thinned, means, strict=True)
    )
    return chart("half", title, desc, (WIDTH, bottom + 42), parts)


def _thin(curve: Curve, most: int = 200) -> Curve:
    """At most `most` points; each is the mean of as many logged steps."""
    block = math.ceil(len(curve.step) / most)
    starts = np.arange(0, len(curve.step), block)
    sizes = np.diff(starts, append=len(curve.step))
    return Curve(*(np.add.reduceat(values, starts) / sizes for values in curve))


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean over a twentieth of the curve."""
    half = max(1, len(y) // 40)
    total = np.cumsum(np.concatenate([[0.0], y]))
    index = np.arange(len(y))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (total[end] - total[start]) / (end - start)


def spread(ys: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Label positions near `ys`, at least `gap` apart, kept inside the plot."""
    order = np.argsort(ys)
    placed = np.array(ys, float)
    for before, after in zip(order, order[1:], strict=False):
        placed[after] = max(placed[after], placed[before] + gap)
    over = max(0.0, float(placed.max(initial=top)) - bottom)
    return np.maximum(placed - over, top).tolist()
