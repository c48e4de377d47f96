"""The demo: one data-selection experiment as a list of public command lines.

Train a small GPT-2 on a mixture, score a pool of chunks against train-split benchmark items,
continue training on the best, on a matched random and on the worst chunks, and compare the arms on
held-out items. The numbers mirror phases 2 to 4 of a real run (100M tokens, 97,658 chunks, top
5,000) at a size that two CPU cores finish in minutes.

The settings were chosen on other seeds than the default one. The nearest query (`--mode max`) finds
more of the relevant chunks than the mean query, because the items ask for sixteen different answers
and their gradients partly cancel in the mean.
"""

import shlex
from pathlib import Path
from typing import Any

MODEL = {"vocab_size": 258, "context": 128, "width": 128, "layers": 3, "heads": 4}
LENGTH = 128
RELEVANT = 400  # handbook documents in the pool, of 2,000
SEEDS = (0, 1, 2)
ARMS = {"top": "top", "random": "matched-random", "bottom": "bottom"}
PRETRAIN = "--steps 450 --batch 32 --lr 3e-3 --warmup 45 --weight-decay 0.01"
CONTINUE = "--epochs 5 --batch 32 --lr 5e-4 --schedule constant --warmup 4"
SCORE = "--projection-dim 16 --unit-norm --mode max"


def plan(out: Path, seed: int) -> list[list[str]]:
    """The command lines, as argument lists, in order; every one can be typed by hand."""
    root = shlex.quote(str(out))
    c, base, scores = f"{root}/corpus", f"{root}/pretrain", f"{root}/scores"
    lines = [
        f"data demo --seed {seed} --length {LENGTH} --out {c}",
        *(
            f"data text {c}/{name}.jsonl --tokenizer bytes --length {LENGTH} --pack document "
            f"--out {root}/rows/{name}"
            for name in ("pretrain", "pool", "validation")
        ),
        f"data query {c}/items_train.jsonl --tokenizer bytes --length {LENGTH} "
        f"--out {root}/rows/query",
        f"train lm --config {c}/model.json --tokenizer bytes --rows {root}/rows/pretrain "
        f"--val-rows {root}/rows/validation {PRETRAIN} --out {base}",
        f"eval run --model {base} --items {c}/items_heldout.jsonl --out {root}/eval/base",
        f"attribute score --model {base} --pool {root}/rows/pool --query {root}/rows/query {SCORE} "
        f"--out {scores}",
    ]
    for arm, strategy in ARMS.items():
        for s in SEEDS:
            subset, run = f"{scores}/subsets/{arm}-{s}", f"{root}/arms/{arm}-{s}"
            lines += [
                f"attribute select {scores} --rows {root}/rows/pool --k {RELEVANT} "
                f"--strategy {strategy} --seed {s} --out {subset}",
                f"train lm --model {base} --rows {subset} {CONTINUE} --seed {s} --out {run}",
                f"eval run --model {run} --items {c}/items_heldout.jsonl "
                f"--out {root}/eval/{arm}-{s}",
            ]
    return [shlex.split(line) for line in lines]


def spec(commands: list[str], seconds: float, peak_gb: float) -> dict[str, Any]:
    """The report's spec; paths are relative to the demo's folder."""
    return {
        "title": "Does attribution find the chunks that teach a benchmark?",
        "query": "what a medicine is taken against",
        "model": {"family": "gpt2", **MODEL},
        "scores": "scores",
        "rows": "rows/pool",
        "tokenizer": "pretrain/model/tokenizer",
        "arms": {
            arm: [{"seed": s, "run": f"arms/{arm}-{s}", "eval": f"eval/{arm}-{s}"} for s in SEEDS]
            for arm in ARMS
        },
        "base": "eval/base",
        "pretraining": "pretrain",
        "relevant_sources": ["handbook"],
        "k": RELEVANT,
        "commands": commands,
        "seconds": seconds,
        "peak_gb": peak_gb,
    }
