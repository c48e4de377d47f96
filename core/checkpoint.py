"""Models on disk: our own folders, the end of a training run, or a Hugging Face folder.

A model folder holds `config.json` (architecture, fingerprint, sizes of the weights' files),
`params/` (Orbax) and `tokenizer/`. The fingerprint is a hash of architecture and weights: stores
and scores record it.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from core import families, schema
from core.config import ModelConfig
from core.errors import InputError
from core.files import PathLike, atomic_folder, read_json, require_space, write_json

KIND = "taproot-model"
# A Hugging Face folder's tokenizer lies beside its weights, under some of these names.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.bpe", "encoder.json",
                    "tokenizer.model")  # fmt: skip


class Loaded(NamedTuple):
    """A model in memory; `params` on the host or on the default device."""

    config: ModelConfig
    params: schema.Params
    tokenizer: Path | None
    fingerprint: str


def fingerprint(config: ModelConfig, params: schema.Params) -> str:
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode())
    for row in families.rows(config):
        digest.update(row.path.encode())
        digest.update(np.ascontiguousarray(schema.get(params, row.path)).data)
    return digest.hexdigest()


def save_model(
    path: PathLike, config: ModelConfig, params: schema.Params, tokenizer: Any = None
) -> str:
    """Write a model folder atomically, with a `tokenizers.Tokenizer`; returns the fingerprint."""
    import orbax.checkpoint as ocp

    mark = fingerprint(config, params)
    with atomic_folder(path) as folder:
        require_space(folder, sum(x.nbytes for x in jax.tree.leaves(params)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "params").absolute(), params)
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        content = {"kind": KIND, "model": config.to_json(), "fingerprint": mark,
                   "files": _sizes(folder)}  # fmt: skip
        write_json(folder / "config.json", content)
    return mark


def load_model(path: PathLike) -> Loaded:
    """Load a model folder, a finished run, or a Hugging Face folder (GPT-2 family)."""
    from core import convert

    path = Path(path)
    if not path.exists():
        raise InputError(f"model {path} does not exist")
    if not (path / "config.json").exists():
        raise InputError(f"{path} has no config.json; give a model folder, a finished run, or a "
                         "Hugging Face folder")  # fmt: skip
    content = read_json(path / "config.json")
    if not isinstance(content, dict):
        raise InputError(f"{path / 'config.json'} holds no JSON object")
    if "command" in content:
        if not (path / "model").exists():
            raise InputError(f"{path} is a run of {content['command']!r} without a final model; "
                             "run its command again to finish it")  # fmt: skip
        return load_model(path / "model")
    if content.get("kind") == KIND:
        return _load_own(path, content)
    config, params = convert.import_hf(path)
    tokenizer = path if any((path / name).exists() for name in _TOKENIZER_FILES) else None
    return Loaded(config, params, tokenizer, fingerprint(config, params))


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of the weights, by its place in the model folder."""
    files = [file for file in sorted((folder / "params").rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _load_own(path: Path, content: dict[str, Any]) -> Loaded:
    import orbax.checkpoint as ocp

    where, remedy = path / "config.json", "copy, convert or train the model again"
    config = ModelConfig.from_json(content.get("model", {}), str(where))
    mark, sizes = content.get("fingerprint"), content.get("files")
    if not isinstance(mark, str) or not isinstance(sizes, dict):
        raise InputError(f"{where} has no fingerprint or no files; {remedy}")
    # Orbax tells of a damaged file in pages, from several threads at once; so look before.
    found = _sizes(path)
    for name, size in sizes.items():
        if found.get(name) != size:
            raise InputError(f"{path / name} has {found.get(name, 'no')} bytes, not {size}; "
                             f"{remedy}")  # fmt: skip
    tree = schema.abstract(families.rows(config), config.layers)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
    folder = (path / "params").absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            saved: Any = checkpointer.metadata(folder).item_metadata
            schema.check(families.rows(config), config.layers, saved.tree, str(where))
            params = checkpointer.restore(folder, tree)
    except InputError:
        raise
    except Exception as error:  # Orbax raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder} cannot be restored ({reason}); {remedy}") from error
    tokenizer = path / "tokenizer"
    return Loaded(config, params, tokenizer if tokenizer.exists() else None, mark)
