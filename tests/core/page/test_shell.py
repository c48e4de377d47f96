"""The shell: data that cannot break out, a policy that stops what was missed, a lasting theme."""

import base64
import hashlib
import json
import re

import pytest

from core.page.shell import document, embedded

HOSTILE = "</script><script>window.hit = 1</script><!--\u2028\u2029&<img src=x onerror=alert(1)>"


def test_embedded_is_the_same_json_without_markup():
    value = {"text": HOSTILE, "\u202e": [1.5, None, True, "é"]}
    text = embedded(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)


def test_no_number_is_null():
    assert json.loads(embedded([float("nan"), float("inf"), 1.0])) == [None, None, 1.0]


def test_policy_names_the_script_and_nothing_else():
    html = document("t", "", "", "const a = '<b>';")
    script = re.findall(r"<script>(.*?)</script>", html, re.S)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = re.findall(r'Content-Security-Policy" content="(.*?)"', html)[0]
    assert f"script-src 'sha256-{digest}'" in policy and policy.startswith("default-src 'none'")
    assert script.endswith("const a = '<b>';")


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a document that is built from these arguments."""

    def open_(main: str = "", script: str = "", **more):
        file = tmp_path / "page.html"
        html = document("t", main, "", script, data={"data": {"text": HOSTILE}})
        file.write_text(html, encoding="utf-8")
        return browser.open(file, **more)

    return open_


def test_data_arrives_whole_and_inert(opened):
    script = "const got = JSON.parse(document.getElementById('data').textContent).text;"
    with opened(script=script) as page:
        assert page.js("got") == HOSTILE
        assert page.js("window.hit") is None
        assert page.problems() == []


def test_a_missed_escape_neither_runs_nor_calls_out(opened):
    main = (
        '<img src="https://example.com/a.png" onerror="window.hit = 1">'
        "<script>window.hit = 1</script><button onclick='window.hit = 1'>x</button>"
        '<link rel="stylesheet" href="https://example.com/a.css">'
    )
    with opened(main) as page:
        page.click("main button")
        assert page.js("fetch('https://example.com/').then(() => 'called', () => 'stopped')") == (
            "stopped"
        )
        found = page.problems()
        assert page.js("window.hit") is None
    refused = [text for text in found if "Content Security Policy" in text]
    assert len(refused) >= 4
    assert any("a.png" in text for text in found) and any("a.css" in text for text in found)


def test_problems_are_seen(opened):
    """The witness itself: what the tests of all pages rely on."""
    script = "console.error('one'); setTimeout(() => { throw new Error('two'); });"
    with opened(script=script) as page:
        page.wait("document.readyState === 'complete'")
        found = "\n".join(page.problems())
    assert "one" in found and "two" in found


def test_theme_button_turns_and_remembers(opened):
    dark = "getComputedStyle(document.body).backgroundColor === 'rgb(23, 22, 19)'"
    with opened(dark=True) as page:
        assert page.js(dark) and page.text("#theme") == "Light"
        page.press("Tab", times=2)
        page.press("Enter")
        assert not page.js(dark) and page.text("#theme") == "Dark"
        page.reload()
        assert not page.js(dark), "as it was left"
        page.click("#theme")
        assert page.js(dark)
        page.js("localStorage.clear()")
