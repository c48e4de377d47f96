"""What pages share in their scripts: walks along marks, tips that stay in sight, an address."""

import pytest

from core.page.shell import document
from core.page.text import about, esc, named

MAIN = (
    '<button id="before">before</button>'
    '<svg viewBox="0 0 900 100" role="group">'
    '<g aria-label="first"><rect width="100" height="90"/></g>'
    '<g aria-label="second"><rect x="100" width="100" height="90"/></g>'
    '<g aria-label="last"><rect x="800" width="100" height="90"/></g></svg>'
    '<pre id="text" style="white-space: pre-wrap; width: 9ch">'
    f"{' '.join(f'<span>{word}</span>' for word in 'one two three four five six'.split())}</pre>"
)
SCRIPT = """
const bars = all("svg g"), words = all("#text span"), walked = [];
walkable(document.querySelector("svg"), bars, (at) => showTip(bars[at]));
const show = (at) => showTip(words[at], `${at}\\n${words[at].textContent}`);
const passes = (at) => !words[at].hidden, arrive = (at) => walked.push(at);
const keys = { PageDown: () => undefined };
const inText = walkable(byId("text"), words, show, { passes, arrive, keys });
"""
TIP = "tip.hidden ? '' : tip.textContent"
WORD = "words.indexOf(document.activeElement)"


@pytest.fixture
def opened(browser, tmp_path):
    (tmp_path / "page.html").write_text(document("t", MAIN, "", SCRIPT), encoding="utf-8")
    with browser.open(tmp_path / "page.html") as opened:
        yield opened
        assert opened.problems() == []


def test_one_tab_stop_a_chart_and_one_a_text(opened):
    opened.js("byId('before').focus()")
    opened.press("Tab")
    assert opened.js(TIP) == "first"
    assert not opened.js("bars[0].hasAttribute('aria-describedby')"), "its label says the same"
    opened.press("ArrowRight", times=5)
    assert opened.js(TIP) == "last"
    opened.press("Tab")
    assert opened.js(TIP) == "0\none"
    assert opened.js("words[0].getAttribute('aria-describedby')") == "tip"
    opened.press("Escape")
    assert opened.js(TIP) == "" and opened.js(WORD) == 0
    opened.press("Tab")
    assert opened.js(WORD) == -1 and opened.js("all('[aria-describedby]').length") == 0
    opened.press("Tab", "shift")
    opened.press("Tab", "shift")
    assert opened.js(TIP) == "last", "where the walk was left"


def test_walk_over_lines_and_what_does_not_pass(opened):
    opened.js("words[1].hidden = true; inText.walk(0)")
    for key, place in (
        ("ArrowRight", 2), ("PageDown", 2), ("End", 5), ("ArrowRight", 5), ("Home", 0),
        ("ArrowDown", 2), ("ArrowDown", 3), ("ArrowUp", 2), ("ArrowUp", 0), ("ArrowLeft", 0),
    ):  # fmt: skip
        opened.press(key)
        assert opened.js(WORD) == place, key
    opened.press("End", "ctrl")
    assert opened.js(WORD) == 0, "keys of the browser are its own"
    assert opened.js("walked") == [0, 2, 5, 0, 2, 3, 2, 0]
    opened.js("document.activeElement.blur(); words[0].hidden = true; inText.settle()")
    assert opened.js("words.map((word) => word.tabIndex)") == [-1, -1, 0, -1, -1, -1]


def test_pointer(opened):
    opened.hover("svg g:nth-of-type(2)")
    assert opened.js(TIP) == "second"
    opened.js("inText.walk(4)")
    opened.hover("svg g:nth-of-type(3)")
    assert opened.js("tip.getBoundingClientRect().right <= document.body.clientWidth - 8")
    point = opened.where("svg")
    opened.call("Input.dispatchMouseEvent", type="mouseMoved", x=point.x, y=point.y)
    assert opened.js(TIP) == "", "between marks of a chart"
    opened.click("#text span:nth-of-type(4)")
    assert opened.js(WORD) == 3 and opened.js(TIP) == "3\nfour"
    opened.hover("#text span:nth-of-type(6)")
    assert opened.js(TIP) == "5\nsix"
    opened.hover("#before")
    assert opened.js(TIP) == "3\nfour", "what has the focus keeps its tip"


def test_tip_is_not_under_what_stays_at_the_top(opened):
    above = "tip.getBoundingClientRect().bottom < words[0].getBoundingClientRect().top"
    opened.js("document.body.style.height = '3000px'")
    opened.js("scrollTo(0, words[0].getBoundingClientRect().top - 70); showTip(words[0], 'a')")
    assert opened.js(above)
    opened.js("roofs.push(document.querySelector('header'))")
    opened.js("roofs[0].style.cssText = 'position: sticky; top: 0'; showTip(words[0], 'a')")
    assert not opened.js(above)


def test_address_is_written_once_after_a_pause(opened):
    opened.js("window.calls = 0; history.replaceState = () => { calls += 1; }")
    opened.js("for (const state of 'abc') remember(state)")
    opened.wait("calls > 0")
    assert opened.js("new Promise((done) => setTimeout(() => done(calls), 200))") == 1


def test_elements_are_made_of_texts(opened):
    assert opened.js("make('p', { title: 'a' }, '<b>', make('i')).outerHTML") == (
        '<p title="a">&lt;b&gt;<i></i></p>'
    )
    assert opened.js("make('svg:g').namespaceURI").endswith("svg")
    assert opened.js("marked('a b\\n\\t\\u00a0')") == "a␣b↵⇥⍽"
    assert opened.js("shade(0.5)") == "rgb(60 130 220 / 0.300)"


def test_named_is_esc_without_html():
    text = "a\u202e<b>&amp;\x00\udcff\n\t é"
    assert named(text) == "a‹U+202E›<b>&amp;‹U+0000›‹\\xff›\n\t é"
    assert esc(text) == named(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert about({"a<": 3}) == '<dl class="about"><div><dt>a&lt;</dt><dd>3</dd></div></dl>'
