"""Model configs: defaults, round trip, and every wrong key or value by name."""

import json

import pytest

from core import families
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.families import read_config

GOOD = {"vocab_size": 100, "context": 32, "width": 24, "layers": 2, "heads": 3}


def test_defaults():
    config = ModelConfig.from_json(GOOD, "file")
    assert (config.family, config.mlp_width, config.head_dim) == ("gpt2", 96, 8)
    assert ModelConfig.from_json(config.to_json(), "file") == config
    assert (config.groups, config.scale) == (3, 8**-0.5)


def test_lists_are_hashable():
    fields = {**GOOD, "sliding": [True, False], "window": 4, "stops": [1, 2], "query_scale": 1}
    config = ModelConfig.from_json(fields, "file")
    assert config.sliding == (True, False) and config.stops == (1, 2) and config.scale == 1
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json())), "file") == config
    hash(config)


BAD = {
    "unknown key": ({**GOOD, "vocabsize": 1}, "unknown model config key 'vocabsize'"),
    "missing key": ({k: v for k, v in GOOD.items() if k != "layers"}, "'layers' is missing"),
    "missing width": ({k: v for k, v in GOOD.items() if k != "width"}, "'width' is missing"),
    "missing heads": ({k: v for k, v in GOOD.items() if k != "heads"}, "'heads' is missing"),
    "zero": ({**GOOD, "layers": 0}, "layers must be positive"),
    "no heads": ({**GOOD, "heads": 0}, "heads must be positive"),
    "negative": ({**GOOD, "width": -24}, "must be positive"),
    "text": ({**GOOD, "width": "24"}, "width must be of type int"),
    "fraction": ({**GOOD, "vocab_size": 1.5}, "vocab_size must be of type int"),
    "true": ({**GOOD, "layers": True}, "layers must be of type int"),
    "tied": ({**GOOD, "tied": "no"}, "tied must be of type bool"),
    "eps": ({**GOOD, "norm_eps": "small"}, "norm_eps must be of type float"),
    "heads": ({**GOOD, "heads": 5}, "width 24"),
    "head_dim": ({**GOOD, "head_dim": 6}, "width 24"),
    "activation": ({**GOOD, "activation": "tanh"}, "tanh"),
    "family": ({**GOOD, "family": "mamba"}, "model family 'mamba' is unknown"),
    "kv_heads": ({**GOOD, "kv_heads": 2}, "3 heads cannot share 2 kv_heads"),
    "rotary_dim": ({**GOOD, "rotary_dim": 9}, "rotary_dim must be 1 to head_dim"),
    "window": ({**GOOD, "sliding": [True, False]}, "window must be positive"),
    "sliding": ({**GOOD, "sliding": [True], "window": 4}, "sliding names 1 of 2 layers"),
    "sliding text": ({**GOOD, "sliding": "yes"}, "sliding must be a list of bool"),
    "sliding numbers": ({**GOOD, "sliding": [1, 0]}, "sliding must be a list of bool"),
    "eos": ({**GOOD, "eos": -1}, "eos must not be negative"),
    "list": ([1], "holds no JSON object"),
    "model_type": ({"model_type": "mamba"}, "model_type 'mamba' is not one of"),
}


@pytest.mark.parametrize("fields,message", BAD.values(), ids=BAD)
def test_wrong_configs_are_named(tmp_path, fields, message):
    """Reading the file, or asking for the parameters, raises before anything is computed."""
    (tmp_path / "model.json").write_text(json.dumps(fields))
    with pytest.raises(InputError, match=message):
        families.rows(read_config(tmp_path / "model.json"))


def test_execution():
    assert Execution(layers="scan").unroll(12) == 1
    assert Execution(layers="unrolled").unroll(40) == 40
    assert [Execution().unroll(n) for n in (2, 16, 17, 48)] == [2, 16, 1, 1]  # auto, on CPU
    assert Execution().tokens_per_chunk(50257) == 667 and Execution().tokens_per_chunk(256) == 2**17
    assert Execution().tokens_per_chunk(10**7) == 128
    assert Execution(loss_chunk=5).tokens_per_chunk(9) == 5
