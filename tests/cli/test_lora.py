"""Adapters through the door: train one, attach it everywhere, merge it, trace it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from core.adapter import Adapter
from core.checkpoint import load_model
from core.files import read_json

GOLDEN = Path(__file__).parents[1] / "golden"
TRAIN = "--steps 3 --batch 4 --lr 0.05 --save-every 2 --layers scan".split()


@pytest.fixture(scope="module")
def world(chained, tmp_path_factory, run):
    """The chain's base model with an adapter trained on its pool, in a folder of its own."""
    folder, out = chained[0], tmp_path_factory.mktemp("lora")
    lora = "--lora-rank 2 --lora-dropout 0.1 --lora-targets attn.c_attn,c_fc".split()
    line = ["train", "lm", "--model", folder / "runs/base", "--rows", folder / "rows/pool",
            *TRAIN, *lora, "--out", out / "run"]  # fmt: skip
    return folder, out, line, run(*line)


def held(place) -> Adapter:
    found = load_model(place).adapter
    assert found is not None
    return found


@pytest.fixture
def losses(world, run, tmp_path):
    """Token losses of the pool under a model, by the words that name it."""
    folder, made = world[0], []

    def losses(*model: object) -> np.ndarray:
        made.append(tmp_path / f"{len(made)}.npy")
        run("eval", "nll", *model, "--rows", folder / "rows/pool", "--out", made[-1])
        return np.load(made[-1])

    return losses


def test_the_run_holds_a_folder_of_peft_and_its_tokenizer(world, run):
    _, out, line, said = world
    assert "adapter_parameters" in said and "already" in run(*line)
    config = read_json(out / "run/adapter/adapter_config.json")
    assert config["r"] == 2 and config["lora_alpha"] == 4 and config["fan_in_fan_out"] is True
    assert config["target_modules"] == ["attn.c_attn", "c_fc"]
    assert (out / "run/adapter/bytes_tokenizer.json").exists() and not (out / "run/model").exists()


def test_the_run_the_adapter_and_the_merged_model_are_one_model(
    world, losses, run, close, tmp_path
):
    folder, out, *_ = world
    base = losses("--model", folder / "runs/base")
    ours = losses("--model", out / "run")
    assert np.nanmax(np.abs(ours - base)) > 1e-3
    attached = losses("--model", folder / "runs/base", "--adapter", out / "run/adapter")
    np.testing.assert_array_equal(attached, ours)
    for number, model in enumerate(
        ([out / "run"], [folder / "runs/base", "--adapter", out / "run"])
    ):
        run("convert", "export", *model, "--out", tmp_path / f"hf{number}")
    assert not (tmp_path / "hf0/adapter_config.json").exists()
    merged = losses("--model", tmp_path / "hf0")
    close(np.nan_to_num(merged), np.nan_to_num(ours))
    prints = {load_model(tmp_path / name).fingerprint for name in ("hf0", "hf1")}
    assert len(prints) == 1


def test_items_are_scored_with_the_adapter(world, run, tmp_path):
    folder, out, *_ = world
    line = ["eval", "run", "--model", folder / "runs/base", "--items", folder / "items.jsonl"]
    run(*line, "--adapter", out / "run", "--out", tmp_path / "eval")
    ours, base = (read_json(f / "results.json") for f in (tmp_path / "eval", folder / "eval/base"))
    assert ours["model"] == load_model(out / "run").fingerprint != base["model"]
    assert ours["answer_logprob"] != base["answer_logprob"]


def test_gradients_are_the_adapters_unless_told_otherwise(world, run, refuse, tmp_path):
    folder, out, *_ = world
    build = ["attribute", "build", "--model", folder / "runs/base", "--rows", folder / "rows/pool",
             "--projection-dim", "0"]  # fmt: skip
    run(*build, "--adapter", out / "run", "--out", tmp_path / "store")
    info = read_json(tmp_path / "store/info.json")
    names = [site["name"] for site in info["sites"]]
    assert names[:2] == ["h.0.attn.c_attn.lora_A", "h.0.attn.c_attn.lora_B"]
    assert info["width"] == held(out / "run").spec.rank * 2 * (8 + 24 + 8 + 32)
    assert 0 < info["coverage"]["parameters"] < 0.5
    run(*build, "--adapter", out / "run", "--gradients", "weight", "--out", tmp_path / "weight")
    names = [site["name"] for site in read_json(tmp_path / "weight/info.json")["sites"]]
    assert names[0] == "h.0.attn.c_attn" and len(names) == 8

    score = ["attribute", "score", "--query", folder / "rows/query", "--projection-dim", "0"]
    run(*score, "--model", out / "run", "--pool", tmp_path / "store", "--out", tmp_path / "scores")
    values = np.load(tmp_path / "scores/scores.npy")
    assert len(np.unique(values)) > 1
    said = refuse(*score, "--model", folder / "runs/base", "--pool", tmp_path / "store",
                  "--out", tmp_path / "other")  # fmt: skip
    assert "made with another model" in said
    said = refuse(*score, "--model", out / "run", "--gradients", "weight", "--pool",
                  tmp_path / "store", "--out", tmp_path / "other")  # fmt: skip
    assert "use the same options" in said


def test_an_adapter_is_trained_on(world, run, tmp_path):
    folder, out, *_ = world
    more = ["train", "lm", "--rows", folder / "rows/pool", *TRAIN]
    run(*more, "--model", out / "run", "--out", tmp_path / "more")
    run(*more, "--model", folder / "runs/base", "--adapter", out / "run/adapter",
        "--lora-dropout", "0.1", "--out", tmp_path / "same")  # fmt: skip
    places = (out / "run", tmp_path / "more", tmp_path / "same")
    first, second, third = (load_model(place).fingerprint for place in places)
    assert second == third != first
    base = load_model(folder / "runs/base").fingerprint
    assert {held(place).base for place in places} == {base}


def test_a_folder_of_peft_is_attached_to_a_hugging_face_folder(run, tmp_path, relative):
    run("convert", "export", GOLDEN / "gpt2_tiny", "--adapter", GOLDEN / "gpt2_tiny_lora",
        "--out", tmp_path / "hf")  # fmt: skip
    plain, merged = (load_model(f).params for f in (GOLDEN / "gpt2_tiny", tmp_path / "hf"))
    changed = {k for k, v in plain["blocks"].items() for n in v
               if (v[n] != merged["blocks"][k][n]).any()}  # fmt: skip
    assert changed == {"attn_c_attn", "mlp_c_proj"}


def test_what_does_not_fit_together_is_told(world, refuse, tmp_path):
    folder, out, *_ = world
    train = ["train", "lm", "--rows", folder / "rows/pool", *TRAIN, "--out", tmp_path / "x"]
    base = ["--model", folder / "runs/base"]
    for words, message in (
        ([*base, "--lora-alpha", "4"], "--lora-alpha needs --lora-rank"),
        ([*base, "--lora-dropout", "0"], "--lora-dropout needs --lora-rank"),
        ([*base, "--lora-rank", "2", "--lora-targets", "q_proj"], "name no linear map"),
        ([*base, "--lora-rank", "2", "--lora-targets", "(("], "no regular expression"),
        ([*base, "--adapter", folder / "rows"], "is no adapter"),
        (["--config", folder / "model.json", "--lora-rank", "2"], "give --model"),
        (["--config", folder / "model.json", "--adapter", out / "run"], "give --model"),
        (["--model", out / "run", "--lora-rank", "3"], "leave --lora-rank out"),
        (["--model", out / "run", "--adapter", out / "run"], "has an adapter already"),
    ):
        assert message in refuse(*train, *words), words
    assert not (tmp_path / "x").exists()
    build = ["attribute", "build", *base, "--rows", folder / "rows/pool", "--out", tmp_path / "y"]
    assert "give --adapter" in refuse(*build, "--gradients", "adapter")
    other = shutil.copytree(out / "run/adapter", tmp_path / "adapter")
    nll = ["eval", "nll", "--rows", folder / "rows/pool", "--out", tmp_path / "z.npy", "--model"]
    said = refuse(*nll, folder / "runs/top", "--adapter", other)
    assert "was trained on another model" in said
    content = read_json(other / "adapter_config.json")
    content["base_model_name_or_path"] = str(tmp_path / "gone")
    (other / "adapter_config.json").write_text(json.dumps(content))
    assert "gone', is not here; give it as --model BASE --adapter" in refuse(*nll, other)
