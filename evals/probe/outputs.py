"""What a run of probes leaves behind: probe files, results, a table, a curve, TensorBoard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.classification import COUNTS
from core.command import columns
from core.files import write_json, write_jsonl, write_text
from core.page.text import esc
from evals.probe.file import save_probe
from evals.probe.run import Judged

SHOWN = ("balanced_accuracy", "auroc", "ap", "mcc", "brier")
SINGLE, LAYERS = "probe.safetensors", "layers"
NAMES = {"majority": "always the same", "current_token": "current token", "linear": "linear probe",
         "own_probability": "model's own p", "random_labels": "random labels"}  # fmt: skip


def write(folder: Path, judged: Judged, single: bool) -> dict[str, Any]:
    """All files of a run; returns what results.json holds. Equal runs write equal bytes, but for
    TensorBoard's, which carry the time."""
    layers = []
    for probe in judged.probes:
        file = SINGLE if single else f"{LAYERS}/{probe.about['tap']}.safetensors"
        save_probe(folder / file, probe)
        names = ("tap", "layer", "fit", "threshold", "metrics", "intervals", "controls")
        layers.append({"file": file, **{name: probe.about[name] for name in names}})
    about = judged.probes[0].about
    names = ("model", "model_fingerprint", "tokenizer_fingerprint", "task", "rule", "target",
             "kind", "dtype", "data", "interval_of")  # fmt: skip
    results = {
        "format": "taproot-probes",
        **{name: about[name] for name in names},
        "counts": judged.counts,
        "baselines": judged.baselines,
        "layers": layers,
    }
    write_json(folder / "results.json", results)
    lines = [{"step": one["layer"], "tap": one["tap"], **_scalars(one)} for one in layers]
    write_jsonl(folder / "metrics.jsonl", lines)
    if not single:
        write_text(folder / "curve.svg", curve(results))
    _board(folder, layers)
    return results


def _scalars(layer: dict[str, Any]) -> dict[str, float]:
    """What TensorBoard shows of a layer, in its order there; NaN has no place in it."""
    metrics, control = layer["metrics"], layer["controls"]["random_labels"] or {}
    found = {name: metrics[name] for name in ("balanced_accuracy", *COUNTS, *SHOWN[1:])}
    found["threshold"], found["selectivity"] = layer["threshold"], control.get("selectivity")
    return {f"probe/{name}": value for name, value in found.items() if value is not None}


def _board(folder: Path, layers: Sequence[dict[str, Any]]) -> None:
    from tensorboardX import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(folder)) as board:
        lines = {"scores": SHOWN[:3], "confusion": COUNTS}
        charts = {title: ["Multiline", [f"^probe/{name}$" for name in names]]
                  for title, names in lines.items()}  # fmt: skip
        board.add_custom_scalars({"probe, by layer": charts})
        for layer in layers:
            for name, value in _scalars(layer).items():
                board.add_scalar(name, value, layer["layer"])
            tn, fp, fn, tp = (layer["metrics"][name] for name in COUNTS)
            text = (f"| {layer['tap']} | says no | says yes |\n|---|---|---|\n"
                    f"| is no | {tn} | {fp} |\n| is yes | {fn} | {tp} |")  # fmt: skip
            board.add_text("probe/confusion", text, layer["layer"])


def table(results: dict[str, Any]) -> str:
    """The results for a terminal, one line a layer and one a baseline."""
    heads = ("balanced acc", "95 %", "AUROC", "AP", "MCC", "Brier", *COUNTS, "threshold",
             "selectivity")  # fmt: skip
    rows: list[tuple[str, ...]] = [("", *heads)]
    for layer in results["layers"]:
        limits = layer["intervals"]["balanced_accuracy"]
        control = layer["controls"]["random_labels"] or {}
        rows.append(_line(layer["tap"], layer["metrics"], limits, control.get("selectivity")))
        if "linear" in layer["controls"]:
            rows.append(_line("  linear", layer["controls"]["linear"]))
    rows += [_line(NAMES[name], of) for name, of in results["baselines"].items()]
    counts = results["counts"]
    parts = ", ".join(
        f"{name} {counts[name]['samples']:,} ({counts[name]['positives']:,} positive)"
        for name in ("train", "validation", "test")
    )
    tail = f"{parts}; {100 * counts['prevalence']:.3g}% of {counts['tokens']:,} tokens are positive"
    if counts["skipped_batches"]:
        tail += f"; {counts['skipped_batches']} of {counts['batches']} batches were not finite"
    return f"{columns(rows)}\n{tail}"


def _line(
    name: str,
    metrics: dict[str, Any],
    limits: Sequence[float] | None = None,
    selectivity: float | None = None,
) -> tuple[str, ...]:
    values = [_number(metrics.get(name)) for name in SHOWN]
    counts = [f"{metrics[name]:,}" if name in metrics else "" for name in COUNTS]
    span = f"{limits[0]:.3f}-{limits[1]:.3f}" if limits else ""
    threshold = _number(metrics.get("threshold"))
    return (name, values[0], span, *values[1:], *counts, threshold, _number(selectivity))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def curve(results: dict[str, Any]) -> str:
    """Balanced accuracy and its interval by layer as an SVG, baselines as dashed lines."""
    layers, baselines = results["layers"], results["baselines"]
    left, right, top, bottom = 50, 560, 30, 270
    step = (right - left - 40) / max(len(layers) - 1, 1)
    xs = [left + 20 + step * i for i in range(len(layers))]

    def y(value: float) -> float:  # from 0.4, a little below chance, to 1
        return bottom - (max(value, 0.4) - 0.4) / 0.6 * (bottom - top)

    parts = [f'<text x="{left}" y="18">balanced accuracy of {esc(results["target"]["text"])}, '
             f"{esc(results['task'])} token</text>"]  # fmt: skip
    for tenth in range(4, 11):
        at = y(tenth / 10)
        parts.append(f'<path d="M{left} {at:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="42" y="{at + 4:.1f}" text-anchor="end">{tenth / 10}</text>')
    for name, of in baselines.items():
        at = y(of["balanced_accuracy"])
        parts += [f'<path d="M{left} {at:.1f}H{right}" stroke="#777" stroke-dasharray="5 4"/>',
                  f'<text x="{right + 8}" y="{at + 4:.1f}">{NAMES[name]}</text>']  # fmt: skip
    points = []
    for x, layer in zip(xs, layers, strict=True):
        at, limits = y(layer["metrics"]["balanced_accuracy"]), layer["intervals"]
        points.append(f"{x:.1f} {at:.1f}")
        if span := limits["balanced_accuracy"]:
            parts.append(f'<path d="M{x:.1f} {y(span[0]):.1f}V{y(span[1]):.1f}" stroke="#1660a8" '
                         'stroke-width="2"/>')  # fmt: skip
        name = "embed" if layer["layer"] < 0 else str(layer["layer"])
        parts += [f'<circle cx="{x:.1f}" cy="{at:.1f}" r="4" fill="#1660a8"/>',
                  f'<text x="{x:.1f}" y="290" text-anchor="middle">{name}</text>']  # fmt: skip
    parts.append(f'<path d="M{"L".join(points)}" fill="none" stroke="#1660a8"/>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 300" font-family="sans-serif" '
        f'font-size="12"><rect width="700" height="300" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
