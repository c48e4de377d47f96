"""What an attribution must beat: scores that cost next to nothing, or nothing at all.

Dims: N rows (or units, see `attribution.validation.scores`), Q queries, C columns (Q, or 1 for the
mean over queries), B rows of a batch, T tokens, D width, U tokens that a query has, R rows.

    BM25:       sum_u in q  idf_u tf / (tf + k1 (1 - b + b |d| / mean |d|)),
                idf_u = ln(1 + (N - df_u + 1/2) / (df_u + 1/2))
    embedding:  cos(mean_t h_t(row), mean_t h_t(query)),   h: the final hidden states

BM25 is Okapi's (Robertson and Zaragoza, 2009) as Lucene has it: no factor k1 + 1, an idf that is
never negative, and a query token counts as often as the query has it. Its terms are token ids.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attribution.validation.scores import Scores
from core import model, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.inference import batch_losses, overlapped
from core.model import Variables
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead

K1, B = 1.2, 0.75


def bm25(rows: Rows, query: Rows, columns: int) -> np.ndarray:
    """BM25 [N,C] of each row's tokens for each query's, or the mean over queries.

    Linear in how often a query has a token, so the mean is that of the mean query.
    """
    terms = np.unique(np.concatenate([query.ids(j) for j in range(len(query))]))
    counts_QU = np.zeros((len(query), len(terms)))
    for j in range(len(query)):
        np.add.at(counts_QU[j], np.searchsorted(terms, query.ids(j)), 1)
    counts_CU = counts_QU if columns == len(query) else counts_QU.mean(0, keepdims=True)

    def terms_of(i: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in `terms` of what row i has of them, and how often."""
        ids = rows.ids(i)
        place = np.minimum(np.searchsorted(terms, ids), len(terms) - 1)
        return np.unique(place[terms[place] == ids], return_counts=True)

    holders_U = np.zeros(len(terms))
    for i in range(len(rows)):
        holders_U[terms_of(i)[0]] += 1
    idf_U = np.log1p((len(rows) - holders_U + 0.5) / (holders_U + 0.5))
    length_N = rows.lengths / rows.lengths.mean()
    scores_NC = np.zeros((len(rows), len(counts_CU)))
    for i in range(len(rows)):
        place, tf = terms_of(i)
        weight = idf_U[place] * tf / (tf + K1 * (1 - B + B * length_N[i]))
        scores_NC[i] = counts_CU[:, place] @ weight
    return scores_NC


@functools.partial(jax.jit, static_argnums=(0, 1))
@model.full_precision
def _directions(
    config: ModelConfig,
    execution: Execution,
    variables: Variables,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
) -> jax.Array:
    """Unit vectors [B,D] along each row's mean hidden state; zero for an empty row."""
    h_BTD = model.hidden(config, execution, variables, ids_BT)
    inside_BT = jnp.arange(ids_BT.shape[1])[None] < lengths_B[:, None]
    wide = np.promote_types(h_BTD.dtype, jnp.float32)
    sum_BD = jnp.einsum("BTD,BT->BD", h_BTD.astype(wide), inside_BT.astype(wide))
    return sum_BD / jnp.maximum(jnp.linalg.norm(sum_BD, axis=-1, keepdims=True), 1e-30)


def _embedded(
    loaded: Loaded, rows: Rows, execution: Execution, batch_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row numbers, unit vectors) of batch after batch, without padding rows."""
    mesh = sharding.local_mesh()
    where = sharding.over_rows(mesh)
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))

    def compute(batch: Batch) -> jax.Array:
        lengths_B = np.where(batch.rows_B >= 0, rows.lengths[batch.rows_B], 0).astype(np.int32)
        arrays = (sharding.place(x, where) for x in (batch.ids_BT, lengths_B))
        return _directions(loaded.config, execution, variables, *arrays)

    plan = Plan(rows, batch_tokens, jax.local_device_count())
    for batch, unit_BD in overlapped(read_ahead(plan), compute):
        real_B = batch.rows_B >= 0
        yield batch.rows_B[real_B], unit_BD[real_B].astype(np.float64)


def embedding(
    loaded: Loaded, rows: Rows, query: Rows, columns: int, execution: Execution, batch_tokens: int
) -> np.ndarray:
    """Cosine [N,C] of mean final hidden states; with one column its mean over queries."""
    query_QD = np.zeros((len(query), loaded.config.width))
    for rows_B, unit_BD in _embedded(loaded, query, execution, batch_tokens):
        query_QD[rows_B] = unit_BD
    query_CD = query_QD if columns == len(query) else query_QD.mean(0, keepdims=True)
    scores_NC = np.zeros((len(rows), len(query_CD)))
    with Progress(len(rows), "embed", "row") as bar:
        for rows_B, unit_BD in _embedded(loaded, rows, execution, batch_tokens):
            scores_NC[rows_B] = unit_BD @ query_CD.T
            bar.update(len(rows_B))
    return scores_NC


def controls(
    scored: Scores,
    loaded: Loaded,
    rows: Rows,
    query: Rows,
    execution: Execution,
    batch_tokens: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Scores [N,C] by name, as many columns as `scored` has; those a row has are in all columns.

    Loss (per token) and gradient norm are left out where the scores folder does not hold them.
    """
    shape = scored.scores_NC.shape
    of_rows = {
        "length": rows.trained,
        "loss": None if scored.losses_N is None else scored.losses_N / rows.trained,
        "gradient norm": scored.norms_N,
    }
    return {
        "random": np.random.default_rng([seed, 2]).normal(size=shape),
        **{
            name: np.broadcast_to(np.asarray(x_N, np.float64)[:, None], shape)
            for name, x_N in of_rows.items()
            if x_N is not None
        },
        "bm25": bm25(rows, query, shape[1]),
        "embedding": embedding(loaded, rows, query, shape[1], execution, batch_tokens),
    }


def token_controls(
    scored: Scores,
    of_rows: Scores,
    loaded: Loaded,
    rows: Rows,
    execution: Execution,
    batch_tokens: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Scores [N,C] of supervised tokens: random, their loss, their row's score in equal parts."""
    tokens, shape = scored.tokens, scored.scores_NC.shape
    assert tokens is not None
    nll_RT = np.zeros(tokens.shape)
    plan = Plan(rows, batch_tokens, jax.local_device_count())
    with Progress(len(rows), "losses", "row") as bar:
        for batch, nll_BT in batch_losses(loaded.config, execution, loaded.variables, plan):
            real_B = batch.rows_B >= 0
            nll_RT[batch.rows_B[real_B], : nll_BT.shape[1]] = nll_BT[real_B]
            bar.update(int(real_B.sum()))
    loss_N1 = nll_RT[tokens.rows_N, tokens.places_N][:, None]
    return {
        "random": np.random.default_rng([seed, 2]).normal(size=shape),
        "loss": np.broadcast_to(loss_N1, shape),
        "row": (of_rows.scores_NC / rows.trained[:, None])[tokens.rows_N],
    }
