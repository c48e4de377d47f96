"""Options of every command that trains, and the settings they stand for.

Imports click alone at the top, so that `--help` stays instant.
"""

import math
from collections.abc import Callable
from typing import Any

import click

from core.command import NATURAL, POSITIVE, SEED, Finite, options


def training_options(**defaults: Any) -> Callable[[Any], Any]:
    """The decorator; `defaults` (by parameter name) are what a command has other defaults for."""

    def option(flag: str, default: Any, **how: Any) -> Callable[[Any], Any]:
        name = flag.split("/")[0].removeprefix("--").replace("-", "_")
        return click.option(flag, default=defaults.get(name, default), **how)

    share = Finite(0, 1, max_open=True)
    return options(
        click.option("--steps", type=POSITIVE, help="optimizer steps; default: from --epochs"),
        option("--epochs", 1, type=POSITIVE, help="passes over the rows"),
        option("--batch", 8, type=POSITIVE, help="rows of an optimizer step"),
        option("--accumulate", 1, type=POSITIVE, help="micro-batches of a step"),
        option("--shuffle/--no-shuffle", True, help="each pass in an order of its own, or as is"),
        option("--optimizer", "adamw", type=click.Choice(["adamw", "sgd", "muon"]),
               help="muon: of matrices, with adamw for the rest"),
        option("--lr", 3e-4, type=Finite(0, 100, min_open=True)),
        option("--schedule", "cosine",
               type=click.Choice(["constant", "linear", "cosine", "polynomial"])),
        option("--power", 1.0, type=Finite(0, min_open=True), help="of polynomial"),
        option("--warmup", 0, type=NATURAL, help="steps of linear warm-up"),
        click.option("--start", type=Finite(0, 1),
                     help="rate that the warm-up starts at, share of --lr; default: 1 / --warmup"),
        option("--end", 0.1, type=Finite(0, 1), help="last learning rate, share of --lr"),
        option("--weight-decay", 0.0, type=Finite(0), help="coupled in sgd, else decoupled"),
        click.option("--decay", multiple=True,
                     help="glob of Hugging Face parameter names that --weight-decay falls on, may "
                     "be repeated ('*': all); default: the matrices"),
        option("--beta1", 0.9, type=share, help="of adamw"),
        option("--beta2", 0.95, type=share, help="of adamw"),
        option("--eps-root", 0.0, type=Finite(0),
               help="under adamw's square root; above 0 its steps are smooth in the weights"),
        click.option("--momentum", type=share, help="default: 0 of sgd, 0.95 of muon"),
        option("--nesterov", False, is_flag=True, help="of sgd; muon's momentum always is"),
        option("--clip", 1.0, type=Finite(0), help="global gradient norm; 0 = off"),
        option("--seed", 0, type=SEED),
    )  # fmt: skip


def optimizer(opts: dict[str, Any]) -> Any:
    """The `training.optim.Optim` of these options; what an old run has not recorded is default."""
    from dataclasses import fields

    from training.optim import Optim

    spelled = {"name": "optimizer", "b1": "beta1", "b2": "beta2"}
    named = {field.name: spelled.get(field.name, field.name) for field in fields(Optim)}
    given = {name: opts[option] for name, option in named.items() if option in opts}
    given["decay"] = tuple(given.get("decay", ()))
    if given.get("momentum") is None:
        given["momentum"] = 0.95 if given["name"] == "muon" else 0.0
    return Optim(**given)


def training_settings(opts: dict[str, Any], rows: int, finite: bool = False) -> tuple[Any, Any]:
    """(`training.loop.Settings`, `training.optim.Optim`) for this many rows.

    finite: without --steps, each row is drawn exactly --epochs times and the last batch may lack
    some; otherwise rows go on into further passes, and the number of steps is rounded.
    """
    from training.loop import Settings

    total, drawn = opts["epochs"] * rows, None
    if opts["steps"]:
        steps = opts["steps"]
    elif finite:
        steps, drawn = math.ceil(total / opts["batch"]), total
    else:
        steps = max(round(total / opts["batch"]), 1)
    how = (opts["batch"], opts["accumulate"], opts["seed"])
    settings = Settings(steps, *how, shuffle=opts["shuffle"], drawn=drawn)
    return settings, optimizer(opts)
