"""The folder a command writes: what was asked, on what, how it ended.

Two kinds. A run works in its folder and can be continued (`open_run`): `config.json` holds the
command and its options, and can be replayed; `inputs.json` the hashes of what it read, `env.json`
the machine and versions, `manifest.json` the files it made; one of DONE, PREEMPTED, FAILED says
how it ended. What is made in one go (`produce`) appears whole, with its `command.json`, or not.

Either way the same command again goes on or changes nothing, and another one is refused. A start
that fails before any work leaves nothing, so the corrected command may use the same folder. Of
several processes (`core.distributed`) the first holds and records a run, and the others follow it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from core import distributed
from core.errors import InputError
from core.files import PathLike, dumps, read_json, sha256_file, write_json
from core.memmap import checksum

STATUSES = ("DONE", "PREEMPTED", "FAILED")
# What a run writes before any work.
RECORDS = ("config.json", "inputs.json", "env.json", "LOCK")


class Run:
    """An output folder that this process holds; a context manager, see `open_run`."""

    def __init__(self, path: Path, config: dict[str, Any], fresh: bool = False):
        self.path, self.config, self.fresh = path, config, fresh
        self._session = distributed.session()
        self._lock, self._made = None, []
        if distributed.first():
            self._hold()

    def _hold(self) -> None:
        path = self.path
        self._made = _missing(path)
        with _writable(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / "LOCK", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(f"{path} is in use by another process; wait for it to end") from None

    @property
    def status(self) -> str | None:
        return next((name for name in STATUSES if (self.path / name).exists()), None)

    @property
    def done(self) -> bool:
        return self.status == "DONE" and not self.fresh

    def inputs(self, **hashes: Any) -> None:
        """End the checks and begin: record what is read; a resume refuses what has changed since.

        Nothing but the lock is written before, and with `fresh` the earlier run stands until here.
        """
        if self._lock is None:
            distributed.wait(self._led)
            _same(read_json(self.path / "inputs.json"), hashes, self.path, "input")
            self.fresh = False
            return
        self._begin(hashes)
        self._lock.write(self._session)
        self._lock.flush()

    def _led(self) -> bool:
        lock = self.path / "LOCK"
        return lock.exists() and lock.read_text() == self._session

    def _begin(self, hashes: dict[str, Any]) -> None:
        if _begun(self.path) and not self.fresh:
            _same(read_json(self.path / "inputs.json"), hashes, self.path, "input")
            for name in STATUSES:
                (self.path / name).unlink(missing_ok=True)
            return
        for entry in list(self.path.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != "LOCK":
                entry.unlink()
        self.fresh = False
        write_json(self.path / "config.json", self.config)
        write_json(self.path / "env.json", environment())
        write_json(self.path / "inputs.json", hashes)

    def finish(self, status: str = "DONE", **info: Any) -> None:
        if self._lock is None:
            distributed.wait(lambda: self.status)
            return
        for name in STATUSES:
            (self.path / name).unlink(missing_ok=True)
        files = [f for f in sorted(self.path.rglob("*")) if f.is_file() and f.name != "LOCK"]
        if status == "DONE":
            manifest = {
                str(f.relative_to(self.path)): {
                    "bytes": f.stat().st_size,
                    "sha256": checksum(f) or sha256_file(f),
                }  # fmt: skip
                for f in files
                if f.name != "manifest.json"
            }
            write_json(self.path / "manifest.json", manifest)
        write_json(self.path / status, info)

    def close(self) -> None:
        """Let the folder go; if nothing was done in it, as if it had never been touched."""
        if self._lock is None:
            return
        if not _begun(self.path):
            for name in RECORDS:
                (self.path / name).unlink(missing_ok=True)
            _remove_empty(self._made)
        self._lock.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        _name_full_disk(self.path, error)


def open_run(path: PathLike, command: str, options: dict[str, Any], fresh: bool = False) -> Run:
    """Hold a run folder, to begin or continue the run by `Run.inputs`.

    Raises InputError when the folder holds anything that is not this command's run with these
    options. fresh: begin anew in the folder of an earlier run of this command.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for --out")
    if path.exists() and _begun(path):
        old = _record(path / "config.json", path)
        if old["command"] != command:
            raise InputError(f"{path} holds the output of {old['command']!r}, not of {command!r}; "
                             "give another --out")  # fmt: skip
        if not fresh:
            _same(old["options"], options, path, "option")
    return Run(path, {"taproot": 1, "command": command, "options": options}, fresh)


@contextlib.contextmanager
def produce(
    path: PathLike, command: str, options: dict[str, Any], inputs: dict[str, str] | None = None
) -> Iterator[Path | None]:
    """A folder that a command makes in one go: it appears whole, with `command.json`, or not.

    Yields an empty folder to make it in, or None when the same command with the same options and
    `inputs` (see `stamps`) has made it before. Anything else at `path` raises InputError.
    """
    path, mark = Path(path), "command.json"
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for --out")
    if path.exists() and any(path.iterdir()):
        _made_before(path, path / mark, command, options, inputs)
        yield None
        return
    with _beside(path) as folder:
        folder.mkdir()
        yield folder
        write_json(folder / mark, _made(command, options, inputs))
        os.replace(folder, path)


@contextlib.contextmanager
def produce_file(
    path: PathLike, command: str, options: dict[str, Any], inputs: dict[str, str] | None = None
) -> Iterator[Path | None]:
    """Like `produce` for a file and the `.json` of the same name beside it, which is the record.

    The block writes both; the command and its options are added to the object in the second.
    """
    path = Path(path)
    mark = path.with_suffix(".json")
    if path.is_dir() or mark.is_dir():
        raise InputError(f"{path if path.is_dir() else mark} is a folder; give a file for --out")
    if path.exists() or mark.exists():
        _made_before(path, mark, command, options, inputs)
        yield None
        return
    with _beside(path) as file:
        yield file
        made = file.with_suffix(".json")
        write_json(made, {**_made(command, options, inputs), **read_json(made)})
        os.replace(file, path)
        os.replace(made, mark)


def stamps(options: dict[str, Any]) -> dict[str, str]:
    """For every file or folder an option names, a hash that changes when its content does.

    Of a folder it takes the files at its top: small JSON ones, where our folders record checksums
    of the rest, by content, others by size.
    """
    found: dict[str, str] = {}
    for name, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        paths = [Path(v) for v in values if isinstance(v, (str, Path)) and os.path.isabs(v)]
        if name != "out" and paths and all(path.exists() for path in paths):
            found[name] = hashlib.sha256("".join(map(_stamp, paths)).encode()).hexdigest()
    return found


def _stamp(path: Path) -> str:
    if path.is_file():
        return sha256_file(path)
    lines = []
    for file in sorted(f for f in path.iterdir() if f.is_file() and f.name != "LOCK"):
        size = file.stat().st_size
        small = file.suffix == ".json" and size < 2**24
        lines.append(f"{file.name} {sha256_file(file) if small else size}\n")
    return "".join(lines)


def _made(command: str, options: dict[str, Any], inputs: dict[str, str] | None) -> dict[str, Any]:
    return {"taproot": 1, "command": command, "options": options, "inputs": inputs or {}}


def _made_before(
    path: Path, mark: Path, command: str, options: dict[str, Any], inputs: dict[str, str] | None
) -> None:
    old = _record(mark, path)
    if old["command"] != command:
        raise InputError(f"{path} was made by {old['command']!r}; give another --out")
    _same(old["options"], options, path, "option")
    _same(old.get("inputs", {}), inputs or {}, path, "input")


def _record(file: Path, path: Path) -> dict[str, Any]:
    """The record of a command in `file`; InputError if what is at `path` has none."""
    content = read_json(file) if file.exists() else None
    if not isinstance(content, dict) or not {"taproot", "command", "options"} <= content.keys():
        raise InputError(f"{path} exists and is not ours to replace; give another --out")
    return content


def _begun(path: Path) -> bool:
    """Whether a run folder holds anything but a start's records and their temporary files."""
    return any(f.name not in RECORDS and f.suffix != ".tmp" for f in path.iterdir())


def _same(old: dict[str, Any], new: dict[str, Any], path: Path, what: str) -> None:
    new = json.loads(dumps(new))  # as the old ones read back
    for key in sorted(old.keys() | new.keys()):
        if key != "out" and old.get(key) != new.get(key):
            raise InputError(
                f"{path} was made with {what} {key}={old.get(key)!r}, now it is {new.get(key)!r}; "
                "use the same, give another --out, or delete what is there"
            )


def _missing(path: Path) -> list[Path]:
    """The folders that must be made for `path` to be one, innermost first."""
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Names an --out that cannot be written to, and takes back the folders made for it."""
    made = _missing(path)
    try:
        yield
    except OSError as error:
        _remove_empty(made)
        raise InputError(
            f"{path} cannot be written ({error.strerror}); give another --out"
        ) from error


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place on the same disk to make `path` at, gone afterwards.

    It has the same name in a folder of its own, so that progress lines and errors name it right.
    """
    made = _missing(path.parent)
    with _writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield holder / path.name
    except Exception as error:
        _name_full_disk(path, error)
        if isinstance(error, InputError) and str(holder) in str(error):
            message = str(error).replace(str(holder), str(path.parent))
            raise InputError(message) from error
        raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        _remove_empty(made)


def _name_full_disk(path: Path, error: BaseException | None) -> None:
    """Raises InputError for a full disk, which libraries report each in their own way."""
    if error is None or isinstance(error, InputError):
        return
    signs = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "requested and")  # numpy's
    if any(sign in str(error) for sign in signs):
        raise InputError(f"{path} cannot be finished, the disk is full; free some and run the same "
                         "command again") from error  # fmt: skip


def environment() -> dict[str, Any]:
    """Versions, devices and settings that a result may depend on."""
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "datasets", "numpy",
             "tiktoken")  # fmt: skip
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "argv": sys.argv,
    }
