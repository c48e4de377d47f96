"""`generate` and `bench generate` from the command line: what they print, write, resume, refuse."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from core import adapter, families, schema
from core.checkpoint import load_model, save_model
from core.config import ModelConfig
from core.files import read_json, read_jsonl
from core.hf import gate, peft
from tokenizers import load

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONFIG = ModelConfig("gpt2", 258, 40, 16, 2, 2, 32, 8, init_std=0.4)
SHORT = ["--max-new-tokens", 6, "--batch", 2]
GENERATE = ["generate", "--model", "model", *SHORT]
LINES = [{"prompt": text, "id": i} for i, text in enumerate(["to be", "or", "not to be", "x"])]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    params = schema.init(families.rows(CONFIG), CONFIG.layers, 0)
    save_model(folder / "model", CONFIG, params, load("bytes"))
    (folder / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "p.txt").write_text("to be\nor\n")
    return folder


@pytest.fixture
def world(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


def test_one_prompt_prints_its_text_and_several_are_labelled(world, run):
    one = run(*GENERATE, "--prompt", "to be")
    assert one.endswith("\n") and "---" not in one
    several = run(*GENERATE, "--prompt", "to be", "--prompt", "or")
    assert several.startswith("--- 1, length\n" + one) and "\n--- 2, " in several
    assert run(*GENERATE, "--prompts", "p.txt") == several


def test_a_run_keeps_ids_and_log_probabilities_and_is_replayed(world, run, refuse):
    options = ["--prompts", "p.jsonl", "--temperature", 0.9, "--top-p", 0.9, "--stop", "e",
               "--stop", "\x07", "--stop-id", 9, "--seed", 4]  # fmt: skip
    said = run(*GENERATE, *options, "--out", "out")
    assert "completions 4" in said and read_json("out/DONE")["completions"] == 4
    lines = read_jsonl("out/completions.jsonl")
    assert [{name: line[name] for name in ("prompt", "id")} for line in lines] == LINES
    assert all(len(line["ids"]) == len(line["logprobs"]) for line in lines)
    assert "already done" in run(*GENERATE, *options, "--out", "out")
    run("run", "out/config.json", "--out", "again")
    content = Path("out/completions.jsonl").read_bytes()
    assert Path("again/completions.jsonl").read_bytes() == content
    assert "seed" in refuse(*GENERATE, *options, "--seed", 5, "--out", "out")


def test_hugging_face_folders_and_adapters(world, run):
    gate.export_hf(CONFIG, schema.init(families.rows(CONFIG), CONFIG.layers, 0), Path("hf"))
    spec = adapter.LoraSpec(2, 4.0, ("c_attn",))
    factors = jax.tree.map(lambda x: x + 0.1, adapter.init(spec, CONFIG, 0))
    peft.write("lora", CONFIG, adapter.Adapter(spec, factors))
    base = ["generate", "--model", "hf", "--tokenizer", "bytes", *SHORT, "--prompt", "abc"]
    run(*base, "--out", "plain")
    run(*base, "--adapter", "lora", "--out", "adapted")
    plain, adapted = (read_jsonl(f"{name}/completions.jsonl")[0] for name in ("plain", "adapted"))
    assert plain["logprobs"] != adapted["logprobs"]
    assert read_json("plain/inputs.json")["model"] == load_model("hf").fingerprint
    assert read_json("adapted/inputs.json")["model"] == load_model("hf", "lora").fingerprint


def test_conversations_are_rendered_and_end_with_the_turn(world, run, refuse, tmp_path):
    tokenizer = load(GOLDEN / "chat" / "tokenizer")
    config = ModelConfig("gpt2", tokenizer.vocab_size, 128, 16, 1, 2, 32, 8)
    params = schema.init(families.rows(config), 1, 0)
    save_model("chatty", config, params, tokenizer)
    line = {"messages": [{"role": "user", "content": "hi"}]}
    Path("c.jsonl").write_text(json.dumps(line) + "\n")
    chat = ["generate", "--model", "chatty", "--prompts", "c.jsonl", *SHORT]
    run(*chat, "--chat", "chatml", "--system", "be brief", "--out", "out")
    (found,) = read_jsonl("out/completions.jsonl")
    assert found["prompt"] == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert "give a chat template" in refuse(*chat)
    assert "'nosuch'" in refuse(*chat, "--chat", "nosuch")
    assert "--chat" in refuse(*GENERATE, "--prompt", "a", "--system", "b")


REFUSED = {
    "neither": ([], "--prompt TEXT"),
    "both": (["--prompt", "a", "--prompts", "p.txt"], "--prompt TEXT"),
    "empty": (["--prompt", ""], "prompt 1 has no tokens"),
    "long": (["--prompt", "a" * 35], "35 tokens; with 6 new ones"),
    "longer": (["--prompt", "a", "--max-new-tokens", 40], "no room"),
    "cold": (["--prompt", "a", "--temperature", -1], "--temperature"),
    "not a number": (["--prompt", "a", "--temperature", "nan"], "--temperature"),
    "top k": (["--prompt", "a", "--top-k", -1], "--top-k"),
    "top p": (["--prompt", "a", "--top-p", 0], "--top-p"),
    "stop id": (["--prompt", "a", "--stop-id", 258], "stop id 258"),
    "stop": (["--prompt", "a", "--stop", ""], "stop string is empty"),
    "no file": (["--prompts", "nosuch.txt"], "nosuch.txt"),
    "file": (["--prompts", "model"], "must end in .txt"),
    "template": (["--prompt", "a", "--chat", "nosuch"], "nosuch"),
    "no template": (["--prompt", "a", "--chat", "auto"], "no chat template"),
    "tokenizer": (["--prompt", "a", "--tokenizer", "nosuch"], "nosuch"),
    "adapter": (["--prompt", "a", "--adapter", "model"], "no adapter"),
    "model": (["--prompt", "a", "--model", "nosuch"], "nosuch does not exist"),
    "batch": (["--prompt", "a", "--batch", 0], "--batch"),
}


@pytest.mark.parametrize("bad", REFUSED)
def test_bad_input_is_named_and_leaves_nothing(world, refuse, bad):
    options, wanted = REFUSED[bad]
    before = sorted(world.rglob("*"))
    for out in ([], ["--out", "out"]):
        assert wanted in refuse(*GENERATE, *options, *out)
    assert sorted(world.rglob("*")) == before


def test_a_model_without_a_tokenizer_needs_one(world, refuse):
    shutil.rmtree("model/tokenizer")
    assert "--tokenizer" in refuse(*GENERATE, "--prompt", "a")


def test_a_tokenizer_of_another_vocabulary_is_named(world, refuse):
    tiny = ["generate", "--model", GOLDEN / "gpt2_tiny", "--tokenizer", "bytes", *SHORT]
    said = refuse(*tiny, "--prompt", "a")
    assert "bytes: the tokenizer has token 255, the model a vocabulary of 131" in said


def test_a_long_prompt_can_be_cut(world, run):
    cut = run(*GENERATE, "--prompt", "b" * 30 + "a" * 34, "--truncate", "left")
    assert cut == run(*GENERATE, "--prompt", "a" * 34)


def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(world, run):
    Path("many.txt").write_text("".join(f"{n} and {n}\n" for n in range(400)))
    line = ["generate", "--model", "model", "--prompts", "many.txt", "--batch", "4",
            "--max-new-tokens", "9", "--temperature", "1", "--out"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *line, "out"], stderr=subprocess.DEVNULL
    )
    journal = Path("out/finished.jsonl")
    while not journal.exists() or journal.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not Path("out/DONE").exists()
    run(*line, "out")
    run(*line, "whole")
    content = Path("whole/completions.jsonl").read_bytes()
    assert Path("out/completions.jsonl").read_bytes() == content and content.count(b"\n") == 400
    assert {f.name for f in Path("out").iterdir()} == {f.name for f in Path("whole").iterdir()}


def test_the_benchmark_prints_a_table_and_writes_its_numbers(world, run, refuse):
    sizes = ["--batch", 1, "--prompt-length", 8, "--new-tokens", 2, "--repeats", 1]
    assert "decode / floor" in run("bench", "generate", *sizes, "--out", "out.json")
    assert read_json("out.json")["ratios"]["uncached_to_decode"] > 0
    assert "--prompt-length" in refuse("bench", "generate", "--prompt-length", 9999)
