"""Cross-entropy that never holds the logits of a whole batch.

Dims: B batch, T tokens, D width, V vocabulary, C tokens of a row in one chunk.

Both routes walk chunks of positions. Positions that carry no label are first sorted behind the
others, so a chunk of only such positions costs nothing: a query with two answer tokens pays for
one chunk. nll = logsumexp(z) - z[label]; its derivative in z is softmax(z) - onehot(label).

`token_losses` is plain code that any mode of differentiation passes through, for every
`Objective`; it recomputes logits in the backward pass. `weighted_nll` knows the weights beforehand,
so its forward pass leaves behind the finished gradients and no logits are formed twice
(Liger-Kernel, arXiv 2410.10989). Its two rules are plain differentiable code: forward mode may be
applied to its gradient.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

IGNORED = -100
BLOCK = 8192  # words of the vocabulary


class Objective(NamedTuple):
    """What a token costs, in nats.

    nll: -log p(label); of its weight, the share `smoothing` is spread evenly over the vocabulary.
    log-odds: -log(p / (1 - p)) of the label (TRAK, arXiv 2303.14186).
    kl: KL(p || p_base), where p_base belongs to other hidden states, of the same output matrix.
    """

    kind: Literal["nll", "log-odds", "kl"] = "nll"
    smoothing: float = 0.0


NLL = Objective()


class Chunks(NamedTuple):
    """Positions regrouped as [chunks, B, C, ...]; `order_BT` is the place each came from."""

    hidden: jax.Array
    targets: jax.Array
    order_BT: jax.Array


def _chunks(hidden_BTD: jax.Array, targets_BT: jax.Array, tokens: int) -> Chunks:
    b, t, d = hidden_BTD.shape
    n = -(-b * t // tokens)
    if n <= 1:
        order_BT = jnp.broadcast_to(jnp.arange(t)[None], (b, t))
        return Chunks(hidden_BTD[None], targets_BT[None], order_BT)
    c = -(-t // n)
    n = -(-t // c)
    order_BT = jnp.argsort(targets_BT == IGNORED, axis=1, stable=True)
    hidden_BTD = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1)
    targets_BT = jnp.take_along_axis(targets_BT, order_BT, axis=1)
    pad = ((0, 0), (0, n * c - t))
    hidden_BTD = jnp.pad(hidden_BTD, (*pad, (0, 0)))
    targets_BT = jnp.pad(targets_BT, pad, constant_values=IGNORED)
    return Chunks(
        jnp.swapaxes(hidden_BTD.reshape(b, n, c, d), 0, 1),
        jnp.swapaxes(targets_BT.reshape(b, n, c), 0, 1),
        order_BT,
    )


def _unchunk(chunked: jax.Array, order_BT: jax.Array) -> jax.Array:
    """[n, B, C, ...] -> [B, T, ...] in the original order."""
    b, t = order_BT.shape
    x = jnp.swapaxes(chunked, 0, 1).reshape(b, -1, *chunked.shape[3:])[:, :t]
    if chunked.shape[0] == 1:
        return x
    back_BT = jnp.argsort(order_BT, axis=1)
    return jnp.take_along_axis(x, back_BT.reshape(b, t, *(1,) * (x.ndim - 2)), axis=1)


def _logits(hidden_BCD: jax.Array, head_VD: jax.Array) -> jax.Array:
    wide = np.promote_types(hidden_BCD.dtype, jnp.float32)
    head_VD = head_VD.astype(hidden_BCD.dtype)
    return jnp.einsum("BCD,VD->BCV", hidden_BCD, head_VD, preferred_element_type=wide)


def _pick(x_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BCV, jnp.maximum(targets_BC, 0)[..., None], axis=-1)[..., 0]


def _cost(z_BCV: jax.Array, y_BC: jax.Array, base_BCV: jax.Array | None, objective: Objective):
    """The objective of every position, [B,C]."""
    if objective.kind == "kl":
        assert base_BCV is not None
        logp_BCV, base_BCV = jax.nn.log_softmax(z_BCV), jax.nn.log_softmax(base_BCV)
        return (jnp.exp(logp_BCV) * (logp_BCV - base_BCV)).sum(-1)
    picked_BC = _pick(z_BCV, y_BC)
    if objective.kind == "log-odds":
        is_label_BCV = jnp.arange(z_BCV.shape[-1], dtype=y_BC.dtype)[None, None] == y_BC[..., None]
        return jax.nn.logsumexp(jnp.where(is_label_BCV, -jnp.inf, z_BCV), -1) - picked_BC
    share = objective.smoothing
    if share:
        picked_BC = (1 - share) * picked_BC + share * z_BCV.mean(-1)
    return jax.nn.logsumexp(z_BCV, -1) - picked_BC


def token_losses(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    chunk: int,
    objective: Objective = NLL,
    base_BTD: jax.Array | None = None,
    catch: Callable[[jax.Array, jax.Array], jax.Array] = lambda z_BCV, h_BCD: z_BCV,
) -> jax.Array:
    """The objective at every position, float32 [B,T]; 0 where the target is -100.

    chunk: positions of the batch whose logits are held at once. base_BTD: the other hidden states
    of `kl`. catch: an identity on the logits of a chunk that sees them and their hidden states.
    """
    hiddens = hidden_BTD if base_BTD is None else jnp.stack([hidden_BTD, base_BTD], -2)
    d = hidden_BTD.shape[-1]

    @jax.checkpoint
    def cost(h_BCD: jax.Array, y_BC: jax.Array) -> jax.Array:
        base_BCV = None if base_BTD is None else _logits(h_BCD[..., d:], head_VD)
        h_BCD = h_BCD[..., :d]
        cost_BC = _cost(catch(_logits(h_BCD, head_VD), h_BCD), y_BC, base_BCV, objective)
        return jnp.where(y_BC == IGNORED, 0, cost_BC)

    return _walk(cost, hiddens.reshape(*hidden_BTD.shape[:2], -1), targets_BT, chunk)


def compared(
    hidden_SBTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Of S hidden states of one output matrix: nll [S,B,T], and KL(p_0 || p_s) [S,B,T] in nats.

    0 where the target is -100. No logits are formed twice; chunk: see `token_losses`.
    """
    count, b, t, d = hidden_SBTD.shape

    def cost(h_BCX: jax.Array, y_BC: jax.Array) -> jax.Array:
        h_BCSD = h_BCX.reshape(*y_BC.shape, count, d)
        logp = [jax.nn.log_softmax(_logits(h_BCSD[:, :, s], head_VD)) for s in range(count)]
        p_BCV = jnp.exp(logp[0])
        nll = [-_pick(logp_BCV, y_BC) for logp_BCV in logp]
        kl = [(p_BCV * (logp[0] - logp_BCV)).sum(-1) for logp_BCV in logp]
        return jnp.where((y_BC == IGNORED)[..., None], 0, jnp.stack([*nll, *kl], -1))

    joined_BTX = jnp.moveaxis(hidden_SBTD, 0, 2).reshape(b, t, -1)
    found_SBT = jnp.moveaxis(_walk(cost, joined_BTX, targets_BT, max(chunk // count, 1)), -1, 0)
    return found_SBT[:count], found_SBT[count:]


def _walk(
    cost: Callable[[jax.Array, jax.Array], jax.Array],
    hidden_BTX: jax.Array,
    targets_BT: jax.Array,
    tokens: int,
) -> jax.Array:
    """cost(hidden [B,C,X], targets [B,C]) -> [B,C,...] of all positions, `tokens` of them at once.

    0 for chunks without a target, which cost nothing.
    """
    chunks = _chunks(hidden_BTX, targets_BT, tokens)
    if chunks.hidden.shape[0] == 1:
        return cost(chunks.hidden[0], chunks.targets[0])
    like = jax.eval_shape(cost, chunks.hidden[0], chunks.targets[0])

    def body(carry: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        def skip(*_: jax.Array) -> jax.Array:
            return jnp.zeros(like.shape, like.dtype)

        return carry, jax.lax.cond((chunk[1] != IGNORED).any(), cost, skip, *chunk)

    _, cost_nBC = jax.lax.scan(body, None, (chunks.hidden, chunks.targets))
    return _unchunk(cost_nBC, chunks.order_BT)


def token_nll(
    hidden_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int
) -> jax.Array:
    """-log p(target) at every position, float32 [B,T]; 0 where the target is -100."""
    return token_losses(hidden_BTD, head_VD, targets_BT, chunk)


@jax.custom_jvp
def _accumulate(sum_VD: jax.Array, p_BCV: jax.Array, h_BCD: jax.Array) -> jax.Array:
    """sum + p^T h."""
    return sum_VD + jnp.einsum("BCV,BCD->VD", p_BCV, h_BCD, preferred_element_type=sum_VD.dtype)


@_accumulate.defjvp
def _accumulate_along(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]):
    """dsum + dp^T h + p^T dh, some words at a time: no product of the head's size stands beside
    the sum, where there would be two."""
    _, p_BCV, h_BCD = primals
    dsum_VD, dp_BCV, dh_BCD = tangents
    both_BCD = jnp.concatenate([h_BCD, dh_BCD], 1)
    vocabulary, words = len(dsum_VD), min(BLOCK, len(dsum_VD))

    def add(i: jax.Array, dsum_VD: jax.Array) -> jax.Array:
        at = jnp.minimum(i * words, vocabulary - words)  # the last block reaches back
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=at, slice_size=words)
        both_BCW = jnp.concatenate([part(dp_BCV, axis=2), part(p_BCV, axis=2)], 1)
        sum_WD = _accumulate(part(dsum_VD), both_BCW, both_BCD)
        is_new_W1 = (at + jnp.arange(words, dtype=at.dtype) >= i * words)[:, None]
        sum_WD = jnp.where(is_new_W1, sum_WD, part(dsum_VD))
        return jax.lax.dynamic_update_slice_in_dim(dsum_VD, sum_WD, at, 0)

    return _accumulate(*primals), jax.lax.fori_loop(0, -(-vocabulary // words), add, dsum_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def weighted_nll(
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """(sum over positions of weight * nll, nll [B,T]), float32.

    Differentiable in hidden, head and weights through the first output only; asking for a reverse
    derivative through the second raises (use `token_nll`).
    """
    nll_BT = token_nll(hidden_BTD, head_VD, targets_BT, chunk)
    return (weights_BT * nll_BT).sum(), nll_BT


def _weighted_forward(
    hidden: CustomVJPPrimal,
    head: CustomVJPPrimal,
    targets: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    chunk: int,
):
    hidden_BTD, head_VD, targets_BT = hidden.value, head.value, targets.value
    weights_BT = weights.value
    head_low_VD = head_VD.astype(hidden_BTD.dtype)
    chunks = _chunks(hidden_BTD, targets_BT, chunk)
    weights_BT = jnp.where(targets_BT == IGNORED, 0, weights_BT)
    weights_nBC = _chunks(weights_BT[..., None], targets_BT, chunk).hidden[..., 0]
    wide = weights_BT.dtype

    def gradients(h_BCD: jax.Array, y_BC: jax.Array, w_BC: jax.Array, dhead_VD: jax.Array | None):
        z_BCV = _logits(h_BCD, head_VD)
        top_BC1 = jax.lax.stop_gradient(z_BCV.max(-1, keepdims=True))
        e_BCV = jnp.exp(z_BCV - top_BC1)
        s_BC = e_BCV.sum(-1)
        nll_BC = jnp.log(s_BC) + top_BC1[..., 0] - _pick(z_BCV, y_BC)
        # The one-hot half of the derivative touches one row of the head per position, so it is a
        # gather (and a scatter below), not another [B,C,V] array.
        p_BCV = (e_BCV * (w_BC / s_BC)[..., None]).astype(h_BCD.dtype)
        dh_BCD = jnp.einsum("BCV,VD->BCD", p_BCV, head_low_VD, preferred_element_type=wide)
        dh_BCD = dh_BCD - w_BC[..., None] * head_VD[jnp.maximum(y_BC, 0)]
        if dhead_VD is not None:
            dhead_VD = _accumulate(dhead_VD, p_BCV, h_BCD)
        return jnp.where(y_BC == IGNORED, 0, nll_BC), dh_BCD.astype(h_BCD.dtype), dhead_VD

    dhead_VD = jnp.zeros(head_VD.shape, wide) if head.perturbed else None
    if chunks.hidden.shape[0] == 1:
        nll, dh, dhead_VD = gradients(chunks.hidden[0], chunks.targets[0], weights_nBC[0], dhead_VD)
        nll_nBC, dh_nBCD = nll[None], dh[None]
    else:

        def body(dhead_VD: jax.Array | None, chunk: tuple[jax.Array, jax.Array, jax.Array]):
            def skip(h_BCD: jax.Array, y_BC: jax.Array, w_BC: jax.Array, dhead_VD):
                return jnp.zeros(y_BC.shape, wide), jnp.zeros_like(h_BCD), dhead_VD

            live = (chunk[1] != IGNORED).any()
            nll_BC, dh_BCD, dhead_VD = jax.lax.cond(live, gradients, skip, *chunk, dhead_VD)
            return dhead_VD, (nll_BC, dh_BCD)

        dhead_VD, (nll_nBC, dh_nBCD) = jax.lax.scan(
            body, dhead_VD, (chunks.hidden, chunks.targets, weights_nBC)
        )
    nll_BT = _unchunk(nll_nBC, chunks.order_BT)
    dh_BTD = _unchunk(dh_nBCD, chunks.order_BT)
    if dhead_VD is not None:
        wh_BTD = weights_BT[..., None] * hidden_BTD.astype(wide)
        dhead_VD = dhead_VD.at[jnp.maximum(targets_BT, 0)].add(-wh_BTD)
    return ((weights_BT * nll_BT).sum(), nll_BT), (dh_BTD, dhead_VD, nll_BT)


def _weighted_backward(chunk: int, residual, cotangents):
    del chunk
    dh_BTD, dhead_VD, nll_BT = residual
    g, g_nll = cotangents
    if not isinstance(g_nll, SymbolicZero):
        raise TypeError("weighted_nll has no reverse derivative through its nll; use token_nll")
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    return (
        (g * dh_BTD.astype(g.dtype)).astype(dh_BTD.dtype),
        None if dhead_VD is None else g * dhead_VD,
        None,
        g * nll_BT,
    )


weighted_nll.defvjp(_weighted_forward, _weighted_backward, symbolic_zeros=True)
