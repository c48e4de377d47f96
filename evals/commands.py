"""The commands of `eval`. Nothing heavy is imported before one of them runs."""

import re
from pathlib import Path
from typing import Any

import click

from core.command import (
    NATURAL,
    PATH,
    POSITIVE,
    SEED,
    TOKENIZER,
    Door,
    Finite,
    batch_tokens_option,
    columns,
    execution,
    execution_options,
    load_model,
    model_option,
    options,
    out_option,
    producing,
    running,
    show,
    tidy,
)


class TaskNames(click.ParamType):
    """Names of tasks; the path of a task file is made absolute."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        parts = (part.strip() for part in value.split(","))
        files = (".toml", ".json")
        return ",".join(str(Path(p).resolve()) if p.endswith(files) else p for p in parts if p)


TASKS = TaskNames()
WATCH_TOKENS = 8192  # of a batch: the default of eval run, whose programs these are
TASKS_HELP = "names, groups or patterns, separated by commas, or task files"
eval_group = click.Group("eval", help="Losses and benchmark scores.")

data_option = click.option(
    "--data", type=PATH, help="folder of local datasets, ORG__NAME/CONFIG/SPLIT.jsonl or .parquet; "
    "default: the Hub"
)  # fmt: skip
chat_template_option = click.option(
    "--apply-chat-template", is_flag=False, flag_value="auto", metavar="[NAME]",
    help="write items as conversations: gemma, gemma2, tulu or chatml; without a name the "
    "tokenizer's own",
)  # fmt: skip
asking_options = options(
    data_option,
    click.option("--num-fewshot", help="examples before each item, 5 or mmlu=5,arc_challenge=25; "
                 "default: each task's own"),
    click.option("--limit", type=Finite(0, min_open=True),
                 help="first items of each task; below 1: that share of them"),
    click.option("--fewshot-seed", type=SEED, default=1234, help="of the choice of examples"),
    chat_template_option,
    click.option("--fewshot-as-multiturn/--no-fewshot-as-multiturn", default=True,
                 help="with a chat template, examples are turns of their own"),
    click.option("--system-instruction", help="what the system says"),
    click.option("--max-length", type=POSITIVE,
                 help="tokens read and predicted; default: the model's context"),
    click.option("--add-bos/--no-add-bos", default=None, help="default: as the tokenizer says"),
    click.option("--max-new-tokens", type=POSITIVE,
                 help="of a generated answer; default: each task's own"),
    click.option("--stop-at-turn-end/--no-stop-at-turn-end", default=True,
                 help="with a chat template, its end of turn ends an answer"),
    click.option("--bootstrap", type=NATURAL, default=100_000,
                 help="resamples of a perplexity's standard error; 0 = none"),
)  # fmt: skip


watching_options = options(
    click.option("--eval-tasks", type=TASKS,
                 help=f"benchmarks to score every --eval-every steps: {TASKS_HELP}"),
    click.option("--eval-data", type=PATH, help="as --data of eval run"),
    click.option("--eval-num-fewshot", help="as --num-fewshot of eval run"),
    click.option("--eval-limit", type=Finite(0, min_open=True), help="as --limit of eval run"),
    click.option("--eval-chat-template", is_flag=False, flag_value="auto", metavar="[NAME]",
                 help="as --apply-chat-template of eval run"),
)  # fmt: skip


def chat_template(name: str | None, tokenizer: Any) -> Any:
    """The template by `chat_template_option`, None for none."""
    from tokenizers.templates import template

    return name and template(tokenizer, None if name == "auto" else name)


def shots_of(text: str | None) -> dict[str, int]:
    """`evals.benchmark.Settings.shots` by --num-fewshot."""
    from core.errors import InputError
    from evals.tasks.catalogue import select

    shots: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in (text or "").split(","))):
        found = re.fullmatch(r"(?:(.+)=)?(\d+)", part)
        if not found:
            raise InputError(f"--num-fewshot {part!r} is neither a number nor TASK=NUMBER")
        named = [task.name for task in select([found[1]]).tasks] if found[1] else [""]
        shots |= dict.fromkeys(named, int(found[2]))
    return shots


def watch(opts: dict[str, Any], config: Any, tokenizer: Any) -> Any:
    """What `watching_options` ask for, an `evals.watch.Watch`; None for nothing."""
    from core.errors import InputError
    from evals.benchmark import Settings, ask
    from evals.tasks.catalogue import select
    from evals.watch import Watch

    if not opts["eval_tasks"]:
        return None
    if tokenizer is None:
        raise InputError("--eval-tasks needs a tokenizer; name it with --tokenizer")
    chosen = select([opts["eval_tasks"]])
    shots = shots_of(opts["eval_num_fewshot"])
    chat = chat_template(opts["eval_chat_template"], tokenizer)
    settings = Settings(opts["eval_data"], shots, opts["eval_limit"], template=chat, bootstrap=0)
    asked = ask(chosen.tasks, tokenizer, config.context, settings)
    return Watch(config, execution(opts), asked, chosen.groups, settings, WATCH_TOKENS)


def settings_of(opts: dict[str, Any], tokenizer: Any) -> Any:
    """`evals.benchmark.Settings` by `asking_options`."""
    from core.errors import InputError
    from evals.benchmark import Settings

    chat = chat_template(opts["apply_chat_template"], tokenizer)
    if chat is None and opts["system_instruction"]:
        raise InputError("--system-instruction needs --apply-chat-template")
    return Settings(
        data=opts["data"],
        shots=shots_of(opts["num_fewshot"]),
        limit=opts["limit"],
        seed=opts["fewshot_seed"],
        template=chat,
        multiturn=opts["fewshot_as_multiturn"],
        system=opts["system_instruction"],
        max_length=opts["max_length"],
        add_bos=opts["add_bos"],
        new_tokens=opts["max_new_tokens"],
        turn_end=opts["stop_at_turn_end"],
        bootstrap=opts["bootstrap"],
    )


@eval_group.command("nll")
@model_option
@click.option("--rows", type=PATH, required=True)
@click.option("--out", type=PATH, required=True, help="a .npy file, float32 [N, T]")
@batch_tokens_option
@execution_options
@click.pass_obj
def nll(door: Door, **opts: Any) -> None:
    """Per-token negative log-likelihoods, label-aligned, NaN where unsupervised."""
    from evals.nll import run_nll

    with producing("eval nll", opts, file=True) as file:
        if file is not None:
            loaded = load_model(opts["model"], opts["adapter"])
            rows = door.rows(opts["rows"], loaded)
            tokenizer = door.tokenizer(None, loaded) if loaded.tokenizer else None
            summary = run_nll(loaded, rows, file, execution(opts), opts["batch_tokens"], tokenizer)
            show(opts["out"], summary, "rows", "tokens", "nll", "perplexity", "bits_per_byte")


@eval_group.command("run")
@model_option
@click.option("--tasks", type=TASKS, help=TASKS_HELP)
@click.option("--items", type=PATH, help="instead: multiple-choice items, JSON lines")
@click.option("--tokenizer", type=TOKENIZER, help="default: the model's own")
@out_option
@asking_options
@click.option("--batch", type=POSITIVE, default=8, help="answers generated at a time")
@click.option("--store", type=PATH, help="file of answers to use and add to; default: one for each "
              "model in the user's cache")  # fmt: skip
@click.option("--write-out", is_flag=True, help="show each task's first request and its tokens")
@batch_tokens_option
@execution_options
@click.pass_obj
def run_command(door: Door, **opts: Any) -> None:
    """Score benchmarks as lm-evaluation-harness does, or a file of multiple-choice items."""
    from core.errors import InputError

    if (opts["tasks"] is None) == (opts["items"] is None):
        raise InputError("give either --tasks or --items")
    (run_tasks if opts["tasks"] else run_items)(door, opts)


def run_items(door: Door, opts: dict[str, Any]) -> None:
    from evals.items import read_items
    from evals.scorer import run_eval

    with producing("eval run", opts) as folder:
        if folder is not None:
            loaded = load_model(opts["model"], opts["adapter"])
            tokenizer = door.tokenizer(opts["tokenizer"], loaded)
            items = read_items(opts["items"])
            results = run_eval(
                loaded, tokenizer, items, folder, execution(opts), opts["batch_tokens"]
            )
            show(opts["out"], results, "items", "acc", "acc_norm", "answer_logprob",
                 "close_items", "truncated_items", "alone_choices")  # fmt: skip


def run_tasks(door: Door, opts: dict[str, Any]) -> None:
    from core import distributed

    distributed.start()
    from evals.benchmark import ask
    from evals.outputs import first_prompt, table
    from evals.run import run_tasks
    from evals.tasks.catalogue import select

    with running("eval run", opts) as run:
        if run is None:
            return
        selection = select([opts["tasks"]])
        loaded = load_model(opts["model"], opts["adapter"])
        tokenizer = door.tokenizer(opts["tokenizer"], loaded)
        settings = settings_of(opts, tokenizer)
        asked = ask(selection.tasks, tokenizer, loaded.config.context, settings)
        for of_task in asked if distributed.first() else ():
            for warning in of_task.warnings:
                click.secho(f"WARNING: {warning}", fg="yellow", err=True)
            if opts["write_out"]:
                click.echo(first_prompt(of_task))
        run.inputs(
            model=loaded.fingerprint,
            tokenizer=tokenizer.fingerprint,
            tasks={a.task.name: a.fingerprint for a in asked},
            **distributed.layout(),  # batches depend on it
        )
        names = ("adapter", "dtype", "batch_tokens")
        about = {"model_name": str(opts["model"]), **{name: opts[name] for name in names}}
        results = run_tasks(
            run, loaded, tokenizer, selection, asked, settings, execution(opts),
            opts["batch_tokens"], opts["batch"], opts["store"], about,
        )  # fmt: skip
        run.finish()
        if results is not None:
            click.echo(table(results))
            click.echo(tidy(f"{run.path / 'results.json'}"))


@eval_group.command("list")
@click.option("--tasks", type=TASKS, help=TASKS_HELP)
def list_command(tasks: str | None) -> None:
    """The benchmarks there are: items, examples, what is measured, where the items come from."""
    from evals.tasks.catalogue import select

    chosen = select([tasks or "*"])
    rows = [("task", "items", "shots", "kind", "metrics", "data")]
    for task in chosen.tasks:
        place = "/".join(filter(None, (task.dataset, task.config)))
        shots = {None: "0, or as asked", 0: "0, always"}.get(
            task.shots, f"{task.shots}, or as asked"
        )
        rows.append((task.name, f"{task.size:,}" if task.size else "?", shots, task.kind,
                     ", ".join(task.metrics), f"{place} {task.split}"))  # fmt: skip
    click.echo(columns(rows))
    for group in chosen.groups:
        click.echo(f"group {group.name}: {', '.join(group.members)}")


@eval_group.command("compare")
@click.argument("a")
@click.argument("b")
@click.option("--resamples", type=POSITIVE, default=10_000, help="of the bootstrap")
@click.option("--seed", type=SEED, default=0, help="of the bootstrap")
@click.option("--out", type=PATH, help="a .json file for the result")
def compare_command(a: str, b: str, resamples: int, seed: int, out: Path | None) -> None:
    """Compare two runs item by item. A, B: folders of `eval run`; several, separated by commas,
    are seeds, paired in their order."""
    from core.files import write_json
    from evals.compare import compare, table

    of_a, of_b = ([Path(part) for part in text.split(",") if part] for text in (a, b))
    result = compare(of_a, of_b, resamples, seed)
    if out is not None:
        write_json(out, result)
    click.echo(table(result))


@eval_group.command("serve")
@model_option
@click.option("--tokenizer", type=TOKENIZER, help="default: the model's own")
@click.option("--max-length", type=POSITIVE,
              help="tokens read and predicted; default: the model's context")  # fmt: skip
@click.option("--add-bos/--no-add-bos", default=None, help="default: as the tokenizer says")
@click.option("--batch", type=POSITIVE, default=8, help="answers generated at a time")
@batch_tokens_option
@execution_options
@click.pass_obj
def serve_command(door: Door, **opts: Any) -> None:
    """Answer requests for log-probabilities and texts, JSON lines on standard input and output."""
    import sys

    from evals.serve import serve

    loaded = load_model(opts["model"], opts["adapter"])
    tokenizer = door.tokenizer(opts["tokenizer"], loaded)
    serve(
        loaded, tokenizer, sys.stdin, sys.stdout, execution(opts), opts["batch_tokens"],
        opts["max_length"], opts["add_bos"], opts["batch"],
    )  # fmt: skip
