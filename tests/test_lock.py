"""The environment is what the locks say: ten direct names, every entry pinned and hashed."""

import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
RUNTIME, CUDA, DEV = "requirements.lock", "requirements-cuda.lock", "requirements-dev.lock"
DIRECT = {
    "jax", "flax", "optax", "orbax-checkpoint", "tiktoken", "datasets", "numpy", "grain",
    "tensorboardx", "click",
}  # fmt: skip


class Entry(NamedTuple):
    requirement: Requirement
    hashes: tuple[str, ...]
    direct: bool  # asked for by requirements.in itself

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, str(self.requirement)
        return specifier.version


def read_lock(name: str) -> dict[str, Entry]:
    """{canonical package name: entry}; an entry spans the indented lines below it."""
    entries: dict[str, Entry] = {}
    for text in re.split(r"\n(?=\S)", (ROOT / name).read_text()):
        if text.startswith("#"):
            continue
        requirement = Requirement(text.split("\\", 1)[0])
        key = canonicalize_name(requirement.name)
        assert key not in entries, f"{name} holds {key} twice"
        hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})\b", text))
        entries[key] = Entry(
            requirement, hashes, bool(re.search(r"-r requirements\.in$", text, re.M))
        )
    return entries


def asked_for() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.in").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def test_direct_dependencies_are_the_ten():
    assert asked_for().keys() == DIRECT


def test_lock_was_made_from_the_inputs():
    lock = read_lock(RUNTIME)
    assert {name for name, entry in lock.items() if entry.direct} == DIRECT
    for name, requirement in asked_for().items():
        assert lock[name].version in requirement.specifier, f"{name}: run `make lock`"


@pytest.mark.parametrize("name", [RUNTIME, CUDA, DEV])
def test_every_entry_is_pinned_and_hashed_without_an_address(name):
    for entry in read_lock(name).values():
        assert entry.version and entry.hashes and entry.requirement.url is None, entry
    for path in (ROOT / name, (ROOT / name).with_suffix(".in")):
        assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", path.read_text())


@pytest.mark.parametrize("name", [CUDA, DEV])
def test_other_locks_extend_the_runtime_lock(name):
    other = read_lock(name)
    for key, entry in read_lock(RUNTIME).items():
        assert other[key] == entry, f"{key} differs: run `make lock`"


def test_installed_versions_are_the_pins():
    """Nothing missing, nothing at another version, and nothing that no lock names."""
    found = metadata.distributions()
    installed: dict[str, str] = {canonicalize_name(dist.name): dist.version for dist in found}
    entries = read_lock(DEV) | (read_lock(CUDA) if "jax-cuda12-plugin" in installed else {})
    pinned = {
        name: entry.version
        for name, entry in entries.items()
        if entry.requirement.marker is None or entry.requirement.marker.evaluate()
    }
    for name in ("pip", "setuptools"):  # put there by `python -m venv` itself
        installed.pop(name, None)
    names = sorted(installed.keys() | pinned.keys())
    wrong = [
        f"{name}: installed {installed.get(name)}, pinned {pinned.get(name)}"
        for name in names
        if installed.get(name) != pinned.get(name)
    ]
    assert not wrong, f"run `make setup`, which rebuilds a stale .venv: {wrong}"
