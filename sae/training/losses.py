"""What an SAE is trained to do: its losses, summed over the width and averaged over rows.

    standard     |y - t|^2 + c |f n|_p                       n: norms of the decoder's rows
    gated        |y - t|^2 + c |g n|_1 + |g W_dec + b_dec - t|^2,   g = relu(gate)   (2404.16014)
    jumprelu     |y - t|^2 + c L0(h), straight through its threshold                 (2407.14435)
    topk         |y - t|^2 + AuxK; abstopk: by magnitude                             (2406.04093)
    batchtopk    the same with the k N largest of a batch of N rows                  (2412.06410)
    matryoshka   batchtopk, + |y_w - t|^2 for every prefix of w features             (2503.17547)

t is the input x, or a transcoder's target. L0: the number of active features l ("step"),
2 / l0* (l - l0*)^2 ("quadratic", Gemma Scope 2), or sum tanh(4 f n) ("tanh", Anthropic 2025).
Values and gradients are SAELens's; every term has a name.
Dims: N rows, D width in, F features, O width out, G prefixes.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from core.errors import InputError
from core.model import full_precision
from sae.coder import Coder, decode, encode, preactivations
from sae.training import chosen, straight_through
from sae.training.chosen import Choice, Chosen

Kind = Literal["standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka"]
Params = dict[str, jax.Array]
RANKED = ("topk", "abstopk", "batchtopk", "matryoshka")
OF_BATCH = ("batchtopk", "matryoshka")
TANH_SCALE = 4.0


class AuxK(NamedTuple):
    """How dead features learn: the O / 2 largest of them reconstruct what the others leave over.

    normalised: divided by the variance of what is left over. rectified: negative pre-activations
    count as zero. ramp: times min(dead / (O / 2), 1). coefficient 0: not at all.
    """

    coefficient: float = 1.0
    normalised: bool = False
    rectified: bool = False
    ramp: bool = True


SAELENS = AuxK()
OPENAI = AuxK(1 / 32, normalised=True, rectified=True, ramp=False)  # and dictionary_learning
SPARSIFY = AuxK(0.0, rectified=True)  # its coefficient is 0 unless one is given


@dataclass(frozen=True)
class Objective:
    """An SAE's kind and what its losses weigh; hashable.

    k: active features of a row; of batchtopk and matryoshka on average. k_start: k at the first
    step, where it falls over a warm-up (0: it does not). centred: b_dec is subtracted from the
    input. rescale: features are ranked by their value times the norm of their decoder row.
    sparsity: c. p: of standard's norm. l0, target_l0, bandwidth, to_input (see straight_through):
    of jumprelu; pre_act: its coefficient of sum relu(threshold - h) n over dead features.
    widths: matryoshka's prefixes, the last one all features. aux_by_prefix: dead features of each
    prefix, beyond the one before it, reconstruct what that prefix leaves over.
    """

    kind: Kind
    k: float = 0.0
    k_start: float = 0.0
    centred: bool = True
    rescale: bool = False
    sparsity: float = 0.0
    p: float = 1.0
    l0: Literal["step", "tanh", "quadratic"] = "step"
    target_l0: float = 0.0
    bandwidth: float = 1e-3
    to_input: bool = False
    pre_act: float = 0.0
    aux: AuxK = SAELENS
    widths: tuple[int, ...] = ()
    aux_by_prefix: bool = False

    def check(self, d_sae: int) -> None:
        """Raise InputError for what is no objective of an SAE with so many features."""
        ranked = self.kind in RANKED
        if ranked and not (0 < self.k <= d_sae and self.k_start <= d_sae):
            raise InputError(f"k is {self.k:g}, not between 1 and the {d_sae} features; choose how "
                             f"many features {self.kind} keeps")  # fmt: skip
        if self.kind in ("topk", "abstopk") and (self.k % 1 or self.k_start % 1):
            raise InputError(f"k {self.k:g} is no whole number, as {self.kind} needs for every "
                             "row; round it, or choose batchtopk")  # fmt: skip
        if ranked and self.k_start and self.k_start < self.k:
            raise InputError(f"k starts at {self.k_start:g} and ends at {self.k:g}; a warm-up "
                             "comes down from more features")  # fmt: skip
        if self.rescale and not ranked:
            raise InputError(f"rescale is of kinds that rank features, not of {self.kind}; leave "
                             "it out")  # fmt: skip
        if not ranked and self.sparsity <= 0:
            raise InputError(f"{self.kind} has sparsity coefficient {self.sparsity:g}, so nothing "
                             "makes it sparse; give a positive one")  # fmt: skip
        if self.kind == "jumprelu" and self.l0 == "quadratic" and not 0 < self.target_l0 <= d_sae:
            raise InputError(f"the quadratic L0 loss has target {self.target_l0:g}; give how many "
                             "features shall be active, --target-l0")  # fmt: skip
        if self.kind != "matryoshka" and (self.widths or self.aux_by_prefix):
            raise InputError(f"prefixes of features are of matryoshka, not of {self.kind}; leave "
                             "out widths and aux_by_prefix")  # fmt: skip
        if self.kind == "matryoshka":
            rises = all(a < b for a, b in zip((0, *self.widths), self.widths, strict=False))
            if not rises or self.widths[-1:] != (d_sae,):
                raise InputError(f"Matryoshka widths {list(self.widths)} must rise and end at the "
                                 f"{d_sae} features")  # fmt: skip

    def coder(self, d_in: int, d_sae: int, d_out: int, transcoder: bool) -> Coder:
        """What it trains, as it is once trained, on the input that it was trained on."""
        architecture = "jumprelu" if self.kind in OF_BATCH else self.kind
        k = int(self.k) if self.kind in ("topk", "abstopk") else 0
        return Coder(
            architecture, d_in, d_sae, d_out, k, self.centred, rescale=self.rescale,
            transcoder=transcoder,
        )  # fmt: skip

    def count(self, k: float, rows: int) -> int:
        """How many features are chosen of a row or, of batchtopk and matryoshka, of a batch."""
        return int(k * rows) if self.kind in OF_BATCH else int(k)


class Phase(NamedTuple):
    """Where the warm-ups stand: the share of `sparsity`, and of the way from k back to k_start."""

    sparsity: jax.Array | float = 1.0
    extra: jax.Array | float = 0.0


class Batch(NamedTuple):
    """What a step is about: inputs, targets, which features are dead (bool), the warm-ups."""

    x_ND: jax.Array
    target_NO: jax.Array
    dead_F: jax.Array
    phase: Phase = Phase()


class Outcome(NamedTuple):
    """Terms of the loss by name; the reconstruction; in how many rows each feature is active;
    the smallest activation that batchtopk or matryoshka chose, inf if none and for others."""

    terms: dict[str, jax.Array]
    y_NO: jax.Array
    fires_F: jax.Array
    smallest: jax.Array


@full_precision
def loss(
    objective: Objective, params: Params, batch: Batch, sparse: bool = False
) -> tuple[jax.Array, Outcome]:
    """The sum of the terms, and what else came out of the pass.

    Differentiable in the parameters; x and the target pass nothing. sparse: which way of `chosen`.
    """
    encoder = _without_input_gradient(objective, params)
    d_in, d_sae = params["W_enc"].shape
    coder = Coder("standard", d_in, d_sae, len(params["b_dec"]), centred=objective.centred,
                  transcoder=True)  # fmt: skip
    if objective.kind in RANKED:
        outcome = _ranked(objective, coder, encoder, params, batch, sparse)
    else:
        run = {"standard": _standard, "gated": _gated, "jumprelu": _jump_relu}[objective.kind]
        terms, f_NF = run(objective, coder, encoder, params, batch)
        y_NO = decode(coder, params, f_NF, batch.x_ND)
        terms = {"mse": _squares(y_NO - batch.target_NO), **terms}
        fires_F = (f_NF != 0).sum(0, dtype=jnp.int32)
        outcome = Outcome(terms, y_NO, fires_F, jnp.full((), jnp.inf))
    return functools.reduce(jnp.add, outcome.terms.values()), outcome


def _without_input_gradient(objective: Objective, params: Params) -> Params:
    """The encoder's parameters, whose b_dec passes its gradient through the other biases.

    Through the input it would cost a product as large as the encoder, summed over rows at once.
    """
    if not objective.centred:
        return params
    fixed_D = jax.lax.stop_gradient(params["b_dec"])
    zero_F = jnp.einsum("D,DF->F", params["b_dec"] - fixed_D, params["W_enc"])
    shifts = {"b_enc": zero_F, "b_gate": zero_F}
    if objective.kind == "gated":
        shifts["b_mag"] = zero_F * jnp.exp(params["r_mag"])
    shifted = {name: params[name] - shift for name, shift in shifts.items() if name in params}
    return params | shifted | {"b_dec": fixed_D}


def _standard(objective: Objective, coder: Coder, encoder: Params, params: Params, batch: Batch):
    f_NF = encode(coder, encoder, batch.x_ND)
    weighted_NF = f_NF * _norms(params)
    if objective.p == 1:
        size_N = weighted_NF.sum(1)
    else:  # the power's derivative is infinite at zero, where no feature is to move
        active_NF = weighted_NF > 0
        powers_NF = jnp.where(active_NF, weighted_NF, 1) ** objective.p
        size_N = jnp.where(active_NF, powers_NF, 0).sum(1) ** (1 / objective.p)
    return {"l1": objective.sparsity * batch.phase.sparsity * size_N.mean()}, f_NF


def _gated(objective: Objective, coder: Coder, encoder: Params, params: Params, batch: Batch):
    f_NF = encode(dataclasses.replace(coder, architecture="gated"), encoder, batch.x_ND)
    gate_NF = encode(coder, encoder | {"b_enc": encoder["b_gate"]}, batch.x_ND)
    size_N = (gate_NF * _norms(params)).sum(1)
    left_NO = decode(coder, params, gate_NF, batch.x_ND) - batch.target_NO
    l1 = objective.sparsity * batch.phase.sparsity * size_N.mean()
    return {"l1": l1, "aux": _squares(left_NO)}, f_NF


def _jump_relu(objective: Objective, coder: Coder, encoder: Params, params: Params, batch: Batch):
    h_NF = preactivations(coder, encoder, batch.x_ND)
    through = (params["threshold"], objective.bandwidth, objective.to_input)
    f_NF = straight_through.jump_relu(h_NF, *through)
    if objective.l0 == "tanh":
        l0_N = jnp.tanh(TANH_SCALE * f_NF * _norms(params)).sum(1)
    else:
        l0_N = straight_through.step(h_NF, *through).sum(1)
    if objective.l0 == "quadratic":
        l0_N = 2 / objective.target_l0 * (l0_N - objective.target_l0) ** 2
    terms = {"l0": objective.sparsity * batch.phase.sparsity * l0_N.mean()}
    if objective.pre_act:
        below_NF = jax.nn.relu(params["threshold"][None] - h_NF) * _norms(params)
        terms["pre_act"] = (
            objective.pre_act * jnp.where(batch.dead_F[None], below_NF, 0).sum(1).mean()
        )
    return terms, f_NF


def _ranked(
    objective: Objective, coder: Coder, encoder: Params, params: Params, batch: Batch, sparse: bool
) -> Outcome:
    h_NF = preactivations(coder, encoder, batch.x_ND)
    # A value is decoded after the norm that ranked it is divided off again: v = h either way.
    rank_NF = jnp.abs(h_NF) if objective.kind == "abstopk" else h_NF
    rank_NF = jax.lax.stop_gradient(rank_NF * _norms(params) if objective.rescale else rank_NF)

    def reconstruct(choice: Choice) -> Chosen:
        if not sparse:
            return chosen.dense(choice, h_NF, params["W_dec"])
        s_ND = batch.x_ND - encoder["b_dec"][None] if objective.centred else batch.x_ND
        maps = (encoder["W_enc"], encoder["b_enc"], params["W_dec"])
        return chosen.sparse(choice, h_NF, s_ND, *maps)

    rows = len(batch.x_ND)
    last = objective.count(objective.k, rows)
    most = objective.count(max(objective.k, objective.k_start), rows)
    now = last + jnp.asarray((most - last) * batch.phase.extra).astype(jnp.int32)
    of_batch, relu = objective.kind in OF_BATCH, objective.kind != "abstopk"
    main = reconstruct(Choice(rank_NF, now, most, of_batch, objective.widths, relu))
    left_GNO = jnp.cumsum(main.y_GNO, axis=0) + params["b_dec"][None, None]
    left_GNO = batch.target_NO[None] - left_GNO
    terms = {"mse": _squares(left_GNO[-1])}
    for width, left_NO in zip(objective.widths[:-1], left_GNO, strict=False):
        terms[f"mse_{width}"] = _squares(left_NO)
    if objective.aux.coefficient:
        terms["aux"] = _revival(objective, reconstruct, rank_NF, left_GNO, batch.dead_F)
    smallest = main.smallest if of_batch else jnp.full((), jnp.inf)
    return Outcome(terms, batch.target_NO - left_GNO[-1], main.fires_F, smallest)


def _revival(
    objective: Objective,
    reconstruct: Callable[[Choice], Chosen],
    rank_NF: jax.Array,
    left_GNO: jax.Array,
    dead_F: jax.Array,
) -> jax.Array:
    """AuxK, without b_dec, which what is left over has had already."""
    aux, most = objective.aux, left_GNO.shape[2] // 2
    left_GNO = jax.lax.stop_gradient(left_GNO)

    def revive(dead_F: jax.Array, left_NO: jax.Array) -> jax.Array:
        dead = dead_F.sum(dtype=jnp.int32)

        def term() -> jax.Array:
            ranks_NF = jnp.where(dead_F[None], rank_NF, -jnp.inf)
            now, bound = jnp.minimum(dead, most), min(most, len(dead_F))
            choice = Choice(ranks_NF, now, bound, relu=aux.rectified)
            value = _squares(reconstruct(choice).y_GNO[0] - left_NO)
            if aux.normalised:
                value /= jnp.maximum(_squares(left_NO - left_NO.mean(0, keepdims=True)), 1e-30)
            if aux.ramp:
                value *= jnp.minimum(dead / most, 1)
            return aux.coefficient * value

        return jax.lax.cond(dead > 0, term, lambda: jnp.zeros(()))

    if not objective.aux_by_prefix:
        return revive(dead_F, left_GNO[-1])
    place_F, starts = jnp.arange(len(dead_F)), (0, *objective.widths[:-1])
    return functools.reduce(jnp.add, [
        revive(dead_F & (place_F >= a) & (place_F < b), left_NO)
        for a, b, left_NO in zip(starts, objective.widths, left_GNO, strict=True)
    ])  # fmt: skip


def _squares(left_NO: jax.Array) -> jax.Array:
    return (left_NO**2).sum(1).mean()


def _norms(params: Params) -> jax.Array:
    """Of the decoder's rows, [1,F]."""
    return jnp.linalg.norm(params["W_dec"], axis=1)[None]
