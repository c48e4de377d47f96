"""Gemma's tokenizer: the ids of both reference libraries, roles, saving."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from tokenizers import TokenizerError, load

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "gemma_expected.json").read_text())
MODEL, JSON = GOLDEN / "gemma" / "tokenizer.model", GOLDEN / "gemma" / "tokenizer.json"
SPACE = "\u2581"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("path, name", [(MODEL, "model"), (JSON, "json")])
def test_ids_and_texts_are_those_of_the_reference_library(path, name):
    tokenizer, expected = load(path), EXPECTED[name]
    for n, text in enumerate(EXPECTED["strings"]):
        plain = tokenizer.encode(text)
        assert plain.dtype == np.int32 and plain.shape == (len(expected["plain"][n]),)
        assert plain.tolist() == expected["plain"][n], ascii(text)
        parsed = plain
        if name == "json":
            parsed = tokenizer.encode(text, special=True)
            assert parsed.dtype == np.int32
            assert parsed.tolist() == (expected["special"][n] or expected["plain"][n]), ascii(text)
        assert tokenizer.decode(parsed) == expected["decoded"][n]


def test_the_sample_holds_what_is_hard():
    def some(condition):
        return any(map(condition, EXPECTED["strings"]))

    plain = EXPECTED["json"]["plain"], EXPECTED["model"]["plain"]
    assert any(a != b for a, b in zip(*plain, strict=True))  # the libraries disagree
    assert any(EXPECTED["json"]["special"])
    assert some(lambda s: any(0xD800 <= ord(c) < 0xE000 for c in s))
    assert some(lambda s: SPACE * 2 in s) and some(lambda s: " " * 40 in s)
    byte_ids = range(*(load(JSON).encode(c)[0] for c in "\x00\x08"))
    assert sum(i in byte_ids for row in plain[0] for i in row) > 5


def test_text_survives_but_for_what_spells_a_space():
    for path in (MODEL, JSON):
        tokenizer = load(path)
        for text in EXPECTED["strings"]:
            repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            spaced = repaired.replace(SPACE, " ")
            for special in (False, True):
                ids = tokenizer.encode(text, special)
                assert tokenizer.decode_bytes(ids) == spaced.encode(), ascii(text)


def test_every_character_survives():
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000 and c != 0x2581)
    for path in (MODEL, JSON):
        tokenizer = load(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", [" " * 1_200_000, "<" * 1_200_000, "x" * 300_000, "\n" * 500_000])
def test_long_runs_are_no_trouble(text):
    for path in (MODEL, JSON):
        tokenizer = load(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes_that_are_no_text_decode():
    tokenizer = load(JSON)
    first = tokenizer.encode("\x00")[0]
    assert tokenizer.decode_bytes(first + np.arange(256)) == bytes(range(256))
    assert tokenizer.decode(first + np.array([0xC3, 0xA9, 0xC3])) == "é\ufffd"
    with pytest.raises(TokenizerError, match="has no token 1500, only 1500 tokens"):
        tokenizer.decode([1500])
    assert tokenizer.encode("").shape == (0,) and tokenizer.encode("").dtype == np.int32


def test_roles_come_from_the_file():
    from_json, from_model = load(JSON), load(MODEL)
    for tokenizer in (from_json, from_model):
        assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2, 1, 0) and tokenizer.add_bos
        assert tokenizer.vocab_size == len(tokenizer.pieces) == 1500
        assert 2 not in tokenizer.encode("text")  # `encode` leaves adding it to the caller
    assert from_json.fingerprint != from_model.fingerprint
    assert from_json.control.keys() - from_model.control == {"<start_of_turn>", "<end_of_turn>"}


def test_files_beside_say_more(tmp_path):
    config = {"add_bos_token": False, "eos_token": "<end_of_turn>", "pad_token": None}
    for path in (MODEL, JSON):
        folder = tmp_path / path.name
        folder.mkdir()
        shutil.copy(path, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load(folder)
        assert (tokenizer.bos, tokenizer.pad, tokenizer.add_bos) == (2, None, False)
        assert tokenizer.decode([tokenizer.eos or -1]) == "<end_of_turn>"
        # SentencePiece always cuts out what the user defined, whatever role it plays.
        always = path is MODEL
        assert (tokenizer.eos in tokenizer.encode("a<end_of_turn>")) == always
        assert tokenizer.encode("a<end_of_turn>", special=True)[-1] == tokenizer.eos


@pytest.mark.parametrize("path", [MODEL, JSON])
def test_saved_and_pickled_it_is_the_same(path, tmp_path):
    first = load(path)
    first.encode("tiktoken is made")
    first.save(tmp_path / "saved")
    assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes()
    again = load(tmp_path / "saved")
    for name in ("fingerprint", "bos", "eos", "pad", "add_bos", "vocab_size", "pieces", "control"):
        assert getattr(first, name) == getattr(again, name), name
    assert dict(first.files) == dict(again.files)
    copy = pickle.loads(pickle.dumps(first))
    text = "".join(EXPECTED["strings"][:40])
    expected = first.encode(text, special=True).tolist()
    assert again.encode(text, special=True).tolist() == expected
    assert copy.encode(text, special=True).tolist() == expected
    assert copy.decode(expected) == first.decode(expected)


def test_of_two_files_the_json_counts(tmp_path):
    for path in (MODEL, JSON):
        shutil.copy(path, tmp_path)
    assert load(tmp_path).fingerprint == load(JSON).fingerprint
