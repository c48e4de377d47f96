"""Training SAEs: one pass of the language model feeds several, killed at any moment and resumed.

The state of a run is (step, the state of every SAE, the scale of every activation), which a
checkpoint holds in one file; batch s is a function of the rows and s (`sae.activations.Shuffle`).
So a run that is killed and started again goes on from its last checkpoint and ends bit-identical.

Activations are trained on times sqrt(D) / mean |x|, so that one learning rate and one sparsity suit
all sites, as in SAELens; the SAE that is written reads them as they are.

Dims: N tokens of a batch, D width in, O width out.
"""

import dataclasses
import functools
import os
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from core import safetensors
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError, Preempted
from core.files import require_space
from core.progress import Progress
from core.rows import Rows
from core.rundir import Run
from core.safetensors import Lazy
from core.sharding import make_mesh, over_rows, place
from core.stop import Stop
from core.taps import Tap, parse
from sae import coder as coders
from sae import formats
from sae.activations import Reader, Shuffle
from sae.coder import About, Sae
from sae.formats.names import hugging_face
from sae.formats.saelens import KNOWN
from sae.training.log import Log, Sums
from sae.training.step import Recipe, State, finished, initial, shardings, train_step

LOGS, STATE = "logs", "state.safetensors"
COPIES = 4  # of its parameters that an SAE needs in training: they, two moments, the gradient


class Job(NamedTuple):
    """An SAE to train, written to the folder `name`; a transcoder where the taps differ.

    recipe: of the taps' widths, and of as many steps as `Settings.steps` says.
    """

    name: str
    tap_in: Tap
    tap_out: Tap
    recipe: Recipe


@dataclasses.dataclass(frozen=True)
class Settings:
    """tokens: to train on, epochs end to end; None = every token once. batch: tokens of a step.

    buffer, batch_tokens, cache: see `sae.activations`. *_every: steps.
    """

    tokens: int | None = None
    batch: int = 4096
    seed: int = 0
    normalize: bool = True
    buffer: int = 2**18
    batch_tokens: int = 8192
    cache: Path | None = None
    log_every: int = 50
    save_every: int = 1000
    model_parallel: int = 1

    def check(self, devices: int) -> None:
        for name in ("batch", "buffer", "batch_tokens", "log_every", "save_every"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1")
        if self.model_parallel < 1 or devices % self.model_parallel:
            raise InputError(f"--model-parallel {self.model_parallel} does not divide {devices} "
                             "devices; choose a divisor")  # fmt: skip
        if self.batch % (devices // self.model_parallel):
            raise InputError(f"--batch {self.batch} does not divide over "
                             f"{devices // self.model_parallel} devices")  # fmt: skip

    def steps(self, counted: int) -> int:
        """Of a run over rows with so many counted tokens (`sae.activations.row_counts`)."""
        tokens = self.tokens or counted
        if tokens < self.batch:
            raise InputError(f"{tokens} tokens fill no step of {self.batch}; lower --batch, or "
                             "give more --tokens")  # fmt: skip
        return tokens // self.batch


class Point(NamedTuple):
    """Where a run stands, which is what a checkpoint holds.

    scales: what each tap's activations are multiplied by. sums: of each log's open window.
    skipped: tokens so far whose activations are not finite.
    """

    step: int
    states: list[State]
    scales: dict[Tap, np.float32]
    sums: list[Sums]
    skipped: int


def train(
    run: Run,
    loaded: Loaded,
    rows: Rows,
    jobs: list[Job],
    settings: Settings,
    execution: Execution,
    model: str,
) -> dict[str, Any]:
    """Train to the end, or raise `Preempted` after SIGTERM/SIGINT; returns a summary.

    Every SAE is written to the folder of its name in `run.path`, in SAELens's format, its metrics
    to the folder of its name in `run.path / "logs"`. model: its name, for those files.
    Raises InputError for what does not fit, and when a loss is not finite.
    """
    settings.check(jax.device_count())
    _check(jobs)
    wanted = tuple(sorted({tap for job in jobs for tap in (job.tap_in, job.tap_out)}))
    reader = Reader(loaded, execution, rows, wanted)
    _require_memory(reader, jobs, settings)
    total = settings.steps(int(reader.counts.sum()))
    assert all(job.recipe.steps == total for job in jobs)
    mesh = make_mesh(model=settings.model_parallel)
    homes = [shardings(job.recipe, mesh) for job in jobs]
    source = Shuffle(reader, settings.batch_tokens, settings.buffer, settings.seed, settings.cache)
    file = run.path / STATE
    point = _restored(file, jobs, homes)
    batches = source.batches(settings.batch, point.step if point else 0)
    if point is None:
        first = next(batches)
        batches = chain([first], batches)
        point = _beginning(jobs, homes, dict(zip(wanted, first, strict=True)), settings)
    else:
        source.skipped = point.skipped
    start, states, scales, sums, _ = point
    logs = [
        Log(run.path / LOGS / job.name, start, settings.batch, held)
        for job, held in zip(jobs, sums, strict=True)
    ]

    def save(step: int) -> None:
        for log in logs:
            log.flush()
        _save(file, jobs, Point(step, states, scales, [log.sums for log in logs], source.skipped))

    where = over_rows(mesh)
    try:
        with Stop() as stop, Progress(total, f"sae train {run.path.name}", "step", start) as bar:
            for step in range(start + 1, total + 1):
                x = {
                    tap: _scaled(place(x_ND, where), scales[tap])
                    for tap, x_ND in zip(wanted, next(batches), strict=True)
                }
                for j, job in enumerate(jobs):
                    target_NO = x[job.tap_out] if job.recipe.transcoder else None
                    states[j], metrics = train_step(job.recipe, states[j], x[job.tap_in], target_NO)
                    logs[j].step(step, metrics)
                last, stopping = step == total, stop.asked
                if last or step % settings.log_every == 0:
                    for job, log in zip(jobs, logs, strict=True):
                        log.line(step, float(job.recipe.rate(jnp.int32(step - 1))))
                if last or stopping or step % settings.save_every == 0:
                    save(step)
                bar.update(1, **_shown(logs))
                if stopping and not last:
                    run.finish("PREEMPTED", step=step)
                    raise Preempted(f"stopped after step {step} of {total}; run it again to go on")
    except FloatingPointError as error:
        run.finish("FAILED", error=str(error))
        raise InputError(f"{error}; begin anew (--resume never) with a lower --lr or a longer "
                         "--warmup") from None  # fmt: skip
    finally:
        for log in logs:
            log.close()
    found = {}
    for job, state, log in zip(jobs, states, logs, strict=True):
        sae = _finished(run.path / job.name, job, state, scales, reader, model)
        formats.save(run.path / job.name, sae)
        found[job.name] = {"fingerprint": sae.fingerprint, **log.last}
    return {
        "steps": total,
        "tokens": total * settings.batch,
        "skipped": source.skipped,
        "explained_variance": min(one["explained_variance"] for one in found.values()),
        "saes": found,
    }


@jax.jit
def _scaled(x_ND: jax.Array, scale: jax.Array) -> jax.Array:
    return x_ND.astype(jnp.float32) * scale


def _check(jobs: list[Job]) -> None:
    if jax.process_count() > 1:
        raise InputError("SAEs are trained by one process on all its devices; start it once")
    names = [job.name for job in jobs]
    for name, job in zip(names, jobs, strict=True):
        if Path(name).name != name or name in (LOGS, STATE):
            raise InputError(f"{name!r} cannot be the name of an SAE's folder; choose another")
        if names.count(name) > 1:
            raise InputError(f"{name} is asked for twice; give every --site, --width and --k once")
        job.recipe.check()
        coder = job.recipe.coder
        if (coder.architecture, coder.transcoder, False) not in KNOWN.values():
            raise InputError(f"{name}: the SAELens format has no {coder.architecture} transcoder; "
                             "train batchtopk or jumprelu")  # fmt: skip


def _require_memory(reader: Reader, jobs: list[Job], settings: Settings) -> None:
    """Raise InputError for what no care could fit into this machine."""
    tokens = min(settings.buffer, int(reader.rows.lengths.sum())) + settings.batch
    chunk = tokens * sum(reader.widths) * reader.execution.compute_dtype.itemsize
    sizes = (job.recipe.d_sae * (job.recipe.d_in + job.recipe.d_out) for job in jobs)
    states = COPIES * 4 * sum(sizes)
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if chunk + states > machine:
        remedy = "lower --buffer" if chunk > states else "train fewer or narrower ones at once"
        raise InputError(f"the SAEs need {states / 1e9:.3g} GB and a chunk of activations "
                         f"{chunk / 1e9:.3g} GB, the machine has {machine / 1e9:.3g}; {remedy}"
                         )  # fmt: skip


def _beginning(
    jobs: list[Job], homes: list[State], first: dict[Tap, np.ndarray], settings: Settings
) -> Point:
    """Before the first step; its batch is the sample that states and scales are made from."""
    scales = {
        tap: _scale(tap, x_ND) if settings.normalize else np.float32(1)
        for tap, x_ND in first.items()
    }
    sample = {tap: _scaled(jnp.asarray(x_ND), scales[tap]) for tap, x_ND in first.items()}
    states = []
    for job, home in zip(jobs, homes, strict=True):
        target_NO = sample[job.tap_out] if job.recipe.transcoder else None
        state = initial(job.recipe, sample[job.tap_in], settings.seed, target_NO)
        states.append(jax.device_put(state, home))
    return Point(0, states, scales, [{} for _ in jobs], 0)


def _scale(tap: Tap, x_ND: np.ndarray) -> np.float32:
    """What makes the mean norm sqrt(D)."""
    norm = np.linalg.norm(x_ND.astype(np.float64), axis=1).mean()
    if not norm:
        raise InputError(f"the activations at {tap} are all zero; choose another site")
    return np.float32(np.sqrt(x_ND.shape[1]) / norm)


def _save(file: Path, jobs: list[Job], point: Point) -> None:
    held: dict[str, Any] = {f"scale/{tap}": scale for tap, scale in point.scales.items()}
    for job, state, sums in zip(jobs, point.states, point.sums, strict=True):
        held |= {f"{job.name}/sums/{name}": value for name, value in sums.items()}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            held[f"{job.name}/state{jax.tree_util.keystr(path)}"] = leaf
    require_space(file.parent, sum(x.nbytes for x in held.values()))
    lazy = {
        name: Lazy(x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in held.items()
    }
    safetensors.write(file, lazy, {"step": str(point.step), "skipped": str(point.skipped)})


def _restored(file: Path, jobs: list[Job], homes: list[State]) -> Point | None:
    """The checkpoint, its states laid out as their homes say; None if there is none."""
    if not file.exists():
        return None
    held, about = safetensors.read(file), safetensors.metadata(file)

    def state(job: Job, home: State) -> State:
        def leaf(path: tuple[Any, ...], where: NamedSharding) -> jax.Array:
            # A copy, because the step takes its buffers.
            return place(np.array(held[f"{job.name}/state{jax.tree_util.keystr(path)}"]), where)

        return jax.tree_util.tree_map_with_path(leaf, home)

    def under(prefix: str) -> dict[str, np.ndarray]:
        return {n.removeprefix(prefix): x for n, x in held.items() if n.startswith(prefix)}

    scales = {parse(name): np.float32(x) for name, x in under("scale/").items()}
    sums = [{n: np.array(x) for n, x in under(f"{job.name}/sums/").items()} for job in jobs]
    return Point(
        int(about["step"]), [*map(state, jobs, homes)], scales, sums, int(about["skipped"])
    )


def _finished(
    folder: Path, job: Job, state: State, scales: dict[Tap, np.float32], reader: Reader, model: str
) -> Sae:
    coder, params = finished(
        job.recipe, state, float(scales[job.tap_in]), float(scales[job.tap_out])
    )
    rows, family = reader.rows, reader.config.family
    extra: dict[str, Any] = {
        "hf_hook_name": hugging_face(str(job.tap_in), family),
        "hf_hook_name_out": hugging_face(str(job.tap_out), family) if coder.transcoder else None,
        "model_fingerprint": reader.model,
        "context_size": int(rows.lengths.max()),
        "prepend_bos": bool((reader.counts < rows.lengths).all()),
        "training_architecture": job.recipe.objective.kind,
    }
    extra = {name: value for name, value in extra.items() if value is not None}
    about = About(str(job.tap_in), str(job.tap_out), model, str(folder), "saelens", extra)
    return Sae(coder, params, about, coders.fingerprint(coder, params))


def _shown(logs: list[Log]) -> dict[str, str]:
    """What the progress line says besides its count: of the SAE that explains least."""
    lines = [log.last for log in logs if log.last]
    if not lines:
        return {}
    worst = min(lines, key=lambda line: line["explained_variance"])
    shown = {"ev": f"{worst['explained_variance']:.4f}", "l0": f"{worst['l0']:.4g}"}
    speed = worst.get("tokens_per_second")
    return shown | ({"tok/s": f"{speed:,}"} if speed else {})
