"""The arrays of a score run: filled batch by batch, resumable, one folder for people and tools.

Dims: N pool rows, K rows that are scored, Q queries, B rows of a batch, T tokens of the longest.

`scores.npy` is [N] or [N,Q], with `token_scores.npy` [N,T] or [N,T,Q] beside it where asked for,
`norms.npy`, `losses.npy`, `info.json`, and what `attribution.diagnostics` makes of them. Where
only some rows, the candidates, are scored, the others hold NaN.
"""

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from attribution.diagnostics import diagnose, ranking
from attribution.select import POSITIVE, read_proponents
from attribution.store import Features, Pass, Store, check_finite, rows_before
from attribution.targets import coverage
from core import distributed
from core.errors import InputError
from core.files import PathLike, atomic, read_json, write_json
from core.inference import overlapped
from core.memmap import FilledArray
from core.progress import Progress
from core.rows import Rows, read_ahead
from core.rundir import Run

PARTS = "parts"  # the folder of arrays that are put together at the end
SIZE = 1024  # stored rows of a batch
Arrays = dict[str, np.ndarray]


class Picked:
    """Some rows of a store as a source of features, numbered by their place among them."""

    def __init__(self, store: Store, chosen_K: np.ndarray):
        self.store, self.chosen_K = store, chosen_K
        self.share = distributed.share(len(chosen_K))
        starts = range(self.share.start, self.share.stop, SIZE)
        self.plan = [np.arange(start, min(start + SIZE, self.share.stop)) for start in starts]

    def compute(self, places_B: np.ndarray) -> Features:
        parts = [self.store.compute(self.chosen_K[i : i + 1]) for i in places_B]
        features_BD = np.concatenate([np.asarray(part.features_BD) for part in parts])
        return Features(places_B, features_BD, np.concatenate([part.losses_B for part in parts]))


Source = Pass | Store | Picked


@dataclasses.dataclass(frozen=True)
class Scored:
    """The rows of the pool, and which of them [K] are scored; None: all."""

    rows: Rows
    chosen_K: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows if self.chosen_K is None else self.chosen_K)

    @property
    def sha(self) -> str | None:
        """A hash of the choice, for a resume to be of the same."""
        chosen = self.chosen_K
        return (
            None if chosen is None else hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest()
        )

    def source(self, pool: Pass | Store) -> Source:
        """The pool's gradients of these rows only."""
        if self.chosen_K is None:
            return pool
        if isinstance(pool, Store):
            return Picked(pool, self.chosen_K)
        return pool.of(self.rows.take(self.chosen_K))

    def number(self, rows_B: np.ndarray) -> np.ndarray:
        """Row numbers of the pool; -1 stays."""
        if self.chosen_K is None:
            return rows_B
        return np.where(rows_B < 0, -1, self.chosen_K[np.maximum(rows_B, 0)])


def fill(
    folder: Path,
    source: Source,
    scored: Scored,
    columns: dict[str, tuple[int, ...]],
    compute: Callable[[Any], tuple[np.ndarray, Arrays]],
) -> Arrays:
    """Run over a source into `NAME.npy` of each column; continues where a killed run stopped.

    columns: the shape of a row in each. compute: batch -> (row numbers [B] of the source, values),
    tokens past the end of a batch's longest row are 0.
    """
    arrays = {
        name: FilledArray(folder / f"{name}.npy", (len(scored), *shape))
        for name, shape in columns.items()
    }
    start = min(array.next_batch for array in arrays.values())
    for array in arrays.values():
        array.next_batch = start
    done = rows_before(cast(Any, source), start)
    with Progress(len(source.share), "attribute score", "row", done) as bar:
        for _, (rows_B, values) in overlapped(read_ahead(source.plan, start), compute):
            for name, array in arrays.items():
                value = values[name]
                check_finite(
                    scored.rows, scored.number(rows_B), value.reshape(len(value), -1).sum(1)
                )
                short = [(0, 0)] * value.ndim
                if name == "token_scores":
                    short[1] = (0, columns[name][0] - value.shape[1])
                array.write(rows_B, np.pad(value, short))
            bar.update(int((rows_B >= 0).sum()))
    return {name: array.finish() for name, array in arrays.items()}


def about(scored: Scored, pool: Pass | Store, query: Pass, control: Pass | None) -> dict[str, Any]:
    """What `info.json` says of a run's inputs."""

    def of(source: Pass) -> dict[str, Any]:
        return {"path": str(source.rows.path), **source.hashes}

    config, spec, tokenizer = query.loaded.config, query.spec, query.loaded.tokenizer
    return {
        "spec": spec.to_json(),
        "coverage": coverage(config, spec),
        "queries": len(query.rows),
        "tokenizer": tokenizer and str(tokenizer),
        "pool": {"path": str(scored.rows.path), **pool.hashes},
        "query": of(query),
        **({"control": of(control)} if control else {}),
    }


def together(scores_NQ: np.ndarray, mode: str) -> np.ndarray:
    """[N] for `mean` and `max` over the queries, [N,Q] for `each`; float32."""
    over = {"mean": scores_NQ.mean, "max": scores_NQ.max}
    return np.asarray(over[mode](1) if mode in over else scores_NQ, np.float32)


def aligned(side: Literal["gradient", "loss"] | None) -> dict[str, Any]:
    """What `info.json` says of token scores: entry t is of reading token t, or of predicting it."""
    alignment = {"gradient": "position", "loss": "label"}
    return {"tokens": {"side": side, "alignment": alignment[side]}} if side else {}


def publish(
    run: Run, scored: Scored, parts: list[Arrays], mode: str, info: dict[str, Any]
) -> dict[str, Any]:
    """Join `parts`, of slices of the queries, and write what people and tools read, once.

    Returns `summary.json` in every process.
    """
    summary, aside = run.path / "summary.json", run.path / PARTS
    marks = distributed.parts(aside / "ended")
    if not distributed.first():
        if aside.exists():
            distributed.part(aside / "ended").touch()  # it reads there no more
        distributed.wait(summary.exists)
        return read_json(summary)
    arrays = dict(parts[0])
    for name in ("scores", "token_scores"):
        if len(parts) > 1 and name in arrays:
            slices = [part[name] for part in parts]
            best = mode == "max"
            arrays[name] = np.maximum.reduce(slices) if best else np.concatenate(slices, -1)
    if scored.chosen_K is not None:
        arrays = {name: _spread(scored, values) for name, values in arrays.items()}
        info |= {"candidates": len(scored.chosen_K)}
    for name, values in arrays.items():
        if not (file := run.path / f"{name}.npy").exists():  # it was not filled in place
            with atomic(file) as stream:
                np.save(stream, values, allow_pickle=False)  # pyright: ignore[reportArgumentType]
    known = {"format": "taproot-scores", "sign": f"{POSITIVE} (gradient inner product)"}
    write_json(run.path / "info.json", known | info)
    found = diagnose(run.path, scored.rows, arrays["scores"], arrays.get("norms"), arrays["losses"])
    if aside.exists():
        distributed.wait(lambda: all(mark.exists() for mark in marks[1:]))
        shutil.rmtree(aside)
    return found


def folder_of(run: Run, scored: Scored, slices: int) -> Path:
    """Where the arrays are filled: in place, or aside when they are not yet what is asked for."""
    whole = slices == 1 and scored.chosen_K is None
    return run.path if whole else run.path / PARTS


def _spread(scored: Scored, values: np.ndarray) -> np.ndarray:
    out = np.full((len(scored.rows), *values.shape[1:]), np.nan, np.float32)
    out[scored.chosen_K] = values
    return out


def candidates(path: PathLike, top: int | None, rows: Rows) -> np.ndarray:
    """Row numbers in increasing order: the `top` best of a folder of scores, or a file's lines."""
    path, n = Path(path), len(rows)
    if path.is_dir() == (top is None):
        raise InputError("--candidates-top says how many of the best rows of a folder of scores; "
                         f"give it with a folder, and only then ({path})")  # fmt: skip
    if top is not None:
        scores_N = read_proponents(path, rows).mean_N
        return np.sort(ranking(scores_N)[: min(top, np.isfinite(scores_N).sum())])
    try:
        chosen = np.unique([int(line) for line in path.read_text().split()])
    except (OSError, ValueError) as error:
        raise InputError(f"--candidates {path} is no list of row numbers ({error}); give one a "
                         "line, or a folder of scores") from error  # fmt: skip
    if not len(chosen) or chosen[0] < 0 or chosen[-1] >= n:
        raise InputError(f"--candidates {path} must name rows 0 to {n - 1} of {rows.path}")
    return chosen
