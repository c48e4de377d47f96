"""What the tests of report pages share: a strict parser, hostile text, charts that can be drawn."""

import re
from html.parser import HTMLParser

import pytest

HOSTILE = (
    b"<script>alert(1)</script></style></pre>\"'><img src=x onerror=alert(2)> &amp; "
    b"\x00\x07\x1b[31m\r\n\ttab  two\xff\xfe\xe2\x80\xae moc.live \xe2\x80\x8b\xf3\xa0\x81\x81 "
    b"\xd7\xa9\xd7\x9c\xd7\x95\xd7\x9d https://example.com \xe2\x80\xa8 end \n"
)


class Page(HTMLParser):
    """Elements in order, the open ones at each text, and every attribute of the page."""

    VOID = {"meta", "link", "br", "img", "input"}

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute of <{tag}> is given twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def assert_drawable(html: str) -> None:
    numbers = re.findall(r' (?:d|x|y|x1|x2|y1|y2|cx|cy|width|height)="([^"]*)"', html)
    assert numbers
    assert all(re.fullmatch(r"[MLv\d. -]+", number) for number in numbers)
    assert all(float(n) >= 0 for n in re.findall(r' (?:width|height)="([^"]*)"', html))


@pytest.fixture(scope="session")
def parse():
    """A page's HTML -> its elements and texts; raises where the HTML is not well formed."""
    return Page


@pytest.fixture(scope="session")
def drawable():
    """Assert that the numbers of a page's charts are numbers."""
    return assert_drawable


@pytest.fixture(scope="session")
def strange() -> bytes:
    """Text that tries to be markup, to hide, to reorder and to be no text."""
    return HOSTILE
