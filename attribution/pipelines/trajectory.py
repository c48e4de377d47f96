"""A training run as the models on its way, with what the optimizer knew and did there.

`train lm --save-every S --keep K` leaves the checkpoints. Methods that trace a whole training
(LESS, SOURCE) look at several of them: the gradients of each, Adam's moments, and the learning
rates between one and the next.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from attribution import exact
from attribution.targets import Spec, Tree
from core import adapter as adapters
from core import checkpoint, schema
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, read_json
from core.schema import Params
from training.optim import Optim, learning_rate
from training.options import optimizer
from training.step import Recipe, State, initial


class Point(NamedTuple):
    """A checkpoint: its model, Adam's first and second moments if there are (as trained), and how
    many steps were taken, from which learning rates, since the point before."""

    step: int
    loaded: Loaded
    first: Params | None
    second: Params | None
    rates: np.ndarray


class Trajectory(NamedTuple):
    """steps: of the checkpoints, in order. at: reads the one of that number among them."""

    steps: list[int]
    optim: Optim
    at: Callable[[int], Point]

    def hashes(self) -> dict[str, Any]:
        """What a result depends on, without reading every checkpoint."""
        last = self.at(len(self.steps) - 1)
        return {"model": last.loaded.fingerprint, "checkpoints": self.steps}


def open_trajectory(path: PathLike) -> Trajectory:
    """The kept checkpoints of a finished run of `train lm`; InputError when there are none."""
    import orbax.checkpoint as ocp

    path = Path(path)
    if not (path / "DONE").exists() or not (path / "ckpt").is_dir():
        raise InputError(f"{path} is no finished run of `train lm`; give its --out folder")
    opts, total = read_json(path / "config.json")["options"], read_json(path / "DONE")["steps"]
    optim = optimizer(opts)
    loaded = checkpoint.load_model(path)
    spec = loaded.adapter.spec if loaded.adapter else None
    recipe = Recipe(loaded.config, Execution(), optim, total, spec)
    folder = (path / "ckpt").absolute()
    with ocp.CheckpointManager(folder) as manager:
        steps = sorted(manager.all_steps())
    if not steps:
        raise InputError(f"{path} keeps no checkpoint; train again with --save-every and --keep")
    rates = np.asarray(jax.vmap(learning_rate(optim, total))(np.arange(total)))

    def at(number: int) -> Point:
        state = _restore(folder, recipe, steps[number])
        before = steps[number - 1] if number else 0
        adam = optim.name == "adamw"
        first, second = (
            optax.tree.get(state.opt_state, name) if adam else None for name in ("mu", "nu")
        )
        model = _with(loaded, state.params)
        return Point(steps[number], model, first, second, rates[before : steps[number]])

    return Trajectory(steps, optim, at)


def _restore(folder: Path, recipe: Recipe, step: int) -> State:
    import orbax.checkpoint as ocp

    params = schema.abstract(recipe.rows(), recipe.config.layers)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
        jax.eval_shape(lambda params: initial(recipe, params), params),
    )
    with ocp.CheckpointManager(folder) as manager:
        state: State = manager.restore(step, args=ocp.args.StandardRestore(wanted))
    return jax.tree.map(np.asarray, state)


def _with(loaded: Loaded, trained: Params) -> Loaded:
    """The final model with other weights, or another adapter's factors."""
    if loaded.adapter is None:
        mark = checkpoint.fingerprint(loaded.config, trained)
        return loaded._replace(params=trained, fingerprint=mark)
    adapter = loaded.adapter._replace(factors=trained)
    mark = adapters.fingerprint(loaded.config, adapter)
    return loaded._replace(adapter=adapter, fingerprint=mark)


def by_sink(spec: Spec, loaded: Loaded, trained: Params) -> Tree:
    """Arrays shaped as what is trained, such as moments, as a tree [L,1,O,I(+1)]."""
    if (spec.adapter is None) != (loaded.adapter is None):
        raise InputError("the run trained an adapter, whose moments are no weights'; leave "
                         "--gradients weight out")  # fmt: skip
    collection = "params" if spec.adapter is None else "lora"
    stacked = jax.tree.map(lambda x: x[None], trained)
    return exact.directions(loaded.config, spec, {collection: stacked})
