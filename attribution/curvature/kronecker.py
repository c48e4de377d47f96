"""Kronecker-factored curvature, fitted in one or two passes, and its inverses: K-FAC to Shampoo.

Dims: L layers, I inputs (+1 with the bias), O outputs, Q gradients.

H = Q_G Q_A diag(l_G l_A) Q_A^T Q_G^T by the eigenvectors of a site's A and S (`moments`); with
`corrected` (EK-FAC) the diagonal is measured in a second pass, L = mean_n (Q_G^T G_n Q_A)^2.
A fit is a folder: the sums (`moments`, `corrections`), a file of eigenvectors per module, and last
`info.json`; each is written whole, and a killed fit goes on from what is there.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attribution.curvature import precondition
from attribution.curvature.moments import (
    SIDES,
    Moments,
    Positions,
    RuleName,
    accumulate,
    sites,
    zeros,
)
from attribution.targets import Spec, Tree
from core import model, safetensors, sharding
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import PathLike, read_json, write_json
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead

MOMENTS, CORRECTIONS = "moments.safetensors", "corrections.safetensors"
Inversion = Literal["damped", "absolute", "pseudo", "tikhonov", "factored"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """labels: the dataset's (`empirical` Fisher) or drawn from the model's own (`sampled`)."""

    method: Literal["kfac", "tkfac", "shampoo"] = "kfac"
    corrected: bool = True
    labels: Literal["sampled", "empirical"] = "sampled"
    seed: int = 0


class Module(NamedTuple):
    """One matrix of the fit: its key in a tree, its layer and the name others give it."""

    sink: str
    layer: int
    name: str


class Factors(NamedTuple):
    """A finished fit: `info.json`, and by sink arrays with a leading layer axis.

    vectors: of A and S, in columns. spectra: their eigenvalues, so scaled that the products are
    H's. values: H's eigenvalues in that basis, [L,O,I]; zero where a layer has no such site.
    """

    info: dict[str, Any]
    vectors: dict[str, Moments]
    spectra: dict[str, Moments]
    values: Tree

    def check(self, spec: Spec, fingerprint: str) -> None:
        """Raise unless these factors belong to this model and these sites."""
        if self.info["model"] != fingerprint:
            raise InputError(f"the factors are of another model ({self.info['model'][:12]}) than "
                             f"{fingerprint[:12]}; fit them with this one")  # fmt: skip
        if self.info["spec"] != _record(spec):
            raise InputError(f"the factors were fitted with {self.info['spec']}, not with "
                             f"{_record(spec)}; use the same options")  # fmt: skip


def _record(spec: Spec) -> dict[str, Any]:
    return {key: value for key, value in spec.to_json().items() if key != "projection"}


def modules(config: ModelConfig, spec: Spec) -> list[Module]:
    return [
        Module(target.sink, layer, target.site.name.format(l=layer))
        for layer in range(config.layers)
        for target in sites(config, spec)
        if target.layers[layer]
    ]


def fit(
    folder: PathLike,
    loaded: Loaded | Sequence[Loaded],
    rows: Rows,
    spec: Spec,
    execution: Execution,
    batch_tokens: int,
    settings: Settings,
) -> Factors:
    """Fit the factors of a model on rows into `folder`; continues a killed fit.

    loaded: of several, checkpoints of one model, the factors are of all their sums. The projection
    of `spec` plays no part. Raises InputError when the folder holds another fit, or for sums that
    are not finite.
    """
    folder = Path(folder)
    models = [loaded] if isinstance(loaded, Loaded) else [*loaded]
    marks, config = [one.fingerprint for one in models], models[0].config
    info = {
        "format": "taproot-factors",
        "model": marks[0] if len(marks) == 1 else marks,
        "tokenizer": rows.tokenizer,
        "rows": rows.sha,
        "spec": _record(spec),
        "settings": dataclasses.asdict(settings),
        "documents": len(rows) * len(models),
        "positions": int((rows.lengths - 1).sum()) * len(models),
        "layers": config.layers,
        "modules": [module._asdict() for module in modules(config, spec)],
    }
    begun = {**info, "batch_tokens": batch_tokens, "devices": jax.device_count()}
    if not (folder / "fit.json").exists():
        write_json(folder / "fit.json", begun)
    elif read_json(folder / "fit.json") != begun:
        raise InputError(f"{folder} holds a fit of something else; use another folder")
    if (folder / "info.json").exists():
        return load_factors(folder)

    plan = Plan(rows, batch_tokens, jax.device_count())
    mesh = sharding.make_mesh()
    everywhere, by_rows = sharding.replicated(mesh), sharding.over_rows(mesh)
    placed_models: dict[int, model.Variables] = {}  # the one at hand

    seed = jnp.uint32(settings.seed) if settings.labels == "sampled" else None

    def stream(name: str, rule: RuleName, bases: Tree | None = None) -> None:
        def add(sums: Tree, number: int, batch: Batch) -> Tree:
            if number not in placed_models:
                placed_models.clear()
                placed_models[number] = jax.device_put(models[number].variables, everywhere)
            lengths_B = np.where(batch.rows_B < 0, 0, rows.lengths[batch.rows_B]).astype(np.int32)
            arrays = batch.ids_BT, batch.labels_BT, lengths_B, batch.rows_B.astype(np.int32)
            placed = Positions(*(sharding.place(array, by_rows) for array in arrays))
            return accumulate(
                config, execution, spec, rule, placed_models[number], bases, sums, placed, seed
            )

        start = jax.device_put(zeros(config, spec, rule), everywhere)
        _stream(folder / name, plan, len(models), start, add)

    stream(MOMENTS, settings.method)
    _decompose(folder, info)
    if settings.corrected:
        vectors = {s: Moments(**v) for s, v in _stacked(folder, info, "vectors").items()}
        stream(CORRECTIONS, "corrections", jax.device_put(vectors, everywhere))
    write_json(folder / "info.json", info)
    return load_factors(folder)


def write_tree(file: Path, tree: Any, metadata: dict[str, str]) -> None:
    """A tree of arrays as one safetensors file; a name is the path to a leaf."""
    values, _ = jax.tree_util.tree_flatten_with_path(tree)
    safetensors.write(file, {_name(path): np.asarray(leaf) for path, leaf in values}, metadata)


def read_tree(file: Path, like: Any) -> Any:
    """What `write_tree` wrote, memory-mapped, in the structure of `like`."""
    held = safetensors.read(file)
    return jax.tree_util.tree_map_with_path(lambda path, _: held[_name(path)], like)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=":")


def _stream(
    file: Path, plan: Plan, models: int, sums: Tree, add: Callable[[Tree, int, Batch], Tree]
) -> None:
    """Write to `file` the sums over all batches of each model; saved every minute and resumed."""
    start = 0
    if file.exists():
        start = int(safetensors.metadata(file)["batches"])
        shardings = jax.tree.map(lambda leaf: leaf.sharding, sums)
        sums = jax.device_put(read_tree(file, sums), shardings)
    saved = time.monotonic()
    total, done = models * len(plan), start
    with Progress(total, f"curvature {file.stem}", "batch", start) as bar:
        while done < total:
            for batch in read_ahead(plan, done % len(plan)):
                sums = add(sums, done // len(plan), batch)
                done += 1
                bar.update(1)
                if done == total or time.monotonic() - saved > 60:
                    write_tree(file, sums, {"batches": str(done)})
                    saved = time.monotonic()
    for name, tensor in safetensors.read(file).items():
        if not np.isfinite(tensor).all():
            raise InputError(f"the curvature of {name} is not finite; check the model's weights, "
                             "or use --dtype float32")  # fmt: skip


def _decompose(folder: Path, info: dict[str, Any]) -> None:
    """Eigenvalues and eigenvectors of A and S per position, in float64, a file per module."""
    sums = safetensors.read(folder / MOMENTS)
    layer, known = -1, []
    with Progress(len(info["modules"]), "eigendecompositions", "module") as bar:
        for module in _modules(info):
            if module.layer != layer:
                layer, known = module.layer, []
            file = folder / "eigen" / f"{module.name}.safetensors"
            tensors: dict[str, np.ndarray] = {}
            for side in SIDES if not file.exists() else ():
                upper_II = np.triu(sums[f"{module.sink}:{side}"][layer].astype(np.float64))
                sum_II = upper_II + np.triu(upper_II, 1).T
                if info["settings"]["method"] == "shampoo" and side == SIDES[0]:
                    sum_II /= max(np.trace(sum_II), np.finfo(np.float64).tiny)
                # Sites that read the same activation (q, k and v) have the same A to the bit.
                same = [pair for matrix_II, pair in known if np.array_equal(matrix_II, sum_II)]
                pair = same[0] if same else np.linalg.eigh(sum_II / info["positions"])
                known.append((sum_II, pair))
                tensors[f"{side}:values"] = np.maximum(pair[0], 0)
                tensors[f"{side}:vectors"] = pair[1].astype(np.float32)
            if tensors:
                safetensors.write(file, tensors)
            bar.update(1)


def _modules(info: dict[str, Any]) -> list[Module]:
    return [Module(**fields) for fields in info["modules"]]


def _stacked(folder: Path, info: dict[str, Any], kind: str) -> Tree:
    """Eigenvalues or eigenvectors of all modules: {sink: {side: [L, ...]}}."""
    trees: Tree = {}
    for module in _modules(info):
        held = safetensors.read(folder / "eigen" / f"{module.name}.safetensors")
        sides = trees.setdefault(module.sink, {})
        for side in SIDES:
            part = held[f"{side}:{kind}"]
            all_layers = np.zeros((info["layers"], *part.shape), part.dtype)
            sides.setdefault(side, all_layers)[module.layer] = part
    return trees


def load_factors(path: PathLike) -> Factors:
    """Read a finished fit."""
    folder = Path(path)
    if not (folder / "info.json").exists():
        raise InputError(f"{path} holds no finished curvature factors; fit them first")
    info = read_json(folder / "info.json")
    if not isinstance(info, dict) or info.get("format") != "taproot-factors":
        raise InputError(f"{path} holds no curvature factors; fit them first")
    vectors, spectra = (_stacked(folder, info, kind) for kind in ("vectors", "values"))
    scale = (info["positions"] / info["documents"]) ** 0.5
    spectra = jax.tree.map(lambda values_LI: scale * values_LI, spectra)
    if info["settings"]["corrected"]:
        held = safetensors.read(folder / CORRECTIONS)
        values = {sink: held[sink] / np.float32(info["documents"]) for sink in vectors}
        for sink, values_LOI in values.items():
            values_LOI[~spectra[sink][SIDES[0]].any(1)] = 0  # a layer that was not collected
    else:
        grids = ((sink, [both[side] for side in SIDES]) for sink, both in spectra.items())
        values = {
            sink: np.einsum("LO,LI->LOI", outputs_LO, inputs_LI).astype(np.float32)
            for sink, (inputs_LI, outputs_LO) in grids
        }
    return Factors(
        info,
        {s: Moments(**v) for s, v in vectors.items()},
        {s: Moments(**v) for s, v in spectra.items()},
        values,
    )


class Inverse(NamedTuple):
    """A power of the inverse of H, ready for the device: per sink vectors and multipliers."""

    vectors: dict[str, Moments]
    multipliers: Tree


def inverse(
    factors: Factors, inversion: Inversion = "damped", damping: float = 0.1, power: float = 1.0
) -> Inverse:
    """H^-power, regularised as `precondition.multipliers` or, `factored`, by the Kronecker factors.

    factored adds (pi sqrt(d)) l_G + (sqrt(d) / pi) l_A + d to l, d = damping mean(l) and
    pi = sqrt(mean l_A / mean l_G), Martens and Grosse (arXiv 1503.05671), section 6.3.
    """

    def one(values_OI: np.ndarray, inputs_I: np.ndarray, outputs_O: np.ndarray) -> np.ndarray:
        if inversion != "factored":
            return precondition.multipliers(values_OI, inversion, damping)
        values_OI = np.maximum(values_OI.astype(np.float64), 0)
        if not values_OI.any():
            return values_OI
        root = np.sqrt(damping * values_OI.mean())
        pi = np.sqrt(inputs_I.mean() / outputs_O.mean())
        shift_OI = pi * root * outputs_O[:, None] + root / pi * inputs_I[None] + root**2
        return precondition.reciprocals(values_OI + shift_OI)

    found = {
        sink: np.stack(
            [one(*parts) ** power for parts in zip(values_LOI, *factors.spectra[sink], strict=True)]
        )
        for sink, values_LOI in factors.values.items()
    }
    multipliers = {sink: jnp.asarray(m_LOI, jnp.float32) for sink, m_LOI in found.items()}
    return Inverse(jax.tree.map(jnp.asarray, factors.vectors), multipliers)


@jax.jit
@model.full_precision
def multiply(inverse: Inverse, tree: Tree) -> Tree:
    """Q_G[(Q_G^T G Q_A) * m]Q_A^T of every [L,Q,O,I]."""

    def one(vectors: Moments, m_LOI: jax.Array, g_LQOI: jax.Array) -> jax.Array:
        left_L1OO, right_L1II = vectors.outputs_OO[:, None], vectors.inputs_II[:, None]
        turned_LQOI = jnp.swapaxes(left_L1OO, -1, -2) @ g_LQOI @ right_L1II * m_LOI[:, None]
        return left_L1OO @ turned_LQOI @ jnp.swapaxes(right_L1II, -1, -2)

    return {s: one(inverse.vectors[s], inverse.multipliers[s], g) for s, g in tree.items()}


def apply(
    factors: Factors,
    tree: Tree,
    inversion: Inversion = "damped",
    damping: float = 0.1,
    power: float = 1.0,
) -> Tree:
    """H^-power of every gradient of `tree`, {sink: [L,Q,O,I]}; see `inverse`."""
    return multiply(inverse(factors, inversion, damping, power), tree)
