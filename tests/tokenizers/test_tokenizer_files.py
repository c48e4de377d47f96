"""Finding, saving and refusing tokenizer files; GPT-2's without a network."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tokenizers import TokenizerError, gpt2, load

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
VOCAB = (GOLDEN / "gpt2" / "vocab.json").read_bytes()
MERGES = (GOLDEN / "gpt2" / "merges.txt").read_bytes()
TEXT = "The river's\n\n    mill <|endoftext|> é\u0301 🌊"


def put(folder: Path, **files: bytes | dict) -> Path:
    """Write vocab_json=... as vocab.json and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{stem}.{ending}").write_bytes(data)
    return folder


@pytest.fixture
def golden_as_gpt2(monkeypatch):
    """The small golden files in the place of OpenAI's; every request is refused and counted."""
    contents = {"vocab.bpe": MERGES, "encoder.json": VOCAB}
    for name, content in contents.items():
        monkeypatch.setitem(gpt2.SHA256, name, hashlib.sha256(content).hexdigest())
    requests = []

    def refuse(url, timeout):
        assert 0 < timeout <= 30
        requests.append(url)
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return contents, requests


def test_one_vocabulary_in_any_layout_is_one_tokenizer(tmp_path):
    model = {"vocab": json.loads(VOCAB), "merges": MERGES.decode().split("\n")[1:-1]}
    words = {"type": "ByteLevel", "add_prefix_space": False}
    data = {"model": model, "pre_tokenizer": words}
    put(tmp_path / "hf", vocab_json=VOCAB, merges_txt=MERGES)
    put(tmp_path / "windows", vocab_json=VOCAB, merges_txt=MERGES.replace(b"\n", b"\r\n"))
    put(tmp_path / "openai", vocab_bpe=MERGES.rstrip(), encoder_json=VOCAB)
    put(tmp_path / "fast", tokenizer_json=data, vocab_json=b"not read", merges_txt=b"not read")
    put(tmp_path / "file", some_name_json=data)
    paths = [tmp_path / n for n in ("hf", "windows", "openai", "fast", "file/some_name.json")]
    paths += [tmp_path / "hf" / "merges.txt", tmp_path / "openai" / "encoder.json"]
    tokenizers = [load(path) for path in paths] + [load(str(tmp_path / "hf"))]
    assert len({t.fingerprint for t in tokenizers}) == 1
    assert len({tuple(t.encode(TEXT, special=True)) for t in tokenizers}) == 1
    assert {t.eos for t in tokenizers} == {0} and {t.vocab_size for t in tokenizers} == {512}


@pytest.mark.parametrize("source", ["gpt2", "neox", "bytes", "roles"])
def test_saved_and_moved_it_is_the_same_tokenizer(source, tmp_path):
    path = "bytes" if source == "bytes" else GOLDEN / source
    if source == "roles":
        shutil.copytree(GOLDEN / "neox", path := tmp_path / "roles")
        put(path, config_json={"bos_token_id": 1, "command": "train lm"})
        put(path, special_tokens_map_json={"pad_token": {"content": "<|padding|>"}})
        config = {"add_bos_token": True, "eos_token": None, "chat_template": "{{ x }}"}
        put(path, tokenizer_config_json=config)
    first = load(path)
    first.save(tmp_path / "new" / "saved")
    first.save(tmp_path / "new" / "saved")  # again over itself
    shutil.move(tmp_path / "new", tmp_path / "moved")
    second = load(tmp_path / "moved" / "saved")
    for name in ("fingerprint", "bos", "eos", "pad", "add_bos", "vocab_size", "pieces", "control"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.encode(TEXT, special=True).tolist() == second.encode(TEXT, special=True).tolist()
    assert dict(second.files) == dict(first.files)
    assert not list((tmp_path / "moved" / "saved").glob(".*"))  # nothing temporary is left
    if source == "roles":
        assert (first.bos, first.eos, first.pad, first.add_bos) == (1, None, 1, True)
        saved = json.loads((tmp_path / "moved" / "saved" / "tokenizer_config.json").read_text())
        assert saved["chat_template"] == "{{ x }}"


def test_a_folder_with_another_tokenizer_is_left_alone(tmp_path):
    folder = put(tmp_path, tokenizer_json={"theirs": True})
    with pytest.raises(TokenizerError, match="tokenizer.json belongs to another tokenizer"):
        load(GOLDEN / "gpt2").save(folder)
    assert [path.name for path in folder.iterdir()] == ["tokenizer.json"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    tokenizer = load("bytes")
    tokenizer.save(tmp_path)
    (before,) = tmp_path.iterdir()
    content = before.read_bytes()
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tokenizer.save(tmp_path)
    assert list(tmp_path.iterdir()) == [before] and before.read_bytes() == content


@pytest.mark.parametrize(
    "files, roles",
    [
        ({}, (0, 0, None, False)),
        ({"config_json": {"eos_token_id": [5, 0], "bos_token_id": 50256}}, (0, 0, None, False)),
        ({"added_tokens_json": {"[PAD]": 512}}, (0, 0, None, False)),
        (
            {"added_tokens_json": {"[PAD]": 512}, "config_json": {"pad_token_id": 512}},
            (0, 0, 512, False),
        ),
        (
            {
                "added_tokens_json": {"[PAD]": 512},
                "tokenizer_config_json": {"pad_token": {"content": "[PAD]"}, "bos_token": None},
                "special_tokens_map_json": {"bos_token": "<|endoftext|>", "eos_token": "ill"},
            },
            (None, json.loads(VOCAB)["ill"], 512, False),
        ),
        ({"tokenizer_config_json": {"add_bos_token": True}}, (0, 0, None, True)),
    ],
)
def test_roles_come_from_the_strongest_file_that_names_them(files, roles, tmp_path):
    tokenizer = load(put(tmp_path, vocab_json=VOCAB, merges_txt=MERGES, **files))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.add_bos) == roles


def test_a_template_with_bos_says_add_bos(tmp_path):
    data = json.loads((GOLDEN / "neox" / "tokenizer.json").read_bytes())
    single = [{"SpecialToken": {"id": "<|endoftext|>"}}, {"Sequence": {"id": "A"}}]
    data["post_processor"] = {"type": "TemplateProcessing", "single": single}
    tokenizer = load(put(tmp_path, tokenizer_json=data))
    assert tokenizer.add_bos and tokenizer.bos == 0
    assert 0 not in tokenizer.encode(TEXT)  # encode leaves adding it to the caller


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no tokenizer: put tokenizer.json"),
        ({"vocab_json": VOCAB}, "merges.txt is missing: vocab.json and merges.txt belong"),
        ({"vocab_bpe": MERGES}, "encoder.json is missing: vocab.bpe and encoder.json belong"),
        ({"tokenizer_json": b"{"}, "tokenizer.json is not JSON"),
        ({"tokenizer_json": b"[]"}, "tokenizer.json must hold a JSON object, not a list"),
        ({"tokenizer_json": b"\xff"}, "tokenizer.json is not UTF-8"),
        ({"vocab_json": b"<html>", "merges_txt": MERGES}, "vocab.json is not JSON"),
        ({"vocab_json": VOCAB, "merges_txt": b"#version\na\n"}, "merges.txt, line 2: 'a' is not"),
        ({"vocab_json": VOCAB, "merges_txt": b"a b c\n"}, "merges.txt, line 1: 'a b c' is not"),
        (
            {"vocab_json": VOCAB, "merges_txt": MERGES, "tokenizer_config_json": b"x"},
            "tokenizer_config.json is not JSON",
        ),
        (
            {
                "vocab_json": VOCAB,
                "merges_txt": MERGES,
                "tokenizer_config_json": {"eos_token": "?!"},
            },
            "tokenizer_config.json: eos_token '\\?!' is not a token",
        ),
    ],
)
def test_bad_folders_are_one_clear_error(files, message, tmp_path):
    with pytest.raises(TokenizerError, match=message) as caught:
        load(put(tmp_path, **files))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_path_names_the_choices(tmp_path):
    with pytest.raises(TokenizerError, match='or the name "bytes" or "gpt2"'):
        load(tmp_path / "absent")


def test_gpt2_comes_from_tiktokens_cache(golden_as_gpt2, tmp_path, monkeypatch):
    contents, requests = golden_as_gpt2
    for name, content in contents.items():
        (tmp_path / hashlib.sha1((gpt2.URL + name).encode()).hexdigest()).write_bytes(content)
    expected = load(GOLDEN / "gpt2").fingerprint
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
        monkeypatch.setenv(variable, str(tmp_path))
        assert load("gpt2").fingerprint == expected
    assert requests == []


def test_gpt2_without_cache_and_network_says_what_to_do(golden_as_gpt2, tmp_path, monkeypatch):
    _, requests = golden_as_gpt2
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(TokenizerError, match="no network here") as caught:
        load("gpt2")
    for part in (*map(gpt2.cache_name, gpt2.SHA256), "TIKTOKEN_CACHE_DIR", "encoder.json"):
        assert part in str(caught.value)
    assert str(tmp_path) in str(caught.value) and len(requests) == 1

    corrupt = tmp_path / gpt2.cache_name("vocab.bpe")
    corrupt.write_bytes(b"truncated")
    with pytest.raises(TokenizerError, match="has the wrong sha256"):
        load("gpt2")
    assert corrupt.read_bytes() == b"truncated"  # tiktoken would have deleted it


def test_gpt2_from_the_network_fills_the_cache(golden_as_gpt2, tmp_path, monkeypatch):
    contents, _ = golden_as_gpt2
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    served = []

    def serve(url, timeout):
        served.append(url)
        return io.BytesIO(contents[url.removeprefix(gpt2.URL)])

    monkeypatch.setattr(urllib.request, "urlopen", serve)
    assert load("gpt2").fingerprint == load("gpt2").fingerprint
    assert len(served) == 2 and len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"a login page"))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # off
    with pytest.raises(TokenizerError, match="the cache is off.*what arrived has the wrong sha256"):
        load("gpt2")


def test_the_default_cache_is_tiktokens(golden_as_gpt2, monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(TokenizerError, match="/nowhere/data-gym-cache/6d1cbeee0f20b3d9"):
        load("gpt2")


def test_importing_is_cheap():
    code = "import sys, tokenizers; print({'tiktoken', 'urllib.request'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.stdout == "set()\n", run.stderr
