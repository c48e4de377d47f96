"""A run as a function of weights: the loop's own run at 1, and nothing of a row at 0."""

import jax
import numpy as np
import pytest

from core import families, schema
from core.checkpoint import Loaded, fingerprint, load_model
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.rows import load_rows, save_rows
from core.rundir import open_run
from training.course import Course
from training.loop import Settings, train
from training.optim import Optim

CONFIG = ModelConfig("gpt2", 23, 12, 8, 2, 2, 12, 4)
SETTINGS = Settings(5, 3, seed=3, drawn=14)
OPTIM = Optim("sgd", 0.1, "constant", clip=0)
SCAN = Execution(layers="scan")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("rows")
    save_rows(folder / "rows", [random.integers(1, 23, n) for n in (12, 7, 12, 9, 12, 10, 5)])
    return load_rows(folder / "rows", 23, 12)


@pytest.fixture(scope="module")
def loaded():
    params = schema.init(families.rows(CONFIG), CONFIG.layers, 0)
    return Loaded(CONFIG, params, None, fingerprint(CONFIG, params))


@pytest.fixture
def course(loaded, rows):
    return Course(loaded, rows, SETTINGS, OPTIM, SCAN)


def test_unit_weights_are_plain_training(course, loaded, rows, tmp_path):
    """Bit for bit, and a start is the caller's own."""
    told = []
    end = course.train(seen=lambda t, metrics: told.append(float(metrics.loss))).params
    with open_run(tmp_path / "run", "train lm", {}) as run:
        run.inputs()
        train(run, CONFIG, loaded.params, rows, SETTINGS, OPTIM, SCAN)
    jax.tree.map(np.testing.assert_array_equal, end, load_model(tmp_path / "run").params)
    assert len(told) == 5 and told[-1] < told[0]
    for weights in (np.ones(7), np.ones((7, 12))):
        jax.tree.map(np.testing.assert_array_equal, end, course.train(weights).params)
    jax.tree.map(np.testing.assert_array_equal, course.start().params, loaded.params)
    course.save(tmp_path / "saved", course.start())
    assert load_model(tmp_path / "saved" / "model").fingerprint == loaded.fingerprint


def test_a_row_without_weight_does_nothing(course, loaded, rows, tmp_path, close):
    """Whatever its tokens are: D counts them all the same."""
    random = np.random.default_rng(1)
    other = [random.integers(1, 23, 7) if i == 1 else rows.ids(i) for i in range(7)]
    save_rows(tmp_path / "rows", other)
    twin = Course(loaded, load_rows(tmp_path / "rows", 23, 12), SETTINGS, OPTIM, SCAN)
    weights_N = np.where(np.arange(7) == 1, 0.0, 1.0)
    weights_NT = np.repeat(weights_N[:, None], 12, 1)
    without = course.train(weights_N).params
    close(twin.train(weights_N).params, without)
    jax.tree.map(np.testing.assert_array_equal, course.train(weights_NT).params, without)
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), course.train().params, without)
    assert max(jax.tree.leaves(moved)) > 1e-3


def test_weights_find_their_rows_and_tokens(course):
    """[N,T] is label-aligned as batches are; an empty row of the last batch weighs nothing real."""
    weights_NT = np.arange(7 * 12).reshape(7, 12) + 1.0
    for t in range(course.steps):
        batch = course.batch(t)
        ids_ABT, labels_ABT, found_ABT = course.arrays(t, weights_NT)
        assert found_ABT.dtype == np.float32
        np.testing.assert_array_equal(ids_ABT[0], batch.ids_BT)
        np.testing.assert_array_equal(labels_ABT[0], batch.labels_BT)
        for place, row in enumerate(batch.rows_B):
            if row >= 0:
                length = batch.ids_BT.shape[1]
                np.testing.assert_array_equal(found_ABT[0, place], weights_NT[row, :length])
    assert batch.rows_B[-1] == -1 and (batch.labels_BT[-1] == -100).all()


def test_what_a_result_depends_on(course, loaded, rows):
    about = course.describe()
    assert about == Course(loaded, rows, SETTINGS, OPTIM, SCAN).describe()
    assert about["model"] == loaded.fingerprint and about["rows"] == rows.sha
    changed = [
        Course(loaded, rows.take(range(6)), Settings(4, 3, seed=3, drawn=12), OPTIM, SCAN),
        Course(loaded, rows, Settings(5, 3, seed=4, drawn=14), OPTIM, SCAN),
        Course(loaded, rows, Settings(5, 3, seed=3, shuffle=False, drawn=14), OPTIM, SCAN),
        Course(loaded, rows, SETTINGS, Optim("sgd", 0.2, "constant", clip=0), SCAN),
        Course(loaded, rows, SETTINGS, OPTIM, Execution(layers="unrolled")),
    ]
    assert all(other.describe() != about for other in changed)


def test_more_steps_than_batches_are_refused(loaded, rows):
    with pytest.raises(InputError, match="--steps 6 are more than the 5 batches"):
        Course(loaded, rows, Settings(6, 3, drawn=14), OPTIM, SCAN)
    with pytest.raises(InputError, match="--accumulate 2"):
        Course(loaded, rows, Settings(5, 3, 2, drawn=14), OPTIM, SCAN)
