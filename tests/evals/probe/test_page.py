"""The probe's page as text: digits and counts that are exact, a text that is whole, a small file.

What it does in a browser: `test_page_browser.py`.
"""

import base64
import json
import re
from html import unescape

import numpy as np

from core.page.text import decode
from evals.probe.page import UNKNOWN, YES, codes, confusion, page, spans

TAGS = re.compile(r"<[^>]*>")


def data_of(html: str) -> dict:
    return json.loads(re.findall(r'id="view">(.*?)</script>', html)[0])


def shown(html: str) -> str:
    """Text as a reader without our style sheet has it."""
    return unescape(TAGS.sub("", html))


def test_digits_are_those_of_p_and_answers_those_of_the_threshold():
    p_T = np.r_[np.random.default_rng(1).random(2_000), 0, 1, 0.5, 1e-9, np.nan].astype(np.float32)
    threshold = np.float64(p_T[7])  # the threshold itself says yes; the next number below no
    p_LT = np.stack([p_T, np.where(p_T == p_T[7], np.nextafter(p_T, np.float32(0)), p_T)])
    code_LT = codes(p_LT, np.array([threshold, threshold]))
    for p_T, code_T in zip(p_LT, code_LT, strict=True):
        for p, code in zip(p_T.tolist(), code_T.tolist(), strict=True):
            if np.isnan(p):
                assert code == UNKNOWN
            else:
                assert f"{(code & ~YES) / 10_000:.4f}" == f"{p:.4f}"
                assert bool(code & YES) == (p >= threshold)
    assert code_LT[0, 7] & YES and not code_LT[1, 7] & YES


def test_counts_are_of_known_tokens(view):
    for layer, threshold in enumerate(view.thresholds_L.tolist()):
        expected = {"tp": 0, "fn": 0, "fp": 0, "tn": 0}
        for p, truth in zip(view.p_LT[layer].tolist(), view.truth_T.tolist(), strict=True):
            if not np.isnan(p) and truth >= 0:
                said = p >= threshold
                expected[("t" if said == truth else "f") + ("p" if said else "n")] += 1
        assert confusion(view, layer) == expected
        assert layer > 1 or min(expected.values())  # each kind of cell was met


def test_data_is_the_view(view):
    data = data_of(page(view))
    packed = np.frombuffer(base64.b64decode(data["codes"]), "<u2").reshape(view.p_LT.shape)
    np.testing.assert_array_equal(packed, codes(view.p_LT, view.thresholds_L))
    assert data["best"] == 3
    assert data["truth"] == "".join("?" if t < 0 else str(t) for t in view.truth_T.tolist())
    figures = data["layers"][1]
    assert (figures["auroc"], figures["ece"], figures["mcc"]) == ("n/a", "n/a", "−0.100")
    assert (figures["held_tn"], figures["held_yes"]) == ("40,001", "93.8%")


def test_spans_are_tokens_and_text_is_whole(view):
    html = spans(view.tokens)
    assert html.count("<span>") == len(view.tokens)
    bytes_shown = {"\udcff": "\\xff", "\udce6\udcbc": "\\xe6\\xbc"}
    plain = decode(b"".join(view.tokens))
    for character in "\x00\x1b\r\u202e\u2066":
        bytes_shown[character] = f"U+{ord(character):04X}"
    for character, name in bytes_shown.items():
        plain = plain.replace(character, name)
    assert shown(html) == plain
    assert html.startswith(' <span>caf<i class="part"></i></span><span>é</span>')


def test_nothing_of_the_text_is_markup(view):
    html = page(view)
    assert html.count("<script") == 2  # the data's and the page's own
    assert "<img" not in html and "<b>tiny</b>" not in html
    assert not re.search(r'(?:src|href)="(?!data:,|#)', html) and "url(" not in html


def test_table_has_every_layer(view):
    table = re.findall(r"<details>(.*?)</details>", page(view), re.S)[0]
    rows = [shown(row) for row in re.findall(r"<tr>(.*?)</tr>", table, re.S)]
    assert all(row.startswith(name) for row, name in zip(rows[1:], view.layers, strict=True))
    assert "n/a" in rows[2] and "0.600" in rows[2]


def test_one_probe_needs_no_slider(view):
    first = view._replace(
        layers=view.layers[:1], p_LT=view.p_LT[:1], thresholds_L=view.thresholds_L[:1],
        metrics=[{}],
    )  # fmt: skip
    html = page(first)
    assert "radiogroup" not in html and 'type="range"' not in html
    assert "Balanced accuracy on held-out text is n/a." in html


def test_a_large_page_is_small(view):
    n = 5_000
    large = view._replace(
        tokens=[b" lobster"] * n,
        layers=[f"resid_post.{layer}" for layer in range(19)],
        p_LT=np.random.default_rng(0).random((19, n)).astype(np.float32),
        truth_T=np.zeros(n, np.int8),
        thresholds_L=np.full(19, 0.5),
        metrics=[view.metrics[0]] * 19,
    )
    assert len(page(large).encode()) < 500_000
