"""What all formats share: a file's tensors under our names, in float32, checked before use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from core import files, safetensors
from core.errors import InputError
from sae import coder as coders
from sae.coder import About, Coder, Sae

Tensors = dict[str, np.ndarray]
NAMED = 8  # tensors of a file that an error lists


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError for anything else."""
    config = files.read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object; download or copy it again")
    return config


def size(config: Mapping[str, Any], name: str, where: Path) -> int:
    """A positive whole number of a config; InputError if it is missing or another thing."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{where}: {name} is {value!r}, not a positive whole number; copy the "
                         "config that was saved with these weights")  # fmt: skip
    return value


def taken(tensors: Mapping[str, np.ndarray], names: Mapping[str, str], where: Path) -> Tensors:
    """A file's tensors in float32 by our names, given {theirs: ours}; `theirs?` may be missing.

    Matrices of torch's Linear, whose names end in `.weight`, are transposed into ours. What is
    float32 already stays in its mapped file. InputError names a tensor that is missing, has no
    place, is no float, or holds NaN or infinity.
    """
    asked = {theirs.removesuffix("?"): ours for theirs, ours in names.items()}
    missing = [name for name in names if not name.endswith("?") and name not in tensors]
    unexpected = sorted(tensors.keys() - asked.keys())
    if missing or unexpected:
        fault = (
            f"no tensor {missing[0]!r}" if missing else f"an unexpected tensor {unexpected[0]!r}"
        )
        held = ", ".join(sorted(tensors)[:NAMED]) + (", ..." if len(tensors) > NAMED else "")
        raise InputError(
            f"{where} has {fault}; this architecture has {', '.join(asked)}, the file {held}: is "
            "it an SAE's, is it whole, and its config the one saved with it?"
        )
    params = {}
    for theirs, ours in asked.items():
        if theirs in tensors:
            value = _float32(tensors[theirs], f"{where}: tensor {theirs!r}")
            params[ours] = value.T if theirs.endswith(".weight") else value
    return params


def _float32(value: np.ndarray, what: str) -> np.ndarray:
    if value.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        raise InputError(f"{what} is of type {value.dtype}; store it as float32")
    if value.dtype != np.float32:
        value = safetensors.copied(np.atleast_1d(value), np.float32).reshape(value.shape)
    for _, block in safetensors.blocks(np.atleast_1d(value)):
        if not np.isfinite(block).all():
            raise InputError(f"{what} holds NaN or infinity; it is damaged, or its training "
                             "diverged: take another file")  # fmt: skip
    return value


def other_axis(matrix: np.ndarray, known: int) -> int:
    """The size of a matrix's axis that is not `known`, whichever way round the matrix lies."""
    return next((n for n in matrix.shape if n != known), known)


def made(coder: Coder, params: Tensors, about: About, where: Path) -> Sae:
    """The SAE of these parameters when they are all it needs; InputError names what is not."""
    coders.check(coder, params, str(where))
    params = {name: np.ascontiguousarray(value) for name, value in params.items()}
    return Sae(coder, params, about, coders.fingerprint(coder, params))
