"""Models on disk: our own folders, the end of a training run, or a Hugging Face folder.

A model folder holds `config.json` (architecture and fingerprint), `params.safetensors` (our own
names and layout, see `core.schema`) and `tokenizer/`. The fingerprint is a hash of architecture and
weights: stores and scores record it.

An adapter folder (`core.hf.peft`) is attached to a base model, or names its own. A run that trained
an adapter holds it in `adapter/`, and is that adapter.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from core import adapter as adapters
from core import families, safetensors, schema
from core.adapter import Adapter
from core.config import ModelConfig
from core.errors import InputError
from core.files import PathLike, atomic_folder, read_json, require_space, write_json
from core.hf import hub, peft

KIND = "taproot-model"
WEIGHTS = "params.safetensors"
# A Hugging Face folder's tokenizer lies beside its weights, under some of these names.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.bpe", "encoder.json",
                    "tokenizer.model", "bytes_tokenizer.json")  # fmt: skip


class Loaded(NamedTuple):
    """A model in memory: numpy arrays, for the caller to place on its devices.

    Of a model with an adapter, params are the base's; fingerprint and tokenizer are of both.
    """

    config: ModelConfig
    params: schema.Params
    tokenizer: Path | None
    fingerprint: str
    adapter: Adapter | None = None

    @property
    def variables(self) -> dict[str, schema.Params]:
        """What `core.model` runs."""
        if self.adapter is None:
            return {"params": self.params}
        lora = adapters.collection(self.adapter.spec, self.config, self.adapter.factors)
        return {"params": self.params, "lora": lora}


def fingerprint(config: ModelConfig, params: schema.Params) -> str:
    """sha256 of architecture and values; the dtype that holds the values is no part of it."""
    # Without the fields at their defaults, so that a new field changes no model's fingerprint.
    plain = {f.name: f.default for f in dataclasses.fields(config)}
    fields = {name: value for name, value in config.to_json().items() if value != plain[name]}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
    for row in families.rows(config):
        digest.update(row.path.encode())
        for _, block in safetensors.blocks(np.asarray(schema.get(params, row.path))):
            digest.update(np.ascontiguousarray(block, np.float32).data)
    return digest.hexdigest()


def save_model(
    path: PathLike, config: ModelConfig, params: schema.Params, tokenizer: Any = None
) -> str:
    """Write a model folder atomically, with a `tokenizers.Tokenizer`; returns the fingerprint.

    The weights keep the dtype they have.
    """
    mark = fingerprint(config, params)
    tensors = {row.path: schema.get(params, row.path) for row in families.rows(config)}
    with atomic_folder(path) as folder:
        require_space(folder, sum(x.nbytes for x in tensors.values()))
        safetensors.write(folder / WEIGHTS, tensors)
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        content = {"kind": KIND, "model": config.to_json(), "fingerprint": mark}
        write_json(folder / "config.json", content)
    return mark


def load_model(path: PathLike, adapter: PathLike | None = None, dtype: str = "float32") -> Loaded:
    """Load a model folder, a finished run, or a Hugging Face folder, and attach an adapter.

    path, adapter: a name on the Hub (as text, see `core.hf.hub`) stands for its folder.
    dtype: of the weights in memory, whatever they are stored in; under an adapter float32.
    adapter: a PEFT folder, or a run that made one; at `path`, it is attached to the base it names.
    Its own tokenizer goes before the base's.
    """
    name, path = str(path), hub.locate(path)
    attached = None if adapter is None else hub.locate(adapter)
    own = _adapter_in(path)
    if own is not None and attached is not None:
        raise InputError(f"{path} has an adapter already; give its base model for --model")
    if own is None and attached is None:
        return _load_base(path, dtype)
    folder = own or _adapter_in(attached or path)
    if folder is None:
        raise InputError(f"{adapter} is no adapter: it has no {peft.CONFIG}; give a PEFT folder or "
                         "a finished run with --lora-rank")  # fmt: skip
    name, base = (name, path) if own is None else _base_of(own)
    loaded = _load_base(base, "float32")
    found = peft.read(folder, loaded.config)
    if found.base not in (None, loaded.fingerprint):
        raise InputError(
            f"adapter {folder} was trained on another model ({found.base[:12]}) than {base} "
            f"({loaded.fingerprint[:12]}); give the model it was trained on"
        )
    model = name if hub.is_name(name) else str(base.resolve())
    found = found._replace(base=loaded.fingerprint, model=model)
    return loaded._replace(
        tokenizer=folder if has_tokenizer(folder) else loaded.tokenizer,
        fingerprint=adapters.fingerprint(loaded.config, found),
        adapter=found,
    )


def _adapter_in(path: Path) -> Path | None:
    """The adapter that a folder is, or that it holds as the run that trained it."""
    if (path / peft.CONFIG).exists():
        return path
    inner = path / "adapter"
    if (path / "config.json").exists() and (inner / peft.CONFIG).exists():
        content = read_json(path / "config.json")
        return inner if isinstance(content, dict) and "command" in content else None
    return None


def _base_of(adapter: Path) -> tuple[str, Path]:
    """The base model that an adapter's config names, and its folder."""
    content = read_json(adapter / peft.CONFIG)
    name = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    folder = hub.locate(name) if isinstance(name, str) else None
    if not isinstance(name, str) or folder is None or not folder.is_dir() or _adapter_in(folder):
        raise InputError(f"the base model of adapter {adapter}, {name!r}, is not here; give it as "
                         f"--model BASE --adapter {adapter}")  # fmt: skip
    return name, folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer lies in a Hugging Face folder."""
    return any((folder / name).exists() for name in _TOKENIZER_FILES)


def _load_base(path: Path, dtype: str) -> Loaded:
    from core.hf import convert

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
        return _load_base(path / "model", dtype)
    if content.get("kind") == KIND:
        return _load_own(path, content, dtype)
    config, params = convert.import_hf(path, dtype)
    tokenizer = path if has_tokenizer(path) else None
    return Loaded(config, params, tokenizer, fingerprint(config, params))


def _load_own(path: Path, content: dict[str, Any], dtype: str) -> Loaded:
    where, remedy = path / "config.json", "copy, convert or train the model again"
    config = ModelConfig.from_json(content.get("model", {}), str(where))
    mark = content.get("fingerprint")
    if not isinstance(mark, str):
        raise InputError(f"{where} has no fingerprint; {remedy}")
    tensors, rows = safetensors.read(path / WEIGHTS), families.rows(config)
    schema.check(rows, config.layers, tensors, str(path / WEIGHTS))
    params: schema.Params = {}
    for row in rows:
        if not jnp.issubdtype(tensors[row.path].dtype, jnp.floating):
            raise InputError(f"{path / WEIGHTS}: {row.path!r} holds {tensors[row.path].dtype}, not "
                             f"floating point; {remedy}")  # fmt: skip
        schema.put(params, row.path, safetensors.copied(tensors[row.path], dtype))
    tokenizer = path / "tokenizer"
    return Loaded(config, params, tokenizer if tokenizer.exists() else None, mark)
