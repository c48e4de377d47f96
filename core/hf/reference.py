"""A second opinion on a checkpoint: its forward pass in numpy, from the files alone.

Dims: B sequences, T tokens, S keys, D width, E fused q|k|v, F mlp width, I and O a linear map's
inputs and outputs, H heads, G key-value heads, K head width, V vocabulary.

Written against what transformers does with the keys of `config.json`, in the spellings of its
versions 4 and 5, and with the names of the tensors. It shares nothing with the model, the schema or
the family files, so that a mistake which import and export make alike (each undoing the other)
still shows. Float32 whatever the file's dtype; one tensor of the file is in memory at a time.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import files, safetensors
from core.errors import InputError

Config = dict[str, Any]


class Outputs(NamedTuple):
    """Hidden states [B,T,D] after the last norm, and the output matrix as the file stores it."""

    hidden_BTD: np.ndarray
    head_VD: np.ndarray

    def logits(self, rows: slice = slice(None)) -> np.ndarray:
        """[B,T,V], or of some rows of the vocabulary."""
        return self.hidden_BTD @ safetensors.copied(self.head_VD[rows], np.float32).T


def forward(folder: Path, ids_BT: np.ndarray) -> Outputs:
    """Sequences of equal length through the model in a Hugging Face folder, without padding."""
    config = files.read_json(folder / "config.json")
    families = {"gpt2": _gpt2, "gemma3_text": _gemma3, "gpt_neox": _gpt_neox}
    return families[config["model_type"]](config, safetensors.read_folder(folder), ids_BT)


def logits(folder: Path, ids_BT: np.ndarray) -> np.ndarray:
    """All logits [B,T,V]: for small models."""
    return forward(folder, ids_BT).logits()


# ------------------------------------------------------------------------------------ families


def _gpt2(config: Config, tensors: safetensors.Tensors, ids_BT: np.ndarray) -> Outputs:
    """`GPT2LMHeadModel` in evaluation mode; its linear maps are stored [in, out]."""
    file = _File(tensors, "transformer.", "wte.weight")
    c = {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"} | config
    heads, eps = c["n_head"], c["layer_norm_epsilon"]

    def linear(x_BTI: np.ndarray, name: str) -> np.ndarray:
        return x_BTI @ file[f"{name}.weight"] + file[f"{name}.bias"]

    x_BTD = file.rows("wte.weight", ids_BT) + file["wpe.weight"][: ids_BT.shape[1]]
    for layer in range(c["n_layer"]):
        h = f"h.{layer}"
        qkv_BTE = linear(_layer_norm(file, f"{h}.ln_1", x_BTD, eps), f"{h}.attn.c_attn")
        q, k, v = (_heads(part_BTD, heads) for part_BTD in np.split(qkv_BTE, 3, -1))
        a_BTD = _attention(q, k, v, q.shape[-1] ** -0.5)
        x_BTD = x_BTD + linear(a_BTD, f"{h}.attn.c_proj")
        f_BTF = linear(_layer_norm(file, f"{h}.ln_2", x_BTD, eps), f"{h}.mlp.c_fc")
        x_BTD = x_BTD + linear(_activation(c["activation_function"])(f_BTF), f"{h}.mlp.c_proj")
    hidden_BTD = _layer_norm(file, "ln_f", x_BTD, eps)
    return Outputs(hidden_BTD, file.head("wte.weight", "lm_head.weight"))


def _gemma3(config: Config, tensors: safetensors.Tensors, ids_BT: np.ndarray) -> Outputs:
    """`Gemma3ForCausalLM` in evaluation mode, text alone."""
    file = _File(tensors, "model.", "embed_tokens.weight")
    c = {
        "head_dim": 256, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "sliding_window": 4096,
    } | config  # fmt: skip
    _refuse(c, "final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention",
            "attention_bias", "rope_scaling")  # fmt: skip
    eps, groups, layers = c["rms_norm_eps"], c["num_key_value_heads"], c["num_hidden_layers"]
    period = c.get("sliding_window_pattern", 6)
    kinds = c.get("layer_types") or [
        "sliding_attention" if i % period else "full_attention" for i in range(1, layers + 1)
    ]
    rope = c.get("rope_parameters") or {}
    thetas = {
        "full_attention": _theta(rope.get("full_attention"), c.get("rope_theta"), 1e6),
        "sliding_attention": _theta(
            rope.get("sliding_attention"), c.get("rope_local_base_freq"), 1e4
        ),
    }

    def linear(x_BTI: np.ndarray, name: str) -> np.ndarray:
        return x_BTI @ file[f"{name}.weight"].T

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        scale = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.float32(eps))
        return x * scale * (1 + file[f"{name}.weight"])

    x_BTD = file.rows("embed_tokens.weight", ids_BT) * np.float32(math.sqrt(c["hidden_size"]))
    for layer, kind in enumerate(kinds[:layers]):
        block, attention = f"layers.{layer}", f"layers.{layer}.self_attn"
        h_BTD = norm(f"{block}.input_layernorm", x_BTD)
        q_BHTK = _heads(linear(h_BTD, f"{attention}.q_proj"), c["num_attention_heads"])
        k_BGTK = _heads(linear(h_BTD, f"{attention}.k_proj"), groups)
        v_BGTK = _heads(linear(h_BTD, f"{attention}.v_proj"), groups)
        q_BHTK = _rotate(norm(f"{attention}.q_norm", q_BHTK), thetas[kind], c["head_dim"])
        k_BGTK = _rotate(norm(f"{attention}.k_norm", k_BGTK), thetas[kind], c["head_dim"])
        window = c["sliding_window"] if kind == "sliding_attention" else None
        scale = c["query_pre_attn_scalar"] ** -0.5
        a_BTE = linear(_attention(q_BHTK, k_BGTK, v_BGTK, scale, window), f"{attention}.o_proj")
        x_BTD = x_BTD + norm(f"{block}.post_attention_layernorm", a_BTE)
        h_BTD = norm(f"{block}.pre_feedforward_layernorm", x_BTD)
        f_BTF = _activation(c["hidden_activation"])(linear(h_BTD, f"{block}.mlp.gate_proj"))
        f_BTF = f_BTF * linear(h_BTD, f"{block}.mlp.up_proj")
        m_BTD = linear(f_BTF, f"{block}.mlp.down_proj")
        x_BTD = x_BTD + norm(f"{block}.post_feedforward_layernorm", m_BTD)
    return Outputs(norm("norm", x_BTD), file.head("embed_tokens.weight", "lm_head.weight"))


def _gpt_neox(config: Config, tensors: safetensors.Tensors, ids_BT: np.ndarray) -> Outputs:
    """`GPTNeoXForCausalLM` in evaluation mode; q, k and v of a head lie side by side."""
    file = _File(tensors, "gpt_neox.", "embed_in.weight")
    c = {
        "layer_norm_eps": 1e-5, "hidden_act": "gelu", "use_parallel_residual": True,
        "attention_bias": True,
    } | config  # fmt: skip
    _refuse(c, "rope_scaling", "is_decoder")
    heads, eps, rope = c["num_attention_heads"], c["layer_norm_eps"], c.get("rope_parameters") or {}
    theta = _theta(rope, c.get("rotary_emb_base"), 1e4)
    share = rope.get("partial_rotary_factor", c.get("rotary_pct", 0.25))
    turned = int(c["hidden_size"] // heads * share)

    def linear(x_BTI: np.ndarray, name: str, bias: bool = True) -> np.ndarray:
        y_BTO = x_BTI @ file[f"{name}.weight"].T
        return y_BTO + file[f"{name}.bias"] if bias else y_BTO

    x_BTD = file.rows("embed_in.weight", ids_BT)
    for layer in range(c["num_hidden_layers"]):
        block, attention = f"layers.{layer}", f"layers.{layer}.attention"
        h_BTD = _layer_norm(file, f"{block}.input_layernorm", x_BTD, eps)
        qkv_BTE = linear(h_BTD, f"{attention}.query_key_value", c["attention_bias"])
        q, k, v = np.split(_heads(qkv_BTE, heads), 3, -1)
        a_BTD = _attention(_rotate(q, theta, turned), _rotate(k, theta, turned), v,
                           q.shape[-1] ** -0.5)  # fmt: skip
        a_BTD = linear(a_BTD, f"{attention}.dense", c["attention_bias"])
        seen_BTD = x_BTD if c["use_parallel_residual"] else x_BTD + a_BTD
        h_BTD = _layer_norm(file, f"{block}.post_attention_layernorm", seen_BTD, eps)
        f_BTF = _activation(c["hidden_act"])(linear(h_BTD, f"{block}.mlp.dense_h_to_4h"))
        x_BTD = x_BTD + a_BTD + linear(f_BTF, f"{block}.mlp.dense_4h_to_h")
    hidden_BTD = _layer_norm(file, "final_layer_norm", x_BTD, eps)
    return Outputs(hidden_BTD, file.head("embed_in.weight", "embed_out.weight", "lm_head.weight"))


# ------------------------------------------------------------------------------------- weights


class _File:
    """Tensors by their names below the base model; float32 copies, so that no page stays mapped."""

    def __init__(self, tensors: safetensors.Tensors, prefix: str, probe: str):
        self.tensors = tensors
        self.prefix = prefix if prefix + probe in tensors else ""

    def __getitem__(self, name: str) -> np.ndarray:
        return safetensors.copied(self.tensors[self.prefix + name], np.float32)

    def rows(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows of an embedding."""
        return safetensors.gathered(self.tensors[self.prefix + name], ids, np.float32)

    def head(self, embedding: str, *names: str) -> np.ndarray:
        """A head in the file wins over the embedding, even when the config ties the two."""
        found = [self.tensors[name] for name in names if name in self.tensors]
        return found[0] if found else self.tensors[self.prefix + embedding]


def _refuse(config: Config, *keys: str) -> None:
    for key in keys:
        if config.get(key):
            raise InputError(
                f"config.json: {key}={config[key]!r} has no reference to check against"
            )


def _theta(rope: Config | None, older: float | None, default: float) -> float:
    """The base of rotary angles: transformers 5's key wins over version 4's."""
    rope = rope or {}
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"config.json: rope_type={rope['rope_type']!r} has no reference")
    older = default if older is None else older
    return rope.get("rope_theta", older)


# ----------------------------------------------------------------------------------- functions


def _heads(x_BTE: np.ndarray, heads: int) -> np.ndarray:
    """[B,T,H*K] -> [B,H,T,K]."""
    return x_BTE.reshape(*x_BTE.shape[:2], heads, -1).swapaxes(1, 2)


def _attention(
    q_BHTK: np.ndarray,
    k_BGSK: np.ndarray,
    v_BGSK: np.ndarray,
    scale: float,
    window: int | None = None,
) -> np.ndarray:
    """Causal attention [B,T,H*K]; neighbouring heads share keys; `window` counts the query too."""
    batch, heads, length, _ = q_BHTK.shape
    k_BHSK, v_BHSK = (np.repeat(a, heads // a.shape[1], axis=1) for a in (k_BGSK, v_BGSK))
    scores_BHTS = q_BHTK @ k_BHSK.swapaxes(2, 3) * np.float32(scale)
    visible_TS = np.tri(length, dtype=bool)
    if window is not None:
        visible_TS &= ~np.tri(length, k=-window, dtype=bool)
    scores_BHTS[:, :, ~visible_TS] = -np.inf
    p_BHTS = np.exp(scores_BHTS - scores_BHTS.max(-1, keepdims=True))
    p_BHTS /= p_BHTS.sum(-1, keepdims=True)
    return (p_BHTS @ v_BHSK).swapaxes(1, 2).reshape(batch, length, -1)


def _rotate(x_BHTK: np.ndarray, theta: float, turned: int) -> np.ndarray:
    """Rotary positions on the first `turned` features of a head, the i-th with the (i + n/2)-th."""
    frequency_K = theta ** (-np.arange(0, turned, 2) / turned)
    angle_TK = np.arange(x_BHTK.shape[2])[:, None] * frequency_K
    cos_TK, sin_TK = np.cos(angle_TK).astype(np.float32), np.sin(angle_TK).astype(np.float32)
    half = len(frequency_K)
    a, b, rest = x_BHTK[..., :half], x_BHTK[..., half : 2 * half], x_BHTK[..., 2 * half :]
    return np.concatenate([a * cos_TK - b * sin_TK, b * cos_TK + a * sin_TK, rest], -1)


def _layer_norm(file: _File, name: str, x_BTD: np.ndarray, eps: float) -> np.ndarray:
    deviation_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    variance_BT1 = (deviation_BTD**2).mean(-1, keepdims=True)
    normal_BTD = deviation_BTD / np.sqrt(variance_BT1 + np.float32(eps))
    return normal_BTD * file[f"{name}.weight"] + file[f"{name}.bias"]


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x * x * x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x), row by row because `_erf` needs ten times the memory of its argument."""
    rows = x.reshape(-1, x.shape[-1])
    found = [0.5 * row * (1 + _erf(row / math.sqrt(2)).astype(x.dtype)) for row in rows]
    return np.stack(found).reshape(x.shape)


@functools.cache
def _erf_table() -> tuple[np.ndarray, np.ndarray, float]:
    """erf and its derivative times the step, at points that far apart on [-6, 6]."""
    step = 2.0**-7
    points = np.arange(-6, 6 + step, step)
    slopes = 2 / math.sqrt(math.pi) * np.exp(-points * points) * step
    return np.array([math.erf(point) for point in points]), slopes, step


def _erf(x: np.ndarray) -> np.ndarray:
    """erf, float64, by cubic Hermite interpolation between exact values; error below 1e-10."""
    values, slopes, step = _erf_table()
    place = (np.clip(x, -6, 6).astype(np.float64) + 6) / step
    left = np.minimum(place.astype(np.int64), len(values) - 2)
    t = place - left
    low, high = values[left], values[left + 1]
    bend = (slopes[left] + slopes[left + 1]) - 2 * (high - low)
    return low + t * (slopes[left] + t * (3 * (high - low) - 2 * slopes[left] - slopes[left + 1]
                                          + t * bend))  # fmt: skip


def _activation(name: str) -> Callable[[np.ndarray], np.ndarray]:
    return {
        "gelu_new": _gelu_tanh,
        "gelu_pytorch_tanh": _gelu_tanh,
        "gelu_fast": _gelu_tanh,
        "gelu": _gelu,
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: 0.5 * x * (1 + np.tanh(0.5 * x)),
        "swish": lambda x: 0.5 * x * (1 + np.tanh(0.5 * x)),
    }[name]
