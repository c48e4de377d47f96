"""`attribute score`: the influence of pool rows on queries."""

from typing import Any

import click

from attribution.commands.options import gradient_options, gradient_spec
from core.command import (
    PATH,
    Door,
    Finite,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    out_option,
    running,
    show,
)


@click.command("score")
@model_option
@click.option("--pool", type=PATH, required=True, help="rows, or a store of `attribute build`")
@click.option("--query", type=PATH, required=True, help="rows")
@out_option
@click.option("--mode", type=click.Choice(["mean", "max", "each"]), default="mean",
              help="how the queries are put together")  # fmt: skip
@click.option("--precondition", type=click.Choice(["none", "query", "pool", "mixed"]),
              default="none", help="whose gradient autocorrelation is inverted")  # fmt: skip
@click.option("--damping", type=Finite(0), default=0.1, help="share of the mean eigenvalue")
@click.option("--unit-norm", is_flag=True, help="compare directions, not lengths")
@click.option("--convention", type=click.Choice(["clean", "notes"]), default="clean",
              help="see attribution/score.py; notes also takes normal projections with rows of "
              "unit length and mean losses")  # fmt: skip
@gradient_options
@batch_tokens_option
@execution_options
@click.pass_obj
def score(door: Door, **opts: Any) -> None:
    """Score every pool row by its influence on the query; positive = proponent."""
    from attribution import score as scores
    from attribution.store import Pass, Store, is_store
    from core.rows import same_tokenizer

    notes = opts["convention"] == "notes"
    if notes:
        opts |= {"projection": "normal", "loss": "mean"}
    with running("attribute score", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        spec = gradient_spec(opts, loaded, row_norm=notes)
        settings = scores.Settings(
            opts["mode"], opts["precondition"], opts["damping"], opts["unit_norm"],
            opts["convention"],
        )  # fmt: skip
        query_rows = door.rows(opts["query"], loaded)
        store = Store(opts["pool"]) if is_store(opts["pool"]) else None
        if store:
            store.check(spec, loaded.fingerprint)
        pool_rows = door.rows(store.rows_path if store else opts["pool"], loaded)
        if store:
            store.check_rows(pool_rows)
        same_tokenizer(pool_rows, query_rows)
        how = (spec, execution(opts), opts["batch_tokens"])
        query, pool = Pass(loaded, query_rows, *how), store or Pass(loaded, pool_rows, *how)
        summary = scores.score(run, pool, query, settings, pool_rows)
        run.finish(rows=summary["rows"])
        show(run.path, {"rows": summary["rows"], **summary["score"]})
