"""Pooled features against plain numpy, and what they may not depend on."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sae.coder import Coder
from sae.pooling import STATISTICS, Spec, pool

B, T, D, F, K = 5, 13, 6, 40, 12
JUMP = Coder("jumprelu", D, F, D)
CODERS = {
    "jumprelu": JUMP,
    "topk": Coder("topk", D, F, D, k=4),
    "abstopk": Coder("abstopk", D, F, D, k=4),
}
run = jax.jit(pool, static_argnums=0)


def parameters(coder: Coder) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    params = {
        "W_enc": rng.normal(size=(D, F)), "b_enc": rng.normal(0, 0.3, F),
        "W_dec": rng.normal(size=(F, D)), "b_dec": rng.normal(size=D),
    }  # fmt: skip
    if coder.architecture == "jumprelu":
        params["threshold"] = rng.uniform(1, 6, F)
        params["threshold"][7] = 100.0  # never active
    return {name: value.astype(np.float32) for name, value in params.items()}


@pytest.fixture(scope="module")
def batch():
    """Rows of which other tokens count, one of none, and NaN where nothing counts."""
    rng = np.random.default_rng(1)
    x_BTD = rng.normal(0, 1.5, (B, T, D)).astype(np.float32)
    counted_BT = np.arange(T) < np.array([13, 7, 0, 1, 10])[:, None]
    counted_BT[::2, 0] = False
    x_BTD[~counted_BT] = np.nan
    return x_BTD, counted_BT


def features(coder: Coder, params: dict[str, np.ndarray], x_ND: np.ndarray) -> np.ndarray:
    h_NF = x_ND.astype(np.float64) @ params["W_enc"] + params["b_enc"]
    if coder.architecture == "jumprelu":
        return np.where(h_NF > params["threshold"], h_NF.clip(0), 0)
    ranked_NF = np.abs(h_NF) if coder.architecture == "abstopk" else h_NF
    last_N1 = np.sort(ranked_NF, 1)[:, -coder.k, None]
    kept_NF = np.where(ranked_NF >= last_N1, h_NF, 0)
    return np.abs(kept_NF) if coder.architecture == "abstopk" else kept_NF.clip(0)


def largest(f_F: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    index_K = np.argsort(-f_F, kind="stable")[:k]
    return f_F[index_K], np.where(f_F[index_K] > 0, index_K, -1)


def plain(coder: Coder, params: dict[str, np.ndarray], x_ND: np.ndarray) -> dict[str, np.ndarray]:
    """The fingerprint of the tokens that count, one by one."""
    n = len(x_ND)
    f_NF = features(coder, params, x_ND) if n else np.zeros((1, F))
    mean_F, max_F, l0_N = f_NF.mean(0), f_NF.max(0), (f_NF > 0).sum(1)
    share_F = mean_F[mean_F > 0] / mean_F.sum()
    statistics = {
        "tokens": n, "l0_mean": l0_N.mean(), "l0_sd": l0_N.std(), "l0_max": l0_N.max(),
        "l1_mean": f_NF.sum(1).mean(), "largest": f_NF.max(),
        "features": (f_NF > 0).any(0).sum(),
        "top10_share": np.sort(share_F)[-10:].sum(), "entropy": -(share_F * np.log(share_F)).sum(),
        "hidden_norm": np.sqrt((x_ND.astype(np.float64) ** 2).sum(1)).mean() if n else 0,
    }  # fmt: skip
    found = {"statistics": np.array([statistics[name] for name in STATISTICS])}
    found["hidden_mean"] = x_ND.astype(np.float64).mean(0) if n else np.zeros(D)
    for name, pooled_F in (("mean", mean_F), ("max", max_F)):
        found[f"{name}_value"], found[f"{name}_index"] = largest(pooled_F, K)
    return found


@pytest.mark.parametrize("name", CODERS)
def test_equals_plain_numpy(batch, close, name):
    coder, (x_BTD, counted_BT) = CODERS[name], batch
    params = parameters(coder)
    found = jax.device_get(run(Spec(coder, K, 3, 4), params, x_BTD, counted_BT))
    for b in range(B):
        x_ND = x_BTD[b, counted_BT[b]]
        expected = plain(coder, params, x_ND)
        for key in ("mean_index", "max_index"):
            np.testing.assert_array_equal(found[key][b], expected.pop(key))
        close({key: found[key][b] for key in expected}, expected)
        each = [largest(f_F, 3) for f_F in features(coder, params, x_ND)]
        for token, (value_K, index_K) in zip(np.flatnonzero(counted_BT[b]), each, strict=True):
            np.testing.assert_array_equal(found["token_index"][b, token], index_K)
            close(found["token_value"][b, token], value_K)
    none = {key: x_B[2] for key, x_B in found.items() if not key.startswith("token")}
    for key, value in none.items():
        np.testing.assert_array_equal(value, -1 if key.endswith("index") else 0)
    if name == "jumprelu":
        few = run(Spec(coder, 2), params, x_BTD, counted_BT)  # fewer than the statistics look at
        close(few["statistics"], found["statistics"], 1e-6)
        np.testing.assert_array_equal(few["mean_index"], found["mean_index"][:, :2])
        # Some rows have fewer active features than are asked for.
        assert (found["mean_index"] == -1).any(1).sum() > 1 and not (found["mean_index"] == 7).any()


def test_depends_on_neither_chunk_nor_batch_nor_padding(batch, close):
    """1e-6: sums over tokens may run in another order."""
    params, (x_BTD, counted_BT) = parameters(JUMP), batch
    expected = jax.device_get(run(Spec(JUMP, K, 3), params, x_BTD, counted_BT))
    assert {key: x_B.dtype for key, x_B in expected.items() if x_B.dtype != np.float32} == {
        key: np.int32 for key in ("mean_index", "max_index", "token_index")
    }

    def same(found: dict[str, jax.Array], rows: slice) -> None:
        for key, value in expected.items():
            if key.endswith("index"):
                np.testing.assert_array_equal(found[key], value[rows])
            else:
                close(found[key], value[rows], 1e-6)

    for chunk in (7, 26):  # parts of a row; two rows
        same(run(Spec(JUMP, K, 3, chunk), params, x_BTD, counted_BT), slice(None))
    for rows in (slice(1), slice(1, 4)):
        same(run(Spec(JUMP, K, 3), params, x_BTD[rows], counted_BT[rows]), rows)
    wide_BTD = np.pad(x_BTD, ((0, 2), (0, 8), (0, 0)), constant_values=9)
    wide_BT = np.pad(counted_BT, ((0, 2), (0, 8)))
    found = run(Spec(JUMP, K, 3, 10), params, wide_BTD, wide_BT)
    same({k: x[:B, :T] if k.startswith("token") else x[:B] for k, x in found.items()}, slice(None))


def test_the_mean_comes_before_the_largest():
    """Feature 2 is second at every token, and first on average; among equals the lowest wins."""
    coder = Coder("standard", 4, 4, 4)
    eye = np.eye(4, dtype=np.float32)
    params = {"W_enc": eye, "W_dec": eye, "b_enc": eye[0] * 0, "b_dec": eye[0] * 0}
    x_1TD = np.array([[[3, 0, 2, 0], [0, 3, 2, 0]]], np.float32)
    found = run(Spec(coder, 3), params, x_1TD, np.ones((1, 2), bool))
    assert found["mean_index"].tolist() == [[2, 0, 1]]
    assert found["mean_value"].tolist() == [[2, 1.5, 1.5]]
    assert found["max_index"].tolist() == [[0, 1, 2]]


DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from core.sharding import make_mesh, over_rows
from sae.coder import Coder, shardings
from sae.pooling import Spec, pool

with np.load(sys.argv[1]) as file:
    params = dict(file)
x_BTD, counted_BT = params.pop("x"), params.pop("counted")
coder, run = Coder("topk", 6, 40, 6, k=4), jax.jit(pool, static_argnums=0)
expected = run(Spec(coder, 12, 3, 4), params, x_BTD, counted_BT)
mesh = make_mesh(model=2)
split = jax.device_put(params, shardings(params, mesh))
given = (jax.device_put(x, over_rows(mesh)) for x in (x_BTD, counted_BT))
found = run(Spec(coder, 12, 3, 4, mesh), split, *given)
for name, value in expected.items():
    if name.endswith("index"):
        np.testing.assert_array_equal(found[name], value)
    else:
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
print(jax.device_count())
"""


def test_devices_do_not_matter(batch, tmp_path):
    """Rows over `data`, features over `model`: four devices give what one does."""
    x_BTD, counted_BT = (np.concatenate([x, x[:1]]) for x in batch)
    given = {**parameters(CODERS["topk"]), "x": x_BTD, "counted": counted_BT}
    np.savez(tmp_path / "in.npz", **given)  # pyright: ignore[reportArgumentType]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    process = subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path / "in.npz")],
        env={**os.environ, "XLA_FLAGS": flags}, cwd=Path(__file__).parents[2],
        capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["4"]
