"""Options of `sae train`, and the SAEs they stand for.

Imports click alone at the top, so that `--help` stays instant.
"""

from typing import Any

import click

from core.command import NATURAL, PATH, POSITIVE, SEED, Finite, options

KINDS = ("topk", "batchtopk", "jumprelu", "matryoshka", "standard", "gated", "abstopk")

training_options = options(
    click.option("--site", "sites", multiple=True, required=True,
                 help="activation to train on, as resid_post.12, may be repeated; of a transcoder "
                 "two, as mlp_in.12:mlp_out.12"),
    click.option("--architecture", type=click.Choice(KINDS), default="batchtopk"),
    click.option("--width", "widths", type=POSITIVE, multiple=True,
                 help="features, may be repeated; default: 16 times the activation's width"),
    click.option("--k", "ks", type=POSITIVE, multiple=True,
                 help="active features of a token (top-k kinds), may be repeated; default: 32"),
    click.option("--k-start", type=POSITIVE, help="where k begins; it falls over --k-warmup steps"),
    click.option("--k-warmup", type=NATURAL, default=0),
    click.option("--sparsity", type=Finite(0),
                 help="coefficient of the sparsity loss; default: 1 of jumprelu, 5 of others"),
    click.option("--sparsity-warmup", type=Finite(0, 1), default=0.1,
                 help="share of the steps over which it rises from 0"),
    click.option("--l0-loss", type=click.Choice(["tanh", "quadratic", "step"]), default="tanh",
                 help="of jumprelu"),
    click.option("--target-l0", type=Finite(0, min_open=True), help="of --l0-loss quadratic"),
    click.option("--bandwidth", type=Finite(0, min_open=True), default=0.05,
                 help="around jumprelu's thresholds in which they learn"),
    click.option("--prefix", "prefixes", type=POSITIVE, multiple=True,
                 help="features of a matryoshka's nested SAEs; default: 1/16, 1/4 and all"),
    click.option("--aux", type=click.Choice(["saelens", "openai", "sparsify"]), default="openai",
                 help="how dead features learn in top-k kinds"),
    click.option("--tokens", type=POSITIVE, help="to train on; default: every token once"),
    click.option("--batch", type=POSITIVE, default=4096, help="tokens of a step"),
    click.option("--lr", type=Finite(0, min_open=True), help="default: by architecture and width"),
    click.option("--warmup", type=Finite(0, 1), default=0.05,
                 help="share of the steps over which the rate rises"),
    click.option("--decay", type=Finite(0, 1), default=0.2,
                 help="share of the steps, the last, over which it falls to 0"),
    click.option("--beta1", type=Finite(0, 1, max_open=True), default=0.9),
    click.option("--clip", type=Finite(0, min_open=True), default=1.0, help="global gradient norm"),
    click.option("--dead-tokens", type=POSITIVE, default=10_000_000,
                 help="tokens without firing after which a feature is dead"),
    click.option("--normalize/--no-normalize", default=True,
                 help="train on activations of mean norm sqrt(D); undone in what is written"),
    click.option("--buffer", type=POSITIVE, default=2**18, help="tokens shuffled together"),
    click.option("--cache", type=PATH, help="folder to keep activations in; results are the same"),
    click.option("--log-every", type=POSITIVE, default=50, help="steps"),
    click.option("--save-every", type=POSITIVE, default=1000, help="steps"),
    click.option("--model-parallel", type=POSITIVE, default=1,
                 help="devices that share the features"),
    click.option("--seed", type=SEED, default=0),
)  # fmt: skip


def training_jobs(opts: dict[str, Any], config: Any, steps: int) -> list[Any]:
    """A `sae.training.run.Job` for each site, width and k."""
    from core import taps
    from core.errors import InputError
    from sae.training.losses import RANKED
    from sae.training.run import Job

    _require_meant(opts, RANKED)
    kind, ks = opts["architecture"], opts["ks"] or (32,)
    jobs = []
    for site in opts["sites"]:
        source, transcoder, target = site.partition(":")
        reads = taps.parse(source, config)
        writes = taps.parse(target, config) if transcoder else reads
        d_in, d_out = taps.width(config, reads), taps.width(config, writes)
        for width in opts["widths"] or (16 * d_in,):
            for k in ks if kind in RANKED else (0,):
                name = f"{site.replace(':', '-')}_{kind}_{width}"
                name += f"_k{k}" if len(ks) > 1 else ""
                recipe = recipe_of(opts, steps, (d_in, width, d_out), k, bool(transcoder))
                jobs.append(Job(name, reads, writes, recipe))
    if opts["widths"] and opts["prefixes"] and len(opts["widths"]) > 1:
        raise InputError("--prefix is of one --width; train the others by themselves")
    return jobs


def _require_meant(opts: dict[str, Any], ranked: tuple[str, ...]) -> None:
    """Raise InputError for an option that would do nothing. ranked: architectures with a k."""
    from core.errors import InputError

    kind = opts["architecture"]
    warm = {"--k-start": opts["k_start"], "--k-warmup": opts["k_warmup"]}
    given = {"--k": opts["ks"], **warm, "--sparsity": opts["sparsity"] is not None,
             "--target-l0": opts["target_l0"], "--prefix": opts["prefixes"]}  # fmt: skip
    of = dict.fromkeys(("--k", *warm), ranked)
    of |= {"--sparsity": [name for name in KINDS if name not in ranked],
           "--target-l0": ["jumprelu"], "--prefix": ["matryoshka"]}  # fmt: skip
    for option, kinds in of.items():
        if given[option] and kind not in kinds:
            raise InputError(f"{option} is of --architecture {', '.join(kinds)}, not of {kind}; "
                             "leave it out")  # fmt: skip
    if opts["target_l0"] and opts["l0_loss"] != "quadratic":
        raise InputError("--target-l0 is of --l0-loss quadratic; give that, or leave it out")
    if any(warm.values()) and not all(warm.values()):
        raise InputError("--k-start and --k-warmup belong together; give both, or neither")


def recipe_of(
    opts: dict[str, Any], steps: int, sizes: tuple[int, int, int], k: int, transcoder: bool
) -> Any:
    """The `sae.training.step.Recipe` of one of them. sizes: width in, features, width out.

    k: 0 for architectures without one.
    """
    from sae.training import losses
    from sae.training.step import Recipe

    kind, (d_in, width, d_out) = opts["architecture"], sizes
    sparsity = opts["sparsity"]
    if sparsity is None:
        sparsity = {"jumprelu": 1.0, "standard": 5.0, "gated": 5.0}.get(kind, 0.0)
    nested = opts["prefixes"] or (max(width // 16, 1), max(width // 4, 1))
    objective = losses.Objective(
        kind,
        k=k,
        k_start=opts["k_start"] or 0,
        centred=not transcoder,
        sparsity=sparsity,
        l0=opts["l0_loss"],
        target_l0=opts["target_l0"] or 0.0,
        bandwidth=opts["bandwidth"],
        aux={"saelens": losses.SAELENS, "openai": losses.OPENAI, "sparsify": losses.SPARSIFY}[
            opts["aux"]
        ],
        widths=tuple(sorted({*nested, width})) if kind == "matryoshka" else (),
    )
    return Recipe(
        objective,
        d_in,
        width,
        d_out,
        steps,
        transcoder,
        opts["lr"],
        opts["beta1"],
        warmup=int(opts["warmup"] * steps),
        decay=opts["decay"],
        clip=opts["clip"],
        sparsity_warmup=int(opts["sparsity_warmup"] * steps),
        k_warmup=opts["k_warmup"],
        dead_tokens=opts["dead_tokens"],
    )
