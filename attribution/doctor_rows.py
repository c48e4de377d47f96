"""What rows, and a folder of their scores, say about themselves; no model is run.

`core.rows.load_rows` refuses the first bad row of a folder. A check-up wants all of them counted,
and also what is allowed and still spoils an attribution: a bos twice, labels on padding, copies of
a row, a score that ranks by length. Every check is a `Finding`: the number it measured, and what
to change.

Dims: N rows.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from attribution.select import read_info
from core.config import ModelConfig
from core.errors import InputError
from core.files import read_json, read_jsonl, read_npy
from core.progress import Progress
from core.ranks import spearman
from core.rows import IGNORED, LISTS, SIDECAR, Ragged, Rows, load_rows

Verdict = Literal["ok", "warn", "bad"]
CONFOUNDED = 0.5  # rank correlation from which a score may be the other number in disguise


class Finding(NamedTuple):
    """One check: the number measured, what it means, and what to change (empty when ok)."""

    check: str
    verdict: Verdict
    value: float | None
    said: str
    remedy: str = ""


class Special(NamedTuple):
    """Token ids with a role, and whether the tokenizer's texts begin with bos."""

    bos: int | None
    eos: int | None
    pad: int | None
    add_bos: bool


class Facts(NamedTuple):
    """Of every row: what needs a look at its tokens."""

    fits_N: np.ndarray  # as many labels as ids
    known_N: np.ndarray  # all ids are in the vocabulary
    bos_N: np.ndarray  # how many bos it begins with, of the first two tokens
    padding_N: np.ndarray  # supervised tokens of a run of eos or pad at its end, but for the first
    copy_N: np.ndarray  # the ids are those of an earlier row


def open_rows(path: Path) -> Rows:
    """The rows as they are; InputError only where they cannot be read as rows at all."""
    try:
        return load_rows(path)
    except InputError as refused:
        import datasets

        try:
            table: Any = datasets.Dataset.load_from_disk(str(path)).with_format("arrow")[:]
            ids, labels = (Ragged(table.column(name), name, path) for name in LISTS)
        except Exception:  # the library raises many kinds for a damaged folder
            raise refused from None
        info = read_json(path / SIDECAR) if (path / SIDECAR).exists() else {}
        if not len(ids.lengths):
            raise
        return Rows(path, table, ids, labels, np.arange(len(ids.lengths)), info)


def row_findings(
    rows: Rows, config: ModelConfig, special: Special
) -> tuple[list[Finding], np.ndarray]:
    """(checks of every row; the numbers of the rows that a pass could take)."""
    facts = _facts(rows, config.vocab_size, special)
    long_N, masked_N = rows.lengths > config.context, rows.trained == 0
    share_N = rows.trained / np.maximum(rows.lengths - 1, 1)
    typical = float(np.median(share_N))
    found = [
        _counted("labels", ~facts.fits_N, "have labels of another length than their ids",
                 "make them equal, with -100 where a token is not supervised"),
        _counted("vocabulary", ~facts.known_N, "hold ids outside the model's vocabulary",
                 "tokenise with the model's own tokenizer"),
        _counted("context", long_N, f"are longer than the model's context of {config.context}",
                 f"make the rows again with --length {config.context} or less"),
        _counted("masked rows", masked_N, "have no supervised token",
                 "drop them or supervise a token"),
        _counted("nearly masked rows", ~masked_N & (share_N < typical / 10),
                 f"train on less than a tenth of the usual share of their tokens ({typical:.0%})",
                 "look at them: a template cut short leaves such rows; drop them, or use --loss "
                 "sum so that they weigh little", "warn"),
        _counted("duplicates", facts.copy_N, "repeat an earlier row",
                 "drop copies: they share one score and fill the top k together", "warn"),
    ]  # fmt: skip
    if special.bos is not None:
        found.append(_bos(facts.bos_N, special.add_bos))
    if special.eos is not None or special.pad is not None:
        share = float(facts.padding_N.sum() / max(int(rows.trained.sum()), 1))
        n = int((facts.padding_N > 0).sum())
        verdict: Verdict = "ok" if n == 0 else "warn" if share < 0.01 else "bad"
        said = (
            f"{share:.1%} of the trained tokens are repeats of eos or pad at the end of {n:,} rows"
        )
        remedy = "set the labels of padding to -100; where pad is eos, keep the first one only"
        found.append(Finding("trained padding", verdict, share, said, remedy if n else ""))
    sound_N = facts.fits_N & facts.known_N & ~long_N & ~masked_N
    return found, np.flatnonzero(sound_N)


def _facts(rows: Rows, vocab_size: int, special: Special) -> Facts:
    n, seen = len(rows), set()
    fits_N, known_N, copy_N = np.ones(n, bool), np.ones(n, bool), np.zeros(n, bool)
    bos_N, padding_N = np.zeros(n, np.int64), np.zeros(n, np.int64)
    padding = [i for i in (special.eos, special.pad) if i is not None]
    with Progress(n, "rows", "row") as bar:
        for i in range(n):
            ids, labels = rows.ids(i), rows.labels(i)
            fits_N[i] = len(ids) == len(labels) > 0
            known_N[i] = ((ids >= 0) & (ids < vocab_size)).all()
            if fits_N[i]:
                supervised = labels[labels != IGNORED]
                known_N[i] &= ((supervised >= 0) & (supervised < vocab_size)).all()
                if ids[-1] in padding:
                    others = np.flatnonzero(ids != ids[-1])
                    start = int(others[-1]) + 1 if len(others) else 0
                    padding_N[i] = (labels[start + 1 :] != IGNORED).sum()
                if ids[0] == special.bos:
                    bos_N[i] = 1 + (len(ids) > 1 and ids[1] == special.bos)
            mark = hash(ids.tobytes())
            copy_N[i] = mark in seen
            seen.add(mark)
            bar.update(1)
    return Facts(fits_N, known_N, bos_N, padding_N, copy_N)


def _counted(
    check: str, bad_N: np.ndarray, what: str, remedy: str, verdict: Verdict = "bad"
) -> Finding:
    n = int(bad_N.sum())
    said = f"{n:,} of {len(bad_N):,} rows {what}"
    if n == 0:
        return Finding(check, "ok", 0, said)
    return Finding(check, verdict, n, f"{said}; the first is row {int(bad_N.argmax())}", remedy)


def _bos(bos_N: np.ndarray, add_bos: bool) -> Finding:
    n, doubled, begun = len(bos_N), int((bos_N == 2).sum()), int((bos_N > 0).sum())
    if doubled:
        said = f"{doubled:,} of {n:,} rows begin with bos twice"
        remedy = "the template and the tokenizer both added it: make the rows again with one"
        return Finding("bos", "bad" if 2 * doubled > n else "warn", doubled / n, said, remedy)
    said = f"{begun:,} of {n:,} rows begin with bos, none with two"
    if begun == n or not add_bos:
        return Finding("bos", "ok", begun / n, said)
    remedy = "the model expects bos first: make the rows with it (pieces of one text need none)"
    return Finding("bos", "warn" if begun else "bad", begun / n, said, remedy)


def score_findings(folder: Path, rows: Rows) -> list[Finding]:
    """Whether a folder of scores is sound, and whether it ranks by something cheaper to get."""
    info = read_info(folder)
    if info["pool"]["rows"] != rows.sha:
        raise InputError(f"{folder} scored {info['pool']['path']}, whose rows differ from "
                         f"{rows.path}; give the rows that were scored")  # fmt: skip
    scores = read_npy(folder / "scores.npy")
    scores_N = np.asarray(scores if scores.ndim == 1 else scores.mean(1), np.float64)
    scored = np.flatnonzero(~np.isnan(scores_N))  # rows that were no candidates have NaN
    values = len(np.unique(scores_N[scored]))
    said = f"{len(scored):,} of {len(rows):,} rows have a score, {values:,} of them different"
    if values < 2 or np.isinf(scores_N).any():
        remedy = "look at the query: one row alone, or a gradient that is zero, ranks nothing"
        return [Finding("scores", "bad", values, said, remedy)]
    found = [Finding("scores", "ok", values, said)]
    lines = read_jsonl(folder / "row_diagnostics.jsonl")
    unit = bool(info.get("settings", {}).get("unit_norm"))
    summed = info.get("spec", {}).get("loss", "sum") == "sum"
    weigh = "--unit-norm" + (" or --loss mean" if summed else "")
    by_size = f"score again with {weigh}, so that longer rows do not weigh more"
    if unit:
        by_size = "select against random rows of equal length (--strategy matched-random)"
    remedies = {
        "length": by_size,
        "trained": by_size,
        "loss": "compare with ranking by loss alone; --precondition mixed takes out what all rows "
        "share, --unit-norm how strongly a row pulls",
        "norm": "--precondition mixed takes out the directions that all rows share"
        if unit
        else "score again with --unit-norm, which compares directions alone",
    }
    names = {"length": "length", "trained": "trained tokens", "loss": "loss", "norm": "norm"}
    for key, name in names.items():
        if any(lines[i].get(key) is None for i in scored):  # exact scores form no gradient
            continue
        r = spearman(scores_N[scored], np.array([lines[i][key] for i in scored], np.float64))
        said = f"rank correlation of score and {name}: " + ("none" if r is None else f"{r:+.2f}")
        high = r is not None and abs(r) > CONFOUNDED
        remedy = remedies[key] if high else ""
        found.append(Finding(f"score by {name}", "warn" if high else "ok", r, said, remedy))
    return found
