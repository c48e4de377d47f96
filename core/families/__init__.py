"""One file per model family over shared parts.

A family file gives `rows(config)`, `Embed` and `Block` and `FinalNorm` modules, and the reading
and writing of its Hugging Face config: `MODEL_TYPE`, `from_hf`, `to_hf`, `PREFIX`, `IGNORED`.
"""

from types import ModuleType

from core.config import ModelConfig
from core.errors import InputError
from core.families import gpt2
from core.schema import Row

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2}


def of(config: ModelConfig) -> ModuleType:
    if config.family not in FAMILIES:
        raise InputError(f"model family {config.family!r} is unknown; known: {sorted(FAMILIES)}")
    return FAMILIES[config.family]


def rows(config: ModelConfig) -> list[Row]:
    return of(config).rows(config)
