"""A check-up of a setting (model, rows, precision, batch) before hours are spent on it.

Per-example gradients should not depend on what else is in a batch, on padding or on a second try;
they should be finite, and as true in the chosen precision as scores need. The pass itself is run a
few times on a small sample of rows to see, in three shapes and two precisions:

    error = max_n |g_n - g'_n| / |g'_n|,    H_s = mean_n vec(G_ns) vec(G_ns)^T for the damping

`attribution.doctor_rows` has the checks that run no model.

Dims: N rows of the sample, B rows of a batch, T tokens, D features, E features of a site.
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import targets
from attribution.curvature.precondition import LARGEST
from attribution.doctor_rows import (
    Finding,
    Special,
    Verdict,
    open_rows,
    row_findings,
    score_findings,
)
from attribution.normalizer import Adafactor, Adam
from attribution.store import Pass
from attribution.targets import Feature, Spec
from core import model
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.progress import Progress
from core.ranks import spearman
from core.rows import IGNORED, Batch, Rows, pad_batch

Gradients = Callable[[Batch], tuple[np.ndarray, np.ndarray]]  # features [B,D], losses [B]
# Relative errors of a row's gradient from which to warn, and which are bad.
LIMITS = {"float32": (1e-4, 1e-2), "bfloat16": (0.05, 0.3)}
PASSES, LARGEST_SAMPLE = 6, 8e9  # over the sample; bytes of their gradients, held at once
CONDITION = 1000  # of a damped H, where more is asked of the data than it knows


class Found(NamedTuple):
    """Features [N,D] and losses [N] of the sample."""

    features_ND: np.ndarray
    losses_N: np.ndarray


def examine(
    loaded: Loaded,
    path: Path,
    special: Special,
    spec: Spec,
    execution: Execution,
    batch_tokens: int,
    normalizer: Adam | Adafactor | None = None,
    damping: float = 0.1,
    sample: int = 16,
    seed: int = 0,
    scores: Path | None = None,
) -> list[Finding]:
    """All checks of a setting. sample: how many rows the gradient checks run on."""
    rows = open_rows(path)
    if PASSES * 4 * sample * targets.width(loaded.config, spec) > LARGEST_SAMPLE:
        raise InputError(f"{PASSES} times the gradients of {sample} rows are more than "
                         f"{LARGEST_SAMPLE / 1e9:.0f} GB; use a smaller --sample or "
                         "--projection-dim (0 is unprojected)")  # fmt: skip
    weights = check_weights(loaded)
    about_rows, sound = row_findings(rows, loaded.config, special)
    found = [weights, *about_rows]
    if scores is not None:
        found += score_findings(scores, rows)
    found.append(check_matmul())
    if weights.verdict == "bad" or not len(sound):
        return found
    random = np.random.default_rng(seed)
    chosen = np.sort(random.choice(sound, min(sample, len(sound)), replace=False))
    taken = rows.take(chosen)

    def at(dtype: str) -> Gradients:
        how = dataclasses.replace(execution, dtype=dtype)
        source = Pass(loaded, taken, spec, how, batch_tokens, normalizer)

        def compute(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
            out = source.compute(batch)
            return np.asarray(out.features_BD), np.asarray(out.losses_B)

        return compute

    other = "bfloat16" if execution.dtype == "float32" else "float32"
    numeric, features_ND = check_gradients(
        at(execution.dtype), at(other), execution.dtype, taken, chosen, batch_tokens
    )
    found += numeric
    if len(features_ND):
        layout = targets.features(loaded.config, spec)
        found.append(check_sites(layout, features_ND, spec.adapter is not None))
        found += check_damping(layout, features_ND, len(sound), damping)
    return found


def check_weights(loaded: Loaded) -> Finding:
    leaves = jax.tree_util.tree_leaves_with_path(loaded.variables)
    broken = {}
    for place, value in leaves:
        n = int((~np.isfinite(np.asarray(value, np.float32))).sum())
        if n:
            broken[jax.tree_util.keystr(place, simple=True, separator="/")] = n
    if not broken:
        return Finding("weights", "ok", 0, f"all values of {len(leaves)} tensors are finite")
    worst = next(iter(broken))
    said = f"{worst} holds {broken[worst]:,} values that are NaN or infinite"
    said += f", {len(broken) - 1} more tensors do, too" if len(broken) > 1 else ""
    return Finding("weights", "bad", sum(broken.values()), said,
                   "convert or train the model again")  # fmt: skip


def check_matmul() -> Finding:
    """Whether the pass's float32 is float32 here: TF32 keeps ten bits of a factor."""
    random = np.random.default_rng(0)
    a_OI, b_OI = random.normal(size=(2, 256, 256)).astype(np.float32)
    product = jax.jit(model.full_precision(jnp.matmul))(a_OI, b_OI)
    exact = a_OI.astype(np.float64) @ b_OI
    error = float(np.abs(np.asarray(product) - exact).max() / np.abs(exact).max())
    said = f"a float32 matmul of the pass errs by {error:.1e} on {jax.default_backend()}"
    if error < 1e-5:
        return Finding("matmul precision", "ok", error, said)
    remedy = "TF32 is forced: unset NVIDIA_TF32_OVERRIDE and precision flags in XLA_FLAGS"
    return Finding("matmul precision", "bad", error, said, remedy)


def check_gradients(
    compute: Gradients,
    compute_other: Gradients,
    dtype: str,
    rows: Rows,
    names: np.ndarray,
    batch_tokens: int,
) -> tuple[list[Finding], np.ndarray]:
    """(checks, the finite features of the sample).

    compute, compute_other: the pass in `dtype` and in the other of float32 and bfloat16.
    names: the numbers that messages call the rows by.
    """
    n, devices = len(rows), jax.local_device_count()
    longest, half = int(rows.lengths.max()), max(int(rows.lengths.max()) // 2, 2)
    size = -(-min(max(batch_tokens // longest, 2), n) // devices) * devices
    together = [pad_batch(rows, _filled(part, size), longest) for part in _parts(n, size)]
    alone = [pad_batch(rows, _filled(part, devices), longest) for part in _parts(n, 1)]
    starts = [_cut(batch, half, half) for batch in together]
    padded = [_cut(batch, half, longest) for batch in together]
    steps = 4 * len(together) + len(alone) + len(starts)
    with Progress(steps, "gradients", "batch") as bar:

        def collect(run: Gradients, batches: Iterable[Batch]) -> Found:
            parts = []
            for batch in batches:
                features_BD, losses_B = run(batch)
                real_B = batch.rows_B >= 0
                parts.append((features_BD[real_B], losses_B[real_B]))
                bar.update(1)
            features, losses = zip(*parts, strict=True)
            return Found(np.concatenate(features), np.concatenate(losses))

        reference = collect(compute, together)
        found = [_finite("losses", np.isfinite(reference.losses_N), names, dtype)]
        sound_N = np.isfinite(reference.features_ND).all(1) & np.isfinite(reference.losses_N)
        found.append(_finite("gradients", sound_N, names, dtype))
        if not sound_N.any():
            return found, reference.features_ND[:0]
        again = collect(compute, together)
        single, short = collect(compute, alone), collect(compute, starts)
        long, other = collect(compute, padded), collect(compute_other, together)

    def compare(a: Found, b: Found) -> float:
        return _error(a.features_ND[sound_N], b.features_ND[sound_N])

    warn, bad = LIMITS[dtype]
    error = compare(again, reference)
    said = f"the same batch twice differs by {error:.1e} (dropout is off in the gradient pass)"
    remedy = "on a GPU, add --xla_gpu_deterministic_ops=true to XLA_FLAGS"
    found.append(_graded("repeatability", error, 0, warn, said, remedy))
    error = compare(single, reference)
    said = f"alone and in a batch of {size}, a row's gradient differs by {error:.1e} at most"
    remedy = "use --dtype float32" if dtype != "float32" else "look for fast-math in XLA_FLAGS"
    found.append(_graded("batch size", error, warn, bad, said, remedy))
    error = compare(long, short)
    said = f"{longest - half} tokens of padding change a gradient by {error:.1e} at most"
    found.append(_graded("padding", error, warn, bad, said, remedy))
    features_ND = reference.features_ND[sound_N]
    found.append(_precision(dtype, features_ND, other.features_ND[sound_N]))
    return found, features_ND


def _parts(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + size, n)) for start in range(0, n, size)]


def _filled(chosen: np.ndarray, size: int) -> np.ndarray:
    return np.pad(chosen, (0, size - len(chosen)), constant_values=-1)


def _cut(batch: Batch, length: int, padded: int) -> Batch:
    """The starts of rows, supervised everywhere, padded to `padded` tokens."""
    ids_BT = np.zeros((len(batch.rows_B), padded), np.int32)
    labels_BT = np.full_like(ids_BT, IGNORED)
    ids_BT[:, :length] = batch.ids_BT[:, :length]
    labels_BT[batch.rows_B >= 0, :length] = ids_BT[batch.rows_B >= 0, :length]
    return Batch(ids_BT, labels_BT, batch.rows_B)


def _error(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """The largest |a - b| / |b| of a row; infinite where only one of the two is finite."""
    a_ND, b_ND = a_ND.astype(np.float64), b_ND.astype(np.float64)  # squares of tiny ones underflow
    difference_N, size_N = np.linalg.norm(a_ND - b_ND, axis=1), np.linalg.norm(b_ND, axis=1)
    error_N = difference_N / np.where(size_N > 0, size_N, 1)
    return float(np.where(np.isfinite(error_N), error_N, np.inf).max())


def _graded(check: str, value: float, warn: float, bad: float, said: str, remedy: str) -> Finding:
    verdict: Verdict = "ok" if value <= warn else "warn" if value <= bad else "bad"
    return Finding(check, verdict, value, said, "" if verdict == "ok" else remedy)


def _finite(check: str, sound_N: np.ndarray, names: np.ndarray, dtype: str) -> Finding:
    broken = names[~sound_N].tolist()
    if not broken:
        return Finding(check, "ok", 0, f"all {check} of {len(names)} sampled rows are finite")
    said = f"{len(broken)} of {len(names)} sampled rows have {check} that are not finite; "
    remedy = "use --dtype float32" if dtype != "float32" else "look at the row and at the weights"
    return Finding(check, "bad", len(broken), f"{said}the first is row {broken[0]}", remedy)


def _precision(dtype: str, features_ND: np.ndarray, other_ND: np.ndarray) -> Finding:
    """Does bfloat16 keep the order of scores? The last quarter of the sample asks, as a query."""
    queries = max(len(features_ND) // 4, 1)

    def scores(x_ND: np.ndarray) -> np.ndarray:
        return (x_ND[:-queries] @ x_ND[-queries:].T).ravel()

    if not np.isfinite(other_ND).all():
        rank, cosine = -1.0, -1.0
    else:
        sizes_N = np.linalg.norm(features_ND, axis=1) * np.linalg.norm(other_ND, axis=1)
        inner_N = np.einsum("ND,ND->N", features_ND, other_ND)
        cosine = float((inner_N / np.where(sizes_N > 0, sizes_N, 1)).min())
        rank = spearman(scores(features_ND), scores(other_ND)) if len(features_ND) > 2 else None
    order = "none" if rank is None else f"{rank:.4f}"
    said = (
        f"bfloat16 against float32: rank correlation of scores {order}, least cosine of two "
        f"gradients {cosine:.4f}"
    )
    value = cosine if rank is None else rank
    if dtype == "float32":  # nothing is wrong then; the number tells whether to try bfloat16
        return Finding("precision", "ok", value, said)
    return _graded("precision", -value, -0.99, -0.9, said, "use --dtype float32")._replace(
        value=value
    )


def check_sites(layout: list[Feature], features_ND: np.ndarray, adapter: bool) -> Finding:
    """Sites whose gradient is zero in every sampled row: nothing about them can be attributed."""
    dead = [f.name for f in layout if not _block(features_ND, f).any()]
    said = f"{len(dead)} of {len(layout)} sites have a zero gradient in every sampled row"
    if not dead:
        return Finding("sites", "ok", 0, said)
    verdict: Verdict = "bad" if len(dead) == len(layout) else "warn"
    said += f"; the first is {dead[0]}"
    remedy = (
        "a fresh adapter's B is zero, and with it A's gradient: train it first"
        if adapter
        else "leave them out, or look at their weights"
    )
    return Finding("sites", verdict, len(dead), said, remedy)


def _block(features_ND: np.ndarray, feature: Feature) -> np.ndarray:
    return features_ND[:, feature.offset : feature.offset + feature.shape[0] * feature.shape[1]]


class Spectrum(NamedTuple):
    """Of one site's H, from the sample; eigenvalues in units of the mean one."""

    stable_rank: float
    top: float
    below: float  # share of the trace in eigenvalues below the damping
    tenth: float  # the eigenvalue above which nine tenths of the trace lie


def check_damping(
    layout: list[Feature], features_ND: np.ndarray, n_rows: int, damping: float
) -> list[Finding]:
    """Can these rows precondition, and does the damping leave their spectrum alone?

    n_rows: rows that H would be made of; the sample alone shows only the top of its spectrum.
    """
    width = max(f.shape[0] * f.shape[1] for f in layout)
    blocks = [_block(features_ND, f).astype(np.float64) for f in layout]
    spectra = [_spectrum(x_NE, damping) for x_NE in blocks if x_NE.any()]
    if width > LARGEST or not spectra:
        return []
    stable_rank, top, below, tenth = (float(np.median(column)) for column in np.transpose(spectra))
    side = int(min(n_rows, width) ** 0.5)
    said = f"{n_rows:,} rows for an autocorrelation of {width:,} features a site"
    condition = (top + damping) / damping if damping else float("inf")
    found = [Finding("preconditioner", "ok", n_rows / width, said)]
    if n_rows < width:
        said += f": in {width - n_rows:,} directions of each, damping alone decides"
        gentle = f", or --damping {top / CONDITION:.2g}" if condition > 10 * CONDITION else ""
        remedy = f"to precondition, use --projection-dim {side} or {width:,} rows{gentle}"
        found = [Finding("preconditioner", "warn", n_rows / width, said, remedy)]
    said = (
        f"median site: stable rank {stable_rank:.1f}, {below:.0%} of the spectrum below "
        f"{damping:g} x mean, condition {condition:.3g} at most when damped"
    )
    if damping == 0 and n_rows < width:
        remedy = f"the inverse does not exist: use --damping {top / CONDITION:.2g} or more"
        return [*found, Finding("damping", "bad", below, said, remedy)]
    if below > 0.5:
        remedy = f"damping decides everything; use --damping {tenth:.2g} or less"
        return [*found, Finding("damping", "warn", below, said, remedy)]
    return [*found, Finding("damping", "ok", below, said)]


def _spectrum(x_NE: np.ndarray, damping: float) -> Spectrum:
    """By the N x N Gram matrix, whose eigenvalues are those of H that are not zero."""
    values_N = np.maximum(np.linalg.eigvalsh(x_NE @ x_NE.T), 0)[::-1]
    total = values_N.sum()
    values_N = values_N / (total / x_NE.shape[1])
    share_N = np.cumsum(values_N) / values_N.sum()
    return Spectrum(
        float(values_N.sum() / values_N[0]),
        float(values_N[0]),
        float(values_N[values_N < damping].sum() / values_N.sum()),
        float(values_N[np.searchsorted(share_N, 0.9)]),
    )


def table(found: list[Finding], width: int = 100) -> str:
    """The findings for people: verdict, check, what was measured and, below, what to change."""
    import textwrap

    column = 6 + max(len(finding.check) for finding in found) + 2
    lines, margin = [], " " * column
    for finding in found:
        head = f"{finding.verdict:<6}{finding.check}".ljust(column)
        lines += textwrap.wrap(finding.said, width, initial_indent=head, subsequent_indent=margin)
        lines += textwrap.wrap(finding.remedy, width, initial_indent=f"{margin}-> ",
                               subsequent_indent=f"{margin}   ")  # fmt: skip
    counts = {v: sum(f.verdict == v for f in found) for v in ("bad", "warn", "ok")}
    return "\n".join([*lines, ", ".join(f"{n} {verdict}" for verdict, n in counts.items())])


def worst(found: list[Finding]) -> Verdict:
    order: tuple[Verdict, ...] = ("bad", "warn", "ok")
    return next(v for v in order if v == "ok" or any(f.verdict == v for f in found))


def as_json(found: list[Finding], setting: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "taproot-doctor",
        "verdict": worst(found),
        "setting": setting,
        "checks": [finding._asdict() for finding in found],
    }
