"""GPT-2: learned positions, pre-LayerNorm, fused qkv, tanh-gelu, biases everywhere, tied head.

Dims: V vocabulary, C context, D width, F mlp width, H heads, K head width; B batch, T tokens.
The file's four matrices are Conv1D, stored [in, out] as ours are, so no row is transposed.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from core.attention import causal_attention
from core.config import ModelConfig
from core.errors import InputError
from core.layers import LayerNorm, activation
from core.linear import Linear
from core.schema import Row

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
# Buffers (causal masks) that old files carry beside the parameters.
IGNORED = (r"h\.\d+\.attn\.(bias|masked_bias)",)


def rows(c: ModelConfig) -> list[Row]:
    activation(c.activation)  # raises for an unknown one
    if c.heads * c.head_dim != c.width:
        raise InputError(f"a gpt2 model of width {c.width} cannot have {c.heads} heads of "
                         f"{c.head_dim}; choose a divisor of the width")  # fmt: skip
    d, f = c.width, c.mlp_width
    residual = c.init_std / (2 * c.layers) ** 0.5  # GPT-2 paper, section 2.3

    def linear(name: str, hf: str, i: int, o: int, axes: tuple[str, str], std: float) -> list[Row]:
        site, file = f"h.{{l}}.{hf}", f"{PREFIX}h.{{l}}.{hf}"
        return [
            Row(f"blocks/{name}/w", (i, o), axes, f"{file}.weight", init=std, site=site),
            Row(f"blocks/{name}/b", (o,), axes[1:], f"{file}.bias", init="zeros", site=site),
        ]

    def norm(path: str, hf: str) -> list[Row]:
        return [
            Row(f"{path}/g", (d,), (None,), f"{PREFIX}{hf}.weight", init="ones"),
            Row(f"{path}/b", (d,), (None,), f"{PREFIX}{hf}.bias", init="zeros"),
        ]

    vocab = ("vocab", "embed")
    return [
        Row("embed/wte", (c.vocab_size, d), vocab, f"{PREFIX}wte.weight", init=c.init_std),
        Row("embed/wpe", (c.context, d), (None, "embed"), f"{PREFIX}wpe.weight", init=c.init_std),
        *norm("blocks/ln_1", "h.{l}.ln_1"),
        *linear("attn_c_attn", "attn.c_attn", d, 3 * d, ("embed", "heads"), c.init_std),
        *linear("attn_c_proj", "attn.c_proj", d, d, ("heads", "embed"), residual),
        *norm("blocks/ln_2", "h.{l}.ln_2"),
        *linear("mlp_c_fc", "mlp.c_fc", d, f, ("embed", "mlp"), c.init_std),
        *linear("mlp_c_proj", "mlp.c_proj", f, d, ("mlp", "embed"), residual),
        *norm("final_norm", "ln_f"),
        *([] if c.tied else [Row("head", (c.vocab_size, d), vocab, "lm_head.weight")]),
    ]


class Embed(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        c, zeros = self.config, nn.initializers.zeros
        wte_VD = self.param("wte", zeros, (c.vocab_size, c.width))
        wpe_CD = self.param("wpe", zeros, (c.context, c.width))
        return wte_VD[ids_BT] + wpe_CD[None, : ids_BT.shape[1]]


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        h_BTD = LayerNorm(c.norm_eps, name="ln_1")(x_BTD)
        qkv_BTE = Linear(3 * c.width, name="attn_c_attn")(h_BTD)
        q, k, v = (
            part.reshape(*part.shape[:2], c.heads, c.head_dim)
            for part in jnp.split(qkv_BTE, 3, axis=-1)
        )
        a_BTHK = causal_attention(q, k, v, scale=c.head_dim**-0.5)
        x_BTD = x_BTD + Linear(c.width, name="attn_c_proj")(a_BTHK.reshape(x_BTD.shape))
        h_BTD = LayerNorm(c.norm_eps, name="ln_2")(x_BTD)
        h_BTF = activation(c.activation)(Linear(c.mlp_width, name="mlp_c_fc")(h_BTD))
        return x_BTD + Linear(c.width, name="mlp_c_proj")(h_BTF)


class FinalNorm(LayerNorm):
    """GPT-2's `ln_f`."""


# Keys of a Hugging Face config that change nothing here: what the file is and how others train it.
_INERT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "task_specific_params", "attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx",
    "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "gradient_checkpointing", "pad_token_id", "return_dict", "id2label",
    "label2id", "is_encoder_decoder", "problem_type", "output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "tokenizer_class", "_num_labels", "_attn_implementation_autoset",
}  # fmt: skip
# Keys that are understood at one value only.
_FIXED = {
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False, "add_cross_attention": False, "is_decoder": False,
}  # fmt: skip
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
    "silu": "silu",
}  # fmt: skip


def from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a `config.json`; an unknown key, or a known one at an unsupported value, raises."""
    read = {
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon",
        "activation_function", "tie_word_embeddings", "initializer_range", "bos_token_id",
        "eos_token_id",
    }  # fmt: skip
    for key, value in hf.items():
        if key in _FIXED and value != _FIXED[key]:
            raise InputError(f"{where}: {key}={value!r} is not supported for gpt2")
        if key not in read | _INERT | _FIXED.keys():
            raise InputError(f"{where}: unknown key {key!r}; remove it if it changes nothing")
    for key in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if not isinstance(hf.get(key), int) or hf[key] < 1:
            raise InputError(f"{where}: key {key!r} is missing or not a positive integer")
    if hf["n_embd"] % hf["n_head"]:
        raise InputError(
            f"{where}: n_embd={hf['n_embd']} is not divisible by n_head={hf['n_head']}"
        )
    function = hf.get("activation_function", "gelu_new")
    if function not in _ACTIVATIONS:
        raise InputError(f"{where}: activation_function={function!r} is not supported for gpt2")
    return ModelConfig(
        family="gpt2",
        vocab_size=hf["vocab_size"],
        context=hf["n_positions"],
        width=hf["n_embd"],
        layers=hf["n_layer"],
        heads=hf["n_head"],
        head_dim=hf["n_embd"] // hf["n_head"],
        mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        activation=_ACTIVATIONS[function],
        tied=hf.get("tie_word_embeddings", True),
        init_std=hf.get("initializer_range", 0.02),
        bos=hf.get("bos_token_id"),
        eos=hf.get("eos_token_id"),
    )


def to_hf(c: ModelConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": c.vocab_size,
        "n_positions": c.context,
        "n_ctx": c.context,
        "n_embd": c.width,
        "n_layer": c.layers,
        "n_head": c.heads,
        "n_inner": c.mlp_width,
        "activation_function": names.get(c.activation, c.activation),
        "layer_norm_epsilon": c.norm_eps,
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos,
    }
