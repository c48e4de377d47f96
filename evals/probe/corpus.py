"""Tokens that probes are trained and judged on: which count, what is true of them, who gets them.

Dims: R rows, S tokens of all rows on end, U units (documents), V vocabulary, N sampled tokens.

Tokens are split by document, so that none is in two of training, validation and test. Training
takes as many positives as negatives, or tokens as they come; the other two always take tokens as
they come, so that their measures are those of real text. Rows are drawn first and tokens within
them, and no more rows are drawn than are needed: what the model must read is most of the cost.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.errors import InputError
from core.rows import IGNORED, Rows, save_rows
from evals.probe.target import Target
from tokenizers import Tokenizer

SPLITS = ("train", "validation", "test")
SHARES = (0.7, 0.15, 0.15)  # of the counted tokens
FEWEST = 5  # tokens of either kind in each of them
UNITS = 10  # documents; fewer cannot be split, and rows take their place

Task = Literal["next", "current"]


class Corpus(NamedTuple):
    """ids_S int32; row r is starts[r] to starts[r+1]; unit_S: number of each token's document.

    by: what a unit is, document or row. where: the file or folder, for people.
    """

    ids_S: np.ndarray
    starts: np.ndarray
    unit_S: np.ndarray
    by: str
    where: str

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    @property
    def row_S(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def ids(self, i: int) -> np.ndarray:
        return self.ids_S[self.starts[i] : self.starts[i + 1]]

    labels = ids  # of a batch; nothing is trained on them

    @property
    def sha256(self) -> str:
        """Of tokens, rows and documents: with the seed, it says who was in which part."""
        digest = hashlib.sha256(self.ids_S.astype("<i4").tobytes())
        digest.update(self.starts.astype("<i8").tobytes())
        digest.update(self.unit_S.astype("<i8").tobytes())
        return digest.hexdigest()


class Samples(NamedTuple):
    """Places of sampled tokens in the corpus, ascending, [N] each; split: index into `SPLITS`."""

    place_N: np.ndarray
    positive_N: np.ndarray
    split_N: np.ndarray


def from_rows(rows: Rows) -> Corpus:
    """The tokens of a rows folder; documents by its column `documents`, else `doc`."""
    starts = np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int64)
    ids_S = np.concatenate([rows.ids(i) for i in range(len(rows))])
    inside, doc = rows.column("documents"), rows.column("doc")
    unit_S = None
    if inside is not None and all(inside):
        begins = [start + part["start"] for start, row in zip(starts, inside, strict=False)
                  for part in row]  # fmt: skip
        numbers = [part["number"] for row in inside for part in row]
        unit_S = np.repeat(numbers, np.diff([*begins, len(ids_S)]))
    elif doc is not None:
        unit_S = np.repeat(np.array([str(name) for name in doc]), rows.lengths)
    return _corpus(ids_S, starts, unit_S, str(rows.path))


def from_text(path: Path, tokenizer: Tokenizer, context: int) -> Corpus:
    """A text file, `context` tokens a row, BOS first where it is due.

    Blank lines end a document; rows go on over its end, as a reader does.
    """
    documents = [tokenizer.encode(text) for text in _documents(path)]
    ids_S = np.concatenate(documents)
    unit_S = np.repeat(np.arange(len(documents)), [len(ids) for ids in documents])
    if tokenizer.add_bos and tokenizer.bos is not None:
        every = np.arange(0, len(ids_S), max(context - 1, 1))
        ids_S = np.insert(ids_S, every, tokenizer.bos)
        unit_S = np.insert(unit_S, every, unit_S[every])
    size = len(ids_S) - (len(ids_S) % context == 1)  # a row of one token predicts nothing
    if not size:
        raise InputError(f"{path} is a single token; give more text")
    starts = np.append(np.arange(0, size, context), size).astype(np.int64)
    return _corpus(ids_S[:size].astype(np.int32), starts, unit_S[:size], str(path))


def _corpus(ids_S: np.ndarray, starts: np.ndarray, unit_S: np.ndarray | None, where: str) -> Corpus:
    if unit_S is not None:
        _, unit_S = np.unique(unit_S, return_inverse=True)
    if unit_S is None or unit_S.max() + 1 < UNITS:
        unit_S = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        return Corpus(ids_S, starts, unit_S, "row", where)
    return Corpus(ids_S, starts, unit_S, "document", where)


def save(corpus: Corpus, out: Path, tokenizer: Tokenizer) -> None:
    """A rows folder from which `from_rows` makes the same corpus."""
    rows = [corpus.ids(i) for i in range(len(corpus.lengths))]
    inside = []
    for start, end in itertools.pairwise(corpus.starts.tolist()):
        numbers, begins = np.unique(corpus.unit_S[start:end], return_index=True)
        inside.append([{"start": int(begin), "number": int(number)}
                       for begin, number in zip(begins, numbers, strict=True)])  # fmt: skip
    columns = {"documents": inside} if corpus.by == "document" else {}
    save_rows(out, rows, columns=columns, tokenizer=tokenizer.fingerprint)


def read_text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error}); convert the file to UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    if not text.strip():
        raise InputError(f"{path} holds no text")
    return text


def _documents(path: Path) -> list[str]:
    """The text in parts that each end with their blank lines; nothing is lost."""
    lines = read_text(path).splitlines(keepends=True)
    parts: list[list[str]] = [[]]
    for before, line in itertools.pairwise(["", *lines]):
        if parts[-1] and line.strip() and not before.strip():
            parts.append([])
        parts[-1].append(line)
    return ["".join(part) for part in parts]


def truth(
    corpus: Corpus, target: Target, task: Task, tokenizer: Tokenizer, labels_S: np.ndarray | None
) -> np.ndarray:
    """int8 [S]: 1 where the answer is yes, 0 no, -1 where the token does not count.

    next: what comes behind the token, in its row. BOS and padding neither are asked nor count as
    what comes. labels_S: the answers themselves, for a target that is a column.
    """
    counts_S = ~np.isin(corpus.ids_S, outside(tokenizer))
    if labels_S is None:
        labels_S = np.isin(corpus.ids_S, target.ids).astype(np.int8)
    labels_S = np.where(counts_S, labels_S, -1).astype(np.int8)
    if task == "current":
        return labels_S
    next_S = np.append(labels_S[1:], np.int8(-1))
    next_S[corpus.starts[1:] - 1] = -1
    return np.where(counts_S, next_S, -1).astype(np.int8)


def outside(tokenizer: Tokenizer) -> list[int]:
    """The tokens that never count."""
    return [i for i in (tokenizer.bos, tokenizer.pad) if i is not None]


def column_labels(rows: Rows, name: str) -> tuple[np.ndarray, bool]:
    """(int8 [S] labels of a column, whether it has one for every token); -1 where it has none.

    A row's label, or list of labels, is 0 or 1, true or false, or missing.
    """
    values = rows.column(name)
    if values is None:
        found = ", ".join(rows.columns) or "none"
        raise InputError(f"{rows.path} has no column {name!r} for --label (columns: {found})")
    listed = any(isinstance(value, list) for value in values)
    parts = []
    for i, (value, length) in enumerate(zip(values, rows.lengths, strict=True)):
        items: list[Any] = value if isinstance(value, list) else [value] * (1 if listed else length)
        if len(items) != length:
            raise InputError(f"{rows.path} row {i}: column {name!r} has {len(items)} labels for "
                             f"{length} tokens; give one for each")  # fmt: skip
        parts.append([_label(item, rows, i, name) for item in items])
    return np.concatenate(parts).astype(np.int8), listed


def _label(value: Any, rows: Rows, i: int, name: str) -> int:
    if value is None or value in (IGNORED, -1):
        return -1
    if value in (0, 1):
        return int(value)
    raise InputError(f"{rows.path} row {i}: column {name!r} holds {value!r}; a label is 0 or 1, "
                     "true or false, or missing")  # fmt: skip


def split(corpus: Corpus, truth_S: np.ndarray, seed: int) -> np.ndarray:
    """int8 [S], index into `SPLITS`: units in random order, each to who lacks most tokens."""
    counts = np.bincount(corpus.unit_S[truth_S >= 0], minlength=int(corpus.unit_S.max()) + 1)
    split_U = np.zeros(len(counts), np.int8)
    missing = np.array(SHARES) * counts.sum()
    for unit in np.random.default_rng([seed, 0]).permutation(len(counts)):
        split_U[unit] = missing.argmax()
        missing[split_U[unit]] -= counts[unit]
    return split_U[corpus.unit_S]


def sample(
    corpus: Corpus,
    truth_S: np.ndarray,
    split_S: np.ndarray,
    target: Target,
    samples: int,
    balanced: bool,
    eval_tokens: int,
    seed: int,
) -> Samples:
    """Tokens to read the model at: for training up to `samples` of each kind (or twice as many as
    they come), for validation and test up to `eval_tokens` each, as they come.

    InputError where there are too few of a kind, before any model has run.
    """
    if not (truth_S == 1).any() or not (truth_S == 0).any():
        which = "no positive" if not (truth_S == 1).any() else "no negative"
        raise InputError(f"{corpus.where} has {which} case of {target}; give a text that has some")
    row_S, parts = corpus.row_S, []
    for number, name in enumerate(SPLITS):
        rng = np.random.default_rng([seed, 1, number])
        mine_S = (split_S == number) & (truth_S >= 0)
        kinds = [mine_S & (truth_S == 0), mine_S & (truth_S == 1)]
        if number or not balanced:
            kinds = [mine_S]
        want = eval_tokens if number else samples if balanced else 2 * samples
        order = rng.permutation(len(corpus.lengths))
        enough = max(_rows_for(kind_S, row_S, order, want) for kind_S in kinds)
        read_S = np.isin(row_S, order[:enough])
        drawn = [_draw(np.flatnonzero(kind_S & read_S), want, rng) for kind_S in kinds]
        if number == 0 and balanced:  # as many negatives as positives
            drawn[0] = _draw(drawn[0], len(drawn[1]), rng)
        found = np.sort(np.concatenate(drawn))
        positives = int((truth_S[found] == 1).sum())
        fewest = min(positives, len(found) - positives)
        if fewest < FEWEST:
            kind = "positive" if positives == fewest else "negative"
            more = "; raise --eval-tokens" if number and len(found) == want else ""
            raise InputError(f"{corpus.where}: {target} has {fewest} {kind} cases in the {name} "
                             f"part and needs {FEWEST}; give more text{more}")  # fmt: skip
        parts.append((found, np.full(len(found), number, np.int8)))
    place_N, split_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    ascending = np.argsort(place_N)
    return Samples(place_N[ascending], truth_S[place_N[ascending]] == 1, split_N[ascending])


def _rows_for(kind_S: np.ndarray, row_S: np.ndarray, order: np.ndarray, want: int) -> int:
    """How many rows of the order hold `want` tokens of a kind."""
    held = np.cumsum(np.bincount(row_S[kind_S], minlength=len(order))[order])
    return min(int(np.searchsorted(held, want)) + 1, len(order))


def _draw(places: np.ndarray, want: int, rng: np.random.Generator) -> np.ndarray:
    return places if len(places) <= want else rng.choice(places, want, replace=False)
