"""What is asked of the end of a training run, and its gradient there.

Dims: Q queries, K some of them, R rows asked, N of one part, B of a batch, T tokens.

A query is a function phi_q of the rows' summed token losses s_r (nats), so its gradient is a
weighted loss's:

    grad phi_q = sum_r c_qr grad s_r,    c_qr = d phi_q / d s_r

    nll        sum_r s_r / tokens, or of each row by itself
    margin     s_gold + logsumexp_o(-s_o) over an item's other choices o: how much less likely its
               right answer is than any wrong one; the mean over the items, or each item's
    contrast   either, less its mean over control rows

All fall as the model gets better at what is asked.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from attribution.magic.adjoint import zeros
from core import model
from core.errors import InputError
from core.inference import batch_losses, placer
from core.progress import Progress
from core.rows import Batch, Plan, Rows, bucket, pad_batch, same_tokenizer
from core.schema import Params
from training.optim import Optim
from training.step import Recipe

Mode = Literal["mean", "each"]
Kind = Literal["nll", "margin"]
ITEM, GOLD = "item", "gold"  # columns of rows that are choices


class Functional(NamedTuple):
    """names [Q]; parts: the rows [R] asked, of the query and then of a control.

    of: s [R] -> (phi [Q], c [Q,R]), float64. share: of each query in the mean of all.
    """

    names: list[str]
    parts: tuple[Rows, ...]
    of: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    share_Q: np.ndarray

    def mean(self, phi_Q: np.ndarray) -> float:
        return float(phi_Q @ self.share_Q)


def functional(query: Rows, mode: Mode, kind: Kind, control: Rows | None = None) -> Functional:
    """The functional of query rows, less its mean over control rows.

    InputError when `margin` is asked of rows that are no choices (`data query --choices all`), or
    the two were made with different tokenizers.
    """
    asked = {"nll": _nll, "margin": _margin}[kind]
    names, own, share_Q = asked(query, mode)
    if control is None:
        return Functional(names, (query,), own, share_Q)
    same_tokenizer(query, control)
    _, other, _ = asked(control, "mean")

    def contrast(s_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phi_Q, c_QR = own(s_R[: len(query)])
        less_1, less_1R = other(s_R[len(query) :])
        return phi_Q - less_1, np.hstack([c_QR, np.repeat(-less_1R, len(phi_Q), 0)])

    return Functional(names, (query, control), contrast, share_Q)


Asked = tuple[list[str], Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], np.ndarray]


def _nll(rows: Rows, mode: Mode) -> Asked:
    if mode == "mean":
        c_QR = np.full((1, len(rows)), 1 / rows.trained.sum())
        return ["mean"], lambda s_R: (c_QR @ s_R, c_QR), np.ones(1)
    c_QR = np.diag(1 / rows.trained)
    given = rows.column("id") or [None] * len(rows)
    names = [str(i if name is None else name) for i, name in enumerate(given)]
    return names, lambda s_R: (c_QR @ s_R, c_QR), rows.trained / rows.trained.sum()


def _margin(rows: Rows, mode: Mode) -> Asked:
    items = choices(rows)

    def margins(s_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        phi_I, c_IR = np.zeros(len(items)), np.zeros((len(items), len(rows)))
        for i, (gold, others) in enumerate(items.values()):
            wrong = np.logaddexp.reduce(-s_R[others])
            phi_I[i] = s_R[gold] + wrong
            c_IR[i, gold], c_IR[i, others] = 1, -np.exp(-s_R[others] - wrong)
        if mode == "each":
            return phi_I, c_IR
        return phi_I.mean(keepdims=True), c_IR.mean(0, keepdims=True)

    if mode == "mean":
        return ["mean"], margins, np.ones(1)
    return list(items), margins, np.full(len(items), 1 / len(items))


def choices(rows: Rows) -> dict[str, tuple[int, list[int]]]:
    """Row of the right choice and rows of the others, by item, in the order of the rows."""
    found: list[list[Any]] = []
    for name in (ITEM, GOLD):
        values = rows.column(name)
        if values is None:
            raise InputError(f"{rows.path} has no column {name!r}, so its rows are not known as "
                             "choices; make them with `data query --choices all`")  # fmt: skip
        found.append(values)
    right: dict[str, list[int]] = {}
    wrong: dict[str, list[int]] = {}
    for row, (item, gold) in enumerate(zip(*found, strict=True)):
        if item is None or gold not in (0, 1):
            raise InputError(f"{rows.path} row {row} has {ITEM} {item!r} and {GOLD} {gold!r}; name "
                             "the item and say whether the choice is right")  # fmt: skip
        right.setdefault(str(item), [])
        wrong.setdefault(str(item), [])
        (right if gold else wrong)[str(item)].append(row)
    for item in right:
        if len(right[item]) != 1 or not wrong[item]:
            raise InputError(f"{rows.path}: item {item!r} has {len(right[item])} right and "
                             f"{len(wrong[item])} other choices; a margin needs one right choice "
                             "and at least one other")  # fmt: skip
    return {item: (right[item][0], wrong[item]) for item in right}


def losses(
    recipe: Recipe, params: Params, frozen: Params | None, parts: Iterable[Rows], batch_tokens: int
) -> np.ndarray:
    """s [R], float64: the summed token losses of every part's rows, one part after the other."""
    variables, found = recipe.variables(params, frozen), []
    for rows in parts:
        s_R, plan = np.zeros(len(rows)), Plan(rows, batch_tokens, jax.device_count())
        for batch, losses_BT in batch_losses(recipe.config, recipe.execution, variables, plan):
            real_B = batch.rows_B >= 0
            s_R[batch.rows_B[real_B]] = losses_BT[real_B].sum(1, dtype=np.float64)
        found.append(s_R)
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("sums",))
@model.full_precision
def _add(
    recipe: Recipe,
    params: Params,
    frozen: Params | None,
    sums: Params,
    q_K: jax.Array,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    weights_B: jax.Array,
) -> Params:
    """`sums` with the gradient of a batch's weighted loss added at the queries q."""

    def loss(params: Params) -> jax.Array:
        weights_BT = jnp.broadcast_to(weights_B[:, None], labels_BT.shape)
        variables = recipe.variables(params, frozen)
        batch = ids_BT, labels_BT, weights_BT
        return model.weighted_loss(recipe.config, recipe.execution, variables, *batch)[0]

    grads = cast(Params, jax.grad(loss)(params))
    return jax.tree.map(lambda sum_Q, grad: sum_Q.at[q_K].add(grad[None]), sums, grads)


def gradients(
    recipe: Recipe,
    params: Params,
    frozen: Params | None,
    parts: Sequence[Rows],
    c_QR: np.ndarray,
    batch_tokens: int,
) -> Params:
    """sum_r c_qr grad s_r in `params`, of every query: a tree like `params`, each leaf [Q, ...].

    Dropout is off. All Q trees are on the devices at once; a caller with less memory gives some of
    c's rows at a time. A row without weight in a query costs it nothing, and rows that weigh the
    same in all of them, as a control's do, are run once.
    """
    sums = jax.tree.map(lambda leaf: zeros(len(c_QR), leaf), params)
    place, every, ends = placer(), np.arange(len(c_QR)), np.cumsum([len(rows) for rows in parts])
    wide = np.promote_types(recipe.execution.compute_dtype, np.float32)
    recipe = recipe._replace(optim=Optim(), steps=0)  # one program, however it was trained
    work: list[tuple[Rows, np.ndarray, np.ndarray]] = []
    for rows, c_QN in zip(parts, np.split(c_QR, ends[:-1], axis=1), strict=True):
        groups = [every] if (c_QN == c_QN[:1]).all() else every[:, None]
        work += [(rows, q_K, c_QN[q_K[0]]) for q_K in groups]
    with Progress(sum(int((c_N != 0).sum()) for *_, c_N in work), "query gradients", "row") as bar:
        for rows, q_K, c_N in work:
            for batch in _batches(rows, np.flatnonzero(c_N), batch_tokens):
                real_B = batch.rows_B >= 0
                weights_B = np.where(real_B, c_N[batch.rows_B], 0).astype(wide)
                sums = _add(recipe, params, frozen, sums, q_K, *place(batch), weights_B)
                bar.update(int(real_B.sum()))
    return sums


def _batches(rows: Rows, chosen: np.ndarray, batch_tokens: int) -> Iterator[Batch]:
    """Rows `chosen` in batches, longest first; all that are few share few shapes."""
    longest, devices = int(rows.lengths.max()), jax.device_count()
    left = chosen[np.argsort(-rows.lengths[chosen], kind="stable")]
    while len(left):
        length = bucket(int(rows.lengths[left[0]]), longest)
        size = min(max(batch_tokens // length, 1), len(chosen))
        size += -size % devices
        empty = np.full(max(size - len(left), 0), -1)
        yield pad_batch(rows, np.append(left[:size], empty), length)
        left = left[size:]
