"""What a model is (`ModelConfig`) and how it is run (`Execution`).

`ModelConfig` holds every family's architecture as plain data; how it reads and writes a Hugging
Face `config.json` belongs to the family's file. `Execution` never changes a result beyond rounding.
"""

import dataclasses
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp

from core.errors import InputError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model. Sizes count elements; `context` and `window` count tokens.

    None means: kv_heads as many as heads, rotary_dim the whole head, query_scale head_dim**-0.5.
    sliding: for each layer, whether it sees only the last `window` tokens (itself included) and
    turns by `rope_theta_local`; empty = no layer. stops: further ids that end a text, beside eos.
    A family reads the fields it has a use for.
    """

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
    stops: tuple[int, ...] = ()
    kv_heads: int | None = None
    rotary_dim: int | None = None
    rope_theta: float = 10_000.0
    rope_theta_local: float = 10_000.0
    window: int = 0
    sliding: tuple[bool, ...] = ()
    query_scale: float | None = None
    parallel_residual: bool = True

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def scale(self) -> float:
        """What a query times a key is multiplied by."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @classmethod
    def from_json(cls, fields: dict[str, Any], where: str) -> "ModelConfig":
        """Read our own field names; unknown and missing keys raise by name."""
        if not isinstance(fields, dict):
            raise InputError(f"{where} holds no JSON object; expected the fields of a model config")
        known = {field.name: field for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise InputError(f"{where}: unknown model config key {unknown[0]!r}; known: {[*known]}")
        fields = {"family": "gpt2", **fields}
        fields = {name: _read(known[name], value, where) for name, value in fields.items()}
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
        """Raise InputError, naming `where` and the field, for sizes that fit no model."""
        sizes = ("vocab_size", "context", "width", "layers", "heads", "groups", "mlp_width",
                 "head_dim")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if value < 1:
                raise InputError(f"{where}: {name} must be positive, got {value}")
        if self.heads % self.groups:
            raise InputError(
                f"{where}: {self.heads} heads cannot share {self.groups} kv_heads evenly"
            )
        if self.rotary_dim is not None and not 0 < self.rotary_dim <= self.head_dim:
            raise InputError(f"{where}: rotary_dim must be 1 to head_dim, got {self.rotary_dim}")
        if self.sliding and len(self.sliding) != self.layers:
            raise InputError(f"{where}: sliding names {len(self.sliding)} of {self.layers} layers")
        if any(self.sliding) and self.window < 1:
            raise InputError(f"{where}: window must be positive where a layer is sliding")
        for name in ("bos", "eos"):
            if (i := getattr(self, name)) is not None and i < 0:
                raise InputError(f"{where}: {name} must not be negative, got {i}")

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for a JSON file."""
        return dataclasses.asdict(self)


def _read(field: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """A field's value out of JSON, of the type the field is declared with."""
    kind: Any = field.type
    if isinstance(kind, types.GenericAlias):  # tuple[item, ...], a list in JSON
        item = kind.__args__[0]
        if isinstance(value, list | tuple) and all(type(v) is item for v in value):
            return tuple(value)
        raise InputError(f"{where}: {field.name} must be a list of {item.__name__}, got {value!r}")
    allowed = {bool} if kind is bool else {int, float} if kind is float else {*_union(kind)}
    if type(value) not in allowed:  # not isinstance: a bool is an int, too
        name = getattr(kind, "__name__", str(kind))
        raise InputError(f"{where}: {field.name} must be of type {name}, got {value!r}")
    return value


def _union(kind: Any) -> tuple[type, ...]:
    members = getattr(kind, "__args__", (kind,))
    return (*members, int) if float in members else members


@dataclasses.dataclass(frozen=True)
class Execution:
    """How to run a model.

    dtype: of activations and matmuls; parameters, norms, softmax and losses stay float32
        (float64 with float64 parameters, for tests).
    layers: `scan` compiles one block, `unrolled` compiles all; `auto` see `unroll`.
    remat: recompute each block in the backward pass instead of keeping its activations;
        `products` keeps those that a product with a weight made.
    loss_chunk: tokens whose logits are held at once; 0 picks about 2**25 logits (128 MiB).
    """

    dtype: str = "float32"
    layers: Literal["auto", "scan", "unrolled"] = "auto"
    remat: Literal[False, True, "products"] = False
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
