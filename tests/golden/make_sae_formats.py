"""Files of sparse autoencoders in other tools' formats, and what those tools compute with them.

    python -P tests/golden/make_sae_formats.py     rewrites sae/formats/

Random weights of width 12 with 32 features (33 where features are in groups of 3), in float32. Each
folder below is as its tool wrote it, or, where Google's are imitated, as SAELens reads it, plus
expected.npz, of six rows (M) of activations [M, D], [M, heads, D / heads] or [M, layers, D]:

    x                the activations
    activations      the features [M, F], of a crosscoder [M, layers, F]
    reconstruction   [M, O]

saelens/, gemma_scope/ (but crosscoders and their kin): what SAELens computes; old/ are configs as
SAELens 3 wrote them, read by version 6. sparsify/, dictionary_learning/: what these libraries
compute; the training half of each imports packages (schedulefree, nnsight) that are replaced by
empty modules, and `ae.pt` is stored as `ae.safetensors`. Crosscoders and cross-layer transcoders:
their formula in numpy and float64, because no tool reconstructs from such files.
"""

# ruff: noqa: E402  the empty modules come before the imports that ask for them

import json
import os
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
for missing in ("nnsight", "schedulefree"):
    sys.modules[missing] = types.ModuleType(missing)
sys.modules["nnsight"].LanguageModel = sys.modules["schedulefree"].ScheduleFreeWrapper = object

import numpy as np
import sae_lens.loading.pretrained_sae_loaders as loaders
import torch
from dictionary_learning import dictionary
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from sparsify import SparseCoder, SparseCoderConfig

HERE = Path(__file__).parent / "sae" / "formats"
M, D, F, K, LAYERS = 6, 12, 32, 4, 3
GOOGLE = HERE / "gemma_scope" / "google"
SCOPE = GOOGLE / "gemma-scope-2-270m-pt"
random = np.random.default_rng(7)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(random.normal(size=shape) * scale, dtype=torch.float32)


def fill(module: torch.nn.Module) -> None:
    """Random values; thresholds near what features are, so that some lie on either side."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(normal(*value.shape, scale=D**-0.5 if value.ndim == 2 else 0.3))
            if "threshold" in name:
                value.copy_(value.abs() * 2)


def expect(folder: Path, x: torch.Tensor, activations: Any, reconstruction: Any) -> None:
    arrays = {"x": x, "activations": activations, "reconstruction": reconstruction}
    values = {k: np.asarray(v, np.float32) for k, v in arrays.items()}
    np.savez_compressed(folder / "expected.npz", **values)


def lens_expect(folder: Path, sae: SAE, x: torch.Tensor) -> None:
    with torch.no_grad():
        expect(folder, x, sae.encode(x).to_dense(), sae(x))


def inputs(*shape: int) -> torch.Tensor:
    return normal(*shape, scale=2.0) + 0.5


def saelens(name: str, architecture: str, heads: int = 0, **options: Any) -> None:
    """A folder as SAELens saves it."""
    make, configure = get_sae_class(architecture)
    hook = "blocks.3.attn.hook_z" if heads else "blocks.3.hook_resid_post"
    if architecture.endswith("transcoder"):
        options = {"d_out": D, "apply_b_dec_to_input": False, **options}
    metadata = SAEMetadata(
        model_name="gpt2", hook_name=hook, context_size=128, prepend_bos=True,
        training_architecture=architecture,
    )  # fmt: skip
    sae = make(configure(d_in=D, d_sae=F, metadata=metadata, **options))
    fill(sae)
    if architecture == "matching_pursuit":
        with torch.no_grad():
            sae.W_dec /= sae.W_dec.norm(dim=-1, keepdim=True)
    folder = HERE / "saelens" / name
    sae.save_model(folder)
    lens_expect(folder, sae, inputs(M, heads, D // heads) if heads else inputs(M, D))


def old(name: str, config: dict[str, Any]) -> None:
    """A config from before version 6, and the tensors that went with it."""
    folder = HERE / "saelens" / "old" / name
    folder.mkdir(parents=True)
    weights = {"W_enc": normal(D, F, scale=0.3), "b_enc": normal(F, scale=0.3),
               "W_dec": normal(F, D, scale=0.3), "b_dec": normal(D)}  # fmt: skip
    save_file(weights, folder / "sae_weights.safetensors")
    shared = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "device": "cpu",
              "model_name": "gpt2-small", "context_size": 64, "hook_point_layer": 4}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(shared | config))
    sae = SAE.load_from_disk(folder)
    heads = (3, D // 3) if "hook_z" in config["hook_point"] else (D,)
    lens_expect(folder, sae, inputs(M, *heads))


def scope_params(skip: bool = False, *between: int) -> dict[str, torch.Tensor]:
    params = {
        "w_enc": normal(D, F, scale=0.3), "w_dec": normal(F, *between, D, scale=0.3),
        "b_enc": normal(F, scale=0.3), "b_dec": normal(D, scale=0.3),
        "threshold": normal(F).abs() * 0.8,
    }  # fmt: skip
    return params | ({"affine_skip_connection": normal(D, D, scale=0.3)} if skip else {})


def offline(folder: Path, load: Callable[..., Any], **options: Any) -> SAE:
    """An SAE of a folder that SAELens believes to be on the Hub."""
    repository, *inner = folder.relative_to(GOOGLE).parts

    def fetched(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        path = HERE / "gemma_scope" / repo_id / subfolder / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(str(path))
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        path = HERE / "gemma_scope" / repo_id / filename
        return {k: list(v.shape) for k, v in loaders.load_safetensors_weights(path).items()}

    with mock.patch.multiple(
        loaders, hf_hub_download=fetched, get_safetensors_tensor_shapes=shapes
    ):
        config, state, _ = load(f"google/{repository}", "/".join(inner), **options)
    sae = SAE.from_dict(loaders.handle_config_defaulting(config))
    sae.load_state_dict(state)
    return sae


def scope(place: str, kind: str, site: str, config: bool = True) -> None:
    """A folder as Google publishes it."""
    folder, affine = SCOPE / place, place.endswith("_affine")
    folder.mkdir(parents=True)
    save_file(scope_params(affine), folder / "params.safetensors")
    reads, writes = site.split(" > ") if " > " in site else (site, site)
    said = {
        "hf_hook_point_in": reads, "hf_hook_point_out": writes, "width": F,
        "model_name": "google/gemma-3-270m-pt", "architecture": "jump_relu", "l0": 20,
        "affine_connection": affine, "type": kind,
    }  # fmt: skip
    if config:
        (folder / "config.json").write_text(json.dumps(said))
    lens_expect(folder, offline(folder, loaders.gemma_3_sae_huggingface_loader), inputs(M, D))


def scope_layers(place: str, skip: bool) -> None:
    """One file per layer; that a layer writes to no earlier one is a matter of zeros."""
    folder = SCOPE / place
    folder.mkdir(parents=True)
    x_MLD = inputs(M, LAYERS, D).double().numpy()
    f_MLF, y_MLD = np.zeros((M, LAYERS, F)), np.zeros((M, LAYERS, D))
    for layer in range(LAYERS):
        params = scope_params(skip, LAYERS)
        params["w_dec"][:, :layer] = 0
        save_file(params, folder / f"params_layer_{layer}.safetensors")
        p = {name: value.double().numpy() for name, value in params.items()}
        h_MF = x_MLD[:, layer] @ p["w_enc"] + p["b_enc"]
        f_MLF[:, layer] = np.maximum(h_MF, 0) * (h_MF > p["threshold"])
        y_MLD += np.einsum("MF,FOD->MOD", f_MLF[:, layer], p["w_dec"])
        y_MLD[:, layer] += p["b_dec"]
        if skip:
            y_MLD[:, layer] += x_MLD[:, layer] @ p["affine_skip_connection"]
    expect(folder, x_MLD, f_MLF, y_MLD)


def first_scope(repository: str, place: str, load: Callable[..., Any]) -> None:
    folder = GOOGLE / repository / place
    folder.mkdir(parents=True)
    params = {k.replace("w_", "W_"): v.numpy() for k, v in scope_params().items()}
    np.savez(folder / "params.npz", **params)
    sizes = {"d_in": D, "d_sae": F} | ({"d_out": D} if "transcoders" in repository else {})
    lens_expect(folder, offline(folder, load, cfg_overrides=sizes), inputs(M, D))


def sparsify(name: str, module: str, features: int = F, **options: Any) -> None:
    folder = HERE / "sparsify" / name / module
    coder = SparseCoder(D, SparseCoderConfig(num_latents=features, k=3, **options))
    fill(coder)
    coder.save_to_disk(folder)
    (folder.parent / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-70m"}))
    x = inputs(M, D)
    with torch.no_grad():
        out = coder(x)
    f_MF = np.zeros((M, coder.num_latents), np.float32)
    np.put_along_axis(f_MF, out.latent_indices.numpy(), out.latent_acts.numpy(), 1)
    expect(folder, x, f_MF, out.sae_out)


def learned(name: str, sae: torch.nn.Module) -> None:
    fill(sae)
    kind = type(sae).__name__
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        sae.threshold.fill_(0.7)
    folder = HERE / "dictionary_learning" / name
    folder.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in sae.state_dict().items()}, folder / "ae.safetensors")
    trainer = {
        "dict_class": kind, "activation_dim": D, "dict_size": F, "layer": 3,
        "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_3",
    }  # fmt: skip
    trainer |= {"k": K} if hasattr(sae, "k") else {}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}))
    x = inputs(M, D)
    with torch.no_grad():
        f_MF = sae.encode(x)
        expect(folder, x, f_MF, sae.decode(f_MF))


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    saelens("standard", "standard")
    saelens("gated", "gated", apply_b_dec_to_input=False)
    saelens("jumprelu", "jumprelu", normalize_activations="layer_norm")
    saelens("jumprelu_heads", "jumprelu", heads=3, reshape_activations="hook_z")
    saelens("topk", "topk", k=K, normalize_activations="expected_average_only_in")
    saelens("topk_rescaled", "topk", k=K, rescale_acts_by_decoder_norm=True,
            normalize_activations="constant_norm_rescale")  # fmt: skip
    saelens("abstopk", "abstopk", k=K)
    saelens("matching_pursuit", "matching_pursuit", residual_threshold=1.0, max_iterations=8)
    saelens("transcoder", "transcoder", d_out=D + 3)
    saelens("skip_transcoder", "skip_transcoder")
    saelens("jumprelu_transcoder", "jumprelu_transcoder", d_out=D + 3)
    saelens("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", d_out=D + 3)
    old("standard", {"hook_point": "blocks.4.hook_resid_pre", "normalize_activations": False})
    old("topk", {"hook_point": "blocks.4.attn.hook_z", "activation_fn_str": "topk",
                 "activation_fn_kwargs": {"k": K}, "normalize_activations": True})  # fmt: skip
    layer = "model.layers.12"
    mlp = f"{layer}.pre_feedforward_layernorm.output > {layer}.post_feedforward_layernorm.output"
    scope("resid_post/layer_12_width_16k_l0_medium", "sae", f"{layer}.output")
    scope("attn_out_all/layer_12_width_16k_l0_small", "sae", f"{layer}.self_attn.o_proj.input")
    scope("transcoder_all/layer_12_width_16k_l0_small", "transcoder", mlp)
    scope("transcoder_all/layer_12_width_16k_l0_small_affine", "transcoder", mlp)
    scope("transcoder/layer_9_width_16k_l0_big_affine", "", "", config=False)
    scope("mlp_out/layer_9_width_16k_l0_big", "", "", config=False)
    scope_layers("crosscoder/layer_5_9_12_width_64k_l0_medium", skip=False)
    scope_layers("clt/width_256k_l0_medium_affine", skip=True)
    second = loaders.gemma_2_sae_huggingface_loader
    first_scope("gemma-scope-2b-pt-res", "layer_7/width_16k/average_l0_13", second)
    first_scope("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", second)
    first_scope("gemma-scope-2b-pt-transcoders", "layer_7/width_16k/average_l0_9",
                loaders.gemma_2_transcoder_huggingface_loader)  # fmt: skip
    sparsify("topk", "layers.3", normalize_decoder=True)
    sparsify("groupmax", "layers.3", features=33, activation="groupmax")
    sparsify("expansion", "layers.3", features=0, expansion_factor=2)
    sparsify("transcoder", "layers.3.mlp", transcode=True, skip_connection=True)
    learned("standard", dictionary.AutoEncoder(D, F))
    learned("april", dictionary.AutoEncoderNew(D, F))
    learned("gated", dictionary.GatedAutoEncoder(D, F))
    learned("jumprelu", dictionary.JumpReluAutoEncoder(D, F))
    learned("topk", AutoEncoderTopK(D, F, K))
    learned("batchtopk", BatchTopKSAE(D, F, K))
    learned("matryoshka", MatryoshkaBatchTopKSAE(D, F, K, [8, 24]))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
