"""SAEs against SAELens's own numbers (tests/golden/make_sae.py), and what holds for every one."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import InputError
from core.sharding import make_mesh
from sae import coder as coders
from sae.coder import About, Coder, Sae, check, check_input, encode, preactivations, reconstruct

GOLDEN = Path(__file__).parents[1] / "golden" / "sae"
CASES = json.loads((GOLDEN / "inference.json").read_text())
FEATURES, RECONSTRUCTION = 2e-5, 5e-5  # of the largest, or of one where that is less
D, F = 6, 16
PLAIN = [
    Coder("standard", D, F, D, centred=True, normalize="layer_norm"),
    Coder("gated", D, F, D),
    Coder("jumprelu", D, F, D, normalize="constant_norm_rescale"),
    Coder("topk", D, F, D, k=3, centred=True, rescale=True),
    Coder("abstopk", D, F, D, k=3),
    Coder("groupmax", D, F, D, k=4),
    Coder("matching_pursuit", D, F, D, centred=True, residual_threshold=0.1),
    Coder("jumprelu", D, F, D + 1, transcoder=True, normalize="layer_norm"),
]
names = [f"{c.architecture}{'_transcoder' * c.transcoder}" for c in PLAIN]
every = pytest.mark.parametrize("coder", PLAIN, ids=names)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "inference.npz") as file:
        return dict(file)


def random_params(coder: Coder, seed: int = 0, skip: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = coders.shapes(coder)
    if skip:
        shapes["W_skip"] = (coder.d_in, coder.d_out)
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if coder.architecture == "matching_pursuit":
        params["W_dec"] /= np.linalg.norm(params["W_dec"], axis=1, keepdims=True)
    return params


def random_x(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(1, 2, size=shape), jnp.float32)


def from_saelens(cfg: dict, golden: dict) -> tuple[Coder, dict[str, np.ndarray]]:
    kind = cfg["architecture"]
    transcoder, skip = kind.endswith("transcoder"), "skip" in kind
    if transcoder:
        kind = "jumprelu" if "jumprelu" in kind else "standard"
    coder = Coder(
        kind,
        cfg["d_in"],
        cfg["d_sae"],
        cfg.get("d_out", cfg["d_in"]),
        k=cfg.get("k", 0),
        centred=cfg.get("apply_b_dec_to_input", True),
        normalize=cfg.get("normalize_activations", "none"),
        rescale=cfg.get("rescale_acts_by_decoder_norm", False),
        transcoder=transcoder,
        residual_threshold=cfg.get("residual_threshold", 0.0),
        max_iterations=cfg.get("max_iterations", 0),
        stop_on_duplicate=cfg.get("stop_on_duplicate_support", True),
    )
    params = {name: golden[f"params/{cfg['params']}/{name}"] for name in coders.shapes(coder)}
    if skip:
        params["W_skip"] = golden[f"params/{cfg['params']}/W_skip"].T
    return coder, params


def off(found, expected) -> float:
    expected = np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", CASES)
def test_as_saelens(name, golden):
    coder, params = from_saelens(CASES[name], golden)
    check(coder, params, name)
    f, y = reconstruct(coder, params, jnp.asarray(golden[f"x/{CASES[name]['x']}"]))
    np.testing.assert_array_equal(np.asarray(f) != 0, golden[f"{name}/acts"] != 0)
    assert off(f, golden[f"{name}/acts"]) <= FEATURES
    assert off(y, golden[f"{name}/recon"]) <= RECONSTRUCTION


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
def test_decoder_norms_fold_as_in_saelens(kind, golden, close):
    name = f"{kind}-none-b_dec1"
    folded = coders.fold_decoder_norm(*from_saelens(CASES[name], golden))
    close(folded, {tensor: golden[f"fold/{name}/{tensor}"] for tensor in folded})


@pytest.mark.parametrize(
    "coder",
    [
        Coder("standard", D, F, D, centred=True, rescale=True),
        Coder("jumprelu", D, F, D, normalize="layer_norm"),
        Coder("jumprelu", D, F, D, rescale=True),
        Coder("gated", D, F, D + 2, transcoder=True),
        Coder("topk", D, F, D, k=3, rescale=True),
        Coder("groupmax", D, F, D, k=4, rescale=True),
    ],
)
def test_folded_norms_change_no_reconstruction(coder, close):
    params, x = random_params(coder), random_x(5, D)
    folded = coders.fold_decoder_norm(coder, params)
    close(np.linalg.norm(folded["W_dec"], axis=1), np.ones(F))
    norms_1F = np.linalg.norm(params["W_dec"], axis=1)[None]
    f, y = reconstruct(coder, params, x)
    scaled = f if coder.rescale else f * norms_1F
    close(reconstruct(coder, folded, x), (scaled, y))
    close(reconstruct(dataclasses.replace(coder, rescale=False), folded, x)[1], y)


@pytest.mark.parametrize("kind", ["topk", "abstopk", "groupmax", "matching_pursuit"])
def test_norms_that_decide_are_not_folded(kind):
    coder = Coder(kind, D, F, D, k=4)
    with pytest.raises(InputError, match=f"folded into {kind}.* would choose other features"):
        coders.fold_decoder_norm(coder, random_params(coder))


@every
def test_rows_do_not_know_of_each_other(coder, close):
    params, x = random_params(coder, skip=coder.transcoder), random_x(2, 3, D)
    f, y = reconstruct(coder, params, x)
    assert 0 < (np.asarray(f) != 0).mean() < 1
    close(reconstruct(coder, params, x[0, 0]), (f[0, 0], y[0, 0]))
    padded = jnp.concatenate([x, jnp.ones((1, 3, D))])
    found_f, found_y = reconstruct(coder, params, padded)
    close((found_f[:2], found_y[:2]), (f, y))
    heads_f, heads_y = reconstruct(coder, params, x.reshape(2, 3, 2, D // 2))
    close((heads_f, heads_y), (f, y if coder.transcoder else y.reshape(2, 3, 2, D // 2)))


def features(coder: Coder, h_F: list[int]) -> jax.Array:
    """Of these preactivations."""
    given = {"W_enc": np.zeros((D, F), np.float32), "b_enc": np.asarray(h_F, np.float32)}
    return encode(coder, random_params(coder) | given, random_x(D))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_of_equal_features_the_first_are_kept(architecture):
    coder = Coder(architecture, D, F, D, k=5)
    f_F = features(coder, [2, -3, 1, 1, 1, 0, 1, 1] + [-1] * 8)
    kept = [2, 0, 1, 1, 1, 0, 1, 0] if architecture == "topk" else [2, -3, 1, 1, 1, 0, 0, 0]
    np.testing.assert_array_equal(f_F, kept + [0] * 8)


def test_a_group_has_one_feature():
    coder = Coder("groupmax", D, F, D, k=4)
    f_F = features(coder, [1, 2, 2, 0, -1, -2, -1, -3, 0, 0, 0, 5, 4, 3, 2, 1])
    expected = [0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 4, 0, 0, 0]
    np.testing.assert_array_equal(f_F, expected)


@pytest.mark.parametrize("coder", [PLAIN[i] for i in (0, 1, 3, 7)])
def test_gradients_are_those_of_differences(coder, x64):
    params = {k: v.astype(np.float64) for k, v in random_params(coder, skip=True).items()}
    x_ND, step = random_x(3, D).astype(jnp.float64), 1e-6

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        f, y = reconstruct(coder, params, x_ND)
        return (y**2).sum() + f.sum()

    _, grads = loss(params)
    along = random_params(coder, seed=2, skip=True)
    along = {name: value.astype(np.float64) for name, value in along.items()}
    ahead, back = ({n: v + s * along[n] for n, v in params.items()} for s in (step, -step))
    slope = (loss(ahead)[0] - loss(back)[0]) / (2 * step)
    found = sum((grads[name] * along[name]).sum() for name in params)
    assert off(found, slope) <= 1e-7


def test_float32_means_float32():
    coder = PLAIN[3]
    params, x = random_params(coder), random_x(2, D)

    def loss(params):
        f, y = reconstruct(coder, params, x)
        return y.sum() + f.sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert text.count("dot_general[") == text.count("Precision.HIGHEST, Precision.HIGHEST") > 4
    assert encode(coder, params, x.astype(jnp.bfloat16)).dtype == np.float32


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk"])
def test_a_row_without_scale_is_not_hidden(architecture):
    coder = Coder(architecture, D, F, D, k=3, normalize="constant_norm_rescale")
    f, y = reconstruct(coder, random_params(coder), jnp.zeros((1, D)))
    assert np.isnan(f).all() and np.isnan(y).all()


SCRIPT = """
import functools, json, sys
import jax, numpy as np
from core.sharding import make_mesh, over_rows
from sae import coder as coders
from sae.coder import Coder, reconstruct

mesh, found = make_mesh(data=2, model=4), {}
place = lambda x: jax.device_put(x, over_rows(mesh))
with np.load(sys.argv[1]) as file:
    data = dict(file)
for name, fields in json.loads(sys.argv[2]).items():
    coder = Coder(**fields)
    params = {n: data[f"{name}/{n}"] for n in coders.shapes(coder)}
    params = jax.device_put(params, coders.shardings(params, mesh))
    run = jax.jit(functools.partial(reconstruct, coder, mesh=mesh))
    run = run.lower(params, place(data["x"])).compile()
    f, y = run(params, place(data["x"]))
    assert f.sharding.spec == jax.sharding.PartitionSpec("data", "model"), f.sharding
    found |= {f"{name}/f": np.asarray(f), f"{name}/y": np.asarray(y)}
    gathers = [line.split("all-gather(")[0] for line in run.as_text().splitlines()
               if " all-gather(" in line]
    found[f"{name}/gathers"] = np.asarray(gathers, str)
np.savez(sys.argv[3], **found)
"""


def test_features_over_devices_are_those_of_one(tmp_path, close):
    """Rows over two, features over four: no device sees more of them than the best of each."""
    wide = {c.architecture: dataclasses.replace(c, d_sae=1024) for c in PLAIN[:6]}
    fields = {name: dataclasses.asdict(coder) for name, coder in wide.items()}
    params = {name: random_params(coder) for name, coder in wide.items()}
    arrays: dict[str, Any] = {"x": (x := random_x(4, D))}
    for name in wide:
        arrays |= {f"{name}/{tensor}": value for tensor, value in params[name].items()}
    np.savez(tmp_path / "in.npz", **arrays)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", SCRIPT, tmp_path / "in.npz", json.dumps(fields)]
    environment = os.environ | {"XLA_FLAGS": flags}
    root = Path(coders.__file__).parents[1]
    subprocess.run([*command, tmp_path / "out.npz"], check=True, env=environment, cwd=root)
    with np.load(tmp_path / "out.npz") as found:
        for name, coder in wide.items():
            one = jax.jit(functools.partial(reconstruct, coder))(params[name], x)
            np.testing.assert_array_equal(found[f"{name}/f"] != 0, np.asarray(one[0]) != 0)
            close((found[f"{name}/f"], found[f"{name}/y"]), tuple(map(np.asarray, one)))
            gathers = found[f"{name}/gathers"]
            assert len(gathers) == (2 if "topk" in name else 0), gathers
            assert all("[2,12]" in gather for gather in gathers), gathers  # 4 devices' best 3


def test_features_are_split_over_the_model_axis():
    params = random_params(Coder("jumprelu", D, 15, D), skip=True)
    where = {name: tuple(s.spec) for name, s in coders.shardings(params, make_mesh()).items()}
    assert where == {
        "W_enc": (None, "model"),
        "b_enc": ("model",),
        "W_dec": ("model", None),
        "b_dec": (None,),
        "threshold": ("model",),
        "W_skip": (None, None),
    }
    mesh: Any = types.SimpleNamespace(shape={"data": 1, "model": 2})
    with pytest.raises(InputError, match="15 features do not divide over 2 devices"):
        coders.shardings(params, mesh)


BAD = [
    ({"architecture": "temporal"}, {}, "architecture 'temporal' is unknown; known: stand"),
    ({"normalize": "l2"}, {}, "normalisation 'l2' is unknown; known: none, layer_norm"),
    ({"architecture": "topk"}, {}, "k is 0, not between 1 and its 16 features"),
    ({"architecture": "topk", "k": 17}, {}, "k is 17, not between 1 and its 16 features"),
    ({"architecture": "groupmax", "k": 5}, {}, "16 features do not make 5 equal groups"),
    ({"d_out": D + 1}, {}, "reads width 6 and writes 7, which only a transcoder"),
    ({"architecture": "jumprelu"}, {}, "no tensor 'threshold', which jumprelu needs; it has"),
    ({}, {"threshold": np.ones(F)}, "tensor 'threshold' has no place in standard"),
    ({}, {"W_enc": np.ones((F, D))}, r"W_enc is \[16, 6\], not \[6, 16\] .*d_sae\); .*transposed"),
    ({}, {"W_dec": np.ones((D, F))}, r"W_dec is \[6, 16\], not \[16, 6\] .*d_out\); .*transposed"),
    ({}, {"W_dec": np.ones((F, D + 1))}, r"W_dec is \[16, 7\], not .*another SAE's, or its config"),
    ({"d_in": 8, "d_out": 8}, {}, r"W_enc is \[6, 16\], not \[8, 16\]"),
    ({}, {"W_skip": np.ones((D, F))}, r"W_skip is \[6, 16\], not \[6, 6\] \(d_in x d_out\)"),
]


@pytest.mark.parametrize("fields,tensors,message", BAD)
def test_what_makes_no_sae_is_refused(fields, tensors, message):
    plain = Coder("standard", D, F, D)
    check(plain, random_params(plain), "here")
    with pytest.raises(InputError, match=f"^here: {message}"):
        check(dataclasses.replace(plain, **fields), random_params(plain) | tensors, "here")


def test_activations_of_another_place_are_refused():
    coder = Coder("standard", D, F, D)
    about = About("resid_post.3", "resid_post.3", None, "folder", "saelens", {})
    sae = Sae(coder, random_params(coder), about, "")
    check_input(sae, D, "resid_post.3", "here")
    check_input(sae, D, None, "here")
    check_input(sae._replace(about=about._replace(tap_in=None)), D, "mlp_out.1", "here")
    with pytest.raises(InputError, match="width 7, but the SAE folder reads 6 of resid_post.3"):
        check_input(sae, 7, "resid_post.3", "here")
    with pytest.raises(InputError, match="of mlp_out.1, but .* was trained on resid_post.3"):
        check_input(sae, D, "mlp_out.1", "here")
    with pytest.raises(InputError, match=r"shape \[2, 7\] do not end in the SAE's width 6"):
        encode(coder, sae.params, random_x(2, 7))


def test_fingerprint():
    coder = PLAIN[3]
    params = random_params(coder)
    mark = coders.fingerprint(coder, params)
    wide = {name: value.astype(np.float64) for name, value in reversed(params.items())}
    assert len(mark) == 64 and coders.fingerprint(coder, wide) == mark
    assert coders.fingerprint(dataclasses.replace(coder, k=4), params) != mark
    assert coders.fingerprint(coder, params | {"b_dec": params["b_dec"] + 1}) != mark


def test_preactivations_are_what_is_ranked(close):
    coder = PLAIN[3]
    params, x = random_params(coder), random_x(4, D)
    h, f = (np.asarray(function(coder, params, x)) for function in (preactivations, encode))
    third_N1 = np.sort(h, -1)[:, [-3]]
    close(f, np.where(h >= third_N1, np.maximum(h, 0), 0))
