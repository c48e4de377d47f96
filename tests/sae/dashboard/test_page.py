"""The dashboard's HTML and the data in it."""

import base64
import json
import re

import numpy as np

from sae.dashboard.page import NO_TEXT, PART, Texts, page
from tests.sae.dashboard.conftest import PIECES


def data_of(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="view">(.*?)</script>', html, re.S)
    assert found
    return json.loads(found[1])


def unpacked(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_numbers_are_the_views(view):
    data, shown = data_of(page(view)), view.contexts
    for name, kind, expected in (
        ("active", "<u4", view.activity.active_F),
        ("max", "<f4", view.activity.max_F),
        ("mean", "<f4", view.activity.mean_F),
        ("weight", "<f4", view.weight_F),
        ("near", "<u4", view.near_KE),
        ("cosine", "<f4", view.cosine_KE),
        ("shown", "<u4", shown.chosen_N),
        ("histogram", "<u4", shown.histogram_NH),
        ("row", "<i4", shown.row_NK),
        ("place", "<u4", shown.place_NK),
        ("value", "<f4", shown.value_NKW),
    ):
        found = unpacked(data[name], kind)
        np.testing.assert_array_equal(found, np.asarray(expected).ravel().astype(kind), name)
    text, value = data["effects"]["down"]
    np.testing.assert_array_equal(unpacked(value, "<f4"), view.effects.down.ravel().astype("<f4"))
    words = [data["table"][i] for i in unpacked(text, "<u4")]
    plain = [PIECES[i].decode("utf-8", "replace") for i in view.effects.down_id.ravel().tolist()]
    assert sum(a == b for a, b in zip(words, plain, strict=True)) > 0.9 * len(words)
    assert data["shelves"] == [[20, None], [3, [50, 75]], [3, [25, 50]], [3, [0, 25]]]


def test_texts(view):
    texts = Texts(view)
    ids = np.array([8, 9, 10, 6, 3, 4, 5, 8, -1, -1])
    found = [list(texts.table)[i] if i != NO_TEXT else None for i in texts.windows(ids[None])[0]]
    named = ["‹U+202E›evil‹U+2066›", "‹U+0000›‹U+001B›‹U+000D›", "‹\\xff›"]
    # Two tokens make one character; at the end of a window a half stays a half.
    assert found == [f" caf{PART}", "é", "東", "\n", *named, " caf‹\\xc3›", None, None]
    place = texts.tokens(np.array([[2]]))[0, 0]
    assert list(texts.table)[place] == "&lt;b&gt;"
    alone = Texts(view._replace(pieces=None))
    places = alone.tokens(np.array([7, 3, 7]))
    assert [list(alone.table)[i] for i in places] == ["[7]", "[3]", "[7]"]
    unknown = Texts(view._replace(pieces={}))
    unknown.tokens(np.array([99]))
    assert [*unknown.table] == ["[99]"]


def test_nothing_of_the_data_is_markup(view):
    html = page(view)
    assert html.count("<script") == 2  # the data's and the page's own
    assert "<img" not in html and "<b>tiny</b>" not in html and "<i>folder</i>" not in html
    assert not re.search(r'(?:src|href)="(?!data:,|#)', html) and "url(" not in html
    assert "innerHTML" not in html


def test_without_classifier_or_effects(view):
    data = data_of(page(view._replace(weight_F=None, effects=None)))
    assert data["weight"] is None and data["effects"] is None
    assert 'data-sort="weight"' not in page(view._replace(weight_F=None))


def test_many_features_are_some_megabytes(view):
    """16,384 with tokens and neighbours; contexts of 500 are six times 40 kB more for 6 of them."""
    f, rng = 16_384, np.random.default_rng(0)
    effects = view.effects._replace(
        **{name: rng.integers(0, len(PIECES), (f, 10)) for name in ("up_id", "down_id")},
        **{name: rng.random((f, 10)) for name in ("up", "down")},
    )
    many = np.ones(f)
    large = view._replace(
        activity=view.activity._replace(active_F=many, total_F=many, max_F=many), weight_F=many,
        detailed_K=np.arange(f), effects=effects, near_KE=np.zeros((f, 8)),
        cosine_KE=np.zeros((f, 8)),
    )  # fmt: skip
    few = view.contexts._replace(**{k: v[:0] for k, v in view.contexts._asdict().items()})
    without, whole = (len(page(v).encode()) for v in (large._replace(contexts=few), large))
    assert without < 6e6
    assert without + (whole - without) * 500 / 6 < 10e6
