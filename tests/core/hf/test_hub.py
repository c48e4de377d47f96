"""Names on the Hub, against the Hub library's own cache layout; there is no network in tests."""

from pathlib import Path

import pytest

from core.errors import InputError
from core.hf import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub's library, which may not reach for the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, repository: str, revision: str, *names: str) -> Path:
    """A repository as the library leaves it after a download."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / revision).write_text(COMMIT)
    folder = place / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_a_name_is_found_in_the_cache(cache):
    folder = put(cache, "google/gemma-3-270m", "main", "config.json", "model.safetensors")
    assert hub.locate("google/gemma-3-270m") == folder


def test_revisions(cache):
    folder = put(cache, "EleutherAI/pythia-70m", "step3000", "config.json")
    assert hub.locate("EleutherAI/pythia-70m@step3000") == folder
    with pytest.raises(InputError, match="pythia-70m is no folder here and cannot be fetched"):
        hub.locate("EleutherAI/pythia-70m")


def test_a_folder_of_that_name_comes_first(cache):
    put(cache, "gpt2", "main", "config.json")
    assert hub.is_name("gpt2")
    Path("gpt2").mkdir()
    assert not hub.is_name("gpt2") and hub.locate("gpt2") == Path("gpt2")


@pytest.mark.parametrize("name", ["google/gemma-3-270m", "gpt2"])
def test_what_cannot_be_had_is_named(cache, name):
    with pytest.raises(InputError, match=f"{name} is no folder here.*give its folder"):
        hub.locate(name)


@pytest.mark.parametrize("path", ["runs/a/b", "/abs/path", "./model", "../model", "model", "a b/c"])
def test_paths_are_no_names(cache, path):
    assert not hub.is_name(path) and hub.locate(path) == Path(path)


def test_a_folder_of_a_repository(cache):
    folder = put(cache, "google/gemma-scope", "main", "a/b/config.json", "a/b/params.safetensors")
    assert hub.locate("google/gemma-scope", ("config.json",), "a/b") == folder / "a/b"
    Path("google/gemma-scope").mkdir(parents=True)
    here = hub.locate("google/gemma-scope", ("config.json",), "a/b")
    assert here == Path("google/gemma-scope/a/b")
