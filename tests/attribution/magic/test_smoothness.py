"""Metasmoothness against its definition, what it says of optimizers, and what a kill leaves."""

import click.testing
import jax
import numpy as np
import pytest

from attribution.commands.metasmoothness import metasmoothness as command
from attribution.magic.smoothness import agreement, displacement, metasmoothness
from core.checkpoint import save_model
from core.command import Door, Group
from core.files import read_json
from core.rows import load_rows
from training.course import Course
from training.optim import Optim

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")
SGD = Optim("sgd", 0.02, "constant", clip=0)


def flat(params):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(params)])


@pytest.fixture
def course(runs):
    return runs.course("gpt2", SGD)


def test_agreement_by_hand(relative):
    first, middle, last = (np.array(x) for x in ([0.0, 0, 0, 1], [1.0, 1, -1, 1], [3.0, -1, -2, 1]))
    # Of the distances 3, 1, 2, 0 the second turns back.
    assert agreement([(first, middle, last)]) == pytest.approx((3 - 1 + 2) / 6)
    random = np.random.default_rng(0)
    points = random.normal(size=(3, 50))
    d = np.abs(points[2] - points[0])
    expected = d @ (np.sign(points[1] - points[0]) * np.sign(points[2] - points[1])) / d.sum()
    parts = [tuple(points[:, i : i + 20]) for i in range(0, 50, 20)]
    assert relative(agreement(parts), expected) < 1e-14
    assert agreement([(first, first, first)]) is None
    for bad in (np.nan, np.inf):
        assert agreement([(first, np.full(4, bad), last), (first, middle, last)]) is None


def test_it_is_its_definition(course, runs, tmp_path, close):
    found = metasmoothness(course, tmp_path, 0.2, 5)
    v_N = np.random.default_rng([5, 0]).normal(size=len(runs.rows))
    ends = [flat(course.train(w).params) for w in (None, 1 + 0.2 * v_N, 1 + 0.4 * v_N)]
    d = np.abs(ends[2] - ends[0])
    expected = d @ (np.sign(ends[1] - ends[0]) * np.sign(ends[2] - ends[1])) / d.sum()
    close(found["smoothness"], expected, "float64")
    start = flat(course.start().params)
    l2 = np.linalg.norm(ends[0] - start)
    close(found["displacement"]["l2"], l2, "float64")
    close(found["displacement"]["relative"], l2 / np.linalg.norm(start), "float64")
    assert displacement(course, course.train().params) == found["displacement"]
    assert found == read_json(tmp_path / "metasmoothness.json")
    assert not (tmp_path / "ends").exists()
    assert metasmoothness(course, tmp_path, 0.2, 5) == found  # read, not made


def test_gradient_descent_is_smooth_and_adam_without_eps_root_is_less(course, runs, tmp_path):
    found = metasmoothness(course, tmp_path / "sgd")["smoothness"]
    assert found > 0.98
    adam = runs.course("gpt2", Optim("adamw", 0.02, "constant", clip=0, eps_root=0.0))
    rough = metasmoothness(adam, tmp_path / "adam")["smoothness"]
    assert rough < found - 0.05


def test_a_killed_one_goes_on_and_a_known_end_is_not_trained(course, tmp_path, monkeypatch):
    def losses(params):
        return np.array([flat(params).sum(), 2.0])

    whole = metasmoothness(course, tmp_path / "whole", directions=2, losses=losses)
    assert len(whole["directions"]) == 2
    assert whole["smoothness"] == pytest.approx(np.mean(whole["directions"]))
    start, end = course.start().params, course.train().params
    assert whole["query"]["before"] == [flat(start).sum(), 2]
    assert whole["query"]["after"] == [flat(end).sum(), 2]
    assert all(abs(s) == 1 for s in whole["query"]["directions"])  # of one number that moves
    done, train = [], Course.train

    def counted(self, *of):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(of)
        return train(self, *of)

    monkeypatch.setattr(Course, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        metasmoothness(course, tmp_path / "killed", directions=2, losses=losses)
    assert len(list((tmp_path / "killed" / "ends").iterdir())) == 2
    done.clear()
    monkeypatch.setattr(Course, "train", lambda self, *of: done.append(of) or train(self, *of))
    assert metasmoothness(course, tmp_path / "killed", directions=2, losses=losses) == whole
    assert len(done) == 3
    done.clear()
    known = metasmoothness(course, tmp_path / "known", directions=2, base=end, losses=losses)
    assert known == whole and len(done) == 4


def test_what_is_not_finite_has_no_smoothness(course, tmp_path):
    broken = jax.tree.map(lambda x: x * np.nan, course.start().params)
    found = metasmoothness(course, tmp_path, base=broken)
    assert found["smoothness"] is None and found["directions"] == [None]


def test_the_command(runs, tiny, tmp_path):
    with jax.enable_x64(False):
        save_model(tmp_path / "model", tiny.config, tiny.params())
        door = Door(lambda path, _: load_rows(path), lambda *_: None)
        group = Group("attribute")
        group.add_command(command)

        def run(out, *options):
            line = ["metasmoothness", "--model", tmp_path / "model", "--rows", runs.rows.path,
                    "--out", out, "--layers", "scan", *options]  # fmt: skip
            result = click.testing.CliRunner().invoke(group, [str(x) for x in line], obj=door)
            if result.exception is not None and not isinstance(result.exception, SystemExit):
                raise result.exception
            return result

        options = ["--lr", "0.01", "--query", runs.query.path]
        printed = run(tmp_path / "out", *options).stdout
        assert printed.startswith("metasmoothness 0.9") or "metasmoothness 1.0" in printed
        assert "smooth in the weights" in printed and "loss_drop" in printed
        assert "moved_relative" in printed
        found = read_json(tmp_path / "out" / "metasmoothness.json")
        assert found["steps"] == 2 and found["h"] == 0.1
        assert len(found["query"]["after"]) == len(runs.query)
        assert "already done" in run(tmp_path / "out", *options).stdout
        failed = run(tmp_path / "bad", "--accumulate", "3")
        assert failed.exit_code == 2 and not (tmp_path / "bad").exists()
