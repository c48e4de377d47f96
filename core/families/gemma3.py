"""Gemma 3, text: RMSNorm before and after each half-block, normed q and k, local and global layers.

Dims: V vocabulary, D width, F mlp width, H heads, G key-value heads, K head width (not D / H);
B batch, T tokens. Weights of the norms are stored zero-centred and used as 1 + g.

Layers differ in one bit, scanned with their parameters: a sliding layer sees the last `window`
tokens and turns by `rope_theta_local`, a global one sees all and turns by `rope_theta`.
transformers gives no input-side gradient to the row of the padding id; ours is the true gradient,
which differs only for texts that contain that id.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from core.attention import Rotation, attend, rotate, rotation
from core.config import ModelConfig
from core.errors import InputError
from core.families.hf_config import Keys, ends
from core.layers import RMSNorm, activation
from core.linear import Linear, catch, tap
from core.schema import Row

MODEL_TYPE = "gemma3_text"
ARCHITECTURE = "Gemma3ForCausalLM"
PREFIX = "model."
IGNORED = (r"rotary_emb(_local)?\.inv_freq", r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
ALIASES: dict[str, str] = {}
ATTENTION = r"layers\.\d+\.self_attn\.(q|k|v|o)_proj"  # sites, for adapters
NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)  # fmt: skip


def rows(c: ModelConfig) -> list[Row]:
    activation(c.activation)  # raises for an unknown one
    if (c.rotary_dim or c.head_dim) != c.head_dim or c.head_dim % 2:
        raise InputError(f"a gemma3 model turns whole, even heads, not {c.rotary_dim} of "
                         f"{c.head_dim}")  # fmt: skip
    d, f, q, kv = c.width, c.mlp_width, c.heads * c.head_dim, c.groups * c.head_dim

    def linear(module: str, name: str, i: int, o: int, axes: tuple[str, str]) -> Row:
        site = f"layers.{{l}}.{module}.{name}"
        return Row(f"blocks/{name}/w", (i, o), axes, f"{PREFIX}{site}.weight", transpose=True,
                   init=c.init_std, site=site)  # fmt: skip

    def norm(path: str, hf: str, size: int) -> Row:
        return Row(f"{path}/g", (size,), (None,), f"{PREFIX}{hf}.weight", init="zeros")

    before, after, *mlp_norms = (norm(f"blocks/{n}", f"layers.{{l}}.{n}", d) for n in NORMS)
    vocab = ("vocab", "embed")
    embedding = f"{PREFIX}embed_tokens.weight"
    return [
        Row("embed/wte", (c.vocab_size, d), vocab, embedding, init=c.init_std),
        before,
        linear("self_attn", "q_proj", d, q, ("embed", "heads")),
        linear("self_attn", "k_proj", d, kv, ("embed", "heads")),
        linear("self_attn", "v_proj", d, kv, ("embed", "heads")),
        norm("blocks/q_norm", "layers.{l}.self_attn.q_norm", c.head_dim),
        norm("blocks/k_norm", "layers.{l}.self_attn.k_norm", c.head_dim),
        linear("self_attn", "o_proj", q, d, ("heads", "embed")),
        after,
        mlp_norms[0],
        linear("mlp", "gate_proj", d, f, ("embed", "mlp")),
        linear("mlp", "up_proj", d, f, ("embed", "mlp")),
        linear("mlp", "down_proj", f, d, ("mlp", "embed")),
        mlp_norms[1],
        norm("final_norm", "norm", d),
        *([] if c.tied else [Row("head", (c.vocab_size, d), vocab, "lm_head.weight")]),
    ]


def heads(c: ModelConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Of the sites whose outputs belong to heads, those of each head, by the site's path."""
    k = c.head_dim

    def rows(heads: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(h * k, (h + 1) * k)) for h in range(heads))

    names = {"q_proj": c.heads, "k_proj": c.groups, "v_proj": c.groups}
    return {f"blocks/{name}": rows(heads) for name, heads in names.items()}


class Places(NamedTuple):
    """What blocks need of positions; rotations of sliding and of global layers."""

    positions_BT: jax.Array
    near: Rotation
    far: Rotation


def places(c: ModelConfig, positions_BT: jax.Array, dtype: jnp.dtype) -> Places:
    near = rotation(positions_BT, c.head_dim, c.rope_theta_local, dtype)
    return Places(positions_BT, near, rotation(positions_BT, c.head_dim, c.rope_theta, dtype))


def kinds(c: ModelConfig) -> jax.Array:
    """[L] bool: whether the layer is a sliding one."""
    return jnp.asarray(np.array(c.sliding or [False] * c.layers))


class Embed(nn.Module):
    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        del positions_BT
        c = self.config
        wte_VD = self.param("wte", nn.initializers.zeros, (c.vocab_size, c.width))
        x_BTD = catch(self.get_variable("sinks", "wte"), wte_VD[ids_BT], ids_BT).astype(self.dtype)
        # The factor is rounded to the embedding's dtype first: 25.25 in bfloat16, not 25.298.
        return x_BTD * jnp.asarray(c.width**0.5, self.dtype)


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, places: Places, kind: jax.Array) -> jax.Array:
        c = self.config
        before, after, before_mlp, after_mlp = (RMSNorm(c.norm_eps, name=n) for n in NORMS)
        by = jax.tree.map(lambda near, far: jnp.where(kind, near, far), places.near, places.far)
        h_BTD = before(x_BTD)
        q_BTHK = self._heads("q_proj", c.heads, h_BTD)
        k_BTGK = self._heads("k_proj", c.groups, h_BTD)
        v_BTGK = self._heads("v_proj", c.groups, h_BTD)
        q_BTHK = rotate(RMSNorm(c.norm_eps, name="q_norm")(q_BTHK), by)
        k_BTGK = rotate(RMSNorm(c.norm_eps, name="k_norm")(k_BTGK), by)
        window = jnp.where(kind, c.window, c.context + 1) if any(c.sliding) else None
        a_BTHK = attend(self, q_BTHK, k_BTGK, v_BTGK, places.positions_BT, c.scale, window)
        o_BTE = tap(self, "attn_out", a_BTHK.reshape(*x_BTD.shape[:2], -1))
        x_BTD = x_BTD + after(Linear(c.width, bias=False, name="o_proj")(o_BTE))
        h_BTD = tap(self, "mlp_in", before_mlp(x_BTD))
        gate_BTF = activation(c.activation)(
            Linear(c.mlp_width, bias=False, name="gate_proj")(h_BTD)
        )
        h_BTF = gate_BTF * Linear(c.mlp_width, bias=False, name="up_proj")(h_BTD)
        m_BTD = after_mlp(Linear(c.width, bias=False, name="down_proj")(h_BTF))
        return x_BTD + tap(self, "mlp_out", m_BTD)

    def _heads(self, name: str, heads: int, h_BTD: jax.Array) -> jax.Array:
        y_BTE = Linear(heads * self.config.head_dim, bias=False, name=name)(h_BTD)
        return y_BTE.reshape(*y_BTE.shape[:2], heads, self.config.head_dim)


class FinalNorm(RMSNorm):
    """Gemma's `norm`."""


def _pattern(keys: Keys, layers: int, where: str) -> tuple[bool, ...]:
    """Which layers slide: `layer_types`, else every one but each n-th."""
    types = keys.left.pop("layer_types", None)
    period = keys.size("_sliding_window_pattern", 6)
    period = keys.size("sliding_window_pattern", period)
    if types is None:
        return tuple((layer + 1) % period != 0 for layer in range(layers))
    names = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or not {*types} <= {*names}:
        raise InputError(f"{where}: layer_types must name {layers} layers, each one of {names}")
    return tuple(name == "sliding_attention" for name in types)


def from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a `config.json` of transformers 4 or 5; an unknown or unsupported key raises."""
    keys = Keys(hf, where, "gemma3")
    keys.fixed(attention_bias=False, attn_logit_softcapping=None, final_logit_softcapping=None,
               use_bidirectional_attention=False, rope_scaling=None)  # fmt: skip
    far = keys.rope("full_attention", ["rope_theta"], [])
    near = keys.rope("sliding_attention", ["rope_local_base_freq"], [])
    layers, head_dim = keys.size("num_hidden_layers"), keys.size("head_dim", 256)
    config = ModelConfig(
        family="gemma3",
        vocab_size=keys.size("vocab_size"),
        context=keys.size("max_position_embeddings"),
        width=keys.size("hidden_size"),
        layers=layers,
        heads=keys.size("num_attention_heads"),
        kv_heads=keys.size("num_key_value_heads"),
        head_dim=head_dim,
        mlp_width=keys.size("intermediate_size"),
        norm_eps=keys.number("rms_norm_eps", 1e-6),
        activation=keys.activation("hidden_activation", "gelu_pytorch_tanh"),
        tied=keys.flag("tie_word_embeddings", True),
        init_std=keys.number("initializer_range", 0.02),
        rope_theta=float(far.rope_theta or 1e6),
        rope_theta_local=float(near.rope_theta or 1e4),
        window=keys.size("sliding_window", 4096),
        sliding=_pattern(keys, layers, where),
        query_scale=keys.number("query_pre_attn_scalar", 256.0) ** -0.5,
        **keys.ids(),
    )
    keys.finish()
    config.check(where)
    return config


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """In the spellings of transformers 4 and 5 at once, where they differ."""
    names = {"gelu_tanh": "gelu_pytorch_tanh"}
    sliding = c.sliding or (False,) * c.layers
    scalar = c.scale**-2
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": c.context,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.groups,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation": names.get(c.activation, c.activation),
        "initializer_range": c.init_std,
        "tie_word_embeddings": c.tied,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-9 else scalar,
        "sliding_window": c.window or 1,
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "rope_theta": c.rope_theta,
        "rope_local_base_freq": c.rope_theta_local,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": c.rope_theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": c.rope_theta_local},
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "bos_token_id": c.bos,
        "eos_token_id": ends(c.eos, c.stops),
    }
