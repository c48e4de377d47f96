"""Exact scores and token scores as `attribute score` writes them."""

import numpy as np
import pytest

from attribution import directions, score
from attribution.outputs import Scored, candidates
from attribution.projection import Projection
from attribution.score import Settings
from attribution.store import Pass, Store, build
from attribution.targets import Spec
from core.config import Execution
from core.errors import InputError
from core.files import read_json
from core.rows import load_rows, save_rows
from core.rundir import open_run

SPECS = {
    "plain": Spec(Projection(0)),
    "site": Spec(Projection(4)),
    "global": Spec(Projection(6, target="global")),
}


ADVANTAGE = [1.0, -0.5, 2.0, 0.25, -1.0, 1.5, 0.5, 3.0]


class Scene:
    """A pool, queries and a control, in batches of one shape, so that each pass compiles once."""

    def __init__(self, tiny, folder):
        self.folder, self.number = folder, 0
        self.pool = tiny.rows(
            folder / "pool", [15, 9, 12, 16, 5, 14, 7, 8], seed=1, advantage=ADVANTAGE
        )
        self.query = tiny.rows(folder / "query", [14, 16, 6, 9, 4, 11], seed=2)
        self.control = tiny.rows(folder / "control", [9, 13, 4], seed=3)
        self.passes = {
            name: Pass(tiny.loaded(), self.pool, spec, Execution(layers="scan"), 48)
            for name, spec in SPECS.items()
        }

    def run(self, function, *args, **more) -> dict[str, np.ndarray]:
        self.number += 1
        self.out = self.folder / f"scores{self.number}"
        with open_run(self.out, "attribute score", {}) as run:
            self.summary = function(run, *args, **more)
        return {path.stem: np.load(path) for path in self.out.glob("*.npy")}

    def score(self, settings, spec="site", chosen=None, control=False, pool=None):
        source = self.passes[spec]
        sources = pool or source, source.of(self.query)
        return self.run(score.score, *sources, settings, Scored(self.pool, chosen),
                        source.of(self.control) if control else None)  # fmt: skip

    def exact(self, mode="mean", tokens=None, chosen=None, control=False, query_batch=3):
        source = self.passes["plain"]
        return self.run(
            directions.score_exact, source, source.of(self.query), Scored(self.pool, chosen), mode,
            tokens, query_batch, source.of(self.control) if control else None,
        )  # fmt: skip


@pytest.fixture(scope="module")
def scene(tiny, tmp_path_factory):
    return Scene(tiny, tmp_path_factory.mktemp("scene"))


@pytest.mark.parametrize("mode", ["mean", "each", "max"])
def test_exact_scores_are_those_of_stored_gradients(scene, close, mode):
    expected = scene.score(Settings(mode), "plain")
    found = scene.exact(mode)
    close(found["scores"], expected["scores"])
    close(found["losses"], expected["losses"])
    info = read_json(scene.out / "info.json")
    assert info["settings"]["exact"] and info["queries"] == 6


@pytest.mark.parametrize("mode, side", [("each", "gradient"), ("mean", "loss")])
def test_exact_tokens_add_up(scene, close, mode, side):
    found = scene.exact(mode, side)
    close(found["token_scores"].sum(1), found["scores"])
    close(found["scores"], scene.exact(mode)["scores"])
    past = np.arange(16)[None] >= np.asarray(scene.pool.lengths)[:, None]
    assert found["token_scores"].shape[:2] == (8, 16)
    assert not found["token_scores"][past].any()


@pytest.mark.parametrize("mode, spec", [("mean", "plain"), ("each", "site"), ("mean", "global")])
def test_projected_tokens_add_up(scene, close, mode, spec):
    """Each position's share of the very score, whatever became of the example's gradient."""
    kind = "none" if spec == "plain" else "pool"
    for unit_norm in (False, True):
        settings = Settings(mode, kind, unit_norm=unit_norm, tokens=True)
        found = scene.score(settings, spec)
        close(found["token_scores"].sum(1), found["scores"])
        plain = scene.score(Settings(mode, kind, unit_norm=unit_norm), spec)
        assert plain.keys() == {"scores", "norms", "losses"}
        close(found["scores"], plain["scores"])


def test_contrast_is_the_difference(scene, close):
    for run in (lambda **k: scene.score(Settings(), **k), lambda **k: scene.exact(**k)):
        contrast, query = run(control=True)["scores"], run()["scores"]
        scene.query, scene.control = scene.control, scene.query
        control = run()["scores"]
        scene.query, scene.control = scene.control, scene.query
        close(contrast, query - control)


def test_candidates_have_the_scores_of_the_full_run(scene, close, tmp_path):
    with open_run(tmp_path / "store", "attribute build", {}) as run:
        build(run, scene.passes["site"])
    whole = scene.score(Settings("mean", "pool"))["scores"]
    best = candidates(scene.out, 3, scene.pool)
    assert set(best) == set(np.argsort(-whole)[:3])
    (tmp_path / "rows.txt").write_text("\n".join(map(str, best[::-1])))
    np.testing.assert_array_equal(candidates(tmp_path / "rows.txt", None, scene.pool), best)
    others = np.setdiff1d(np.arange(8), best)
    runs = {
        "pass": lambda: scene.score(Settings("mean", "pool"), chosen=best),
        "store": lambda: scene.score(
            Settings("mean", "pool"), chosen=best, pool=Store(tmp_path / "store")
        ),
        "exact": lambda: scene.exact(chosen=best),
    }
    for name, run in runs.items():
        found = run()["scores"]
        close(found[best], scene.exact()["scores"][best] if name == "exact" else whole[best])
        assert np.isnan(found[others]).all()
        found = run()["scores"]
        assert not (scene.out / "parts").exists()
        assert {line["row"] for line in scene.summary["top"][:3]} == set(best)
    with pytest.raises(InputError, match="must name rows 0 to 7"):
        (tmp_path / "rows.txt").write_text("8")
        candidates(tmp_path / "rows.txt", None, scene.pool)


def test_self_influence_is_the_diagonal(scene, close, monkeypatch):
    for kind in ("none", "pool"):
        own = scene.score(Settings("self", kind))["scores"]
        monkeypatch.setattr(scene, "query", scene.pool)
        square = scene.score(Settings("each", kind))["scores"]
        close(own, np.diag(square))


@pytest.mark.parametrize("mode", ["each", "max"])
def test_slices_of_queries_change_nothing(scene, close, monkeypatch, mode):
    expected = scene.score(Settings(mode))["scores"]
    close(scene.score(Settings(mode, query_batch=3))["scores"], expected)
    monkeypatch.setattr(score, "LARGEST_QUERY", 3 * 4 * 8 * 16)  # as many as fit
    close(scene.score(Settings(mode))["scores"], expected)


def test_killed_exact_run_continues_to_the_same_bytes(scene, monkeypatch):
    expected = scene.exact("mean", "loss")
    count, place = [0], Pass.inputs

    def failing(source, batch):
        count[0] += source.rows is scene.pool
        if count[0] == 3:
            raise KeyboardInterrupt
        return place(source, batch)

    monkeypatch.setattr(Pass, "inputs", failing)
    with pytest.raises(KeyboardInterrupt):
        scene.exact("mean", "loss")
    monkeypatch.setattr(Pass, "inputs", place)
    scene.number -= 1
    for name, values in scene.exact("mean", "loss").items():
        np.testing.assert_array_equal(values, expected[name])


def test_what_does_not_go_together_is_refused(scene):
    refused = {
        "--mode self is <g, H": Settings("self", unit_norm=True),
        "--tokens needs --mode mean or each": Settings("max", tokens=True),
        "notes has its own damping": Settings(convention="notes", inversion="pseudo"),
    }
    for message, settings in refused.items():
        with pytest.raises(InputError, match=message):
            scene.score(settings)
    with pytest.raises(InputError, match="--control is taken off the mean query"):
        scene.score(Settings("each"), control=True)
    with pytest.raises(InputError, match="--control is taken off the mean query"):
        scene.exact("each", control=True)
    with pytest.raises(InputError, match="--projection-dim 0"):
        source = scene.passes["site"]
        scene.run(directions.score_exact, source, source, Scored(scene.pool))


def test_fully_masked_query_is_refused(tiny, tmp_path):
    """Defect 8 of Bergson 2.5.1: a query without a label had NaN as every score of unit length."""
    ids = np.arange(1, 8)
    save_rows(tmp_path / "query", [ids, ids], [ids, np.full(7, -100)])
    with pytest.raises(InputError, match="row 1"):
        load_rows(tmp_path / "query", tiny.config.vocab_size, tiny.config.context)


def test_control_alike_gives_zeros_not_nan(scene):
    """Defect 8 of Bergson 2.5.1: a zero direction of unit length was NaN in every score."""
    scene.control, kept = scene.query, scene.control
    for settings in (Settings(unit_norm=True), Settings(unit_norm=True, convention="notes")):
        assert not scene.score(settings, control=True)["scores"].any()
    scene.control = kept


def test_aggregated_queries_are_one_column(scene):
    """Defect 7 of Bergson 2.5.1: a mean over queries filled the first of Q columns."""
    for settings in (Settings(), Settings("mean", "pool", unit_norm=True), Settings("max")):
        assert scene.score(settings)["scores"].shape == (8,)
    assert scene.exact()["scores"].shape == (8,)
