"""Expected numbers of data attribution from Bergson 2.5.1: gradients, Hessians and scores.

Needs an environment of its own (see README.md). Bergson's own pipelines run on two small untied
models with random weights; nothing is computed here but the checkpoints that SOURCE reads:

    python -P tests/golden/make_bergson.py [gpt2] [gemma3]    rewrites bergson/NAME/

MODULE is a linear layer's name below the base model, SPLIT train or query, SIZES [O, I], or
[O, I+1] with the bias last. Each document is a batch of its own, so nothing depends on how Bergson
batches. Dims: N rows of a split, Q query rows, T tokens, P = 4 and M = 16 projected sizes.

model/          a Hugging Face model
rows.npz        SPLIT/ids, SPLIT/labels [N, T] int32, padding -1 and -100; SPLIT/lengths [N]
gradients.npz   sum/SPLIT/MODULE [N, O, I]; KIND/MODULE [2, *SIZES] of the first train rows, KIND
                mean, log_odds, smooth (0.1), and with biases bias, adam, adafactor; loss/sum,
                loss/mean [N] of train
normalizers.npz exp_avg_sq.NAME, exp_avg_sq_row.NAME, exp_avg_sq_col.NAME by parameter name, as
                a checkpoint stores them (GPT-2's matrices [I, O])
projected.npz   matrix/KIND/MODULE/left [P, O], right [P, I], right_bias [P, I+1], KIND rademacher
                or normal, divided by sqrt(P); RUN/SPLIT/MODULE [N, P P], RUN rademacher, normal,
                seed7, bias, row_norm, adam, adafactor, heads (MODULE.head_i);
                global/SPLIT [N, M], trak/SPLIT [N, 2 M] (normal, of log-odds)
hessians.npz    autocorrelation/{train,query,mixed}/MODULE [P P, P P]; mix_lambda; trak_gram;
                METHOD/{A,G}/MODULE raw sums (Shampoo's A is divided by its trace) of kfac, tkfac,
                shampoo, kfac_bias; METHOD/corrected/MODULE [O, I] of kfac and shampoo; positions;
                ihvp/METHOD/MODULE [O, I], the inverse times query 0's gradient
scores.npz      [N, Q] by name, or one column where queries are reduced; token_gradient and
                token_output [sum(T-1), Q] with offsets [N+1]; trak_weights [N], trak_scale;
                higher is better but for source and source_adam
source.npz      C/params/NAME, C/exp_avg_sq/NAME of checkpoints C = 0..3, in 2 segments; steps and
                beta2 of their Adam; lrs and adam_lrs (for source_adam), segment_steps [2]

Kronecker factors use the rows' own labels; `_cg` is ASTRA's conjugate gradients, 8 steps on all
rows; damping is 0.1 of the mean eigenvalue, in LiSSA 0.1.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from bergson import DataConfig, GradientProcessor, IndexConfig, PreprocessConfig, ScoreConfig
from bergson.approx_unrolling.pipeline import approx_unrolling_pipeline
from bergson.build import build
from bergson.cli.commands import Build, Hessian
from bergson.cli.trackstar import trackstar
from bergson.cli.trak import trak
from bergson.collector.collector import create_module_projection_matrix
from bergson.config.config import (
    ApproxUnrollingConfig,
    AstraConfig,
    AttentionConfig,
    HessianConfig,
    HessianPipelineConfig,
    InversionConfig,
    LissaConfig,
    QuerySetConfig,
    TrackstarConfig,
    TrackstarIndexConfig,
    TrakConfig,
)
from bergson.config.config_io import save_run_config
from bergson.data import column_offsets, load_gradients, load_scores
from bergson.hessians import astra
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.hessians.lissa import lissa_pipeline
from bergson.hessians.pipeline import hessian_pipeline
from bergson.hessians.preconditioner import _load_full
from bergson.process_grads import mix_autocorrelation_matrices
from bergson.score.score import score_dataset
from bergson.utils.math import compute_lambda
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from tokenizers import Tokenizer, models

P, M = 4, 16
LENGTHS = {"train": (24, 13, 19, 16, 24, 3, 21, 14, 17, 22), "query": (20, 13, 24)}
FEW = 2  # rows whose gradients are stored in every variant
LONGEST = 24  # the token budget of a batch: two documents never fit, for all but one exceed half
INVERSIONS = ("damped_inverse", "absolute_damped_inverse", "pseudoinverse", "tikhonov_filtered")
STEPS, EVERY = 8, 2  # of the training run that SOURCE unrolls
ADAM = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
# Square, tall and wide matrices; no two sizes that could be swapped by mistake are equal.
CONFIGS = {
    "gpt2": GPT2Config(
        vocab_size=61,
        n_positions=32,
        n_embd=20,
        n_layer=2,
        n_head=4,
        n_inner=36,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
    ),
    "gemma3": Gemma3TextConfig(
        vocab_size=61,
        max_position_embeddings=32,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        query_pre_attn_scalar=9,
        sliding_window=7,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
HEADS = {  # one module split by its outputs: heads, features of one, axis of [N, T, O]
    "gpt2": ("h.1.mlp.c_fc", AttentionConfig(num_heads=4, head_size=9, head_dim=2)),
    "gemma3": ("layers.1.self_attn.q_proj", AttentionConfig(4, 6, 2)),
}

GLOBAL = {
    "global": {"projection_dim": M, "projection_target": "global"},
    "trak": {
        "projection_dim": 2 * M,
        "projection_target": "global",
        "projection_type": "normal",
        "loss_fn": "log_odds",
    },
}
KRONECKER = {  # name: (factors, inversion, iterative refinement, with bias)
    "kfac": (HessianConfig("kfac"), {}, {}, False),
    "kfac_bias": (HessianConfig("kfac"), {}, {}, True),
    "kfac_ft": (HessianConfig("kfac"), {"inversion": "factored_tikhonov"}, {}, False),
    "ekfac": (HessianConfig("kfac", ev_correction=True), {}, {}, False),
    "ekfac_cg": (
        HessianConfig("kfac", ev_correction=True),
        {},
        {"num_steps": 8, "solver": "cg", "batch_size": len(LENGTHS["train"])},
        False,
    ),
    "tkfac": (HessianConfig("tkfac"), {}, {}, False),
    "shampoo": (HessianConfig("shampoo"), {}, {}, False),
    "shampoo_ev": (HessianConfig("shampoo", ev_correction=True), {}, {}, False),
}
LISSA_SCALE, LISSA_DEPTH = 2000.0, 30
UNROLLED = {"lrs": (0.01, 0.02), "adam_lrs": (3e-3, 3e-3), "segment_steps": (4, 4)}


class Case(NamedTuple):
    """Where one model's inputs are and its runs go."""

    name: str
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def load(self):
        return AutoModelForCausalLM.from_pretrained(self.model, attn_implementation="eager").eval()

    def config(self, run: str, split: str = "train", **options) -> IndexConfig:
        return IndexConfig(
            run_path=str(self.folder / run),
            model=str(self.model),
            data=DataConfig(dataset=str(self.folder / split)),
            token_batch_size=LONGEST,
            **options,
        )

    def queries(self) -> QuerySetConfig:
        return QuerySetConfig(dataset=str(self.folder / "query"))


def layers(model) -> dict[str, tuple[torch.nn.Module, int, int]]:
    """{module: (layer, O, I)} in Bergson's order."""
    found = {}
    for name, layer in model.base_model.named_modules():
        if isinstance(layer, Conv1D):
            found[name] = layer, layer.nf, layer.nx
        elif isinstance(layer, torch.nn.Linear):
            found[name] = layer, layer.out_features, layer.in_features
    return found


def make_inputs(case: Case) -> dict[str, np.ndarray]:
    """The model with random weights, biases and norms, the two datasets, and their arrays."""
    random = torch.Generator().manual_seed(11)
    model = AutoModelForCausalLM.from_config(CONFIGS[case.name]).float()
    for name, parameter in model.named_parameters():
        norm = parameter.ndim == 1 and name.endswith("weight")
        spread = 1.3 * parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
        torch.nn.init.normal_(parameter, 0.0, spread, generator=random)
        parameter.data += float(norm and case.name == "gpt2")  # Gemma's norms add the one
    model.save_pretrained(case.model)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w0",
        pad_token="w0",
        model_max_length=32,
    )
    tokenizer.save_pretrained(case.model)
    arrays = {}
    for split, lengths in LENGTHS.items():
        ids_NT = torch.full((len(lengths), LONGEST), -1, dtype=torch.int32)
        labels_NT = torch.full_like(ids_NT, -100)
        for n, length in enumerate(lengths):
            ids_NT[n, :length] = torch.randint(1, len(words), (length,), generator=random)
            masked = length // 2 if n % 3 == 0 else 0
            labels_NT[n, masked:length] = ids_NT[n, masked:length]
        rows = {
            "input_ids": [row[:n].tolist() for row, n in zip(ids_NT, lengths, strict=True)],
            "labels": [row[:n].tolist() for row, n in zip(labels_NT, lengths, strict=True)],
        }
        Dataset.from_dict(rows).save_to_disk(str(case.folder / split))
        arrays[f"{split}/ids"] = ids_NT.numpy()
        arrays[f"{split}/labels"] = labels_NT.numpy()
        arrays[f"{split}/lengths"] = np.array(lengths, np.int32)
    return arrays


def built(config: IndexConfig, preprocess: PreprocessConfig | None = None) -> dict[str, np.ndarray]:
    """Run `bergson build`: {module: [N, features]}."""
    preprocess = preprocess or PreprocessConfig()
    config.partial_run_path.mkdir(parents=True)
    save_run_config(Build(config, preprocess), config.partial_run_path)
    build(config, preprocess)
    return stored(Path(config.run_path))


def stored(path: Path) -> dict[str, np.ndarray]:
    gradients = np.array(load_gradients(path))
    sizes = json.loads((path / "info.json").read_text())["grad_sizes"]
    return {name: gradients[:, lo:hi] for name, (lo, hi) in column_offsets(sizes).items()}


def matrices(gradients: dict[str, np.ndarray], sizes) -> dict[str, np.ndarray]:
    return {k: v.reshape(len(v), sizes[k][1], -1) for k, v in gradients.items()}


def scored(
    config: IndexConfig, query: Path, preprocess: PreprocessConfig | None = None, **options
) -> np.ndarray:
    """Run `bergson score` against a query index: [N, Q], or a row for every token."""
    choice = ScoreConfig(query_path=str(query), **options)
    score_dataset(config, choice, preprocess or PreprocessConfig())
    return np.array(load_scores(Path(config.run_path))[:])


def flat(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}/{name}": value for name, value in arrays.items()}


def write_moments(case: Case) -> dict[str, np.ndarray]:
    """Random second moments as torch's Adam and transformers' Adafactor would save them."""
    random, found = torch.Generator().manual_seed(5), {}
    states = {"adam": {}, "adafactor": {}}
    for i, (name, parameter) in enumerate(case.load().named_parameters()):
        moment = torch.rand(parameter.shape, generator=random) ** 2 * 1e-2 + 1e-5
        found[f"exp_avg_sq.{name}"] = moment
        states["adam"][i] = {"exp_avg_sq": moment, "step": torch.tensor(10)}
        states["adafactor"][i] = states["adam"][i]
        if moment.ndim == 2:
            row, column = moment.mean(1), moment.mean(0) * (1 + torch.rand(1, generator=random))
            found |= {f"exp_avg_sq_row.{name}": row, f"exp_avg_sq_col.{name}": column}
            states["adafactor"][i] = {"exp_avg_sq_row": row, "exp_avg_sq_col": column}
    for kind, state in states.items():
        groups = [{"params": list(state)}]
        torch.save({"state": state, "param_groups": groups}, case.folder / f"{kind}.pt")
    return {name: value.numpy() for name, value in found.items()}


def make_gradients(case: Case, sizes) -> dict[str, np.ndarray]:
    found = {}
    for split in LENGTHS:
        gradients = built(case.config(f"sum_{split}", split))
        found |= flat(f"sum/{split}", matrices(gradients, sizes))
    variants = {
        "mean": {"loss_reduction": "mean"},
        "bias": {"include_bias": True},
        "log_odds": {"loss_fn": "log_odds"},
        "smooth": {"label_smoothing": 0.1},
        "adam": {"optimizer_state": str(case.folder / "adam.pt"), "include_bias": True},
        "adafactor": {"optimizer_state": str(case.folder / "adafactor.pt"), "include_bias": True},
    }
    for kind, options in variants.items():
        gradients = matrices(built(case.config(kind, **options)), sizes)
        found |= flat(kind, {name: value[:FEW] for name, value in gradients.items()})
    for kind, run in (("sum", "sum_train"), ("mean", "mean")):
        kept = Dataset.load_from_disk(str(case.folder / run / "data.hf"))
        found[f"loss/{kind}"] = np.array(kept["loss"])
    return found


def make_projected(case: Case, sizes) -> dict[str, np.ndarray]:
    found = {}
    for kind in ("rademacher", "normal"):
        for name, (_, outputs, inputs) in sizes.items():
            for side, columns in (("left", outputs), ("right", inputs), ("right_bias", inputs + 1)):
                matrix = create_module_projection_matrix(
                    name,
                    side.removesuffix("_bias"),
                    P,
                    columns,
                    torch.float32,
                    torch.device("cpu"),
                    kind,
                    "jl",
                    None,
                )
                found[f"matrix/{kind}/{name}/{side}"] = matrix.numpy()
    split_module, heads = HEADS[case.name]
    runs = {
        "rademacher": {},
        "normal": {"projection_type": "normal"},
        "seed7": {"projection_seed": 7},
        "bias": {"include_bias": True},
        "row_norm": {"projection_scale": "row_norm"},
        "adam": {"optimizer_state": str(case.folder / "adam.pt")},
        "adafactor": {"optimizer_state": str(case.folder / "adafactor.pt")},
        "heads": {"split_attention_modules": [split_module], "attention": heads},
    }
    for split in LENGTHS:
        for run, options in runs.items():
            config = case.config(f"{run}_{split}", split, projection_dim=P, **options)
            gradients = built(config)
            if run == "heads":
                gradients = {k: v for k, v in gradients.items() if ".head_" in k}
            found |= flat(f"{run}/{split}", gradients)
        for run, options in GLOBAL.items():
            gradients = built(case.config(f"{run}_{split}", split, **options))
            found[f"{run}/{split}"] = np.concatenate([*gradients.values()], 1)
    return found


def score_gradients(case: Case) -> dict[str, np.ndarray]:
    """Dot products of whole gradients; tokens by where a gradient arises or by the loss it cuts."""
    query, adam = case.folder / "sum_query", {"optimizer_state": str(case.folder / "adam.pt")}
    tokens = {"attribute_tokens": True}
    found = {
        "raw": scored(case.config("raw"), query),
        "cosine": scored(case.config("cosine"), query, PreprocessConfig(unit_normalize=True)),
        "nearest": scored(case.config("nearest"), query, score="nearest"),
        "token_gradient": scored(case.config("token_gradient", **tokens), query),
        "token_output": scored(
            case.config("token_output", **tokens), query, token_influence="output"
        ),
    }
    # Aggregated by `score` itself, only the first column is written; it is the mean of queries.
    averaged = scored(case.config("mean_query"), query, PreprocessConfig(aggregation="mean"))
    found["mean_query"] = averaged[:, :1]
    found["offsets"] = np.array(load_scores(case.folder / "token_gradient").offsets)
    built(case.config("adam_query_whole", "query", **adam))
    found["adam"] = scored(case.config("adam_scores", **adam), case.folder / "adam_query_whole")
    return found


def score_projected(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(scores, Hessians) of projected gradients with the autocorrelation as Hessian."""
    scores, hessians = {}, {}
    for split in LENGTHS:
        config = case.config(f"H_{split}", split, projection_dim=P)
        choice = HessianConfig(method="autocorrelation")
        save_run_config(Hessian(choice, config), config.partial_run_path)
        approximate_hessians(config, choice)
    components = 10
    folders = {kind: case.folder / f"H_{kind}" for kind in ("train", "query", "mixed")}
    mix_autocorrelation_matrices(folders["query"], folders["train"], folders["mixed"], components)
    processors = {kind: GradientProcessor.load(path) for kind, path in folders.items()}
    for kind, processor in processors.items():
        values = {name: value.numpy() for name, value in processor.hessians.items()}
        hessians |= flat(f"autocorrelation/{kind}", values)
    eigen = [processors[split].hessians_eigen for split in ("query", "train")]
    hessians["mix_lambda"] = np.array(compute_lambda(*eigen, components))

    query = case.folder / "rademacher_query"

    def with_hessian(run: str, kind: str, cosine: bool, inversion: str = "damped_inverse"):
        preprocess = PreprocessConfig(
            hessian_path=str(folders[kind]),
            unit_normalize=cosine,
            inversion_cfg=InversionConfig(inversion, 0.1),
        )
        scores[run] = scored(case.config(run, projection_dim=P), query, preprocess)

    for inversion in INVERSIONS:
        with_hessian(f"{inversion}_onesided", "train", False, inversion)
        with_hessian(f"{inversion}_split_cosine", "train", True, inversion)
    with_hessian("mixed_split_cosine", "mixed", True)
    whole = case.config("global_scores", **GLOBAL["global"])
    scores["global"] = scored(whole, case.folder / "global_query")
    scores["projected_nearest"] = scored(
        case.config("projected_nearest", projection_dim=P), query, score="nearest"
    )

    trackstar_config = TrackstarConfig(
        query=case.queries(),
        preprocess_cfg=PreprocessConfig(unit_normalize=True),
        target_downweight_components=components,
    )
    trackstar(pipeline(case.config("trackstar", projection_dim=P)), trackstar_config)
    scores["trackstar"] = np.array(load_scores(case.folder / "trackstar/scores")[:])

    damping = PreprocessConfig(inversion_cfg=InversionConfig(damping_factor=0.1))
    trak_config = pipeline(case.config("trak", **GLOBAL["trak"]))
    trak(trak_config, TrakConfig(query=case.queries(), preprocess_cfg=damping))
    folder = case.folder / "trak"
    scores["trak"] = np.array(load_scores(folder / "scores")[:])
    scores |= {f"trak_{k}": np.load(folder / f"scores/trak_{k}.npy") for k in ("weights", "scale")}
    gram = GradientProcessor.load(folder / "train_hessian").hessians["joint"]
    return scores, hessians | {"trak_gram": gram.numpy()}


def pipeline(config: IndexConfig) -> TrackstarIndexConfig:
    fields = [field.name for field in dataclasses.fields(config)]
    return TrackstarIndexConfig(**{name: getattr(config, name) for name in fields})


def score_kronecker(case: Case, sizes) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(scores, factors and inverses) of the Kronecker-factored Hessians, and LiSSA."""
    scores, hessians = {}, {}
    for name, (choice, inversion, refinement, bias) in KRONECKER.items():
        config = case.config(f"kron_{name}", include_bias=bias)
        choice = dataclasses.replace(choice, use_dataset_labels=True)
        options = HessianPipelineConfig(
            query=case.queries(),
            inversion_cfg=InversionConfig(**inversion),
            astra=AstraConfig(**refinement),
        )
        hessian_pipeline(config, choice, ScoreConfig(), PreprocessConfig(), options)
        folder = Path(config.run_path)
        factors = folder / "hessian" / choice.method
        scores[name] = np.array(load_scores(folder / "scores")[:])

        def read(kind: str, factors=factors) -> dict[str, np.ndarray]:
            return {k: v.numpy() for k, v in _load_full(factors, f"{kind}_sharded", "cpu").items()}

        if name in ("kfac", "kfac_bias", "tkfac", "shampoo"):
            hessians |= flat(f"{name}/A", read("activation"))
            hessians |= flat(f"{name}/G", read("gradient"))
        if choice.ev_correction and not refinement:
            hessians |= flat(f"{choice.method}/corrected", read("eigenvalue_correction"))
        if not bias:
            solved = stored(folder / ("astra_query" if refinement else f"{choice.method}_query"))
            first = {k: v[0] for k, v in matrices(solved, sizes).items()}
            hessians |= flat(f"ihvp/{name}", first)
        hessians["positions"] = torch.load(factors / "total_processed.pt").numpy()
    config = case.config("lissa")
    rows = len(LENGTHS["train"])
    lissa = LissaConfig(
        query=case.queries(),
        damping=0.1,
        scale=LISSA_SCALE,
        depth=LISSA_DEPTH,
        repeats=1,
        batch_size=rows,
        micro_batch_size=rows,
    )
    lissa_pipeline(config, ScoreConfig(), PreprocessConfig(), lissa)
    scores["lissa"] = np.array(load_scores(case.folder / "lissa/scores")[:])
    return scores, hessians


def train(case: Case) -> tuple[list[Path], dict[str, np.ndarray]]:
    """A short run of torch's AdamW on whole rows; checkpoints as transformers' trainer saves."""
    model, found, paths = case.load(), {}, []
    optimizer = torch.optim.AdamW(model.parameters(), **ADAM)
    rows = Dataset.load_from_disk(str(case.folder / "train"))
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            (model(ids, labels=labels).loss / len(rows)).backward()
        optimizer.step()
        if step % EVERY == 0:
            path = case.folder / "run" / f"checkpoint-{step}"
            shutil.copytree(case.model, path)
            model.save_pretrained(path)
            torch.save(optimizer.state_dict(), path / "optimizer.pt")
            paths.append(path)
            for name, parameter in model.named_parameters():
                moment = optimizer.state[parameter]["exp_avg_sq"]
                found[f"{len(paths) - 1}/params/{name}"] = parameter.detach().numpy().copy()
                found[f"{len(paths) - 1}/exp_avg_sq/{name}"] = moment.numpy().copy()
    found["steps"] = np.arange(EVERY, STEPS + 1, EVERY)
    found["beta2"] = np.array(ADAM["betas"][1])
    return paths, found | {name: np.array(value) for name, value in UNROLLED.items()}


def score_source(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(scores, inputs): approximate unrolling as after gradient descent, and as after Adam."""
    paths, inputs = train(case)
    scores = {}
    for name, lrs in (("source", "lrs"), ("source_adam", "adam_lrs")):
        options = ApproxUnrollingConfig(
            checkpoints=[str(path) for path in paths],
            segments=2,
            lr_list=list(UNROLLED[lrs]),
            step_size_list=list(UNROLLED["segment_steps"]),
            momentum=0.0,
            use_adam_preconditioner=name == "source_adam",
            query=case.queries(),
        )
        choice = HessianConfig("kfac", ev_correction=True, use_dataset_labels=True)
        approx_unrolling_pipeline(case.config(name), choice, options)
        scores[name] = np.array(load_scores(case.folder / f"{name}/scores")[:])
    return scores, inputs


def make(name: str) -> None:
    target = Path(__file__).parent / "bergson" / name
    with tempfile.TemporaryDirectory() as scratch:
        case = Case(name, Path(scratch))
        arrays = {"rows": make_inputs(case), "normalizers": write_moments(case)}
        sizes = layers(case.load())
        with contextlib.redirect_stdout(io.StringIO()):
            arrays["gradients"] = make_gradients(case, sizes)
            arrays["projected"] = make_projected(case, sizes)
            projected, autocorrelation = score_projected(case)
            kronecker, factors = score_kronecker(case, sizes)
            source, arrays["source"] = score_source(case)
            arrays["scores"] = score_gradients(case) | projected | kronecker | source
        arrays["hessians"] = autocorrelation | factors
        (target / "model").mkdir(parents=True, exist_ok=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(case.model / file, target / "model" / file)
    for file, values in arrays.items():
        for key, value in values.items():
            assert np.isfinite(value).all(), key
        np.savez_compressed(target / f"{file}.npz", **values)
    sizes = {path.name: path.stat().st_size for path in sorted(target.rglob("*.*"))}
    print(name, sizes, "in all", sum(sizes.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(CONFIGS)}")
    torch.set_num_threads(1)
    # On a CPU, ASTRA would update a read-only memory map in place.
    astra.load_gradients = lambda path: np.array(load_gradients(path))
    for name in parser.parse_args().names or CONFIGS:
        make(name)
