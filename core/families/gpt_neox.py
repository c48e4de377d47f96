"""GPT-NeoX and Pythia: partly rotated heads, fused qkv by head, parallel residual, untied head.

Dims: V vocabulary, D width, F mlp width, H heads, K head width; B batch, T tokens. The fused matrix
stays as the file has it: its outputs are (head, q|k|v, K), so that it is one site under one name.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from core.attention import Rotation, attend, rotate, rotation
from core.config import ModelConfig
from core.errors import InputError
from core.families.hf_config import Keys, ends
from core.layers import LayerNorm, activation
from core.linear import Linear, catch, tap
from core.schema import Row

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
PREFIX = "gpt_neox."
IGNORED = (r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
           r"rotary_emb\.inv_freq")  # fmt: skip
ALIASES = {"lm_head.weight": "embed_out.weight"}  # what transformers 5 calls it in memory
ATTENTION = r"layers\.\d+\.attention\.(query_key_value|dense)"  # sites, for adapters


def rows(c: ModelConfig) -> list[Row]:
    activation(c.activation)  # raises for an unknown one
    if c.heads * c.head_dim != c.width or c.groups != c.heads:
        raise InputError(
            f"a gpt_neox model of width {c.width} cannot have {c.heads} heads of {c.head_dim} over "
            f"{c.groups}; choose a divisor of the width"
        )
    turned = c.rotary_dim or c.head_dim
    if turned + turned % 2 > c.head_dim:  # pairs; transformers rounds an odd number up
        raise InputError(f"a gpt_neox model cannot turn {turned} of {c.head_dim} features in pairs")
    d, f = c.width, c.mlp_width

    def linear(module: str, name: str, i: int, o: int, axes: tuple[str, str]) -> list[Row]:
        site = f"layers.{{l}}.{module}.{name}"
        file = f"{PREFIX}{site}"
        return [
            Row(f"blocks/{name}/w", (i, o), axes, f"{file}.weight", transpose=True,
                init=c.init_std, site=site),
            Row(f"blocks/{name}/b", (o,), axes[1:], f"{file}.bias", init="zeros", site=site),
        ]  # fmt: skip

    def norm(path: str, hf: str) -> list[Row]:
        return [
            Row(f"{path}/g", (d,), (None,), f"{PREFIX}{hf}.weight", init="ones"),
            Row(f"{path}/b", (d,), (None,), f"{PREFIX}{hf}.bias", init="zeros"),
        ]

    vocab, size = ("vocab", "embed"), (c.vocab_size, d)
    head = Row("head", size, vocab, "embed_out.weight", init=c.init_std)
    return [
        Row("embed/wte", size, vocab, f"{PREFIX}embed_in.weight", init=c.init_std),
        *norm("blocks/input_layernorm", "layers.{l}.input_layernorm"),
        *linear("attention", "query_key_value", d, 3 * d, ("embed", "heads")),
        *linear("attention", "dense", d, d, ("heads", "embed")),
        *norm("blocks/post_attention_layernorm", "layers.{l}.post_attention_layernorm"),
        *linear("mlp", "dense_h_to_4h", d, f, ("embed", "mlp")),
        *linear("mlp", "dense_4h_to_h", f, d, ("mlp", "embed")),
        *norm("final_norm", "final_layer_norm"),
        *([] if c.tied else [head]),
    ]


def heads(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Of the sites whose outputs belong to heads, those of each head, by the site's path."""
    size = 3 * c.head_dim  # a head's q, k and v lie together
    rows = tuple(tuple(range(h * size, (h + 1) * size)) for h in range(c.heads))
    return {"blocks/query_key_value": rows}


class Places(NamedTuple):
    """What blocks need of positions."""

    positions_BT: jax.Array
    by: Rotation


def places(c: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> Places:
    dim = c.rotary_dim or c.head_dim
    return Places(positions_BT, rotation(positions_BT, dim, c.rope_theta, dtype))


def kinds(c: ModelConfig) -> None:
    """All layers are alike."""
    del c


class Embed(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        del positions_BT
        c = self.config
        wte_VD = self.param("wte", nn.initializers.zeros, (c.vocab_size, c.width))
        x_BTD = catch(self.get_variable("sinks", "wte"), wte_VD[ids_BT], ids_BT)
        return x_BTD.astype(self.dtype)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, places: Places, kind: None) -> jax.Array:
        c = self.config
        h_BTD = LayerNorm(c.norm_eps, name="input_layernorm")(x_BTD)
        qkv_BTE = Linear(3 * c.width, name="query_key_value")(h_BTD)
        qkv_BTHE = qkv_BTE.reshape(*qkv_BTE.shape[:2], c.heads, 3 * c.head_dim)
        q_BTHK, k_BTHK, v_BTHK = jnp.split(qkv_BTHE, 3, axis=-1)
        q_BTHK, k_BTHK = rotate(q_BTHK, places.by), rotate(k_BTHK, places.by)
        a_BTHK = attend(self, q_BTHK, k_BTHK, v_BTHK, places.positions_BT, c.head_dim**-0.5)
        a_BTD = Linear(c.width, name="dense")(tap(self, "attn_out", a_BTHK.reshape(x_BTD.shape)))
        before_BTD = x_BTD if c.parallel_residual else x_BTD + a_BTD
        h_BTD = LayerNorm(c.norm_eps, name="post_attention_layernorm")(before_BTD)
        h_BTD = tap(self, "mlp_in", h_BTD)
        h_BTF = activation(c.activation)(Linear(c.mlp_width, name="dense_h_to_4h")(h_BTD))
        m_BTD = tap(self, "mlp_out", Linear(c.width, name="dense_4h_to_h")(h_BTF))
        return m_BTD + a_BTD + x_BTD if c.parallel_residual else m_BTD + before_BTD


class FinalNorm(LayerNorm):
    """GPT-NeoX's `final_layer_norm`."""


def from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a `config.json` of transformers 4 or 5; an unknown or unsupported key raises."""
    keys = Keys(hf, where, "gpt_neox")
    keys.fixed(attention_bias=True, rope_scaling=None, is_decoder=False)
    rope = keys.rope(
        None, ["rope_theta", "rotary_emb_base"], ["partial_rotary_factor", "rotary_pct"]
    )
    width, heads = keys.size("hidden_size"), keys.size("num_attention_heads")
    if width % heads:
        raise InputError(
            f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}"
        )
    config = ModelConfig(
        family="gpt_neox",
        vocab_size=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings"),
        width=width,
        layers=keys.size("num_hidden_layers"),
        heads=heads,
        head_dim=width // heads,
        mlp_width=keys.size("intermediate_size"),
        norm_eps=keys.number("layer_norm_eps", 1e-5),
        activation=keys.activation("hidden_act", "gelu"),
        tied=keys.flag("tie_word_embeddings", False),
        init_std=keys.number("initializer_range", 0.02),
        rotary_dim=int(width // heads * (rope.partial_rotary_factor or 0.25)),
        rope_theta=float(rope.rope_theta or 10_000),
        parallel_residual=keys.flag("use_parallel_residual", True),
        **keys.ids(),
    )
    keys.finish("classifier_dropout", "hidden_dropout")
    config.check(where)
    return config


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """In the spellings of transformers 4 and 5 at once, where they differ."""
    names = {"gelu_tanh": "gelu_new"}
    turned = c.rotary_dim or c.head_dim
    share = turned / c.head_dim
    if int(c.head_dim * share) < turned:  # what readers compute, rounded down
        share = math.nextafter(share, 1)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": names.get(c.activation, c.activation),
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "use_parallel_residual": c.parallel_residual,
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rotary_pct": share,
        "rotary_emb_base": c.rope_theta,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": c.rope_theta,
            "partial_rotary_factor": share,
        },
        "bos_token_id": c.bos,
        "eos_token_id": ends(c.eos, c.stops),
    }
