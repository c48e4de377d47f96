"""A small view with everything a page may meet."""

import numpy as np
import pytest

from sae.dashboard.collect import AROUND, BINS, KEPT, OTHERS, TOP, Activity, Contexts
from sae.dashboard.decoder import ENDS, NEAREST, Effects
from sae.dashboard.view import View

F, TOKENS, ROW = 300, 20_000, 60
HOSTILE = (
    b"</script><script>window.hit = 1</script>",
    b"<img src=x onerror='window.hit = 1'>",
    b"&lt;b&gt;",
    "\u202eevil\u2066".encode(),
    b"\x00\x1b\r",
    b"\xff",
)
PIECES = (
    *HOSTILE, b"\n", b"\t", b" caf\xc3", b"\xa9", "東".encode(), "שלום".encode(), b"  ", b"",
    *(f"{' ' * (i % 3 > 0)}{word}{i}".encode() for i, word in
      enumerate(["sea", "house", "lobster", "day", "still"] * 40)),
)  # fmt: skip
CHOSEN = np.array([0, 3, 17, 42, 120, 299])  # with contexts
DEAD = 5


@pytest.fixture(scope="session")
def view() -> View:
    """300 features, of which 6 have contexts. Token 0, at the start of some rows, is the BOS."""
    random = np.random.default_rng(0)
    active_F = random.integers(1, 4_000, F)
    max_F = np.round(random.gamma(3, 4, F), 3)
    active_F[DEAD], max_F[DEAD], max_F[17] = 0, 0, 40.0
    weight_F = np.where(random.random(F) < 0.3, random.normal(size=F), 0)
    weight_F[42], weight_F[3], weight_F[120] = 3.5, -3.25, 0
    ids = random.integers(0, len(PIECES), (F, 2, ENDS))
    ids[7, 0, 2] = PIECES.index(b"lobster57")  # promoted, by this one alone
    ids[(ids == ids[7, 0, 2]) & (np.arange(F) != 7)[:, None, None]] = 15
    ids[17, 0, : len(HOSTILE)] = range(len(HOSTILE))
    value_FE = -np.sort(-random.gamma(2, 0.4, (F, 2, ENDS)), axis=2)
    effects = Effects(ids[:, 0].astype(np.int32), value_FE[:, 0], ids[:, 1], -value_FE[:, 1])
    near_FE = (np.arange(F)[:, None] + 1 + np.arange(NEAREST)) % F
    cosine_FE = np.tile(np.linspace(0.9, -0.1, NEAREST), (F, 1))
    activity = Activity(TOKENS, active_F, active_F * max_F * 0.25, max_F)
    return View("Features of <b>tiny</b>", {"site": "resid_post.2", "SAE": "a <i>folder</i>"},
                activity, weight_F, np.arange(F), effects, near_FE, cosine_FE,
                _contexts(random, max_F), dict(enumerate(PIECES)))  # fmt: skip


def _contexts(random: np.random.Generator, max_F: np.ndarray) -> Contexts:
    n, w = len(CHOSEN), 2 * AROUND + 1
    row_NK = np.tile(np.arange(KEPT), (n, 1))
    row_NK[:, TOP - 4 : TOP], row_NK[:, TOP + OTHERS : TOP + 2 * OTHERS] = -1, -1
    place_NK = random.integers(0, ROW, (n, KEPT))
    place_NK[:, 0] = 6
    at_NKW = place_NK[:, :, None] + np.arange(-AROUND, AROUND + 1)
    inside_NKW = (at_NKW >= 0) & (at_NKW < ROW) & (row_NK >= 0)[:, :, None]
    id_NKW = random.integers(1, len(PIECES), (n, KEPT, w))
    id_NKW[:, 1, AROUND - 4 : AROUND + 4] = [*range(6), 8, 9]
    share_K = np.r_[np.linspace(1, 0.8, TOP), np.repeat([0.6, 0.4, 0.1], OTHERS)]
    value_NKW = random.random((n, KEPT, w)) * (random.random((n, KEPT, w)) < 0.3)
    value_NKW[:, :, AROUND] = 1
    value_NKW *= (max_F[CHOSEN][:, None] * share_K)[:, :, None]
    value_NKW = np.where(inside_NKW & (at_NKW > 0), value_NKW, np.nan)
    histogram_NH = random.poisson(np.exp(6 - np.arange(BINS) / 6), (n, BINS))
    histogram_NH[:, 7] = 0
    id_NKW = np.where(inside_NKW, id_NKW, -1)
    return Contexts(CHOSEN, histogram_NH, row_NK, place_NK, id_NKW, value_NKW)
