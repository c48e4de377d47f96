"""One progress line for every long command: count, rate, time left, and what is being measured."""

import sys
import time
from types import TracebackType
from typing import TextIO


class Progress:
    """Counts `unit`s of work; rewrites one line on a terminal, else prints one every ten seconds.

    `start` is the work already done by an earlier, interrupted run: shown, but not in the rate.
    """

    def __init__(
        self, total: int, label: str, unit: str, start: int = 0, stream: TextIO | None = None
    ):
        self.total, self.label, self.unit = total, label, unit
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.start = self.done = self.told = start
        self.began = time.monotonic()
        self.shown = -1e9
        self.fields: dict[str, object] = {}

    def update(self, n: int = 1, **fields: object) -> None:
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        if now - self.shown >= (0.1 if self.live else 10.0) and now - self.began >= 0.1:
            self._show(now)

    def _show(self, now: float) -> None:
        self.shown, self.told = now, self.done
        seconds = max(now - self.began, 1e-9)
        rate = (self.done - self.start) / seconds
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        percent = 100 * self.done / max(self.total, 1)
        parts = [f"{self.label} {self.done:,}/{self.total:,} ({percent:.0f}%)"]
        parts += [f"{name} {value}" for name, value in self.fields.items()]
        parts += [f"{rate:,.4g} {self.unit}/s", f"eta {clock(left)}"]
        line = " | ".join(parts)
        self.stream.write(f"\r\x1b[K{line}" if self.live else f"{line}\n")
        self.stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.done > self.start and self.done != self.told:
            self._show(time.monotonic())
        if self.live:
            self.stream.write("\n")
            self.stream.flush()


def clock(seconds: float) -> str:
    """`75.0` -> `1:15`; unknown -> `?`."""
    if not seconds < 1e7:
        return "?"
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
