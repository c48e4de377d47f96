"""Options that several `attribute` commands share, and what they stand for."""

from typing import Any

import click

from core.command import NATURAL, PATH, SEED, Finite, options, show

KINDS = ["rademacher", "normal", "bergson-rademacher", "bergson-normal"]

module_options = options(
    click.option("--modules", multiple=True,
                 help="glob of Hugging Face module names to collect, may be repeated; names also "
                 "embedding and output matrix; default: the blocks' linear maps"),
    click.option("--exclude", multiple=True, help="glob of module names to leave out"),
    click.option("--include-bias", is_flag=True, help="the bias gradient as a last column"),
    click.option("--gradients", type=click.Choice(["weight", "adapter"]),
                 help="of the weights or the adapter's factors; default: adapter if there is one"),
)  # fmt: skip
loss_options = options(
    click.option("--loss", type=click.Choice(["sum", "mean"]), default="sum",
                 help="of an example, over its supervised tokens"),
    click.option("--objective", type=click.Choice(["nll", "log-odds", "kl"]), default="nll",
                 help="of a token; kl: from the model with the adapter to the one without"),
    click.option("--label-smoothing", type=Finite(0, 1, max_open=True), default=0.0),
)  # fmt: skip
projection_options = options(
    click.option("--projection-dim", type=NATURAL, default=16,
                 help="P of the P x P projection of each site; 0 = unprojected"),
    click.option("--projection", type=click.Choice(KINDS), default="rademacher",
                 help="entries; bergson-*: Bergson's own matrices"),
    click.option("--projection-target", type=click.Choice(["site", "global"]), default="site",
                 help="P x P for each site, or one sketch of P x P for all"),
    click.option("--projection-seed", type=SEED, default=0),
    click.option("--heads", is_flag=True, help="split the attention's outputs by head"),
)  # fmt: skip
gradient_options = options(
    projection_options,
    module_options,
    loss_options,
    click.option("--normalizer", type=PATH,
                 help="second moments that gradients are divided by: a training run, or a "
                 ".safetensors or .npz file"),
)  # fmt: skip


def spec_and_normalizer(opts: dict[str, Any], loaded: Any, row_norm: bool = False) -> Any:
    """What the options say is collected, and the second moments that it is divided by, or None.

    Of `gradient_options`, those that a command has not are at their defaults.
    """
    from attribution import normalizer
    from attribution.projection import Projection
    from attribution.targets import Spec, targets
    from core.errors import InputError
    from core.loss import Objective

    if opts.get("gradients") == "adapter" and not loaded.adapter:
        raise InputError("--gradients adapter needs a model with an adapter; give --adapter")
    lora = loaded.adapter.spec if loaded.adapter and opts.get("gradients") != "weight" else None
    objective = Objective(opts.get("objective", "nll"), opts.get("label_smoothing", 0.0))
    if objective.kind == "kl" and loaded.adapter is None:
        raise InputError("--objective kl compares a model with its adapter to the one without; "
                         "give --adapter, or use nll")  # fmt: skip
    if objective.kind != "nll" and objective.smoothing:
        raise InputError(f"--label-smoothing goes with --objective nll, not {objective.kind}; "
                         "leave it out")  # fmt: skip
    projection = Projection(
        opts.get("projection_dim", 0), opts.get("projection", "rademacher"),
        "row_norm" if row_norm else "jl", opts.get("projection_seed", 0),
        opts.get("projection_target", "site"),
    )  # fmt: skip
    spec = Spec(
        projection, opts.get("include_bias", False), opts.get("loss", "sum"), lora, objective,
        tuple(opts.get("modules", ())), tuple(opts.get("exclude", ())), opts.get("heads", False),
    )  # fmt: skip
    found = targets(loaded.config, spec)
    if not opts.get("normalizer"):
        return spec, None
    moments = normalizer.load(opts["normalizer"], loaded.config, found, spec.include_bias)
    return spec._replace(normalizer=normalizer.identity(moments)), moments


def finish(run: Any, summary: dict[str, Any]) -> None:
    """End a run that scored rows: a line about the scores and what they are of."""
    from core.files import read_json

    run.finish(rows=summary["rows"])
    covered = read_json(run.path / "info.json")["coverage"]
    shares = {f"share_of_{name}": share for name, share in covered.items()}
    show(run.path, {"rows": summary["rows"], **summary["score"], **shares})
