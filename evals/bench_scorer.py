"""Requests per second of the benchmark scorer, against one padded row and all logits a request.

Dims: B rows, T tokens, V vocabulary.

The requests have the shapes of real benchmarks and random ids: no data, no tokenizer. Both routes
start from the same tokens and end with the same log-probabilities and greedy flags, planning
included; they run in one process, in turn, on the same random weights. The plain route is what a
short script would do: a row for each request, eight rows of like length a batch, log-softmax of all
logits, the wanted ones picked.
"""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core import families, model, schema, sharding
from core.config import Execution, ModelConfig
from core.rows import bucket
from evals.items import Prompt
from evals.plan import Plan
from evals.scorer import Programs, Score, compile_plan, make_plan, run_plan

CLOCKS = {"": time.perf_counter, "_cpu": time.process_time}
BODY = ModelConfig(
    "gemma3", 262_144, 2048, 256, 4, 4, 1024, 64, norm_eps=1e-6, kv_heads=1, rope_theta=1e6,
    window=512, sliding=(True, True, True, False), init_std=0.1,
)  # fmt: skip
PLAIN_ROWS = 8
AGREE = {"float32": 1e-3, "bfloat16": 0.5}  # nats that two routes may differ by


class Form(NamedTuple):
    """Least and most tokens of a benchmark's question and of one choice; letters: MMLU's."""

    question: tuple[int, int]
    choices: int
    choice: tuple[int, int]
    letters: bool = False


MMLU = Form((60, 140), 4, (1, 1), letters=True)
MIX = (
    Form((15, 40), 4, (1, 8)),  # arc
    Form((40, 80), 4, (10, 35)),  # hellaswag
    Form((8, 30), 2, (8, 35)),  # piqa
    MMLU,
)


class Case(NamedTuple):
    """documents: taken in turn from the forms. shots: examples before each, drawn anew, or, if
    shared, one list for all documents of a subject."""

    vocab: int
    documents: int
    shots: int = 0
    shared: int = 0  # documents of a subject

    @property
    def name(self) -> str:
        kind = "shared prefix" if self.shared else f"{self.shots}-shot"
        return f"{self.vocab:,} {kind}"


CASES = (
    Case(262_144, 8),
    Case(262_144, 4, shots=3),
    Case(1280, 48),
    Case(1280, 24, shots=3),
    Case(1280, 24, shots=5, shared=12),
)


def requests(case: Case) -> list[Prompt]:
    """The case's requests; always the same.

    Some choices repeat the token before them, which a random model with tied matrices finds
    likeliest, so that some requests are greedy.
    """
    draw = np.random.default_rng(0)

    def text(span: tuple[int, int]) -> np.ndarray:
        return draw.integers(8, case.vocab, draw.integers(span[0], span[1] + 1), np.int32)

    def shots(form: Form) -> np.ndarray:
        parts = [text(span) for _ in range(case.shots) for span in (form.question, form.choice)]
        return np.concatenate([np.array([2], np.int32), *parts])

    made = []
    before = np.zeros(0, np.int32)
    for number in range(case.documents):
        form = MMLU if case.shared else MIX[number % len(MIX)]
        if not case.shared or number % case.shared == 0:
            before = shots(form)
        context = np.concatenate([before, text(form.question)])
        if form.letters:
            choices = [np.array([letter], np.int32) for letter in range(4, 8)]
        else:
            choices = [text(form.choice) for _ in range(form.choices)]
        if number % 3 == 0:
            choices[0] = np.full(len(choices[0]), context[-1])
        made += [Prompt(np.concatenate([context, choice]), len(context)) for choice in choices]
    return made


@model.full_precision
def plain(
    config: ModelConfig,
    execution: Execution,
    variables: model.Variables,
    ids_BT: jax.Array,
    targets_BT: jax.Array,
    wanted_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability [B] of the wanted targets of each row, and whether all are likeliest [B]."""
    logits_BTV = model.logits(config, execution, variables, ids_BT)
    logprobs_BTV = jax.nn.log_softmax(logits_BTV)
    picked_BT1 = jnp.take_along_axis(logprobs_BTV, targets_BT[..., None], axis=-1)
    likeliest_BT = logits_BTV.argmax(-1) == targets_BT
    logprob_B = jnp.where(wanted_BT, picked_BT1[..., 0], 0).sum(-1)
    return logprob_B, (likeliest_BT | ~wanted_BT).all(-1)


class Ours:
    """The scorer as commands run it."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution,
        variables: model.Variables,
        batch_tokens: int,
    ):
        self.mesh, self.variables = sharding.make_mesh(), variables
        self.how = (config, execution, batch_tokens, self.mesh)
        self.programs = Programs(config, execution, variables, self.mesh)

    def plan(self, prompts: Sequence[Prompt]) -> Plan:
        return make_plan(prompts, *self.how)

    def compile(self, plan: Plan) -> list[Any]:
        compile_plan(plan, self.programs)
        return [*self.programs.made.values()]

    def run(self, plan: Plan) -> list[Score]:
        return run_plan(plan, self.programs, self.variables)

    def tokens(self, plan: Plan) -> int:
        begun = {prefix: shape.prefix for shape, prefix, _ in plan.batches}
        return sum(begun.values()) + sum(s.rows * s.length for s, _, _ in plan.batches)


class Plain:
    """A row for each request, rows of like length together, every logit."""

    def __init__(self, config: ModelConfig, execution: Execution, variables: model.Variables):
        self.run_batch = jax.jit(functools.partial(plain, config, execution))
        self.variables = variables
        self.made: dict[int, Any] = {}

    def plan(self, prompts: Sequence[Prompt]) -> list[tuple[list[int], list[np.ndarray]]]:
        """Which requests are the rows of each batch; its inputs, targets and whether wanted."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        longest = len(prompts[order[0]].ids) - 1
        batches = []
        for first in range(0, len(order), PLAIN_ROWS):
            chosen = order[first : first + PLAIN_ROWS]
            shape = PLAIN_ROWS, bucket(len(prompts[chosen[0]].ids) - 1, longest)
            ids_BT, targets_BT = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            wanted_BT = np.zeros(shape, bool)
            for row, i in enumerate(chosen):
                ids, start, _ = prompts[i]
                ids_BT[row, : len(ids) - 1], targets_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
                wanted_BT[row, start - 1 : len(ids) - 1] = True
            batches.append((chosen, [ids_BT, targets_BT, wanted_BT]))
        return batches

    def compile(self, plan: list[Any]) -> list[Any]:
        for _, arrays in plan:
            length = arrays[0].shape[1]
            if length not in self.made:
                self.made[length] = self.run_batch.lower(self.variables, *arrays).compile()
        return [*self.made.values()]

    def run(self, plan: list[Any]) -> list[Score]:
        found: dict[int, Score] = {}
        for chosen, arrays in plan:
            made = self.made[arrays[0].shape[1]](self.variables, *arrays)
            logprobs, greedy = (np.asarray(x_B).tolist() for x_B in made)
            found |= zip(chosen, map(Score, logprobs, greedy), strict=False)  # last rows are empty
        return [found[i] for i in range(len(found))]

    def tokens(self, plan: list[Any]) -> int:
        return sum(arrays[0].size for _, arrays in plan)


def bench(
    cases: Sequence[Case], batch_tokens: int, repeats: int, execution: Execution
) -> dict[str, Any]:
    """What both routes take for each case, and how far their answers are apart.

    batch_tokens: of ours. seconds: medians of `repeats` rounds of compiled programs, planning
    included; `_cpu` is the time of the processors, which tells more than the clock on a busy
    machine. tokens: run through the model, padding included. temp_bytes: of the largest program.
    """
    return {
        "repeats": repeats,
        "batch_tokens": batch_tokens,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "execution": {**execution.__dict__, "unroll": execution.unroll(BODY.layers)},
        "cases": [_bench(case, batch_tokens, repeats, execution) for case in cases],
    }


def _bench(case: Case, batch_tokens: int, repeats: int, execution: Execution) -> dict[str, Any]:
    config, prompts = dataclasses.replace(BODY, vocab_size=case.vocab), requests(case)
    params = schema.init(families.rows(config), config.layers, seed=0)
    variables = jax.device_put({"params": params}, sharding.replicated(sharding.make_mesh()))
    routes: dict[str, Any] = {
        "ours": Ours(config, execution, variables, batch_tokens),
        "plain": Plain(config, execution, variables),
    }
    times: dict[str, list[float]] = {f"{name}{clock}": [] for name in routes for clock in CLOCKS}
    numbers: dict[str, dict[str, float]] = {}
    found: dict[str, list[Score]] = {}
    for name, route in routes.items():
        plan, began = route.plan(prompts), time.perf_counter()
        programs = route.compile(plan)
        numbers[name] = {
            "compilations": len(programs),
            "compile_seconds": time.perf_counter() - began,
            "temp_bytes": max(p.memory_analysis().temp_size_in_bytes for p in programs),
            "tokens": route.tokens(plan),
        }
    for _ in range(repeats):
        for name, route in routes.items():
            before = [clock() for clock in CLOCKS.values()]
            found[name] = route.run(route.plan(prompts))
            for (suffix, clock), was in zip(CLOCKS.items(), before, strict=True):
                times[name + suffix].append(clock() - was)
    median = {name: float(np.median(values)) for name, values in times.items()}
    pairs = list(zip(found["ours"], found["plain"], strict=True))
    return {
        "case": case.name,
        **case._asdict(),
        "requests": len(prompts),
        "seconds": median,
        "requests_per_second": {name: len(prompts) / median[name] for name in routes},
        "ratio": median["plain"] / median["ours"],
        "ratio_cpu": median["plain_cpu"] / max(median["ours_cpu"], 1e-9),
        **{key: {name: numbers[name][key] for name in routes} for key in numbers["ours"]},
        "largest_difference": max(abs(a.logprob - b.logprob) for a, b in pairs),
        "greedy": sum(b.greedy for _, b in pairs),
        "greedy_mismatches": sum(a.greedy != b.greedy for a, b in pairs),
    }


def table(result: dict[str, Any]) -> str:
    """The result for people: two lines a case, and a third where the routes disagree."""
    lines = [
        f"batches of {result['batch_tokens']:,} tokens, {result['execution']['dtype']}, "
        f"{result['device']}, jax {result['jax']}; medians of {result['repeats']}",
        f"{'case':24} {'route':6} {'requests/s':>11} {'seconds':>9} {'cpu':>9} {'tokens':>9} "
        f"{'programs':>9} {'compile':>8} {'temp MiB':>9}",
    ]
    agree = AGREE[result["execution"]["dtype"]]
    for case in result["cases"]:
        for name in ("ours", "plain"):
            label = case["case"] if name == "ours" else f"  {case['requests']} requests"
            lines.append(
                f"{label:24} {name:6} {case['requests_per_second'][name]:11,.1f} "
                f"{case['seconds'][name]:9.3f} {case['seconds'][f'{name}_cpu']:9.3f} "
                f"{case['tokens'][name]:9,} {case['compilations'][name]:9} "
                f"{case['compile_seconds'][name]:8.1f} {case['temp_bytes'][name] / 2**20:9,.1f}"
            )
        lines.append(
            f"  ours {case['ratio']:.1f} times as fast ({case['ratio_cpu']:.1f} by processor time);"
            f" log-probabilities within {case['largest_difference']:.1e}, greedy flags of "
            f"{case['greedy_mismatches']} of {case['requests']} differ"
        )
        if not case["largest_difference"] < agree or case["greedy_mismatches"]:
            lines.append("  THE ROUTES DISAGREE")
    return "\n".join(lines)
