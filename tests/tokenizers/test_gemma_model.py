"""SentencePiece's tokenizer.model: scores mean what SentencePiece means, the rest is an error."""

import itertools
import random
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenizers import Tokenizer, TokenizerError, gemma, load, sentencepiece

MODEL = Path(__file__).parents[1] / "golden" / "tokenizers" / "gemma" / "tokenizer.model"
SPACE = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TRAINER = {3: 2, 35: 1, 46: b"<bos>", 47: b"<eos>"}
NORMALIZER = {1: b"identity", 3: 0, 4: 0}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path_factory.mktemp("cache")))


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text: str, score: float = 0.0, kind: int = 1) -> bytes:
    fields = field(1, text.encode()) + field(2, float(score))
    return field(1, fields + (field(3, kind) if kind != 1 else b""))


def gemma_model(
    scores: Mapping[str, float],
    user: Sequence[str] = (),
    trainer: Mapping[int, Any] = TRAINER,
    normalizer: Mapping[int, Any] = NORMALIZER,
    pieces: Sequence[bytes] | None = None,
) -> bytes:
    """Ids: 4 control, 256 bytes, normal, user-defined; or `pieces` instead of all these."""
    if pieces is None:
        pieces = [piece(t, 0, 2 if t == "<unk>" else 3) for t in CONTROL]
        pieces += [piece(t, 0, 6) for t in BYTES]
        pieces += [piece(t, score) for t, score in scores.items()]
        pieces += [piece(t, 0, 4) for t in user]
    parts = (b"".join(field(n, v) for n, v in part.items()) for part in (trainer, normalizer))
    return b"".join(pieces) + b"".join(field(n, p) for n, p in zip((2, 3), parts, strict=True))


def built_model(content: bytes) -> Tokenizer:
    return gemma.build("test", {"tokenizer.model": content}, Path("test"))


def merge_pieces(symbols: list[str], score: Mapping[str, float], frozen: set[str]) -> list[str]:
    """SentencePiece: of all neighbours that spell a piece, those of the highest score."""
    while len(symbols) > 1:
        pairs = [(a + b, a in frozen or b in frozen) for a, b in itertools.pairwise(symbols)]
        scores = [-np.inf if fixed else score.get(piece, -np.inf) for piece, fixed in pairs]
        first = int(np.argmax(scores))
        if scores[first] == -np.inf:
            break
        symbols = [*symbols[:first], pairs[first][0], *symbols[first + 2 :]]
    return symbols


def random_vocabulary(rng: random.Random, letters: str, size: int) -> list[str]:
    """Words made of others and words out of reach; some have spaces inside."""
    words = [*letters]
    for _ in range(size):
        a, b = rng.choices(words, k=2)
        word = a + b if rng.random() < 0.9 else "".join(rng.choices(letters, k=rng.randint(2, 5)))
        if word not in words and len(word) < 10:
            words.append(word)
    return words


@pytest.mark.parametrize("seed", range(60))
def test_any_scores_mean_the_same_as_by_definition(seed):
    rng = random.Random(seed)
    letters = ("ab", "abc" + SPACE, "aé水\n" + SPACE)[seed % 3]
    words = random_vocabulary(rng, letters, rng.randint(4, 50))
    lines = rng.sample(["\n", "\n\n", "\n\n\n", "a\n", "\na"], seed % 5)
    words = [w for w in words if w not in lines and (len(w) > 1 or rng.random() < 0.8)]
    score = dict(zip(words, rng.sample(range(-99, 0), len(words)), strict=True))
    user = [SPACE * n for n in range(2, rng.randint(2, 5))] + lines + ["<b>", "ca"]
    user = [word for word in user if word not in score]
    tokenizer = built_model(gemma_model(score, user))
    ids = {w: i for i, w in enumerate([*score, *user], start=260)}
    for _ in range(60):
        text = "".join(rng.choices([*letters, "<b>", "<"], k=rng.randint(0, 30)))
        symbols, at = [], 0
        while at < len(text):
            found = [word for word in user if text.startswith(word, at)]
            symbols.append(max(found, key=len, default=text[at]))
            at += len(symbols[-1])
        expected: list[int] = []
        for symbol in merge_pieces(symbols, score, set(user)):
            spelt = [4 + b for b in symbol.encode()]
            expected += [ids[symbol]] if symbol in ids else spelt
        assert tokenizer.encode(text).tolist() == expected, text


def test_the_models_made_here_are_as_sentencepiece_writes_them():
    out = b""
    for number, value in sentencepiece._fields(MODEL.read_bytes()):
        assert isinstance(value, bytes)
        out += piece(*sentencepiece._piece(value)) if number == 1 else field(number, value)
    assert out == MODEL.read_bytes()


def pieces(*more: bytes, without: str = "") -> list[bytes]:
    control = [piece(t, 0, 3) for t in CONTROL]
    return [*control, *(piece(t, 0, 6) for t in BYTES if t != without), *more]


@pytest.mark.parametrize(
    "content, message",
    [
        (gemma_model({}, trainer=TRAINER | {3: 1}), "model type 1 is not supported"),
        (gemma_model({}, trainer={35: 1}), "model type 1 is not supported"),
        (gemma_model({}, trainer={3: 2}), "a model without byte_fallback is not supported"),
        (gemma_model({}, normalizer=NORMALIZER | {2: b"\1"}), "a normalisation charsmap is not"),
        (gemma_model({}) + field(5, field(2, b"\1")), "a normalisation charsmap is not supported"),
        (gemma_model({}, normalizer={3: 1, 4: 0}), "add_dummy_prefix is not supported"),
        (gemma_model({}, normalizer={4: 0}), "add_dummy_prefix is not supported"),
        (gemma_model({}, normalizer={3: 0}), "remove_extra_whitespaces is not supported"),
        (gemma_model({}, normalizer=NORMALIZER | {5: 0}), "escape_whitespaces turned off is not"),
        (gemma_model({}, pieces=pieces(piece("ab", 0, 5))), "unused piece 'ab' is not supported"),
        (gemma_model({}, pieces=pieces(without="<0xE2>")), "has no byte piece <0xE2>"),
        (gemma_model({"ab": -1, "bc": -1}), "pieces 'ab' and 'bc' have the same score"),
        (
            gemma_model({"ab": -1, "bc": np.nan}),
            "pieces 'ab' and 'bc' have the same score, or none",
        ),
        (gemma_model({}, pieces=pieces(piece("a"), piece("a"))), "a piece is empty or there twice"),
        (gemma_model({}, pieces=pieces(piece(""))), "a piece is empty or there twice"),
        (gemma_model({}, pieces=pieces(piece("a", 0, 7))), "piece 'a' is of type 7"),
        (gemma_model({}, pieces=pieces(field(1, field(2, 0.5)))), "a piece without text"),
        (gemma_model({}, pieces=pieces(field(1, field(1, b"\xff")))), "no intact SentencePiece"),
        (gemma_model({}, pieces=[]), "it has no pieces"),
        (field(1, 5) + gemma_model({}), "a number where a piece belongs"),
        (b"", "it has no pieces"),
        (b"\x0a", "no intact SentencePiece model"),
        (b"\xff" * 20, "a number of more than ten bytes"),
        (b"<!doctype html><title>Access denied</title>", "no intact SentencePiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "no intact SentencePiece"),
        (MODEL.read_bytes()[:9000], "it ends inside a field"),
    ],
)
def test_a_model_that_is_not_followed_is_named_with_its_fault(content, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        built_model(content)
    assert str(caught.value).startswith("test/tokenizer.model")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_an_error_or_another_tokenizer(seed):
    rng = random.Random(seed)
    content = gemma_model({"a": -9, "b": -8, "ab": -1, SPACE: -2, SPACE + "a": -3}, ["<b>"])
    errors = 0
    for _ in range(250):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            if rng.random() < 0.7:
                damaged[at] = rng.randrange(256)
            else:
                del damaged[at : at + rng.randint(1, 300)]
        try:
            tokenizer = built_model(bytes(damaged))
        except TokenizerError:
            errors += 1
        else:
            text = "ab  a\n<b>é水"
            assert tokenizer.decode(tokenizer.encode(text)).replace(SPACE, " ") == text
    assert errors > 50


def test_tokens_added_to_a_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(MODEL.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<image_soft_token>": 1500}')
    tokenizer = load(tmp_path)
    assert tokenizer.vocab_size == 1501 and tokenizer.pieces[1500] == b"<image_soft_token>"
    assert tokenizer.encode("<image_soft_token>", special=True).tolist() == [1500]
    assert 1500 not in tokenizer.encode("<image_soft_token>")
    assert tokenizer.fingerprint != load(MODEL).fingerprint
    (tmp_path / "added_tokens.json").write_text('{"<image_soft_token>": 1400}')
    with pytest.raises(TokenizerError, match="the id of '<image_soft_token>' is another token's"):
        load(tmp_path)
