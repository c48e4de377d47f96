"""Conversations to rows: one row each, trained on what the assistant wrote.

A record of a .jsonl, .json or .parquet file holds its messages in one field, as a list of
{"role", "content"} or {"from", "value"} (ShareGPT's names), or a question and its answer in two.
Rows longer than `length` keep their first tokens; a row is left out, and counted, if nothing of it
is trained (`dropped_untrained`) or its tokens cannot be traced to its characters
(`dropped_unaligned`). A malformed conversation stops the command, or is left out and counted
(`dropped_malformed`) on request.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import PathLike, sha256_file
from core.progress import Progress
from core.rows import IGNORED, Row, write_rows
from tokenizers import Tokenizer
from tokenizers.chat import ChatError, Unaligned, encode
from tokenizers.templates import template as template_of
from training.data.records import (
    JSONL,
    ORIGIN,
    PARQUET,
    Kept,
    Record,
    check_files,
    origin,
    read_records,
)

SHAREGPT = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Fields:
    """Where a record holds its conversation: all messages, or (if both are named) two texts."""

    messages: str = "messages"
    prompt: str | None = None
    answer: str | None = None


def build_chat_rows(
    files: Sequence[PathLike],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    template: str | None = None,
    fields: Fields = Fields(),
    train_newline: bool = False,
    drop_malformed: bool = False,
    keep: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the files' conversations, in order, into the rows folder `out`; returns `rows.json`.

    length: most tokens of a row. template: of `tokenizers.templates`, by default the tokenizer's
    own. train_newline: also train the newline after an assistant's end of turn. Columns: source and
    doc, as for texts, and those of the records named in `keep`. The counts are also given for each
    source.
    """
    paths = [Path(file) for file in files]
    check_files(paths, (*JSONL, PARQUET))
    if length < 2:
        raise InputError(f"--length must be at least 2 (one token predicts the next), got {length}")
    if (fields.prompt is None) != (fields.answer is None):
        raise InputError("give both --prompt-field and --answer-field, or neither")
    form = template_of(tokenizer, template)
    sources: dict[str, Counter[str]] = {}
    kept = Kept(paths, keep)

    def rows(bar: Progress) -> Iterator[Row]:
        done = tokens = 0
        for path in paths:
            for record in read_records(path, (*ORIGIN, *_names(fields), *keep)):
                source, doc = origin(path, record)
                counts = sources.setdefault(source, Counter())
                counts["conversations"] += 1
                try:
                    messages = conversation(record, fields)
                    made = encode(tokenizer, messages, form, length, train_newline)
                except ChatError as error:
                    if not drop_malformed:
                        raise InputError(f"{path} {record.where}: {error}") from None
                    counts["dropped_malformed"] += 1
                    continue
                except Unaligned:
                    counts["dropped_unaligned"] += 1
                    continue
                trained = int((made.labels[1:] != IGNORED).sum())
                if not trained:
                    counts["dropped_untrained"] += 1
                    continue
                counts.update(rows=1, tokens=len(made.input_ids), trained=trained)
                counts["truncated"] += made.cut > 0
                tokens += len(made.input_ids)
                columns = {"source": source, "doc": doc, **kept.of(path, record)}
                yield Row(made.input_ids, made.labels, columns)
                bar.update((done + record.end) // 1000 - bar.done, tokens=f"{tokens:,}")
            done += path.stat().st_size
        if not tokens:
            raise InputError(f"no conversation of {paths[0]} makes a row: {_told(_sum(sources))}")

    def info() -> dict[str, Any]:
        counts = _sum(sources)
        return {
            "kind": "chat",
            "template": form.name,
            "length": length,
            "train_newline": train_newline,
            **counts,
            "trained_share": counts["trained"] / counts["tokens"],
            "sources": sources,
            "files": [{"path": str(path), "sha256": sha256_file(path)} for path in paths],
        }

    with Progress(sum(path.stat().st_size for path in paths) // 1000, "tokenise", "kB") as bar:
        types = {"source": "string", "doc": "string", **kept.types}
        return write_rows(out, rows(bar), types, tokenizer.fingerprint, info)


def _names(fields: Fields) -> list[str]:
    if fields.prompt is None or fields.answer is None:
        return [fields.messages]
    return [fields.prompt, fields.answer]


def conversation(record: Record, fields: Fields) -> list[dict[str, Any]]:
    """The messages of a record, by "role" and "content". Raises ChatError if it has none."""
    found = []
    for name in _names(fields):
        if record.value.get(name) is None:
            raise ChatError(
                f"there is no field {name!r}: name the one that holds the conversation"
                " (--messages-field, or --prompt-field and --answer-field)"
            )
        found.append(record.value[name])
    if len(found) == 2:
        return [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant"), found, strict=True)
        ]
    if not isinstance(found[0], list) or not all(isinstance(m, dict) for m in found[0]):
        raise ChatError(
            f"{fields.messages!r} is no list of messages: each needs a role and a content"
        )
    return [_message(number, message) for number, message in enumerate(found[0])]


def _message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    if message.get("tool_calls"):
        raise ChatError(f"message {number} calls a tool: no template here can render that")
    if "role" in message or "from" not in message:
        return {"role": message.get("role"), "content": message.get("content")}
    role = message["from"]
    role = SHAREGPT.get(role, role) if isinstance(role, str) else role
    return {"role": role, "content": message.get("value")}


def _sum(sources: dict[str, Counter[str]]) -> dict[str, int]:
    names = ("conversations", "rows", "tokens", "trained", "truncated", "dropped_untrained",
             "dropped_unaligned", "dropped_malformed")  # fmt: skip
    return {name: sum(counts[name] for counts in sources.values()) for name in names}


def _told(counts: dict[str, int]) -> str:
    parts = [f"{name} {count}" for name, count in counts.items() if count]
    return ", ".join(parts) or "the files hold none"
