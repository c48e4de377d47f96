"""`attribute validate`: are the scores true?"""

from pathlib import Path
from typing import Any

import click

from attribution.commands.recorded import recorded
from core.command import (
    PATH,
    POSITIVE,
    Door,
    Finite,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    running,
    show,
)
from training.options import training_options, training_settings


@click.command("validate")
@click.argument("scores", type=PATH)
@model_option
@click.option("--rows", type=PATH, required=True, help="the rows that were scored")
@click.option("--query", type=PATH, required=True, help="rows")
@click.option("--out", type=PATH, help="folder; default: SCORES/validation/PROTOCOL")
@click.option("--protocol", default="drop",
              type=click.Choice(["drop", "half", "tail", "weight-step", "recall", "mislabelled"]),
              help="drop, half: LDS; tail: QLD of the top; weight-step: first-order check; "
              "recall: rows that state a query's fact; mislabelled: AUC")  # fmt: skip
@click.option("--fraction", "fractions", type=Finite(0, 1, min_open=True, max_open=True),
              multiple=True, help="of the units, removed; or size of a weight step. Several make "
              "a curve. Default: 0.01, half 0.5, weight-step 0.05 and 0.1")  # fmt: skip
@click.option(
    "--units",
    type=click.Choice(["row", "token"]),
    default="row",
    help="what is removed; token: supervised ones, where the folder has their scores",
)
@click.option("--count", type=POSITIVE,
              help="random subsets, default 100; for tail random removals, default 10")  # fmt: skip
@click.option("--seeds", type=POSITIVE, default=1, help="retrains of each subset, averaged")
@click.option("--bank", type=PATH,
              help="retrains to use and add to; default: SCORES/validation/bank")  # fmt: skip
@click.option("--controls/--no-controls", default=True,
              help="also random, length, loss, gradient norm, BM25, embedding cosine; for tokens "
              "random, loss, their row's score")  # fmt: skip
@training_options()
@batch_tokens_option
@execution_options
@click.pass_context
def validate(ctx: click.Context, **opts: Any) -> None:
    """Put SCORES to the test: retrain without rows from --model, or look for known causes.

    Give the training options that the scores are about; MAGIC's know them. A table compares them
    with controls; a killed command goes on at the next retrain, and --bank shares retrains between
    scores.
    """
    from attribution.select import read_info
    from attribution.validation import validate as validation
    from attribution.validation.bank import Bank
    from attribution.validation.controls import controls, token_controls
    from attribution.validation.scores import asked, of_tokens, read_scores
    from core.rows import same_tokenizer

    door: Door = ctx.obj
    by_token = opts["units"] == "token"
    mark = f"{opts['protocol']}{'-token' if by_token else ''}"
    opts["out"] = opts["out"] or opts["scores"] / "validation" / mark
    opts["bank"] = opts["bank"] or opts["scores"] / "validation" / "bank"
    info = read_info(opts["scores"])
    held = recorded(ctx, opts, info)
    with running("attribute validate", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        rows, query = (door.rows(opts[name], loaded) for name in ("rows", "query"))
        same_tokenizer(rows, query)
        control = None
        if held:
            loaded = held.start(loaded)
            if held.control:
                control = door.rows(Path(held.control["path"]), loaded)
        functional, texts = asked(info, query, control)
        of_rows = scored = read_scores(opts["scores"], rows, query, len(functional.names))
        if by_token:
            scored = of_tokens(opts["scores"], of_rows, rows)
        names = ("protocol", "fractions", "count", "seeds", "seed")
        settings = validation.settings_of(*(opts[name] for name in names))
        protocol = validation.ask(settings, scored, rows, texts)
        how = (execution(opts), opts["batch_tokens"])
        bank, unused = None, 0
        if opts["protocol"] in validation.RETRAINING:
            plan, optim = held[:2] if held else training_settings(opts, len(rows))
            way = (plan, optim, held.execution if held else how[0], opts["batch_tokens"])
            bank = Bank(opts["bank"], loaded, rows, functional, *way)
            unused = len(rows) - (plan.drawn or plan.steps * plan.batch)
        run.inputs(model=loaded.fingerprint, rows=rows.sha, query=query.sha, scores=scored.sha)
        if unused > 0:
            click.echo(f"{unused} of {len(rows)} rows are never trained on; see --epochs", err=True)
        methods = {"scores": scored.scores_NC}
        if opts["controls"] and by_token:
            methods |= token_controls(scored, of_rows, loaded, rows, *how, opts["seed"])
        elif opts["controls"]:
            methods |= controls(scored, loaded, rows, texts, *how, opts["seed"])
        result = validation.validate(run, settings, protocol, scored, methods, texts, bank)
        run.finish()
        click.echo(validation.table(result["table"]))
        if not scored.same_query:
            click.echo(f"the scores are of another query than {opts['query']}")
        shown = {"protocol": opts["protocol"], "rows": len(rows), "queries": len(texts)}
        losses = result.get("query_loss", {})
        show(run.path, shown | {f"loss_{when}_training": loss for when, loss in losses.items()})
