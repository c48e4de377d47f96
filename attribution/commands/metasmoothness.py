"""`attribute metasmoothness`: is a training smooth enough for MAGIC's scores to mean something?"""

from typing import Any

import click

from attribution.commands.magic import course_of, magic_training
from core.command import (
    PATH,
    POSITIVE,
    Door,
    Finite,
    batch_tokens_option,
    dtype_option,
    load_model,
    model_option,
    out_option,
    program_options,
    running,
    show,
)


@click.command("metasmoothness")
@model_option
@click.option("--rows", type=PATH, required=True, help="rows to train on")
@click.option("--query", type=PATH, help="rows, whose loss is followed too")
@out_option
@click.option("--h", "step", type=Finite(0, min_open=True), default=0.1,
              help="step of the rows' weights, in standard deviations")  # fmt: skip
@click.option("--directions", type=POSITIVE, default=1, help="of the step, averaged")
@magic_training
@batch_tokens_option
@dtype_option("float32", "float64")
@program_options
@click.pass_obj
def metasmoothness(door: Door, **opts: Any) -> None:
    """Train three times, with the rows' weights at 1 and at two steps along a random direction.

    1: both steps move the parameters alike; 0: the second knows nothing of the first. Below 0.9
    first-order scores do not predict retraining. Differences below 0.02 are noise.
    """
    import jax
    import numpy as np

    from attribution.magic import functional
    from attribution.magic import smoothness as smooth
    from attribution.magic.trust import smoothness_in_words
    from core.rows import same_tokenizer

    with running("attribute metasmoothness", opts) as run:
        if run is None:
            return
        jax.config.update("jax_enable_x64", opts["dtype"] == "float64")
        loaded = load_model(opts["model"], opts["adapter"])
        rows = door.rows(opts["rows"], loaded)
        query = door.rows(opts["query"], loaded) if opts["query"] else None
        course = course_of(opts, loaded, rows)
        asked = None
        if query:
            same_tokenizer(rows, query)
            asked = functional.functional(query, "each", "nll")

        def losses(params: Any) -> Any:
            assert asked is not None
            how = (course.recipe, params, course.frozen, asked.parts, opts["batch_tokens"])
            return asked.of(functional.losses(*how))[0]

        run.inputs(model=loaded.fingerprint, rows=rows.sha, query=query and query.sha)
        found = smooth.metasmoothness(
            course, run.path, opts["step"], opts["seed"], opts["directions"],
            losses=losses if query else None,
        )  # fmt: skip
        run.finish()
        value, moved = found["smoothness"], found["displacement"]
        said = "none" if value is None else f"{value:.3f}"
        click.echo(f"metasmoothness {said}: {smoothness_in_words(value)}")
        shown = {"steps": course.steps, "moved": moved["l2"], "moved_relative": moved["relative"]}
        if query:
            before, after = (
                float(np.array(found["query"][when], float) @ query.trained / query.trained.sum())
                for when in ("before", "after")
            )
            shown |= {"loss_before": before, "loss_after": after, "loss_drop": before - after}
        show(run.path, shown)
