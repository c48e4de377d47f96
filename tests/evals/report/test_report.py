"""The report: numbers that agree with what is on disk, a page that is whole, offline and safe."""

import copy
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

import tokenizers
from core.errors import InputError
from core.files import jsonable, read_json, read_jsonl, write_json, write_jsonl, write_npy
from core.page.text import decode, duration, esc, listed, num, percent, shortened, typeset
from core.rows import load_rows, save_rows
from evals.report import tokens
from evals.report.build import SPEC_KEYS, build_report
from evals.report.data import load_items
from evals.report.rows import Text

EFFECTS = {"top": 0.6, "random": 0.2, "bottom": -0.1}


def texts_of(source: str, rng: np.random.Generator) -> bytes:
    if source == "arithmetic":
        pairs = rng.integers(2, 60, (8, 2))
        return " ".join(f"What is {a} plus {b}? {a + b}." for a, b in pairs).encode()
    if source == "travel":
        names, places = ["Ada", "Bo", "Cy", "Dee"], ["Oslo", "Lima", "Rome", "Cairo"]
        pick = rng.integers(0, 4, (6, 2))
        return "\n".join(f"{names[a]} met a friend in {places[b]}." for a, b in pick).encode()
    words = "the value of an object is set when a class body is run and names are bound".split()
    return " ".join(rng.choice(words, 30)).encode()


def make_experiment(
    folder: Path, strange: bytes, chunks: int = 60, seeds: int = 3, items: int = 20, steps: int = 12
) -> dict:
    """A small made-up experiment in the formats of the commands; returns its spec."""
    rng = np.random.default_rng(0)
    names = np.array(["arithmetic", "manual", "travel"], object)
    source_N = rng.choice(names, chunks, p=[0.2, 0.6, 0.2])
    source_N[:3] = names
    data = [texts_of(source, rng) for source in source_N]
    data[1] = strange
    ids = [np.frombuffer(text, np.uint8).astype(np.int32) for text in data]
    tokenizer = tokenizers.load("bytes")
    save_rows(folder / "pool", ids, None, {"source": source_N.tolist()}, tokenizer.fingerprint)

    centre = {"arithmetic": 0.007, "manual": -0.001, "travel": 0.001}
    score_N = np.array([centre[s] + 0.002 * rng.standard_t(5) for s in source_N]).astype(np.float32)
    score_N[1] = score_N.min() - 0.001
    rank_N = np.argsort(np.argsort(-score_N))
    scores = folder / "scores"
    write_npy(scores / "scores.npy", score_N)
    write_json(scores / "info.json", {"sign": "positive = proponent", "mode": "mean"})
    write_jsonl(
        scores / "row_diagnostics.jsonl",
        [
            {"row": i, "score": float(score_N[i]), "rank": int(rank_N[i]), "percentile": 0.0,
             "length": len(ids[i]), "trained": len(ids[i]) - 1, "norm": 1.0, "source": source_N[i]}
            for i in range(chunks)
        ],
    )  # fmt: skip

    difficulty = rng.normal(-2.5, 0.8, items)
    write_eval(folder / "base", difficulty)
    write_run(folder / "pretrain", 5 * steps, 4.2, 2.1, rng, "data/pretrain")
    arms = {}
    for arm, effect in EFFECTS.items():
        arms[arm] = []
        for seed in range(seeds):
            name = f"{arm}{seed}"
            gain = effect + rng.normal(0, 0.05) + rng.normal(0, 0.25, items)
            write_eval(folder / f"eval_{name}", difficulty + gain)
            write_run(folder / f"run_{name}", steps, 2.3, 2.1 - effect / 2, rng, f"data/{arm}")
            arms[arm].append({"seed": seed, "run": f"run_{name}", "eval": f"eval_{name}"})
    return {
        "title": "Which chunks teach two-digit addition?",
        "query": "two-digit addition",
        "model": {"family": "GPT-2", "parameters": 811_264, "layers": 4, "width": 128},
        "scores": "scores",
        "rows": "pool",
        "tokenizer": "bytes",
        "arms": arms,
        "base": "base",
        "pretraining": "pretrain",
        "relevant_sources": ["arithmetic"],
        "k": chunks // 10,
        "commands": ["python cli.py attribute score --model 'runs/a b' --out scores"],
        "seconds": 251.3,
        "peak_gb": 1.42,
    }


def write_eval(folder: Path, logprob_I: np.ndarray) -> None:
    lines = [
        {"id": f"q{i:03}", "label": 0, "logprobs": [float(v), -3.0], "lengths": [3, 3],
         "pred": int(v < -3), "acc": float(v >= -3), "acc_norm": 1.0, "answer_logprob": float(v)}
        for i, v in enumerate(logprob_I)
    ]  # fmt: skip
    write_jsonl(folder / "items.jsonl", lines)


def test_an_eval_of_benchmarks_has_their_items(tmp_path):
    lines = [{"doc_id": i, "acc": 1.0, "answer_logprob": -float(i)} for i in range(3)]
    write_jsonl(tmp_path / "samples_arc_easy.jsonl", lines)
    write_jsonl(tmp_path / "samples_piqa.jsonl", lines[:1])
    write_jsonl(tmp_path / "samples_gsm8k.jsonl", [{"doc_id": 0, "answer_logprob": None}])
    ids, logprob_I, acc_I = load_items(tmp_path)
    assert ids == ["arc_easy/0", "arc_easy/1", "arc_easy/2", "piqa/0"]
    assert logprob_I.tolist() == [0, -1, -2, 0] and acc_I.tolist() == [1] * 4


def write_run(
    folder: Path, steps: int, first: float, last: float, rng: np.random.Generator, data: str
) -> None:
    lines = []
    for step in range(1, steps + 1):
        loss = last + (first - last) * np.exp(-5 * step / steps) + rng.normal(0, 0.04)
        lines.append({"step": step, "loss": loss, "lr": 1e-3, "tokens": 4096 * step})
        if step % max(1, steps // 5) == 0:
            lines.append({"step": step, "val_loss": loss + 0.1})
    write_jsonl(folder / "metrics.jsonl", lines)
    options = {"data": data, "steps": steps, "optim": {"lr": 1e-3, "name": "adamw"}, "seed": 0}
    write_json(folder / "config.json", {"command": "train lm", "options": options})
    write_json(folder / "env.json", {"jax": "0.10.2", "device": "cpu"})


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, strange):
    folder = tmp_path_factory.mktemp("experiment")
    return folder, make_experiment(folder, strange)


def built(spec: dict, folder: Path, out: Path) -> tuple[dict, str]:
    summary = build_report(spec, out, folder)
    assert read_json(out / "summary.json") == jsonable(summary)
    return summary, (out / "report.html").read_text("utf-8")


def test_summary_equals_numbers_taken_straight_from_the_files(experiment, tmp_path):
    folder, spec = experiment
    summary, _ = built(spec, folder, tmp_path)
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    top = sorted(lines, key=lambda line: -line["score"])[: spec["k"]]
    relevant = [line for line in lines if line["source"] == "arithmetic"]
    found = sum(line["source"] == "arithmetic" for line in top)
    assert summary["precision_at_k"] == pytest.approx(found / spec["k"])
    assert summary["recall_at_k"] == pytest.approx(found / len(relevant))
    assert summary["relevant_share"] == pytest.approx(len(relevant) / len(lines))
    means = {
        arm: np.mean([
            line["answer_logprob"]
            for seed in range(3)
            for line in read_jsonl(folder / f"eval_{arm}{seed}" / "items.jsonl")
        ])
        for arm in EFFECTS
    }  # fmt: skip
    for arm, mean in means.items():
        assert summary["arms"][arm]["mean"] == pytest.approx(mean)
    for better, worse in (("top", "random"), ("random", "bottom")):
        interval = summary[f"{better}_minus_{worse}"]
        assert interval["mean"] == pytest.approx(means[better] - means[worse])
        assert interval["low"] < interval["mean"] < interval["high"]
    assert summary["seconds"] == 251.3 and summary["peak_gb"] == 1.42


def test_items_and_seeds_are_paired_by_name_not_by_order(experiment, tmp_path):
    folder, spec = experiment
    before, _ = built(spec, folder, tmp_path / "before")
    lines = read_jsonl(folder / "eval_random1" / "items.jsonl")
    write_jsonl(folder / "eval_shuffled" / "items.jsonl", lines[::-1])
    spec = copy.deepcopy(spec)
    spec["arms"]["random"][1]["eval"] = "eval_shuffled"
    spec["arms"]["top"].reverse()
    after, _ = built(spec, folder, tmp_path / "after")
    for key in ("mean", "low", "high"):
        # resampling draws other copies when the seeds stand in another order
        expected = pytest.approx(before["top_minus_random"][key], abs=0.02)
        assert after["top_minus_random"][key] == expected
    assert after["random_minus_bottom"] == before["random_minus_bottom"]


@pytest.mark.parametrize(
    ("swap", "word", "said"),
    [
        (("top", "random", "bottom"), "Top-k beats random", "taught more"),
        (("random", "top", "bottom"), "Top-k loses to random", "taught less"),
        (("random", "random", "bottom"), "No difference shown", "did not measurably differ"),
    ],
)
def test_the_headline_follows_the_interval(experiment, tmp_path, swap, word, said):
    folder, spec = experiment
    arms = dict(zip(EFFECTS, (spec["arms"][name] for name in swap), strict=True))
    summary, html = built({**spec, "arms": arms}, folder, tmp_path)
    assert said in summary["verdict"]
    assert f'<p class="word">{word}</p>' in html


def test_one_seed_is_said_to_be_one_seed(experiment, tmp_path):
    folder, spec = experiment
    arms = {name: entries[:1] for name, entries in spec["arms"].items()}
    _, html = built({**spec, "arms": arms}, folder, tmp_path)
    assert "With one seed the interval covers the choice of items" in html


def test_unequal_compute_is_said(experiment, tmp_path):
    folder, spec = experiment
    assert "did not see the same number of tokens" not in built(spec, folder, tmp_path / "a")[1]
    write_run(folder / "run_long", 24, 2.3, 2.0, np.random.default_rng(0), "data/top")
    spec = copy.deepcopy(spec)
    spec["arms"]["top"][0]["run"] = "run_long"
    assert "did not see the same number of tokens" in built(spec, folder, tmp_path / "b")[1]


def test_page_is_well_formed_and_asks_for_nothing(experiment, tmp_path, parse):
    folder, spec = experiment
    page = parse(built(spec, folder, tmp_path)[1])
    assert page.open == []
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert not {"src", "srcset", "action", "data"} & set(attrs), tag
        assert all(not name.startswith("on") for name in attrs), tag
        if "href" in attrs:
            link = attrs["href"]
            assert link == "data:," or link in {f"#{name}" for name in ids}
    style = "".join(page.texts["style"])
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] or "" for a in page.all("meta") if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'") and "script-src 'sha256-" in policy
    assert len(page.all("script")) == 1


def test_charts_can_be_read_without_seeing_them(experiment, tmp_path, parse, drawable):
    folder, spec = experiment
    html = built(spec, folder, tmp_path)[1]
    page = parse(html)
    charts = page.all("svg")
    assert len(charts) == 7  # arms, differences, two widths of scores, recall, two of learning
    assert all(chart["aria-label"] and chart["role"] for chart in charts)
    assert len(page.texts["desc"]) == len(charts) and all(page.texts["desc"])
    marks = [attrs for _, attrs in page.tags if "data-tip" in attrs]
    assert all(m["tabindex"] == "0" and m["role"] == "img" and m["aria-label"] for m in marks)
    labels = [mark["aria-label"] or "" for mark in marks]
    for arm in ("Top 6", "Random 6", "Bottom 6"):
        assert sum(label.startswith(f"{arm}\nseed") for label in labels) == 3
        assert sum(label.startswith(f"{arm}\nmean") for label in labels) == 1
    drawable(html)


def test_histograms_hold_every_chunk_and_mark_the_selected_ones(experiment, tmp_path):
    folder, spec = experiment
    html = built(spec, folder, tmp_path)[1]
    wide = html[html.index('<svg class="wide"') : html.index('<svg class="narrow"')]
    bars = re.findall(r"&#10;([\d,]+) chunks?&#10;.*?class=\"bar( faint)?\"", wide)
    assert sum(int(n) for n, _ in bars) == 60
    assert sum(int(n) for n, faint in bars if not faint) == spec["k"]


def test_hostile_text_is_shown_and_never_run(experiment, tmp_path, parse, strange):
    folder, spec = experiment
    hostile = "</title></style><script>alert('x')</script>\x00\u202e\""
    spec = {**copy.deepcopy(spec), "title": hostile, "query": hostile, "commands": [hostile]}
    spec["model"] = {hostile: hostile}
    spec["arms"][hostile] = spec["arms"]["random"]
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    lines[0]["source"] = hostile
    write_jsonl(folder / "scores_hostile" / "row_diagnostics.jsonl", lines)
    html = built({**spec, "scores": "scores_hostile"}, folder, tmp_path)[1]
    page = parse(html)
    assert page.open == []
    assert len(page.all("script")) == 1 and len(page.all("style")) == 1 and not page.all("img")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069]", html)
    assert "‹U+202E›" in html  # in labels
    chunk = next(t for t in page.texts["pre"] if "alert(1)" in t)
    assert chunk.startswith(strange[:60].decode())
    named = set(page.texts["i"])
    assert {"U+0000", "U+0007", "U+001B", "U+000D", "\\xff", "\\xfe", "U+202E", "U+E0041"} <= named
    assert {"\n", "\t", "  "} <= named


def test_filter_finds_every_source_at_both_ends(experiment, tmp_path, parse):
    folder, spec = experiment
    page = parse(built({**spec, "shown": 5}, folder, tmp_path)[1])
    items = page.all("li")
    shown = [item for item in items if "data-source" in item and "hidden" not in item]
    assert len(shown) == 10
    for source in ("arithmetic", "manual", "travel"):
        assert sum(item.get("data-source") == source for item in items) >= 6
        assert any(button.get("data-source") == source for button in page.all("button"))


def test_only_scores(experiment, tmp_path, parse):
    folder, _ = experiment
    summary, html = built({"scores": "scores"}, folder, tmp_path)
    assert summary["top_minus_random"] is None and summary["recall_at_k"] is None
    assert summary["arms"] == {} and summary["chunks"] == 60
    assert "Scores only" in html and "cannot say" in html
    assert parse(html).open == []
    assert 'id="arms"' not in html and 'id="recall"' not in html and 'id="curves"' not in html


@pytest.mark.parametrize("missing", sorted(set(SPEC_KEYS) - {"scores"}))
def test_any_key_but_the_scores_may_be_missing(experiment, tmp_path, missing, parse):
    folder, spec = experiment
    html = built({k: v for k, v in spec.items() if k != missing}, folder, tmp_path)[1]
    assert parse(html).open == []


def test_scores_whose_low_end_helps_keep_their_sign(experiment, tmp_path):
    folder, spec = experiment
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    for line in lines:
        line["score"] *= -1
    write_jsonl(folder / "magic" / "row_diagnostics.jsonl", lines)
    before, _ = built(spec, folder, tmp_path / "a")
    after, html = built({**spec, "scores": {"MAGIC": "magic"}}, folder, tmp_path / "b")
    assert after["recall_at_k"] == before["recall_at_k"]
    assert "← more helpful" in html and "top 6 ≤" in html


def test_two_rankings_are_compared(experiment, tmp_path):
    folder, spec = experiment
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    for line in lines:
        line["rank"], line["score"] = line["row"], -line["row"]
    write_jsonl(folder / "order" / "row_diagnostics.jsonl", lines)
    named = {"gradient": "scores", "row <order>": "order"}
    summary, html = built({**spec, "scores": named}, folder, tmp_path)
    assert set(summary["methods"]) == set(named)
    assert summary["methods"]["gradient"]["auc"] == summary["auc"] > 0.9
    assert "row &lt;order&gt;: " in html


@pytest.mark.parametrize("scores", [[0.0], [0.0, 0.0, 0.0], [1e-9, 1e9, 5e8, -3e12]])
def test_degenerate_scores_still_make_a_page(tmp_path, scores, parse, drawable):
    ranked = sorted(scores, reverse=True)
    lines = [
        {"row": i, "score": s, "rank": i, "length": 1, "source": None} for i, s in enumerate(ranked)
    ]
    write_jsonl(tmp_path / "row_diagnostics.jsonl", lines)
    html = built({"scores": ".", "k": 1}, tmp_path, tmp_path / "out")[1]
    assert parse(html).open == []
    drawable(html)


def replaced(key, value):
    return lambda spec: spec.__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("scroes", "x"), "unknown report key 'scroes'"),
        (replaced("scores", None), "needs `scores`"),
        (replaced("scores", "nowhere"), "nowhere"),
        (replaced("k", 61), "k is 61"),
        (replaced("k", 0), "k is 0"),
        (replaced("k", "6"), "k is '6'"),
        (replaced("relevant_sources", ["poetry"]), "'poetry' is not in the pool"),
        (replaced("base", "eval_other"), "other items"),
        (replaced("tokenizer", "nowhere"), "nowhere"),
        (lambda spec: spec["arms"]["top"].pop(), "cannot be paired"),
        (lambda spec: spec["arms"]["top"][0].pop("eval"), "names no eval"),
        (lambda spec: spec["arms"]["top"][0].update(seed=1), "a seed twice"),
        (lambda spec: spec["arms"]["top"][0].update(eval="eval_other"), "other items"),
        (lambda spec: spec["arms"]["top"][0].update(eval="eval_null"), "q000 has no answer_log"),
        (lambda spec: spec["arms"]["top"][0].update(eval="eval_twice"), "an item id twice"),
        (lambda spec: spec["arms"].update(top=[]), "has no entries"),
        (lambda spec: spec["arms"].update(base=spec["arms"]["top"]), "cannot be called 'base'"),
    ],
)
def test_unusable_input_is_refused_before_anything_is_written(
    experiment, tmp_path, change, message
):
    folder, spec = experiment
    lines = read_jsonl(folder / "base" / "items.jsonl")
    write_jsonl(folder / "eval_other" / "items.jsonl", lines[1:])
    write_jsonl(folder / "eval_twice" / "items.jsonl", [lines[0], *lines])
    write_jsonl(folder / "eval_null" / "items.jsonl", [{"id": "q000", "answer_logprob": None}])
    spec = copy.deepcopy(spec)
    change(spec)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_report(spec, tmp_path / "out", folder)
    assert isinstance(caught.value, InputError | tokenizers.TokenizerError)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_tokenizer_are_refused(experiment, tmp_path):
    folder, spec = experiment
    ids = [np.arange(1, 5, dtype=np.int32)] * 60
    save_rows(folder / "other_pool", ids, None, {}, "0" * 64)
    with pytest.raises(InputError, match="another tokenizer"):
        build_report({**spec, "rows": "other_pool"}, tmp_path, folder)
    save_rows(folder / "small_pool", ids[:2], None, {}, None)
    with pytest.raises(InputError, match="name the rows that were scored"):
        build_report({**spec, "rows": "small_pool"}, tmp_path, folder)


def test_same_input_gives_the_same_page(experiment, tmp_path):
    folder, spec = experiment
    assert built(spec, folder, tmp_path / "a") == built(spec, folder, tmp_path / "b")


def with_tokens(folder: Path, name: str, scores_NT: np.ndarray, tokens: object) -> str:
    """A copy of the scores folder that also has token scores."""
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    write_jsonl(folder / name / "row_diagnostics.jsonl", lines)
    write_npy(folder / name / "token_scores.npy", scores_NT.astype(np.float32))
    write_json(folder / name / "info.json", {"sign": "positive = proponent", "tokens": tokens})
    return name


def test_tokens_are_coloured_by_their_scores(experiment, tmp_path, parse):
    folder, spec = experiment
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    scores_NT = np.zeros((60, max(line["length"] for line in lines)))
    scores_NT[:, 1:4] = [1.0, -2.0, 0.1]
    scores_NT[:, 4] = np.nan
    name = with_tokens(folder, "tokens", scores_NT, {"alignment": "label"})
    html = built({**spec, "scores": name}, folder, tmp_path)[1]
    assert parse(html).open == [] and "to predict it" in html
    for span in ('"helps s2" title="1: +1.00"', '"hurts s4" title="2: −2.00" tabindex="0"'):
        assert html.count(f"<span class={span}>") >= 24  # in twelve chunks of either end
    assert '<span title="3: +0.100">' in html  # too small for a colour, but its number is there
    assert html.count("<details open>") == 2  # the first and the last chunk
    best = min(lines, key=lambda line: line["rank"])["row"]
    shown = re.search(r'<details open>.*?<pre class="tokens" [^>]*>(.*?)</pre>', html, re.S)
    assert shown is not None
    ids = load_rows(folder / "pool").ids(best)
    assert unescape(re.sub("<[^>]*>", "", shown[1])) == tokenizers.load("bytes").decode(ids)
    # The colours change sides where low scores help; the numbers stay.
    for line in lines:
        line["score"] *= -1
    write_jsonl(folder / name / "row_diagnostics.jsonl", lines)
    html = built({**spec, "scores": name}, folder, tmp_path / "magic")[1]
    assert '<span class="hurts s2" title="1: +1.00">' in html
    assert '<span class="helps s4" title="2: −2.00" tabindex="0">' in html
    with_tokens(folder, name, scores_NT, {"alignment": "position"})
    assert "to read it" in built({**spec, "scores": name}, folder, tmp_path / "position")[1]


def test_a_character_of_several_tokens_stays_whole():
    text = Text([b"a", b"\xe2", b"\x82", b"\xac", b"\xff", b"\n", b"\xe2"], np.arange(7.0))
    assert tokens.limit([text]) == pytest.approx(np.quantile(np.arange(1.0, 7), 0.98))
    html = tokens.coloured(text, 6.0, higher_helps=True)
    pattern = r'<span(?: class="(helps s\d)")? title="([^"]*)"( tabindex="0")?>(.*?)</span>'
    spans = re.findall(pattern, html, re.S)
    assert spans == [
        ("", "0: 0", "", "a"),
        ("helps s4", "1: +1.00 +2.00 +3.00", ' tabindex="0"', "€"),
        ("helps s3", "4: +4.00", "", '<i class="ctl">\\xff</i>'),
        ("helps s3", "5: +5.00", "", '<i class="nl">\n</i>'),
        ("helps s4", "6: +6.00", "", '<i class="ctl">\\xe2</i>'),
    ]
    assert tokens.coloured(text._replace(scores_T=np.full(7, np.nan)), 1.0, True) == typeset(
        decode(text.data), blanks=False
    )
    assert [tokens.step(x, 8) for x in (-100, -3, -0.9, 0, 1.1, 8)] == [-4, -2, 0, 0, 1, 4]
    assert tokens.step(float("nan"), 8) == tokens.step(3, 0) == 0
    assert tokens.limit([]) == 0


@pytest.mark.parametrize(
    ("shape", "tokens", "message"),
    [
        ((60,), {"alignment": "label"}, "not a line for each of 60 rows"),
        ((59, 9), {"alignment": "label"}, "not a line for each of 60 rows"),
        ((60, 9), {"alignment": "middle"}, "'middle'"),
        ((60, 9), None, "tokens.alignment"),
    ],
)
def test_token_scores_that_cannot_be_placed_are_refused(
    experiment, tmp_path, shape, tokens, message
):
    folder, spec = experiment
    name = with_tokens(folder, "bad_tokens", np.ones(shape), tokens)
    with pytest.raises(InputError, match=re.escape(message)):
        build_report({**spec, "scores": name}, tmp_path, folder)


def test_rows_without_a_tokenizer_are_shown_as_ids(experiment, tmp_path, parse):
    folder, spec = experiment
    html = built({k: v for k, v in spec.items() if k != "tokenizer"}, folder, tmp_path)[1]
    assert any(re.fullmatch(r"\d+( \d+)+", text) for text in parse(html).texts["pre"])


def test_rows_that_were_no_candidates_are_left_out(experiment, tmp_path):
    folder, spec = experiment
    lines = read_jsonl(folder / "scores" / "row_diagnostics.jsonl")
    for line in lines:
        line["score"] = line["score"] if line["rank"] < 50 else None
    write_jsonl(folder / "candidates" / "row_diagnostics.jsonl", lines)
    summary, _ = built({**spec, "scores": "candidates"}, folder, tmp_path)
    assert summary["chunks"] == 50


METHODS = {"scores": (0.7, 0.6, 0.8), "random": (-0.02, -0.2, 0.2), "<b>25": (None, None, None)}


def make_validation(protocol: str, statistic: str, **details: object) -> dict:
    lines = [
        {"method": name, "statistic": statistic, "estimate": estimate,
         "interval": None if low is None else [low, high], "values": [estimate]}
        for name, (estimate, low, high) in METHODS.items()
    ]  # fmt: skip
    return {
        "format": "taproot-validation",
        "protocol": protocol,
        "fractions": [0.01],
        "count": 30,
        "seeds": 2,
        "same_query": True,
        "query_loss": {"before": 2.5, "after": 1.5},
        "table": lines,
        **details,
    }


LDS = make_validation(
    "drop",
    "lds",
    points={"measured": [0.1, 0.2, 0.4], "predicted": {"scores": [1, 2, 3], "random": [3, 1, 2]}},
)
TAIL = make_validation(
    "tail",
    "QLD 1%",
    fractions=[0.01, 0.1],
    increase={
        "scores": {"top": [0.25, 0.5], "bottom": [-0.125, -0.25]},
        "<b>25": {"top": [0.0625, 0.375], "bottom": [0, 0]},
        "random": [[0.01, 0.02, 0.03], [0.05, 0.02, 0.08]],
    },
)


def test_validations_in_the_folder_are_drawn(experiment, tmp_path, parse, drawable):
    folder, spec = experiment
    scores = with_tokens(folder, "validated", np.zeros((60, 4)), {"alignment": "label"})
    write_json(folder / scores / "validation" / "drop" / "validation.json", LDS)
    write_json(folder / scores / "validation" / "drop" / "config.json", {"command": "x"})
    write_json(folder / scores / "validation" / "tail.json", TAIL)
    write_json(folder / "mrr.json", make_validation("recall", "MRR", fractions=[]))
    listed = {**spec, "scores": scores, "validation": ["mrr.json", f"{scores}/validation/drop"]}
    summary, html = built(listed, folder, tmp_path)
    assert [v["protocol"] for v in summary["validation"]] == ["drop", "tail", "recall"]
    assert summary["validation"][0]["methods"]["scores"] == [0.7, 0.6, 0.8]
    part = html[html.index('<section id="validation">') :].split("</section>")[0]
    page = parse(part)
    assert page.open == ["section"] and len(page.all("svg")) == 5
    drawable(part)
    labels = [attrs["aria-label"] or "" for _, attrs in page.tags if "data-tip" in attrs]
    assert labels.count("scores\nlds 0.700\n95% interval 0.600 to 0.800") == 1
    assert not any(label.startswith("<b>25\nlds") for label in labels)  # has no number
    assert sum(label.startswith("measured +") for label in labels) == 3
    tenth = next(label for label in labels if label.startswith("10% removed"))
    assert "without the top: +0.500\nwithout the bottom: −0.250" in tenth
    assert "without random rows: +0.0500 (0.0200 to 0.0800)" in tenth
    assert "top by <b>25: +0.375" in tenth
    assert "from 2.50 to 1.50 nats" in part and "1% or 10%" in part


def test_scores_without_a_validation_say_nothing_of_it(experiment, tmp_path):
    folder, spec = experiment
    summary, html = built(spec, folder, tmp_path)
    assert "validation" not in summary and 'id="validation"' not in html


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"format": "other"}, "no result of `attribute validate`"),
        ({**LDS, "protocol": "guess"}, "no result of `attribute validate`"),
        ({**LDS, "points": {"measured": [1, 2]}}, "lacks what its protocol gives"),
        ({**TAIL, "increase": {"random": [[1]]}}, "lacks what its protocol gives"),
        ({**LDS, "points": {"measured": [1, 2], "predicted": {"scores": [1]}}}, "lacks what"),
        ({**LDS, "table": LDS["table"][1:]}, "no line for the scores"),
    ],
)
def test_broken_validations_are_refused(experiment, tmp_path, content, message):
    folder, spec = experiment
    write_json(folder / "broken.json", content)
    with pytest.raises(InputError, match=message):
        build_report({**spec, "validation": ["broken.json"]}, tmp_path / "out", folder)
    assert not (tmp_path / "out").exists()


def test_typesetting_loses_nothing(parse):
    text = decode(b"a  b\tc\n\xff \xe2\x80\xad<i>&\n\n end ")
    shown = parse(typeset(text)).texts
    assert "".join(shown["i"]).count("\n") == 3
    plain = re.sub("<[^>]*>", "", typeset(text))
    assert plain == "a  b\tc\n\\xff U+202D&lt;i&gt;&amp;\n\n end "
    assert esc("<\u2066'\"\ud800>") == "&lt;‹U+2066›&#x27;&quot;‹U+D800›&gt;"


def test_numbers_read_well():
    assert [num(x) for x in (0, 1, -0.4231, 1234.5, 0.00012, 3e-7, -2e12, float("nan"))] == [
        "0", "1.00", "−0.423", "1,234", "0.000120", "3.00×10⁻⁷", "−2.00×10¹²", "–",
    ]  # fmt: skip
    assert [percent(x) for x in (0, 0.004, 0.5, 1, None)] == ["0%", "0.4%", "50%", "100%", "–"]
    assert [duration(x) for x in (0.25, 60, 3725)] == ["0.25 s", "1 min 0 s", "1 h 2 min"]
    assert [listed(x) for x in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == [
        "", "a", "a and b", "a, b and c",
    ]  # fmt: skip
    assert len(shortened("x" * 50, 20)) == 20 and shortened("short", 20) == "short"
