"""Expected numbers of MAGIC from Bergson 2.5.1: scores of training tokens through whole runs.

Runs after make_bergson.py and in its environment (see README.md), on its models and rows:

    python -P tests/golden/make_bergson_magic.py [gpt2] [gemma3]    rewrites bergson/NAME/magic.npz

What is stored is what Bergson's `run_magic` writes in float64, in which Gemma's norms and attention
would still round to float32 and here do not: two epochs over the training rows in batches of four,
so five steps, each batch's loss sum(w nll) / (its supervised tokens). Scores are
d(query loss) / d(w), so negative is a proponent; all parameters decay. Bergson's entry t is the
weight of token t + 1; here they are label-aligned. Dims: N rows, T tokens, Q query rows.

order                [2 N] int32, the rows in the order of training, both epochs
VARIANT/tokens       [N, T] for the mean query loss per supervised token
VARIANT/queries      [N, Q] for each query row's own mean
VARIANT/loss         that mean query loss after training, nats
VARIANT/lr           [5] of each step

It also prints how far the scores of a few tokens are from central differences of Bergson's own
training.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import bergson.utils.worker_utils as workers
import numpy as np
import torch
from bergson import DataConfig, QuerySetConfig
from bergson.config.config import LRScheduleConfig
from bergson.data import load_scores
from bergson.magic.cli import (
    attach_doc_ids_if_missing,
    attach_example_ids,
    compute_query_gradients,
    run_magic,
    shuffled_epochs,
)
from bergson.magic.config import MagicConfig
from bergson.magic.data_stream import DataStream
from bergson.magic.trainer import prepare_trainer
from bergson.utils.worker_utils import setup_data_pipeline
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from tokenizers import Tokenizer, models

NAMES = ("gpt2", "gemma3")
STEP, CHECKED = 1e-5, 6  # of the central differences; tokens of each variant
SGD = {
    "optimizer": "sgd",
    "adam_beta1": 0.0,  # Bergson's name for the momentum
    "weight_decay": 0.0,
    "lr_schedule": LRScheduleConfig(lr=0.05, lr_scheduler_type="linear"),
}
ADAMW = {
    "optimizer": "adamw",
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_eps": 1e-8,
    "eps_root": 1e-8,
    "weight_decay": 0.01,
    "lr_schedule": LRScheduleConfig(
        lr=2e-3, lr_scheduler_type="polynomial", lr_start=2e-6, lr_end=2e-4, warmup_steps=2
    ),
}
VARIANTS = {
    "sgd": SGD,
    "sgd_momentum": SGD | {"adam_beta1": 0.9, "weight_decay": 0.1},
    "sgd_clip": SGD | {"max_grad_norm": 0.5},
    "sgd_accumulate": SGD | {"grad_accum_steps": 2},
    "adamw": ADAMW,
    # Bergson's backward pass forgets Muon's decay.
    "muon": ADAMW | {"optimizer": "muon", "adam_beta1": 0.95, "weight_decay": 0.0},
}


class Case(NamedTuple):
    """One model and its rows, and a folder for runs."""

    name: str
    golden: Path
    folder: Path

    def rows(self) -> dict[str, np.ndarray]:
        with np.load(self.golden / "rows.npz", allow_pickle=False) as found:
            return dict(found)

    def prepare(self) -> None:
        """The rows as datasets, and the tokenizer that Bergson asks for and never uses."""
        rows = self.rows()
        for split in ("train", "query"):
            columns = {
                column: [
                    row[:n].tolist()
                    for row, n in zip(rows[f"{split}/{key}"], rows[f"{split}/lengths"], strict=True)
                ]
                for column, key in (("input_ids", "ids"), ("labels", "labels"))
            }
            Dataset.from_dict(columns).save_to_disk(str(self.folder / split))
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"w0": 0}, unk_token="w0")),
            eos_token="w0",
            pad_token="w0",
        ).save_pretrained(self.folder / "tokenizer")

    def config(self, run: str, aggregation: str = "mean", **options) -> MagicConfig:
        return MagicConfig(
            run_path=str(self.folder / run),
            model=str(self.golden / "model"),
            tokenizer=str(self.folder / "tokenizer"),
            precision="fp64",
            data=DataConfig(dataset=str(self.folder / "train")),
            query=QuerySetConfig(dataset=str(self.folder / "query"), aggregation=aggregation),
            batch_size=4,
            num_epochs=2,
            save_mode="all",
            wandb_project="",
            **options,
        )


def sequence(config: MagicConfig) -> Dataset:
    """The rows in the order of training."""
    rows = attach_example_ids(attach_doc_ids_if_missing(setup_data_pipeline(config)[0]))
    return shuffled_epochs(rows, config.seed, config.num_epochs)


def scored(config: MagicConfig) -> tuple[np.ndarray, float]:
    """Run `bergson magic`: (scores, query loss after training)."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run_magic(config)
    scores = load_scores(Path(config.run_path) / "scores")
    loss = said.getvalue().split("Baseline loss: ")[1].split("\n")[0]
    return scores.to_grid().numpy() if config.attribute_tokens else scores[:], float(loss)


def trained_loss(config: MagicConfig, weights_NT: torch.Tensor) -> float:
    """The query loss after Bergson's forward pass alone, tokens weighted."""
    stream = DataStream(sequence(config), config.batch_size, weight_shape=weights_NT.shape)
    stream.weights = torch.nn.Parameter(weights_NT)
    schedule = config.lr_schedule.get_schedule(len(stream))
    trainer, state, model = prepare_trainer(config, 0, schedule)
    state = trainer.train(
        state.detach_(),
        stream,
        inplace=True,
        max_grad_norm=config.max_grad_norm,
        grad_accum_steps=config.grad_accum_steps,
    )
    queries, count = setup_data_pipeline(config, config.query)
    return compute_query_gradients(state, model, DataStream(queries, count))[1]


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """A model of float64 computes in it throughout."""
    softmax = torch.nn.functional.softmax
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch.nn.functional, "softmax", lambda x, dim, **_: softmax(x, dim)),
    ):
        yield


def error(config: MagicConfig, scores_NT: np.ndarray) -> float:
    """Largest difference from central differences of a few tokens, relative to the largest."""
    large = np.argwhere(np.abs(scores_NT) > 0.02 * np.abs(scores_NT).max())
    places = np.random.default_rng(0).permutation(large)[:CHECKED]
    found = []
    for n, t in places:
        losses = []
        for sign in (1, -1):
            weights_NT = torch.ones(scores_NT.shape, dtype=torch.float64)
            weights_NT[n, t] += sign * STEP
            losses.append(trained_loss(config, weights_NT))
        found.append((losses[0] - losses[1]) / (2 * STEP))
    return float(np.abs(scores_NT[*places.T] - found).max() / np.abs(found).max())


def label_aligned(scores_NT: np.ndarray) -> np.ndarray:
    return np.pad(scores_NT, ((0, 0), (1, 0)))[:, : scores_NT.shape[1]]


def make(name: str) -> None:
    golden = Path(__file__).parent / "bergson" / name
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, in_float64():
        case = Case(name, golden, Path(folder))
        case.prepare()
        order = sequence(case.config("order", **SGD))["example_ids"]
        found, errors = {"order": np.array(order, np.int32)}, {}
        for variant, options in VARIANTS.items():
            tokens = case.config(f"{variant}_tokens", attribute_tokens=True, **options)
            tokens_NT, loss = scored(tokens)
            queries_NQ, _ = scored(case.config(f"{variant}_queries", "none", **options))
            history = Path(tokens.run_path, "checkpoints", "log_history.json").read_text()
            values = {
                "tokens": label_aligned(tokens_NT),
                "queries": queries_NQ,
                "loss": loss,
                "lr": [step["learning_rate"] for step in json.loads(history)],
            }
            found |= {f"{variant}/{key}": np.float32(value) for key, value in values.items()}
            errors[variant] = f"{error(tokens, tokens_NT):.1e}"
    for key, value in found.items():
        assert np.isfinite(value).all(), key
    np.savez_compressed(golden / "magic.npz", **found)
    print(name, (golden / "magic.npz").stat().st_size, "bytes; against differences", errors)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(NAMES)}")
    torch.set_num_threads(1)
    # Gemma passes vocab_size by position, which Bergson's loss takes by keyword only.
    loss = workers.weighted_causal_lm_ce
    workers.weighted_causal_lm_ce = lambda logits, labels, vocab_size=None, **options: loss(
        logits, labels, vocab_size=vocab_size, **options
    )
    for name in parser.parse_args().names or NAMES:
        make(name)
