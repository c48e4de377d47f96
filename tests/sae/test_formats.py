"""Other tools' files, read and written, against what these tools compute with them."""

import fnmatch
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from core import safetensors
from core.errors import InputError
from sae import coder as coders
from sae import crosscoder, formats
from sae.coder import Coder
from sae.formats import CrossSae, names, saelens

GOLDEN = Path(__file__).parents[1] / "golden" / "sae" / "formats"
FOLDERS = {
    str(file.parent.relative_to(GOLDEN)): file.parent for file in GOLDEN.rglob("expected.npz")
}
SCOPE = "gemma_scope/google/gemma-scope-2-270m-pt"
RESIDUAL = f"{SCOPE}/resid_post/layer_12_width_16k_l0_medium"
AFFINE = f"{SCOPE}/transcoder_all/layer_12_width_16k_l0_small_affine"
CROSS = f"{SCOPE}/crosscoder/layer_5_9_12_width_64k_l0_medium"
FIRST = "gemma_scope/google/gemma-scope-2b-pt"
LENS = sorted(name for name in FOLDERS if name.startswith("saelens/") and "/old/" not in name)
ACTIVATIONS, RECONSTRUCTION = 2e-5, 5e-5  # relative to the largest


@pytest.fixture
def copied(tmp_path):
    """A golden folder that a test may spoil, under its own names."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(GOLDEN / name, tmp_path / name))

    return copy


def respell(folder: Path, **changes) -> None:
    """Change keys of a folder's config; None removes one."""
    file = next(path for path in (folder / "cfg.json", folder / "config.json") if path.exists())
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def rewrite(file: Path, change) -> None:
    """Replace a file's tensors by `change` of them."""
    tensors = {name: value.copy() for name, value in safetensors.read(file).items()}
    safetensors.write(file, change(tensors))


# What is computed


def test_there_is_a_file_of_every_kind():
    assert len(FOLDERS) == 36 and len(LENS) == len(saelens.KNOWN) + 2


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_features_and_reconstruction(name, close):
    sae = formats.load(FOLDERS[name])
    params = jax.tree.map(jax.numpy.asarray, sae.params)
    with np.load(FOLDERS[name] / "expected.npz") as file:
        expected = dict(file)
    x = jax.numpy.asarray(expected["x"])
    if isinstance(sae, CrossSae):
        f = crosscoder.encode(params, x)
        y = crosscoder.decode(params, f, x)
    else:
        f, y = coders.reconstruct(sae.coder, params, x)
    close(f, expected["activations"], ACTIVATIONS)
    close(y, expected["reconstruction"], RECONSTRUCTION)
    assert np.array_equal(np.asarray(f) != 0, expected["activations"] != 0)


@pytest.mark.parametrize(
    ("name", "tap_in", "tap_out", "model"),
    [
        (RESIDUAL, "resid_post.12", "resid_post.12", "google/gemma-3-270m"),
        (AFFINE, "mlp_in.12", "mlp_out.12", "google/gemma-3-270m"),
        (f"{SCOPE}/attn_out_all/layer_12_width_16k_l0_small", "attn_out.12", "attn_out.12",
         "google/gemma-3-270m"),
        (f"{SCOPE}/mlp_out/layer_9_width_16k_l0_big", "mlp_out.9", "mlp_out.9",
         "google/gemma-3-270m"),  # from the path alone, as the next
        (f"{SCOPE}/transcoder/layer_9_width_16k_l0_big_affine", "mlp_in.9", "mlp_out.9",
         "google/gemma-3-270m"),
        (f"{FIRST}-res/layer_7/width_16k/average_l0_13", "resid_post.7", "resid_post.7",
         "google/gemma-2-2b"),
        (f"{FIRST}-res/embedding/width_4k/average_l0_6", "embed", "embed", "google/gemma-2-2b"),
        (f"{FIRST}-transcoders/layer_7/width_16k/average_l0_9", None, "mlp_out.7",
         "google/gemma-2-2b"),
        ("saelens/standard", "resid_post.3", "resid_post.3", "gpt2"),
        ("saelens/jumprelu_heads", "attn_out.3", "attn_out.3", "gpt2"),
        ("saelens/old/standard", "resid_post.3", "resid_post.3", "gpt2-small"),
        ("saelens/old/topk", "attn_out.4", "attn_out.4", "gpt2-small"),
        ("sparsify/topk/layers.3", "resid_post.3", "resid_post.3", "EleutherAI/pythia-70m"),
        ("sparsify/transcoder/layers.3.mlp", "mlp_in.3", "mlp_out.3", "EleutherAI/pythia-70m"),
        ("dictionary_learning/topk", "resid_post.3", "resid_post.3", "EleutherAI/pythia-70m"),
    ],
)  # fmt: skip
def test_where_it_belongs(name, tap_in, tap_out, model):
    assert formats.load(GOLDEN / name).about[:3] == (tap_in, tap_out, model)


def test_layers_of_a_crosscoder():
    cross = formats.load(GOLDEN / CROSS)
    clt = formats.load(GOLDEN / SCOPE / "clt/width_256k_l0_medium_affine")
    assert isinstance(cross, CrossSae) and isinstance(clt, CrossSae)
    assert cross.taps_in == ("resid_post.5", "resid_post.9", "resid_post.12")
    assert clt.taps_in == ("mlp_in.0", "mlp_in.1", "mlp_in.2")
    assert clt.taps_out == ("mlp_out.0", "mlp_out.1", "mlp_out.2") and "W_skip" in clt.params
    with pytest.raises(InputError, match="reads 3 layers at once; choose an SAE"):
        formats.load_one(GOLDEN / CROSS)


def test_what_else_a_file_says_is_kept():
    extra = formats.load(GOLDEN / RESIDUAL).about.extra
    assert (extra["l0"], extra["type"]) == (20, "sae")
    assert extra["hf_hook_name"] == "model.layers.12.output"
    assert formats.load(GOLDEN / "saelens/old/standard").about.extra["context_size"] == 64
    heads = formats.load(GOLDEN / "saelens/old/topk").about.extra
    assert heads["reshape_activations"] == "hook_z" and heads["hook_name"] == "blocks.4.attn.hook_z"
    assert formats.load(GOLDEN / "sparsify/topk/layers.3").about.extra["hookpoint"] == "layers.3"


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_into_float32(copied, dtype):
    folder = copied("sparsify/topk/layers.3")
    whole = formats.load(folder)
    rewrite(folder / "sae.safetensors", lambda t: {k: v.astype(dtype) for k, v in t.items()})
    for name, value in formats.load(folder).params.items():
        assert value.dtype == np.float32 and value.flags.c_contiguous
        assert np.array_equal(value, whole.params[name].astype(dtype).astype(np.float32))


# Names


@pytest.mark.parametrize(
    ("name", "tap"),
    [
        ("model.layers.12.output", "resid_post.12"),
        ("model.layers.12", "resid_post.12"),
        ("blocks.12.hook_resid_post", "resid_post.12"),
        ("blocks.12.hook_resid_pre", "resid_post.11"),
        ("blocks.0.hook_resid_pre", "embed"),
        ("gpt_neox.layers.3", "resid_post.3"),
        ("transformer.h.3", "resid_post.3"),
        ("layers.10", "resid_post.10"),
        ("h.10", "resid_post.10"),
        ("layers.10.mlp", "mlp_out.10"),
        ("layers.10.mlp.input", "mlp_in.10"),
        ("embed_tokens", "embed"),
        ("blocks.4.hook_mlp_out", "mlp_out.4"),
        ("blocks.4.mlp.hook_in", "mlp_in.4"),
        ("blocks.4.attn.hook_z", "attn_out.4"),
        ("model.layers.4.self_attn.o_proj.input", "attn_out.4"),
        ("model.layers.4.post_feedforward_layernorm.output", "mlp_out.4"),
        # These sound alike and are other activations.
        ("blocks.4.hook_attn_out", None),
        ("blocks.4.hook_mlp_in", None),
        ("blocks.4.ln2.hook_normalized", None),
        ("blocks.4.hook_resid_mid", None),
        ("hook_embed", None),
        ("model.layers.4.mlp.output", None),
        ("model.layers.4.post_attention_layernorm.output", None),
        ("model.layers.x.output", None),
        ("", None),
        (None, None),
    ],
)
def test_names_of_activations(name, tap):
    assert names.tap(name) == tap


def test_the_mlp_of_gemma_puts_out_something_else():
    assert names.tap("layers.10.mlp", "google/gemma-2-2b") is None
    assert names.tap("layers.10.mlp.input", "google/gemma-2-2b") == "mlp_in.10"


@pytest.mark.parametrize("family", names.HUGGING_FACE)
@pytest.mark.parametrize("tap", ["resid_post.7", "mlp_out.0", "mlp_in.11", "attn_out.3", "embed"])
def test_names_come_back(tap, family):
    assert names.tap(names.transformer_lens(tap)) == tap
    module = names.hugging_face(tap, family)
    assert module is None if (tap, family) == ("embed", "gpt2") else names.tap(module) == tap


# Written for SAELens


@pytest.mark.parametrize(
    "name", sorted(name for name in FOLDERS if "scope-2-270m-pt/c" not in name)
)
def test_what_is_saved_is_the_same_sae(name, tmp_path):
    sae = formats.load_one(FOLDERS[name])
    kind = (sae.coder.architecture, sae.coder.transcoder, "W_skip" in sae.params)
    if kind not in saelens.KNOWN.values():
        with pytest.raises(InputError, match=f"SAELens has no {sae.coder.architecture}"):
            formats.save(tmp_path / "sae", sae)
        assert not (tmp_path / "sae").exists()
        return
    formats.save(tmp_path / "sae", sae)
    again = formats.load_one(tmp_path / "sae")
    assert again.coder == sae.coder and again.fingerprint == sae.fingerprint
    assert again.params.keys() == sae.params.keys()
    assert all(np.array_equal(again.params[k], sae.params[k]) for k in sae.params)
    assert again.about[:3] == sae.about[:3]
    assert sae.about.extra.items() <= again.about.extra.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize("name", LENS)
def test_files_are_those_that_saelens_writes(name, tmp_path):
    """Fields and tensors of a saved SAE against SAELens's own file of it."""
    formats.save(tmp_path / "sae", formats.load_one(GOLDEN / name))
    ours, theirs = (
        json.loads((p / "cfg.json").read_text()) for p in (tmp_path / "sae", GOLDEN / name)
    )
    if theirs["normalize_activations"] == "expected_average_only_in":
        theirs["normalize_activations"] = "none"  # it does nothing to a saved SAE
    assert ours == theirs
    found, expected = (
        safetensors.read(p / "sae_weights.safetensors") for p in (tmp_path / "sae", GOLDEN / name)
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[k], expected[k]) for k in expected)


def test_a_trained_sae_is_saved_with_its_decoder_norm_folded(tmp_path, close):
    sae = formats.load_one(GOLDEN / RESIDUAL)
    x = np.load(GOLDEN / RESIDUAL / "expected.npz")["x"]
    rescaled = sae._replace(coder=Coder("jumprelu", 12, 32, 12, centred=True, rescale=True))
    formats.save(tmp_path / "sae", rescaled)
    folded = formats.load_one(tmp_path / "sae")
    assert not folded.coder.rescale
    close(
        coders.reconstruct(folded.coder, folded.params, jax.numpy.asarray(x)),
        coders.reconstruct(rescaled.coder, rescaled.params, jax.numpy.asarray(x)),
    )


def test_options_of_matching_pursuit(copied, tmp_path):
    folder = copied("saelens/matching_pursuit")
    respell(folder, max_iterations=None, stop_on_duplicate_support=False, residual_threshold=0.5)
    sae = formats.load_one(folder)
    formats.save(tmp_path / "sae", sae)
    for coder in (sae.coder, formats.load_one(tmp_path / "sae").coder):
        assert coder == Coder("matching_pursuit", 12, 32, 12, centred=True, residual_threshold=0.5,
                              stop_on_duplicate=False)  # fmt: skip


def test_other_files_are_not_overwritten(tmp_path):
    sae = formats.load_one(GOLDEN / RESIDUAL)
    (tmp_path / "notes.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="name a new folder"):
            formats.save(place, sae)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    formats.save(tmp_path / "sae", sae)
    formats.save(tmp_path / "sae", sae)  # its own may be


# Bad files


def spoil(name, value):
    def change(tensors):
        tensors[name][..., -1] = value
        return tensors

    return change


def without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def replaced(name, make):
    return lambda tensors: tensors | {name: make(tensors[name])}


SAE_FILE = {RESIDUAL: "params.safetensors", AFFINE: "params.safetensors",
            CROSS: "params_layer_1.safetensors",
            "saelens/jumprelu": "sae_weights.safetensors",
            "saelens/gated": "sae_weights.safetensors",
            "saelens/jumprelu_skip_transcoder": "sae_weights.safetensors",
            "sparsify/topk/layers.3": "sae.safetensors",
            "dictionary_learning/batchtopk": "ae.safetensors",
            "dictionary_learning/matryoshka": "ae.safetensors"}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (RESIDUAL, without("threshold"), "no tensor 'threshold'"),
        (RESIDUAL, replaced("w_enc", np.transpose), r"W_enc is \[32, 12\].*transpose"),
        (RESIDUAL, replaced("w_dec", np.transpose), r"W_dec is \[12, 32\].*transpose"),
        (RESIDUAL, spoil("b_enc", np.nan), "'b_enc' holds NaN or infinity"),
        (RESIDUAL, spoil("w_dec", np.inf), "'w_dec' holds NaN or infinity"),
        (RESIDUAL, lambda t: t | {"W_skip": t["w_enc"]}, "unexpected tensor 'W_skip'"),
        (RESIDUAL, lambda t: t | {"affine_skip_connection": np.eye(12)}, "unexpected tensor"),
        (RESIDUAL, replaced("w_enc", lambda w: w[:-1]), r"reads width 11 and writes 12"),
        (RESIDUAL, lambda t: {k: v[..., :8] for k, v in t.items()}, "8 features.*width 32"),
        (RESIDUAL, replaced("threshold", lambda v: v.astype(np.int32)), "is of type int32"),
        (AFFINE, without("affine_skip_connection"), "no tensor 'affine_skip_connection'"),
        (CROSS, replaced("b_enc", lambda b: b[1:]), "params_layer_1.*unlike layer 0"),
        ("saelens/jumprelu", without("threshold"), "no tensor 'threshold'"),
        ("saelens/jumprelu", replaced("W_enc", np.transpose), r"W_enc is \[32, 12\].*transpose"),
        ("saelens/jumprelu", replaced("b_enc", lambda b: b[1:]), r"b_enc is \[31\], not \[32\]"),
        ("saelens/gated", without("r_mag"), "no tensor 'r_mag'"),
        ("saelens/gated", lambda t: t | {"b_enc": t["b_mag"]}, "unexpected tensor 'b_enc'"),
        ("saelens/gated", lambda t: t | {"scaling_factor": 2 * t["b_mag"]}, "scaling_factor"),
        ("saelens/jumprelu_skip_transcoder", replaced("W_skip", np.transpose),
         r"W_skip is \[15, 12\].*transpose"),
        ("sparsify/topk/layers.3", replaced("encoder.weight", np.transpose), "W_enc.*transpose"),
        ("sparsify/topk/layers.3", lambda t: t | {"W_skip": np.eye(12)}, "unexpected.*'W_skip'"),
        ("dictionary_learning/batchtopk", without("threshold"), "no tensor 'threshold'"),
        ("dictionary_learning/batchtopk", without("decoder.weight"), "'decoder.weight'"),
        ("dictionary_learning/matryoshka", replaced("W_dec", np.transpose), "W_dec.*transpose"),
    ],
)  # fmt: skip
def test_bad_tensors_are_named(copied, name, change, message):
    folder = copied(name)
    rewrite(folder / SAE_FILE[name], change)
    with pytest.raises(InputError, match=message):
        formats.load(folder)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (RESIDUAL, {"architecture": "topk"}, "'topk' is unknown; known.*'jump_relu'"),
        (RESIDUAL, {"type": "lorsa"}, "'lorsa' is unknown; known: sae, transcoder, crosscoder"),
        (RESIDUAL, {"width": 16384}, "32 features, but config.json beside it says width 16384"),
        ("saelens/topk", {"architecture": "temporal"}, "'temporal' is unknown; known: standard"),
        ("saelens/topk", {"architecture": "batchtopk"}, "unknown.*save_inference_model"),
        ("saelens/topk", {"normalize_activations": "l2"}, "'l2' is unknown; known: none"),
        ("saelens/topk", {"k": None}, "k is None, not a positive whole number"),
        ("saelens/topk", {"k": 33}, "k is 33, not between 1 and its 32"),
        ("saelens/topk", {"d_in": 13}, r"W_enc is \[12, 32\], not \[13, 32\]"),
        ("saelens/old/topk", {"activation_fn_str": "tanh-relu"}, "'tanh-relu' is unknown"),
        ("sparsify/groupmax/layers.3", {"k": 5}, "33 features do not make 5 equal groups"),
        ("sparsify/topk/layers.3", {"activation": "sign"}, "'sign' is unknown"),
        ("sparsify/topk/layers.3", {"signed": True}, "'signed topk' is unknown"),
        ("dictionary_learning/topk", {"trainer": {"dict_class": "Other"}}, "'Other' is unknown; k"),
        ("dictionary_learning/topk", {"trainer": None}, "None is unknown; known: AutoEncoder"),
    ],
)  # fmt: skip
def test_bad_configs_are_named(copied, name, changes, message):
    folder = copied(name)
    respell(folder, **changes)
    with pytest.raises(InputError, match=message):
        formats.load(folder)


def test_k_of_a_file_and_of_its_config(copied):
    folder = copied("dictionary_learning/topk")
    rewrite(folder / "ae.safetensors", replaced("k", lambda k: k + 1))
    with pytest.raises(InputError, match="has k 5, but config.json beside it says 4"):
        formats.load(folder)


def test_a_missing_layer_is_named(copied):
    folder = copied(CROSS)
    (folder / "params_layer_1.safetensors").unlink()
    with pytest.raises(InputError, match="2 files .*, but no params_layer_1.safetensors"):
        formats.load(folder)


def test_a_pickle_is_not_opened(copied):
    folder = copied("dictionary_learning/standard")
    (folder / "ae.safetensors").rename(folder / "ae.pt")
    with pytest.raises(InputError, match=r"can run code and is not read.*save_file\(torch.load"):
        formats.load(folder)


def test_folders_without_an_sae(tmp_path):
    with pytest.raises(InputError, match="is no folder; name the folder of an SAE"):
        formats.load(tmp_path / "none")
    with pytest.raises(InputError, match="holds no SAE: none of sae_weights.safetensors"):
        formats.load(tmp_path)
    with pytest.raises(InputError, match="with --sae-id: attn_out_all/layer_12.*and 5 more"):
        formats.load(GOLDEN / SCOPE)


# Names on the Hub


def test_a_run_that_trained_one_stands_for_it(copied, tmp_path):
    """Whatever lies above it; two of them must be told apart."""
    inner = copied(RESIDUAL)
    assert formats.load(tmp_path).fingerprint == formats.load(inner).fingerprint
    copied(AFFINE)
    with pytest.raises(InputError, match="with --sae-id: .*resid_post.*transcoder_all"):
        formats.load(tmp_path)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that has the golden folders; calls are kept."""
    import huggingface_hub

    calls = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        calls.append((repository, revision, allow_patterns, ignore_patterns))
        return str(GOLDEN / "gemma_scope" / repository)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("place", "id", "revision"),
    [
        ("google/gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_medium", None),
        ("google/gemma-scope-2-270m-pt/resid_post", "layer_12_width_16k_l0_medium", None),
        ("google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium", None, None),
        ("google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium@v2", None, "v2"),
    ],
)
def test_a_folder_on_the_hub(hub, place, id, revision):
    sae = formats.load(place, id)
    assert sae.fingerprint == formats.load(GOLDEN / RESIDUAL).fingerprint
    assert sae.about.tap_in == "resid_post.12"
    suffix = f"@{revision}" if revision else ""
    name = "google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium"
    assert sae.about.origin == name + suffix
    ((repository, asked, allow, ignore),) = hub
    assert (repository, asked) == ("google/gemma-scope-2-270m-pt", revision)

    def fetched(path: str) -> bool:
        matches = (any(fnmatch.fnmatch(path, p) for p in patterns) for patterns in (allow, ignore))
        return next(matches) and not next(matches)

    inside = "resid_post/layer_12_width_16k_l0_medium"
    assert fetched(f"{inside}/config.json") and fetched(f"{inside}/params.safetensors")
    assert fetched(f"{inside}/params_layer_3.safetensors")
    assert not fetched(f"{inside}/examples.safetensors") and not fetched(f"{inside}/ae.pt")
    assert not fetched("config.json") and not fetched(f"{inside}_seed_1/params.safetensors")
    assert not fetched(f"{inside}/more/params.safetensors")


def test_a_path_of_the_hub_says_what_a_config_does_not(hub):
    sae = formats.load("google/gemma-scope-2-270m-pt/mlp_out/layer_9_width_16k_l0_big@main")
    assert sae.about.tap_in == "mlp_out.9" and sae.about.model == "google/gemma-3-270m"
    sae = formats.load("google/gemma-scope-2b-pt-res/layer_7/width_16k/average_l0_13@main")
    assert sae.about.tap_in == "resid_post.7" and sae.about.extra["l0"] == 13


def test_folders_here_come_first(hub, tmp_path):
    inner = "google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium"
    shutil.copytree(GOLDEN / RESIDUAL, tmp_path / inner)
    assert formats.load(inner).about.origin == str(tmp_path / inner)
    repository, id = inner.split("/resid", 1)
    assert formats.load(repository, f"resid{id}").about.origin == str(tmp_path / inner)
    with pytest.raises(InputError, match="is no folder"):
        formats.load(f"{repository}/resid_post/layer_9_width_16k_l0_medium")
    assert not hub
