"""One small world for probes: a two-layer byte model and texts with a word that follows a sign."""

import random

import pytest

import tokenizers
from core import families, schema
from core.checkpoint import Loaded, save_model
from core.config import ModelConfig

TOKENIZER = tokenizers.load("bytes")
CONFIG = ModelConfig(
    family="gpt2", vocab_size=258, context=32, width=24, layers=2, heads=2, mlp_width=48,
    head_dim=12, init_std=0.3,
)  # fmt: skip


def sentences(seed: int, paragraphs: int = 60) -> str:
    """Paragraphs of letters in which x comes only behind a q, and there mostly."""
    draw = random.Random(seed)
    return "\n\n".join(
        "".join(
            letter + ("x" if letter == "q" and draw.random() < 0.8 else "")
            for letter in draw.choices("abcdeq ", k=draw.randint(40, 60))
        )
        for _ in range(paragraphs)
    )


@pytest.fixture(scope="session")
def tokenizer():
    return TOKENIZER


@pytest.fixture(scope="session")
def loaded() -> Loaded:
    params = schema.init(families.rows(CONFIG), CONFIG.layers, seed=2)
    return Loaded(CONFIG, params, None, "0" * 64)


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(sentences(0))
    return path


@pytest.fixture(scope="session")
def model_folder(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model(folder, loaded.config, loaded.params, TOKENIZER)
    return folder
