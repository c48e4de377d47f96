"""Conversion of GPT-2: every bit survives, and whatever does not fit is refused by name."""

import dataclasses
import json
import re
import shutil
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import convert, families, files, reference, safetensors, schema
from core.config import ModelConfig
from core.errors import InputError

GOLDEN = Path(__file__).parents[1] / "golden"
TIED, UNTIED = GOLDEN / "gpt2_tiny", GOLDEN / "gpt2_tiny_untied"
WTE, C_PROJ = "transformer.wte.weight", "transformer.h.1.attn.c_proj.weight"


@pytest.fixture(params=[TIED, UNTIED], ids=["tied", "untied"])
def source(request) -> Path:
    """A folder written by transformers."""
    return request.param


def load(folder: Path) -> tuple[dict, dict]:
    return files.read_json(folder / "config.json"), safetensors.read_folder(folder)


def save(folder: Path, config: dict, tensors: dict) -> Path:
    files.write_json(folder / "config.json", config)
    safetensors.write(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def changed(tmp_path: Path, source: Path = TIED, config=(), tensors=(), drop=()) -> Path:
    """A copy of a folder with keys and tensors replaced, added or left out."""
    old_config, old_tensors = load(source)
    kept = {name: t for name, t in (old_tensors | dict(tensors)).items() if name not in drop}
    return save(tmp_path / "changed", old_config | dict(config), kept)


def assert_same(found: schema.Params, expected: schema.Params) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


# Round trips


def test_import_fills_the_whole_schema(source):
    config, params = convert.import_hf(source)
    expected = schema.abstract(families.rows(config), config.layers)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )
    tensors = load(source)[1]
    wanted = np.stack([tensors[f"transformer.h.{i}.mlp.c_fc.bias"] for i in range(config.layers)])
    np.testing.assert_array_equal(params["blocks"]["mlp_c_fc"]["b"], wanted)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_export_writes_the_file_of_transformers(tmp_path, source, kind):
    config, params = convert.import_hf(source)
    agreement = convert.export_hf(config, jax.tree.map(kind, params), tmp_path / "out")
    assert agreement.error < 1e-5 and agreement.tokens == config.context
    written, original = (f / "model.safetensors" for f in (tmp_path / "out", source))
    assert written.read_bytes() == original.read_bytes()
    again, found = convert.import_hf(tmp_path / "out")
    assert again == config
    assert_same(found, params)


def test_names_without_prefix_buffers_and_an_equal_head_are_accepted(tmp_path):
    """As on the Hub: no prefix, causal masks beside the weights, a copy of the tied head."""
    config, tensors = load(TIED)
    tensors = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    for layer in range(config["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = np.tri(48, dtype=bool)[None, None]
        tensors[f"h.{layer}.attn.masked_bias"] = np.float32(-10000)
    tensors["lm_head.weight"] = tensors["wte.weight"]
    folder = save(tmp_path, config, tensors)
    assert_same(convert.import_hf(folder)[1], convert.import_hf(TIED)[1])
    assert convert.check_hf(folder) == convert.check_hf(TIED)


def test_shards_are_accepted(tmp_path, source):
    config, tensors = load(source)
    files.write_json(tmp_path / "config.json", config)
    places = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == shard}
        safetensors.write(tmp_path / shard, part)
    files.write_json(tmp_path / "model.safetensors.index.json", {"weight_map": places})
    assert_same(convert.import_hf(tmp_path)[1], convert.import_hf(source)[1])
    convert.check_hf(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_exports_hold_the_rounded_weights(tmp_path, dtype):
    config, params = convert.import_hf(TIED)
    convert.export_hf(config, params, tmp_path / "out", dtype=dtype)
    assert {t.dtype for t in load(tmp_path / "out")[1].values()} == {np.dtype(dtype)}
    assert load(tmp_path / "out")[0]["torch_dtype"] == dtype
    rounded = jax.tree.map(lambda x: x.astype(dtype), params)
    assert_same(convert.import_hf(tmp_path / "out", dtype)[1], rounded)
    wide = jax.tree.map(lambda x: x.astype(np.float32), rounded)
    assert_same(convert.import_hf(tmp_path / "out")[1], wide)


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "silu"])
def test_every_activation_and_setting_survives(tmp_path, activation):
    config = ModelConfig(
        family="gpt2", vocab_size=29, context=7, width=6, layers=2, heads=3, head_dim=2,
        mlp_width=11, norm_eps=1e-3, activation=activation, tied=False, init_std=0.5, eos=28,
    )  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)
    convert.export_hf(config, params, tmp_path / "out")
    assert convert.import_hf(tmp_path / "out")[0] == config


def test_reference_agrees_with_transformers(source):
    with np.load(source / "expected.npz", allow_pickle=False) as expected:
        scale = np.abs(expected["logits"]).max()
        for ids_T, logits_TV, n in zip(
            expected["ids"], expected["logits"], expected["lengths"], strict=True
        ):
            found_TV = reference.logits(source, ids_T[:n])
            assert np.abs(found_TV - logits_TV[:n]).max() <= 1e-5 * scale


def test_memory_is_the_result_and_one_tensor(tmp_path):
    config = ModelConfig(
        family="gpt2", vocab_size=64, context=8, width=128, layers=12, heads=2, head_dim=64,
        mlp_width=512,
    )  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)
    convert._write(tmp_path, config, params, "bfloat16")
    largest = max(t.size for t in load(tmp_path)[1].values()) * 4
    tracemalloc.start()
    imported = convert.import_hf(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(x.nbytes for x in jax.tree.leaves(imported)) + 2 * largest


# Input that must be refused


@pytest.mark.parametrize("name", [WTE, C_PROJ, "transformer.ln_f.bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_must_be_finite(tmp_path, name, value):
    bad = np.array(load(TIED)[1][name])
    bad.flat[-1] = value
    with pytest.raises(InputError, match=f"'{name}' holds NaN or infinity"):
        convert.import_hf(changed(tmp_path, tensors={name: bad}))


def test_weights_must_fit_the_dtype(tmp_path):
    big = np.array(load(TIED)[1][C_PROJ])
    big[0, 0] = 1e6
    folder = changed(tmp_path, tensors={C_PROJ: big})
    config, params = convert.import_hf(folder)
    with pytest.raises(InputError, match=f"'{C_PROJ}' holds NaN or infinity as float16"):
        convert.import_hf(folder, "float16")
    with pytest.raises(InputError, match=f"'{C_PROJ}' holds NaN or infinity as float16"):
        convert.export_hf(config, params, tmp_path / "out", dtype="float16")
    with pytest.raises(InputError, match="dtype 'int8' are not supported"):
        convert.import_hf(folder, "int8")
    assert not (tmp_path / "out").exists()


def test_weights_must_be_floating_point(tmp_path):
    folder = changed(tmp_path, tensors={C_PROJ: np.ones((14, 14), np.int32)})
    with pytest.raises(InputError, match=f"'{C_PROJ}' holds int32"):
        convert.import_hf(folder)


W = np.zeros((131, 14), np.float32)
REFUSED = {
    "unknown tensor": (dict(tensors={"transformer.h.0.x": W}), "'transformer.h.0.x' has no place"),
    "wrong prefix": (dict(tensors={"model.wte.weight": W}), "'model.wte.weight' has no place"),
    "double prefix": (
        dict(tensors={f"transformer.{WTE}": W}, drop=[WTE]),
        f"'transformer.{WTE}' has no place",
    ),
    "more layers in the file": (dict(config={"n_layer": 2}), "no place in a 2-layer gpt2 model"),
    "fewer layers in the file": (
        dict(config={"n_layer": 4}),
        "'transformer.h.3.ln_1.weight' and 11 more is missing for a 4-layer",
    ),
    "missing": (dict(drop=[C_PROJ]), f"'{C_PROJ}' is missing"),
    "both prefixes": (dict(tensors={"wte.weight": W}), f"holds '{WTE}' twice"),
    "vocabulary in the config": (
        dict(config={"vocab_size": 128}),
        f"vocab_size 128, '{WTE}' has 131 rows",
    ),
    "vocabulary in the file": (
        dict(tensors={WTE: W[:130]}),
        f"vocab_size 131, '{WTE}' has 130 rows",
    ),
    "positions": (
        dict(config={"n_positions": 47}),
        "'transformer.wpe.weight' has shape [48, 14], the config asks for [47, 14]",
    ),
    "width": (
        dict(config={"n_embd": 16}),
        f"'{WTE}' has shape [131, 14], the config asks for [131, 16]",
    ),
    "transposed": (
        dict(tensors={"transformer.h.2.mlp.c_fc.weight": np.zeros((56, 14), np.float32)}),
        "'transformer.h.2.mlp.c_fc.weight' has shape [56, 14], the config asks for [14, 56]; it "
        "looks transposed",
    ),
    "stale head": (
        dict(tensors={"lm_head.weight": W}),
        f"'lm_head.weight' differs from '{WTE}' although the config ties them",
    ),
    "stale head of another size": (
        dict(tensors={"lm_head.weight": W[:128]}),
        f"'lm_head.weight' differs from '{WTE}'",
    ),
    "no head": (dict(config={"tie_word_embeddings": False}), "'lm_head.weight' is missing"),
    "model type": (dict(config={"model_type": "bert"}), "model_type 'bert' is not supported"),
    "config key": (dict(config={"use_rope": True}), "unknown key 'use_rope'"),
    "config value": (
        dict(config={"scale_attn_by_inverse_layer_idx": True}),
        "scale_attn_by_inverse_layer_idx=True is not supported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named(tmp_path, case):
    change, message = REFUSED[case]
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        convert.import_hf(changed(tmp_path, **change))
    assert str(tmp_path) in str(caught.value)


def test_tied_config_over_an_untied_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="'lm_head.weight' differs from"):
        convert.import_hf(changed(tmp_path, UNTIED, config={"tie_word_embeddings": True}))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(InputError, match="config.json does not exist"):
        convert.import_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(InputError, match="model_type None is not supported"):
        convert.import_hf(tmp_path)
    shutil.copy(TIED / "config.json", tmp_path)
    with pytest.raises(InputError, match="has no model.safetensors; download"):
        convert.import_hf(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match=r"only pytorch_model.bin: a pickle.*save_pretrained"):
        convert.import_hf(tmp_path)


# Around the weights


def test_tokenizer_files_are_copied_as_they_are(tmp_path):
    """From a whole model folder: everything but its weights and its config."""
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(UNTIED, tokenizer)
    (tokenizer / "merges.txt").write_bytes(b"\xc4\xa0 t\r\n")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"é": 1}))
    (tokenizer / "expected.npz").unlink()
    (tokenizer / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tokenizer / "model.safetensors.index.json").write_text("{}")
    config, params = convert.import_hf(TIED)
    convert.export_hf(config, params, tmp_path / "out", tokenizer)
    names = {"config.json", "model.safetensors", "merges.txt", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
    assert load(tmp_path / "out")[0]["vocab_size"] == 131
    with pytest.raises(InputError, match="tokenizer folder .* does not exist"):
        convert.export_hf(config, params, tmp_path / "out2", tmp_path / "nowhere")


def test_an_export_replaces_nothing(tmp_path):
    config, params = convert.import_hf(TIED)
    out = tmp_path / "out"
    out.mkdir()
    convert.export_hf(config, params, out)
    before = (out / "model.safetensors").stat()
    with pytest.raises(InputError, match=f"{out} exists; name another folder"):
        convert.export_hf(config, params, out)
    assert (out / "model.safetensors").stat() == before


def test_parameters_must_fit_the_config(tmp_path):
    config, params = convert.import_hf(TIED)
    head = params | {"head": params["embed"]["wte"]}
    short = params | {"embed": params["embed"] | {"wte": params["embed"]["wte"][:-1]}}
    less = {name: value for name, value in params.items() if name != "final_norm"}
    for tree, message in (
        (head, "'head' has shape (131, 14), the config asks for None"),
        (short, "'embed/wte' has shape (130, 14), the config asks for (131, 14)"),
        (less, "'final_norm/b' has shape None, the config asks for (14,)"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            convert.export_hf(config, tree, tmp_path / "out")
    for change in ({"vocab_size": 130}, {"layers": 2}, {"tied": False}, {"mlp_width": 55}):
        with pytest.raises(InputError, match="the config asks for"):
            convert.export_hf(dataclasses.replace(config, **change), params, tmp_path / "out")
    with pytest.raises(InputError, match="width 14 cannot have 2 heads of 3"):
        convert.export_hf(dataclasses.replace(config, head_dim=3), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
