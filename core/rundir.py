"""The folder of a run: what was asked, on what, how it ended.

`config.json` holds the command and its options and can be replayed; `inputs.json` the hashes of
what it read; `env.json` the machine and versions; `manifest.json` the files it made. One of
DONE, PREEMPTED, FAILED says how it ended. A second start with the same options continues; with
other options it is refused.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import PathLike, dumps, read_json, sha256_file, write_json

STATUSES = ("DONE", "PREEMPTED", "FAILED")
# Options that say where or how to run, not what: they may change between a start and a resume.
_FREE = {"out", "resume"}


class Run:
    """An output folder that this process holds; see `open_run`."""

    def __init__(self, path: Path, config: dict[str, Any]):
        self.path, self.config = path, config
        self._lock = open(path / "LOCK", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{path} is in use by another process; wait for it to end") from None

    @property
    def status(self) -> str | None:
        return next((name for name in STATUSES if (self.path / name).exists()), None)

    @property
    def done(self) -> bool:
        return self.status == "DONE"

    def inputs(self, **hashes: Any) -> None:
        """Record what is read, or on a resume refuse when it has changed since."""
        file = self.path / "inputs.json"
        if file.exists():
            _same(read_json(file), hashes, self.path, "input")
        else:
            write_json(file, hashes)

    def finish(self, status: str = "DONE", **info: Any) -> None:
        for name in STATUSES:
            (self.path / name).unlink(missing_ok=True)
        files = [f for f in sorted(self.path.rglob("*")) if f.is_file() and f.name != "LOCK"]
        if status == "DONE":
            manifest = {
                str(f.relative_to(self.path)): {"bytes": f.stat().st_size, "sha256": sha256_file(f)}
                for f in files
                if f.name != "manifest.json"
            }
            write_json(self.path / "manifest.json", manifest)
        write_json(self.path / status, info)

    def close(self) -> None:
        self._lock.close()


def _same(old: dict[str, Any], new: dict[str, Any], path: Path, what: str) -> None:
    for key in sorted(old.keys() | new.keys()):
        if key not in _FREE and old.get(key) != new.get(key):
            raise InputError(
                f"{path} was begun with {what} {key}={old.get(key)!r}, now it is "
                f"{new.get(key)!r}; use the same, another --out, or delete the folder"
            )


def open_run(path: PathLike, command: str, options: dict[str, Any], fresh: bool = False) -> Run:
    """Begin or continue a run folder.

    Raises InputError when the folder holds anything that is not this command's run with these
    options. fresh: delete an earlier run of this command first.
    """
    path = Path(path)
    config = {"taproot": 1, "command": command, "options": options}
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; give a folder for --out")
    if path.exists() and any(path.iterdir()):
        if not (path / "config.json").exists():
            raise InputError(f"{path} is not empty and not one of our runs; give another --out")
        old = read_json(path / "config.json")
        if not isinstance(old, dict) or old.get("command") != command:
            kind = old.get("command") if isinstance(old, dict) else None
            raise InputError(f"{path} holds the output of {kind!r}, not of {command!r}; "
                             "give another --out")  # fmt: skip
        if fresh:
            Run(path, config).close()  # nobody else may hold it
            shutil.rmtree(path)
        else:
            _same(old["options"], _plain(options), path, "option")
    try:
        path.mkdir(parents=True, exist_ok=True)
        run = Run(path, config)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}); give another --out"
        ) from error
    if not (path / "config.json").exists():
        write_json(path / "config.json", config)
        write_json(path / "env.json", environment())
    return run


@contextlib.contextmanager
def produce(path: PathLike, command: str, options: dict[str, Any]) -> Iterator[Path | None]:
    """A folder that a command makes in one go: it appears whole, with `command.json`, or not.

    Yields the temporary place to make it at, or None when the same command with the same options
    has made it before. Anything else at `path` raises InputError.
    """
    path, mark = Path(path), "command.json"
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not path.is_dir() or not (path / mark).exists():
            raise InputError(f"{path} exists and is not ours to replace; give another --out")
        old = read_json(path / mark)
        if old.get("command") != command:
            raise InputError(f"{path} was made by {old.get('command')!r}; give another --out")
        _same(old["options"], _plain(options), path, "option")
        yield None
        return
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        write_json(temporary / mark, {"taproot": 1, "command": command, "options": options})
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options as they read back from JSON."""
    return json.loads(dumps(options))


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
