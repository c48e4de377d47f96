"""The training loop: batches in, metrics and checkpoints out, killed at any moment and resumed.

A run's state is (step, parameters, optimizer state); batch s is a function of (rows, seed, s), so
a run that is killed and started again goes on from its last checkpoint and ends bit-identical.
"""

import dataclasses
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import jax
import numpy as np
import optax

from core import adapter as adapters
from core import checkpoint, families, sharding
from core.adapter import Adapter
from core.config import Execution, ModelConfig
from core.errors import InputError, Preempted
from core.files import append_jsonl, read_jsonl, require_space, write_jsonl
from core.hf import peft
from core.inference import batch_losses
from core.model import Variables
from core.progress import Progress
from core.rows import Batch, Plan, Rows, TrainingBatches, read_ahead
from core.rundir import Run
from core.schema import Params, Row
from core.stop import Stop
from training.optim import Optim, learning_rate
from training.step import Metrics, Recipe, State, initial, train_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """batch: rows per optimizer step, split into `accumulate` micro-batches. *_every: steps.

    shuffle, drawn: see `core.rows.TrainingBatches`.
    """

    steps: int
    batch: int = 8
    accumulate: int = 1
    seed: int = 0
    save_every: int = 500
    eval_every: int = 250
    keep: int = 2
    model_parallel: int = 1
    shuffle: bool = True
    drawn: int | None = None

    def check(self, devices: int) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "eval_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if self.model_parallel < 1 or devices % self.model_parallel:
            raise InputError(f"--model-parallel {self.model_parallel} does not divide {devices} "
                             "devices; choose a divisor")  # fmt: skip
        if self.batch % self.accumulate:
            raise InputError(f"--batch {self.batch} does not divide into --accumulate "
                             f"{self.accumulate} micro-batches")  # fmt: skip
        if (self.batch // self.accumulate) % (devices // self.model_parallel):
            raise InputError(f"micro-batches of {self.batch // self.accumulate} rows do not divide "
                             f"over {devices // self.model_parallel} devices")  # fmt: skip


class Measure(Protocol):
    """What else is measured of a model in training, such as benchmarks.

    `begin` is told the layout of the model's arrays before the first step, to compile beside it.
    """

    def begin(self, variables: Variables, mesh: jax.sharding.Mesh) -> None: ...

    def __call__(self, variables: Variables, mesh: jax.sharding.Mesh) -> Mapping[str, float]: ...


def train(
    run: Run,
    config: ModelConfig,
    params: Params,
    rows: Rows,
    settings: Settings,
    optim: Optim,
    execution: Execution,
    tokenizer: Any = None,
    validation: Rows | None = None,
    adapter: Adapter | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Train to the end, or raise `Preempted` after SIGTERM/SIGINT; returns a summary.

    The final model is written to `run.path / "model"`, with the tokenizer. With an adapter, to be
    trained from its factors, `params` stay as they are and `run.path / "adapter"` is written.
    Every `eval_every` steps and at the end the loss on `validation` and `measure` are logged.
    """
    settings.check(jax.device_count())
    optim.check(settings.steps)
    mesh = sharding.make_mesh(model=settings.model_parallel)
    recipe = recipe_of(config, execution, optim, settings, adapter)
    state = place_state(recipe, mesh, adapter.factors if adapter else params)
    frozen = spread(families.rows(config), config.layers, mesh, params) if adapter else None
    key = run_key(recipe, settings.seed, mesh)
    saver = _Saver(run.path / "ckpt", settings.keep)
    state = saver.restore(state)
    start, total = int(state.step), settings.steps
    source = TrainingBatches(rows, settings.batch, settings.seed, settings.shuffle, settings.drawn)
    batches = read_ahead(source, start)
    log = _Log(run.path, start, learning_rate(optim, total))
    watched = validation is not None or measure is not None
    if measure is not None and start < total:
        measure.begin(recipe.variables(state.params, frozen), mesh)
    try:
        with log, Stop() as stop, Progress(total, f"train {run.path.name}", "step", start) as bar:
            for step in range(start + 1, total + 1):
                arrays = place_batch(next(batches), settings, mesh)
                state, metrics = train_step(recipe, state, *arrays, frozen, key)
                log.step(step, metrics)
                last, stopping = step == total, stop.asked
                if watched and (last or step % settings.eval_every == 0):
                    variables, found = recipe.variables(state.params, frozen), {}
                    if validation is not None:
                        found["val_loss"] = mean_loss(config, execution, variables, validation)
                    if measure is not None:
                        found |= measure(variables, mesh)
                    log.measured(step, found)
                if last or stopping or step % settings.save_every == 0:
                    log.flush()
                    saver.save(step, state)
                bar.update(1, **log.shown())
                if stopping and not last:
                    run.finish("PREEMPTED", step=step)
                    raise Preempted(f"stopped after step {step} of {total}; run it again to go on")
    except FloatingPointError as error:
        run.finish("FAILED", error=str(error))
        raise InputError(f"{error}; begin anew (--resume never) with a lower --lr, or look at the "
                         "rows of that step") from None  # fmt: skip
    finally:
        saver.manager.close()
    if adapter is None:
        fingerprint = checkpoint.save_model(run.path / "model", config, state.params, tokenizer)
        return {"steps": total, "loss": log.loss, "model": fingerprint}
    trained = adapter._replace(factors=jax.device_get(state.params))
    peft.write(run.path / "adapter", config, trained, tokenizer)
    return {
        "steps": total,
        "loss": log.loss,
        "model": adapters.fingerprint(config, trained),
        "adapter_parameters": adapters.size(adapter.spec, config),
    }


def recipe_of(
    config: ModelConfig,
    execution: Execution,
    optim: Optim,
    settings: Settings,
    adapter: Adapter | None,
) -> Recipe:
    # A constant rate does not depend on the number of steps; runs of any length share one program.
    horizon = 0 if optim.schedule == "constant" else settings.steps
    return Recipe(config, execution, optim, horizon, adapter.spec if adapter else None)


def run_key(recipe: Recipe, seed: int, mesh: jax.sharding.Mesh) -> jax.Array | None:
    """The key of a run's dropout; None where there is none."""
    if recipe.lora is None or not recipe.lora.dropout:
        return None
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"dropout"))
    return jax.device_put(key, sharding.replicated(mesh))


def spread(rows: list[Row], layers: int, mesh: jax.sharding.Mesh, params: Params) -> Params:
    """Parameters described by `rows`, on the mesh."""
    where = sharding.parameter_shardings(rows, layers, mesh)
    return jax.tree.map(lambda x, s: sharding.place(np.asarray(x), s), params, where)


def place_state(recipe: Recipe, mesh: jax.sharding.Mesh, params: Params) -> State:
    """The state before the first step, on the mesh; moments lie where their parameters lie."""
    rows, layers = recipe.rows(), recipe.config.layers
    where = sharding.parameter_shardings(rows, layers, mesh)
    state = initial(recipe, spread(rows, layers, mesh, params))
    found = jax.tree_util.tree_flatten_with_path(where)[0]
    places = {tuple(key.key for key in path): near for path, near in found}

    def place(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        """A moment's path ends as its parameter's does; what has none is everywhere."""
        names = tuple(getattr(key, "key", None) for key in path)
        ends = (names[i:] for i in range(len(names)))
        near = next((places[end] for end in ends if end in places), sharding.replicated(mesh))
        return jax.device_put(leaf, near)

    moments = jax.tree_util.tree_map_with_path(place, state.opt_state)
    return State(jax.device_put(state.step, sharding.replicated(mesh)), state.params, moments)


def place_batch(
    batch: Batch, settings: Settings, mesh: jax.sharding.Mesh, weights: np.ndarray | None = None
) -> tuple[jax.Array, ...]:
    """ids, labels and weights as [A, B/A, T] on the mesh.

    weights: of all rows [N], or of their tokens [N,T], label-aligned; None: 1.
    """
    shape_BT = batch.ids_BT.shape
    of_rows = np.ones(len(batch.rows_B), np.float32) if weights is None else weights[batch.rows_B]
    of_rows = of_rows[:, None] if of_rows.ndim == 1 else of_rows[:, : shape_BT[1]]
    where = sharding.over_rows(mesh, axis=1)
    shape = (settings.accumulate, settings.batch // settings.accumulate, shape_BT[1])
    arrays = (batch.ids_BT, batch.labels_BT, np.broadcast_to(of_rows, shape_BT))
    return tuple(sharding.place(x.reshape(shape), where) for x in arrays)


def mean_loss(config: ModelConfig, execution: Execution, variables: Variables, rows: Rows) -> float:
    """Mean loss per supervised token of all rows, in nats."""
    losses = batch_losses(config, execution, variables, Plan(rows, 8192, jax.device_count()))
    return sum(float(nll_BT.sum()) for _, nll_BT in losses) / int(rows.trained.sum())


class _Log:
    """metrics.jsonl and TensorBoard; one line a step, none twice after a resume.

    Metrics stay on the device until they are a step old, so the device never waits for the host.
    """

    def __init__(self, folder: Path, start: int, rate: optax.Schedule):
        from tensorboardX import SummaryWriter

        self.file, self.schedule = folder / "metrics.jsonl", rate
        self.kept = [m for m in read_jsonl(self.file) if m["step"] <= start] if start else []
        write_jsonl(self.file, self.kept)
        self.board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self.pending: list[tuple[int, Metrics]] = []
        self.lines: list[dict[str, Any]] = []
        steps = [m for m in self.kept if "loss" in m]
        self.loss, self.trained = (steps[-1]["loss"], steps[-1]["tokens"]) if steps else (np.nan, 0)
        self.rate = 0.0
        self.tokens, self.since = 0, 0.0

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.board.close()

    def step(self, step: int, metrics: Metrics) -> None:
        self.pending.append((step, metrics))
        if len(self.pending) > 1:
            self._read(*self.pending.pop(0))

    def _read(self, step: int, metrics: Metrics) -> None:
        loss, norm, tokens = (np.asarray(x, np.float64).item() for x in metrics)
        if not np.isfinite(loss) or not np.isfinite(norm):
            append_jsonl(self.file, self.lines)
            raise FloatingPointError(f"loss {loss}, gradient norm {norm} at step {step}")
        self.loss = loss
        self.trained += int(tokens)
        if self.since:  # the first step's time is compilation
            self.tokens += int(tokens)
            self.rate = self.tokens / (time.monotonic() - self.since)
        else:
            self.since = time.monotonic()
        self._add(step, loss=loss, lr=float(np.asarray(self.schedule(step - 1))), grad_norm=norm,
                  tokens=self.trained, tokens_per_second=round(self.rate))  # fmt: skip

    def shown(self) -> dict[str, str]:
        """What the progress line says besides its count."""
        shown = {"loss": f"{self.loss:.4f}", "tok/s": f"{self.rate:,.0f}"}
        return shown if self.rate else {}

    def measured(self, step: int, values: Mapping[str, float]) -> None:
        self._drain()
        self._add(step, **values)

    def _add(self, step: int, **values: Any) -> None:
        """A name with a folder of its own, as in eval/hellaswag/acc, keeps it on the board."""
        self.lines.append({"step": step, **values})
        for name, value in values.items():
            self.board.add_scalar(name if "/" in name else f"train/{name}", value, step)

    def _drain(self) -> None:
        while self.pending:
            self._read(*self.pending.pop(0))

    def flush(self) -> None:
        self._drain()
        append_jsonl(self.file, self.lines)
        self.lines = []


class _Saver:
    """Training checkpoints `ckpt/{step}`; a save is complete or does not exist."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp

        self.ocp = ocp
        policy = ocp.checkpoint_managers.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, enable_async_checkpointing=False
        )
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def restore(self, state: State) -> State:
        """The newest complete checkpoint, laid out like `state`; or `state` if there is none."""
        step = self.manager.latest_step()
        if step is None:
            return state
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        return cast(State, self.manager.restore(step, args=self.ocp.args.StandardRestore(target)))

    def save(self, step: int, state: State) -> None:
        require_space(self.manager.directory, sum(x.nbytes for x in jax.tree.leaves(state)))
        self.manager.save(step, args=self.ocp.args.StandardSave(state))
