"""All that the dashboard's page shows.

Dims: F features, K features with tokens and neighbours, E ends of a list.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sae.dashboard.collect import Activity, Contexts
from sae.dashboard.decoder import Effects

DENSE = 0.1  # share of the tokens from which a feature says little


class View(NamedTuple):
    """about: texts by name. weight_F: of a classifier, None without one.

    detailed_K: features whose effects (None: the SAE writes to no place that has them) and
    neighbours, near_KE and cosine_KE, are known. pieces: bytes of each token, None without a
    tokenizer.
    """

    title: str
    about: dict[str, str]
    activity: Activity
    weight_F: np.ndarray | None
    detailed_K: np.ndarray
    effects: Effects | None
    near_KE: np.ndarray
    cosine_KE: np.ndarray
    contexts: Contexts
    pieces: Mapping[int, bytes] | None
