"""Timing programs against each other, in one process and in turn."""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def alternate(
    runs: dict[str, Callable[[], Any]], repeats: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median (seconds, CPU seconds) of each, taken in turn; what a first call costs is left out."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        jax.block_until_ready(run())
    for _ in range(repeats):
        for name, run in runs.items():
            began, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(run())
            taken[name].append((time.perf_counter() - began, time.process_time() - used))
    median = {name: np.median(pairs, 0).tolist() for name, pairs in taken.items()}
    return {n: wall for n, (wall, _) in median.items()}, {n: cpu for n, (_, cpu) in median.items()}
