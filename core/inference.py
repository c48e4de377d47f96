"""Running a model over many batches without a gradient."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from core import model, sharding
from core.config import Execution, ModelConfig
from core.model import Variables
from core.rows import Batch, read_ahead

token_losses = jax.jit(model.full_precision(model.token_losses), static_argnums=(0, 1))


def overlapped(batches: Iterable[Any], compute: Callable[[Any], Any]) -> Iterator[Any]:
    """(batch, result on the host) of each batch.

    The device works on one batch while the host deals with the one before.
    """
    waiting: tuple[Any, Any] | None = None
    for batch in batches:
        ahead = (batch, compute(batch))
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
        waiting = ahead
    if waiting is not None:
        yield waiting[0], jax.device_get(waiting[1])


def placer() -> Callable[[Batch], tuple[jax.Array, jax.Array]]:
    """A function that puts a batch's ids and labels on this process's devices, split by rows."""
    where = sharding.over_rows(sharding.local_mesh())
    return lambda batch: (
        sharding.place(batch.ids_BT, where),
        sharding.place(batch.labels_BT, where),
    )


def batch_losses(
    config: ModelConfig, execution: Execution, variables: Variables, batches: Any
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Each batch of a random-access source (see `core.rows.Plan`) with its token losses [B,T]."""
    place = placer()

    def compute(batch: Batch) -> jax.Array:
        return token_losses(config, execution, variables, *place(batch))

    return overlapped(read_ahead(batches), compute)
