"""Optimizers and schedules: a frozen description, built into optax inside the jitted step."""

import dataclasses
import difflib
from fnmatch import fnmatchcase
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from core.errors import InputError
from core.schema import Row, put
from training.muon import scale_by_muon


@dataclasses.dataclass(frozen=True)
class Optim:
    """lr rises linearly over `warmup` steps, then follows `schedule` down to `end` * lr.

    weight_decay is decoupled in adamw and muon, coupled in sgd; it falls on what `decay` names,
    globs of Hugging Face names, () = the matrices. clip bounds the global gradient norm (0 = off).
    eps_root is added under Adam's square root and makes the update differentiable. muon is for
    matrices; what is none is left to AdamW (b1, b2, eps, eps_root) at the same learning rate
    (Bergson takes Muon's momentum for that b1). momentum, nesterov: of sgd; Muon has momentum too,
    always Nesterov's, and 0.95 as published.
    power: of `polynomial`. start: share of lr at the first update, which warm-up leads up from to
    reach lr in `warmup` updates; None: lr / warmup, which reaches it one update earlier.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 3e-4
    schedule: Literal["cosine", "linear", "polynomial", "constant"] = "cosine"
    warmup: int = 0
    end: float = 0.1
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    eps_root: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    clip: float = 1.0
    power: float = 1.0
    start: float | None = None
    decay: tuple[str, ...] = ()

    @property
    def linear(self) -> bool:
        """Whether the update is linear in the gradient: its derivative does not depend on it."""
        return self.name == "sgd" and not self.clip

    def check(self, steps: int) -> None:
        if not 0 < self.lr < 100:
            raise InputError(f"--lr must be a positive number, got {self.lr}")
        if not 0 <= self.warmup <= steps:
            raise InputError(f"--warmup {self.warmup} does not fit into {steps} steps")
        if self.start is not None and not (self.warmup and 0 <= self.start <= 1):
            raise InputError(f"--start {self.start} must be a share of --lr, 0 to 1, from which "
                             "--warmup rises; give both or neither")  # fmt: skip
        if not self.power > 0 or (self.power != 1 and self.schedule != "polynomial"):
            raise InputError(f"--power {self.power} must be positive, and is of --schedule "
                             f"polynomial, not of {self.schedule}; leave it out")  # fmt: skip
        if self.momentum and self.name == "adamw":
            raise InputError(f"--momentum {self.momentum} is of sgd and muon; use --beta1 for "
                             "adamw")  # fmt: skip
        if self.nesterov and not (self.momentum and self.name == "sgd"):
            raise InputError("--nesterov goes with --optimizer sgd and a --momentum above 0; leave "
                             "it out")  # fmt: skip


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
    """Step number (from 0) -> learning rate, in float64 where jax has it.

    Without `start`, the first step of a warm-up already moves.
    """
    decay, last = max(steps - optim.warmup, 1), optim.end * optim.lr
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(optim.lr, decay, optim.end),
        "linear": lambda: optax.linear_schedule(optim.lr, last, decay),
        "polynomial": lambda: optax.polynomial_schedule(optim.lr, last, optim.power, decay),
        "constant": lambda: optax.constant_schedule(optim.lr),
    }[optim.schedule]()
    schedule = after
    if optim.warmup:
        if optim.start is None:
            first, rise = optim.lr / optim.warmup, max(optim.warmup - 1, 1)
        else:
            first, rise = optim.start * optim.lr, optim.warmup
        warm = optax.linear_schedule(first, optim.lr, rise)
        schedule = optax.join_schedules([warm, after], [optim.warmup])
    return lambda step: schedule(jnp.asarray(step, float))


def decayed(rows: list[Row], globs: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tree that says which parameters a glob names; without globs the matrices.

    A stacked bias is no matrix. In a name `*` stands for the layer, as all layers are one
    parameter here: `*.mlp.*` is right, a glob of a single layer is an InputError.
    """
    names = [row.hf.format(l="*") for row in rows]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            near = difflib.get_close_matches(glob, names, 3, 0)
            raise InputError(f"--decay {glob!r} names no parameter; the nearest names are "
                             f"{', '.join(near)} (of every layer at once)")  # fmt: skip
    tree: dict[str, Any] = {}
    for row, name in zip(rows, names, strict=True):
        named = any(fnmatchcase(name, glob) for glob in globs)
        put(tree, row.path, named if globs else len(row.shape) >= 2)
    return tree


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """As optax's, but differentiable also where all gradients are zero."""

    def update(grads: Any, _: Any) -> Any:
        norm = jnp.sqrt(jnp.maximum(optax.tree.norm(grads, squared=True), 1e-30))
        return jax.tree.map(lambda g: jnp.where(norm < limit, g, g / norm * limit), grads)

    return optax.stateless(update)


def scale_by_adam(
    b1: float, b2: float, eps: float, eps_root: float
) -> optax.GradientTransformation:
    """As optax's, but differentiable also, without `eps_root`, where all gradients were zero.

    That is so for every word and place that no row had: m / (sqrt(v) + eps) is m / eps there, on
    which v has no influence, while the derivative of sqrt at 0 would make it 0 / 0.
    """
    plain = optax.scale_by_adam(b1, b2, eps, eps_root)

    def direction(m: jax.Array, v: jax.Array) -> jax.Array:
        v = v + eps_root
        counts = v >= jnp.finfo(v.dtype).tiny  # below, sqrt(v) is nothing beside eps
        root = jnp.where(counts, jnp.sqrt(jnp.where(counts, v, 1)), 0)
        return m / (root + eps)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = plain.update(updates, state, params)
        m, v = (
            optax.tree.bias_correction(x, decay, state.count)
            for x, decay in ((state.mu, b1), (state.nu, b2))
        )
        return jax.tree.map(direction, m, v), state

    return optax.GradientTransformation(plain.init, update)


def build(optim: Optim, steps: int, rows: list[Row]) -> optax.GradientTransformation:
    """The optax transformation; `rows` of the parameters say what decays and what is a matrix."""
    rate = learning_rate(optim, steps)
    clip = clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    decay = optax.add_decayed_weights(optim.weight_decay, decayed(rows, optim.decay))
    if optim.name == "sgd":
        momentum = optim.momentum or None
        return optax.chain(clip, decay, optax.sgd(rate, momentum=momentum, nesterov=optim.nesterov))
    direction = scale_by_adam(optim.b1, optim.b2, optim.eps, optim.eps_root)
    if optim.name == "muon":
        kinds: dict[str, Any] = {}
        for row in rows:
            put(kinds, row.path, "matrix" if len(row.shape) == 2 else "other")
        muon = scale_by_muon(optim.momentum)
        direction = optax.partition({"matrix": muon, "other": direction}, kinds)
    return optax.chain(clip, optax.chain(direction, decay, optax.scale_by_learning_rate(rate)))
