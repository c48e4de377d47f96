"""What is asked of a model: its value, coefficients and gradient, against the plain formulas.

The reference is the reverse derivative of the formula itself, in float64.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution.magic.functional import functional, gradients, losses
from core import adapter, model
from core.adapter import LoraSpec
from core.config import Execution
from core.errors import InputError
from core.rows import load_rows, pad_batch, save_rows
from training.optim import Optim
from training.step import Recipe

LENGTHS = [9, 4, 16, 12, 13, 3]
ITEMS = ["x", "x", "y", "x", "y", "y"]
GOLD = [False, True, False, False, False, True]
CONTROL = [8, 16, 5]
ASKED = [
    (kind, mode, control) for kind in ("nll", "margin") for mode in ("mean", "each")
    for control in (False, True)
]  # fmt: skip


def formula(kind: str, mode: str, s, tokens, items, gold):
    """phi [Q] as it is defined, in jax, of the rows' summed losses and numbers of tokens."""
    if kind == "nll":
        return s / tokens if mode == "each" else (s.sum() / tokens.sum())[None]
    margins = []
    for item in dict.fromkeys(items):
        rows = [r for r, name in enumerate(items) if name == item]
        others = jnp.stack([-s[r] for r in rows if not gold[r]])
        right = next(-s[r] for r in rows if gold[r])
        margins.append(-(right - jax.nn.logsumexp(others)))
    found = jnp.stack(margins)
    return found.mean(keepdims=True) if mode == "mean" else found


class Case:
    """Query and control rows, a model in float64, and all of ASKED of it."""

    def __init__(self, tiny, path, lora: LoraSpec | None, batch_tokens: int):
        self.query = tiny.rows(path / "query", LENGTHS, 1, item=ITEMS, gold=GOLD, id=list("abcdef"))
        control = {"item": ["u"] * 3, "gold": [1, 0, 0]}
        self.control = tiny.rows(path / "control", CONTROL, 2, **control)
        self.batch_tokens = batch_tokens
        self.recipe = Recipe(tiny.config, Execution("float64", "scan"), Optim(), 5, lora)
        self.params, self.frozen = tiny.params(dtype="float64"), None
        if lora:
            self.frozen, random = self.params, np.random.default_rng(6)  # `b` starts at zero
            self.params = jax.tree.map(
                lambda x: jnp.asarray(np.float64(x) + random.normal(0, 0.1, x.shape)),
                adapter.init(lora, tiny.config, 4),
            )

    def asked(self, kind, mode, contrasted):
        return functional(self.query, mode, kind, self.control if contrasted else None)

    def losses(self, params) -> np.ndarray:
        parts = self.query, self.control
        return losses(self.recipe, params, self.frozen, parts, self.batch_tokens)

    def values(self, params) -> tuple[np.ndarray, np.ndarray]:
        """(phi [Q], c [Q,R]) of all of ASKED, one after the other."""
        s_R, values, coefficients = self.losses(params), [], []
        for asked in ASKED:
            count = len(s_R) if asked[2] else 6
            phi_Q, c_QR = self.asked(*asked).of(s_R[:count])
            values.append(phi_Q)
            coefficients.append(np.pad(c_QR, ((0, 0), (0, len(s_R) - count))))
        return np.concatenate(values), np.concatenate(coefficients)

    @functools.cached_property
    def found(self):
        phi_Q, c_QR = self.values(self.params)
        how = self.recipe, self.params, self.frozen, (self.query, self.control)
        return phi_Q, gradients(*how, c_QR, self.batch_tokens)

    def formulas(self, params):
        """What `values` must be; the model runs over all rows at once."""
        parts = [pad_batch(rows, np.arange(len(rows)), 19) for rows in (self.query, self.control)]
        ids_RT, labels_RT = (jnp.concatenate(x) for x in list(zip(*parts, strict=True))[:2])
        variables, how = self.recipe.variables(params, self.frozen), self.recipe
        s_R = model.token_losses(how.config, how.execution, variables, ids_RT, labels_RT).sum(1)
        of = [
            (s, rows.trained.astype(float), rows.column("item"), rows.column("gold"))
            for s, rows in ((s_R[:6], self.query), (s_R[6:], self.control))
        ]
        found = []
        for kind, mode, contrasted in ASKED:
            less = formula(kind, "mean", *of[1])[0] if contrasted else 0.0
            found.append(formula(kind, mode, *of[0]) - less)
        return jnp.concatenate(found)


@pytest.fixture(scope="module")
def cases(tiny, tmp_path_factory):
    """Of all parameters and of an adapter's factors, each with batches of its own size."""
    spec = LoraSpec(2, 3.0, ("c_attn", "mlp.c_proj"), layers=(1,), dropout=0.5)
    with jax.enable_x64(True):
        yield {
            name: Case(tiny, tmp_path_factory.mktemp(name), lora, batch_tokens)
            for name, lora, batch_tokens in (("all", None, 1000), ("lora", spec, 32))
        }


@pytest.fixture
def case(cases):
    return cases["all"]


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_values_and_gradients_are_those_of_the_formula(cases, trained, close):
    case = cases[trained]

    def both(params):
        found_Q = case.formulas(params)
        return found_Q, found_Q

    grads, phi_Q = jax.jit(jax.jacrev(both, has_aux=True))(case.params)
    close(case.found, (phi_Q, grads), "float64")


def test_gradients_predict_what_a_step_does(case):
    """Central differences along a random direction of the parameters."""
    random = np.random.default_rng(3)
    along = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), case.params)
    ends = [jax.tree.map(lambda x, v, e=e: x + e * v, case.params, along) for e in (1e-6, -1e-6)]
    after_Q, before_Q = (case.values(params)[0] for params in ends)
    pairs = zip(jax.tree.leaves(case.found[1]), jax.tree.leaves(along), strict=True)
    slopes_Q = sum(np.tensordot(np.asarray(g), np.asarray(v), v.ndim) for g, v in pairs)
    np.testing.assert_allclose((after_Q - before_Q) / 2e-6, slopes_Q, rtol=1e-6)


@pytest.mark.parametrize("kind, mode, contrasted", ASKED)
def test_coefficients_are_the_derivative_in_the_losses(case, close, kind, mode, contrasted):
    asked = case.asked(kind, mode, contrasted)
    count = 6 + 3 * contrasted
    s_R = np.random.default_rng(0).uniform(1, 4, count)
    found = asked.of(s_R)[1]
    steps = 1e-5 * np.eye(count)
    differences = [(asked.of(s_R + e)[0] - asked.of(s_R - e)[0]) / 2e-5 for e in steps]
    close(found, np.stack(differences, 1), 1e-9)


def test_names_say_which_query(case):
    assert functional(case.query, "mean", "nll").names == ["mean"]
    assert functional(case.query, "each", "nll").names == list("abcdef")
    assert functional(case.query, "each", "margin").names == ["x", "y"]
    assert functional(case.control, "each", "nll").names == ["0", "1", "2"]


def test_margins_of_certain_answers_stay_finite(case):
    phi_Q, c_QR = functional(case.query, "each", "margin").of(np.array([1e4] * 5 + [0.0]))
    np.testing.assert_allclose(phi_Q, np.log(2) - [0, 1e4])
    np.testing.assert_allclose(c_QR.sum(1), 0, atol=1e-12)


def test_a_control_is_shared_by_its_queries(case, close):
    """And float32 stays float32."""
    place = 1 + 1 + 6  # of the first query of nll, each, contrasted
    execution = dataclasses.replace(case.recipe.execution, dtype="float32")
    params = jax.tree.map(lambda x: x.astype(jnp.float32), case.params)
    asked = case.asked("nll", "each", True)
    c_QR = asked.of(np.zeros(9))[1][:2]
    with jax.enable_x64(False):
        how = case.recipe._replace(execution=execution), params, None, asked.parts
        grads = gradients(*how, c_QR, 1000)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype("float32")}
    close(grads, jax.tree.map(lambda x: x[place : place + 2], case.found[1]))


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "no column 'item'.*data query --choices all"),
        ({"item": ["x", "x"]}, "no column 'gold'"),
        ({"item": ["x", None], "gold": [True, False]}, "row 1 has item None"),
        ({"item": ["x", "x"], "gold": [True, None]}, "row 1 .* gold None"),
        ({"item": ["x", "x"], "gold": [False, False]}, "'x' has 0 right and 2 other"),
        ({"item": ["x", "x"], "gold": [True, True]}, "'x' has 2 right"),
        ({"item": ["x", "z"], "gold": [True, False]}, "'x' has 1 right and 0 other"),
    ],
)
def test_rows_that_are_no_items_are_named(tmp_path, tiny, columns, message):
    rows = tiny.rows(tmp_path / "rows", [5, 6], **columns)
    functional(rows, "mean", "nll")
    with pytest.raises(InputError, match=message):
        functional(rows, "mean", "margin")


def test_a_control_has_the_querys_tokenizer(case, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        save_rows(folder, [np.arange(4)], tokenizer=folder.name)
    with pytest.raises(InputError, match="different tokenizers"):
        functional(load_rows(folders[0]), "mean", "nll", load_rows(folders[1]))
