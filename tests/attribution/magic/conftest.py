"""Small runs to be walked back, of every family, optimizer and kind of parameters."""

import functools
from pathlib import Path

import numpy as np
import pytest

from attribution.magic import functional as functionals
from attribution.magic.adjoint import forward_step
from attribution.magic.functional import Mode, functional
from attribution.magic.walk import Settings as Way
from attribution.magic.walk import Walk
from core import adapter, families, schema
from core.adapter import Adapter, LoraSpec
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.rows import Rows, load_rows, save_rows
from core.schema import Params
from training.course import Course
from training.loop import Settings
from training.optim import Optim

V, T = 24, 12
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
# With it, and batches of 3, a row is twice in the batch that goes over the first epochs' border.
SEED = 3


class Runs:
    """Courses over the same few rows, and their walks."""

    lora = LoraSpec(2, 4.0, adapter.ALL_LINEAR, dropout=0.3)

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
        batch: int = 3,
        accumulate: int = 1,
        drawn: int | None = None,
    ) -> Course:
        """Of two epochs, in float64."""
        n = 2 * len(self.rows) if drawn is None else drawn
        settings = Settings(-(-n // batch), batch, accumulate, seed=SEED, drawn=n)
        execution = Execution("float64", "scan")  # which compiles one layer
        return Course(self.loaded(family, lora), self.rows, settings, optim, execution)

    def walk(self, folder: Path, course: Course, mode: Mode = "mean", **way) -> Walk:
        asked = functional(self.query, mode, "nll")
        folder.mkdir(exist_ok=True)
        return Walk(folder, course, asked, Way(**{"batch_tokens": 64, **way}))

    @staticmethod
    def trained(course: Course, weights: np.ndarray | None = None) -> Params:
        """As `Course.train`, by the program that the walk has compiled already."""
        state = course.start()
        for t in range(course.steps):
            batch = course.arrays(t, weights)
            state, *_ = forward_step(course.recipe, state, *batch, course.frozen, course.key)
        return state.params

    def query_losses(self, course: Course, params: Params, mode: Mode = "mean") -> np.ndarray:
        asked = functional(self.query, mode, "nll")
        s_R = functionals.losses(course.recipe, params, course.frozen, asked.parts, 64)
        return asked.of(s_R)[0]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(tmp_path_factory.mktemp("magic"))
