#!/usr/bin/env python3
"""The door: every command builds a config, calls one function and prints a summary.

Nothing heavy is imported before a command runs, so `--help` answers at once. A command records
its options beside what it makes (`config.json`, `command.json`), and `run` replays that file.
Exit codes: 2 bad input, with one line on stderr; 75 a run was told to stop, and the same command
continues it; 130 interrupted.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import click

from attribution.commands import attribute_group
from attribution.commands.bench import bench_attribution, bench_magic
from core.command import (
    MODEL,
    NATURAL,
    PATH,
    POSITIVE,
    SEED,
    TOKENIZER,
    Door,
    Finite,
    Group,
    adapter_option,
    benchmark,
    execution,
    execution_options,
    load_model,
    lora_options,
    model_option,
    out_option,
    producing,
    result_option,
    running,
    show,
    tidy,
    trained_adapter,
)
from evals.bench_commands import bench_eval, bench_generate, bench_probe
from evals.commands import (
    TASKS,
    TASKS_HELP,
    chat_template,
    chat_template_option,
    data_option,
    eval_group,
    watch,
    watching_options,
)
from evals.probe.commands import probe_group
from sae.commands import bench_sae, sae_group
from training.options import training_options, training_settings


class Cli(Group):
    """`tokenizers` imports nothing of ours, so its errors are known here only."""

    def is_input(self, error: BaseException) -> bool:
        from tokenizers import TokenizerError

        return isinstance(error, TokenizerError) or super().is_input(error)


@click.group(
    cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Trace what a language model does back to the tokens that taught it, and prove the trace."""
    from core.allocator import keep_freed_memory

    keep_freed_memory()
    context.obj = door()


def group(name: str, help: str) -> click.Group:
    made = click.Group(name, help=help)
    cli.add_command(made)
    return made


convert_group = group("convert", "Hugging Face folders to model folders and back.")
data_group = group("data", "Text and benchmark items to rows of token ids.")
train_group = group("train", "Training.")
cli.add_command(eval_group)
cli.add_command(attribute_group)
cli.add_command(sae_group)
cli.add_command(probe_group)
bench_group = group("bench", "Speed and memory, as ratios measured in one run.")
for bench in (
    bench_attribution, bench_magic, bench_eval, bench_generate, bench_probe, bench_sae,
):  # fmt: skip
    bench_group.add_command(bench)


def load_rows(path: Path, loaded: Any) -> Any:
    """Rows that fit the model, made with its tokenizer where both are known."""
    import tokenizers
    from core.files import read_json
    from core.rows import SIDECAR, load_rows

    side = path / SIDECAR
    recorded = loaded.tokenizer and side.exists() and read_json(side).get("tokenizer")
    mark = tokenizers.load(loaded.tokenizer).fingerprint if recorded else None
    return load_rows(path, loaded.config.vocab_size, loaded.config.context, mark)


def load_tokenizer(name: str | None, loaded: Any = None) -> Any:
    """The tokenizer of that name or place, else the model's; it must fit the model."""
    import tokenizers
    from core.errors import InputError
    from core.hf.gate import check_vocabulary
    from core.hf.hub import TOKENIZER_FILES, locate

    if name is None and (loaded is None or loaded.tokenizer is None):
        raise InputError("the model has no tokenizer beside it; name one with --tokenizer")
    place = name or loaded.tokenizer
    place = place if place in TOKENIZER.known else locate(place, TOKENIZER_FILES)
    tokenizer = tokenizers.load(place)
    if loaded is not None:
        check_vocabulary(tokenizer, loaded.config, place)
    return tokenizer


def own_tokenizer(loaded: Any) -> Any:
    """The model's own, or None: one of another kind costs no more than the texts of a report."""
    from tokenizers import TokenizerError

    try:
        return load_tokenizer(None, loaded) if loaded.tokenizer else None
    except TokenizerError as error:
        click.echo(f"{tidy(str(error))}; the report will show no text", err=True)
        return None


def write_page(folder: Path) -> None:
    """The report of a folder of scores, beside them."""
    from evals.report.build import write_page

    write_page(page_of(folder), folder / "report.html", folder)


def page_of(folder: Path) -> dict[str, Any]:
    """The report spec of a folder of scores."""
    from attribution.select import read_info

    info = read_info(folder)
    return {"scores": ".", "rows": info["pool"]["path"], "tokenizer": info["tokenizer"]}


def proponents(folder: Path, rows: Any) -> Any:
    """The scores [N] of rows in a folder of scores, larger = stronger proponent."""
    from attribution.select import read_proponents

    return read_proponents(folder, rows).mean_N


def diagnose(*given: Any) -> dict[str, Any]:
    """What a folder of scores says of its rows."""
    from attribution.diagnostics import diagnose

    return diagnose(*given)


def select(*given: Any) -> dict[str, Any]:
    """Rows chosen by a folder of scores, as a rows folder."""
    from attribution.select import select

    return select(*given)


def door() -> Door:
    return Door(load_rows, load_tokenizer, own_tokenizer, write_page, proponents, diagnose, select)


# ------------------------------------------------------------------------------------- convert


weights_dtype = click.Choice(["float32", "bfloat16", "float16"])


@convert_group.command("import")
@click.argument("hf_dir", type=MODEL)
@out_option
@click.option("--dtype", type=weights_dtype, default="float32", help="of the weights on disk")
@click.option("--trim-vocab", is_flag=True,
              help="cut off rows of the embedding beyond config.json's vocabulary")  # fmt: skip
def convert_import(**opts: Any) -> None:
    """Read a Hugging Face folder into a model folder."""
    import tokenizers
    from core.checkpoint import has_tokenizer, save_model
    from core.hf.convert import open_hf, parameters
    from core.hf.hub import locate

    with producing("convert import", opts) as folder:
        if folder is not None:
            source = open_hf(locate(opts["hf_dir"]), opts["trim_vocab"])
            found = has_tokenizer(source.folder)
            tokenizer = tokenizers.load(source.folder) if found else None
            params = parameters(source, opts["dtype"])
            mark = save_model(folder, source.config, params, tokenizer)
            show(opts["out"], {"family": source.config.family, "model": mark,
                               "trimmed_rows": source.padding})  # fmt: skip


@convert_group.command("export")
@click.argument("model_dir", type=MODEL)
@adapter_option
@out_option
@click.option("--dtype", type=weights_dtype, default="float32")
@click.option("--shard-size", type=Finite(0, min_open=True), default=5.0,
              help="GB of weights in a file at most")  # fmt: skip
def convert_export(**opts: Any) -> None:
    """Write a Hugging Face folder; it appears only if it passes `convert check`.

    An adapter is merged into the weights; as it is, it is a PEFT folder already.
    """
    import tokenizers
    from core.adapter import merge
    from core.hf.gate import export_hf

    with producing("convert export", opts) as folder:
        if folder is not None:
            loaded = load_model(opts["model_dir"], opts["adapter"], opts["dtype"])
            params = loaded.params
            if loaded.adapter:
                params = merge(loaded.config, params, loaded.adapter)
            agreement = export_hf(
                loaded.config, params, folder, loaded.tokenizer, opts["dtype"],
                opts["shard_size"] * 1e9, tokenizers.load,
            )  # fmt: skip
            show(opts["out"], agreement._asdict())


@convert_group.command("check")
@click.argument("hf_dir", type=MODEL)
@click.option("--tokens", type=POSITIVE, help="of each sequence; default: 256, or past the window")
def convert_check(hf_dir: Path, tokens: int | None) -> None:
    """Compare what our model and a second implementation make of a Hugging Face folder."""
    import tokenizers
    from core.checkpoint import has_tokenizer
    from core.hf.gate import check_hf
    from core.hf.hub import locate

    folder = locate(hf_dir)
    tokenizer = tokenizers.load(folder) if has_tokenizer(folder) else None
    show(folder, check_hf(folder, tokenizer, tokens)._asdict())


# ---------------------------------------------------------------------------------------- data


keep_option = click.option("--keep", multiple=True,
                           help="column of the records to keep with the rows, as quality; may be "
                           "repeated")  # fmt: skip


@data_group.command("text")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--tokenizer", type=TOKENIZER, required=True,
              help="a name (bytes, gpt2, gpt2-mul), or a folder or file")  # fmt: skip
@click.option("--length", type=POSITIVE, default=1024, help="tokens of a row")
@click.option("--pack", type=click.Choice(["concat", "document"]), default="concat",
              help="cut joined documents, or a row each")  # fmt: skip
@click.option("--split", type=click.Choice(["file", "blank"]), default="file",
              help="what a document of a .txt file is")  # fmt: skip
@keep_option
@click.option("--inject-facts", is_flag=True,
              help="write products of two digits as the tokens of gpt2-mul")  # fmt: skip
@out_option
def data_text(**opts: Any) -> None:
    """Tokenise .txt, .jsonl or .parquet files into rows; every token is supervised."""
    from training.data.text import build_text_rows

    tokenizer = load_tokenizer(opts["tokenizer"])
    with producing("data text", opts) as folder:
        if folder is not None:
            info = build_text_rows(
                opts["files"], tokenizer, opts["length"], folder, opts["pack"], opts["split"],
                opts["inject_facts"], opts["keep"],
            )  # fmt: skip
            show(opts["out"], info, "rows", "tokens", "documents", "facts", "empty_documents",
                 "long_documents", "dropped_tokens")  # fmt: skip


@data_group.command("chat")
@click.argument("files", type=PATH, nargs=-1, required=True)
@click.option("--tokenizer", type=TOKENIZER, required=True,
              help="a name (bytes, gpt2, gpt2-mul), or a folder or file")  # fmt: skip
@click.option("--template", help="gemma, gemma2, tulu or chatml; default: the tokenizer's own")
@click.option("--length", type=POSITIVE, default=1024, help="most tokens of a row")
@click.option("--messages-field", default="messages", help="of a record, with all its messages")
@click.option("--prompt-field", help="with the one user message; needs --answer-field")
@click.option("--answer-field", help="with the one assistant message")
@click.option("--train-newline", is_flag=True, help="also train the newline after an answer's end")
@keep_option
@click.option("--drop-malformed", is_flag=True, help="leave out and count what cannot be rendered")
@out_option
def data_chat(**opts: Any) -> None:
    """Turn conversations into rows; only what the assistant says is supervised."""
    from training.data.chat import Fields, build_chat_rows

    tokenizer = load_tokenizer(opts["tokenizer"])
    with producing("data chat", opts) as folder:
        if folder is not None:
            fields = Fields(opts["messages_field"], opts["prompt_field"], opts["answer_field"])
            info = build_chat_rows(
                opts["files"], tokenizer, opts["length"], folder, opts["template"], fields,
                opts["train_newline"], opts["drop_malformed"], opts["keep"],
            )  # fmt: skip
            show(opts["out"], info, "rows", "tokens", "trained_share", "truncated",
                 "dropped_untrained", "dropped_unaligned", "dropped_malformed")  # fmt: skip


@data_group.command("query")
@click.argument("items", type=PATH, required=False)
@click.option("--tasks", type=TASKS, help=f"instead of items: {TASKS_HELP}")
@click.option("--split", default="train", help="of the tasks; never one that is evaluated")
@click.option("--n", "count", type=POSITIVE, default=250, help="examples of each task")
@click.option("--seed", type=SEED, default=0, help="of the choice of examples")
@data_option
@chat_template_option
@click.option("--tokenizer", type=TOKENIZER, required=True,
              help="a name (bytes, gpt2, gpt2-mul), or a folder or file")  # fmt: skip
@click.option("--length", type=POSITIVE, default=256, help="tokens of a row")
@click.option("--choices", type=click.Choice(["gold", "all"]), default="gold",
              help="of items: a row for the right choice, or one for each")  # fmt: skip
@click.option("--add-eos", is_flag=True,
              help="also supervise an end of text, or of the assistant's turn")  # fmt: skip
@out_option
def data_query(**opts: Any) -> None:
    """Turn benchmark items into query rows; only the answer is supervised.

    ITEMS is a file of multiple-choice items; with --tasks, the training examples of benchmarks.
    """
    from core.errors import InputError
    from evals.items import read_items
    from evals.query import build_query, build_task_query
    from evals.tasks.catalogue import select

    if (opts["tasks"] is None) == (opts["items"] is None):
        raise InputError("give either a file of items or --tasks")
    if opts["tasks"] and opts["choices"] == "all":
        raise InputError("--choices all is for a file of items; leave it out")
    if opts["items"] and opts["apply_chat_template"]:
        raise InputError("--apply-chat-template is for --tasks; leave it out")
    tokenizer = load_tokenizer(opts["tokenizer"])
    chat = chat_template(opts["apply_chat_template"], tokenizer)
    with producing("data query", opts) as folder:
        if folder is None:
            return
        if opts["tasks"]:
            info = build_task_query(
                select([opts["tasks"]]).tasks, tokenizer, opts["split"], opts["count"],
                opts["length"], folder, opts["data"], chat, opts["seed"], opts["add_eos"],
            )  # fmt: skip
            for name, of_task in info["tasks"].items():
                show(Path(name), of_task, "rows", "left_out")
                if of_task["left_out"] is None:
                    click.echo(f"{name}: the split it is evaluated on is not at hand, so examples "
                               "that are also evaluated were not looked for", err=True)  # fmt: skip
        else:
            info = build_query(
                read_items(opts["items"]), tokenizer, opts["length"], folder, opts["add_eos"],
                opts["choices"],
            )  # fmt: skip
        show(opts["out"], info, "rows", "tokens", "truncated_items", "alone_choices")


@data_group.command("demo")
@click.option("--seed", type=SEED, default=0)
@click.option("--length", type=POSITIVE, default=128, help="bytes of a row")
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
            sizes = {n: sum(c.values()) if isinstance(c, dict) else c for n, c in counts.items()}
            show(opts["out"], sizes)


# --------------------------------------------------------------------------------------- train


@train_group.command("lm")
@click.option("--model", type=MODEL, help="continue this model, or its adapter if it has one")
@adapter_option
@click.option("--config", "config_file", type=PATH, help="start from this architecture (JSON)")
@click.option("--tokenizer", type=TOKENIZER, help="default: the model's own")
@click.option("--rows", type=PATH, required=True)
@click.option("--val-rows", type=PATH, help="rows for the validation loss")
@out_option
@training_options()
@click.option("--save-every", type=POSITIVE, default=500, help="steps")
@click.option("--eval-every", type=POSITIVE, default=250, help="steps")
@watching_options
@click.option("--keep", type=POSITIVE, default=2, help="checkpoints")
@lora_options
@click.option("--model-parallel", type=POSITIVE, default=1, help="devices to split weights over")
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto",
              help="go on with the run in --out, or begin anew")  # fmt: skip
@execution_options
def train_lm(**opts: Any) -> None:
    """Train on rows, from scratch or from a model."""
    import dataclasses

    import jax

    from core import families, schema
    from core.errors import InputError
    from core.families import read_config
    from core.rows import load_rows
    from training.loop import recipe_of, train

    if (opts["model"] is None) == (opts["config_file"] is None):
        raise InputError("give either --model (continue) or --config (start from scratch)")
    if opts["model"] is None and (opts["adapter"] or opts["lora_rank"]):
        raise InputError("an adapter needs the weights of a model beneath it; give --model")
    with running("train lm", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"]) if opts["model"] else None
        config = loaded.config if loaded else read_config(opts["config_file"])
        needs_tokenizer = opts["tokenizer"] or (loaded and loaded.tokenizer)
        tokenizer = load_tokenizer(opts["tokenizer"], loaded) if needs_tokenizer else None
        fits = (config.vocab_size, config.context, tokenizer and tokenizer.fingerprint)
        rows = load_rows(opts["rows"], *fits)
        validation = load_rows(opts["val_rows"], *fits) if opts["val_rows"] else None
        settings, optim = training_settings(opts, len(rows))
        names = ("save_every", "eval_every", "keep", "model_parallel")
        settings = dataclasses.replace(settings, **{name: opts[name] for name in names})
        settings.check(jax.device_count())
        optim.check(settings.steps)
        adapter = trained_adapter(opts, loaded)
        recipe_of(config, execution(opts), optim, settings, adapter).optimizer()  # checks --decay
        measure = watch(opts, config, tokenizer)
        run.inputs(
            rows=rows.sha,
            validation=validation and validation.sha,
            model=loaded and loaded.fingerprint,
            config=config.to_json(),
            **({"eval_tasks": measure.inputs} if measure else {}),
        )
        if loaded:
            params = loaded.params
        else:
            params = schema.init(families.rows(config), config.layers, opts["seed"])
        summary = train(
            run, config, params, rows, settings, optim, execution(opts), tokenizer, validation,
            adapter, measure,
        )  # fmt: skip
        run.finish(**summary)
        show(run.path, summary)


# ------------------------------------------------------------------------------------ generate


@cli.command("generate")
@model_option
@click.option("--tokenizer", type=TOKENIZER, help="default: the model's own")
@click.option("--prompt", "prompt", multiple=True, help="a text to continue; may be repeated")
@click.option("--prompts", type=PATH, help=".txt, one a line, or .jsonl with prompt or messages")
@click.option("--max-new-tokens", type=POSITIVE, default=128)
@click.option("--temperature", type=Finite(0), default=0.0, help="0 = the likeliest token")
@click.option("--top-k", type=NATURAL, default=0, help="only the k likeliest tokens; 0 = off")
@click.option("--top-p", type=Finite(0, 1, min_open=True), default=1.0,
              help="only the likeliest tokens of this probability together; 1 = off")  # fmt: skip
@click.option("--stop", multiple=True, help="text that ends a completion; may be repeated")
@click.option("--stop-id", type=NATURAL, multiple=True,
              help="token that ends a completion, beside the model's own")  # fmt: skip
@click.option("--seed", type=SEED, default=0, help="of the sampling")
@click.option("--batch", type=POSITIVE, default=8, help="prompts at a time")
@click.option("--chat", help="template to write prompts as conversations with; auto = the "
              "tokenizer's own")  # fmt: skip
@click.option("--system", help="system message of every conversation")
@click.option("--truncate", type=click.Choice(["none", "left"]), default="none",
              help="of a prompt that is too long, refuse it or keep its end")  # fmt: skip
@click.option("--out", type=PATH, help="folder for completions.jsonl; default: print them")
@execution_options
def generate_command(**opts: Any) -> None:
    """Continue prompts; with --out into a folder, by a run that can be resumed."""
    from core.errors import InputError
    from core.generate import Sampling
    from evals import generation as g
    from evals import user_prompts as u
    from tokenizers.templates import template

    if bool(opts["prompt"]) == bool(opts["prompts"]):
        raise InputError("give either --prompt TEXT, once or more, or --prompts FILE")
    with running("generate", opts) if opts["out"] else contextlib.nullcontext() as run:
        if opts["out"] and run is None:
            return
        asked = [u.UserPrompt(text, f"prompt {n}") for n, text in enumerate(opts["prompt"], 1)]
        asked = asked or u.read_prompts(opts["prompts"])
        loaded = load_model(opts["model"], opts["adapter"])
        tokenizer = load_tokenizer(opts["tokenizer"], loaded)
        named = None if opts["chat"] == "auto" else opts["chat"]
        chat = template(tokenizer, named) if opts["chat"] else None
        ids, strings = g.end_of_turn(tokenizer, chat) if chat else ((), ())
        settings = g.Settings(
            opts["max_new_tokens"],
            Sampling(opts["temperature"], opts["top_k"], opts["top_p"]),
            opts["seed"],
            (*g.default_stops(loaded, tokenizer), *ids, *opts["stop_id"]),
            (*strings, *opts["stop"]),
            opts["batch"],
        )
        prompts = u.prepare(
            loaded, tokenizer, asked, settings.new_tokens, chat, opts["system"],
            opts["truncate"] == "left",
        )  # fmt: skip
        settings.check(loaded)
        how = (settings, execution(opts))
        if run is None:
            texts = g.complete_all(loaded, tokenizer, prompts, *how)
            click.echo(texts[0].text if len(texts) == 1 else g.show(texts))
            return
        run.inputs(model=loaded.fingerprint, tokenizer=tokenizer.fingerprint,
                   prompts=u.fingerprint(prompts))  # fmt: skip
        summary = g.run_generation(loaded, tokenizer, prompts, run.path, *how)
        run.finish(**summary)
        show(run.path, summary)


# ------------------------------------------------------------------------- report, bench, demo


@cli.command()
@click.argument("source", type=PATH)
@click.option("--out", type=PATH, help="folder; default: where SOURCE lies")
def report(source: Path, out: Path | None) -> None:
    """Write report.html and summary.json for SOURCE: a report spec (JSON) or a scores folder."""
    from core.files import read_json
    from evals.report.build import build_report

    if source.is_dir():
        spec, folder, target = page_of(source), source, out or source / "report"
    else:
        spec, folder, target = read_json(source), source.parent, out or source.parent
    summary = build_report(spec, target, folder)
    click.echo(summary["verdict"])
    click.echo(tidy(f"{target / 'report.html'}"))


@bench_group.command("tokenizer")
@click.option("--tokenizer", type=TOKENIZER, default="bytes",
              help="a name, or a folder or file")  # fmt: skip
@click.option("--text", type=PATH, help="a UTF-8 file; default: a sample made on the spot")
@click.option("--repeats", type=POSITIVE, default=5, help="of which the best")
@result_option
def bench_tokenizer(**opts: Any) -> None:
    """Time a tokenizer on documents of 4 kB, both ways, and its loading."""
    from tokenizers.bench import bench, table

    benchmark(opts["out"], table, bench, opts["tokenizer"], opts["text"], opts["repeats"])


@cli.command("run")
@click.argument("config", type=PATH)
@click.option("--out", type=PATH, help="another folder than the recorded one")
def run_command(config: Path, out: Path | None) -> None:
    """Replay the command recorded in a run's config.json (or a folder's command.json)."""
    from core.errors import InputError
    from core.files import read_json

    content = read_json(config)
    content = content if isinstance(content, dict) else {}
    name, given = content.get("command"), content.get("options")
    if not isinstance(name, str) or not isinstance(given, dict):
        raise InputError(f"{config} records no command; give a config.json that a run wrote")
    command: click.Command | None = cli
    for word in name.split():
        command = command.commands.get(word) if isinstance(command, click.Group) else None
    if command is None or isinstance(command, click.Group) or command is run_command:
        raise InputError(f"{config}: {name!r} is no command that can be replayed")
    if unknown := sorted(set(given) - {parameter.name for parameter in command.params}):
        raise InputError(f"{config}: {name!r} has no option {unknown[0]!r}; remove it")
    given = {key: value for key, value in given.items() if value is not None}  # null = default
    given |= {"out": out} if out else {}
    try:
        context = command.make_context(name, [], default_map=given, obj=door())
    except TypeError as error:  # click expects texts, or values of the right type
        raise InputError(f"{config}: an option has a value of another kind ({error})") from error
    with context:
        command.invoke(context)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default="runs/demo")
@click.option("--seed", type=SEED, default=0)
def demo(out: Path, seed: int) -> None:
    """The whole idea in minutes: trace, select, retrain three arms, compare, report."""
    import resource
    import shlex
    import time

    from core.files import read_json, write_json
    from evals import demo

    commands = demo.plan(out, seed)
    cost = out / "cost.json"  # of each command, so that an interrupted demo adds up
    spent = read_json(cost) if cost.exists() else {"seconds": {}, "peak_gb": 0.0}
    seconds = spent["seconds"]
    for number, command in enumerate(commands, 1):
        line = "python cli.py " + shlex.join(command)
        click.secho(f"[{number}/{len(commands)}] {line}", fg="cyan")
        began = time.monotonic()
        cli.main(command, standalone_mode=False)
        seconds[line] = max(time.monotonic() - began, seconds.get(line, 0.0))
        resident_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        spent["peak_gb"] = max(resident_gb, spent["peak_gb"])
        write_json(cost, spent)
    total = sum(seconds.values())
    write_json(out / "report.json", demo.spec(list(seconds), total, spent["peak_gb"]))
    cli.main(["report", str(out / "report.json")], standalone_mode=False)
    summary = read_json(out / "summary.json")
    shown = ("relevant_share", "recall_at_k", "top_minus_random", "random_minus_bottom", "seconds",
             "peak_gb")  # fmt: skip
    click.echo(json.dumps({key: summary[key] for key in shown}, indent=1))


if __name__ == "__main__":
    cli()
