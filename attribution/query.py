"""The rows of a gradient store that a query's gradient is nearest to.

Dims: Q queries, K rows kept of each, N rows of the store, B rows of a block, D features.

    inner     <q, g>            what a step along the row's gradient does to the query's loss
    cosine    <q, g> / |q||g|   the same for directions; rows of many tokens win no longer by length

The store is read once, block by block, and only the K best of each query are kept, so neither the
store nor [Q,N] scores need to fit into memory.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution.score import Settings, query_features
from attribution.store import Pass, Store
from core.errors import InputError
from core.progress import Progress
from core.rows import Ragged, Rows

ORIGIN = ("id", "source", "doc")  # columns that say where a row is from
SHOWN = 80  # characters of a text
BLOCK = 2**22  # features of the store that are on the device at once; they fit into CPU caches


class Best(NamedTuple):
    """The K best rows of each query, best first; row -1 = none yet."""

    scores_QK: jax.Array
    rows_QK: jax.Array


def text_rows(texts: list[str], tokenizer: Any, context: int) -> Rows:
    """Texts as rows in memory, every token supervised. tokenizer: see `tokenizers.base`."""
    import pyarrow as pa

    found = []
    for text in texts:
        ids = tokenizer.encode(text)
        if tokenizer.add_bos:
            ids = np.concatenate([[tokenizer.bos], ids])
        if not 2 <= len(ids) <= context:
            raise InputError(f"text {text[:SHOWN]!r} has {len(ids)} tokens; give one of 2 to "
                             f"{context}, the model's context")  # fmt: skip
        found.append(ids)
    column = pa.chunked_array([pa.array([ids.tolist() for ids in found], pa.list_(pa.int32()))])
    table = pa.table({"input_ids": column, "labels": column})
    ids, labels = (Ragged(table.column(name), name, "--text") for name in table.column_names)
    info = {"tokenizer": tokenizer.fingerprint}
    return Rows(Path("--text"), table, ids, labels, np.arange(len(texts)), info)


def _norms(x_BD: jax.Array) -> jax.Array:
    """Lengths [B], of a zero row 1; as one matmul, unless squares leave the range of float32."""

    def plain(x_BD: jax.Array) -> jax.Array:
        return jnp.einsum("BD,BD->B", x_BD, x_BD, precision="highest")

    def scaled(x_BD: jax.Array) -> jax.Array:
        largest_B1 = jnp.abs(x_BD).max(-1, keepdims=True)
        largest_B1 = jnp.where(largest_B1 > 0, largest_B1, 1)
        return jnp.maximum(jnp.sqrt(plain(x_BD / largest_B1)), 1) * largest_B1[:, 0]

    squares_B = plain(x_BD)
    usual = ((squares_B > 1e-30) & jnp.isfinite(squares_B)).all()
    return jax.lax.cond(usual, lambda _: jnp.sqrt(squares_B), scaled, x_BD)


@functools.partial(jax.jit, static_argnames="cosine")
def _better(best: Best, query_QD: jax.Array, block_BD: jax.Array, first: int, cosine: bool) -> Best:
    """The best of `best` and of a block whose first row is number `first`."""
    block_BD = block_BD.astype(jnp.float32)
    scores_QB = jnp.einsum("QD,BD->QB", query_QD, block_BD, precision="highest")
    if cosine:
        scores_QB = scores_QB / _norms(block_BD)[None]
    rows_B = first + jnp.arange(len(block_BD), dtype=jnp.int32)
    rows_QB = jnp.broadcast_to(rows_B, scores_QB.shape)
    both = Best(
        *(jnp.concatenate(pair, 1) for pair in zip(best, (scores_QB, rows_QB), strict=True))
    )
    scores_QK, at_QK = jax.lax.top_k(both.scores_QK, best.scores_QK.shape[1])
    return Best(scores_QK, jnp.take_along_axis(both.rows_QK, at_QK, axis=1))


def top_k(store: Store, query_QD: np.ndarray, k: int, cosine: bool = False) -> Best:
    """The rows of the whole store with the largest products; of equal ones the first rows.

    cosine: of the rows' directions, with queries of unit length.
    """
    n, width = store.array.shape
    k, size = min(k, n), max(1, BLOCK // width)
    best = Best(
        jnp.full((len(query_QD), k), -jnp.inf, jnp.float32),
        jnp.full((len(query_QD), k), -1, jnp.int32),
    )
    query = jnp.asarray(query_QD)
    with Progress(n, "attribute query", "row") as bar:
        for start in range(0, n, size):
            block_BD = store.read(slice(start, min(start + size, n)))
            best = _better(best, query, block_BD, start, cosine)
            bar.update(len(block_BD))
    return jax.device_get(best)


def beginning(ids: np.ndarray, tokenizer: Any) -> str:
    """The first words of a row, on one line; nothing without a tokenizer."""
    if tokenizer is None:
        return ""
    return " ".join(tokenizer.decode(ids[: 4 * SHOWN]).split())[:SHOWN]


def answers(
    store: Store,
    source: Pass,
    tokenizer: Any,
    queries: Rows,
    names: list[Any],
    k: int,
    cosine: bool,
) -> list[dict[str, Any]]:
    """What to tell of each query: its name and text, and its best rows with score and origin.

    source: the pass over the store's rows, which is made one over the queries.
    """
    asked_QD = query_features(source.of(queries), Settings("each", unit_norm=cosine))
    best = top_k(store, asked_QD, k, cosine)
    pool, told = source.rows, []
    for i, name in enumerate(names):
        hits = []
        for rank, row in enumerate(best.rows_QK[i].tolist(), 1):
            one, score = pool.take([row]), float(best.scores_QK[i, rank - 1])
            origin = {key: value[0] for key in ORIGIN if (value := one.column(key))}
            text = beginning(one.ids(0), tokenizer)
            hits.append({"rank": rank, "row": row, "score": score, **origin, "text": text})
        text = beginning(queries.ids(i), tokenizer)
        told.append({"query": name, "text": text, "hits": hits})
    return told
