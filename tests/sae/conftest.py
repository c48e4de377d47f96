"""A small model and rows for it, half of which begin with the BOS."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint import load_model
from core.rows import load_rows, save_rows

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def loaded():
    found = load_model(GOLDEN / "gpt2_tiny")
    return found._replace(config=dataclasses.replace(found.config, bos=0))


@pytest.fixture(scope="session")
def rows_of(loaded, tmp_path_factory):
    """Lengths -> rows of random tokens."""

    def make(lengths):
        rng = np.random.default_rng(0)
        ids = [rng.integers(1, loaded.config.vocab_size, n).astype(np.int32) for n in lengths]
        for row in ids[::2]:
            row[0] = 0
        path = tmp_path_factory.mktemp("rows") / "rows"
        save_rows(path, ids)
        return load_rows(path)

    return make
