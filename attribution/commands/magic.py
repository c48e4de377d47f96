"""`attribute magic`: what each token of a training run did to a query."""

from typing import Any

import click

from core.command import (
    MODEL,
    PATH,
    POSITIVE,
    Door,
    Finite,
    adapter_option,
    batch_tokens_option,
    dtype_option,
    execution,
    load_model,
    lora_options,
    options,
    out_option,
    program_options,
    running,
    show,
    trained_adapter,
)
from training.options import training_options, training_settings

# The notes' setting: what MAGIC's commands train like unless they are told otherwise.
magic_training = options(
    training_options(
        optimizer="sgd", lr=1e-4, schedule="constant", end=0.0, batch=4, eps_root=1e-8, clip=0.0
    ),
    lora_options,
)


def course_of(opts: dict[str, Any], loaded: Any, rows: Any, replayed: bool = False) -> Any:
    """The `training.course.Course` that these options ask for, and says what is wrong with it."""
    from training.course import Course

    settings, optim = training_settings(opts, len(rows), finite=not replayed)
    held = trained_adapter(opts, loaded)
    if held and held.spec.dropout and opts["lora_dropout"] is None and not replayed:
        import dataclasses

        held = held._replace(spec=dataclasses.replace(held.spec, dropout=0.0))
        click.echo("the adapter's dropout is off; --lora-dropout turns it on", err=True)
    if held and held.spec.dropout:
        click.echo("--lora-dropout: the scores will be about one draw of its masks, which "
                   "retraining does not repeat; they may predict nothing", err=True)  # fmt: skip
    if optim.name == "adamw" and not optim.eps_root:
        click.echo("--eps-root 0: the derivative of 1 / sqrt(v) is nearly unbounded where v is "
                   "near 0, so scores predict retraining worse and may overflow; 1e-8 to 1e-6 make "
                   "the steps smooth", err=True)  # fmt: skip
    return Course(loaded._replace(adapter=held), rows, settings, optim, execution(opts))


@click.command("magic")
@click.option("--model", type=MODEL,
              help="model folder, finished run, Hugging Face folder or hub name")  # fmt: skip
@adapter_option
@click.option("--rows", type=PATH, help="rows to train on, whose tokens are scored")
@click.option("--run", "trained", type=PATH,
              help="finished `train lm` to walk back, instead of --model and --rows")  # fmt: skip
@click.option("--query", type=PATH, required=True, help="rows whose loss is asked about")
@click.option("--control", type=PATH, help="rows whose mean loss is taken off the query's")
@out_option
@click.option("--query-mode", type=click.Choice(["mean", "each"]), default="mean",
              help="one score for the mean over the query's tokens, or one a row")  # fmt: skip
@click.option("--query-loss", type=click.Choice(["nll", "margin"]), default="nll",
              help="margin: of the right choice (`data query --choices all`)")  # fmt: skip
@click.option("--query-batch", type=POSITIVE, default=8, help="queries walked back together")
@click.option("--target", type=click.Choice(["token", "example", "document"]), default="token",
              help="what is credited; document: also those inside packed rows")  # fmt: skip
@click.option("--save-mode", default="sqrt",
              type=click.Choice(["sqrt", "all", "log", "interval"]),
              help="which states of the training are kept for the way back")  # fmt: skip
@click.option("--save-every", type=POSITIVE, default=50, help="steps, of --save-mode interval")
@click.option("--memory-gb", type=Finite(0), default=4.0,
              help="kept states beyond this go to disk")  # fmt: skip
@click.option("--metasmoothness/--no-metasmoothness", "smoothness", default=True,
              help="train twice more to see if derivatives can predict retraining")  # fmt: skip
@magic_training
@batch_tokens_option
@dtype_option("float32", "float64", "bfloat16")
@click.option("--force", is_flag=True, help="with --dtype bfloat16: go on all the same")
@program_options
@click.pass_context
def magic(ctx: click.Context, **opts: Any) -> None:
    """Train --model on --rows, or --run again, and differentiate the query's loss through it all.

    Each token gets d(query loss) / d(weight of the token): negative = training on the token lowers
    the query's loss. The trained model stays in OUT/model.
    """
    import jax

    from attribution.commands import replayed
    from attribution.magic import documents, functional, outputs, smoothness, walk
    from core.errors import InputError
    from core.rows import same_tokenizer

    door: Door = ctx.obj
    past = opts["trained"]
    if past:
        opts |= replayed.options_of(ctx, past)
    elif opts["model"] is None or opts["rows"] is None:
        raise InputError("give --model and --rows, or --run")
    if opts["dtype"] == "bfloat16" and not opts["force"]:
        raise InputError("--dtype bfloat16: derivatives through rounded steps are mostly rounding; "
                         "use float32, or --force")  # fmt: skip
    with running("attribute magic", opts) as run:
        if run is None:
            return
        jax.config.update("jax_enable_x64", opts["dtype"] == "float64")
        loaded = (
            replayed.start_of(past, opts) if past else load_model(opts["model"], opts["adapter"])
        )
        rows, query = (door.rows(opts[name], loaded) for name in ("rows", "query"))
        same_tokenizer(rows, query)
        if past:
            replayed.check_rows(past, rows)
        control = door.rows(opts["control"], loaded) if opts["control"] else None
        asked = functional.functional(query, opts["query_mode"], opts["query_loss"], control)
        packed = documents.documents(rows) if opts["target"] == "document" else None
        settings = walk.Settings(
            opts["target"], opts["query_batch"], opts["save_mode"], opts["save_every"],
            int(opts["memory_gb"] * 1e9), opts["batch_tokens"],
        )  # fmt: skip
        tokenizer = door.own(loaded)
        loaded = loaded if tokenizer else loaded._replace(tokenizer=None)
        course = course_of(opts, loaded, rows, past is not None)
        way = walk.Walk(run.path, course, asked, settings)
        run.inputs(
            model=loaded.fingerprint,
            rows=rows.sha,
            query=query.sha,
            control=control and control.sha,
        )
        found = way.go()
        smooth = None
        if opts["smoothness"]:
            smooth = smoothness.metasmoothness(
                course, run.path, seed=opts["seed"], base=found.final.params
            )
        course.save(run.path, found.final, tokenizer)
        about = {name: opts[name] for name in ("query_mode", "query_loss")}
        if past:
            about["replay"] = replayed.compared(past, course, found.final)
        info = outputs.publish(
            run, loaded, course, asked, settings, found, about, smooth, packed
        )  # fmt: skip
        door.page(run.path)
        way.clear()
        run.finish(verdict=info["trust"]["verdict"])
        for reason in info["trust"]["reasons"]:
            click.echo(reason)
        losses, moved = info["losses"], info["displacement"]
        shown = {
            "rows": len(rows), "queries": len(asked.names), "steps": course.steps,
            "loss_before": losses["before"], "loss_after": losses["after"],
            "loss_drop": info["loss_drop"], "moved_relative": moved["relative"],
        }  # fmt: skip
        if past:
            shown["difference_to_run"] = about["replay"]["difference"]
        if smooth and smooth["smoothness"] is not None:
            shown["metasmoothness"] = smooth["smoothness"]
        show(run.path, shown | {"verdict": info["trust"]["verdict"]})
