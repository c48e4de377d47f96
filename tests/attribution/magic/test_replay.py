"""Every state comes back as it was, whatever is kept, where it lies and who was killed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution.magic.replay import Counted, Kept, Replay, Scheme, States, cost, size_of
from training.step import State

MODES = [("all", 1), ("sqrt", 1), ("log", 1), ("interval", 1), ("interval", 4), ("interval", 99)]


class Toy:
    """A run whose state before step t is known; counts its steps."""

    def __init__(self, steps, dtype=np.float64):
        self.again, self.states = [], [self.start(dtype)]
        for t in range(steps):
            self.states.append(self.advance(t, self.states[-1])[0])
        self.again.clear()

    def start(self, dtype=np.float64):
        params = {"a": np.arange(1, 7, dtype=dtype).reshape(2, 3) / 7, "b": np.ones((), dtype)}
        step: Any = np.zeros((), np.int32)
        return State(step, params, (np.int32(5), np.zeros(4, dtype)))

    def advance(self, t, state):
        assert int(state.step) == t
        self.again.append(t)
        state = jax.device_get(state)
        params = {"a": np.sin(3 * state.params["a"]), "b": state.params["b"] * 1.5}
        count, moment = state.opt_state
        moment = moment + params["a"][0, 0]
        grads = {name: leaf + np.float32(t) for name, leaf in state.params.items()}
        return State(state.step + 1, params, (count + 2, moment)), grads, None


def same(one, other):
    leaves, structure = jax.tree.flatten(one)
    others, expected = jax.tree.flatten(other)
    assert structure == expected
    for leaf, wanted in zip(leaves, others, strict=True):
        assert leaf.dtype == wanted.dtype and np.asarray(leaf).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("mode, every", MODES)
def test_every_state_comes_back(mode, every, needs_gradient):
    """Twice, as for two groups of queries, at the cost foretold."""
    for steps in range(1, 41):
        toy, counted, replayed = Toy(steps), Counted(), []
        scheme = Scheme.of(mode, steps, every)
        replay = Replay(scheme, counted, lambda t=toy: t.states[0], toy.advance, needs_gradient)
        same(replay.first(0, toy.states[0], lambda *_: None), toy.states[-1])
        assert toy.again == list(range(steps))
        toy.again.clear()
        for ended in (False, True):
            for t in reversed(range(steps)):
                state, grads = replay.back(t, replayed.append)
                same(state, toy.states[t])
                if needs_gradient:
                    assert grads is not None and grads["b"] == toy.states[t].params["b"] + t
                replay.forget(t, ended)
        assert not counted.kept and toy.again == replayed
        assert cost(scheme, needs_gradient, 2) == (len(replayed), counted.most)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_the_cost_of_every_way(needs_gradient):
    """What the module promises, of any number of steps; a gradient that was not kept costs one."""
    for steps in range(1, 41):
        counts = {m: cost(Scheme.of(m, steps), needs_gradient) for m in ("all", "sqrt", "log")}
        gradients = needs_gradient * steps
        assert counts["all"] == (0, steps)
        again, most = counts["sqrt"]
        assert again <= steps + gradients and most <= 2 * math.sqrt(steps) + 2
        again, most = counts["log"]
        log = math.log2(steps)
        assert again <= steps * log / 2 + gradients and most <= 2 * log + 3


def states_of(folder, budget, toy):
    like = jax.tree.map(jnp.asarray, toy.states[0])
    return States(folder, budget, like)


@pytest.fixture
def toy(x64):
    return Toy(12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("budget", ["all", "some", "none"])
def test_states_are_the_same_from_memory_and_disk(x64, tmp_path, dtype, budget):
    toy = Toy(6, dtype)
    kept = [
        Kept(state, toy.advance(t, state)[1] if t % 2 else None)
        for t, state in enumerate(toy.states[:6])
    ]
    each = size_of(kept[1])
    states = states_of(tmp_path, {"all": 2**20, "some": 3 * each, "none": 0}[budget], toy)
    for t, value in enumerate(kept):
        states.put(t, jax.tree.map(jnp.asarray, value))
        assert states.used <= states.budget
    assert states.steps == {*range(6)}
    assert {"all": 0, "some": 2, "none": 6}[budget] == len(states.saved)
    assert sorted(tmp_path.iterdir()) == sorted(tmp_path / f"{t}.npz" for t in states.saved)
    for t, value in enumerate(kept):
        same(states[t], value)
        assert isinstance(states[t].state.step, jax.Array)
    # Another process sees what is on the disk, and nothing of what a kill has cut short.
    (tmp_path / ".9.npz.x.tmp").write_bytes(b"half")
    other = states_of(tmp_path, 0, toy)
    assert other.saved == states.saved and other.steps == {*states.saved}
    for t in other.saved:
        same(other[t], kept[t])
    for t in range(6):
        states.drop(t)
    assert not states.steps and not list(tmp_path.glob("*.npz")) and states.used == 0
    states.drop(3)  # of what is not there


def test_a_state_can_be_put_again_and_saved(toy, tmp_path):
    states = states_of(tmp_path, 2**20, toy)
    for value in (toy.states[3], toy.states[5]):
        states.put(3, Kept(value, None))
    assert states.used == size_of(toy.states[5]) and not states.saved
    same(states[3].state, toy.states[5])
    states.save(4, Kept(toy.states[4], None))
    assert states.saved == [4] and states.used == size_of(toy.states[5])


@pytest.mark.parametrize("mode, every", MODES)
def test_a_killed_walk_finds_its_states(toy, tmp_path, mode, every):
    """With nothing in memory; the rest is walked from what lies on the disk."""
    scheme = Scheme.of(mode, 12, every)
    for stop in (7, 0):
        states = states_of(tmp_path, 0, toy)
        replay = Replay(scheme, states, lambda: toy.states[0], toy.advance, True)
        if stop:
            replay.first(0, toy.states[0], lambda *_: None)
        toy.again.clear()
        for t in reversed(range(stop, 12 if stop else 7)):
            state, grads = replay.back(t)
            same(state, toy.states[t])
            assert grads is not None and grads["b"] == toy.states[t].params["b"] + t
            replay.forget(t, True)
    assert not list(tmp_path.iterdir())
