"""Small runs to be walked back, of every family, optimizer and kind of parameters."""

import functools
from pathlib import Path

import numpy as np
import pytest

from attribution.magic.functional import functional
from attribution.magic.walk import Settings as Way
from attribution.magic.walk import Walk
from core import adapter, families, schema
from core.adapter import Adapter, LoraSpec
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.rows import Rows, load_rows, save_rows
from training.course import Course
from training.loop import Settings
from training.optim import Optim

V, T = 23, 12
CONFIGS = {
    "gpt2": ModelConfig("gpt2", V, T, 8, 2, 2, 12, 4),
    "gemma3": ModelConfig(
        "gemma3", V, T, 8, 2, 2, 12, 4, norm_eps=1e-6, kv_heads=1, rope_theta=1e6, window=4,
        sliding=(True, False),
    ),
    "gpt_neox": ModelConfig(
        "gpt_neox", V, T, 8, 2, 2, 12, 4, activation="gelu", tied=False, rotary_dim=2
    ),
}  # fmt: skip
LORA = LoraSpec(2, 4.0, adapter.ALL_LINEAR)


class Runs:
    """Courses over the same few rows, and their walks."""

    def __init__(self, folder: Path):
        self.rows = self._rows(folder / "rows", [12, 7, 12, 9, 12, 10, 5], 0)
        self.query = self._rows(folder / "query", [8, 12, 6], 1)

    @staticmethod
    def _rows(path: Path, lengths: list[int], seed: int) -> Rows:
        """Every second row has a prompt that is not supervised."""
        random = np.random.default_rng(seed)
        ids = [random.integers(1, V, n).astype(np.int32) for n in lengths]
        labels = [np.where(np.arange(len(x)) < i % 2 * 3, -100, x) for i, x in enumerate(ids)]
        save_rows(path, ids, labels)
        return load_rows(path, V, T)

    @functools.cache  # noqa: B019 (as long as the process)
    def loaded(self, family: str, lora: LoraSpec | None = None) -> Loaded:
        """Random everywhere, so that no mistake hides behind a zero."""
        config, random = CONFIGS[family], np.random.default_rng(0)

        def draw(rows: list[schema.Row]) -> schema.Params:
            found: schema.Params = {}
            for row in rows:
                shape = schema.full_shape(row, config.layers)
                spread = shape[-1] ** -0.5 if len(row.shape) == 2 else 0.3
                gain = row.path.endswith("/g") and family != "gemma3"  # which adds the 1 itself
                schema.put(found, row.path, random.normal(0, spread, shape) + gain)
            return found

        held = Adapter(lora, draw(adapter.rows(lora, config)), None, None) if lora else None
        return Loaded(config, draw(families.rows(config)), None, "0" * 64, held)

    def course(
        self,
        family: str,
        optim: Optim,
        lora: LoraSpec | None = None,
        dtype: str = "float64",
        batch: int = 3,
        accumulate: int = 1,
        epochs: int = 2,
    ) -> Course:
        n = epochs * len(self.rows)
        settings = Settings(-(-n // batch), batch, accumulate, seed=3, drawn=n)
        return Course(self.loaded(family, lora), self.rows, settings, optim, Execution(dtype))

    def walk(self, folder: Path, course: Course, mode: str = "mean", **way) -> Walk:
        asked = functional(self.query, mode, "nll")
        return Walk(folder, course, asked, Way(**{"batch_tokens": 64, **way}))

    def query_losses(self, course: Course, weights: np.ndarray, mode: str = "mean") -> np.ndarray:
        """The queries after training with these weights."""
        from attribution.magic import functional as functionals

        asked = functional(self.query, mode, "nll")
        params = course.train(weights).params
        s_R = functionals.losses(course.recipe, params, course.frozen, asked.parts, 64)
        return asked.of(s_R)[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("magic"))
