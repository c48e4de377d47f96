"""A second opinion on an exported model: its forward pass in numpy, from the files alone.

Dims: T tokens, D width, H heads, K head width, V vocabulary.

Written against what transformers does with the keys of `config.json` and the names of the tensors.
It shares nothing with the model, the schema or the family files, so that a mistake which import
and export make alike (each undoing the other) still shows. Slow, float32, one sequence.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from core import files, safetensors


def logits(folder: Path, ids_T: np.ndarray) -> np.ndarray:
    """Logits [T,V] of one sequence of ids [T] under the model in a Hugging Face folder."""
    config = files.read_json(folder / "config.json")
    forward = {"gpt2": _gpt2}[config["model_type"]]
    return forward(config, safetensors.read_folder(folder), ids_T)


def _gpt2(config: dict[str, Any], tensors: safetensors.Tensors, ids_T: np.ndarray) -> np.ndarray:
    """`GPT2LMHeadModel` in evaluation mode."""
    prefix = "transformer." if "transformer.wte.weight" in tensors else ""
    heads, eps = config["n_head"], config.get("layer_norm_epsilon", 1e-5)
    gelu = _ACTIVATIONS[config.get("activation_function", "gelu_new")]

    def weight(name: str) -> np.ndarray:
        return tensors[prefix + name].astype(np.float32)

    def layer_norm(x_TD: np.ndarray, name: str) -> np.ndarray:
        deviation_TD = x_TD - x_TD.mean(-1, keepdims=True)
        variance_T1 = (deviation_TD**2).mean(-1, keepdims=True)
        normal_TD = deviation_TD / np.sqrt(variance_T1 + eps)
        return normal_TD * weight(f"{name}.weight") + weight(f"{name}.bias")

    def conv1d(x_TI: np.ndarray, name: str) -> np.ndarray:
        return x_TI @ weight(f"{name}.weight") + weight(f"{name}.bias")

    def attention(qkv_TE: np.ndarray) -> np.ndarray:
        length = len(qkv_TE)
        q, k, v = (
            part.reshape(length, heads, -1).swapaxes(0, 1) for part in np.split(qkv_TE, 3, -1)
        )
        scores_HTS = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
        scores_HTS[:, ~np.tri(length, dtype=bool)] = -np.inf
        p_HTS = np.exp(scores_HTS - scores_HTS.max(-1, keepdims=True))
        p_HTS /= p_HTS.sum(-1, keepdims=True)
        return (p_HTS @ v).swapaxes(0, 1).reshape(length, -1)

    x_TD = weight("wte.weight")[ids_T] + weight("wpe.weight")[: len(ids_T)]
    for layer in range(config["n_layer"]):
        h = f"h.{layer}"
        qkv_TE = conv1d(layer_norm(x_TD, f"{h}.ln_1"), f"{h}.attn.c_attn")
        x_TD = x_TD + conv1d(attention(qkv_TE), f"{h}.attn.c_proj")
        mlp_TF = gelu(conv1d(layer_norm(x_TD, f"{h}.ln_2"), f"{h}.mlp.c_fc"))
        x_TD = x_TD + conv1d(mlp_TF, f"{h}.mlp.c_proj")
    # A head in the file wins over the embedding, even when the config ties the two.
    head_VD = tensors.get("lm_head.weight", tensors[f"{prefix}wte.weight"]).astype(np.float32)
    return layer_norm(x_TD, "ln_f") @ head_VD.T


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(x.dtype)


_ACTIVATIONS = {
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": _gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: 0.5 * x * (1 + np.tanh(0.5 * x)),
}
