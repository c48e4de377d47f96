"""One report of a data-selection experiment: did the chunks that attribution chose teach more?

`build_report` reads the folders that scoring, training and evaluation wrote, computes a few numbers
with honest intervals (`evals.statistics`), and writes `summary.json` and one self-contained
`report.html`. Every part of the spec except the scores may be missing; the page then shows less.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import InputError
from core.files import read_json, write_json, write_text
from core.page.text import count, listed, num, percent, signed
from evals.report import magic as of_magic
from evals.report import validation
from evals.report.data import (
    Arm,
    Difference,
    Pool,
    Report,
    Shown,
    Verdict,
    check_paired,
    load_arm,
    load_magic,
    load_pool,
    load_run,
    paired_difference,
)
from evals.report.page import page
from evals.report.rows import load_source, load_token_scores, row_texts
from evals.report.toptokens import strongest
from evals.statistics import paired_bootstrap, ranking_auc, recall_at_k

SPEC_KEYS = {
    "title": "heading of the page",
    "query": "what the scores are about, in words: 'two-digit addition'",
    "model": "one line, or an object of facts, about the model",
    "scores": "output folder of `attribute score`, or an object {method name: folder}, main first",
    "rows": "the scored rows folder (for the text of chunks)",
    "tokenizer": "tokenizer folder or name that decodes the rows",
    "arms": "{'top': [{'seed', 'run', 'eval'}, ...], 'random': [...], 'bottom': [...], ...}",
    "base": "eval folder of the checkpoint that every arm starts from",
    "pretraining": "run directory of that checkpoint",
    "relevant_sources": "names of the sources that teach the query",
    "k": "how many chunks were selected",
    "shown": "how many top and bottom chunks to print (default 12)",
    "validation": "results of `attribute validate`, beside those in the scores folder: a list",
    "commands": "the command lines that were run",
    "seconds": "wall time of the whole experiment",
    "peak_gb": "peak memory in GB",
}
EXTRA_PER_SOURCE, EXTRA_SOURCES = 3, 12


def build_report(spec: dict[str, Any], out: Path, folder: Path = Path(".")) -> dict[str, Any]:
    """Write `out`/summary.json and `out`/report.html; return the summary.

    `spec` is described by SPEC_KEYS; its paths are relative to `folder`, where the spec file lies.
    Summary: `relevant_share` is the share of the pool that relevant sources hold,
    `precision_at_k` that of the top k, `recall_at_k` the share of all relevant chunks found
    there; differences are nats of answer log-probability with 95 % intervals over seeds and
    items. A number that the spec cannot give is None.
    Raises InputError before anything is written when the spec or a folder is unusable.
    """
    if not isinstance(spec, dict):
        raise InputError(f"a report spec is a JSON object with `scores`, not {spec!r}")
    old = Path(out) / "summary.json"
    if old.exists() and "verdict" not in read_json(old):
        raise InputError(f"{old} is not a report's, so it is not replaced; give another --out")
    report = read_report(spec, Path(folder))
    html = page(report)
    write_json(old, report.summary)
    write_text(Path(out) / "report.html", html)
    return report.summary


def write_page(spec: dict[str, Any], file: Path, folder: Path = Path(".")) -> dict[str, Any]:
    """Write the page alone, into a folder that has a summary of its own; return the report's."""
    report = read_report(spec, Path(folder))
    write_text(file, page(report))
    return report.summary


def read_report(spec: dict[str, Any], folder: Path) -> Report:
    unknown = sorted(set(spec) - set(SPEC_KEYS))
    if unknown:
        known = ", ".join(SPEC_KEYS)
        raise InputError(f"unknown report key {unknown[0]!r}: known keys are {known}")
    if not spec.get("scores"):
        raise InputError("the report needs `scores`: the output folder of `attribute score`")
    named = spec["scores"] if isinstance(spec["scores"], dict) else {"this ranking": spec["scores"]}
    pools = [load_pool(folder / path, name) for name, path in named.items()]
    pool, k = pools[0], spec.get("k")
    for other in pools[1:]:
        if len(other.score_N) != len(pool.score_N):
            raise InputError(f"scores {pool.name!r} and {other.name!r} are of different pools")
    if k is not None and not (isinstance(k, int) and 0 < k <= len(pool.score_N)):
        scored = count(len(pool.score_N), "scored chunk")
        raise InputError(f"k is {k!r}; it must be a whole number from 1 to the {scored}")
    relevant = list(spec.get("relevant_sources") or [])
    for name in sorted(set(relevant) - set(pool.sources)):
        some = ", ".join(list(pool.sources)[:20])
        raise InputError(f"relevant source {name!r} is not in the pool, which has {some}")

    arms = [load_arm(name, entries, folder) for name, entries in (spec.get("arms") or {}).items()]
    if any(arm.name == "base" for arm in arms):
        raise InputError("an arm cannot be called 'base': name its eval folder under `base`")
    base = load_arm("base", [{"eval": spec["base"]}], folder) if spec.get("base") else None
    evaluated = [*arms, base] if base else arms
    check_paired(evaluated)
    intervals = {arm.name: paired_bootstrap(arm.logprob_SI) for arm in evaluated}
    differences = _differences({arm.name: arm for arm in arms})
    run = spec.get("pretraining")

    shown, main = _shown(pool, spec.get("shown", 12)), folder / next(iter(named.values()))
    token_scores = load_token_scores(main, pool.info, int(pool.row_N.max(initial=-1)) + 1)
    rows = folder / spec["rows"] if spec.get("rows") else None
    source = load_source(rows, _tokenizer_path(spec.get("tokenizer"), folder))
    magic = load_magic(main, pool, source)
    texts = row_texts(source, [int(pool.row_N[chunk.index]) for chunk in shown], token_scores)
    top = strongest(source, token_scores, pool.higher_helps) if source and token_scores else None
    retrieval = {pool.name: _retrieval(pool, relevant, k) for pool in pools}
    summary: dict[str, Any] = {
        "title": spec.get("title"),
        "verdict": None,
        "k": k,
        "chunks": len(pool.score_N),
        **retrieval[pool.name],
        "top_minus_random": None,
        "random_minus_bottom": None,
        **{f"{d.better}_minus_{d.worse}": d.interval._asdict() for d in differences},
        "arms": {
            arm.name: {
                **intervals[arm.name]._asdict(),
                "seeds": len(arm.seeds),
                "items": len(arm.items),
                "acc": float(arm.acc_SI.mean()),
            }
            for arm in evaluated
        },
        "seconds": spec.get("seconds"),
        "peak_gb": spec.get("peak_gb"),
    }
    if len(pools) > 1:
        summary["methods"] = retrieval
    validations = _validations(spec, named, folder)
    if validations:
        summary["validation"] = validation.summary(validations)
    if magic and not arms:
        verdict = of_magic.verdict(magic, top, spec.get("query"))
        summary["trust"] = {"verdict": verdict.word, "reasons": verdict.reasons}
    else:
        verdict = _verdict(spec, pool, k, arms, differences, summary)
    summary["verdict"] = verdict.sentence
    return Report(
        spec=spec,
        pools=pools,
        relevant=relevant,
        k=k,
        arms=arms,
        base=base,
        pretraining=load_run(folder / run, "pretraining") if run else None,
        intervals=intervals,
        differences=differences,
        shown=shown,
        texts=texts,
        token_scores=token_scores,
        strongest=top,
        magic=magic,
        validations=validations,
        verdict=verdict,
        summary=summary,
    )


def _validations(
    spec: dict[str, Any], named: dict[str, str], folder: Path
) -> list[validation.Validation]:
    """Those in the folders of the rankings, then those that the spec lists, each once."""
    first = next(iter(named))
    found = {file: name for name, path in named.items() for file in validation.find(folder / path)}
    for path in spec.get("validation") or []:
        place = folder / path
        found.setdefault(place / "validation.json" if place.is_dir() else place, first)
    return [validation.load(file, name) for file, name in found.items()]


def _tokenizer_path(name: str | None, folder: Path) -> str | None:
    return str(folder / name) if name and (folder / name).exists() else name


def _differences(arms: dict[str, Arm]) -> list[Difference]:
    """Every arm against random, the arm expected to be better first."""
    if "random" not in arms:
        return []
    others = [name for name in arms if name not in ("random", "bottom")]
    pairs = [(name, "random") for name in others]
    pairs += [("random", "bottom")] if "bottom" in arms else []
    differences = []
    for better, worse in pairs:
        difference_SI = paired_difference(arms[better], arms[worse])
        seed_means = tuple(difference_SI.mean(1).tolist())
        differences.append(Difference(better, worse, paired_bootstrap(difference_SI), seed_means))
    return differences


def _retrieval(pool: Pool, relevant: list[str], k: int | None) -> dict[str, float | None]:
    """How well the ranking alone finds the relevant sources; no training involved."""
    keys = ("precision_at_k", "relevant_share", "recall_at_k", "best_recall_at_k", "auc")
    if not relevant:
        return dict.fromkeys(keys)
    relevant_N = np.isin(pool.source_N, relevant)
    auc = ranking_auc(relevant_N)
    values = (None, float(relevant_N.mean()), None, None, auc if math.isfinite(auc) else None)
    if k is not None:
        best = min(1.0, k / int(relevant_N.sum()))
        share, recall = float(relevant_N[:k].mean()), recall_at_k(relevant_N, k)
        values = (share, values[1], recall, best, values[4])
    return dict(zip(keys, values, strict=True))


def _shown(pool: Pool, n: int) -> list[Shown]:
    """The first and last `n` chunks, and the first and last few of each of the larger sources."""
    total, sizes = len(pool.score_N), pool.sources
    n = min(n, (total + 1) // 2)
    large = sorted(sizes, key=lambda name: -sizes[name])[:EXTRA_SOURCES]
    shown = []
    for end, order in (("top", np.arange(total)), ("bottom", np.arange(total)[::-1])):
        extra = [order[pool.source_N[order] == source][:EXTRA_PER_SOURCE] for source in large]
        wanted = np.unique(np.concatenate([order[:n], *extra]))
        main = set(order[:n].tolist())
        wanted = wanted if end == "top" else wanted[::-1]
        shown += [Shown(index, end, index not in main) for index in wanted.tolist()]
    return shown


def _verdict(
    spec: dict[str, Any],
    pool: Pool,
    k: int | None,
    arms: list[Arm],
    differences: list[Difference],
    summary: dict[str, Any],
) -> Verdict:
    query = spec.get("query") or "the query"
    total = len(pool.score_N)
    found = ""
    if k is not None and summary["precision_at_k"] is not None:
        share, expected = percent(summary["precision_at_k"]), summary["relevant_share"]
        found = (
            f"{share} of the top {k:,} come from the sources that teach {query}, against "
            f"{percent(expected)} of the whole pool."
        )
    main = next((d for d in differences if (d.better, d.worse) == ("top", "random")), None)
    if main is None:
        ranked = f"{count(total, 'chunk')} ranked by their influence on {query}."
        method = (
            "There is no top arm and random arm to compare, so this page cannot say whether "
            "training on the best ranked chunks helps."
        )
        method = f"{ranked} {method}" if found else method
        return Verdict("none", "Scores only", found or ranked, method)

    chunks = f"{k:,} " if k else ""
    mean, low, high = main.interval
    interval = f"95% interval {signed(low, 2)} to {signed(high, 2)}"
    if low > 0:
        kind, word = "yes", "Top-k beats random"
        said = f"taught more than {chunks}random ones"
    elif high < 0:
        kind, word = "no", "Top-k loses to random"
        said = f"taught less than {chunks}random ones"
    else:
        kind, word = "unclear", "No difference shown"
        said = f"did not measurably differ from {chunks}random ones"
    sentence = (
        f"The {chunks}chunks with the highest influence on {query} {said}: "
        f"{signed(mean, 2)} nats per held-out answer ({interval})."
    )
    top = next(arm for arm in arms if arm.name == "top")
    seeds = count(len(top.seeds), "seed")
    tokens = {run.tokens for arm in arms for run in arm.runs if run.tokens}
    compute = f", {tokens.pop():,} tokens a run" if len(tokens) == 1 else ""
    method = (
        f"The {listed([arm.name for arm in arms])} arms were trained from one checkpoint, {seeds} "
        f"each{compute}, and asked the same {count(len(top.items), 'held-out item')}. A right "
        f"answer is {num(math.exp(mean))} times as probable for the top arm as for the random arm "
        f"(geometric mean). {found}"
    )
    if len(top.seeds) == 1:
        method += " With one seed the interval covers the choice of items, not of training runs."
    return Verdict(kind, word, sentence, method.strip())
