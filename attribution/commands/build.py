"""`attribute build`: gradients of rows into a store."""

from typing import Any

import click

from attribution.commands.options import gradient_options, gradient_spec
from core.command import (
    PATH,
    Door,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    out_option,
    running,
    show,
)


@click.command("build")
@model_option
@click.option("--rows", type=PATH, required=True)
@out_option
@gradient_options
@batch_tokens_option
@execution_options
@click.pass_obj
def build(door: Door, **opts: Any) -> None:
    """Store the projected gradient of every row; resumable."""
    from attribution import store

    with running("attribute build", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        rows = door.rows(opts["rows"], loaded)
        source = store.Pass(
            loaded, rows, gradient_spec(opts, loaded), execution(opts), opts["batch_tokens"]
        )
        info = store.build(run, source)
        run.finish(rows=info["rows_count"])
        shares = {f"share_of_{name}": share for name, share in info["coverage"].items()}
        show(run.path, {"rows": info["rows_count"], "features": info["width"], **shares})
