"""MAGIC: what each training token did to a query, through the whole training run.

Dims: N rows, T tokens of the longest, Q queries, A micro-batches, B rows of one, R query rows.

    score_it = d phi(theta_end) / d w_it  at w = 1,    summed over the steps that token (i, t) is in

phi is the query (`attribution.magic.functional`), theta_end the end of a `training.course`. The
run is trained once, then walked from its last step to its first with the derivative of phi in the
state (`adjoint`), the states coming back one by one (`replay`). A negative score is a proponent:
more of the token, less of the query's loss (Ilyas and Engstrom, arXiv 2504.16430).

What has been found is saved every minute, so that a killed walk goes on from there, to the same
numbers: the state in the first pass, the derivative and the scores on the way back.
"""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from attribution.magic import adjoint as adjoints
from attribution.magic import functional as functionals
from attribution.magic.adjoint import Adjoint, backward_step, forward_step, moving
from attribution.magic.functional import Functional
from attribution.magic.replay import Kept, Replay, SaveMode, Scheme, States, cost, size_of
from attribution.magic.smoothness import displacement
from core.errors import InputError
from core.files import atomic, read_jsonl, read_npy, read_npz, require_space, write_jsonl, write_npy
from core.progress import Progress
from core.rows import Batch
from core.schema import Params
from training.course import Course
from training.optim import learning_rate
from training.step import Metrics, State

SAVE_SECONDS = 60.0
FOLDER = "walk"  # of a run: what a killed command goes on from

Target = Literal["token", "example", "document"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """queries: walked back together; save_*, budget (bytes in memory): see `replay`."""

    target: Target = "token"
    queries: int = 8
    save_mode: SaveMode = "sqrt"
    save_every: int = 50
    budget: int = 2**32
    batch_tokens: int = 8192


class Found(NamedTuple):
    """scores: [N,T,Q] label-aligned, or [N,Q] of examples; final: the state after training.

    before, after [Q]: the queries before and after training. displacement: of the parameters.
    """

    scores: np.ndarray
    before_Q: np.ndarray
    after_Q: np.ndarray
    displacement: dict[str, float]
    final: State


class Walk:
    """One run there and back; see `Walk.go`."""

    def __init__(self, folder: Path, course: Course, functional: Functional, settings: Settings):
        """Raises InputError when the states do not fit the disk."""
        self.folder, self.course, self.functional = folder / FOLDER, course, functional
        self.settings, self.recipe = settings, course.recipe
        start, size = course.start(), len(functional.names)
        self.groups = [
            slice(i, min(i + settings.queries, size)) for i in range(0, size, settings.queries)
        ]
        needs_gradient = not self.recipe.optim.linear
        scheme = Scheme.of(settings.save_mode, course.steps, settings.save_every)
        self.again, most = cost(scheme, needs_gradient, len(self.groups))
        each = size_of(start) + needs_gradient * size_of(start.params)
        longest = max(group.stop - group.start for group in self.groups)
        kept = max(most * each - settings.budget, 0)
        # A snapshot is written beside the one it replaces; a group's scores stay to the end.
        cells = len(course.rows) * self._row() * course.dtype.itemsize * (size + 2 * longest)
        require_space(folder, kept + 3 * size_of(start) + 2 * longest * size_of(start) + cells)
        like = Adjoint(start.params, moving(self.recipe, start)[1])
        self.where = jax.tree.map(adjoints.of_queries, like)
        self.states = States(self.folder / "states", settings.budget, start)
        self.replay = Replay(scheme, self.states, course.start, self._advance, needs_gradient)

    def go(self) -> Found:
        """Train, walk back, and say what was found; goes on where a killed walk was."""
        before_Q, _ = self.functional.of(self._query_losses(self.course.start().params))
        steps = self.course.steps
        back = {group.start: round(0.7 + 2 * (group.stop - group.start)) for group in self.groups}
        total = steps + self.again + steps * sum(back.values())
        with Progress(total, "attribute magic", "step") as self.bar:
            final = self._forward()
            after_Q, c_QR = self.functional.of(self._query_losses(final.params))
            parts = [
                self._backward(final, c_QR[group], group, back[group.start])
                for group in self.groups
            ]
        moved = displacement(self.course, final.params)
        return Found(np.concatenate(parts, -1), before_Q, after_Q, moved, final)

    def clear(self) -> None:
        """Remove what a killed walk would have gone on from, when all is published."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _query_losses(self, params: Params) -> np.ndarray:
        asked, tokens = self.functional.parts, self.settings.batch_tokens
        s_R = functionals.losses(self.recipe, params, self.course.frozen, asked, tokens)
        if not np.isfinite(s_R).all():
            raise InputError(f"{asked[0].path}: a query's loss is not finite; lower --lr, or look "
                             "at the model")  # fmt: skip
        return s_R

    def _advance(self, t: int, state: State) -> tuple[State, Params | None, Metrics]:
        course = self.course
        return forward_step(self.recipe, state, *course.arrays(t), course.frozen, course.key)

    def _forward(self) -> State:
        """The state after training, with `metrics.jsonl` beside the walk."""
        log = _Log(self.folder.parent / "metrics.jsonl", self.course)
        anchors = [t for t in self.states.saved if t <= len(log.lines)]
        begin = anchors[-1] if anchors else 0
        log.begin(begin)
        self.bar.update(begin)
        state = self.states[begin].state if begin else self.course.start()
        due, anchor = _Due(), begin

        def seen(t: int, state: State, metrics: Metrics) -> None:
            nonlocal anchor
            log.step(metrics)
            self.bar.update(1, phase="train", loss=log.shown)
            if t + 1 == self.course.steps or due.now():
                log.flush()
                self.states.save(t + 1, Kept(state, None))
                self.replay.forget(anchor, False)
                anchor = t + 1

        return self.replay.first(begin, state, seen)

    def _backward(self, final: State, c_QR: np.ndarray, group: slice, weight: int) -> np.ndarray:
        """Scores of a group of queries; `weight`: what a step costs, in steps of training."""
        file = self.folder / f"scores-{group.start}.npy"
        course, ended = self.course, group == self.groups[-1]
        steps = course.steps
        if file.exists():
            self.bar.update(weight * steps)
            return read_npy(file)
        snapshot = self.folder / "adjoint.npz"
        begin, adjoint, scores = steps, None, None
        if snapshot.exists():
            begin, adjoint, scores = self._resumed(snapshot, group)
        if adjoint is None or scores is None:
            rows, tokens = self.functional.parts, self.settings.batch_tokens
            adjoint = adjoints.last(
                final,
                functionals.gradients(
                    self.recipe, final.params, self.course.frozen, rows, c_QR, tokens
                ),
            )
            shape = (len(self.course.rows), self._row(), len(c_QR))
            scores = np.zeros(shape, self.course.dtype)
        self.bar.update(weight * (steps - begin))
        waiting: tuple[Batch, jax.Array] | None = None
        due = _Due()

        def replayed(t: int) -> None:
            self.bar.update(1, phase="replay")

        for t in reversed(range(begin)):
            state, grads = self.replay.back(t, replayed)
            adjoint = jax.device_put(adjoint, self.where)  # where a resumed one is put, too
            adjoint, scores_QABT = backward_step(
                self.recipe, state, grads, adjoint, *course.arrays(t),
                course.frozen, course.key,
            )  # fmt: skip
            if waiting is not None:  # the device is at this step already
                self._credit(scores, *waiting)
            waiting = (self.course.batch(t), scores_QABT)
            self.replay.forget(t, ended)
            self.bar.update(weight, phase="backward")
            if due.now():
                self._credit(scores, *waiting)
                waiting = None
                self._save(snapshot, group, t, adjoint, scores)
        if waiting is not None:
            self._credit(scores, *waiting)
        scores = scores[:, 0] if self.settings.target == "example" else scores
        write_npy(file, scores)
        snapshot.unlink(missing_ok=True)
        return scores

    def _row(self) -> int:
        """Numbers of a row and query."""
        return 1 if self.settings.target == "example" else int(self.course.rows.lengths.max())

    def _credit(self, scores_NTQ: np.ndarray, batch: Batch, scores_QABT: jax.Array) -> None:
        found_QBT = np.asarray(scores_QABT).reshape(len(scores_QABT), *batch.ids_BT.shape)
        found_BTQ = np.moveaxis(found_QBT, 0, -1)[batch.rows_B >= 0]
        if self.settings.target == "example":
            found_BTQ = found_BTQ.sum(1, keepdims=True, dtype=np.float64)
        rows_B = batch.rows_B[batch.rows_B >= 0]
        # A row can be twice in a batch that goes over the border between two epochs.
        np.add.at(scores_NTQ[:, : found_BTQ.shape[1]], rows_B, found_BTQ.astype(scores_NTQ.dtype))

    def _save(self, file: Path, group: slice, t: int, adjoint: Adjoint, scores: np.ndarray) -> None:
        leaves = {f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(adjoint))}
        with atomic(file) as stream:
            np.savez(stream, at=np.array([group.start, t]), scores=scores, **leaves)  # pyright: ignore[reportArgumentType]

    def _resumed(self, file: Path, group: slice) -> tuple[int, Adjoint | None, np.ndarray | None]:
        """(step before which the derivative is, it, the scores of the steps from there on)."""
        arrays = read_npz(file)
        if arrays["at"][0] != group.start:
            return self.course.steps, None, None
        structure = jax.tree.structure(self.where)
        adjoint = structure.unflatten([arrays[f"a{i}"] for i in range(structure.num_leaves)])
        return int(arrays["at"][1]), adjoint, arrays["scores"]


class _Due:
    """Whether it is time to save."""

    def __init__(self) -> None:
        self.since = time.monotonic()

    def now(self) -> bool:
        if time.monotonic() - self.since < SAVE_SECONDS:
            return False
        self.since = time.monotonic()
        return True


class _Log:
    """`metrics.jsonl` of the first pass; metrics are read when they are a step old."""

    def __init__(self, file: Path, course: Course):
        self.file = file
        self.lines: list[dict[str, Any]] = read_jsonl(file) if file.exists() else []
        self.rate = learning_rate(course.recipe.optim, course.recipe.steps)
        self.pending: list[Metrics] = []

    def begin(self, step: int) -> None:
        self.lines = self.lines[:step]

    @property
    def shown(self) -> str:
        return f"{self.lines[-1]['loss']:.4f}" if self.lines else "?"

    def step(self, metrics: Metrics) -> None:
        self.pending.append(metrics)
        if len(self.pending) > 1:
            self._read()

    def _read(self) -> None:
        loss, norm, tokens = (np.asarray(x, np.float64).item() for x in self.pending.pop(0))
        step = len(self.lines) + 1
        if not np.isfinite(loss) or not np.isfinite(norm):
            raise InputError(f"loss {loss}, gradient norm {norm} at step {step}, it diverges; "
                             "lower --lr, or look at the rows of that step")  # fmt: skip
        rate = float(np.asarray(self.rate(step - 1)))
        self.lines.append(
            {"step": step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": int(tokens)}
        )

    def flush(self) -> None:
        while self.pending:
            self._read()
        write_jsonl(self.file, self.lines)
