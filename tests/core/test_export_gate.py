"""The gate of an export: every known exporter bug must be refused, and leave nothing behind."""

import re
from pathlib import Path

import numpy as np
import pytest

from core import convert, files, safetensors
from core.errors import InputError
from core.families import gpt2

TIED = Path(__file__).parents[1] / "golden" / "gpt2_tiny"
WTE, C_PROJ = "transformer.wte.weight", "transformer.h.1.attn.c_proj.weight"


def of(pattern: str, change):
    """The mutation of every tensor whose name matches."""

    def mutate(tensors):
        hits = [name for name in tensors if re.search(pattern, name)]
        assert hits
        return tensors | {name: change(tensors[name]) for name in hits}

    return mutate


def renamed(pattern: str, new):
    return lambda tensors: {re.sub(pattern, new, name): t for name, t in tensors.items()}


def adding(name: str, make):
    return lambda tensors: tensors | {name: make(tensors)}


def same(tensors):
    return tensors


def kqv(w):
    q, k, v = np.split(w, 3, axis=-1)
    return np.concatenate([k, q, v], axis=-1)


def interleaved(w):
    """GPT-NeoX's order: q, k, v of the first head, then of the second."""
    return w.reshape(*w.shape[:-1], 3, 2, 7).swapaxes(-3, -2).reshape(w.shape)


MATRICES = r"(c_attn|c_proj|c_fc)\.weight"
LESS, MORE = of("wte", lambda w: w[:-1]), of("wte", lambda w: np.pad(w, ((0, 5), (0, 0))))
# (changes of config.json, change of the tensors)
LOGIT_MUTATIONS = {
    "square c_proj transposed": ({}, of(r"attn\.c_proj\.weight", np.transpose)),
    "k, q, v": ({}, of("c_attn", kqv)),
    "interleaved heads": ({}, of("c_attn", interleaved)),
    "reshaped, not transposed": ({}, of(MATRICES, lambda w: w.T.reshape(w.shape))),
    "biases dropped": ({}, of(r"(c_attn|c_proj|c_fc)\.bias", np.zeros_like)),
    "one bias dropped": ({}, of(r"h\.1\.mlp\.c_proj\.bias", np.zeros_like)),
    "norms saved as w - 1": ({}, of(r"ln_\w+\.weight", lambda w: w - 1)),
    "layers reversed": ({}, renamed(r"h\.(\d)", lambda m: f"h.{2 - int(m[1])}")),
    "positions moved by one": ({}, of("wpe", lambda w: np.roll(w, 1, axis=0))),
    "vocabulary moved by one": ({}, of("wte", lambda w: np.roll(w, 1, axis=0))),
    "another head beside a tied one": ({}, adding("lm_head.weight", lambda t: t[WTE][::-1])),
    "gelu of the other kind": ({"activation_function": "gelu"}, same),
    "heads": ({"n_head": 7}, same),
}
FILE_MUTATIONS = {
    "no prefix": ({}, renamed("^transformer.", "")),
    "wrong prefix": ({}, renamed("^transformer.", "model.")),
    "equal head beside a tied one": ({}, adding("lm_head.weight", lambda t: t[WTE])),
    "untied": ({"tie_word_embeddings": False}, adding("lm_head.weight", lambda t: t[WTE])),
    "vocabulary of the config": ({"vocab_size": 130}, same),
    "a row too few": ({}, LESS),
    "padding rows": ({}, MORE),
    "a row too few, config agrees": ({"vocab_size": 130}, LESS),
    "padding rows, config agrees": ({"vocab_size": 136}, MORE),
    "a position too few": ({"n_positions": 47}, of("wpe", lambda w: w[:-1])),
    "epsilon": ({"layer_norm_epsilon": 1e-6}, same),
    "rounded": ({}, of(C_PROJ, lambda w: w.astype("bfloat16").astype(np.float32))),
    "one bit": ({}, of(C_PROJ, lambda w: (w.view(np.uint32) ^ 1).view(np.float32))),
    "a buffer": ({}, adding("transformer.h.0.attn.bias", lambda t: np.ones((1, 1, 48, 48)))),
}
MUTATIONS = LOGIT_MUTATIONS | FILE_MUTATIONS


def mutate(folder: Path, name: str) -> None:
    keys, change = MUTATIONS[name]
    config, weights = folder / "config.json", folder / "model.safetensors"
    files.write_json(config, files.read_json(config) | keys)
    safetensors.write(weights, change(safetensors.read(weights)))


@pytest.fixture
def exported(tmp_path):
    """(folder, config, params) of an export before its gate."""
    config, params = convert.import_hf(TIED)
    folder = tmp_path / "export"
    convert._write(folder, config, params, "float32")
    return folder, config, params


def test_gate_passes_what_was_exported(exported):
    folder, config, params = exported
    assert convert._gate(folder, config, params, "float32").error < 1e-5


@pytest.mark.parametrize("name", MUTATIONS)
def test_gate_refuses_every_mutation(exported, name):
    folder, config, params = exported
    mutate(folder, name)
    with pytest.raises(InputError):
        convert._gate(folder, config, params, "float32")


@pytest.mark.parametrize("name", LOGIT_MUTATIONS)
def test_logits_alone_tell_a_wrong_model(exported, name):
    """Without comparing any tensor: only what transformers would compute from the files."""
    folder, config, params = exported
    mutate(folder, name)
    with pytest.raises(InputError, match="logits differ"):
        convert._compare_logits(folder, config, params)


def test_a_mistake_that_import_undoes_is_caught(tmp_path, monkeypatch):
    """Transposing the square c_proj both ways keeps every bit, and is wrong for everybody else."""
    config, params = convert.import_hf(TIED)
    rows = gpt2.rows

    def transposed(config):
        square = "attn.c_proj.weight"
        return [row._replace(transpose=row.hf.endswith(square)) for row in rows(config)]

    monkeypatch.setattr(gpt2, "rows", transposed)
    with pytest.raises(InputError, match="logits differ"):
        convert.export_hf(config, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_logits_are_refused(tmp_path, value):
    config, params = convert.import_hf(TIED)
    params = params | {"embed": params["embed"] | {"wte": np.full((131, 14), value, np.float32)}}
    with pytest.raises(InputError, match="every token is equally likely"):
        convert.export_hf(config, params, tmp_path / "out")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    config, params = convert.import_hf(TIED)
    write = convert._write

    def faulty(folder, *args):
        write(folder, *args)
        mutate(folder, "k, q, v")

    monkeypatch.setattr(convert, "_write", faulty)
    message = f"the export failed its check and was deleted: {tmp_path / 'out'}: tensor"
    with pytest.raises(InputError, match=re.escape(message)):
        convert.export_hf(config, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
