"""What a benchmark run leaves behind: results.json and samples_<task>.jsonl, and tables for people.

Both files have the shape that lm-evaluation-harness 0.4.13 gives them, so that what reads those
reads these; numbers stay numbers. Under "taproot" stands what the harness does not record: model
and tokenizer by fingerprint, data by content, intervals, and all that may have spoilt a number.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from core.checkpoint import Loaded
from core.command import columns
from core.files import jsonable
from evals import metrics
from evals.benchmark import Asked, Judged, Settings, new_tokens
from evals.generation import Answer
from evals.scorer import Score
from evals.tasks.task import Group, Question, Task
from tokenizers import Tokenizer
from tokenizers.templates import own_template

OUTPUT_TYPES = {"multiple_choice": "multiple_choice", "loglikelihood": "loglikelihood",
                "rolling": "loglikelihood_rolling", "generate": "generate_until"}  # fmt: skip


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


# ----------------------------------------------------------------------------------------- samples


def samples(judged: Judged, settings: Settings) -> list[dict[str, Any]]:
    """The lines of samples_<task>.jsonl: one for each filter and item.

    ctx_tokens: of each request, or once if all requests have the same.
    """
    return [
        _sample(judged, settings, name, n)
        for name in metrics.filters(judged.asked.task)
        for n in range(len(judged.asked.questions))
    ]


def _sample(judged: Judged, settings: Settings, filter_name: str, n: int) -> dict[str, Any]:
    asked, answer = judged.asked, judged.answers[n]
    question, read = asked.questions[n], asked.prompts[n]
    measured, target = judged.of_items[n][filter_name], _target(question)
    arguments = _arguments(asked.task, question, settings)
    contexts = [prompt.ids[: prompt.start] for prompt in read]
    doc = json.dumps(jsonable(question.doc.row), indent=2, ensure_ascii=False)
    return {
        "doc_id": question.doc.index,
        "doc": question.doc.row,
        "target": target,
        "arguments": {
            f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(of_request)}
            for i, of_request in enumerate(arguments)
        },
        **_responses(asked.task, answer, measured.extracted),
        "filter": filter_name,
        "metrics": [*measured.values],
        **measured.values,
        "doc_hash": sha(doc),
        "prompt_hash": sha(arguments[0][0]),
        "target_hash": sha(str(target)),
        "ctx_tokens": contexts[:1] if len({*map(bytes, contexts)}) == 1 else contexts,
        "cont_tokens": [prompt.ids[prompt.start :] for prompt in read],
        "truncated": asked.truncated[n],
        "alone": asked.alone[n],
        "answer_logprob": measured.answer_logprob,
        "margins": measured.margins,
    }


def _target(question: Question) -> int | str:
    doc = question.doc
    return doc.target if doc.target or doc.gold is None else doc.gold


def _arguments(task: Task, question: Question, settings: Settings) -> list[tuple[Any, ...]]:
    """Of each request, what the harness calls its arguments."""
    if task.kind == "rolling":
        return [(text,) for text in question.continuations]
    if task.kind == "generate":
        return [(question.contexts[0], _generation(task, settings))]
    return list(zip(question.contexts, question.continuations, strict=True))


def _generation(task: Task, settings: Settings) -> dict[str, Any]:
    return {"until": task.until, "do_sample": False, "temperature": 0.0,
            "max_gen_toks": new_tokens(task, settings)}  # fmt: skip


def _responses(
    task: Task, answer: Sequence[Score] | Answer, extracted: str | None
) -> dict[str, Any]:
    if isinstance(answer, Answer):
        return {"resps": [[answer.text]], "filtered_resps": [extracted], "resp_tokens": answer.ids,
                "reason": answer.reason}  # fmt: skip
    if task.kind == "rolling":
        total = sum(score.logprob for score in answer)
        return {"resps": [[total]], "filtered_resps": [total]}
    return {"resps": [[score] for score in answer], "filtered_resps": answer}


# ----------------------------------------------------------------------------------------- results


def results(
    judged: Sequence[Judged],
    lines: Mapping[str, Sequence[Mapping[str, Any]]],
    groups: Sequence[Group],
    loaded: Loaded,
    tokenizer: Tokenizer,
    settings: Settings,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """results.json. lines: of each task, see `samples`. about: further keys of "config"."""
    tasks = {one.asked.task.name: one for one in judged}
    members = {group.name: list(group.members) for group in groups}
    of_tasks = {name: _task_result(one) for name, one in tasks.items()}
    of_groups = metrics.aggregate_groups(groups, of_tasks)
    shots = {name: one.asked.shots for name, one in tasks.items()}
    template = settings.template
    source = own_template(tokenizer) if template else None
    words = {role: _word(tokenizer, getattr(tokenizer, role)) for role in ("bos", "eos")}
    return {
        "results": of_tasks | of_groups,
        "groups": of_groups,
        "group_subtasks": members,
        "configs": {name: _config(one.asked, settings) for name, one in tasks.items()},
        "versions": {name: one.asked.task.version for name, one in tasks.items()}
        | {group.name: group.version for group in groups},
        "n-shot": shots | {g: shots[some[0]] for g, some in members.items() if some[0] in shots},
        "higher_is_better": {
            name: {metric: metric in metrics.SHARES for metric in one.asked.task.metrics}
            for name, one in tasks.items()
        },
        "n-samples": {
            name: {"original": one.asked.size, "effective": len(one.asked.questions)}
            for name, one in tasks.items()
        },
        "config": {
            "model": "taproot",
            "limit": settings.limit,
            "bootstrap_iters": settings.bootstrap,
            "fewshot_seed": settings.seed,
            **about,
        },
        "max_length": settings.length(loaded.config.context),
        "tokenizer_bos_token": words["bos"],
        "tokenizer_eos_token": words["eos"],
        "eot_token_id": tokenizer.eos,
        "task_hashes": {name: _task_hash(of_task) for name, of_task in lines.items()},
        "model_source": "taproot",
        "model_name": about.get("model_name"),
        "system_instruction": settings.system,
        "system_instruction_sha": settings.system and sha(settings.system),
        "fewshot_as_multiturn": bool(template and settings.multiturn),
        "chat_template": source,
        "chat_template_sha": source and sha(source),
        "taproot": {
            "model": loaded.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "chat_template": template and template.name,
            "warnings": list(dict.fromkeys(w for one in judged for w in one.asked.warnings)),
            "tasks": {name: _told(one) for name, one in tasks.items()},
            "intervals": {
                name: metrics.intervals(result) for name, result in (of_tasks | of_groups).items()
            },
        },
    }


def _task_result(one: Judged) -> dict[str, Any]:
    task = one.asked.task
    return {
        "alias": task.alias or task.name,
        "name": task.name,
        "sample_len": len(one.asked.questions),
        **one.summary,
    }


def _word(tokenizer: Tokenizer, i: int | None) -> list[Any] | None:
    return None if i is None else [tokenizer.decode([i]), i]


def _config(asked: Asked, settings: Settings) -> dict[str, Any]:
    """A task in the harness's words; templates stay in ours."""
    task = asked.task
    found = {
        "task": task.name,
        "dataset_path": task.dataset,
        "dataset_name": task.config,
        "test_split": task.split,
        "fewshot_split": task.pool,
        "output_type": OUTPUT_TYPES[task.kind],
        "description": task.description,
        "doc_to_text": task.prompt,
        "doc_to_choice": task.choices,
        "doc_to_target": task.answer if task.answer is not None else task.target,
        "target_delimiter": task.delimiter,
        "fewshot_delimiter": task.shot_delimiter,
        "gen_prefix": task.prefix or None,
        "num_fewshot": asked.shots,
        "repeats": 1,
        "metric_list": [
            {"metric": name, "higher_is_better": name in metrics.SHARES} for name in task.metrics
        ],
        "generation_kwargs": _generation(task, settings) if task.kind == "generate" else None,
        "filter_list": [one._asdict() for one in task.filters] or None,
        "metadata": {"version": task.version},
    }
    return {key: value for key, value in found.items() if value is not None}


def _task_hash(lines: Sequence[Mapping[str, Any]]) -> str:
    keys = ("doc_hash", "prompt_hash", "target_hash")
    return sha("".join(line[key] for line in lines for key in keys))


def _told(one: Judged) -> dict[str, Any]:
    """What a reader of the numbers should know of a task."""
    asked = one.asked
    told = {
        "data": {split: {"origin": found.origin, "sha256": found.sha256}
                 for split, found in asked.splits.items()},
        "truncated_items": sum(cut > 0 for cut in asked.truncated),
        "alone_choices": sum(asked.alone),
        "close_calls": metrics.close_calls(one.of_items),
        "first_request": next((some[0].ids[:8] for some in asked.prompts if some), None),
    }  # fmt: skip
    if one.answers and isinstance(one.answers[0], Answer):
        reasons = [answer.reason for answer in one.answers if isinstance(answer, Answer)]
        told["unfinished_answers"] = reasons.count("length")
    return told


# ------------------------------------------------------------------------------------------ tables


def table(found: Mapping[str, Any]) -> str:
    """results.json for people: a line a metric, and below what may have spoilt the numbers."""
    ours, subtasks = found["taproot"], found["group_subtasks"]
    group_of = {member: group for group, members in subtasks.items() for member in members}
    rows: list[tuple[str, ...]] = [("task", "n", "shots", "metric", "value", "stderr", "95 %")]

    def add(name: str, depth: int) -> None:
        result = found["results"].get(name)
        if result is not None:
            rows.extend(_table_rows(name, depth, result, found))
        for member in subtasks.get(name, ()):
            add(member, depth + (result is not None))

    def root(name: str) -> str:
        return root(group_of[name]) if name in group_of else name

    for name in dict.fromkeys(map(root, found["configs"])):
        add(name, 0)
    return "\n".join([columns(rows), *_remarks(ours)])


def _table_rows(
    name: str, depth: int, result: Mapping[str, Any], found: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    intervals = found["taproot"]["intervals"].get(name, {})
    shots = found["n-shot"].get(name)
    rows = []
    for key, value in result.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        stderr = result[f"{metric}_stderr,{filter_name}"]
        low_high = intervals.get(key)
        rows.append((
            "  " * depth + result["alias"] if not rows else "",
            f"{result['sample_len']:,}" if not rows else "",
            "" if rows or shots is None else str(shots),
            metric if filter_name == "none" else f"{metric}, {filter_name}",
            f"{value:.4f}",
            stderr if isinstance(stderr, str) else f"{stderr:.4f}",
            f"{low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else "",
        ))  # fmt: skip
    return rows


def _remarks(ours: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, told in ours["tasks"].items():
        parts = [
            f"{told[key]:,} {text}"
            for key, text in (
                ("truncated_items", "items cut on the left"),
                ("alone_choices", "choices tokenised alone"),
                ("unfinished_answers", "answers longer than allowed"),
            )
            if told.get(key)
        ]
        for metric, calls in told["close_calls"].items():
            if calls["close"]:
                parts.append(f"{calls['close']:,} items decided by less than {metrics.CLOSE} in "
                             f"{metric} ({calls['ties']:,} of them ties)")  # fmt: skip
        if parts:
            lines.append(f"{name}: {', '.join(parts)}")
    return lines + [f"WARNING: {text}" for text in ours["warnings"]]


def first_prompt(asked: Asked) -> str:
    """A task's first request as the model reads it, with its tokens."""
    if not asked.questions:
        return f"{asked.task.name}: no items"
    question, read = asked.questions[0], asked.prompts[0]
    context = question.contexts[0] if question.contexts else ""
    lines = [f"--- {asked.task.name}, {asked.shots}-shot, first of {len(asked.questions):,} items",
             context]  # fmt: skip
    for n, prompt in enumerate(read):
        text = question.continuations[n] if n < len(question.continuations) else ""
        ids = prompt.ids.tolist()
        lines.append(
            f"[{n}] {text!r}: ids {_short(ids[: prompt.start])} + {_short(ids[prompt.start :])}"
        )
    doc = question.doc
    right = doc.target if doc.gold is None else f"[{doc.gold}]"
    return "\n".join([*lines, f"right: {right}"])


def _short(ids: list[int]) -> str:
    if len(ids) <= 12:
        return str(ids)
    return f"[{', '.join(map(str, ids[:6]))}, ..., {', '.join(map(str, ids[-6:]))}] ({len(ids)})"
