"""Benchmarks of a model that is being trained: planned once, compiled beside the first steps.

The plan is the one that `eval run` makes, so the batches and the numbers are, too.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from core.config import Execution, ModelConfig
from core.errors import InputError
from core.model import Variables
from evals import metrics
from evals.benchmark import Asked, Settings, deal, judge, requests
from evals.programs import Programs
from evals.scorer import compile_plan, make_plan, run_plan
from evals.tasks.task import Group


class Watch:
    """Scores `asked` whenever it is called; see `training.loop.Measure`."""

    def __init__(
        self,
        config: ModelConfig,
        execution: Execution,
        asked: Sequence[Asked],
        groups: Sequence[Group],
        settings: Settings,
        batch_tokens: int,
    ):
        if generated := [a.task.name for a in asked if a.task.kind == "generate"]:
            raise InputError(f"task {generated[0]} is answered by generation, which would hold up "
                             "training; leave it to eval run")  # fmt: skip
        self.config, self.execution, self.batch_tokens = config, execution, batch_tokens
        self.asked, self.groups, self.settings = asked, groups, settings

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of tasks and data, for the record of a run."""
        return {a.task.name: a.fingerprint for a in self.asked}

    def begin(self, variables: Variables, mesh: Mesh) -> None:
        """Plan, and compile in a thread of its own; `variables` show the layout of later ones."""
        how = (self.config, self.execution)
        self.plan = make_plan(requests(self.asked), *how, self.batch_tokens, mesh)
        self.programs = Programs(*how, variables, mesh)
        threading.Thread(target=compile_plan, args=(self.plan, self.programs)).start()

    def __call__(self, variables: Variables, mesh: Mesh) -> Mapping[str, float]:
        """Metrics by "eval/task/metric"; of groups with metrics in place of their tasks'."""
        answers = deal(self.asked, run_plan(self.plan, self.programs, variables))
        results: dict[str, dict[str, Any]] = {}
        for a in self.asked:
            judged = judge(a, answers[a.task.name], self.settings)
            results[a.task.name] = {"sample_len": len(a.questions), **judged.summary}
        of_groups = metrics.aggregate_groups(self.groups, results)
        members = {group.name: group.members for group in self.groups}
        grouped = {leaf for name in of_groups for leaf in metrics.leaves(name, members)}
        shown = {n: result for n, result in results.items() if n not in grouped} | of_groups
        return {
            f"eval/{name}/{key.removesuffix(',none')}": value
            for name, result in shown.items()
            for key, value in result.items()
            if key.endswith(",none") and not key.endswith("_stderr,none")
        }
