"""One row per parameter; everything else is derived from the rows.

A row says where a parameter lives in our tree, its shape, its logical axes, its name and layout in
a Hugging Face file, how it starts, and whether it is an attribution site. Initialisation,
conversion in both directions, sharding and the list of sites follow from it. A row whose file name
holds `{l}` stands for one tensor per layer, stacked on a leading axis in our tree.
"""

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from core.errors import InputError

Params = dict[str, Any]
Matrix = tuple[int, int]


class Row(NamedTuple):
    """One parameter.

    path: place in the tree, `blocks/mlp_c_fc/w`. shape: ours, without the layer axis.
    axes: a logical axis name or None for each dimension of `shape`, for sharding.
    hf: tensor name in a Hugging Face file. transpose: the file holds the transposed matrix.
    init: standard deviation of a normal start, or `zeros`, or `ones`.
    site: Hugging Face module name, relative to the base model, of the linear map it belongs to.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    hf: str
    transpose: bool = False
    init: float | str = 0.02
    site: str | None = None

    @property
    def stacked(self) -> bool:
        return "{l}" in self.hf


class Site(NamedTuple):
    """A linear map of the blocks: where it is, what others call it, and its size."""

    path: str
    name: str
    inputs: int
    outputs: int
    bias: bool


def full_shape(row: Row, layers: int) -> tuple[int, ...]:
    return (layers, *row.shape) if row.stacked else row.shape


def put(tree: Params, path: str, value: Any) -> None:
    *folders, leaf = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[leaf] = value


def get(tree: Params, path: str) -> Any:
    for key in path.split("/"):
        tree = tree[key]
    return tree


def init(rows: Iterable[Row], layers: int, seed: int) -> Params:
    """Random float32 parameters; each row draws from its own stream, named by its path."""
    root = jax.random.key(seed)
    params: Params = {}
    for row in rows:
        shape = full_shape(row, layers)
        if isinstance(row.init, str):
            value = {"zeros": jnp.zeros, "ones": jnp.ones}[row.init](shape, jnp.float32)
        else:
            key = jax.random.fold_in(root, zlib.crc32(row.path.encode()))
            value = row.init * jax.random.normal(key, shape, jnp.float32)
        put(params, row.path, value)
    return params


def abstract(rows: Iterable[Row], layers: int) -> Params:
    """The tree's shapes and dtypes, without memory."""
    params: Params = {}
    for row in rows:
        put(params, row.path, jax.ShapeDtypeStruct(full_shape(row, layers), jnp.float32))
    return params


def check(rows: Iterable[Row], layers: int, tree: Any, where: str) -> None:
    """Raise InputError unless the tree's leaves are the rows' parameters, in their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(x.shape) for p, x in leaves}
    wanted = {row.path: full_shape(row, layers) for row in rows}
    for path in sorted(found.keys() | wanted.keys()):
        if found.get(path) != wanted.get(path):
            raise InputError(
                f"{where}: parameter {path!r} has shape {found.get(path)}, the config asks for "
                f"{wanted.get(path)} (None: no such parameter); take both from one model"
            )


def sites(rows: Iterable[Row]) -> list[Site]:
    """The linear maps of the blocks, in schema order; a name holds `{l}` for the layer."""
    rows = list(rows)
    biased = {row.site for row in rows if row.path.endswith("/b")}
    return [
        Site(row.path.removesuffix("/w"), row.site, *cast(Matrix, row.shape), row.site in biased)
        for row in rows
        if row.site is not None and row.path.endswith("/w")
    ]
