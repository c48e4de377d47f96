"""What a report shows, read from the folders that the other commands wrote.

Everything is checked here, before any page is made: items must agree between arms, seeds must pair,
`k` must fit the pool. The page and the charts then only draw.

Dimension key: S seeds, I items, N chunks of the pool (best first).
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import read_json, read_jsonl
from evals.report_validation import Validation
from evals.statistics import Interval


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
        return bool(self.score_N[0] >= self.score_N[-1])


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


class Verdict(NamedTuple):
    """The answer in one word, in one sentence, and what was done to get it."""

    kind: str  # "yes", "no", "unclear" or "none" (nothing was retrained)
    word: str
    sentence: str
    method: str


class Shown(NamedTuple):
    """A chunk to print: its place in the ranking; extras appear when their source is picked."""

    index: int
    end: str  # "top" or "bottom"
    extra: bool


class Text(NamedTuple):
    """A row to print: the bytes of its tokens, and a score for each (NaN where there is none)."""

    pieces: list[bytes]
    scores_T: np.ndarray

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class TokenScores(NamedTuple):
    """scores_NT [rows, tokens], or with a last axis of queries, memory-mapped in row order.

    alignment says what an entry is about.

    `label`: of predicting token t. `position`: of reading it.
    """

    scores_NT: np.ndarray
    alignment: str


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
    validations: list[Validation]
    verdict: Verdict
    summary: dict[str, Any]


def load_pool(path: Path, name: str) -> Pool:
    """Read the output folder of `attribute score`."""
    lines = read_jsonl(path / "row_diagnostics.jsonl")
    try:
        lines = [line for line in lines if line["score"] is not None]  # null: was no candidate
        lines.sort(key=lambda line: line["rank"])
        score_N = np.array([line["score"] for line in lines], np.float64)
        row_N = np.array([line["row"] for line in lines], np.int64)
        length_N = np.array([line["length"] for line in lines], np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path / 'row_diagnostics.jsonl'} has a line without a number for row, score, rank "
            f"or length ({error}): score the pool again"
        ) from error
    if not lines:
        raise InputError(f"{path / 'row_diagnostics.jsonl'} has no scores: score the pool again")
    if not np.isfinite(score_N).all():
        raise InputError(f"{path} holds scores that are not finite: score the pool again")
    sources = [line.get("source") for line in lines]
    source_N = np.array(["(no source)" if s is None else str(s) for s in sources], object)
    info = read_json(path / "info.json") if (path / "info.json").exists() else {}
    return Pool(name, row_N, score_N, source_N, length_N, info)


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
    lines = read_jsonl(path / "items.jsonl")
    ids = [str(line.get("id", index)) for index, line in enumerate(lines)]
    if not ids:
        raise InputError(f"{path / 'items.jsonl'} is empty: run the evaluation again")
    if len(set(ids)) < len(ids):
        raise InputError(f"{path / 'items.jsonl'} holds an item id twice: give items unique ids")
    for item, line in zip(ids, lines, strict=True):
        if not isinstance(line.get("answer_logprob"), int | float):
            raise InputError(f"{path / 'items.jsonl'}: item {item} has no answer_logprob")
    logprob_I = np.array([line["answer_logprob"] for line in lines], np.float64)
    acc_I = np.array([line.get("acc", np.nan) for line in lines], np.float64)
    return ids, logprob_I, acc_I


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


def load_token_scores(path: Path, pool: Pool) -> TokenScores | None:
    """`token_scores.npy` of a scores folder, where there is one."""
    from core.memmap import open_array

    file = path / "token_scores.npy"
    if not file.exists():
        return None
    scores_NT = open_array(file)
    if scores_NT.ndim not in (2, 3) or len(scores_NT) <= int(pool.row_N.max()):
        raise InputError(f"{file} is {list(scores_NT.shape)}, not a line for each of "
                         f"{len(pool.row_N)} rows: score the pool again")  # fmt: skip
    tokens = pool.info.get("tokens")
    alignment = tokens.get("alignment") if isinstance(tokens, dict) else None
    if alignment not in ("label", "position"):
        raise InputError(f"{path / 'info.json'} does not say whether token scores are aligned to "
                         f"'label' or 'position' (tokens.alignment): {alignment!r}")  # fmt: skip
    return TokenScores(scores_NT, alignment)


def chunk_texts(
    rows_path: Path | None,
    tokenizer_path: str | None,
    wanted: np.ndarray,
    token_scores: TokenScores | None,
) -> dict[int, Text]:
    """The tokens of the wanted rows, as ids where no tokenizer is given; empty without rows."""
    if rows_path is None:
        return {}
    import tokenizers
    from core.rows import load_rows

    rows = load_rows(rows_path)
    tokenizer = None if tokenizer_path is None else tokenizers.load(tokenizer_path)
    if tokenizer and rows.tokenizer is not None and rows.tokenizer != tokenizer.fingerprint:
        raise InputError(
            f"{rows_path} was tokenised by another tokenizer than {tokenizer_path}: "
            "name the tokenizer that made the rows"
        )
    if wanted.size and int(wanted.max()) >= len(rows):
        raise InputError(
            f"the scores name row {int(wanted.max())} but {rows_path} has {len(rows)} rows: "
            "name the rows that were scored"
        )

    def text(row: int) -> Text:
        ids = rows.ids(row)
        if tokenizer:
            pieces = [tokenizer.decode_bytes([i]) for i in ids.tolist()]
        else:
            pieces = [b" %d" % i if place else b"%d" % i for place, i in enumerate(ids.tolist())]
        scores_T = np.full(len(ids), np.nan)
        if token_scores is not None:
            known_T = token_scores.scores_NT[row, : len(ids)]
            known_T = known_T if known_T.ndim == 1 else known_T.mean(-1)  # of the mean query
            scores_T[: len(known_T)] = known_T
        return Text(pieces, scores_T)

    return {int(row): text(int(row)) for row in wanted}
