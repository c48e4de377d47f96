"""The gate of an export: every known exporter bug must be refused, and leave nothing behind."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import tokenizers
from core import families, files, safetensors
from core.errors import InputError
from core.families import gemma3, gpt2
from core.hf import convert, gate

GOLDEN = Path(__file__).parents[2] / "golden"
TOKENIZER = GOLDEN / "tokenizers" / "gpt2"
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


def without(pattern: str):
    return lambda tensors: {n: t for n, t in tensors.items() if not re.search(pattern, n)}


def adding(name: str, make):
    return lambda tensors: tensors | {name: make(tensors)}


def swapped(a: str, b: str):
    """Two kinds of tensors trade places."""
    return renamed(f"({a}|{b})", lambda m: b if m[1] == a else a)


def same(tensors):
    return tensors


def reshaped(w):
    return w.T.reshape(w.shape)


def shifted(w):
    return np.roll(w, 1, axis=0)


def kqv(w):
    q, k, v = np.split(w, 3, axis=-1)
    return np.concatenate([k, q, v], axis=-1)


def interleaved(w):
    """GPT-NeoX's order in GPT-2's file: q, k, v of the first head, then of the second."""
    return w.reshape(*w.shape[:-1], 3, 2, 7).swapaxes(-3, -2).reshape(w.shape)


def de_interleaved(w):
    """GPT-2's order in GPT-NeoX's file: all of q, then k, then v."""
    return w.reshape(2, 3, 17, -1).swapaxes(0, 1).reshape(w.shape)


def kqv_by_head(w):
    q, k, v = np.split(w.reshape(2, 3, 17, -1), 3, axis=1)
    return np.concatenate([k, q, v], axis=1).reshape(w.shape)


ROPE = {
    "full_attention": {"rope_type": "default", "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
SWAPPED_ROPE = dict(zip(ROPE, reversed(ROPE.values()), strict=True))
LOCAL, GLOBAL = "sliding_attention", "full_attention"


class Case(NamedTuple):
    """Changes of config.json and of the tensors."""

    config: Mapping[str, Any]
    tensors: Any = same


MATRICES = r"(c_attn|c_proj|c_fc)\.weight"
LINEAR = r"(_proj|query_key_value|dense\w*)\.weight"
LESS, MORE = of("wte", lambda w: w[:-1]), of("wte", lambda w: np.pad(w, ((0, 5), (0, 0))))
# Change what transformers computes; those whose names hold "config" change what we compute as well.
LOGIT_CASES = {
    "gpt2_tiny": {
        "square c_proj transposed": Case({}, of(r"attn\.c_proj\.weight", np.transpose)),
        "k, q, v": Case({}, of("c_attn", kqv)),
        "interleaved heads": Case({}, of("c_attn", interleaved)),
        "reshaped, not transposed": Case({}, of(MATRICES, reshaped)),
        "biases dropped": Case({}, of(r"(c_attn|c_proj|c_fc)\.bias", np.zeros_like)),
        "one bias dropped": Case({}, of(r"h\.1\.mlp\.c_proj\.bias", np.zeros_like)),
        "norms saved as w - 1": Case({}, of(r"ln_\w+\.weight", lambda w: w - 1)),
        "layers reversed": Case({}, renamed(r"h\.(\d)", lambda m: f"h.{2 - int(m[1])}")),
        "positions moved by one": Case({}, of("wpe", shifted)),
        "vocabulary moved by one": Case({}, of("wte", shifted)),
        "gelu of the other kind, config": Case({"activation_function": "gelu"}),
        "heads, config": Case({"n_head": 7}),
    },
    "gemma3_tiny": {
        "reshaped, not transposed": Case({}, of(LINEAR, reshaped)),
        "k and v": Case({}, swapped("k_proj", "v_proj")),
        "gate and up": Case({}, swapped("gate_proj", "up_proj")),
        "q and k norms": Case({}, swapped("q_norm", "k_norm")),
        "q and k norms dropped": Case({}, of(r"[qk]_norm", np.zeros_like)),
        "q_norm dropped": Case({}, of("q_norm", np.zeros_like)),
        "norms around the attention": Case(
            {}, swapped("input_layernorm", "post_attention_layernorm")
        ),
        "norms saved as 1 + w": Case({}, of("norm", lambda w: w + 1)),
        "norms saved as w - 1": Case({}, of("norm", lambda w: w - 1)),
        "scaled embedding": Case({}, of("embed_tokens", lambda w: w * 20**0.5)),
        "heads in another order": Case(
            {}, of("q_proj", lambda w: w.reshape(2, 2, 6, -1).swapaxes(0, 1).reshape(w.shape))
        ),
        "rotary halves interleaved": Case(
            {},
            of("[qk]_proj", lambda w: w.reshape(-1, 2, 3, 20).swapaxes(1, 2).reshape(w.shape)),
        ),
        "layers reversed": Case({}, renamed(r"layers\.(\d)", lambda m: f"layers.{3 - int(m[1])}")),
        "vocabulary moved by one": Case({}, of("embed_tokens", shifted)),
        "pattern shifted, config": Case({"layer_types": [GLOBAL, LOCAL, LOCAL, GLOBAL]}),
        "all layers global, config": Case({"layer_types": [GLOBAL] * 4}),
        "bases swapped, config": Case({"rope_parameters": SWAPPED_ROPE}),
        "window, config": Case({"sliding_window": 6}),
        "query scale, config": Case({"query_pre_attn_scalar": 6}),
        "heads and their keys, config": Case(
            {"num_attention_heads": 4, "hidden_activation": "silu"}
        ),
    },
    "neox_tiny": {
        "square dense transposed": Case({}, of(r"attention\.dense\.weight", np.transpose)),
        "k, q, v": Case({}, of("query_key_value", kqv_by_head)),
        "q, k, v not by head": Case({}, of("query_key_value", de_interleaved)),
        "reshaped, not transposed": Case({}, of(LINEAR, reshaped)),
        "biases dropped": Case({}, of(r"(query_key_value|dense\w*)\.bias", np.zeros_like)),
        "norms saved as w - 1": Case({}, of(r"norm\.weight", lambda w: w - 1)),
        "norms of the two branches": Case(
            {}, swapped("input_layernorm", "post_attention_layernorm")
        ),
        "layers reversed": Case({}, renamed(r"layers\.(\d)", lambda m: f"layers.{1 - int(m[1])}")),
        "vocabulary moved by one": Case({}, of("embed_in", shifted)),
        "head moved by one": Case({}, of("embed_out", shifted)),
        "head of the embedding": Case(
            {}, adding("embed_out.weight", lambda t: t["gpt_neox.embed_in.weight"])
        ),
        "share that rotates, config": Case(
            {"rope_parameters": {"rope_theta": 300.0, "partial_rotary_factor": 0.5}}
        ),
        "base, config": Case(
            {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}}
        ),
        "sequential residual, config": Case({"use_parallel_residual": False}),
        "gelu of the other kind, config": Case({"hidden_act": "gelu_new"}),
    },
    "neox_tiny_sequential": {
        "parallel residual, config": Case({"use_parallel_residual": True}),
        "two heads more, config": Case({"num_attention_heads": 9}),
    },
    "gemma3_tiny_mqa": {
        "another head": Case({}, of("lm_head", shifted)),
        "heads, config": Case({"num_attention_heads": 3, "query_pre_attn_scalar": 8}),
    },
}
# Refused by a loader or by the comparison with what was exported, whatever they compute.
FILE_CASES = {
    "gpt2_tiny": {
        "no prefix": Case({}, renamed("^transformer.", "")),
        "wrong prefix": Case({}, renamed("^transformer.", "model.")),
        "equal head beside a tied one": Case({}, adding("lm_head.weight", lambda t: t[WTE])),
        "another head beside a tied one": Case(
            {}, adding("lm_head.weight", lambda t: t[WTE][::-1])
        ),
        "untied": Case({"tie_word_embeddings": False}, adding("lm_head.weight", lambda t: t[WTE])),
        "vocabulary of the config": Case({"vocab_size": 130}),
        "a row too few": Case({}, LESS),
        "padding rows": Case({}, MORE),
        "a row too few, config agrees": Case({"vocab_size": 130}, LESS),
        "padding rows, config agrees": Case({"vocab_size": 136}, MORE),
        "a position too few": Case({"n_positions": 47}, of("wpe", lambda w: w[:-1])),
        "epsilon": Case({"layer_norm_epsilon": 1e-6}),
        "rounded": Case({}, of(C_PROJ, lambda w: w.astype("bfloat16").astype(np.float32))),
        "one bit": Case({}, of(C_PROJ, lambda w: (w.view(np.uint32) ^ 1).view(np.float32))),
        "a buffer": Case(
            {}, adding("transformer.h.0.attn.bias", lambda t: np.ones((1, 1, 48, 48)))
        ),
        "another dtype": Case({}, of(C_PROJ, lambda w: w.astype(np.float64))),
    },
    "gemma3_tiny": {
        "no prefix": Case({}, renamed("^model.", "")),
        "wrong prefix": Case({}, renamed("^model.", "transformer.")),
        "stale head": Case(
            {}, adding("lm_head.weight", lambda t: t["model.embed_tokens.weight"] + 1)
        ),
        "q_norm left out": Case({}, without("q_norm")),
        "not transposed": Case({}, of(LINEAR, np.transpose)),
        "a row too few": Case({}, of("embed_tokens", lambda w: w[:-1])),
        "epsilon": Case({"rms_norm_eps": 1e-6}),
        "eos": Case({"eos_token_id": 3}),
    },
    "neox_tiny": {
        "no prefix": Case({}, renamed("^gpt_neox.", "")),
        "wrong prefix": Case({}, renamed("^gpt_neox.", "model.")),
        "head under its other name": Case({}, renamed("embed_out", "lm_head")),
        "tied": Case({"tie_word_embeddings": True}),
        "no head": Case({}, without("embed_out")),
        "a row too few": Case({}, of("embed_(in|out)", lambda w: w[:-1])),
        "a row too few in the head": Case({}, of("embed_out", lambda w: w[:-1])),
        "epsilon": Case({"layer_norm_eps": 1e-6}),
    },
}


def cases(*tables: dict[str, dict[str, Case]]) -> list[Any]:
    return [
        pytest.param(model, case, id=f"{model}-{name}")
        for table in tables
        for model, named in table.items()
        for name, case in named.items()
    ]


def mutate(folder: Path, case: Case) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    files.write_json(config, files.read_json(config) | dict(case.config))
    safetensors.write(weights, case.tensors(safetensors.read(weights)))


def written(tmp_path: Path, model: str) -> tuple[Path, Any, Any]:
    """(folder, config, params) of an export before its gate, in the source's own spelling."""
    config, params = convert.import_hf(GOLDEN / model)
    folder = tmp_path / "export"
    folder.mkdir()
    convert.write_hf(folder, config, params)
    files.write_json(folder / "config.json", files.read_json(GOLDEN / model / "config.json"))
    return folder, config, params


@pytest.mark.parametrize("model", LOGIT_CASES)
def test_gate_passes_what_was_exported(tmp_path, model):
    folder, config, params = written(tmp_path, model)
    gate.check_weights(folder, config, params, "float32")
    assert gate.check_hf(folder).logits_error < 1e-5


@pytest.mark.parametrize("model,case", cases(LOGIT_CASES, FILE_CASES))
def test_every_mutation_is_refused(tmp_path, model, case):
    folder, config, params = written(tmp_path, model)
    mutate(folder, case)
    with pytest.raises(InputError):
        gate.check_weights(folder, config, params, "float32")


@pytest.mark.parametrize("model,case", cases(LOGIT_CASES))
def test_logits_alone_tell_a_wrong_model(tmp_path, monkeypatch, model, case):
    """Without comparing any tensor: the reference reads the changed files, we the right ones."""
    folder, _, _ = written(tmp_path, model)
    source = convert.open_hf(GOLDEN / model)
    mutate(folder, case)
    monkeypatch.setattr(convert, "open_hf", lambda _: source._replace(folder=folder))
    with pytest.raises(InputError, match="logits differ"):
        gate.check_hf(folder)


def transposed(path: str):
    """A family's rows with one square matrix turned, both ways."""

    def change(rows):
        return [row._replace(transpose=row.transpose != (row.path == path)) for row in rows]

    return change


def permuted_layers(rows):
    """Layers 0 and 1 trade names, both ways: `{l}` becomes a name that sorts them otherwise."""
    return [row._replace(hf=row.hf.replace("q_norm", "k_norm")) if "q_norm" in row.hf else
            row._replace(hf=row.hf.replace("k_norm", "q_norm")) for row in rows]  # fmt: skip


BOTH_WAYS = {
    "gpt2 c_proj": ("gpt2_tiny", transposed("blocks/attn_c_proj/w")),
    "neox dense": ("neox_tiny", transposed("blocks/dense/w")),
    "gemma q and k norms": ("gemma3_tiny", permuted_layers),
}


@pytest.mark.parametrize("model,change", BOTH_WAYS.values(), ids=BOTH_WAYS.keys())
def test_a_mistake_that_import_undoes_is_caught(tmp_path, monkeypatch, model, change):
    """Bits survive a matrix that is turned both ways; it is wrong for everybody else."""
    config, params = convert.import_hf(GOLDEN / model)
    family = families.of(config)
    rows = family.rows
    monkeypatch.setattr(family, "rows", lambda config: change(rows(config)))
    with pytest.raises(InputError, match="logits differ"):
        gate.export_hf(config, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_constant_logits_are_refused(tmp_path, value):
    config, params = convert.import_hf(GOLDEN / "gpt2_tiny")
    params = params | {"embed": params["embed"] | {"wte": np.full((131, 14), value, np.float32)}}
    with pytest.raises(InputError, match="every token is equally likely"):
        gate.export_hf(config, params, tmp_path / "out")


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    config, params = convert.import_hf(GOLDEN / "gpt2_tiny")
    write = convert.write_hf

    def faulty(folder, *args):
        write(folder, *args)
        mutate(folder, LOGIT_CASES["gpt2_tiny"]["k, q, v"])

    monkeypatch.setattr(convert, "write_hf", faulty)
    message = f"the export failed its check and was deleted: {tmp_path / 'out'}: tensor"
    with pytest.raises(InputError, match=re.escape(message)):
        gate.export_hf(config, params, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_our_side_runs_the_familys_modules(tmp_path, monkeypatch):
    """A block, an embedding or a norm of ours that is wrong fails the check."""
    for family, name in ((gpt2, "Embed"), (gpt2, "Block"), (gemma3, "FinalNorm")):
        model = "gpt2_tiny" if family is gpt2 else "gemma3_tiny"
        right = getattr(family, name)

        class Wrong(right):
            def __call__(self, *args):
                return super().__call__(*args) * 1.01

        gate._block.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(family, name, Wrong)
            with pytest.raises(InputError, match="logits differ"):
                gate.check_hf(GOLDEN / model)
        gate._block.cache_clear()
        gate.check_hf(GOLDEN / model)


@pytest.mark.parametrize("tokens", [2, 5, 100])
def test_length_of_the_check_is_bounded_by_the_context(tokens):
    agreement = gate.check_hf(GOLDEN / "gpt2_tiny", tokens=tokens)
    assert agreement.tokens == min(tokens, 48) and agreement.greedy == min(4, tokens - 1)


# The tokenizer's part


def with_vocabulary(tmp_path: Path, size: int) -> tuple[Any, Any]:
    """A random model with that many tokens."""
    from core import schema
    from core.config import ModelConfig

    config = ModelConfig("gpt2", size, 64, 8, 1, 2, 16, 4)
    return config, schema.init(families.rows(config), 1, 0)


def test_tokenizer_ids_are_compared_and_texts_tried(tmp_path):
    size = tokenizers.load(TOKENIZER).vocab_size
    config, params = with_vocabulary(tmp_path, size)
    out = tmp_path / "out"
    agreement = gate.export_hf(config, params, out, TOKENIZER, load_tokenizer=tokenizers.load)
    assert agreement.tokens == 2 * config.context
    assert tokenizers.load(out).fingerprint == tokenizers.load(TOKENIZER).fingerprint
    assert gate.check_hf(out, tokenizers.load(out)) == agreement
    assert gate.check_hf(out).tokens == config.context


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(tmp_path):
    size = tokenizers.load(TOKENIZER).vocab_size
    config, params = with_vocabulary(tmp_path, size - 5)
    with pytest.raises(InputError, match="the tokenizer has token .* the model a vocabulary of"):
        gate.export_hf(config, params, tmp_path / "out", TOKENIZER, load_tokenizer=tokenizers.load)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["vocab.json", "merges.txt"])
def test_tokenizer_files_changed_on_the_way_are_noticed(tmp_path, monkeypatch, file):
    size = tokenizers.load(TOKENIZER).vocab_size
    config, params = with_vocabulary(tmp_path, size)
    copy = convert.copy_tokenizer

    def faulty(source: Path, folder: Path) -> None:
        copy(source, folder)
        text = (folder / file).read_text("utf-8")
        lines = text.splitlines(keepends=True)
        if file == "merges.txt":
            lines[1], lines[2] = lines[2], lines[1]
            (folder / file).write_text("".join(lines), "utf-8")
        else:
            (folder / file).write_text(re.sub(r'"(\w)":', r'"\1\1\1\1":', text, count=3), "utf-8")

    monkeypatch.setattr(convert, "copy_tokenizer", faulty)
    with pytest.raises((InputError, tokenizers.TokenizerError)):
        gate.export_hf(config, params, tmp_path / "out", TOKENIZER, load_tokenizer=tokenizers.load)
    assert list(tmp_path.iterdir()) == []
