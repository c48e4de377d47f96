"""Several processes of one command, each with rows (or requests) of its own.

Attribution needs nothing of one row to work on another. So every process takes a contiguous share
of the rows, runs on its own devices, and fills its own part of each array; results are those of
one process. Requests of benchmarks are shared out likewise, and their answers meet in one store
(`evals.store`). The processes meet through files in the run's folder, which all of them must see,
so a slow one is waited for as long as it takes. `jax.distributed` tells them apart, and ends them
all when one has died; the same command, started again in each, continues.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from core.files import atomic, read_npz

# A process that ends in an error waits this long for the others to end, which then end too.
PATIENCE = 10  # seconds


def start() -> None:
    """Join the other processes; alone when TAPROOT_COORDINATOR is not set.

    TAPROOT_COORDINATOR: host:port of process 0, with TAPROOT_PROCESSES, how many there are, and
    TAPROOT_PROCESS, the number of this one; or `auto`, to ask the cluster (Slurm, MPI, TPU pods).
    It must come before anything uses a device, and returns when all have come.
    """
    address = os.environ.get("TAPROOT_COORDINATOR")
    if not address:
        return
    import jax

    given: dict[str, Any] = {}
    if address != "auto":
        names = {"num_processes": "TAPROOT_PROCESSES", "process_id": "TAPROOT_PROCESS"}
        given = {"coordinator_address": address}
        given |= {key: _number(name) for key, name in names.items()}
        if not given["process_id"] < given["num_processes"]:
            raise InputError(f"TAPROOT_PROCESS={given['process_id']} is none of "
                             f"{given['num_processes']} processes; count from 0")  # fmt: skip
    if not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(**given, shutdown_timeout_seconds=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"TAPROOT_COORDINATOR={address} brings no processes together "
                             f"({error}); give process 0's host:port, or auto on a cluster"
                             ) from error  # fmt: skip


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    if not value.isdecimal():
        raise InputError(f"{name}={value!r} is not a number; TAPROOT_COORDINATOR needs it")
    return int(value)


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    import jax

    return jax.process_index(), jax.process_count()


def first() -> bool:
    """Whether this process is the one that records and writes results."""
    return place()[0] == 0


def layout() -> dict[str, int]:
    """What batches and parts depend on: a run resumes with the same."""
    import jax

    return {"devices": jax.device_count(), "processes": jax.process_count()}


def session() -> str:
    """A word all processes of this start know, and no earlier start's; empty in one process."""
    if place()[1] == 1:
        return ""
    from jax.experimental import multihost_utils

    drawn = np.frombuffer(os.urandom(8), np.int32)
    return str(multihost_utils.broadcast_one_to_all(drawn).tolist())


def split(n: int) -> slice:
    """Which of `n` things are this process's; maybe none."""
    number, count = place()
    return slice(n * number // count, n * (number + 1) // count)


def share(rows: int) -> range:
    """Which of `rows` rows are this process's."""
    count = place()[1]
    if rows < count:
        raise InputError(f"{rows} rows are too few for {count} processes; start at most {rows}")
    return range(rows)[split(rows)]


def parts(path: Path) -> list[Path]:
    """The file of every process that together stand for `path`; [path] in one process."""
    count = place()[1]
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i + 1:05}-of-{count:05}") for i in range(count)]


def part(path: Path) -> Path:
    """This process's own one."""
    return parts(path)[place()[0]]


def wait(ready: Callable[[], Any]) -> Any:
    """Ask until the answer is true, and return it."""
    while not (answer := ready()):
        time.sleep(0.05)
    return answer


def gather(path: Path, **arrays: Any) -> list[dict[str, Any]]:
    """The arrays of every process, in order; they pass through files beside `path` (.npz)."""
    if parts(path) == [path]:
        return [arrays]
    with atomic(part(path)) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return [wait(lambda file=file: file.exists() and read_npz(file)) for file in parts(path)]
