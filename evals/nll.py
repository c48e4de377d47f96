"""The loss of every token of a rows folder, and the three means people quote.

    perplexity = exp(mean nll)      bits per byte = sum nll / (ln 2 * bytes of the predicted tokens)

Bits per byte compares models across tokenizers. Control tokens stand for no text, so they are left
out of both of its sums (nanochat's `evaluate_bpb`).
"""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core import sharding
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, write_json, write_npy
from core.inference import batch_losses
from core.progress import Progress
from core.rows import IGNORED, Plan, Rows
from tokenizers import Tokenizer


def token_nll(loaded: Loaded, rows: Rows, execution: Execution, batch_tokens: int) -> np.ndarray:
    """-log p(token t | tokens before it) in nats, float32 [N,T], T the longest row.

    Label-aligned; NaN where nothing is predicted: padding, unsupervised tokens, all of column 0.
    Rows must fit the model (`load_rows` checks it when given vocabulary and context).
    """
    nll_NT = np.full((len(rows), int(rows.lengths.max())), np.nan, np.float32)
    mesh = sharding.make_mesh()
    variables = jax.device_put(loaded.variables, sharding.replicated(mesh))
    plan = Plan(rows, batch_tokens, jax.device_count())
    with Progress(int(rows.lengths.sum()), "nll", "tokens") as bar:
        for batch, nll_BT in batch_losses(loaded.config, execution, variables, plan):
            real = batch.rows_B >= 0
            mask_BT = batch.labels_BT != IGNORED
            mask_BT[:, 0] = False
            where_BT = np.where(mask_BT, nll_BT, np.nan)
            nll_NT[batch.rows_B[real], : nll_BT.shape[1]] = where_BT[real]
            bar.update(int(rows.lengths[batch.rows_B[real]].sum()))
    return nll_NT


def run_nll(
    loaded: Loaded,
    rows: Rows,
    out: PathLike,
    execution: Execution,
    batch_tokens: int,
    tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Write `token_nll` to `out` (.npy) and its summary beside it (.json); returns the summary.

    bits_per_byte is None without the tokenizer that made the rows.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise InputError(f"{out} must end in .npy")
    if tokenizer is not None and rows.tokenizer not in (None, tokenizer.fingerprint):
        raise InputError(f"{rows.path} was not made with tokenizer {tokenizer.name}; "
                         "use the one that made it")  # fmt: skip
    nll_NT = token_nll(loaded, rows, execution, batch_tokens)
    tokens = int(np.isfinite(nll_NT).sum())
    if tokens != int(rows.trained.sum()):
        raise InputError(f"model {loaded.fingerprint[:12]} gives losses that are not finite; "
                         "its weights are damaged or it diverged")  # fmt: skip
    mean = float(np.nansum(nll_NT, dtype=np.float64)) / tokens
    summary = {
        "rows": len(rows),
        "tokens": tokens,
        "nll": mean,
        "perplexity": float(np.exp(mean)),
        "bits_per_byte": None if tokenizer is None else bits_per_byte(nll_NT, rows, tokenizer),
        "model": loaded.fingerprint,
        "rows_sha256": rows.sha,
    }
    write_npy(out, nll_NT)
    write_json(out.with_suffix(".json"), summary)
    return summary


def bits_per_byte(nll_NT: np.ndarray, rows: Rows, tokenizer: Tokenizer) -> float | None:
    """Bits a byte of the predicted text; None if no predicted token stands for text."""
    size_V = np.zeros(tokenizer.vocab_size, np.int64)
    for token, piece in tokenizer.pieces.items():
        size_V[token] = len(piece)
    size_V[list(tokenizer.control.values())] = 0
    nats, size = 0.0, 0
    for i in range(len(rows)):
        ids, nll_T = rows.ids(i), nll_NT[i, : rows.lengths[i]]
        size_T = np.where(np.isnan(nll_T), 0, size_V[ids])
        nats += float(nll_T[size_T > 0].sum(dtype=np.float64))
        size += int(size_T.sum())
    return nats / math.log(2) / size if size else None
