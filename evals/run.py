"""A run of benchmarks that survives being killed: answers go to a store, files appear at the end.

The folder records how far the store's file had come when the run began. A run that is started again
makes the plan it had then, asks for what is missing, and ends with the same bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core import distributed
from core.checkpoint import Loaded
from core.config import Execution
from core.files import read_json, write_json, write_jsonl
from core.rundir import Run
from evals.benchmark import Asked, Settings, answer, judge
from evals.outputs import results, samples
from evals.store import Store, default_path
from evals.tasks.catalogue import Selection
from tokenizers import Tokenizer

BEGAN = "store.json"


def open_store(folder: Path, about: dict[str, Any], path: Path | None) -> Store:
    """The answers of a run in `folder`: in `path`, else in the user's cache or the folder."""
    record, alone = folder / BEGAN, distributed.place()[1] == 1
    if not distributed.first():
        distributed.wait(record.exists)
    if record.exists():
        began = read_json(record)
        return Store(Path(began["path"]), about, began["size"])
    cached = default_path(about) if alone else None  # which other machines may not see
    store = Store(path or cached or folder / "answers.jsonl", about)
    write_json(record, {"path": store.path, "size": store.size})
    return store


def run_tasks(
    run: Run,
    loaded: Loaded,
    tokenizer: Tokenizer,
    selection: Selection,
    asked: list[Asked],
    settings: Settings,
    execution: Execution,
    batch_tokens: int,
    batch: int,
    store_path: Path | None,
    about: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Ask the model and write samples_<task>.jsonl and results.json; returns the latter.

    Of several processes each asks its share; the first writes, the others return None.
    """
    mark = {"model": loaded.fingerprint, "tokenizer": tokenizer.fingerprint,
            "dtype": execution.dtype}  # fmt: skip
    store = open_store(run.path, mark, store_path)
    how = (settings, execution, batch_tokens, batch, store, f"eval {run.path.name}")
    found = answer(asked, loaded, tokenizer, *how)
    if not distributed.first():
        return None
    judged = [judge(a, answers, settings) for a, answers in zip(asked, found, strict=True)]
    lines = {one.asked.task.name: samples(one, settings) for one in judged}
    for name, of_task in lines.items():
        write_jsonl(run.path / f"samples_{name}.jsonl", of_task)
    content = results(judged, lines, selection.groups, loaded, tokenizer, settings, about)
    write_json(run.path / "results.json", content)
    return content
