"""The page of a MAGIC run: its verdict, every token's score within reach, the strongest of them."""

import re
from pathlib import Path

import numpy as np
import pytest

import tokenizers
from core.errors import InputError
from core.files import read_json, write_json, write_jsonl, write_npy
from core.rows import IGNORED, load_rows, save_rows
from evals.report import toptokens
from evals.report.build import build_report, write_page
from evals.report.rows import ROW_TOKENS, Source, TokenScores, heaviest
from evals.report.toptokens import strongest

WORDS = "a lobster is blue in life and turns red when it is cooked".split()
LDS = {
    "format": "taproot-validation",
    "protocol": "drop",
    "fractions": [0.01],
    "scores_times": -1.0,
    "table": [{"method": "scores", "statistic": "lds", "estimate": 0.7, "interval": [0.6, 0.8]}],
    "points": {"measured": [0.1, 0.2, 0.4], "predicted": {"scores": [1, 2, 3]}},
}
SPEC = {"scores": ".", "rows": "rows", "tokenizer": "bytes"}


def make_run(
    folder: Path, strange: bytes, rows: int = 40, length: int = 60, queries: int = 0, seed: int = 0
):
    """A made-up run over rows of bytes; returns its token scores [N,T] or [N,T,Q]."""
    rng = np.random.default_rng(seed)
    data = [" ".join(rng.choice(WORDS, length)).encode()[:length] for _ in range(rows)]
    data[1:3] = strange[:60], strange[60:120]
    ids = [np.frombuffer(text, np.uint8).astype(np.int32) for text in data]
    labels = [np.where(np.arange(len(row)) == 7, IGNORED, row) for row in ids]
    save_rows(folder / "rows", ids, labels, {}, tokenizers.load("bytes").fingerprint)
    scores = rng.standard_t(3, (rows, length, queries or 1)).astype(np.float32) * 1e-5
    scores[:, [0, 7]] = 0
    return scores if queries else scores[..., 0]


def write_scores(folder: Path, scores: np.ndarray, info: dict | None = None) -> None:
    """What `attribute magic` leaves of these token scores."""
    write_npy(folder / "per_token_scores.npy", scores)
    row_scores = scores.sum(1)
    write_npy(folder / "scores.npy", row_scores)
    score_N = row_scores if row_scores.ndim == 1 else row_scores.mean(1)
    scored = np.flatnonzero(np.isfinite(score_N))
    order = scored[np.argsort(score_N[scored])]
    rows = load_rows(folder / "rows")
    lines = [{"row": int(row), "score": float(score_N[row]), "rank": rank, "percentile": 0.0,
              "length": int(rows.lengths[row]), "source": None}
             for rank, row in enumerate(order)]  # fmt: skip
    if lines:
        write_jsonl(folder / "row_diagnostics.jsonl", lines)
    steps = [{"step": s + 1, "loss": 4 - s / 20, "lr": 0.1, "tokens": 9} for s in range(20)]
    write_jsonl(folder / "metrics.jsonl", steps)
    known = {
        "format": "taproot-scores",
        "method": "magic",
        "sign": "negative = proponent (d query loss / d token weight)",
        "query": {"path": "data/lobsters"},
        "queries": 3,
        "query_mode": "each" if scores.ndim == 3 else "mean",
        "target": "token",
        "tokens": {"file": "per_token_scores.npy", "alignment": "label"},
        "training": {"settings": {"batch": 2, "shuffle": False}, "optim": {"name": "sgd"}},
        "steps": 20,
        "losses": {"before": 3.75, "after": 3.5},
        "displacement": {"l2": 0.5, "relative": 0.0125},
        "metasmoothness": {"smoothness": 0.96},
        "trust": {"verdict": "trusted", "reasons": ["It is smooth."]},
    }
    write_json(folder / "info.json", known | (info or {}))


def link_rows(source: Path, folder: Path) -> None:
    (folder / "rows").symlink_to(source / "rows")


@pytest.fixture(scope="session")
def page_of(parse):
    """Build a run's page: its summary, and its HTML, which is well formed and shows what hides."""

    def built(folder: Path, **spec) -> tuple[dict, str]:
        summary = write_page({**SPEC, **spec}, folder / "report.html", folder)
        html = (folder / "report.html").read_text("utf-8")
        assert parse(html).open == []
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069]", html)
        return summary, html

    return built


def part(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}">') :].split("</section>")[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory, strange, page_of):
    folder = tmp_path_factory.mktemp("magic")
    scores_NT = make_run(folder, strange)
    write_scores(folder, scores_NT)
    write_json(folder / "summary.json", {"rows": 40})
    write_json(folder / "validation" / "drop" / "validation.json", LDS)
    summary, html = page_of(folder)
    return folder, scores_NT, summary, html


def test_headline_says_what_was_attributed_and_whether_to_trust_it(run, drawable):
    folder, _, summary, html = run
    said = "20 steps of SGD on 40 rows lowered the query's loss by 0.250 nats, from 3.75 to 3.50."
    assert summary["verdict"] == said
    assert summary["trust"] == {"verdict": "Scores are trusted", "reasons": ("It is smooth.",)}
    head = html[html.index('<section class="verdict v-yes">') :].split("</section>")[0]
    assert "mean loss of the rows in lobsters" in head and "A negative score helps" in head
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd><b>(.*?)<i>", head))
    assert facts.pop("tokens scored") == f"{sum(load_rows(folder / 'rows').trained):,}"
    assert list(facts.values()) == ["−0.250", "0.700", "0.960", "1.2%"]
    assert "0.600 to 0.800" in head
    assert read_json(folder / "summary.json") == {"rows": 40}  # is the run's own
    order = [
        html.index(f'<section id="{x}">') for x in ("chunks", "tokens", "validation", "curves")
    ]
    assert order == sorted(order)
    drawable(html)


@pytest.mark.parametrize(
    ("trust", "kind"),
    [
        ({"verdict": "not to be trusted", "reasons": ["<b>Rough</b>."]}, "no"),
        ({"verdict": "doubtful", "reasons": []}, "unclear"),
        (None, "unclear"),
    ],
)
def test_verdict_is_the_runs_own(run, tmp_path, trust, kind, page_of):
    link_rows(run[0], tmp_path)
    write_scores(tmp_path, run[1], {"trust": trust, "losses": {"before": 3.0, "after": 3.5}})
    summary, html = page_of(tmp_path)
    assert f'class="verdict v-{kind}"' in html and "<b>Rough" not in html
    assert "raised the query's loss by 0.500 nats" in summary["verdict"]
    assert summary["trust"]["verdict"] == f"Scores are {(trust or {}).get('verdict', 'doubtful')}"


def test_every_token_can_be_reached_and_says_its_score(run, parse):
    folder, scores_NT, _, html = run
    rows = load_rows(folder / "rows")
    boxes = re.findall(r'<pre class="tokens" ([^>]*)>(.*?)</pre>', html, re.S)
    assert len(boxes) == 24
    for attributes, body in boxes:
        row = int(re.findall(r'data-row="(\d+)"', attributes)[0])
        assert 'role="group"' in attributes and f'aria-label="Row {row}, ' in attributes
        spans = [dict(attrs) for tag, attrs in parse(body).tags if tag == "span"]
        values = [str(span["title"]).split(": ") for span in spans]
        positions = np.cumsum([0, *(len(scores.split()) for _, scores in values)])
        assert [int(position) for position, _ in values] == positions[:-1].tolist()
        assert positions[-1] == len(rows.ids(row))
        stops = [i for i, span in enumerate(spans) if span.get("tabindex") == "0"]
        if len(spans) == len(rows.ids(row)):  # else a character has several tokens
            known_T = scores_NT[row, : len(spans)]
            assert stops == [int(np.argmax(np.abs(known_T)))]
            helps = [i for i, span in enumerate(spans) if "helps" in str(span.get("class"))]
            assert helps and (known_T[helps] < 0).all()
        assert len(stops) == 1
    assert '<div id="readout" role="status"></div>' in html


def cells(table: str) -> list[list[str]]:
    """Texts of the cells of a table's body."""
    lines = re.findall(r"<tr>(<th scope=\"row\">.*?)</tr>", table, re.S)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", x, re.S) for x in lines]
    return [[re.sub("<[^>]*>", "", cell) for cell in row] for row in found]


def test_strongest_tokens_and_kinds_are_those_of_all_rows(run, monkeypatch):
    folder, scores_NT, _, html = run
    rows = load_rows(folder / "rows")
    every = [
        (float(scores_NT[row, t]), row, t, int(rows.ids(row)[t]))
        for row in range(len(rows))
        for t in range(1, len(rows.ids(row)))
        if t != 7
    ]
    source = Source(rows, tokenizers.load("bytes"))
    for size in (1, 200, 2**20):  # of a block
        monkeypatch.setattr(toptokens, "BLOCK_TOKENS", size)
        found = strongest(source, TokenScores(scores_NT, "label"), higher_helps=False)
        assert [(t.score, t.row, t.position) for t in found.helping] == [
            x[:3] for x in sorted(every)[:12]
        ]
        assert [t.score for t in found.hurting] == [x[0] for x in sorted(every)[:-13:-1]]
        assert found.finite == len(every) and found.missing == 0
        lobsters = [x[0] for x in every if x[3] == ord("l")]
        kinds = {k.text: k for k in [*found.kinds_helping, *found.kinds_hurting]}
        if "l" in kinds:
            assert kinds["l"].count == len(lobsters)
            assert kinds["l"].total == pytest.approx(sum(lobsters))
        totals = {i: sum(x[0] for x in every if x[3] == i) for i in {x[3] for x in every}}
        best = min(totals, key=totals.__getitem__)
        assert found.kinds_helping[0].total == pytest.approx(totals[best])
        assert found.kinds_helping[0].text.encode("utf-8", "surrogateescape") == bytes([best])
    tables = part(html, "tokens").split("<table")[1:]
    first = found.helping[0]
    shown = cells(tables[0])[0]
    assert shown[0] == first.before + first.text + first.after and shown[2:] == [
        f"{first.row}", f"{first.position}"
    ]  # fmt: skip
    assert [len(cells(table)) for table in tables[:2]] == [12, 12]


def test_hostile_text_stays_text_in_the_tables(run, tmp_path, parse, page_of):
    scores_NT = run[1].copy()
    scores_NT[1:3, 1:] = [[-1.0], [1.0]]  # the rows of hostile text are the strongest
    scores_NT[:, 7] = 0
    link_rows(run[0], tmp_path)
    write_scores(tmp_path, scores_NT)
    html = page_of(tmp_path)[1]
    page = parse(html)
    assert len(page.all("script")) == 1 and not page.all("img")
    helping, hurting = part(html, "tokens").split("<table")[1:3]
    assert any("&lt;script&gt;" in row[0] for row in cells(helping))
    assert '<i class="ctl">' in hurting


def test_runs_that_are_not_finite_have_a_page_that_says_so(run, tmp_path, page_of):
    link_rows(run[0], tmp_path)
    trust = {"verdict": "not to be trusted", "reasons": ["It overflowed."]}
    losses = {"before": 3.75, "after": None}
    write_scores(
        tmp_path,
        np.full_like(run[1], np.nan),
        {"losses": losses, "metasmoothness": None, "trust": trust},
    )
    summary, html = page_of(tmp_path)
    assert summary["chunks"] == 0 and 'class="verdict v-no"' in html
    assert "40 of 40 rows" in html and "It overflowed." in html and "no finite loss" in html
    assert 'id="chunks"' not in html and 'id="tokens"' not in html and 'id="curves"' in html

    scores_NT = run[1].copy()
    scores_NT[3] = np.nan
    scores_NT[5, 9] = np.inf
    write_scores(tmp_path, scores_NT)  # the run itself says that it is to be trusted
    summary, html = page_of(tmp_path)
    assert summary["trust"]["verdict"] == "Scores are not to be trusted"
    assert "2 of 40 rows and 59 tokens have no finite score" in html
    assert "59 scores are not finite and left out" in part(html, "tokens")


def test_each_query_shows_the_mean(tmp_path, strange, page_of):
    scores_NTQ = make_run(tmp_path, strange, queries=3)
    write_scores(tmp_path, scores_NTQ)
    _, of_each = page_of(tmp_path)
    write_scores(tmp_path, scores_NTQ.mean(-1))
    _, of_mean = page_of(tmp_path)
    assert "each of 3 queries in lobsters" in of_each and "shows the mean of all" in of_each
    for name in ("chunks", "tokens"):
        assert part(of_each, name) == part(of_mean, name)


def test_example_scores_have_no_token_scores(run, tmp_path, page_of):
    link_rows(run[0], tmp_path)
    write_scores(tmp_path, run[1], {"target": "example"})
    (tmp_path / "per_token_scores.npy").unlink()
    html = page_of(tmp_path)[1]
    assert "the training rows" in html and 'id="tokens"' not in html
    assert html.count('<pre dir="auto">') == 24 and '<pre class="tokens"' not in html


def test_rows_without_tokenizer_are_numbers(run, tmp_path, page_of):
    link_rows(run[0], tmp_path)
    write_scores(tmp_path, run[1])
    html = page_of(tmp_path, tokenizer=None)[1]
    for row in cells(part(html, "tokens")):
        assert re.fullmatch(r" ?\d+(  ?\d+)* ?|\d+( \d+)*", re.sub(" +", " ", row[0]).strip())
    html = page_of(tmp_path, tokenizer=None, rows=None)[1]
    assert 'id="tokens"' not in html and "name the rows" in html


def test_documents_have_their_own_part(run, tmp_path, page_of):
    link_rows(run[0], tmp_path)
    write_scores(tmp_path, run[1], {"target": "document"})
    write_npy(tmp_path / "document_scores.npy", np.array([3, -2, np.nan, -5, 0], np.float32))
    lines = [{"number": i, "doc": f"<i>{i}", "tokens": 9, "spans": [[2 * i, 1, 30]]}
             for i in range(5)]  # fmt: skip
    write_jsonl(tmp_path / "documents.jsonl", lines)
    helping, hurting = part(page_of(tmp_path)[1], "documents").split("<table")[1:]
    assert [row[1:] for row in cells(helping)] == [
        ["&lt;i&gt;3", "3", "9", "−5.00", "6"], ["&lt;i&gt;1", "1", "9", "−2.00", "2"]
    ]  # fmt: skip
    text = load_rows(tmp_path / "rows").ids(6)[1:21].astype(np.uint8).tobytes().decode()
    assert cells(helping)[0][0] == " ".join(text.split())
    assert [row[2] for row in cells(hurting)] == ["0"]
    write_jsonl(tmp_path / "documents.jsonl", lines[:3])
    with pytest.raises(InputError, match="does not fit document_scores"):
        page_of(tmp_path)


def test_lds_says_that_its_sign_is_turned(run):
    shown = part(run[3], "validation")
    assert "minus the sum of the removed rows&#x27; scores" in shown
    assert shown.count("measured +") == 3 and "95% interval 0.600 to 0.800" in shown


def test_losses_are_drawn(run):
    shown = part(run[3], "curves")
    assert "query loss 3.75&#10;step 0" in shown and "query loss 3.50&#10;step 20" in shown
    assert "training: from 4.00 to 3.05" in shown and "SGD" in shown


def test_pages_of_long_rows_stay_small(tmp_path, strange, page_of):
    length = 2 * ROW_TOKENS + 10
    scores_NT = make_run(tmp_path, strange, rows=30, length=length)
    scores_NT[:, ROW_TOKENS:] *= 100  # the later part carries more
    write_scores(tmp_path, scores_NT)
    html = page_of(tmp_path)[1]
    assert len(html.encode()) < 3e6
    most = max(len(re.findall("<span", x)) for x in re.findall(r"<pre.*?</pre>", html, re.S))
    assert 1000 < most <= ROW_TOKENS
    starts = [int(x.replace(",", "")) for x in re.findall(r"Tokens ([\d,]+) to", html)]
    assert 22 <= len(starts) <= 24 and min(starts) > ROW_TOKENS - 50  # the hostile rows are short


def test_the_window_is_the_heaviest():
    scores_T = np.random.default_rng(0).standard_normal(50)
    scores_T[[3, 40]] = np.nan, np.inf
    sizes_T = np.where(np.isfinite(scores_T), np.abs(scores_T), 0)
    for size in (1, 7, 49):
        sums = [sizes_T[start : start + size].sum() for start in range(51 - size)]
        assert heaviest(scores_T, size) == int(np.argmax(sums))
    assert heaviest(scores_T, 50) == heaviest(scores_T, 60) == 0


def test_a_report_of_its_own_folder_has_a_summary(run, tmp_path):
    spec = {**SPEC, "title": "Lobsters"}
    summary = build_report(spec, tmp_path, run[0])
    assert read_json(tmp_path / "summary.json")["verdict"] == summary["verdict"]
    with pytest.raises(InputError, match="not a report's"):
        build_report(spec, run[0], run[0])
