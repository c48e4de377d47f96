"""Conversion: every bit survives, and whatever does not fit is refused by name."""

import dataclasses
import gc
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import families, files, safetensors, schema
from core.config import ModelConfig
from core.errors import InputError
from core.hf import convert, gate, reference

GOLDEN = Path(__file__).parents[2] / "golden"
TIED, UNTIED = GOLDEN / "gpt2_tiny", GOLDEN / "gpt2_tiny_untied"
GEMMA, NEOX = GOLDEN / "gemma3_tiny", GOLDEN / "neox_tiny"
FOLDERS = (TIED, UNTIED, GEMMA, GOLDEN / "gemma3_tiny_mqa", NEOX, GOLDEN / "neox_tiny_sequential")
WTE, C_PROJ = "transformer.wte.weight", "transformer.h.1.attn.c_proj.weight"


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
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


def test_layers_are_stacked_and_linear_maps_stored_in_out():
    tensors, params = load(TIED)[1], convert.import_hf(TIED)[1]
    for layer, name in enumerate(f"transformer.h.{layer}.mlp.c_fc" for layer in range(3)):
        for path, wanted in (("w", "weight"), ("b", "bias")):
            np.testing.assert_array_equal(
                params["blocks"]["mlp_c_fc"][path][layer], tensors[f"{name}.{wanted}"]
            )
    tensors, params = load(NEOX)[1], convert.import_hf(NEOX)[1]
    for layer in range(2):
        np.testing.assert_array_equal(
            params["blocks"]["dense_h_to_4h"]["w"][layer].T,
            tensors[f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"],
        )


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_export_writes_the_file_of_transformers(tmp_path, source, kind):
    config, params = convert.import_hf(source)
    agreement = gate.export_hf(config, jax.tree.map(kind, params), tmp_path / "out")
    assert agreement.logits_error < 1e-5 and agreement.tokens == config.context
    written, original = (f / "model.safetensors" for f in (tmp_path / "out", source))
    assert written.read_bytes() == original.read_bytes()
    again, found = convert.import_hf(tmp_path / "out")
    assert again == config
    assert_same(found, params)


BUFFERS = {
    TIED: ("h.{}.attn.bias", "h.{}.attn.masked_bias"),
    GEMMA: ("layers.{}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    NEOX: ("layers.{}.attention.bias", "layers.{}.attention.rotary_emb.inv_freq"),
}


@pytest.mark.parametrize("source", BUFFERS, ids=lambda folder: folder.name)
def test_names_without_prefix_and_buffers_are_accepted(tmp_path, source):
    """As on the Hub: no prefix, causal masks and rotary tables beside the weights."""
    config, tensors = load(source)
    family = families.of(convert.open_hf(source).config)
    tensors = {name.removeprefix(family.PREFIX): tensor for name, tensor in tensors.items()}
    for layer in range(2):
        for buffer in BUFFERS[source]:
            tensors[buffer.format(layer)] = np.tri(4, dtype=bool)[None, None]
    folder = save(tmp_path, config, tensors)
    assert_same(convert.import_hf(folder)[1], convert.import_hf(source)[1])
    assert gate.check_hf(folder) == gate.check_hf(source)


@pytest.mark.parametrize("source", [TIED, GEMMA], ids=lambda folder: folder.name)
def test_an_equal_copy_of_a_tied_head_is_accepted(tmp_path, source):
    config, tensors = load(source)
    embedding = next(t for name, t in tensors.items() if re.search("wte|embed_tokens", name))
    folder = save(tmp_path, config, tensors | {"lm_head.weight": embedding})
    assert_same(convert.import_hf(folder)[1], convert.import_hf(source)[1])
    gate.check_hf(folder)


def test_neox_head_has_two_names(tmp_path):
    """transformers 5 calls `embed_out` `lm_head` in memory, and some of its files do."""
    config, tensors = load(NEOX)
    renamed = {name.replace("embed_out", "lm_head"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    folder = save(tmp_path, config, renamed)
    assert_same(convert.import_hf(folder)[1], convert.import_hf(NEOX)[1])
    assert gate.check_hf(folder) == gate.check_hf(NEOX)
    save(tmp_path, config, tensors | renamed)
    with pytest.raises(InputError, match="holds 'embed_out.weight' twice"):
        convert.import_hf(tmp_path)


@pytest.mark.parametrize("name", [folder.name for folder in FOLDERS[2:]])
def test_configs_of_transformers_4_mean_the_same(tmp_path, name):
    config = files.read_json(GOLDEN / "transformers4" / f"{name}.json")
    folder = save(tmp_path, config, load(GOLDEN / name)[1])
    assert convert.import_hf(folder)[0] == convert.import_hf(GOLDEN / name)[0]
    assert gate.check_hf(folder) == gate.check_hf(GOLDEN / name)


def test_shards_are_written_and_read(tmp_path, source):
    """In transformers' naming, at most of the size asked for, except for one large tensor."""
    config, params = convert.import_hf(source)
    limit = 12_000
    gate.export_hf(config, params, tmp_path / "out", shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    count = len(shards)
    assert count > 1 and not (tmp_path / "out" / "model.safetensors").exists()
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    total = 0
    for shard in shards:
        held = safetensors.read(tmp_path / "out" / shard)
        assert all(index["weight_map"][name] == shard for name in held)
        size = sum(tensor.nbytes for tensor in held.values())
        assert size <= limit or len(held) == 1
        total += size
    assert index["metadata"] == {"total_size": total}
    original = load(source)[1]
    assert {*index["weight_map"]} == {*original}
    for name, tensor in safetensors.read_folder(tmp_path / "out").items():
        np.testing.assert_array_equal(tensor, original[name])
    assert_same(convert.import_hf(tmp_path / "out")[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_exports_hold_the_rounded_weights(tmp_path, dtype):
    config, params = convert.import_hf(TIED)
    gate.export_hf(config, params, tmp_path / "out", dtype=dtype)
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
    gate.export_hf(config, params, tmp_path / "out")
    assert convert.import_hf(tmp_path / "out")[0] == config


OTHERS = {
    "gemma3": dict(kv_heads=1, head_dim=4, rope_theta_local=7.0, window=3, stops=(5, 6),
                   sliding=(True, False), query_scale=10**-0.5),
    "gemma3, all defaults": dict(),
    "gpt_neox": dict(rotary_dim=2, parallel_residual=False, rope_theta=9.0, tied=True),
    "gpt_neox, all defaults": dict(tied=False),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_settings_of_the_other_families_survive(tmp_path, name):
    fields = {"activation": "silu", "norm_eps": 1e-3, "eos": 28, "head_dim": 4, **OTHERS[name]}
    config = ModelConfig(
        family=name.split(",")[0], vocab_size=29, context=9, width=8, layers=2, heads=2,
        mlp_width=11, **fields,
    )  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)
    gate.export_hf(config, params, tmp_path / "out")
    found = convert.import_hf(tmp_path / "out")[0]
    for field, value in fields.items():
        assert getattr(found, field) == value
    assert gate._explicit(found) == gate._explicit(config)


def test_reference_agrees_with_transformers(source):
    with np.load(source / "expected.npz", allow_pickle=False) as expected:
        scale = np.abs(expected["logits"]).max()
        for ids_T, logits_TV, n in zip(
            expected["ids"], expected["logits"], expected["lengths"], strict=True
        ):
            found_TV = reference.logits(source, ids_T[None, :n])[0]
            assert np.abs(found_TV - logits_TV[:n]).max() <= 1e-5 * scale


def test_memory_is_the_result_and_one_tensor(tmp_path):
    config = ModelConfig(
        family="gpt2", vocab_size=64, context=8, width=128, layers=12, heads=2, head_dim=64,
        mlp_width=512,
    )  # fmt: skip
    params = schema.init(families.rows(config), config.layers, seed=0)
    convert.write_hf(tmp_path, config, params, "bfloat16")
    largest = max(t.size for t in load(tmp_path)[1].values()) * 4
    convert.import_hf(tmp_path)  # what the first time alone takes is not meant
    gc.collect()
    tracemalloc.start()
    imported = convert.import_hf(tmp_path)[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sum(x.nbytes for x in jax.tree.leaves(imported)) + 2 * largest


# Peak resident memory of an import whose file is twice what it makes, in a process of its own.
MEASURE = """
import re, sys
from pathlib import Path
from core.hf import convert

def status(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

before = status("VmRSS")
convert.import_hf(Path(sys.argv[1]), "bfloat16")
print(status("VmHWM") - before)
"""


def test_resident_memory_is_the_result(tmp_path):
    """Pages of the mapped file do not pile up beside it."""
    config = ModelConfig(
        family="gpt_neox", vocab_size=20_000, context=8, width=1024, layers=4, heads=8,
        head_dim=128, mlp_width=4096, tied=False,
    )  # fmt: skip
    files.write_json(tmp_path / "config.json", families.of(config).to_hf(config))
    tensors = {
        name: safetensors.Lazy(
            slot.shape, "float32", lambda slot=slot: np.full(slot.shape, 0.5, "f4")
        )
        for name, slot in convert.slots(config).items()
    }
    safetensors.write(tmp_path / "model.safetensors", tensors)
    made = sum(np.prod(slot.shape) for slot in convert.slots(config).values()) * 2
    assert made > 150e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert made < int(done.stdout) < 1.3 * made


def test_generation_config_adds_ends(tmp_path):
    """Chat models name the end of a turn there; it ends a text here too, and an export keeps it."""
    folder = changed(tmp_path)
    config, params = convert.import_hf(folder)
    files.write_json(folder / "generation_config.json", {"eos_token_id": [config.eos, 7]})
    found = convert.import_hf(folder)[0]
    assert (found.eos, found.stops) == (config.eos, (7,)) and config.stops == ()
    gate.export_hf(found, params, tmp_path / "out")
    assert convert.import_hf(tmp_path / "out")[0] == found
    files.write_json(folder / "generation_config.json", {"eos_token_id": "7"})
    with pytest.raises(InputError, match="generation_config.json: eos_token_id must be a token id"):
        convert.import_hf(folder)


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
        gate.export_hf(config, params, tmp_path / "out", dtype="float16")
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
        f"vocab_size 128, '{WTE}' has 131 rows; cut off padding rows with `convert import "
        "--trim-vocab`",
    ),
    "vocabulary in the file": (
        dict(tensors={WTE: W[:130]}),
        f"vocab_size 131, '{WTE}' has 130 rows; correct vocab_size or take both files",
    ),
    "layers beyond counting": (dict(config={"n_layer": 2**40}), f"n_layer={2**40} is more than"),
    "huge width": (dict(config={"n_embd": 2**40}), f"the config asks for [131, {2**40}]"),
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


@pytest.mark.parametrize("source", [TIED, NEOX], ids=lambda folder: folder.name)
def test_padding_of_the_vocabulary_is_cut_off_on_request(tmp_path, source):
    config, tensors = load(source)
    rows = r"wte|embed_in|embed_out"
    padded = {
        name: np.pad(tensor, ((0, 5), (0, 0))) if re.search(rows, name) else tensor
        for name, tensor in tensors.items()
    }
    folder = save(tmp_path / "padded", config, padded)
    with pytest.raises(InputError, match="--trim-vocab"):
        convert.import_hf(folder)
    trimmed = convert.open_hf(folder, trim_vocab=True)
    assert trimmed.padding == 5 and convert.open_hf(source, trim_vocab=True).padding == 0
    assert_same(convert.parameters(trimmed), convert.import_hf(source)[1])
    short = {n: t[:-1] if re.search(rows, n) else t for n, t in tensors.items()}
    with pytest.raises(InputError, match="correct vocab_size or take both files"):
        convert.open_hf(save(tmp_path / "short", config, short), trim_vocab=True)


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
    tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(UNTIED / name, tokenizer)
    (tokenizer / "merges.txt").write_bytes(b"\xc4\xa0 t\r\n")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"é": 1}))
    (tokenizer / "model-00001-of-00002.safetensors").write_bytes(b"")
    (tokenizer / "model.safetensors.index.json").write_text("{}")
    config, params = convert.import_hf(TIED)
    gate.export_hf(config, params, tmp_path / "out", tokenizer)
    names = {"config.json", "model.safetensors", "merges.txt", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in ("merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
    assert load(tmp_path / "out")[0]["vocab_size"] == 131
    with pytest.raises(InputError, match="tokenizer folder .* does not exist"):
        gate.export_hf(config, params, tmp_path / "out2", tmp_path / "nowhere")


def test_an_export_replaces_nothing(tmp_path):
    config, params = convert.import_hf(TIED)
    out = tmp_path / "out"
    out.mkdir()
    gate.export_hf(config, params, out)
    before = (out / "model.safetensors").stat()
    with pytest.raises(InputError, match=f"{out} exists; name another folder"):
        gate.export_hf(config, params, out)
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
            gate.export_hf(config, tree, tmp_path / "out")
    for change in ({"vocab_size": 130}, {"layers": 2}, {"tied": False}, {"mlp_width": 55}):
        with pytest.raises(InputError, match="the config asks for"):
            gate.export_hf(dataclasses.replace(config, **change), params, tmp_path / "out")
    with pytest.raises(InputError, match="width 14 cannot have 2 heads of 3"):
        gate.export_hf(dataclasses.replace(config, head_dim=3), params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
