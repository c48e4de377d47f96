"""What walking a training step backwards costs, against the step.

Dims: Q queries.

`backward_Q` is `adjoint.backward_step`: the optimizer's derivative, then one of the gradient. Of
matmul FLOPs a step has 3 parts (forward, and both factors' derivatives), the derivative 2 without
and 6 with each query's direction: (2 + 6 Q) / 3 Q of a step for each query, 2.67 for one and 2.08
for eight, is the floor. `reverse_1` is the plain way, one reverse derivative of the whole step as
written with `core.loss.token_losses`.

Memory is what a program holds beside its arguments (XLA's own analysis): temporary arrays, and
outputs that take no donated argument's place.
"""

import dataclasses
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from attribution.magic import adjoint as adjoints
from attribution.magic.adjoint import Adjoint
from core import families, model, schema
from core.config import Execution
from core.errors import InputError
from core.presets import PRESETS
from core.timing import alternate
from training import step as steps
from training.optim import Optim
from training.step import Recipe, State


class Shapes(NamedTuple):
    """What the programs are compiled for."""

    state: State
    grads: Any
    batch: tuple[Any, Any, Any]


def bench(
    preset: str,
    batch: int,
    length: int,
    queries: int,
    optim: Optim,
    repeats: int,
    reverse: bool,
    execution: Execution,
) -> dict[str, Any]:
    """Bytes held and, unless `repeats` is 0, median seconds, as ratios to a training step's.

    Nothing is allocated when there is nothing to be timed. reverse: also the plain way.
    """
    config = PRESETS[preset]
    if not 2 <= length <= config.context or min(batch, queries) < 1:
        raise InputError(f"--length must be 2 to {config.context}; --batch and --queries positive")
    recipe = Recipe(config, execution, optim, 0)
    shapes = _shapes(recipe, batch, length)
    counts = sorted({1, queries})
    names = [
        "train",
        *(f"backward_{q}" for q in counts),
        *(["reverse_1"] if reverse else []),
    ]
    programs, compiling = {}, {}
    for name in names:
        began = time.perf_counter()
        programs[name] = _compiled(name, recipe, shapes)
        compiling[name] = time.perf_counter() - began
    held = {name: _held(parts) for name, parts in programs.items()}
    result = {
        "preset": preset,
        "batch": batch,
        "length": length,
        "optim": dataclasses.asdict(optim),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(config.layers)},
        "compile_seconds": compiling,
        "held_bytes": held,
        "memory_ratios": {name: value / held["train"] for name, value in held.items()},
    }
    if repeats:
        seconds, cpu = alternate(_runs(programs, recipe, shapes), repeats)
        ratios = {name: value / seconds["train"] for name, value in seconds.items()}
        result |= {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "ratios": ratios,
            "per_query": {name: ratios[name] / _queries(name) for name in names[1:]},
        }
    return result


def _queries(name: str) -> int:
    return int(name.split("_")[1])


def _shapes(recipe: Recipe, batch: int, length: int) -> Shapes:
    params = schema.abstract(recipe.rows(), recipe.config.layers)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    state = jax.eval_shape(lambda params: steps.initial(recipe, params), params)
    ids_ABT = jax.ShapeDtypeStruct((1, batch, length), jnp.int32)
    weights_ABT = jax.ShapeDtypeStruct((1, batch, length), jnp.float32)
    grads = None if recipe.optim.linear else params
    return Shapes(state, grads, (ids_ABT, ids_ABT, weights_ABT))


def _adjoint(state: State, queries: int) -> Adjoint:
    """A random one, as its cost does not depend on it."""
    key = jax.random.key(3)
    grads = jax.tree.map(lambda x: jax.random.normal(key, (queries, *x.shape)), state.params)
    return adjoints.last(state, grads)


def _compiled(name: str, recipe: Recipe, shapes: Shapes) -> list[Any]:
    """The executables that follow one another in the program of that name."""
    state, grads, batch = shapes
    if name == "train":
        return [steps.train_step.lower(recipe, state, *batch).compile()]
    of_state = Adjoint(state.params, adjoints.moving(recipe, state)[1])
    adjoint = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((_queries(name), *x.shape), x.dtype), of_state
    )
    if name.startswith("reverse"):
        plain = jax.jit(reverse_step, static_argnums=0, donate_argnums=2)
        return [plain.lower(recipe, state, adjoint, *batch).compile()]
    first = adjoints.through_update.lower(recipe, state, grads, adjoint)
    second = adjoints.through_gradient.lower(recipe, state, adjoint, adjoint.params, *batch)
    return [first.compile(), second.compile()]


def _held(parts: list[Any]) -> int:
    """Most bytes beside the arguments; what one program leaves, the next holds too."""
    most, left = 0, 0
    for part in parts:
        memory = part.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        most = max(most, left + new + memory.temp_size_in_bytes)
        left += new
    return most


def _runs(programs: dict[str, list[Any]], recipe: Recipe, shapes: Shapes) -> dict[str, Any]:
    """Each program, on what it left the last time: donated memory cannot be given twice."""
    config = recipe.config
    shape = shapes.batch[0].shape
    ids_ABT = jax.random.randint(jax.random.key(1), shape, 0, config.vocab_size)
    batch = (ids_ABT, ids_ABT, jnp.ones(shape, jnp.float32))
    state = steps.initial(recipe, schema.init(families.rows(config), config.layers, seed=0))
    grads = None if shapes.grads is None else jax.tree.map(jnp.copy, state.params)
    held: dict[str, Any] = {"train": jax.tree.map(jnp.copy, state)}
    held |= {name: _adjoint(state, _queries(name)) for name in programs if name != "train"}

    def run(name: str) -> Any:
        parts = programs[name]
        if name == "train":
            held[name], out = parts[0](held[name], *batch)
        elif len(parts) == 1:
            held[name], out = parts[0](state, held[name], *batch)
        else:
            adjoint, u = parts[0](state, grads, held[name])
            held[name], out = parts[1](state, adjoint, u, *batch)
        return held[name], out

    return {name: lambda name=name: run(name) for name in programs}


@model.full_precision
def reverse_step(
    recipe: Recipe,
    state: State,
    adjoint: Adjoint,
    ids_ABT: jax.Array,
    labels_ABT: jax.Array,
    weights_ABT: jax.Array,
) -> tuple[Adjoint, jax.Array]:
    """What `adjoint.backward_step` returns, of a single micro-batch."""
    move, moments = adjoints.moving(recipe, state)

    def after(params: Any, moments: list[jax.Array], weights_BT: jax.Array) -> Adjoint:
        def loss(params: Any) -> jax.Array:
            nll_BT = model.token_losses(
                recipe.config,
                recipe.execution,
                {"params": params},
                ids_ABT[0],
                labels_ABT[0],
            )
            return (weights_BT * nll_BT).sum() / steps.supervised(labels_ABT)

        return move(params, moments, jax.grad(loss)(params))

    _, pull = jax.vjp(after, state.params, moments, weights_ABT[0])
    *along, scores_QBT = adjoints.over_queries(pull, adjoint)
    return Adjoint(*along), scores_QBT[:, None]


def table(result: dict[str, Any]) -> str:
    """The result for people: one line a program."""
    lines = [
        f"{result['preset']}: batch {result['batch']} x {result['length']} tokens, "
        f"{result['optim']['name']}, {result['device']}, jax {result['jax']}",
        f"{'program':12} {'held MiB':>9} {'ratio':>6} {'compile s':>9}",
    ]
    timed = "seconds" in result
    lines[1] += f" {'seconds':>9} {'ratio':>6} {'per query':>9}" if timed else ""
    for name, held in result["held_bytes"].items():
        lines.append(f"{name:12} {held / 2**20:9.1f} {result['memory_ratios'][name]:6.2f} "
                     f"{result['compile_seconds'][name]:9.1f}")  # fmt: skip
        if timed:
            lines[-1] += f" {result['seconds'][name]:9.4f} {result['ratios'][name]:6.2f}"
        if name in result.get("per_query", {}):
            lines[-1] += f" {result['per_query'][name]:9.2f}"
    return "\n".join(lines)
