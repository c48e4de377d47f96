"""`eval run --tasks`, `list`, `compare`, `serve`, `data query --tasks`, `train lm --eval-tasks`."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import click.testing
import pytest

import cli as door
from core.files import read_json, read_jsonl
from core.rows import load_rows
from evals.store import Store
from tokenizers import load

DOOR = Path(__file__).parents[2] / "cli.py"
GOLDEN = Path(__file__).parents[1] / "golden" / "evals"
DATA = ["--data", GOLDEN / "data"]
RUN = ["eval", "run", "--model", "./gpt2", *DATA, "--bootstrap", 1000, "--batch-tokens", 512]
TASKS = ["--tasks", "arc_easy,winogrande,lambada_openai"]
# What readers of the harness's files look for.
KEYS = {"results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better",
        "n-samples", "config", "model_name", "max_length", "task_hashes"}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory, run):
    """A finished run of three tasks, with its store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("benchmarks"))
        shutil.copytree(GOLDEN / "models" / "gpt2", "gpt2")
        shutil.copytree(GOLDEN.parent / "tokenizers" / "gpt2", "gpt2", dirs_exist_ok=True)
        Path("said").write_text(run(*RUN, *TASKS, "--store", "store.jsonl", "--out", "runs/a"))
        yield Path.cwd()


def files(folder: str) -> dict[str, bytes]:
    """What a run found; not how it was asked."""
    found = [Path(folder) / "results.json", *Path(folder).glob("samples_*.jsonl")]
    return {path.name: path.read_bytes() for path in found}


def test_a_run_has_the_harness_s_shape(world, run):
    results = read_json("runs/a/results.json")
    assert results.keys() >= KEYS
    expected = read_json(GOLDEN / "expected" / "gpt2_0shot.json")["results"]
    for task in ("arc_easy", "winogrande", "lambada_openai"):
        for key, value in results["results"][task].items():
            if "perplexity" not in key and "," in key:
                assert value == pytest.approx(expected[task][key], abs=1e-12), (task, key)
    spread = "perplexity_stderr,none"  # of 1,000 resamples, where the harness took 100,000
    found, known = (r["lambada_openai"][spread] for r in (results["results"], expected))
    assert found != known and found == pytest.approx(known, rel=0.2)
    lines = read_jsonl("runs/a/samples_arc_easy.jsonl")
    assert [line["doc_id"] for line in lines] == list(range(len(lines)))
    first = lines[0]
    assert first["arguments"]["gen_args_1"]["arg_1"] == f" {first['doc']['choices']['text'][1]}"
    assert all(type(ll) is float and type(greedy) is bool for ll, greedy in first["filtered_resps"])
    assert first["acc"] in (0.0, 1.0) and len(first["cont_tokens"]) == len(first["resps"])
    assert "arc_easy" in Path("said").read_text() and "acc_norm" in Path("said").read_text()
    assert "already done" in run(*RUN, *TASKS, "--store", "store.jsonl", "--out", "runs/a")


def test_a_repeated_run_asks_nothing(world, run, monkeypatch):
    monkeypatch.setattr(Store, "add", lambda *_: pytest.fail("something was asked"))
    run(*RUN, *TASKS, "--store", "store.jsonl", "--out", "runs/again")
    assert files("runs/again") == files("runs/a")


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(world, run, monkeypatch):
    kept, add = [], Store.add

    def add_once(self, pairs):
        if kept:
            raise KeyboardInterrupt
        kept.append(add(self, pairs))

    line = [*RUN, *TASKS, "--store", "other.jsonl", "--out", "runs/killed"]
    monkeypatch.setattr(Store, "add", add_once)
    killed = click.testing.CliRunner().invoke(door.cli, [str(a) for a in line])
    assert killed.exit_code == 130 and not Path("runs/killed/results.json").exists()
    before = Path("other.jsonl").stat().st_size
    monkeypatch.setattr(Store, "add", add)
    run(*line)
    assert files("runs/killed") == files("runs/a")
    assert 0 < before < Path("other.jsonl").stat().st_size == Path("store.jsonl").stat().st_size


def test_generated_answers_shots_limits_and_the_first_request(world, run):
    said = run(*RUN, "--tasks", "gsm8k,arc_easy", "--num-fewshot", "arc_easy=2,gsm8k=1", "--limit",
               2, "--max-new-tokens", 4, "--write-out", "--out", "runs/few")  # fmt: skip
    results = read_json("runs/few/results.json")
    assert results["n-shot"] == {"gsm8k": 1, "arc_easy": 2}
    assert results["n-samples"]["gsm8k"]["effective"] == 2
    assert {"exact_match,strict-match", "exact_match,flexible-extract"} <= {
        *results["results"]["gsm8k"]
    }
    (first, *_), (strict, *_) = (
        read_jsonl(f"runs/few/samples_{t}.jsonl") for t in ("arc_easy", "gsm8k")
    )
    shown = first["arguments"]["gen_args_0"]["arg_0"]
    assert shown.count("Question:") == 3 and shown in said
    assert len(strict["resp_tokens"]) <= 4 and strict["filter"] == "strict-match"


def test_tasks_of_one_s_own_and_groups(world, run, refuse):
    Path("mine.jsonl").write_text('{"q": "two", "options": ["a", "b"], "right": 1}\n' * 3)
    task = {"name": "mine", "kind": "multiple_choice", "dataset": "mine.jsonl", "split": "test",
            "prompt": "{q}:", "choices": "{options}", "answer": "{right}"}  # fmt: skip
    Path("mine.json").write_text(json.dumps(task))
    run(*RUN, "--tasks", "mine.json,wmdp_bio_robust", "--out", "runs/mine")
    results = read_json("runs/mine/results.json")
    assert results["n-samples"]["mine"] == {"original": 3, "effective": 3}
    expected = read_json(GOLDEN / "expected" / "gpt2_0shot.json")["results"]["wmdp_bio_robust"]
    assert results["groups"]["wmdp_bio_robust"]["acc,none"] == pytest.approx(expected["acc,none"])
    Path("mine.json").write_text(json.dumps(task | {"metric": "acc"}))
    assert "'metric'" in refuse(*RUN, "--tasks", "mine.json", "--out", "runs/none")
    assert not Path("runs/none").exists()


def test_two_runs_are_compared(world, run, refuse):
    run(*RUN, *TASKS, "--dtype", "bfloat16", "--out", "runs/b")
    said = run("eval", "compare", "runs/a", "runs/b", "--resamples", 200, "--out", "compared.json")
    rows = read_json("compared.json")["rows"]
    assert {row["task"] for row in rows} == {"arc_easy", "winogrande", "lambada_openai"}
    assert "arc_easy" in said and "no difference shown" in said
    assert "runs/none" in refuse("eval", "compare", "runs/a", "runs/none")


def test_tasks_are_listed(world, run, refuse):
    said = run("eval", "list", "--tasks", "mmlu,gsm8k")
    assert "mmlu_anatomy" in said and "1,319" in said and "group mmlu:" in said
    assert len(run("eval", "list").splitlines()) > 80
    assert "hellaswag" in refuse("eval", "list", "--tasks", "helaswag")


@pytest.mark.parametrize(
    "options, wanted",
    [
        ([], "either --tasks or --items"),
        (["--tasks", "arc_esy"], "arc_easy"),
        (["--tasks", "arc_easy", "--num-fewshot", "many"], "'many'"),
        (["--tasks", "arc_easy", "--system-instruction", "Be kind."], "--apply-chat-template"),
        (["--tasks", "arc_easy", "--apply-chat-template"], "chat template"),
        (["--tasks", "arc_easy", "--data", "nowhere"], "nowhere"),
        (["--tasks", "gsm8k", "--max-new-tokens", 5000], "5000 new tokens"),
        (["--tasks", "arc_easy", "--max-length", 2], "at most 2 fit"),
    ],
)
def test_bad_input_ends_before_work_begins(world, refuse, options, wanted):
    assert wanted in refuse(*RUN, *options, "--out", "runs/bad")
    assert not Path("runs/bad").exists()


def test_training_examples_become_query_rows(world, run, refuse):
    asked = ["data", "query", *DATA, "--tasks", "winogrande,arc_easy", "--tokenizer", "./gpt2"]
    run(*asked, "--n", 2, "--add-eos", "--out", "rows/query")
    rows = load_rows(Path("rows/query"))
    assert rows.column("task") == ["winogrande"] * 2 + ["arc_easy"] * 2
    tokenizer = load("./gpt2")
    for i in range(len(rows)):
        trained = rows.labels(i)[rows.labels(i) >= 0].tolist()
        assert trained[-1] == tokenizer.eos and "Answer:" in tokenizer.decode(rows.ids(i))
    alone = Path("data/allenai__winogrande/winogrande_xl")
    shutil.copytree(GOLDEN / "data/allenai__winogrande/winogrande_xl", alone)
    (alone / "validation.jsonl").unlink()
    line = ["data", "query", "--data", "data", "--tasks", "winogrande", "--tokenizer", "bytes"]
    told = click.testing.CliRunner().invoke(door.cli, [*line, "--out", "rows/unchecked"])
    assert told.exit_code == 0 and "were not looked for" in told.stderr
    refused = refuse(*asked, "--split", "validation", "--out", "rows/none")
    assert "winogrande is evaluated on the split 'validation'" in refused
    assert "--tasks" in refuse("data", "query", "--tokenizer", "bytes", "--out", "rows/none")


def test_training_logs_what_eval_run_finds_at_its_end(world, run):
    (world / "text.txt").write_text("a b c d e f g h\n" * 40)
    run("data", "text", "text.txt", "--tokenizer", "./gpt2", "--length", 16, "--out", "rows/text")
    run("train", "lm", "--model", "./gpt2", "--rows", "rows/text", "--steps", 2, "--batch", 2,
        "--eval-every", 1, "--eval-tasks", "arc_easy,wmdp_bio_robust", "--eval-data",
        GOLDEN / "data", "--out", "runs/trained")  # fmt: skip
    run(*RUN, "--model", "runs/trained", "--tasks", "arc_easy,wmdp_bio_robust", "--out", "runs/end")
    found = read_json("runs/end/results.json")["results"]
    lines = [
        line for line in read_jsonl("runs/trained/metrics.jsonl") if "eval/arc_easy/acc" in line
    ]
    assert [line["step"] for line in lines] == [1, 2]
    for name, key in (("arc_easy", "acc_norm"), ("arc_easy", "acc"), ("wmdp_bio_robust", "acc")):
        assert lines[-1][f"eval/{name}/{key}"] == pytest.approx(found[name][f"{key},none"])


def test_two_processes_ask_half_each(world, run):
    """Of two devices each; the numbers are those of one process, beyond rounding."""
    tasks = ["--tasks", "arc_easy,winogrande,gsm8k", "--num-fewshot", 1, "--limit", 4,
             "--max-new-tokens", 4, "--batch-tokens", 128]  # fmt: skip
    run(*RUN, *tasks, "--out", "runs/one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "TAPROOT_PROCESSES": "2",
                   "TAPROOT_COORDINATOR": address}  # fmt: skip
    line = [str(part) for part in (*RUN, *tasks, "--out", "runs/two")]
    started = [
        subprocess.Popen(
            [sys.executable, str(DOOR), *line], env={**environment, "TAPROOT_PROCESS": str(number)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), said
    assert ["results.json" in out for out, _ in said] == [True, False]
    asked = [re.findall(r"(\d+)/(\d+) \(100%\) .* (prompts|answers)/s", err) for _, err in said]
    assert all({unit for *_, unit in of} == {"prompts", "answers"} for of in asked), said
    for task in ("arc_easy", "winogrande", "gsm8k"):
        pairs = zip(*(read_jsonl(f"runs/{n}/samples_{task}.jsonl") for n in ("one", "two")),
                    strict=True)  # fmt: skip
        for one, two in pairs:
            assert two["doc_id"] == one["doc_id"] and two["ctx_tokens"] == one["ctx_tokens"]
            if task == "gsm8k":
                assert two["resps"] == one["resps"]
            else:
                scores = [[ll for ll, _ in line["filtered_resps"]] for line in (one, two)]
                assert scores[1] == pytest.approx(scores[0], rel=1e-5)


def test_requests_are_served_on_standard_input_and_output(world):
    asked = [{"id": 1, "method": "loglikelihood", "args": [["Question: a\nAnswer:", " b"]]},
             {"id": 2, "method": "nothing", "args": {}}]  # fmt: skip
    lines = "".join(json.dumps(line) + "\n" for line in asked)
    served = click.testing.CliRunner().invoke(
        door.cli, ["eval", "serve", "--model", "./gpt2"], input=lines
    )
    good, bad = map(json.loads, served.stdout.splitlines())
    assert good["id"] == 1 and good["result"][0][0] < 0 and "method" in bad["error"]
