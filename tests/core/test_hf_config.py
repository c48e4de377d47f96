"""Hugging Face configs: both spellings, round trips, and every wrong key or value by name."""

import dataclasses

import pytest

from core import families
from core.config import ModelConfig
from core.errors import InputError

GPT2 = {"model_type": "gpt2", "vocab_size": 90, "n_positions": 32, "n_embd": 24, "n_layer": 2,
        "n_head": 3}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 90, "max_position_embeddings": 64,
    "hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 10, "intermediate_size": 40, "query_pre_attn_scalar": 20, "sliding_window": 7,
    "rope_theta": 5e5, "rope_local_base_freq": 3e4, "eos_token_id": [1, 106],
}  # fmt: skip
NEOX = {
    "model_type": "gpt_neox", "vocab_size": 90, "max_position_embeddings": 64, "hidden_size": 24,
    "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "rotary_pct": 0.5,
    "rotary_emb_base": 5000,
}  # fmt: skip
ROPE5 = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}


def read(content, **changes) -> ModelConfig:
    """`content` with changes; None takes a key out."""
    return families.from_hf({k: v for k, v in (content | changes).items() if v is not None}, "file")


def test_gemma3():
    c = read(GEMMA3)
    assert (c.groups, c.head_dim, c.window, c.tied, c.norm_eps) == (2, 10, 7, True, 1e-6)
    assert (c.rope_theta, c.rope_theta_local, c.scale) == (5e5, 3e4, 20**-0.5)
    assert c.sliding == (True, True, True, True, True, False, True, True)
    assert (c.eos, c.stops) == (1, (106,))


def test_gemma3_patterns():
    assert read(GEMMA3, sliding_window_pattern=2).sliding == (True, False) * 4
    assert read(GEMMA3, _sliding_window_pattern=8).sliding == (True,) * 7 + (False,)
    types = ["full_attention"] + ["sliding_attention"] * 7
    # What the layers are called wins over the period, which transformers writes beside it.
    found = read(GEMMA3, layer_types=types, sliding_window_pattern=6).sliding
    assert found == (False,) + (True,) * 7


def test_spellings_of_rope_agree():
    five = read(GEMMA3, rope_theta=None, rope_local_base_freq=None, rope_parameters=ROPE5)
    assert five == read(GEMMA3) == read(GEMMA3, rope_parameters=ROPE5)
    new = {"rope_type": "default", "rope_theta": 5000, "partial_rotary_factor": 0.5}
    five = read(NEOX, rotary_pct=None, rotary_emb_base=None, rope_parameters=new)
    assert five == read(NEOX) and (five.rotary_dim, five.rope_theta) == (4, 5000)


def test_defaults_of_neox():
    c = read(NEOX, rotary_pct=None, rotary_emb_base=None)
    assert (c.rotary_dim, c.rope_theta, c.activation) == (2, 10_000, "gelu")
    assert c.parallel_residual and not c.tied


@pytest.mark.parametrize("content", [GPT2, GEMMA3, NEOX], ids=["gpt2", "gemma3", "gpt_neox"])
def test_round_trip(content):
    c = read(content, bos_token_id=5)
    changed = dataclasses.replace(c, tied=not c.tied, norm_eps=3e-4, eos=7, stops=(8, 9))
    for config in (c, changed):
        assert families.from_hf(families.of(config).to_hf(config), "file") == config


@pytest.mark.parametrize("head_dim", range(2, 130))
def test_every_share_of_a_head_survives_the_file(head_dim):
    """Readers take int(head_dim * share), and a quotient may fall just below its integer."""
    c = read(NEOX, hidden_size=head_dim * 3)
    for turned in range(1, head_dim + 1):
        config = dataclasses.replace(c, rotary_dim=turned)
        assert families.from_hf(families.of(config).to_hf(config), "file").rotary_dim == turned


WRONG = {
    "unknown key": (GEMMA3, {"qk_clip": 3}, "unknown key 'qk_clip'"),
    "unknown in gpt2": (GPT2, {"rotary_pct": 1.0}, "unknown key 'rotary_pct'"),
    "missing": (GEMMA3, {"hidden_size": None}, "'hidden_size' is missing"),
    "kv heads missing": (GEMMA3, {"num_key_value_heads": None}, "'num_key_value_heads'"),
    "kv heads": (GEMMA3, {"num_key_value_heads": 3}, "4 heads cannot share 3"),
    "text": (NEOX, {"hidden_size": "24"}, "'hidden_size'"),
    "true": (NEOX, {"num_hidden_layers": True}, "'num_hidden_layers'"),
    "heads": (NEOX, {"num_attention_heads": 5}, "hidden_size=24 is not divisible"),
    "softcap": (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "attention softcap": (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    "bidirectional": (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "attention bias": (GEMMA3, {"attention_bias": True}, "attention_bias=True"),
    "no attention bias": (NEOX, {"attention_bias": False}, "attention_bias=False"),
    "scaled rope": (GEMMA3, {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}, "rope_scal"),
    "rope type": (NEOX, {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
    "rope key": (NEOX, {"rope_parameters": {"factor": 2.0}}, "'factor' in rope_parameters"),
    "rope kind": (GEMMA3, {"rope_parameters": {"full_attention": 3}}, "must hold JSON objects"),
    "rope list": (NEOX, {"rope_parameters": [1]}, "must hold JSON objects"),
    "rope disagrees": (NEOX, {"rope_parameters": {"rope_theta": 7.0}}, "disagree about rope_theta"),
    "rope theta": (NEOX, {"rotary_emb_base": -1}, "rope_theta must be positive"),
    "share": (NEOX, {"rotary_pct": 1.5}, "rotary_dim must be 1 to head_dim"),
    "layer types": (GEMMA3, {"layer_types": ["full_attention"] * 7}, "must name 8 layers"),
    "layer type": (GEMMA3, {"layer_types": ["full"] * 8}, "must name 8 layers"),
    "activation": (GEMMA3, {"hidden_activation": "tanh"}, "hidden_activation='tanh'"),
    "eps": (NEOX, {"layer_norm_eps": 0}, "layer_norm_eps must be a positive number"),
    "tied": (NEOX, {"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false"),
    "eos": (GEMMA3, {"eos_token_id": ["</s>"]}, "eos_token_id must be a token id"),
    "family": (GPT2, {"model_type": "gemma3"}, "model_type 'gemma3' is not one of"),
}


@pytest.mark.parametrize("content,changes,message", WRONG.values(), ids=WRONG)
def test_wrong_configs_are_named(content, changes, message):
    with pytest.raises(InputError, match=message):
        families.rows(read(content, **changes))
