"""The dashboard in a real browser, by keyboard and by pointer."""

import numpy as np
import pytest

from sae.dashboard.collect import AROUND, KEPT
from sae.dashboard.page import page
from tests.sae.dashboard.conftest import CHOSEN, DEAD, PIECES, F

NAME = "article.querySelector('h2').textContent"
TIP = "tip.hidden ? '' : tip.textContent"
ORDER = "[...order]"
ALPHAS = """[...article.querySelectorAll('.contexts .token')].map(
  (token) => Number(/[.\\d]+(?=\\)$)/.exec(token.style.backgroundColor)))"""


@pytest.fixture(scope="module")
def path(view, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "dashboard.html"
    file.write_text(page(view), encoding="utf-8")
    return file


@pytest.fixture
def opened(browser, path):
    """The page in light; nothing may have gone wrong by the test's end."""
    with browser.open(path) as opened:
        yield opened
        assert opened.problems() == []


def find(opened, text: str) -> list[int]:
    opened.js(f"search.value = {text!r}; search.dispatchEvent(new Event('input'))")
    opened.js("new Promise((done) => setTimeout(done, 5))")
    return opened.js(ORDER)


def descending(values) -> list[int]:
    return np.argsort(-np.asarray(values, np.float32), kind="stable").tolist()


def test_by_keyboard_alone(opened, view):
    """Search, browse, read: every stop of the way."""
    assert opened.js(NAME) == "Feature 42", "the largest weight comes first"
    opened.press("/")
    assert opened.js("document.activeElement === search")
    for key in "17":
        opened.press(key)
    opened.press("Enter")
    assert opened.js("document.activeElement === list") and opened.js(NAME) == "Feature 17"
    opened.press("/")
    opened.press("ArrowLeft")
    opened.js("search.value = ''")
    opened.press("ArrowDown")
    by_weight = descending(view.weight_F)
    assert opened.js(NAME) == f"Feature {by_weight[0]}"
    opened.press("ArrowDown", times=2)
    assert opened.js(NAME) == f"Feature {by_weight[2]}"
    chosen = "document.querySelector('[aria-selected=true]')"
    assert opened.js(f"{chosen}.id === list.getAttribute('aria-activedescendant')")
    assert opened.js(f"{chosen}.getAttribute('aria-posinset')") == "3"
    opened.press("End")
    assert opened.js(NAME) == "Feature 3", "the most negative weight"
    box = f"(({{ top, bottom }}) => [top, bottom])({chosen}.getBoundingClientRect())"
    top, bottom = opened.js(box)
    here = opened.js("(({ top, bottom }) => [top, bottom])(list.getBoundingClientRect())")
    assert here[0] <= top and bottom <= here[1] + 1, "what is chosen is in sight"
    opened.press("PageUp")
    assert opened.js("order.indexOf(current)") < F - 5
    opened.press("End")
    opened.press("ArrowDown")
    opened.press("Enter")
    assert opened.js("document.activeElement === article")
    opened.press("Tab")
    assert "of the tokens" not in opened.js(TIP) and "tokens" in opened.js(TIP), "the histogram"
    counts = view.contexts.histogram_NH[1]
    assert opened.js(TIP).startswith("0 to ") and f"{counts[0]} tokens" in opened.js(TIP)
    opened.press("ArrowRight")
    assert f"\n{counts[1]} tokens" in opened.js(TIP)
    opened.press("Tab", times=9)  # past the links to eight neighbours
    tip = opened.js(TIP)
    assert tip.startswith(f"{view.activity.max_F[3]:.3f}"[:5]) and "100% of the largest" in tip
    assert "row 0, token 6" in tip
    described = "document.activeElement.getAttribute('aria-describedby')"
    assert opened.js(f"byId({described}).textContent") == tip
    opened.press("ArrowDown")
    assert "row 1, token" in opened.js(TIP)
    opened.press("ArrowLeft")
    place = int(view.contexts.place_NK[1, 1])
    assert f"row 1, token {place - 1}" in opened.js(TIP)
    opened.press("Home")
    assert opened.js(TIP).startswith("n/a"), "a token that does not count"
    opened.press("Escape")
    assert opened.js(TIP) == ""
    opened.press("Tab")
    assert not opened.js("article.contains(document.activeElement)"), "one stop for all tokens"


def test_sorting(opened, view):
    found = view.activity
    columns = {"density": found.density_F, "max": found.max_F, "mean": found.mean_F}
    for name, values in columns.items():
        opened.click(f"[data-sort={name}]")
        assert opened.js(ORDER) == descending(values)
    opened.click("[data-sort=mean]")
    assert opened.js(ORDER) == descending(-found.mean_F)
    opened.click("[data-sort=id]")
    assert opened.js(ORDER) == list(range(F))
    pressed = opened.js("heads.map((head) => head.getAttribute('aria-pressed'))")
    assert pressed == ["true", "false", "false", "false", "false"]
    assert "–" in opened.text(f"#o{DEAD}") and "0%" in opened.text(f"#o{DEAD}")


def test_search(opened, view):
    token = PIECES.index(b"lobster57")
    of_contexts = set(CHOSEN[(view.contexts.id_NKW == token).any((1, 2))].tolist())
    assert {*find(opened, "Lobster57")} == {7} | of_contexts and 7 not in of_contexts
    assert find(opened, "#120") == [120]
    assert find(opened, "120")[0] == 120, "by number before all others"
    assert find(opened, "no such thing at all") == []
    assert opened.text("#found") == f"0 of {F} features"
    assert {*find(opened, " CAFé")} == {*CHOSEN.tolist()}, "over tokens, whatever the case"
    find(opened, "")
    opened.click("#only")
    assert sorted(opened.js(ORDER)) == CHOSEN.tolist()


def test_only_what_is_in_sight_is_there(opened):
    assert opened.js("sheet.children.length") < 40
    opened.js("list.scrollTop = list.scrollHeight")
    opened.wait(f"byId('o' + order[{F - 1}]) !== null")
    assert opened.js("sheet.children.length") < 40


def test_pointer(opened, view):
    opened.click("[data-sort=max]")
    opened.click(f"#o{17}")
    assert opened.js(NAME) == "Feature 17"
    text = opened.text("article")
    assert "40.00" in text and f"{view.activity.active_F[17]:,}" in text
    opened.hover(".peak")
    assert opened.js(TIP).startswith("40.000") and "100% of the largest" in opened.js(TIP)
    opened.hover("h2")
    assert opened.js(TIP) == ""
    opened.hover(".contexts li:nth-child(2) .peak")
    token, value = view.contexts.id_NKW[2, 1, AROUND], view.contexts.value_NKW[2, 1, AROUND]
    assert opened.js(TIP).startswith(f"{value:.3f}") and token == 4
    opened.hover(".spread .mark:nth-of-type(3)")
    assert " tokens" in opened.js(TIP) and " to " in opened.js(TIP)
    opened.wait("location.hash === '#f17'")
    opened.click('a[href="#f18"]')
    opened.wait(f"{NAME} === 'Feature 18'")
    assert "--feature 18" in opened.text("article"), "one without contexts says how to get them"
    opened.js("history.back()")
    opened.wait(f"{NAME} === 'Feature 17'")


def test_contexts_are_what_was_kept(opened, view):
    shown = view.contexts
    for n, feature in enumerate(CHOSEN.tolist()):
        opened.js(f"choose({feature})")
        rows = (shown.row_NK[n] >= 0).sum()
        assert opened.js("article.querySelectorAll('.contexts li').length") == rows < KEPT
        count = "article.querySelectorAll('.contexts .token').length"
        assert opened.js(count) == (shown.id_NKW[n] >= 0).sum()
        alphas = opened.js(ALPHAS)
        values = shown.value_NKW[n][shown.id_NKW[n] >= 0]
        expected = 0.6 * np.nan_to_num(values) / view.activity.max_F[feature]
        np.testing.assert_allclose(alphas, expected, atol=4e-3)
    titles = opened.js("[...article.querySelectorAll('.line')].map((line) => line.textContent)")
    assert titles[0].startswith("Strongest in 16 rows")
    assert titles[1:] == ["At 50% to 75% of the largest", "Up to 25% of the largest"]


def test_address_keeps_the_feature(browser, path):
    with browser.open(path) as opened:
        opened.js("choose(120)")
        opened.wait("location.hash === '#f120'")
    with browser.open(path, "#f120") as again:
        assert again.js(NAME) == "Feature 120"
        assert again.js("byId('o120').getAttribute('aria-selected')") == "true", "it is in sight"
    with browser.open(path, f"#f{F}") as lost:
        assert lost.js(NAME) == "Feature 42" and lost.problems() == []


def test_hostile_text_is_shown_and_never_run(opened):
    opened.js("choose(17)")
    text = opened.text("article")
    for part in ("</script><script>window.hit = 1", "<img src=x", "&lt;b&gt;", "U+202E", "U+0000"):
        assert text.count(part) >= 2, part  # promoted, and in a context
    opened.js("article.querySelectorAll('.token').forEach((token) => token.dispatchEvent("
              "new PointerEvent('pointerover', { bubbles: true })))")  # fmt: skip
    assert opened.js("document.images.length + document.querySelectorAll('script').length") == 2
    assert opened.js("window.hit") is None and opened.js("tip.children.length") == 0
    assert opened.text("h1") == "Features of <b>tiny</b>"


def test_phone_needs_no_sideways_scrolling(browser, path):
    with browser.open(path, "#f17", width=360, height=740, touch=True) as phone:
        assert phone.js("document.documentElement.scrollWidth") == 360
        phone.hover(".contexts li:nth-child(2) .peak")
        assert phone.js("tip.getBoundingClientRect().right") <= 360
        phone.click("#list [role=option]:nth-child(3)")
        assert 0 <= phone.js("article.getBoundingClientRect().top") < 100, "what was asked for"
        phone.click(".back")
        assert phone.js("search.getBoundingClientRect().top") >= 0
        assert phone.problems() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(browser, path, dark):
    with browser.open(path, "#f17", dark=dark) as opened:
        paper = opened.js("getComputedStyle(document.body).backgroundColor")
        assert (int(paper[4:].split(",")[0]) < 128) == dark
        for part in (".contexts .token", "#list span", "small .token", ".note", ".heads button"):
            assert opened.contrast(part) >= 4.5, part


def test_an_sae_that_is_dead(browser, view, tmp_path):
    none = view.activity._replace(**dict.fromkeys(("active_F", "total_F", "max_F"), np.zeros(F)))
    few = view.contexts._replace(**{k: v[:0] for k, v in view.contexts._asdict().items()})
    dead = page(view._replace(activity=none, contexts=few))
    (tmp_path / "dead.html").write_text(dead, encoding="utf-8")
    with browser.open(tmp_path / "dead.html") as opened:
        assert "Not active on any of the 20,000 tokens" in opened.text("article")
        assert opened.js("byId('densities').hidden") and opened.problems() == []


def test_without_classifier_or_effects(browser, view, tmp_path):
    bare = view._replace(weight_F=None, effects=None)
    (tmp_path / "bare.html").write_text(page(bare), encoding="utf-8")
    with browser.open(tmp_path / "bare.html") as opened:
        assert opened.js(NAME) == "Feature 17", "the largest activation comes first"
        writes = opened.text(".writes")
        assert "not defined here" in writes and "Promotes" not in writes
        assert opened.problems() == []
