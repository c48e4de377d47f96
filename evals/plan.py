"""Which tokens must be read to score many prompts: batches of few shapes, and what they are asked.

A plan is a function of the set of prompts, not of their order, and of the numbers it is given. Only
its batches hold arrays, made when they are asked for.

Dims: B rows, T tokens, n chunks, C positions of a chunk, K targets of a position, P prefix tokens.
"""

import copy
from collections.abc import Iterator, Sequence, Set
from typing import NamedTuple

import numpy as np

from evals import packing
from evals.items import Prompt
from evals.packing import Row, Rows, Trie

CHUNK = 128  # positions that meet the output matrix together
TARGETS = 4  # tokens asked of a position at once: the letters of an exam question
SPAN = 1024  # tokens of a row whose attention costs as much as all else, where none is given
OVERHEAD = 512  # tokens' worth of starting a batch


class Shape(NamedTuple):
    """What a program is compiled for. prefix: of its bucket, 0 = none. chunks: a device's."""

    rows: int
    length: int
    prefix: int
    chunks: int


class Batch(NamedTuple):
    """Rows ready for the devices, what is asked of them, and how their answers are read.

    prefix: for `Plan.prefix`, -1 = none. positions_BT: depths. ends_BT: see `core.attention`.
    at_nC: places in the flat [B*T] of a device's rows. targets_nCK: ids, -1 = none. live: chunks in
    use of each device. prompts: numbers of those answered; the tokens of each begin at its place in
    `firsts`. The answer about a token is in row `entries`, column `columns` of the flat [n*C,K].
    """

    shape: Shape
    prefix: int
    ids_BT: np.ndarray
    positions_BT: np.ndarray
    ends_BT: np.ndarray
    at_nC: np.ndarray
    targets_nCK: np.ndarray
    live: np.ndarray
    prompts: np.ndarray
    firsts: np.ndarray
    tokens: np.ndarray
    entries: np.ndarray
    columns: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What a program takes, each split over the devices by its first axis."""
        return self[2:8]


class Plan:
    """All batches of some prompts, a random-access source of `Batch`.

    batch_tokens: of a batch, padding included. devices: that share the rows of a batch evenly.
    chunk: positions whose logits are held at once. span: see `SPAN`.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_tokens: int,
        devices: int = 1,
        chunk: int = CHUNK,
        span: int = SPAN,
    ):
        self.asked, self.devices, self.chunk = prompts, devices, min(chunk, CHUNK)
        self.batches: list[tuple[Shape, int, list[Row]]] = []
        self.prefixes: list[np.ndarray] = []  # ids
        if not prompts:
            return
        self.trie = Trie(prompts)
        classes: dict[tuple[int, int], list[Rows]] = {}
        for rows in packing.packed(self.trie, batch_tokens // 4, span):
            bucket = packing.prefix_bucket(rows.prefix)
            classes.setdefault((bucket, rows.length), []).append(rows)
        found: list[tuple[Rows, Shape, list[Row]]] = []
        for (bucket, length), members in classes.items():
            size = self._batch_rows([len(rows.rows) for rows in members], length, batch_tokens)
            parts = [
                (rows, rows.rows[i : i + size])
                for rows in members
                for i in range(0, len(rows.rows), size)
            ]
            each = size // devices
            chunks = max(
                self._chunks(part[i : i + each]) for _, part in parts for i in range(0, size, each)
            )
            shape = Shape(size, length, bucket, 1 << (chunks - 1).bit_length())
            found += [(rows, shape, part) for rows, part in parts]
        # Those of one prefix follow each other; long rows come first, to fail early if they must.
        found.sort(key=lambda batch: (batch[0].prefix > 0, batch[0].first, -batch[1].length))
        known: dict[int, int] = {}
        for rows, shape, part in found:
            if rows.prefix and rows.first not in known:
                known[rows.first] = len(self.prefixes)
                self.prefixes.append(self.trie.ids[rows.first][: rows.prefix])
            self.batches.append((shape, known[rows.first] if rows.prefix else -1, part))

    def _batch_rows(self, counts: list[int], length: int, batch_tokens: int) -> int:
        """Rows of a batch: up to batch_tokens, and so that few of them stay empty.

        Of few sizes, so that other plans need the same programs.
        """
        most = max(batch_tokens // length // self.devices, 1)
        sizes = [m << k >> 2 for k in range(most.bit_length()) for m in (4, 5, 6, 7)]
        sizes = self.devices * np.array(sorted({n for n in sizes if n <= most}, reverse=True))
        batches_SG = -(-np.array(counts)[None] // sizes[:, None])
        return int(sizes[np.argmin(batches_SG.sum(1) * (sizes * length + OVERHEAD))])

    def _chunks(self, rows: list[Row]) -> int:
        """Chunks that suffice for what is asked of the rows."""
        sequences = [i for row in rows for i in row.sequences.tolist()]
        positions = int((self.trie.lengths - self.trie.limits)[sequences].sum())
        tokens = sum(len(self.asked[p].ids) - self.asked[p].start
                     for i in sequences for p in self.trie.asked[i])  # fmt: skip
        return max(-(-(positions + tokens // TARGETS) // self.chunk), 1)

    @property
    def shapes(self) -> list[Shape]:
        """The programs needed, in the order of their first use."""
        return list(dict.fromkeys(shape for shape, _, _ in self.batches))

    def prefix(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids [1,P] of a prefix, padded to its bucket, its length)."""
        ids = self.prefixes[number]
        ids_1P = np.zeros((1, packing.prefix_bucket(len(ids))), np.int32)
        ids_1P[0, : len(ids)] = ids
        return ids_1P, np.array(len(ids), np.int32)

    def numbers(self, k: int) -> list[int]:
        """The prompts that batch k answers."""
        rows = self.batches[k][2]
        return [p for row in rows for i in row.sequences.tolist() for p in self.trie.asked[i]]

    def part(self, which: slice) -> "Plan":
        """The plan of some of the batches."""
        some = copy.copy(self)
        some.batches = self.batches[which]
        return some

    def without(self, known: Set[int]) -> "Plan":
        """The plan less the batches that answer only prompts of these numbers."""
        if not known:
            return self
        left = copy.copy(self)
        is_left = [not known >= {*self.numbers(k)} for k in range(len(self))]
        left.batches = [b for b, keep in zip(self.batches, is_left, strict=True) if keep]
        return left

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int) -> Batch:
        shape, prefix, rows = self.batches[k]
        start = 0 if prefix < 0 else len(self.prefixes[prefix])
        size = (shape.rows, shape.length)
        ids_BT, positions_BT = np.zeros(size, np.int32), np.zeros(size, np.int32)
        ends_BT = np.tile(np.arange(1, shape.length + 1, dtype=np.int32), (shape.rows, 1))
        prompts: list[int] = []
        places: list[np.ndarray] = []
        for b, row in enumerate(rows):
            arrays = (ids_BT[b], positions_BT[b], ends_BT[b])
            for i, path in self._fill(row, start, *arrays):
                for p in self.trie.asked[i]:
                    prompts.append(p)
                    first = self.asked[p].start - 1
                    places.append(b * shape.length + path[first : self.trie.lengths[i]])
        tokens = np.concatenate([self.asked[p].ids[self.asked[p].start :] for p in prompts])
        firsts = np.cumsum([0, *map(len, places[:-1])])
        asked, entries, columns = self._questions(shape, np.concatenate(places), tokens)
        return Batch(
            shape, prefix, ids_BT, positions_BT, ends_BT, *asked,
            np.array(prompts), firsts, tokens, entries, columns,
        )  # fmt: skip

    def _fill(
        self, row: Row, start: int, ids_T: np.ndarray, positions_T: np.ndarray, ends_T: np.ndarray
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Write a row; yields each sequence with where the token of each depth lies."""
        lengths = self.trie.lengths[row.sequences]
        stops = np.cumsum(lengths - row.begins)
        offsets = stops - (lengths - row.begins)
        end_of = np.zeros(lengths.max(), np.int32)  # of the subtree at each depth of a path
        seams = [*zip(*(x.tolist() for x in (row.begins, lengths, offsets, stops)), strict=True)]
        known = start
        for begin, length, offset, stop in reversed(seams):
            end_of[known:length] = stop
            ends_T[offset:stop] = end_of[begin:length]
            known = begin
        path = np.zeros(lengths.max(), np.int64)
        for i, (begin, length, offset, stop) in zip(row.sequences.tolist(), seams, strict=True):
            ids_T[offset:stop] = self.trie.ids[i][begin:length]
            positions_T[offset:stop] = np.arange(begin, length)
            path[begin:length] = np.arange(offset, stop)
            yield i, path

    def _questions(self, shape: Shape, places: np.ndarray, tokens: np.ndarray):
        """((at_nC, targets_nCK, live), entry and column of every token asked).

        places: in the flat [B*T]. A position of which more than K tokens are asked has several
        entries; those of a device begin at its own first chunk.
        """
        n, c = self.devices * shape.chunks, self.chunk
        wide = int(tokens.max()) + 1
        pairs, back = np.unique(places * wide + tokens, return_inverse=True)
        at, target = pairs // wide, pairs % wide
        order = np.arange(len(pairs))
        is_first = np.diff(at, prepend=-1) != 0
        rank = order - np.maximum.accumulate(np.where(is_first, order, 0))
        is_entry, column = rank % TARGETS == 0, rank % TARGETS
        device, at = np.divmod(at, shape.rows * shape.length // self.devices)
        counts = np.bincount(device[is_entry], minlength=self.devices)
        skipped = np.arange(self.devices) * shape.chunks * c - (np.cumsum(counts) - counts)
        entry = np.cumsum(is_entry) - 1 + skipped[device]
        at_nC = np.zeros(n * c, np.int32)
        at_nC[entry] = at
        targets_nCK = np.full((n * c, TARGETS), -1, np.int32)
        targets_nCK[entry, column] = target
        live = (-(-counts // c)).astype(np.int32)
        asked = at_nC.reshape(n, c), targets_nCK.reshape(n, c, TARGETS), live
        return asked, entry[back], column[back]
