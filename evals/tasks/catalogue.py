"""The benchmarks that are known: `evals/tasks/*.toml`, and files of the same form by users.

A file's keys are the fields of `Task`. The file piqa.toml is the task piqa; a user's file
says its `name`. Further keys are the reader's own:

    [members]    a family: for each member a table of the keys in which it differs from the rest of
                 the file. Its name fills {member} in templates, dataset, config, description and
                 alias; it becomes the task <file>_<member>
    group        the group that the task, or every member, belongs to
    [groups.X]   metrics, alias and version of a group, and its members that are groups themselves
"""

import dataclasses
import difflib
import fnmatch
import inspect
import re
import tomllib
import types
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from core.errors import InputError
from core.files import PathLike, read_json
from evals.tasks.task import METRICS, Group, Task
from evals.tasks.template import fill, parse, render

FOLDER = Path(__file__).parent

_NEEDED = {
    "multiple_choice": ("prompt", "answer"),
    "loglikelihood": ("prompt", "target"),
    "rolling": ("target", "counted"),
    "generate": ("prompt", "target"),
}
_ASKED = {"prompt", "description", "delimiter", "shot_delimiter", "prefix", "pool", "sampler",
          "examples"}  # fmt: skip
# Keys that mean something to these kinds only.
_OWN = {
    "multiple_choice": _ASKED | {"choices", "labels", "answer", "target", "query"},
    "loglikelihood": _ASKED | {"target"},
    "rolling": {"target", "counted"},
    "generate": _ASKED | {"target", "until", "new_tokens", "filters", "exact_match"},
}
_TEMPLATES = ("files", "fields", "prompt", "choices", "labels", "answer", "target", "counted")
_FILLED = ("dataset", "config", "description", "alias")  # plain texts that may name {member}


class Selection(NamedTuple):
    """Tasks to run, each once, and the groups that were asked for, with those within them."""

    tasks: list[Task]
    groups: list[Group]


@cache
def catalogue() -> tuple[dict[str, Task], dict[str, Group]]:
    """Tasks and groups of this folder, by name, in alphabetical order of the files."""
    tasks: dict[str, Task] = {}
    groups: dict[str, Group] = {}
    for path in sorted(FOLDER.glob("*.toml")):
        of_file, groups_of_file = _read(_load(path), path.stem, str(path))
        tasks |= of_file
        groups |= groups_of_file
    return tasks, groups


def read_task_file(path: PathLike) -> tuple[dict[str, Task], dict[str, Group]]:
    """Tasks and groups of a user's .toml or .json file; strict: InputError names a key amiss.

    `dataset` may also be a .jsonl or .parquet file, or a folder laid out like a dataset's folder
    under --data, relative to the file.
    """
    path = Path(path)
    content = _load(path)
    if not isinstance(name := content.pop("name", None), str):
        raise InputError(f"{path}: 'name' must be the task's name, got {name!r}")
    beside = path.parent / str(content.get("dataset", ""))
    if "dataset" in content and (beside.suffix in (".jsonl", ".parquet") or beside.is_dir()):
        content["dataset"] = str(beside.absolute())
    return _read(content, name, str(path))


def select(names: Sequence[str]) -> Selection:
    """The tasks and groups of names, patterns such as mmlu_*, comma lists and task files.

    A group brings its members in its order. A task comes once. InputError for what nothing is
    called, with the names nearest to it.
    """
    known = catalogue()
    tasks, groups = dict(known[0]), dict(known[1])
    wanted: list[str] = []
    for name in (part.strip() for entry in names for part in entry.split(",")):
        if name.endswith((".toml", ".json")):
            of_file = read_task_file(name)
            names_of_file = [*of_file[1], *of_file[0]]
            for taken in {*names_of_file} & {*tasks, *groups}:
                raise InputError(f"{name}: the name {taken!r} is taken; give the task another")
            tasks |= of_file[0]
            groups |= of_file[1]
            grouped = {member for group in of_file[1].values() for member in group.members}
            wanted += [n for n in names_of_file if n not in grouped]
        elif name:
            wanted += _called(name, [*groups, *tasks])
    if not wanted:
        raise InputError("no task is named; `eval list` shows those there are")
    chosen: dict[str, Task] = {}
    chosen_groups: dict[str, Group] = {}

    def add(name: str) -> None:
        if name in tasks:
            chosen[name] = tasks[name]
        else:
            chosen_groups[name] = groups[name]
            for member in groups[name].members:
                add(member)

    for name in wanted:
        add(name)
    return Selection(list(chosen.values()), list(chosen_groups.values()))


def _called(name: str, known: list[str]) -> list[str]:
    found = [n for n in known if fnmatch.fnmatchcase(n, name)]
    if not found:
        raise InputError(f"no task or group is called {name!r}{_near(name, known)}; `eval list` "
                         "shows all")  # fmt: skip
    return found


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _load(path: Path) -> dict[str, Any]:
    if path.suffix == ".json":
        content = read_json(path)
        if not isinstance(content, dict):
            raise InputError(f"{path} is no JSON object; write a task's keys")
        return content
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"task file {path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not TOML ({error})") from None


def _table(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} must be a table, got {value!r}")
    return value


def _read(
    content: dict[str, Any], name: str, where: str
) -> tuple[dict[str, Task], dict[str, Group]]:
    """The tasks and groups of a file."""
    content = dict(content)
    members = _table(content.pop("members", {}), f"{where}: members")
    headings = _table(content.pop("groups", {}), f"{where}: groups")
    tasks: dict[str, Task] = {}
    within: dict[str, tuple[str, ...]] = {}
    for member, own in members.items() or [("", {})]:
        at = f"{where}: member {member!r}" if members else where
        keys = content | _table(own, at)
        if members:
            keys = {key: _with_member(key, value, member, at) for key, value in keys.items()}
        task_name = f"{name}_{member}" if members else name
        if (group := keys.pop("group", None)) is not None:
            if not isinstance(group, str) or group not in headings:
                raise InputError(f"{at}: group {group!r} is unknown; describe it in [groups.X]")
            within[group] = (*within.get(group, ()), task_name)
        tasks[task_name] = _task(task_name, keys, at)
    groups = {
        heading: _group(heading, keys, within.get(heading, ()), f"{where}: group {heading!r}")
        for heading, keys in headings.items()
    }
    later = list(groups)
    for group in groups.values():
        later.remove(group.name)  # so that no group can hold itself
        if not group.members:
            raise InputError(f"{where}: group {group.name!r} has no members; give it some")
        for member in group.members:
            if member not in {*tasks, *later}:
                raise InputError(f"{where}: group {group.name!r} names {member!r}, which is no "
                                 "task and no later group of the file"
                                 f"{_near(member, [*tasks, *later])}")  # fmt: skip
    return tasks, groups


def _with_member(key: str, value: Any, member: str, where: str) -> Any:
    """A key's value with {member} filled in; templates stay templates over the columns."""
    if key in _FILLED and isinstance(value, str):
        return render(value, {"member": member}, f"{where}: {key}")
    if key not in (*_TEMPLATES, "query"):
        return value
    if isinstance(value, str):
        return fill(value, {"member": member}, f"{where}: {key}")
    if isinstance(value, list):
        return [_with_member(key, entry, member, where) for entry in value]
    if isinstance(value, dict):
        return {k: _with_member(key, entry, member, where) for k, entry in value.items()}
    return value


def _group(name: str, keys: Any, tasks: tuple[str, ...], where: str) -> Group:
    group: Group = _build(Group, {"members": []} | _table(keys, where), {"name": name}, where)
    return group._replace(members=tuple(dict.fromkeys(group.members + tasks)))


def _task(name: str, keys: dict[str, Any], where: str) -> Task:
    """The task of a file's keys; InputError, naming the key, unless it could be run."""
    if not re.fullmatch(r"[\w.-]+", name):  # it becomes part of file names
        raise InputError(f"{where}: {name!r} is no task's name; use letters, digits, _, - and .")
    task: Task = _build(Task, keys, {"name": name, "where": where}, where)
    needed = ("dataset", "split", "metrics", *_NEEDED[task.kind])
    if task.kind == "multiple_choice":
        # Either one prompt before several choices, or several prompts before one text.
        needed += ("choices",) if isinstance(task.prompt, str) else ("target",)
    for key in needed:
        if not getattr(task, key):
            raise InputError(f"{where}: {key!r} is missing; a {task.kind} task needs it")
    refused = set().union(*_OWN.values()) - _OWN[task.kind]
    if task.kind == "multiple_choice":
        refused.add("target" if isinstance(task.prompt, str) else "choices")
    elif not isinstance(task.prompt, str):
        raise InputError(f"{where}: 'prompt' is a list; only a multiple_choice task has several")
    for key in keys:
        if key in refused:
            raise InputError(f"{where}: {key!r} means nothing to this {task.kind} task; remove it")
    for metric in task.metrics:
        if metric not in METRICS[task.kind]:
            raise InputError(f"{where}: metric {metric!r} is not of a {task.kind} task; it has "
                             f"{', '.join(METRICS[task.kind])}")  # fmt: skip
    for key, least in (("size", 1), ("shots", 0), ("new_tokens", 1)):
        if (count := getattr(task, key)) is not None and count < least:
            raise InputError(f"{where}: {key!r} must be at least {least}, got {count}")
    if task.shots and task.pool is None and task.examples is None:
        raise InputError(f"{where}: {task.shots} shots need a 'pool' split or 'examples'")
    if task.pool is not None and task.examples is not None:
        raise InputError(f"{where}: shots come from 'pool' or from 'examples'; give one of them")
    for regex in (*(f.regex for f in task.filters), *task.exact_match.ignore):
        try:
            re.compile(regex)
        except re.error as error:
            raise InputError(f"{where}: {regex!r} is no regular expression ({error})") from None
    for key, template in _templates(task):
        try:
            parse(template)
        except InputError as error:
            raise InputError(f"{where}: {key!r}: {error}") from None
    return task


def _templates(task: Task) -> Iterator[tuple[str, str]]:
    values = [(key, getattr(task, key)) for key in _TEMPLATES]
    if task.query is not None:
        values += [("query", task.query.prompt), ("query", task.query.choices)]
    for key, value in values:
        if isinstance(value, str):
            yield key, value
        elif key != "labels":  # a list of labels is plain
            texts = value.values() if isinstance(value, dict) else value or ()
            yield from ((key, text) for text in texts)


def _build(kind: Any, keys: dict[str, Any], given: dict[str, Any], where: str) -> Any:
    """A dataclass or NamedTuple of a table: types as declared, no key unknown, none missing."""
    declared = inspect.signature(kind).parameters
    open_keys = [name for name in declared if name not in given]
    for key in keys:
        if key not in open_keys:
            raise InputError(f"{where}: unknown key {key!r}{_near(key, open_keys)}; the keys are "
                             f"{', '.join(open_keys)}")  # fmt: skip
    for key in open_keys:
        if declared[key].default is inspect.Parameter.empty and key not in keys:
            raise InputError(f"{where}: {key!r} is missing; it must be "
                             f"{_described(declared[key].annotation)}")  # fmt: skip
    typed = {
        key: _typed(declared[key].annotation, value, f"{where}: {key!r}")
        for key, value in keys.items()
    }
    return kind(**typed, **given)


def _typed(kind: Any, value: Any, where: str) -> Any:
    options = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if _fits(option, value):
            if get_origin(option) is tuple:
                entry = get_args(option)[0]
                return tuple(_typed(entry, v, f"{where} entry {i}") for i, v in enumerate(value))
            if get_origin(option) is dict:
                entry = get_args(option)[1]
                return {k: _typed(entry, v, f"{where} entry {k!r}") for k, v in value.items()}
            return _build(option, value, {}, where) if _is_record(option) else value
    raise InputError(f"{where} must be {_described(kind)}, got {value!r}")


def _is_record(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


def _fits(kind: Any, value: Any) -> bool:
    if kind is Any:
        return True
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    if get_origin(kind) is tuple:
        return isinstance(value, list)
    if get_origin(kind) is dict or _is_record(kind):
        return isinstance(value, dict)
    return type(value) is kind  # not isinstance: a bool is an int, too


def _described(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        options = [option for option in get_args(kind) if option is not types.NoneType]
        return " or ".join(map(_described, options))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "a list"
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "a table")
