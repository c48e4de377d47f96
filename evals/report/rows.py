"""Rows as people read them: the bytes of each token, and the score that a token has.

A page holds only so many tokens, so of a long row the part is taken that carries most: the window
of tokens whose scores have the largest sum of sizes. Rows and scores stay memory-mapped.

Dims: N rows, T tokens of a row, Q queries.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.page.text import decode

PAGE_TOKENS = 30_000  # that all coloured rows of a page have together
ROW_TOKENS, LEAST_TOKENS = 1500, 100  # of one row, at most and in any case


class Text(NamedTuple):
    """A row, or part of one from token `start`: bytes and score (NaN: none) of each token."""

    pieces: list[bytes]
    scores_T: np.ndarray
    start: int = 0

    @property
    def data(self) -> bytes:
        return b"".join(self.pieces)


class TokenScores(NamedTuple):
    """scores_NT [N, T], or [N, T, Q] with an axis of queries, memory-mapped in row order.

    alignment says what an entry is about. `label`: predicting token t. `position`: reading it.
    """

    scores_NT: np.ndarray
    alignment: str

    def of(self, row: int, length: int) -> np.ndarray:
        """Scores of a row's tokens, of the mean query; NaN where there is none. float64 [T]."""
        scores_T = np.full(length, np.nan)
        known_T = self.scores_NT[row, :length]
        with np.errstate(invalid="ignore"):  # infinities of both signs have no mean
            scores_T[: len(known_T)] = known_T if known_T.ndim == 1 else known_T.mean(-1)
        return scores_T


class Source(NamedTuple):
    """The scored rows, and the tokenizer that reads them, if one is known."""

    rows: Any
    tokenizer: Any

    def pieces(self, ids_T: np.ndarray) -> list[bytes]:
        """The bytes of each token; its number where there is no tokenizer."""
        if self.tokenizer is None:
            return [b" %d" % i if place else b"%d" % i for place, i in enumerate(ids_T.tolist())]
        return [self.tokenizer.decode_bytes([i]) for i in ids_T.tolist()]

    def read(self, row: int, start: int, end: int) -> str:
        """The text of some tokens of a row."""
        return decode(b"".join(self.pieces(self.rows.ids(row)[start:end])))


def load_source(rows_path: Path | None, tokenizer_path: str | None) -> Source | None:
    """The rows folder and its tokenizer; None without rows."""
    if rows_path is None:
        return None
    import tokenizers
    from core.rows import load_rows

    rows = load_rows(rows_path)
    tokenizer = None if tokenizer_path is None else tokenizers.load(tokenizer_path)
    if tokenizer and rows.tokenizer is not None and rows.tokenizer != tokenizer.fingerprint:
        raise InputError(
            f"{rows_path} was tokenised by another tokenizer than {tokenizer_path}: "
            "name the tokenizer that made the rows"
        )
    return Source(rows, tokenizer)


def load_token_scores(path: Path, info: dict[str, Any], rows: int) -> TokenScores | None:
    """The token scores of a scores folder, where it has some.

    info: its `info.json`, which names their file (`token_scores.npy` unless it says otherwise)
    and their alignment. rows: how many the file must have at least.
    """
    from core.memmap import open_array

    tokens = info.get("tokens")
    tokens = tokens if isinstance(tokens, dict) else {}
    file = path / str(tokens.get("file", "token_scores.npy"))
    if not file.exists():
        return None
    scores_NT = open_array(file)
    if scores_NT.ndim not in (2, 3) or len(scores_NT) < rows:
        raise InputError(f"{file} is {list(scores_NT.shape)}, not a line for each of "
                         f"{rows} rows: score the pool again")  # fmt: skip
    alignment = tokens.get("alignment")
    if alignment not in ("label", "position"):
        raise InputError(f"{path / 'info.json'} does not say whether token scores are aligned to "
                         f"'label' or 'position' (tokens.alignment): {alignment!r}")  # fmt: skip
    return TokenScores(scores_NT, alignment)


def row_texts(
    source: Source | None, wanted: Sequence[int], token_scores: TokenScores | None
) -> dict[int, Text]:
    """The wanted rows, whole; with token scores, of long ones the part that carries most."""
    if source is None:
        return {}
    if wanted and max(wanted) >= len(source.rows):
        raise InputError(
            f"the scores name row {max(wanted)} but {source.rows.path} has {len(source.rows)} "
            "rows: name the rows that were scored"
        )
    most = max(LEAST_TOKENS, min(ROW_TOKENS, PAGE_TOKENS // max(1, len(set(wanted)))))

    def text(row: int) -> Text:
        ids_T = source.rows.ids(row)
        if token_scores is None:
            return Text(source.pieces(ids_T), np.full(len(ids_T), np.nan))
        scores_T = token_scores.of(row, len(ids_T))
        start = heaviest(scores_T, most)
        part = slice(start, start + most)
        return Text(source.pieces(ids_T[part]), scores_T[part], start)

    return {row: text(row) for row in dict.fromkeys(wanted)}


def heaviest(scores_T: np.ndarray, size: int) -> int:
    """Where the window of `size` tokens begins whose scores have the largest sum of sizes."""
    if len(scores_T) <= size:
        return 0
    sizes_T = np.abs(np.where(np.isfinite(scores_T), scores_T, 0.0))
    total = np.concatenate([[0.0], np.cumsum(sizes_T)])
    return int(np.argmax(total[size:] - total[:-size]))
