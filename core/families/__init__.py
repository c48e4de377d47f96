"""One file per model family over shared parts.

A family file gives `rows(config)`, `Embed` and `Block` and `FinalNorm` modules, and the reading
and writing of its Hugging Face config: `MODEL_TYPE`, `from_hf`, `to_hf`, `PREFIX`, `IGNORED`.
"""

from types import ModuleType
from typing import Any

from core.config import ModelConfig
from core.errors import InputError
from core.families import gpt2
from core.schema import Row

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}


def of(config: ModelConfig) -> ModuleType:
    if config.family not in FAMILIES:
        raise InputError(f"model family {config.family!r} is unknown; known: {sorted(FAMILIES)}")
    return FAMILIES[config.family]


def from_hf(hf: dict[str, Any], where: str) -> ModelConfig:
    """Read a Hugging Face `config.json`; its `model_type` names the family."""
    for module in FAMILIES.values():
        if hf.get("model_type") == module.MODEL_TYPE:
            return module.from_hf(hf, where)
    known = sorted(module.MODEL_TYPE for module in FAMILIES.values())
    raise InputError(f"{where}: model_type {hf.get('model_type')!r} is not one of {known}")


def rows(config: ModelConfig) -> list[Row]:
    return of(config).rows(config)
