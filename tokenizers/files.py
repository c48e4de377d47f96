"""A tokenizer's files as {name: content}: found in a folder, parsed, written back whole."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BYTES_MARKER = "bytes_tokenizer.json"
# The files that hold a vocabulary, in the order in which a folder is searched for them.
LAYOUTS = (
    (BYTES_MARKER,),
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.bpe", "encoder.json"),
    ("vocab.json", "merges.txt"),
)
# What may lie beside them: what tells bos, eos and pad, strongest first, and a chat's template.
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "added_tokens.json",
          "chat_template.jinja")  # fmt: skip
SURROGATE = re.compile("[\ud800-\udfff]")


class TokenizerError(ValueError):
    """A tokenizer file, path or token id that cannot be used; says which, and what to do."""


def read_files(path: Path) -> tuple[Path, dict[str, bytes]]:
    """The folder, and the content of each file of its first complete layout and of BESIDE."""
    if path.is_dir():
        folder, names = path, _layout_in(path)
    elif path.is_file():
        folder = path.parent
        names = next((names for names in LAYOUTS if path.name in names), None)
    else:
        raise TokenizerError(
            f'there is no tokenizer at {path}: pass a folder, a file, or the name "bytes" or "gpt2"'
        )
    files = {} if names else {"tokenizer.json": path.read_bytes()}
    for name in names or ():
        if not (folder / name).is_file():
            raise TokenizerError(
                f"{folder / name} is missing: {' and '.join(names or ())} belong in one folder"
            )
        files[name] = (folder / name).read_bytes()
    for name in BESIDE:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return folder, files


def _layout_in(folder: Path) -> tuple[str, ...]:
    present = {name for names in LAYOUTS for name in names if (folder / name).is_file()}
    for fits in (present.issuperset, present.intersection):  # complete, else begun
        for names in LAYOUTS:
            if fits(names):
                return names
    raise TokenizerError(
        f"{folder} holds no tokenizer: put tokenizer.json, tokenizer.model, vocab.bpe with"
        " encoder.json, or vocab.json with merges.txt there"
    )


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write each file whole or not at all, beside no file of another tokenizer."""
    rivals = {name for names in LAYOUTS for name in names}
    rivals |= {"added_tokens.json", "chat_template.jinja"}
    for name in sorted(rivals - files.keys()):
        if (folder / name).exists():
            raise TokenizerError(
                f"{folder / name} belongs to another tokenizer: remove it or save elsewhere"
            )
    for name, content in files.items():
        write_atomic(folder / name, content)


def write_atomic(path: Path, content: bytes) -> None:
    """Write under a temporary name in the same folder, flush to disk, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def parse_text(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 ({error}): fetch it again") from None


def parse_object(path: Path, content: bytes) -> dict[str, Any]:
    """The JSON object in content; path only names it in errors."""
    text = parse_text(path, content)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
        raise TokenizerError(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold; JSON can also spell half a surrogate pair."""
    return isinstance(value, str) and (value.isascii() or not SURROGATE.search(value))


def check_ids(source: Path, ids: Mapping[str, int]) -> None:
    """Raises TokenizerError unless every token is a text and has an id of its own."""
    owner: dict[int, str] = {}
    for token, i in ids.items():
        if not is_text(token):
            raise TokenizerError(f"{source}: token {token!r} is no text: fetch it again")
        if type(i) is not int or not 0 <= i < 2**31:
            raise TokenizerError(
                f"{source}: token {token!r} has id {i!r}: expected an integer from 0 to 2**31 - 1"
            )
        if i in owner:
            raise TokenizerError(
                f"{source}: tokens {owner[i]!r} and {token!r} both have id {i}: fetch it again"
            )
        owner[i] = token
