"""GPT-2's own two files, from tiktoken's cache or from where tiktoken downloads them.

tiktoken's loader waits for the network without a limit and deletes a cached file that fails its
hash; this one does neither, but reads and fills the same cache.
"""

import hashlib
import http.client
import os
import tempfile
import urllib.request
from pathlib import Path

from tokenizers.files import TokenizerError, write_atomic

URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
TIMEOUT_SECONDS = 10


def fetch() -> dict[str, bytes]:
    """vocab.bpe and encoder.json. Raises TokenizerError where neither cache nor network has one."""
    return {name: _fetch(name) for name in SHA256}


def cache_name(name: str) -> str:
    """What tiktoken's cache calls the file: the sha1 of its address."""
    return hashlib.sha1((URL + name).encode()).hexdigest()


def _cache_folder() -> Path | None:
    """tiktoken's rule; an empty variable turns the cache off."""
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", default))
    return Path(folder) if folder else None


def _fetch(name: str) -> bytes:
    folder = _cache_folder()
    cached = folder / cache_name(name) if folder else None
    problem = "the cache is off" if cached is None else f"{cached} does not exist"
    if cached is not None and cached.is_file():
        content = cached.read_bytes()
        if _intact(name, content):
            return content
        problem = f"{cached} has the wrong sha256"
    try:
        with urllib.request.urlopen(URL + name, timeout=TIMEOUT_SECONDS) as response:
            content = response.read()
        if not _intact(name, content):
            raise OSError("what arrived has the wrong sha256")
    except (OSError, http.client.HTTPException) as error:
        hashes = " and ".join(f"{other} (named {cache_name(other)})" for other in SHA256)
        raise TokenizerError(
            f"cannot get GPT-2's {name}: {problem}, and {URL}{name} gives {error}. Copy {hashes}"
            " to a folder and set TIKTOKEN_CACHE_DIR to it, or pass a folder that holds vocab.bpe"
            " and encoder.json under their own names"
        ) from None
    if cached is not None:
        try:
            write_atomic(cached, content)
        except OSError:
            pass  # a cache that cannot be written costs another download, nothing else
    return content


def _intact(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == SHA256[name]
