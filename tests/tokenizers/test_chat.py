"""Conversations: the text of published templates, their ids, and which tokens are trained."""

import dataclasses
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tokenizers import Tokenizer, TokenizerError, chat, load, templates
from tokenizers.chat import ChatError, Unaligned, encode, render
from tokenizers.templates import TEMPLATES, normal_form, recognise, template

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "chat" / "expected.json").read_text(encoding="utf-8"))
NEOX = load(GOLDEN / "chat" / "tokenizer")
TOKENIZERS = {"neox": NEOX, "gpt2": load(GOLDEN / "tokenizers" / "gpt2")}
DISORDERED = ("two users", "assistant first", "system in the middle")
CASES = [
    (key, title)
    for key, cases in EXPECTED["cases"].items()
    for title in cases
    if title not in DISORDERED
]


def trained(labels: np.ndarray) -> str:
    return "".join("01"[int(label != chat.UNTRAINED)] for label in labels)


def talk(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def with_files(**files: str) -> Tokenizer:
    content = {name.replace("__", "."): text.encode() for name, text in files.items()}
    kept = {"tokenizer.json": NEOX.files["tokenizer.json"]}
    return dataclasses.replace(NEOX, name="mine", files=kept | content)


@pytest.mark.parametrize("key, title", CASES)
def test_text_ids_and_trained_tokens_are_those_of_transformers(key, title):
    which, name = key.split("/")
    tokenizer, messages = TOKENIZERS[which], EXPECTED["conversations"][title]
    expected, form = EXPECTED["cases"][key][title], template(tokenizer, name)
    assert render(messages, form).text == expected["text"]
    assert render(messages, form, add_generation_prompt=True).text == expected["prompted"]
    made = encode(tokenizer, messages, form)
    assert made.input_ids.tolist() == expected["ids"] and made.cut == 0
    assert made.input_ids.dtype == made.labels.dtype == np.int32
    assert trained(made.labels) == expected["trained"]
    np.testing.assert_array_equal(
        made.labels[made.labels != -100], made.input_ids[made.labels != -100]
    )
    assert (
        trained(encode(tokenizer, messages, form, train_newline=True).labels)
        == (expected["trained_newline"])
    )
    for length, (count, mask) in expected["cut"].items():
        cut = encode(tokenizer, messages, form, int(length))
        assert cut.input_ids.tolist() == expected["ids"][:count] and trained(cut.labels) == mask
        assert cut.cut == len(expected["ids"]) - count


@pytest.mark.parametrize("name", ["gemma", "gemma2"])
def test_what_the_published_template_refuses_is_refused(name):
    assert {*DISORDERED} <= {*EXPECTED["refused"][name]}
    for title in EXPECTED["refused"][name]:
        with pytest.raises(ChatError):
            render(EXPECTED["conversations"][title], template(NEOX, name))


def test_only_content_and_end_of_turn_are_trained():
    """What the labels spell, for each template."""
    messages = talk(" a ", "b c\n", "d", "")
    spelt = {
        "gemma": ["b c<end_of_turn>", "<end_of_turn>"],
        "tulu": ["b c\n<|endoftext|>", "<|endoftext|>"],
        "chatml": ["b c\n<|im_end|>", "<|im_end|>"],
    }
    for name, parts in spelt.items():
        form = template(NEOX, name)
        text, spans = render(messages, form)
        assert [text[a:b] for a, b in spans] == parts
        labels = encode(NEOX, messages, form).labels
        assert NEOX.decode(labels[labels != -100]) == "".join(parts)
        parts = [parts[0] + "\n", parts[1] + "\n" * (name != "tulu")]
        text, spans = render(messages, form, train_newline=True)
        assert [text[a:b] for a, b in spans] == parts


@pytest.mark.parametrize("name", ["gemma", "tulu", "chatml"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_bos_stands_once_where_template_or_model_wants_it(name, add_bos):
    tokenizer = dataclasses.replace(NEOX, add_bos=add_bos)
    ids = encode(tokenizer, talk("a", "b"), template(tokenizer, name)).input_ids.tolist()
    assert ids.count(tokenizer.bos) == (add_bos or name == "gemma")
    assert (ids[0] == tokenizer.bos) == (add_bos or name == "gemma")


def test_a_token_on_the_edge_of_a_span_is_trained():
    """Here two newlines are one token, and the header's last is the content's first."""
    of_byte = {piece: i for i, piece in NEOX.pieces.items() if len(piece) == 1}
    joined = NEOX.vocab_size

    def by_bytes(text: str) -> list[int]:
        parts = [[of_byte[bytes([b])] for b in part] for part in text.encode().split(b"\n\n")]
        return [i for n, part in enumerate(parts) for i in [joined] * (n > 0) + part]

    pieces = {**NEOX.pieces, joined: b"\n\n"}
    tokenizer = dataclasses.replace(NEOX, pieces=pieces, encode_text=by_bytes)
    made = encode(tokenizer, talk("a", "\nb"), template(tokenizer, "tulu"))
    at = made.input_ids.tolist().index(joined)
    assert (made.labels[:at] == -100).all() and (made.labels[at:] != -100).all()


def test_normalised_text_is_traced():
    """Combining marks compose, so bytes get lost; the trained part is the same text."""
    content = "e\u0301" * 20 + "\u212b"
    made = encode(NEOX, talk("a\u0308", content, "o\u0302", "u"), template(NEOX, "gemma"))
    text = NEOX.decode(made.labels[made.labels != -100])
    assert text == unicodedata.normalize("NFC", content) + "<end_of_turn>u<end_of_turn>"


def test_a_text_that_the_tokens_do_not_spell_is_refused():
    form = template(NEOX, "gemma")
    lossy = dataclasses.replace(NEOX, encode_text=lambda t: NEOX.encode(t.replace("\u2581", " ")))
    encode(lossy, talk("a b", "c"), form)
    with pytest.raises(Unaligned, match="do not spell the text"):
        encode(lossy, talk("a\u2581b", "c"), form)
    with pytest.raises(Unaligned, match="half of a surrogate pair"):
        encode(NEOX, talk("a", "\ud83c"), form)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "the conversation is empty"),
        ([{"role": "system", "content": "a"}], "only a system message: add a user"),
        (
            talk("a", "b") + talk("c", "d")[1:],
            "message 2 is of assistant after assistant where user",
        ),
        (talk("a") + talk("b"), "message 1 is of user after user where assistant was due"),
        (talk("a", "b")[1:], "message 0 is of assistant after the beginning"),
        ([*talk("a", "b"), {"role": "system", "content": "c"}], "message 2 is of system after"),
        ([*talk("a"), {"role": "tool", "content": "c"}], "message 1 has the role 'tool': rename"),
        ([{"content": "c"}], "message 0 has the role None"),
        ([{"role": ["user"], "content": "c"}], r"message 0 has the role \['user'\]"),
        ([{"role": "user"}], r"message 0 \(user\) has no string as content but NoneType"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has no string as content but list"),
    ],
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_malformed_conversation_is_named(messages, message, name):
    if name == "gemma2" and messages and messages[0].get("role") == "system":
        message = "chat template gemma2 has no system role"
    with pytest.raises(ChatError, match=message):
        render(messages, template(NEOX, name))


def test_unfit_templates_are_named():
    gpt2 = TOKENIZERS["gpt2"]
    with pytest.raises(TokenizerError, match="no chat template 'raw': name one of gemma, gemma2,"):
        template(NEOX, "raw")
    with pytest.raises(TokenizerError, match="gemma needs the token <start_of_turn>, which .*gpt2"):
        template(gpt2, "gemma")
    with pytest.raises(TokenizerError, match="tulu needs a token for EOS, and tokenizer"):
        template(dataclasses.replace(gpt2, eos=None), "tulu")
    with pytest.raises(TokenizerError, match="gemma needs a token for BOS, and tokenizer"):
        template(dataclasses.replace(NEOX, bos=None), "gemma")


SPELLINGS = [
    "{% for m in messages %}{{ '<' + m['role'] + '>\\n' }}{% endfor %}",
    '{%- for m in messages -%}\n    {{ "<" + m["role"] + ">\n" }}\n{%- endfor -%}\n',
    "{#- any comment -#}\n{%for m in messages%}{{'<'+m['role']+'>\\n'}}{%endfor%}\n",
]
NORMAL = "{%forminmessages%}{{'<'+m['role']+'>\n'}}{%endfor%}"
OTHERS = [
    "{% for m in messages %}{{ '<' + m['role'] + '> \\n' }}{% endfor %}",
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% endfor %}",
    "{% for m in messages %} {{ '<' + m['role'] + '>\\n' }}{% endfor %}",
    "{% for m in messages %}{{ '<' + m['role'] + '>\\n' }}{% endfor %}.",
]


def test_the_normal_form_keeps_what_shows():
    assert [normal_form(text) for text in SPELLINGS] == [NORMAL] * 3
    assert NORMAL not in [normal_form(text) for text in OTHERS]


def test_a_folders_own_template_is_recognised(monkeypatch):
    mark = hashlib.sha256(NORMAL.encode()).hexdigest()
    monkeypatch.setitem(templates.KNOWN, mark, "chatml")
    config = json.dumps({"chat_template": SPELLINGS[0]})
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": SPELLINGS[1]}]
    for files in (
        {"tokenizer_config__json": config},
        {"tokenizer_config__json": json.dumps({"chat_template": named})},
        {"chat_template__jinja": SPELLINGS[2], "tokenizer_config__json": '{"chat_template": "x"}'},
    ):
        assert recognise(with_files(**files)) == "chatml"
        assert template(with_files(**files)) == template(NEOX, "chatml")
        assert template(with_files(**files), "tulu").name == "tulu"
    for text in OTHERS:
        with pytest.raises(
            TokenizerError, match="of tokenizer mine is none of gemma, .*--template"
        ):
            template(with_files(chat_template__jinja=text))
    for config in ("{}", '{"chat_template": null}', '{"chat_template": [1]}'):
        with pytest.raises(
            TokenizerError, match="tokenizer mine has no chat template: name one of"
        ):
            template(with_files(tokenizer_config__json=config))


def test_known_templates_are_named_by_hashes():
    assert {*templates.KNOWN.values()} == {*TEMPLATES}
    assert all(len(mark) == 64 and int(mark, 16) for mark in templates.KNOWN)
