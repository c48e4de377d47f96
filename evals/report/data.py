"""What a report shows, read from the folders that the other commands wrote.

Everything is checked here, before any page is made: items must agree between arms, seeds must pair,
`k` must fit the pool. The page and the charts then only draw.

Dimension key: S seeds, I items, N chunks of the pool (best first).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import read_json, read_jsonl, read_npy
from evals.report.rows import Source, Text, TokenScores
from evals.report.toptokens import SHOWN, Strongest
from evals.report.validation import Validation
from evals.statistics import Interval

OPENING = 20  # tokens shown of a document


class Pool(NamedTuple):
    """A scored pool in rank order: entry 0 is the chunk that helps the query most."""

    name: str
    row_N: np.ndarray
    score_N: np.ndarray
    source_N: np.ndarray
    length_N: np.ndarray
    info: dict[str, Any]

    @property
    def sources(self) -> dict[str, int]:
        """Chunks of each source; the best mean rank first."""
        names, of_N, sizes = np.unique(self.source_N, return_inverse=True, return_counts=True)
        mean_ranks = np.bincount(of_N, np.arange(len(of_N))) / sizes
        order = np.argsort(mean_ranks, kind="stable")
        return dict(zip(names[order].tolist(), sizes[order].tolist(), strict=True))

    @property
    def higher_helps(self) -> bool:
        """False for scores whose sign convention puts proponents at the low end (MAGIC)."""
        ends = self.score_N[[0, -1]] if len(self.score_N) else np.zeros(2)
        low_helps = str(self.info.get("sign")).startswith("negative")
        return bool(ends[0] > ends[1] or (ends[0] == ends[1] and not low_helps))


class Curve(NamedTuple):
    """A logged quantity of one run: `y` (nats per token) at each `step`."""

    step: np.ndarray
    y: np.ndarray


class Run(NamedTuple):
    name: str
    loss: Curve
    val_loss: Curve
    tokens: int | None
    options: dict[str, Any]
    env: dict[str, Any]


class Arm(NamedTuple):
    """One way of choosing training data, trained with every seed and asked every held-out item."""

    name: str
    seeds: tuple[int, ...]
    items: tuple[str, ...]
    logprob_SI: np.ndarray
    acc_SI: np.ndarray
    runs: tuple[Run, ...]


class Difference(NamedTuple):
    """Arm `better` minus arm `worse` in nats of answer log-probability, paired."""

    better: str
    worse: str
    interval: Interval
    seed_means: tuple[float, ...]


class Document(NamedTuple):
    """A document inside packed rows: where it is from, the row it begins in, its first words."""

    number: int
    name: str
    tokens: int
    score: float
    row: int
    opening: str


class Magic(NamedTuple):
    """A run of `attribute magic`: its `info.json`, and how the loss of its batches went.

    missing: of how many of the `rows` the score is not finite. documents: where they were asked
    for, the strongest of either sign.
    """

    info: dict[str, Any]
    loss: Curve
    rows: int
    missing: int
    documents: list[Document]


class Verdict(NamedTuple):
    """The answer in one word, in one sentence, and what was done to get it."""

    kind: str  # "yes", "no", "unclear" or "none" (nothing was retrained)
    word: str
    sentence: str
    method: str
    reasons: tuple[str, ...] = ()


class Shown(NamedTuple):
    """A chunk to print: its place in the ranking; extras appear when their source is picked."""

    index: int
    end: str  # "top" or "bottom"
    extra: bool


class Report(NamedTuple):
    spec: dict[str, Any]
    pools: list[Pool]
    relevant: list[str]
    k: int | None
    arms: list[Arm]
    base: Arm | None
    pretraining: Run | None
    intervals: dict[str, Interval]
    differences: list[Difference]
    shown: list[Shown]
    texts: dict[int, Text]
    token_scores: TokenScores | None
    strongest: Strongest | None
    magic: Magic | None
    validations: list[Validation]
    verdict: Verdict
    summary: dict[str, Any]


def load_pool(path: Path, name: str) -> Pool:
    """Read a scores folder. Only that of a MAGIC run, which may diverge, may be without a score."""
    info = read_json(path / "info.json") if (path / "info.json").exists() else {}
    file, may_lack = path / "row_diagnostics.jsonl", info.get("method") == "magic"
    lines = [] if may_lack and not file.exists() else read_jsonl(file)
    try:
        lines = [line for line in lines if line["score"] is not None]  # null: was no candidate
        lines.sort(key=lambda line: line["rank"])
        score_N = np.array([line["score"] for line in lines], np.float64)
        row_N = np.array([line["row"] for line in lines], np.int64)
        length_N = np.array([line["length"] for line in lines], np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file} has a line without a number for row, score, rank "
            f"or length ({error}): score the pool again"
        ) from error
    if not lines and not may_lack:
        raise InputError(f"{file} has no scores: score the pool again")
    if not np.isfinite(score_N).all():
        raise InputError(f"{path} holds scores that are not finite: score the pool again")
    sources = [line.get("source") for line in lines]
    unnamed = "(no source)" if any(s is not None for s in sources) else "all chunks"
    source_N = np.array([unnamed if s is None else str(s) for s in sources], object)
    return Pool(name, row_N, score_N, source_N, length_N, info)


def load_magic(path: Path, pool: Pool, source: Source | None) -> Magic | None:
    """Read what a run of `attribute magic` left beside the scores; None for other folders.

    source: the scored rows, for the text of documents.
    """
    if pool.info.get("method") != "magic":
        return None
    scores = read_npy(path / "scores.npy")
    finite_N = np.isfinite(scores.reshape(len(scores), -1)).all(1)
    metrics = read_jsonl(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    documents = _documents(path, source) if (path / "document_scores.npy").exists() else []
    return Magic(pool.info, _curve(metrics, "loss"), len(scores), int((~finite_N).sum()), documents)


def _documents(path: Path, source: Source | None) -> list[Document]:
    """The strongest of either sign, those that help most first."""
    scores = read_npy(path / "document_scores.npy")
    score_M = (scores if scores.ndim == 1 else scores.mean(1)).astype(np.float64)
    lines, file = read_jsonl(path / "documents.jsonl"), path / "documents.jsonl"
    finite = np.flatnonzero(np.isfinite(score_M))
    order = finite[np.argsort(score_M[finite], kind="stable")]
    found = []
    try:
        for i in np.concatenate([order[:SHOWN], order[SHOWN:][-SHOWN:]]).tolist():
            row, start, end = lines[i]["spans"][0]
            name = lines[i].get("doc") or lines[i].get("source") or ""
            opening = source.read(row, start, min(end, start + OPENING)) if source else ""
            number, tokens = int(lines[i]["number"]), int(lines[i]["tokens"])
            found.append(Document(number, str(name), tokens, float(score_M[i]), row, opening))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{file} does not fit document_scores.npy ({error!r}); attribute again"
                         ) from error  # fmt: skip
    return found


def load_run(path: Path, name: str) -> Run:
    """Read a training run directory: its curves, options and environment."""
    metrics = read_jsonl(path / "metrics.jsonl")
    tokens = [line["tokens"] for line in metrics if line.get("tokens") is not None]
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    env = read_json(path / "env.json") if (path / "env.json").exists() else {}
    curve, val_curve = _curve(metrics, "loss"), _curve(metrics, "val_loss")
    tokens = int(tokens[-1]) if tokens else None
    return Run(name, curve, val_curve, tokens, config.get("options", config), env)


def _curve(metrics: list[dict[str, Any]], key: str) -> Curve:
    # A resumed run logs some steps twice; the later line is the one that counted.
    values = {line["step"]: line[key] for line in metrics if line.get(key) is not None}
    steps = sorted(values)
    return Curve(np.array(steps, np.float64), np.array([values[s] for s in steps], np.float64))


def load_arm(name: str, entries: list[dict[str, Any]], folder: Path) -> Arm:
    """Read every seed of one arm; all seeds must hold the same items."""
    if not entries:
        raise InputError(f"arm {name!r} has no entries: give one per seed, or leave the arm out")
    logprobs, accs, runs, items = [], [], [], ()
    seeds = tuple(entry.get("seed", index) for index, entry in enumerate(entries))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"arm {name!r} names a seed twice: {list(seeds)}")
    for seed, entry in zip(seeds, entries, strict=True):
        if "eval" not in entry:
            raise InputError(f"arm {name!r} seed {seed} names no eval folder")
        ids, logprob_I, acc_I = load_items(folder / entry["eval"])
        if logprobs and set(ids) != set(items):
            raise InputError(_different_items(f"{name} seed {seed}", ids, items))
        order = sorted(range(len(ids)), key=ids.__getitem__)
        items = tuple(ids[i] for i in order)
        logprobs.append(logprob_I[order])
        accs.append(acc_I[order])
        if "run" in entry:
            runs.append(load_run(folder / entry["run"], f"{name} seed {seed}"))
    return Arm(name, seeds, items, np.stack(logprobs), np.stack(accs), tuple(runs))


def load_items(path: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Item ids, log-probability of the right answer [I] (nats) and accuracy [I] of one eval."""
    found = _items(path)
    if not found:
        raise InputError(f"{path} holds no items with log-probabilities: run the evaluation again")
    if len({item for item, _ in found}) < len(found):
        raise InputError(f"{path / 'items.jsonl'} holds an item id twice: give items unique ids")
    for item, line in found:
        if not isinstance(line.get("answer_logprob"), int | float):
            raise InputError(f"{path / 'items.jsonl'}: item {item} has no answer_logprob")
    logprob_I = np.array([line["answer_logprob"] for _, line in found], np.float64)
    acc_I = np.array([line.get("acc", np.nan) for _, line in found], np.float64)
    return [item for item, _ in found], logprob_I, acc_I


def _items(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(id, line) of each item: of an items file, or of all benchmarks but generated answers."""
    samples = sorted(path.glob("samples_*.jsonl"))
    if not samples:
        lines = read_jsonl(path / "items.jsonl")
        return [(str(line.get("id", number)), line) for number, line in enumerate(lines)]
    return [
        (f"{file.stem.removeprefix('samples_')}/{line['doc_id']}", line)
        for file in samples
        for line in read_jsonl(file)
        if line.get("answer_logprob") is not None
    ]


def check_paired(arms: list[Arm]) -> None:
    """InputError unless all arms share items, and all but a single-run base share seeds."""
    for arm in arms[1:]:
        if arm.items != arms[0].items:
            raise InputError(_different_items(arm.name, arm.items, arms[0].items, arms[0].name))
    trained = [arm for arm in arms if arm.name != "base"]
    for arm in trained[1:]:
        if set(arm.seeds) != set(trained[0].seeds):
            raise InputError(
                f"arms {trained[0].name!r} and {arm.name!r} cannot be paired: seeds "
                f"{sorted(trained[0].seeds)} and {sorted(arm.seeds)}; train both with the same ones"
            )


def paired_difference(a: Arm, b: Arm) -> np.ndarray:
    """Log-probability of the right answer, arm `a` minus arm `b`: [S, I], seeds in a's order."""
    order = [b.seeds.index(seed) for seed in a.seeds]
    return a.logprob_SI - b.logprob_SI[order]


def _different_items(name: str, ids: Any, others: Any, other: str = "its first seed") -> str:
    odd = sorted(set(ids) ^ set(others))[:3]
    return (
        f"{name} was asked other items than {other} (for example {', '.join(odd)}): "
        "evaluate every arm on the same items file"
    )
