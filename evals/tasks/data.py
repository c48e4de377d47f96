"""Where the items of a benchmark come from: a local folder first, else the Hugging Face Hub.

    DIR/<org>__<name>/<config>/<split>.jsonl    or .parquet, or <split>-00000-of-00002.parquet, ...
    DIR/<org>__<name>/<split>.jsonl             a dataset of one configuration
    DIR/<org>__<name>/<config>.jsonl            a dataset of plain files (`Task.files`)

Local files are read as they are, past the cache of `datasets`, which does not see that a file has
changed. A split is known by the hash of its rows, whichever kind of file they lie in.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.errors import InputError
from core.files import parse_object
from evals.tasks.task import Task
from evals.tasks.template import render

PRODUCTS = "taproot/products"
_ENDINGS = (".jsonl", ".parquet")


class Split(NamedTuple):
    """rows: the items' columns, in file order. sha256: of the rows. origin: files or address."""

    rows: list[dict[str, Any]]
    sha256: str
    origin: str


def load_split(task: Task, split: str, data: Path | None = None) -> Split:
    """The rows of a split of the task's dataset; data: a folder to look into before the Hub.

    InputError names the dataset, the splits there are and the local file to provide.
    """
    place = Path(task.dataset)  # absolute where a user's task file names a file or folder
    alone = task.dataset == PRODUCTS or task.files is not None or place.suffix in _ENDINGS
    if alone and split != task.split:
        raise InputError(f"{task.name}: {task.dataset} has no split {split!r}; all it has is taken "
                         f"for {task.split!r}")  # fmt: skip
    if task.dataset == PRODUCTS:
        return _split(_products(), PRODUCTS)
    if data is not None and not data.is_dir():
        raise InputError(f"data folder {data} does not exist")
    if not place.is_absolute():
        if data is None or not (place := data / task.dataset.replace("/", "__")).is_dir():
            return _hub(task, split)
    there = _splits(task, place) if place.is_dir() else {split: [place]}
    if split not in there:
        has = ", ".join(sorted(there)) or "none"
        raise InputError(f"{task.name}: {place} has no split {split!r} (it has: {has}); "
                         f"{_provide(task, split)}")  # fmt: skip
    return _local(there[split])


def _split(rows: list[dict[str, Any]], origin: str) -> Split:
    if not rows:
        raise InputError(f"{origin} holds no items")
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(row, sort_keys=True, default=str)
        digest.update(text.encode() + b"\n")
    return Split(rows, digest.hexdigest(), origin)


def _products() -> list[dict[str, Any]]:
    return [{"a": a, "b": b, "c": a * b} for a in range(1, 10) for b in range(1, 10)]


def _provide(task: Task, split: str) -> str:
    file = task.config or "default"
    if task.files is None:
        file = f"{file}/{split}"
    if Path(task.dataset).is_absolute():
        return f"provide {task.dataset}/{file}.jsonl (or .parquet)"
    folder = task.dataset.replace("/", "__")
    return f"provide {folder}/{file}.jsonl (or .parquet) in a folder given as --data"


def _splits(task: Task, folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a dataset's folder."""
    config = task.config or "default"
    if task.files is not None:
        files = [path for ending in _ENDINGS if (path := folder / f"{config}{ending}").is_file()]
        return {task.split: files} if files else {}
    place = folder / config
    if config == "default" and not place.is_dir():
        place = folder
    found: dict[str, list[Path]] = {}
    for path in sorted(place.glob("*")):
        if path.suffix in _ENDINGS:
            found.setdefault(re.sub(r"-\d{5}-of-\d{5}$", "", path.stem), []).append(path)
    return found


def _local(paths: Sequence[Path]) -> Split:
    """The rows of one file, or of all parts of one."""
    first = paths[0]
    part = re.search(r"(.*)-\d{5}-of-(\d{5})$", first.stem)
    names = (
        [f"{part[1]}-{n:05}-of-{part[2]}{first.suffix}" for n in range(int(part[2]))]
        if part
        else [first.name]
    )
    if [path.name for path in paths] != names:
        raise InputError(f"{first.parent} has {', '.join(path.name for path in paths)}, which are "
                         "not one split; leave one file, or all parts of one")  # fmt: skip
    rows = [row for path in paths for row in _read(path)]
    return _split(rows, ", ".join(map(str, paths)))


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".jsonl":
            return [
                parse_object(line, f"{path} line {number}")
                for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
                if line.strip()
            ]
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A file object: a folder named a=1 on the path would become a column.
            with open(path, "rb") as file:
                return pq.read_table(file).to_pylist()
        except pa.ArrowException as error:
            raise InputError(f"{path} cannot be read as parquet ({error})") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from error


def _hub(task: Task, split: str) -> Split:
    """The split from the Hub, through the cache of `datasets`; no code of a dataset is run."""
    import datasets

    origin = f"hub:{task.dataset}@{task.config or 'default'}/{split}"
    try:
        if task.files is None:
            rows = datasets.load_dataset(task.dataset, task.config, split=split)
        else:
            file = render(task.files, {"config": task.config}, task.name)
            address = f"hf://datasets/{task.dataset}/{file}"
            rows = datasets.load_dataset("json", data_files=address, split="train")
        return _split([dict(row) for row in rows], origin)
    except InputError:
        raise
    except Exception as error:  # whatever the network, the Hub or a dataset's files come up with
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{task.name}: dataset {task.dataset} cannot be had from the Hub "
            f"({type(error).__name__}: {reason}); {_provide(task, split)}"
        ) from error
