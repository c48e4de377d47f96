"""What people ask to be continued, texts or conversations, and how the model reads it.

A prompt's text is tokenised with the control tokens it spells, as rendered chat templates need, and
begins with BOS exactly once if the tokenizer asks for it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import generate
from core.checkpoint import Loaded
from core.errors import InputError
from core.files import PathLike, parse_object
from evals.items import encode
from tokenizers import Tokenizer, chat
from tokenizers.templates import Template

# What a line of completions.jsonl holds beside the columns of its prompt.
COLUMNS = ("index", "completion", "ids", "logprob", "logprobs", "reason")


class ReadyPrompt(NamedTuple):
    """What the model reads; `extra` holds the other columns of a file's line."""

    text: str
    ids: np.ndarray
    extra: Mapping[str, Any] = {}


class UserPrompt(NamedTuple):
    """A prompt as a person wrote it: a text, or a conversation that the assistant is to go on."""

    content: str | list[dict[str, Any]]
    where: str
    extra: Mapping[str, Any] = {}


def read_prompts(path: PathLike) -> list[UserPrompt]:
    """Prompts of a file: .txt, one a line; .jsonl, objects with `prompt` or `messages`.

    Blank lines are left out. InputError names file, line and field of the first bad one.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path} must end in .txt (a prompt a line) or .jsonl")
    try:
        lines = path.read_bytes().decode("utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error})") from None
    parse = _parse if path.suffix == ".jsonl" else UserPrompt
    found = [
        parse(line.removesuffix("\r"), f"{path} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{path} holds no prompts")
    return found


def _parse(line: str, where: str) -> UserPrompt:
    fields = parse_object(line, where)
    given = {"prompt", "messages"} & fields.keys()
    if len(given) != 1:
        raise InputError(f"{where} must be an object with either 'prompt' or 'messages'")
    (name,) = given
    content = fields.pop(name)
    if name == "prompt" and not isinstance(content, str):
        raise InputError(f"{where}: 'prompt' must be a string, got {content!r}")
    if name == "messages" and not (
        isinstance(content, list) and content and all(isinstance(m, dict) for m in content)
    ):
        raise InputError(f"{where}: 'messages' must be a list of objects with role and content")
    if taken := sorted({*COLUMNS, "prompt"} & fields.keys()):
        raise InputError(f"{where}: {taken[0]!r} is a column of the result; rename it")
    return UserPrompt(content, where, fields)


def prepare(
    loaded: Loaded,
    tokenizer: Tokenizer,
    asked: Sequence[UserPrompt],
    new_tokens: int,
    template: Template | None = None,
    system: str | None = None,
    truncate: bool = False,
) -> list[ReadyPrompt]:
    """Prompts as the model reads them.

    template: renders conversations, and texts as what a user says. system: said before each.
    truncate: keep the last tokens of a prompt too long for `new_tokens` more.
    """
    room = loaded.config.context - new_tokens
    if room < 1:
        raise InputError(f"{new_tokens} new tokens leave no room for a prompt in the model's "
                         f"context of {loaded.config.context}; ask for fewer")  # fmt: skip
    if system is not None and template is None:
        raise InputError("a system message needs a chat template; give --chat")
    prompts = []
    for question in asked:
        text = _text(question, template, system)
        ids = encode(tokenizer, text)
        prompts.append(ReadyPrompt(text, ids[-room:] if truncate else ids, question.extra))
    generate.check_prompts(loaded.config, [prompt.ids for prompt in prompts], new_tokens)
    return prompts


def _text(asked: UserPrompt, template: Template | None, system: str | None) -> str:
    content, where = asked.content, asked.where
    if template is None:
        if isinstance(content, str):
            return content
        raise InputError(f"{where} holds messages; give a chat template, --chat auto or its name")
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    if system is not None:
        if messages[0].get("role") == "system":
            raise InputError(f"{where} has a system message of its own; leave out --system")
        messages = [{"role": "system", "content": system}, *messages]
    if messages[-1].get("role") == "assistant":
        raise InputError(f"{where} ends with the assistant; its last message must be the user's")
    try:
        return chat.render(messages, template, add_generation_prompt=True).text
    except chat.ChatError as error:
        raise InputError(f"{where}: {error}") from error


def fingerprint(prompts: Sequence[ReadyPrompt]) -> str:
    """A sha256 over the ids of all prompts and the columns beside them."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.tobytes() + b"|")
        digest.update(json.dumps([prompt.text, prompt.extra], sort_keys=True).encode())
    return digest.hexdigest()
