"""The benchmarks of attribution. Nothing heavy is imported before one of them runs."""

from typing import Any

import click

from core.command import (
    POSITIVE,
    benchmark,
    execution,
    execution_options,
    preset_option,
    result_option,
)


@click.command("attribution")
@preset_option
@click.option("--batch", type=POSITIVE, default=8, help="rows")
@click.option("--length", type=POSITIVE, default=256, help="tokens of a row")
@click.option("--projection-dim", type=POSITIVE, multiple=True, default=(16, 32),
              help="P of the P x P projection, may be repeated")  # fmt: skip
@click.option("--repeats", type=POSITIVE, default=7, help="alternating, of which the median")
@click.option("--program", "programs", multiple=True, help="to time beside value_and_grad, may be "
              "repeated (see attribution/bench.py); default: all")  # fmt: skip
@click.option("--parts/--no-parts", default=False, help="also time a training step's pieces")
@result_option
@execution_options
def bench_attribution(**opts: Any) -> None:
    """Time attribution's passes against value-and-grad, forward and vmap(grad)."""
    from attribution.bench import PROGRAMS, bench, table
    from core.errors import InputError

    if unknown := sorted({*opts["programs"]} - {*PROGRAMS}):
        raise InputError(f"--program {unknown[0]} is unknown; known: {', '.join(PROGRAMS)}")
    benchmark(
        opts["out"], table, bench,
        opts["preset"], opts["batch"], opts["length"], opts["projection_dim"], opts["repeats"],
        opts["programs"] or PROGRAMS, opts["parts"], execution(opts),
    )  # fmt: skip


@click.command("magic")
@preset_option
@click.option("--batch", type=POSITIVE, default=8, help="rows")
@click.option("--length", type=POSITIVE, default=256, help="tokens of a row")
@click.option("--queries", type=POSITIVE, default=8, help="walked back together, beside one alone")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw", "muon"]), default="sgd")
@click.option("--repeats", type=POSITIVE, default=5, help="alternating, of which the median")
@click.option("--reverse/--no-reverse", default=False, help="also reverse-over-reverse")
@click.option("--memory-only", is_flag=True, help="compile and run nothing; fits anywhere")
@result_option
@execution_options
def bench_magic(**opts: Any) -> None:
    """Time a training step walked backwards, and what it holds, against the step."""
    from attribution.magic.bench import bench, table
    from training.optim import Optim

    momentum = 0.95 if opts["optimizer"] == "muon" else 0.0
    optim = Optim(
        opts["optimizer"], schedule="constant", clip=0.0, eps_root=1e-8, momentum=momentum
    )
    benchmark(
        opts["out"], table, bench,
        opts["preset"], opts["batch"], opts["length"], opts["queries"], optim,
        0 if opts["memory_only"] else opts["repeats"], opts["reverse"], execution(opts),
    )  # fmt: skip
