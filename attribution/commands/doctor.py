"""`attribute doctor`: does a setting give gradients that can be trusted?"""

from typing import Any

import click

from attribution.commands.options import gradient_options, spec_and_normalizer
from core.command import (
    PATH,
    POSITIVE,
    SEED,
    Door,
    Finite,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
)


@click.command("doctor")
@model_option
@click.option("--rows", type=PATH, required=True, help="pool or query rows; all are looked at")
@click.option("--scores", type=PATH, help="folder of `attribute score` over these rows")
@click.option("--sample", type=POSITIVE, default=16, help="rows to take gradients of")
@click.option("--seed", type=SEED, default=0, help="of the sample")
@click.option("--damping", type=Finite(0), default=0.1, help="that --precondition would use")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--out", type=PATH, help="a .json file for the result")
@gradient_options
@batch_tokens_option
@execution_options
@click.pass_obj
def doctor(door: Door, **opts: Any) -> None:
    """Check a model, rows and settings; exit code 1 when something is bad."""
    from attribution import doctor as check_up
    from attribution.doctor_rows import Special
    from core.files import dumps, write_json

    loaded = load_model(opts["model"], opts["adapter"])
    config = loaded.config
    special = Special(config.bos, config.eos, None, False)
    if loaded.tokenizer:
        known = door.tokenizer(None, loaded)
        special = Special(known.bos, known.eos, known.pad, known.add_bos)
    spec, normalizer = spec_and_normalizer(opts, loaded)
    found = check_up.examine(
        loaded, opts["rows"], special, spec, execution(opts), opts["batch_tokens"], normalizer,
        opts["damping"], opts["sample"], opts["seed"], opts["scores"],
    )  # fmt: skip
    setting = {name: value for name, value in opts.items() if name not in ("as_json", "out")}
    result = check_up.as_json(found, setting)
    if opts["out"]:
        write_json(opts["out"], result)
    click.echo(dumps(result, indent=2) if opts["as_json"] else check_up.table(found))
    if result["verdict"] == "bad":
        click.get_current_context().exit(1)
