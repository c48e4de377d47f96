"""The strongest single tokens of all scored rows, and the kinds of token that add up to most.

One pass over rows and scores in blocks, so that a pool larger than memory can be read. A score that
is not finite is left out, and so is, where scores are about predicting, a token without label.

Dims: N rows, T tokens of a row, K tokens taken together, V ids.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from core.page.text import Markup, decode, signed, table, typeset
from core.rows import IGNORED
from evals.report.rows import Source, TokenScores

SHOWN, BEFORE, AFTER = 12, 12, 8
BLOCK_TOKENS = 2**20


class Token(NamedTuple):
    """One token, the text around it, and where it stands."""

    before: str
    text: str
    after: str
    score: float
    row: int
    position: int


class Kind(NamedTuple):
    """All tokens of one id."""

    text: str
    total: float
    count: int


class Strongest(NamedTuple):
    """Best first. finite: tokens whose scores were used; missing: those that are not finite."""

    helping: list[Token]
    hurting: list[Token]
    kinds_helping: list[Kind]
    kinds_hurting: list[Kind]
    finite: int
    missing: int


class _Block(NamedTuple):
    score_K: np.ndarray
    id_K: np.ndarray
    row_K: np.ndarray
    position_K: np.ndarray


def strongest(source: Source, scores: TokenScores, higher_helps: bool, n: int = SHOWN) -> Strongest:
    """The n strongest tokens and kinds of token of either sign."""
    sign = 1.0 if higher_helps else -1.0
    ends: dict[float, _Block] = {}
    total_V, count_V, missing = np.zeros(0), np.zeros(0), 0
    for block in _blocks(source, scores):
        finite_K = np.isfinite(block.score_K)
        missing += int((~finite_K).sum())
        block = _Block(*(values[finite_K] for values in block))
        total_V = _add(total_V, np.bincount(block.id_K, block.score_K))
        count_V = _add(count_V, np.bincount(block.id_K))
        for side in (sign, -sign):
            known = [ends[side], block] if side in ends else [block]
            together = _Block(*(np.concatenate(values) for values in zip(*known, strict=True)))
            order = np.argsort(-side * together.score_K, kind="stable")[:n]
            ends[side] = _Block(*(values[order] for values in together))

    def tokens(side: float) -> list[Token]:
        place = zip(*(v.tolist() for v in ends[side]), strict=True) if side in ends else ()
        return [_token(source, s, row, t) for s, _, row, t in place if side * s > 0]

    def kinds(side: float) -> list[Kind]:
        order = [i for i in np.argsort(-side * total_V, kind="stable")[:n] if side * total_V[i] > 0]
        texts = [decode(piece) for piece in source.pieces(np.array(order, np.int64))]
        numbers = zip(texts, total_V[order].tolist(), count_V[order].astype(int), strict=True)
        return [Kind(text.strip() if source.tokenizer is None else text, total, int(k))
                for text, total, k in numbers]  # fmt: skip

    return Strongest(tokens(sign), tokens(-sign), kinds(sign), kinds(-sign),
                     int(count_V.sum()), missing)  # fmt: skip


def _blocks(source: Source, scores: TokenScores) -> Iterator[_Block]:
    """All scored tokens, some rows at a time."""
    held: list[tuple[np.ndarray, ...]] = []
    size = 0
    for row in range(min(len(source.rows), len(scores.scores_NT))):
        ids_T = source.rows.ids(row)
        known_T = np.ones(len(ids_T), bool)
        if scores.alignment == "label":
            known_T[:] = source.rows.labels(row) != IGNORED
            known_T[:1] = False
        position_K = np.flatnonzero(known_T)
        score_K = scores.of(row, len(ids_T))[position_K]
        held.append((score_K, ids_T[position_K], np.full(len(position_K), row), position_K))
        size += len(position_K)
        if size >= BLOCK_TOKENS:
            yield _Block(*(np.concatenate(values) for values in zip(*held, strict=True)))
            held, size = [], 0
    if held:
        yield _Block(*(np.concatenate(values) for values in zip(*held, strict=True)))


def _add(a_V: np.ndarray, b_V: np.ndarray) -> np.ndarray:
    size = max(len(a_V), len(b_V))
    return np.pad(a_V, (0, size - len(a_V))) + np.pad(b_V, (0, size - len(b_V)))


def _token(source: Source, score: float, row: int, t: int) -> Token:
    parts = ((max(0, t - BEFORE), t), (t, t + 1), (t + 1, t + 1 + AFTER))
    before, text, after = (source.read(row, start, end) for start, end in parts)
    gap = " " if source.tokenizer is None else ""  # between numbers
    return Token(before + gap, text, gap + after, score, row, t)


def section(found: Strongest | None) -> str:
    """The part of the page."""
    if found is None or not found.finite:
        return ""
    columns = "".join(
        f"<h3>{label}</h3>{_tokens(tokens, side)}"
        for label, side, tokens in (
            ("Single tokens that help most", "helps", found.helping),
            ("Single tokens that hurt most", "hurts", found.hurting),
        )
    )
    kinds = "".join(
        f"<div><h3>{label}</h3>{_kinds(of, side)}</div>"
        for label, side, of in (
            ("Tokens that help, added up", "helps", found.kinds_helping),
            ("Tokens that hurt, added up", "hurts", found.kinds_hurting),
        )
    )
    missing = ""
    if found.missing:
        missing = f'<p class="caution">{found.missing:,} scores are not finite and left out.</p>'
    return (
        f"<h2>Which tokens are strongest?</h2><p>Of {found.finite:,} scored tokens in all rows. A "
        "single token stands with the text around it; below, all tokens of one kind are added up, "
        f'so that small effects of a frequent one count.</p>{missing}{columns}<div class="pair">'
        f"{kinds}</div>"
    )


def _tokens(tokens: list[Token], side: str) -> str:
    rows = [
        [
            Markup(
                f'<span class="around" dir="auto">{typeset(t.before, blanks=False)}'
                f'<b class="{side} s4">{typeset(t.text)}</b>{typeset(t.after, blanks=False)}</span>'
            ),
            signed(t.score),
            f"{t.row:,}",
            f"{t.position:,}",
        ]
        for t in tokens
    ]
    return table(["Token in its text", "Score", "Row", "Position"], rows, "top") or _none(side)


def _kinds(kinds: list[Kind], side: str) -> str:
    rows = [
        [
            Markup(f'<span class="around"><b class="{side} s2">{typeset(k.text)}</b></span>'),
            signed(k.total),
            f"{k.count:,}",
            signed(k.total / k.count),
        ]
        for k in kinds
    ]
    return table(["Token", "Sum", "Count", "Mean"], rows, "top") or _none(side)


def _none(side: str) -> str:
    return f'<p class="note">No token {side}.</p>'
