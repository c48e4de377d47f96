"""The progress line: content, rate of this run only, terminals and logs."""

import io

import pytest

from core import progress
from core.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def now(monkeypatch):
    """A clock to be moved by hand."""
    time = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def test_a_log_gets_a_line_every_ten_seconds(now):
    stream = io.StringIO()
    with Progress(100, "read", "row", stream=stream) as bar:
        for _ in range(100):
            now[0] += 0.5
            bar.update(1, loss="2.0")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 6 and "\r" not in stream.getvalue()
    assert lines[0] == "read 1/100 (1%) | loss 2.0 | 2 row/s | eta 0:50"
    assert lines[-1].startswith("read 100/100 (100%)") and lines[-1].endswith("eta 0:00")


def test_a_terminal_gets_one_line_rewritten(now):
    stream = Terminal()
    with Progress(10, "read", "row", stream=stream) as bar:
        for _ in range(10):
            now[0] += 0.2
            bar.update()
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n") and text.count("\r\x1b[K") == 10


def test_work_of_an_earlier_run_is_shown_but_not_in_the_rate(now):
    stream = io.StringIO()
    with Progress(100, "read", "row", start=90, stream=stream) as bar:
        now[0] += 5
        bar.update(5)
    assert stream.getvalue() == "read 95/100 (95%) | 1 row/s | eta 0:05\n"


def test_nothing_done_says_nothing(now):
    stream = io.StringIO()
    with Progress(0, "read", "row", stream=stream):
        pass
    with pytest.raises(RuntimeError), Progress(5, "read", "row", stream=stream):
        raise RuntimeError
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "seconds,text",
    [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3600, "1:00:00"), (float("inf"), "?"),
     (float("nan"), "?")],
)  # fmt: skip
def test_clock(seconds, text):
    assert clock(seconds) == text
