"""`attribute build`: gradients of rows into a store; `attribute export`: a store to other tools."""

from typing import Any

import click

from attribution.commands.options import gradient_options, spec_and_normalizer
from core.command import (
    PATH,
    Door,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    out_option,
    producing,
    running,
    show,
)


@click.command("build")
@model_option
@click.option("--rows", type=PATH, required=True)
@out_option
@click.option("--store-dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              default="float32", help="of the gradients on disk")  # fmt: skip
@gradient_options
@batch_tokens_option
@execution_options
@click.pass_obj
def build(door: Door, **opts: Any) -> None:
    """Store the projected gradient of every row; resumable."""
    from attribution import store
    from core import distributed

    distributed.start()
    with running("attribute build", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        rows = door.rows(opts["rows"], loaded)
        spec, normalizer = spec_and_normalizer(opts, loaded)
        source = store.Pass(
            loaded, rows, spec, execution(opts), opts["batch_tokens"], normalizer, split=True
        )
        info = store.build(run, source, opts["store_dtype"])
        run.finish(rows=info["rows_count"])
        shares = {f"share_of_{name}": share for name, share in info["coverage"].items()}
        show(run.path, {"rows": info["rows_count"], "features": info["width"], **shares})


@click.command("export")
@click.argument("store", type=PATH)
@out_option
def export(**opts: Any) -> None:
    """Write a store as a Bergson index (gradients.bin and info.json)."""
    from attribution.store import Store, export

    with producing("attribute export", opts) as folder:
        if folder is not None:
            info = export(Store(opts["store"]), folder)
            show(opts["out"], {"rows": info["num_items"], "modules": len(info["grad_sizes"])})
