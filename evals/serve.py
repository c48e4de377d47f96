"""A model that answers requests line by line, for programs that cannot import ours.

A request is a line of JSON, {"id": any, "method": name, "args": ...}; its answer is a line with the
same id and either "result" or "error". Methods, as lm-evaluation-harness names them:

    info                   {}                             what the model is and reads
    loglikelihood          [[context, continuation], ..]  -> [[nats, greedy], ..]
    loglikelihood_rolling  [[text], ..]                   -> [nats, ..]
    generate_until         [[context, {until, max_gen_toks}], ..]  -> [text, ..]
    chat                   {messages, add_generation_prompt}       -> text

Everything asked for in one request is planned together, so ask for much at once.
"""

import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import click
import jax

from core import sharding
from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import parse_object
from core.model import Variables
from core.progress import Progress
from evals.generation import answers, default_stops
from evals.items import Prompt, keep_last, read_context, rolling, tokenise
from evals.scorer import Programs, Score, make_plan, run_batches
from tokenizers import Tokenizer, TokenizerError, chat, templates
from tokenizers.templates import Template

NEW_TOKENS = 256  # where a request does not say, the harness's
GREEDY = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


@dataclass(frozen=True)
class Server:
    """A model and how it is run.

    length: tokens read and predicted. add_bos: None: as the tokenizer says. batch: texts generated
    at a time.
    """

    loaded: Loaded
    tokenizer: Tokenizer
    execution: Execution
    batch_tokens: int
    length: int
    add_bos: bool | None
    batch: int

    def answer(self, request: dict[str, Any]) -> Any:
        """The result of one request; InputError or TokenizerError for what cannot be answered."""
        methods = {
            "info": lambda _: self.info(),
            "loglikelihood": self.loglikelihood,
            "loglikelihood_rolling": self.loglikelihood_rolling,
            "generate_until": self.generate_until,
            "chat": self.chat,
        }
        chosen = methods.get(str(request.get("method")))
        if chosen is None:
            raise InputError(f"a request needs 'id', 'args' and a 'method' of {', '.join(methods)}")
        return chosen(request.get("args"))

    def info(self) -> dict[str, Any]:
        return {
            "model": self.loaded.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "dtype": self.execution.dtype,
            "max_length": self.length,
            "max_gen_toks": NEW_TOKENS,
            "chat_template": templates.own_template(self.tokenizer),
        }

    def loglikelihood(self, args: Any) -> list[tuple[float, bool]]:
        _check(args, "[context, continuation]", str, str)
        prompts: list[Prompt] = []
        for context, pairs in itertools.groupby(args, key=lambda pair: pair[0]):
            continuations = [continuation for _, continuation in pairs]
            prompts += tokenise(self.tokenizer, context, continuations, self.add_bos)
        return [(score.logprob, score.greedy) for score in self._scores(prompts)]

    def loglikelihood_rolling(self, args: Any) -> list[float]:
        _check(args, "[text]", str)
        windows = [rolling(self.tokenizer, text, self.length, self.add_bos) for (text,) in args]
        scores = iter(self._scores([prompt for some in windows for prompt in some]))
        return [sum((score.logprob for score in itertools.islice(scores, len(some))), 0.0)
                for some in windows]  # fmt: skip

    def _scores(self, prompts: Sequence[Prompt]) -> list[Score]:
        kept = [keep_last(prompt, self.length + 1, f"request {i}")
                for i, prompt in enumerate(prompts)]  # fmt: skip
        variables, programs = self.ready
        how = (self.loaded.config, self.execution, self.batch_tokens, programs.mesh)
        found: dict[int, Score] = {}
        with Progress(len(kept), "serve", "prompts") as bar:
            for scored in run_batches(make_plan(kept, *how), programs, variables):
                found |= scored
                bar.update(len(scored))
        return [found[i] for i in range(len(kept))]

    @functools.cached_property
    def ready(self) -> tuple[Variables, Programs]:
        """The weights on all devices, and what was compiled for the requests so far."""
        mesh = sharding.make_mesh()
        variables = jax.device_put(self.loaded.variables, sharding.replicated(mesh))
        return variables, Programs(self.loaded.config, self.execution, variables, mesh)

    def generate_until(self, args: Any) -> list[str]:
        _check(args, "[context, {until, max_gen_toks}]", str, dict)
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for i, (_, how) in enumerate(args):
            alike.setdefault(_greedy(how), []).append(i)
        found: dict[int, str] = {}
        stops = default_stops(self.loaded, self.tokenizer)
        for (until, new_tokens), chosen in alike.items():
            room = self.length - new_tokens
            if room < 1:
                raise InputError(f"{new_tokens} new tokens leave no room for a context in "
                                 f"{self.length}; ask for fewer")  # fmt: skip
            read = [read_context(self.tokenizer, args[i][0], room, self.add_bos) for i in chosen]
            texts = answers(
                self.loaded, self.tokenizer, [context.ids for context in read], until, new_tokens,
                stops, self.execution, self.batch, "serve",
            )  # fmt: skip
            found |= {i: answer.text for i, answer in zip(chosen, texts, strict=True)}
        return [found[i] for i in range(len(args))]

    def chat(self, args: Any) -> str:
        """The conversation by the tokenizer's own template; a last turn that is not to be answered
        is gone on with."""
        fields = args if isinstance(args, dict) else {}
        messages, prefix = fields.get("messages"), ""
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise InputError("chat needs {'messages': [{'role', 'content'}, ..]}")
        if not fields.get("add_generation_prompt", True):
            *messages, last = messages or [{}]
            prefix = last.get("content")
            if last.get("role") != "assistant" or not isinstance(prefix, str):
                raise InputError("without a generation prompt the last message must be a text of "
                                 "the assistant's, to go on with")  # fmt: skip
        if self.template.system == "refused":
            messages = [message for message in messages if message.get("role") != "system"]
        text = chat.render(messages, self.template, add_generation_prompt=True).text
        return text + (prefix.strip() if self.template.trim else prefix)

    @functools.cached_property
    def template(self) -> Template:
        found = templates.template(self.tokenizer)
        if found.system == "refused":
            click.echo(f"chat template {found.name} has no system role: what the system says is "
                       "LEFT OUT of every prompt", err=True)  # fmt: skip
        return found


def _check(args: Any, form: str, *kinds: type) -> None:
    """Raise InputError unless args is a list of such tuples."""
    for i, values in enumerate(args if isinstance(args, list) else [None]):
        if (
            not isinstance(values, list)
            or len(values) != len(kinds)
            or not all(isinstance(v, kind) for v, kind in zip(values, kinds, strict=True))
        ):
            raise InputError(f"args must be a list of {form}; args[{i}] is {str(values)[:200]}")


def _greedy(how: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and most new tokens; InputError for anything but greedy decoding."""
    if how.get("do_sample") or how.get("temperature") or how.keys() - GREEDY:
        raise InputError(f"only greedy generation by {sorted(GREEDY)} is served, not {how}")
    until = how.get("until", [])
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list) or not all(isinstance(text, str) for text in until):
        raise InputError(f"until must be a list of texts, got {until!r}")
    new_tokens = how.get("max_gen_toks", NEW_TOKENS)
    if type(new_tokens) is not int or new_tokens < 1:
        raise InputError(f"max_gen_toks must be a positive integer, got {new_tokens!r}")
    return tuple(until), new_tokens


def serve(
    loaded: Loaded,
    tokenizer: Tokenizer,
    lines_in: Iterable[str],
    lines_out: TextIO,
    execution: Execution,
    batch_tokens: int,
    max_length: int | None = None,
    add_bos: bool | None = None,
    batch: int = 8,
) -> None:
    """Answer each line of `lines_in` with one of `lines_out`, until there are no more.

    max_length: tokens read and predicted; None: the model's context. See `Server` for the rest.
    """
    length = min(max_length or loaded.config.context, loaded.config.context)
    server = Server(loaded, tokenizer, execution, batch_tokens, length, add_bos, batch)
    for line in lines_in:
        request: dict[str, Any] = {}
        try:
            request = parse_object(line, "a request")
            answer = {"result": server.answer(request)}
        except (InputError, TokenizerError) as error:
            answer = {"error": str(error)}
        lines_out.write(json.dumps({"id": request.get("id"), **answer}) + "\n")
        lines_out.flush()
