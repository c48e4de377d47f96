"""Weights in and out of Hugging Face folders, derived from the schema alone.

A row of `families.rows` names its tensors in the file and their layout, so both directions are one
map between our stacked tree and the file's flat names. Import is strict: a tensor that is unknown,
missing, given twice, of another shape or not finite is named and nothing is guessed. Both ways walk
mapped files in small blocks, so their memory is the result and one block. `core.hf.gate` says
whether a folder means what we think it means.
"""

import dataclasses
import fnmatch
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from core import families, files, safetensors
from core.config import ModelConfig
from core.errors import InputError
from core.families.hf_config import Keys
from core.schema import Params, Row, full_shape, get, put

FLOATS = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5e9  # transformers' own limit
# A config that asks for more is damaged; everything below counts layers.
MAX_LAYERS = 10_000
_NOT_TOKENIZER = (
    "config.json", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack",
    "*.onnx", "*.gguf", "adapter_config.json",
)  # fmt: skip


class Slot(NamedTuple):
    """One tensor of a file: the parameter it belongs to, and which layer of it."""

    row: Row
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.row.shape[::-1] if self.row.transpose else self.row.shape

    def view(self, params: Params) -> Any:
        """The tensor's place in our tree, in the file's layout; of numpy arrays, writable."""
        array = get(params, self.row.path)
        array = array if self.layer is None else array[self.layer]
        return array.T if self.row.transpose else array


class Source(NamedTuple):
    """A Hugging Face folder whose files agree: its tensors, mapped, under the names of `slots`.

    padding: rows that the file has beyond the vocabulary and that were cut off.
    """

    folder: Path
    config: ModelConfig
    tensors: safetensors.Tensors
    padding: int = 0


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of a file, by name."""
    return {
        row.hf.format(l=layer): Slot(row, layer if row.stacked else None)
        for row in families.rows(config)
        for layer in range(config.layers if row.stacked else 1)
    }


def open_hf(folder: Path, trim_vocab: bool = False) -> Source:
    """A Hugging Face folder, single or sharded, checked name by name and shape by shape.

    Names may carry or lack the family's prefix. trim_vocab: cut off the rows of embedding and head
    beyond config.json's vocabulary. Raises InputError naming the file, key or tensor and the
    remedy for everything that does not fit.
    """
    folder = Path(folder)
    config, family = _read_config(folder)
    tensors = _by_slot(config, family, _read_tensors(folder), folder)
    padding = 0
    for name, slot in slots(config).items():
        if trim_vocab and slot.row.axes[0] == "vocab" and tensors[name].ndim:
            padding = max(padding, len(tensors[name]) - config.vocab_size)
            tensors[name] = tensors[name][: config.vocab_size]
        _check_tensor(folder, name, tensors[name], slot, config)
    return Source(folder, config, tensors, padding)


def parameters(source: Source, dtype: str = "float32") -> Params:
    """The parameters of a folder: numpy arrays of `dtype`, stacked by layer, all finite."""
    check_dtype(dtype)
    params: Params = {}
    for row in families.rows(source.config):
        put(params, row.path, np.empty(full_shape(row, source.config.layers), np.dtype(dtype)))
    for name, slot in slots(source.config).items():
        target = slot.view(params)
        for part, block in safetensors.blocks(source.tensors[name]):
            target[part] = cast(source.folder, name, block, dtype)
    return params


def import_hf(folder: Path, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """`open_hf` and `parameters` in one."""
    check_dtype(dtype)
    source = open_hf(folder)
    return source.config, parameters(source, dtype)


def write_hf(
    folder: Path,
    config: ModelConfig,
    params: Params,
    dtype: str = "float32",
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights cast to `dtype`, one tensor at a time, unchecked."""
    content = families.of(config).to_hf(config) | {"torch_dtype": dtype}
    files.write_json(folder / "config.json", content)
    tensors = {
        name: safetensors.Lazy(
            slot.shape,
            dtype,
            lambda name=name, slot=slot: cast("the model", name, slot.view(params), dtype),
        )
        for name, slot in slots(config).items()
    }
    safetensors.write_folder(folder, tensors, {"format": "pt"}, shard_bytes)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Every file as it is, except weights and config: `source` may be a whole model folder."""
    if not source.is_dir():
        raise InputError(f"tokenizer folder {source} does not exist")
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, p) for p in _NOT_TOKENIZER):
            shutil.copyfile(path, folder / path.name)


def check_dtype(dtype: str) -> None:
    if dtype not in FLOATS:
        raise InputError(f"weights of dtype {dtype!r} are not supported; use one of {FLOATS}")


def cast(where: Path | str, name: str, tensor: Any, dtype: str) -> np.ndarray:
    """A tensor as numpy in `dtype`; InputError unless it is finite there."""
    with np.errstate(over="ignore"):
        array = np.asarray(tensor).astype(dtype, copy=False)
    pieces = np.array_split(array, array.nbytes // safetensors.BLOCK + 1)
    if not all(np.isfinite(piece).all() for piece in pieces):
        raise InputError(
            f"{where}: tensor {name!r} holds NaN or infinity as {dtype}; the model diverged, or "
            "its values do not fit"
        )
    return array


def _read_config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    where = folder / "config.json"
    content = files.read_json(where)
    kind = content.get("model_type") if isinstance(content, dict) else None
    known = {family.MODEL_TYPE: family for family in families.FAMILIES.values()}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{where}: model_type {kind!r} is not supported; known: {sorted(known)}")
    for key in ("n_layer", "num_hidden_layers"):
        if isinstance(layers := content.get(key), int) and layers > MAX_LAYERS:
            raise InputError(f"{where}: {key}={layers} is more than any model; correct it")
    return _with_ends(known[kind].from_hf(content, str(where)), folder), known[kind]


def _with_ends(config: ModelConfig, folder: Path) -> ModelConfig:
    """The config with the ends of a text that `generation_config.json` adds, as for chat models."""
    where = folder / "generation_config.json"
    content = files.read_json(where) if where.exists() else {}
    if not isinstance(content, dict):
        raise InputError(f"{where} holds no JSON object; fetch it again or remove it")
    ids = Keys({"eos_token_id": content.get("eos_token_id")}, str(where), config.family).ids()
    ends = [i for i in (config.eos, *config.stops, ids["eos"], *ids["stops"]) if i is not None]
    eos, *stops = dict.fromkeys(ends) or [None]
    return dataclasses.replace(config, eos=eos, stops=tuple(stops))


def _read_tensors(folder: Path) -> safetensors.Tensors:
    if not any((folder / name).exists() for name in (safetensors.SINGLE, safetensors.INDEX)):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth"})
        if not others:
            raise InputError(f"{folder} has no model.safetensors; download the model's weights")
        raise InputError(
            f"{folder} has no model.safetensors, only {others[0]}: a pickle, which can run any "
            "code, so it is never opened here; convert it where transformers is installed: "
            "AutoModelForCausalLM.from_pretrained(IN).save_pretrained(OUT)"
        )
    return safetensors.read_folder(folder)


def _by_slot(
    config: ModelConfig, family: ModuleType, tensors: safetensors.Tensors, folder: Path
) -> safetensors.Tensors:
    """The file's tensors under the names of `slots(config)`: all of them and no others."""
    wanted = slots(config).keys()
    untied = {row.path: row.hf for row in families.rows(dataclasses.replace(config, tied=False))}
    head, embedding = untied["head"], untied["embed/wte"]
    found: safetensors.Tensors = {}
    for name, tensor in tensors.items():
        full = family.ALIASES.get(name, name)
        full = full if full in wanted or full == head else family.PREFIX + full
        if full not in wanted and full != head:
            short = name.removeprefix(family.PREFIX)
            if any(re.fullmatch(pattern, short) for pattern in family.IGNORED):
                continue
            raise InputError(
                f"{folder}: tensor {name!r} has no place in a {config.layers}-layer "
                f"{config.family} model; remove it, or correct config.json if it belongs"
            )
        if full in found:
            raise InputError(
                f"{folder} holds {full!r} twice, under two of its names (with and without the "
                f"prefix {family.PREFIX!r}, or an older one); remove one"
            )
        found[full] = tensor
    if missing := [name for name in wanted if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{folder}: tensor {missing[0]!r}{more} is missing for a {config.layers}-layer "
            f"{config.family} model; download the weights again or correct config.json"
        )
    copy = found.pop(head, None) if config.tied else None
    if copy is not None and not _equal(copy, found[embedding]):
        raise InputError(
            f"{folder}: {head!r} differs from {embedding!r} although the config ties them; remove "
            f"{head!r} if it is stale, or set tie_word_embeddings to false to use both"
        )
    return found


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.ndim == 0:
        return False
    pairs = zip(safetensors.blocks(a), safetensors.blocks(b), strict=True)
    return all(np.array_equal(left, right) for (_, left), (_, right) in pairs)


def _check_tensor(
    folder: Path, name: str, tensor: np.ndarray, slot: Slot, config: ModelConfig
) -> None:
    where = f"{folder}: tensor {name!r}"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise InputError(f"{where} holds {tensor.dtype}, not floating point")
    if tensor.shape == slot.shape:
        return
    if slot.row.axes[0] == "vocab" and tensor.shape[1:] == slot.shape[1:]:
        remedy = (
            "cut off padding rows with `convert import --trim-vocab`, or correct vocab_size"
            if len(tensor) > config.vocab_size
            else "correct vocab_size or take both files from one model"
        )
        raise InputError(
            f"{folder}: config.json has vocab_size {config.vocab_size}, {name!r} has "
            f"{len(tensor)} rows; {remedy}"
        )
    hint = "it looks transposed" if tensor.shape == slot.shape[::-1] else "correct config.json"
    raise InputError(
        f"{where} has shape {list(tensor.shape)}, the config asks for {list(slot.shape)}; {hint} "
        "or take both files from one model"
    )
