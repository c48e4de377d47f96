"""Optimizers and schedules: a frozen description, built into optax inside the jitted step."""

import dataclasses
from typing import Any, Literal

import optax

from core.errors import InputError
from core.schema import Row, put


@dataclasses.dataclass(frozen=True)
class Optim:
    """lr rises linearly over `warmup` steps, then follows `schedule` down to `end` * lr.

    weight_decay is decoupled and falls on matrices only; clip bounds the global gradient norm
    (0 = off); eps_root is added under Adam's square root and makes the update differentiable.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
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

    def check(self, steps: int) -> None:
        if not 0 < self.lr < 100:
            raise InputError(f"--lr must be a positive number, got {self.lr}")
        if not 0 <= self.warmup <= steps:
            raise InputError(f"--warmup {self.warmup} does not fit into {steps} steps")


def learning_rate(optim: Optim, steps: int) -> optax.Schedule:
    """Step number (from 0) -> learning rate; the first step already moves."""
    decay = max(steps - optim.warmup, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(optim.lr, decay, optim.end),
        "linear": lambda: optax.linear_schedule(optim.lr, optim.end * optim.lr, decay),
        "constant": lambda: optax.constant_schedule(optim.lr),
    }[optim.schedule]()
    if not optim.warmup:
        return after
    first = optim.lr / optim.warmup
    warm = optax.linear_schedule(first, optim.lr, max(optim.warmup - 1, 1))
    return optax.join_schedules([warm, after], [optim.warmup])


def decayed(rows: list[Row]) -> dict[str, Any]:
    """The tree that says which parameters are matrices (a stacked bias is not one)."""
    tree: dict[str, Any] = {}
    for row in rows:
        put(tree, row.path, len(row.shape) >= 2)
    return tree


def build(optim: Optim, steps: int, rows: list[Row]) -> optax.GradientTransformation:
    """The optax transformation; `rows` of the parameters decide where weight decay falls."""
    rate = learning_rate(optim, steps)
    clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    if optim.name == "adamw":
        return optax.chain(
            clip,
            optax.adamw(
                rate,
                b1=optim.b1,
                b2=optim.b2,
                eps=optim.eps,
                eps_root=optim.eps_root,
                weight_decay=optim.weight_decay,
                mask=decayed(rows),
            ),
        )
    decay = optax.add_decayed_weights(optim.weight_decay, decayed(rows))
    momentum = optim.momentum or None
    return optax.chain(clip, decay, optax.sgd(rate, momentum=momentum, nesterov=optim.nesterov))
