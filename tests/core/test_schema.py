"""One row per parameter: shapes, initialisation and sites follow from the rows."""

import jax
import numpy as np
import pytest

from core import families, schema
from core.config import ModelConfig
from core.schema import Site

GPT2 = ModelConfig("gpt2", 50257, 1024, 768, 12, 12, 3072, 64)
SMALL = ModelConfig("gpt2", 300, 200, 64, 3, 4, 256, 16)


def test_gpt2_counts():
    """124,439,808 parameters in 148 tensors (openai/gpt-2), wte being the head too."""
    rows = families.rows(GPT2)
    shapes = [schema.full_shape(row, 12) for row in rows]
    assert sum(int(np.prod(shape)) for shape in shapes) == 124_439_808
    assert sum(12 if row.stacked else 1 for row in rows) == 148


def test_gpt2_sites():
    assert schema.sites(families.rows(GPT2)) == [
        Site("blocks/attn_c_attn", "h.{l}.attn.c_attn", 768, 2304, True),
        Site("blocks/attn_c_proj", "h.{l}.attn.c_proj", 768, 768, True),
        Site("blocks/mlp_c_fc", "h.{l}.mlp.c_fc", 768, 3072, True),
        Site("blocks/mlp_c_proj", "h.{l}.mlp.c_proj", 3072, 768, True),
    ]


def test_abstract_has_the_tree_of_init():
    rows = families.rows(SMALL)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), schema.init(rows, 3, 0))
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), schema.abstract(rows, 3))


def test_init_draws_what_the_rows_say():
    rows = families.rows(SMALL)
    params = schema.init(rows, 3, 0)
    drawn = {}
    for row in rows:
        value = np.asarray(schema.get(params, row.path))
        if isinstance(row.init, str):
            assert (value == {"zeros": 0, "ones": 1}[row.init]).all()
        else:
            assert value.std() == pytest.approx(row.init, rel=0.05), row.path
            assert abs(value.mean()) < 4 * row.init / value.size**0.5
            drawn[row.path] = value.ravel()
    names = {"attn_c_proj", "mlp_c_proj"}
    residual = [r.init for r in rows if r.path.split("/")[1] in names and r.path.endswith("/w")]
    assert residual == [0.02 / 6**0.5] * 2  # GPT-2 paper, section 2.3: 1 / sqrt(2 layers)
    # Streams are named by path: equal shapes do not share numbers, other rows change nothing.
    for a in drawn:
        assert all((drawn[a][:50] != drawn[b][:50]).all() for b in drawn if a != b)
    alone = schema.init(rows[:1], 3, 0)
    np.testing.assert_array_equal(alone["embed"]["wte"], params["embed"]["wte"])
    other = schema.init(rows[:1], 3, 1)
    assert (np.asarray(other["embed"]["wte"]) != np.asarray(params["embed"]["wte"])).all()


def test_put_and_get():
    tree = {}
    schema.put(tree, "a/b/c", 1)
    schema.put(tree, "a/d", 2)
    assert tree == {"a": {"b": {"c": 1}, "d": 2}} and schema.get(tree, "a/b/c") == 1
