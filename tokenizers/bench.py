"""How fast a tokenizer is: text to ids and back, on one core, and from files to first ids.

Whole documents of about 4 kB go through `Tokenizer.encode` one after the other, as in `data text`.
Of each document the best of several repeats counts: others on the machine can only slow one down.
"""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.files import TokenizerError

DOCUMENT_BYTES = 4096
SAMPLE_BYTES = 4_000_000
SAMPLE = """\
The river that feeds the town rises in the hills above it, and it has been there for longer than
the town has. In 1851 there were 12 mills on it; in 2024 there was 1, at 51.4778 north.
"What's that?" she'd asked. He'd said: "That's the weir -- where the river's turned, isn't it?"

Der Fluß fließt über die Wiesen, und die Mühle mahlt größere Körner für die Bäcker der Städte.
L'été, la rivière s'élève à peine ; où l'eau coulait, il n'y a plus que des pierres désséchées.
Река течёт через город и поле, а мельница стоит у реки. 川は町を流れて、水車は川のそばにある。

    def flow(river, mills):
        total = 0
        for mill in mills:
            if mill.open and not mill.closed:
                total += mill.rate * river.depth  # litres a second
        return total
"""


def bench(
    path_or_name: str | Path, text: str | bytes | Path | None, repeats: int
) -> dict[str, Any]:
    """MB/s of UTF-8 both ways, seconds of a load, bytes a token, size of the vocabulary.

    text: itself or a file; default: a sample in four languages and code, repeated, every copy with
    words of its own. A load ends with the first ids. Cold: without the caches of `tokenizers.cache`
    and of the Python process; warm: with the former.
    """
    if isinstance(text, Path):
        text = text.read_bytes()
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    documents = _documents(sample() if text is None else text)
    if not documents or repeats < 1:
        raise TokenizerError("the text is empty, or repeats is not positive: give it some text")
    tokenizer = tokenizers.load(path_or_name)
    size = sum(len(document.encode()) for document in documents)
    ids = [tokenizer.encode(document) for document in documents]

    def load(place: str | Path) -> None:
        tokenizers.load(place).encode("The first ids.")

    with tempfile.TemporaryDirectory() as empty, _cache(empty):
        cold = _seconds(load, [path_or_name], 1)
        warm = _seconds(load, [path_or_name], repeats)
    return {
        "tokenizer": tokenizer.name,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "documents": len(documents),
        "bytes": size,
        "bytes_per_token": size / sum(len(row) for row in ids),
        "encode_mb_per_second": size / 1e6 / _seconds(tokenizer.encode, documents, repeats),
        "decode_mb_per_second": size / 1e6 / _seconds(tokenizer.decode, ids, repeats),
        "load_seconds": {"cold": cold, "warm": warm},
    }


def sample() -> str:
    """About 4 MB, the same everywhere."""
    copies = SAMPLE_BYTES // len(SAMPLE.encode())
    return "".join(SAMPLE.replace("river", f"river {n:x}") for n in range(copies))


def _documents(text: str) -> list[str]:
    """Pieces of whole lines, as long as 4 kB or the line at their end makes them."""
    documents, part, size = [], [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        size += len(line.encode("utf-8", "replace"))
        if size >= DOCUMENT_BYTES:
            documents.append("".join(part))
            part, size = [], 0
    return documents + (["".join(part)] if part else [])


def _seconds(function: Callable[[Any], Any], inputs: Sequence[Any], repeats: int) -> float:
    """The sum over inputs of the shortest of repeats."""
    best = [math.inf] * len(inputs)
    for _ in range(repeats):
        for n, value in enumerate(inputs):
            began = time.perf_counter()
            function(value)
            best[n] = min(best[n], time.perf_counter() - began)
    return sum(best)


@contextlib.contextmanager
def _cache(folder: str) -> Iterator[None]:
    before = os.environ.get("TAPROOT_CACHE")
    os.environ["TAPROOT_CACHE"] = folder
    try:
        yield
    finally:
        del os.environ["TAPROOT_CACHE"]
        if before is not None:
            os.environ["TAPROOT_CACHE"] = before


def table(result: dict[str, Any]) -> str:
    """The result for people."""
    load = result["load_seconds"]
    return "\n".join(
        [
            f"{result['tokenizer']}: {result['vocab_size']:,} ids,"
            f" {result['documents']:,} documents, {result['bytes'] / 1e6:.1f} MB,"
            f" {result['bytes_per_token']:.2f} bytes a token",
            f"encode  {result['encode_mb_per_second']:8.1f} MB/s",
            f"decode  {result['decode_mb_per_second']:8.1f} MB/s",
            f"load    {load['cold']:8.2f} s cold, {load['warm']:.2f} s warm",
        ]
    )
