"""The door itself: help at every level without heavy imports, and real processes in any folder."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

import cli as door

DOOR = Path(__file__).parents[2] / "cli.py"
HEAVY = ("jax", "numpy", "flax", "optax", "orbax", "datasets", "grain", "tiktoken", "tensorboardX",
         "pyarrow")  # fmt: skip


def levels(command: click.Command = door.cli, path: tuple[str, ...] = ()):
    """Every command and group with the words that call it."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from levels(inner, (*path, name))


LEVELS = list(levels())


@pytest.mark.parametrize("path, command", LEVELS, ids=[" ".join(p) for p, _ in LEVELS])
def test_help_explains_the_command_and_every_option(path, command, run, monkeypatch):
    # A command keeps the help option of the first call, which another test may have made directly.
    monkeypatch.setattr(command, "_help_option", None)
    text = run(*path, "--help")
    assert run(*path, "-h") == text
    assert command.help and command.help.splitlines()[0][:40] in " ".join(text.split())
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.opts[0] in text
    if isinstance(command, click.Group):
        assert all(name in text for name in command.commands)


def test_help_imports_nothing_heavy():
    """At all levels in one process, so that it costs nothing to be sure of each."""
    program = (
        "import sys, json, importlib.util\n"
        f"sys.path.insert(0, {str(DOOR.parent)!r})\n"
        "import cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    try:\n"
        "        cli.cli.main([*words, '--help'], 'cli.py')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, words\n"
        f"found = [name for name in {HEAVY} if name in sys.modules]\n"
        "assert not found, found\n"
    )
    paths = json.dumps([path for path, _ in LEVELS])
    done = subprocess.run([sys.executable, "-c", program, paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: cli.py") == len(LEVELS)


def test_the_names_of_the_heavy_modules_are_right():
    assert all(importlib.util.find_spec(name) for name in HEAVY)


def process(*arguments: object, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(DOOR), *map(str, arguments)],
        capture_output=True, text=True, cwd=folder,
    )  # fmt: skip


def test_it_runs_in_any_folder_and_says_what_is_wrong_in_one_line(tmp_path):
    # Names of ours in the current folder are not ours.
    (tmp_path / "core").mkdir()
    (tmp_path / "tokenizers.py").write_text("raise SystemExit('the wrong one')")
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    text = ["data", "text", "a.txt", "--tokenizer", "bytes", "--out"]
    done = process(*text, "rows", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "rows: rows 1, tokens 23, documents 1\n")
    assert done.stderr.count("\n") <= 1  # the last state of the progress line

    done = process(*text, "a.txt", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: a.txt is a file; give a folder for --out\n"


def test_a_damaged_model_is_told_in_one_line(tmp_path, chain):
    shutil.copytree("model", tmp_path / "model")
    weights = tmp_path / "model/params.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    losses = ["eval", "nll", "--model", "model", "--rows", chain[0] / "rows/pool"]
    done = process(*losses, "--out", "x/nll.npy", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: model/params.safetensors is truncated")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


def test_a_success_is_silent_but_for_progress_and_the_summary(tmp_path, chain):
    losses = ["eval", "nll", "--model", "hf", "--rows", "rows/pool", "--out", tmp_path / "nll.npy"]
    done = process(*losses, folder=chain[0])
    assert done.returncode == 0 and done.stdout.count("\n") == 1, done.stderr
    assert all(line.startswith("nll ") for line in done.stderr.splitlines()), done.stderr
