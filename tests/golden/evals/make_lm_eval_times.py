"""Requests a second that lm-evaluation-harness 0.4.13 and Taproot answer, on one core, in turn.

Runs in the environment of make_evals.py and starts Taproot in its own:

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 taskset -c 0 \
        python -P tests/golden/evals/make_lm_eval_times.py --model MODEL --data DATA \
        --tasks arc_easy,hellaswag --num-fewshot 3 --python TAPROOT/bin/python

MODEL is a Hugging Face folder; DATA holds local datasets as `cli.py eval run --data` reads them.
The harness makes the requests of all tasks; its own HFLM (float32, batches of 8) and
`evals/lm_eval_adapter.py` answer them, in turn: ours, the harness's, ours. Both tokenise, both are
warmed up by one round, and ours count the way through the pipe. Seconds are medians, by the clock
and of the processor. Prints JSON and makes no golden numbers; `command` is what a user would type
for the same requests.
"""

import argparse
import contextlib
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM

ROOT = Path(__file__).resolve().parents[3]
sys.path.append(str(ROOT / "evals"))  # behind the libraries, some of whose names are there too

from lm_eval_adapter import TaprootLM  # noqa: E402


class Listener(LM):
    """Keeps the requests that it is given."""

    def loglikelihood(self, requests):
        self.requests = requests
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests):
        raise SystemExit("only tasks whose requests are log-likelihoods can be timed")

    generate_until = loglikelihood_rolling


def local(data: Path) -> Callable[..., datasets.DatasetDict]:
    """`datasets.load_dataset`, but out of a folder."""

    def load(path: str, name: str | None = None, **_: Any) -> datasets.DatasetDict:
        folder = data / path.replace("/", "__") / (name or "default")
        splits = {file.stem: datasets.Dataset.from_list(list(map(json.loads, file.open())))
                  for file in folder.glob("*.jsonl")}  # fmt: skip
        splits |= {file.stem: datasets.Dataset.from_parquet(str(file))
                   for file in folder.glob("*.parquet")}  # fmt: skip
        if not splits:
            raise SystemExit(f"{folder} has no .jsonl or .parquet files")
        return datasets.DatasetDict(splits)

    return load


def processor_seconds(process: int | str) -> float:
    """What a process has had of the processor, as Linux counts it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    datasets.load_dataset = local(options.data)
    listener = Listener()
    how = {"num_fewshot": options.num_fewshot, "limit": options.limit, "bootstrap_iters": 0}
    with contextlib.redirect_stdout(sys.stderr):
        lm_eval.simple_evaluate(listener, tasks=options.tasks.split(","), **how)
    requests = listener.requests
    ours = TaprootLM(str(options.model), options.python, batch_tokens=options.batch_tokens)
    theirs = HFLM(str(options.model), device="cpu", dtype="float32", batch_size=8)
    asked: dict[str, tuple[Callable[[], Any], int | str]] = {
        "ours": (lambda: ours.loglikelihood(requests), ours.server.process.pid),
        "lm_eval": (lambda: theirs.loglikelihood(requests, disable_tqdm=True), "self"),
    }
    seconds: dict[str, list[float]] = {n: [] for name in asked for n in (name, f"{name}_cpu")}
    first, found = {}, {}
    for turn in range(options.repeats + 1):
        for name in ("ours", "lm_eval", "ours") if turn else asked:
            ask, process = asked[name]
            began, spent = time.perf_counter(), processor_seconds(process)
            found[name] = ask()
            took = time.perf_counter() - began
            if turn:
                seconds[name].append(took)
                seconds[f"{name}_cpu"].append(processor_seconds(process) - spent)
            else:
                first[name] = took
    median = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = list(zip(*found.values(), strict=True))
    command = ["cli.py", "eval", "run", "--model", options.model, "--data", options.data,
               "--tasks", options.tasks, "--out", "OUT"]  # fmt: skip
    for name in ("num_fewshot", "limit"):
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", value]
    result = {
        "model": options.model.name,
        "tasks": options.tasks,
        "num_fewshot": options.num_fewshot,
        "requests": len(requests),
        "threads": torch.get_num_threads(),
        "requests_per_second": {n: len(requests) / max(s, 1e-9) for n, s in median.items()},
        "ratio": median["lm_eval"] / median["ours"],
        "ratio_cpu": median["lm_eval_cpu"] / max(median["ours_cpu"], 1e-9),
        "first_round_seconds": first,
        "largest_difference": max(abs(a[0] - b[0]) for a, b in pairs),
        "greedy_mismatches": sum(a[1] != b[1] for a, b in pairs),
        "command": shlex.join(map(str, command)),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=lambda p: Path(p).resolve(), required=True)
    parser.add_argument("--data", type=lambda p: Path(p).resolve(), required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=int, help="items of each task")
    parser.add_argument("--python", required=True, help="the interpreter of Taproot's environment")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    main(parser.parse_args())
