"""The probe's page in a real browser, by keyboard and by pointer."""

import numpy as np
import pytest

from evals.probe.page import confusion, page

TOKEN = "#tokens > span:nth-of-type({})"
LAYER = "document.querySelector('output').textContent"
FOCUS = "(({ id, role, tagName }) => id || role || tagName)(document.activeElement)"
FIGURES = "Object.fromEntries(all('[data-figure]').map((f) => [f.dataset.figure, f.innerText]))"
KINDS = "tokens.map((token) => token.className)"
COLOURS = "tokens.map((token) => token.style.backgroundColor)"
MARKS = ("textDecorationLine", "boxShadow", "backgroundImage")
LINE = "scrollY + document.activeElement.getBoundingClientRect().top"
TIP = "tip.hidden ? '' : tip.textContent"


@pytest.fixture(scope="module")
def path(view, tmp_path_factory):
    file = tmp_path_factory.mktemp("page") / "probe.html"
    file.write_text(page(view), encoding="utf-8")
    return file


@pytest.fixture
def opened(browser, path):
    """The page in light; nothing may have gone wrong by the test's end."""
    with browser.open(path) as opened:
        yield opened
        assert opened.problems() == []


def kind(view, layer: int, place: int) -> str:
    p, truth = view.p_LT[layer, place], view.truth_T[place]
    if np.isnan(p):
        return "na"
    said = p >= view.thresholds_L[layer]
    return "" if truth < 0 else ("t" if said == truth else "f") + ("p" if said else "n")


def kinds(view, layer: int) -> list[str]:
    return [kind(view, layer, place) for place in range(len(view.tokens))]


def test_whole_page_by_keyboard_alone(opened, view):
    assert opened.js(LAYER) == "resid_post.2", "the best layer comes first"
    opened.press("Tab", times=3)
    assert opened.js(FOCUS) == "layer"
    before = opened.js(COLOURS)
    opened.press("ArrowLeft", times=2)
    assert opened.js(LAYER) == "resid_post.0"
    assert opened.js("slider.getAttribute('aria-valuetext')") == "resid_post.0"
    assert opened.js(COLOURS) != before
    found = opened.js(FIGURES)
    assert (found["balanced_accuracy"], found["auroc"], found["ece"]) == ("0.600", "n/a", "n/a")
    assert found["threshold"] == "0.4500"
    cells = confusion(view, 1)
    assert {name: found[f"here_{name}"] for name in cells} == {n: str(c) for n, c in cells.items()}
    assert found["held_tn"] == "40,001"

    opened.press("Tab")  # one stop for the whole chart
    assert opened.js(FOCUS) == "radio" and "AUROC n/a" in opened.js(TIP)
    opened.press("ArrowRight")
    assert opened.js(LAYER) == "resid_post.1" and opened.js("slider.value") == "2"
    assert opened.js("choices.map((c) => c.getAttribute('aria-checked')).indexOf('true')") == 2
    opened.press("End")
    assert opened.js(LAYER) == "resid_post.2"
    opened.press("Tab")
    opened.press("Enter")
    assert "resid_post.1" in opened.text("details table")
    opened.press("Tab", times=2)
    assert opened.js(FOCUS) == "errors"
    opened.press("Tab")
    assert opened.js("document.activeElement === tokens[0]")
    opened.press("Tab")
    assert not opened.js("block.contains(document.activeElement)"), "one stop for all tokens"
    opened.press("Tab", "shift")

    opened.press("[")
    assert opened.js(LAYER) == "resid_post.1", "brackets work anywhere"
    opened.press("]", times=5)
    assert opened.js(LAYER) == "resid_post.2", "and stop at the last layer"
    opened.press("ArrowRight", times=4)
    tip = opened.js(TIP)
    assert tip.startswith(f"{view.p_LT[3, 4]:.4f}  ‹<img␣src=x␣onerror=") and "token 5" in tip
    described = "document.activeElement.getAttribute('aria-describedby')"
    assert opened.js(f"byId({described}).textContent") == tip
    opened.press("[", times=2)
    assert opened.js(TIP).startswith(f"{view.p_LT[1, 4]:.4f}"), "the tip follows the layer"
    opened.press("ArrowRight")
    assert opened.js(TIP).startswith("n/a") and "0.0000" not in opened.js(TIP)
    opened.press("End")
    assert f"token {len(view.tokens)}" in opened.js(TIP) and "not known" in opened.js(TIP)
    opened.press("Home")
    opened.press("ArrowLeft")
    assert opened.js("document.activeElement === tokens[0]")
    assert "‹␣caf›" in opened.js(TIP)
    top = opened.js(LINE)
    opened.press("ArrowDown")
    below = opened.js(LINE)
    opened.press("ArrowUp")
    assert opened.js(LINE) == top < below
    opened.press("Escape")
    assert opened.js(TIP) == "" and opened.js("block.contains(document.activeElement)")


def test_pointer(opened, view):
    place = 25
    opened.hover(TOKEN.format(place + 1))
    tip = opened.js(TIP)
    assert tip.startswith(f"{view.p_LT[3, place]:.4f}")
    word = view.tokens[place].decode().replace(" ", "␣").replace("\n", "↵")
    assert f"‹{word}›" in tip
    opened.hover("h2")
    assert opened.js(TIP) == ""
    opened.click('[aria-label^="resid_post.1"]')
    assert opened.js(LAYER) == "resid_post.1"
    assert opened.js(TIP) == "resid_post.1\nBalanced accuracy 0.700\nAUROC 0.800"
    opened.click(TOKEN.format(place + 1))
    assert opened.js(f"document.activeElement === tokens[{place}]")


def test_errors_are_marked_without_colour_and_alone_on_demand(opened, view):
    opened.press("[", times=3)
    found = opened.js(KINDS)
    assert found == kinds(view, 0) and {"tp", "fp", "fn", "tn", "na"} <= set(found)
    looks = {}
    for name in ("tp", "fn", "fp", "tn", "na"):
        style = f"getComputedStyle(tokens[{kinds(view, 0).index(name)}])"
        looks[name] = [opened.js(f"{style}.{rule}") != "none" for rule in MARKS]
        looks[name][0] = looks[name][0] and opened.js(f"{style}.textDecorationStyle")
    assert looks == {
        "tp": ["solid", False, False],
        "fn": ["dotted", False, False],
        "fp": [False, True, False],
        "tn": [False, False, False],
        "na": [False, False, True],
    }
    assert opened.text(".legend b.fn") == "miss"

    wrong = [place for place, name in enumerate(kinds(view, 0)) if name in ("fp", "fn")]
    assert opened.text("#errors") == f"Only errors ({len(wrong)})"
    opened.click("#errors")
    bare = "rgba(0, 0, 0, 0)"
    shown = opened.js(f"tokens.map((t) => getComputedStyle(t).backgroundColor !== '{bare}')")
    assert [place for place, is_shown in enumerate(shown) if is_shown] == wrong
    opened.press("Tab")
    walked = []
    for _ in range(4):
        walked.append(opened.js("tokens.indexOf(document.activeElement)"))
        opened.press("ArrowRight")
    assert walked == wrong[:4], "arrow keys walk the errors"


def test_no_value_is_hatched_and_never_zero(opened, view):
    opened.press("[", times=2)
    missing = np.flatnonzero(np.isnan(view.p_LT[1])).tolist()
    assert len(missing) == 5
    for place in missing:
        assert opened.js(f"[tokens[{place}].className, tokens[{place}].style.backgroundColor]") == [
            "na",
            "",
        ]
    opened.hover(TOKEN.format(missing[2] + 1))
    assert opened.js(TIP).startswith("n/a")


def test_phone_wraps_and_needs_no_sideways_scrolling(browser, path):
    with browser.open(path, width=360, height=740, touch=True) as phone:
        assert phone.js("document.documentElement.scrollWidth") == 360
        assert phone.js("Math.max(...tokens.map((t) => t.getBoundingClientRect().right))") <= 360
        assert phone.js("new Set(tokens.map((t) => t.getBoundingClientRect().top)).size") > 10
        phone.hover(TOKEN.format(30))
        assert phone.js("tip.getBoundingClientRect().right") <= 360
        assert phone.problems() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast(browser, path, view, dark):
    with browser.open(path, dark=dark) as opened:
        paper = opened.js("getComputedStyle(document.body).backgroundColor")
        assert (int(paper[4:].split(",")[0]) < 128) == dark
        assert (view.p_LT[3] == 1).any(), "the deepest colour is among them"
        assert opened.contrast("#tokens > span") >= 4.5
        opened.js("errors.click()")
        assert opened.contrast("#tokens > span") >= 4.5


def test_address_keeps_the_state(browser, path, view):
    with browser.open(path) as opened:
        opened.press("[", times=3)
        opened.click(TOKEN.format(30))
        opened.click("#errors")
        opened.wait("location.hash.includes('errors')")
        address = opened.js("location.hash")
        assert address == "#layer=embed&token=30&only=errors"
        opened.js("location.hash = '#main'")  # what the link to the text does
        assert opened.js(LAYER) == "embed"
    with browser.open(path, address) as again:
        assert again.js(LAYER) == "embed" and again.js("isOnly()")
        assert again.js("document.activeElement === tokens[29]")
        assert again.js(TIP).startswith(f"{view.p_LT[0, 29]:.4f}")
    with browser.open(path, "#layer=nowhere&token=99999") as lost:
        assert lost.js(LAYER) == "resid_post.2" and lost.problems() == []


def test_hostile_text_is_shown_and_never_run(opened, view):
    assert opened.js("window.hit") is None
    assert opened.js("document.images.length + document.querySelectorAll('script').length") == 2
    text = opened.text("#tokens")
    for part in (
        "</script><script>window.hit = 1</script>",
        "<img src=x",
        "&lt;b&gt;",
        "U+202E",
        "U+0000",
    ):
        assert part in text
    assert opened.text(".about").endswith("<b>tiny</b>")
    opened.js("tokens.forEach((token, place) => point(place))")
    assert opened.js("window.hit") is None and opened.js("tip.children.length") == 0


def test_nothing_moves_for_who_wants_no_motion(opened):
    scrolling = "getComputedStyle(document.documentElement).scrollBehavior"
    opened.press("[")
    assert opened.js("document.getAnimations().length") == 0
    assert opened.js(scrolling) == "auto"
    opened.media(still=False)
    assert opened.js(scrolling) == "smooth"


def test_one_probe(browser, view, tmp_path):
    one = view._replace(
        layers=view.layers[:1], p_LT=view.p_LT[:1], thresholds_L=view.thresholds_L[:1],
        metrics=view.metrics[:1],
    )  # fmt: skip
    (tmp_path / "one.html").write_text(page(one), encoding="utf-8")
    with browser.open(tmp_path / "one.html") as opened:
        opened.press("]")
        assert opened.js(LAYER) == "embed"
        assert opened.js(KINDS) == kinds(view, 0)
        assert opened.problems() == []
