"""Our benchmark numbers against recorded runs of lm-evaluation-harness 0.4.13, item by item.

    python -m tests.golden.evals.compare_runs RESULTS MODELS DATA [--tasks TOML] [--only TEXT]

RESULTS is a folder of *.json as `make_evals.py` writes them, MODELS has the model folders that they
name, DATA the rows. For each run one line: how many of the prompts, tokens, log-probabilities,
greedy flags, metrics of items, generated texts and numbers of tasks and groups are equal, and the
first few that are not. Equal is within 1e-4 nats, or 5e-7 of a long text's. An `edge` folder beside
RESULTS holds single requests. Exit status 1 if something differs. Runs in bfloat16 are shown, and
only their prompts and tokens must be equal.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha1
from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint import Loaded, load_model
from core.config import Execution
from core.files import jsonable
from evals import benchmark, outputs
from evals.benchmark import Settings
from evals.items import keep_last, rolling, tokenise
from evals.metrics import exact_match, extract
from evals.scorer import score_prompts
from evals.store import Store
from evals.tasks.catalogue import Selection, catalogue, read_task_file, select
from evals.tasks.task import Group
from tests.golden.evals.brief import brief
from tokenizers import Tokenizer, load
from tokenizers.templates import template

NATS = 1e-4
# Of a sum over a long text, relative: the harness's own float32 is off by 1.2e-7 against float64.
ROUNDING = 5e-7
LOW_NATS = 0.5  # bfloat16
BATCH_TOKENS = 2048
BATCH = 16
Sample = dict[str, Any]
KINDS = ("prompts", "tokens", "logprobs", "greedy", "metrics", "texts", "numbers")


@dataclass
class Tally:
    """How many of each kind were compared and equal, and what differs.

    worst: difference of a log-probability in nats, and of a whole text's, relative.
    """

    equal: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    total: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    worst: float = 0.0
    worst_text: float = 0.0
    differing: list[str] = field(default_factory=list)

    def check(self, kind: str, same: bool, what: object) -> None:
        self.total[kind] += 1
        self.equal[kind] += bool(same)
        if not same:
            self.differing.append(f"{kind}: {what}")

    def differs(self, kinds: Sequence[str] = KINDS) -> bool:
        return any(self.equal[kind] != self.total[kind] for kind in kinds)

    def __str__(self) -> str:
        counts = (f"{kind} {self.equal[kind]}/{self.total[kind]}" for kind in KINDS)
        worst = f"worst {self.worst:.1e} nats, of a text {self.worst_text:.1e} of its nats"
        return f"{', '.join(counts)}; {worst}"


class Outcome(NamedTuple):
    """What ours writes for a run: results.json, and the lines of samples_<task>.jsonl by task."""

    results: dict[str, Any]
    samples: dict[str, list[Sample]]


def chosen(record: Mapping[str, Any], custom: Mapping[str, Path]) -> tuple[Selection, list[str]]:
    """Our tasks and groups for a record's, and the names of which we have none."""
    tasks, groups = catalogue()
    members = record["group_subtasks"]
    names, made, unknown = [], [], []

    def add(name: str) -> None:
        if name in custom:
            names.append(str(custom[name]))
        elif name in tasks or name in groups:
            names.append(name)
        elif name in members:
            made.append(Group(name, tuple(members[name]), ("acc",)))
            for member in members[name]:
                add(member)
        else:
            unknown.append(name)

    for name in record["tasks"]:
        add(name)
    selection = select(names) if names else Selection([], [])
    return selection._replace(groups=selection.groups + made), unknown


def settings_of(
    record: Mapping[str, Any], tokenizer: Tokenizer, data: Path, chat: str | None = None
) -> Settings:
    """chat: name of the chat template; None: the tokenizer's own."""
    asked, model = record["eval_kw"], record["model_kw"]
    shots = asked.get("num_fewshot")
    return Settings(
        data=data,
        shots={} if shots is None else {"": shots},
        template=template(tokenizer, chat) if asked.get("apply_chat_template") else None,
        multiturn=asked.get("fewshot_as_multiturn", True),
        system=asked.get("system_instruction"),
        max_length=model.get("max_length"),
        add_bos=model.get("add_bos_token"),
        new_tokens=asked.get("gen_kwargs", {}).get("max_gen_toks"),
        turn_end=False,
    )


def evaluate(
    records: Sequence[Mapping[str, Any]],
    loaded: Loaded,
    tokenizer: Tokenizer,
    data: Path,
    custom: Mapping[str, Path],
    execution: Execution,
    chat: str | None = None,
) -> list[Outcome]:
    """Ours for some records of one model, all asked at once, so that little is compiled."""
    pooled, parts = [], []
    for n, record in enumerate(records):
        selection = chosen(record, custom)[0]
        settings = settings_of(record, tokenizer, data, chat)
        asked = benchmark.ask(selection.tasks, tokenizer, loaded.config.context, settings)
        parts.append((selection, settings, asked))
        for one in asked:
            new_tokens = benchmark.new_tokens(one.task, settings)
            task = replace(one.task, name=f"{n} {one.task.name}", new_tokens=new_tokens)
            pooled.append(one._replace(task=task))
    how = (Settings(turn_end=False), execution, BATCH_TOKENS, BATCH, Store(None, {}))
    answers = iter(benchmark.answer(pooled, loaded, tokenizer, *how))
    found = []
    for selection, settings, asked in parts:
        judged = [benchmark.judge(one, next(answers), settings) for one in asked]
        lines = {one.asked.task.name: outputs.samples(one, settings) for one in judged}
        results = outputs.results(judged, lines, selection.groups, loaded, tokenizer, settings, {})
        found.append(Outcome(*json.loads(json.dumps(jsonable((results, lines))))))
    return found


def compare(
    record: Mapping[str, Any], ours: Outcome, skipped: Sequence[str] = (), low: bool = False
) -> Tally:
    """Count what of a record ours repeats, but of the tasks `skipped`. low: it is in bfloat16."""
    tally = Tally()
    for task, wanted in record["samples"].items():
        if task in skipped:
            continue
        lines = ours.samples.get(task, [])
        found = {(line["doc_id"], line["filter"]): line for line in lines}
        tally.check("prompts", len(found) == len(wanted), f"{task}: {len(found)} samples")
        for sample in wanted:
            where = f"{task} {sample['doc_id']}"
            line = found.get((sample["doc_id"], sample["filter"]))
            if line is None:
                tally.check("prompts", False, f"{where} is missing")
            else:
                _compare_asked(tally, record, sample, line, where)
                _compare_answer(tally, sample, line, where, low)
    for name, numbers in record["results"].items():
        if name not in skipped:
            mine = ours.results["results"].get(name, {})
            _compare_numbers(tally, numbers, mine, name, low)
        if name in record["samples"] and name not in skipped:
            mine, shots = ours.results["n-shot"].get(name), record["n_shot"][name]
            tally.check("numbers", mine == shots, f"shots of {name}: {mine} for {shots}")
    return tally


def _compare_asked(
    tally: Tally, record: Mapping[str, Any], sample: Sample, line: Sample, where: str
) -> None:
    """Text and tokens, where the record has them."""
    length = record["max_length"]
    room = length - record["eval_kw"].get("gen_kwargs", {}).get("max_gen_toks", 0)
    contexts = [arguments["arg_0"] for arguments in line["arguments"].values()]
    if "context" in sample:
        context = contexts[0] if len({*contexts}) == 1 else contexts
        tally.check("prompts", _same(context, sample["context"]), f"{where}: {context!r}")
    if "continuation" in sample and not isinstance(sample["continuation"][0], dict):
        found = [arguments["arg_1"] for arguments in line["arguments"].values()]
        tally.check("prompts", found == sample["continuation"], f"{where}: {found}")
    before, after = line["ctx_tokens"], line["cont_tokens"]
    before = before * len(after) if len(before) == 1 else before
    if "cont_tokens" in sample and "context" not in sample:  # a long text in windows
        whole, wanted = [i for ids in after for i in ids], sample["cont_tokens"]
        wanted = wanted[0] if isinstance(wanted, list) and isinstance(wanted[0], list) else wanted
        tally.check("tokens", _same(whole, wanted), f"{where}: {len(whole)} tokens")
        return
    if "cont_tokens" in sample:
        tally.check("tokens", after == sample["cont_tokens"], f"{where}: {after}")
    one = before[0] if all(ids == before[0] for ids in before) else before
    wanted = sample.get("ctx_tokens")
    if isinstance(wanted, list):
        # Of every continuation, and what was tokenised rather than what was read.
        several = wanted if wanted and isinstance(wanted[0], list) else [wanted] * len(before)
        rooms = [length + 1 - len(ids) for ids in after] if "cont_tokens" in sample else [room]
        read = [ids[-room:] for ids, room in zip(several, rooms, strict=True)]
        tally.check("tokens", before == read, f"{where}: {before}")
    elif wanted is not None:
        tally.check("tokens", _same(one, wanted), f"{where}: {one}")
    if "ctx_tokens_sha1" in sample:
        digest = sha1(json.dumps(one).encode()).hexdigest()
        tally.check("tokens", digest == sample["ctx_tokens_sha1"], f"{where}: {one}")


def _same(found: Any, wanted: Any) -> bool:
    return found == wanted or brief(found) == wanted


def _compare_answer(tally: Tally, sample: Sample, line: Sample, where: str, low: bool) -> None:
    if "resps" in sample and isinstance(sample["resps"][0][0], str):
        found, wanted = line["resps"][0][0], sample["resps"][0][0]
        tally.check("texts", found == wanted, f"{where}: {found!r} for {wanted!r}")
        found, wanted = line["filtered_resps"], sample["filtered_resps"]
        tally.check("metrics", found == wanted, f"{where}: read {found!r} for {wanted!r}")
    else:
        for found, wanted in zip(line["filtered_resps"], sample["filtered_resps"], strict=True):
            _compare_score(tally, found, wanted, where, low)
    for metric, wanted in sample["metrics"].items():
        found = line.get(metric)
        if isinstance(wanted, list):  # (nats, what they are divided by)
            same = found is not None and found[1] == wanted[1] and _near(found[0], wanted[0], low)
        elif metric == "perplexity":
            same = found is not None and _near(found, wanted, low)
        else:
            same = found == wanted
        tally.check("metrics", same, f"{where}: {metric} {found} for {wanted}")


def _compare_score(tally: Tally, found: Any, wanted: Any, where: str, low: bool) -> None:
    if isinstance(wanted, list):
        tally.check("greedy", found[1] == wanted[1], f"{where}: {found[1]} for {wanted[1]}")
        found, wanted = found[0], wanted[0]
        tally.worst = max(tally.worst, abs(found - wanted))
    else:
        tally.worst_text = max(tally.worst_text, abs(found / wanted - 1))
    tally.check("logprobs", _near(found, wanted, low), f"{where}: {found} for {wanted}")


def _near(found: float, wanted: float, low: bool) -> bool:
    limit = LOW_NATS if low else NATS
    return abs(found - wanted) <= max(limit, abs(wanted) * (1e-3 if low else ROUNDING))


def _compare_numbers(
    tally: Tally, wanted: dict[str, Any], found: dict[str, Any], where: str, low: bool
) -> None:
    for key, number in wanted.items():
        if "," not in key and key != "sample_len":
            continue
        exact = "perplexity" not in key and "bits" not in key
        limit = 3e-2 if low else 1e-9 if exact else 1e-4
        mine = found.get(key)
        same = mine == number
        if isinstance(number, float) and isinstance(mine, float | int):
            same = math.isclose(mine, number, rel_tol=limit, abs_tol=1e-12)
        tally.check("numbers", same, f"{where}: {key} {mine} for {number}")


def compare_edge(edge: Mapping[str, Any], loaded: Loaded, tokenizer: Tokenizer) -> Tally:
    """Single requests and long texts. Where theirs fails, ours must answer (docs, deviations)."""
    tally, length = Tally(), edge["max_length"]
    bos = edge["model_kw"].get("add_bos_token")
    long = edge["long_unit"] * edge["long_text_repeats"]
    asked = []
    for n, request in enumerate(edge["singly"]):
        context = long if request["context"] is None else request["context"]
        text = request["continuation"] or long[: request["n_chars"][1]]
        (whole,) = tokenise(tokenizer, context, [text], bos)
        asked.append(keep_last(whole, length + 1, f"request {n}"))
        if "error" in request:
            continue
        sizes = [whole.start, len(whole.ids) - whole.start]
        tally.check("tokens", sizes == [request["n_ctx"], request["n_cont"]], f"{n}: {sizes}")
        for ids, key in ((whole.ids[: whole.start], "ctx"), (whole.ids[whole.start :], "cont")):
            if request[f"{key}_tokens"] is not None:
                same = ids.tolist() == request[f"{key}_tokens"]
                tally.check("tokens", same, f"{n}: {key} {ids.tolist()}")
    texts = [request["text"] or long[: request["n_chars"]] for request in edge["rolling"]]
    windows = [rolling(tokenizer, text, length, bos) for text in texts]
    every = [*asked, *(window for some in windows for window in some)]
    scores = iter(score_prompts(loaded, every, Execution(), BATCH_TOKENS, "edge", Store(None, {})))
    for n, request in enumerate(edge["singly"]):
        score = next(scores)
        if "error" in request:
            tally.check("logprobs", math.isfinite(score.logprob), f"{n}: {score}")
        else:
            wanted = [request["loglikelihood"], request["is_greedy"]]
            _compare_score(tally, [*score], wanted, f"request {n}", False)
    for n, (request, some) in enumerate(zip(edge["rolling"], windows, strict=True)):
        sizes = [[w.start, len(w.ids) - w.start] for w in some]
        tally.check("tokens", sizes == request["windows"], f"text {n}: {sizes}")
        total = sum(next(scores).logprob for _ in some)
        _compare_score(tally, total, request["loglikelihood"], f"text {n}", False)
    return tally


def compare_extraction(cases: Mapping[str, Any]) -> Tally:
    """How gsm8k reads numbers out of responses."""
    tally, task = Tally(), catalogue()[0]["gsm8k"]
    for case in cases["cases"]:
        for one in task.filters:
            found, wanted = extract(one, case["response"]), case[one.name]
            what = f"{case['response']!r}: {found!r}"
            tally.check("texts", found == wanted["extracted"], what)
            for gold, text in cases["gold"].items():
                right = exact_match(task.exact_match, found, text)
                tally.check("metrics", right == wanted["exact_match"][gold], f"{what} for {gold}")
    return tally


def report(name: str, tally: Tally, note: str = "", gate: Sequence[str] = KINDS) -> bool:
    bad = tally.differs(gate)
    print(f"{'DIFF' if bad else 'ok  '} {name}: {tally}{note}")
    for line in tally.differing[:5]:
        print(f"     {line[:300]}")
    sys.stdout.flush()
    return bad


def main(arguments: argparse.Namespace) -> int:
    custom = {}
    for path in arguments.tasks:
        tasks, groups = read_task_file(path)
        custom |= dict.fromkeys([*tasks, *groups], path)
    records: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for path in sorted(arguments.results.glob("*.json")):
        if arguments.only in path.stem:
            record = json.loads(path.read_text("utf-8"))
            low = record["model_kw"].get("dtype") == "bfloat16"
            records.setdefault((record["model"], low), []).append(record)
    bad = False
    for (name, low), of_model in records.items():
        loaded, tokenizer = model(arguments.models / name)
        execution = Execution(dtype="bfloat16" if low else "float32")
        found = evaluate(of_model, loaded, tokenizer, arguments.data, custom, execution)
        for record, ours in zip(of_model, found, strict=True):
            unknown = chosen(record, custom)[1]
            note = f"; no task {', '.join(unknown)}" if unknown else ""
            gate = ("prompts", "tokens") if low else KINDS
            bad |= report(record["run"], compare(record, ours, unknown, low), note, gate)
    for path in sorted((arguments.results.parent / "edge").glob("*.json")):
        if arguments.only in path.stem:
            content = json.loads(path.read_text("utf-8"))
            if "model" in content:
                tally = compare_edge(content, *model(arguments.models / content["model"]))
            else:
                tally = compare_extraction(content)
            bad |= report(f"edge {path.stem}", tally)
    return int(bad)


def model(folder: Path) -> tuple[Loaded, Tokenizer]:
    loaded = load_model(folder)
    assert loaded.tokenizer is not None, f"{folder} has no tokenizer"
    return loaded, load(loaded.tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("results", "models", "data"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="TOML files of tasks")
    parser.add_argument("--only", default="", help="text that the names of the runs have")
    sys.exit(main(parser.parse_args()))
