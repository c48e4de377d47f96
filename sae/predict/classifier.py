"""A trained classifier of fingerprints: how they are read, what it needs of them, and its file.

`classifier.safetensors` holds `vocabulary` (feature numbers, int32 [V]), `scale`, `weight` [V] and
`bias` of the best logistic regression, whose weights the dashboard shows; where the network was
better, the same of its vocabulary and its parameters under `network.` too. A text in the header
says what fingerprints it is for: SAE, model, tap, tokens left out, sizes. Others are refused.

Dims: N rows, V features of a vocabulary, F all features of the SAE.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import safetensors
from core.errors import InputError
from core.files import PathLike, dumps, sha256_file
from sae.fingerprint import POOLING, Fingerprints
from sae.predict import attention
from sae.predict.attention import Bags, Network
from sae.predict.predictors import Fingerprint, Linear

FILE, FORMAT, ABOUT = "classifier.safetensors", "taproot-classifier", "about"
NETWORK = "network"


class Classifier(NamedTuple):
    """Weights and scales are over all features [F], 0 outside the vocabulary.

    about: `kind`, which of the two ranks rows ("network" or how a fingerprint is read); `linear`,
    how the other is; `needs`, see `needs`; `chosen`, hyperparameters of each; and whatever else.
    """

    about: dict[str, Any]
    linear: Linear
    scale_F: np.ndarray
    network: Network | None = None
    network_scale_F: np.ndarray | None = None


def needs(info: dict[str, Any], kind: str) -> dict[str, Any]:
    """What of a folder's `info.json` must be the same for a classifier of this kind to fit it."""
    same = {
        "sae": info["sae"]["fingerprint"],
        "model": info["model"],
        "tap": info["tap"],
        "exclude": info["exclude"],
    }
    return same | ({"token_k": info["token_k"]} if kind == NETWORK else {})


def require_same(made: Classifier, where: PathLike, **has: Any) -> None:
    """Raise InputError, about `where`, if it has something else than the classifier needs."""
    for name, wanted in made.about["needs"].items():
        if has.get(name, wanted) != wanted:
            raise InputError(f"{where} has {name} {_short(has[name])}, the classifier wants "
                             f"{_short(wanted)}; use what it was trained with, or train one on "
                             "fingerprints of this")  # fmt: skip


def scores(made: Classifier, found: Fingerprints) -> np.ndarray:
    """Logits of all rows, float64 [N]; higher = taken for a stronger proponent.

    Raises InputError unless the fingerprints are what the classifier knows.
    """
    about, k = made.about, made.about["k"]
    require_same(made, found.path, **needs(found.info, about["kind"]))
    if found.info["k"] < k:
        raise InputError(f"{found.path} keeps {found.info['k']} features of a row, the classifier "
                         f"wants {k}; fingerprint again with --k {k}")  # fmt: skip
    if made.network is None or made.network_scale_F is None:
        return readings(found)[about["kind"]].first(k).logits(made.scale_F, made.linear)
    seen = bags(found, k)
    return attention.logits(made.network, seen, made.network_scale_F, np.arange(len(seen)))


def readings(found: Fingerprints) -> dict[str, Fingerprint]:
    """The ways the pooled features of a folder are read, by name."""
    features = found.info["sae"]["d_sae"]
    views = {n: Fingerprint(found.index[n], found.value[n], features) for n in POOLING}
    return views | {"binary": views["mean"]._replace(reading="present")}


def bags(found: Fingerprints, k: int) -> Bags:
    """What the network reads: tokens, or without them the k largest means of a row as one token."""
    features = found.info["sae"]["d_sae"]
    if found.tokens is not None:
        tokens = found.tokens
        return Bags(tokens.offsets_N, tokens.index_MJ, tokens.value_MJ, features)
    one = readings(found)["mean"].first(k)
    return Bags(np.arange(len(found) + 1), one.index_NK, one.value_NK, features)


def save(folder: PathLike, classifier: Classifier) -> None:
    """Write FILE into the folder, atomically; the same classifier gives the same bytes."""
    one, known_V = classifier.linear, np.flatnonzero(classifier.scale_F)
    tensors = {
        "vocabulary": known_V.astype(np.int32),
        "scale": classifier.scale_F[known_V],
        "weight": one.weight[known_V],
        "bias": np.asarray(one.bias),
    }
    if classifier.network is not None and classifier.network_scale_F is not None:
        known_V = np.flatnonzero(classifier.network_scale_F)
        inner = {name: np.asarray(value) for name, value in classifier.network.items()}
        inner |= {"vocabulary": known_V.astype(np.int32), "embedding": inner["embedding"][known_V],
                  "scale": classifier.network_scale_F[known_V]}  # fmt: skip
        tensors |= {f"{NETWORK}.{name}": value for name, value in inner.items()}
    about = {"format": FORMAT, **classifier.about}
    safetensors.write(Path(folder) / FILE, tensors, {ABOUT: dumps(about)})


def load(folder: PathLike) -> Classifier:
    """The classifier a folder holds, its file's hash in `about`; InputError for anything else."""
    file = Path(folder) / FILE
    if not file.exists():
        raise InputError(f"{folder} holds no classifier; give the folder of a finished "
                         "`sae classify`")  # fmt: skip
    tensors = {name: np.array(value) for name, value in safetensors.read(file).items()}
    try:
        about = {**json.loads(safetensors.metadata(file)[ABOUT]), "sha256": sha256_file(file)}
        features = about["features"]
        scale_F = _spread(tensors["vocabulary"], tensors["scale"], features)
        weight_F = _spread(tensors["vocabulary"], tensors["weight"], features)
        found = Classifier(about, Linear(weight_F, float(tensors["bias"])), scale_F)
        if about["kind"] != NETWORK:
            return found
        prefix = f"{NETWORK}."
        inner = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        known_V = inner.pop("vocabulary")
        wide_F = _spread(known_V, inner.pop("scale"), features)
        inner["embedding"] = _spread(known_V, inner["embedding"], features)
        return found._replace(network=inner, network_scale_F=wide_F)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{file} is no classifier of ours ({error!r}); train it again") from error


def _spread(known_V: np.ndarray, values: np.ndarray, features: int) -> np.ndarray:
    """[V,...] -> [F,...], 0 outside the vocabulary."""
    out = np.zeros((features, *values.shape[1:]), values.dtype)
    out[known_V] = values
    return out


def _short(value: Any) -> str:
    return str(value)[:12] if isinstance(value, str) and len(value) == 64 else str(value)
