"""Scores against brute force: explicit matrices, numpy float64, formulas written anew.

The reference follows the conventions as published, not the code: TrackStar's two-sided cosine and
the plain influence for `clean`, the one-sided recipe of the research notes for `notes`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import outputs, score, targets
from attribution.outputs import Scored
from attribution.projection import Projection, matrix
from attribution.score import Settings
from attribution.store import Pass, Store, build
from attribution.targets import Spec
from core import model, rows
from core.config import Execution
from core.errors import InputError
from core.files import read_json
from core.rundir import open_run

POOL = [17, 9, 24, 13, 5, 21, 19, 8, 8, 11, 24, 16, 2, 19]
QUERY = [14, 20, 6]
MODES: list[Any] = ["mean", "max", "each"]
PRECONDITIONERS: list[Any] = ["none", "query", "pool", "mixed"]
# float32 gradients and scores; a damped inverse magnifies rounding by its condition number.
TOLERANCE = 5e-5
P = 4
SPEC = Spec(Projection(P, "normal"))


def plain_features(tiny, spec, lengths, seed):
    """Per-example gradients [N,S,E] in float64, formed in full, then multiplied out."""
    with jax.enable_x64(True):
        ids_BT, labels_BT = map(jnp.asarray, tiny.batch(lengths, seed))
        params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny.params())
        plain = tiny.plain_gradients(tiny.config, params, ids_BT, labels_BT)
    parts = []
    for layer in range(tiny.config.layers):
        for site in targets.sites(tiny.config):
            g_NOI = plain[site.path][:, layer]
            if spec.projection.dim:
                name = site.name.format(l=layer)
                left_OP = np.float64(matrix(spec.projection, f"{name}/left", site.outputs))
                right_IP = np.float64(matrix(spec.projection, f"{name}/right", site.inputs))
                g_NOI = left_OP.T @ g_NOI @ right_IP
            parts.append(g_NOI.reshape(len(lengths), -1))
    return np.stack(parts, 1) if spec.projection.dim else np.concatenate(parts, 1)[:, None]


def unit(x_NSE):
    return x_NSE / np.sqrt((x_NSE**2).sum((1, 2), keepdims=True))


def mixture(settings, query_SEE, pool_SEE):
    """TrackStar's A.1.3 for `clean`: equal at the given eigenvalue of all sites together."""
    if settings.convention == "notes":
        return 0.99 * query_SEE + 0.01 * pool_SEE
    query, pool = (np.sort(np.linalg.eigvalsh(h).ravel())[-settings.mix_components]
                   for h in (query_SEE, pool_SEE))  # fmt: skip
    share = pool / (query + pool)
    return share * query_SEE + (1 - share) * pool_SEE


def brute_force(settings: Settings, g_NSE: np.ndarray, q_QSE: np.ndarray) -> np.ndarray:
    """Scores [N,Q] or [N] by the definition."""

    def second_moment(x_NSE):
        return np.stack([x_NSE[:, s].T @ x_NSE[:, s] / len(x_NSE) for s in range(x_NSE.shape[1])])

    def inner(a_NSE, b_QSE):
        return a_NSE.reshape(len(a_NSE), -1) @ b_QSE.reshape(len(b_QSE), -1).T

    hessian = {
        "none": lambda: None,
        "query": lambda: second_moment(q_QSE),
        "pool": lambda: second_moment(g_NSE),
        "mixed": lambda: mixture(settings, second_moment(q_QSE), second_moment(g_NSE)),
    }[settings.preconditioner]()  # fmt: skip
    size, clean = g_NSE.shape[-1], settings.convention == "clean"

    def damped(h_EE):
        mean = np.linalg.eigvalsh(h_EE).mean() if clean else np.abs(h_EE).mean()
        return h_EE + settings.damping * mean * np.eye(size)

    def solve(x_NSE):
        """(H + lambda)^-1 x"""
        if hessian is None:
            return x_NSE
        return np.stack([np.linalg.solve(damped(h), x_NSE[:, s].T).T
                         for s, h in enumerate(hessian)], 1)  # fmt: skip

    def whiten(x_NSE):
        """A x with A^T A = (H + lambda)^-1; any such A gives the same inner products."""
        if hessian is None:
            return x_NSE
        return np.stack([np.linalg.solve(np.linalg.cholesky(damped(h)), x_NSE[:, s].T).T
                         for s, h in enumerate(hessian)], 1)  # fmt: skip

    if clean and settings.unit_norm:
        each_NQ = inner(unit(whiten(g_NSE)), unit(whiten(q_QSE)))
        return {"mean": each_NQ.mean(1), "max": each_NQ.max(1), "each": each_NQ}[settings.mode]
    if settings.unit_norm:
        q_QSE = unit(q_QSE)
    if settings.mode == "mean":
        q_QSE = q_QSE.mean(0, keepdims=True)
    q_QSE = solve(q_QSE)
    if settings.unit_norm:
        g_NSE, q_QSE = unit(g_NSE), unit(q_QSE)
    each_NQ = inner(g_NSE, q_QSE)
    return {"mean": each_NQ[:, 0], "max": each_NQ.max(1), "each": each_NQ}[settings.mode]


class Scene:
    """A pool, a query and the model, on disk and by the definition."""

    def __init__(self, tiny, folder, spec):
        self.tiny, self.folder, self.spec = tiny, folder, spec
        self.pool_rows = tiny.rows(folder / "pool", POOL, seed=1)
        self.query_rows = tiny.rows(folder / "query", QUERY, seed=2)
        self.g_NSE = plain_features(tiny, spec, POOL, 1)
        self.q_QSE = plain_features(tiny, spec, QUERY, 2)
        self.number = 0

    def source(self, rows, loaded=None):
        return Pass(loaded or self.tiny.loaded(), rows, self.spec, Execution(layers="scan"), 72)

    def store(self):
        if not (self.folder / "store").exists():
            with open_run(self.folder / "store", "attribute build", {}) as run:
                build(run, self.source(self.pool_rows))
        return Store(self.folder / "store")

    def score(self, settings, pool=None, query=None, chosen=None, control=None) -> np.ndarray:
        self.number += 1
        folder = self.folder / f"scores{self.number}"
        with open_run(folder, "attribute score", {}) as run:
            pool = pool or self.source(self.pool_rows)
            query = query or self.source(self.query_rows)
            scored = Scored(self.pool_rows, chosen)
            score.score(run, pool, query, settings, scored, control)
        self.out = folder
        return np.load(folder / "scores.npy")


@pytest.fixture(scope="module", autouse=True)
def one_shape():
    """All batches of 3 rows and 24 tokens, so that a pass compiles once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "bucket", lambda length, longest: 24)
        yield


@pytest.fixture(scope="module")
def scene(tiny, tmp_path_factory):
    return Scene(tiny, tmp_path_factory.mktemp("scene"), SPEC)


@pytest.fixture(scope="module")
def unprojected(tiny, tmp_path_factory):
    return Scene(tiny, tmp_path_factory.mktemp("unprojected"), Spec(Projection(0)))


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_the_definition(scene, relative, mode, preconditioner):
    for unit_norm, convention in itertools.product((False, True), ("clean", "notes")):
        settings = Settings(mode, preconditioner, 0.1, unit_norm, convention, mix_components=20)
        expected = brute_force(settings, scene.g_NSE, scene.q_QSE)
        found = scene.score(settings, scene.store())
        assert found.dtype == np.float32
        assert relative(found, expected) < TOLERANCE, settings
        assert read_json(scene.out / "info.json")["sign"].startswith("positive = proponent")
        if unit_norm:
            assert np.abs(found).max() <= 1 + 1e-6


@pytest.mark.parametrize("settings", [
    Settings(), Settings("each", "mixed", 0.1, True, mix_components=20),
    Settings("max", "pool", 0.3, True, "notes"),
], ids=["mean", "each-mixed", "max-pool-notes"])  # fmt: skip
def test_store_and_pass_score_alike(scene, relative, settings):
    """The very same features: only the batches of the inner products differ."""
    stored = scene.score(settings, scene.store())
    computed = scene.score(settings)
    assert relative(stored, computed) < 1e-6
    norms_N = np.sqrt((scene.g_NSE**2).sum((1, 2)))
    assert relative(np.load(scene.out / "norms.npy"), norms_N) < 1e-5


@pytest.mark.parametrize("unit_norm", [False, True])
def test_unprojected_scores_are_exact(unprojected, relative, unit_norm):
    scene = unprojected
    for mode in MODES:
        settings = Settings(mode, "none", 0.1, unit_norm)
        expected = brute_force(settings, scene.g_NSE, scene.q_QSE)
        assert relative(scene.score(settings), expected) < 1e-5
    for preconditioner in PRECONDITIONERS[1:]:
        with pytest.raises(InputError, match="--projection-dim between 1 and 64"):
            scene.score(Settings("mean", preconditioner))


def test_positive_scores_are_proponents(tiny, unprojected):
    """A small step along a row's gradient lowers the query's loss by lr times the score."""
    full, found = unprojected, unprojected.score(Settings())
    ids_BT, labels_BT = map(jnp.asarray, tiny.batch(QUERY, 2))
    rate, losses = 1e-6, []
    for row in (int(found.argmax()), int(found.argmin())):
        with jax.enable_x64(True):
            params = jax.tree.map(lambda x: x.astype(jnp.float64), tiny.params())
            flat = full.g_NSE[row, 0]
            for f in targets.features(tiny.config, full.spec):
                _, layer, *name = f.name.split(".")
                g_OI = flat[f.offset : f.offset + f.shape[0] * f.shape[1]].reshape(f.shape)
                site = params["blocks"]["_".join(name)]
                site["w"] = site["w"].at[int(layer)].add(-rate * g_OI.T)
            after, before = (mean_loss(tiny, p, ids_BT, labels_BT) for p in (params, tiny.params()))
        losses.append((before - after) / rate)
    np.testing.assert_allclose(losses, [found.max(), found.min()], rtol=1e-3)
    assert losses[0] > 0 > losses[1]


def mean_loss(tiny, params, ids_BT, labels_BT) -> float:
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    execution = Execution("float64")
    losses = tiny.jit(model.token_losses, static_argnums=(0, 1))
    loss_BT = losses(tiny.config, execution, {"params": params}, ids_BT, labels_BT)
    return float(loss_BT.sum()) / len(ids_BT)


def test_tiny_gradients_have_unit_length_too():
    """Squares below 1e-38 are zero in float32: a norm of them would divide by nothing."""
    x_BD = jnp.array([[3e-25, 4e-25], [0, 0], [3, -4], [3e25, 4e25]], jnp.float32)
    expected = [[0.6, 0.8], [0, 0], [0.6, -0.8], [0.6, 0.8]]
    np.testing.assert_allclose(score._unit(x_BD), expected, rtol=1e-6)


@pytest.mark.parametrize("settings", [Settings(), Settings("each"), Settings("mean", "query")],
                         ids=["mean", "each", "preconditioned"])  # fmt: skip
def test_query_without_a_gradient_is_refused_by_row(scene, monkeypatch, settings):
    query = scene.source(scene.query_rows)
    compute = query.compute

    def dead(batch):
        out = compute(batch)
        alive_B1 = (batch.rows_B != 2)[:, None].astype(np.float32)
        return out._replace(features_BD=out.features_BD * alive_B1)

    monkeypatch.setattr(query, "compute", dead)
    with pytest.raises(InputError, match="query row 2 has a zero gradient; drop it"):
        scene.score(settings, scene.store(), query)


def test_gradients_that_are_not_finite_are_refused(scene, tiny):
    loaded = tiny.loaded()
    embed = loaded.params["embed"]
    embed["wte"] = embed["wte"].at[:, 0].set(np.inf)
    with pytest.raises(InputError, match="query row . has a gradient that is not finite"):
        scene.score(Settings(), None, scene.source(scene.query_rows, loaded))
    with pytest.raises(InputError, match="pool row .* has a gradient that is not finite"):
        scene.score(Settings(), scene.source(scene.pool_rows, loaded))
    with pytest.raises(InputError, match="pool row has a gradient that is not finite"):
        scene.score(Settings("mean", "pool"), scene.source(scene.pool_rows, loaded))


def test_done_batches_are_not_scored_again(scene, monkeypatch):
    """A run that was stopped goes on behind its journal, to the same bytes."""
    expected = scene.score(Settings())
    first = scene.source(scene.pool_rows)
    compute, left = first.compute, [3]

    def failing(batch):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return compute(batch)

    write = outputs.FilledArray.write

    def flushed(self, rows_B: Any, values: Any) -> None:
        write(self, rows_B, values)
        self.flush()

    monkeypatch.setattr(outputs.FilledArray, "write", flushed)
    monkeypatch.setattr(first, "compute", failing)
    with pytest.raises(KeyboardInterrupt):
        scene.score(Settings(), first)
    done = read_json(scene.folder / f"scores{scene.number}" / "scores.journal.json")["batches"]
    assert done == 2  # the third was computed, but not yet written
    second, seen = scene.source(scene.pool_rows), []
    compute = second.compute
    monkeypatch.setattr(second, "compute", lambda batch: seen.append(batch) or compute(batch))
    scene.number -= 1
    np.testing.assert_array_equal(scene.score(Settings(), second), expected)
    assert len(seen) == len(second.plan) - done
