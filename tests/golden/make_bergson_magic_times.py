"""What a whole MAGIC run costs in Bergson 2.5.1 and here: CPU seconds and memory, on one core.

Bergson's half runs in the environment of make_bergson.py, ours in Taproot's, on the same folder:

    export OMP_NUM_THREADS=1
    python -P tests/golden/make_bergson_magic_times.py make FOLDER gpt2 64
    taskset -c 0 python -P tests/golden/make_bergson_magic_times.py bergson FOLDER sgd
    taskset -c 0 python -m tests.golden.make_bergson_magic_times ours FOLDER sgd

Random untied models: `gpt2` is ours of preset `tiny` (4 layers, width 256, vocabulary 5,000),
`gemma3` of preset `gemma3-tiny` (vocabulary 16,384). Rows of 256 tokens in batches of 8, one epoch,
the mean of 8 query rows, a score for every token, states brought back by `sqrt`.

Prints one line of JSON: cpu_seconds of the whole process and of all after its imports, and peak_mib
of resident memory above what there was when the model had been loaded.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LENGTH, BATCH, QUERIES = 256, 8, 8
SHAPE = {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": SHAPE | {"vocab_size": 5000, "n_positions": 1024, "n_embd": 256, "n_layer": 4,
                     "n_head": 4},
    "gemma3": SHAPE | {"vocab_size": 16_384, "max_position_embeddings": 2048, "hidden_size": 256,
                       "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4,
                       "num_key_value_heads": 1, "head_dim": 64, "query_pre_attn_scalar": 64,
                       "sliding_window": 512, "pad_token_id": 0},
}  # fmt: skip
RATES = {"sgd": 0.01, "adamw": 1e-4}
BETAS, EPS_ROOT, DECAY = (0.9, 0.95), 1e-8, 0.01  # of adamw; sgd has no momentum


class Memory:
    """Resident memory of this process, as Linux counts it, MiB."""

    base = 0.0

    @staticmethod
    def _read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))

    def loaded(self) -> None:
        """The model has been loaded: peaks count from here."""
        Path("/proc/self/clear_refs").write_text("5")
        self.base = self._read("VmRSS")

    def peak(self) -> float:
        return self._read("VmHWM") - self.base


def make(folder: Path, name: str, rows: int) -> None:
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        Gemma3TextConfig,
        GPT2Config,
        PreTrainedTokenizerFast,
    )

    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = {"gpt2": GPT2Config, "gemma3": Gemma3TextConfig}[name](**CONFIGS[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0")),
        eos_token="w0",
        pad_token="w0",
    ).save_pretrained(folder / "tokenizer")
    for split, count in (("train", rows), ("query", QUERIES)):
        ids = torch.randint(1, config.vocab_size, (count, LENGTH)).tolist()
        Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(str(folder / split))


def bergson(folder: Path, optimizer: str, run: Path, memory: Memory) -> Callable[[], None]:
    import bergson.magic.trainer as trainers
    import bergson.utils.worker_utils as workers
    import torch
    from bergson import DataConfig, QuerySetConfig
    from bergson.config.config import LRScheduleConfig
    from bergson.magic.cli import run_magic
    from bergson.magic.config import MagicConfig

    torch.set_num_threads(1)
    # Gemma passes vocab_size by position, which Bergson's loss takes by keyword only.
    loss, load = workers.weighted_causal_lm_ce, trainers.setup_model_and_peft
    workers.weighted_causal_lm_ce = lambda logits, labels, vocab_size=None, **options: loss(
        logits, labels, vocab_size=vocab_size, **options
    )

    def loaded(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)
        memory.loaded()
        return found

    trainers.setup_model_and_peft = loaded
    adamw = optimizer == "adamw"
    config = MagicConfig(
        run_path=str(run),
        model=str(folder / "model"),
        tokenizer=str(folder / "tokenizer"),
        precision="fp32",
        data=DataConfig(dataset=str(folder / "train")),
        query=QuerySetConfig(dataset=str(folder / "query"), aggregation="mean"),
        attribute_tokens=True,
        batch_size=BATCH,
        optimizer=optimizer,
        lr_schedule=LRScheduleConfig(lr=RATES[optimizer], lr_scheduler_type="linear"),
        adam_beta1=BETAS[0] if adamw else 0.0,
        adam_beta2=BETAS[1],
        eps_root=EPS_ROOT,
        weight_decay=DECAY if adamw else 0.0,
        wandb_project="",
    )
    return lambda: run_magic(config)


def ours(folder: Path, optimizer: str, run: Path, memory: Memory) -> Callable[[], None]:
    import orbax.checkpoint  # noqa: F401 (an import of every training command)

    from attribution.magic.functional import functional
    from attribution.magic.walk import Settings as Way
    from attribution.magic.walk import Walk
    from core.checkpoint import load_model
    from core.config import Execution
    from core.rows import load_rows
    from training.course import Course
    from training.loop import Settings
    from training.optim import Optim

    adamw = optimizer == "adamw"
    optim = Optim(
        optimizer,
        RATES[optimizer],
        "linear",
        end=0.0,
        weight_decay=DECAY if adamw else 0.0,
        b1=BETAS[0],
        b2=BETAS[1],
        eps_root=EPS_ROOT,
        clip=0.0,
        decay=("*",),
    )

    def work() -> None:
        loaded = load_model(folder / "model")
        memory.loaded()
        train, query = (load_rows(folder / split) for split in ("train", "query"))
        settings = Settings(len(train) // BATCH, BATCH)
        lean = Execution(layers="scan", remat=True)
        course = Course(loaded, train, settings, optim, lean)
        run.mkdir()
        way = Way(save_mode="sqrt", budget=0)  # states on disk, as Bergson has them
        Walk(run, course, functional(query, "mean", "nll"), way).go()

    return work


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "bergson", "ours"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", help="to make: gpt2 or gemma3; to run: sgd or adamw")
    parser.add_argument("rows", nargs="?", type=int, default=64)
    args = parser.parse_args()
    if args.what == "make":
        return make(args.folder, args.name, args.rows)
    memory, prepare = Memory(), {"bergson": bergson, "ours": ours}[args.what]
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(args.folder, args.name, Path(folder) / "run", memory)
        imports, began = time.process_time(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            work()
    total = time.process_time()
    found = {
        "what": args.what,
        "optimizer": args.name,
        "folder": args.folder.name,
        "cpu_seconds": round(total, 2),
        "cpu_seconds_of_work": round(total - imports, 2),
        "wall_seconds_of_work": round(time.monotonic() - began, 2),
        "peak_mib": round(memory.peak(), 1),
        "loaded_mib": round(memory.base, 1),
    }
    print(json.dumps(found), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
