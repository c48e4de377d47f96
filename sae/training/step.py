"""One training step of an SAE, how it starts, and the SAE that comes out of it.

    gradients -> minus their part along the decoder's rows -> clipped -> Adam -> rows of norm one

A row of unit norm makes a feature's value the length of what it adds, and keeps L1 and rank from
being met by shrinking the encoder and growing the decoder; its gradient's part along the row would
only be undone (Bricken et al. 2023; Gao et al. 2024, arXiv 2406.04093). A feature is dead when it
has been silent for `dead_tokens` rows; whether one is enters the loss as a mask, so a recipe and
batch size compile once.

Dims: N rows (tokens), D width in, F features, O width out.
"""

import dataclasses
import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.errors import InputError
from core.model import full_precision
from sae import coder as coders
from sae.coder import Coder
from sae.training import losses
from sae.training.losses import Batch, Objective, Params, Phase

Array = jax.Array | np.ndarray
THRESHOLD_RATE = 0.01  # of the running mean of batchtopk's and matryoshka's threshold
DENSE = 0.1  # a feature active in more than this share of rows is dense
SAMPLE = 1024  # rows of which all features are held at the start
LONG_SILENT = 1 << 30  # where counting stops, well below int32's end


@dataclass(frozen=True)
class Recipe:
    """All that is static about training; hashable, so one recipe compiles once.

    lr: None = by kind and width, see `rate`. It rises over `warmup` steps and falls to zero over
    the last share `decay` of them. b1, b2: Adam's; Gemma Scope has (0, 0.999). clip: largest norm
    of all gradients together. sparsity_warmup: steps over which the sparsity coefficient rises
    from zero; k_warmup: over which k falls from the objective's k_start. threshold: jumprelu's
    start. unit_norm: of the decoder's rows.
    """

    objective: Objective
    d_in: int
    d_sae: int
    d_out: int
    steps: int
    transcoder: bool = False
    lr: float | None = None
    b1: float = 0.9
    b2: float = 0.999
    warmup: int = 0
    decay: float = 0.2
    clip: float = 1.0
    sparsity_warmup: int = 0
    k_warmup: int = 0
    dead_tokens: int = 10_000_000
    threshold: float = 1e-3
    unit_norm: bool = True

    def check(self) -> None:
        """Raise InputError for what cannot be trained."""
        self.objective.check(self.d_sae)
        if self.transcoder and self.objective.centred:
            raise InputError("a transcoder's b_dec is of its output, so it cannot be subtracted "
                             "from the input; set centred=False")  # fmt: skip
        if not self.transcoder and self.d_in != self.d_out:
            raise InputError(f"an SAE of width {self.d_in} cannot reconstruct width {self.d_out}; "
                             "that is a transcoder")  # fmt: skip
        if bool(self.k_warmup) != bool(self.objective.k_start):
            raise InputError(f"k starts at {self.objective.k_start:g} and falls over "
                             f"{self.k_warmup} steps; give both or neither")  # fmt: skip
        for name in ("warmup", "sparsity_warmup", "k_warmup"):
            if not 0 <= getattr(self, name) <= self.steps:
                raise InputError(f"{name} of {getattr(self, name)} steps does not fit into "
                                 f"{self.steps}; shorten it")  # fmt: skip
        if not 0 < self.dead_tokens < LONG_SILENT:
            raise InputError(f"dead_tokens {self.dead_tokens} must be positive and below "
                             f"{LONG_SILENT}")  # fmt: skip

    @property
    def coder(self) -> Coder:
        """What comes out; its input and output are those of training, that is scaled."""
        return self.objective.coder(self.d_in, self.d_sae, self.d_out, self.transcoder)

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step, from 0.

        By default 2e-4 / sqrt(F / 2^14) for what ranks (Gao et al.), 7e-5 for jumprelu (Gemma
        Scope), 3e-4 for standard and gated (SAELens). These last begin with half of all features
        active and their thresholds and biases must travel, so a run of few steps has 1 / steps, up
        to 1e-3.
        """
        by_width = 2e-4 / math.sqrt(self.d_sae / 2**14)
        by_kind = {"jumprelu": 7e-5, "standard": 3e-4, "gated": 3e-4}
        few = min(1 / self.steps, 1e-3)
        known = by_kind.get(self.objective.kind)
        lr = by_width if known is None else max(known, few)
        lr = lr if self.lr is None else self.lr
        rise = (step + 1) / max(self.warmup, 1)
        fall = (self.steps - step) / max(self.decay * self.steps, 1)
        return lr * jnp.clip(jnp.minimum(rise, fall), 0, 1)

    def phase(self, step: jax.Array) -> Phase:
        """Where the warm-ups of sparsity and of k stand at a step, from 0."""
        sparsity = jnp.minimum((step + 1) / max(self.sparsity_warmup, 1), 1)
        return Phase(sparsity, jnp.maximum(1 - step / max(self.k_warmup, 1), 0))

    def optimizer(self) -> optax.GradientTransformation:
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(self.b1, self.b2),
            optax.scale_by_learning_rate(lambda step: self.rate(jnp.asarray(step))),
        )


class State(NamedTuple):
    """Everything a step changes, as arrays.

    step: finished ones. silent_F: int32, rows since a feature was active, or since the start.
    threshold: of batchtopk and matryoshka, a running mean of the smallest activation of a batch;
    0 = none yet.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    silent_F: jax.Array
    threshold: jax.Array


class Metrics(NamedTuple):
    """Of one step, before its update (dead: after it).

    losses: the loss's terms by name. l0: active features of a row. dead: how many features are.
    dense: share of features active in more than a tenth of the rows. fires_F: in how many rows
    each is active. The explained variance of many steps, summed in float64, is
    1 - sum(errors) / (sum(squares) - |sum(total_O)|^2 / rows): errors of the reconstruction,
    squares of the targets, the targets' sum.
    """

    losses: dict[str, jax.Array]
    grad_norm: jax.Array
    l0: jax.Array
    dead: jax.Array
    dense: jax.Array
    errors: jax.Array
    squares: jax.Array
    total_O: jax.Array
    fires_F: jax.Array


def initial(recipe: Recipe, sample_ND: Array, seed: int, sample_NO: Array | None = None) -> State:
    """The start of training, from a sample of the activations that it will see.

    Decoder rows of random directions; the encoder their transpose, a transcoder's encoder
    directions of its own; b_dec the geometric median of the (target's) sample. The encoder's biases
    are such that it begins at the median of its input, centred or not. Where half of all features
    begin active, the encoder is scaled so that they together say what the target is, not times as
    much. Random streams are named.
    """
    recipe.check()
    sample_ND = jnp.asarray(sample_ND, jnp.float32)
    root = jax.random.key(seed)

    def directions(name: str, width: int) -> jax.Array:
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        return _unit(jax.random.normal(key, (recipe.d_sae, width)))

    target_NO = sample_ND if sample_NO is None else jnp.asarray(sample_NO, jnp.float32)
    W_dec_FO = directions("W_dec", recipe.d_out)
    W_enc_FD = directions("W_enc", recipe.d_in) if recipe.transcoder else W_dec_FO
    bias_F = jnp.zeros(recipe.d_sae)
    if not recipe.objective.centred:
        bias_F = -full_precision(jnp.dot)(W_enc_FD, geometric_median(sample_ND))
    starts = {
        "W_enc": W_enc_FD.T, "W_dec": W_dec_FO, "b_dec": geometric_median(target_NO),
        "b_enc": bias_F, "b_gate": bias_F, "b_mag": bias_F, "r_mag": jnp.zeros(recipe.d_sae),
        "threshold": jnp.full(recipe.d_sae, recipe.threshold, jnp.float32),
    }  # fmt: skip
    names = coders.shapes(recipe.coder).keys()
    if recipe.objective.kind in losses.OF_BATCH:
        names -= {"threshold"}
    if recipe.objective.kind not in losses.RANKED:
        some = slice(0, SAMPLE)
        share = _loudness(
            recipe.coder, {n: starts[n] for n in names}, sample_ND[some], target_NO[some]
        )
        starts |= {n: starts[n] * share for n in ("W_enc", "b_enc", "b_gate", "b_mag")}
    # Copies, because a step takes the buffers of its state, and no two may be the same.
    params = {name: jnp.array(starts[name], copy=True) for name in sorted(names)}
    silent_F = jnp.zeros(recipe.d_sae, jnp.int32)
    opt_state = recipe.optimizer().init(params)
    return State(jnp.zeros((), jnp.int32), params, opt_state, silent_F, jnp.zeros(()))


@functools.partial(jax.jit, static_argnums=0)
@full_precision
def _loudness(coder: Coder, params: Params, x_ND: jax.Array, target_NO: jax.Array) -> jax.Array:
    """What activations must be multiplied by so that the reconstruction is nearest the target.

    At least a tenth of what makes them equally long, for a transcoder that knows nothing yet.
    """
    told_NO = coders.reconstruct(coder, params, x_ND)[1] - params["b_dec"][None]
    wanted_NO = target_NO - params["b_dec"][None]
    size = jnp.maximum((told_NO**2).sum(), 1e-30)
    return jnp.maximum(
        (told_NO * wanted_NO).sum() / size, 0.1 * jnp.sqrt((wanted_NO**2).sum() / size)
    )


@jax.jit
def geometric_median(x_ND: jax.Array) -> jax.Array:
    """The point [D] of the least summed distance to the rows, by Weiszfeld's iteration."""

    def nearer(state: tuple) -> tuple:
        n, median_D, _ = state
        distance_N = jnp.linalg.norm(x_ND - median_D[None], axis=1)
        weight_N = 1 / jnp.maximum(distance_N, 1e-6 * distance_N.max() + 1e-30)
        next_D = jnp.einsum("N,ND->D", weight_N / weight_N.sum(), x_ND)
        moved = jnp.linalg.norm(next_D - median_D)
        return n + 1, next_D, moved > 1e-6 * distance_N.mean()

    start = (jnp.zeros((), jnp.int32), x_ND.mean(0), jnp.array(True))
    with jax.default_matmul_precision("highest"):
        return jax.lax.while_loop(lambda s: s[2] & (s[0] < 100), nearer, start)[1]


def train_step(
    recipe: Recipe, state: State, x_ND: Array, target_NO: Array | None = None
) -> tuple[State, Metrics]:
    """One step in place of the state, which is given away.

    x: activations of any float dtype, scaled as the SAE shall see them; target: what a transcoder
    predicts. State and batch may be spread over a mesh, see `shardings`.
    """
    devices = state.params["W_dec"].devices()
    sparse = len(devices) == 1 and next(iter(devices)).platform == "cpu"
    return _train_step(recipe, sparse, state, x_ND, x_ND if target_NO is None else target_NO)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
@full_precision
def _train_step(
    recipe: Recipe, sparse: bool, state: State, x_ND: Array, target_NO: Array
) -> tuple[State, Metrics]:
    x_ND, target_NO = (jnp.asarray(a, jnp.float32) for a in (x_ND, target_NO))
    dead_F = state.silent_F >= recipe.dead_tokens
    batch = Batch(x_ND, target_NO, dead_F, recipe.phase(state.step))

    def loss(params: Params) -> tuple[jax.Array, losses.Outcome]:
        return losses.loss(recipe.objective, params, batch, sparse)

    grads, outcome = jax.grad(loss, has_aux=True)(state.params)
    if recipe.unit_norm:
        grads["W_dec"] = across(grads["W_dec"], state.params["W_dec"])
    updates, opt_state = recipe.optimizer().update(grads, state.opt_state, state.params)
    params = cast(Params, optax.apply_updates(state.params, updates))
    if recipe.unit_norm:
        params["W_dec"] = _unit(params["W_dec"])
    if "threshold" in params:
        params["threshold"] = jnp.maximum(params["threshold"], 0)

    rows, fires_F = len(x_ND), outcome.fires_F
    longer_F = jnp.minimum(state.silent_F + rows, LONG_SILENT)
    silent_F = jnp.where(fires_F > 0, 0, longer_F)
    threshold = following(state.threshold, outcome.smallest)
    metrics = Metrics(
        losses=outcome.terms,
        grad_norm=optax.tree.norm(grads),
        l0=fires_F.sum() / rows,
        dead=(silent_F >= recipe.dead_tokens).sum(dtype=jnp.int32),
        dense=(fires_F > DENSE * rows).mean(),
        errors=((outcome.y_NO - target_NO) ** 2).sum(),
        squares=(target_NO**2).sum(),
        total_O=target_NO.sum(0),
        fires_F=fires_F,
    )
    return State(state.step + 1, params, opt_state, silent_F, threshold), metrics


def across(grad_FO: jax.Array, rows_FO: jax.Array) -> jax.Array:
    """The gradient's part across rows of unit norm, without the part along them."""
    return grad_FO - (grad_FO * rows_FO).sum(1, keepdims=True) * rows_FO


def following(threshold: jax.Array, smallest: jax.Array) -> jax.Array:
    """The running mean after a batch, of which no activation may be positive (inf)."""
    mean = (1 - THRESHOLD_RATE) * threshold + THRESHOLD_RATE * smallest
    new = jnp.where(threshold > 0, mean, smallest)
    return jnp.where(jnp.isfinite(smallest), new, threshold)


def shardings(recipe: Recipe, mesh: Mesh) -> State:
    """Where a state lives whose features are split over the mesh axis `model`.

    Raises InputError when their number does not divide.
    """
    sample = jax.ShapeDtypeStruct((1, recipe.d_in), jnp.float32)
    target = jax.ShapeDtypeStruct((1, recipe.d_out), jnp.float32)
    state = jax.eval_shape(lambda x, y: initial(recipe, x, 0, y), sample, target)
    of_params = coders.shardings(state.params, mesh)
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, _: Any) -> NamedSharding:
        return of_params.get(getattr(path[-1], "key", ""), whole)

    tree = jax.tree_util.tree_map_with_path(place, state)
    return tree._replace(silent_F=NamedSharding(mesh, PartitionSpec("model")))


def finished(
    recipe: Recipe, state: State, scale: float = 1.0, target_scale: float | None = None
) -> tuple[Coder, dict[str, np.ndarray]]:
    """The SAE to use: of raw activations, which training saw times `scale`.

    target_scale: of a transcoder's target. Features are those of training; what they say is of raw
    activations: W_enc * scale, W_dec / scale, b_dec / scale, biases and thresholds as they are.
    batchtopk and matryoshka become jumprelu at their running threshold; norms of the decoder that
    ranked features go into the encoder.
    """
    target_scale = scale if target_scale is None else target_scale
    params: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in state.params.items()}
    if recipe.objective.kind in losses.OF_BATCH:
        params["threshold"] = np.full(recipe.d_sae, state.threshold, np.float32)
    coder = recipe.coder
    if coder.rescale:
        params = coders.fold_decoder_norm(coder, params)
        coder = dataclasses.replace(coder, rescale=False)
    factors = {"W_enc": scale, "W_dec": 1 / target_scale, "b_dec": 1 / target_scale}
    folded = {
        name: np.asarray(value * np.float32(factors.get(name, 1)), np.float32)
        for name, value in params.items()
    }
    return coder, folded


def _unit(rows_FO: jax.Array) -> jax.Array:
    return rows_FO / jnp.linalg.norm(rows_FO, axis=1, keepdims=True)
