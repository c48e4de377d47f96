"""Scores are derivatives: against retraining with other weights, in float64; and a killed walk."""

import dataclasses

import jax
import numpy as np
import pytest

from attribution.magic import functional as functionals
from attribution.magic import walk as walks
from core.errors import InputError
from core.files import read_jsonl
from core.rows import IGNORED
from training.optim import Optim

pytestmark = pytest.mark.usefixtures("standard_promotion", "x64")

# At a constant rate, runs of any length share one program.
SGD = Optim("sgd", lr=0.1, schedule="linear", end=0.0, clip=0.0)
ADAMW = Optim(
    "adamw", lr=3e-3, schedule="constant", warmup=2, clip=0.0, eps_root=1e-6, weight_decay=0.1
)
MUON = Optim(
    "muon", lr=3e-3, schedule="polynomial", power=2.0, clip=0.0, eps_root=1e-6, momentum=0.95,
    weight_decay=1.0,
)  # fmt: skip


def change(optim: Optim, **fields) -> Optim:
    return dataclasses.replace(optim, **fields)


# Larger steps make the small random Gemma chaotic, and then differences mean nothing.
EXACT = {
    "sgd, clipped": ("gpt_neox", change(SGD, clip=0.5), {}),
    "sgd, momentum, decay": ("gpt2", change(SGD, momentum=0.9, weight_decay=0.1), {}),
    "adamw": ("gpt2", ADAMW, {}),
    "adamw, all decays, clipped, accumulated": (
        "gemma3",
        change(ADAMW, lr=1e-3, schedule="cosine", weight_decay=1.0, decay=("*",), clip=0.5),
        {"batch": 4, "accumulate": 2},
    ),
    "muon": ("gpt2", MUON, {}),
    "nesterov, adapter with dropout": (
        "gemma3", change(SGD, lr=0.02, momentum=0.9, nesterov=True), {"lora": True}
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_gradient(monkeypatch):
    """The query's gradient does not depend on the optimizer, and is compiled once a model."""
    add = functionals._add

    def plain(recipe, *arrays):
        return add(recipe._replace(optim=SGD, steps=0), *arrays)

    monkeypatch.setattr(functionals, "_add", plain)


def course_of(runs, name, **more):
    family, optim, how = EXACT[name]
    lora = runs.lora if how.get("lora") else None
    return runs.course(family, optim, **{**how, "lora": lora, **more})


@pytest.mark.parametrize("name", EXACT)
def test_scores_are_derivatives_of_retraining(runs, tmp_path, name):
    """In a random direction of all weights, and in that of one token, twice in one batch."""
    course = course_of(runs, name)
    scores_NT = runs.walk(tmp_path, course).go().scores[..., 0]
    one_token, h = np.zeros_like(scores_NT), 1e-5
    one_token[1, 5] = 1
    assert course.settings.batch == 4 or (course.batch(2).rows_B == 1).sum() == 2
    for direction_NT in (np.random.default_rng(0).normal(size=scores_NT.shape), one_token):
        ahead, behind = (
            runs.query_losses(course, runs.trained(course, 1 + sign * h * direction_NT))[0]
            for sign in (1, -1)
        )
        expected = (ahead - behind) / (2 * h)
        assert abs((direction_NT * scores_NT).sum() - expected) <= 1e-6 * abs(expected)


@pytest.fixture(scope="module")
def each(runs, tmp_path_factory):
    """(a course of ten steps, each query's scores with all states kept, one query at a time)."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        course = course_of(runs, "adamw", drawn=28)
        way = {"queries": 1, "save_mode": "all"}
        return course, runs.walk(tmp_path_factory.mktemp("each"), course, "each", **way).go()


@pytest.mark.parametrize(
    "mode, budget", [("all", 0), ("sqrt", 2**32), ("sqrt", 0), ("log", 40_000), ("interval", 0)]
)
def test_what_is_kept_changes_no_bit(runs, each, tmp_path, mode, budget):
    course, expected = each
    way = {"queries": 1, "save_mode": mode, "save_every": 3, "budget": budget}
    walk = runs.walk(tmp_path, course, "each", **way)
    found = walk.go()
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.after_Q, expected.after_Q)
    assert walk.bar.done == walk.bar.total
    assert walk.states.saved == [course.steps]  # of the rest, the last walk leaves nothing
    walk.clear()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_queries_together_are_queries_alone(runs, each, tmp_path, close):
    course, expected = each
    found = runs.walk(tmp_path / "two", course, "each", queries=2).go().scores
    close(found, expected.scores, "float64")
    np.testing.assert_array_equal(found[..., 2], expected.scores[..., 2])
    mean = runs.walk(tmp_path / "mean", course).go()
    share_Q = runs.query.trained / runs.query.trained.sum()
    close(mean.scores[..., 0], expected.scores @ share_Q, "float64")
    close(mean.after_Q[0], expected.after_Q @ share_Q, "float64")


def test_rows_have_their_tokens_sum(runs, each, tmp_path, close):
    course, expected = each
    found = runs.walk(tmp_path, course, "each", queries=1, target="example").go().scores
    assert found.shape == (7, 3)
    close(found, expected.scores.sum(1), "float64")


def test_only_predicted_tokens_have_scores(runs, each):
    scores_NTQ = each[1].scores
    assert scores_NTQ.shape == (7, 12, 3)
    for row, scores_TQ in enumerate(scores_NTQ):
        live_T = np.zeros(12, bool)
        live_T[1 : runs.rows.lengths[row]] = runs.rows.labels(row)[1:] != IGNORED
        assert (scores_TQ[~live_T] == 0).all() and (scores_TQ[live_T] != 0).all()


def test_micro_batches_change_nothing(runs, tmp_path, close):
    name = "sgd, momentum, decay"
    whole, parts = (
        runs.walk(tmp_path / str(n), course_of(runs, name, accumulate=n)).go() for n in (1, 3)
    )
    close(parts.scores, whole.scores, "float64")


def test_a_row_that_is_never_drawn_has_no_score(runs, tmp_path):
    course = course_of(runs, "adamw", drawn=6)
    found = runs.walk(tmp_path, course).go().scores
    drawn = {row for t in range(course.steps) for row in course.batch(t).rows_B.tolist()}
    assert len(drawn) == 6 and {row for row in range(7) if (found[row] != 0).any()} == drawn


def test_what_the_first_pass_tells(runs, each, tmp_path, close):
    """The losses of training, how far it went, and its end."""
    course, found = each
    walk = runs.walk(tmp_path, course)
    final = walk.go().final
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [*range(1, 11)]
    assert [line["lr"] for line in lines[:3]] == [1.5e-3, 3e-3, 3e-3]
    assert sum(line["tokens"] for line in lines) == 4 * runs.rows.trained.sum()
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)
    jax.tree.map(np.testing.assert_array_equal, final.params, runs.trained(course))
    jax.tree.map(np.testing.assert_array_equal, final, found.final)
    start = course.start().params
    close(found.before_Q, runs.query_losses(course, start, "each"), 0.0)
    close(found.after_Q, runs.query_losses(course, final.params, "each"), 0.0)
    moved = jax.tree.map(lambda x, y: float(((x - y) ** 2).sum()), final.params, start)
    close(found.displacement["l2"], sum(jax.tree.leaves(moved)) ** 0.5, "float64")


def test_a_training_in_one_program_is_the_same(runs, close):
    course = runs.course("gpt2", Optim("sgd", 0.02, "constant", clip=0))
    close(course.train().params, runs.trained(course), "float64")
    weights_NT = np.random.default_rng(0).uniform(size=(7, 12))
    close(course.train(weights_NT).params, runs.trained(course, weights_NT), "float64")


class Kills:
    """A process that dies at its n-th call of some function; counts what has been done."""

    def __init__(self, monkeypatch, *places):
        self.calls, self.done, self.deadly = [], [], {}
        for module, name in places:
            monkeypatch.setattr(module, name, self._counted(name, getattr(module, name)))

    def _counted(self, name, function):
        def counted(*arguments, **named):
            self.calls.append(name)
            if self.deadly.get(name) == self.calls.count(name) or (
                self.deadly.get("any") == len(self.calls)
            ):
                if name == "savez":
                    arguments[0].write(b"half of it")
                raise KeyboardInterrupt
            self.done.append(name)
            return function(*arguments, **named)

        return counted

    def go(self, walk, **deadly):
        """What was found, or None when it died."""
        self.calls, self.deadly = [], deadly
        try:
            return walk().go()
        except KeyboardInterrupt:
            return None


@pytest.fixture
def kills(monkeypatch):
    monkeypatch.setattr(walks, "SAVE_SECONDS", 0)
    return Kills(
        monkeypatch, (walks, "forward_step"), (walks, "backward_step"), (np, "savez"),
        (functionals, "gradients"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "deadly",
    [
        {"forward_step": 4},  # in the first pass
        {"forward_step": 14},  # in the replay
        {"backward_step": 15},
        {"gradients": 2},  # between two groups of queries
        {"savez": 3},
    ],
    ids=lambda deadly: " ".join(f"{k} {v}" for k, v in deadly.items()),
)
def test_a_killed_walk_goes_on(runs, each, kills, tmp_path, deadly):
    """To the same bits, and what was done is not done again."""
    course, expected = each

    def walk():
        return runs.walk(tmp_path, course, "each", queries=1)

    assert kills.go(walk, **deadly) is None
    found = kills.go(walk)
    np.testing.assert_array_equal(found.scores, expected.scores)
    jax.tree.map(np.testing.assert_array_equal, found.final, expected.final)
    assert kills.done.count("backward_step") <= 30 + ("savez" in deadly)
    # Kept states that were in memory are made again, of each group once.
    assert kills.done.count("forward_step") <= 10 + walk().again + 3 * 10
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 10


def test_a_walk_that_is_killed_again_and_again_ends(runs, each, kills, tmp_path):
    course, expected = each
    found, deaths = None, -1
    while found is None and deaths < 40:
        deaths += 1
        found = kills.go(lambda: runs.walk(tmp_path, course, "each", queries=1), any=29)
    assert found and 2 < deaths
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert kills.done.count("backward_step") <= 30 + deaths


def test_a_run_that_diverges_names_the_step(runs, each, tmp_path, monkeypatch):
    forward = walks.forward_step

    def overflow(recipe, state, *rest):
        state, *found = forward(recipe, state, *rest)
        params = jax.tree.map(lambda x: x * 1e300 if state.step == 4 else x, state.params)
        return state._replace(params=params), *found

    monkeypatch.setattr(walks, "forward_step", overflow)
    with pytest.raises(InputError, match="loss (nan|inf).* at step 5, it diverges; lower --lr"):
        runs.walk(tmp_path, each[0]).go()
