"""The format of SAELens (github.com/decoderesearch/SAELens), in and out.

`cfg.json` and `sae_weights.safetensors`, whose tensors have the names and orientation of ours but
for W_skip [O,D]. Files from before version 6 have other keys and defaults. Two normalisations do
nothing when an SAE is used, because SAELens folds them into the weights that it saves.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from core import files, safetensors
from core.errors import InputError
from sae import coder as coders
from sae.coder import About, Architecture, Coder, Normalize, Sae
from sae.formats import names, tensors

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.54.12"  # of the conventions that are written
# SAELens's architectures: ours, and whether it is a transcoder and has W_skip.
KNOWN: dict[str, tuple[Architecture, bool, bool]] = {
    "standard": ("standard", False, False),
    "gated": ("gated", False, False),
    "jumprelu": ("jumprelu", False, False),
    "topk": ("topk", False, False),
    "abstopk": ("abstopk", False, False),
    "matching_pursuit": ("matching_pursuit", False, False),
    "transcoder": ("standard", True, False),
    "skip_transcoder": ("standard", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
NORMALIZE: dict[str, Normalize] = {
    "none": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm_rescale",
    "expected_average_only_in": "none",
    "covariance_whitening": "none",
}
# What a config from before version 6 says of where an SAE belongs; later ones have `metadata`.
METADATA = (
    "model_name", "hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out",
    "hook_head_index", "hook_head_index_out", "model_class_name", "model_from_pretrained_kwargs",
    "prepend_bos", "exclude_special_tokens", "neuronpedia_id", "context_size", "seqpos_slice",
    "dataset_path", "sae_lens_training_version",
)  # fmt: skip


def read(folder: Path, origin: str) -> Sae:
    """The SAE of a folder; what its config says of model and hooks stays in `about.extra`."""
    where, path = folder / CONFIG, folder / WEIGHTS
    config = _modern(tensors.read_config(where), where)
    if config["architecture"] not in KNOWN:
        raise InputError(
            f"{where}: architecture {config['architecture']!r} is unknown; known: "
            f"{', '.join(KNOWN)}. One that is being trained is saved as one of these by SAELens's "
            "save_inference_model"
        )
    architecture, transcoder, skip = KNOWN[config["architecture"]]
    normalize = config.get("normalize_activations") or "none"
    if normalize not in NORMALIZE:
        raise InputError(f"{where}: normalize_activations {normalize!r} is unknown; known: "
                         f"{', '.join(NORMALIZE)}")  # fmt: skip
    d_in, ranked = tensors.size(config, "d_in", where), architecture in ("topk", "abstopk")
    coder = Coder(
        architecture,
        d_in,
        tensors.size(config, "d_sae", where),
        tensors.size(config, "d_out", where) if transcoder else d_in,
        k=tensors.size(config, "k", where) if ranked else 0,
        centred=not transcoder and config.get("apply_b_dec_to_input", True),
        normalize=NORMALIZE[normalize],
        rescale=ranked and config.get("rescale_acts_by_decoder_norm", False),
        transcoder=transcoder,
    )
    if architecture == "matching_pursuit":
        coder = dataclasses.replace(
            coder,
            residual_threshold=float(config.get("residual_threshold", 1e-2)),
            max_iterations=config.get("max_iterations") or 0,
            stop_on_duplicate=config.get("stop_on_duplicate_support", True),
        )
    stored = safetensors.read(path)
    if not np.allclose(stored.pop("scaling_factor", 1.0), 1.0):
        raise InputError(f"{path}: tensor 'scaling_factor' is not 1, which SAELens no longer "
                         "applies; multiply the rows of W_dec by it and remove it")  # fmt: skip
    asked = {name: name for name in coders.shapes(coder)} | ({"W_skip": "W_skip"} if skip else {})
    params = tensors.taken(stored, asked, path)
    if skip:
        params["W_skip"] = params["W_skip"].T
    extra = dict(config["metadata"])
    extra.pop("sae_lens_version", None)
    model = extra.pop("model_name", None)
    hook_in = names.tap(extra.get("hf_hook_name")) or names.tap(extra.get("hook_name"))
    hook_out = names.tap(extra.get("hf_hook_name_out")) or names.tap(extra.get("hook_name_out"))
    if config.get("reshape_activations", "none") != "none":
        extra["reshape_activations"] = config["reshape_activations"]
    about = About(hook_in, hook_out if transcoder else hook_in, model, origin, "saelens", extra)
    return tensors.made(coder, params, about, path)


def save(folder: Path, sae: Sae) -> None:
    """Write an SAE so that `sae_lens.SAE.load_from_disk(folder)` computes the same.

    `about.extra` goes into the metadata. Raises InputError for what SAELens has no architecture
    for, and for a folder that holds other files, before anything is written.
    """
    coder, params = sae.coder, dict(sae.params)
    if coder.rescale and coder.architecture not in ("topk", "abstopk"):
        params = coders.fold_decoder_norm(coder, params)
        coder = dataclasses.replace(coder, rescale=False)
    kind = (coder.architecture, coder.transcoder, "W_skip" in params)
    architecture = next((name for name, known in KNOWN.items() if known == kind), None)
    if architecture is None:
        what = f"{coder.architecture} {'transcoder' if coder.transcoder else 'SAE'}"
        raise InputError(f"{sae.about.origin}: SAELens has no {what}"
                         f"{' with a skip connection' if kind[2] else ''}, only "
                         f"{', '.join(KNOWN)}; keep the format it has")  # fmt: skip
    others = {path.name for path in folder.glob("*")} - {CONFIG, WEIGHTS}
    if others or folder.is_file():
        raise InputError(f"{folder} {'holds other files' if others else 'is a file'}; name a new "
                         "folder")  # fmt: skip
    extra, about = dict(sae.about.extra), sae.about
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": coder.centred,
        "normalize_activations": coder.normalize,
        "reshape_activations": extra.pop("reshape_activations", "none"),
    }
    if coder.transcoder:
        config["d_out"] = coder.d_out
    if coder.architecture in ("topk", "abstopk"):
        config |= {"k": coder.k, "rescale_acts_by_decoder_norm": coder.rescale}
    if coder.architecture == "matching_pursuit":
        config["residual_threshold"] = coder.residual_threshold
        config["max_iterations"] = coder.max_iterations or None
        config["stop_on_duplicate_support"] = coder.stop_on_duplicate
    named = {"model_name": about.model}
    for end, tap in (("", about.tap_in), ("_out", about.tap_out if coder.transcoder else None)):
        named[f"hook_name{end}"] = names.transformer_lens(tap) if tap else None
    said = {name: value for name, value in named.items() if value}
    config["metadata"] = {"sae_lens_version": VERSION, **said, **extra}
    if "W_skip" in params:
        params["W_skip"] = params["W_skip"].T
    values = {name: np.asarray(value, np.float32) for name, value in params.items()}
    with files.atomic_folder(folder) as new:
        safetensors.write(new / WEIGHTS, values, {"format": "pt"})
        files.write_json(new / CONFIG, config)


def _modern(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """A config with the keys and defaults of version 6, whichever wrote it."""
    metadata = config.get("metadata") or {}
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if version.partition(".")[0].isdecimal() and int(version.partition(".")[0]) >= 6:
        return {"architecture": "standard", **config, "metadata": metadata}
    older = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index",
             "activation_fn_str": "activation_fn"}  # fmt: skip
    config = {older.get(name, name): value for name, value in config.items()}
    config.setdefault("architecture", "standard")
    activation = config.get("activation_fn", "relu")
    if activation == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise InputError(f"{where}: activation function {activation!r} is unknown; known: relu, "
                         "topk")  # fmt: skip
    if isinstance(config.get("normalize_activations"), bool):
        scaled = config["normalize_activations"]
        config["normalize_activations"] = "expected_average_only_in" if scaled else "none"
    if "hook_z" in (config.get("hook_name") or ""):
        config.setdefault("reshape_activations", "hook_z")
    said = {name: config[name] for name in METADATA if config.get(name) is not None}
    return {**config, "metadata": said}
