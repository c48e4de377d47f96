"""Google's Gemma Scope 2 (for Gemma 3) and Gemma Scope 1 (for Gemma 2): JumpReLU throughout.

    f = relu(h) [h > threshold], h = x W_enc + b_enc;  y = f W_dec + b_dec (+ x A)

Inputs are raw activations. Gemma Scope 2: `config.json` beside `params.safetensors`, or one
`params_layer_{i}.safetensors` per layer of a crosscoder or cross-layer transcoder; A is
`affine_skip_connection` [D,O]. Gemma Scope 1: `params.npz` alone. What no config says is read off
the names of the folders that it was published in.

Dims: D width in, F features, O width out, L layers.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import files, safetensors
from core.errors import InputError
from sae import coder as coders
from sae import crosscoder
from sae.coder import About, Coder, Sae
from sae.crosscoder import Crosscoder
from sae.formats import names, tensors

ONE, TWO, SHARDS = "params.npz", "params.safetensors", "params_layer_*.safetensors"
NAMES = {"w_enc": "W_enc", "w_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec",
         "threshold": "threshold"}  # fmt: skip
SKIP = "affine_skip_connection"
SITES = {  # folders of Gemma Scope 2, and the modules that they read and write
    "resid_post": ("model.layers.{}.output",) * 2,
    "attn_out": ("model.layers.{}.self_attn.o_proj.input",) * 2,
    "mlp_out": ("model.layers.{}.post_feedforward_layernorm.output",) * 2,
    "crosscoder": ("model.layers.{}.output",) * 2,
    "transcoder": ("model.layers.{}.pre_feedforward_layernorm.output",
                   "model.layers.{}.post_feedforward_layernorm.output"),
}  # fmt: skip
SITES["clt"] = SITES["transcoder"]
TYPES = {"resid_post": "sae", "attn_out": "sae", "mlp_out": "sae"}  # the others are their sites
FIRST = {  # repositories of Gemma Scope 1; their transcoders read before the norm's weight
    "res": ("blocks.{}.hook_resid_post",) * 2,
    "mlp": ("blocks.{}.hook_mlp_out",) * 2,
    "att": ("blocks.{}.attn.hook_z",) * 2,
    "transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}


class CrossSae(NamedTuple):
    """A loaded crosscoder or cross-layer transcoder; its taps are those of its layers in order."""

    coder: Crosscoder
    params: dict[str, np.ndarray]
    taps_in: tuple[str | None, ...]
    taps_out: tuple[str | None, ...]
    about: About
    fingerprint: str


def read(folder: Path, origin: str) -> Sae:
    """The SAE or transcoder of a Gemma Scope 2 folder."""
    config, path = _config(folder, origin), folder / TWO
    params = tensors.taken(safetensors.read(path), _names(config), path)
    features, out = params["b_enc"].size, params["b_dec"].size
    if config.get("width", features) != features:
        raise InputError(f"{path} has {features} features, but config.json beside it says width "
                         f"{config['width']}; download or copy the folder again")  # fmt: skip
    width = tensors.other_axis(params["W_enc"], features)
    coder = Coder("jumprelu", width, features, out, transcoder=config.get("type") == "transcoder")
    hook_in = config.get("hf_hook_point_in")
    hook_out = config.get("hf_hook_point_out") or hook_in
    said = {"hf_hook_name": hook_in, "hf_hook_name_out": hook_out} if hook_in else {}
    about = About(names.tap(hook_in), names.tap(hook_out), *_source(config, origin, said))
    return tensors.made(coder, params, about, path)


def read_layers(folder: Path, origin: str) -> CrossSae:
    """The crosscoder or cross-layer transcoder of a Gemma Scope 2 folder of one file per layer."""
    config, count = _config(folder, origin), len(list(folder.glob(SHARDS)))
    layers = []
    for layer in range(count):
        path = folder / SHARDS.replace("*", str(layer))
        if not path.is_file():
            raise InputError(f"{folder} has {count} files {SHARDS}, but no {path.name}; download "
                             "or copy the folder again")  # fmt: skip
        layers.append(tensors.taken(safetensors.read(path), _names(config), path))
        shapes = [{name: value.shape for name, value in layers[i].items()} for i in (0, -1)]
        if shapes[0] != shapes[1]:
            raise InputError(f"{path} has tensors {shapes[1]}, unlike layer 0, {shapes[0]}; "
                             "download or copy the folder again")  # fmt: skip
    coder = Crosscoder(count, layers[0]["b_dec"].size, layers[0]["b_enc"].size)
    params = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    crosscoder.check(coder, params, str(folder))
    hooks_in, hooks_out = _layer_hooks(origin, count)
    said = {"hf_hook_name": hooks_in, "hf_hook_name_out": hooks_out}
    return CrossSae(
        coder,
        params,
        tuple(names.tap(hook) for hook in hooks_in),
        tuple(names.tap(hook) for hook in hooks_out),
        About(None, None, *_source(config, origin, said)),
        coders.fingerprint(Coder("jumprelu", coder.width, coder.features, coder.width), params),
    )


def read_first(folder: Path, origin: str) -> Sae:
    """The SAE or transcoder of a Gemma Scope 1 folder; its site is known from the folder's path."""
    path = folder / ONE
    values = {
        name.lower() if name[:2] in ("W_", "w_") else name: value
        for name, value in files.read_npz(path).items()
    }
    params = tensors.taken(values, NAMES, path)
    features, out = params["b_enc"].size, params["b_dec"].size
    width = tensors.other_axis(params["W_enc"], features)
    place = f"{origin.partition('@')[0]}/"
    repository = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)/", place)
    layer = re.search(r"/layer_(\d+)/", place)
    hook_in = hook_out = model = None
    if repository:
        model = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    if "/embedding/" in place:
        # Trained on embeddings before Gemma multiplies them by the root of their width.
        root = np.float32(math.sqrt(width))
        params |= {"W_enc": params["W_enc"] / root, "W_dec": params["W_dec"] * root}
        hook_in = hook_out = names.TRANSFORMER_LENS["embed"]
    elif repository and layer:
        hook_in, hook_out = (hook.format(layer[1]) for hook in FIRST[repository[3]])
    coder = Coder("jumprelu", width, features, out, transcoder=hook_in != hook_out)
    found = re.search(r"/average_l0_(\d+)/", place)
    extra: dict[str, Any] = {"l0": int(found[1])} if found else {}
    if hook_in:
        extra |= {"hook_name": hook_in, "hook_name_out": hook_out}
    about = About(names.tap(hook_in), names.tap(hook_out), model, origin, "gemma_scope", extra)
    return tensors.made(coder, params, about, path)


def _config(folder: Path, origin: str) -> dict[str, Any]:
    """config.json, or as much of it as the names of the folders say."""
    path = folder / "config.json"
    if not path.exists():
        return _inferred(origin)
    config = tensors.read_config(path)
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise InputError(f"{path}: architecture {config['architecture']!r} is unknown; known "
                         "of Gemma Scope: 'jump_relu'")  # fmt: skip
    kinds = ("sae", "transcoder", "crosscoder", "clt")
    if config.get("type", "sae") not in kinds:
        raise InputError(f"{path}: type {config['type']!r} is unknown; known: {', '.join(kinds)}")
    return config


def _inferred(origin: str) -> dict[str, Any]:
    site, layers = _place(origin)
    config: dict[str, Any] = {}
    if found := re.search(r"gemma-scope-2-(\w+-(?:pt|it))(?:/|$)", origin):
        config["model_name"] = f"google/gemma-3-{found[1]}"
    if site:
        config["type"] = TYPES.get(site, site)
    if site and len(layers) == 1:
        hook_in, hook_out = SITES[site]
        config["hf_hook_point_in"] = hook_in.format(*layers)
        config["hf_hook_point_out"] = hook_out.format(*layers)
    return config


def _layer_hooks(origin: str, count: int) -> tuple[list[str | None], list[str | None]]:
    """The modules that each of several layers reads and writes, as its folders' names say."""
    site, layers = _place(origin)
    layers = layers or [str(layer) for layer in range(count)]  # those of all layers name none
    if site is None or len(layers) != count:
        return [None] * count, [None] * count
    hook_in, hook_out = SITES[site]
    return [hook_in.format(n) for n in layers], [hook_out.format(n) for n in layers]


def _place(origin: str) -> tuple[str | None, list[str]]:
    """Site and layers in the path of a folder of Gemma Scope 2, as far as it has them."""
    site = re.search(rf"/({'|'.join(SITES)})(?:_all)?/", origin)
    layers = re.search(r"/layer_(\d+(?:_\d+)*)_", origin)
    return (site[1] if site else None), (layers[1].split("_") if layers else [])


def _names(config: dict[str, Any]) -> dict[str, str]:
    """The tensors to expect; without a config, whether there is a skip is for the file to say."""
    affine = config.get("affine_connection")
    if affine is False:
        return NAMES
    return NAMES | {SKIP if affine else f"{SKIP}?": "W_skip"}


def _source(
    config: dict[str, Any], origin: str, said: dict[str, Any]
) -> tuple[str | None, str, str, dict[str, Any]]:
    """The end of an `About`; names of models in a config are not always those on the Hub."""
    model = config.get("model_name")
    if model:
        model = model if model.startswith("google/") else f"google/{model}"
        model = model.replace("-v3", "-3").replace("-270m-pt", "-270m")
    extra = {name: config[name] for name in ("type", "l0") if name in config}
    return model, origin, "gemma_scope_2", said | extra
