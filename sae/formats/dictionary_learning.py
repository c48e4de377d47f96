"""The format of dictionary_learning (github.com/saprmarks/dictionary_learning), as safetensors.

Its own files, `ae.pt`, are pickles, which are never opened here; the same tensors in
`ae.safetensors` are read, with `config.json`, whose `trainer.dict_class` is the architecture. Those
trained with batch-top-k compare with one threshold when they are used. All but JumpReLU and
AutoEncoderNew subtract the decoder's bias from the input.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import safetensors
from core.errors import InputError
from sae.coder import About, Architecture, Coder, Sae
from sae.formats import tensors

CONFIG, WEIGHTS, PICKLE = "config.json", "ae.safetensors", "ae.pt"
LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


class Layout(NamedTuple):
    """A class of that library: its architecture, tensors {theirs: ours}, and what is centred."""

    architecture: Architecture
    names: dict[str, str]
    centred: bool = True


CLASSES = {
    "AutoEncoder": Layout("standard", LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": Layout("standard", LINEAR | {"decoder.bias": "b_dec"}, centred=False),
    "AutoEncoderTopK": Layout("topk", LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": Layout("jumprelu", LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": Layout("jumprelu", PLAIN),
    "JumpReluAutoEncoder": Layout("jumprelu", PLAIN, centred=False),
    "GatedAutoEncoder": Layout(
        "gated",
        {
            "encoder.weight": "W_enc",
            "decoder.weight": "W_dec",
            "decoder_bias": "b_dec",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
            "r_mag": "r_mag",
        },
    ),
}


def read(folder: Path, origin: str) -> Sae:
    """The SAE of a folder; InputError says how to turn a pickle into safetensors."""
    where, path = folder / CONFIG, folder / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{folder} has no {WEIGHTS}; a pickle such as {PICKLE} can run code and is not read. "
            "Convert it once, in an environment with torch: import torch, safetensors.torch; "
            f"safetensors.torch.save_file(torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')"
        )
    trainer: Any = tensors.read_config(where).get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if kind not in CLASSES:
        raise InputError(f"{where}: trainer.dict_class {kind!r} is unknown; known: "
                         f"{', '.join(CLASSES)}")  # fmt: skip
    layout, stored = CLASSES[kind], safetensors.read(path)
    k = stored.pop("k", None)
    stored.pop("group_sizes", None)  # of a Matryoshka's prefixes, in training
    if layout.architecture == "topk":
        stored.pop("threshold", None)  # it has one too, and ranks all the same
    width, features = (
        tensors.size(trainer, name, where) for name in ("activation_dim", "dict_size")
    )
    params = tensors.taken(stored, layout.names, path)
    if "threshold" in params and params["threshold"].ndim == 0:
        params["threshold"] = np.full(features, params["threshold"])
    ranked = layout.architecture == "topk"
    if ranked and k is not None and int(k) != trainer.get("k"):
        raise InputError(f"{path} has k {int(k)}, but {CONFIG} beside it says {trainer.get('k')}; "
                         "copy the config that was saved with these weights")  # fmt: skip
    coder = Coder(layout.architecture, width, features, width,
                  k=tensors.size(trainer, "k", where) if ranked else 0,
                  centred=layout.centred)  # fmt: skip
    module, layer = trainer.get("submodule_name"), trainer.get("layer")
    tap = f"resid_post.{layer}" if str(module).startswith("resid_post") else None
    about = About(tap, tap, trainer.get("lm_name"), origin, "dictionary_learning", trainer)
    return tensors.made(coder, params, about, path)
