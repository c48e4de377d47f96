"""Queries of a store: the rows that a plain search over all products would name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from attribution import query
from attribution.commands.query import query as command
from attribution.projection import Projection
from attribution.store import Pass, Store, build
from attribution.targets import Spec
from core.checkpoint import load_model, save_model
from core.command import Door
from core.config import Execution
from core.errors import InputError
from core.memmap import Parts
from core.rows import load_rows
from core.rundir import open_run

N, D, Q = 50, 6, 4
LENGTHS = [17, 21, 24, 18, 23, 24, 20]  # of one batch


class Numbers:
    """A store of given features, in two files."""

    def __init__(self, folder: Path, values_ND: np.ndarray):
        paths = [folder / "a.npy", folder / "b.npy"]
        for path, part in zip(paths, np.split(values_ND, [17]), strict=True):
            np.save(path, part)
        self.array = Parts(paths)

    def read(self, rows: slice) -> np.ndarray:
        return self.array[rows]


@pytest.fixture
def values_ND():
    values_ND = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
    values_ND[30:40] = values_ND[10:20]  # equal rows: the first are named first
    values_ND[[0, 45]] = 0
    return values_ND


@pytest.mark.parametrize("cosine", [False, True], ids=["inner", "cosine"])
@pytest.mark.parametrize("block", [1, 7, N])
@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e25])
def test_top_k_is_that_of_all_products(tmp_path, monkeypatch, values_ND, cosine, block, scale):
    """Also for gradients whose squares float32 cannot hold, which a cosine must not notice."""
    monkeypatch.setattr(query, "BLOCK", block * D)
    query_QD = np.random.default_rng(1).normal(size=(Q, D)).astype(np.float32)
    if cosine:
        query_QD /= np.linalg.norm(query_QD, axis=1, keepdims=True)
    products_QN = query_QD.astype(np.float64) @ values_ND.T
    if cosine:
        norms_N = np.linalg.norm(values_ND, axis=1)
        products_QN /= np.where(norms_N > 0, norms_N, 1)
    store: Any = Numbers(tmp_path, values_ND * np.float32(scale))
    best = query.top_k(store, query_QD, 8, cosine)
    expected_QK = np.argsort(-products_QN.round(6), axis=1, kind="stable")[:, :8]
    np.testing.assert_array_equal(best.rows_QK, expected_QK)
    scores_QK = np.take_along_axis(products_QN, expected_QK, 1) * (1 if cosine else scale)
    np.testing.assert_allclose(best.scores_QK, scores_QK, 1e-5)


def test_of_a_small_store_all_rows_are_named(tmp_path, values_ND):
    store: Any = Numbers(tmp_path, values_ND)
    best = query.top_k(store, values_ND[1:2], 1000)
    assert sorted(best.rows_QK[0].tolist()) == list(range(N))


class Letters:
    """Every byte from 'A' is a token."""

    bos, add_bos, fingerprint = 0, False, None

    @staticmethod
    def encode(text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) - 65

    @staticmethod
    def decode(ids: np.ndarray) -> str:
        return bytes((np.asarray(ids) + 65).tolist()).decode()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """A model folder, rows and their store."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model", tiny.config, tiny.params())
    rows = tiny.rows(folder / "rows", LENGTHS, source=[f"s{i}" for i in range(len(LENGTHS))])
    with open_run(folder / "store", "attribute build", {}) as run:
        loaded = load_model(folder / "model")
        build(run, Pass(loaded, rows, Spec(Projection(4)), Execution(), 512))
    return folder


@pytest.fixture
def ask(world):
    """Run `attribute query` over the world's store; returns its output."""

    def ask(*arguments: object, lines: str = "") -> str:
        def rows(path, loaded):
            return load_rows(path, loaded.config.vocab_size, loaded.config.context)

        given = [world / "store", "--model", world / "model", *arguments]
        result = CliRunner().invoke(
            command, list(map(str, given)), obj=Door(rows, lambda *_: Letters), input=lines
        )
        if result.exception:
            raise result.exception
        return result.stdout

    return ask


def test_rows_find_themselves(world, ask):
    said = ask("--query", world / "rows", "--cosine", "--top-k", 3, "--json", "--verify")
    for i, line in enumerate(said.splitlines()):
        answer = json.loads(line)
        best = answer["hits"][0]
        assert (answer["query"], best["row"], best["source"]) == (i, i, f"s{i}")
        assert abs(best["score"] - 1) < 1e-5 and [hit["rank"] for hit in answer["hits"]] == [
            1,
            2,
            3,
        ]


def test_a_text_finds_the_row_it_is(world, ask, tmp_path):
    """However it is given; its score is the gradients' own product."""
    text = Letters.decode(load_rows(world / "rows").ids(4))
    rows, features_ND = (
        Store(world / "store").array.shape[0],
        np.load(world / "store/gradients.npy"),
    )
    said = json.loads(ask("--text", text, "--json", "--top-k", rows))
    scores = {hit["row"]: hit["score"] for hit in said["hits"]}
    np.testing.assert_allclose(
        [scores[i] for i in range(rows)], features_ND @ features_ND[4], 1e-4, 1e-5
    )
    typed = ask("--json", "--top-k", rows, lines=f"{text}\n\n A\n{text}\n").splitlines()
    assert [json.loads(line) for line in typed] == [said, said]
    ask("--text", text, "--top-k", rows, "--out", tmp_path / "hits")
    assert json.loads((tmp_path / "hits" / "hits.jsonl").read_text()) == said
    table = ask("--text", text, "--cosine").splitlines()
    assert table[0] == f"query: {text}" and table[1].split()[:4] == ["1", "1", "row", "4"]


@pytest.mark.parametrize("arguments,message", [
    (["--text", "A"], "text 'A' has 1 tokens; give one of 2 to 40"),
    (["--text", "A" * 41], "has 41 tokens; give one of 2 to 40"),
    (["--text", "AB", "--query", "/rows"], "--query and --text"),
    (["--out", "/nowhere"], "--out records no lines of stdin"),
])  # fmt: skip
def test_what_cannot_be_asked_is_refused(ask, arguments, message):
    with pytest.raises(InputError, match=message):
        ask(*arguments)


def test_a_store_of_another_model_is_refused(tiny, ask, tmp_path):
    save_model(tmp_path / "other", tiny.config, tiny.params(seed=1))
    with pytest.raises(InputError, match="made with another model"):
        ask("--model", tmp_path / "other", "--text", "AB")
