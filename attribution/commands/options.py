"""Options that several `attribute` commands share, and the spec they stand for."""

from typing import Any

import click

from core.command import NATURAL, SEED, options

gradient_options = options(
    click.option("--projection-dim", type=NATURAL, default=16,
                 help="P of the P x P projection of each site; 0 = unprojected"),
    click.option("--projection", type=click.Choice(["rademacher", "normal"]), default="rademacher"),
    click.option("--projection-seed", type=SEED, default=0),
    click.option("--include-bias", is_flag=True, help="the bias gradient as a last column"),
    click.option("--loss", type=click.Choice(["sum", "mean"]), default="sum",
                 help="of an example, over its supervised tokens"),
    click.option("--gradients", type=click.Choice(["weight", "adapter"]),
                 help="of the weights or the adapter's factors; default: adapter if there is one"),
)  # fmt: skip


def gradient_spec(opts: dict[str, Any], loaded: Any, row_norm: bool = False) -> Any:
    from attribution.gradients import Spec
    from attribution.projection import Projection
    from core.errors import InputError

    scale = "row_norm" if row_norm else "jl"
    projection = Projection(
        opts["projection_dim"], opts["projection"], scale, opts["projection_seed"]
    )
    if opts["gradients"] == "adapter" and not loaded.adapter:
        raise InputError("--gradients adapter needs a model with an adapter; give --adapter")
    lora = loaded.adapter.spec if loaded.adapter and opts["gradients"] != "weight" else None
    return Spec(projection, opts["include_bias"], opts["loss"], lora)
