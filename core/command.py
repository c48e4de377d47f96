"""What every command shares: option types, one line per error, output folders, the summary line.

Imports click alone at the top, so that `--help` stays instant.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

# Absolute, because the recorded command must mean the same when replayed from another folder.
PATH = click.Path(path_type=Path, resolve_path=True)


class Whole(click.IntRange):
    name = "integer"


class Finite(click.FloatRange):
    """A range of numbers; infinity and NaN, which compares with nothing, are in none."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


POSITIVE, NATURAL, SEED = Whole(1), Whole(0), Whole(0, 2**32 - 1)


class HubName(click.ParamType):
    """A name on the Hugging Face Hub as it is; anything else is a path, made absolute."""

    name = "path or hub name"
    known: tuple[str, ...] = ()  # further names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from core.hf.hub import is_name

        if value in self.known or is_name(str(value)):
            return value
        return Path(value).resolve()


class TokenizerName(HubName):
    """The same for tokenizers, some of which have names of their own."""

    name = "name or path"
    known = ("bytes", "gpt2", "gpt2-mul")


MODEL, TOKENIZER = HubName(), TokenizerName()


class Door(NamedTuple):
    """What the door hands to commands (`click.pass_obj`) of rooms that may not import others.

    rows: (path, loaded model) -> rows that fit it. tokenizer: (name or None, loaded model) -> the
    tokenizer of that name or the model's own. own: loaded model -> its tokenizer, None if it has
    none that is known here. page: scores folder -> `report.html` in it. proponents: (scores folder,
    rows) -> [N], larger = stronger proponent. diagnose, select: attribution's own.
    """

    rows: Callable[[Path, Any], Any]
    tokenizer: Callable[[str | None, Any], Any]
    own: Callable[[Any], Any] = lambda loaded: None
    page: Callable[[Path], Any] = lambda folder: None
    proponents: Callable[[Path, Any], Any] = lambda folder, rows: None
    diagnose: Callable[..., dict[str, Any]] = lambda *given: {}
    select: Callable[..., dict[str, Any]] = lambda *given: {}


def tidy(text: str) -> str:
    """One line, with the paths inside the current folder relative to it."""
    here = re.escape(f"{Path.cwd()}/")
    return re.sub(rf"(?<![^\s'\"(\[=,]){here}", "", " ".join(text.split()))


class Ended(click.ClickException):
    """The end of a command that is no bug of ours: one line, no traceback."""

    def __init__(self, error: BaseException | str):
        super().__init__(tidy(str(error)))


class BadInput(Ended):
    exit_code = 2


class Stopped(Ended):
    exit_code = 75  # EX_TEMPFAIL


class Interrupted(Ended):
    exit_code = 130


class Group(click.Group):
    """Turns errors that are no bug of ours into one line and an exit code."""

    def is_input(self, error: BaseException) -> bool:
        from core.errors import InputError

        return isinstance(error, InputError)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):  # --help is an Exit: import nothing
            raise
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except Exception as error:
            from core.errors import Preempted

            if isinstance(error, Preempted):
                raise Stopped(error) from error
            if self.is_input(error):
                raise BadInput(error) from error
            if isinstance(error, OSError) and error.filename:
                message = f"{error.filename}: {error.strerror}; check the path and its permissions"
                raise BadInput(message) from error
            raise


def options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several click options as one decorator."""
    return lambda f: functools.reduce(lambda g, decorate: decorate(g), reversed(decorators), f)


@contextlib.contextmanager
def running(command: str, opts: dict[str, Any]) -> Iterator[Any]:
    """The run folder of a resumable command; None when it is already done."""
    from core.rundir import open_run

    fresh = opts.pop("resume", "auto") == "never"
    with open_run(opts["out"], command, opts, fresh) as run:
        if run.done:
            click.echo(tidy(f"{run.path} is already done"))
        yield None if run.done else run


@contextlib.contextmanager
def producing(command: str, opts: dict[str, Any], file: bool = False) -> Iterator[Path | None]:
    """Where a command makes its folder (or file) in one go; None when it is already there."""
    from core.rundir import produce, produce_file, stamps

    make = produce_file if file else produce
    with make(opts["out"], command, opts, stamps(opts)) as place:
        if place is None:
            click.echo(tidy(f"{opts['out']} is already there, made with the same options"))
        yield place


def show(path: Path, values: dict[str, Any], *names: str) -> None:
    """One summary line a command: of `names` (default: all) what is a text or a number.

    Counts of nothing are left out, hashes are cut short, standard errors stand by their values.
    """
    parts = []
    for name in names or values:
        value = values[name]
        if isinstance(value, float):
            spread = values.get(f"{name}_stderr")
            parts.append(f"{name} {value:,.4g}" + (f" ± {spread:.2g}" if spread else ""))
        elif isinstance(value, str):
            parts.append(f"{name} {value[:12] if len(value) == 64 else value}")
        elif isinstance(value, int) and value:
            parts.append(f"{name} {value:,}")
    click.echo(tidy(f"{path}: {', '.join(parts)}"))


def benchmark(
    out: Path | None,
    table: Callable[[dict[str, Any]], str],
    bench: Callable[..., dict[str, Any]],
    *arguments: Any,
) -> None:
    """Run a benchmark and print its table; `out`, a .json file, is opened before."""
    from core.files import atomic, dumps

    with atomic(out) if out else contextlib.nullcontext() as file:
        result = bench(*arguments)
        if file is not None:
            file.write(f"{dumps(result, indent=2)}\n".encode())
    click.echo(table(result))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, its columns aligned on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)


out_option = click.option("--out", type=PATH, required=True, help="folder to make")
adapter_option = click.option(
    "--adapter", type=MODEL, help="PEFT folder, or run that made one, to attach to the model"
)
model_option = options(
    click.option("--model", type=MODEL, required=True,
                 help="model folder, finished run, Hugging Face folder or hub name"),
    adapter_option,
)  # fmt: skip
program_options = options(
    click.option("--layers", type=click.Choice(["auto", "scan", "unrolled"]), default="auto",
                 help="compile one block or all"),
    click.option("--remat/--no-remat", default=False, help="recompute blocks in the backward pass"),
    click.option("--loss-chunk", type=NATURAL, default=0,
                 help="tokens whose logits are held at once; 0 = auto"),
)  # fmt: skip


def dtype_option(*choices: str) -> Callable[[Any], Any]:
    """`--dtype` of a command that can compute in these; the first is the default."""
    return click.option("--dtype", type=click.Choice(choices), default=choices[0],
                        help="of activations and matmuls")  # fmt: skip


execution_options = options(dtype_option("float32", "bfloat16"), program_options)
lora_options = options(
    click.option("--lora-rank", type=POSITIVE, help="train an adapter of this rank, no weights"),
    click.option("--lora-alpha", type=Finite(0, min_open=True), help="default: twice the rank"),
    click.option("--lora-dropout", type=Finite(0, 1, max_open=True), help="default: 0"),
    click.option("--lora-targets",
                 help="ends of module names (q_proj,v_proj), or a regular expression for whole "
                 "names, or all-linear; default: the attention's projections"),
    click.option("--lora-rslora", is_flag=True,
                 help="scale by alpha / sqrt(rank), not alpha / rank"),
)  # fmt: skip
PRESET = click.Choice(["tiny", "gemma3-tiny", "gpt2-124m", "gemma3-270m", "pythia-160m"])
preset_option = click.option(
    "--preset", default="tiny", type=PRESET, help="size of the model; its weights are random"
)
result_option = click.option("--out", type=PATH, help="a .json file for the result")
batch_tokens_option = click.option(
    "--batch-tokens", type=POSITIVE, default=8192, help="tokens of a batch, padding included"
)


def execution(opts: dict[str, Any]) -> Any:
    from core.config import Execution

    return Execution(opts["dtype"], opts["layers"], opts["remat"], opts["loss_chunk"])


def load_model(path: Path, adapter: Path | None = None, dtype: str = "float32") -> Any:
    from core.checkpoint import load_model

    return load_model(path, adapter, dtype)


def trained_adapter(opts: dict[str, Any], loaded: Any) -> Any:
    """What training starts from by `lora_options`: a new adapter or the model's, None for none.

    loaded: the model, or None when there is none yet.
    """
    import dataclasses

    from core import adapter
    from core.errors import InputError

    names = ("rank", "alpha", "targets", "rslora")
    given = [f"--lora-{name}" for name in names if opts[f"lora_{name}"]]
    held, rate = loaded and loaded.adapter, opts["lora_dropout"]
    if held:
        if given:
            raise InputError(f"the model has an adapter, which goes on as it is; leave {given[0]} "
                             "out, or give the base model for --model")  # fmt: skip
        rate = held.spec.dropout if rate is None else rate
        return held._replace(spec=dataclasses.replace(held.spec, dropout=rate))
    rank, config = opts["lora_rank"], loaded and loaded.config
    if rank is None:
        if given or rate is not None:
            raise InputError(f"{(*given, '--lora-dropout')[0]} needs --lora-rank")
        return None
    text, alpha = opts["lora_targets"], opts["lora_alpha"] or 2 * rank
    targets = adapter.parse_targets(text) if text else adapter.attention_targets(config)
    spec = adapter.LoraSpec(rank, alpha, targets, rate or 0.0, opts["lora_rslora"])
    factors = adapter.init(spec, config, opts["seed"])
    return adapter.Adapter(spec, factors, loaded.fingerprint, str(opts["model"]))
