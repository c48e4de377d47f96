"""A pool whose attribution is known: some features of the fingerprints make the score."""

from pathlib import Path

import numpy as np

from core.files import write_json, write_npy
from core.rows import Rows, load_rows, save_rows
from sae.fingerprint import Fingerprints, read_fingerprints
from sae.pooling import STATISTICS

FEATURES, WIDTH, K, TOKENS, TOKEN_K = 300, 16, 24, 6, 4
SIGNAL = 4  # features of rows that raise the score
DOCUMENTS, EACH = 50, 4


def rows(path: Path, seed: int = 0, named: bool = True, **columns: list) -> Rows:
    """DOCUMENTS x EACH rows of random tokens."""
    random, n = np.random.default_rng([seed, 1]), DOCUMENTS * EACH
    ids = [random.integers(1, 64, random.integers(6, 20)).astype(np.int32) for _ in range(n)]
    columns |= {"doc": [f"d{i // EACH}" for i in range(n)]} if named else {}
    save_rows(path, ids, columns=columns)
    return load_rows(path)


def fingerprints(
    path: Path, rows: Rows, has_NS: np.ndarray, tokens: bool = True, **info: object
) -> Fingerprints:
    """Row n has the signal feature s where has_NS, among others that mean nothing."""
    random, n = np.random.default_rng(len(has_NS)), len(rows)
    path.mkdir()
    index_NK = random.permuted(np.tile(np.arange(20, FEATURES), (n, 1)), axis=1)[:, :K]
    value_NK = -np.sort(-random.uniform(0.1, 2, (n, K)), axis=1)
    signals = has_NS.shape[1]
    index_NK[:, :signals] = np.where(has_NS, np.arange(signals), index_NK[:, :signals])
    for name in ("mean", "max"):
        write_npy(path / f"{name}_index.npy", index_NK.astype(np.int32))
        write_npy(path / f"{name}_value.npy", value_NK.astype(np.float32))
    for name, width in (("statistics", len(STATISTICS)), ("hidden_mean", WIDTH)):
        write_npy(path / f"{name}.npy", random.normal(size=(n, width)).astype(np.float32))
    write_npy(path / "lengths.npy", np.full(n, TOKENS, np.int32))
    if tokens:  # each token has some of the row's features
        shape = (n, TOKENS * TOKEN_K)
        write_npy(path / "token_index.npy",
                  index_NK[:, : shape[1]].reshape(-1, TOKEN_K).astype(np.int32))  # fmt: skip
        write_npy(path / "token_value.npy",
                  value_NK[:, : shape[1]].reshape(-1, TOKEN_K).astype(np.float32))  # fmt: skip
        write_npy(path / "token_offsets.npy", np.arange(n + 1) * TOKENS)
    about = {
        "format": "taproot-fingerprints",
        "rows": {"path": str(rows.path), "sha": rows.sha, "count": n},
        "model": "m" * 64,
        "tokenizer": None,
        "sae": {"path": "sae", "fingerprint": "s" * 64, "d_sae": FEATURES,
                "architecture": "topk"},
        "tap": "resid_post.1",
        "pooling": ["mean", "max", "attention"] if tokens else ["mean", "max"],
        "k": K,
        "token_k": TOKEN_K if tokens else 0,
        "statistics": [*STATISTICS],
        "exclude": ["padding"],
    }  # fmt: skip
    write_json(path / "info.json", about | info)
    return read_fingerprints(path)


def presence(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 2]).random((n, SIGNAL)) < 0.5
