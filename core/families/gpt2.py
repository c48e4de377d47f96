"""GPT-2: learned positions, pre-LayerNorm, fused qkv, tanh-gelu, biases everywhere, tied head.

Dims: V vocabulary, C context, D width, F mlp width, H heads, K head width; B batch, T tokens.
The file's four matrices are Conv1D, stored [in, out] as ours are, so no row is transposed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from core.attention import attend
from core.config import ModelConfig
from core.errors import InputError
from core.families.hf_config import Keys, ends
from core.layers import LayerNorm, activation
from core.linear import Linear, catch, tap
from core.schema import Row

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
PREFIX = "transformer."
# Buffers (causal masks) that old files carry beside the parameters.
IGNORED = (r"h\.\d+\.attn\.(bias|masked_bias)",)
ALIASES: dict[str, str] = {}
ATTENTION = r"h\.\d+\.attn\.(c_attn|c_proj)"  # sites, for adapters


def rows(c: ModelConfig) -> list[Row]:
    activation(c.activation)  # raises for an unknown one
    if c.heads * c.head_dim != c.width or c.groups != c.heads:
        raise InputError(
            f"a gpt2 model of width {c.width} cannot have {c.heads} heads of {c.head_dim} over "
            f"{c.groups}; choose a divisor of the width"
        )
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


def heads(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Of the sites whose outputs belong to heads, those of each head, by the site's path."""
    k = c.head_dim
    parts = [[p * c.width + h * k for p in range(3)] for h in range(c.heads)]  # of q, k and v
    rows = tuple(tuple(start + i for start in of for i in range(k)) for of in parts)
    return {"blocks/attn_c_attn": rows}


class Places(NamedTuple):
    """What blocks need of positions: the positions, [B,T] or [1,T]."""

    positions_BT: jax.Array


def places(c: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> Places:
    del c, dtype
    return Places(positions_BT)


def kinds(c: ModelConfig) -> None:
    """All layers are alike."""
    del c


class Embed(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        c, zeros = self.config, nn.initializers.zeros
        wte_VD = self.param("wte", zeros, (c.vocab_size, c.width))
        wpe_CD = self.param("wpe", zeros, (c.context, c.width))
        x_BTD = catch(self.get_variable("sinks", "wte"), wte_VD[ids_BT], ids_BT)
        return (x_BTD + wpe_CD[positions_BT]).astype(self.dtype)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, places: Places, kind: None) -> jax.Array:
        c = self.config
        h_BTD = LayerNorm(c.norm_eps, name="ln_1")(x_BTD)
        qkv_BTE = Linear(3 * c.width, name="attn_c_attn")(h_BTD)
        q, k, v = (
            part.reshape(*part.shape[:2], c.heads, c.head_dim)
            for part in jnp.split(qkv_BTE, 3, axis=-1)
        )
        a_BTHK = attend(self, q, k, v, places.positions_BT, c.head_dim**-0.5)
        o_BTD = tap(self, "attn_out", a_BTHK.reshape(x_BTD.shape))
        x_BTD = x_BTD + Linear(c.width, name="attn_c_proj")(o_BTD)
        h_BTD = tap(self, "mlp_in", LayerNorm(c.norm_eps, name="ln_2")(x_BTD))
        h_BTF = activation(c.activation)(Linear(c.mlp_width, name="mlp_c_fc")(h_BTD))
        return x_BTD + tap(self, "mlp_out", Linear(c.width, name="mlp_c_proj")(h_BTF))


class FinalNorm(LayerNorm):
    """GPT-2's `ln_f`."""


def from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a `config.json`; an unknown key, or a known one at an unsupported value, raises."""
    keys = Keys(hf, where, "gpt2")
    keys.fixed(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
               reorder_and_upcast_attn=False, add_cross_attention=False,
               is_decoder=False)  # fmt: skip
    width, heads = keys.size("n_embd"), keys.size("n_head")
    if width % heads:
        raise InputError(f"{where}: n_embd={width} is not divisible by n_head={heads}")
    config = ModelConfig(
        family="gpt2",
        vocab_size=keys.size("vocab_size"),
        context=keys.size("n_positions"),
        width=width,
        layers=keys.size("n_layer"),
        heads=heads,
        head_dim=width // heads,
        mlp_width=keys.size("n_inner", 4 * width),
        norm_eps=keys.number("layer_norm_epsilon", 1e-5),
        activation=keys.activation("activation_function", "gelu_new"),
        tied=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
        **keys.ids(),
    )
    keys.finish("attn_pdrop", "embd_pdrop", "resid_pdrop", "n_ctx", "summary_activation",
                "summary_first_dropout", "summary_proj_to_labels", "summary_type",
                "summary_use_proj")  # fmt: skip
    return config


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
        "eos_token_id": ends(c.eos, c.stops),
    }
