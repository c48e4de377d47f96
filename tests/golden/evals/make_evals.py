"""Expected answers to benchmark questions from lm-evaluation-harness itself, item by item.

Needs an environment of its own (see ../README.md), and `-P`, because the project's `tokenizers/`
would shadow the library that transformers imports:

    HF_HUB_OFFLINE=1 python -P tests/golden/evals/make_evals.py [RUN...]    all runs, or some

Without names it first makes, beside this file,

    data/ORG__NAME/CONFIG/SPLIT.jsonl   the rows of benchmark_rows.py
    models/NAME/                        see make_models.py

and then expected/RUN.json, in float32 on a CPU:

    run, model, model_kw, eval_kw, tasks   what lm-eval was asked (`HFLM`, `simple_evaluate`)
    max_length, n_shot, results, group_subtasks   as it says
    samples   {task: by filter and item [{
        doc_id, filter, metrics
        context         one, or one for each continuation
        continuation    of each request
        ctx_tokens, cont_tokens    as read, after any cut; of a rolling task those of the whole text
        filtered_resps  [log-probability, greedy] each, or a text's log-probability, or what the
                        filter found in a generated text, which is `resps`
    }]}

where `brief.py` may have shortened context and tokens. The harness's own task files are used as
they are, on a local stand-in for the Hub; tasks/*.yaml are those that it lacks, tasks/*.toml ours.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # behind the libraries; -P leaves it out
sys.path.append(str(HERE.parent / "chat"))

import datasets  # noqa: E402
import lm_eval  # noqa: E402
import torch  # noqa: E402
from benchmark_rows import CATEGORIES, SUBJECTS, Row, addition, benchmarks  # noqa: E402
from brief import brief  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from make_chat import gemma as gemma_template  # noqa: E402
from make_models import CONFIGS, assemble, make_model  # noqa: E402

INSTALLED = Path(lm_eval.__file__).parent / "tasks"


def task_files(folder: Path) -> None:
    """What lm-eval does not ship: tasks/*.yaml with paths filled in, categories, groups."""

    def write(name: str, text: str) -> None:
        filled = text.replace("INSTALLED", str(INSTALLED)).replace("DATA", str(HERE / "data"))
        (folder / f"{name}.yaml").write_text(filled)

    written = {path.stem: path.read_text() for path in (HERE / "tasks").glob("*.yaml")}
    category = written.pop("wmdp_bio_robust")
    for name, text in written.items():
        write(name, text)
    for name in CATEGORIES:
        write(name, f"{category}task: wmdp_bio_robust_{name}\ndataset_name: {name}\n")
    subjects = [f"mmlu_{subject}" for subject in SUBJECTS]
    groups = {
        "wmdp_bio_robust": [f"wmdp_bio_robust_{name}" for name in CATEGORIES],
        "mmlu_few": ["mmlu_few_first", "mmlu_few_rest"],
        "mmlu_few_first": subjects[:3],
        "mmlu_few_rest": subjects[3:],
    }
    for name, members in groups.items():
        weighed = "aggregate_metric_list: [{metric: acc, weight_by_size: True}]"
        write(f"group_{name}", f"group: {name}\ntask: [{', '.join(members)}]\n{weighed}\n")


def write_data(hub: Path) -> None:
    """data/ and the same rows as local datasets of their Hub names under `hub`."""
    shutil.rmtree(HERE / "data", ignore_errors=True)

    def lines(path: Path, rows: list[Row]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")

    for name, configs in benchmarks().items():
        card = "---\nconfigs:\n"
        for config, splits in configs.items():
            card += f"- config_name: {config}\n  data_files:\n"
            folder = hub / name / config
            folder.mkdir(parents=True)
            for split, rows in splits.items():
                lines(HERE / "data" / name.replace("/", "__") / config / f"{split}.jsonl", rows)
                dataset = datasets.Dataset.from_list(rows)
                if name == "cais/mmlu":
                    labels = datasets.ClassLabel(names=["A", "B", "C", "D"])
                    dataset = dataset.cast_column("answer", labels)
                dataset.to_parquet(folder / f"{split}.parquet")
                card += f"  - split: {split}\n    path: {config}/{split}.parquet\n"
        (hub / name / "README.md").write_text(card + "---\n")
    lines(HERE / "data" / "EleutherAI__arithmetic" / "two_digit_addition.jsonl", addition(4))


SCORED = ["arc_easy", "arc_challenge", "hellaswag", "winogrande", "piqa", "lambada_openai",
          "wikitext", "wmdp_bio", "wmdp_bio_robust", "wmdp_bio_cloze_verified", "mmlu_few",
          "arithmetic_2da"]  # fmt: skip
SHOWN = ["arc_easy", "hellaswag", "winogrande", "piqa", "lambada_openai", "mmlu_few",
         "arithmetic_2da"]  # fmt: skip
TALKED = ["arc_easy", "hellaswag", "winogrande", "wmdp_bio", "lambada_openai", "mmlu_anatomy"]
PREFIXED = ["arc_easy_prefill", "arc_easy_prefill_ws"]
GENERATED = ["gsm8k", "arith_gen_2da"]
FEW = {"num_fewshot": 2}
SHORT = {"gen_kwargs": {"max_gen_toks": 40}}
CHAT = {"apply_chat_template": True, "fewshot_as_multiturn": True}
# name: model, tasks, what HFLM and what simple_evaluate are told
RUNS: dict[str, tuple[str, list[str], dict[str, Any], dict[str, Any]]] = {
    **{f"{m}_0shot": (m, SCORED, {}, {}) for m in CONFIGS},
    **{f"{m}_3shot": (m, SHOWN, {}, {"num_fewshot": 3}) for m in CONFIGS},
    **{f"{m}_gen": (m, GENERATED, {}, FEW | SHORT) for m in CONFIGS},
    "gpt2_bos": ("gpt2", ["arc_easy", "wikitext"], {"add_bos_token": True}, {}),
    "gpt2_cut": ("gpt2", ["arc_easy", "wmdp_bio", "wikitext"], {"max_length": 48}, {}),
    "gpt2_gen_cut": ("gpt2", ["gsm8k"], {"max_length": 128}, FEW | SHORT),
    "gemma_cut": ("gemma", ["arc_easy", "wmdp_bio", "wikitext"], {"max_length": 48}, {}),
    "gemma_no_bos": ("gemma", ["arc_easy", "wikitext"], {"add_bos_token": False}, {}),
    "gemma_prefix": ("gemma", PREFIXED, {}, FEW),
    "gemma_chat": ("gemma", TALKED, {}, CHAT),
    "gemma_chat_2shot": ("gemma", TALKED, {}, CHAT | FEW),
    "gemma_chat_one_turn": (
        "gemma",
        TALKED,
        {},
        FEW | {**CHAT, "fewshot_as_multiturn": False, "system_instruction": "You are careful."},
    ),
    "gemma_chat_prefix": ("gemma", PREFIXED, {}, CHAT | FEW),
    "gemma_chat_gen": ("gemma", ["gsm8k"], {}, CHAT | FEW | SHORT),
}


class Recorded(HFLM):
    """Keeps what tokens it scored or read, by task, item and request."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens: dict[tuple, tuple[list[int], list[int]]] = {}

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        self.requests = [(list(context), list(rest)) for _, context, rest in requests]
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def loglikelihood(self, requests, disable_tqdm=True):
        found = super().loglikelihood(requests, disable_tqdm=True)
        for one, (context, rest) in zip(requests, self.requests, strict=True):
            room = self.max_length + 1 - len(rest)
            self.tokens[one.task_name, one.doc_id, one.idx] = context[-room:], rest
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=True):
        for one in requests:
            whole = self.tok_encode(one.args[0])
            self.tokens[one.task_name, one.doc_id, one.idx] = [], whole
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests, disable_tqdm=True):
        for one in requests:
            room = self.max_length - one.args[1]["max_gen_toks"]
            read = self.tok_encode(one.args[0])[-room:]
            self.tokens[one.task_name, one.doc_id, one.idx] = read, []
        return super().generate_until(requests, disable_tqdm=True)


def sample(model: Recorded, task: str, kind: str, found: dict[str, Any]) -> dict[str, Any]:
    """One item under one filter. Text and tokens stand at the first filter only."""
    kept = {key: found[key] for key in ("doc_id", "filter", "filtered_resps")}
    kept["metrics"] = {name: found[name] for name in found["metrics"]}
    if kind == "generate_until":
        kept["resps"] = found["resps"]
    arguments = found["arguments"]
    tokens = [model.tokens[task, found["doc_id"], i] for i in range(len(arguments))]
    contexts, parts = [a[0] for a in arguments], [ids for ids, _ in tokens]
    if kind == "loglikelihood_rolling":
        return kept | {"cont_tokens": brief(tokens[0][1])}
    kept["context"] = brief(contexts[0] if len({*contexts}) == 1 else contexts)
    kept["ctx_tokens"] = brief(parts[0] if all(ids == parts[0] for ids in parts) else parts)
    if kind != "generate_until":
        kept["continuation"] = [a[1] for a in arguments]
        kept["cont_tokens"] = [ids for _, ids in tokens]
    return kept


def run(name: str, model: Recorded, manager: TaskManager) -> None:
    folder, tasks, model_kw, eval_kw = RUNS[name]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, log_samples=True, **eval_kw
        )
    wanted = ("name", "alias", "sample_count")
    record = {
        "run": name,
        "model": folder,
        "model_kw": model_kw,
        "eval_kw": eval_kw,
        "tasks": tasks,
        "max_length": model.max_length,
        "n_shot": found["n-shot"],
        "results": {
            task: {key: value for key, value in numbers.items() if key not in wanted}
            for task, numbers in found["results"].items()
        },
        "group_subtasks": found["group_subtasks"],
        "samples": {
            task: [sample(model, task, found["configs"][task]["output_type"], s) for s in samples]
            for task, samples in found["samples"].items()
        },
    }
    path = HERE / "expected" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    lines = json.dumps(record, ensure_ascii=False, default=lambda number: number.item())
    path.write_text(lines + "\n", encoding="utf-8")
    every = [s for samples in record["samples"].values() for s in samples]
    greedy = [r[1] for s in every for r in s["filtered_resps"] if isinstance(r, list | tuple)]
    scores = [[r[0] for r in s["filtered_resps"]] for s in every if len(s["filtered_resps"]) > 1]
    margin = min((b - a for a, b in (sorted(some)[-2:] for some in scores)), default=1.0)
    print(f"{name}: {len(every)} items, {sum(greedy)} of {len(greedy)} greedy, smallest margin "
          f"{margin:.0e}, {path.stat().st_size:,} bytes", flush=True)  # fmt: skip
    assert margin > 1e-3, "an item that rounding may decide"


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for part in ("hub", "tasks", "models"):
            (scratch / part).mkdir()
        write_data(scratch / "hub")
        if not names:
            for name in CONFIGS:
                make_model(name)
        task_files(scratch / "tasks")
        shipped = ("arc", "hellaswag", "winogrande", "piqa", "mmlu/default", "wmdp", "lambada",
                   "wikitext", "gsm8k")  # fmt: skip
        paths = [str(INSTALLED / folder) for folder in shipped] + [str(scratch / "tasks")]
        os.chdir(scratch / "hub")
        # A cache elsewhere would serve the rows of an earlier making.
        datasets.config.HF_DATASETS_CACHE = scratch / "cache"
        manager = TaskManager(include_path=paths, include_defaults=False)
        for name in CONFIGS:
            assemble(name, scratch / "models")
        for name in names or RUNS:
            folder, _, options, _ = RUNS[name]
            model = Recorded(
                pretrained=str(scratch / "models" / folder),
                device="cpu",
                dtype="float32",
                batch_size=8,
                **options,
            )
            model.tokenizer.chat_template = (
                gemma_template(False)
                .replace("{% generation %}", "")
                .replace("{% endgeneration %}", "")
            )
            run(name, model, manager)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUNS)}")
    main(parser.parse_args().names)
