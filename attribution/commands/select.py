"""`attribute select`: rows chosen by score, or at random at the same cost."""

from typing import Any

import click

from core.command import PATH, POSITIVE, SEED, producing, show


@click.command("select")
@click.argument("scores", type=PATH)
@click.option("--rows", type=PATH, required=True, help="the rows that were scored")
@click.option("--k", type=POSITIVE, required=True, help="rows of the top")
@click.option("--strategy", type=click.Choice(["top", "bottom", "random", "matched-random"]),
              default="top")  # fmt: skip
@click.option("--seed", type=SEED, default=0, help="of random draws and of ties")
@click.option("--out", type=PATH, help="folder; default: SCORES/subsets/STRATEGY-kK-seedS")
def select(**opts: Any) -> None:
    """Choose rows by score, or at random with as many trained tokens as the top k."""
    from attribution import select as selection_of
    from core.rows import load_rows

    name = f"{opts['strategy']}-k{opts['k']}-seed{opts['seed']}"
    opts["out"] = opts["out"] or opts["scores"] / "subsets" / name
    with producing("attribute select", opts) as folder:
        if folder is not None:
            rows = load_rows(opts["rows"])
            selection = selection_of.select(
                opts["scores"], rows, opts["k"], opts["strategy"], opts["seed"], folder
            )
            show(opts["out"], selection, "strategy", "k", "seed", "rows", "trained_tokens")
