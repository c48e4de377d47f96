"""Random matrices from a counter, equal to Bergson's bit for bit (its projection version 2).

Dims: P projected (rows), N columns, W words: outputs of the generator that fill one row.

Philox4x32-10 (Salmon et al., SC 2011) maps a counter (w, row, 0, 0) and a key, the first 8 bytes
of md5(name), to four words of 32 bits. A sign is one bit of the 128, a normal entry one of the
four of two Box-Muller pairs; so an entry depends on its name, row and column alone: not on the
matrix's size, nor on the machine, but for the last bits of normals, where `log` and `cos` differ.
"""

import hashlib
from typing import Literal

import numpy as np

ROUNDS = 10
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85  # of the key, round by round
WORD = 2**32 - 1
CHUNK = 2**16  # entries made at a time, so that they stay in the cache

Counter = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(counter: Counter, key: tuple[int, int]) -> Counter:
    """Four words of every counter; all uint64 holding 32 bits, in shapes that broadcast."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (p1 >> 32) ^ x1 ^ k0, p1 & WORD, (p0 >> 32) ^ x3 ^ k1, p0 & WORD
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return x0, x1, x2, x3


def matrix(name: str, rows: int, columns: int, kind: Literal["rademacher", "normal"]) -> np.ndarray:
    """[P,N] float32 of variance 1: Bergson's matrix of this identifier before it is scaled.

    name: `MODULE/left`, `MODULE/right` or `MODULE/single/START`, before START or at the end with
    `/seedS` where Bergson was given a projection seed.
    """
    digest = hashlib.md5(name.encode(), usedforsecurity=False).digest()
    key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    entries, per_output = {"rademacher": (_signs, 128), "normal": (_normals, 4)}[kind]
    outputs = -(-columns // per_output)
    w_1W, zero_11 = np.arange(outputs, dtype=np.uint64)[None], np.zeros((1, 1), np.uint64)
    out_PN = np.empty((rows, columns), np.float32)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        row_P1 = np.arange(start, min(start + step, rows), dtype=np.uint64)[:, None]
        words_PWx4 = np.stack(philox((w_1W, row_P1, zero_11, zero_11), key), -1).astype("<u4")
        out_PN[start : start + step] = entries(words_PWx4)[:, :columns]
    return out_PN


def _signs(words_PWx4: np.ndarray) -> np.ndarray:
    """Column c is bit c of the words, lowest first: 1 is +1, 0 is -1."""
    bytes_PN = words_PWx4.reshape(len(words_PWx4), -1).view(np.uint8)
    bits_PN = np.unpackbits(bytes_PN, axis=-1, bitorder="little")
    return 2 * bits_PN.view(np.int8) - 1


def _normals(words_PWx4: np.ndarray) -> np.ndarray:
    """Box-Muller of each two words, in float32 throughout: r cos t, r sin t."""
    a_PM, b_PM = (
        words_PWx4[..., start::2].reshape(len(words_PWx4), -1).astype(np.float32)
        for start in (0, 1)
    )
    radius_PM = np.sqrt(-2 * np.log((a_PM + 0.5) * 2.0**-32))
    angle_PM = 2 * np.pi * (b_PM * 2.0**-32)
    pairs_PMx2 = np.stack([radius_PM * np.cos(angle_PM), radius_PM * np.sin(angle_PM)], -1)
    return pairs_PMx2.reshape(len(pairs_PMx2), -1)
