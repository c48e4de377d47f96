"""The house: which folder may import which, and what nobody imports."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import tokenizers

ROOT = Path(__file__).parents[1]
ARROWS = {
    "core": set(),
    "tokenizers": set(),
    "training": {"core", "tokenizers"},
    "evals": {"core", "tokenizers"},
    "sae": {"core"},
    "attribution": {"core", "training"},
}
ROOMS = {*ARROWS, "cli", "tests"}
FILES = sorted(
    f
    for f in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in f.relative_to(ROOT).parts)
)


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level name, whether it is imported when the file is) of every import in a file."""
    tree = ast.parse(path.read_text())
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        else:
            continue
        yield from ((name.split(".")[0], id(node) not in inside) for name in names)


def files(room: str) -> list[Path]:
    found = [f for f in FILES if f.relative_to(ROOT).parts[0] == room]
    assert found, room
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_arrows(room):
    for path in files(room):
        ours = {name for name, _ in imports(path)} & (ROOMS - {room})
        assert ours <= ARROWS[room], f"{path.relative_to(ROOT)} imports {ours - ARROWS[room]}"


def test_nobody_imports_the_tests_or_the_door():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "tests":
            assert not {name for name, _ in imports(path)} & {"tests", "cli"}, path


def test_nothing_of_torch():
    """Only the scripts that make golden numbers, which run in an environment of their own."""
    for path in FILES:
        if path.match("tests/golden/*/make_*.py") or path.match("tests/golden/make_*.py"):
            continue
        names = {name for name, _ in imports(path)}
        assert not names & {"torch", "transformers", "safetensors"}, path


def test_only_declared_packages():
    """Run time needs nothing beyond requirements.in, and pickles nothing.

    But one file runs in the environment of lm-eval, and imports nothing of ours.
    """
    declared = {
        "jax", "flax", "optax", "orbax", "tiktoken", "datasets", "numpy", "grain", "tensorboardX",
        "click", "pyarrow", "ml_dtypes",  # the public types of datasets and of jax
        "huggingface_hub",  # how datasets itself reaches the Hub
    }  # fmt: skip
    standard = set(sys.stdlib_module_names) - {"pickle", "shelve", "marshal"}
    for room in (*ARROWS, "cli.py"):
        for path in files(room):
            names = {name for name, _ in imports(path)} - ROOMS - standard
            if path.name == "lm_eval_adapter.py":
                assert names == {"lm_eval"} and not ROOMS & {name for name, _ in imports(path)}
                continue
            assert names <= declared, f"{path.relative_to(ROOT)} imports {names - declared}"


def test_the_door_opens_at_once():
    """`--help` loads nothing heavy: the door and what its commands share import click alone."""
    light = {"click"} | set(sys.stdlib_module_names)
    rooms = {"core", "attribution", "training", "evals", "sae"}
    commands = {file: rooms for file in (ROOT / "attribution/commands").iterdir()}
    doors = {
        ROOT / "cli.py": rooms,
        ROOT / "core/command.py": set(),
        ROOT / "training/options.py": {"core"},
        ROOT / "evals/commands.py": {"core"},
        ROOT / "evals/bench_commands.py": {"core"},
        ROOT / "evals/probe/commands.py": {"core"},
        ROOT / "sae/commands.py": {"core", "sae"},
        ROOT / "sae/training/options.py": {"core"},
    }
    for file, also in (commands | doors).items():
        if file.suffix == ".py":
            top = {name for name, at_start in imports(file) if at_start}
            assert top <= light | also, file
    code = (
        "import sys, cli, click.testing\n"
        "assert click.testing.CliRunner().invoke(cli.cli, ['--help']).exit_code == 0\n"
        "print(*{name.split('.')[0] for name in sys.modules})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    heavy = {"jax", "datasets", "orbax", "grain", "tensorboardX", "numpy", "flax", "optax"}
    assert loaded.returncode == 0 and not heavy & set(loaded.stdout.split()), loaded


BARE = """
import importlib, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"datasets", "grain", "orbax", "tensorboardX", "pyarrow"}:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
for name in sys.argv[1:]:
    importlib.import_module(name)
from attribution.gradients import example_gradients, projections
from attribution.targets import Spec
from core import families, schema
from core.config import Execution, ModelConfig
import jax.numpy as jnp
config = ModelConfig("gpt2", 8, 4, 4, 1, 1, 4, 4)
params = schema.init(families.rows(config), 1, 0)
ids_BT = jnp.ones((2, 4), jnp.int32)
spec = Spec()
aux, variables = projections(config, spec), {"params": params}
example_gradients(config, Execution(), spec, variables, aux, ids_BT, ids_BT)
"""


def test_the_compute_core_needs_no_data_packages():
    """A bare accelerator image with jax, flax, optax, numpy and click runs the benchmarks."""
    names = [
        "core.model", "core.loss", "core.linear", "core.schema", "core.config", "core.families",
        "core.sharding", "training.step", "training.optim", "attribution.gradients",
        "attribution.bench", "attribution.magic.bench", "core.generate", "evals.bench",
        "evals.bench_scorer", "sae.coder", "sae.pooling", "sae.training.step", "sae.bench",
    ]  # fmt: skip
    command = [sys.executable, "-c", BARE, *names]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_our_tokenizers_are_meant():
    assert Path(tokenizers.__file__).is_relative_to(ROOT)


def test_no_installed_package_has_one_of_our_names():
    """Installed beside us, `tokenizers` of another project would be found instead of ours."""
    taken = metadata.packages_distributions()
    assert not {name: taken[name] for name in ROOMS & taken.keys()}
