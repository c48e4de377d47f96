"""Requests as lines: what is answered, that nothing but the line is refused, and who asks."""

import dataclasses
import functools
import hashlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import jax
import numpy as np
import pytest

import tokenizers
from core import families, model, schema
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from evals.generation import answers
from evals.items import rolling
from evals.serve import NEW_TOKENS, Server, serve
from tokenizers import templates

ROOT = Path(__file__).parents[2]
BYTES = tokenizers.load("bytes")
EOS = cast(int, BYTES.eos)
CHAT = tokenizers.load(ROOT / "tests" / "golden" / "chat" / "tokenizer")
CONFIG = ModelConfig("gpt2", 260, 48, 16, 2, 2, 32, 8, init_std=0.5)
EXECUTION = Execution()


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    params = schema.init(families.rows(CONFIG), CONFIG.layers, seed=1)
    return Loaded(CONFIG, params, None, "f" * 64)


full_logits = jax.jit(functools.partial(model.logits, CONFIG, EXECUTION))


def logprobs(loaded: Loaded, ids: list[int]) -> np.ndarray:
    """log p(next | ids[:t + 1]) of every token of the vocabulary, float64 [T,V]."""
    read = np.zeros((1, CONFIG.context), np.int32)
    read[0, : len(ids)] = ids
    z_TV = np.asarray(full_logits({"params": loaded.params}, read)[0, : len(ids)], np.float64)
    return z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))


def brute_force(loaded: Loaded, ids: list[int], start: int) -> tuple[float, bool]:
    logp_TV = logprobs(loaded, ids[:-1])[start - 1 :]
    wanted = ids[start:]
    return float(logp_TV[range(len(wanted)), wanted].sum()), logp_TV.argmax(-1).tolist() == wanted


def request(method: str, args: object, mark: object = 0) -> str:
    return json.dumps({"id": mark, "method": method, "args": args}) + "\n"


def ask(loaded: Loaded, *lines: str, tokenizer=BYTES, **options) -> list[dict]:
    out = io.StringIO()
    serve(loaded, tokenizer, lines, out, EXECUTION, 128, **options)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def likeliest(loaded: Loaded) -> tuple[str, str]:
    """A context after which the likeliest token is a character."""
    for context in map(chr, range(32, 127)):
        best = int(logprobs(loaded, [ord(context)])[-1].argmax())
        if 32 <= best < 127:
            return context, chr(best)
    raise AssertionError("seed 1 has one")


def test_log_likelihoods_equal_brute_force(loaded):
    pairs = [["The sea", " is"], ["The sea", " was"], ["", "Yes"], [*likeliest(loaded)]]
    (answer,) = ask(loaded, request("loglikelihood", pairs))
    for (context, continuation), (logprob, greedy) in zip(pairs, answer["result"], strict=True):
        begin = list(context.encode()) or [EOS]
        expected = brute_force(loaded, begin + list(continuation.encode()), len(begin))
        assert (logprob, greedy) == (pytest.approx(expected[0], rel=1e-5), expected[1])
    assert [greedy for _, greedy in answer["result"]] == [False, False, False, True]


def test_long_contexts_keep_their_end(loaded):
    pair = ["much too long", " to read"]
    (answer,) = ask(loaded, request("loglikelihood", [pair]), max_length=10)
    expected, _ = brute_force(loaded, list("".join(pair).encode())[-11:], 3)
    assert answer["result"][0][0] == pytest.approx(expected, rel=1e-5)


def test_a_text_is_the_sum_of_its_windows(loaded):
    texts = [["a long text in windows"], [""]]
    (answer,) = ask(loaded, request("loglikelihood_rolling", texts), max_length=10)
    windows = rolling(BYTES, texts[0][0], 10)
    expected = sum(brute_force(loaded, w.ids.tolist(), w.start)[0] for w in windows)
    assert len(windows) == 3
    assert answer["result"] == [pytest.approx(expected, rel=1e-5), 0.0]


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_nothing_asked_is_nothing_answered(loaded, method):
    assert ask(loaded, request(method, [])) == [{"id": 0, "result": []}]


def test_texts_come_in_the_order_of_the_requests(loaded):
    how = [{"until": ["\n"], "max_gen_toks": 6}, {"until": "e", "max_gen_toks": 9, "top_p": 0.5}]
    asked = [["one", how[0]], ["two", how[1]], ["three", how[0]]]
    (answer,) = ask(loaded, request("generate_until", asked))
    for (context, settings), text in zip(asked, answer["result"], strict=True):
        ids, until = np.array(list(context.encode()), np.int32), [*settings["until"]]
        alone = answers(loaded, BYTES, [ids], until, settings["max_gen_toks"], [EOS],
                        EXECUTION, 8, "test")  # fmt: skip
        assert text == alone[0].text
    assert len({*answer["result"]}) == 3


def test_what_the_model_is(loaded):
    (answer,) = ask(loaded, request("info", {}, "x"), max_length=1000)
    assert answer == {"id": "x", "result": {
        "model": "f" * 64, "tokenizer": BYTES.fingerprint, "dtype": "float32", "max_length": 48,
        "max_gen_toks": NEW_TOKENS, "chat_template": None,
    }}  # fmt: skip


def with_template(monkeypatch, name: str) -> tokenizers.Tokenizer:
    """The chat tokenizer with a template of its own, recognised as that one."""
    monkeypatch.setitem(templates.KNOWN, hashlib.sha256(b"mine").hexdigest(), name)
    return dataclasses.replace(CHAT, files={"chat_template.jinja": b"mine"})


TALK = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
USER, MODEL = "<start_of_turn>user\n", "<start_of_turn>model\n"


def test_conversations_by_the_tokenizers_own_template(loaded, monkeypatch):
    tokenizer = with_template(monkeypatch, "gemma")
    begun = [*TALK, {"role": "assistant", "content": "The answer is "}]
    lines = [
        request("info", {}),
        request("chat", {"messages": TALK}),
        request("chat", {"messages": begun, "add_generation_prompt": False}),
    ]
    info, asked, prefixed = (a["result"] for a in ask(loaded, *lines, tokenizer=tokenizer))
    bos = tokenizer.decode([cast(int, tokenizer.bos)])
    assert info["chat_template"] == "mine"
    assert asked == f"{bos}{USER}Be kind.\n\nHello<end_of_turn>\n{MODEL}"
    assert prefixed == f"{asked}The answer is"


def test_a_template_without_a_system_role_says_so(loaded, monkeypatch, capsys):
    tokenizer = with_template(monkeypatch, "gemma2")
    first, again = ask(loaded, *[request("chat", {"messages": TALK})] * 2, tokenizer=tokenizer)
    assert first == again and "Be kind." not in first["result"] and "Hello" in first["result"]
    assert capsys.readouterr().err.count("no system role") == 1


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("{\n", "not JSON"),
        ("[]\n", "a request is no JSON object"),
        (request("dance", {}), "a request needs 'id', 'args' and a 'method' of info"),
        ('{"method": []}', "a request needs"),
        (request("loglikelihood", [["a"]]), r"args\[0\] is \['a'\]"),
        (request("loglikelihood", {"a": "b"}), "must be a list of"),
        (request("loglikelihood", [["a", "b" * 49]]), "request 0 has a choice of 49 tokens"),
        (request("loglikelihood_rolling", [["a"], [1]]), r"args\[1\]"),
        (request("generate_until", [["a", {"do_sample": True}]]), "only greedy"),
        (request("generate_until", [["a", {"num_beams": 2}]]), "only greedy"),
        (request("generate_until", [["a", {"until": 3, "max_gen_toks": 2}]]), "until must be"),
        (request("generate_until", [["a", {"max_gen_toks": "2"}]]), "max_gen_toks must be"),
        (request("generate_until", [["a", {}]]), "256 new tokens leave no room"),
        (request("chat", {}), "chat needs"),
        (request("chat", {"messages": [], "add_generation_prompt": False}), "the last message"),
        (request("chat", {"messages": TALK}), "has no chat template"),
    ],
)
def test_a_bad_request_is_answered_and_the_next_one_too(loaded, line, wanted):
    bad, good = ask(loaded, line, request("info", {}, 2))
    assert re.search(wanted, bad["error"]) and "result" not in bad
    assert good["id"] == 2 and "result" in good


def test_what_was_compiled_serves_the_next_request(loaded):
    server = Server(loaded, BYTES, EXECUTION, 128, 48, None, 8)
    first = server.loglikelihood([["The sea", " is"]])
    made = server.ready[1].compilations
    assert server.loglikelihood([["The sea", " is"]]) == first
    assert server.ready[1].compilations == made


# ------------------------------------------------------------------------------------ the adapter

# What the adapter needs of lm-eval, which is not here, and a server that says what it was told.
HARNESS = {
    "__init__": "",
    "__main__": """
import json, sys, lm_eval.api.registry as registry
from lm_eval.api.instance import Instance
def cli_evaluate():
    import statistics
    how = json.loads(sys.argv[1])
    lm = registry.known["taproot"](**how)
    found = [lm.loglikelihood([Instance("a", "b"), Instance("c", "d")]),
             lm.generate_until([Instance("a", {"until": "x"})]),
             lm.apply_chat_template([{"role": "user"}], False), lm.tokenizer_name]
    print(json.dumps([found, lm.cache_hook.seen, statistics.__file__]))
    lm.server.ask("fail", {})
""",
    "api/__init__": "",
    "api/instance": """
class Instance:
    def __init__(self, *args):
        self.args = args
""",
    "api/model": """
class Hook:
    def __init__(self):
        self.seen = []
    def add_partial(self, *seen):
        self.seen.append(seen)
class LM:
    def __init__(self):
        self.cache_hook = Hook()
""",
    "api/registry": """
known = {}
def register_model(name):
    return lambda kind: known.setdefault(name, kind)
""",
    "models/__init__": "",
    "models/utils": """
def normalize_gen_kwargs(how, default):
    return {**how, "max_gen_toks": default}
""",
}
SERVER = """#!{python}
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    result = {{"info": {{"tokenizer": " ".join(sys.argv[1:]), "max_gen_toks": 7}},
              "loglikelihood": [[-1.5, True], [-2.0, False]],
              "generate_until": [json.dumps(asked["args"])], "chat": json.dumps(asked["args"]),
              }}.get(asked["method"])
    print(json.dumps({{"result": result}} if result else {{"error": "no such thing"}}), flush=True)
"""


def test_the_adapter_hands_requests_on(tmp_path):
    for name, content in HARNESS.items():
        path = tmp_path / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    server = tmp_path / "python"
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(0o755)
    adapter = str(ROOT / "evals" / "lm_eval_adapter.py")
    how = {"model": "M", "python": str(server), "add_bos": False, "max_length": 48,
           "batch_size": 1, "device": "cpu"}  # fmt: skip
    done = subprocess.run([sys.executable, adapter, json.dumps(how)], capture_output=True,
                          text=True, env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    (scores, (text,), chat, command), seen, statistics = json.loads(done.stdout)
    assert command == f"{ROOT / 'cli.py'} eval serve --model M --no-add-bos --max-length 48"
    assert scores == [[-1.5, True], [-2.0, False]]
    assert json.loads(text) == [["a", {"until": "x", "max_gen_toks": 7}]]
    assert json.loads(chat) == {"messages": [{"role": "user"}], "add_generation_prompt": False}
    assert seen[:2] == [["loglikelihood", ["a", "b"], [-1.5, True]],
                        ["loglikelihood", ["c", "d"], [-2.0, False]]]  # fmt: skip
    assert seen[2][:2] == ["generate_until", ["a", {"until": "x"}]]
    assert not Path(statistics).is_relative_to(ROOT)
    assert done.returncode and "eval serve, fail: no such thing" in done.stderr
