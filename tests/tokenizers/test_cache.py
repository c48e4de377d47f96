"""The cache of compiled tokenizers: the same as without it, and never believed."""

from pathlib import Path

import pytest

from tokenizers import cache, gemma, load

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
MODEL, JSON = GOLDEN / "gemma" / "tokenizer.model", GOLDEN / "gemma" / "tokenizer.json"
TEXT = "The  mill's\n\n\tpond é水🌊 \u2581\u2581\u2581<b>x</b><bos><start_of_turn>"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("path", [MODEL, JSON])
def test_from_the_cache_it_is_the_same(path, own_cache, monkeypatch):
    first = load(path)
    assert len(files_in(own_cache)) == 1
    monkeypatch.setattr(gemma, "_compiled", None)  # not called again
    again = load(path)
    assert again.fingerprint == first.fingerprint and again.pieces == first.pieces
    for special in (False, True):
        expected = first.encode(TEXT, special).tolist()
        assert again.encode(TEXT, special).tolist() == expected


def test_a_cache_that_is_not_this_files_is_not_read(own_cache, monkeypatch):
    expected = load(JSON).encode(TEXT).tolist()
    (of_json,) = files_in(own_cache)
    load(MODEL)
    (of_model,) = set(files_in(own_cache)) - {of_json}
    whole, other = of_json.read_bytes(), of_model.read_bytes()
    wrong = [b"", b"x", whole[:-1], whole[:200], whole + b"x", other, b"\x80\x04K\x01.", whole[1:]]
    wrong += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (0, 30, 120, 5000)]
    compiled = gemma._compiled
    calls = []

    def counted(source, content):
        calls.append(source)
        return compiled(source, content)

    monkeypatch.setattr(gemma, "_compiled", counted)
    for content in wrong:
        of_json.write_bytes(content)
        assert load(JSON).encode(TEXT).tolist() == expected
        assert of_json.read_bytes() == whole  # and is mended
    assert len(calls) == len(wrong)


def test_another_file_or_other_code_has_another_place(tmp_path):
    code = tmp_path / "code.py"
    code.write_text("one")
    first = cache.key(b"content", code)
    assert first == cache.key(b"content", code) and first != cache.key(b"other", code)
    code.write_text("two")
    assert first != cache.key(b"content", code)
    assert {Path(gemma.__file__).with_name(f"{n}.py") for n in ("merges", "table")} < {*gemma.CODE}


def test_a_cache_that_cannot_be_used_only_costs_time(tmp_path, monkeypatch):
    expected = load(MODEL).encode(TEXT).tolist()
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "inside"):
        monkeypatch.setenv("TAPROOT_CACHE", str(place))
        assert load(MODEL).encode(TEXT).tolist() == expected
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    monkeypatch.setenv("TAPROOT_CACHE", str(tmp_path / "full"))
    assert load(MODEL).encode(TEXT).tolist() == expected
    assert files_in(tmp_path / "full" / "tokenizers") == []


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("TAPROOT_CACHE", "")
    assert cache.path_of("k") is None
    monkeypatch.delenv("TAPROOT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.path_of("k") == Path("/x/taproot/tokenizers/k.npz")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.path_of("k") == Path("/home/someone/.cache/taproot/tokenizers/k.npz")
