"""What --target and --regex mean, and what is offered to those who meant something else."""

from pathlib import Path

import pytest

import tokenizers
from core.errors import InputError
from evals.probe.target import regex, token

GPT2 = tokenizers.load(Path(__file__).parents[3] / "golden" / "tokenizers" / "gpt2")


def test_one_token():
    pieces = {i: p for i, p in GPT2.pieces.items() if p.startswith(b" ") and p.isascii()}
    number, piece = max(pieces.items(), key=lambda item: len(item[1]))
    found = token(piece.decode(), GPT2)
    assert found.ids.tolist() == [number] and str(found) == f"target {piece.decode()!r}"


def test_many_tokens_offer_others():
    whole = next(t for t in map(bytes.decode, filter(bytes.isascii, GPT2.pieces.values()))
                 if len(t) > 3 and t.isalpha() and len(GPT2.encode(t)) == 1)  # fmt: skip
    with pytest.raises(InputError, match="tokens") as raised:
        token(whole.upper() + "!", GPT2)
    assert "single tokens near it" in str(raised.value)
    with pytest.raises(InputError) as raised:
        token(whole + "?", GPT2)
    assert repr(whole) in str(raised.value), "the beginning of the target is one token"
    with pytest.raises(InputError, match="empty"):
        token("", GPT2)
    byte = tokenizers.load("bytes")
    with pytest.raises(InputError, match=r"is 2 tokens \(' ', 'a'\); single.*'a'"):
        token(" a", byte)


def test_patterns():
    byte = tokenizers.load("bytes")
    assert regex("^[0-9]$", byte).ids.tolist() == list(range(48, 58))
    assert not {256, 257} & set(regex("[a-z<|>]", byte).ids.tolist()), "control tokens are none"
    with pytest.raises(InputError, match="no token"):
        regex("ab", byte)
    with pytest.raises(InputError, match="every token"):
        regex("", byte)
    with pytest.raises(InputError, match="no regular expression"):
        regex("(", byte)
