"""LoRA adapters against PEFT: folders in and out, logits, gradients, merging, targets.

The expected numbers are made by tests/golden/make_lora.py.
"""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tokenizers
from core import adapter, checkpoint, families, model, safetensors, schema
from core.adapter import Adapter, LoraSpec
from core.checkpoint import load_model, save_model
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.hf import peft

GOLDEN = Path(__file__).parents[1] / "golden"
BASES = ("gpt2_tiny", "gemma3_tiny", "neox_tiny")
TINY = families.read_config(GOLDEN / "gpt2_tiny" / "config.json")  # 3 layers


@functools.cache
def golden(name):
    """(base, base with PEFT's adapter, ids, labels, expected arrays)."""
    with np.load(GOLDEN / name / "expected.npz") as file:
        ids_BT, labels_BT, lengths_B = (file[key] for key in ("ids", "labels", "lengths"))
    with np.load(GOLDEN / f"{name}_lora" / "expected.npz") as file:
        expected = dict(file)
    real_BT = np.arange(ids_BT.shape[1])[None] < lengths_B[:, None]
    base, adapted = load_model(GOLDEN / name), load_model(GOLDEN / name, GOLDEN / f"{name}_lora")
    return base, adapted, ids_BT, labels_BT, real_BT, expected


@functools.partial(jax.jit, static_argnums=(0, 1))
def logits(config, layers, variables, ids_BT):
    return model.logits(config, Execution(layers=layers), variables, ids_BT)


def held(loaded) -> Adapter:
    assert loaded.adapter is not None
    return loaded.adapter


every_base = pytest.mark.parametrize("name", BASES)


@every_base
@pytest.mark.parametrize("layers", ["unrolled", "scan"])
def test_a_folder_of_peft_gives_pefts_logits(name, layers, relative):
    base, adapted, ids_BT, _, real_BT, expected = golden(name)
    found_BTV = np.asarray(logits(adapted.config, layers, adapted.variables, ids_BT))
    assert relative(found_BTV[real_BT], expected["logits"][real_BT]) < 1e-5
    plain_BTV = np.asarray(logits(base.config, layers, base.variables, ids_BT))
    assert relative(plain_BTV[real_BT], expected["logits"][real_BT]) > 0.1


@every_base
def test_gradients_of_the_factors_are_pefts(name, relative):
    _, adapted, ids_BT, labels_BT, _, expected = golden(name)
    spec, config = held(adapted).spec, adapted.config
    params = jax.tree.map(jnp.asarray, adapted.params)

    @jax.jit
    def losses(factors):
        variables = {"params": params, "lora": adapter.collection(spec, config, factors)}
        nll_BT = model.token_losses(config, Execution(), variables, ids_BT, labels_BT)
        return nll_BT.sum(), nll_BT

    grads, nll_BT = jax.grad(losses, has_aux=True)(held(adapted).factors)
    assert relative(nll_BT, expected["losses"]) < 1e-5
    slots = adapter.slots(spec, config)
    assert {f"grad/{tensor}" for tensor in slots} == {k for k in expected if k.startswith("grad/")}
    for tensor, (row, layer) in slots.items():
        found = np.asarray(schema.get(grads, row.path))[layer].T
        assert relative(found, expected[f"grad/{tensor}"]) < 1e-5, tensor


@every_base
def test_merging_is_attaching(name, relative):
    _, adapted, ids_BT, _, real_BT, expected = golden(name)
    merged = adapter.merge(adapted.config, adapted.params, held(adapted))
    schema.check(families.rows(adapted.config), adapted.config.layers, merged, name)
    found_BTV = np.asarray(logits(adapted.config, "unrolled", {"params": merged}, ids_BT))
    assert relative(found_BTV[real_BT], expected["merged"][real_BT]) < 1e-5
    with jax.enable_x64(True):  # in float32 the two differ by rounding
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), adapted.variables)
        exact = adapter.merge(adapted.config, adapted.params, held(adapted))
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), exact)
        run = jax.jit(functools.partial(model.logits, adapted.config, Execution("float64")))
        assert relative(run({"params": exact}, ids_BT), run(wide, ids_BT)) < 1e-6


@every_base
def test_in_and_out_again_is_the_same(name, tmp_path):
    base, adapted, *_ = golden(name)
    peft.write(tmp_path / "out", adapted.config, held(adapted))
    source, out = GOLDEN / f"{name}_lora", tmp_path / "out"
    theirs, ours = (safetensors.read(folder / peft.WEIGHTS) for folder in (source, out))
    assert theirs.keys() == ours.keys()
    for tensor, value in theirs.items():
        np.testing.assert_array_equal(ours[tensor].view(np.uint32), value.view(np.uint32))
    header = {"format": "pt", "taproot_base": base.fingerprint}
    assert safetensors.metadata(out / peft.WEIGHTS) == header
    theirs, ours = (json.loads((folder / peft.CONFIG).read_text()) for folder in (source, out))
    assert ours.pop("base_model_name_or_path") == str(GOLDEN / name)
    assert ours == {key: theirs[key] for key in ours}
    again = load_model(GOLDEN / name, out)
    assert again.fingerprint == adapted.fingerprint != base.fingerprint
    assert load_model(out).fingerprint == adapted.fingerprint  # it names its base


def spec_of(targets, **fields):
    return LoraSpec(**{"rank": 3, "alpha": 6.0, "targets": targets, **fields})


def hit(targets, **fields):
    """{site: layers} of the three-layer GPT-2."""
    found = adapter.hits(spec_of(targets, **fields), TINY)
    return {site.name.removeprefix("h.{l}."): np.flatnonzero(layers) for site, layers in found}


@pytest.mark.parametrize(
    "targets,fields,sites,layers",
    [
        (("c_proj",), {}, ["attn.c_proj", "mlp.c_proj"], [0, 1, 2]),
        (("attn.c_proj", "c_fc"), {}, ["attn.c_proj", "mlp.c_fc"], [0, 1, 2]),
        (("proj", "c_attn"), {}, ["attn.c_attn"], [0, 1, 2]),  # not a part of a name
        (("transformer.h.1.attn.c_attn",), {}, ["attn.c_attn"], [1]),
        (("c_attn",), {"layers": (0, 2)}, ["attn.c_attn"], [0, 2]),
        (r".*\.h\.(0|2)\.mlp\..*", {}, ["mlp.c_fc", "mlp.c_proj"], [0, 2]),
        ("all-linear", {}, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], [0, 1, 2]),
    ],
)
def test_targets_are_found_as_peft_finds_them(targets, fields, sites, layers):
    found = hit(targets, **fields)
    assert list(found) == sites
    assert all(where.tolist() == layers for where in found.values())


@pytest.mark.parametrize(
    "targets", [("q_proj",), "c_attn", r"h\.0\..*", ("transformer.h.3.mlp.c_fc",)]
)
def test_targets_that_name_nothing_are_refused_and_told_what_there_is(targets):
    with pytest.raises(InputError, match=r"no linear map.*transformer\.h\.\*\.attn\.c_attn"):
        adapter.hits(spec_of(targets), TINY)


def test_a_new_adapter_may_not_name_a_target_in_vain():
    with pytest.raises(InputError, match="'kproj'"):
        adapter.init(spec_of(("c_attn", "kproj")), TINY, 0)
    with pytest.raises(InputError, match="no regular expression"):
        adapter.init(spec_of("(c_attn"), TINY, 0)


@pytest.mark.parametrize(
    "text,targets",
    [("q_proj,v_proj", ("q_proj", "v_proj")), ("attn.c_proj", ("attn.c_proj",)),
     ("all-linear", "all-linear"), (r".*\.q_proj", r".*\.q_proj")],
)  # fmt: skip
def test_targets_on_the_command_line(text, targets):
    assert adapter.parse_targets(text) == targets


def test_the_usual_targets_and_their_size():
    """16 x (inputs + outputs) of q, k, v, o in 18 layers of Gemma-3-270m is PEFT's count."""
    gemma = ModelConfig("gemma3", 262144, 32768, 640, 18, 4, 2048, 256, kv_heads=1)
    targets = adapter.attention_targets(gemma)
    assert targets == tuple(f"self_attn.{name}_proj" for name in "qkvo")
    assert adapter.size(LoraSpec(16, 32, targets), gemma) == 1_474_560
    assert adapter.attention_targets(TINY) == ("attn.c_attn", "attn.c_proj")
    neox = families.read_config(GOLDEN / "neox_tiny" / "config.json")
    assert adapter.attention_targets(neox) == ("attention.query_key_value", "attention.dense")


def test_a_new_adapter_starts_as_pefts_do():
    """A uniform in +-1/sqrt(inputs), B zero; a matrix draws the same whatever else is a target."""
    every = adapter.init(spec_of("all-linear", rank=64), TINY, 1)
    for site in schema.sites(families.rows(TINY)):
        factors, bound = schema.get(every, site.path), site.inputs**-0.5
        assert not factors["b"].any() and np.abs(factors["a"]).max() <= bound
        assert float(factors["a"].std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    some = adapter.init(spec_of(r".*\.1\.mlp\.c_fc", rank=64), TINY, 1)
    assert some["blocks"].keys() == {"mlp_c_fc"}
    a_LIR = np.asarray(some["blocks"]["mlp_c_fc"]["a"])
    np.testing.assert_array_equal(a_LIR[1], every["blocks"]["mlp_c_fc"]["a"][1])
    assert not a_LIR[[0, 2]].any()
    other = adapter.init(spec_of("all-linear", rank=64), TINY, 2)
    assert not (other["blocks"]["mlp_c_fc"]["a"] == every["blocks"]["mlp_c_fc"]["a"]).any()


def random(spec, config, seed=0):
    """Factors of which none is zero where there is an adapter."""
    rng, factors = np.random.default_rng(seed), adapter.init(spec, config, seed)
    for site, layers in adapter.hits(spec, config):
        b_LRO = np.where(np.array(layers)[:, None, None], rng.normal(
            0, 0.3, (config.layers, spec.rank, site.outputs)), 0)  # fmt: skip
        schema.put(factors, f"{site.path}/b", b_LRO.astype(np.float32))
    return factors


def test_an_adapter_of_some_layers_leaves_the_others_alone(tmp_path):
    spec = spec_of(r".*\.(0|2)\.mlp\.c_fc", rslora=True)
    made = Adapter(spec, random(spec, TINY))
    assert adapter.size(spec, TINY) == 2 * 3 * (14 + 56)
    peft.write(tmp_path / "out", TINY, made)
    names = {f"base_model.model.transformer.h.{layer}.mlp.c_fc.lora_{factor}.weight"
             for layer in (0, 2) for factor in "AB"}  # fmt: skip
    assert safetensors.read(tmp_path / "out" / peft.WEIGHTS).keys() == names
    again = peft.read(tmp_path / "out", TINY)
    modules = tuple(f"transformer.h.{layer}.mlp.c_fc" for layer in (0, 2))
    assert again.spec == dataclasses.replace(spec, targets=modules)  # safe where norms match, too
    jax.tree.map(np.testing.assert_array_equal, again.factors, made.factors)
    scale_L = adapter.collection(spec, TINY, made.factors)["blocks"]["mlp_c_fc"]["scale"]
    np.testing.assert_allclose(scale_L, [6 / 3**0.5, 0, 6 / 3**0.5], rtol=1e-6)
    params = golden("gpt2_tiny")[0].params
    merged, plain = (p["blocks"] for p in (adapter.merge(TINY, params, made), params))
    changed = (merged["mlp_c_fc"]["w"] != plain["mlp_c_fc"]["w"]).any((1, 2))
    np.testing.assert_array_equal(changed, [True, False, True])
    assert merged["attn_c_attn"]["w"] is plain["attn_c_attn"]["w"]


def test_the_fingerprint_is_of_the_base_and_of_what_the_adapter_adds():
    made = Adapter(spec_of(("mlp.c_fc",)), random(spec_of(("c_fc",)), TINY), "one")
    same = made._replace(spec=spec_of(r".*c_fc", dropout=0.5))
    other = jax.tree.map(lambda x: x * 1.0001, made.factors)
    marks = {
        adapter.fingerprint(TINY, each)
        for each in (made, made._replace(base="two"), made._replace(factors=other),
                     made._replace(spec=spec_of(("c_fc",), alpha=7.0)))
    }  # fmt: skip
    assert len(marks) == 4 and adapter.fingerprint(TINY, same) == adapter.fingerprint(TINY, made)


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "gpt2_tiny_lora", tmp_path / "lora")


def edit(folder, **changes):
    content = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**content, **changes}))


def rewrite(folder, change, metadata=None):
    tensors = dict(safetensors.read(folder / peft.WEIGHTS))
    change(tensors)
    safetensors.write(folder / peft.WEIGHTS, tensors, metadata or {"format": "pt"})


NAME = "base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"
DAMAGE = {
    "another method": (lambda f: edit(f, peft_type="IA3"), "peft_type 'IA3'"),
    "no method": (lambda f: (f / peft.CONFIG).write_text("[]"), "peft_type None"),
    "dora": (lambda f: edit(f, use_dora=True), "use_dora=True is not supported"),
    "whole modules": (lambda f: edit(f, modules_to_save=["wte"]), "modules_to_save="),
    "ranks": (lambda f: edit(f, rank_pattern={"c_attn": 8}), "rank_pattern="),
    "alphas": (lambda f: edit(f, alpha_pattern={"c_attn": 8}), "alpha_pattern="),
    "a key of the future": (lambda f: edit(f, use_magic=1), "use_magic=1 is not supported"),
    "biases": (lambda f: edit(f, bias="all"), "bias='all'"),
    "pissa": (lambda f: edit(f, init_lora_weights="pissa"), "init_lora_weights must be one of"),
    "no targets": (lambda f: edit(f, target_modules=None), "target_modules must be"),
    "odd targets": (lambda f: edit(f, target_modules=["c_attn", 3]), "target_modules must be"),
    "odd layers": (lambda f: edit(f, layers_to_transform="0"), "layers_to_transform must be"),
    "no rank": (lambda f: edit(f, r=0), "'r' is missing or not a positive integer"),
    "huge rank": (lambda f: edit(f, r=10**12), r"rank 1000000000000 and this model ask for"),
    "no alpha": (lambda f: edit(f, lora_alpha=-1), "lora_alpha must be"),
    "odd dropout": (lambda f: edit(f, lora_dropout=1.0), r"lora_dropout must be a number in \[0,"),
    "other targets": (lambda f: edit(f, target_modules=["c_attn"]), "h.0.mlp.c_proj.* no place"),
    "more targets": (lambda f: edit(f, target_modules=["c_attn", "c_proj"]), "c_proj.*is missing"),
    "no config": (lambda f: (f / peft.CONFIG).unlink(), "is no adapter"),
    "no weights": (lambda f: (f / peft.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "a pickle": (
        lambda f: (f / peft.WEIGHTS).rename(f / "adapter_model.bin"),
        "is a pickle and never opened",
    ),
    "missing": (lambda f: rewrite(f, lambda t: t.pop(NAME)), f"{NAME}' is missing"),
    "unknown": (lambda f: rewrite(f, lambda t: t.update(x=t[NAME])), "'x' has no place"),
    "transposed": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].T})),
        rf"{NAME}' has shape \[14, 3\], rank 3 and this model ask for \[3, 14\]",
    ),
    "not finite": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME] * np.inf})),
        "NaN or inf",
    ),
    "integers": (
        lambda f: rewrite(f, lambda t: t.update({NAME: t[NAME].astype(np.int32)})),
        "holds int32, not floating point",
    ),
    "for another base": (
        lambda f: rewrite(f, lambda t: None, {"taproot_base": "0" * 64}),
        r"was trained on another model \(000000000000\)",
    ),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_what_is_wrong_is_named(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(GOLDEN / "gpt2_tiny", folder)


def test_a_model_of_other_sizes_is_refused(folder):
    with pytest.raises(InputError, match="has no place in an adapter.*for a 2-layer gpt2 model"):
        load_model(GOLDEN / "gpt2_tiny_untied", folder)
    with pytest.raises(InputError, match="name no linear map of this"):
        load_model(GOLDEN / "gemma3_tiny", folder)


def test_half_precision_files_are_read(folder, relative):
    exact = held(golden("gpt2_tiny")[1])
    rewrite(folder, lambda t: t.update({k: np.asarray(v, jnp.bfloat16) for k, v in t.items()}))
    read = peft.read(folder, TINY)
    for found, expected in zip(*(jax.tree.leaves(a.factors) for a in (read, exact)), strict=True):
        assert found.dtype == np.float32 and 0 < relative(found, expected) < 1e-2


def test_factors_that_are_not_finite_are_not_written(tmp_path):
    made = held(golden("gpt2_tiny")[1])
    bad = made._replace(factors=jax.tree.map(lambda x: x * np.float32(np.nan), made.factors))
    with pytest.raises(InputError, match="NaN or infinity"):
        peft.write(tmp_path / "out", TINY, bad)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------ loading a model


def test_the_adapters_own_tokenizer_goes_before_the_bases(tmp_path, folder):
    base = golden("gpt2_tiny")[0]
    save_model(tmp_path / "base", base.config, base.params, tokenizers.load("bytes"))
    assert load_model(tmp_path / "base", folder).tokenizer == tmp_path / "base" / "tokenizer"
    for name in ("bytes_tokenizer.json",):
        shutil.copy(tmp_path / "base" / "tokenizer" / name, folder / name)
    assert load_model(tmp_path / "base", folder).tokenizer == folder


def test_an_adapter_alone_needs_its_base(tmp_path, folder):
    with pytest.raises(InputError, match=r"'gpt2_tiny', is not here; give it as --model BASE"):
        load_model(folder)  # as PEFT saved it, it names a place that is not ours
    edit(folder, base_model_name_or_path=str(GOLDEN / "gpt2_tiny"))
    assert load_model(folder).fingerprint == golden("gpt2_tiny")[1].fingerprint
    with pytest.raises(InputError, match="has an adapter already"):
        load_model(folder, folder)
    edit(folder, base_model_name_or_path=str(folder))
    with pytest.raises(InputError, match="is not here"):
        load_model(folder)
    with pytest.raises(InputError, match="is no adapter"):
        load_model(GOLDEN / "gpt2_tiny", tmp_path)


def test_a_plain_model_runs_its_parameters_alone():
    base = golden("gpt2_tiny")[0]
    assert base.adapter is None and base.variables == {"params": base.params}
    assert checkpoint.fingerprint(base.config, base.params) == base.fingerprint


def test_a_spec_is_a_value():
    """It is static in compiled programs."""
    assert hash(spec_of(("a",))) == hash(dataclasses.replace(spec_of(("b",)), targets=("a",)))
