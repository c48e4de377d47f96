"""A finished `train lm` as the training that MAGIC walks back."""

from pathlib import Path
from typing import Any

import click

# What a run of its own is told and a replayed one has been told already.
OWN = ("model", "adapter", "rows", "steps", "epochs", "batch", "accumulate", "shuffle", "optimizer",
       "lr", "schedule", "power", "warmup", "start", "end", "weight_decay", "decay", "beta1",
       "beta2", "eps_root", "momentum", "nesterov", "clip", "seed", "lora_rank", "lora_alpha",
       "lora_dropout", "lora_targets", "lora_rslora", "layers", "remat", "loss_chunk")  # fmt: skip


def options_of(ctx: click.Context, run: Path) -> dict[str, Any]:
    """The options that `run` was trained with, by the names of `attribute magic`'s.

    InputError for a folder that is no such run, and for an option given beside it.
    """
    from core.errors import InputError
    from core.files import read_json

    for name in OWN:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} is what --run was trained with; leave {option} out")
    content = read_json(run / "config.json") if (run / "config.json").exists() else {}
    if content.get("command") != "train lm" or not (run / "DONE").exists():
        raise InputError(f"{run} is no finished run of `train lm`; give its --out folder")
    held = content["options"]
    if held.get("model_parallel", 1) != 1 or held.get("dtype", "float32") != "float32":
        raise InputError(f"{run} was trained in {held['dtype']} on {held['model_parallel']} model "
                         "shards, which cannot be walked back alike; train it again in float32 on "
                         "one")  # fmt: skip
    # Runs older than an option went without it; `attribute magic` alone has another default.
    known: dict[str, Any] = {"eps_root": 0.0}
    known |= {name: held[name] for name in OWN if name in held}
    return known | {"rows": Path(held["rows"])}


def start_of(run: Path, opts: dict[str, Any]) -> Any:
    """The model that the run began with; InputError if it is not the one that was recorded."""
    from core import checkpoint, families, schema
    from core.errors import InputError
    from core.families import read_config
    from core.files import read_json

    recorded = read_json(run / "inputs.json")
    if opts["model"] is not None:
        loaded = checkpoint.load_model(opts["model"], opts["adapter"])
    else:
        config = read_config(Path(read_json(run / "config.json")["options"]["config_file"]))
        params = schema.init(families.rows(config), config.layers, opts["seed"])
        place = run / "model" / "tokenizer"
        loaded = checkpoint.Loaded(
            config, params, place if place.exists() else None,
            checkpoint.fingerprint(config, params),
        )  # fmt: skip
        if config.to_json() != recorded["config"]:
            raise InputError(f"the config that {run} was trained from has changed since; put it "
                             "back")  # fmt: skip
    if recorded["model"] not in (None, loaded.fingerprint):
        raise InputError(
            f"{opts['model']} has changed since {run} was trained from it; put it back"
        )
    return loaded


def check_rows(run: Path, rows: Any) -> None:
    """InputError if the run's data order cannot be reproduced from these rows."""
    from core.errors import InputError
    from core.files import read_json

    if read_json(run / "inputs.json")["rows"] != rows.sha:
        raise InputError(f"{rows.path} has changed since {run} was trained on it, so its batches "
                         "cannot be made again; put the rows back")  # fmt: skip


def compared(run: Path, course: Any, state: Any) -> dict[str, Any]:
    """How the end of the replay differs from what the run left: 0 on the same kind of machine,
    but for rounding in another compiled program."""
    import jax
    import numpy as np

    from core.checkpoint import load_model

    left = load_model(run)
    parts = zip(
        jax.tree.leaves(left.adapter.factors if left.adapter else left.params),
        jax.tree.leaves(state.params), jax.tree.leaves(course.start().params), strict=True,
    )  # fmt: skip
    off = moved = 0.0
    for end, again, start in parts:
        end, again, start = (np.asarray(x, np.float64) for x in (end, again, start))
        off += float(((again - end) ** 2).sum())
        moved += float(((end - start) ** 2).sum())
    return {"run": str(run), "difference": (off / moved) ** 0.5 if moved else 0.0}
