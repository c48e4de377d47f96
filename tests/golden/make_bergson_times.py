"""How long Bergson 2.5.1 takes for the passes that `cli.py bench attribution` times, on one core.

Runs in the environment of make_bergson.py, pinned like ours, and in turn with ours:

    taskset -c 0 env OMP_NUM_THREADS=1 python -P tests/golden/make_bergson_times.py gpt2
    taskset -c 0 python cli.py bench attribution --preset tiny --batch 8 --length 256

Random models: `gpt2` is ours of preset `tiny` (4 layers, width 256, vocabulary 5,000); `gemma3` is
Gemma-shaped (4 layers, width 256, 4 heads of 64 over one, MLP 1,024, vocabulary 16,384). 64 rows of
256 tokens in batches of 8. Only passes over the data are timed, in CPU seconds, the least of three:
no imports, no loading. Prints JSON.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from bergson import DataConfig, IndexConfig, PreprocessConfig, ScoreConfig
from bergson.build import build
from bergson.collection import collect_gradients
from bergson.config.config import HessianConfig
from bergson.data import allocate_batches
from bergson.hessians.hessian_approximations import hessian_worker
from bergson.score.score import create_scorer
from bergson.utils.worker_utils import (
    create_processor,
    setup_data_pipeline,
    setup_model_and_peft,
)
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from tokenizers import Tokenizer, models

ROWS, LENGTH, BATCH, REPEATS = 64, 256, 8, 3
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=5000, n_positions=BATCH * LENGTH, n_embd=256, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    ),
    "gemma3": Gemma3TextConfig(
        vocab_size=16_384, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=1, head_dim=64, query_pre_attn_scalar=64,
        max_position_embeddings=BATCH * LENGTH, sliding_window=512, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    model.save_pretrained(folder / "model")
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w0", pad_token="w0", model_max_length=BATCH * LENGTH,
    ).save_pretrained(folder / "model")  # fmt: skip
    for split, rows in (("train", ROWS), ("query", 4)):
        ids = torch.randint(1, len(words), (rows, LENGTH)).tolist()
        Dataset.from_dict({"input_ids": ids, "labels": ids}).save_to_disk(str(folder / split))


class Timed:
    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0

    def config(self, split: str = "train", **options) -> IndexConfig:
        self.runs += 1
        made = IndexConfig(
            run_path=str(self.folder / f"run{self.runs}"), model=str(self.folder / "model"),
            data=DataConfig(dataset=str(self.folder / split)), token_batch_size=BATCH * LENGTH,
            **options,
        )  # fmt: skip
        made.partial_run_path.mkdir(parents=True)
        return made

    def plain(self) -> float:
        """Forward and backward of all weights, as training has it."""
        model = AutoModelForCausalLM.from_pretrained(self.folder / "model").eval()
        ids = torch.tensor(Dataset.load_from_disk(str(self.folder / "train"))["input_ids"])
        began = time.process_time()
        for start in range(0, ROWS, BATCH):
            batch = ids[start : start + BATCH]
            logits = model(batch).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            model.zero_grad()
        return time.process_time() - began

    def collect(self, query: Path | None = None, **options) -> float:
        """`bergson build`, or `bergson score` on a query's index."""
        config = self.config(**options)
        data, _ = setup_data_pipeline(config)
        model, targets = setup_model_and_peft(config)
        processor = create_processor(model, config, targets)
        scorer = None
        if query is not None:
            scorer = create_scorer(
                config.partial_run_path, data, ScoreConfig(query_path=str(query)),
                PreprocessConfig(), torch.device("cpu"), torch.float32,
                attribute_tokens=config.attribute_tokens,
            )  # fmt: skip
        batches = allocate_batches(data["length"][:], BATCH * LENGTH)
        began = time.process_time()
        collect_gradients(
            model, data, processor, config, batches=batches, target_modules=targets, scorer=scorer
        )
        return time.process_time() - began

    def query(self, **options) -> Path:
        config = self.config("query", **options)
        config.partial_run_path.rmdir()
        build(config, PreprocessConfig())
        return Path(config.run_path)

    def ekfac(self) -> float:
        config = self.config()
        data, _ = setup_data_pipeline(config)
        began = time.process_time()
        hessian_worker(0, 0, 1, config, HessianConfig("kfac", ev_correction=True), data)
        return time.process_time() - began


def main(name: str) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), name)
        timed = Timed(Path(folder))
        whole, small = timed.query(), timed.query(projection_dim=16)
        programs = {
            "forward_backward": timed.plain,
            "build_16": lambda: timed.collect(projection_dim=16),
            "build_32": lambda: timed.collect(projection_dim=32),
            "score_16": lambda: timed.collect(small, projection_dim=16),
            "token_score_unprojected": lambda: timed.collect(whole, attribute_tokens=True),
            "token_score_16": lambda: timed.collect(
                small, projection_dim=16, attribute_tokens=True
            ),
            "ekfac_fit": timed.ekfac,
        }
        for program, run in programs.items():
            repeats = 1 if program == "ekfac_fit" else REPEATS
            with contextlib.redirect_stderr(io.StringIO()):
                seconds = min(run() for _ in range(repeats))
            found[program] = {"cpu_seconds": seconds, "tokens_per_second": ROWS * LENGTH / seconds}
            print(program, round(seconds, 2), file=sys.stderr, flush=True)
    print(json.dumps({"model": name, "threads": torch.get_num_threads(), "programs": found}))


if __name__ == "__main__":
    main(sys.argv[1])
