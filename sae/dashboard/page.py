"""The dashboard's page: a list of all features, and of one of them all that is known.

Numbers travel as base64 of little-endian arrays and texts as one table of distinct ones, so that
16,384 features are some ten megabytes; the script (`page.js`) makes elements of what is in sight
only, and of texts never markup. Characters that nobody would see stand by their names already here.

Dims: F features, K features with tokens and neighbours, N features with contexts, E ends of a list,
R rows kept of a feature, W tokens around the strongest.
"""

import base64
import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.page.shell import document
from core.page.text import about, count, decode, esc, named
from sae.dashboard.collect import LEVELS, SHELVES
from sae.dashboard.view import DENSE, View

HERE = Path(__file__).parent
NO_TEXT = 2**32 - 1
PART = "⋯"  # stands for a token that ends within a character
COLUMNS = {
    "id": ("Feature", "by number"),
    "density": ("Density", "share of the tokens on which it is active"),
    "max": ("Max", "largest activation"),
    "mean": ("Mean", "mean activation where it is active"),
    "weight": ("Weight", "of the feature in the classifier"),
}


class Texts:
    """The table of distinct texts, and what stands in it for a token id."""

    def __init__(self, view: View):
        self.pieces, self.table = view.pieces, {}

    def put(self, text: str) -> int:
        return self.table.setdefault(named(text), len(self.table))

    def bytes_of(self, token: int) -> bytes:
        found = None if self.pieces is None else self.pieces.get(token)
        return f"[{token}]".encode() if found is None else found

    def tokens(self, id_X: np.ndarray) -> np.ndarray:
        """Table places of ids, each a text of its own."""
        ids, back = np.unique(id_X, return_inverse=True)
        places = [self.put(decode(self.bytes_of(i))) for i in ids.tolist()]
        return np.array(places, np.uint32)[back].reshape(id_X.shape)

    def windows(self, id_NRW: np.ndarray) -> np.ndarray:
        """Table places of ids in a row, `NO_TEXT` for -1. A character that several tokens make
        stands in the one that completes it."""
        out = np.full(id_NRW.shape, NO_TEXT, np.uint32)
        for id_W, out_W in zip(_last_axis(id_NRW), _last_axis(out), strict=True):
            here = np.flatnonzero(id_W >= 0).tolist()
            reader = codecs.getincrementaldecoder("utf-8")("surrogateescape")
            for at, token in zip(here, id_W[here].tolist(), strict=True):
                text = reader.decode(self.bytes_of(token), final=at == here[-1])
                pending = bool(reader.getstate()[0]) or not text
                out_W[at] = self.put(text + PART if pending else text)
        return out


def page(view: View) -> str:
    """The whole page as HTML text, readable offline."""
    style, parts, script = (
        (HERE / name).read_text("utf-8") for name in ("page.css", "parts.js", "page.js")
    )
    main, data = _headline(view) + _panes(view), {"view": _data(view)}
    return document(esc(view.title), main, style, parts + script, data=data)


def _data(view: View) -> dict[str, Any]:
    found, shown, texts = view.activity, view.contexts, Texts(view)
    effects = None
    if view.effects is not None:
        up_id, up, down_id, down = view.effects
        effects = {
            "ends": up.shape[1],
            "up": [_packed(texts.tokens(up_id), "<u4"), _packed(up, "<f4")],
            "down": [_packed(texts.tokens(down_id), "<u4"), _packed(down, "<f4")],
        }
    data = {
        "tokens": found.tokens,
        "active": _packed(found.active_F, "<u4"),
        "max": _packed(found.max_F, "<f4"),
        "mean": _packed(found.mean_F, "<f4"),
        "weight": None if view.weight_F is None else _packed(view.weight_F, "<f4"),
        "detailed": _packed(view.detailed_K, "<u4"),
        "effects": effects,
        "nearest": view.near_KE.shape[1],
        "near": _packed(view.near_KE, "<u4"),
        "cosine": _packed(view.cosine_KE, "<f4"),
        "shown": _packed(shown.chosen_N, "<u4"),
        "bins": shown.histogram_NH.shape[1],
        "histogram": _packed(shown.histogram_NH, "<u4"),
        "window": shown.id_NKW.shape[2],
        "row": _packed(shown.row_NK, "<i4"),
        "place": _packed(shown.place_NK, "<u4"),
        "text": _packed(texts.windows(shown.id_NKW), "<u4"),
        "value": _packed(shown.value_NKW, "<f4"),
        "shelves": [[size, percents(level)] for _, size, level in SHELVES],
    }
    return data | {"table": list(texts.table)}  # only now are all texts in it


def percents(level: int | None) -> list[float] | None:
    """Where a level begins and ends, of the largest activation."""
    return None if level is None else [100 * (level + side) / LEVELS for side in (0, 1)]


def _packed(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode()


def _last_axis(array: np.ndarray) -> Iterator[np.ndarray]:
    return iter(array.reshape(-1, array.shape[-1]))


def _headline(view: View) -> str:
    found = view.activity
    features, dead = len(found.active_F), int((found.active_F == 0).sum())
    dense = int((found.density_F >= DENSE).sum())
    lead = f"{count(features, 'feature')} seen on {count(found.tokens, 'token')}: {dead:,} never "
    lead += f"active, {dense:,} active on a tenth of the tokens or more."
    return (
        f'<section class="verdict"><div><h1>{esc(view.title)}</h1><p class="lead">{esc(lead)}</p>'
        f'{about(view.about)}</div><figure id="densities" hidden></figure></section>'
        "<noscript><p>The page needs its script. The numbers are in features.npz beside it.</p>"
        "</noscript>"
    )


def _panes(view: View) -> str:
    names = {n: c for n, c in COLUMNS.items() if n != "weight" or view.weight_F is not None}
    heads = "".join(
        f'<button type="button" data-sort="{name}" title="{meaning}" aria-pressed="false">{label}'
        "</button>"
        for name, (label, meaning) in names.items()
    )
    shown = f"With contexts ({len(view.contexts.chosen_N):,})"
    only = "Only features whose contexts are on the page; their numbers are bold"
    return (
        f'<div class="panes" id="panes" style="--columns: {len(names)}" hidden>'
        '<aside aria-label="All features"><div class="search">'
        '<input type="search" id="search" placeholder="number, token or text" '
        'aria-label="Search features by number, promoted token or text of a context" '
        'aria-keyshortcuts="/" autocomplete="off" spellcheck="false" dir="auto">'
        f'<button type="button" id="only" aria-pressed="false" title="{only}">{shown}</button>'
        "</div>"
        '<div class="found"><output id="found" for="search"></output><span class="keys">'
        "<kbd>/</kbd> search <kbd>↑</kbd> <kbd>↓</kbd> browse <kbd>Enter</kbd> read</span></div>"
        f'<div class="heads" role="group" aria-label="Sort by">{heads}</div>'
        '<div class="list" id="list" role="listbox" tabindex="0" aria-label="Features">'
        '<div id="sheet" role="presentation"></div></div></aside>'
        '<article id="feature" tabindex="-1" aria-labelledby="name"></article></div>'
    )
