"""A real browser for tests of pages: headless chromium over the Chrome DevTools Protocol.

Messages are JSON ended by NUL on two pipes, which chromium reads and writes as its descriptors 3
and 4 (`--remote-debugging-pipe`): no port, no websocket library, no other process can listen in.
A `Page` is used as a person would: keys, pointer, eyes (`screenshot`); `problems` lists whatever
the page did that no page of ours may do.
Protocol: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --remote-debugging-pipe --no-first-run --no-default-browser-check "
    "--disable-gpu --disable-dev-shm-usage --disable-extensions --disable-background-networking "
    "--disable-component-update --disable-sync --disable-default-apps --mute-audio "
    "--force-color-profile=srgb --font-render-hinting=none"
).split()
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"
PATIENCE = 30.0  # seconds until a silent browser counts as broken
# What the keyboard driver needs to know of keys that write nothing: their Windows code.
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "PageUp": 33, "PageDown": 34, "End": 35,
    "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40,
}  # fmt: skip
MODIFIERS = {"alt": 1, "ctrl": 2, "meta": 4, "shift": 8}

# Luminance contrast of WCAG 2 between an element's ink and the colours that lie under it.
CONTRAST = """((selector) => {
  const board = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (...layers) => {
    for (const colour of layers) { board.fillStyle = colour; board.fillRect(0, 0, 1, 1); }
    const parts = [...board.getImageData(0, 0, 1, 1).data].slice(0, 3).map((byte) => byte / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      layers.unshift(getComputedStyle(at).backgroundColor);
    }
    const under = luminance(...layers), ink = luminance(...layers, getComputedStyle(element).color);
    return (Math.max(under, ink) + 0.05) / (Math.min(under, ink) + 0.05);
  });
})"""


class BrowserError(AssertionError):
    """The browser, or JavaScript running in it, refused."""


class Point(NamedTuple):
    x: float
    y: float


class Browser:
    """One chromium process. Pages made by `open` are tabs of it."""

    def __init__(self, program: str):
        self.profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Out of the way first: the copies to 3 and 4 must not close each other.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]
        self.process = os.posix_spawn(
            program,
            [program, *FLAGS, OFFLINE, f"--user-data-dir={self.profile.name}", "about:blank"],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, high[0], 3),
                (os.POSIX_SPAWN_DUP2, high[1], 4),
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ],
            setpgroup=0,
        )
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._in, self._out = ours_in, ours_out
        self._buffer = b""
        self._last = 0
        self._events: defaultdict[str, list[dict]] = defaultdict(list)

    def call(self, method: str, session: str = "", **params: Any) -> dict:
        """The result of a command; events that come before it are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (reply := self._receive(method)).get("id") != self._last:
            pass
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']}")
        return reply["result"]

    def event(self, session: str, method: str) -> dict:
        """Waits until an event of this name has come to the page, and takes it."""
        while True:
            for event in self._events[session]:
                if event["method"] == method:
                    self._events[session].remove(event)
                    return event["params"]
            self._receive(method)

    def events(self, session: str) -> list[dict]:
        return self._events[session]

    def _receive(self, what: str) -> dict:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready = select.select([self._in], [], [], max(0, deadline - time.monotonic()))[0]
            data = os.read(self._in, 1 << 20) if ready else b""
            if not data:
                raise BrowserError(f"{what}: the browser {'ended' if ready else 'is silent'}")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        if "method" in message:
            self._events[message.get("sessionId", "")].append(message)
        return message

    def open(
        self,
        path: Path,
        hash: str = "",
        width: int = 1100,
        height: int = 800,
        dark: bool = False,
        touch: bool = False,
    ) -> "Page":
        """A file in a new tab, loaded. touch: as on a phone."""
        return Page(self, path.resolve().as_uri() + hash, width, height, dark, touch)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        self.profile.cleanup()


class Page:
    """A tab, as someone sees and uses it. Selectors are CSS; the first match counts."""

    def __init__(
        self, browser: Browser, url: str, width: int, height: int, dark: bool, touch: bool
    ):
        self.browser, self.url = browser, url
        self.target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        attached = browser.call("Target.attachToTarget", targetId=self.target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if touch else 1}
        self.call("Emulation.setDeviceMetricsOverride", mobile=touch, **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.media(dark=dark)
        self.call("Page.navigate", url=url)
        browser.event(self.session, "Page.loadEventFired")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)

    def call(self, method: str, **params: Any) -> dict:
        return self.browser.call(method, self.session, **params)

    def reload(self) -> None:
        self.call("Page.reload")
        self.browser.event(self.session, "Page.loadEventFired")

    def media(self, dark: bool = False, still: bool = True, printed: bool = False) -> None:
        """What the reader prefers: a dark page, no motion (else a click may miss), paper."""
        features = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        self.call(
            "Emulation.setEmulatedMedia",
            media="print" if printed else "screen",
            features=[{"name": name, "value": value} for name, value in features.items()],
        )

    def js(self, expression: str) -> Any:
        """The value of an expression as JSON; promises are awaited, exceptions raised."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise BrowserError(details.get("exception", details).get("description", str(details)))
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        """The text as it is shown (nothing of what is hidden)."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def wait(self, expression: str) -> None:
        """Until the expression is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.js(expression):
            if time.monotonic() > deadline:
                raise BrowserError(f"never true: {expression}")
            time.sleep(0.02)

    def press(self, key: str, *modifiers: str, times: int = 1) -> None:
        """Presses and releases a key by its name in `KeyboardEvent.key`."""
        event: dict[str, Any] = {"key": key, "modifiers": sum(MODIFIERS[m] for m in modifiers)}
        event["windowsVirtualKeyCode"] = KEYS.get(key) or ord(key.upper())
        written = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        for _ in range(times):
            down = {"type": "keyDown", "text": written} if written else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **down, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def where(self, selector: str) -> Point:
        """The middle of an element's first box, scrolled into view."""
        x, y = self.js(
            f"""(() => {{
              const element = document.querySelector({json.dumps(selector)});
              element.scrollIntoView({{ block: "center", behavior: "instant" }});
              const box = element.getClientRects()[0];
              return [box.x + box.width / 2, box.y + box.height / 2];
            }})()"""
        )
        return Point(x, y)

    def hover(self, selector: str) -> Point:
        """Moves the pointer over an element."""
        point = self.where(selector)
        self._mouse("mouseMoved", point)
        return point

    def click(self, selector: str) -> None:
        point = self.hover(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._mouse(kind, point, button="left", clickCount=1)

    def _mouse(self, kind: str, point: Point, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=point.x, y=point.y, **more)

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """A png of what is in view, or of the whole page."""
        options: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            options = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        shot = self.call("Page.captureScreenshot", **options)
        path.write_bytes(base64.b64decode(shot["data"]))

    def contrast(self, selector: str) -> float:
        """The lowest contrast of ink and ground among the elements that match."""
        return min(self.js(f"{CONTRAST}({json.dumps(selector)})"))

    def problems(self) -> list[str]:
        """Errors, warnings, refusals of the content policy, and requests beyond the file itself."""
        self.js("new Promise((done) => setTimeout(done, 20))")  # what is under way still counts
        found = []
        for event in self.browser.events(self.session):
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(details.get("exception", details).get("description", str(details)))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
                found.append(f"console: {params['args']}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                if url != self.url.split("#")[0] and not url.startswith("data:"):
                    found.append(f"request: {url}")
        return found


@pytest.fixture(scope="session")
def browser():
    """A browser for all tests of a process. Without one they are skipped, but never in CI."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        reason = f"none of {', '.join(NAMES)} is installed: pages were not tested in a browser"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    running = Browser(program)
    yield running
    running.close()
