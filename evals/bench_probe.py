"""What probes of all layers cost, against a probe of one: same rows, same tokens, one process.

The model runs once for all layers, so a sweep adds the fits and what carries the activations off.
Random weights, and text in which some tokens call for the one that is told. The runs alternate and
medians are compared; the first of each, which compiles, is told apart.
"""

import time
from typing import Any

import jax
import numpy as np

import tokenizers
from core import families, schema
from core.checkpoint import Loaded
from core.config import Execution
from core.presets import PRESETS
from core.taps import Tap
from evals.probe.corpus import Corpus, truth
from evals.probe.run import Settings, plan, run_probes, sites
from evals.probe.target import Target

CLOCKS = {"": time.perf_counter, "_cpu": time.process_time}
TARGET, CALLS = 1, 0.04  # the token, and how often it comes


def text(vocab_size: int, rows: int, length: int) -> Corpus:
    """Rows of tokens of falling frequency; a tenth of them call for the target."""
    rng = np.random.default_rng(0)
    ids_S = (vocab_size * rng.random(rows * length) ** 3).astype(np.int32)
    called_S = np.append(False, ids_S[:-1] % 10 == 7)
    ids_S[called_S & (rng.random(len(ids_S)) < 10 * CALLS)] = TARGET
    starts = np.arange(0, len(ids_S) + 1, length)
    return Corpus(ids_S, starts, np.repeat(np.arange(rows), length), "row", "text")


def bench(
    preset: str, rows: int, length: int, settings: Settings, repeats: int, execution: Execution
) -> dict[str, Any]:
    """Seconds of a run of the middle layer alone and of all, first and median; their ratio.

    `_cpu` is the time of the processors, which tells more than the clock on a busy machine.
    """
    config = PRESETS[preset]
    params = schema.init(families.rows(config), config.layers, seed=0)
    loaded, tokenizer = Loaded(config, params, None, "random"), tokenizers.load("bytes")
    corpus, target = text(config.vocab_size, rows, length), Target("token", "", np.array([TARGET]))
    planned = plan(corpus, target, truth(corpus, target, "next", tokenizer, None), settings)
    runs: dict[str, tuple[Tap, ...]] = {
        "single": (Tap("resid_post", config.layers // 2),),
        "sweep": sites("all", "resid_post", config),
    }
    times: dict[str, list[float]] = {f"{name}{clock}": [] for name in runs for clock in CLOCKS}
    for _ in range(repeats + 1):
        for name, at in runs.items():
            before = [clock() for clock in CLOCKS.values()]
            run_probes(loaded, tokenizer, "", "", planned, at, settings, execution)
            for (suffix, clock), was in zip(CLOCKS.items(), before, strict=True):
                times[name + suffix].append(clock() - was)
    median = {name: float(np.median(values[1:])) for name, values in times.items()}
    return {
        "preset": preset,
        "rows": rows,
        "length": length,
        "layers": {name: len(at) for name, at in runs.items()},
        "samples": len(planned.samples.place_N),
        "tokens": length * len(np.unique(planned.samples.place_N // length)),
        "repeats": repeats,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "dtype": execution.dtype,
        "first_seconds": {name: values[0] for name, values in times.items()},
        "seconds": median,
        "ratio": median["sweep"] / median["single"],
        "ratio_cpu": median["sweep_cpu"] / max(median["single_cpu"], 1e-9),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    first, median = result["first_seconds"], result["seconds"]
    lines = [
        f"{result['preset']}: {result['tokens']:,} tokens read, {result['samples']:,} kept, "
        f"{result['dtype']}, {result['device']}, jax {result['jax']}",
        f"{'run':8} {'layers':>6} {'seconds':>9} {'cpu':>9} {'first':>9}",
    ]
    for name, layers in result["layers"].items():
        lines.append(f"{name:8} {layers:6} {median[name]:9.2f} {median[f'{name}_cpu']:9.2f} "
                     f"{first[name]:9.2f}")  # fmt: skip
    lines.append(f"sweep / single: {result['ratio']:.2f} ({result['ratio_cpu']:.2f} of processor "
                 "time)")  # fmt: skip
    return "\n".join(lines)
