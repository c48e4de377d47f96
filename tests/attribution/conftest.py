"""A tiny model whose every parameter matters, rows for it, and gradients taken the plain way."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from core import families, model, schema
from core.checkpoint import Loaded, fingerprint, load_model
from core.config import Execution, ModelConfig
from core.rows import Rows, load_rows, save_rows

# No two sizes that could be swapped by mistake are equal.
CONFIG = ModelConfig("gpt2", 61, 40, 12, 3, 2, 20, 6)
# As tests/conftest.py has them, for processes that tests start.
QUICK = {
    "xla_llvm_disable_expensive_passes": True,
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
}


class Tiny:
    """What the tests of this folder share; every method is a function of its arguments."""

    config = CONFIG
    untied = dataclasses.replace(CONFIG, tied=False)
    quick = QUICK
    jit = staticmethod(jax.jit)

    @staticmethod
    def params(config: ModelConfig = CONFIG, seed: int = 0, dtype: str = "float32"):
        """Random everywhere: biases and norms too, so that no mistake hides behind a zero."""
        random, params = np.random.default_rng(seed), {}
        for row in families.rows(config):
            shape = schema.full_shape(row, config.layers)
            spread = shape[-1] ** -0.5 if len(row.shape) == 2 else 0.3
            value = random.normal(0, spread, shape) + row.path.endswith("/g")
            schema.put(params, row.path, value.astype(dtype))
        return jax.tree.map(jax.numpy.asarray, params)

    @classmethod
    def loaded(cls, config: ModelConfig = CONFIG, seed: int = 0) -> Loaded:
        params = cls.params(config, seed)
        return Loaded(config, params, None, fingerprint(config, params))

    @staticmethod
    def batch(lengths: list[int], seed: int = 0, length: int | None = None):
        """(ids, labels), int32 [B,T]: right padding, a masked prompt in every second row."""
        random = np.random.default_rng(seed)
        ids_BT = np.zeros((len(lengths), length or max(lengths)), np.int32)
        labels_BT = np.full_like(ids_BT, -100)
        for b, n in enumerate(lengths):
            ids_BT[b, :n] = random.integers(1, CONFIG.vocab_size, n)
            masked = n // 3 if b % 2 else 0
            labels_BT[b, masked:n] = ids_BT[b, masked:n]
        return ids_BT, labels_BT

    @classmethod
    def rows(cls, path: Path, lengths: list[int], seed: int = 0, **columns: list) -> Rows:
        ids_BT, labels_BT = cls.batch(lengths, seed)
        parts = [(ids_BT[b, :n], labels_BT[b, :n]) for b, n in enumerate(lengths)]
        save_rows(path, [p[0] for p in parts], [p[1] for p in parts], columns)
        return load_rows(path, CONFIG.vocab_size, CONFIG.context)

    @classmethod
    def plain_gradients(cls, config: ModelConfig, params, ids_BT, labels_BT, bias: bool = False):
        """{site path: [B,L,O,I(+1)]} of each row's summed token losses by vmap(grad), no sink."""
        execution = Execution(str(params["embed"]["wte"].dtype))

        def loss(blocks, ids_T, labels_T):
            variables = {"params": {**params, "blocks": blocks}}
            ids_1T, labels_1T = ids_T[None], labels_T[None]
            return model.token_losses(config, execution, variables, ids_1T, labels_1T).sum()

        one = cls.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))
        blocks = one(params["blocks"], ids_BT, labels_BT)
        found = {}
        for name, grads in blocks.items():
            if "w" in grads:
                weight_BLOI = np.swapaxes(np.asarray(grads["w"]), -1, -2)
                column = np.asarray(grads["b"])[..., None]
                found[f"blocks/{name}"] = (
                    np.concatenate([weight_BLOI, column], -1) if bias else weight_BLOI
                )
        return found


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


GOLDEN = Path(__file__).parents[1] / "golden" / "bergson"


class Bergson:
    """Numbers of Bergson itself on a small model; see tests/golden/make_bergson.py."""

    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.loaded = load_model(self.folder / "model")
        self.config, self.params = self.loaded.config, self.loaded.params

    @functools.cache  # noqa: B019 (as long as the process)
    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """All arrays of `FILE.npz`."""
        with np.load(self.folder / f"{file}.npz", allow_pickle=False) as found:
            return dict(found)

    def parts(self, file: str, prefix: str) -> dict[str, np.ndarray]:
        """Arrays of `FILE.npz` below `PREFIX/`, in Bergson's order."""
        found = self.arrays(file).items()
        return {k.removeprefix(f"{prefix}/"): x for k, x in found if k.startswith(f"{prefix}/")}

    def batch(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids, labels), int32 [B,T], of `train` or `query`."""
        rows = self.arrays("rows")
        return np.maximum(rows[f"{split}/ids"], 0), rows[f"{split}/labels"]

    def rows(self, split: str, path: Path) -> Rows:
        """The same as a rows folder."""
        found, lengths = self.arrays("rows"), self.arrays("rows")[f"{split}/lengths"]
        ids, labels = (
            [row[:n] for row, n in zip(found[f"{split}/{key}"], lengths, strict=True)]
            for key in ("ids", "labels")
        )
        save_rows(path, ids, labels)
        return load_rows(path, self.config.vocab_size, self.config.context)


@pytest.fixture(scope="session", params=["gpt2", "gemma3"])
def bergson(request) -> Bergson:
    return _bergson(request.param)


@functools.cache
def _bergson(name: str) -> Bergson:
    return Bergson(name)
