"""A training run as a function of its tokens' weights: all else about it is fixed.

Dims: N rows, T tokens, A micro-batches, B rows of one.

    theta(w) = the end of training on sum_bt w_bt nll_bt / D

from one start, on the same batches in the same order, with the same D. Attribution asks what theta
does as w changes: by the derivative at w = 1 (MAGIC), along a direction (metasmoothness), or with
rows left out (a bank of retrains). A row is left out by weight 0, never by batching the others
anew, which would differ by as much as another seed does.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import checkpoint, families, sharding
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.hf import peft
from core.rows import Batch, Rows, TrainingBatches
from training.loop import Settings, place_batch, place_state, recipe_of, run_key, spread
from training.optim import Optim
from training.step import Metrics, State, train_step


class Course:
    """The run that trains `loaded`, or its adapter, on `rows`."""

    def __init__(
        self, loaded: Loaded, rows: Rows, settings: Settings, optim: Optim, execution: Execution
    ):
        settings.check(jax.device_count())
        optim.check(settings.steps)
        self.rows, self.settings, self.model = rows, settings, loaded.fingerprint
        self.steps = settings.steps
        self.batches = TrainingBatches(
            rows, settings.batch, settings.seed, settings.shuffle, settings.drawn
        )
        if self.steps > len(self.batches):
            raise InputError(f"--steps {self.steps} are more than the {len(self.batches)} batches "
                             f"of {rows.path}; leave --steps or --epochs out")  # fmt: skip
        held, config = loaded.adapter, loaded.config
        self.adapter = held
        self.recipe = recipe_of(config, execution, optim, settings, held)
        self.recipe.optimizer()  # raises for what fits no parameter
        self.mesh = sharding.make_mesh(model=settings.model_parallel)
        self.dtype = np.promote_types(execution.compute_dtype, np.float32)

        def wide(tree: Any) -> Any:
            return jax.tree.map(lambda x: np.asarray(x, self.dtype), tree)

        self._start = wide(held.factors if held else loaded.params)
        self.frozen = None
        if held:
            params = wide(loaded.params)
            self.frozen = spread(families.rows(config), config.layers, self.mesh, params)
        self.key = run_key(self.recipe, settings.seed, self.mesh)

    def start(self) -> State:
        """The state before the first step; the caller's own, to be eaten by a step."""
        return jax.tree.map(jnp.copy, place_state(self.recipe, self.mesh, self._start))

    def batch(self, t: int) -> Batch:
        """The rows of step t (from 0), on the host."""
        return self.batches[t]

    def arrays(self, t: int, weights: np.ndarray | None = None) -> tuple[jax.Array, ...]:
        """ids, labels and weights [A,B,T] of step t; see `training.loop.place_batch`."""
        weights = np.ones(len(self.rows)) if weights is None else weights
        return place_batch(self.batch(t), self.settings, self.mesh, weights.astype(self.dtype))

    def train(
        self,
        weights: np.ndarray | None = None,
        seen: Callable[[int, Metrics], None] = lambda t, metrics: None,
    ) -> State:
        """The state after the last step with these weights, [N] or [N,T]; None: all 1.

        seen: is told of each step when it has been asked of the device.
        """
        state = self.start()
        with jax.default_matmul_precision("highest"):
            for t in range(self.steps):
                arrays = self.arrays(t, weights)
                state, metrics = train_step(self.recipe, state, *arrays, self.frozen, self.key)
                seen(t, metrics)
        return state

    def save(self, folder: Path, state: State, tokenizer: Any = None) -> None:
        """What is trained, in float32: `folder / "model"`, or `adapter` as a PEFT folder."""
        trained = jax.tree.map(lambda x: np.asarray(x, np.float32), state.params)
        config = self.recipe.config
        if self.adapter is None:
            checkpoint.save_model(folder / "model", config, trained, tokenizer)
        else:
            peft.write(
                folder / "adapter", config, self.adapter._replace(factors=trained), tokenizer
            )

    def describe(self) -> dict[str, Any]:
        """What the result depends on besides the weights, JSON-able."""
        names = ("steps", "batch", "accumulate", "seed", "shuffle", "drawn")
        return {
            "model": self.model,
            "rows": self.rows.sha,
            "settings": {name: getattr(self.settings, name) for name in names},
            "optim": dataclasses.asdict(self.recipe.optim),
            "lora": self.recipe.lora and dataclasses.asdict(self.recipe.lora),
            # What a run is asked about can be little more than what rounding differs by.
            "execution": dataclasses.asdict(self.recipe.execution),
            "devices": [device.device_kind for device in jax.devices()],
        }
