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

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from core.errors import InputError
from core.files import PathLike, sha256_file
from core.progress import Progress
from core.rows import save_rows
from tokenizers import Tokenizer

Pack = Literal["concat", "document"]
Split = Literal["file", "blank"]


class Document(NamedTuple):
    """A text and where it is from; `end`: bytes of its file read so far."""

    text: str
    source: str
    doc: str
    end: int


class Frame(NamedTuple):
    """The ids put before and after every document; None = nothing."""

    before: int | None
    after: int | None


class Piece(NamedTuple):
    """Tokens [T] and the source and doc of the first."""

    ids: np.ndarray
    source: str
    doc: str


def build_text_rows(
    files: Sequence[PathLike],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    pack: Pack = "concat",
    split: Split = "file",
) -> dict[str, Any]:
    """Write the files' documents, in order, into the rows folder `out`; returns its `rows.json`.

    length: most tokens of a row. split: what a document of a .txt file is, all of it or each run
    of lines between `blank` ones. Columns: source (default: the file's name without suffix) and doc
    (default: the file, and the line or row), of a row's first token. Every token is supervised.
    """
    paths = [Path(file) for file in files]
    _check(paths, length)
    around = frame(tokenizer, pack)
    counts = Counter(documents=0, empty_documents=0, long_documents=0)
    with Progress(sum(path.stat().st_size for path in paths) // 1000, "tokenise", "kB") as bar:
        documents = _documents(paths, split, counts)
        pieces = _encode(documents, tokenizer, around, length, counts, bar)
        rows = list((concat if pack == "concat" else by_document)(pieces, length))
    kept = [row for row in rows if len(row.ids) > 1]
    if not kept:
        raise InputError(f"{paths[0]}: a single token cannot be a row; give more text")
    info = {
        "kind": "text",
        "length": length,
        "pack": pack,
        "split": split,
        "bos": around.before is not None,
        "eos": around.after is not None,
        **counts,
        "dropped_tokens": len(rows) - len(kept),
        "files": [{"path": str(path), "sha256": sha256_file(path)} for path in paths],
    }
    columns = {"source": [row.source for row in kept], "doc": [row.doc for row in kept]}
    return save_rows(out, [row.ids for row in kept], None, columns, tokenizer.fingerprint, info)


def _check(paths: Sequence[Path], length: int) -> None:
    if length < 2:
        raise InputError(f"--length must be at least 2 (one token predicts the next), got {length}")
    if not paths:
        raise InputError("no files to tokenise; name at least one")
    for path in paths:
        if path.suffix not in READERS:
            raise InputError(f"{path} has none of the suffixes {', '.join(READERS)}")
        if not path.is_file():
            raise InputError(f"{path} does not exist or is no file")
        if path.stat().st_size == 0:
            raise InputError(f"{path} is empty")


def frame(tokenizer: Tokenizer, pack: Pack) -> Frame:
    """What the tokenizer's model needs around a document."""
    before = tokenizer.bos if tokenizer.add_bos else None
    if before is not None and pack == "concat":
        return Frame(before, None)
    if tokenizer.eos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no EOS to put between documents")
    return Frame(before, tokenizer.eos)


def _documents(paths: Sequence[Path], split: Split, counts: Counter[str]) -> Iterator[Document]:
    """The documents of all files that hold text; `end` counts the bytes of all files so far."""
    read = 0
    for path in paths:
        some = False
        for document in READERS[path.suffix](path, split):
            if document.text.strip():
                some = True
                yield document._replace(end=read + document.end)
            else:
                counts["empty_documents"] += 1
        if not some:
            raise InputError(f"{path} holds no text")
        read += path.stat().st_size


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
    for text, source, doc, end in documents:
        ids = np.concatenate([before, tokenizer.encode(text), after])
        yield Piece(ids, source, doc)
        tokens += len(ids)
        counts["documents"] += 1
        counts["long_documents"] += len(ids) > length
        bar.update(end // 1000 - bar.done, tokens=f"{tokens:,}")


def concat(pieces: Iterator[Piece], length: int) -> Iterator[Piece]:
    """Rows of `length` tokens from all pieces on end; what is left at the end is the last row."""
    parts, filled, first = [], 0, None
    for piece in pieces:
        start = 0
        while start < len(piece.ids):
            first = first or piece
            parts.append(piece.ids[start : start + length - filled])
            start, filled = start + len(parts[-1]), filled + len(parts[-1])
            if filled == length:
                yield first._replace(ids=np.concatenate(parts))
                parts, filled, first = [], 0, None
    if first:
        yield first._replace(ids=np.concatenate(parts))


def by_document(pieces: Iterator[Piece], length: int) -> Iterator[Piece]:
    """Every piece cut into rows of `length` tokens, its last row shorter."""
    for piece in pieces:
        for start in range(0, len(piece.ids), length):
            yield piece._replace(ids=piece.ids[start : start + length])


def _lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """(number, line with its newline, offset of its end in bytes) of a UTF-8 file."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path} is not UTF-8: byte {offset + error.start} (line {number}) is "
                    f"0x{line[error.start]:02x}; convert the file to UTF-8"
                ) from None
            offset += len(line)
            yield number, text, offset


def _read_txt(path: Path, split: Split) -> Iterator[Document]:
    part, first, end = [], 1, 0
    for number, line, offset in _lines(path):
        if split == "file" or line.strip():
            if not part:
                first = number
            part.append(line)
            end = offset
        elif part:
            yield Document("".join(part).rstrip("\r\n"), path.stem, f"{path}:{first}", end)
            part = []
    if part:
        whole = split == "file"
        text = "".join(part) if whole else "".join(part).rstrip("\r\n")
        yield Document(text, path.stem, str(path) if whole else f"{path}:{first}", end)


def _read_jsonl(path: Path, split: Split) -> Iterator[Document]:
    for number, line, end in _lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path} line {number} is not JSON ({error}); write one object a line"
            ) from None
        yield _document(record, path, f"line {number}", number, end)


def _read_parquet(path: Path, split: Split) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = [n for n in ("text", "source", "doc", "id") if n in file.schema_arrow.names]
        rows, size, number = file.metadata.num_rows, path.stat().st_size, 0
        for batch in file.iter_batches(columns=names):
            for record in batch.to_pylist():
                yield _document(record, path, f"row {number}", number, size * (number + 1) // rows)
                number += 1
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read as parquet ({error})") from error


def _document(record: Any, path: Path, where: str, number: int, end: int) -> Document:
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise InputError(f'{path} {where} has no "text" with a string')
    names = (record.get("doc"), record.get("id"), f"{path}:{number}")
    source, doc = record.get("source"), next(name for name in names if name is not None)
    return Document(record["text"], path.stem if source is None else str(source), str(doc), end)


READERS = {
    ".txt": _read_txt, ".jsonl": _read_jsonl, ".json": _read_jsonl, ".parquet": _read_parquet,
}  # fmt: skip
