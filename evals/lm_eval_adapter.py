"""lm-evaluation-harness drives a Taproot model: all of its tasks, and its numbers to check ours by.

    python evals/lm_eval_adapter.py --model taproot \
        --model_args model=M,python=TAPROOT/bin/python --tasks arc_easy,gsm8k

The command line is that of lm-eval 0.4.13, in whose environment this one file runs; it imports
nothing of ours. The model lives in a process of its own, `cli.py eval serve`, under the interpreter
`python`, because lm-eval needs packages that Taproot does not, one of them with the name of a
folder of ours. Of --model_args, `model` and `python` are meant here; what else is given (adapter,
tokenizer, dtype, max_length, ...) becomes an option of `eval serve`. --batch_size and --device are
lm-eval's own and mean nothing here.
"""
# pyright: reportMissingImports=false

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if __name__ == "__main__":  # as a script, the folder's other files would hide standard ones
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != HERE]

import json  # noqa: E402
import subprocess  # noqa: E402
from typing import Any  # noqa: E402

from lm_eval.__main__ import cli_evaluate  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.models.utils import normalize_gen_kwargs  # noqa: E402


class Server:
    """A running `cli.py eval serve`; asked one question at a time."""

    def __init__(self, python: str, options: dict[str, Any]):
        command = [python, os.path.join(os.path.dirname(HERE), "cli.py"), "eval", "serve"]
        for name, value in options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                command.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                command += [f"--{flag}", str(value)]
        # What would keep the script's own folder from being searched is meant for us alone.
        environment = {name: v for name, v in os.environ.items() if name != "PYTHONSAFEPATH"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True,
                                        encoding="utf-8", env=environment)  # fmt: skip

    def ask(self, method: str, args: Any) -> Any:
        """The answer to one request; RuntimeError if it is an error or the server is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"id": 0, "method": method, "args": args}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"eval serve ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"eval serve, {method}: {answer['error']}")
        return answer["result"]


@register_model("taproot")
class TaprootLM(LM):
    """A Taproot model, Hugging Face folder or adapter as lm-eval sees a model.

    Greedy decoding only. Chat templates are rendered by the server, with the model's own template.
    """

    def __init__(
        self,
        model: str,
        python: str = sys.executable,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **options: Any,
    ):
        super().__init__()
        self.server = Server(python, {"model": model, **options})
        self.info = self.server.ask("info", {})

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(logprob, greedy) for logprob, greedy in self._all("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return self._all("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        default = self.info["max_gen_toks"]
        asked = [(text, normalize_gen_kwargs(how, default)) for text, how in _arguments(requests)]
        return self._all("generate_until", requests, asked)

    def _all(self, method: str, requests: list[Instance], asked: list[Any] | None = None) -> Any:
        found = self.server.ask(method, _arguments(requests) if asked is None else asked)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial(method, request.args, answer)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        how = {"messages": chat_history, "add_generation_prompt": add_generation_prompt}
        return self.server.ask("chat", how)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's own text, for lm-eval's records."""
        return self.info["chat_template"] or ""

    @property
    def tokenizer_name(self) -> str:
        return self.info["tokenizer"]

    @property
    def max_length(self) -> int:
        return self.info["max_length"]

    def get_model_info(self) -> dict[str, Any]:
        return {"model_sha": self.info["model"], "model_dtype": self.info["dtype"]}


def _arguments(requests: list[Instance]) -> list[Any]:
    return [request.args for request in requests]


if __name__ == "__main__":
    cli_evaluate()
