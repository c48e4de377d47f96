"""Second moments of an optimizer, by which gradients are divided before all else.

Dims: L layers, I inputs, O outputs of a matrix.

A gradient in the optimizer's own units, so that a step counts by how far it moves a parameter:

    Adam       G_oi / (sqrt(v_oi) + 1e-8)
    Adafactor  G_oi sqrt(mean(r)) / sqrt((r_o + 1e-30) (c_i + 1e-30)), bias g_o / sqrt(v_o + 1e-8)

as TrackStar (arXiv 2410.17413) has them and Bergson computes them: v is taken as the optimizer
keeps it, without bias correction. Adafactor's two scales belong to g and x, so that G need not be
formed. Moments come from a run of ours or from a file under Hugging Face's parameter names, in the
layout in which a model's file holds the parameter; which way a matrix lies is never guessed.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution.targets import EMBEDDING, HEAD, Target
from core import adapter as adapters
from core import families, safetensors, schema
from core.config import ModelConfig
from core.errors import InputError
from core.files import PathLike, read_npz
from core.hf.convert import slots

Kind = Literal["adam", "adafactor"]
FULL, ROW, COLUMN = "exp_avg_sq", "exp_avg_sq_row", "exp_avg_sq_col"
PICKLES = (".pt", ".pth", ".bin", ".pkl")
ADAM_EPS, FACTOR_EPS, BIAS_EPS = 1e-8, 1e-30, 1e-8


class Adam(NamedTuple):
    """v: second moments by sink, [L,O,I], or [L,O,I+1] with the bias last."""

    v: dict[str, np.ndarray]


class Adafactor(NamedTuple):
    """By sink: rows [L,O] and cols [L,I], second moments averaged over the other; bias [L,O]."""

    rows: dict[str, np.ndarray]
    cols: dict[str, np.ndarray]
    bias: dict[str, np.ndarray]


def divide(adam: Adam) -> dict[str, np.ndarray]:
    """What G is multiplied by, entry by entry: 1 / (sqrt(v) + 1e-8)."""
    return {sink: 1 / (np.sqrt(v) + ADAM_EPS) for sink, v in adam.v.items()}


def scales(adafactor: Adafactor, sink: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Factors of g [L,O], of x [L,I], and of the bias gradient [L,O] where that is collected."""
    row_LO, bias_LO = adafactor.rows[sink], adafactor.bias.get(sink)
    mean_L1 = row_LO.mean(-1, keepdims=True)
    g_LO = np.sqrt(mean_L1) / np.sqrt(row_LO + FACTOR_EPS)
    x_LI = 1 / np.sqrt(adafactor.cols[sink] + FACTOR_EPS)
    return g_LO, x_LI, None if bias_LO is None else 1 / np.sqrt(bias_LO + BIAS_EPS)


def identity(moments: Adam | Adafactor) -> tuple[Kind, str]:
    """Kind and sha256 of the values, for `Spec.normalizer`."""
    digest = hashlib.sha256()
    for name, tree in moments._asdict().items():
        for sink, array in sorted(tree.items()):
            digest.update(f"{name} {sink} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return ("adam" if isinstance(moments, Adam) else "adafactor"), digest.hexdigest()


def load(
    path: PathLike,
    config: ModelConfig,
    found: list[Target],
    include_bias: bool = False,
    kind: Kind | None = None,
) -> Adam | Adafactor:
    """Second moments of the matrices `found`, as float32 numpy arrays; 1 where not collected.

    path: a run of `train lm`, whose newest checkpoint is read, or a .safetensors or .npz file with
    tensors `exp_avg_sq.NAME`, `state.NAME.exp_avg_sq` or just `NAME`; of Adafactor's matrices
    `exp_avg_sq_row.NAME` and `exp_avg_sq_col.NAME`. kind: by default Adafactor's if it has any.
    InputError names the first tensor that is missing, unknown, misshaped, negative or not finite.
    """
    path = Path(path)
    given = _of_run(path, config) if path.is_dir() else _of_file(path, config)
    if kind is None:
        kind = "adafactor" if ROW in given else "adam"
    places = [_place(config, target) for target in found]
    source = _Source(path, given)
    bias = [p for p in places if include_bias and p.target.site.bias]
    bias_LO = {
        p.target.sink: source.stacked(FULL, p, (p.target.site.outputs,), ".bias") for p in bias
    }
    if kind == "adam":
        v = {p.target.sink: source.matrix(p) for p in places}
        for sink, last_LO in bias_LO.items():
            v[sink] = np.concatenate([v[sink], last_LO[..., None]], -1)
        return Adam(v)
    rows, cols = {}, {}
    for p in places:
        o, i = p.target.site.outputs, p.target.site.inputs
        fields = (COLUMN, ROW) if p.turned else (ROW, COLUMN)
        rows[p.target.sink] = source.stacked(fields[0], p, (o,))
        cols[p.target.sink] = source.stacked(fields[1], p, (i,))
    return Adafactor(rows, cols, bias_LO)


class _Place(NamedTuple):
    """A target in a file: its module, `{l}` for the layer, and whether it holds [I,O]."""

    target: Target
    module: str
    turned: bool


def _place(config: ModelConfig, target: Target) -> _Place:
    site, rows = target.site, {row.path: row for row in families.rows(config)}
    if target.sink in (EMBEDDING, HEAD):
        return _Place(target, rows[site.path].hf.removesuffix(".weight"), False)
    weight = rows.get(f"{site.path}/w")
    if weight is None:  # a factor of an adapter, which PEFT keeps as [O,I]
        return _Place(target, adapters.PREFIX + adapters.module_name(config, site), False)
    return _Place(target, weight.hf.removesuffix(".weight"), not weight.transpose)


class _Source(NamedTuple):
    """Tensors by field and parameter, in the layout of a model's file, and where they are from."""

    path: Path
    given: Mapping[str, Mapping[str, np.ndarray]]

    def stacked(
        self, field: str, place: _Place, shape: tuple[int, ...], end: str = ".weight"
    ) -> np.ndarray:
        """[L, *shape] float32 of one field of a target, as stored."""
        return np.stack([
            self.checked(field, place.module.format(l=layer) + end, shape)
            if wanted
            else np.ones(shape, np.float32)
            for layer, wanted in enumerate(place.target.layers)
        ])  # fmt: skip

    def matrix(self, place: _Place) -> np.ndarray:
        shape = (place.target.site.outputs, place.target.site.inputs)
        stored = self.stacked(FULL, place, shape[::-1] if place.turned else shape)
        return stored.swapaxes(1, 2) if place.turned else stored

    def checked(self, field: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensors = self.given.get(field, {})
        if name not in tensors:
            some = next(iter(tensors), None)
            raise InputError(
                f"{self.path} has no {field} of {name!r}"
                + (f", but of {some!r}" if some else "")
                + "; give the optimizer of what is attributed: of all the model's weights, or of "
                "the adapter with --gradients adapter"
            )
        tensor, where = tensors[name], f"{self.path}: {field} of {name!r}"
        if tensor.shape != shape:
            raise InputError(f"{where} has shape {list(tensor.shape)}, as the parameter is stored "
                             f"it is {list(shape)}; give the optimizer of this model")  # fmt: skip
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise InputError(f"{where} holds {tensor.dtype}, not floating point; convert it")
        with np.errstate(over="ignore"):
            tensor = tensor.astype(np.float32)
        if not np.isfinite(tensor).all() or (tensor < 0).any():
            raise InputError(f"{where} holds a negative value, NaN or infinity, which no second "
                             "moment is; give the field exp_avg_sq of a sound state")  # fmt: skip
        return tensor


def _of_file(path: Path, config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """{field: {parameter: tensor}} of a file, every name of which must be the model's."""
    if path.suffix in PICKLES:
        raise InputError(
            f"{path} is a pickle, which may run any code and is never opened; where it is from, "
            "save each parameter's state[p]['exp_avg_sq'] as `exp_avg_sq.NAME` with "
            "safetensors.torch.save_file"
        )
    if path.suffix not in (".safetensors", ".npz"):
        raise InputError(f"{path} is no run, .safetensors or .npz file of second moments")
    tensors = read_npz(path) if path.suffix == ".npz" else safetensors.read(path)
    known = set(slots(config)) | _factors(config).keys()
    found: dict[str, dict[str, np.ndarray]] = {}
    for full_name, tensor in tensors.items():
        field, name = _parse(full_name)
        if name not in known:
            raise InputError(f"{path}: tensor {full_name!r} belongs to no parameter of this "
                             f"{config.layers}-layer {config.family} model; names are "
                             f"`exp_avg_sq.{next(iter(slots(config)))}`")  # fmt: skip
        if name in found.setdefault(field, {}):
            raise InputError(f"{path} holds {field} of {name!r} twice; delete one")
        found[field][name] = tensor
    return found


def _parse(full_name: str) -> tuple[str, str]:
    """(field, parameter) that a tensor's name says."""
    before = re.fullmatch(rf"({ROW}|{COLUMN}|{FULL})\.(.+)", full_name)
    if before:
        return before[1], before[2]
    after = re.fullmatch(rf"state\.(.+)\.({ROW}|{COLUMN}|{FULL})", full_name)
    return (after[2], after[1]) if after else (FULL, full_name)


def _factors(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """Name in a PEFT file of every factor an adapter may have: its path with us, and its layer."""
    found = {}
    for site in schema.sites(families.rows(config)):
        for end in "ab":
            module = adapters.PREFIX + adapters.module_name(config, site)
            for layer in range(config.layers):
                name = f"{module.format(l=layer)}.lora_{end.upper()}.weight"
                found[name] = f"{site.path}/{end}", layer
    return found


def _of_run(path: Path, config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """Adam's second moments from a run's newest checkpoint, named and laid out as in files."""
    moments, found = _restored(path), {}
    places = {n: (s.row.path, s.layer, s.row.transpose) for n, s in slots(config).items()}
    places |= {name: (*place, True) for name, place in _factors(config).items()}
    for name, (place, layer, transpose) in places.items():
        if place not in moments:
            continue
        array = moments[place]
        if layer is not None:
            if len(array) != config.layers:
                raise InputError(f"{path} trained a model of {len(array)} layers, this one has "
                                 f"{config.layers}; give a run of this model")  # fmt: skip
            array = array[layer]
        found[name] = array.T if transpose else array
    return {FULL: found}


def _restored(path: Path) -> dict[str, np.ndarray]:
    """{path in our tree: second moments}; reads no other part of the checkpoint."""
    import orbax.checkpoint as ocp

    if not (path / "ckpt").is_dir():
        raise InputError(f"{path} is no training run: it has no ckpt/; give a run of `train lm`, "
                         "or a .safetensors or .npz file")  # fmt: skip
    handler = ocp.PyTreeCheckpointHandler()
    with ocp.CheckpointManager((path / "ckpt").absolute(), item_handlers=handler) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(f"{path} has no complete checkpoint; run its command again to go on")
        tree = manager.item_metadata(step).tree
        wanted = jax.tree_util.tree_map_with_path(
            lambda keys, leaf: leaf if _parameter(keys) else ocp.PLACEHOLDER, tree
        )
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = manager.restore(step, args=ocp.args.PyTreeRestore(wanted, plain))
    leaves = jax.tree_util.tree_leaves_with_path(state)
    found = {_parameter(keys): np.asarray(leaf) for keys, leaf in leaves if _parameter(keys)}
    if not found:
        raise InputError(f"{path} was trained without second moments; give a run with --optimizer "
                         "adamw")  # fmt: skip
    return found


def _parameter(keys: tuple[Any, ...]) -> str:
    """The parameter whose second moment a leaf of the training state is, or nothing."""
    names = jax.tree_util.keystr(keys, simple=True, separator="/")
    inside = re.fullmatch(r"opt_state/.*?\bnu/(.+)", names)
    return inside[1] if inside else ""
