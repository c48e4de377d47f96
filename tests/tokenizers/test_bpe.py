"""Byte-level BPE: the same ids as Hugging Face's library, for any list of merges."""

import inspect
import json
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken_ext.openai_public

from tokenizers import Tokenizer, TokenizerError, bpe, load

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
SPELLING = {b: c for c, b in bpe.BYTE_OF.items()}
GPT2_WORDS = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
)


def spelt(token: bytes) -> str:
    return "".join(SPELLING[b] for b in token)


def tokenizer_json(
    merges: list[tuple[bytes, bytes]],
    added: dict[str, int] | None = None,
    special: dict[str, int] | None = None,
    normalizer: dict | None = None,
) -> dict:
    """A tokenizer.json whose ids are the bytes, then the merges in their order."""
    vocab = {SPELLING[b]: b for b in range(256)}
    for left, right in merges:
        vocab.setdefault(spelt(left + right), len(vocab))
    tokens = [
        {"content": token, "id": i, "special": is_special}
        for group, is_special in ((added, False), (special, True))
        for token, i in (group or {}).items()
    ]
    return {
        "added_tokens": tokens,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "decoder": {"type": "ByteLevel"},
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [[spelt(left), spelt(right)] for left, right in merges],
        },
    }


def built(data: dict, **beside: dict) -> Tokenizer:
    files = {f"{name}.json": json.dumps(value).encode() for name, value in beside.items()}
    return bpe.build("test", {"tokenizer.json": json.dumps(data).encode(), **files}, Path("test"))


def merge_by_pairs(word: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The definition: merge the pair that is listed first, leftmost first, until none is listed."""
    rank = {pair: n for n, pair in enumerate(merges)}
    parts = [bytes([b]) for b in word]
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        first = min(range(len(pairs)), key=lambda k: (rank.get(pairs[k], len(rank)), k))
        if pairs[first] not in rank:
            break
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts


def random_merges(rng: random.Random, letters: bytes, count: int) -> list[tuple[bytes, bytes]]:
    """Merges of known tokens at random: no corpus behind them, so many are never reached."""
    tokens = [bytes([b]) for b in letters]
    merges: list[tuple[bytes, bytes]] = []
    for _ in range(count):
        left, right = rng.choice(tokens), rng.choice(tokens)
        if left + right not in tokens and len(left + right) < 12:
            tokens.append(left + right)
            merges.append((left, right))
    return merges


@pytest.mark.parametrize("name", ["gpt2", "neox"])
def test_ids_and_texts_are_those_of_the_reference_library(name):
    tokenizer = load(GOLDEN / name)
    expected = EXPECTED[name]
    assert any(expected["special"])
    for n, text in enumerate(EXPECTED["strings"]):
        plain = tokenizer.encode(text)
        parsed = tokenizer.encode(text, special=True)
        assert plain.dtype == parsed.dtype == np.int32
        assert plain.shape == (len(expected["plain"][n]),)
        assert plain.tolist() == expected["plain"][n], ascii(text)
        assert parsed.tolist() == (expected["special"][n] or expected["plain"][n]), ascii(text)
        assert tokenizer.decode(parsed) == expected["decoded"][n]


def test_text_survives_unless_it_is_normalised():
    gpt2, neox = load(GOLDEN / "gpt2"), load(GOLDEN / "neox")
    for text in EXPECTED["strings"]:
        assert gpt2.decode_bytes(gpt2.encode(text)) == text.encode()
        assert neox.decode(neox.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("seed", range(60))
def test_any_list_of_merges_means_the_same_as_by_pairs(seed):
    rng = random.Random(seed)
    letters = b"ab" if seed % 2 else b"abc "
    merges = random_merges(rng, letters, rng.randint(5, 120))
    data = tokenizer_json(merges)
    ids = data["model"]["vocab"]
    tokenizer = built(data)
    lost = bpe.unreachable(merges)
    for left, right in merges:
        alone = merge_by_pairs(left + right, merges) == [left + right]
        assert alone == (left + right not in lost)
    for _ in range(60):
        text = "".join(rng.choices(letters.decode(), k=rng.randint(0, 40)))
        words = [word.encode() for word in GPT2_WORDS.findall(text)]
        parts = [part for word in words for part in merge_by_pairs(word, merges)]
        assert tokenizer.encode(text).tolist() == [ids[spelt(part)] for part in parts], text
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_token_no_merge_reaches_is_only_decoded():
    merges = [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"abc", b"d")]
    tokenizer = built(tokenizer_json(merges))
    assert bpe.unreachable(merges) == {b"abc", b"abcd"}
    assert tokenizer.encode("abc").tolist() == [256, ord("c")]
    assert tokenizer.decode([258, 259]) == "abcabcd"


def test_the_word_pattern_is_tiktokens():
    assert bpe.WORD == tiktoken_ext.openai_public.r50k_pat_str


def test_added_tokens_are_cut_longest_first_and_always():
    tokenizer = built(tokenizer_json([(b" ", b" ")], {"  ": 300, "     ": 301, "<t>": 302}))
    assert tokenizer.encode(" " * 8 + "<t><t").tolist() == [301, 300, 32, 302, *b"<t"]
    assert tokenizer.decode([301, 300, 32, 302]) == " " * 8 + "<t>"


def test_control_tokens_are_text_unless_asked_for():
    tokenizer = built(tokenizer_json([], special={"<a>": 300, "<a><b>": 301, "<b>": 302}))
    text = "x<a><b><b><a>"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.encode(text, special=True).tolist() == [ord("x"), 301, 302, 300]
    assert tokenizer.decode([ord("x"), 301, 302, 300]) == text


def test_text_between_control_tokens_is_normalised_apart():
    data = tokenizer_json([], special={"<|x|>": 300}, normalizer={"type": "NFC"})
    tokenizer = built(data)
    assert tokenizer.encode("<|x|>\u0338", special=True).tolist() == [300, *"\u0338".encode()]
    assert tokenizer.encode("<|x|>\u0338").tolist() == list("<|x|\u226f".encode())


@pytest.mark.parametrize("text", ["\ud800", "a\udfff b", "\ud83d\ude00", "\ude00\ud83d"])
def test_lone_surrogates_become_replacement_characters(text):
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for tokenizer in (load(GOLDEN / "neox"), load("bytes")):
        assert tokenizer.encode(text).tolist() == tokenizer.encode(repaired).tolist()
        assert tokenizer.decode(tokenizer.encode(text, special=True)) == repaired


def test_too_much_whitespace_is_one_clear_error():
    tokenizer = load(GOLDEN / "gpt2")
    most = "x" + "\n" * (bpe.MAX_BLANKS - 1) + "x"
    assert tokenizer.decode(tokenizer.encode(most * 2)) == most * 2
    with pytest.raises(TokenizerError, match="1100002 characters .* from character 1 on: shorten"):
        tokenizer.encode("x" + "\n" * 1_100_000 + "x")


def test_decoding_bytes_and_foreign_ids():
    tokenizer = built(tokenizer_json([]))
    assert tokenizer.decode_bytes(np.array(list("é".encode()))[:1]) == b"\xc3"
    assert tokenizer.decode([0xC3, 0xA9, 0xC3]) == "é\ufffd"
    assert tokenizer.decode([]) == "" and tokenizer.encode("").shape == (0,)
    for foreign in (256, -1):
        with pytest.raises(TokenizerError, match=f"no token {foreign}, only 256 tokens"):
            tokenizer.decode([foreign])


def test_pickled_for_a_worker_it_is_the_same():
    tokenizer = load(GOLDEN / "neox")
    copy = pickle.loads(pickle.dumps(tokenizer))
    text = EXPECTED["strings"][5]
    assert copy.encode(text, special=True).tolist() == tokenizer.encode(text).tolist()
    assert copy.fingerprint == tokenizer.fingerprint and copy.decode([560]) == " " * 24


def test_what_changes_ids_changes_the_fingerprint_and_nothing_else_does():
    merges = [(b"a", b"b"), (b"c", b"d")]
    base = tokenizer_json(merges, special={"<x>": 300})
    same = built(base).fingerprint
    assert built(base, tokenizer_config={"eos_token": "<x>"}).fingerprint == same
    spelt_out = json.loads(json.dumps(base))
    spelt_out["model"]["merges"] = ["a b", "c d"]
    assert built(spelt_out).fingerprint == same
    others = [
        tokenizer_json(merges[::-1], special={"<x>": 300}),
        tokenizer_json(merges[:1], special={"<x>": 300}),
        tokenizer_json(merges, special={"<x>": 301}),
        tokenizer_json(merges, special={"<y>": 300}),
        tokenizer_json(merges, added={"<x>": 300}),
        tokenizer_json(merges, special={"<x>": 300}, normalizer={"type": "NFC"}),
    ]
    assert len({same, *(built(other).fingerprint for other in others)}) == 1 + len(others)


def broken(**changes) -> dict:
    data = tokenizer_json([(b"a", b"b")], special={"<x>": 300})
    for key, value in changes.items():
        (data["model"] if key in ("type", "vocab", "merges", "dropout") else data)[key] = value
    return data


VOCAB = tokenizer_json([(b"a", b"b"), (b"b", b"c")])["model"]["vocab"]
TEMPLATE = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<x>"}}]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"type": "Unigram"}, 'model type "Unigram" is not supported'),
        ({"dropout": 0.1}, "model option dropout 0.1 is not supported"),
        ({"normalizer": {"type": "NFKC"}}, 'normalizer {"type": "NFKC"} is not supported'),
        ({"pre_tokenizer": None}, "pre_tokenizer null is not supported"),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "pre_tokenizer .*add_prefix_space.* is not supported",
        ),
        (
            {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
            "pre_tokenizer .*use_regex.* is not supported",
        ),
        ({"decoder": {"type": "Metaspace"}}, 'decoder {"type": "Metaspace"} is not supported'),
        (
            {"post_processor": {"type": "TemplateProcessing", "single": TEMPLATE}},
            "post_processor .*<x>.* is not supported",
        ),
        (
            {"added_tokens": [{"content": "<m>", "id": 9, "special": True, "lstrip": True}]},
            "added token with lstrip .*<m>.* is not supported",
        ),
        (
            {"added_tokens": [{"content": "ab", "id": 9, "special": True}]},
            "token 'ab' has id 256 in the vocabulary but 9 among the added tokens",
        ),
        (
            {"added_tokens": [{"content": "<m>", "id": 97, "special": True}]},
            "tokens 'a' and '<m>' both have id 97",
        ),
        ({"vocab": VOCAB | {"ab": 98}}, "tokens 'b' and 'ab' both have id 98"),
        ({"vocab": VOCAB | {"ab": "256"}}, "token 'ab' has id '256': expected an integer"),
        ({"vocab": {t: i for t, i in VOCAB.items() if t != "Ġ"}}, "no token for byte 0x20"),
        ({"vocab": ["a", "b"]}, "not laid out as a tokenizer.json"),
        ({"model": {"type": "BPE"}}, "not laid out as a tokenizer.json .*merges"),
        ({"model": None}, "not laid out as a tokenizer.json"),
        ({"merges": ["a b c"]}, "merge .* is not two tokens"),
        ({"merges": [["a", 5]]}, "merge .* is not two tokens"),
        ({"merges": ["a c"]}, "merge 'a' \\+ 'c' names a token that is not in the vocabulary"),
        ({"vocab": VOCAB, "merges": ["b c", "a b"]}, "ids do not rise in the order of the merges"),
        ({"merges": ["a b", "a b"]}, "ids do not rise in the order of the merges"),
    ],
)
def test_a_malformed_or_unsupported_file_is_named_with_its_fault(changes, message):
    with pytest.raises(TokenizerError, match=message) as caught:
        built(broken(**changes))
    assert str(caught.value).startswith("test/tokenizer.json")


def test_a_merge_of_a_token_made_later_is_refused():
    data = tokenizer_json([(b"ab", b"c"), (b"a", b"b")])
    with pytest.raises(TokenizerError, match="'ab' \\+ 'c' names .* no earlier merge makes"):
        built(data)


def test_gpt2_files_are_the_ones_tiktoken_asks_for():
    from tokenizers import gpt2

    source = inspect.getsource(tiktoken_ext.openai_public.gpt2)
    for name, sha256 in gpt2.SHA256.items():
        assert f'"{gpt2.URL}{name}"' in source and f'"{sha256}"' in source
