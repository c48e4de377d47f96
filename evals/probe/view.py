"""What probes say about every token of a text, for the page that people read.

Dims: L probes (layers), T tokens.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from evals.probe import activations
from evals.probe.corpus import from_text, outside, truth
from evals.probe.file import Probe, load_probe, require_match
from evals.probe.outputs import LAYERS, SINGLE
from tokenizers import Tokenizer


class View(NamedTuple):
    """Probabilities p_LT (float32; NaN: nothing to say there) of a text's tokens, by layer.

    tokens: the bytes of each. layers: names of the taps. truth_T int8: 1 positive, 0 negative,
    -1 unknown. thresholds_L: p from which a probe says yes. metrics: one dict a layer, from its
    probe file (balanced_accuracy, auroc, ap, mcc, brier, ece, tn, fp, fn, tp; None: undefined).
    about: what the page's header says, by name.
    """

    title: str
    tokens: list[bytes]
    layers: list[str]
    p_LT: np.ndarray
    truth_T: np.ndarray
    thresholds_L: np.ndarray
    metrics: list[dict[str, Any]]
    about: dict[str, str]


def open_probes(path: Path) -> list[Probe]:
    """The probe of a file or of a `probe train` folder, or all of a sweep, by layer."""
    if path.is_dir():
        files = [path / SINGLE] if (path / SINGLE).exists() else [*(path / LAYERS).glob("*")]
        files = [file for file in files if file.suffix == ".safetensors"]
        if not files:
            raise InputError(f"{path} holds no probe; give a folder of `probe train` or "
                             "`probe sweep`, or a probe file")  # fmt: skip
    elif not path.exists():
        raise InputError(f"{path} does not exist; give a folder of `probe train` or `probe sweep`, "
                         "or a probe file")  # fmt: skip
    else:
        files = [path]
    probes = sorted((load_probe(file) for file in files), key=lambda probe: probe.about["layer"])
    for name in ("task", "target", "model_fingerprint", "tokenizer_fingerprint", "context"):
        if any(probe.about[name] != probes[0].about[name] for probe in probes):
            raise InputError(f"the probes in {path} differ in {name}; make the sweep again")
    return probes


def view(
    path: Path,
    probes: list[Probe],
    loaded: Loaded,
    tokenizer: Tokenizer,
    text: Path,
    tokens: int,
    batch_tokens: int,
) -> View:
    """Ask the probes about the first `tokens` tokens of a text, read as the probes' own was."""
    for probe in probes:
        require_match(probe, loaded, tokenizer, path)
    first = probes[0].about
    target = probes[0].target
    corpus = from_text(text, tokenizer, min(first["context"], loaded.config.context))
    place_T = np.flatnonzero(~np.isin(corpus.ids_S, outside(tokenizer)))
    found, place_T = len(place_T), place_T[:tokens]
    at = tuple(probe.tap for probe in probes)
    read = activations.read(loaded, Execution(first["dtype"]), corpus, place_T, at, batch_tokens,
                            np.zeros(len(place_T), bool), None)  # fmt: skip
    p_LT = np.stack([p.probability(x) for p, x in zip(probes, read.x_LND, strict=True)])
    truth_T = np.full(len(place_T), -1, np.int8)
    if target.kind != "label":
        truth_T = truth(corpus, target, first["task"], tokenizer, None)[place_T]
    asks = "is the next token" if first["task"] == "next" else "is this token"
    meant = {"token": "", "regex": "one that matches ", "label": "labelled "}[target.kind]
    meant += repr(target.text)
    shown = f"{len(place_T):,}" if found == len(place_T) else f"first {len(place_T):,} of {found:,}"
    about = {
        "question": f"{asks} {meant}?",
        "model": first["model"],
        "text": text.name,
        "tokens": shown,
        "probe": first["kind"],
        "trained on": f"{first['counts']['train']['samples']:,} tokens",
        "threshold": first["threshold_rule"],
    }
    return View(
        f"Probes for {meant}: {text.name}",
        [tokenizer.pieces[i] for i in corpus.ids_S[place_T].tolist()],
        [str(tap) for tap in at],
        p_LT.astype(np.float32),
        truth_T,
        np.array([probe.threshold for probe in probes]),
        [probe.about["metrics"] for probe in probes],
        about,
    )
