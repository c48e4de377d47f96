"""A bank of retrains: what the queries' losses become when rows of the training set weigh less.

Dims: N rows, T tokens, Q queries, M retrains, A micro-batches, B rows of one.

    theta(w) = the end of training on sum_bt w_bt nll_bt / D,    L_q(w) = query q's loss there

A row is removed by weight 0, never by batching the others anew: all retrains run one program on
the same batches in the same order, from the same start, with the same D, and differ in w alone.
(With other batches the difference would be that of another seed, which is larger than what a
hundredth of the rows does.)

A result is one small file named by a hash of everything it depends on. So a killed command goes on
at the next retrain, and other scores of the same rows are validated without training again.
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core import sharding
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, dumps, read_npy, write_json, write_npy
from core.inference import batch_losses
from core.progress import Progress
from core.rows import Batch, Plan, Rows, training_batches
from core.schema import Params
from training.loop import Settings
from training.optim import Optim
from training.step import Recipe, initial, train_step


class Bank:
    """Retrains from `loaded` on `rows`, with the losses of every row of `query` after each."""

    def __init__(
        self,
        folder: PathLike,
        loaded: Loaded,
        rows: Rows,
        query: Rows,
        settings: Settings,
        optim: Optim,
        execution: Execution,
        batch_tokens: int,
    ):
        """settings: steps, batch and accumulate; its seed is left to each retrain."""
        settings.check(jax.device_count())
        optim.check(settings.steps)
        self.rows, self.query, self.settings = rows, query, settings
        lora = loaded.adapter.spec if loaded.adapter else None
        self.recipe = Recipe(loaded.config, execution, optim, settings.steps, lora)
        setting = {
            "model": loaded.fingerprint,
            "rows": rows.sha,
            "query": query.sha,
            "training": {
                **{name: getattr(settings, name) for name in ("steps", "batch", "accumulate")},
                **dataclasses.asdict(optim),
            },
            # What a retrain is made for can be little more than what rounding differs by.
            "execution": dataclasses.asdict(execution),
            "batch_tokens": batch_tokens,
            "devices": [device.device_kind for device in jax.devices()],
        }
        mark = hashlib.sha256(dumps(setting).encode()).hexdigest()
        self.folder = Path(folder) / mark[:16]
        self.setting = setting
        self.plan = Plan(query, batch_tokens, jax.device_count())
        self._mesh = sharding.make_mesh()
        everywhere = sharding.replicated(self._mesh)
        start = loaded.adapter.factors if loaded.adapter else loaded.params
        self._start = jax.device_put(start, everywhere)
        self._frozen = jax.device_put(loaded.params, everywhere) if loaded.adapter else None

    def file(self, weights: np.ndarray, seed: int) -> Path:
        """Where the result of one retrain is kept, once it is there."""
        weights = np.ascontiguousarray(weights, "<f8")
        digest = hashlib.sha256(f"{weights.shape}".encode())
        digest.update(weights.data)
        return self.folder / f"seed{seed}-{digest.hexdigest()[:32]}.npy"

    def losses(self, weights: Sequence[np.ndarray], seeds: Sequence[int] = (0,)) -> np.ndarray:
        """Query losses [M,Q] after each retrain, nats per supervised token, mean over seeds.

        weights: of each retrain [N], or [N,T] label-aligned. What the bank has is read, the rest
        is trained and kept.
        """
        write_json(self.folder / "setting.json", self.setting)
        wanted = [[self.file(w, seed) for seed in seeds] for w in weights]
        missing = {
            file: (w, seed)
            for w, files in zip(weights, wanted, strict=True)
            for seed, file in zip(seeds, files, strict=True)
            if not file.exists()
        }
        total = len({file for files in wanted for file in files})
        with Progress(total, "retrain", "run", total - len(missing)) as bar:
            for file, (w, seed) in missing.items():
                write_npy(file, self.retrain(w, seed))
                bar.update(1)
        sums_MQ = np.stack([np.mean([read_npy(file) for file in files], 0) for files in wanted])
        return sums_MQ / self.query.trained

    def retrain(self, weights: np.ndarray, seed: int) -> np.ndarray:
        """Summed loss [Q] of each query row after training with these weights, float64 nats."""
        weights = np.asarray(weights, np.promote_types(self.recipe.execution.dtype, np.float32))
        state = initial(self.recipe, jax.tree.map(jnp.copy, self._start))  # a step eats its state
        key = None
        if self.recipe.lora and self.recipe.lora.dropout:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"dropout"))
        batches = training_batches(self.rows, self.settings.batch, seed)
        with jax.default_matmul_precision("highest"):
            for _ in range(self.settings.steps):
                arrays = self._arrays(next(batches), weights)
                state, _ = train_step(self.recipe, state, *arrays, self._frozen, key)
        losses_Q = self._query_losses(state.params)
        if not np.isfinite(losses_Q).all():
            raise InputError(f"training on {self.rows.path} diverged, a query's loss is not finite "
                             "after it; lower --lr")  # fmt: skip
        return losses_Q

    def before(self) -> np.ndarray:
        """Query losses [Q] before any training, nats per supervised token."""
        return self._query_losses(self._start) / self.query.trained

    def _query_losses(self, params: Params) -> np.ndarray:
        losses_Q = np.zeros(len(self.query))
        recipe, variables = self.recipe, self.recipe.variables(params, self._frozen)
        for batch, nll_BT in batch_losses(recipe.config, recipe.execution, variables, self.plan):
            real_B = batch.rows_B >= 0
            losses_Q[batch.rows_B[real_B]] = nll_BT.sum(1, dtype=np.float64)[real_B]
        return losses_Q

    def _arrays(self, batch: Batch, weights: np.ndarray) -> tuple[jax.Array, ...]:
        """ids, labels and weights as [A,B,T] on all devices."""
        shape_BT = batch.ids_BT.shape
        of_rows = weights[batch.rows_B]
        of_rows = of_rows[:, None] if weights.ndim == 1 else of_rows[:, : shape_BT[1]]
        shape = (self.settings.accumulate, shape_BT[0] // self.settings.accumulate, shape_BT[1])
        where = sharding.over_rows(self._mesh, axis=1)
        arrays = (batch.ids_BT, batch.labels_BT, np.broadcast_to(of_rows, shape_BT))
        return tuple(sharding.place(x.reshape(shape), where) for x in arrays)
