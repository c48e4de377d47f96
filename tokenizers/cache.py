"""Arrays that take seconds to make from a file, kept on disk under a hash of that file.

In $TAPROOT_CACHE (empty: no cache), else $XDG_CACHE_HOME/taproot, else ~/.cache/taproot. A file
that is damaged, or was made from something else or by other code, counts as absent, and so does a
folder that cannot be read or written.
"""

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tokenizers.files import write_atomic

MAGIC = b"taproot tokenizer table"


def key(content: bytes, *made_by: Path) -> str:
    """sha256 hex of content and of the code that makes the arrays of it."""
    digest = hashlib.sha256(content)
    for path in made_by:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def folder() -> Path | None:
    """Where caches of all kinds lie; None: nowhere."""
    named = os.environ.get("TAPROOT_CACHE")
    if named is not None:
        return Path(named) if named else None
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "taproot"


def path_of(key: str) -> Path | None:
    base = folder()
    return base / "tokenizers" / f"{key}.npz" if base else None


def read(key: str) -> dict[str, np.ndarray] | None:
    path = path_of(key)
    try:
        content = path.read_bytes() if path else b""
    except OSError:
        return None
    header = len(_header(key, b""))
    if content[:header] != _header(key, content[header:]):
        return None
    with np.load(io.BytesIO(content[header:]), allow_pickle=False) as arrays:
        return dict(arrays)


def write(key: str, arrays: Mapping[str, np.ndarray]) -> None:
    path = path_of(key)
    if path is None:
        return
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    content = buffer.getvalue()
    try:
        write_atomic(path, _header(key, content) + content)
    except OSError:
        pass  # a cache that cannot be written costs the next load seconds, nothing else


def _header(key: str, content: bytes) -> bytes:
    return b"%s\n%s\n%s\n" % (MAGIC, key.encode(), hashlib.sha256(content).hexdigest().encode())
