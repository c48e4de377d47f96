"""Output folders: who may write, what is refused by name, what a failed start leaves."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from core.errors import InputError
from core.files import read_json, sha256_file, write_json
from core.rundir import RECORDS, open_run, produce, produce_file

OPTIONS = {"lr": 0.1, "rows": None, "files": ("a", "b")}


def begin(path, options=OPTIONS, fresh=False, **inputs):
    run = open_run(path, "train lm", options, fresh)
    try:
        run.inputs(**(inputs or {"rows": "abc"}))
    except InputError:
        run.close()
        raise
    return run


@pytest.fixture
def worked(tmp_path):
    """A run that has begun its work and was then cut off."""
    with begin(tmp_path / "deep" / "run") as run:
        (run.path / "ckpt").mkdir()
    return run.path


def test_a_whole_run(tmp_path):
    with begin(tmp_path / "run") as run:
        assert run.status is None and not run.done
        (run.path / "ckpt" / "1").mkdir(parents=True)
        (run.path / "ckpt" / "1" / "x").write_text("data")
        run.finish(loss=1.5)
        assert run.done
    config = read_json(run.path / "config.json")
    assert (config["command"], config["options"]["files"]) == ("train lm", ["a", "b"])
    assert read_json(run.path / "inputs.json") == {"rows": "abc"}
    assert read_json(run.path / "env.json")["versions"]["jax"]
    assert read_json(run.path / "DONE") == {"loss": 1.5}
    manifest = read_json(run.path / "manifest.json")
    assert manifest.keys() == {"config.json", "inputs.json", "env.json", "ckpt/1/x"}
    assert manifest["ckpt/1/x"] == {"bytes": 4, "sha256": sha256_file(run.path / "ckpt/1/x")}
    with open_run(run.path, "train lm", OPTIONS) as again:
        assert again.done


def test_one_status_at_a_time(worked):
    with begin(worked) as run:
        for status in ("PREEMPTED", "FAILED", "DONE"):
            run.finish(status)
            assert run.status == status
            assert [n for n in ("DONE", "FAILED", "PREEMPTED") if (worked / n).exists()] == [status]


def test_the_same_command_continues(worked):
    with begin(worked):
        assert (worked / "ckpt").exists()


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"rows": 1}, {"files": ["a"]}, {"new": 1}])
def test_other_options_are_refused_by_name(worked, change):
    with pytest.raises(InputError, match=f"option {next(iter(change))}=.* now it is"):
        begin(worked, {**OPTIONS, **change})
    assert (worked / "ckpt").exists()


def test_other_inputs_are_refused_by_name(worked):
    with pytest.raises(InputError, match="input rows='abc', now it is 'abd'"):
        begin(worked, rows="abd")
    assert read_json(worked / "inputs.json") == {"rows": "abc"}


def test_the_place_may_change(worked, tmp_path):
    os.rename(worked, tmp_path / "moved")
    with begin(tmp_path / "moved", {**OPTIONS, "out": "moved"}):
        pass


def test_foreign_folders_are_refused(worked, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is a file"):
        open_run(tmp_path / "file", "train lm", OPTIONS)
    for fresh in (False, True):
        with pytest.raises(InputError, match="not ours to replace"):
            open_run(tmp_path / "mine", "train lm", OPTIONS, fresh)
        with pytest.raises(InputError, match="holds the output of 'train lm', not of 'sae train'"):
            open_run(worked, "sae train", OPTIONS, fresh)
    assert os.listdir(tmp_path / "mine") == ["thesis.tex"]
    with pytest.raises(InputError, match="cannot be written"):
        open_run(tmp_path / "file" / "run", "train lm", OPTIONS)


def test_fresh_begins_anew_only_when_the_checks_have_passed(worked):
    with open_run(worked, "train lm", {"lr": 9}, fresh=True) as run:
        assert not run.done and (worked / "ckpt").exists()
    assert (worked / "ckpt").exists() and read_json(worked / "config.json")["options"]["lr"] == 0.1
    with begin(worked, {"lr": 9}, fresh=True):
        assert {f.name for f in worked.iterdir()} == set(RECORDS)
    assert not os.listdir(worked), "nothing was done in the new run"


def test_a_start_that_fails_leaves_nothing(tmp_path):
    """So the corrected command may use the same folder."""
    with pytest.raises(InputError, match="bad rows"), open_run(tmp_path / "a/run", "train lm", {}):
        raise InputError("bad rows")
    assert not os.listdir(tmp_path)
    (tmp_path / "given").mkdir()
    with pytest.raises(InputError), open_run(tmp_path / "given", "train lm", {}):
        raise InputError("bad rows")
    assert os.listdir(tmp_path) == ["given"] and not os.listdir(tmp_path / "given")


@pytest.mark.parametrize("names", [["LOCK"], ["LOCK", "config.json", ".env.json.x1.tmp"], RECORDS])
def test_killed_before_any_work(tmp_path, names):
    """Whatever part of a start's records a kill left, another start is welcome."""
    for name in names:
        write_json(tmp_path / "run" / name, {"torn": True})
    with begin(tmp_path / "run", {"lr": 5}) as run:
        (run.path / "ckpt").mkdir()
    assert read_json(run.path / "config.json")["options"] == {"lr": 5}
    assert {f.name for f in run.path.iterdir()} == {*RECORDS, "ckpt"}


HOLD = """
import sys, time
from core.rundir import open_run
with open_run(sys.argv[1], "train lm", {}) as run:
    run.inputs()
    (run.path / "ckpt").mkdir()
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_held_by_another_process_is_refused_until_it_is_killed(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        for fresh in (False, True):
            with pytest.raises(InputError, match="in use by another process"):
                open_run(tmp_path / "run", "train lm", {}, fresh)
        assert (tmp_path / "run" / "ckpt").exists()
        process.send_signal(signal.SIGKILL)
    with open_run(tmp_path / "run", "train lm", {}) as run:
        run.inputs()


def test_a_full_disk_is_named(worked):
    with pytest.raises(InputError, match="disk is full"), begin(worked):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_produce(tmp_path):
    out, other = tmp_path / "deep" / "out", {**OPTIONS, "lr": 1}
    with produce(out, "data text", OPTIONS) as folder:
        assert folder is not None and not out.exists()
        (folder / "x").write_text("1")
    assert sorted(os.listdir(out)) == ["command.json", "x"]
    assert os.listdir(out.parent) == ["out"]
    with produce(out, "data text", OPTIONS) as folder:
        assert folder is None
    with pytest.raises(InputError, match="option lr="), produce(out, "data text", other):
        pass
    with pytest.raises(InputError, match="made by 'data text'"), produce(out, "eval run", OPTIONS):
        pass


def test_produce_file(tmp_path):
    out, other = tmp_path / "deep" / "nll.npy", {**OPTIONS, "lr": 1}
    with produce_file(out, "eval nll", OPTIONS) as file:
        assert file is not None and file.name == "nll.npy"
        file.write_text("1")
        write_json(file.with_suffix(".json"), {"mean": 2})
    assert sorted(os.listdir(out.parent)) == ["nll.json", "nll.npy"]
    assert read_json(out.with_suffix(".json"))["mean"] == 2
    with produce_file(out, "eval nll", OPTIONS) as file:
        assert file is None
    with pytest.raises(InputError, match="option lr="), produce_file(out, "eval nll", other):
        pass


@pytest.mark.parametrize("make", [produce, produce_file])
@pytest.mark.parametrize("error", [InputError("bad"), KeyboardInterrupt()])
def test_what_fails_leaves_nothing(tmp_path, make, error):
    with pytest.raises(type(error)), make(tmp_path / "deep" / "out.npy", "x", {}) as place:
        (place / "x" if place.is_dir() else place).write_text("half")
        raise error
    assert not os.listdir(tmp_path)


def test_produce_refuses_foreign_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for path in (tmp_path / "mine", tmp_path / "mine" / "thesis.tex"):
        with pytest.raises(InputError, match="another --out|folder for --out"):
            with produce(path, "data text", {}):
                pass
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
