"""The states of a training run from last to first, of which only some are kept.

A step is a function of the state before it, so a state that was not kept is made again from one
that was: the same program on the same arrays, bit for bit. What is kept while moving from a kept
state over n steps:

    all        every state                                      no step is run twice
    sqrt       every sqrt(T)-th, and all of the last stretch    2 sqrt(T) states, T further steps
    interval   the same with another distance
    log        those that halve what is left                    log2(T) states, T log2(T) / 2 steps

(Griewank and Walther 2000; REPLAY of arXiv 2503.13751 is the tree in general.) Kept states are in
memory as long as they fit a budget, else on disk. Where the optimizer's derivative needs the
step's gradient it is kept with the state, so that no step need be run a third time for it.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from core.files import atomic, read_npz
from core.schema import Params
from training.step import State

SaveMode = Literal["all", "sqrt", "log", "interval"]


class Kept(NamedTuple):
    """The state before a step, and the step's gradient if it was kept."""

    state: State
    grads: Params | None


class Scheme(NamedTuple):
    """What is kept of a run of `steps`; every: of `interval`, and found for `sqrt`."""

    mode: SaveMode
    steps: int
    every: int

    @classmethod
    def of(cls, mode: SaveMode, steps: int, every: int = 1) -> "Scheme":
        return cls(mode, steps, math.isqrt(steps - 1) + 1 if mode == "sqrt" else every)

    def kept(self, start: int, stop: int) -> set[int]:
        """Steps in [start, stop) whose states are kept while moving over them from `start`."""
        if self.mode == "all":
            return set(range(start, stop))
        if self.mode == "log":
            found = {start}
            while start + 1 < stop:
                start = (start + stop + 1) // 2 if start + 2 < stop else start + 1
                found.add(start)
            return found
        last = (stop - 1) // self.every * self.every  # the last stretch is walked first
        return {t for t in range(start, stop) if t % self.every == 0 or t >= last}


class States:
    """Kept states by step: in memory up to `budget` bytes, else files in `folder`.

    like: a state of the run, for the structure and the places of arrays on devices. What a killed
    run left in the folder is there again.
    """

    def __init__(self, folder: Path, budget: int, like: State):
        self.folder, self.budget, self.used = folder, budget, 0
        self._structure = jax.tree.structure(like)
        self._where = jax.tree.map(lambda x: x.sharding, like)
        self._held: dict[int, tuple[Kept, int]] = {}
        self._disk = {int(file.stem): file for file in folder.glob("*.npz")}

    @property
    def steps(self) -> set[int]:
        return {*self._held, *self._disk}

    @property
    def saved(self) -> list[int]:
        """Those on disk, in order."""
        return sorted(self._disk)

    def __getitem__(self, t: int) -> Kept:
        """On the devices."""
        if t in self._held:
            state, grads = self._held[t][0]
        else:
            arrays = read_npz(self._disk[t])
            leaves = [arrays[f"s{i}"] for i in range(self._structure.num_leaves)]
            state, grads = self._structure.unflatten(leaves), None
            if "g0" in arrays:
                structure = jax.tree.structure(state.params)
                leaves = [arrays[f"g{i}"] for i in range(structure.num_leaves)]
                grads = structure.unflatten(leaves)
        if grads is not None:
            grads = jax.tree.map(jax.device_put, grads, self._where.params)
        return Kept(jax.tree.map(jax.device_put, state, self._where), grads)

    def put(self, t: int, kept: Kept) -> None:
        size = size_of(kept)
        if t in self._held:
            self.used -= self._held.pop(t)[1]
        if self.used + size > self.budget:
            self.save(t, kept)
        else:
            self._held[t] = (jax.device_get(kept), size)
            self.used += size

    def save(self, t: int, kept: Kept) -> None:
        """On disk, whatever the budget."""
        parts = {"s": kept.state} if kept.grads is None else {"s": kept.state, "g": kept.grads}
        arrays = {
            f"{name}{i}": np.asarray(leaf)
            for name, part in parts.items()
            for i, leaf in enumerate(jax.tree.leaves(part))
        }
        file = self.folder / f"{t}.npz"
        with atomic(file) as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
        self._disk[t] = file

    def drop(self, t: int) -> None:
        if t in self._held:
            self.used -= self._held.pop(t)[1]
        if t in self._disk:
            self._disk.pop(t).unlink()


def size_of(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


class Replay:
    """A run of T steps that gives back the state before any of them.

    advance: (step, state before it) -> (state after it, its gradient or None, metrics).
    """

    def __init__(
        self,
        scheme: Scheme,
        states: "States | Counted",
        start: Callable[[], State],
        advance: Callable[[int, State], tuple[State, Params | None, Any]],
        needs_gradient: bool,
    ):
        self.scheme, self.states, self.start = scheme, states, start
        self.advance, self.needs_gradient = advance, needs_gradient
        self.held = scheme.kept(0, scheme.steps)  # by the first pass, until `forget`

    def first(self, t: int, state: State, seen: Callable[[int, State, Any], None]) -> State:
        """From the state before step t to the end; `seen` is told the state after each step."""
        for s in range(t, self.scheme.steps):
            state, metrics = self._over(s, state, s in self.held)
            seen(s, state, metrics)
        return state

    def back(self, t: int, replayed: Callable[[int], None] = lambda t: None) -> Kept:
        """The state before step t, and its gradient if that is needed.

        replayed: is told of each step that had to be run again.
        """
        begin = max((s for s in self.states.steps if s <= t), default=0)
        if begin not in self.states.steps:
            self.states.put(0, Kept(self.start(), None))
        found = self.states[begin]
        if begin == t and (found.grads is not None or not self.needs_gradient):
            return found
        keep, state = self.scheme.kept(begin, t + 1), found.state
        for s in range(begin, t):
            state, _ = self._over(s, state, s in keep)
            replayed(s)
        if not self.needs_gradient:
            return Kept(state, None)
        _, grads, _ = self.advance(t, state)
        replayed(t)
        return Kept(state, grads)

    def forget(self, t: int, ended: bool) -> None:
        """Step t is dealt with; ended: nobody walks over the run again."""
        if ended or t not in self.held:
            self.states.drop(t)

    def _over(self, s: int, state: State, keep: bool) -> tuple[State, Any]:
        after, grads, metrics = self.advance(s, state)
        if keep:
            self.states.put(s, Kept(state, grads if self.needs_gradient else None))
        return after, metrics


class Counted:
    """Stands for `States` and counts what would be kept."""

    def __init__(self) -> None:
        self.kept: dict[int, Kept] = {}
        self.most = 0

    @property
    def steps(self) -> set[int]:
        return set(self.kept)

    def __getitem__(self, t: int) -> Kept:
        return self.kept[t]

    def put(self, t: int, kept: Kept) -> None:
        self.kept[t] = kept
        self.most = max(self.most, len(self.kept))

    def drop(self, t: int) -> None:
        self.kept.pop(t, None)


def cost(scheme: Scheme, needs_gradient: bool, walks: int = 1) -> tuple[int, int]:
    """(steps run again in all, most states kept at once) of walking back so many times."""
    counted, again = Counted(), 0
    nothing: Any = ()  # of a state

    def advance(t: int, state: Any) -> tuple[Any, Any, None]:
        return nothing, nothing, None

    def replayed(t: int) -> None:
        nonlocal again
        again += 1

    replay = Replay(scheme, counted, lambda: nothing, advance, needs_gradient)
    replay.first(0, nothing, lambda *_: None)
    for walk in range(walks):
        for t in reversed(range(scheme.steps)):
            replay.back(t, replayed)
            replay.forget(t, walk == walks - 1)
    return again, counted.most
