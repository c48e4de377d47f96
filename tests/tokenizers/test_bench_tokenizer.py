"""The tokenizer benchmark: its sample, its counts, and the command."""

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

import cli
from tokenizers import TokenizerError, bench

MODEL = Path(__file__).parents[1] / "golden" / "tokenizers" / "gemma" / "tokenizer.model"


def test_counts_and_rates(monkeypatch, tmp_path):
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path))
    text = "The river's mill\n" * 1000
    result = bench.bench(MODEL, text, 2)
    assert result["bytes"] == len(text) and result["vocab_size"] == 1500
    assert result["documents"] == -(-len(text) // (241 * 17))  # whole lines, 4096 bytes or more
    assert 1 < result["bytes_per_token"] < 17
    assert result["encode_mb_per_second"] > 0 and result["decode_mb_per_second"] > 0
    assert result["load_seconds"]["cold"] > 0 and result["load_seconds"]["warm"] > 0
    assert os.environ["TAPROOT_CACHE"] == str(tmp_path)
    assert len(list(tmp_path.rglob("*.npz"))) == 1  # cold loads are measured elsewhere
    assert "1,500 ids" in bench.table(result)
    assert bench.bench("bytes", b"ab\xff", 1)["bytes"] == 5


def test_the_sample_is_deterministic_and_of_the_right_size():
    assert bench.sample() == bench.sample()
    assert abs(len(bench.sample().encode()) / bench.SAMPLE_BYTES - 1) < 0.05


def test_nothing_to_measure_is_one_clear_error():
    with pytest.raises(TokenizerError, match="the text is empty"):
        bench.bench("bytes", "", 1)


def test_the_command(tmp_path):
    (tmp_path / "text.txt").write_text("Some text.\n" * 500)
    options = ["--text", str(tmp_path / "text.txt"), "--repeats", "1", "--out", str(tmp_path / "o")]
    run = CliRunner().invoke(cli.cli, ["bench", "tokenizer", *options])
    assert run.exit_code == 0, run.output
    assert "bytes: 258 ids, 2 documents, 0.0 MB, 1.00 bytes a token" in run.output
    assert json.loads((tmp_path / "o").read_text())["bytes"] == 5500
    run = CliRunner().invoke(cli.cli, ["bench", "tokenizer", "--text", str(tmp_path / "absent")])
    assert run.exit_code == 2 and "absent" in run.output
