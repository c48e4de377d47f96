"""Second moments: Bergson's formulas on its own gradients; orientation, files, runs, refusals."""

import dataclasses
import inspect
from pathlib import Path

import jax
import numpy as np
import pytest

from attribution import normalizer
from attribution.normalizer import Adafactor, Adam, divide, identity, load, scales
from attribution.targets import Spec, targets
from core import adapter, families, safetensors
from core.adapter import LoraSpec
from core.config import Execution
from core.errors import InputError
from core.hf import convert
from core.rundir import open_run
from training import loop
from training.optim import Optim
from training.step import Recipe, initial

BERGSON = Path(__file__).parents[1] / "golden" / "bergson"
EVERY = Spec(modules=("*",))


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def golden(request):
    """(config, folder, {module: gradients with bias [2,O,I+1]} in Bergson's names)."""
    folder = BERGSON / request.param
    config = convert.open_hf(folder / "model").config
    with np.load(folder / "gradients.npz") as file:
        plain = {k.removeprefix("bias/"): file[k] for k in file.files if k.startswith("bias/")}
        expected = {k: file[k] for k in file.files if k.startswith("ada")}
    return config, folder / "normalizers.npz", plain, expected


def by_module(found, tree):
    """{module: value of its layer} of arrays by sink."""
    return {
        target.site.name.format(l=layer): np.asarray(tree[target.sink])[layer]
        for target in found
        for layer in range(len(target.layers))
    }


def test_adam_is_bergsons(golden, close):
    config, path, plain, expected = golden
    found = targets(config, Spec())
    adam = load(path, config, found, include_bias=True, kind="adam")
    assert isinstance(adam, Adam) and identity(adam)[0] == "adam"
    for module, scale_OI in by_module(found, divide(adam)).items():
        close(plain[module] * scale_OI, expected[f"adam/{module}"])


def test_adafactor_is_bergsons(golden, close):
    config, path, plain, expected = golden
    found = targets(config, Spec())
    adafactor = load(path, config, found, include_bias=True)
    assert isinstance(adafactor, Adafactor) and identity(adafactor)[0] == "adafactor"
    of = {target.sink: scales(adafactor, target.sink) for target in found}
    g = by_module(found, {sink: parts[0] for sink, parts in of.items()})
    x = by_module(found, {sink: parts[1] for sink, parts in of.items()})
    for target in found:
        assert (of[target.sink][2] is not None) == target.site.bias
    bias = {t.sink: of[t.sink][2] for t in found if t.site.bias}
    columns = by_module([t for t in found if t.site.bias], bias)
    for module, g_O in g.items():
        scale_OI = g_O[:, None] * x[module][None]
        if module in columns:
            scale_OI = np.concatenate([scale_OI, columns[module][:, None]], 1)
        close(plain[module] * scale_OI, expected[f"adafactor/{module}"])


def test_without_bias(golden):
    config, path, _, _ = golden
    found = targets(config, Spec())
    adam, adafactor = load(path, config, found, kind="adam"), load(path, config, found)
    assert isinstance(adam, Adam) and isinstance(adafactor, Adafactor)
    for t in found:
        assert adam.v[t.sink].shape == (config.layers, t.site.outputs, t.site.inputs)
        assert adam.v[t.sink].dtype == np.float32
    assert adafactor.bias == {}


@pytest.fixture
def moments(tiny):
    """Second moments of all of the tiny model's parameters, as a file of it would hold them."""
    random = np.random.default_rng(3)
    config = tiny.untied
    return config, {
        name: random.uniform(1e-6, 1e-2, slot.shape).astype(np.float32)
        for name, slot in convert.slots(config).items()
    }


@pytest.mark.parametrize("name", ["{}", "exp_avg_sq.{}", "state.{}.exp_avg_sq"])
@pytest.mark.parametrize("end", [".safetensors", ".npz"])
def test_spellings_and_formats(tmp_path, moments, name, end):
    config, tensors = moments
    written, path = {name.format(k): v for k, v in tensors.items()}, tmp_path / f"v{end}"
    np.savez(path, **written) if end == ".npz" else safetensors.write(path, written)
    adam = load(path, config, targets(config, EVERY))
    assert isinstance(adam, Adam)
    # GPT-2's files hold [I,O]; the square matrix, too, is turned
    for layer in range(config.layers):
        stored_IO = tensors[f"transformer.h.{layer}.attn.c_proj.weight"]
        assert stored_IO.shape == (config.width, config.width)
        np.testing.assert_array_equal(adam.v["blocks/attn_c_proj/weight"][layer], stored_IO.T)
    np.testing.assert_array_equal(adam.v["embed/wte"][0], tensors["transformer.wte.weight"])
    np.testing.assert_array_equal(adam.v["head"][0], tensors["lm_head.weight"])


def test_only_what_is_collected_must_be_there(tmp_path, moments):
    config, tensors = moments
    last = "transformer.h.2.mlp.c_fc.weight"
    safetensors.write(tmp_path / "v.safetensors", {last: tensors[last]})
    found = targets(config, Spec(modules=("h.2.mlp.c_fc",)))
    adam = load(tmp_path / "v.safetensors", config, found)
    assert isinstance(adam, Adam)
    v_LOI = adam.v["blocks/mlp_c_fc/weight"]
    assert (v_LOI[:2] == 1).all() and (v_LOI[2] == tensors[last].T).all()
    with pytest.raises(InputError, match=r"no exp_avg_sq of '.*h\.0\.attn\.c_attn\.weight'"):
        load(tmp_path / "v.safetensors", config, targets(config, Spec()))


NAME = "transformer.h.1.mlp.c_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, NAME: t[NAME].T}, r"c_proj.weight' has shape \[12, 20\], .* \[20, 12\]"),
        (lambda t: {**t, NAME: -t[NAME]}, r"h.1.mlp.c_proj.weight' holds a negative value"),
        (lambda t: {**t, NAME: t[NAME] * np.float32(np.nan)}, r"h.1.mlp.c_proj.weight'.* NaN"),
        (lambda t: {**t, NAME: t[NAME].astype(np.int32)}, "int32, not floating point"),
        (lambda t: {**t, "h.9.mlp": t[NAME]}, r"'h.9.mlp' belongs to no parameter of this 3-layer"),
        (lambda t: {**t, f"exp_avg_sq.{NAME}": t[NAME]}, "c_proj.weight' twice"),
        (lambda t: {k: v for k, v in t.items() if k != NAME}, "has no exp_avg_sq of 'transformer"),
    ],
)
def test_refuses_tensors(tmp_path, moments, change, message):
    config, tensors = moments
    safetensors.write(tmp_path / "v.safetensors", change(tensors))
    with pytest.raises(InputError, match=message):
        load(tmp_path / "v.safetensors", config, targets(config, Spec()))


def test_refuses_files(tmp_path, tiny):
    found = targets(tiny.config, Spec())
    for name, message in {"o.pt": "is a pickle", "o.bin": "save_file", "o.json": "no run"}.items():
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=message):
            load(tmp_path / name, tiny.config, found)
    with pytest.raises(InputError, match="has no ckpt/"):
        load(tmp_path, tiny.config, found)


def test_adafactor_needs_both_factors(tmp_path, golden):
    config, path, _, _ = golden
    with np.load(path) as file:
        rows = {k: file[k] for k in file.files if k.startswith("exp_avg_sq_row.")}
    np.savez(tmp_path / "rows.npz", **rows)
    with pytest.raises(InputError, match="has no exp_avg_sq_col of"):
        load(tmp_path / "rows.npz", config, targets(config, Spec()))


# -- runs of ours

LORA = LoraSpec(2, 3.0, ("attn.c_attn", "h.1.mlp.c_fc"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny):
    """A run of two steps by Adam, and saved states of an adapter's run and of one by SGD."""
    folder = tmp_path_factory.mktemp("runs")
    rows = tiny.rows(folder / "rows", [9, 12, 7, 11])
    params, settings = tiny.params(), loop.Settings(2, batch=4, save_every=2)
    adam, execution = Optim(lr=1e-3, schedule="constant"), Execution(layers="scan")
    quick = tiny.jit(inspect.unwrap(loop.train_step), static_argnames=("recipe",))
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", quick)
        with open_run(folder / "adam", "train lm", {"seed": 0}, False) as run:
            run.inputs(rows=rows.sha)
            loop.train(run, tiny.config, params, rows, settings, adam, execution)
            run.finish()
        factors = adapter.init(LORA, tiny.config, 0)
        lora = initial(Recipe(tiny.config, execution, adam, 0, LORA), factors)
        counted = jax.tree.map(lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), lora)
        save(folder / "lora", counted)
        sgd = Optim("sgd", momentum=0.9)
        save(folder / "sgd", initial(Recipe(tiny.config, execution, sgd, 0), params))
    return folder


def save(folder, state):
    saver = loop._Saver(folder / "ckpt", 1)
    saver.save(1, state)
    saver.manager.close()


def nu(folder, prefix):
    """The second moments as the checkpoint holds them: {path: array}."""
    found = normalizer._restored(folder)
    return {k: v for k, v in found.items() if k.startswith(prefix)}


def test_run(runs, tiny):
    found = targets(tiny.config, EVERY)
    adam = load(runs / "adam", tiny.config, found, include_bias=True)
    assert isinstance(adam, Adam) and {*adam.v} == {t.sink for t in found}
    stored = nu(runs / "adam", "")
    assert {*stored} == {row.path for row in families.rows(tiny.config)}
    for t in found:
        v = adam.v[t.sink]
        if t.stacked:
            np.testing.assert_array_equal(v[..., :-1], stored[f"{t.site.path}/w"].swapaxes(1, 2))
            np.testing.assert_array_equal(v[..., -1], stored[f"{t.site.path}/b"])
        else:
            np.testing.assert_array_equal(v[0], stored[t.site.path])
        assert (v >= 0).all() and (v > 0).any()
    # Adam after two steps: (1 - b2) (b2 g1^2 + g2^2) is far below the squared gradients themselves
    assert max(v.max() for v in adam.v.values()) < 1


def test_run_of_an_adapter(runs, tiny):
    found = targets(tiny.config, Spec(adapter=LORA))
    adam = load(runs / "lora", tiny.config, found)
    assert isinstance(adam, Adam)
    stored = nu(runs / "lora", "blocks/")
    assert {*stored} == {f"{t.site.path}" for t in found}
    for t in found:
        v_LOI, layers = adam.v[t.sink], np.array(t.layers)
        np.testing.assert_array_equal(v_LOI[layers], stored[t.site.path].swapaxes(1, 2)[layers])
        assert v_LOI[layers].max() > 0
    with pytest.raises(InputError, match="--gradients adapter"):
        load(runs / "lora", tiny.config, targets(tiny.config, Spec()))


def test_refuses_runs(runs, tiny):
    with pytest.raises(InputError, match="trained without second moments"):
        load(runs / "sgd", tiny.config, targets(tiny.config, Spec()))
    other = dataclasses.replace(tiny.config, layers=2)
    with pytest.raises(InputError, match="of 3 layers, this one has 2"):
        load(runs / "adam", other, targets(other, Spec()))
    (runs / "empty" / "ckpt").mkdir(parents=True)
    with pytest.raises(InputError, match="no complete checkpoint"):
        load(runs / "empty", tiny.config, targets(tiny.config, Spec()))


def test_identity_tells_values_apart(moments):
    _, tensors = moments
    one = {name: tensors[name] for name in [*tensors][:3]}
    same = dict(reversed(one.items()))
    changed = {**one, [*one][0]: one[[*one][0]] * 2}
    assert identity(Adam(one)) == identity(Adam(same)) != identity(Adam(changed))
