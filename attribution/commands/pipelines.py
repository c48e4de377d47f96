"""Published methods in one command each: trackstar, ekfac, trak, less, source."""

from typing import Any

import click

from attribution.commands.options import finish, loss_options, module_options, spec_and_normalizer
from attribution.commands.score import score
from core.command import (
    NATURAL,
    PATH,
    POSITIVE,
    SEED,
    Door,
    Finite,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    options,
    out_option,
    running,
)

rows_options = options(
    click.option("--pool", type=PATH, required=True, help="rows to score"),
    click.option("--query", type=PATH, required=True, help="rows"),
    out_option,
    click.option("--mode", type=click.Choice(["mean", "max", "each"]), default="mean",
                 help="how the queries are put together"),
)  # fmt: skip
run_option = click.option(
    "--run", "trained", type=PATH, required=True,
    help="finished `train lm` that kept checkpoints (--save-every, --keep)",
)  # fmt: skip
damping_option = click.option(
    "--damping", type=Finite(0), default=0.1, help="share of the mean eigenvalue"
)
fit_options = options(
    click.option("--method", type=click.Choice(["kfac", "tkfac", "shampoo"]), default="kfac",
                 help="of the Kronecker factors"),
    click.option("--corrected/--no-corrected", default=True,
                 help="measure the eigenvalues in a second pass (EK-FAC)"),
    click.option("--labels", type=click.Choice(["sampled", "empirical"]), default="sampled",
                 help="of the Fisher matrix: the model's own, or the data's"),
    click.option("--seed", type=SEED, default=0, help="of sampled labels and documents"),
)  # fmt: skip


def fit_settings(opts: dict[str, Any]) -> Any:
    from attribution.curvature.kronecker import Settings

    return Settings(opts["method"], opts["corrected"], opts["labels"], opts["seed"])


def load(door: Door, opts: dict[str, Any], loaded: Any) -> tuple[Any, Any]:
    """Pool and query rows, made with one tokenizer."""
    from core.rows import same_tokenizer

    pool, query = door.rows(opts["pool"], loaded), door.rows(opts["query"], loaded)
    same_tokenizer(pool, query)
    return pool, query


@click.command("trackstar")
@model_option
@rows_options
@damping_option
@click.option("--projection-dim", type=POSITIVE, default=16, help="P of the P x P projection")
@click.option(
    "--normalizer", type=PATH, help="second moments: a training run, or a .safetensors or .npz file"
)
@click.option(
    "--mix-components",
    type=POSITIVE,
    default=1000,
    help="the eigenvalue at which the queries' and the pool's are made alike",
)
@module_options
@batch_tokens_option
@execution_options
@click.pass_context
def trackstar(context: click.Context, **opts: Any) -> None:
    """Cosines of gradients whitened by the mixed autocorrelation; a preset of `score`."""
    given = {"precondition": "mixed", "unit_norm": True, **opts}
    context.invoke(score, **given)


@click.command("ekfac")
@model_option
@rows_options
@click.option("--fit-rows", type=PATH, help="rows that the curvature is of; default: the pool")
@click.option(
    "--factors", type=PATH, help="folder of a fit, to make or to use again; default: OUT/factors"
)
@fit_options
@click.option(
    "--inversion",
    default="damped",
    type=click.Choice(["damped", "absolute", "pseudo", "tikhonov", "factored"]),
    help="what becomes of small eigenvalues",
)
@damping_option
@click.option(
    "--cg-steps", type=NATURAL, default=0, help="steps of conjugate gradients from there; 0 = none"
)
@click.option(
    "--cg-documents", type=POSITIVE, default=256, help="rows of their Gauss-Newton matrix at most"
)
@click.option("--tokens", is_flag=True, help="what each token adds to its row's score, as well")
@click.option(
    "--token-side",
    type=click.Choice(["gradient", "loss"]),
    default="loss",
    help="a token's share by its own loss, or by what passes through its position",
)
@module_options
@loss_options
@batch_tokens_option
@execution_options
@click.pass_obj
def ekfac(door: Door, **opts: Any) -> None:
    """<g, H^-1 q> with EK-FAC curvature (or K-FAC, TKFAC, Shampoo; refined by --cg-steps)."""
    from attribution.pipelines import ekfac as pipeline
    from attribution.store import Pass

    with running("attribute ekfac", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        spec, _ = spec_and_normalizer(opts, loaded)
        pool_rows, query_rows = load(door, opts, loaded)
        fit_rows = door.rows(opts["fit_rows"], loaded) if opts["fit_rows"] else pool_rows
        settings = pipeline.Settings(
            fit_settings(opts),
            opts["inversion"],
            opts["damping"],
            opts["cg_steps"],
            opts["cg_documents"],
            opts["mode"],
            opts["token_side"] if opts["tokens"] else None,
        )
        pool = Pass(loaded, pool_rows, spec, execution(opts), opts["batch_tokens"])
        finish(
            run, pipeline.ekfac(run, pool, pool.of(query_rows), fit_rows, settings, opts["factors"])
        )


@click.command("trak")
@model_option
@rows_options
@damping_option
@click.option(
    "--projection",
    default="normal",
    help="entries of the sketch",
    type=click.Choice(["rademacher", "normal", "bergson-rademacher", "bergson-normal"]),
)
@click.option(
    "--projection-dim",
    type=POSITIVE,
    default=64,
    help="P of the P x P sketch of all sites (of bergson-*, its whole length)",
)
@click.option("--projection-seed", type=SEED, default=0)
@click.option(
    "--members", type=POSITIVE, default=1, help="sketches that are averaged, of the next seeds"
)
@click.option(
    "--member-model",
    type=PATH,
    multiple=True,
    help="a further model of the ensemble, may be repeated",
)
@module_options
@batch_tokens_option
@execution_options
@click.pass_obj
def trak(door: Door, **opts: Any) -> None:
    """Sketched gradients of log-odds, whitened by their Gram matrix, times 1 - p."""
    from attribution.pipelines import trak as pipeline
    from attribution.store import Pass

    with running("attribute trak", opts) as run:
        if run is None:
            return
        members = []
        for path in (opts["model"], *opts["member_model"]):
            loaded = load_model(path, opts["adapter"])
            pool_rows, query_rows = load(door, opts, loaded)
            for number in range(opts["members"]):
                seed = opts["projection_seed"] + number
                given = {"objective": "log-odds", "projection_target": "global"}
                spec, _ = spec_and_normalizer({**opts, **given, "projection_seed": seed}, loaded)
                pool = Pass(loaded, pool_rows, spec, execution(opts), opts["batch_tokens"])
                members.append(pipeline.Member(pool, pool.of(query_rows)))
        finish(run, pipeline.trak(run, members, opts["damping"], opts["mode"]))


@click.command("less")
@run_option
@rows_options
@click.option(
    "--loss",
    type=click.Choice(["sum", "mean"]),
    default="mean",
    help="of an example, over its supervised tokens",
)
@module_options
@batch_tokens_option
@execution_options
@click.pass_obj
def less(door: Door, **opts: Any) -> None:
    """Cosines of Adam's updates of an adapter with the queries, over a run's checkpoints."""
    from attribution.pipelines import less as pipeline

    with running("attribute less", opts) as run:
        if run is None:
            return
        trajectory, make, pool, query = over_run(door, opts)
        finish(run, pipeline.less(run, trajectory, pool, query, make, opts["mode"]))


@click.command("source")
@run_option
@rows_options
@click.option("--segments", type=POSITIVE, default=3, help="of the training; divides checkpoints")
@click.option("--as-sgd", is_flag=True, help="the plain formula, even of a run with Adam")
@fit_options
@damping_option
@loss_options
@module_options
@batch_tokens_option
@execution_options
@click.pass_obj
def source(door: Door, **opts: Any) -> None:
    """Influence through a training's segments, over a run's checkpoints."""
    from attribution.pipelines import source as pipeline

    with running("attribute source", opts) as run:
        if run is None:
            return
        trajectory, make, pool, query = over_run(door, opts)
        settings = pipeline.Settings(
            opts["segments"], fit_settings(opts), opts["damping"], opts["as_sgd"], opts["mode"]
        )
        finish(run, pipeline.source(run, trajectory, pool, query, make, settings))


def over_run(door: Door, opts: dict[str, Any]) -> Any:
    """(the run's checkpoints, a pass over rows at a model of them, pool and query rows)."""
    from attribution.pipelines.trajectory import open_trajectory
    from attribution.store import Pass

    trajectory = open_trajectory(opts["trained"])
    loaded = trajectory.at(len(trajectory.steps) - 1).loaded
    spec, _ = spec_and_normalizer(opts, loaded)

    def make(loaded: Any, rows: Any) -> Any:
        return Pass(loaded, rows, spec, execution(opts), opts["batch_tokens"])

    return trajectory, make, *load(door, opts, loaded)
