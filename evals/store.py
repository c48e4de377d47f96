"""Answers of a model, kept in a file, so that a killed run goes on and a repeated one is free.

The file is append-only JSON lines: a header that says whose answers these are (model, tokenizer,
dtype), then {"key", "value"}; a key is a hash of all the tokens that an answer depends on. Every
append is one write to the file's end and begins with a newline, so several processes may share a
file, and a line torn by a kill spoils no other. A torn line is skipped: its answer is asked again.

What is computed together changes the last bits of a number. A run therefore plans without the
answers that it found when it began (`before`), and computes its plan's batches as if nothing of
them were known, save those of which all answers have come meanwhile (`since`): resumed from the
same `size`, it makes the same plan and ends with the same bits.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from core import distributed
from core.errors import InputError
from core.files import write_bytes
from tokenizers import cache

FORMAT = "taproot-answers"
VERSION = 1  # to be raised when the same model would answer the same tokens with other numbers


class Store:
    """Answers by key; the first answer of a key is the one that counts.

    before: those in the first `size` bytes of the file. since: those behind them, of this run
    before it was killed, of others beside it, and added now. size: bytes of the file when the run
    began.
    """

    def __init__(self, path: Path | None, about: dict[str, Any], size: int | None = None):
        """Open or begin the file; None keeps nothing. size: of the run to resume, None = all.

        Raises InputError where the file is no such file, holds answers of another `about`, or
        cannot be read or written.
        """
        self.path, self.size = path, 0
        self.before: dict[str, Any] = {}
        self.since: dict[str, Any] = {}
        if path is None:
            return
        header = _lines([{"format": FORMAT, "version": VERSION, **about}])
        try:
            content = path.read_bytes() if path.exists() else b""
            if len(content) < len(header) and header.startswith(content):  # none, or cut by a kill
                write_bytes(path, header)
                content = header
        except OSError as error:
            raise _unusable(path, error) from error
        _check(path, content, header)
        self.size = len(content) if size is None else min(size, len(content))
        self.before = _answers(content[: self.size])
        self._keep(content[self.size :])
        self._seen = content.rfind(b"\n") + 1  # up to here; a line behind it may be under way

    def add(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Append answers (plain JSON data, numbers of numpy) and wait until the disk has them."""
        lines = _lines([{"key": key, "value": value} for key, value in pairs])
        if self.path is None or not lines:
            return
        data = b"\n" + lines
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                if os.write(handle, data) < len(data):
                    raise OSError(None, "the disk is full")
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise _unusable(self.path, error) from error
        self._keep(data)

    def gather(self, keys: Iterable[str]) -> None:
        """Wait until the other processes of this run have answered what is theirs of `keys`."""
        left = {key for key in keys if key not in self.before}
        if self.path is not None and distributed.place()[1] > 1:
            distributed.wait(lambda: not left - self._follow().keys())

    def _follow(self) -> dict[str, Any]:
        """`since`, with what has been added to the file."""
        assert self.path is not None
        with open(self.path, "rb") as file:
            file.seek(self._seen)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._seen += whole
        self._keep(data[:whole])
        return self.since

    def _keep(self, data: bytes) -> None:
        """Know what a later run will read; a resumed one must not know other numbers."""
        for key, value in _answers(data).items():
            if key not in self.before:
                self.since.setdefault(key, value)


def default_path(about: dict[str, Any]) -> Path | None:
    """The file of `about` in the cache folder (`tokenizers.cache.folder`), None without one."""
    folder, about = cache.folder(), {"version": VERSION, **about}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "answers" / f"{name}.jsonl" if folder else None


def prompt_key(ids: ArrayLike, start: int) -> str:
    """Of log p(ids[start:] | ids[:start]): 32 hex digits."""
    return _key(["logprob", int(start)], ids)


def generation_key(
    ids: ArrayLike, new_tokens: int, stop_ids: Sequence[int], stop_strings: Sequence[str]
) -> str:
    """Of the greedy continuation of ids, up to new_tokens or a stop: 32 hex digits."""
    stops = sorted({int(i) for i in stop_ids})
    return _key(["greedy", int(new_tokens), stops, list(stop_strings)], ids)


def _key(asked: list[Any], ids: ArrayLike) -> str:
    tokens = np.asarray(ids, "<i4").tobytes()
    return hashlib.sha256(json.dumps(asked).encode() + b"\n" + tokens).hexdigest()[:32]


def _lines(values: Iterable[Any]) -> bytes:
    # Floats are written so that reading gives the same bits; NaN and infinities keep their names.
    lines = (json.dumps(value, default=lambda array: array.tolist()) for value in values)
    return "".join(f"{line}\n" for line in lines).encode()


def _record(line: str) -> dict[str, Any]:
    """The object of a line, {} if there is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _answers(data: bytes) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for record in map(_record, data.decode("utf-8", "replace").split("\n")):
        if isinstance(record.get("key"), str) and "value" in record:
            answers.setdefault(record["key"], record["value"])
    return answers


def _check(path: Path, content: bytes, header: bytes) -> None:
    found = _record(content.split(b"\n", 1)[0].decode("utf-8", "replace"))
    wanted = _record(header.decode())
    if found.get("format") != FORMAT:
        raise InputError(f"{path} is no file of answers; name another file, or remove it")
    names = sorted(found.keys() | wanted.keys())
    if differing := [name for name in names if found.get(name) != wanted.get(name)]:
        raise InputError(f"{path} holds answers of another {' and '.join(differing)}; name another "
                         "file, or remove it to begin anew")  # fmt: skip


def _unusable(path: Path, error: OSError) -> InputError:
    return InputError(f"answers cannot be kept in {path} ({error.strerror}); free some space, or "
                      "set TAPROOT_CACHE to a folder that can be written")  # fmt: skip
