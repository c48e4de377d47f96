"""Gemma's tokenizer.json: any merges mean what Hugging Face means; the rest is one clear error."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tokenizers import Tokenizer, TokenizerError, gemma, load

SPACE = "\u2581"
BYTES = [f"<0x{b:02X}>" for b in range(256)]
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path_factory.mktemp("cache")))


def gemma_json(
    words: Sequence[str], pairs: Sequence[tuple[str, str]], added: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Ids: 0 to 3 control, 4 to 259 bytes, then words."""
    special = [
        {"content": t, "id": i, "special": True, "normalized": False} for i, t in enumerate(CONTROL)
    ]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "added_tokens": [*special, *added],
        "normalizer": replace,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate([*CONTROL, *BYTES, *words])},
            "merges": [list(pair) for pair in pairs],
        },
    }


def built(data: dict, **beside: dict) -> Tokenizer:
    files = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
    content = json.dumps(data).encode()
    return gemma.build("test", {"tokenizer.json": content, **files}, Path("test"))


def merge_pairs(symbols: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    """Hugging Face: of all neighbours that are listed, the first listed, leftmost first."""
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        first = min(range(len(pairs)), key=lambda k: (rank.get(pairs[k], len(rank)), k))
        if pairs[first] not in rank:
            break
        symbols = [*symbols[:first], "".join(pairs[first]), *symbols[first + 2 :]]
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
def test_any_list_of_pairs_means_the_same_as_by_definition(seed):
    rng = random.Random(seed)
    letters = ("ab", "abc" + SPACE, "aé水" + SPACE)[seed % 3]
    words = random_vocabulary(rng, letters, rng.randint(4, 50))
    pairs = [
        (word[:at], word[at:])
        for word in words
        for at in range(1, len(word))
        if word[:at] in words and word[at:] in words and rng.random() < 0.8
    ]
    if seed % 4:  # else in the order in which words were made
        rng.shuffle(pairs)
    tokenizer = built(gemma_json(words, pairs))
    ids = {word: i for i, word in enumerate(words, start=260)}
    rank = {pair: n for n, pair in enumerate(pairs)}
    for _ in range(60):
        text = "".join(rng.choices(letters, k=rng.randint(0, 30)))
        symbols = merge_pairs(list(text), rank)
        assert tokenizer.encode(text).tolist() == [ids[s] for s in symbols], text
        assert tokenizer.encode(text.replace(SPACE, " ")).tolist() == [ids[s] for s in symbols]


def test_added_tokens_are_cut_before_or_after_spaces_are_replaced():
    added = [
        {"content": "a b", "id": 900, "special": False, "normalized": False},
        {"content": f"c{SPACE}d", "id": 901, "special": False, "normalized": False},
        {"content": "e f", "id": 902, "special": False, "normalized": True},
        {"content": "<x>", "id": 903, "special": True, "normalized": False},
        {"content": "x>y", "id": 904, "special": False, "normalized": False},
    ]
    words = [*"abcdefxy<>", SPACE]
    tokenizer = built(gemma_json(words, [], added))
    one = {word: 260 + n for n, word in enumerate(words)}

    def ids(*parts: str | int) -> list[int]:
        return [i for p in parts for i in ([p] if isinstance(p, int) else [one[c] for c in p])]

    text = f"a b a{SPACE}b c d c{SPACE}d e f e{SPACE}f".replace(" ", "|").replace("|", " ")
    expected = ids(900, f"{SPACE}a{SPACE}b{SPACE}c{SPACE}d{SPACE}", 901, SPACE, 902, SPACE, 902)
    assert tokenizer.encode(text).tolist() == expected
    # Leftmost first, whichever kind; a control token that stays text hides what overlaps it.
    assert tokenizer.encode("<x>y", special=True).tolist() == ids(903, "y")
    assert tokenizer.encode("<x>y").tolist() == ids("<x>y")
    assert tokenizer.encode("x>y").tolist() == [904]


def test_runs_of_spaces_that_are_cut_after_normalising():
    words = ["a", "b", SPACE, SPACE * 2, SPACE + "a", SPACE * 2 + "a"]
    pairs = [(SPACE, "a"), (SPACE, SPACE), (SPACE * 2, "a"), (SPACE, SPACE + "a")]
    runs = [
        {"content": SPACE * n, "id": i, "special": False, "normalized": True}
        for n, i in ((2, 263), (3, 900))
    ]
    tokenizer = built(gemma_json(words, pairs, runs))
    assert tokenizer.encode(" a  a").tolist() == [264, 263, 260]
    assert tokenizer.encode(f" {SPACE} {SPACE} b a").tolist() == [900, 263, 261, 264]


def test_a_text_that_spells_what_is_never_allowed():
    tokenizer = built(gemma_json(["a"], []))
    text = "a\0taproot\0a"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == 11


def test_what_changes_ids_changes_the_fingerprint_and_nothing_else_does():
    words, pairs = ["a", "b", "ab", "ba", "aba"], [("a", "b"), ("b", "a"), ("ab", "a")]
    base = gemma_json(words, pairs)
    same = built(base).fingerprint
    assert built(base, tokenizer_config={"add_bos_token": False}).fingerprint == same
    spelt_out = json.loads(json.dumps(base))
    spelt_out["model"]["merges"] = [" ".join(pair) for pair in pairs]
    assert built(spelt_out).fingerprint == same
    never = gemma_json(words, [*pairs, ("a", "ba")])  # ab is there before ba is
    assert built(never).fingerprint == same
    token = {"content": "<y>", "id": 900, "special": False, "normalized": False}
    others = [
        gemma_json(words, pairs[::-1]),
        gemma_json(words, pairs[:2]),
        gemma_json(words[::-1], pairs),
        gemma_json(words, pairs, [token]),
        gemma_json(words, pairs, [token | {"normalized": True}]),
        gemma_json(words, pairs, [token | {"special": True}]),
        gemma_json(words, pairs, [token | {"id": 901}]),
    ]
    assert len({same, *(built(other).fingerprint for other in others)}) == 1 + len(others)


def broken(**changes) -> dict:
    data = gemma_json(["a", "b", "ab"], [("a", "b")])
    parts = ("type", "vocab", "merges", "dropout", "ignore_merges", "end_of_word_suffix")
    for key, value in changes.items():
        (data["model"] if key in parts else data)[key] = value
    return data


BASE = gemma_json(["a", "b", "ab"], [("a", "b")])
VOCAB = BASE["model"]["vocab"]
SPECIAL = {"content": "<x>", "id": 900, "special": True, "normalized": False}
BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
IT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"type": "Unigram"}, 'model type "Unigram" is not supported'),
        ({"dropout": 0.1}, "model option dropout 0.1 is not supported"),
        ({"ignore_merges": True}, "model option ignore_merges true is not supported"),
        ({"end_of_word_suffix": "</w>"}, "model option end_of_word_suffix .* is not supported"),
        ({"normalizer": None}, "normalizer null is not supported"),
        ({"normalizer": {"type": "NFKC"}}, 'normalizer {"type": "NFKC"} is not supported'),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "x"}},
            "normalizer .*Precompiled.* is not supported",
        ),
        (
            {
                "normalizer": {
                    "type": "Sequence",
                    "normalizers": [{"type": "Prepend", "prepend": SPACE}, BASE["normalizer"]],
                }
            },
            "normalizer .*Prepend.* is not supported",
        ),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer .*Metaspace.* is not supported"),
        (
            {"pre_tokenizer": BASE["pre_tokenizer"] | {"invert": True}},
            "pre_tokenizer .* is not supported",
        ),
        (
            {"pre_tokenizer": BASE["pre_tokenizer"] | {"pattern": {"Regex": " "}}},
            "pre_tokenizer .*Regex.* is not supported",
        ),
        ({"decoder": {"type": "ByteLevel"}}, "decoder .*ByteLevel.* is not supported"),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [BOS, IT, EOS]}},
            "post_processor .*<bos>.* is not supported",
        ),
        (
            {"post_processor": {"type": "RobertaProcessing"}},
            "post_processor .*RobertaProcessing.* is not supported",
        ),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<s>"}}, IT]}},
            'post_processor with "<s>" is not supported',
        ),
        ({"added_tokens": [SPECIAL | {"lstrip": True}]}, "added token with lstrip .* is not"),
        ({"added_tokens": [SPECIAL | {"normalized": True}]}, "added token .*<x>.* is not"),
        ({"added_tokens": [SPECIAL | {"content": ""}]}, "added token .* is not supported"),
        (
            {"added_tokens": [SPECIAL | {"content": "ab"}]},
            "token 'ab' has id 262 in the vocabulary but 900 among the added tokens",
        ),
        ({"added_tokens": [SPECIAL | {"id": 261}]}, "tokens 'b' and '<x>' both have id 261"),
        ({"added_tokens": [SPECIAL | {"id": 2**31}]}, "token '<x>' has id 2147483648: expected"),
        ({"vocab": VOCAB | {"ab": "262"}}, "token 'ab' has id '262': expected an integer"),
        ({"vocab": VOCAB | {"\ud800": 901}}, r"token .* is no text"),
        ({"vocab": {t: i for t, i in VOCAB.items() if t != "<0x41>"}}, "has no token <0x41>"),
        ({"vocab": [["a", -1.0]]}, "not laid out as a tokenizer.json"),
        ({"model": {"type": "BPE"}}, "not laid out as a tokenizer.json .*vocab"),
        ({"model": None}, "not laid out as a tokenizer.json"),
        ({"added_tokens": [{"content": "<x>"}]}, "not laid out as a tokenizer.json .*special"),
        ({"merges": ["a b c"]}, "merge \\['a', 'b', 'c'\\] is not two tokens"),
        ({"merges": [["a", 5]]}, "merge \\['a', 5\\] is not two tokens"),
        ({"merges": [["a", "b"], 5]}, "merge 5 is not two tokens"),
        ({"merges": [["b", "a"]]}, "merge .* is not two .* that make a third"),
        ({"merges": [["a", "b"], ["a", "b"]]}, "lists a merge twice"),
        (
            {"vocab": VOCAB | {"<0x41>b": 901}, "merges": [["<0x41>", "b"]]},
            "lists a merge of a token that stands for a byte",
        ),
    ],
)  # fmt: skip
def test_a_json_that_is_not_followed_is_named_with_its_fault(changes, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        built(broken(**changes))
    assert str(caught.value).startswith("test/tokenizer.json")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_bytes_are_an_error_or_another_tokenizer(seed):
    rng = random.Random(seed)
    content = json.dumps(gemma_json(["a", "b", "ab", SPACE], [("a", "b")])).encode()
    errors = 0
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(damaged))
            if rng.random() < 0.5:
                damaged[at] = rng.randrange(256)
            else:
                del damaged[at : at + rng.randint(1, 300)]
        try:
            tokenizer = gemma.build("test", {"tokenizer.json": bytes(damaged)}, Path("test"))
        except TokenizerError:
            errors += 1
        else:
            text = "ab  a\n<bos>é水"
            decoded = tokenizer.decode(tokenizer.encode(text, special=True))
            assert decoded.replace(SPACE, " ") == text
    assert errors > 50


def test_the_kind_is_told_by_content(tmp_path):
    data = gemma_json(["a", "b", "ab"], [("a", "b")])
    (tmp_path / "tokenizer.json").write_text(json.dumps(data, indent=2))
    assert load(tmp_path).encode("ab").tolist() == [262]
    assert load(tmp_path / "tokenizer.json").encode("ab").tolist() == [262]
    data["model"]["byte_fallback"] = False
    (tmp_path / "other.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="normalizer .* or with byte_fallback as in Gemma"):
        load(tmp_path / "other.json")


def test_tokens_that_begin_one_another_a_thousand_times():
    names = ["ab" * n for n in range(1, 1500)]
    added = [
        {"content": t, "id": 1000 + n, "special": False, "normalized": False}
        for n, t in enumerate(names)
    ]
    tokenizer = built(gemma_json(["a", "b"], [], added))
    with pytest.raises(TokenizerError, match="of 1503 added tokens hundreds begin one another"):
        tokenizer.encode("abab")
