"""Text files to rows.

Documents come from .txt (the file, or its paragraphs), .jsonl/.json (one object with "text" a line)
and .parquet (a "text" column); "source" and "doc" (or "id") name where they are from. Every
document is framed for the tokenizer at hand and then packed:

    concat     all documents on end, cut every `length` tokens; the last row may be shorter.
               Frame: BOS before each document if the tokenizer wants BOS, else EOS after each.
    document   a document begins a row and is cut every `length` tokens; rows keep their own length.
               Frame: EOS after each document, and BOS before it if the tokenizer wants it.

No token is lost, except that a row of one token predicts nothing and is left out (and counted).
Text that spells a control token is ordinary text here.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike, sha256_file
from core.progress import Progress
from core.rows import Row, write_rows
from tokenizers import Tokenizer, mul_facts
from training.data.records import (
    JSONL,
    ORIGIN,
    PARQUET,
    Kept,
    check_files,
    origin,
    read_lines,
    read_records,
)

Pack = Literal["concat", "document"]
Split = Literal["file", "blank"]


class Document(NamedTuple):
    """A text and where it is from; `end`: bytes of its file read so far."""

    text: str
    source: str
    doc: str
    end: int
    kept: dict[str, Any]


class Frame(NamedTuple):
    """The ids put before and after every document; None = nothing."""

    before: int | None
    after: int | None


class Piece(NamedTuple):
    """Tokens [T] of one document, its number and where it is from."""

    ids: np.ndarray
    number: int
    source: str
    doc: str
    kept: dict[str, Any]


def build_text_rows(
    files: Sequence[PathLike],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    pack: Pack = "concat",
    split: Split = "file",
    inject_facts: bool = False,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the files' documents, in order, into the rows folder `out`; returns its `rows.json`.

    length: most tokens of a row. split: what a document of a .txt file is, all of it or each run
    of lines between `blank` ones. Columns: source (default: the file's name without suffix) and doc
    (default: the file, and the line or row), and those of the records named in `keep`, of a row's
    first token; documents: where in the row
    each of its documents starts, the number it has among all, and its source and doc. Every token
    is supervised. inject_facts: rewrite products as the tokens of `tokenizers.mul_facts`, which
    must be there.
    """
    paths = [Path(file) for file in files]
    check_files(paths, tuple(READERS))
    if length < 2:
        raise InputError(f"--length must be at least 2 (one token predicts the next), got {length}")
    fact = next(iter(mul_facts.FACTS.values()))
    if inject_facts and len(tokenizer.encode(fact)) != 1:
        raise InputError(f"tokenizer {tokenizer.name} has no token {fact} for --inject-facts; use "
                         "gpt2-mul")  # fmt: skip
    around = frame(tokenizer, pack)
    kept = Kept(paths, keep)
    counts = Counter(documents=0, empty_documents=0, long_documents=0, dropped_tokens=0, facts=0)

    def rows(bar: Progress) -> Iterator[Row]:
        documents = _documents(paths, split, kept, counts)
        if inject_facts:
            documents = (_injected(document, counts) for document in documents)
        pieces = _encode(documents, tokenizer, around, length, counts, bar)
        some = False
        for parts in (concat if pack == "concat" else by_document)(pieces, length):
            ids = np.concatenate([part.ids for part in parts])
            if len(ids) > 1:
                some = True
                yield Row(ids, ids, _columns(parts))
            else:
                counts["dropped_tokens"] += 1
        if not some:
            raise InputError(f"{paths[0]}: a single token cannot be a row; give more text")

    def info() -> dict[str, Any]:
        return {
            "kind": "text",
            "length": length,
            "pack": pack,
            "split": split,
            "inject_facts": inject_facts,
            "bos": around.before is not None,
            "eos": around.after is not None,
            **counts,
            "files": [{"path": str(path), "sha256": sha256_file(path)} for path in paths],
        }

    with Progress(sum(path.stat().st_size for path in paths) // 1000, "tokenise", "kB") as bar:
        return write_rows(out, rows(bar), {**_types(), **kept.types}, tokenizer.fingerprint, info)


def _types() -> dict[str, Any]:
    import pyarrow as pa

    numbers = {"start": pa.int32(), "number": pa.int32()}
    texts = dict.fromkeys(("source", "doc"), pa.string())
    return {**texts, "documents": pa.list_(pa.struct({**numbers, **texts}))}


def _columns(parts: Sequence[Piece]) -> dict[str, Any]:
    starts = np.cumsum([0, *(len(part.ids) for part in parts)]).tolist()
    documents = [
        {"start": start, "number": number, "source": source, "doc": doc}
        for start, (_, number, source, doc, _) in zip(starts, parts, strict=False)
    ]
    first = parts[0]
    return {"source": first.source, "doc": first.doc, "documents": documents, **first.kept}


def frame(tokenizer: Tokenizer, pack: Pack) -> Frame:
    """What the tokenizer's model needs around a document."""
    before = tokenizer.bos if tokenizer.add_bos else None
    if before is not None and pack == "concat":
        return Frame(before, None)
    if tokenizer.eos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no EOS to put between documents")
    return Frame(before, tokenizer.eos)


def _documents(
    paths: Sequence[Path], split: Split, kept: Kept, counts: Counter[str]
) -> Iterator[Document]:
    """The documents of all files that hold text; `end` counts the bytes of all files so far."""
    read = 0
    for path in paths:
        some = False
        for document in READERS[path.suffix](path, split, kept):
            if document.text.strip():
                some = True
                yield document._replace(end=read + document.end)
            else:
                counts["empty_documents"] += 1
        if not some:
            raise InputError(f"{path} holds no text")
        read += path.stat().st_size


def _injected(document: Document, counts: Counter[str]) -> Document:
    text = mul_facts.inject(document.text)
    counts["facts"] += text.count("<MUL_") - document.text.count("<MUL_")
    return document._replace(text=text)


def _encode(
    documents: Iterator[Document],
    tokenizer: Tokenizer,
    around: Frame,
    length: int,
    counts: Counter[str],
    bar: Progress,
) -> Iterator[Piece]:
    before, after = (np.array([] if i is None else [i], np.int32) for i in around)
    tokens = 0
    for text, source, doc, end, kept in documents:
        ids = np.concatenate([before, tokenizer.encode(text), after])
        yield Piece(ids, counts["documents"], source, doc, kept)
        tokens += len(ids)
        counts["documents"] += 1
        counts["long_documents"] += len(ids) > length
        bar.update(end // 1000 - bar.done, tokens=f"{tokens:,}")


def concat(pieces: Iterator[Piece], length: int) -> Iterator[list[Piece]]:
    """Rows of `length` tokens from all pieces on end; what is left at the end is the last row."""
    parts, filled = [], 0
    for piece in pieces:
        start = 0
        while start < len(piece.ids):
            parts.append(piece._replace(ids=piece.ids[start : start + length - filled]))
            start, filled = start + len(parts[-1].ids), filled + len(parts[-1].ids)
            if filled == length:
                yield parts
                parts, filled = [], 0
    if parts:
        yield parts


def by_document(pieces: Iterator[Piece], length: int) -> Iterator[list[Piece]]:
    """Every piece cut into rows of `length` tokens, its last row shorter."""
    for piece in pieces:
        for start in range(0, len(piece.ids), length):
            yield [piece._replace(ids=piece.ids[start : start + length])]


def _read_txt(path: Path, split: Split, kept: Kept) -> Iterator[Document]:
    none = dict.fromkeys(kept.kinds)
    part, first, end = [], 1, 0
    for number, line, offset in read_lines(path):
        if split == "file" or line.strip():
            if not part:
                first = number
            part.append(line)
            end = offset
        elif part:
            text = "".join(part).rstrip("\r\n")
            yield Document(text, path.stem, f"{path}:{first}", end, none)
            part = []
    if part:
        whole = split == "file"
        text = "".join(part) if whole else "".join(part).rstrip("\r\n")
        yield Document(text, path.stem, str(path) if whole else f"{path}:{first}", end, none)


def _read_records(path: Path, split: Split, kept: Kept) -> Iterator[Document]:
    for record in read_records(path, ("text", *ORIGIN, *kept.kinds)):
        text = record.value.get("text")
        if not isinstance(text, str):
            raise InputError(f'{path} {record.where} has no "text" with a string')
        yield Document(text, *origin(path, record), record.end, kept.of(path, record))


READERS = {".txt": _read_txt, **dict.fromkeys((*JSONL, PARQUET), _read_records)}
