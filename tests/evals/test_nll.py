"""Token losses against the full log-softmax of each row alone, and the means made of them."""

import functools
import json
import math

import jax
import numpy as np
import pytest

import tokenizers
from core import families, model, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.rows import load_rows, save_rows
from evals.nll import run_nll, token_nll

TOKENIZER = tokenizers.load("bytes")
CONFIG = ModelConfig(
    family="gpt2", vocab_size=258, context=40, width=32, layers=2, heads=2, mlp_width=64,
    head_dim=16, init_std=0.3,
)  # fmt: skip
EXECUTION = Execution()
TEXTS = ["To be, or not to be", "that is", "the question, and more of it: forty byte.", "no"]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    params = schema.init(families.rows(CONFIG), CONFIG.layers, seed=2)
    return Loaded(CONFIG, params, None, "fingerprint")


@pytest.fixture
def rows(tmp_path):
    ids = [TOKENIZER.encode(text)[: CONFIG.context] for text in TEXTS]
    labels = [x.copy() for x in ids]
    labels[0][:5] = -100
    labels[2][10:20] = -100
    ids[1] = labels[1] = np.concatenate([ids[1], TOKENIZER.encode("<|endoftext|>", special=True)])
    save_rows(tmp_path / "rows", ids, labels, tokenizer=TOKENIZER.fingerprint)
    return load_rows(tmp_path / "rows", CONFIG.vocab_size, CONFIG.context)


full_logits = jax.jit(functools.partial(model.logits, CONFIG, EXECUTION))


def brute_force(loaded, rows) -> np.ndarray:
    nll_NT = np.full((len(rows), CONFIG.context), np.nan)
    for i in range(len(rows)):
        ids, labels = rows.ids(i), rows.labels(i)
        read = np.full((1, CONFIG.context), 7, np.int32)
        read[0, : len(ids)] = ids
        logits_TV = np.asarray(full_logits({"params": loaded.params}, read)[0], np.float64)
        logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        for t in range(1, len(ids)):
            if labels[t] != -100:
                nll_NT[i, t] = -logp_TV[t - 1, ids[t]]
    return nll_NT


@pytest.mark.parametrize("batch_tokens", [1, 64, 10_000])
def test_equals_brute_force(loaded, rows, batch_tokens):
    nll_NT = token_nll(loaded, rows, EXECUTION, batch_tokens)
    assert nll_NT.dtype == np.float32 and nll_NT.shape == (4, CONFIG.context)
    assert np.isnan(nll_NT[:, 0]).all()
    np.testing.assert_allclose(nll_NT, brute_force(loaded, rows), rtol=1e-4, atol=1e-5)


def test_written_file_and_summary(loaded, rows, tmp_path):
    out = tmp_path / "deep" / "nll.npy"
    summary = run_nll(loaded, rows, out, EXECUTION, 64, TOKENIZER)
    nll_NT = np.load(out, allow_pickle=False)
    np.testing.assert_array_equal(nll_NT, token_nll(loaded, rows, EXECUTION, 64))
    assert json.loads((tmp_path / "deep" / "nll.json").read_text()) == summary
    assert summary["tokens"] == rows.trained.sum() == np.isfinite(nll_NT).sum()
    assert summary["nll"] == pytest.approx(np.nanmean(nll_NT.astype(np.float64)))
    assert summary["perplexity"] == pytest.approx(math.exp(summary["nll"]))
    # Every byte token is one byte; the end token of row 1 is none, and counts in neither sum.
    ends = nll_NT[1, len(rows.ids(1)) - 1]
    text = float(np.nansum(nll_NT, dtype=np.float64) - ends) / (summary["tokens"] - 1)
    assert summary["bits_per_byte"] == pytest.approx(text / math.log(2))


def test_bits_per_byte_needs_the_tokenizer(loaded, rows, tmp_path):
    summary = run_nll(loaded, rows, tmp_path / "nll.npy", EXECUTION, 64)
    assert summary["bits_per_byte"] is None


def test_refuses_another_tokenizer_and_another_suffix(loaded, rows, tmp_path):
    rows.info["tokenizer"] = "another"
    with pytest.raises(InputError, match="not made with tokenizer bytes"):
        run_nll(loaded, rows, tmp_path / "nll.npy", EXECUTION, 64, TOKENIZER)
    with pytest.raises(InputError, match="nll.txt"):
        run_nll(loaded, rows, tmp_path / "nll.txt", EXECUTION, 64)


def test_a_broken_model_is_refused(loaded, rows, tmp_path):
    broken = loaded._replace(params=jax.tree.map(lambda x: x * np.float32(np.nan), loaded.params))
    with pytest.raises(InputError, match="not finite"):
        run_nll(broken, rows, tmp_path / "nll.npy", EXECUTION, 64)
    assert not (tmp_path / "nll.npy").exists()
