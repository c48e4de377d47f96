"""Which of a list of merges ever happen, for symbols that a merge may reach in several ways.

Dims: M merges, V ids, N pairs of neighbours.

A tokenizer.json lists pairs of neighbours, first listed first merged; tiktoken merges neighbours by
what they spell. Before x and y meet as neighbours nothing has merged across the ends of x + y, so
these characters went through the same states as they do alone, and alone they have one last pair.
So every token has at most one merge that ever makes it, whatever else is listed; ranking the token
by that merge, and leaving out tokens that have none, makes both ways the same.
"""

from collections.abc import Callable

import numpy as np

NEVER = np.iinfo(np.int64).max


def last_merges(
    left_M: np.ndarray,
    right_M: np.ndarray,
    made_M: np.ndarray,
    length_V: np.ndarray,
    characters: Callable[[int], list[int]],
) -> np.ndarray:
    """The merge that makes each id, int64 [V]; -1 for single characters and for what none makes.

    Pairs of ids and what they spell, in order of preference, no pair twice; length_V: characters of
    each id, of which `characters` gives the ids; a merge's length is the sum of its parts'.
    """
    size = len(length_V)
    key_M = left_M.astype(np.int64) * size + right_M
    order_M = np.argsort(key_M, kind="stable")
    sorted_M = key_M[order_M]

    def rank(x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
        key_N = x_N.astype(np.int64) * size + y_N
        at_N = np.minimum(np.searchsorted(sorted_M, key_N), len(sorted_M) - 1)
        return np.where(sorted_M[at_N] == key_N, order_M[at_N], NEVER)

    def meet(x_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
        """Whether x and y become neighbours: undo the later of their last merges again and again;
        the neighbours at the edge must not be due before the merge that took one of them away."""
        meets_N, open_N = np.ones(len(x_N), bool), np.arange(len(x_N))
        while len(open_N):
            of_x_N, of_y_N = last_V[x_N], last_V[y_N]
            undo_x_N = of_x_N > of_y_N
            limit_N = np.where(undo_x_N, of_x_N, of_y_N + 1)  # + 1: of equals, the leftmost first
            x_N = np.where(undo_x_N, right_M[of_x_N], x_N)
            y_N = np.where(undo_x_N | (of_y_N < 0), y_N, left_M[of_y_N])
            lost_N = rank(x_N, y_N) < limit_N
            meets_N[open_N[lost_N]] = False
            left_over_N = ~lost_N & (limit_N > 0)  # 0: both are characters
            open_N, x_N, y_N = open_N[left_over_N], x_N[left_over_N], y_N[left_over_N]
        return meets_N

    last_V = np.full(size, -1)
    exists_V = length_V == 1
    # Time is rank only while every merge is listed after those that make its parts; for ids made by
    # merges listed sooner, and for what is made of these, the characters themselves are merged.
    early_V = np.zeros(size, bool)
    pairs: dict[int, int] = {}
    for length in np.unique(length_V[made_M]):
        m = np.flatnonzero(length_V[made_M] == length)
        m = m[exists_V[left_M[m]] & exists_V[right_M[m]]]
        plain = m[~(early_V[left_M[m]] | early_V[right_M[m]])]
        found = plain[meet(left_M[plain], right_M[plain])]
        unclear = np.setdiff1d(made_M[np.setdiff1d(m, plain)], made_M[found])
        if len(unclear):
            pairs = pairs or dict(zip(key_M.tolist(), range(len(key_M)), strict=True))
            ends = [_merged(characters(i), made_M, pairs, size) for i in unclear.tolist()]
            found = np.concatenate([found, [e for e in ends if e >= 0]]).astype(np.int64)
        x, y, made = left_M[found], right_M[found], made_M[found]
        last_V[made], exists_V[made] = found, True
        early_V[made] = (found < np.maximum(last_V[x], last_V[y])) | early_V[x] | early_V[y]
    return last_V


def _merged(symbols: list[int], made_M: np.ndarray, pairs: dict[int, int], size: int) -> int:
    """The last of the merges that make one symbol of all, -1 if they do not."""
    last = -1
    while len(symbols) > 1:
        ranks = [pairs.get(x * size + y, NEVER) for x, y in zip(symbols, symbols[1:], strict=False)]
        last = min(ranks)
        if last == NEVER:
            return -1
        at = ranks.index(last)
        symbols = [*symbols[:at], int(made_M[last]), *symbols[at + 2 :]]
    return last
