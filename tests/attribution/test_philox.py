"""Philox against the vectors of its authors, and matrices against Bergson's own, bit for bit."""

from pathlib import Path

import numpy as np
import pytest

from attribution import philox

BERGSON = Path(__file__).parents[1] / "golden" / "bergson"
# Random123's known answers for philox4x32-10: counter, key, words.
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((philox.WORD,) * 4, (philox.WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def test_known_answers():
    counters, keys, words = zip(*ANSWERS, strict=True)
    for counter, key, expected in zip(counters, keys, words, strict=True):
        x0, x1, x2, x3 = (np.array([value], np.uint64) for value in counter)
        found = philox.philox((x0, x1, x2, x3), key)
        assert tuple(int(word[0]) for word in found) == expected


def test_counters_broadcast():
    w_1W, row_P1 = np.arange(5, dtype=np.uint64)[None], np.arange(3, dtype=np.uint64)[:, None]
    zero = np.zeros((1, 1), np.uint64)
    words = philox.philox((w_1W, row_P1, zero, zero), (7, 9))
    one = philox.philox((w_1W[:, 4:], row_P1[2:], zero, zero), (7, 9))
    assert all(word.shape == (3, 5) for word in words)
    assert [int(word[2, 4]) for word in words] == [int(word[0, 0]) for word in one]


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_matrices_are_bergsons(family, kind):
    with np.load(BERGSON / family / "projected.npz") as file:
        golden = {
            key.removeprefix(f"matrix/{kind}/"): file[key]
            for key in file.files
            if key.startswith(f"matrix/{kind}/")
        }
    assert len(golden) >= 24
    for name, scaled_PN in golden.items():
        rows, columns = scaled_PN.shape
        own_PN = philox.matrix(name.removesuffix("_bias"), rows, columns, kind) / np.float32(2)
        if kind == "rademacher":
            np.testing.assert_array_equal(own_PN, scaled_PN)
        else:  # another machine's `log` and `cos` may round otherwise
            np.testing.assert_allclose(own_PN, scaled_PN, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_size_and_chunks_change_no_entry(kind, monkeypatch):
    whole_PN = philox.matrix("a/left", 9, 700, kind)
    np.testing.assert_array_equal(philox.matrix("a/left", 4, 129, kind), whole_PN[:4, :129])
    monkeypatch.setattr(philox, "CHUNK", 1)
    np.testing.assert_array_equal(philox.matrix("a/left", 9, 700, kind), whole_PN)
    assert (philox.matrix("a/right", 9, 700, kind) != whole_PN).any(1).all()


@pytest.mark.parametrize(("kind", "fourth"), [("rademacher", 1), ("normal", 3)])
def test_moments_and_independence(kind, fourth):
    m_PN = philox.matrix("moments", 64, 4096, kind).astype(np.float64)
    assert abs(m_PN.mean()) < 5 / m_PN.size**0.5
    assert abs((m_PN**2).mean() - 1) < 5 * (2 / m_PN.size) ** 0.5
    assert abs((m_PN**4).mean() - fourth) < 5 * (96 / m_PN.size) ** 0.5
    between = m_PN @ m_PN.T / 4096 - np.eye(64)
    assert np.abs(between - np.diag(np.diag(between))).max() < 6 / 4096**0.5
