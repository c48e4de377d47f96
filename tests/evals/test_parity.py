"""Our benchmark numbers are those of lm-evaluation-harness 0.4.13, item by item.

The recorded runs, and what they ran on, are in tests/golden/evals. Everything is compared: prompts,
token ids, log-probabilities (1e-4 nats, or 5e-7 of a long text's), greedy flags, metrics of
each item, generated texts, and the numbers and standard errors of tasks and groups.
"""

import copy
import functools
import json
import shutil
from pathlib import Path

import pytest

from core.config import Execution
from tests.golden.evals import compare_runs
from tests.golden.evals.compare_runs import KINDS, Outcome

GOLDEN = Path(compare_runs.__file__).parent
CUSTOM = {path.stem: path for path in (GOLDEN / "tasks").glob("*.toml")}
RECORDS = {path.stem: json.loads(path.read_text("utf-8"))
           for path in sorted((GOLDEN / "expected").glob("*.json"))}  # fmt: skip


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Ours for a record; all of a model are asked together."""

    @functools.cache
    def of_model(name: str) -> dict[str, Outcome]:
        folder = tmp_path_factory.mktemp("models") / name
        shutil.copytree(GOLDEN / "models" / name, folder)
        for path in (GOLDEN.parent / "tokenizers" / name).iterdir():
            if path.suffix in (".json", ".txt"):
                shutil.copy(path, folder)
        records = {run: record for run, record in RECORDS.items() if record["model"] == name}
        loaded, tokenizer = compare_runs.model(folder)
        found = compare_runs.evaluate([*records.values()], loaded, tokenizer, GOLDEN / "data",
                                      CUSTOM, Execution(), "gemma")  # fmt: skip
        return dict(zip(records, found, strict=True))

    return lambda run: of_model(RECORDS[run]["model"])[run]


@pytest.mark.parametrize("run", RECORDS)
def test_run(ours, run):
    tally = compare_runs.compare(RECORDS[run], ours(run))
    assert not tally.differing, tally.differing[:5]
    answers = tally.total["logprobs"] + tally.total["texts"]
    assert answers and tally.total["prompts"] and tally.total["numbers"], tally


def _change(record, kind: str) -> None:
    """Spoil one thing of the first item, as little as must be noticed."""
    item = next(iter(record["samples"].values()))[0]
    if kind == "prompts":
        item["continuation"][0] += " "
    elif kind == "tokens":
        item["cont_tokens"][0][0] += 1
    elif kind == "logprobs":
        item["filtered_resps"][0][0] += 2e-4
    elif kind == "greedy":
        item["filtered_resps"][0][1] ^= True
    elif kind == "metrics":
        item["metrics"]["acc"] = 0.5
    elif kind == "texts":
        item["resps"][0][0] += " "
    else:
        record["results"]["wmdp_bio_robust"]["acc,none"] += 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_found(ours, kind):
    run = "neox_gen" if kind == "texts" else "neox_0shot"
    record = copy.deepcopy(RECORDS[run])
    _change(record, kind)
    tally = compare_runs.compare(record, ours(run))
    found = {name for name in KINDS if tally.equal[name] != tally.total[name]}
    assert found == {kind} and len(tally.differing) == 1


def test_what_is_missing_is_found(ours):
    found = ours("neox_0shot")
    samples = {name: lines[1:] for name, lines in found.samples.items()}
    results = {**found.results, "results": {}}
    tally = compare_runs.compare(RECORDS["neox_0shot"], Outcome(results, samples))
    assert tally.equal["numbers"] < tally.total["numbers"]
    assert tally.equal["prompts"] < tally.total["prompts"]
