"""Retrains as they are, but compiled quickly: compiling is what these tests wait for."""

import inspect

import pytest

from attribution.validation.controls import _directions
from core.model import token_losses
from training.step import train_step


@pytest.fixture(scope="session")
def quick(tiny):
    step = tiny.jit(inspect.unwrap(train_step), static_argnames=("recipe",))
    losses = tiny.jit(token_losses, static_argnums=(0, 1))
    directions = tiny.jit(inspect.unwrap(_directions), static_argnums=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.course.train_step", step)
        patch.setattr("core.inference.token_losses", losses)
        patch.setattr("attribution.validation.controls._directions", directions)
        yield
