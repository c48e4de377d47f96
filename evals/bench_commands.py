"""The benchmarks of evals. Nothing heavy is imported before one of them runs."""

from typing import Any

import click

from core.command import (
    POSITIVE,
    batch_tokens_option,
    benchmark,
    execution,
    execution_options,
    preset_option,
    result_option,
)


@click.command("eval")
@click.option("--vocab", "vocabularies", type=click.Choice(["1280", "262144"]), multiple=True,
              default=("1280", "262144"), help="words of the model, may be repeated")  # fmt: skip
@click.option("--repeats", type=POSITIVE, default=3, help="alternating, of which the median")
@result_option
@batch_tokens_option
@execution_options
def bench_eval(**opts: Any) -> None:
    """Time the benchmark scorer against one padded row and all logits for each request."""
    from evals.bench_scorer import CASES, bench, table

    cases = [case for case in CASES if str(case.vocab) in opts["vocabularies"]]
    how = (opts["batch_tokens"], opts["repeats"], execution(opts))
    benchmark(opts["out"], table, bench, cases, *how)


@click.command("generate")
@preset_option
@click.option("--batch", type=POSITIVE, default=8, help="rows")
@click.option("--prompt-length", type=POSITIVE, default=128, help="tokens of a prompt")
@click.option("--new-tokens", type=POSITIVE, default=33, help="rounded up to 1 + whole calls")
@click.option("--repeats", type=POSITIVE, default=5, help="alternating, of which the median")
@result_option
@execution_options
def bench_generate(**opts: Any) -> None:
    """Time prefill and decoding against reading all weights once and against no cache."""
    from evals.bench import bench, table

    benchmark(
        opts["out"], table, bench,
        opts["preset"], opts["batch"], opts["prompt_length"], opts["new_tokens"],
        opts["repeats"], execution(opts),
    )  # fmt: skip


@click.command("probe")
@preset_option
@click.option("--rows", type=POSITIVE, default=256, help="made-up ones")
@click.option("--length", type=POSITIVE, default=256, help="tokens of a row")
@click.option("--samples", type=POSITIVE, default=500, help="positives to train on")
@click.option("--repeats", type=POSITIVE, default=3, help="alternating, of which the median")
@result_option
@batch_tokens_option
@execution_options
def bench_probe(**opts: Any) -> None:
    """Time a sweep of probes over all layers against a probe of one."""
    from evals.bench_probe import bench, table
    from evals.probe.run import Settings

    settings = Settings(samples=opts["samples"], batch_tokens=opts["batch_tokens"])
    benchmark(
        opts["out"], table, bench,
        opts["preset"], opts["rows"], opts["length"], settings, opts["repeats"], execution(opts),
    )  # fmt: skip
