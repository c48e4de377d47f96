"""A small network over a row's tokens: which of them matter is learned.

    e_t = sum_k x_tk E[f_tk]                        a token by its features
    a   = softmax_t(e_t q),   h = sum_t a_t e_t     a learned query looks for the tokens that count
    logit = v relu(W h + b) + c

q starts at 0, where h is the mean over tokens. Features are read as `predictors` says, and so
a fingerprint of a whole row is a row of one token. Trained by AdamW on batches of one shape, until
the validation AUROC has not risen for a while; the best epoch's parameters are kept. The same seed
gives the same network on the same kind of device.

Dims: N rows, S tokens of all rows, B rows of a batch, T tokens of the longest row, K features of a
token, F features of the SAE, H, I width of a token and of the hidden layer.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sae.predict.predictors import Answer, Question, compressed, typical
from sae.predict.splits import TRAIN, VALIDATION

WIDTH = 32
BATCH = 32
RATE, DECAY = 3e-3, 0.1
START = 0.1  # of the embedding: less to unlearn of features that few rows have
EPOCHS, PATIENCE = 100, 10
BLOCK = 1024  # rows whose features are counted at once

Network = dict[str, Any]  # of arrays


class Bags(NamedTuple):
    """Rows as bags of tokens: row n has the tokens offsets[n] to offsets[n + 1].

    index int32 [S,K], -1 = none, and value [S,K] may be mapped files.
    """

    offsets: np.ndarray
    index_SK: np.ndarray
    value_SK: np.ndarray
    features: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def scale(self, rows_L: np.ndarray) -> np.ndarray:
        """s_f [F] over the tokens of these rows, 0 outside their vocabulary."""
        blocks = (
            np.concatenate([self.tokens(n) for n in rows_L[start : start + BLOCK]])
            for start in range(0, len(rows_L), BLOCK)
        )
        return typical(((self.index_SK[at], self.value_SK[at]) for at in blocks), self.features)

    def tokens(self, n: int) -> np.ndarray:
        return np.arange(self.offsets[n], self.offsets[n + 1])

    def batches(self, rows_N: np.ndarray, scale_F: np.ndarray) -> Iterator["Batch"]:
        """Batches of one shape, the last one filled up with empty rows, numbered -1."""
        longest, k = int(np.diff(self.offsets).max()), self.index_SK.shape[1]
        for start in range(0, len(rows_N), BATCH):
            rows_B = np.full(BATCH, -1, np.int64)
            rows_B[: len(rows_N) - start] = rows_N[start : start + BATCH]
            index_BTK = np.full((BATCH, longest, k), -1, np.int32)
            value_BTK = np.zeros((BATCH, longest, k), np.float32)
            length_B = np.zeros(BATCH, np.int32)
            for b, n in enumerate(rows_B[rows_B >= 0]):
                at = slice(self.offsets[n], self.offsets[n + 1])
                length_B[b] = at.stop - at.start
                index_BTK[b, : length_B[b]] = self.index_SK[at]
                value_BTK[b, : length_B[b]] = self.value_SK[at]
            x_BTK = compressed(index_BTK, value_BTK, scale_F).astype(np.float32)
            yield Batch(rows_B, index_BTK.clip(min=0), x_BTK, length_B)


class Batch(NamedTuple):
    """Row numbers (-1 = none), features of the tokens and what is read of each, tokens of rows."""

    rows_B: np.ndarray
    index_BTK: np.ndarray
    x_BTK: np.ndarray
    length_B: np.ndarray


def start(features: int, k: int, seed: int) -> Network:
    """A network before training, float32."""
    random = np.random.default_rng([seed, features])

    def normal(deviation: float, *shape: int) -> np.ndarray:
        return (deviation * random.standard_normal(shape)).astype(np.float32)

    return {
        "embedding": normal(START * k**-0.5, features, WIDTH),
        "query": np.zeros(WIDTH, np.float32),
        "hidden": normal((2 / WIDTH) ** 0.5, WIDTH, WIDTH),
        "hidden_bias": np.zeros(WIDTH, np.float32),
        "output": normal(WIDTH**-0.5, WIDTH),
        "output_bias": np.zeros((), np.float32),
    }


def forward(
    network: Network, index_BTK: jax.Array, x_BTK: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Logits [B]; an empty row has that of the bias alone, or any."""
    token_BTH = jnp.einsum("BTK,BTKH->BTH", x_BTK, network["embedding"][index_BTK])
    relevance_BT = jnp.einsum("BTH,H->BT", token_BTH, network["query"])
    there_BT = jnp.arange(x_BTK.shape[1])[None] < length_B[:, None]
    share_BT = jax.nn.softmax(jnp.where(there_BT, relevance_BT, -1e30))
    pooled_BH = jnp.einsum("BT,BTH->BH", share_BT, token_BTH)
    hidden_BI = jnp.einsum("BH,HI->BI", pooled_BH, network["hidden"])
    hidden_BI = jax.nn.relu(hidden_BI + network["hidden_bias"][None])
    return jnp.einsum("BI,I->B", hidden_BI, network["output"]) + network["output_bias"]


_forward = jax.jit(forward)


def _optimizer() -> optax.GradientTransformation:
    return optax.adamw(RATE, weight_decay=DECAY)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _step(
    network: Network,
    state: optax.OptState,
    batch: tuple[jax.Array, jax.Array, jax.Array],
    positive_B: jax.Array,
    weight_B: jax.Array,
) -> tuple[Network, optax.OptState]:
    """One update by the mean cross-entropy of rows with weight 1."""

    def loss(network: Network) -> jax.Array:
        nll_B = optax.sigmoid_binary_cross_entropy(forward(network, *batch), positive_B)
        return (weight_B * nll_B).sum() / weight_B.sum()

    updates, state = _optimizer().update(jax.grad(loss)(network), state, network)
    return optax.apply_updates(network, updates), state  # pyright: ignore[reportReturnType]


def logits(network: Network, bags: Bags, scale_F: np.ndarray, rows_L: np.ndarray) -> np.ndarray:
    """Of these rows, float64 [N]; 0 for all others."""
    out_N = np.zeros(len(bags))
    network = jax.device_put(network)
    for batch in bags.batches(rows_L, scale_F):
        real_B = batch.rows_B >= 0
        out_N[batch.rows_B[real_B]] = np.asarray(_forward(network, *batch[1:]))[real_B]
    return out_N


def train(
    bags: Bags, question: Question, epochs: int | None = None
) -> tuple[Network, np.ndarray, Answer]:
    """The network, the scale [F] of its vocabulary, and its answer.

    epochs: to run all the same; None: until the validation rows tell to stop.
    """
    rows_L = question.rows(TRAIN)
    scale_F = bags.scale(rows_L)
    network = jax.device_put(start(bags.features, bags.index_SK.shape[1], question.seed))
    state, best, best_epoch, highest = _optimizer().init(network), network, 0, -1.0
    for epoch in range(1, (epochs or EPOCHS) + 1):
        order_L = np.random.default_rng([question.seed, epoch]).permutation(rows_L)
        for batch in bags.batches(order_L, scale_F):
            positive_B = (question.label_N[batch.rows_B] == 1).astype(np.float32)
            weight_B = (batch.rows_B >= 0).astype(np.float32)
            network, state = _step(network, state, batch[1:], positive_B, weight_B)
        if epochs is None:
            seen = question.validation(logits(network, bags, scale_F, question.rows(VALIDATION)))
            if seen > highest:
                best, best_epoch, highest = jax.device_get(network), epoch, seen
            elif epoch - best_epoch >= PATIENCE:
                break
    if epochs is not None:
        best, best_epoch = jax.device_get(network), epochs
    logit_N = logits(best, bags, scale_F, np.arange(len(bags)))
    return best, scale_F, Answer(logit_N, question.validation(logit_N), {"epochs": best_epoch})
