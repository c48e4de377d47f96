"""Sparse autoencoders and transcoders: one description of every architecture, and its formulas.

    s = normalised(x) - b_dec (if centred),  h = s W_enc + b_enc (times |W_dec| if rescale)
    f = activation(h),  y = f W_dec + b_dec, un-normalised (unless transcoder), + x W_skip

Activations: ReLU; gated (Rajamanoharan et al. 2024, arXiv 2404.16014); JumpReLU h [h > threshold]
(2407.14435); top-k (Gao et al. 2024, 2406.04093), also by magnitude (abstopk), or one in each of k
groups (groupmax); matching pursuit (Costa et al. 2025, 2506.03093). A batch-top-k or a Matryoshka
SAE is a JumpReLU once trained. Names and conventions of the parameters are SAELens's.

All is float32 in full precision: a rounded factor would decide otherwise which features fire.
Dims: N rows (any leading axes), D width in, F features, O width out.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.errors import InputError
from core.model import full_precision
from sae import topk

Architecture = Literal[
    "standard", "gated", "jumprelu", "topk", "abstopk", "groupmax", "matching_pursuit"
]
Normalize = Literal["none", "layer_norm", "constant_norm_rescale"]
Params = Mapping[str, Any]

LAYER_NORM_EPS = 1e-5  # outside the root, and only on the way in
AXES: dict[str, str] = {
    "W_enc": "DF", "b_enc": "F", "W_dec": "FO", "b_dec": "O", "threshold": "F", "b_gate": "F",
    "b_mag": "F", "r_mag": "F", "W_skip": "DO",
}  # fmt: skip
SIZES = {"D": "d_in", "F": "d_sae", "O": "d_out"}


@dataclass(frozen=True)
class Coder:
    """What an SAE computes, apart from its parameters.

    k: active features, for topk, abstopk and groupmax. centred: b_dec is subtracted from the
    input. rescale: features are ranked, thresholded and reported times the norm of their decoder
    row. transcoder: y is another activation than x, and so never un-normalised.
    residual_threshold, max_iterations (0 = d_in), stop_on_duplicate: when matching pursuit ends.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    d_out: int
    k: int = 0
    centred: bool = False
    normalize: Normalize = "none"
    rescale: bool = False
    transcoder: bool = False
    residual_threshold: float = 0.0
    max_iterations: int = 0
    stop_on_duplicate: bool = True


class About(NamedTuple):
    """Where an SAE comes from and which activations it is for; None = its file does not say.

    tap_in, tap_out: names as "resid_post.12". extra: what else the file said.
    """

    tap_in: str | None
    tap_out: str | None
    model: str | None
    origin: str
    format: str
    extra: dict[str, Any]


class Sae(NamedTuple):
    """A loaded SAE; its fingerprint is that of `fingerprint(coder, params)`."""

    coder: Coder
    params: dict[str, np.ndarray]
    about: About
    fingerprint: str


@full_precision
def preactivations(coder: Coder, params: Params, x_ND: jax.Array) -> jax.Array:
    """h [N,F], what is ranked or compared with the threshold; not for gated, matching pursuit."""
    return _preactivations(coder, params, _encoder_input(coder, params, x_ND))


@full_precision
def encode(coder: Coder, params: Params, x_ND: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Features f [N,F] of activations x [N,D].

    The last axes of x may also be heads and their width, together D. mesh: over which `shardings`
    spreads the features, and the caller perhaps the rows. Differentiable except for matching
    pursuit; thresholds and choices pass no gradient.
    """
    s_ND = _encoder_input(coder, params, x_ND)
    if coder.architecture == "gated":
        return _gated(params, s_ND)
    if coder.architecture == "matching_pursuit":
        return _matching_pursuit(coder, params["W_dec"], s_ND)
    h_NF = _preactivations(coder, params, s_ND)
    match coder.architecture:
        case "standard":
            return jax.nn.relu(h_NF)
        case "jumprelu":
            threshold_NF = _rows(params["threshold"], h_NF)
            return jnp.where(h_NF <= threshold_NF, 0, jax.nn.relu(h_NF))  # NaN stays NaN
        case "topk":
            return jnp.where(topk.selected(h_NF, coder.k, mesh), jax.nn.relu(h_NF), 0)
        case "abstopk":
            return jnp.where(topk.selected(jnp.abs(h_NF), coder.k, mesh), h_NF, 0)
        case "groupmax":
            grouped = h_NF.reshape(*h_NF.shape[:-1], coder.k, -1)
            best = jax.nn.one_hot(grouped.argmax(-1), grouped.shape[-1], dtype=bool)
            return jnp.where(best, jax.nn.relu(grouped), 0).reshape(h_NF.shape)


@full_precision
def decode(coder: Coder, params: Params, f_NF: jax.Array, x_ND: jax.Array) -> jax.Array:
    """y [N,O] from features; x [N,D], the encoder's input, un-normalises it and feeds the skip.

    With heads in x and no transcoder, y has the shape of x.
    """
    flat_ND = _flat(coder, params, x_ND)
    if coder.rescale:
        f_NF = f_NF / _rows(_norms(params), f_NF)
    y_NO = jnp.einsum("...F,FO->...O", f_NF, params["W_dec"])
    # Matching pursuit's tied decoder adds only what was subtracted.
    if coder.centred or coder.architecture != "matching_pursuit":
        y_NO = y_NO + _rows(params["b_dec"], y_NO)
    if not coder.transcoder:
        shift_N1, scale_N1 = _statistics(coder, flat_ND)
        y_NO = y_NO * scale_N1 + shift_N1
    if "W_skip" in params:
        y_NO = y_NO + jnp.einsum("...D,DO->...O", flat_ND, params["W_skip"])
    return y_NO if coder.transcoder else y_NO.reshape(x_ND.shape)


def reconstruct(
    coder: Coder, params: Params, x_ND: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Features [N,F] and what they say the activation is, [N,O]."""
    f_NF = encode(coder, params, x_ND, mesh)
    return f_NF, decode(coder, params, f_NF, x_ND)


def fold_decoder_norm(coder: Coder, params: Params) -> dict[str, Any]:
    """Parameters of the same SAE whose decoder rows have norm one, as SAELens folds them.

    Reconstructions stay; features are times the norms, as they were already with `rescale`.
    Raises InputError for choices among features that the norms would change.
    """
    ranks = coder.architecture in ("topk", "abstopk", "groupmax") and not coder.rescale
    if ranks or coder.architecture == "matching_pursuit":
        raise InputError(
            f"decoder norms cannot be folded into {coder.architecture}"
            f"{'' if coder.rescale else ' without rescale'}, which would choose other features; "
            "use the SAE as it is"
        )
    norms_F = _norms(params)
    factors = {"W_enc": norms_F[None], "b_enc": norms_F, "b_gate": norms_F, "b_mag": norms_F}
    if not coder.rescale:
        factors["threshold"] = norms_F
    folded = {name: value * factors.get(name, 1) for name, value in params.items()}
    return folded | {"W_dec": params["W_dec"] / norms_F[:, None]}


def shapes(coder: Coder) -> dict[str, tuple[int, ...]]:
    """The tensors that an SAE must have, by name; W_skip is one that it may have besides."""
    names = {"gated": "W_enc b_gate b_mag r_mag", "matching_pursuit": ""}
    names = names.get(coder.architecture, "W_enc b_enc").split() + ["W_dec", "b_dec"]
    names += ["threshold"] if coder.architecture == "jumprelu" else []
    return {name: _shape(coder, name) for name in names}


def check(coder: Coder, params: Params, where: str) -> None:
    """Raise InputError, naming `where`, unless coder and parameters make an SAE."""
    for value, kind, what in (
        (coder.architecture, Architecture, "architecture"),
        (coder.normalize, Normalize, "normalisation"),
    ):
        if value not in get_args(kind):
            raise InputError(
                f"{where}: {what} {value!r} is unknown; known: {', '.join(get_args(kind))}"
            )
    if coder.architecture in ("topk", "abstopk", "groupmax") and not 0 < coder.k <= coder.d_sae:
        raise InputError(
            f"{where}: k is {coder.k}, not between 1 and its {coder.d_sae} features; give the "
            f"number of features that {coder.architecture} keeps"
        )
    if coder.architecture == "groupmax" and coder.d_sae % coder.k:
        raise InputError(
            f"{where}: {coder.d_sae} features do not make {coder.k} equal groups; choose a divisor"
        )
    if (coder.centred or not coder.transcoder) and coder.d_in != coder.d_out:
        raise InputError(
            f"{where}: reads width {coder.d_in} and writes {coder.d_out}, which only a transcoder "
            "without b_dec on its input can; look at its config"
        )
    expected = shapes(coder)
    for name in [*expected, *sorted(params.keys() - expected.keys())]:
        if name not in params:
            raise InputError(
                f"{where}: no tensor {name!r}, which {coder.architecture} needs; it has "
                f"{', '.join(sorted(params))}"
            )
        if name not in expected and name != "W_skip":
            raise InputError(
                f"{where}: tensor {name!r} has no place in {coder.architecture}, whose tensors are "
                f"{', '.join(expected)}; is its architecture another?"
            )
        found, shape = tuple(params[name].shape), _shape(coder, name)
        if found != shape:
            remedy = "it is another SAE's, or its config is"
            if found == shape[::-1]:
                remedy = "it looks transposed: store its transpose"
            raise InputError(
                f"{where}: {name} is {list(found)}, not {list(shape)} "
                f"({' x '.join(SIZES[axis] for axis in AXES[name])}); {remedy}"
            )


def check_input(sae: Sae, width: int, tap: str | None, where: str) -> None:
    """Raise InputError unless the SAE reads activations of this width, and of this tap.

    tap: the name of the activations' place, None = unknown; an SAE that does not say which tap
    it was trained on reads any.
    """
    if sae.coder.d_in != width:
        raise InputError(
            f"{where}: activations have width {width}, but the SAE {sae.about.origin} reads "
            f"{sae.coder.d_in}{f' of {sae.about.tap_in}' if sae.about.tap_in else ''}; choose an "
            "SAE of this model and site"
        )
    if tap and sae.about.tap_in and tap != sae.about.tap_in:
        raise InputError(
            f"{where}: activations are of {tap}, but the SAE {sae.about.origin} was trained on "
            f"{sae.about.tap_in}; take them there"
        )


def fingerprint(coder: Coder, params: Params) -> str:
    """sha256 of what the SAE computes: description and float32 values."""
    # Without the fields at their defaults, so that a new field changes no SAE's fingerprint.
    fields = [(f.name, getattr(coder, f.name), f.default) for f in dataclasses.fields(coder)]
    plain = {name: value for name, value, default in fields if value != default}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(params):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(params[name], np.float32).data)
    return digest.hexdigest()


def shardings(params: Params, mesh: Mesh) -> dict[str, NamedSharding]:
    """Where the parameters live when features are split over the mesh axis `model`.

    Raises InputError when their number does not divide.
    """
    features, devices = params["W_dec"].shape[0], mesh.shape["model"]
    if features % devices:
        raise InputError(
            f"{features} features do not divide over {devices} devices of mesh axis 'model'; "
            "choose a divisor"
        )
    spec = {
        name: PartitionSpec(*("model" if axis == "F" else None for axis in AXES[name]))
        for name in params
    }
    return {name: NamedSharding(mesh, spec[name]) for name in params}


def _shape(coder: Coder, name: str) -> tuple[int, ...]:
    return tuple(getattr(coder, SIZES[axis]) for axis in AXES[name])


def _encoder_input(coder: Coder, params: Params, x_ND: jax.Array) -> jax.Array:
    flat_ND = _flat(coder, params, x_ND)
    shift_N1, scale_N1 = _statistics(coder, flat_ND)
    eps = LAYER_NORM_EPS if coder.normalize == "layer_norm" else 0.0
    s_ND = (flat_ND - shift_N1) / (scale_N1 + eps)
    return s_ND - _rows(params["b_dec"], s_ND) if coder.centred else s_ND


def _flat(coder: Coder, params: Params, x: jax.Array) -> jax.Array:
    """x with its last axes, [D] or [heads, width of one], as one, in the parameters' dtype."""
    axes = next((n for n in (1, 2) if math.prod(x.shape[-n:]) == coder.d_in), None)
    if axes is None:
        raise InputError(
            f"activations of shape {list(x.shape)} do not end in the SAE's width {coder.d_in}; "
            "take them at the site that it was trained on"
        )
    return x.reshape(*x.shape[:-axes], coder.d_in).astype(params["W_dec"].dtype)


def _statistics(coder: Coder, x_ND: jax.Array) -> tuple[Any, Any]:
    """Shift and scale [N,1] that the normalisation takes off; a zero row has no scale: NaN."""
    match coder.normalize:
        case "layer_norm":
            return x_ND.mean(-1, keepdims=True), x_ND.std(-1, ddof=1, keepdims=True)
        case "constant_norm_rescale":
            return 0.0, jnp.linalg.norm(x_ND, axis=-1, keepdims=True) / math.sqrt(coder.d_in)
        case "none":
            return 0.0, 1.0


def _preactivations(coder: Coder, params: Params, s_ND: jax.Array) -> jax.Array:
    h_NF = jnp.einsum("...D,DF->...F", s_ND, params["W_enc"])
    h_NF = h_NF + _rows(params["b_enc"], h_NF)
    return h_NF * _rows(_norms(params), h_NF) if coder.rescale else h_NF


def _gated(params: Params, s_ND: jax.Array) -> jax.Array:
    """One product with W_enc serves both the gate and the magnitude, which scales it."""
    z_NF = jnp.einsum("...D,DF->...F", s_ND, params["W_enc"])
    gate_NF = z_NF + _rows(params["b_gate"], z_NF)
    size_NF = z_NF * _rows(jnp.exp(params["r_mag"]), z_NF) + _rows(params["b_mag"], z_NF)
    return jnp.where(gate_NF <= 0, 0, jax.nn.relu(size_NF))


def _matching_pursuit(coder: Coder, W_dec_FD: jax.Array, s_ND: jax.Array) -> jax.Array:
    """Take the feature that explains most of what is left, take its part away, and again.

    A row ends when it takes no new feature (if stop_on_duplicate), or when the norm of what is
    left falls below the threshold (if positive). No gradient: the loop's length is data's.
    """
    residual_ND = s_ND.reshape(-1, s_ND.shape[-1])
    rows = jnp.arange(residual_ND.shape[0])

    def unfinished(state):
        step, done_N, _, _ = state
        return (step < (coder.max_iterations or coder.d_in)) & ~done_N.all()

    def pursue(state):
        step, done_N, f_NF, residual_ND = state
        best_N = jnp.einsum("ND,FD->NF", residual_ND, W_dec_FD).argmax(-1)
        chosen_ND = jnp.take(W_dec_FD, best_N, axis=0)
        part_N = jax.nn.relu((residual_ND * chosen_ND).sum(-1))
        part_N = jnp.where(done_N, 0, part_N)
        if coder.stop_on_duplicate:
            done_N |= (part_N == 0) | (f_NF[rows, best_N] != 0)
        residual_ND -= part_N[:, None] * chosen_ND
        if coder.residual_threshold > 0:
            done_N |= jnp.linalg.norm(residual_ND, axis=-1) < coder.residual_threshold
        return step + 1, done_N, f_NF.at[rows, best_N].add(part_N), residual_ND

    f_NF = jnp.zeros((len(rows), coder.d_sae), residual_ND.dtype)
    start = (0, jnp.zeros(len(rows), bool), f_NF, residual_ND)
    _, _, f_NF, _ = jax.lax.while_loop(unfinished, pursue, start)
    return f_NF.reshape(*s_ND.shape[:-1], coder.d_sae)


def _norms(params: Params) -> jax.Array:
    """Of the decoder's rows, [F]."""
    return jnp.linalg.norm(params["W_dec"], axis=-1)


def _rows(v_F: jax.Array, like_NF: jax.Array) -> jax.Array:
    return jnp.broadcast_to(v_F, like_NF.shape)
