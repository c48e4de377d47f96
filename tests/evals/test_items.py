"""Items files are checked line by line; contexts and choices become tokens as in running text."""

import dataclasses
import json

import numpy as np
import pytest

import tokenizers
from core.errors import InputError
from evals.items import Item, Prompt, characters, keep_last, read_items, tokenise

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


def test_truncation_keeps_the_continuation_and_a_token_before_it():
    item = Item("q7", "abcdef", ("gh",), 0, {})
    [prompt] = tokenise(BYTES, item.context, item.choices)
    assert keep_last(prompt, 8, item) is not None
    for size in range(3, 9):
        kept = keep_last(prompt, size, item)
        assert cut(kept) == (list(b"abcdef"[8 - size :]), list(b"gh"))
    with pytest.raises(InputError, match="'q7'.*2 tokens.*at most 1"):
        keep_last(prompt, 2, item)


def test_ids_are_int32():
    for prompt in tokenise(WITH_BOS, "a ", ["b"]) + tokenise(BYTES, "", ["b"]):
        assert prompt.ids.dtype == np.int32
