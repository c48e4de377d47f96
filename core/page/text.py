r"""Words, numbers, tables and hostile text for pages.

Text of a training pool is data from strangers: besides HTML it may hold control characters, bytes
that are no UTF-8, invisible characters and bidi overrides that reorder what a reader sees. `esc`
is for every label, `typeset` for the text of a chunk, `named` for what a script makes a text node
of; all show such characters by name.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Controls, zero-width and bidi marks, line separators, the byte order mark, tag characters,
# noncharacters and lone surrogates. Joiners stay: Indic scripts and emoji need them.
_HIDDEN = (
    "\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufdd0-\ufdef\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U000e0000-\U000e007f"
)
_HIDDEN_RE = re.compile(f"[{_HIDDEN}]")
_UNSEEN_RE = re.compile(f"[{_HIDDEN}]|\n|\t+|\u00a0")
_MARKED_RE = re.compile(f"{_UNSEEN_RE.pattern}| {{2,}}|(?<![^\n]) | (?=\n|$)")
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _name(character: str) -> str:
    code = ord(character)
    # surrogateescape keeps an undecodable byte b as U+DC00 + b
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def named(text: str) -> str:
    """Hidden characters by name; no HTML yet."""
    return _HIDDEN_RE.sub(lambda match: f"‹{_name(match[0])}›", text)


def esc(text: object) -> str:
    """Any value as HTML text or attribute; hidden characters appear by name."""
    return html.escape(named(str(text)), quote=True)


def decode(data: bytes) -> str:
    """UTF-8 text; a byte that is none stays apart and is shown as \\xNN."""
    return data.decode("utf-8", "surrogateescape")


def typeset(text: str, blanks: bool = True) -> str:
    """Chunk text as HTML with visible whitespace; blanks: also those at ends and in a row.

    Marks are drawn by the style sheet around the real characters, so copied text is the original.
    """
    parts, end = [], 0
    for match in (_MARKED_RE if blanks else _UNSEEN_RE).finditer(text):
        parts.append(html.escape(text[end : match.start()]))
        end = match.end()
        found = match[0]
        kind = {"\n": "nl", "\t": "tab", " ": "sp", "\u00a0": "nb"}.get(found[0])
        if kind:
            parts.append(f'<i class="{kind}">{found}</i>')
        else:
            parts.append(f'<i class="ctl">{_name(found)}</i>')
    return "".join(parts) + html.escape(text[end:])


def num(x: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits with a true minus sign; a dash for no number."""
    if x is None or not math.isfinite(x):
        return "–"
    if x == 0:
        return "0"
    exponent = math.floor(math.log10(abs(x)))
    if -5 < exponent < digits:
        text = f"{x:.{max(0, digits - 1 - exponent)}f}"
    elif digits <= exponent < 9:
        text = f"{x:,.0f}"
    else:
        mantissa, power = f"{x:.{digits - 1}e}".split("e")
        text = f"{mantissa}×10{str(int(power)).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def shortened(name: str, most: int) -> str:
    """At most `most` characters; the middle goes, since paths differ at their ends."""
    head = most // 3
    return name if len(name) <= most else f"{name[:head]}…{name[head + 1 - most :]}"


def signed(x: float, digits: int = 3) -> str:
    return f"+{num(x, digits)}" if x > 0 else num(x, digits)


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f}%" if not 0 < x < 0.1 else f"{100 * x:.1f}%"


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def duration(seconds: float) -> str:
    """`4 min 12 s`; the two largest units."""
    if seconds < 60:
        return f"{num(seconds, 2)} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


class Markup(str):
    """HTML that is already safe: a table shows it as it is."""


def about(facts: Mapping[str, object]) -> str:
    """What a page was made of, below its headline."""
    cells = (f"<div><dt>{esc(name)}</dt><dd>{esc(fact)}</dd></div>" for name, fact in facts.items())
    return f'<dl class="about">{"".join(cells)}</dl>'


def figure(chart: str, caption: str) -> str:
    return f"<figure>{chart}<figcaption>{esc(caption)}</figcaption></figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{esc(name)}</th>' for name in head)
    cells = [[v if isinstance(v, Markup) else esc(v) for v in row] for row in rows]
    body = "".join(
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{v}</td>" for v in others) + "</tr>"
        for first, *others in cells
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(head[0])} table">'
        f'<table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
