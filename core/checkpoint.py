"""Models on disk: our own folders, the end of a training run, or a Hugging Face folder.

A model folder holds `config.json` (architecture and fingerprint), `params/` (Orbax) and
`tokenizer/`. The fingerprint is a hash of architecture and weights: stores and scores record it.
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
from core.files import PathLike, atomic_folder, read_json, write_json

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
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / "params").absolute(), params)
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        content = {"kind": KIND, "model": config.to_json(), "fingerprint": mark}
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


def _load_own(path: Path, content: dict[str, Any]) -> Loaded:
    import orbax.checkpoint as ocp

    config = ModelConfig.from_json(content.get("model", {}), str(path / "config.json"))
    tree = schema.abstract(families.rows(config), config.layers)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore((path / "params").absolute(), tree)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path / 'params'} cannot be restored ({error}); convert or train the "
                         "model again") from error  # fmt: skip
    tokenizer = path / "tokenizer"
    return Loaded(config, params, tokenizer if tokenizer.exists() else None, content["fingerprint"])
