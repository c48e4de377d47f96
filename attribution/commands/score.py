"""`attribute score`: the influence of pool rows on queries."""

from typing import Any

import click

from attribution.commands.options import finish, gradient_options, spec_and_normalizer
from core.command import (
    NATURAL,
    PATH,
    POSITIVE,
    Door,
    Finite,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    out_option,
    running,
)


@click.command("score")
@model_option
@click.option("--pool", type=PATH, required=True, help="rows, or a store of `attribute build`")
@click.option("--query", type=PATH, help="rows; not needed for --mode self")
@out_option
@click.option("--control", type=PATH, help="rows whose mean gradient is taken off the queries'")
@click.option("--mode", type=click.Choice(["mean", "max", "each", "self"]), default="mean",
              help="how queries are put together; self: a row on itself")  # fmt: skip
@click.option("--precondition", type=click.Choice(["none", "query", "pool", "mixed"]),
              default="none", help="whose gradient autocorrelation is inverted")  # fmt: skip
@click.option("--inversion", type=click.Choice(["damped", "absolute", "pseudo", "tikhonov"]),
              default="damped", help="what becomes of small eigenvalues")  # fmt: skip
@click.option("--damping", type=Finite(0), default=0.1, help="share of the mean eigenvalue")
@click.option("--mix-components", type=POSITIVE, default=1000,
              help="the eigenvalue at which mixed ones are made alike")  # fmt: skip
@click.option("--unit-norm", is_flag=True, help="compare directions, not lengths")
@click.option("--convention", type=click.Choice(["clean", "notes"]), default="clean",
              help="see attribution/score.py; notes also takes normal projections with rows of "
              "unit length and mean losses")  # fmt: skip
@click.option("--exact", is_flag=True, help="without projection, preconditioner or unit norm")
@click.option("--tokens", is_flag=True, help="what each token adds to its row's score, as well")
@click.option("--token-side", type=click.Choice(["gradient", "loss"]), default="gradient",
              help="a token's share by what passes through its position, or, with --exact, by its "
              "own loss")  # fmt: skip
@click.option("--candidates", type=PATH,
              help="score only these rows: a file of numbers, or a scores folder")  # fmt: skip
@click.option("--candidates-top", type=POSITIVE, help="the best so many of a folder of scores")
@click.option("--query-batch", type=NATURAL, default=0,
              help="queries held at once where kept apart; 0 = as many as fit")  # fmt: skip
@gradient_options
@batch_tokens_option
@execution_options
@click.pass_obj
def score(door: Door, **opts: Any) -> None:
    """Score every pool row by its influence on the query; positive = proponent."""
    from core import distributed

    distributed.start()
    from attribution import directions
    from attribution import score as scores
    from attribution.outputs import Scored, candidates
    from attribution.projection import Projection
    from attribution.store import Pass, Store, is_store
    from core.errors import InputError
    from core.rows import same_tokenizer

    notes, exact, tokens = opts["convention"] == "notes", opts["exact"], opts["tokens"]
    if notes:
        opts |= {"projection": "normal", "loss": "mean"}
    if opts["query"] is None and opts["mode"] != "self":
        raise InputError("--query is missing; give rows (only --mode self needs none)")
    if (opts["candidates_top"] is not None) > (opts["candidates"] is not None):
        raise InputError("--candidates-top needs --candidates, a folder of scores")
    if opts["token_side"] == "loss" and not (tokens and exact):
        raise InputError("--token-side loss needs --tokens and --exact")
    mode: Any = opts["mode"]
    settings = scores.Settings(
        mode, opts["precondition"], opts["damping"], opts["unit_norm"],
        opts["convention"], opts["inversion"], opts["mix_components"], tokens,
        opts["query_batch"],
    )  # fmt: skip
    changed = notes or opts["unit_norm"] or opts["precondition"] != "none"
    if exact and (changed or mode == "self"):
        raise InputError("--exact scores are plain inner products with queries; leave --convention "
                         "notes, --unit-norm, --precondition and --mode self out")  # fmt: skip
    with running("attribute score", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        spec, normalizer = spec_and_normalizer(opts, loaded, row_norm=notes)
        spec = spec._replace(projection=Projection(0)) if exact else spec
        store = Store(opts["pool"], split=True) if is_store(opts["pool"]) else None
        if store:
            store.check(spec, loaded.fingerprint)
        pool_rows = door.rows(store.rows_path if store else opts["pool"], loaded)
        if store:
            store.check_rows(pool_rows)
        query_rows = door.rows(opts["query"], loaded) if opts["query"] else pool_rows
        same_tokenizer(pool_rows, query_rows)
        how = (spec, execution(opts), opts["batch_tokens"], normalizer)
        query = Pass(loaded, query_rows, *how)
        control = query.of(door.rows(opts["control"], loaded)) if opts["control"] else None
        pool: Any = store or Pass(loaded, pool_rows, *how, split=True)
        chosen = None
        if opts["candidates"]:
            chosen = candidates(opts["candidates"], opts["candidates_top"], pool_rows)
        scored = Scored(pool_rows, chosen)
        if exact:
            side = opts["token_side"] if tokens else None
            summary = directions.score_exact(
                run, pool, query, scored, mode, side, opts["query_batch"], control
            )
        else:
            summary = scores.score(run, pool, query, settings, scored, control)
        finish(run, summary)
