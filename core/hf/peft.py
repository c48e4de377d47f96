"""LoRA adapters in and out as PEFT writes them: `adapter_config.json`, `adapter_model.safetensors`.

A file holds A as [R,I] and B as [O,R], float32, under `base_model.model.MODULE.lora_A.weight`; its
header also names the fingerprint of the base model where the adapter is ours. Reading is strict:
what would change a number and is not understood is named, and nothing is guessed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import families, safetensors
from core.adapter import PREFIX, Adapter, LoraSpec, rows, slots
from core.config import ModelConfig
from core.errors import InputError
from core.families.hf_config import Keys
from core.files import PathLike, atomic_folder, read_json, write_json
from core.schema import Params, full_shape, get, put

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# In the header of a file of ours: the fingerprint of the model that the adapter belongs to.
BASE = "taproot_base"


def read(folder: PathLike, config: ModelConfig) -> Adapter:
    """An adapter from a PEFT folder, for a model of this architecture.

    Raises InputError naming the key or tensor for everything that is missing, unknown, of another
    shape, not finite, or a feature that would change the numbers and is not supported.
    """
    folder = Path(folder)
    spec, model = _read_spec(folder / CONFIG)
    if not (folder / WEIGHTS).exists():
        other = "; adapter_model.bin is a pickle and never opened, save it with safetensors"
        hint = other if (folder / "adapter_model.bin").exists() else ""
        raise InputError(f"{folder} has no {WEIGHTS}{hint}")
    tensors, wanted = safetensors.read(folder / WEIGHTS), slots(spec, config)
    for name in sorted(tensors.keys() ^ wanted.keys()):
        fault = "is missing from" if name in wanted else "has no place in"
        raise InputError(
            f"{folder / WEIGHTS}: tensor {name!r} {fault} an adapter of {spec.targets!r} for a "
            f"{config.layers}-layer {config.family} model; give the model it was trained on"
        )
    for name, (row, _) in wanted.items():
        if tensors[name].shape != row.shape[::-1]:
            raise InputError(
                f"{folder / WEIGHTS}: tensor {name!r} has shape {list(tensors[name].shape)}, rank "
                f"{spec.rank} and this model ask for {list(row.shape[::-1])}; give the model it "
                "was trained on"
            )
    factors: Params = {}
    for row in rows(spec, config):
        put(factors, row.path, np.zeros(full_shape(row, config.layers), np.float32))
    for name, (row, layer) in wanted.items():
        array = _float32(tensors[name], f"{folder / WEIGHTS}: tensor {name!r}")
        get(factors, row.path)[layer] = array.T
    base = safetensors.metadata(folder / WEIGHTS).get(BASE)
    return Adapter(spec, factors, base, model)


def write(folder: PathLike, config: ModelConfig, adapter: Adapter, tokenizer: Any = None) -> None:
    """Write an adapter as a PEFT folder, atomically, with a `tokenizers.Tokenizer` beside it."""
    spec, factors = adapter.spec, jax.tree.map(np.asarray, adapter.factors)
    tensors = {
        name: _float32(get(factors, row.path)[layer].T, f"the adapter's {row.path!r}")
        for name, (row, layer) in slots(spec, config).items()
    }
    # Conv1D keeps [in, out] in its file, so its update must be turned before it is added.
    conv1d = {row.transpose for row in families.rows(config) if row.path.endswith("/w")} == {False}
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.model,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.rslora,
        "target_modules": _targets(spec, config),
        "layers_to_transform": spec.layers if isinstance(spec.targets, tuple) else None,
        "fan_in_fan_out": conv1d,
        "bias": "none",
    }
    with atomic_folder(folder) as place:
        if tokenizer is not None:
            tokenizer.save(place)
        header = {"format": "pt"} | ({BASE: adapter.base} if adapter.base else {})
        safetensors.write(place / WEIGHTS, tensors, header)
        write_json(place / CONFIG, content)


def _targets(spec: LoraSpec, config: ModelConfig) -> list[str]:
    """Names as given; of an expression, which for PEFT must match no norm, what it matches here."""
    if isinstance(spec.targets, tuple):
        return list(spec.targets)
    names = [name.split(".lora_")[0] for name in slots(spec, config)]
    return list(dict.fromkeys(name.removeprefix(PREFIX) for name in names))


def _float32(array: np.ndarray, where: str) -> np.ndarray:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"{where} holds {array.dtype}, not floating point")
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{where} holds NaN or infinity; train the adapter again")
    return array


# Keys of an adapter_config.json that change no number here.
_INERT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "revision", "inference_mode",
    "layers_pattern", "megatron_core", "qalora_group_size", "eva_config", "runtime_config",
    "fan_in_fan_out",  # how the base keeps its weights, which its own config says, too
}  # fmt: skip
# Other ways to start change the base's weights, too, which then are not those of its files.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


def _read_spec(path: Path) -> tuple[LoraSpec, str | None]:
    """What an `adapter_config.json` says, and the name of its base model."""
    content = read_json(path)
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not supported, only 'LORA'")
    keys = Keys({key: value for key, value in content.items() if value is not None}, str(path),
                "an adapter")  # fmt: skip

    def take(key: str, default: Any, what: str, fits: Callable[[Any], bool]) -> Any:
        value = keys.left.pop(key, default)
        if not fits(value):
            raise InputError(f"{path}: {key} must be {what}, got {value!r}")
        return value

    keys.fixed(bias="none")
    take("init_lora_weights", True, f"one of {_STARTS}", lambda x: x in _STARTS)
    dropout = take("lora_dropout", 0, "a number in [0, 1)",
                   lambda x: type(x) in (int, float) and 0 <= x < 1)  # fmt: skip
    targets = take("target_modules", None, "a regular expression or a list of names",
                   lambda x: bool(x) and isinstance(x, str) or _all(str, x))  # fmt: skip
    layers = take("layers_to_transform", [], "layer numbers",
                  lambda x: type(x) is int or x == [] or _all(int, x))  # fmt: skip
    layers = [layers] if isinstance(layers, int) else layers
    model = take("base_model_name_or_path", "", "a text", lambda x: isinstance(x, str))
    spec = LoraSpec(
        rank=keys.size("r", 8),
        alpha=keys.number("lora_alpha", 8),
        targets=targets if isinstance(targets, str) else tuple(targets),
        dropout=float(dropout),
        rslora=keys.flag("use_rslora", False),
        layers=tuple(layers) or None,
    )
    for key, value in keys.left.items():
        if value and key not in _INERT:  # without a value, a feature is off
            raise InputError(f"{path}: {key}={value!r} is not supported; merge the adapter with "
                             "PEFT and give the merged model")  # fmt: skip
    return spec, model or None


def _all(kind: type, values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(type(x) is kind for x in values)
