"""Scores, plain, preconditioned and by token, against those that Bergson computed."""

from typing import Any

import numpy as np
import pytest

from attribution import directions, score
from attribution.outputs import Scored
from attribution.projection import Projection
from attribution.score import Settings
from attribution.store import Pass
from attribution.targets import Spec
from core import rows
from core.config import Execution
from core.rundir import open_run

PLAIN, PROJECTED = Spec(Projection(0)), Spec(Projection(4, "bergson-rademacher"))
INVERSIONS: dict[str, Any] = {
    "damped_inverse": "damped",
    "absolute_damped_inverse": "absolute",
    "pseudoinverse": "pseudo",
    "tikhonov_filtered": "tikhonov",
}
VARIANTS: dict[str, tuple[Spec, Settings]] = {
    "raw": (PLAIN, Settings("each")),
    "cosine": (PLAIN, Settings("each", unit_norm=True)),
    "nearest": (PLAIN, Settings("max")),
    "mean_query": (PLAIN, Settings()),
    "projected_nearest": (PROJECTED, Settings("max")),
    "mixed_split_cosine": (
        PROJECTED, Settings("each", "mixed", unit_norm=True, mix_components=10)
    ),
    **{f"{name}_{'split_cosine' if cosine else 'onesided'}":
       (PROJECTED, Settings("each", "pool", 0.1, cosine, inversion=inversion))
       for name, inversion in INVERSIONS.items() for cosine in (False, True)},
}  # fmt: skip


@pytest.fixture(scope="module")
def sources(bergson, tmp_path_factory):
    """spec -> (pool, query). All batches have one shape, so that each pass compiles once."""
    folder = tmp_path_factory.mktemp("rows")
    pool, query = (bergson.rows(split, folder / split) for split in ("train", "query"))
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "bucket", lambda length, longest: 24)
        for spec in (PLAIN, PROJECTED):
            whole = Pass(bergson.loaded, pool, spec, Execution(layers="scan"), 3 * 24)
            made[spec] = whole, whole.of(query)
        yield made


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores(bergson, sources, relative, tmp_path, variant):
    spec, settings = VARIANTS[variant]
    pool, query = sources[spec]
    with open_run(tmp_path / "scores", "attribute score", {}) as run:
        score.score(run, pool, query, settings, Scored(pool.rows))
    expected = bergson.arrays("scores")[variant]
    found = np.load(tmp_path / "scores" / "scores.npy")
    assert relative(found.reshape(expected.shape), expected) < 1e-4


@pytest.mark.parametrize("side", ["gradient", "loss"])
def test_token_scores(bergson, sources, relative, tmp_path, side):
    """Bergson's row t is position t, and loss t + 1; ours are label-aligned."""
    pool, query = sources[PLAIN]
    with open_run(tmp_path / "scores", "attribute score", {}) as run:
        directions.score_exact(run, pool, query, Scored(pool.rows), "each", side)
    found = np.load(tmp_path / "scores" / "token_scores.npy")
    arrays = bergson.arrays("scores")
    expected = arrays["token_gradient" if side == "gradient" else "token_output"]
    shift = 0 if side == "gradient" else 1
    tokens = [found[n, shift : length - 1 + shift] for n, length in enumerate(pool.rows.lengths)]
    assert relative(np.concatenate(tokens), expected) < 1e-4
    assert relative(np.load(tmp_path / "scores" / "scores.npy"), arrays["raw"]) < 1e-4
