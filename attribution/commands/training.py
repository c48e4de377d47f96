"""Options of commands that train again and again, and the settings they stand for."""

from typing import Any

import click

from core.command import NATURAL, POSITIVE, SEED, Finite, options

training_options = options(
    click.option("--steps", type=POSITIVE, help="optimizer steps; default: from --epochs"),
    click.option("--epochs", type=POSITIVE, default=1, help="passes over the rows"),
    click.option("--batch", type=POSITIVE, default=8, help="rows of an optimizer step"),
    click.option("--accumulate", type=POSITIVE, default=1, help="micro-batches of a step"),
    click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw"),
    click.option("--lr", type=Finite(0, 100, min_open=True), default=3e-4),
    click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]),
                 default="cosine"),
    click.option("--warmup", type=NATURAL, default=0, help="steps of linear warm-up"),
    click.option("--end", type=Finite(0, 1), default=0.1,
                 help="last learning rate, share of --lr"),
    click.option("--weight-decay", type=Finite(0), default=0.0, help="on matrices only"),
    click.option("--beta2", type=Finite(0, 1, max_open=True), default=0.95, help="of adamw"),
    click.option("--eps-root", type=Finite(0), default=0.0,
                 help="under adamw's square root; above 0 its steps are smooth in the weights"),
    click.option("--momentum", type=Finite(0, 1, max_open=True), default=0.0, help="of sgd"),
    click.option("--clip", type=Finite(0), default=1.0, help="global gradient norm; 0 = off"),
    click.option("--seed", type=SEED, default=0),
)  # fmt: skip


def training_settings(opts: dict[str, Any], rows: int) -> tuple[Any, Any]:
    """(`training.loop.Settings`, `training.optim.Optim`) for this many rows."""
    from training.loop import Settings
    from training.optim import Optim

    steps = opts["steps"] or max(round(opts["epochs"] * rows / opts["batch"]), 1)
    settings = Settings(steps, opts["batch"], opts["accumulate"], opts["seed"])
    optim = Optim(
        opts["optimizer"], opts["lr"], opts["schedule"], opts["warmup"], opts["end"],
        opts["weight_decay"], b2=opts["beta2"], eps_root=opts["eps_root"],
        momentum=opts["momentum"], clip=opts["clip"],
    )  # fmt: skip
    return settings, optim
