"""Where arrays live: one mesh, one table from logical to physical axes.

The mesh has two axes: `data` splits the rows of a batch, `model` splits vocabulary, heads and mlp
of the weights. Every process computes the same global batch and hands its devices their part, so
results do not depend on how many processes there are.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from core.errors import InputError
from core.schema import Row, full_shape, put

RULES: dict[str | None, str | None] = {
    None: None, "embed": None, "vocab": "model", "heads": "model", "mlp": "model",
}  # fmt: skip


def make_mesh(data: int | None = None, model: int = 1) -> Mesh:
    """All devices as data x model; data None = what `model` leaves."""
    devices = jax.device_count()
    if model < 1 or devices % model:
        raise InputError(f"mesh axis 'model' of {model} does not divide {devices} devices")
    data = data or devices // model
    if data * model != devices:
        raise InputError(f"a mesh of {data} x {model} needs {data * model} devices, not {devices}")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def local_mesh() -> Mesh:
    """All devices of this process as `data`, for work whose rows are split over processes."""
    devices = jax.local_devices()
    axes = (AxisType.Auto,) * 2
    return jax.make_mesh((len(devices), 1), ("data", "model"), axes, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def over_rows(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split the given array axis (the batch) over `data`."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "data"))


def parameter_shardings(rows: list[Row], layers: int, mesh: Mesh) -> dict[str, Any]:
    """The tree of shardings of the parameters; an axis that does not divide raises by name."""
    tree: dict[str, Any] = {}
    for row in rows:
        axes = [RULES[axis] for axis in row.axes]
        for name, size in zip(axes, row.shape, strict=True):
            if name is not None and size % mesh.shape[name]:
                raise InputError(
                    f"{row.path}: size {size} does not divide over {mesh.shape[name]} devices of "
                    f"mesh axis {name!r}; choose a divisor"
                )
        axes = [None, *axes] if row.stacked else axes
        assert len(axes) == len(full_shape(row, layers))
        put(tree, row.path, NamedSharding(mesh, PartitionSpec(*axes)))
    return tree


def place(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds in full, onto the mesh."""
    if len(sharding.device_set) == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
