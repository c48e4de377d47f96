"""Influence scores of pool rows on a query: inner products of preconditioned gradients.

Dims: N pool rows, Q queries, B rows of a batch, T tokens, D features, S sites, E features of one.

With g a pool gradient, q_j the query gradients and H their (or the pool's) autocorrelation:

    clean, plain:      score = <g, H^-1 mean_j q_j>
    clean, unit norm:  score = <u(H^-1/2 g), mean_j u(H^-1/2 q_j)>,   u(x) = x / |x|
    notes:             score = <u(g), u((H + .1 mean|H_ij|)^-1 mean_j u(q_j))>
    self:              score = <g, H^-1 g>

`clean` with unit norm is the cosine in the metric H^-1 (TrackStar, arXiv 2410.17413); `notes` is
the one-sided form of the research notes. `max` and `each` keep the q_j apart; a control's mean is
taken off the queries'. Positive scores are proponents: a step along the row's gradient lowers the
query's loss.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import dot, targets
from attribution.curvature import precondition
from attribution.curvature.precondition import Inversion
from attribution.outputs import Arrays, Scored, Source, about, aligned, fill, folder_of, publish
from attribution.store import Features, Pass, Store, batches, check_finite
from core import distributed
from core.errors import InputError
from core.files import atomic, read_npz
from core.progress import Progress
from core.rows import Rows, read_ahead
from core.rundir import Run

LARGEST_QUERY = 4e9  # bytes of query gradients held at once
FORMULAS = {
    ("clean", False): "<g, H^-1 mean_j q_j>",
    ("clean", True): "<u(H^-1/2 g), mean_j u(H^-1/2 q_j)>, u(x) = x/|x|",
    ("notes", False): "<g, (H + c mean|H_ij| I)^-1 mean_j q_j>",
    ("notes", True): "<u(g), u((H + c mean|H_ij| I)^-1 mean_j u(q_j))>, u(x) = x/|x|",
}
SELF = "<g, H^-1 g>"


@dataclasses.dataclass(frozen=True)
class Settings:
    """mixed: of the queries' and the pool's H, see `precondition.mix`, with so many components;
    for `notes` 0.99 H_query + 0.01 H_pool. tokens: scores by position as well.
    query_batch: queries that are held at once where they are kept apart; 0 = as many as fit.
    """

    mode: Literal["mean", "max", "each", "self"] = "mean"
    preconditioner: Literal["none", "query", "pool", "mixed"] = "none"
    damping: float = 0.1
    unit_norm: bool = False
    convention: Literal["clean", "notes"] = "clean"
    inversion: Inversion = "damped"
    mix_components: int = 1000
    tokens: bool = False
    query_batch: int = 0

    @property
    def two_sided(self) -> bool:
        """H^-1/2 on both sides; else H^-1 on the query's."""
        return self.mode == "self" or (self.unit_norm and self.convention == "clean")

    @property
    def apart(self) -> bool:
        return self.mode in ("max", "each")

    def check(self, pool: Pass | Store, control: bool) -> None:
        """Raise for settings that do not go together."""
        if self.mode == "self" and (self.unit_norm or self.tokens or self.convention == "notes"):
            raise InputError("--mode self is <g, H^-1 g>; leave --unit-norm, --tokens and "
                             "--convention notes out")  # fmt: skip
        if control and self.mode != "mean":
            raise InputError("--control is taken off the mean query; use --mode mean")
        if self.convention == "notes" and self.inversion != "damped":
            raise InputError("--convention notes has its own damping; leave --inversion out")
        if self.tokens and self.mode == "max":
            raise InputError("--tokens needs --mode mean or each: the greatest score's query "
                             "differs from row to row")  # fmt: skip
        if self.tokens and isinstance(pool, Store):
            raise InputError(f"--tokens needs gradients by position, which store {pool.path} does "
                             f"not hold; give its rows, {pool.rows_path}")  # fmt: skip


class Direction(NamedTuple):
    """What pool features meet: directions [Q,D] and, two-sided, H^-1/2 for the pool side.

    Without directions they meet themselves.
    """

    query_QD: jax.Array | None
    root_SEE: jax.Array | None


def _length(x_BD: jax.Array) -> jax.Array:
    """|x|. Scaled first: the squares of tiny gradients underflow."""
    largest_B = jnp.abs(x_BD).max(-1)
    scale_B = jnp.where(largest_B > 0, largest_B, 1)
    return scale_B * jnp.linalg.norm(x_BD / scale_B[:, None], axis=-1)


def _over_length(x: jax.Array, length_B: jax.Array) -> jax.Array:
    """x / |x|, zero where |x| is: a gradient without a direction favours none."""
    length = length_B.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(length > 0, x / jnp.where(length > 0, length, 1), 0)


def _unit(x_BD: jax.Array) -> jax.Array:
    return _over_length(x_BD, _length(x_BD))


@functools.partial(jax.jit, static_argnames="settings")
def _query_batch(
    settings: Settings, matrix_SEE: jax.Array | None, features_BD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(what each query is before the mean, the largest absolute feature of each row)."""
    largest_B = jnp.abs(features_BD).max(-1)
    if matrix_SEE is not None and settings.two_sided:
        features_BD = precondition.apply(matrix_SEE, features_BD)
    return _unit(features_BD) if settings.unit_norm else features_BD, largest_B


def query_features(
    source: Pass, settings: Settings, matrix_SEE: jax.Array | None = None
) -> np.ndarray:
    """Query gradients [Q,D] in row order, or their mean [1,D] when they need not stay apart.

    Of unit length and, two-sided, preconditioned where `settings` say so.
    """
    n, width = len(source.rows), targets.width(source.loaded.config, source.spec)
    kept_QD = np.zeros((n, width), np.float32) if settings.apart else np.zeros((1, width))

    def compute(out: Features) -> tuple[np.ndarray, Any]:
        return out.rows_B, _query_batch(settings, matrix_SEE, out.features_BD)

    with Progress(n, "query gradients", "row") as bar:
        for _, (rows_B, (features_BD, largest_B)) in batches(source, compute):
            check_query(source.rows, rows_B, largest_B)
            real_B = rows_B >= 0
            if settings.apart:
                kept_QD[rows_B[real_B]] = features_BD[real_B]
            else:
                kept_QD += features_BD[real_B].sum(0, dtype=np.float64)
            bar.update(int(real_B.sum()))
    return kept_QD if settings.apart else kept_QD / n


def check_query(rows: Rows, rows_B: np.ndarray, largest_B: np.ndarray) -> None:
    """Raise for the first query without a finite gradient, or with none at all."""
    check_finite(rows, rows_B, largest_B)
    if (dead_B := (rows_B >= 0) & (largest_B == 0)).any():
        row = rows_B[dead_B.argmax()]
        raise InputError(f"{rows.path} row {row} has a zero gradient; drop it")


def autocorrelation(source: Pass | Store, sites: int, file: Path | None = None) -> np.ndarray:
    """H [S,E,E] of a source, of all processes where it is split.

    file: where the state is saved every minute, to resume from.
    """
    state: dict[str, Any] = {"h": None, "batches": 0, "rows": 0}  # what is in h, the sum so far
    part = file and distributed.part(file)
    if part and part.exists():
        state = read_npz(part)
    h_SEE, start, seen = state["h"], int(state["batches"]), int(state["rows"])
    saved = time.monotonic()
    with Progress(len(source.plan), "autocorrelation", "batch", start) as bar:
        for number, batch in enumerate(read_ahead(source.plan, start), start + 1):
            out = source.compute(batch)
            if h_SEE is None:
                e = out.features_BD.shape[1] // sites
                h_SEE = jnp.zeros((sites, e, e), jnp.float32)
            h_SEE = precondition.add_autocorrelation(h_SEE, out.features_BD)
            seen += int((out.rows_B >= 0).sum())
            bar.update(1)
            if part and (number == len(source.plan) or time.monotonic() - saved > 60):
                with atomic(part) as stream:
                    np.savez(stream, h=np.asarray(h_SEE), batches=number, rows=seen)  # pyright: ignore[reportArgumentType]
                saved = time.monotonic()
    parts = [{"h": np.asarray(h_SEE), "rows": np.int64(seen)}]
    if file:
        parts = distributed.gather(file.with_stem(f"{file.stem}-sum"), **parts[0])
    total = parts[0]["h"] if len(parts) == 1 else np.sum([p["h"] for p in parts], axis=0)
    if not np.isfinite(total).all():
        what = "pool" if file else "query"
        raise InputError(f"a {what} row has a gradient that is not finite; check the model's "
                         "weights, or use --dtype float32")  # fmt: skip
    return total / sum(int(p["rows"]) for p in parts)


def preconditioner(
    folder: Path, settings: Settings, pool: Pass | Store, query: Pass, sites: int
) -> tuple[jax.Array | None, dict[str, float]]:
    """(H^-1, or two-sided H^-1/2, [S,E,E]; what to note about H). The pool's H is resumable."""
    kind, noted = settings.preconditioner, {}
    if kind == "none":
        return None, {}
    h_query = h_pool = None
    if kind in ("query", "mixed"):
        h_query = autocorrelation(query, sites)
    if kind in ("pool", "mixed"):
        h_pool = autocorrelation(pool, sites, folder / "autocorrelation.npz")
    h_SEE = h_pool if h_query is None else h_query
    if h_query is not None and h_pool is not None:
        if settings.convention == "notes":
            h_SEE = 0.99 * h_query + 0.01 * h_pool
        else:
            h_SEE, share = precondition.mix(h_query, h_pool, settings.mix_components)
            noted = {"mix_share_of_query": share}
    assert h_SEE is not None
    power = 0.5 if settings.two_sided else 1.0
    relative = "entry" if settings.convention == "notes" else "eigenvalue"
    return jnp.asarray(precondition.inverse_power(
        h_SEE, power, settings.damping, settings.inversion, relative
    )), noted  # fmt: skip


def directions(settings: Settings, query_QD: np.ndarray, matrix_SEE: jax.Array | None) -> Direction:
    """Finish query features (see `query_features`), or what is left of them after a control."""
    queries = jnp.asarray(query_QD, jnp.float32)
    if matrix_SEE is not None and not settings.two_sided:
        queries = precondition.apply(matrix_SEE, queries)
    if settings.convention == "notes" and settings.unit_norm:
        queries = _unit(queries)
    return Direction(queries, matrix_SEE if settings.two_sided else None)


@functools.partial(jax.jit, static_argnames=("mode", "unit_norm"))
def batch_scores(
    direction: Direction,
    features_BD: jax.Array,
    tokens_BTQ: jax.Array | None,
    mode: str,
    unit_norm: bool,
) -> dict[str, jax.Array]:
    """scores [B], or [B,Q] for `each`, raw gradient norms [B], and the tokens' share of the scores.

    tokens_BTQ: their inner products with what `token_directions` gives.
    """
    norms_B = _length(features_BD)
    if direction.root_SEE is not None:
        features_BD = precondition.apply(direction.root_SEE, features_BD)
    if direction.query_QD is None:
        return {"scores": (features_BD**2).sum(-1), "norms": norms_B}
    if unit_norm:
        length_B = _length(features_BD)
        features_BD = _over_length(features_BD, length_B)
        tokens_BTQ = None if tokens_BTQ is None else _over_length(tokens_BTQ, length_B)
    scores_BQ = jnp.matmul(features_BD, direction.query_QD.T, precision="highest")
    one = mode == "mean"
    out = {"scores": scores_BQ if mode == "each" else scores_BQ.max(-1), "norms": norms_B}
    if tokens_BTQ is not None:
        out["token_scores"] = tokens_BTQ[..., 0] if one else tokens_BTQ
    return out


def token_directions(pool: Pass, direction: Direction) -> dict[str, jax.Array]:
    """The directions that a token's raw gradient meets, by sink: two-sided, H^-1/2 goes to them."""
    queries = direction.query_QD
    assert queries is not None
    if direction.root_SEE is not None:
        queries = precondition.apply(direction.root_SEE, queries)
    return dot.by_sink(pool.loaded.config, pool.spec, queries)


def score(
    run: Run,
    pool: Pass | Store,
    query: Pass,
    settings: Settings,
    scored: Scored,
    control: Pass | None = None,
) -> dict[str, Any]:
    """Score pool rows into `run`'s folder; continues a killed run. Returns `summary.json`.

    query: for `self`, whatever H may be taken of. scored: the pool's rows, or some of them only.
    """
    began = time.monotonic()
    config, spec = query.loaded.config, query.spec
    settings.check(pool, control is not None)
    if settings.preconditioner != "none":
        precondition.check_size(spec.projection)
    if settings.tokens:
        dot.check_tokens(config, spec, query.aux)
    run.inputs(pool=pool.hashes, query=query.hashes, control=control and control.hashes,
               candidates=scored.sha, **distributed.layout())  # fmt: skip
    sites = len(targets.features(config, spec))
    matrix_SEE, noted = preconditioner(run.path, settings, pool, query, sites)
    source = scored.source(pool)
    slices = _slices(settings, query)
    folder = folder_of(run, scored, len(slices))
    parts = []
    for number, part in enumerate(slices):
        direction = Direction(None, matrix_SEE)
        if settings.mode != "self":
            query_QD = query_features(part, settings, matrix_SEE)
            if control is not None:
                query_QD = query_QD - query_features(control, settings, matrix_SEE)
            direction = directions(settings, query_QD, matrix_SEE)
        where = folder / f"slice-{number}" if len(slices) > 1 else folder
        parts.append(_fill(where, source, scored, settings, direction))
    own = settings.mode == "self"
    info = {
        "settings": dataclasses.asdict(settings),
        "formula": SELF if own else FORMULAS[settings.convention, settings.unit_norm],
        **noted,
        **aligned("gradient" if settings.tokens else None),
        **about(scored, pool, query, control),
        "seconds": time.monotonic() - began,
    }
    return publish(run, scored, parts, settings.mode, info)


def _slices(settings: Settings, query: Pass) -> list[Pass]:
    """The queries, in as many parts as are held one at a time."""
    if not settings.apart:
        return [query]
    n, width = len(query.rows), targets.width(query.loaded.config, query.spec)
    size = settings.query_batch or max(1, int(LARGEST_QUERY / (4 * width)))
    starts = range(0, n, size)
    return [query.of(query.rows.take(range(start, min(start + size, n)))) for start in starts]


def _fill(
    folder: Path, source: Source, scored: Scored, settings: Settings, direction: Direction
) -> Arrays:
    """One pass over the source, for the queries of one direction."""
    q = (
        ()
        if direction.query_QD is None or settings.mode != "each"
        else direction.query_QD.shape[:1]
    )
    columns: dict[str, tuple[int, ...]] = {"scores": q, "norms": (), "losses": ()}
    tree = None
    if settings.tokens and isinstance(source, Pass):
        columns["token_scores"] = (int(scored.rows.lengths.max()), *q)
        tree = token_directions(source, direction)

    def compute(batch: Any) -> tuple[np.ndarray, Any]:
        tokens_BTQ = None
        if tree is None or not isinstance(source, Pass):
            rows_B, features_BD, losses_B = source.compute(batch)
        else:
            rows_B, arguments = source.inputs(batch)
            features_BD, tokens_BTQ, losses_B = dot.features_and_tokens(
                source.loaded.config, source.execution, source.spec, source.variables, source.aux,
                tree, *arguments,
            )  # fmt: skip
        out = batch_scores(direction, features_BD, tokens_BTQ, settings.mode, settings.unit_norm)
        return rows_B, {**out, "losses": losses_B}

    return fill(folder, source, scored, columns, compute)
