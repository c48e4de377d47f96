"""Reading a Hugging Face `config.json` key by key; what nobody read must be known to be inert.

A key that changes the model and is not understood would otherwise give wrong numbers silently.
"""

from typing import Any, NamedTuple

from core.errors import InputError

# Of every model: what the file is, how others train, serve or label with it.
_INERT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "_name_or_path", "task_specific_params", "gradient_checkpointing", "pad_token_id",
    "return_dict", "id2label", "label2id", "is_encoder_decoder", "problem_type", "tokenizer_class",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward", "_num_labels",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "cache_implementation", "attention_dropout", "torchscript", "pretraining_tp",
}  # fmt: skip
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu": "gelu", "relu": "relu", "silu": "silu", "swish": "silu",
}  # fmt: skip


class Rope(NamedTuple):
    """As transformers 5 names them; None = not given."""

    rope_theta: float | None
    partial_rotary_factor: float | None


class Keys:
    """The keys of one file. Every method takes a key out and names it when its value is wrong."""

    def __init__(self, content: dict[str, Any], where: str, family: str):
        self.left, self.where, self.family = dict(content), where, family

    def size(self, key: str, default: int | None = None) -> int:
        """A positive integer; without a default it must be there. null counts as absent."""
        value = self.left.pop(key, None)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise InputError(f"{self.where}: key {key!r} is missing or not a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        """A positive number."""
        value = self.left.pop(key, None)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise InputError(f"{self.where}: {key} must be a positive number, got {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.left.pop(key, default)
        if type(value) is not bool:
            raise InputError(f"{self.where}: {key} must be true or false, got {value!r}")
        return value

    def fixed(self, **only: Any) -> None:
        """Keys that are understood at one value."""
        for key, value in only.items():
            if (found := self.left.pop(key, value)) != value:
                raise InputError(
                    f"{self.where}: {key}={found!r} is not supported for {self.family}"
                )

    def activation(self, key: str, default: str) -> str:
        value = self.left.pop(key, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            raise InputError(f"{self.where}: {key}={value!r} is not supported for {self.family}")
        return _ACTIVATIONS[value]

    def ids(self) -> dict[str, Any]:
        """bos, eos and stops of a `ModelConfig`; the file may list several ends of a text."""
        found: dict[str, list[int]] = {}
        for key in ("bos_token_id", "eos_token_id"):
            value = self.left.pop(key, None)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(i) is int and i >= 0 for i in values):
                raise InputError(f"{self.where}: {key} must be a token id, got {value!r}")
            found[key] = values
        bos, eos = found["bos_token_id"], found["eos_token_id"]
        return {
            "bos": bos[0] if bos else None,
            "eos": eos[0] if eos else None,
            "stops": tuple(eos[1:]),
        }

    def rope(self, kind: str | None, theta: list[str], share: list[str]) -> Rope:
        """Rotary settings: `rope_parameters` of transformers 5 (of a kind of layer) and older keys.

        theta, share: the older keys. What is given more than once must agree; scaled frequencies
        are not supported.
        """
        table: Any = self.left.get("rope_parameters") or {}
        table = table.get(kind, {}) if kind and isinstance(table, dict) else table
        if not isinstance(table, dict):
            raise InputError(f"{self.where}: rope_parameters must hold JSON objects")
        if (scaling := table.get("rope_type", "default")) != "default":
            raise InputError(
                f"{self.where}: rope_type={scaling!r} is not supported for {self.family}"
            )
        if unknown := sorted(table.keys() - {"rope_type", *Rope._fields}):
            raise InputError(f"{self.where}: unknown key {unknown[0]!r} in rope_parameters")
        found: dict[str, float] = {}
        for name, keys in zip(Rope._fields, (theta, share), strict=True):
            for value in (table.get(name), *(self.left.pop(key, None) for key in keys)):
                if value is None:
                    continue
                if type(value) not in (int, float) or not 0 < value < float("inf"):
                    raise InputError(f"{self.where}: {name} must be positive, got {value!r}")
                if found.setdefault(name, value) != value:
                    raise InputError(
                        f"{self.where}: rope_parameters and {' or '.join(keys)} disagree about "
                        f"{name}: {found[name]} and {value}; keep the one that holds"
                    )
        return Rope(*(found.get(name) for name in Rope._fields))

    def finish(self, *inert: str) -> None:
        """Raise unless every key was read or changes nothing here."""
        for key in ("rope_parameters", *inert):
            self.left.pop(key, None)
        if unknown := sorted(self.left.keys() - _INERT):
            raise InputError(
                f"{self.where}: unknown key {unknown[0]!r}; remove it if it changes nothing"
            )


def ends(eos: int | None, stops: tuple[int, ...]) -> int | list[int] | None:
    """`eos_token_id` as Hugging Face writes it."""
    return [eos, *stops] if eos is not None and stops else eos
