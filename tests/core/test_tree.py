"""Rows of trees, with and without a shared prefix, against one sequence at a time.

In float64, so that a property either holds to 1e-12 or is broken.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import adapter, families, model, schema
from core.adapter import LoraSpec
from core.config import Execution, ModelConfig

SIZES: Any = {"vocab_size": 40, "context": 16, "width": 12, "layers": 3, "heads": 2,
              "mlp_width": 20, "head_dim": 6}  # fmt: skip
CONFIGS = {
    "gpt2": ModelConfig("gpt2", **SIZES),
    "gpt_neox": ModelConfig("gpt_neox", **SIZES, tied=False, rotary_dim=4),
    # Shorter than a branch's way to the root, and than its way into the prefix.
    "gemma3": ModelConfig("gemma3", **SIZES, kv_heads=1, window=4, sliding=(True, False, True)),
}
EACH = pytest.mark.parametrize(
    "family,layers", [*((family, "scan") for family in CONFIGS), ("gemma3", "unrolled")]
)
pytestmark = pytest.mark.usefixtures("x64")

# (parent, tokens): a text, what branches off it, what branches off that; and a second text.
BRANCHES = [(None, 6), (0, 3), (1, 4), (1, 1), (0, 5), (None, 7), (5, 2)]


@functools.cache
def weights(family: str) -> schema.Params:
    rng = np.random.default_rng(0)
    shapes = schema.abstract(families.rows(CONFIGS[family]), CONFIGS[family].layers)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.4, x.shape)), shapes)


def forest(shared: int = 0, padding: int = 3):
    """(what all begin with, `shared` tokens; a row: ids, positions, ends; whole texts; their places
    in the row)."""
    rng = np.random.default_rng(1)
    common = rng.integers(0, 40, shared)
    texts, places, spans = [], [], []
    for parent, n in BRANCHES:
        first = spans[-1][1] if spans else 0
        before, at = (common, []) if parent is None else (texts[parent], places[parent])
        texts.append(np.concatenate([before, rng.integers(0, 40, n)]))
        places.append([*at, *range(first, first + n)])
        spans.append((first, first + n))
    size = spans[-1][1]
    ids, positions = np.zeros((2, size + padding), np.int32)
    ends = np.arange(1, size + padding + 1, dtype=np.int32)
    for text, place, (first, stop) in zip(texts, places, spans, strict=True):
        ids[place], positions[place] = text[shared:], np.arange(shared, len(text))
        ends[place] = stop  # of every ancestor, too: the last one counts
        ends[first:stop] = stop
    return common, [ids, positions, ends], texts, places


@functools.partial(jax.jit, static_argnums=(0, 1))
def tree(config, execution, variables, row, prefix=None):
    ids_BT, positions_BT, ends_BT = row
    return model.tree_hidden(config, execution, variables, ids_BT, positions_BT, ends_BT, prefix)


alone = functools.partial(jax.jit, static_argnums=(0, 1))(model.full_precision(model.hidden))


def expected(config, variables, text):
    padded = np.zeros((1, 16), np.int32)
    padded[0, : len(text)] = text
    return np.asarray(alone(config, Execution("float64", "scan"), variables, padded))[
        0, : len(text)
    ]


def check(config, variables, hidden_TD, texts, places, shared, close):
    for text, place in zip(texts, places, strict=True):
        close(hidden_TD[place], expected(config, variables, text)[shared:], "float64")


@EACH
def test_a_branch_is_a_text_of_its_own(family, layers, close):
    """Also beside another tree, beside padding, and in a second row that is another forest."""
    config, variables = CONFIGS[family], {"params": weights(family)}
    _, row, texts, places = forest()
    apart = [row[0][::-1], np.zeros_like(row[1]), np.arange(1, len(row[0]) + 1)]  # of one token
    both = [np.stack(pair).astype(np.int32) for pair in zip(row, apart, strict=True)]
    hidden_BTD = np.asarray(tree(config, Execution("float64", layers), variables, both))
    check(config, variables, hidden_BTD[0], texts, places, 0, close)
    single = expected(config, variables, apart[0][:1])
    close(hidden_BTD[1, :1], single, "float64")


@EACH
def test_a_prefix_is_read_before_every_row(family, layers, close):
    """Padded to a bucket; windows reach from branches through trunks into it."""
    config, variables = CONFIGS[family], {"params": weights(family)}
    execution = Execution("float64", layers)
    common, row, texts, places = forest(shared=3)
    padded = np.pad(common, (0, 2), constant_values=7)[None]
    of = jax.jit(model.prefix_of, static_argnums=(0, 1))
    prefix = of(config, execution, variables, padded, np.int32(3))
    assert prefix.keys.shape == (3, 1, 5, config.groups, config.head_dim)
    hidden_BTD = tree(config, execution, variables, [x[None] for x in row], prefix)
    check(config, variables, np.asarray(hidden_BTD)[0], texts, places, 3, close)


def test_an_adapter_reads_trees(close):
    config = CONFIGS["gemma3"]
    spec, rng = LoraSpec(2, 4.0, "all-linear"), np.random.default_rng(2)
    factors = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), adapter.init(spec, config, 0)
    )
    lora = adapter.collection(spec, config, factors)
    variables = {"params": weights("gemma3"), "lora": lora}
    _, row, texts, places = forest()
    hidden_BTD = tree(config, Execution("float64", "scan"), variables, [x[None] for x in row])
    check(config, variables, np.asarray(hidden_BTD)[0], texts, places, 0, close)
