"""Which tokens are bos, eos and pad, as the files beside a vocabulary declare it.

Hugging Face spreads this over tokenizer_config.json, special_tokens_map.json and the model's
config.json. The first that mentions a role decides, null meaning none; where none mentions it, the
kind of tokenizer has a default.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers.files import TokenizerError, parse_object

ENDOFTEXT = "<|endoftext|>"


class Roles(NamedTuple):
    """Token strings, and whether the model expects bos first."""

    bos: str | None
    eos: str | None
    pad: str | None
    add_bos: bool


def read_roles(
    folder: Path,
    files: Mapping[str, bytes],
    vocab: Mapping[str, int],
    control: Mapping[str, int],
    default: Roles,
) -> Roles:
    """Roles from the files of `files.BESIDE`; default is what holds where none of them says.

    A model's config keeps its family's default ids even where its vocabulary is another, so an id
    found there counts only if it is a control token's. Raises TokenizerError for a token that
    vocab lacks.
    """
    declared = {
        name: parse_object(folder / name, files[name])
        for name in ("tokenizer_config.json", "special_tokens_map.json")
        if name in files
    }
    model = parse_object(folder / "config.json", files.get("config.json", b"{}"))
    tokens = {i: token for token, i in control.items()}
    found: dict[str, str | None] = {}
    for role in ("bos", "eos", "pad"):
        found[role] = getattr(default, role)
        model_id = model.get(f"{role}_token_id")
        if isinstance(model_id, list) and model_id:
            model_id = model_id[0]
        if isinstance(model_id, int) and model_id in tokens:
            found[role] = tokens[model_id]
        for name, values in reversed(declared.items()):
            if f"{role}_token" in values:
                found[role] = _content(folder / name, role, values[f"{role}_token"], vocab)
    config = declared.get("tokenizer_config.json", {})
    return Roles(**found, add_bos=bool(config.get("add_bos_token", default.add_bos)))


def _content(path: Path, role: str, value: Any, vocab: Mapping[str, int]) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or value in vocab:
        return value
    raise TokenizerError(f"{path}: {role}_token {value!r} is not a token of this tokenizer")


def roles_config(folder: Path, files: Mapping[str, bytes], roles: Roles) -> bytes:
    """tokenizer_config.json with the roles settled, so that it alone decides on reading."""
    name = "tokenizer_config.json"
    settled = {
        "bos_token": roles.bos,
        "eos_token": roles.eos,
        "pad_token": roles.pad,
        "add_bos_token": roles.add_bos,
    }
    config = parse_object(folder / name, files.get(name, b"{}")) | settled
    return (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
