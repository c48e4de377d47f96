"""Train, validation and test parts of a pool that share no document.

Rows cut from one document are near copies in vocabulary and topic: a classifier that has seen one
of them knows the others. So documents are dealt out, 60 / 20 / 20 by their number, never rows.

Dims: N rows, G documents.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import InputError

PARTS = TRAIN, VALIDATION, TEST = 0, 1, 2
NAMES = ("train", "validation", "test")
HELD_OUT = 0.2  # of the documents, for validation and again for test


def documents(names: Sequence[Any] | None, n: int) -> np.ndarray:
    """A number for each document, int64 [N]; a row without a name is a document of its own."""
    keys = [("row", i) if name is None else ("doc", str(name)) for i, name in
            enumerate([None] * n if names is None else names)]  # fmt: skip
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([number[key] for key in keys], np.int64)


def split(document_N: np.ndarray, used_N: np.ndarray, seed: int) -> np.ndarray:
    """The part of every row, int8 [N]; -1 for rows that are not used.

    Raises InputError for fewer documents than parts.
    """
    known_G = np.unique(document_N[used_N])
    if len(known_G) < len(PARTS):
        raise InputError(f"the scored rows are of {len(known_G)} documents, too few for train, "
                         "validation and test; give a pool of more, or rows without a doc column "
                         "if each is a document")  # fmt: skip
    held = max(1, round(HELD_OUT * len(known_G)))
    part_G = np.full(len(known_G), TRAIN, np.int8)
    part_G[:held], part_G[held : 2 * held] = TEST, VALIDATION
    part_G = np.random.default_rng([seed, 0x5EED]).permutation(part_G)
    place_N = np.minimum(np.searchsorted(known_G, document_N), len(known_G) - 1)
    return np.where(used_N, part_G[place_N], -1).astype(np.int8)


def require_both(label_N: np.ndarray, part_N: np.ndarray, seed: int) -> None:
    """Raise InputError unless every part holds rows of both classes."""
    for part in PARTS:
        found = set(label_N[(part_N == part) & (label_N >= 0)].tolist())
        if found != {0, 1}:
            lacking = "no proponents" if found == {0} else "proponents only" if found else "no rows"
            raise InputError(f"the {NAMES[part]} part of seed {seed} has {lacking}; give more "
                             "documents, or a label rule with larger classes")  # fmt: skip
