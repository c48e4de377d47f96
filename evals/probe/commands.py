"""The commands of `probe`. Nothing heavy is imported before one of them runs."""

from pathlib import Path
from typing import Any

import click

from core.command import (
    MODEL,
    PATH,
    POSITIVE,
    SEED,
    TOKENIZER,
    Door,
    Finite,
    batch_tokens_option,
    dtype_option,
    load_model,
    model_option,
    options,
    out_option,
    running,
    tidy,
)

CONTEXT = 256  # tokens of a row, unless told otherwise
probe_group = click.Group("probe", help="What hidden states tell about tokens, layer by layer.")

training_options = options(
    model_option,
    click.option("--rows", type=PATH, help="rows folder to read"),
    click.option("--text", type=PATH, help="instead: a text file; blank lines end a document"),
    click.option("--context", type=POSITIVE, help=f"tokens of a row of --text; default: {CONTEXT}, "
                 "or the model's if less"),
    click.option("--tokenizer", type=TOKENIZER, help="default: the model's own"),
    click.option("--target", help="text of the one token to tell, such as ' the'"),
    click.option("--regex", help="instead: the tokens in whose text this pattern is found"),
    click.option("--label", help="instead: column of the rows with a label of 0 or 1 for each row, "
                 "or a list of one for each token"),
    click.option("--current", is_flag=True,
                 help="tell the token at hand; otherwise the one behind it"),
    click.option("--site", type=click.Choice(["resid_post", "mlp_out", "attn_out", "mlp_in"]),
                 default="resid_post", help="where in a layer"),
    click.option("--probe", "kind", type=click.Choice(["linear", "mlp"]), default="linear",
                 help="logistic regression, or a network with one hidden layer"),
    click.option("--samples", type=POSITIVE, default=2000, help="positives to train on, at most"),
    click.option("--sampling", type=click.Choice(["balanced", "natural"]), default="balanced",
                 help="train on as many negatives, or on twice --samples tokens as they come"),
    click.option("--weighting", type=click.Choice(["none", "balanced", "sqrt"]), default="none",
                 help="of the kinds: none, to equal sums, or positives by the root of the ratio"),
    click.option("--weight-cap", type=Finite(0, min_open=True), default=5.0,
                 help="most that a positive weighs, with sqrt"),
    click.option("--c", type=Finite(0, min_open=True),
                 help="C of the regression, scikit-learn's; default: the best on validation"),
    click.option("--eval-tokens", type=POSITIVE, default=10_000,
                 help="of validation and of test, as they come"),
    click.option("--seed", type=SEED, default=0, help="of the split and the samples"),
    batch_tokens_option,
    dtype_option("float32", "bfloat16"),
    out_option,
)  # fmt: skip


@probe_group.command("train")
@click.option("--layer", required=True, help="number from 0, or embed")
@training_options
@click.pass_obj
def train(door: Door, **opts: Any) -> None:
    """Train a probe of one layer and write OUT/probe.safetensors."""
    _train("probe train", door, opts, opts["layer"])


@probe_group.command("sweep")
@click.option("--layers", default="auto", help="auto: embedding, first, quartiles and last; all; "
              "or numbers and embed, separated by commas")  # fmt: skip
@training_options
@click.pass_obj
def sweep(door: Door, **opts: Any) -> None:
    """Train probes of several layers from one pass of the model over the text."""
    _train("probe sweep", door, opts, opts["layers"])


def _train(command: str, door: Door, opts: dict[str, Any], layers: str) -> None:
    from core.config import Execution
    from core.errors import InputError
    from core.files import sha256_file
    from evals.probe import corpus as corpora
    from evals.probe.outputs import table, write
    from evals.probe.run import Settings, plan, run_probes, sites

    _one_of(opts, "rows", "text")
    _one_of(opts, "target", "regex", "label")
    with running(command, opts) as run:
        if run is None:
            return
        single = command == "probe train"
        loaded = load_model(opts["model"], opts["adapter"])
        tokenizer = door.tokenizer(opts["tokenizer"], loaded)
        at = sites(layers, opts["site"], loaded.config)
        if single and len(at) > 1:
            raise InputError(f"--layer {layers!r} is more than one; use `probe sweep`")
        corpus, truth_S, target, by_row = _question(run.path, door, opts, loaded, tokenizer)
        settings = Settings(
            "current" if opts["current"] or by_row else "next",
            *(opts[name] for name in ("kind", "samples", "sampling", "eval_tokens", "weighting",
                                      "weight_cap", "c", "seed", "batch_tokens")),
        )  # fmt: skip
        planned = plan(corpus, target, truth_S, settings)
        run.inputs(
            model=loaded.fingerprint,
            tokenizer=tokenizer.fingerprint,
            text=sha256_file(opts["text"]) if opts["text"] else None,
            corpus=corpus.sha256,
        )
        if opts["text"] and not (run.path / "rows").exists():
            corpora.save(corpus, run.path / "rows", tokenizer)
        judged = run_probes(loaded, tokenizer, str(opts["model"]), str(opts["adapter"] or ""),
                            planned, at, settings, Execution(opts["dtype"]))  # fmt: skip
        results = write(run.path, judged, single)
        run.finish()
        click.echo(table(results))
        click.echo(tidy(f"{run.path / 'results.json'}"))


def _one_of(opts: dict[str, Any], *names: str) -> None:
    from core.errors import InputError

    given = [f"--{name}" for name in names if opts[name] is not None]
    if len(given) != 1:
        one = " or ".join(f"--{name}" for name in names)
        raise InputError(f"{' and '.join(given) or 'nothing'} was given; give one of {one}")


def _question(
    folder: Path, door: Door, opts: dict[str, Any], loaded: Any, tokenizer: Any
) -> tuple[Any, Any, Any, bool]:
    """(corpus, truth by token, target, whether the truth is of whole rows)."""
    import numpy as np

    from core.errors import InputError
    from core.rows import load_rows
    from evals.probe import corpus as corpora
    from evals.probe import target as targets

    if opts["label"] is not None and opts["text"]:
        raise InputError("--label names a column of --rows; a --text has none")
    if opts["context"] and opts["rows"]:
        raise InputError("--context cuts a --text into rows; leave it out with --rows")
    limit = loaded.config.context
    context = opts["context"] or min(CONTEXT, limit)
    if not 2 <= context <= limit:
        raise InputError(f"--context {context} does not fit the model; give 2 to {limit}")
    rows = None
    if opts["rows"]:
        rows = door.rows(opts["rows"], loaded)
        if rows.tokenizer not in (None, tokenizer.fingerprint):
            raise InputError(f"{rows.path} was not made with tokenizer {tokenizer.name}; use the "
                             "one that made it")  # fmt: skip
        corpus = corpora.from_rows(rows)
    elif (folder / "rows").exists():  # of a run that was killed
        corpus = corpora.from_rows(load_rows(folder / "rows"))
    else:
        corpus = corpora.from_text(opts["text"], tokenizer, context)
    corpus = corpus._replace(where=str(opts["rows"] or opts["text"]))
    labels_S, by_row = None, False
    if opts["label"] is not None:
        assert rows is not None
        labels_S, listed = corpora.column_labels(rows, opts["label"])
        target, by_row = targets.Target("label", opts["label"], np.zeros(0, np.int32)), not listed
    elif opts["regex"] is not None:
        target = targets.regex(opts["regex"], tokenizer)
    else:
        target = targets.token(opts["target"], tokenizer)
    task = "current" if opts["current"] or by_row else "next"
    return corpus, corpora.truth(corpus, target, task, tokenizer, labels_S), target, by_row


@probe_group.command("view")
@click.argument("probe", type=PATH, metavar="PROBE_OR_SWEEP")
@click.option("--text", type=PATH, required=True, help="a text file to read")
@click.option("--out", type=PATH, required=True, help="the page, a .html file")
@click.option("--model", type=MODEL, help="default: the one whose place the probe names")
@click.option("--tokenizer", type=TOKENIZER, help="default: the model's own")
@click.option("--tokens", type=POSITIVE, default=5000, help="of the text, from its beginning")
@batch_tokens_option
@click.pass_obj
def view_command(door: Door, **opts: Any) -> None:
    """Write a page that shows what the probes say about every token of a text."""
    from core.errors import InputError
    from core.files import write_text
    from evals.probe.page import page
    from evals.probe.view import open_probes, view

    if opts["out"].suffix not in (".html", ".htm"):
        raise InputError(f"{opts['out']} must end in .html")
    probes = open_probes(opts["probe"])
    about = probes[0].about
    loaded = load_model(opts["model"] or about["model"], about["adapter"] or None)
    tokenizer = door.tokenizer(opts["tokenizer"], loaded)
    shown = view(opts["probe"], probes, loaded, tokenizer, opts["text"], opts["tokens"],
                 opts["batch_tokens"])  # fmt: skip
    write_text(opts["out"], page(shown))
    click.echo(tidy(f"{opts['out']}: layers {len(shown.layers)}, tokens {len(shown.tokens):,}"))
