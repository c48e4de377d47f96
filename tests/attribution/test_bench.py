"""The benchmark's arithmetic and the shape of what it returns; its times are not judged here."""

import dataclasses

import pytest

from attribution import bench
from core.config import Execution, ModelConfig
from core.errors import InputError

TINY = ModelConfig("gpt2", 50, 32, 8, 2, 2, 16, 4)


def test_flop_floor_by_hand():
    # Of a layer: c_attn 8x24, c_proj 8x8, c_fc 8x16, c_proj 16x8; the head 50x8.
    n = 2 * (8 * 24 + 8 * 8 + 8 * 16 + 16 * 8) + 50 * 8
    a = 2 * 2 * 2 * 10 * 8  # scores and mixing, two FLOPs a multiply-add, 10 keys, 8 wide
    pi = 2 * 2 * ((8 + 24) * 3 + (8 + 8) * 3 + 2 * (8 + 16) * 3 + 4 * 3 * 3)
    expected = (4 * n + 3 * a + pi) / (6 * n + 3 * a)
    assert bench.flop_floor(TINY, length=10, p=3) == pytest.approx(expected, rel=1e-12)


def test_flop_floor_of_the_published_size():
    """reference: GPT-2 124M at 1024 tokens, 0.71-0.72 with a small projection."""
    assert 0.71 <= bench.flop_floor(bench.PRESETS["gpt2-124m"], 1024, 16) <= 0.73


def test_result_has_every_number(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "tiny", one := dataclasses.replace(TINY, layers=1))
    result = bench.bench(
        "tiny", 2, 16, (3, 2), 2, bench.PROGRAMS, parts=True, execution=Execution()
    )
    programs = {
        "forward", "value_and_grad", "projected_3", "projected_2", "global_sketch_3",
        "token_scores_3", "exact_scores", "kfac", "ekfac_correction", "vmap_grad",
    }  # fmt: skip
    for key in ("ratios", "seconds", "tokens_per_second"):
        assert set(result[key]) == programs | {"ekfac_fit"}
    for key in ("cpu_seconds", "temp_bytes"):
        assert set(result[key]) == programs
    whole = result["seconds"]["value_and_grad"]
    for name, seconds in result["seconds"].items():
        assert seconds > 0
        assert result["tokens_per_second"][name] == pytest.approx(2 * 16 / seconds)
        assert result["ratios"][name] == pytest.approx(seconds / whole)
    fit = result["seconds"]["kfac"] + result["seconds"]["ekfac_correction"]
    assert result["seconds"]["ekfac_fit"] == pytest.approx(fit)
    assert result["flop_floor"] == {str(p): bench.flop_floor(one, 16, p) for p in (3, 2)}
    shown = bench.table(result)
    assert all(name in shown for name in programs) and "part attention:1" in shown
    parts = dict(result["parts"])
    total = parts.pop("sum")
    assert total == pytest.approx(sum(parts.values()))
    assert {"attention:1", "norm:3", "activation:1", "head:1", "embedding:1"} <= set(parts)
    assert result["value_and_grad_to_parts"] == pytest.approx(whole / total)


def test_only_what_is_asked_for_is_timed(monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "tiny", TINY)
    result = bench.bench("tiny", 2, 16, (3,), 1, ["forward"], parts=False, execution=Execution())
    assert set(result["seconds"]) == {"forward", "value_and_grad"}


@pytest.mark.parametrize("batch, length, dim, repeats", [
    (0, 16, 3, 1), (2, 1, 3, 1), (2, 1025, 3, 1), (2, 16, 0, 1), (2, 16, -1, 1), (2, 16, 3, 0),
])  # fmt: skip
def test_impossible_sizes_are_refused(batch, length, dim, repeats):
    with pytest.raises(InputError, match="--length must be 2 to 1024"):
        bench.bench("tiny", batch, length, (dim,), repeats, [], False, Execution())
