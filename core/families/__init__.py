"""One file per model family over shared parts.

A family file gives `rows(config)`; the modules `Embed`, `Block` and `FinalNorm`; `places`, what all
blocks need of the tokens' positions, and `kinds`, what differs between layers, stacked over them;
and what concerns its Hugging Face files: `MODEL_TYPE`, `ARCHITECTURE`, `PREFIX`, `IGNORED`,
`ALIASES`, `from_hf`, `to_hf`; and `heads`, which outputs belong to which head of the attention.
"""

from types import ModuleType
from typing import Any

from core.config import ModelConfig
from core.errors import InputError
from core.families import gemma3, gpt2, gpt_neox
from core.files import PathLike, read_json
from core.schema import Row

FAMILIES: dict[str, ModuleType] = {"gpt2": gpt2, "gemma3": gemma3, "gpt_neox": gpt_neox}


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


def read_config(path: PathLike) -> ModelConfig:
    """A model config file: our own fields, or a Hugging Face `config.json` with a `model_type`."""
    content = read_json(path)
    if isinstance(content, dict) and "model_type" in content:
        return from_hf(content, str(path))
    return ModelConfig.from_json(content, str(path))


def rows(config: ModelConfig) -> list[Row]:
    return of(config).rows(config)
