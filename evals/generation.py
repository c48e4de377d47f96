"""Texts from prompts: where a completion ends, and runs that can be resumed.

A completion ends with a stop id, which
its text leaves out, before a stop string, or at its greatest length. A stop string is looked for in
the bytes of the new tokens alone, since it may straddle tokens; the ids go up to the token that
completes it, and the text is cut before it, as lm-evaluation-harness cuts at `until`.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import distributed, generate
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import PathLike, append_jsonl, read_jsonl, write_jsonl
from core.generate import Completion
from core.progress import Progress
from core.sampling import GREEDY, Sampling
from evals.store import Store, generation_key
from evals.user_prompts import ReadyPrompt
from tokenizers import Tokenizer
from tokenizers.templates import Template


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


def spell(tokenizer: Tokenizer, ids: Iterable[int], strings: Sequence[str]) -> str:
    """The text of ids, cut before each of `strings` in their order."""
    data = b"".join(piece(tokenizer, token) for token in ids)
    for string in strings:
        data = data.split(string.encode())[0]
    return data.decode("utf-8", "replace")


def as_text(tokenizer: Tokenizer, completion: Completion, strings: Sequence[str]) -> Text:
    ids = completion.ids[:-1] if completion.reason == "stop_id" else completion.ids
    return Text(spell(tokenizer, ids.tolist(), strings), *completion)


def complete(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    settings: Settings,
    execution: Execution,
    finished: Mapping[int, int] = {},
) -> Iterator[list[tuple[int, Completion]]]:
    """The completions of `prompts` (ids) as `core.generate.generate` yields them.

    Raises InputError for prompts that do not fit, settings that are not possible, and a model whose
    log-probabilities are not finite.
    """
    settings.check(loaded)
    found = generate.generate(
        loaded.config, execution, loaded.variables, prompts, settings.new_tokens,
        settings.sampling, settings.seed, settings.stop_ids,
        ends_with_string(tokenizer, settings.stop_strings), settings.batch, finished,
    )  # fmt: skip
    for group in found:
        if not all(np.isfinite(completion.logprobs).all() for _, completion in group):
            raise InputError(
                f"model {loaded.fingerprint[:12]} gives log-probabilities that are not finite; its "
                "weights are damaged or it diverged"
            )
        yield group


def complete_all(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[ReadyPrompt],
    settings: Settings,
    execution: Execution,
) -> list[Text]:
    """The completions in the order of the prompts."""
    ids, found = [prompt.ids for prompt in prompts], {}
    with Progress(len(prompts), "generate", "completions") as bar:
        for group in complete(loaded, tokenizer, ids, settings, execution):
            found.update(group)
            bar.update(len(group))
    return [as_text(tokenizer, found[i], settings.stop_strings) for i in range(len(prompts))]


def show(texts: Sequence[Text]) -> str:
    """Several completions for people, each under a line that says which it is and why it ended."""
    return "\n\n".join(f"--- {n}, {t.reason}\n{t.text}" for n, t in enumerate(texts, 1))


def run_generation(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[ReadyPrompt],
    out: PathLike,
    settings: Settings,
    execution: Execution,
) -> dict[str, Any]:
    """Write `out`/completions.jsonl, a line a prompt in their order; returns a summary.

    Lines are kept in finished.jsonl as texts end, until all are there; called again after a kill it
    goes on with the other prompts and ends with the same bytes.
    """
    journal, final = Path(out) / "finished.jsonl", Path(out) / "completions.jsonl"
    if not final.exists():
        ids = [prompt.ids for prompt in prompts]
        lines = read_jsonl(journal) if journal.exists() else []
        write_jsonl(journal, lines)  # without a line that a kill cut short
        finished = {line["index"]: len(line["ids"]) for line in lines}
        began, tokens = time.monotonic(), 0
        label = f"generate {Path(out).name}"
        with Progress(len(prompts), label, "completions", len(lines)) as bar:
            for group in complete(loaded, tokenizer, ids, settings, execution, finished):
                texts = [(i, as_text(tokenizer, c, settings.stop_strings)) for i, c in group]
                append_jsonl(journal, [{**prompts[i].extra, "index": i, "prompt": prompts[i].text,
                                        **text.to_json()} for i, text in texts])  # fmt: skip
                tokens += sum(len(text.ids) for _, text in texts)
                rate = tokens / max(time.monotonic() - began, 1e-9)
                bar.update(len(group), **{"tokens/s": f"{rate:,.4g}"})
        write_jsonl(final, sorted(read_jsonl(journal), key=lambda line: line["index"]))
    journal.unlink(missing_ok=True)
    lines = read_jsonl(final)
    reasons = [line["reason"] for line in lines]
    return {"completions": len(lines), "tokens": sum(len(line["ids"]) for line in lines),
            **{reason: reasons.count(reason) for reason in ("stop_id", "stop_string", "length")},
            "model": loaded.fingerprint, "tokenizer": tokenizer.fingerprint}  # fmt: skip


# -------------------------------------------------------------------------- answers of benchmarks


class Answer(NamedTuple):
    """A greedy completion; ids int32 [N] go up to and with what ended it, the text does not."""

    text: str
    ids: np.ndarray
    reason: str


def answers(
    loaded: Loaded,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    until: Sequence[str],
    new_tokens: int,
    stop_ids: Sequence[int],
    execution: Execution,
    batch: int,
    label: str,
    store: Store | None = None,
) -> list[Answer]:
    """The greedy answer to each prompt (ids), by the rules of lm-evaluation-harness 0.4.13.

    It ends with a stop id, or where what is written spells one of `until` or the EOS; its text
    leaves out control tokens and is cut before each of `until`, in their order, and the EOS.

    Equal prompts are answered once, those of `store.before` not at all, and those of `store.since`
    keep their place in the schedule: after a kill all others get the same bits. Several processes
    share the prompts and meet in the store. label: of the progress line. Raises InputError as
    `complete` does.
    """
    store = store or Store(None, {})
    keys = [generation_key(ids, new_tokens, stop_ids, until) for ids in prompts]
    asked = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in store.before}
    known = {key: value for key in keys if (value := store.before.get(key, store.since.get(key)))}
    names = [*asked][distributed.split(len(asked))]
    finished = {i: len(known[key]["ids"]) for i, key in enumerate(names) if key in known}
    strings = (*until, *(() if tokenizer.eos is None else (tokenizer.decode([tokenizer.eos]),)))
    settings = Settings(new_tokens, stop_ids=tuple(stop_ids), stop_strings=strings, batch=batch)
    if len(finished) < len(names):
        ids = [asked[key] for key in names]
        with Progress(len(names), label, "answers", len(finished)) as bar:
            for group in complete(loaded, tokenizer, ids, settings, execution, finished):
                new = {names[i]: {"ids": c.ids.tolist(), "reason": c.reason} for i, c in group}
                store.add(new.items())
                known |= new
                bar.update(len(group))
    store.gather(keys)
    known = {**store.since, **known}
    control = {*tokenizer.control.values()}

    def answer(ids: Sequence[int], reason: str) -> Answer:
        text = spell(tokenizer, (token for token in ids if token not in control), strings)
        return Answer(text, np.array(ids, np.int32), reason)

    return [answer(**known[key]) for key in keys]
