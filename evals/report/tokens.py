"""Text coloured token by token: which parts of a chunk carry its influence.

A divergent scale of four steps to each side, the same for all chunks of a page: blue tokens help
the query, orange ones hurt it. The steps are shares of the score that one shown token in fifty
exceeds, so that single outliers do not pale the rest. A token's title is its position in the row
and its score, which the page's script shows on hover and on focus: the strongest token of a row is
its tab stop, arrow keys walk to the others.

Dims: T tokens.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from core.page.text import count, decode, esc, num, signed, typeset
from evals.report.rows import Text

STEPS = 4
MEANS = {
    "label": "A token's colour is about training the model to predict it.",
    "position": "A token's colour is about training the model to read it: on all that follows.",
}


def limit(texts: Iterable[Text]) -> float:
    """The size of a score from which a token has full colour; 0 when no token has a score."""
    parts = [np.abs(text.scores_T[np.isfinite(text.scores_T)]) for text in texts]
    sizes = np.concatenate([part[part > 0] for part in parts] or [np.zeros(0)])
    return float(np.quantile(sizes, 0.98)) if sizes.size else 0.0


def step(score: float, full: float) -> int:
    """-STEPS .. STEPS; 0 for a score that is small, or none."""
    return round(float(np.clip(score / full, -1, 1)) * STEPS) if np.isfinite(score) and full else 0


def block(text: Text, full: float, higher_helps: bool, row: int, length: int) -> str:
    """A row's coloured tokens in their box; `length` tokens are in the whole row."""
    name = f"Row {row:,}, {count(len(text.pieces), 'token')} with scores; arrow keys walk"
    box = (
        f'<pre class="tokens" dir="auto" role="group" aria-label="{name}" data-row="{row:,}">'
        f"{coloured(text, full, higher_helps)}</pre>"
    )
    end = text.start + len(text.pieces)
    if len(text.pieces) < length:
        shown = f"Tokens {text.start:,} to {end - 1:,} of {length:,}: the part that carries most."
        box = f'<p class="note">{shown}</p>{box}'
    return box


def coloured(text: Text, full: float, higher_helps: bool) -> str:
    """The tokens as HTML, one span each; a character made of several tokens has their sum."""
    characters = list(_characters(text))
    sizes = [abs(sum(s for s in scores if np.isfinite(s))) for _, _, scores in characters]
    stop = int(np.argmax(sizes)) if sizes else 0
    parts = []
    for place, (position, data, scores) in enumerate(characters):
        shown = typeset(decode(data), blanks=False)
        known = [score for score in scores if np.isfinite(score)]
        if not known:
            parts.append(shown)
            continue
        numbers = " ".join(signed(score) for score in known)
        colour = _colour(step(sum(known), full), higher_helps)
        tab = ' tabindex="0"' if place == stop else ""
        parts.append(f'<span{colour} title="{position}: {numbers}"{tab}>{shown}</span>')
    return "".join(parts)


def _colour(steps: int, higher_helps: bool) -> str:
    helps = steps if higher_helps else -steps
    return f' class="{"helps" if helps > 0 else "hurts"} s{abs(helps)}"' if helps else ""


def _characters(text: Text) -> Iterator[tuple[int, bytes, list[float]]]:
    """Position, bytes and scores of tokens, joined where a character goes across their border."""
    data, scores = b"", []
    tokens = zip(text.pieces, text.scores_T.tolist(), strict=True)
    for position, (piece, score) in enumerate(tokens, text.start + 1):
        data, scores = data + piece, [*scores, score]
        if not _cut_short(data):
            yield position - len(scores), data, scores
            data, scores = b"", []
    if data:
        yield text.start + len(text.pieces) - len(scores), data, scores


def _cut_short(data: bytes) -> bool:
    """Whether the bytes end inside a character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def legend(full: float, alignment: str, higher_helps: bool) -> str:
    """The scale with its numbers, and what a token's score is about."""
    order = range(-STEPS, STEPS + 1) if higher_helps else range(STEPS, -STEPS - 1, -1)
    swatches = "".join(
        f'<span{_colour(steps, higher_helps)} title="about {signed(full * steps / STEPS)}">'
        f"{signed(full * steps / STEPS, 2) if abs(steps) in (0, STEPS) else ''}</span>"
        for steps in order
    )
    return (
        f'<div class="legend"><b>hurts</b><div role="img" aria-label="colours from '
        f'{num(-full, 2)} to {num(full, 2)}">{swatches}</div><b>helps</b>'
        f"<small>{esc(MEANS[alignment])} Point at a token for its score, or press Tab "
        f"inside a text and walk with the arrow keys.</small></div>"
    )
