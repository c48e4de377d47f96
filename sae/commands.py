"""The commands of `sae`. Nothing heavy is imported before one of them runs."""

from typing import Any

import click

from core.command import (
    MODEL,
    NATURAL,
    PATH,
    POSITIVE,
    PRESET,
    Door,
    batch_tokens_option,
    benchmark,
    execution,
    execution_options,
    load_model,
    model_option,
    options,
    out_option,
    producing,
    result_option,
    running,
    show,
    tidy,
)
from sae.training.options import training_jobs, training_options

sae_group = click.Group(
    "sae", help="Sparse autoencoders: encode, train, judge, fingerprint, predict attribution."
)

sae_option = options(
    click.option("--sae", type=MODEL, required=True,
                 help="folder of an SAE, a run of sae train, or ORG/NAME/FOLDER on the Hub"),
    click.option("--sae-id", help="folder in --sae, as resid_post/layer_12_width_16k_l0_medium"),
)  # fmt: skip
site_option = click.option("--site", help="activation to read, as resid_post.12; default: what the "
                           "SAE's file says")  # fmt: skip
rows_option = click.option("--rows", type=PATH, required=True)
resume_option = click.option("--resume", type=click.Choice(["auto", "never"]), default="auto",
                             help="never: begin anew")  # fmt: skip


def load_sae(opts: dict[str, Any], many: bool = False) -> Any:
    """The SAE of `sae_option`; many: also a crosscoder, which reads several layers."""
    from sae import formats

    return (formats.load if many else formats.load_one)(opts["sae"], opts["sae_id"])


@sae_group.command("encode")
@sae_option
@click.option("--activations", type=PATH, required=True,
              help=".npy [M, D]; of a crosscoder [M, layers, D]")  # fmt: skip
@click.option("--out", type=PATH, required=True, help="a .npz file")
def encode_command(**opts: Any) -> None:
    """Features and reconstructions of activations from a file."""
    from core.errors import InputError
    from core.files import write_json
    from sae.encode import encode

    if opts["out"].suffix != ".npz":
        raise InputError(f"{opts['out']} must end in .npz")
    with producing("sae encode", opts, file=True) as file:
        if file is not None:
            sae = load_sae(opts, many=True)
            summary = {**encode(sae, opts["activations"], file), "sae": sae.fingerprint}
            write_json(file.with_suffix(".json"), summary)
            show(opts["out"], summary)


@sae_group.command("train")
@model_option
@rows_option
@training_options
@resume_option
@batch_tokens_option
@out_option
@execution_options
@click.pass_obj
def train_command(door: Door, **opts: Any) -> None:
    """Train one or several SAEs or transcoders from one pass of the model."""
    from core import distributed
    from sae.activations import row_counts
    from sae.training import run as t

    with running("sae train", opts) as run:
        if run is None:
            return
        loaded = load_model(opts["model"], opts["adapter"])
        rows = door.rows(opts["rows"], loaded)
        names = ("tokens", "batch", "seed", "normalize", "buffer", "batch_tokens", "cache",
                 "log_every", "save_every", "model_parallel")  # fmt: skip
        settings = t.Settings(**{name: opts[name] for name in names})
        steps = settings.steps(int(row_counts(rows, loaded.config.bos).sum()))
        jobs = training_jobs(opts, loaded.config, steps)
        run.inputs(model=loaded.fingerprint, rows=rows.sha, **distributed.layout())
        summary = t.train(run, loaded, rows, jobs, settings, execution(opts), str(opts["model"]))
        run.finish(**summary)
        for name, found in summary["saes"].items():
            show(run.path / name, found)


@sae_group.command("eval")
@model_option
@rows_option
@sae_option
@site_option
@resume_option
@batch_tokens_option
@out_option
@execution_options
@click.pass_obj
def eval_command(door: Door, **opts: Any) -> None:
    """How well an SAE tells activations, and how well the model runs on what it tells."""
    from sae.evaluate import evaluate
    from sae.places import places_of

    with running("sae eval", opts) as run:
        if run is None:
            return
        loaded, sae = load_model(opts["model"], opts["adapter"]), load_sae(opts)
        places = places_of(sae, opts["site"], loaded.config)
        rows = door.rows(opts["rows"], loaded)
        run.inputs(model=loaded.fingerprint, rows=rows.sha, sae=sae.fingerprint)
        how = (execution(opts), opts["batch_tokens"])
        results = evaluate(run, loaded, rows, sae, places, *how)
        run.finish(**results)
        show(run.path, results, "tokens", "explained_variance", "l0", "dead", "dense_10",
             "ce_clean", "ce_sae", "ce_zero", "ce_score", "kl_score")  # fmt: skip


@sae_group.command("fingerprint")
@model_option
@rows_option
@sae_option
@site_option
@click.option("--k", type=POSITIVE, default=256, help="features kept of a row")
@click.option("--token-k", type=NATURAL, default=0,
              help="also kept of every token, for attention over tokens, as 16")  # fmt: skip
@resume_option
@batch_tokens_option
@out_option
@execution_options
@click.pass_obj
def fingerprint_command(door: Door, **opts: Any) -> None:
    """The features that each row has: pooled, sparse, with ten statistics."""
    from sae import fingerprint as f
    from sae.places import places_of

    with running("sae fingerprint", opts) as run:
        if run is None:
            return
        loaded, sae = load_model(opts["model"], opts["adapter"]), load_sae(opts)
        tap = places_of(sae, opts["site"], loaded.config).reads
        rows = door.rows(opts["rows"], loaded)
        settings = f.Settings(opts["k"], opts["token_k"], opts["batch_tokens"])
        summary = f.fingerprint(run, loaded, rows, sae, tap, settings, execution(opts))
        run.finish(**summary)
        show(run.path, summary)


@sae_group.command("classify")
@click.option("--fingerprints", type=PATH, required=True, help="folder of sae fingerprint")
@click.option("--scores", type=PATH, required=True, help="folder of scores of the same rows")
@click.option("--rows", type=PATH, help="the rows; default: where they were fingerprinted")
@click.option("--label", default="top:0.25",
              help="which rows are proponents: top:SHARE against the rest, or quantile:SHARE, top "
              "against bottom")  # fmt: skip
@click.option("--seeds", type=POSITIVE, default=5, help="of splits by document, and of networks")
@click.option("--k", "ks", type=POSITIVE, multiple=True,
              help="features of a fingerprint that count, may be repeated, chosen on validation; "
              "default: all there are")  # fmt: skip
@click.option("--quality", multiple=True,
              help="column of the rows to compare with, may be repeated; default: those called "
              "quality, reward and the like")  # fmt: skip
@resume_option
@out_option
@click.pass_obj
def classify_command(door: Door, **opts: Any) -> None:
    """Predict from fingerprints which rows attribution ranks high, beside what is known without."""
    from core.files import read_jsonl
    from core.rows import load_rows
    from core.rundir import stamps
    from sae.fingerprint import read_fingerprints
    from sae.predict import baselines, classify, labels, verdict

    with running("sae classify", opts) as run:
        if run is None:
            return
        found = read_fingerprints(opts["fingerprints"])
        rows = load_rows(opts["rows"] or found.info["rows"]["path"])
        scores_N = door.proponents(opts["scores"], rows)
        lines = read_jsonl(opts["scores"] / "row_diagnostics.jsonl")
        pool = baselines.pool(rows, scores_N, lines, opts["quality"], scores=str(opts["scores"]))
        rule, seeds = labels.parse(opts["label"]), tuple(range(opts["seeds"]))
        settings = classify.Settings(rule, seeds, opts["ks"])
        classify.prepare(found, pool, settings)  # all checks
        run.inputs(rows=rows.sha, sae=found.info["sae"]["fingerprint"], **stamps(opts))
        results = classify.classify(run.path, found, pool, settings)
        run.finish()
        for warning in results["warnings"]:
            click.echo(warning, err=True)
        click.echo(verdict.table(results))
        click.echo(tidy(f"{run.path / 'results.json'}"))


@sae_group.command("apply")
@click.option("--classifier", type=PATH, required=True, help="folder of sae classify")
@model_option
@rows_option
@click.option("--sae", type=MODEL, help="default: the one that the classifier was made with")
@click.option("--sae-id", help="folder inside --sae")
@click.option("--k", type=POSITIVE, help="also write the k best rows to OUT/selected")
@resume_option
@batch_tokens_option
@out_option
@execution_options
@click.pass_obj
def apply_command(door: Door, **opts: Any) -> None:
    """Rank a pool by its fingerprints alone, into a folder of scores, and select from it."""
    from sae.predict import apply, classifier

    with running("sae apply", opts) as run:
        if run is None:
            return
        made = classifier.load(opts["classifier"])
        sae = load_sae({**opts, "sae": opts["sae"] or made.about["sae"]["path"]})
        loaded = load_model(opts["model"], opts["adapter"])
        rows = door.rows(opts["rows"], loaded)
        lent = apply.Lent(door.diagnose, door.select)
        how = (execution(opts), opts["batch_tokens"])
        summary = apply.apply(run, made, loaded, sae, rows, opts["k"], lent, *how)
        run.finish()
        show(run.path, {"rows": summary["rows"], **summary["score"]})


@sae_group.command("dashboard")
@model_option
@rows_option
@sae_option
@site_option
@click.option("--classifier", type=PATH, help="folder of sae classify, whose weights to show")
@click.option("--features", type=POSITIVE, default=500,
              help="of how many to keep contexts: those of the largest weights, else of the "
              "largest activations")  # fmt: skip
@click.option("--feature", "also", type=NATURAL, multiple=True,
              help="number of a feature to keep contexts of as well, may be repeated")  # fmt: skip
@resume_option
@batch_tokens_option
@out_option
@execution_options
@click.pass_obj
def dashboard_command(door: Door, **opts: Any) -> None:
    """One page of an SAE's features: when they fire, on what, and what they promote."""
    from sae.dashboard import build
    from sae.places import places_of
    from sae.predict import classifier

    with running("sae dashboard", opts) as run:
        if run is None:
            return
        loaded, sae = load_model(opts["model"], opts["adapter"]), load_sae(opts)
        tap = places_of(sae, opts["site"], loaded.config).reads
        rows = door.rows(opts["rows"], loaded)
        made = classifier.load(opts["classifier"]) if opts["classifier"] else None
        settings = build.Settings(opts["features"], opts["also"], opts["batch_tokens"])
        how = (settings, execution(opts), made)
        summary = build.dashboard(run, loaded, rows, sae, tap, door.own(loaded), *how)
        run.finish(**summary)
        show(run.path / build.PAGE, summary)


@click.command("sae")
@click.option("--preset", default="gemma3-270m", type=PRESET, help="shapes; weights are random")
@click.option("--layer", type=NATURAL, default=12)
@click.option("--width", type=POSITIVE, default=16_384, help="features of the SAE")
@click.option("--batch", type=POSITIVE, default=4, help="rows")
@click.option("--length", type=POSITIVE, default=512, help="tokens of a row")
@click.option("--repeats", type=POSITIVE, default=5, help="alternating, of which the median")
@result_option
@execution_options
def bench_sae(**opts: Any) -> None:
    """Time fingerprints and an SAE's training step against the model's forward to its layer."""
    from sae.bench import bench, table

    how = (opts["batch"], opts["length"], opts["repeats"], execution(opts))
    benchmark(opts["out"], table, bench, opts["preset"], opts["layer"], opts["width"], *how)
