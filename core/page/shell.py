"""The shell of a page: one HTML file with its style, script and data inside, readable offline.

Everything that comes from disk passes `esc` or `typeset` (`core.page.text`) before it gets here, or
comes as data. The page's content policy forbids any request and any script but its own, so even a
missed escape could neither run nor call out.
"""

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.files import dumps

HERE = Path(__file__).parent


def document(
    title: str,
    main: str,
    style: str,
    script: str,
    nav: str = "",
    data: Mapping[str, Any] | None = None,
) -> str:
    """A whole page as HTML text. title, main and nav are HTML that is already safe.

    data: by element id, what the script reads as JSON; NaN and infinities become null.
    style and script come after the ones all pages share: palette, header and theme button, the
    look of tables, charts and texts; helpers (`parts.js`).
    """
    style = (HERE / "base.css").read_text("utf-8") + style
    script = "".join((HERE / name).read_text("utf-8") for name in ("base.js", "parts.js")) + script
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; "
        "img-src data:"
    )
    blocks = "".join(
        f'<script type="application/json" id="{name}">{embedded(value)}</script>\n'
        for name, value in (data or {}).items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<a class="skip" href="#main">Skip to the result</a>
<span class="brand">Taproot</span>
<nav aria-label="Sections">{nav}</nav>
<button type="button" id="theme" hidden>Dark</button>
</header>
<main id="main">
{main}
</main>
<div id="tip" role="presentation" hidden></div>
<div id="readout" role="status"></div>
{blocks}<script>{script}</script>
</body>
</html>
"""


def embedded(value: Any) -> str:
    """JSON that may stand inside a script element, whatever its texts hold."""
    text = dumps(value)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
