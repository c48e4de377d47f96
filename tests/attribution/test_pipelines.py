"""Whole methods: against Bergson's, and LESS against its formula."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution.curvature.kronecker import Settings as Fit
from attribution.pipelines import ekfac, less, source, trak
from attribution.pipelines.trajectory import Point, Trajectory
from attribution.projection import Projection
from attribution.store import Pass
from attribution.targets import Spec
from core import adapter, model, safetensors
from core.adapter import Adapter
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError
from core.files import read_json
from core.loss import Objective
from core.rows import pad_batch
from core.rundir import open_run
from training.optim import Optim

PLAIN = Spec(Projection(0))


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "out", "test", {}) as run:
        yield run


@pytest.fixture
def passes(bergson, tmp_path):
    def make(spec):
        pool = Pass(
            bergson.loaded, bergson.rows("train", tmp_path / "train"), spec, Execution(), 96
        )
        return pool, pool.of(bergson.rows("query", tmp_path / "query"))

    return make


@pytest.mark.parametrize("bergson", ["gemma3"], indirect=True)
def test_ekfac(bergson, passes, run, close):
    pool, query = passes(PLAIN)
    settings = ekfac.Settings(Fit(labels="empirical"), mode="each")
    ekfac.ekfac(run, pool, query, pool.rows, settings, None)
    close(np.load(run.path / "scores.npy"), bergson.arrays("scores")["ekfac"], 1e-4)


@pytest.mark.parametrize("bergson", ["gpt2"], indirect=True)
def test_trak(bergson, passes, run, close):
    projection = Projection(32, "bergson-normal", target="global")
    pool, query = passes(Spec(projection, objective=Objective("log-odds")))
    trak.trak(run, [trak.Member(pool, query)], 0.1, "each")
    close(np.load(run.path / "scores.npy"), bergson.arrays("scores")["trak"], 1e-4)
    assert read_json(run.path / "info.json")["settings"]["members"] == 1
    with pytest.raises(InputError, match="log-odds"):
        trak.trak(run, [trak.Member(*passes(Spec(projection)))], 0.1, "each")


@pytest.mark.parametrize("bergson", ["gpt2"], indirect=True)
def test_a_killed_run_continues_to_the_same_bytes(bergson, passes, tmp_path, monkeypatch):
    projection = Projection(4, target="global")
    pool, query = passes(Spec(projection, objective=Objective("log-odds")))
    members = [trak.Member(pool, query)] * 2
    place, count = Pass.inputs, [0]

    def failing(self, batch):
        count[0] += 1
        if count[0] == 5:  # in the second member's first pass over the pool, or so
            raise KeyboardInterrupt
        return place(self, batch)

    found = []
    for name, inputs in (("whole", [place]), ("killed", [failing, place])):
        for each in inputs:
            monkeypatch.setattr(Pass, "inputs", each)
            with open_run(tmp_path / name, "test", {}) as run:
                if each is failing:
                    with pytest.raises(KeyboardInterrupt):
                        trak.trak(run, members, 0.1, "mean")
                    assert not (run.path / "scores.npy").exists()
                else:
                    trak.trak(run, members, 0.1, "mean")
        found.append((tmp_path / name / "scores.npy").read_bytes())
    assert found[0] == found[1]


@pytest.fixture
def checkpoints(bergson, tmp_path):
    """Bergson's four checkpoints as a trajectory, with moments in the layout of parameters."""
    held = bergson.arrays("source")

    def read(number: int, kind: str):
        folder = tmp_path / f"{kind}-{number}"
        folder.mkdir(exist_ok=True)
        shutil.copy(bergson.folder / "model" / "config.json", folder)
        tensors = bergson.parts("source", f"{number}/{kind}")
        safetensors.write(folder / "model.safetensors", tensors)
        return load_model(folder)

    def trajectory(rates) -> Trajectory:
        steps = held["steps"].tolist()

        def at(number: int) -> Point:
            second = read(number, "exp_avg_sq").params
            rate = np.full(2, rates[number // 2])  # two steps from one to the next
            return Point(steps[number], read(number, "params"), None, second, rate)

        optim = Optim(b2=float(held["beta2"]), eps=1e-8)
        return Trajectory(steps, optim, at)

    return trajectory


@pytest.mark.parametrize("name, rates", [("source", "lrs"), ("source_adam", "adam_lrs")])
def test_source(bergson, checkpoints, passes, run, close, name, rates):
    pool, query = passes(PLAIN)
    trajectory = checkpoints(bergson.arrays("source")[rates])

    def make(loaded, rows):
        return Pass(loaded, rows, PLAIN, Execution(), 96)

    settings = source.Settings(2, Fit(labels="empirical"), 0.1, name == "source", "each")
    source.source(run, trajectory, pool.rows, query.rows, make, settings)
    close(-np.load(run.path / "scores.npy"), bergson.arrays("scores")[name], 1e-4)


def test_segments_must_divide_the_checkpoints(bergson, checkpoints, passes, run):
    pool, query = passes(PLAIN)
    settings = source.Settings(3)
    with pytest.raises(InputError, match=r"--segments 3 does not divide the run's 4 checkpoints"):
        source.source(run, checkpoints([0.1, 0.1]), pool.rows, query.rows, pool.of, settings)


def test_less_is_its_formula(tiny, run, tmp_path, close):
    config, spec = tiny.config, adapter.LoraSpec(2, 4.0, ("c_attn", "c_fc"))
    base, optim = tiny.loaded(), Optim(b1=0.9, b2=0.95, eps=1e-8)
    pool, query = (tiny.rows(tmp_path / name, sizes, seed) for name, sizes, seed in
                   (("pool", [9, 7, 12], 0), ("query", [8, 6], 1)))  # fmt: skip
    random = np.random.default_rng(0)
    shapes = adapter.init(spec, config, 0)

    def draw(scale):
        return jax.tree.map(lambda x: np.float32(random.normal(0, scale, x.shape)), shapes)

    points = []
    for step in (3, 6):
        held = base._replace(adapter=Adapter(spec, draw(0.3), base.fingerprint))
        second = jax.tree.map(np.square, draw(0.1))
        points.append(Point(step, held, draw(0.1), second, np.array([1e-3 * step])))
    trajectory = Trajectory([3, 6], optim, lambda number: points[number])
    settings = Spec(Projection(0), loss="mean", adapter=spec)

    def make(loaded, rows):
        return Pass(loaded, rows, settings, Execution(), 64)

    @jax.jit
    @jax.grad
    def derive(factors, ids_1T, labels_1T):
        variables = {"params": base.params, "lora": adapter.collection(spec, config, factors)}
        return model.token_losses(config, Execution(), variables, ids_1T, labels_1T).sum()

    def gradient(factors, rows, i):
        batch = pad_batch(rows, np.array([i]), 12)
        grads = derive(factors, batch.ids_BT, batch.labels_BT)
        return jax.tree.map(lambda g: g / float(rows.trained[i]), grads)

    def flat(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    def unit(x):
        return x / np.linalg.norm(x)

    expected = np.zeros((3, 2))
    for point in points:
        factors = jax.tree.map(jnp.asarray, point.loaded.adapter.factors)
        first, second = flat(point.first), flat(point.second)
        queries = [unit(flat(gradient(factors, query, j))) for j in range(2)]
        for i in range(3):
            g = flat(gradient(factors, pool, i))
            m = (0.9 * first + 0.1 * g) / (1 - 0.9 ** (point.step + 1))
            v = (0.95 * second + 0.05 * g**2) / (1 - 0.95 ** (point.step + 1))
            update = unit(m / (np.sqrt(v) + 1e-8))
            expected[i] += point.rates[0] * np.array([update @ q for q in queries])
    less.less(run, trajectory, pool, query, make, "each")
    close(np.load(run.path / "scores.npy"), expected)
    with pytest.raises(InputError, match="--optimizer adamw"):
        sgd = trajectory._replace(optim=Optim("sgd"))
        less.less(run, sgd, pool, query, make, "each")
