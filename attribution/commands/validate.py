"""`attribute validate`: are the scores true?"""

from typing import Any

import click

from attribution.commands.training import training_options, training_settings
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
              multiple=True, help="of the rows, removed; or size of a weight step. Several make "
              "a curve. Default: 0.01, half 0.5, weight-step 0.05 and 0.1")  # fmt: skip
@click.option("--count", type=POSITIVE,
              help="random subsets, default 100; for tail random removals, default 10")  # fmt: skip
@click.option("--seeds", type=POSITIVE, default=1, help="retrains of each subset, averaged")
@click.option("--bank", type=PATH,
              help="retrains to use and add to; default: SCORES/validation/bank")  # fmt: skip
@click.option("--controls/--no-controls", default=True,
              help="also random, length, loss, gradient norm, BM25, embedding cosine")  # fmt: skip
@training_options
@batch_tokens_option
@execution_options
@click.pass_obj
def validate(door: Door, **opts: Any) -> None:
    """Put SCORES to the test: retrain without rows from --model, or look for known causes.

    Give the training options that the scores are about. A table compares them with controls; a
    killed command goes on at the next retrain, and --bank shares retrains between scores.
    """
    from attribution.validation import validate as validation
    from attribution.validation.bank import Bank
    from attribution.validation.controls import controls
    from attribution.validation.scores import read_scores
    from core.rows import same_tokenizer

    opts["out"] = opts["out"] or opts["scores"] / "validation" / opts["protocol"]
    opts["bank"] = opts["bank"] or opts["scores"] / "validation" / "bank"
    with running("attribute validate", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        rows, query = (door.rows(opts[name], loaded) for name in ("rows", "query"))
        same_tokenizer(rows, query)
        scored = read_scores(opts["scores"], rows, query)
        names = ("protocol", "fractions", "count", "seeds", "seed")
        settings = validation.settings_of(*(opts[name] for name in names))
        protocol = validation.ask(settings, scored, rows, query)
        how = (execution(opts), opts["batch_tokens"])
        bank = None
        if opts["protocol"] in validation.RETRAINING:
            training = training_settings(opts, len(rows))
            bank = Bank(opts["bank"], loaded, rows, query, *training, *how)
        run.inputs(model=loaded.fingerprint, rows=rows.sha, query=query.sha, scores=scored.sha)
        if bank and (unused := len(rows) - bank.settings.steps * bank.settings.batch) > 0:
            click.echo(f"{unused} of {len(rows)} rows are never trained on; see --epochs", err=True)
        methods = {"scores": scored.scores_NC}
        if opts["controls"]:
            methods |= controls(scored, loaded, rows, query, *how, opts["seed"])
        result = validation.validate(run, settings, protocol, scored, methods, query, bank)
        run.finish()
        click.echo(validation.table(result["table"]))
        if not scored.same_query:
            click.echo(f"the scores are of another query than {opts['query']}")
        shown = {"protocol": opts["protocol"], "rows": len(rows), "queries": len(query)}
        losses = result.get("query_loss", {})
        show(run.path, shown | {f"loss_{when}_training": loss for when, loss in losses.items()})
