"""Weights in and out of Hugging Face folders, derived from the schema alone.

A row of `families.rows` names its tensors in the file and their layout, so both directions are one
map between our stacked tree and the file's flat names. Import is strict: a tensor that is unknown,
missing, given twice, of another shape or not finite is named and nothing is guessed. An export
appears under its name only after the written folder was read back bit for bit and its logits were
computed a second time by `core.reference`.
"""

import dataclasses
import fnmatch
import functools
import re
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families, files, model, reference, safetensors
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.schema import Params, Row, check, full_shape, get, put

FLOATS = ("float32", "bfloat16", "float16")
# The gate compares at most this many logits (256 MiB), which is GPT-2's whole context.
GATE_LOGITS = 2**26
# Relative to the largest logit; float32 implementations differ by about 1e-6.
GATE_TOLERANCE = 1e-4
GATE_TIE = 1e-5
_NOT_TOKENIZER = (
    "config.json", "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack",
    "*.onnx", "*.gguf",
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


class Agreement(NamedTuple):
    """Our logits against the reference's: max |difference| / max |logit| over `tokens` places."""

    error: float
    tokens: int


def slots(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor of a file, by name."""
    return {
        row.hf.format(l=layer): Slot(row, layer if row.stacked else None)
        for row in families.rows(config)
        for layer in range(config.layers if row.stacked else 1)
    }


def import_hf(folder: Path, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """A Hugging Face folder's config and parameters: numpy arrays of `dtype`, stacked by layer.

    Names may carry or lack the family's prefix. Raises InputError naming the file, key or tensor
    and the remedy for everything that does not fit. Peak memory is the result and one tensor.
    """
    folder = Path(folder)
    _check_dtype(dtype)
    config, family = _read_config(folder)
    tensors = _by_slot(config, family, _read_tensors(folder), folder)
    params: Params = {}
    for row in families.rows(config):
        put(params, row.path, np.empty(full_shape(row, config.layers), np.dtype(dtype)))
    for name, slot in slots(config).items():
        _check_shape(folder, name, tensors[name], slot, config)
        slot.view(params)[...] = _cast(folder, name, tensors[name], dtype)
    return config, params


def export_hf(
    config: ModelConfig,
    params: Params,
    out: Path,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
) -> Agreement:
    """Write a Hugging Face folder that holds `params` cast to `dtype` and the tokenizer's files.

    `out` comes to be only if the gate passes: the files, read back, hold the same bits, and their
    logits agree with the reference's. Raises InputError for parameters that do not fit the config,
    an `out` that holds something, and a failed gate, after which nothing is left behind.
    """
    out = Path(out)
    _check_dtype(dtype)
    check(families.rows(config), config.layers, params, "the model")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists; name another folder for the export or remove it")
    with files.atomic_folder(out) as folder:
        _write(folder, config, params, dtype)
        if tokenizer_dir is not None:
            _copy_tokenizer(Path(tokenizer_dir), folder)
        try:
            return _gate(folder, config, params, dtype)
        except InputError as error:
            message = str(error).replace(str(folder), str(out))
            raise InputError(f"the export failed its check and was deleted: {message}") from error


def check_hf(folder: Path) -> Agreement:
    """Import a folder and compare our logits with the reference's; InputError if they differ."""
    config, params = import_hf(folder)
    return _compare_logits(Path(folder), config, params)


def _read_config(folder: Path) -> tuple[ModelConfig, ModuleType]:
    where = folder / "config.json"
    content = files.read_json(where)
    kind = content.get("model_type") if isinstance(content, dict) else None
    known = {family.MODEL_TYPE: family for family in families.FAMILIES.values()}
    if kind not in known:
        raise InputError(f"{where}: model_type {kind!r} is not supported; known: {sorted(known)}")
    return known[kind].from_hf(content, str(where)), known[kind]


def _read_tensors(folder: Path) -> safetensors.Tensors:
    if not any((folder / f"model.safetensors{end}").exists() for end in ("", ".index.json")):
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
        full = name if name in wanted or name == head else family.PREFIX + name
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
                f"{folder} holds {full!r} twice, with and without the prefix {family.PREFIX!r}; "
                "remove one"
            )
        found[full] = tensor
    if missing := [name for name in wanted if name not in found]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"{folder}: tensor {missing[0]!r}{more} is missing for a {config.layers}-layer "
            f"{config.family} model; download the weights again or correct config.json"
        )
    copy = found.pop(head, None) if config.tied else None
    if copy is not None and not np.array_equal(copy, found[embedding]):
        raise InputError(
            f"{folder}: {head!r} differs from {embedding!r} although the config ties them; remove "
            f"{head!r} if it is stale, or set tie_word_embeddings to false to use both"
        )
    return found


def _check_shape(
    folder: Path, name: str, tensor: np.ndarray, slot: Slot, config: ModelConfig
) -> None:
    if tensor.shape == slot.shape:
        return
    if slot.row.axes[0] == "vocab" and tensor.shape[1:] == slot.shape[1:]:
        raise InputError(
            f"{folder}: config.json has vocab_size {config.vocab_size}, {name!r} has "
            f"{tensor.shape[0]} rows; correct vocab_size, or cut off padding rows of the tensor"
        )
    hint = "it looks transposed" if tensor.shape == slot.shape[::-1] else "correct config.json"
    raise InputError(
        f"{folder}: tensor {name!r} has shape {list(tensor.shape)}, the config asks for "
        f"{list(slot.shape)}; {hint} or take both files from one model"
    )


def _check_dtype(dtype: str) -> None:
    if dtype not in FLOATS:
        raise InputError(f"weights of dtype {dtype!r} are not supported; use one of {FLOATS}")


def _cast(where: Path | str, name: str, tensor: Any, dtype: str) -> np.ndarray:
    array = np.asarray(tensor)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{where}: tensor {name!r} holds {array.dtype}, not floating point")
    with np.errstate(over="ignore"):
        array = array.astype(dtype, copy=False)
    if not np.isfinite(array).all():
        raise InputError(
            f"{where}: tensor {name!r} holds NaN or infinity as {dtype}; the model diverged, or "
            "its values do not fit"
        )
    return array


def _write(folder: Path, config: ModelConfig, params: Params, dtype: str) -> None:
    content = families.of(config).to_hf(config) | {"torch_dtype": dtype}
    files.write_json(folder / "config.json", content)
    tensors = {
        name: safetensors.Lazy(
            slot.shape,
            dtype,
            lambda name=name, slot=slot: _cast("the model", name, slot.view(params), dtype),
        )
        for name, slot in slots(config).items()
    }
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Every file as it is, except weights and config: `source` may be a whole model folder."""
    if not source.is_dir():
        raise InputError(f"tokenizer folder {source} does not exist")
    for path in sorted(source.iterdir()):
        if path.is_file() and not any(fnmatch.fnmatch(path.name, p) for p in _NOT_TOKENIZER):
            shutil.copyfile(path, folder / path.name)


def _gate(folder: Path, config: ModelConfig, params: Params, dtype: str) -> Agreement:
    """Whether the files in `folder` are `params`; InputError names the first thing that is not."""
    found, imported = import_hf(folder)
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(found, field.name)
        if ours != theirs:
            raise InputError(f"{folder / 'config.json'}: {field.name} is {theirs!r}, not {ours!r}")
    wanted = slots(config)
    # Import forgives a prefix left out and a second copy of the head; other readers may not.
    if odd := sorted(safetensors.read_folder(folder).keys() ^ wanted.keys()):
        raise InputError(f"{folder}: tensor {odd[0]!r} is missing or should not be there")
    for name, slot in wanted.items():
        ours = np.asarray(slot.view(params)).astype(dtype).astype(np.float32)
        theirs = slot.view(imported)
        if not np.array_equal(ours.view(np.uint32), theirs.view(np.uint32)):
            raise InputError(f"{folder}: tensor {name!r} is not the model's {slot.row.path!r}")
    return _compare_logits(folder, config, imported)


def _gate_ids(config: ModelConfig) -> np.ndarray:
    """One sequence [T] up to the last position, with the first, last and special ids."""
    length = max(1, min(config.context, GATE_LOGITS // config.vocab_size))
    ids_T = np.random.default_rng(0).integers(config.vocab_size, size=length, dtype=np.int32)
    special = [0, config.vocab_size - 1, config.bos, config.eos]
    special = [i for i in special if i is not None and 0 <= i < config.vocab_size][:length]
    ids_T[: len(special)] = special
    return ids_T


def _compare_logits(folder: Path, config: ModelConfig, params: Params) -> Agreement:
    """Our forward pass over `params` against the reference's over the files in `folder`."""
    ids_T = _gate_ids(config)
    forward = jax.jit(functools.partial(model.logits, config, Execution(layers="scan")))
    with jax.default_matmul_precision("highest"):
        ours_TV = np.asarray(forward({"params": params}, jnp.asarray(ids_T)[None]))[0]
    theirs_TV = reference.logits(folder, ids_T)
    # Position by position, so that no further arrays of this size are made.
    scale = max(np.abs(theirs_V).max() for theirs_V in theirs_TV)
    if not max(np.ptp(theirs_V) for theirs_V in theirs_TV) > GATE_TIE * scale:
        raise InputError(
            f"{folder}: every token is equally likely (loss ln V); weights are missing"
        )
    pairs = list(zip(ours_TV, theirs_TV, strict=True))
    error = float(max(np.abs(ours_V - theirs_V).max() for ours_V, theirs_V in pairs) / scale)
    if not error <= GATE_TOLERANCE:
        raise InputError(
            f"{folder}: logits differ from the reference's by {error:.1e} of the largest "
            f"(limit {GATE_TOLERANCE:.0e})"
        )
    # How far our best token is from the reference's best: zero, or a tie that rounding decides.
    tie = max(theirs_V.max() - theirs_V[ours_V.argmax()] for ours_V, theirs_V in pairs) / scale
    if not tie <= GATE_TIE:
        raise InputError(f"{folder}: the most likely token differs from the reference's")
    return Agreement(error, len(ids_T))
