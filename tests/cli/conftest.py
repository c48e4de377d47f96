"""One small world for the command line: texts, items, a two-layer byte model."""

import json
import random
from pathlib import Path
from typing import Any

import click.testing
import jax
import pytest

import cli as door
from core.checkpoint import load_model
from core.files import read_jsonl

STRATEGIES = ("top", "bottom", "random", "matched-random")
ROWS = "--tokenizer bytes --length 32 --out".split()
TRAIN = "--steps 4 --batch 4 --lr 0.01 --save-every 2 --eval-every 2".split()
GRADIENTS = "--projection-dim 4 --unit-norm".split()
MODEL = {"vocab_size": 258, "context": 32, "width": 8, "layers": 2, "heads": 2}


def command(*arguments: object) -> click.testing.Result:
    """Run one command line in this process; an error that is no exit is the test's failure.

    As users run it, without the tests' strict promotion: optax's Adam mixes float32 and int32.
    """
    with jax.numpy_dtype_promotion("standard"):
        result = click.testing.CliRunner().invoke(door.cli, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def run():
    """Run a command line that must succeed; returns what it printed on stdout."""

    def run(*arguments: object) -> str:
        result = command(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture(scope="session")
def refuse():
    """Run a command line that must end with one error line and a code; returns the line."""

    def refuse(*arguments: object, code: int = 2) -> str:
        result = command(*arguments)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output and not result.stdout
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1 and result.stderr.endswith(f"{lines[0]}\n"), result.stderr
        return lines[0]

    return refuse


@pytest.fixture(scope="session")
def write_world():
    """Texts, items and a model config into a folder."""

    def write(folder: Path) -> None:
        draw = random.Random(0)
        words = "the cat sat on a red mat and then ran by".split()
        texts = (" ".join(draw.choice(words) for _ in range(draw.randint(6, 12))) for _ in "ab" * 8)
        lines = [
            {"text": text, "source": "ab"[i % 2], "doc": f"d{i}"} for i, text in enumerate(texts)
        ]
        items = [
            {"context": f"{i} plus 1 is", "choices": [f" {i + 1}", f" {i}"], "label": 0}
            for i in range(4)
        ]
        for name, values in {"texts": lines, "items": items}.items():
            content = "".join(json.dumps(value) + "\n" for value in values)
            (folder / f"{name}.jsonl").write_text(content)
        (folder / "model.json").write_text(json.dumps(MODEL))

    return write


@pytest.fixture(scope="session")
def chained(tmp_path_factory, write_world, run):
    """Every command once, in a folder of its own."""
    folder = tmp_path_factory.mktemp("chain")
    write_world(folder)
    lines = [
        ["data", "text", "texts.jsonl", *ROWS, "rows/pool"],
        ["train", "lm", "--config", "model.json", "--tokenizer", "bytes", "--rows", "rows/pool",
         "--val-rows", "rows/pool", *TRAIN, "--out", "runs/base"],
        ["eval", "nll", "--model", "runs/base", "--rows", "rows/pool", "--out", "deep/er/nll.npy"],
        ["data", "query", "items.jsonl", *ROWS, "rows/query"],
        ["eval", "run", "--model", "runs/base", "--items", "items.jsonl", "--out", "eval/base"],
        ["attribute", "build", "--model", "runs/base", "--rows", "rows/pool",
         "--projection-dim", "4", "--out", "store"],
        *(["attribute", "score", "--model", "runs/base", "--pool", pool, "--query", "rows/query",
           *GRADIENTS, "--out", out]
          for pool, out in (("rows/pool", "scores"), ("store", "from_store"))),
        *(["attribute", "select", "scores", "--rows", "rows/pool", "--k", "4", "--strategy", s,
           "--out", f"subsets/{s}"] for s in STRATEGIES),
        ["train", "lm", "--model", "runs/base", "--rows", "subsets/top", *TRAIN,
         "--out", "runs/top"],
        ["report", "scores"],
        ["convert", "export", "runs/base", "--out", "hf"],
        ["convert", "import", "hf", "--out", "model"],
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return folder, {tuple(line): run(*line) for line in lines}


@pytest.fixture
def chain(chained, monkeypatch):
    """The folder of the chain, which the test is in, and {command line: what it printed}."""
    monkeypatch.chdir(chained[0])
    return chained


@pytest.fixture(scope="session")
def outputs():
    """What a command computed: its files, without the times and places they also record."""
    names = ("scores.npy", "gradients.npy", "losses.npy", "row_diagnostics.jsonl", "items.jsonl",
             "results.json", "selection.json", "rows.json", "model.safetensors")  # fmt: skip

    def outputs(folder: Path) -> dict[str, Any]:
        files = [folder / name for name in names] + sorted(folder.glob("*.arrow"))
        found: dict[str, Any] = {f.name: f.read_bytes() for f in files if f.exists()}
        if (folder / "metrics.jsonl").exists():
            lines = read_jsonl(folder / "metrics.jsonl")
            found["metrics"] = [{**line, "tokens_per_second": None} for line in lines]
        if (folder / "params.safetensors").exists() or (folder / "model").exists():
            found["model"] = load_model(folder).fingerprint
        assert found
        return found

    return outputs
