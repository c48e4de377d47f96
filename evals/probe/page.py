"""The page of a probe: a text coloured by what each layer's probe says about every token.

Probabilities travel as 4 decimals in 15 bits, beside one bit for the probe's answer, so the page
shows the digits and the decisions that were computed here. A layer's figures are texts made here;
the script (`page.js`) only puts those of the chosen layer in their places.

Dims: L probes (layers), T tokens.
"""

import base64
import codecs
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.page.shell import document
from core.page.text import Markup, about, count, esc, figure, table, typeset
from evals.probe.view import View
from evals.report import charts

HERE = Path(__file__).parent
UNKNOWN, YES, DECIMALS = 0x7FFF, 0x8000, 10_000
METRICS = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "ap": "Average precision",
    "mcc": "MCC",
    "brier": "Brier score",
    "ece": "Calibration error",
}
COUNTS = {"tp": "hit", "fn": "miss", "fp": "false alarm", "tn": "correct no"}
CURVES = {"balanced_accuracy": "c-top", "auroc": "c-alt0"}
MOST_LABELS = 20


def page(view: View) -> str:
    """The whole page as HTML text, readable offline and for the most part without its script."""
    best = _best(view)
    layers = [_figures(view, layer) for layer in range(len(view.layers))]
    data = {
        "best": best,
        "layers": layers,
        "truth": "".join("?01"[int(truth) + 1] for truth in view.truth_T),
        "codes": base64.b64encode(codes(view.p_LT, view.thresholds_L).tobytes()).decode(),
    }
    main = (
        f"{_headline(view, best)}{_bar(view, layers[best], best)}"
        f"{_layers(view, layers, best)}{_text(view, layers[best])}"
    )
    style, script = ((HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    return document(esc(view.title), main, style, script, data={"view": data})


def codes(p_LT: np.ndarray, thresholds_L: np.ndarray) -> np.ndarray:
    """uint16 [L, T]: p to 4 decimals, plus YES where p reaches the threshold; UNKNOWN for NaN."""
    known_LT = np.isfinite(p_LT)
    digits_LT = np.rint(np.where(known_LT, p_LT, 0).astype(np.float64) * DECIMALS)
    says_LT = _says(p_LT, thresholds_L)
    return np.where(known_LT, digits_LT + YES * says_LT, UNKNOWN).astype("<u2")


def confusion(view: View, layer: int) -> dict[str, int]:
    """How many tokens of the text are hits, misses, false alarms, rightly passed over."""
    says_T = _says(view.p_LT, view.thresholds_L)[layer]
    counted_T = np.isfinite(view.p_LT[layer]) & (view.truth_T >= 0)
    truth_T = view.truth_T == 1
    cells = {"tp": says_T & truth_T, "fn": ~says_T & truth_T}
    cells |= {"fp": says_T & ~truth_T, "tn": ~says_T & ~truth_T}
    return {name: int((cell_T & counted_T).sum()) for name, cell_T in cells.items()}


def _says(p_LT: np.ndarray, thresholds_L: np.ndarray) -> np.ndarray:
    return p_LT >= thresholds_L[:, None]


def _best(view: View) -> int:
    """The layer of highest balanced accuracy; the last one when none has any."""
    values = [_number(metrics, "balanced_accuracy") for metrics in view.metrics]
    return int(np.nanargmax(values)) if np.isfinite(values).any() else len(values) - 1


def _number(metrics: dict[str, Any], name: str) -> float:
    value = metrics.get(name)
    return np.nan if value is None else float(value)


def _fixed(x: float, digits: int = 3) -> str:
    return f"{x:.{digits}f}".replace("-", "−") if np.isfinite(x) else "n/a"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "n/a"


def _figures(view: View, layer: int) -> dict[str, str]:
    """All that the page says of a layer, as texts by the names of their places."""
    figures, metrics = {"layer": view.layers[layer]}, view.metrics[layer]
    figures["threshold"] = _fixed(float(view.thresholds_L[layer]), 4)
    figures |= {name: _fixed(_number(metrics, name)) for name in METRICS}
    for where, counts in (("here", confusion(view, layer)), ("held", metrics)):
        cells = {name: counts.get(name) for name in COUNTS}
        figures |= {
            f"{where}_{name}": "n/a" if n is None else f"{n:,}" for name, n in cells.items()
        }
        tp, fn, fp, tn = (n or 0 for n in cells.values())
        figures[f"{where}_yes"], figures[f"{where}_no"] = _share(tp, tp + fn), _share(tn, tn + fp)
        figures[f"{where}_errors"] = f"{fn + fp:,}"
    return figures


def _place(figures: dict[str, str], name: str) -> Markup:
    """Where the script writes a figure of the chosen layer."""
    return Markup(f'<span data-figure="{name}">{esc(figures[name])}</span>')


def _headline(view: View, best: int) -> str:
    value = _number(view.metrics[best], "balanced_accuracy")
    lead = f"Balanced accuracy on held-out text is {_fixed(value)}"
    if len(view.layers) > 1 and np.isfinite(value):
        lead += f" at {view.layers[best]}, the best of {len(view.layers)} layers"
    return (
        f'<section class="verdict"><h1>{esc(view.title)}</h1><p class="lead">{esc(lead)}.</p>'
        f"{about(view.about)}</section>"
    )


def _bar(view: View, figures: dict[str, str], best: int) -> str:
    """The layer's slider, which stays in sight."""
    last = len(view.layers) - 1
    slider = (
        f'<input type="range" id="layer" min="0" max="{last}" value="{best}" step="1" '
        'aria-label="Layer" aria-keyshortcuts="[ ]">'
    )
    keys = '<span class="keys"><kbd>[</kbd> <kbd>]</kbd> previous, next layer</span>'
    return (
        f'<div class="bar" id="bar"><span class="extra">Layer</span>{slider if last else ""}'
        f'<output for="layer" data-figure="layer">{esc(view.layers[best])}</output>'
        f"<span>balanced accuracy <b>{_place(figures, 'balanced_accuracy')}</b></span>"
        f'<span class="extra">says yes from <b>{_place(figures, "threshold")}</b></span>'
        f"{keys if last else ''}</div><noscript><p>Without its script the page shows one layer, "
        "and the text without colours. The table has all layers.</p></noscript>"
    )


def _layers(view: View, layers: Sequence[dict[str, str]], best: int) -> str:
    chart, head = "", "How good is the probe?"
    if len(layers) > 1:
        note = "On held-out text; dashed is guessing. Click a layer to choose it."
        chart, head = figure(curve(view, best), note), "Which layer knows?"
    figures = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{_place(layers[best], key)}</dd></div>"
        for key, name in METRICS.items()
    )
    names = {"layer": "Layer", "threshold": "Threshold"} | METRICS
    names |= {f"held_{key}": key.upper() for key in COUNTS}
    names |= {f"here_{key}": f"{key.upper()} here" for key in COUNTS}
    rows = [[figures[name] for name in names] for figures in layers]
    return (
        f'<section><h2>{head}</h2><div class="pair">{chart}{_confusion(layers[best])}</div>'
        f'<dl class="metrics">{figures}</dl><details><summary>All layers as a table</summary>'
        f"{table(list(names.values()), rows)}</details></section>"
    )


def _confusion(figures: dict[str, str]) -> str:
    """Raw counts of the chosen layer, each with the mark its tokens have in the text."""
    bodies = ""
    for where, title in (("here", "This text"), ("held", "Held-out text")):
        cell = {
            key: f'<td><b class="{key}">{_place(figures, f"{where}_{key}")}</b>'
            f"<small>{name}</small></td>"
            for key, name in COUNTS.items()
        }
        yes, no = (f"<td>{_place(figures, f'{where}_{row}')}</td>" for row in ("yes", "no"))
        bodies += (
            f'<tbody><tr><th colspan="4" scope="rowgroup">{title}</th></tr>'
            f'<tr><th scope="row">truth: yes</th>{cell["tp"]}{cell["fn"]}{yes}</tr>'
            f'<tr><th scope="row">truth: no</th>{cell["fp"]}{cell["tn"]}{no}</tr></tbody>'
        )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("says yes", "says no", "right"))
    return f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead>{bodies}</table>'


def curve(view: View, chosen: int) -> str:
    """Balanced accuracy and AUROC by layer; each layer is a choice of a radio group."""
    width, left, right, top, bottom = 560, 46, 548, 30, 226
    value_ML = [[_number(metrics, name) for metrics in view.metrics] for name in CURVES]
    known = [value for value_L in value_ML for value in value_L if np.isfinite(value)]
    y = charts.Scale(min([0.45, *known]), 1.0, bottom, top)
    x = charts.Scale(0, len(view.layers) - 1, left + 14, right - 8)
    parts = charts.y_axis(y, left, right, "")
    parts.append(charts.line(left, y(0.5), right, y(0.5), "chance"))
    named = zip(value_ML, CURVES.items(), (left, left + 190), strict=True)
    for value_L, (name, colour), place in named:
        parts.append(f'<g class="{colour}">{charts.text(place, 12, METRICS[name], "end")}')
        parts += [
            charts.path([x(i) for i in run], [y(value_L[i]) for i in run], "curve")
            for run in _runs(value_L)
        ]
        parts.append("</g>")
    every = -(-len(view.layers) // MOST_LABELS)
    half = (x(1) - x(0)) / 2
    for layer, (tap, value_M) in enumerate(
        zip(view.layers, zip(*value_ML, strict=True), strict=True)
    ):
        if layer % every == 0:
            kind = "tick odd" if layer // every % 2 else "tick"
            label = tap.rpartition(".")[2]
            parts.append(charts.text(x(layer), bottom + 17, label, kind, "middle"))
        dots = "".join(
            f'<circle class="dot {colour}" cx="{x(layer)}" cy="{y(value)}" r="3.4"/>'
            for value, colour in zip(value_M, CURVES.values(), strict=True)
            if np.isfinite(value)
        )
        values = (
            f"{METRICS[name]} {_fixed(value)}" for name, value in zip(CURVES, value_M, strict=True)
        )
        label = "&#10;".join(map(esc, (tap, *values)))
        parts.append(
            f'<g class="mark" role="radio" aria-checked="{str(layer == chosen).lower()}" '
            f'tabindex="{0 if layer == chosen else -1}" aria-label="{label}">'
            f'<rect class="hit" x="{x(layer) - half:.2f}" y="{top}" width="{2 * half:.2f}" '
            f'height="{bottom - top}"/>{charts.line(x(layer), top, x(layer), bottom, "spot")}'
            f"{dots}</g>"
        )
    parts.append(charts.text((left + right) / 2, bottom + 38, "Layer", "axis", "middle"))
    return (
        f'<svg class="half" viewBox="0 0 {width} {bottom + 44}" role="radiogroup" '
        f'aria-label="Layer, with its balanced accuracy and AUROC">{"".join(parts)}</svg>'
    )


def _runs(value_L: Sequence[float]) -> list[list[int]]:
    """Layers in a row that have a value: a curve does not bridge what is not known."""
    runs: list[list[int]] = [[]]
    for layer, value in enumerate(value_L):
        if np.isfinite(value):
            runs[-1].append(layer)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _text(view: View, figures: dict[str, str]) -> str:
    marks = "".join(
        f'<span><b class="{key}">{name}</b> {meaning}</span>'
        for key, name, meaning in (
            ("tp", "hit", "says yes, and it is so"),
            ("fn", "miss", "says no, but it is so"),
            ("fp", "false alarm", "says yes, but it is not"),
            ("na", "n/a", "no value"),
        )
    )
    scale = (
        '<div class="scale" role="img" aria-label="colours from 0 to 1">'
        f'<i id="notch" style="--p: {figures["threshold"]}"></i></div>'
    )
    name = f"The text, {count(len(view.tokens), 'token')}; arrow keys walk"
    return (
        "<section><h2>Token by token</h2><p>The deeper the colour, the likelier the probe holds it "
        "that the answer at this token is yes. Point at a token for its value, or press Tab and "
        "walk with the arrow keys.</p>"
        f'<div class="legend"><span class="whole">p 0 {scale} 1</span>{marks}</div>'
        '<div class="tools" hidden><button type="button" id="errors" aria-pressed="false">'
        f"Only errors ({_place(figures, 'here_errors')})</button></div>"
        f'<pre class="tokens shaded" id="tokens" dir="auto" role="group" aria-label="{name}">'
        f"{spans(view.tokens)}</pre></section>"
    )


def spans(tokens: Sequence[bytes]) -> str:
    """One span a token. A character that several tokens make stands in the one that completes it;
    those before it show that they are a part. Blanks before a word stay outside its span, whose
    box would else begin at the end of a line."""
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    parts = []
    for place, token in enumerate(tokens, 1):
        text = decoder.decode(token, final=place == len(tokens))
        word = text.lstrip(" ") or text
        part = '<i class="part"></i>' if decoder.getstate()[0] or not text else ""
        blanks = text[: len(text) - len(word)]
        parts.append(f"{blanks}<span>{typeset(word, blanks=False)}{part}</span>")
    return "".join(parts)
