"""`sae dashboard`: from a model, rows and an SAE to one page and its numbers.

    dashboard.html   the page, see `sae.dashboard.page`
    features.npz     of all features, [F]: active (tokens), density, max, mean (where active), and
                     weight with a classifier; of those with contexts: shown [N], histogram [N,H]

Dims: F features, K features with tokens and neighbours on the page, N features with contexts too.
"""

import dataclasses
from typing import Any

import numpy as np

from core.checkpoint import Loaded
from core.config import Execution
from core.errors import InputError
from core.files import write_text
from core.rows import Rows
from core.rundir import Run
from core.taps import Tap
from sae.coder import Sae
from sae.dashboard import decoder
from sae.dashboard.collect import Activity, Collector, save
from sae.dashboard.page import page
from sae.dashboard.view import DENSE, View
from sae.places import places_of
from sae.predict.classifier import Classifier, require_same

ALL = 2**15  # features up to which the page has tokens and neighbours of all of them
PAGE, FEATURES = "dashboard.html", "features.npz"


@dataclasses.dataclass(frozen=True)
class Settings:
    """features: how many have contexts on the page, the most interesting. also: further ones.
    batch_tokens: of a batch, padding included."""

    features: int = 500
    also: tuple[int, ...] = ()
    batch_tokens: int = 8192


def dashboard(
    run: Run,
    loaded: Loaded,
    rows: Rows,
    sae: Sae,
    tap: Tap,
    tokenizer: Any,
    settings: Settings,
    execution: Execution,
    classifier: Classifier | None = None,
) -> dict[str, Any]:
    """Write the page and `features.npz` into `run`'s folder; continues a killed run.

    tap: see `sae.places`. tokenizer: the model's, None = ids are shown. Returns a
    summary. Raises InputError for a feature there is none of, or another SAE's classifier.
    """
    f = sae.coder.d_sae
    for feature in settings.also:
        if feature >= f:
            raise InputError(f"--feature {feature}: {sae.about.origin} has features 0 to {f - 1}")
    if classifier is not None:
        require_same(classifier, sae.about.origin, sae=sae.fingerprint, model=loaded.fingerprint,
                     tap=str(tap))  # fmt: skip
    places = places_of(sae, str(tap), loaded.config)
    run.inputs(model=loaded.fingerprint, rows=rows.sha, sae=sae.fingerprint,
               classifier=classifier and classifier.about["sha256"])  # fmt: skip
    collector = Collector(run.path, loaded, rows, sae, tap, execution, settings.batch_tokens)
    activity = collector.activity()
    weight_F = None if classifier is None else classifier.linear.weight
    chosen_N = interesting(activity, weight_F, settings)
    contexts = collector.contexts(chosen_N, activity.max_F)
    direction_FD = decoder.directions(sae)
    detailed_K = np.arange(f) if f <= ALL else chosen_N
    effects = decoder.effects(loaded, places.writes, direction_FD[detailed_K])
    near = decoder.neighbours(direction_FD, detailed_K)
    about = {
        "site": str(tap) if places.writes == tap else f"{tap} to {places.writes}",
        "SAE": sae.about.origin,
        "architecture": sae.coder.architecture,
        "rows": f"{rows.path.name}, {len(rows):,} rows",
    }
    if classifier is not None:
        about["classifier"] = f"logistic regression, {classifier.about['linear']} fingerprints"
    pieces = None if tokenizer is None else tokenizer.pieces
    title = f"Features of {sae.about.model or 'the model'} at {tap}"
    view = View(title, about, activity, weight_F, detailed_K, effects, *near, contexts, pieces)
    _write(run, view)
    return {
        "tokens": activity.tokens,
        "features": f,
        "dead": int((activity.active_F == 0).sum()),
        "dense": int((activity.density_F >= DENSE).sum()),
        "shown": len(chosen_N),
        "bytes": (run.path / PAGE).stat().st_size,
    }


def interesting(activity: Activity, weight_F: np.ndarray | None, settings: Settings) -> np.ndarray:
    """The features whose contexts are kept, ascending: of the largest weights by size, then of the
    largest activations among those that are not dense, then of those; and `settings.also`. A
    feature that is active nowhere has no contexts."""
    size_F = np.zeros(len(activity.max_F)) if weight_F is None else np.abs(weight_F)
    dense_F = activity.density_F >= DENSE
    order_F = np.lexsort((-activity.max_F, dense_F, -size_F))
    alive_F = activity.active_F > 0
    first = order_F[alive_F[order_F]][: settings.features]
    also = np.array(settings.also, int)
    return np.unique(np.concatenate([first, also[alive_F[also]]]))


def _write(run: Run, view: View) -> None:
    found, shown = view.activity, view.contexts
    numbers = {
        "active": found.active_F,
        "density": found.density_F,
        "max": found.max_F,
        "mean": found.mean_F,
        "shown": shown.chosen_N,
        "histogram": shown.histogram_NH,
    }
    if view.weight_F is not None:
        numbers["weight"] = view.weight_F
    save(run.path / FEATURES, numbers)
    write_text(run.path / PAGE, page(view))
