"""TRAK (arXiv 2303.14186): sketched gradients of the label's log-odds, whitened by their own Gram.

Dims: N pool rows, Q queries, M sketch.

    score(n, q) = (1 - p_n) phi_n^T G^-1 phi_q / mean |G^-1|,    G = mean_n phi_n phi_n^T + damping

p_n is the mean probability of the row's supervised tokens. Members of an ensemble differ in the
sketch's seed, or are other models; their scores without (1 - p) are averaged, and so is (1 - p).
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution import score
from attribution.curvature import precondition
from attribution.outputs import PARTS, Arrays, Scored, about, fill, publish, together
from attribution.store import Pass
from core import inference
from core.errors import InputError
from core.files import atomic, read_npz
from core.model import loss
from core.rundir import Run


class Member(NamedTuple):
    pool: Pass
    query: Pass


def trak(run: Run, members: Sequence[Member], damping: float, mode: str) -> dict[str, Any]:
    """Score every row of the pool; continues a killed run. Returns `summary.json`."""
    began, first = time.monotonic(), members[0]
    if first.pool.spec.objective.kind != "log-odds":
        raise InputError("TRAK is defined on --objective log-odds; leave --objective out")
    precondition.check_size(first.pool.spec.projection)
    scored = Scored(first.pool.rows)
    run.inputs(members=[[m.pool.hashes, m.query.hashes] for m in members])
    parts = [_member(run, number, member, damping) for number, member in enumerate(members)]
    scores_NQ = np.mean([part["scores"] for part in parts], axis=0)
    doubt_N = np.mean([part["doubt"] for part in parts], axis=0)
    arrays: Arrays = {
        "scores": together(scores_NQ * doubt_N[:, None], mode),
        "losses": np.mean([part["losses"] for part in parts], axis=0).astype(np.float32),
    }
    info = {
        "settings": {"damping": damping, "mode": mode, "members": len(members)},
        "formula": "(1 - p) phi^T G^-1 phi_q / mean|G^-1|",
        **about(scored, first.pool, first.query, None),
        "seconds": time.monotonic() - began,
    }
    return publish(run, scored, [arrays], mode, info)


def _member(run: Run, number: int, member: Member, damping: float) -> Arrays:
    """scores [N,Q] without (1 - p), doubt = 1 - p [N] and losses [N] of one member."""
    folder = run.path / PARTS / f"member-{number}"
    if (done := folder / "done.npz").exists():
        return read_npz(done)
    pool = member.pool
    width = int(np.prod(pool.spec.projection.shape))

    def compute(batch: Any) -> tuple[np.ndarray, Any]:
        rows_B, features_BD, losses_B = pool.compute(batch)
        _, arguments = pool.inputs(batch)
        nll_BT = inference.token_losses(
            pool.loaded.config, pool.execution, pool.variables, *arguments[:2]
        )
        doubt_B = 1 - _mean_probability(nll_BT, arguments[1])
        return rows_B, {"features": features_BD, "doubt": doubt_B, "losses": losses_B}

    columns: dict[str, tuple[int, ...]] = {"features": (width,), "doubt": (), "losses": ()}
    kept = fill(folder, pool, Scored(pool.rows), columns, compute)
    features_ND = kept["features"]
    gram_SEE = jnp.zeros((1, width, width), jnp.float32)
    blocks = range(0, len(features_ND), max(1, 2**24 // width))
    for start in blocks:
        block_BD = jnp.asarray(features_ND[start : start + blocks.step])
        gram_SEE = precondition.add_autocorrelation(gram_SEE, block_BD)
    inverse_SEE = precondition.inverse_power(np.asarray(gram_SEE) / len(features_ND), 1.0, damping)
    query_QD = score.query_features(member.query, score.Settings("each"))
    query_QD = np.asarray(query_QD, np.float32) @ inverse_SEE[0] / np.abs(inverse_SEE).mean()
    scores = [np.asarray(features_ND[start : start + blocks.step]) @ query_QD.T for start in blocks]
    found: Arrays = {
        "scores": np.concatenate(scores),
        "doubt": np.array(kept["doubt"]),
        "losses": np.array(kept["losses"]),
    }
    with atomic(done) as file:
        np.savez(file, **found)  # pyright: ignore[reportArgumentType]
    return found


@jax.jit
def _mean_probability(nll_BT: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Of the supervised tokens of each row."""
    mask_BT = (labels_BT != loss.IGNORED).at[:, 0].set(False)
    total_B = jnp.where(mask_BT, jnp.exp(-nll_BT), 0).sum(1)
    return total_B / jnp.maximum(mask_BT.sum(1), 1).astype(total_B.dtype)
