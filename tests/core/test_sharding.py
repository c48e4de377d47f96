"""Where parameters live on a mesh; devices that do not divide are refused by name.

A mesh of one device serves for the table; tests/training/test_devices.py runs on eight.
"""

import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from core import families, schema, sharding
from core.config import ModelConfig
from core.errors import InputError

CONFIG = ModelConfig("gpt2", 50257, 64, 12, 3, 2, 20, 6)
ROWS = families.rows(CONFIG)


def test_every_parameter_has_a_place():
    mesh = sharding.make_mesh()
    where = sharding.parameter_shardings(ROWS, CONFIG.layers, mesh)
    specs = {row.path: schema.get(where, row.path).spec for row in ROWS}
    assert specs["embed/wte"] == PartitionSpec("model", None)
    assert specs["embed/wpe"] == PartitionSpec(None, None)
    assert specs["blocks/attn_c_attn/w"] == PartitionSpec(None, None, "model")
    assert specs["blocks/attn_c_attn/b"] == PartitionSpec(None, "model")
    assert specs["blocks/mlp_c_proj/w"] == PartitionSpec(None, "model", None)
    assert specs["blocks/mlp_c_proj/b"] == PartitionSpec(None, None)
    assert specs["blocks/ln_1/g"] == PartitionSpec(None, None)


@pytest.mark.parametrize(
    "devices,message",
    [(2, "embed/wte: size 50257 does not divide over 2 devices of mesh axis 'model'")],
)
def test_an_axis_that_does_not_divide_is_named(devices, message):
    mesh = types.SimpleNamespace(shape={"data": 1, "model": devices})
    with pytest.raises(InputError, match=message):
        sharding.parameter_shardings(ROWS, CONFIG.layers, mesh)  # pyright: ignore


@pytest.mark.parametrize("data,model", [(None, 2), (None, 0), (None, -1), (2, 1)])
def test_a_mesh_that_the_devices_do_not_make_is_refused(data, model):
    assert jax.device_count() == 1
    with pytest.raises(InputError, match="devices"):
        sharding.make_mesh(data, model)


def test_place():
    array = np.arange(12.0, dtype=np.float32).reshape(2, 6)
    placed = sharding.place(array, sharding.over_rows(sharding.make_mesh(), axis=1))
    assert placed.sharding.spec == PartitionSpec(None, "data")  # pyright: ignore
    np.testing.assert_array_equal(placed, array)
