"""Texts from prompts: what is read, where a completion ends, and a run that can be resumed.

A prompt's text is tokenised with the control tokens it spells, as rendered chat templates need, and
begins with BOS exactly once if the tokenizer asks for it. A completion ends with a stop id, which
its text leaves out, before a stop string, or at its greatest length. A stop string is looked for in
the bytes of the new tokens alone, since it may straddle tokens; the ids go up to the token that
completes it, and the text is cut before it, as lm-evaluation-harness cuts at `until`.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import generate
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, append_jsonl, read_jsonl, write_jsonl
from core.generate import GREEDY, Completion, Sampling
from core.progress import Progress
from tokenizers import Tokenizer, chat
from tokenizers.templates import Template

# What a line of completions.jsonl holds beside the columns of its prompt.
COLUMNS = ("index", "completion", "ids", "logprob", "logprobs", "reason")


class Prompt(NamedTuple):
    """What the model reads; `extra` holds the other columns of a file's line."""

    text: str
    ids: np.ndarray
    extra: Mapping[str, Any] = {}


class Settings(NamedTuple):
    """How to continue. stop_ids: all of them, the model's own included (`default_stops`)."""

    new_tokens: int = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    batch: int = 8

    def check(self, loaded: Loaded) -> None:
        """Raise InputError for what this model cannot do."""
        self.sampling.check()
        if outside := [i for i in self.stop_ids if not 0 <= i < loaded.config.vocab_size]:
            raise InputError(f"stop id {outside[0]} is outside the model's vocabulary of "
                             f"{loaded.config.vocab_size}; leave it out")  # fmt: skip
        if "" in self.stop_strings:
            raise InputError("a stop string is empty; leave it out")


class Text(NamedTuple):
    """A completion as people read it; see `core.generate.Completion` for the rest."""

    text: str
    ids: np.ndarray
    logprobs: np.ndarray
    reason: str

    def to_json(self) -> dict[str, Any]:
        logprob = float(self.logprobs.sum(dtype=np.float64))
        return {"completion": self.text, "ids": self.ids, "logprob": logprob,
                "logprobs": self.logprobs, "reason": self.reason}  # fmt: skip


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """int32 [T]: the ids of a prompt's text, after BOS if the tokenizer asks for it."""
    ids = tokenizer.encode(text, special=True)
    if not tokenizer.add_bos or tokenizer.bos is None or (len(ids) and ids[0] == tokenizer.bos):
        return ids
    return np.concatenate([np.array([tokenizer.bos], np.int32), ids])


def default_stops(loaded: Loaded, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end a text: the model's own, or else the tokenizer's EOS."""
    config = loaded.config
    own = (*(() if config.eos is None else (config.eos,)), *config.stops)
    return own or (() if tokenizer.eos is None else (tokenizer.eos,))


def end_of_turn(
    tokenizer: Tokenizer, template: Template
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What ends the assistant's turn: a stop id, or a stop string if it is several tokens."""
    end = template.ends["assistant"]
    ids = tokenizer.encode(end, special=True)
    return ((int(ids[0]),), ()) if len(ids) == 1 else ((), (end,) if end else ())


def piece(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; none for an id of the model that the tokenizer lacks."""
    return tokenizer.pieces.get(token, b"")


def ends_with_string(tokenizer: Tokenizer, strings: Sequence[str]) -> generate.Ends:
    """Counts the tokens up to the one that first completes one of `strings`; None if none does."""
    wanted = [string.encode() for string in strings]

    def ends(ids: np.ndarray) -> int | None:
        if not wanted:
            return None
        pieces = [piece(tokenizer, token) for token in ids.tolist()]
        data = b"".join(pieces)
        completed = [at + len(s) for s in wanted if (at := data.find(s)) >= 0]
        if not completed:
            return None
        return int(np.searchsorted(np.cumsum([len(p) for p in pieces]), min(completed))) + 1

    return ends


def as_text(tokenizer: Tokenizer, completion: Completion, strings: Sequence[str]) -> Text:
    ids = completion.ids[:-1] if completion.reason == "stop_id" else completion.ids
    data = b"".join(piece(tokenizer, token) for token in ids.tolist())
    if completion.reason == "stop_string":
        for string in strings:
            data = data.split(string.encode())[0]
    return Text(data.decode("utf-8", "replace"), *completion)


def complete(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    execution: Execution,
    skip: int = 0,
) -> Iterator[list[tuple[int, Text]]]:
    """The completions of `prompts` (ids), batch by batch as `core.generate.generate` yields them.

    Raises InputError for prompts that do not fit, settings that are not possible, and a model whose
    log-probabilities are not finite.
    """
    settings.check(loaded)
    found = generate.generate(
        loaded.config, execution, loaded.variables, prompts, settings.new_tokens,
        settings.sampling, settings.seed, settings.stop_ids,
        ends_with_string(tokenizer, settings.stop_strings), settings.batch, skip,
    )  # fmt: skip
    for batch in found:
        if not all(np.isfinite(completion.logprobs).all() for _, completion in batch):
            raise InputError(
                f"model {loaded.fingerprint[:12]} gives log-probabilities that are not finite; its "
                "weights are damaged or it diverged"
            )
        yield [(i, as_text(tokenizer, c, settings.stop_strings)) for i, c in batch]


def complete_all(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    execution: Execution,
) -> list[Text]:
    """The completions in the order of the prompts."""
    ids, found = [prompt.ids for prompt in prompts], {}
    with Progress(len(prompts), "generate", "completions") as bar:
        for batch in complete(loaded, tokenizer, ids, settings, execution):
            found.update(batch)
            bar.update(len(batch))
    return [found[i] for i in range(len(prompts))]


def show(texts: Sequence[Text]) -> str:
    """Several completions for people, each under a line that says which it is and why it ended."""
    return "\n\n".join(f"--- {n}, {t.reason}\n{t.text}" for n, t in enumerate(texts, 1))


def run_generation(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    out: PathLike,
    settings: Settings,
    execution: Execution,
) -> dict[str, Any]:
    """Write `out`/completions.jsonl, a line a prompt in their order; returns a summary.

    Finished batches are kept in batches.jsonl, a line each, until all are there; called again after
    a kill it goes on behind them and ends with the same bytes.
    """
    journal, final = Path(out) / "batches.jsonl", Path(out) / "completions.jsonl"
    if not final.exists():
        ids = [prompt.ids for prompt in prompts]
        done = read_jsonl(journal) if journal.exists() else []
        write_jsonl(journal, done)  # without a line that a kill cut short
        began, tokens = time.monotonic(), 0
        label, kept = f"generate {Path(out).name}", sum(map(len, done))
        with Progress(len(prompts), label, "completions", kept) as bar:
            for batch in complete(loaded, tokenizer, ids, settings, execution, len(done)):
                lines = [{**prompts[i].extra, "index": i, "prompt": prompts[i].text,
                          **text.to_json()} for i, text in batch]  # fmt: skip
                append_jsonl(journal, [lines])
                tokens += sum(len(text.ids) for _, text in batch)
                rate = tokens / max(time.monotonic() - began, 1e-9)
                bar.update(len(batch), **{"tokens/s": f"{rate:,.4g}"})
        found = [line for batch in read_jsonl(journal) for line in batch]
        write_jsonl(final, sorted(found, key=lambda line: line["index"]))
    journal.unlink(missing_ok=True)
    lines = read_jsonl(final)
    reasons = [line["reason"] for line in lines]
    return {"completions": len(lines), "tokens": sum(len(line["ids"]) for line in lines),
            **{reason: reasons.count(reason) for reason in ("stop_id", "stop_string", "length")},
            "model": loaded.fingerprint, "tokenizer": tokenizer.fingerprint}  # fmt: skip


# ----------------------------------------------------------------------------------- what is asked


class Asked(NamedTuple):
    """A prompt as a person wrote it: a text, or a conversation that the assistant is to go on."""

    content: str | list[dict[str, Any]]
    where: str
    extra: Mapping[str, Any] = {}


def read_asked(path: PathLike) -> list[Asked]:
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
    parse = _parse if path.suffix == ".jsonl" else Asked
    found = [
        parse(line.removesuffix("\r"), f"{path} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{path} holds no prompts")
    return found


def _parse(line: str, where: str) -> Asked:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); write one object a line") from error
    given = {"prompt", "messages"} & fields.keys() if isinstance(fields, dict) else ()
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
    return Asked(content, where, fields)


def prepare(
    loaded: Loaded,
    tokenizer: Tokenizer,
    asked: Sequence[Asked],
    new_tokens: int,
    template: Template | None = None,
    system: str | None = None,
    truncate: bool = False,
) -> list[Prompt]:
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
        prompts.append(Prompt(text, ids[-room:] if truncate else ids, question.extra))
    generate.check_prompts(loaded.config, [prompt.ids for prompt in prompts], new_tokens)
    return prompts


def _text(asked: Asked, template: Template | None, system: str | None) -> str:
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


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A sha256 over the ids of all prompts and the columns beside them."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids.tobytes() + b"|")
        digest.update(json.dumps([prompt.text, prompt.extra], sort_keys=True).encode())
    return digest.hexdigest()
