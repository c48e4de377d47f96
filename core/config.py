"""What a model is (`ModelConfig`) and how it is run (`Execution`).

`ModelConfig` holds every family's architecture as plain data; how it reads and writes a Hugging
Face `config.json` belongs to the family's file. `Execution` never changes a result beyond rounding.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from core.errors import InputError
from core.files import PathLike, read_json


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Sizes count elements; `context` counts tokens."""

    family: str
    vocab_size: int
    context: int
    width: int
    layers: int
    heads: int
    mlp_width: int
    head_dim: int
    norm_eps: float = 1e-5
    activation: str = "gelu_tanh"
    tied: bool = True
    init_std: float = 0.02
    bos: int | None = None
    eos: int | None = None

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> "ModelConfig":
        """Read our own field names; unknown and missing keys raise by name."""
        if not isinstance(fields, dict):
            raise InputError(f"{where} holds no JSON object; expected the fields of a model config")
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise InputError(f"{where}: unknown model config key {unknown[0]!r}; known: {[*known]}")
        fields = {"family": "gpt2", **fields}
        for name, value in fields.items():
            _check_type(known[name], value, where)
        if "width" in fields and "heads" in fields:
            fields.setdefault("mlp_width", 4 * fields["width"])
            fields.setdefault("head_dim", fields["width"] // max(fields["heads"], 1))
        required = [n for n, field in known.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in fields]:
            raise InputError(f"{where}: model config key {missing[0]!r} is missing")
        config = cls(**fields)
        config.check(where)
        return config

    def check(self, where: str) -> None:
        sizes = ("vocab_size", "context", "width", "layers", "heads", "mlp_width", "head_dim")
        for name in sizes:
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{where}: {name} must be positive, got {value}")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _check_type(field: dataclasses.Field[Any], value: Any, where: str) -> None:
    fits: Any = int | float if field.type is float else field.type
    # A bool is an int, too.
    if not isinstance(value, fits) or isinstance(value, bool) != (field.type is bool):
        kind = getattr(field.type, "__name__", field.type)
        raise InputError(f"{where}: {field.name} must be of type {kind}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run a model.

    dtype: of activations and matmuls; parameters, norms, softmax and losses stay float32
        (float64 with float64 parameters, for tests).
    layers: `scan` compiles one block, `unrolled` compiles all; `auto` see `unroll`.
    remat: recompute each block in the backward pass instead of keeping its activations.
    loss_chunk: tokens whose logits are held at once; 0 picks about 2**25 logits (128 MiB).
    """

    dtype: str = "float32"
    layers: Literal["auto", "scan", "unrolled"] = "auto"
    remat: bool = False
    loss_chunk: int = 0

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    def unroll(self, layers: int) -> int:
        """Layers per scan iteration.

        A scanned backward pass on CPU runs its elementwise work in one thread and costs up to
        1.5x an unrolled one, so `auto` unrolls there, up to a depth where compilation would
        dominate; on accelerators the loop costs little and compiles in constant time.
        """
        if self.layers == "auto":
            return layers if jax.default_backend() == "cpu" and layers <= 16 else 1
        return layers if self.layers == "unrolled" else 1

    def tokens_per_chunk(self, vocab_size: int) -> int:
        return self.loss_chunk or max(128, 2**25 // vocab_size)


def read_config(path: PathLike) -> ModelConfig:
    """A model config file: our own fields, or a Hugging Face `config.json` with a `model_type`."""
    from core import families

    content = read_json(path)
    if isinstance(content, dict) and "model_type" in content:
        return families.from_hf(content, str(path))
    return ModelConfig.from_json(content, str(path))
