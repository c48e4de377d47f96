"""Fingerprints of many rows: which features of an SAE they have, in a folder, resumable.

Dims: N rows, K features kept of each, S statistics, D width of the activation, M tokens that count
of all rows, J features kept of each token.

    mean_index.npy, mean_value.npy, max_index.npy, max_value.npy  [N,K], see `sae.pooling.pool`
    statistics.npy [N,S]   hidden_mean.npy [N,D]   lengths.npy int32 [N], tokens that count
    token_index.npy, token_value.npy [M,J] in row order, token_offsets.npy int64 [N+1]: where asked
    info.json, which says what all of it is of

Whoever learns from them chooses a vocabulary among the features of the training rows: two rows keep
different ones.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from core import distributed
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, read_json, write_json, write_npy
from core.inference import overlapped
from core.memmap import FilledArray, open_array
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead
from core.rundir import Run
from core.sharding import local_mesh, place, replicated
from core.taps import Tap
from sae import pooling
from sae.activations import Reader
from sae.coder import Sae
from sae.pooling import STATISTICS, Spec

FORMAT = "taproot-fingerprints"
POOLING, PARTS = ("mean", "max"), ("index", "value")
ATTENTION = "attention"  # what the features of every token are kept for


@dataclasses.dataclass(frozen=True)
class Settings:
    """k: features kept of a row. token_k: of every token as well, for attention over tokens; 0 =
    none. batch_tokens: of a batch, padding included."""

    k: int = 256
    token_k: int = 0
    batch_tokens: int = 8192


def fingerprint(
    run: Run,
    loaded: Loaded,
    rows: Rows,
    sae: Sae,
    tap: Tap,
    settings: Settings,
    execution: Execution,
) -> dict[str, Any]:
    """Fill `run`'s folder; continues a killed run. Returns a summary.

    tap: see `sae.places`. rows must fit the model (`load_rows`). l0: mean active features of a
    token. kept: mean over rows of what their K features have of the sum of all means; None if no
    feature was ever active.
    """
    _check(sae, settings)
    share = distributed.share(len(rows))
    reader = Reader(loaded, execution, rows, (tap,))
    lengths_N = reader.counts
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    run.inputs(model=loaded.fingerprint, rows=rows.sha, tokenizer=rows.tokenizer,
               sae=sae.fingerprint, **distributed.layout())  # fmt: skip
    mesh = local_mesh()
    spec = Spec(sae.coder, settings.k, settings.token_k, mesh=mesh)
    params = jax.device_put(sae.params, replicated(mesh))
    plan = Plan(rows.take(share), settings.batch_tokens, jax.local_device_count())

    def compute(batch: Batch) -> Any:
        batch = batch._replace(rows_B=np.where(batch.rows_B < 0, -1, batch.rows_B + share.start))
        mask_BT = reader.mask(batch)
        ids_BT, counted_BT = (place(x_BT, reader.over_rows) for x_BT in (batch.ids_BT, mask_BT))
        out = pooling.fingerprints(
            reader.config, execution, tap, spec, reader.variables, params, ids_BT, counted_BT
        )
        return batch.rows_B, mask_BT, out

    arrays = _arrays(run.path, _shapes(settings, len(rows), reader.widths[0], int(offsets[-1])))
    start = arrays["statistics"].next_batch
    total = int(rows.lengths[share.start : share.stop].sum())
    done = sum(int(plan.rows.lengths[c[c >= 0]].sum()) for c, _ in plan.batches[:start])
    with Progress(total, "sae fingerprint", "token", done) as bar:
        for _, (rows_B, mask_BT, out) in overlapped(read_ahead(plan, start), compute):
            _check_finite(rows, rows_B, out, arrays)
            places_M = (offsets[rows_B, None] + np.cumsum(mask_BT, 1) - 1)[mask_BT]
            for name, array in arrays.items():
                by_token = name.startswith("token")
                array.write(*(places_M, out[name][mask_BT]) if by_token else (rows_B, out[name]))
            bar.update(int(rows.lengths[rows_B[rows_B >= 0]].sum()))
    held = {name: array.finish() for name, array in arrays.items()}
    if distributed.first():
        write_npy(run.path / "lengths.npy", lengths_N.astype(np.int32))
        if settings.token_k:
            write_npy(run.path / "token_offsets.npy", offsets)
        write_json(run.path / "info.json", _info(loaded, rows, sae, tap, settings))
    return _summary(held, lengths_N)


def _arrays(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, FilledArray]:
    """All at the same batch, the first that one of them lacks."""
    arrays = {
        name: FilledArray(folder / f"{name}.npy", shape, _dtype(name))
        for name, shape in shapes.items()
    }
    start = min(array.next_batch for array in arrays.values())
    for array in arrays.values():
        array.next_batch = start
    return arrays


def _summary(held: Mapping[str, np.ndarray], lengths_N: np.ndarray) -> dict[str, Any]:
    l0_N, sum_N = (
        held["statistics"][:, STATISTICS.index(name)].astype(np.float64)
        for name in ("l0_mean", "l1_mean")
    )
    tokens = int(lengths_N.sum())
    some_N = sum_N > 0
    kept = held["mean_value"].sum(1)[some_N] / sum_N[some_N]
    return {
        "rows": len(lengths_N),
        "tokens": tokens,
        "l0": float(l0_N @ lengths_N) / tokens,
        "kept": float(kept.mean()) if len(kept) else None,
    }


def _check(sae: Sae, settings: Settings) -> None:
    for option, k in (("--k", settings.k), ("--token-k", settings.token_k)):
        if k > sae.coder.d_sae:
            raise InputError(f"{option} {k} is more than the {sae.coder.d_sae} features of "
                             f"{sae.about.origin}; give less")  # fmt: skip
    if settings.token_k and distributed.place()[1] > 1:
        raise InputError("--token-k works in one process: the tokens of rows are not shared out "
                         "evenly; leave TAPROOT_COORDINATOR out")  # fmt: skip


def _shapes(settings: Settings, rows: int, width: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Of the arrays that are filled, by name."""
    kept = {f"{of}_{part}": (rows, settings.k) for of in POOLING for part in PARTS}
    if settings.token_k:
        kept |= {f"token_{part}": (tokens, settings.token_k) for part in PARTS}
    return {**kept, "statistics": (rows, len(STATISTICS)), "hidden_mean": (rows, width)}


def _dtype(name: str) -> str:
    return "int32" if name.endswith("index") else "float32"


def _check_finite(
    rows: Rows, rows_B: np.ndarray, out: dict[str, np.ndarray], arrays: dict[str, FilledArray]
) -> None:
    """Raise InputError for a row that is not; if it is among the first, leave nothing behind."""
    seen_BX = np.concatenate([out["statistics"], out["hidden_mean"]], 1)
    bad_B = (rows_B >= 0) & ~np.isfinite(seen_BX).all(1)
    if bad_B.any():
        if not arrays["statistics"].next_batch:
            for array in arrays.values():
                array.path.unlink()
                array.journal.unlink()
        raise InputError(f"{rows.path} row {rows_B[bad_B.argmax()]} has activations or features "
                         "that are not finite; check the model's weights, or use --dtype float32"
                         )  # fmt: skip


def _info(loaded: Loaded, rows: Rows, sae: Sae, tap: Tap, settings: Settings) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "rows": {"path": str(rows.path), "sha": rows.sha, "count": len(rows)},
        "model": loaded.fingerprint,
        "tokenizer": rows.tokenizer,
        "sae": {
            "path": sae.about.origin,
            "fingerprint": sae.fingerprint,
            "d_sae": sae.coder.d_sae,
            "architecture": sae.coder.architecture,
        },
        "tap": str(tap),
        "pooling": [*POOLING, ATTENTION] if settings.token_k else [*POOLING],
        "k": settings.k,
        "token_k": settings.token_k,
        "statistics": [*STATISTICS],
        "exclude": ["padding"] if loaded.config.bos is None else ["padding", "bos"],
    }


class Tokens(NamedTuple):
    """The features of every token that counts; row i has those of offsets_N[i] to [i + 1]."""

    index_MJ: np.ndarray
    value_MJ: np.ndarray
    offsets_N: np.ndarray


@dataclasses.dataclass(frozen=True)
class Fingerprints:
    """A finished folder, memory-mapped. index, value: [N,K] by pooling, "mean" or "max"."""

    path: Path
    info: dict[str, Any]
    index: dict[str, np.ndarray]
    value: dict[str, np.ndarray]
    statistics_NS: np.ndarray
    hidden_mean_ND: np.ndarray
    lengths_N: np.ndarray
    tokens: Tokens | None

    def __len__(self) -> int:
        return len(self.lengths_N)


def read_fingerprints(path: PathLike) -> Fingerprints:
    """Open a folder; InputError unless its arrays are what its info.json says."""
    path, remedy = Path(path), "make fingerprints with `sae fingerprint`"
    if not (path / "info.json").exists():
        raise InputError(f"{path} holds no finished fingerprints; {remedy}")
    info = read_json(path / "info.json")
    try:
        known = info["format"] == FORMAT and info["statistics"] == [*STATISTICS]
        settings = Settings(int(info["k"]), int(info["token_k"]))
        rows, features = int(info["rows"]["count"]), int(info["sae"]["d_sae"])
    except (KeyError, TypeError, ValueError):
        known, settings, rows, features = False, Settings(), 0, 0
    if not known:
        raise InputError(f"{path}/info.json does not describe fingerprints; {remedy}")
    lengths_N, width = open_array(path / "lengths.npy"), open_array(path / "hidden_mean.npy").shape
    offsets_N = np.concatenate([[0], np.cumsum(lengths_N)])
    shapes = _shapes(settings, rows, width[-1], int(offsets_N[-1]))
    arrays = {name: open_array(path / f"{name}.npy") for name in shapes}
    for name, array in arrays.items():
        fits = array.shape == shapes[name] and array.dtype == _dtype(name)
        if fits and name.endswith("index"):
            fits = array.size == 0 or (array.min() >= -1 and array.max() < features)
        if not fits or lengths_N.shape != (rows,):
            raise InputError(f"{path}/{name}.npy does not fit info.json; {remedy} again")
    tokens = None
    if settings.token_k:
        tokens = Tokens(arrays["token_index"], arrays["token_value"], offsets_N)
    return Fingerprints(
        path, info, {of: arrays[f"{of}_index"] for of in POOLING},
        {of: arrays[f"{of}_value"] for of in POOLING}, arrays["statistics"],
        arrays["hidden_mean"], lengths_N, tokens,
    )  # fmt: skip
