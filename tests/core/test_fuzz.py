"""Damaged and hostile files: a clean error or a valid load, never anything else, a hang or a flood.

Every case is a small valid folder with one file changed by a random edit; the number of a case is
its seed. Errors must be ours, one case may take seconds at most, and memory is capped.
"""

import contextlib
import json
import re
import resource
import shutil
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import tokenizers
from core import adapter, checkpoint, families, files, safetensors, schema
from core.config import ModelConfig
from core.errors import InputError
from core.hf import convert, peft

GOLDEN = Path(__file__).parents[1] / "golden"
ERRORS = (InputError, tokenizers.TokenizerError)
SECONDS, BYTES = 10, 2**30  # of one case
SMALL: dict[str, Any] = dict(vocab_size=7, context=6, width=4, layers=2, heads=2, head_dim=2,
                             mlp_width=5)  # fmt: skip
CONFIGS = {
    "gpt2": ModelConfig("gpt2", **SMALL, eos=6),
    "gemma3": ModelConfig("gemma3", **SMALL, kv_heads=1, window=3, sliding=(True, False), bos=2),
    "gpt_neox": ModelConfig("gpt_neox", **SMALL, tied=False, rotary_dim=2),
}
HOSTILE = (
    b"0", b"-1", b"1", b"2147483648", b"1099511627776", b"18446744073709551616", b"1e308", b"NaN",
    b"-Infinity", b"0.5", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b'"../../x"',
    b"9" * 5000, b"[" * 3000,
)  # fmt: skip


def edited(content: bytes, random: np.random.Generator) -> bytes:
    """One of a dozen edits, each somewhere random."""
    size = len(content)
    a, b = sorted(random.integers(0, size + 1, 2).tolist())
    b = min(b, a + int(random.integers(1, 40)))
    span = content[a:b]
    noise = random.integers(0, 256, int(random.integers(1, 9)), np.uint8).tobytes()
    values = [*re.finditer(rb'-?\d[\d.e+-]*|true|false|null|"[^"\\]{0,60}"', content[: 2**16])]
    header = struct.pack("<Q", int(random.choice([0, 1, 7, size, 2**31, 2**40, 2**63 - 1])))
    edits: list[Callable[[], bytes]] = [
        lambda: content[:a] + noise + content[b:],
        lambda: content[:a] + noise + content[a:],
        lambda: content[:a] + content[b:],
        lambda: content[:b] + span + content[b:],
        lambda: content[:a],
        lambda: content[:a] + bytes(len(span)) + content[b:],
        lambda: content[:a] + b"\xff" * len(span) + content[b:],
        lambda: content[:a] + span[::-1] + content[b:],
        lambda: bytes([content[a] ^ 1 << random.integers(8)]).join((content[:a], content[a + 1 :])),
        lambda: header + content[8:],
    ]
    if a == size:
        edits.pop(8)
    for _ in range(6 if values else 0):  # the edits that get furthest
        value = values[random.integers(len(values))]
        other = values[random.integers(len(values))][0]
        new = other if random.integers(2) else HOSTILE[random.integers(len(HOSTILE))]
        edits.append(
            lambda value=value, new=new: content[: value.start()] + new + content[value.end() :]
        )
    return edits[random.integers(len(edits))]()


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """MemoryError for whoever takes a gigabyte; TimeoutError, case by case, for a hang."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, hard))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


class Outcome(NamedTuple):
    loaded: int
    refused: int


def fuzz(folder: Path, name: str, cases: int, load: Callable[[Path], None]) -> Outcome:
    """Load a folder in which the file of that name is edited, over and over."""
    path = folder / name
    good = path.read_bytes()
    load(folder)
    refused = 0
    with limits():
        for case in range(cases):
            random = np.random.default_rng([zlib.crc32(f"{folder.name}/{name}".encode()), case])
            path.unlink()
            path.write_bytes(edited(good, random))
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                load(folder)
            except ERRORS as error:
                refused += 1
                assert len(str(error)) < 20_000, f"case {case}"
            except BaseException as error:
                error.add_note(f"{name}, case {case}")
                raise
    path.write_bytes(good)
    return Outcome(cases - refused, refused)


def hugging_face(folder: Path, family: str, shard_bytes: float = 1e9) -> Path:
    config = CONFIGS[family]
    folder.mkdir()
    params = schema.init(families.rows(config), config.layers, 0)
    convert.write_hf(folder, config, params, shard_bytes=shard_bytes)
    return folder


def import_all(folder: Path) -> None:
    config, params = convert.import_hf(folder)
    schema.check(families.rows(config), config.layers, params, "the import")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("family", CONFIGS)
def test_weights(tmp_path, family):
    found = fuzz(hugging_face(tmp_path / family, family), "model.safetensors", 1000, import_all)
    assert min(found) > 20


def test_shards(tmp_path):
    folder = hugging_face(tmp_path / "sharded", "gpt2", shard_bytes=1000)
    shard = sorted(path.name for path in folder.glob("model-00002-*.safetensors"))[0]
    for name, cases in (("model.safetensors.index.json", 800), (shard, 500)):
        assert min(fuzz(folder, name, cases, import_all)) > 10


@pytest.mark.parametrize("family", CONFIGS)
def test_hugging_face_configs(tmp_path, family):
    found = fuzz(hugging_face(tmp_path / family, family), "config.json", 1000, import_all)
    assert min(found) > 20


def test_model_folders(tmp_path):
    folder, config = tmp_path / "model", CONFIGS["gpt2"]
    checkpoint.save_model(folder, config, schema.init(families.rows(config), config.layers, 0))

    def load(folder: Path) -> None:
        loaded = checkpoint.load_model(folder)
        rows = families.rows(loaded.config)
        schema.check(rows, loaded.config.layers, loaded.params, "the load")

    assert fuzz(folder, "config.json", 300, load).refused > 100


def test_adapters(tmp_path):
    folder, config = tmp_path / "adapter", CONFIGS["gpt2"]
    spec = adapter.LoraSpec(2, 4.0, ("c_attn", "c_proj"))
    factors = adapter.init(spec, config, 0)
    peft.write(folder, config, adapter.Adapter(spec, factors))

    def load(folder: Path) -> None:
        found = peft.read(folder, config)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found.factors))

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert min(fuzz(folder, name, 800, load)) > 10


TOKENIZERS = {
    "gpt2": ("vocab.json", "merges.txt"),
    "neox": ("tokenizer.json",),
    "gemma": ("tokenizer.json", "tokenizer.model"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("TAPROOT_CACHE", "")

    def load(folder: Path) -> None:
        tokenizer = tokenizers.load(folder)
        tokenizer.decode(tokenizer.encode("Hello,   world 123 é <|endoftext|>", special=True))

    for name in TOKENIZERS[kind]:
        folder = tmp_path / f"{kind}-{Path(name).suffix[1:]}"
        folder.mkdir()
        shared = TOKENIZERS[kind] if kind == "gpt2" else (name,)
        for file in shared:
            shutil.copy(GOLDEN / "tokenizers" / kind / file, folder)
        fuzz(folder, name, 400, load)


# What an edit of one place hardly meets


def test_names_and_types_that_json_allows(tmp_path):
    """Every value of every config replaced by every hostile one."""
    for family in CONFIGS:
        folder = hugging_face(tmp_path / family, family)
        content = files.read_json(folder / "config.json")
        with limits():
            for key in content:
                for value in (None, True, -1, 0, 2**40, 1e308, "x", [], [1], {}, {"x": [None]}):
                    text = json.dumps(content | {key: value})
                    (folder / "config.json").write_text(text)
                    signal.setitimer(signal.ITIMER_REAL, SECONDS)
                    with contextlib.suppress(*ERRORS):
                        import_all(folder)


def test_config_and_tensors_of_different_models(tmp_path):
    places = {family: hugging_face(tmp_path / family, family) for family in CONFIGS}
    for family, folder in places.items():
        for other in places.keys() - {family}:
            mixed = tmp_path / f"{family}-{other}"
            mixed.mkdir()
            shutil.copy(folder / "config.json", mixed)
            shutil.copy(places[other] / "model.safetensors", mixed)
            with pytest.raises(InputError, match=r"has no place in|is missing"):
                convert.import_hf(mixed)


@pytest.mark.parametrize("dtype", ["I32", "BOOL", "U8"])
def test_weights_of_another_type(tmp_path, dtype):
    folder = hugging_face(tmp_path / "gpt2", "gpt2")
    tensors = safetensors.read_folder(folder)
    name = "transformer.h.0.ln_1.bias"
    changed = tensors | {name: np.ones(4, safetensors.DTYPES[dtype])}
    safetensors.write(folder / "model.safetensors", changed)
    with pytest.raises(InputError, match=f"tensor '{name}' holds .*, not floating point"):
        convert.import_hf(folder)
