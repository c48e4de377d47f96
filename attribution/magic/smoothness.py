"""How smooth the end of training is in the weights of its rows: metasmoothness.

Dims: N rows, Q queries; k runs over all trained numbers.

    S = sum_k d_k sign(theta_h - theta_0)_k sign(theta_2h - theta_h)_k / sum_k d_k
    theta_x = theta(1 + x v),   v ~ N(0, 1) for each row,   d = |theta_2h - theta_0|

the second definition of "Optimizing ML training with metagradient descent" (arXiv 2503.13751),
for weights instead of hyperparameters: 1 when two steps of length h along v move every parameter
the same way, 0 when the second knows nothing of the first. Differences below 0.02 are noise. A
first-order score of a row is worth no more than this allows.
"""

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from core import safetensors
from core.files import PathLike, dumps, read_json, require_space, write_json
from core.progress import Progress
from core.safetensors import Lazy
from core.schema import Params
from training.course import Course

FILE = "metasmoothness.json"
ENDS = "ends"  # where finished trainings lie until all of them are


def metasmoothness(
    course: Course,
    folder: PathLike,
    h: float = 0.1,
    seed: int = 0,
    directions: int = 1,
    base: Params | None = None,
    losses: Callable[[Params], np.ndarray] | None = None,
) -> dict[str, Any]:
    """`metasmoothness.json` of `folder`, made by 1 + 2 `directions` trainings unless it is there.

    base: the end of training with unit weights, if known. losses: parameters -> query losses [Q].
    "smoothness" is the mean over directions of S, None where it has no value: parameters that are
    not finite, or that weights do not move. Memory is a training's: the ends lie in files, read
    block by block, and a killed call goes on at the next training.
    """
    folder = Path(folder)
    file, ends = folder / FILE, folder / ENDS
    if not file.exists():
        write_json(file, _measure(course, ends, h, seed, directions, base, losses))
    shutil.rmtree(ends, ignore_errors=True)
    return read_json(file)


def _measure(
    course: Course,
    ends: Path,
    h: float,
    seed: int,
    directions: int,
    base: Params | None,
    losses: Callable[[Params], np.ndarray] | None,
) -> dict[str, Any]:
    first, weights = ends / "0.safetensors", {}
    for i in range(directions):
        v_N = np.random.default_rng([seed, i]).normal(size=len(course.rows))
        weights |= {ends / f"{i}-{k}.safetensors": 1 + k * h * v_N for k in (1, 2)}
    ends.mkdir(parents=True, exist_ok=True)
    start = course.start().params
    before = None if losses is None else losses(start)
    files = [first, *weights]
    missing = [file for file in files if not file.exists()]
    require_space(ends, len(missing) * sum(x.nbytes for x in jax.tree.leaves(start)))
    if base is not None and first in missing:
        _keep(first, base, losses)
        missing.remove(first)
    total, done = (course.steps * len(x) for x in (files, files[len(missing) :]))
    del base, start  # their memory is the trainings'
    with Progress(total, "metasmoothness", "step", done) as bar:
        for file in missing:
            params = course.train(weights.get(file), lambda *_: bar.update(1)).params
            _keep(file, params, losses)
    origin = safetensors.read(first)
    of_directions = [
        agreement(_together(origin, *map(safetensors.read, pair)))
        for pair in zip(files[1::2], files[2::2], strict=True)
    ]
    known = [s for s in of_directions if s is not None]
    found = {
        "smoothness": float(np.mean(known)) if len(known) == directions else None,
        "directions": of_directions,
        "h": h,
        "seed": seed,
        "steps": course.steps,
        "displacement": displacement(course, origin),
    }
    if before is None:
        return found
    at_Q = [np.array(json.loads(safetensors.metadata(file)["losses"]), float) for file in files]
    pairs = zip(at_Q[1::2], at_Q[2::2], strict=True)
    queries = [agreement([(at_Q[0], *pair)]) for pair in pairs]
    return found | {"query": {"before": before, "after": at_Q[0], "directions": queries}}


def agreement(points: Iterable[tuple[np.ndarray, ...]]) -> float | None:
    """S, from arrays of the numbers at 0, h and 2 h, part by part.

    None where a number is not finite or none moves.
    """
    agree = total = 0.0
    for part in points:
        if not all(np.isfinite(x).all() for x in part):
            return None
        first, middle, last = (np.asarray(x, np.float64) for x in part)
        d = np.abs(last - first)
        agree += float((d * np.sign(middle - first) * np.sign(last - middle)).sum())
        total += float(d.sum())
    return agree / total if total else None


def displacement(course: Course, params: Params) -> dict[str, float]:
    """How far what is trained is from its start: `l2`, and `relative` to the start's length."""
    moved = size = 0.0
    for part in _together(_named(course.start().params), _named(params)):
        start, end = (np.asarray(x, np.float64) for x in part)
        moved += float(((end - start) ** 2).sum())
        size += float((start**2).sum())
    return {"l2": moved**0.5, "relative": (moved / size) ** 0.5}


def _named(params: Params) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}


def _together(*trees: dict[str, Any]) -> Iterator[tuple[np.ndarray, ...]]:
    """The same blocks of the same arrays of all trees."""
    for name in trees[0]:
        walks = [safetensors.blocks(np.asarray(tree[name])) for tree in trees]
        for parts in zip(*walks, strict=True):
            yield tuple(block for _, block in parts)


def _keep(file: Path, params: Params, losses: Callable[[Params], np.ndarray] | None) -> None:
    known = {} if losses is None else {"losses": dumps(losses(params))}
    tensors = {
        name: Lazy(leaf.shape, leaf.dtype, functools.partial(np.asarray, leaf))
        for name, leaf in _named(params).items()
    }
    safetensors.write(file, tensors, known)
