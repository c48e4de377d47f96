#!/usr/bin/env python3
"""The door: every command builds a config, calls one function and prints a summary.

Nothing heavy is imported before a command runs, so `--help` answers at once. A command records
its options in the folder it makes (`config.json` or `command.json`), and `run` replays that file.
Bad input ends with one line on stderr and exit code 2; a run told to stop exits with 75.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

INPUT = click.Path(exists=False, path_type=Path, resolve_path=True)


class BadInput(click.ClickException):
    exit_code = 2


class Stopped(click.ClickException):
    """A run was told to stop; starting the same command again continues it."""

    exit_code = 75  # EX_TEMPFAIL


class Cli(click.Group):
    """Turns our input errors, and the disk's, into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            from core.errors import InputError, Preempted
            from tokenizers import TokenizerError

            if not isinstance(error, (InputError, TokenizerError, OSError, Preempted)):
                raise
            kind = Stopped if isinstance(error, Preempted) else BadInput
            raise kind(str(error)) from error


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Trace what a language model does back to the tokens that taught it, and prove the trace."""


def group(name: str, help: str) -> click.Group:
    made = click.Group(name, help=help)
    cli.add_command(made)
    return made


convert_group = group("convert", "Hugging Face folders to model folders and back.")
data_group = group("data", "Text and benchmark items to rows of token ids.")
train_group = group("train", "Training.")
eval_group = group("eval", "Losses and benchmark scores.")
attribute_group = group("attribute", "Gradient influence of pool rows on a query.")
bench_group = group("bench", "Speed and memory, as ratios measured in one run.")


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""
    return lambda f: functools.reduce(lambda g, decorate: decorate(g), reversed(decorators), f)


out_option = click.option("--out", type=INPUT, required=True, help="folder to make")
model_option = click.option(
    "--model", type=INPUT, required=True, help="model folder, finished run, or Hugging Face folder"
)
execution_options = options(
    click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32",
                 show_default=True, help="of activations and matmuls"),
    click.option("--layers", type=click.Choice(["auto", "scan", "unrolled"]), default="auto",
                 show_default=True, help="compile one block or all"),
    click.option("--remat/--no-remat", default=False, help="recompute blocks in the backward pass"),
    click.option("--loss-chunk", default=0, help="tokens whose logits are held at once; 0 = auto"),
)  # fmt: skip
batch_tokens_option = click.option(
    "--batch-tokens", default=8192, show_default=True, help="tokens of a batch, padding included"
)
gradient_options = options(
    click.option("--projection-dim", default=16, show_default=True,
                 help="P of the P x P projection of each site; 0 = unprojected"),
    click.option("--projection", type=click.Choice(["rademacher", "normal"]), default="rademacher",
                 show_default=True),
    click.option("--projection-seed", default=0, show_default=True),
    click.option("--include-bias", is_flag=True, help="the bias gradient as a last column"),
    click.option("--loss", type=click.Choice(["sum", "mean"]), default="sum", show_default=True,
                 help="of an example, over its supervised tokens"),
)  # fmt: skip


def execution(opts: dict[str, Any]) -> Any:
    from core.config import Execution

    return Execution(opts["dtype"], opts["layers"], opts["remat"], opts["loss_chunk"])


def load_model(path: Path) -> Any:
    from core.checkpoint import load_model

    return load_model(path)


def load_rows(path: Path, loaded: Any) -> Any:
    """Rows that fit the model, made with its tokenizer where both are known."""
    import tokenizers
    from core.rows import load_rows

    mark = tokenizers.load(loaded.tokenizer).fingerprint if loaded.tokenizer else None
    return load_rows(path, loaded.config.vocab_size, loaded.config.context, mark)


def load_tokenizer(name: str | None, loaded: Any = None) -> Any:
    import tokenizers
    from core.errors import InputError

    if name is None and (loaded is None or loaded.tokenizer is None):
        raise InputError("the model has no tokenizer beside it; name one with --tokenizer")
    return tokenizers.load(name if name is not None else loaded.tokenizer)


@contextlib.contextmanager
def running(command: str, opts: dict[str, Any]) -> Iterator[Any]:
    """The run folder of a resumable command; None when it is already done."""
    from core.rundir import open_run

    run = open_run(opts["out"], command, opts, fresh=opts.get("resume") == "never")
    try:
        if run.done:
            click.echo(f"{run.path} is already done")
        yield None if run.done else run
    finally:
        run.close()


@contextlib.contextmanager
def producing(command: str, opts: dict[str, Any]) -> Iterator[Path | None]:
    """The temporary folder of a command that makes its output in one go; None when it exists."""
    from core.rundir import produce

    with produce(opts["out"], command, opts) as folder:
        if folder is None:
            click.echo(f"{opts['out']} is already there, made with the same options")
        yield folder


def show(title: str, values: dict[str, Any]) -> None:
    """One summary line a command."""
    hashes = {k: v[:12] for k, v in values.items() if isinstance(v, str) and len(v) == 64}
    parts = [
        f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in {**values, **hashes}.items()
        if isinstance(value, (str, int, float))
    ]
    click.echo(f"{title}: {', '.join(parts)}")


# ------------------------------------------------------------------------------------- convert


@convert_group.command("import")
@click.argument("hf_dir", type=INPUT)
@out_option
def convert_import(**opts: Any) -> None:
    """Read a Hugging Face folder into a model folder (Orbax, float32)."""
    import tokenizers
    from core.checkpoint import load_model, save_model

    with producing("convert import", opts) as folder:
        if folder is not None:
            loaded = load_model(opts["hf_dir"])
            tokenizer = None if loaded.tokenizer is None else tokenizers.load(loaded.tokenizer)
            save_model(folder, loaded.config, loaded.params, tokenizer)
            show(str(opts["out"]), {"family": loaded.config.family, "model": loaded.fingerprint})


@convert_group.command("export")
@click.argument("model_dir", type=INPUT)
@out_option
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
def convert_export(**opts: Any) -> None:
    """Write a Hugging Face folder, and check it against our own forward before it appears."""
    from core.convert import export_hf

    with producing("convert export", opts) as folder:
        if folder is not None:
            loaded = load_model(opts["model_dir"])
            agreement = export_hf(
                loaded.config, loaded.params, folder, loaded.tokenizer, opts["dtype"]
            )
            show(str(opts["out"]), agreement._asdict())


# ---------------------------------------------------------------------------------------- data


@data_group.command("text")
@click.argument("files", type=INPUT, nargs=-1, required=True)
@click.option("--tokenizer", required=True, help="a name (bytes, gpt2) or a folder or file")
@click.option("--length", default=1024, show_default=True, help="tokens of a row")
@click.option("--pack", type=click.Choice(["concat", "document"]), default="concat",
              show_default=True, help="cut joined documents, or a row each")  # fmt: skip
@click.option("--split", type=click.Choice(["file", "blank"]), default="file",
              show_default=True, help="what a document of a .txt file is")  # fmt: skip
@out_option
def data_text(**opts: Any) -> None:
    """Tokenise .txt, .jsonl or .parquet files into rows; every token is supervised."""
    from training.data.text import build_text_rows

    tokenizer = load_tokenizer(opts["tokenizer"])
    with producing("data text", opts) as folder:
        if folder is not None:
            info = build_text_rows(
                opts["files"], tokenizer, opts["length"], folder, opts["pack"], opts["split"]
            )
            show(str(opts["out"]), info)


@data_group.command("query")
@click.argument("items", type=INPUT)
@click.option("--tokenizer", required=True, help="a name (bytes, gpt2) or a folder or file")
@click.option("--length", default=256, show_default=True, help="tokens of a row")
@click.option("--add-eos", is_flag=True, help="also supervise an end-of-text token")
@out_option
def data_query(**opts: Any) -> None:
    """Turn benchmark items into query rows; only the answer is supervised."""
    from evals.items import read_items
    from evals.query import build_query

    tokenizer = load_tokenizer(opts["tokenizer"])
    with producing("data query", opts) as folder:
        if folder is not None:
            items = read_items(opts["items"])
            info = build_query(items, tokenizer, opts["length"], folder, opts["add_eos"])
            show(str(opts["out"]), info)


@data_group.command("demo")
@click.option("--seed", default=0, show_default=True)
@click.option("--length", default=128, show_default=True, help="bytes of a row")
@out_option
def data_demo(**opts: Any) -> None:
    """Write the demo's corpus, its benchmark items and its model config."""
    from core.files import write_json
    from evals.demo import MODEL
    from training.data.demo import write_corpus

    with producing("data demo", opts) as folder:
        if folder is not None:
            counts = write_corpus(folder, opts["seed"], length=opts["length"])
            write_json(folder / "model.json", MODEL)
            show(str(opts["out"]), counts)


# --------------------------------------------------------------------------------------- train


@train_group.command("lm")
@click.option("--model", type=INPUT, help="continue this model")
@click.option("--config", "config_file", type=INPUT, help="start from this architecture (JSON)")
@click.option("--tokenizer", help="a name or path; default: the model's own")
@click.option("--rows", type=INPUT, required=True)
@click.option("--val-rows", type=INPUT, help="rows for the validation loss")
@out_option
@click.option("--steps", type=int, help="optimizer steps; default: one epoch")
@click.option("--batch", default=8, show_default=True, help="rows of an optimizer step")
@click.option("--accumulate", default=1, show_default=True, help="micro-batches of a step")
@click.option("--optimizer", type=click.Choice(["adamw", "sgd"]), default="adamw")
@click.option("--lr", default=3e-4, show_default=True)
@click.option("--schedule", type=click.Choice(["cosine", "linear", "constant"]), default="cosine")
@click.option("--warmup", default=0, show_default=True, help="steps of linear warm-up")
@click.option("--end", default=0.1, show_default=True, help="last learning rate, share of --lr")
@click.option("--weight-decay", default=0.0, show_default=True, help="on matrices only")
@click.option("--beta2", default=0.95, show_default=True)
@click.option("--momentum", default=0.0, show_default=True, help="of sgd")
@click.option("--clip", default=1.0, show_default=True, help="global gradient norm; 0 = off")
@click.option("--seed", default=0, show_default=True)
@click.option("--save-every", default=500, show_default=True)
@click.option("--eval-every", default=250, show_default=True)
@click.option("--keep", default=2, show_default=True, help="checkpoints")
@click.option(
    "--model-parallel", default=1, show_default=True, help="devices to split weights over"
)
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True)
@execution_options
def train_lm(**opts: Any) -> None:
    """Train on rows, from scratch or from a model."""
    from core import families, schema
    from core.config import read_config
    from core.errors import InputError
    from core.rows import load_rows
    from training.loop import Settings, train
    from training.optim import Optim

    if (opts["model"] is None) == (opts["config_file"] is None):
        raise InputError("give either --model (continue) or --config (start from scratch)")
    with running("train lm", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"]) if opts["model"] else None
        config = loaded.config if loaded else read_config(opts["config_file"])
        needs_tokenizer = opts["tokenizer"] or (loaded and loaded.tokenizer)
        tokenizer = load_tokenizer(opts["tokenizer"], loaded) if needs_tokenizer else None
        fits = (config.vocab_size, config.context, tokenizer and tokenizer.fingerprint)
        rows = load_rows(opts["rows"], *fits)
        validation = load_rows(opts["val_rows"], *fits) if opts["val_rows"] else None
        run.inputs(
            rows=rows.sha,
            validation=validation and validation.sha,
            model=loaded and loaded.fingerprint,
            config=config.to_json(),
        )
        params = (
            loaded.params
            if loaded
            else schema.init(families.rows(config), config.layers, opts["seed"])
        )
        names = ("batch", "accumulate", "seed", "save_every", "eval_every", "keep",
                 "model_parallel")  # fmt: skip
        steps = opts["steps"] or -(-len(rows) // opts["batch"])
        settings = Settings(steps, **{name: opts[name] for name in names})
        optim = Optim(
            opts["optimizer"], opts["lr"], opts["schedule"], opts["warmup"], opts["end"],
            opts["weight_decay"], b2=opts["beta2"], momentum=opts["momentum"], clip=opts["clip"],
        )  # fmt: skip
        summary = train(
            run, config, params, rows, settings, optim, execution(opts), tokenizer, validation
        )
        run.finish(**summary)
        show(str(run.path), summary)


# ---------------------------------------------------------------------------------------- eval


@eval_group.command("nll")
@model_option
@click.option("--rows", type=INPUT, required=True)
@click.option("--out", type=INPUT, required=True, help="a .npy file, float32 [N, T]")
@batch_tokens_option
@execution_options
def eval_nll(**opts: Any) -> None:
    """Per-token negative log-likelihoods, label-aligned, NaN where unsupervised."""
    from evals.nll import run_nll

    loaded = load_model(opts["model"])
    rows = load_rows(opts["rows"], loaded)
    tokenizer = load_tokenizer(None, loaded) if loaded.tokenizer else None
    how = (execution(opts), opts["batch_tokens"])
    summary = run_nll(loaded, rows, opts["out"], *how, tokenizer)
    show(str(opts["out"]), summary)


@eval_group.command("run")
@model_option
@click.option("--items", type=INPUT, required=True, help="multiple-choice items, JSON lines")
@click.option("--tokenizer", help="a name or path; default: the model's own")
@out_option
@batch_tokens_option
@execution_options
def eval_run(**opts: Any) -> None:
    """Score multiple-choice items by the log-probability of each choice."""
    from evals.items import read_items
    from evals.scorer import run_eval

    with producing("eval run", opts) as folder:
        if folder is not None:
            loaded = load_model(opts["model"])
            tokenizer = load_tokenizer(opts["tokenizer"], loaded)
            items = read_items(opts["items"])
            results = run_eval(
                loaded, tokenizer, items, folder, execution(opts), opts["batch_tokens"]
            )
            show(str(opts["out"]), results)


# ----------------------------------------------------------------------------------- attribute


def gradient_spec(opts: dict[str, Any], row_norm: bool = False) -> Any:
    from attribution.gradients import Spec
    from attribution.projection import Projection

    scale = "row_norm" if row_norm else "jl"
    projection = Projection(
        opts["projection_dim"], opts["projection"], scale, opts["projection_seed"]
    )
    return Spec(projection, opts["include_bias"], opts["loss"])


@attribute_group.command("build")
@model_option
@click.option("--rows", type=INPUT, required=True)
@out_option
@gradient_options
@batch_tokens_option
@execution_options
def attribute_build(**opts: Any) -> None:
    """Store the projected gradient of every row; resumable."""
    from attribution.store import Pass, build

    with running("attribute build", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"])
        rows = load_rows(opts["rows"], loaded)
        source = Pass(loaded, rows, gradient_spec(opts), execution(opts), opts["batch_tokens"])
        info = build(run, source)
        show(
            str(run.path), {"rows": info["rows_count"], "width": info["width"], **info["coverage"]}
        )


@attribute_group.command("score")
@model_option
@click.option("--pool", type=INPUT, required=True, help="rows, or a store of `attribute build`")
@click.option("--query", type=INPUT, required=True, help="rows")
@out_option
@click.option("--mode", type=click.Choice(["mean", "max", "each"]), default="mean",
              show_default=True, help="how the queries are put together")  # fmt: skip
@click.option("--precondition", type=click.Choice(["none", "query", "pool", "mixed"]),
              default="none", show_default=True,
              help="whose gradient autocorrelation is inverted")  # fmt: skip
@click.option("--damping", default=0.1, show_default=True, help="share of the mean eigenvalue")
@click.option("--unit-norm", is_flag=True, help="compare directions, not lengths")
@click.option("--convention", type=click.Choice(["clean", "notes"]), default="clean",
              show_default=True, help="see attribution/score.py; notes also takes normal "
              "projections with rows of unit length and mean losses")  # fmt: skip
@gradient_options
@batch_tokens_option
@execution_options
def attribute_score(**opts: Any) -> None:
    """Score every pool row by its influence on the query; positive = proponent."""
    from attribution.score import Settings, score
    from attribution.store import Pass, Store, is_store
    from core.rows import same_tokenizer

    notes = opts["convention"] == "notes"
    if notes:
        opts |= {"projection": "normal", "loss": "mean"}
    with running("attribute score", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"])
        spec = gradient_spec(opts, row_norm=notes)
        settings = Settings(
            opts["mode"], opts["precondition"], opts["damping"], opts["unit_norm"],
            opts["convention"],
        )  # fmt: skip
        query_rows = load_rows(opts["query"], loaded)
        how = (spec, execution(opts), opts["batch_tokens"])
        query = Pass(loaded, query_rows, *how)
        if is_store(opts["pool"]):
            pool = Store(opts["pool"])
            pool.check(spec, loaded.fingerprint)
            pool_rows = load_rows(pool.rows_path, loaded)
        else:
            pool_rows = load_rows(opts["pool"], loaded)
            pool = Pass(loaded, pool_rows, *how)
        same_tokenizer(pool_rows, query_rows)
        summary = score(run, pool, query, settings, pool_rows)
        run.finish(rows=summary["rows"])
        show(str(run.path), {"rows": summary["rows"], **summary["score"]})


@attribute_group.command("select")
@click.argument("scores", type=INPUT)
@click.option("--rows", type=INPUT, required=True, help="the rows that were scored")
@click.option("--k", type=int, required=True)
@click.option("--strategy", type=click.Choice(["top", "bottom", "random", "matched-random"]),
              default="top", show_default=True)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="of random draws and of ties")
@click.option("--out", type=INPUT, help="default: SCORES/subsets/STRATEGY-kK-seedS")
def attribute_select(**opts: Any) -> None:
    """Choose rows by score, or at random with as many trained tokens as the top k."""
    from attribution.select import select
    from core.rows import load_rows

    name = f"{opts['strategy']}-k{opts['k']}-seed{opts['seed']}"
    opts["out"] = opts["out"] or opts["scores"] / "subsets" / name
    with producing("attribute select", opts) as folder:
        if folder is not None:
            rows = load_rows(opts["rows"])
            selection = select(
                opts["scores"], rows, opts["k"], opts["strategy"], opts["seed"], folder
            )
            show(str(opts["out"]), selection)


# ------------------------------------------------------------------------- report, bench, demo


@cli.command()
@click.argument("source", type=INPUT)
@click.option("--out", type=INPUT, help="folder; default: where SOURCE lies")
def report(source: Path, out: Path | None) -> None:
    """Write report.html and summary.json for SOURCE: a report spec (JSON) or a scores folder."""
    from core.files import read_json
    from evals.report import build_report

    if source.is_dir():
        info, folder, target = read_json(source / "info.json"), source, out or source / "report"
        spec = {"scores": ".", "rows": info["pool"]["path"], "tokenizer": info["tokenizer"]}
    else:
        spec, folder, target = read_json(source), source.parent, out or source.parent
    summary = build_report(spec, target, folder)
    click.echo(summary["verdict"])
    click.echo(f"{target / 'report.html'}")


@bench_group.command("attribution")
@click.option("--preset", type=click.Choice(["tiny", "gpt2-124m"]), default="tiny",
              show_default=True)  # fmt: skip
@click.option("--batch", default=8, show_default=True)
@click.option("--length", default=256, show_default=True)
@click.option("--projection-dim", default=16, show_default=True)
@click.option("--repeats", default=7, show_default=True, help="alternating, of which the median")
@click.option("--naive/--no-naive", default=True, help="also time vmap(grad) + projection")
@click.option("--parts/--no-parts", default=False, help="also time a training step's pieces")
@click.option("--out", type=INPUT, help="bench.json")
@execution_options
def bench_attribution(**opts: Any) -> None:
    """Time the projected per-example pass against value-and-grad, forward and vmap(grad)."""
    from attribution.bench import bench, table
    from core.files import write_json

    result = bench(
        opts["preset"], opts["batch"], opts["length"], opts["projection_dim"], opts["repeats"],
        opts["naive"], opts["parts"], execution(opts),
    )  # fmt: skip
    if opts["out"]:
        write_json(opts["out"], result)
    click.echo(table(result))


@cli.command("run")
@click.argument("config", type=INPUT)
@click.option("--out", type=INPUT, help="another folder than the recorded one")
def run_command(config: Path, out: Path | None) -> None:
    """Replay the command recorded in a run's config.json (or a folder's command.json)."""
    from core.errors import InputError
    from core.files import read_json

    content = read_json(config)
    if not isinstance(content, dict) or not {"command", "options"} <= content.keys():
        raise InputError(f"{config} records no command; give a config.json that a run wrote")
    command: click.Command = cli
    for name in content["command"].split():
        found = command.commands.get(name) if isinstance(command, click.Group) else None
        if found is None:
            raise InputError(f"{config}: unknown command {content['command']!r}")
        command = found
    given = {**content["options"], **({"out": str(out)} if out else {})}
    known = {p.name: p for p in command.params}
    if unknown := sorted(set(given) - set(known)):
        raise InputError(f"{config}: {content['command']} has no option {unknown[0]!r}")
    with click.Context(command, info_name=content["command"]) as ctx:
        values = {n: known[n].type_cast_value(ctx, given.get(n)) for n in known if n != "help"}
        ctx.invoke(command, **values)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/demo", show_default=True)
@click.option("--seed", default=0, show_default=True)
def demo(out: Path, seed: int) -> None:
    """The whole idea in minutes: trace, select, retrain three arms, compare, report."""
    import resource
    import time

    from core.files import read_json, write_json
    from evals import demo

    commands = demo.plan(out, seed)
    timing = out / "timing.json"  # seconds of each command, also those of an interrupted demo
    seconds = read_json(timing) if timing.exists() else {}
    for number, command in enumerate(commands, 1):
        line = "python cli.py " + " ".join(command)
        click.secho(f"[{number}/{len(commands)}] {line}", fg="cyan")
        began = time.monotonic()
        cli.main(command, standalone_mode=False)
        seconds[line] = max(time.monotonic() - began, seconds.get(line, 0))
        write_json(timing, seconds)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    write_json(out / "report.json", demo.spec(list(seconds), sum(seconds.values()), peak_gb))
    cli.main(["report", str(out / "report.json")], standalone_mode=False)
    summary = read_json(out / "summary.json")
    shown = ("relevant_share", "recall_at_k", "top_minus_random", "random_minus_bottom", "seconds",
             "peak_gb")  # fmt: skip
    click.echo(json.dumps({key: summary[key] for key in shown}, indent=1))


if __name__ == "__main__":
    cli()
