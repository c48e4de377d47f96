"""Items files are checked line by line; what a model is asked becomes tokens as in running text.

The end-of-text token of the tokenizer "bytes", 256, is its BOS and its EOS.
"""

import dataclasses
import json

import numpy as np
import pytest

import tokenizers
from core.errors import InputError
from evals.items import (
    Item,
    Prompt,
    characters,
    encode,
    keep_last,
    read_context,
    read_items,
    rolling,
    tokenise,
)

BYTES = tokenizers.load("bytes")
GOOD = {"context": "2+2 is", "choices": [" 3", " 4"], "label": 1}
MERGED = 300


def merging(text: str) -> list[int]:
    """Bytes, except that "ab" is one token."""
    ids: list[int] = []
    for byte in text.encode():
        if byte == ord("b") and ids[-1:] == [ord("a")]:
            ids[-1] = MERGED
        else:
            ids.append(byte)
    return ids


MERGING = dataclasses.replace(BYTES, encode_text=merging)
WITH_BOS = dataclasses.replace(BYTES, add_bos=True)


def cut(prompt: Prompt) -> tuple[list[int], list[int]]:
    return prompt.ids[: prompt.start].tolist(), prompt.ids[prompt.start :].tolist()


def write(tmp_path, *lines):
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


def test_reads_items_with_and_without_ids(tmp_path):
    named = {**GOOD, "id": "sum", "source": "arithmetic"}
    first, second = read_items(write(tmp_path, GOOD, "", named))
    assert first == Item("1", "2+2 is", (" 3", " 4"), 1, {})
    assert second == Item("sum", "2+2 is", (" 3", " 4"), 1, {"source": "arithmetic"})
    assert second.answer == " 4"


def test_a_last_line_without_newline_is_read(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(GOOD))
    assert len(read_items(path)) == 1


@pytest.mark.parametrize(
    "bad, field",
    [
        ('{"context": ', "not JSON"),
        ('"text"', "object"),
        ({"choices": [" 3"], "label": 0}, "'context' is missing"),
        ({**GOOD, "context": 7}, "'context'"),
        ({"context": "", "label": 0}, "'choices' is missing"),
        ({**GOOD, "choices": []}, "'choices'"),
        ({**GOOD, "choices": " 3 4"}, "'choices'"),
        ({**GOOD, "choices": [" 3", 4]}, "'choices'"),
        ({**GOOD, "choices": [" 3", " "]}, "'choices'"),
        ({"context": "", "choices": [" 3"]}, "'label' is missing"),
        ({**GOOD, "label": 2}, "'label'.*0 to 1"),
        ({**GOOD, "label": -1}, "'label'"),
        ({**GOOD, "label": True}, "'label'"),
        ({**GOOD, "label": "1"}, "'label'"),
        ({**GOOD, "id": None}, "'id'"),
        ({**GOOD, "id": "1"}, "'1' is used twice"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path, bad, field):
    path = write(tmp_path, GOOD, bad)
    with pytest.raises(InputError, match=rf"items\.jsonl line 2.*{field}"):
        read_items(path)


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b'\n{"context": "\xff"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_items(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InputError, match="absent"):
        read_items(tmp_path / "absent.jsonl")
    with pytest.raises(InputError, match="no items"):
        read_items(write(tmp_path, ""))


def test_length_is_unicode_characters_without_the_joining_blank():
    assert [characters(c) for c in (" naïve", "naïve", "  two", " 木")] == [5, 5, 4, 1]


@pytest.mark.parametrize("blanks", ["", " ", "\n", " \n\t "])
def test_trailing_whitespace_moves_to_the_continuation(blanks):
    [prompt] = tokenise(BYTES, "So" + blanks, [" it is"])
    assert cut(prompt) == (list(b"So"), list(blanks.encode() + b" it is"))


@pytest.mark.parametrize("tokenizer", [BYTES, WITH_BOS])
@pytest.mark.parametrize("context", ["", "  ", "\n"])
def test_an_empty_context_is_a_lone_bos(tokenizer, context):
    [prompt] = tokenise(tokenizer, context, ["it"])
    assert cut(prompt) == ([BYTES.bos], list(context.encode() + b"it"))


def test_bos_comes_once_and_only_if_the_tokenizer_asks():
    text = "<|endoftext|>So"
    assert cut(tokenise(WITH_BOS, "So", [" x"])[0]) == ([256, *b"So"], list(b" x"))
    assert cut(tokenise(WITH_BOS, text, [" x"])[0]) == ([256, *b"So"], list(b" x"))
    assert cut(tokenise(BYTES, "So", [" x"])[0]) == (list(b"So"), list(b" x"))
    assert cut(tokenise(BYTES, text, [" x"])[0]) == ([256, *b"So"], list(b" x"))
    assert cut(tokenise(BYTES, "", ["<|endoftext|>x"])[0]) == ([256], list(b"x"))


def test_eos_stands_in_where_there_is_no_bos():
    assert cut(tokenise(dataclasses.replace(BYTES, bos=None), "", ["x"])[0]) == ([256], list(b"x"))
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        tokenise(dataclasses.replace(BYTES, bos=None, eos=None), "", ["x"])


def test_tokens_are_joint_and_the_continuation_is_the_tail_by_position():
    # Jointly "xab cab" is x AB _ c AB. The context alone is x a: two tokens, so two are cut off.
    [prompt] = tokenise(MERGING, "xa", ["b cab"])
    assert cut(prompt) == (list(b"xa"), [*b" c", MERGED])
    assert not prompt.alone


def test_a_continuation_that_merges_away_is_tokenised_alone():
    swallowed, kept = tokenise(MERGING, "xa", ["b", "bc"])
    assert cut(swallowed) == (list(b"xa"), list(b"b")) and swallowed.alone
    assert cut(kept) == (list(b"xa"), list(b"c")) and not kept.alone


@pytest.mark.parametrize("tokenizer", [BYTES, WITH_BOS])
@pytest.mark.parametrize("add_bos, begin", [(True, [256]), (False, [])])
def test_bos_can_be_forced_either_way(tokenizer, add_bos, begin):
    [prompt] = tokenise(tokenizer, "So", [" x"], add_bos)
    assert cut(prompt) == ([*begin, *b"So"], list(b" x"))
    assert encode(tokenizer, "So", add_bos).tolist() == [*begin, *b"So"]
    spelt, empty = "<|endoftext|>So", list(b"\nx")
    assert encode(tokenizer, spelt, add_bos).tolist() == [256, *b"So"]
    assert cut(tokenise(tokenizer, spelt, [" x"], add_bos)[0]) == ([256, *b"So"], list(b" x"))
    assert cut(tokenise(tokenizer, "\n", ["x"], add_bos)[0]) == ([256], empty)


def test_bos_that_is_not_there_cannot_be_forced():
    only_eos = dataclasses.replace(BYTES, bos=None)
    assert encode(only_eos, "So").tolist() == encode(only_eos, "So", False).tolist() == [*b"So"]
    with pytest.raises(InputError, match="tokenizer bytes has no BOS to add"):
        encode(only_eos, "So", True)


# By hand: every id after the first is predicted once, and by as many before it as a window holds.
@pytest.mark.parametrize(
    "text, windows",
    [
        ("", []),
        ("a", [([256], b"a")]),
        ("abcd", [([256], b"abcd")]),
        ("abcde", [([256], b"abcd"), ([*b"abcd"], b"e")]),
        ("abcdefgh", [([256], b"abcd"), ([*b"d"], b"efgh")]),
        ("abcdefghij", [([256], b"abcd"), ([*b"d"], b"efgh"), ([*b"fgh"], b"ij")]),
    ],
)
def test_a_text_rolls_in_windows_that_predict_each_token_once(text, windows):
    found = rolling(BYTES, text, 4)
    assert [cut(prompt) for prompt in found] == [(a, list(b)) for a, b in windows]
    assert all(prompt.ids.dtype == np.int32 and len(prompt.ids) <= 5 for prompt in found)


def test_a_rolling_text_has_two_bos_where_the_tokenizer_adds_one():
    first, second = rolling(WITH_BOS, "abcd", 4)
    assert cut(first) == ([256], [256, *b"abc"])
    assert cut(second) == ([256, *b"abc"], list(b"d"))
    assert cut(rolling(WITH_BOS, "abcd", 4, add_bos=False)[0]) == ([256], list(b"abcd"))
    assert cut(rolling(BYTES, "abcd", 4, add_bos=True)[0]) == ([256], [256, *b"abc"])
    assert rolling(WITH_BOS, "", 4) == []
    with pytest.raises(InputError, match="neither BOS nor EOS"):
        rolling(dataclasses.replace(BYTES, bos=None, eos=None), "a", 4)


def test_a_context_to_go_on_from_keeps_its_end():
    for room in range(1, 9):
        ids, lost = read_context(WITH_BOS, "So it \n", room)
        assert ids.tolist() == [256, *b"So it \n"][-room:] and lost == 8 - room
    assert read_context(BYTES, "So", 9, True).ids.tolist() == [256, *b"So"]
    assert read_context(WITH_BOS, "So", 9, False).ids.tolist() == list(b"So")
    assert read_context(BYTES, "", 9).ids.tolist() == [256]


def test_truncation_keeps_the_continuation_and_a_token_before_it():
    [prompt] = tokenise(BYTES, "abcdef", ["gh"])
    assert keep_last(prompt, 8, "item 'q7'") is not None
    for size in range(3, 9):
        kept = keep_last(prompt, size, "item 'q7'")
        assert cut(kept) == (list(b"abcdef"[8 - size :]), list(b"gh"))
    with pytest.raises(InputError, match="item 'q7'.*2 tokens.*at most 1"):
        keep_last(prompt, 2, "item 'q7'")


def test_ids_are_int32():
    for prompt in tokenise(WITH_BOS, "a ", ["b"]) + tokenise(BYTES, "", ["b"]):
        assert prompt.ids.dtype == np.int32
