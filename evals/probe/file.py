"""A probe as a file: safetensors, with everything that whoever uses it must know in its header.

Layer, task, target and threshold are read from the file and never asked for again, and a probe
speaks only of the model and the tokenizer it was trained on.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import safetensors, taps
from core.checkpoint import Loaded
from core.errors import InputError
from core.files import PathLike, dumps
from evals.probe import fit
from evals.probe.target import Target
from tokenizers import Tokenizer

FORMAT, SCHEMA = "taproot-probe", 1
LINEAR = ("coef", "intercept", "mean", "std")
MLP = (*LINEAR, "hidden", "hidden_bias")
TEXTS = (
    "kind",
    "tap",
    "task",
    "dtype",
    "model",
    "adapter",
    "model_fingerprint",
    "tokenizer_fingerprint",
)


class Probe(NamedTuple):
    """Tensors float32 (see `fit.probability`) and what is known of them, plain JSON data."""

    tensors: fit.Tensors
    about: dict[str, Any]

    @property
    def tap(self) -> taps.Tap:
        return taps.parse(self.about["tap"])

    @property
    def threshold(self) -> float:
        return self.about["threshold"]

    @property
    def target(self) -> Target:
        of = self.about["target"]
        return Target(of["kind"], of["text"], np.array(of["ids"], np.int32))

    def probability(self, x_ND: np.ndarray) -> np.ndarray:
        """p [N] of activations [N,D]; NaN where they are not finite."""
        return fit.probability(self.tensors, x_ND)


def save_probe(path: PathLike, probe: Probe) -> None:
    about = {"format": FORMAT, "schema": SCHEMA, **probe.about}
    safetensors.write(path, probe.tensors, {"probe": dumps(about)})


def load_probe(path: PathLike) -> Probe:
    """Read and check a probe file; InputError names what is wrong with it."""
    path = Path(path)
    tensors = {name: np.array(x) for name, x in safetensors.read(path).items()}
    header = safetensors.metadata(path).get("probe")
    try:
        about = json.loads(header) if header else None
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise InputError(f"{path} is no probe: its header does not say {FORMAT}; give a file that "
                         "`probe train` or `probe sweep` made")  # fmt: skip
    if about.get("schema") != SCHEMA:
        raise InputError(f"{path} has schema {about.get('schema')!r}, known is {SCHEMA}; train the "
                         "probe again")  # fmt: skip
    for name in TEXTS:
        if not isinstance(about.get(name), str):
            raise InputError(f"{path} does not say its {name}; train the probe again")
    _check_about(path, about)
    _check_tensors(path, about["kind"], tensors)
    return Probe(tensors, about)


def _check_about(path: Path, about: dict[str, Any]) -> None:
    threshold = about.get("threshold")
    if type(threshold) is not float or not 0 <= threshold <= 1:
        raise InputError(f"{path} has no threshold ({threshold!r}): what it says cannot be judged; "
                         "train the probe again")  # fmt: skip
    try:
        taps.parse(about["tap"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    target = about.get("target")
    known = isinstance(target, dict) and target.keys() == {"kind", "text", "ids"}
    if not known or about["task"] not in ("next", "current"):
        raise InputError(f"{path} does not say what it predicts; train the probe again")
    if not isinstance(about.get("metrics"), dict):
        raise InputError(f"{path} has no metrics; train the probe again")


def _check_tensors(path: Path, kind: str, tensors: fit.Tensors) -> None:
    names = {"linear": LINEAR, "mlp": MLP}.get(kind)
    if names is None or tensors.keys() != set(names):
        raise InputError(f"{path} of kind {kind!r} holds {', '.join(sorted(tensors))}; a linear "
                         f"probe holds {', '.join(LINEAR)}, an mlp {', '.join(MLP)}")  # fmt: skip
    width = tensors["mean"].size
    hidden = tensors["coef"].size if kind == "mlp" else 0
    shapes = {"coef": (hidden or width,), "intercept": (), "mean": (width,), "std": (width,),
              "hidden": (width, hidden), "hidden_bias": (hidden,)}  # fmt: skip
    for name in names:
        x = tensors[name]
        if x.dtype != np.float32 or x.shape != shapes[name] or not np.isfinite(x).all():
            raise InputError(f"{path}: tensor {name!r} is {x.dtype}{list(x.shape)}; expected "
                             f"finite float32{list(shapes[name])}")  # fmt: skip


def require_match(probe: Probe, loaded: Loaded, tokenizer: Tokenizer, where: PathLike) -> None:
    """InputError unless the probe was trained on this model with this tokenizer."""
    about = probe.about
    if about["model_fingerprint"] != loaded.fingerprint:
        raise InputError(f"{where} is a probe of model {about['model']} "
                         f"({about['model_fingerprint'][:12]}), not of {loaded.fingerprint[:12]}; "
                         "give the model it was trained on")  # fmt: skip
    if about["tokenizer_fingerprint"] != tokenizer.fingerprint:
        raise InputError(f"{where} was trained with another tokenizer "
                         f"({about['tokenizer_fingerprint'][:12]}) than {tokenizer.name} "
                         f"({tokenizer.fingerprint[:12]})")  # fmt: skip
    tap = taps.parse(about["tap"], loaded.config)
    width = taps.width(loaded.config, tap)
    if probe.tensors["mean"].size != width:
        raise InputError(f"{where} reads {probe.tensors['mean'].size} features, {tap} has {width}")
