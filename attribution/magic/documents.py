"""Scores of the documents inside packed rows.

Dims: M documents, N rows, T tokens, Q queries, S spans.

A token's score is the derivative in the weight of predicting it, so it belongs to the document that
the token itself is in: the first token of a document counts for that document, though it is
predicted from the one before. A document that goes on in further rows is summed over them.

Rows say which documents they hold in a column `documents` (`data text` writes it), or `doc_ids`,
the document of every token, as other tools that pack rows write it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from core.errors import InputError
from core.rows import IGNORED, Rows

DOCUMENTS, DOC_IDS = "documents", "doc_ids"
BLOCK = 1024  # rows whose columns are Python lists at once


class Documents(NamedTuple):
    """Which tokens are whose.

    names [M]: what is known of each document, `number` at least. spans [S,4], in the order of the
    rows: a document, a row, its first token there, and one past its last.
    """

    names: list[dict[str, Any]]
    spans_S4: np.ndarray


def documents(rows: Rows) -> Documents:
    """The documents that the rows hold, in the order of their numbers.

    InputError for rows that do not say it, or whose column does not fit them.
    """
    if DOCUMENTS not in rows.columns and DOC_IDS not in rows.columns:
        raise InputError(f"{rows.path} does not say which document a token is of; make the rows "
                         "with `data text`, add a column doc_ids (a number a token), or use "
                         "--target example")  # fmt: skip
    own = DOCUMENTS in rows.columns
    names: dict[int, dict[str, Any]] = {}
    spans: list[tuple[int, int, int, int]] = []
    for row, value in enumerate(_column(rows, DOCUMENTS if own else DOC_IDS)):
        length = int(rows.lengths[row])
        found = value if own else _runs(value, length)
        starts = [document["start"] for document in found or []]
        if starts[:1] != [0] or (np.diff([*starts, length]) < 1).any():
            raise InputError(f"{rows.path} row {row} has {length} tokens, which column "
                             f"{DOCUMENTS if own else DOC_IDS!r} does not divide into documents; "
                             "make the rows again")  # fmt: skip
        for document, end in zip(found, [*starts[1:], length], strict=True):
            start, name = document["start"], {k: v for k, v in document.items() if k != "start"}
            names.setdefault(name["number"], name)
            spans.append((name["number"], row, start, end))
    numbers = sorted(names)
    spans_S4 = np.array(spans, np.int64)
    spans_S4[:, 0] = np.searchsorted(numbers, spans_S4[:, 0])
    return Documents([names[number] for number in numbers], spans_S4)


def _column(rows: Rows, name: str) -> Iterator[Any]:
    for start in range(0, len(rows), BLOCK):
        part = rows.take(range(start, min(start + BLOCK, len(rows))))
        yield from part.column(name) or []


def _runs(doc_ids: list[int] | None, length: int) -> list[dict[str, Any]]:
    """Where the document of a row's tokens changes; what follows the row's end is padding."""
    ids_T = np.array(doc_ids or [], np.int64)[:length]
    if len(ids_T) < length:
        return []
    starts = np.flatnonzero(np.diff(ids_T, prepend=ids_T[0] - 1))
    return [{"start": int(start), "number": int(ids_T[start])} for start in starts]


def credit(documents: Documents, rows: Rows, scores: np.ndarray) -> np.ndarray:
    """float32 [M] or [M,Q]: token scores [N,T] or [N,T,Q], label-aligned, summed by document.

    Sums in float64. Tokens that nothing supervises, and padding, count nothing.
    """
    total = np.zeros((len(documents.names), *scores.shape[2:]))
    for document, row, start, end in documents.spans_S4:
        start = max(start, 1)  # a row's first token is never predicted
        live_T = rows.labels(row)[start:end] != IGNORED
        total[document] += scores[row, start:end][live_T].sum(0, dtype=np.float64)
    return total.astype(np.float32)


def lines(documents: Documents, rows: Rows) -> list[dict[str, Any]]:
    """[M] for `documents.jsonl`: name, supervised tokens, and spans (row, start, end) of each."""
    ones_NT = np.broadcast_to(1.0, (len(rows), int(rows.lengths.max())))
    tokens_M = credit(documents, rows, ones_NT)
    spans: list[list[list[int]]] = [[] for _ in documents.names]
    for document, *span in documents.spans_S4.tolist():
        spans[document].append(span)
    return [
        {**name, "tokens": int(tokens), "spans": where}
        for name, tokens, where in zip(documents.names, tokens_M, spans, strict=True)
    ]
