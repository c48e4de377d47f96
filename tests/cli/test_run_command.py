"""`run` does again what a record says: the same bytes, in any folder."""

import pytest

from core.files import read_json, write_json

RECORDS = ("rows/pool/command.json", "rows/query/command.json", "runs/base/config.json",
           "eval/base/command.json", "store/config.json", "scores/config.json",
           "from_store/config.json", "subsets/matched-random/command.json", "runs/top/config.json",
           "hf/command.json", "model/command.json")  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_replays_to_the_same_bytes_from_any_folder(
    chain, run, outputs, record, tmp_path, monkeypatch
):
    folder, _ = chain
    monkeypatch.chdir(tmp_path)
    assert "already" in run("run", folder / record)
    run("run", folder / record, "--out", "again/here")
    assert outputs(tmp_path / "again/here") == outputs((folder / record).parent)


def test_a_file_replays_to_the_same_bytes(chain, run, tmp_path):
    folder, _ = chain
    assert "already" in run("run", folder / "deep/er/nll.json")
    run("run", folder / "deep/er/nll.json", "--out", tmp_path / "again.npy")
    assert (tmp_path / "again.npy").read_bytes() == (folder / "deep/er/nll.npy").read_bytes()


def test_a_record_written_by_hand_may_leave_out_what_is_default(chain, run, outputs, tmp_path):
    folder, _ = chain
    record = read_json(folder / "runs/base/config.json")
    short = {name: value for name, value in record["options"].items() if value not in (0, False)}
    assert len(short) < len(record["options"])
    for name in ("model", "optimizer", "beta2", "layers"):
        del short[name]
    write_json(tmp_path / "record.json", {"command": "train lm", "options": short | {"clip": None}})
    run("run", tmp_path / "record.json", "--out", tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(folder / "runs/base")


def test_a_changed_record_is_another_run(chain, run, refuse, outputs, tmp_path):
    folder, _ = chain
    record = read_json(folder / "scores/config.json")
    record["options"]["unit_norm"] = False
    write_json(tmp_path / "record.json", record)
    assert "unit_norm=True" in refuse("run", tmp_path / "record.json")
    run("run", tmp_path / "record.json", "--out", tmp_path / "out")
    assert outputs(tmp_path / "out")["scores.npy"] != outputs(folder / "scores")["scores.npy"]
