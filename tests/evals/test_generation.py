"""Where texts begin and end, and runs that a kill does not change."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import tokenizers
from core import families, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import read_jsonl
from core.generate import Completion
from core.sampling import Sampling
from evals import generation, user_prompts
from evals.generation import Settings
from evals.items import encode
from evals.store import Store, generation_key
from evals.user_prompts import ReadyPrompt, UserPrompt
from tokenizers.templates import TEMPLATES, template

BYTES = tokenizers.load("bytes")
CHAT = tokenizers.load(Path(__file__).parents[1] / "golden" / "chat" / "tokenizer")
CONFIG = ModelConfig("gpt2", 260, 48, 16, 2, 2, 32, 8, init_std=0.5)
SCAN = Execution(layers="scan")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    params = schema.init(families.rows(CONFIG), CONFIG.layers, seed=1)
    return Loaded(CONFIG, params, None, "f" * 64)


# --------------------------------------------------------------------------------------- prompts


def test_bos_comes_first_exactly_once_if_it_is_asked_for():
    eos = BYTES.eos
    plain = encode(BYTES, "ab")
    np.testing.assert_array_equal(plain, [97, 98])
    begins = dataclasses.replace(BYTES, bos=eos, add_bos=True)
    np.testing.assert_array_equal(encode(begins, "ab"), [eos, 97, 98])
    spelt = BYTES.decode(np.array([eos]))
    np.testing.assert_array_equal(encode(begins, spelt + "ab"), [eos, 97, 98])
    np.testing.assert_array_equal(encode(begins, ""), [eos])


def test_what_ends_a_text_by_default(loaded):
    def stops(tokenizer=BYTES, **fields):
        config = ModelConfig(**{**CONFIG.to_json(), **fields})
        return generation.default_stops(loaded._replace(config=config), tokenizer)

    assert stops() == (BYTES.eos,)
    assert stops(eos=3, stops=(9, 11)) == (3, 9, 11)
    assert stops(dataclasses.replace(BYTES, eos=None)) == ()


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_end_of_turn_is_a_stop_id(name):
    chosen = template(CHAT, name)
    ids, strings = generation.end_of_turn(CHAT, chosen)
    assert CHAT.decode(ids) == chosen.ends["assistant"] and len(ids) == 1 and not strings


def test_several_tokens_that_end_a_turn_are_a_stop_string():
    other = dataclasses.replace(template(CHAT, "tulu"), ends={"assistant": "<end>"})
    assert generation.end_of_turn(BYTES, other) == ((), ("<end>",))


def test_texts_of_a_file(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one \n\ntwo\r\n  three\n")
    assert [a.content for a in user_prompts.read_prompts(text)] == ["one ", "two", "  three"]
    lines.write_text('{"prompt": "x\\ny", "id": 7}\n{"messages": [{"role": "user"}]}\n')
    first, second = user_prompts.read_prompts(lines)
    assert first.content == "x\ny" and first.extra == {"id": 7}
    assert second.content == [{"role": "user"}] and second.where.endswith("p.jsonl line 2")


@pytest.mark.parametrize(
    "name, content, wanted",
    [
        ("p.csv", b"a", "must end in .txt"),
        ("p.txt", b"\xff", "not UTF-8"),
        ("p.txt", b"\n \n", "holds no prompts"),
        ("p.jsonl", b"{", "line 1 is not JSON"),
        ("p.jsonl", b"[]", "line 1 is no JSON object"),
        ("p.jsonl", b'{"text": "a"}', "'prompt' or 'messages'"),
        ("p.jsonl", b'{"prompt": "a", "messages": []}', "either 'prompt' or 'messages'"),
        ("p.jsonl", b'{"prompt": 3}', "'prompt' must be a string"),
        ("p.jsonl", b'{"messages": "a"}', "'messages' must be a list"),
        ("p.jsonl", b'{"messages": []}', "'messages' must be a list"),
        ("p.jsonl", b'{"prompt": "a", "ids": []}', "'ids' is a column of the result"),
        ("p.jsonl", b'\n{"prompt": "a"}\n{', "line 3 is not JSON"),
    ],
    ids=range(12),
)
def test_a_bad_file_is_named(tmp_path, name, content, wanted):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=wanted):
        user_prompts.read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nosuch.txt cannot be read"):
        user_prompts.read_prompts(tmp_path / "nosuch.txt")


def prepare(loaded, content, new_tokens=10, chosen=None, system=None, **options):
    asked = [UserPrompt(content, "line 1", {"id": 3})]
    return user_prompts.prepare(loaded, BYTES, asked, new_tokens, chosen, system, **options)[0]


def test_a_long_prompt_is_refused_or_keeps_its_end(loaded):
    with pytest.raises(InputError, match="40 tokens; with 10 new ones they exceed"):
        prepare(loaded, "a" * 39 + "b")
    kept = prepare(loaded, "a" * 39 + "b", truncate=True)
    assert len(kept.ids) == 38 and kept.ids[-1] == ord("b") and kept.extra == {"id": 3}
    with pytest.raises(InputError, match="no room for a prompt"):
        prepare(loaded, "a", 48)
    with pytest.raises(InputError, match="no tokens"):
        prepare(loaded, "")


class TestConversations:
    PLAIN = template(CHAT, "tulu")

    def text(self, loaded, content, system=None):
        large = ModelConfig(**{**CONFIG.to_json(), "context": 1000, "vocab_size": 100_000})
        asked = [UserPrompt(content, "line 1")]
        (prompt,) = user_prompts.prepare(
            loaded._replace(config=large), CHAT, asked, 1, self.PLAIN, system
        )
        np.testing.assert_array_equal(prompt.ids, encode(CHAT, prompt.text))
        return prompt.text

    def test_a_text_is_what_a_user_says(self, loaded):
        said = self.text(loaded, "hi")
        assert said.endswith("<|user|>\nhi\n<|assistant|>\n")
        assert self.text(loaded, [{"role": "user", "content": "hi"}]) == said
        assert "<|system|>\nbe brief\n<|user|>" in self.text(loaded, "hi", "be brief")

    def test_what_cannot_be_continued_is_named(self, loaded):
        user, assistant = ({"role": r, "content": "x"} for r in ("user", "assistant"))
        with pytest.raises(InputError, match="ends with the assistant"):
            self.text(loaded, [user, assistant])
        with pytest.raises(InputError, match="line 1: message 1 is of user after user"):
            self.text(loaded, [user, user])
        with pytest.raises(InputError, match="leave out --system"):
            self.text(loaded, [{"role": "system", "content": "y"}, user], "be brief")
        with pytest.raises(InputError, match="give a chat template"):
            prepare(loaded, [user])
        with pytest.raises(InputError, match="needs a chat template"):
            prepare(loaded, "a", system="b")


# ----------------------------------------------------------------------------------- stop strings


def test_a_stop_string_ends_at_the_token_that_completes_it():
    """Against the beginnings of the ids, one by one; tokens of GPT-2's kind straddle strings."""
    folder = Path(__file__).parents[1] / "golden" / "tokenizers" / "gpt2"
    tokenizer = tokenizers.load(folder)
    rng = np.random.default_rng(0)
    texts = ["the end\n\nof it, the end.", "a  b\n\n\nc", "naïve \n \n – end", "no"]
    for text in texts:
        ids = tokenizer.encode(text)
        for _ in range(30):
            at = rng.integers(0, len(text), 2)
            strings = tuple(text[i : i + n] for i, n in zip(at, rng.integers(1, 5, 2), strict=True))
            ends = generation.ends_with_string(tokenizer, strings)
            decoded = [tokenizer.decode_bytes(ids[:n]) for n in range(1, len(ids) + 1)]
            wanted = next(n for n, data in enumerate(decoded, 1)
                          if any(s.encode() in data for s in strings))  # fmt: skip
            assert ends(ids) == wanted and ends(ids[: wanted - 1]) is None
            completion = Completion(ids[:wanted], np.zeros(wanted, np.float32), "stop_string")
            found = generation.as_text(tokenizer, completion, strings)
            expected = decoded[wanted - 1]
            for string in strings:
                expected = expected.split(string.encode())[0]
            assert found.text == expected.decode("utf-8", "replace")
            np.testing.assert_array_equal(found.ids, ids[:wanted])


def test_a_stop_string_is_not_looked_for_without_one():
    ends = generation.ends_with_string(BYTES, ())
    assert ends(np.arange(200)) is None
    assert generation.ends_with_string(BYTES, ("ab",))(np.array([], np.int32)) is None


def test_the_text_leaves_out_the_stop_id_and_ids_without_a_token():
    ids = np.array([97, 259, 98, BYTES.eos], np.int32)  # the model's vocabulary is larger
    zeros = np.zeros(4, np.float32)
    assert generation.as_text(BYTES, Completion(ids, zeros, "stop_id"), ()).text == "ab"
    half = np.array([97, 0xC3], np.int32)
    assert generation.as_text(BYTES, Completion(half, zeros[:2], "length"), ()).text == "a\ufffd"


# -------------------------------------------------------------------------------------------- runs


TEXTS = ["To be", "or not", "that is the question", "x", "whether 'tis nobler"]
PROMPTS = [ReadyPrompt(text, encode(BYTES, text), {"id": i}) for i, text in enumerate(TEXTS)]
SETTINGS = Settings(12, Sampling(0.8, 50), 3, (256,), ("e",), batch=2)


def run(loaded, out, prompts=PROMPTS, settings=SETTINGS):
    return generation.run_generation(loaded, BYTES, prompts, out, settings, SCAN)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return run(loaded, out), (out / "completions.jsonl").read_bytes()


def test_a_line_for_each_prompt_in_order(whole, loaded):
    summary, content = whole
    lines = [json.loads(line) for line in content.splitlines()]
    assert [line["prompt"] for line in lines] == TEXTS
    assert [line["index"] for line in lines] == [line["id"] for line in lines] == [*range(5)]
    for line in lines:
        assert {*line} == {"id", "prompt", *user_prompts.COLUMNS}
        assert len(line["ids"]) == len(line["logprobs"]) <= 12
        assert line["logprob"] == pytest.approx(sum(line["logprobs"]))
        assert "e" not in line["completion"]
    assert summary["completions"] == 5
    assert summary["tokens"] == sum(len(line["ids"]) for line in lines)
    assert sum(summary[r] for r in ("stop_id", "stop_string", "length")) == 5
    texts = generation.complete_all(loaded, BYTES, PROMPTS, SETTINGS, SCAN)
    assert [text.text for text in texts] == [line["completion"] for line in lines]
    shown = generation.show(texts)
    assert shown.count("--- ") == 5 and "--- 1, " in shown


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_killed_as_a_text_ends_it_goes_on_to_the_same_bytes(
    loaded, tmp_path, whole, after, monkeypatch
):
    append, groups = generation.append_jsonl, []

    def cut(path, lines):
        append(path, lines)
        groups.append(len(lines))
        if len(groups) == after + 1:
            os.truncate(path, os.path.getsize(path) - 20)  # in the middle of a line
            raise Killed

    journal = tmp_path / "finished.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(generation, "append_jsonl", cut)
        with pytest.raises(Killed):
            run(loaded, tmp_path)
    assert not (tmp_path / "completions.jsonl").exists()
    kept = sum(groups) - 1
    assert len(read_jsonl(journal)) == kept < 5
    groups.clear()
    with monkeypatch.context() as patch:
        count = lambda path, lines: (groups.append(len(lines)), append(path, lines))  # noqa: E731
        patch.setattr(generation, "append_jsonl", count)
        assert run(loaded, tmp_path) == whole[0]
    assert sum(groups) == 5 - kept
    assert (tmp_path / "completions.jsonl").read_bytes() == whole[1]
    assert [f.name for f in tmp_path.iterdir()] == ["completions.jsonl"]
    assert run(loaded, tmp_path) == whole[0]


# ----------------------------------------------------------------------------------------- answers

ABOUT = {"model": "f" * 64}
UNTIL, STOPS = ("e", "t", "\x07"), (9, 50)


def answer(loaded, prompts=PROMPTS, until=UNTIL, store=None, tokenizer=BYTES):
    ids = [prompt.ids for prompt in prompts]
    return generation.answers(loaded, tokenizer, ids, until, 12, STOPS, SCAN, 2, "test", store)


def test_an_answer_ends_and_is_cut_as_the_definition_says(loaded):
    """Against the tokens that follow without any stop, read one by one."""
    endless = Settings(12, batch=2)
    free = generation.complete_all(loaded, BYTES, PROMPTS, endless, SCAN)
    strings, found = (*UNTIL, "<|endoftext|>"), answer(loaded)
    for one, text in zip(found, free, strict=True):
        ends = [n for n in range(1, 13) if text.ids[n - 1] in STOPS or any(
            s.encode() in BYTES.decode_bytes(text.ids[:n]) for s in strings)]  # fmt: skip
        end = ends[0] if ends else 12
        np.testing.assert_array_equal(one.ids, text.ids[:end])
        wanted = BYTES.decode([i for i in one.ids if i != BYTES.eos])
        for string in strings:
            wanted = wanted.split(string)[0]
        assert one.text == wanted
    assert {one.reason for one in found} >= {"stop_string", "length"}


@pytest.mark.parametrize(
    "until, control, wanted",
    [
        ((), {}, "so #### 41\n#a<x>b"),
        (("\n#", "####"), {}, "so "),
        (("####", "\n#"), {}, "so "),
        (("1\n", "#### 41"), {}, "so #### 4"),  # the first cut takes the second string away
        (("#### 41", "1\n"), {}, "so "),
        ((), {"<x>": 60}, "so #### 41\n#ax>b"),
        (("ab",), {"<": 60, "x": 120, ">": 62}, "so #### 41\n#"),  # once control tokens are out
    ],
    ids=range(7),
)
def test_the_cut_is_of_the_text_and_in_the_order_of_the_strings(loaded, until, control, wanted):
    ids = BYTES.encode("so #### 41\n#a<x>b").tolist()
    tokenizer = dataclasses.replace(BYTES, control={**BYTES.control, **control})
    known, key = Store(None, ABOUT), generation_key(PROMPTS[0].ids, 12, STOPS, until)
    known.before[key] = {"ids": ids, "reason": "length"}
    (found,) = answer(loaded, PROMPTS[:1], until, known, tokenizer)
    assert (found.text, found.ids.tolist(), found.reason) == (wanted, ids, "length")


@pytest.mark.parametrize("after", [1, 2])
def test_answers_are_kept_and_a_killed_run_ends_the_same(loaded, tmp_path, after, monkeypatch):
    twice = [*PROMPTS, PROMPTS[1]]
    wanted = [(a.text, a.ids.tolist(), a.reason) for a in answer(loaded, twice)]
    assert wanted[1] == wanted[5]
    add, added = Store.add, []

    def killed(store, pairs):
        pairs = list(pairs)
        added.extend(pairs)
        add(store, pairs)
        if len(added) > after:
            raise Killed

    path = tmp_path / "answers.jsonl"
    first = Store(path, ABOUT)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        with pytest.raises(Killed):
            answer(loaded, twice, store=first)
    resumed = Store(path, ABOUT, first.size)
    assert resumed.since == dict(added) and not resumed.before
    found = answer(loaded, twice, store=resumed)
    assert [(a.text, a.ids.tolist(), a.reason) for a in found] == wanted
    lines = read_jsonl(path)[1:]
    assert len(lines) == 5 == len({line["key"] for line in lines})
    # Another run finds them all and computes nothing.
    monkeypatch.setattr(generation, "complete", None)
    found = answer(loaded, twice, store=Store(path, ABOUT))
    assert [(a.text, a.ids.tolist(), a.reason) for a in found] == wanted


@pytest.mark.parametrize(
    "changes, wanted",
    [
        ({"stop_ids": (260,)}, "stop id 260 is outside"),
        ({"stop_strings": ("",)}, "stop string is empty"),
        ({"sampling": Sampling(-1)}, "temperature"),
    ],
)
def test_impossible_settings_are_named(loaded, changes, wanted):
    with pytest.raises(InputError, match=wanted):
        SETTINGS._replace(**changes).check(loaded)


def test_a_damaged_model_is_named(loaded):
    damaged = loaded._replace(params=jax.tree.map(lambda x: x * np.float32("nan"), loaded.params))
    with pytest.raises(InputError, match="ffffffffffff gives log-probabilities that are not fin"):
        generation.complete_all(damaged, BYTES, PROMPTS, SETTINGS, SCAN)


def test_the_fingerprint_tells_prompts_apart():
    marks = {
        user_prompts.fingerprint(PROMPTS),
        user_prompts.fingerprint(PROMPTS[:4]),
        user_prompts.fingerprint([*PROMPTS[:4], PROMPTS[4]._replace(extra={"id": 9})]),
        user_prompts.fingerprint([*PROMPTS[1:], PROMPTS[0]]),
    }
    assert len(marks) == 4
