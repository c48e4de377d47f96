"""A bank of retrains: what the queries' losses become when rows of the training set weigh less.

Dims: N rows, T tokens, Q queries, M retrains, R query rows, S seeds.

    theta(w) = the end of training with weights w (`training.course`)
    L_q(w)   = query q's loss there, a function of its rows' losses (`attribution.magic.functional`)

All retrains run one program on the same batches in the same order, from the same start, with the
same D, and differ in w alone; what is removed has weight 0.

A result is one small file named by a hash of everything it depends on. So a killed command goes on
at the next retrain, and other scores of the same rows are validated without training again.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attribution.magic.functional import Functional, losses
from core import adapter
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, dumps, read_npy, write_json, write_npy
from core.progress import Progress
from core.rows import Rows
from core.schema import Params
from training.course import Course
from training.loop import Settings
from training.optim import Optim


class Bank:
    """Retrains from `loaded` on `rows`, with the losses of all rows that are `asked` after each."""

    def __init__(
        self,
        folder: PathLike,
        loaded: Loaded,
        rows: Rows,
        asked: Functional,
        settings: Settings,
        optim: Optim,
        execution: Execution,
        batch_tokens: int,
    ):
        """settings: its seed is left to each retrain."""
        self._course = Course(loaded, rows, settings, optim, execution)
        self._loaded = loaded
        self.rows, self.asked, self.batch_tokens = rows, asked, batch_tokens
        about = self._course.describe()
        del about["settings"]["seed"]
        query = [part.sha for part in asked.parts]
        held = loaded.adapter and adapter.fingerprint(loaded.config, loaded.adapter)
        self.setting = about | {"query": query, "batch_tokens": batch_tokens, "adapter": held}
        mark = hashlib.sha256(dumps(self.setting).encode()).hexdigest()
        self.folder = Path(folder) / mark[:16]

    def course(self, seed: int) -> Course:
        """The run with this seed; the last one is kept."""
        held = self._course
        if held.settings.seed != seed:
            settings, recipe = dataclasses.replace(held.settings, seed=seed), held.recipe
            how = (settings, recipe.optim, recipe.execution)
            self._course = Course(self._loaded, self.rows, *how)
        return self._course

    def file(self, weights: np.ndarray, seed: int) -> Path:
        """Where the result of one retrain is kept, once it is there."""
        weights = np.ascontiguousarray(weights, "<f8")
        digest = hashlib.sha256(f"{weights.shape}".encode())
        digest.update(weights.data)
        return self.folder / f"seed{seed}-{digest.hexdigest()[:32]}.npy"

    def losses(self, weights: Sequence[np.ndarray], seeds: Sequence[int] = (0,)) -> np.ndarray:
        """Query losses [M,Q] after each retrain, mean over seeds.

        weights: of each retrain [N], or [N,T] label-aligned. What the bank has is read, the rest
        is trained and kept.
        """
        write_json(self.folder / "setting.json", self.setting)
        wanted_SM = [[self.file(w, seed) for w in weights] for seed in seeds]
        missing = {
            file: (w, seed)
            for files, seed in zip(wanted_SM, seeds, strict=True)
            for file, w in zip(files, weights, strict=True)
            if not file.exists()
        }
        total = len({file for files in wanted_SM for file in files})
        with Progress(total, "retrain", "run", total - len(missing)) as bar:
            for file, (w, seed) in missing.items():
                write_npy(file, self.retrain(w, seed))
                bar.update(1)
        found_SMQ = [[self.asked.of(read_npy(file))[0] for file in files] for files in wanted_SM]
        return np.mean(found_SMQ, 0)

    def retrain(self, weights: np.ndarray, seed: int) -> np.ndarray:
        """Summed loss [R] of each query row after training with these weights, float64 nats."""
        losses_R = self._row_losses(self.course(seed).train(weights).params)
        if not np.isfinite(losses_R).all():
            raise InputError(f"training on {self.rows.path} diverged, a query's loss is not finite "
                             "after it; lower --lr")  # fmt: skip
        return losses_R

    def before(self) -> np.ndarray:
        """Query losses [Q] before any training."""
        return self.asked.of(self._row_losses(self._course.start().params))[0]

    def _row_losses(self, params: Params) -> np.ndarray:
        recipe, frozen = self._course.recipe, self._course.frozen
        return losses(recipe, params, frozen, self.asked.parts, self.batch_tokens)
