"""Conversations become rows in order, and what cannot be a row is counted or named."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cli as door
import core.rows
import tokenizers
from core import families, schema
from core.checkpoint import load_model, save_model
from core.config import ModelConfig
from core.errors import InputError
from core.files import read_json, sha256_file
from core.rows import IGNORED, load_rows
from tokenizers.chat import encode
from tokenizers.templates import template
from training.data.chat import Fields, build_chat_rows

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "chat" / "tokenizer"
TOKENIZER = tokenizers.load(FOLDER)


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


CHATS = [
    {
        "messages": turns("Where?", "In the hills.", "And?", "Süß 水 🌊"),
        "source": "a",
        "doc": "d/1",
    },
    {"messages": turns("x" * 300, "never reached"), "source": "a"},
    {"messages": turns("Only a question."), "source": "b", "id": 7},
    {"messages": turns("Short?", "A rather long answer, " * 20), "source": "b"},
    {"messages": [{"role": "system", "content": "Be."}, *turns("e\u0301", "")], "tools": None},
]
KEPT = (0, 3, 4)
LENGTH = 64


def write(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def jsonl(tmp_path):
    return write(tmp_path / "pool.jsonl", CHATS)


def made(tmp_path, files, name="gemma", length=LENGTH, **options):
    info = build_chat_rows(files, TOKENIZER, length, tmp_path / "rows", name, **options)
    rows = load_rows(tmp_path / "rows", TOKENIZER.vocab_size, length, TOKENIZER.fingerprint)
    assert (info["rows"], info["tokens"]) == (len(rows), rows.lengths.sum())
    assert info["trained"] == rows.trained.sum()
    assert info["trained_share"] == info["trained"] / info["tokens"]
    return rows, info


@pytest.mark.parametrize("name", ["gemma", "tulu", "chatml"])
@pytest.mark.parametrize("train_newline", [False, True])
def test_a_row_is_its_encoded_conversation(tmp_path, jsonl, name, train_newline):
    rows, info = made(tmp_path, [jsonl], name, train_newline=train_newline)
    form = template(TOKENIZER, name)
    for i, kept in enumerate(KEPT):
        wanted = encode(TOKENIZER, CHATS[kept]["messages"], form, LENGTH, train_newline)
        np.testing.assert_array_equal(rows.ids(i), wanted.input_ids)
        np.testing.assert_array_equal(rows.labels(i), wanted.labels)
    assert len(rows) == len(KEPT)
    assert (info["template"], info["train_newline"]) == (name, train_newline)
    assert rows.column("source") == ["a", "b", "pool"]
    assert rows.column("doc") == ["d/1", f"{jsonl}:4", f"{jsonl}:5"]


def test_what_is_left_out_is_counted(tmp_path, jsonl):
    rows, info = made(tmp_path, [jsonl])
    assert info["conversations"] == 5 and info["dropped_untrained"] == 2
    assert info["truncated"] == 1 and info["dropped_unaligned"] == info["dropped_malformed"] == 0
    assert info["sources"]["b"]["truncated"] == info["sources"]["b"]["dropped_untrained"] == 1
    for name in ("conversations", "rows", "tokens", "trained"):
        assert info[name] == sum(source[name] for source in info["sources"].values())
    assert info["files"] == [{"path": str(jsonl), "sha256": sha256_file(jsonl)}]
    cut = rows.ids(1)
    assert len(cut) == LENGTH and rows.labels(1)[-1] == cut[-1] != TOKENIZER.encode(
        "<end_of_turn>", special=True
    )  # cut short, and no end of turn made up
    assert read_json(tmp_path / "rows" / "rows.json") == info


def test_same_conversations_same_rows(tmp_path, jsonl, monkeypatch):
    first, info = made(tmp_path, [jsonl])
    sha, content = first.sha, (tmp_path / "rows" / "data-00000-of-00001.arrow").read_bytes()
    second, again = made(tmp_path, [jsonl])
    assert second.sha == sha and again == info
    assert (tmp_path / "rows" / "data-00000-of-00001.arrow").read_bytes() == content
    monkeypatch.setattr(core.rows, "HELD_TOKENS", 1)  # a row at a time
    third, pieces = made(tmp_path, [jsonl])
    assert third.sha == sha and pieces == info


def test_other_layouts_give_the_same_rows(tmp_path, jsonl):
    sha = made(tmp_path, [jsonl])[0].sha
    plain = [{**chat, "tools": None} for chat in CHATS]
    pq.write_table(pa.Table.from_pylist(plain), tmp_path / "pool.parquet", row_group_size=2)
    assert made(tmp_path, [tmp_path / "pool.parquet"])[0].sha == sha
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [
        {"talk": [{"from": names[m["role"]], "value": m["content"]} for m in chat["messages"]]}
        for chat in CHATS
    ]
    path = write(tmp_path / "shared.json", shared)
    assert made(tmp_path, [path], fields=Fields("talk"))[0].sha == sha
    halves = [write(tmp_path / "1.jsonl", CHATS[:2]), write(tmp_path / "2.jsonl", CHATS[2:])]
    assert made(tmp_path, halves)[0].sha == sha


def test_questions_and_answers(tmp_path):
    pairs = [
        {"question": "How many?", "answer": "2 + 2 = 4\n#### 4"},
        {"question": "", "answer": ""},
    ]
    path = write(tmp_path / "gsm.jsonl", pairs)
    rows, _ = made(tmp_path, [path], "tulu", fields=Fields("x", "question", "answer"))
    form = template(TOKENIZER, "tulu")
    for i, pair in enumerate(pairs):
        wanted = encode(TOKENIZER, turns(pair["question"], pair["answer"]), form)
        np.testing.assert_array_equal(rows.ids(i), wanted.input_ids)
    labels = rows.labels(0)
    assert TOKENIZER.decode(labels[labels != IGNORED]) == "2 + 2 = 4\n#### 4<|endoftext|>"


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": []}, "the conversation is empty"),
        ({"messages": turns("a") + turns("b")}, "message 1 is of user after user"),
        ({"messages": turns("a", "b")[1:]}, "message 0 is of assistant after the beginning"),
        ({"messages": [{"role": "bot", "content": ""}]}, "message 0 has the role 'bot'"),
        ({"messages": [{"from": ["bot"], "value": ""}]}, r"message 0 has the role \['bot'\]"),
        ({"messages": [{"role": "user", "content": 3}]}, r"message 0 \(user\) has no string"),
        ({"messages": [{**turns("a")[0], "tool_calls": [{}]}]}, "message 0 calls a tool"),
        ({"messages": "hi"}, "'messages' is no list of messages"),
        ({"messages": ["hi"]}, "'messages' is no list of messages"),
        ({"text": "hi"}, "there is no field 'messages': name the one"),
        (["hi"], "there is no field 'messages'"),
    ],
)
def test_a_malformed_conversation_is_named_or_left_out(tmp_path, record, message):
    path = write(tmp_path / "bad.jsonl", [CHATS[0], record, CHATS[0]])
    with pytest.raises(InputError, match=rf"bad.jsonl line 2: {message}"):
        made(tmp_path, [path])
    assert not (tmp_path / "rows").exists()
    rows, info = made(tmp_path, [path], drop_malformed=True)
    assert len(rows) == 2 and info["dropped_malformed"] == 1


def test_untraceable_conversations_are_counted(tmp_path):
    path = write(tmp_path / "pool.jsonl", [CHATS[0], {"messages": turns("a", "half \ud83c")}])
    rows, info = made(tmp_path, [path])
    assert len(rows) == 1 and info["dropped_unaligned"] == 1


def test_bad_requests(tmp_path, jsonl):
    def refuse(message, files=(jsonl,), tokenizer=TOKENIZER, length=8, **options):
        with pytest.raises(ValueError, match=message):
            build_chat_rows(files, tokenizer, length, tmp_path / "rows", **options)
        assert not (tmp_path / "rows").exists()

    (tmp_path / "a.txt").write_text("text")
    refuse(r"a.txt has none of the suffixes \.jsonl, \.json, \.parquet", [tmp_path / "a.txt"])
    refuse("absent.jsonl does not exist", [tmp_path / "absent.jsonl"], template="tulu")
    refuse("length must be at least 2", length=1, template="tulu")
    refuse("tokenizer tokenizer has no chat template: name one of gemma")
    refuse("there is no chat template 'raw'", template="raw")
    refuse("give both --prompt-field and --answer-field", fields=Fields(prompt="question"))
    refuse("no conversation of .* makes a row: conversations 5, dropped_untrained 5", length=2,
           template="gemma")  # fmt: skip
    path = tmp_path / "cut.jsonl"
    path.write_text('{"messages": [')
    refuse("cut.jsonl line 1 is not JSON", [path], template="tulu")


TEMPLATE = "{{ 'any' }}"


def test_base_weights_with_a_chat_models_tokenizer(tmp_path, jsonl):
    """The tokenizer folder, its template included, is what the trained model keeps."""

    def run(*arguments: object) -> str:
        with jax.numpy_dtype_promotion("standard"):  # optax mixes float32 and int32
            result = CliRunner().invoke(door.cli, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    base, chat = tmp_path / "base_tokenizer", tmp_path / "chat_tokenizer"
    shutil.copytree(FOLDER, base)
    shutil.copytree(FOLDER, chat)
    roles = read_json(chat / "tokenizer_config.json") | {"chat_template": TEMPLATE}
    (chat / "tokenizer_config.json").write_text(json.dumps(roles))
    (chat / "chat_template.jinja").write_text(TEMPLATE)
    assert tokenizers.load(base).fingerprint == tokenizers.load(chat).fingerprint

    config = ModelConfig("gpt2", TOKENIZER.vocab_size, LENGTH, 8, 1, 2, 16, 4)
    params = schema.init(families.rows(config), config.layers, 0)
    save_model(tmp_path / "base", config, params, tokenizers.load(base))
    told = run("data", "chat", jsonl, "--tokenizer", base, "--template", "gemma",
               "--length", LENGTH, "--out", tmp_path / "rows")  # fmt: skip
    assert "rows 3" in told and "dropped_untrained 2" in told and "trained_share" in told
    run("train", "lm", "--model", tmp_path / "base", "--tokenizer", chat, "--steps", 1,
        "--batch", 2, "--rows", tmp_path / "rows", "--out", tmp_path / "tuned")  # fmt: skip

    loaded = load_model(tmp_path / "tuned")
    assert loaded.tokenizer is not None
    assert (loaded.tokenizer / "chat_template.jinja").read_text() == TEMPLATE
    saved = read_json(loaded.tokenizer / "tokenizer_config.json")
    assert (saved["chat_template"], saved["bos_token"]) == (TEMPLATE, "<bos>")
    assert not list((tmp_path / "base").rglob("chat_template.jinja"))
    assert tokenizers.load(loaded.tokenizer).fingerprint == TOKENIZER.fingerprint


def test_a_saved_tokenizer_leaves_no_strange_template(tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(tokenizers.TokenizerError, match="chat_template.jinja belongs to another"):
        TOKENIZER.save(tmp_path)
    with_one = dataclasses.replace(
        TOKENIZER, files={**TOKENIZER.files, "chat_template.jinja": b"{{ 'mine' }}"}
    )
    with_one.save(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ 'mine' }}"


def test_kept_columns(tmp_path):
    """As the quality that SmolTalk's rows come with."""
    records = [{"messages": turns("Hi.", "Ho."), "quality": word} for word in ("good", "poor")]
    rows, _ = made(tmp_path, [write(tmp_path / "pool.jsonl", records)], keep=("quality",))
    assert rows.column("quality") == ["good", "poor"]
