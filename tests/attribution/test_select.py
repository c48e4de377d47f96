"""Choosing rows: exact tops, fair controls, and refusals."""

import numpy as np
import pytest

from attribution.outputs import candidates
from attribution.select import BINS, NEGATIVE, POSITIVE, choose, read_proponents, select
from core.errors import InputError
from core.files import read_json, write_json, write_npy
from core.rows import load_rows

STRATEGIES = ["top", "bottom", "random", "matched-random"]
N = 3000


def pool(kind="long-tailed", seed=0):
    """(scores, trained tokens): long rows score higher, as summed losses make them."""
    random = np.random.default_rng(seed)
    trained_N = {
        "long-tailed": lambda: np.exp(random.normal(4, 1, N)).astype(np.int64) + 1,
        "packed": lambda: np.full(N, 255),
        "two lengths": lambda: random.choice([10, 200], N, p=[0.9, 0.1]),
    }[kind]()
    return random.normal(size=N) + 0.5 * np.log(trained_N), trained_N


def histogram(trained_N, top, chosen):
    """Rows of each length bin of the top, over the chosen ones; the last entry: out of range."""
    edges = np.unique(np.quantile(trained_N[top], np.linspace(0, 1, BINS + 1)))
    bins = np.searchsorted(edges[1:-1], trained_N[chosen], side="right")
    outside = (trained_N[chosen] < edges[0]) | (trained_N[chosen] > edges[-1])
    return np.bincount(np.where(outside, BINS, bins), minlength=BINS + 1).tolist()


@pytest.mark.parametrize("k", [1, 7, 300, N])
def test_top_and_bottom_are_exact(k):
    scores_N, trained_N = pool("packed")
    order = sorted(range(N), key=lambda i: -scores_N[i])
    assert choose(scores_N, trained_N, k, "top", 0).tolist() == sorted(order[:k])
    assert choose(scores_N, trained_N, k, "bottom", 0).tolist() == sorted(order[::-1][:k])


@pytest.mark.parametrize("kind", ["long-tailed", "packed", "two lengths"])
@pytest.mark.parametrize("k", [20, 300, 1500])
def test_controls_train_on_as_many_tokens(kind, k):
    scores_N, trained_N = pool(kind)
    top = choose(scores_N, trained_N, k, "top", 0)
    budget = trained_N[top].sum()
    for seed in range(5):
        for strategy in ("random", "matched-random", "bottom"):
            chosen = choose(scores_N, trained_N, k, strategy, seed)
            assert len(set(chosen.tolist())) == len(chosen) and (np.diff(chosen) > 0).all()
            missed = abs(trained_N[chosen].sum() - budget)
            assert missed <= max(trained_N[chosen].max() / 2, 0.005 * budget)
        matched = choose(scores_N, trained_N, k, "matched-random", seed)
        assert len(matched) == k
        assert abs(trained_N[matched].sum() - budget) <= max(BINS, 0.005 * budget)
        assert histogram(trained_N, top, matched) == histogram(trained_N, top, top)


def test_matched_rows_are_no_longer_or_shorter_than_the_top():
    """A pool of giants and crumbs around a top of one length: neither may stand in for it."""
    trained_N = np.repeat([1, 50, 5000], 100)
    scores_N = np.where(trained_N == 50, 1.0, 0.0) + np.linspace(0, 0.1, 300)
    chosen = choose(scores_N, trained_N, 30, "matched-random", 0)
    assert len(chosen) == 30 and (trained_N[chosen] == 50).all()


def test_random_controls_are_random():
    scores_N, trained_N = pool()
    top = set(choose(scores_N, trained_N, 300, "top", 0).tolist())
    for strategy in ("random", "matched-random"):
        draws = [set(choose(scores_N, trained_N, 300, strategy, s).tolist()) for s in range(20)]
        again = choose(scores_N, trained_N, 300, strategy, 3).tolist()
        assert draws[3] == set(again)
        assert len({frozenset(draw) for draw in draws}) == 20
        # Every row has its chance, and the top is not favoured beyond its lengths.
        assert len(set.union(*draws)) > 0.4 * N
        assert np.mean([len(draw & top) / len(draw) for draw in draws]) < 0.5


def test_ties_fall_by_seed_and_only_by_seed():
    trained_N = np.full(50, 10)
    scores_N = np.repeat([2.0, 1.0], [10, 40])
    chosen = [choose(scores_N, trained_N, 20, "top", seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(chosen[0], chosen[1])
    assert chosen[0].tolist() != chosen[2].tolist()
    for each in chosen:
        assert set(range(10)) <= set(each.tolist())
    first_rows = set(range(20))  # the order of the rows must not decide
    assert all(set(each.tolist()) != first_rows for each in chosen)


@pytest.mark.parametrize("k", [0, -1, N + 1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k_out_of_range_is_refused(strategy, k):
    with pytest.raises(InputError, match=f"--k {k} is not between 1 and .* {N}"):
        choose(*pool(), k, strategy, 0)


@pytest.fixture
def scored(tiny, tmp_path):
    """A pool of ten rows and a scores folder that belongs to it."""
    rows = tiny.rows(tmp_path / "pool", list(range(4, 14)), source=list("aabbccddee"))
    info = {"format": "taproot-scores", "pool": {"path": str(rows.path), "rows": rows.sha},
            "sign": f"{POSITIVE} (gradient inner product)"}  # fmt: skip
    write_json(tmp_path / "scores" / "info.json", info)
    write_npy(tmp_path / "scores" / "scores.npy", np.arange(10, dtype=np.float32) % 7)
    return rows


def test_chosen_rows_are_written_whole(scored, tmp_path):
    folder = tmp_path / "chosen"
    selection = select(tmp_path / "scores", scored, 3, "top", 0, folder)
    indices = selection["indices"]
    assert indices == [4, 5, 6]
    assert read_json(folder / "selection.json") == selection
    chosen = load_rows(folder)
    for place, i in enumerate(indices):
        np.testing.assert_array_equal(chosen.ids(place), scored.ids(i))
        np.testing.assert_array_equal(chosen.labels(place), scored.labels(i))
    assert chosen.column("source") == ["c", "c", "d"]
    assert chosen.column("pool_row") == indices and chosen.column("score") == [4, 5, 6]
    assert selection["trained_tokens"] == chosen.trained.sum()
    other = select(tmp_path / "scores", scored, 3, "random", 0, tmp_path / "other")
    assert other["sha256"] != selection["sha256"]


def test_scores_for_each_query_are_ranked_by_their_mean(scored, tmp_path):
    scores_NQ = np.zeros((10, 2), np.float32)
    scores_NQ[3], scores_NQ[8] = (4, 0), (1, 2)
    write_npy(tmp_path / "scores" / "scores.npy", scores_NQ)
    assert select(tmp_path / "scores", scored, 2, "top", 0, tmp_path / "o")["indices"] == [3, 8]


def test_what_was_not_scored_is_refused(tiny, scored, tmp_path):
    other = tiny.rows(tmp_path / "unscored", list(range(4, 14)), seed=1)
    with pytest.raises(InputError, match="rows differ from .*unscored; give the rows"):
        select(tmp_path / "scores", other, 3, "top", 0, tmp_path / "o")
    with pytest.raises(InputError, match="rows differ"):
        select(tmp_path / "scores", scored.take(range(9)), 3, "top", 0, tmp_path / "o")
    write_npy(tmp_path / "scores" / "scores.npy", np.zeros(9, np.float32))
    with pytest.raises(InputError, match="score them again"):
        select(tmp_path / "scores", scored, 3, "top", 0, tmp_path / "o")
    (tmp_path / "scores" / "info.json").unlink()
    with pytest.raises(InputError, match="info.json does not exist"):
        select(tmp_path / "scores", scored, 3, "top", 0, tmp_path / "o")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_a_score_are_never_chosen(strategy):
    """Where only candidates were scored, the others hold NaN."""
    scores_N, trained_N = pool()
    scores_N[::3] = np.nan
    chosen = choose(scores_N, trained_N, 200, strategy, 0)
    assert len(chosen) and np.isfinite(scores_N[chosen]).all()
    kept = np.flatnonzero(np.isfinite(scores_N))
    alone = choose(scores_N[kept], trained_N[kept], 200, strategy, 0)
    np.testing.assert_array_equal(chosen, kept[alone])
    with pytest.raises(InputError, match="number of scored rows, 2000"):
        choose(scores_N, trained_N, 2001, strategy, 0)


def described(folder, **more):
    """`info.json` with more in it."""
    write_json(folder / "info.json", read_json(folder / "info.json") | more)


def test_the_most_negative_are_the_proponents_of_a_derivative(scored, tmp_path):
    """MAGIC's folders say so, and every reader turns: the top, the bottom, candidates."""
    folder = tmp_path / "scores"
    turned = select(folder, scored, 3, "top", 0, tmp_path / "top")
    scores_N = np.load(folder / "scores.npy")
    write_npy(folder / "scores.npy", -scores_N)
    described(folder, sign=f"{NEGATIVE} (d query loss / d token weight)")
    again = select(folder, scored, 3, "top", 0, tmp_path / "again")
    assert again["indices"] == turned["indices"] == [4, 5, 6]
    assert load_rows(tmp_path / "again").column("score") == [-4, -5, -6]  # as in the file
    bottom = select(folder, scored, 2, "bottom", 0, tmp_path / "bottom")["indices"]
    assert set(bottom) <= {0, 7, 1, 8}
    assert candidates(folder, 3, scored).tolist() == [4, 5, 6]
    np.testing.assert_array_equal(read_proponents(folder, scored).scores, scores_N)


def test_scores_without_a_meaning_are_refused(scored, tmp_path):
    folder = tmp_path / "scores"
    described(folder, sign="larger = better")
    for read in (
        lambda: select(folder, scored, 3, "top", 0, tmp_path / "o"),
        lambda: candidates(folder, 3, scored),
    ):
        with pytest.raises(InputError, match="sign 'larger = better', which is none of"):
            read()
    scores_N = np.arange(10, dtype=np.float32)
    scores_N[7] = np.nan
    write_npy(folder / "scores.npy", scores_N)
    described(folder, sign=NEGATIVE, trust={"reasons": ["set --eps-root", "other"]})
    with pytest.raises(InputError, match=r"row 7 is not finite \(set --eps-root\)"):
        select(folder, scored, 3, "top", 0, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    described(folder, candidates=9)  # the tenth was none
    assert select(folder, scored, 9, "top", 0, tmp_path / "nine")["indices"] == [
        *range(7),
        8,
        9,
    ]
    scores_N[3] = np.inf
    write_npy(folder / "scores.npy", scores_N)
    with pytest.raises(InputError, match="row 3 is not finite"):
        select(folder, scored, 3, "top", 0, tmp_path / "o")
