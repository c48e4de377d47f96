"""The trie of what prompts read, cut and packed into rows of few lengths.

Sorted, the sequences that are read are a trie: each brings the tokens behind what it has in common
with the one before it, and a run of them is a tree. A row is a packed forest of such trees, whose
tokens lie in depth-first order (see `core.attention`): a text that begins another, a context of
four endings, and what some questions begin with are read once a row. A beginning that many rows
share is cut off; those rows are packed by themselves.
"""

import bisect
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evals.items import Prompt

LENGTHS = tuple(m << k for k in range(5, 18) for m in (4, 6))  # of rows: 128, 192, 256, 384, ...
USUAL = 512  # tokens of a row, where it is guessed
SHORTEST_PREFIX = 64  # tokens
SHARED = 8  # tokens from which a beginning is shared among the trees of a row

Run = tuple[int, int]  # sequences from, up to


class Cut(NamedTuple):
    """Sequences a to b, whose first `depth` tokens are a prefix of their rows."""

    a: int
    b: int
    depth: int


class Row(NamedTuple):
    """Sequences in the order of the row, and the depth at which what each brings begins."""

    sequences: np.ndarray
    begins: np.ndarray


class Rows(NamedTuple):
    """Rows of one length behind one prefix: tokens [0, prefix) of sequence `first`."""

    first: int
    prefix: int
    length: int
    rows: list[Row]


def best_fit(sizes: Sequence[int], opened: Callable[[int], int]) -> list[tuple[int, list[int]]]:
    """Bins (capacity, items): each item, largest first, goes where it leaves the least room.

    opened: the capacity of a bin that is opened for an item of the given size.
    """
    bins: list[tuple[int, list[int]]] = []
    free: dict[int, list[list[int]]] = {}  # bins by the room they have left
    rooms = 0  # a bit for each amount of room that some bin has
    for i in np.argsort(-np.asarray(sizes), kind="stable").tolist():
        size = int(sizes[i])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            items = free[room].pop()
            if not free[room]:
                rooms &= ~(1 << room)
        else:
            room, items = opened(size), []
            bins.append((room, items))
        items.append(i)
        free.setdefault(room - size, []).append(items)
        rooms |= 1 << (room - size)
    return bins


def at_least(size: int, sizes: Sequence[int] = LENGTHS) -> int:
    """The smallest of ascending `sizes` that holds `size`."""
    return sizes[bisect.bisect_left(sizes, size)]


class Trie:
    """The sorted sequences of prompts: what is read, all tokens of a prompt but its last.

    asked: the numbers of each one's prompts. shared: tokens in common with the one before. limits:
    the first depth that a prompt asks about.
    """

    def __init__(self, prompts: Sequence[Prompt]):
        # Big-endian bytes sort like the ids.
        numbers: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(prompts):
            numbers.setdefault(prompt.ids[:-1].astype(">i4").tobytes(), []).append(i)
        self.asked = [numbers[key] for key in sorted(numbers)]
        self.ids = [prompts[mine[0]].ids[:-1] for mine in self.asked]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.shared = np.zeros(len(self.ids), np.int64)
        for i in range(1, len(self.ids)):
            n = min(self.lengths[i - 1], self.lengths[i])
            differ = self.ids[i - 1][:n] != self.ids[i][:n]
            self.shared[i] = differ.argmax() if differ.any() else n
        self.limits = np.array([min(prompts[i].start for i in mine) - 1 for mine in self.asked])
        self.sums = np.concatenate([[0], np.cumsum(self.lengths - self.shared)])

    def tokens(self, a: int, b: int) -> int:
        """Tokens of the tree of sequences a to b, from the root."""
        return int(self.sums[b] - self.sums[a + 1] + self.lengths[a])

    def branch(self, a: int, b: int) -> tuple[int, list[Run]]:
        """(depth at which two or more sequences part, the runs that part there)."""
        shared = self.shared[a + 1 : b]
        depth = int(shared.min())
        cuts = [a, *(a + 1 + np.flatnonzero(shared == depth)).tolist(), b]
        return depth, list(zip(cuts, cuts[1:], strict=False))


def prefixes(trie: Trie) -> list[Cut]:
    """Runs whose first tokens are better read once for many rows.

    A node saves its depth in all rows but one; it is cut there unless its children save more.
    """
    nodes = [(0, len(trie.ids), -1)]
    gains, depths = [], []
    for number, (a, b, _) in enumerate(nodes):  # grows meanwhile
        depth, runs = trie.branch(a, b) if b > a + 1 else (0, [])
        large = [run for run in runs if trie.tokens(*run) - depth > 2 * USUAL]
        nodes.extend((*run, number) for run in large)
        depth = min(depth, int(trie.limits[a:b].min()))
        rows = -(-(trie.tokens(a, b) - depth) // USUAL)
        gains.append(depth * (rows - 1) - USUAL if depth >= SHORTEST_PREFIX else 0)
        depths.append(depth)
    below = [0] * len(nodes)
    for number in reversed(range(1, len(nodes))):
        below[nodes[number][2]] += max(gains[number], below[number])
    chosen: list[Cut] = []
    inside = [False] * len(nodes)
    for number, (a, b, parent) in enumerate(nodes):
        inside[number] = parent >= 0 and inside[parent]
        if not inside[number] and gains[number] > 0 and gains[number] >= below[number]:
            chosen.append(Cut(a, b, depths[number]))
            inside[number] = True
    return sorted(chosen)


class Piece(NamedTuple):
    """A tree of `tokens`: runs of siblings that share the path to `depth`."""

    tokens: int
    runs: list[Run]
    depth: int


def pieces(
    trie: Trie, runs: Sequence[Run], start: int, length: int, longest: int
) -> Iterator[Piece]:
    """Trees of the runs without their first `start` tokens.

    Of up to `length` tokens or, where they would share too much of that, up to `longest`.
    """
    work = list(runs)
    while work:
        a, b = work.pop()
        size = trie.tokens(a, b) - start
        if size <= length or b == a + 1:
            yield Piece(size, [(a, b)], start)
            continue
        depth, parts = trie.branch(a, b)
        room = length if 4 * (depth - start) <= length else longest
        if size <= room:
            yield Piece(size, [(a, b)], start)
            continue
        room -= depth - start
        sizes = [trie.tokens(*part) - depth for part in parts]
        work.extend(part for part, n in zip(parts, sizes, strict=True) if n > room)
        fits = [(part, n) for part, n in zip(parts, sizes, strict=True) if n <= room]
        if depth - start < SHARED:
            yield from (Piece(n + depth - start, [part], start) for part, n in fits)
            continue
        for _, items in best_fit([n for _, n in fits], lambda _, room=room: room):
            total = sum(fits[i][1] for i in items) + depth - start
            yield Piece(total, [fits[i][0] for i in sorted(items)], depth)


def pack(
    trie: Trie, runs: Sequence[Run], start: int, lengths: Sequence[int]
) -> dict[int, list[Row]]:
    """Rows by their length, one of `lengths`; they are shared among pieces, largest first."""
    found = list(pieces(trie, runs, start, lengths[0], lengths[-1]))
    packed: dict[int, list[Row]] = {}
    sizes = [size for size, _, _ in found]
    for length, items in best_fit(sizes, functools.partial(at_least, sizes=lengths)):
        sequences, begins = [], []
        for _, siblings, depth in (found[i] for i in items):
            for a, b in siblings:
                sequences.append(np.arange(a, b))
                begins.append(trie.shared[a:b].copy())
                begins[-1][0] = start if (a, b) == siblings[0] else depth
        row = Row(np.concatenate(sequences), np.concatenate(begins))
        packed.setdefault(length, []).append(row)
    return packed


def pack_all(trie: Trie, cuts: Sequence[Cut], lengths: Sequence[int], few: int) -> list[Rows]:
    """Every sequence in a row of one of `lengths`; one that would hold `few` tokens is not used."""
    bounds = [0, *(x for a, b, _ in cuts for x in (a, b)), len(trie.ids)]
    rest = [(a, b) for a, b in zip(bounds[::2], bounds[1::2], strict=True) if a < b]
    groups = [(rest, 0), *(([(a, b)], depth) for a, b, depth in cuts)]
    while True:
        found = [
            Rows(runs[0][0], start, n, rows)
            for runs, start in groups
            if runs
            for n, rows in pack(trie, runs, start, lengths).items()
        ]
        used = {n: sum(n * len(x.rows) for x in found if x.length == n) for n in lengths}
        longest = max(n for n in lengths if used[n])
        kept = [n for n in lengths if used[n] > few or n == longest]
        if kept == lengths:
            return found
        lengths = kept


def prefix_bucket(prefix: int) -> int:
    """Tokens that a prefix is padded to; 0 = none."""
    return max(SHORTEST_PREFIX, 1 << (prefix - 1).bit_length()) if prefix else 0


def packed(trie: Trie, few: int, span: int) -> list[Rows]:
    """The rows that cost least, where a row of `span` tokens costs twice as much a token as a very
    short one, for its attention; see `pack_all`."""
    # Longer than any text, for the branches of a long one.
    longest = at_least(max(3 * int(trie.lengths.max()) // 2, USUAL))
    cuts, lengths = prefixes(trie), [n for n in LENGTHS if n <= longest]
    tries = (pack_all(trie, cuts, lengths[lengths.index(n) :], few)
             for n in lengths if n <= 2 * USUAL)  # fmt: skip

    def cost(found: list[Rows]) -> float:
        return sum(
            len(x.rows) * x.length * (span + x.length + prefix_bucket(x.prefix)) for x in found
        )

    return min(tries, key=cost)
