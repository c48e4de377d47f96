"""Which merges happen, against merging the characters of every token by definition."""

import itertools
import random

import numpy as np
import pytest

from tokenizers.merges import last_merges


def last_pair(word: str, rank: dict[tuple[str, str], int]) -> int:
    """The merge that makes word of its characters, -1 if none does."""
    symbols, last = list(word), -1
    while len(symbols) > 1:
        pairs = list(itertools.pairwise(symbols))
        first = min(range(len(pairs)), key=lambda k: (rank.get(pairs[k], len(rank)), k))
        if pairs[first] not in rank:
            return -1
        last = rank[pairs[first]]
        symbols = [*symbols[:first], "".join(pairs[first]), *symbols[first + 2 :]]
    return last


@pytest.mark.parametrize("letters, order", [*itertools.product(["a", "ab", "abc"], range(3))])
def test_every_token_has_the_merge_that_makes_it(letters, order):
    rng = random.Random(len(letters) * 3 + order)
    made = early = 0
    for _ in range(100):
        words = [*letters]
        for _ in range(rng.randint(2, 60)):
            word = "".join(rng.choices(words, k=2))
            if word not in words and len(word) < 14:
                words.append(word)
        pairs = [
            (word[:at], word[at:])
            for word in words
            for at in range(1, len(word))
            if word[:at] in words and word[at:] in words and rng.random() < 0.85
        ]
        if not pairs:
            continue
        if order == 1:
            rng.shuffle(pairs)
        if order == 2:
            pairs.sort(key=lambda pair: -len("".join(pair)))
        index = {word: n for n, word in enumerate(words)}
        left, right, whole = (
            np.array([index[word] for word in column])
            for column in zip(*((a, b, a + b) for a, b in pairs), strict=True)
        )
        lengths = np.array([len(word) for word in words])
        found = last_merges(
            left, right, whole, lengths, lambda n, w=words, i=index: [i[c] for c in w[n]]
        )
        rank = {pair: n for n, pair in enumerate(pairs)}
        assert found.tolist() == [last_pair(word, rank) for word in words]
        made += int((found >= 0).sum())
        early += int((found[found >= 0] < found[left[found[found >= 0]]]).sum())
    assert made > 100 and (early > 50 or order == 0)
