"""Kronecker factors: parity with Bergson, definitions per document, batching, labels, resuming."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import gradients, targets
from attribution.curvature import fisher, kronecker, moments
from attribution.curvature.kronecker import Factors, Settings
from attribution.curvature.moments import Moments, Positions
from attribution.projection import Projection
from attribution.targets import Spec
from core import adapter as adapters
from core import model, rows, safetensors
from core.adapter import LoraSpec
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError

GOLDEN = Path(__file__).parents[2] / "golden" / "bergson"
LENGTHS = [13, 5, 16, 9]
PLAIN, BIAS = Spec(Projection(0)), Spec(Projection(0), include_bias=True)
SCAN = Execution(layers="scan")
STATIC = ("config", "execution", "spec", "rule")


@pytest.fixture(scope="module", autouse=True)
def quick(tiny):
    """The pass compiled quickly, and one shape for all rows of a dataset."""
    with pytest.MonkeyPatch.context() as patch:
        plain: list[Any] = [moments.accumulate, kronecker.multiply]
        compiled = tiny.jit(plain[0].__wrapped__, static_argnames=STATIC)
        patch.setattr(kronecker, "accumulate", compiled)
        patch.setattr(kronecker, "multiply", tiny.jit(plain[1].__wrapped__))
        patch.setattr(rows, "bucket", lambda length, longest: longest)
        yield compiled


def full(upper):
    return np.triu(upper) + np.swapaxes(np.triu(upper, 1), -1, -2)


@pytest.fixture(scope="module", params=["gpt2", "gemma3"])
def golden(request, tmp_path_factory):
    """(model, rows, hessians, scores, {split: gradients by module})."""
    folder, family = tmp_path_factory.mktemp("golden"), GOLDEN / request.param
    with np.load(family / "rows.npz") as data:
        lengths, columns = data["train/lengths"], (data["train/ids"], data["train/labels"])
    ids, labels = ([x[:n] for x, n in zip(c, lengths, strict=True)] for c in columns)
    rows.save_rows(folder / "rows", ids, labels)
    arrays = [dict(np.load(family / f"{name}.npz")) for name in ("hessians", "scores")]
    with np.load(family / "gradients.npz") as data:
        grads = {
            kind: {k.removeprefix(f"{kind}/"): v for k, v in data.items() if k.startswith(kind)}
            for kind in ("sum/train", "sum/query")
        }
    return load_model(family / "model"), rows.load_rows(folder / "rows"), *arrays, grads


def by_sink(factors: Factors, grads) -> kronecker.Tree:
    """[N,O,I] by module as a tree."""
    tree: kronecker.Tree = {}
    for module in factors.info["modules"]:
        tree.setdefault(module["sink"], []).append(grads[module["name"]])
    return {sink: jnp.stack(parts) for sink, parts in tree.items()}


@pytest.mark.parametrize("name", ["kfac", "tkfac", "shampoo", "kfac_bias"])
def test_factors_inverses_and_scores_are_bergsons(golden, relative, tmp_path, name):
    """Made there with one document a batch, and here with all of them in one."""
    loaded, pool, hessians, scores, grads = golden
    method: Any = name.removesuffix("_bias")
    corrected = name in ("kfac", "shampoo")
    settings = Settings(method, corrected, "empirical")
    spec = BIAS if name == "kfac_bias" else PLAIN
    factors = kronecker.fit(tmp_path, loaded, pool, spec, SCAN, 10_000, settings)
    assert factors.info["positions"] == hessians["positions"]
    sums = safetensors.read(tmp_path / kronecker.MOMENTS)
    for module in factors.info["modules"]:
        sink, layer = module["sink"], module["layer"]
        a_II, s_OO = (full(sums[f"{sink}:{side}"][layer]) for side in moments.SIDES)
        a_II = a_II / np.trace(a_II) if method == "shampoo" else a_II
        assert relative(a_II, hessians[f"{name}/A/{module['name']}"]) < 1e-5
        assert relative(s_OO, hessians[f"{name}/G/{module['name']}"]) < 1e-5
        if corrected:  # eigenvectors have no sign and, where values repeat, no order
            expected = hessians[f"{name}/corrected/{module['name']}"]
            found = np.sort(factors.values[sink][layer], axis=None)
            assert relative(found, np.sort(expected, axis=None)) < 1e-4
    if name == "kfac_bias":
        return
    outer = [np.einsum("LO,LI->LOI", s.outputs_OO, s.inputs_II) for s in factors.spectra.values()]
    plain = factors._replace(values=dict(zip(factors.spectra, outer, strict=True)))
    cases: dict[str, list[Any]] = {
        "kfac": [("kfac", plain, "damped"), ("kfac_ft", plain, "factored"),
                 ("ekfac", factors, "damped")],
        "tkfac": [("tkfac", factors, "damped")],
        "shampoo": [("shampoo", plain, "damped"), ("shampoo_ev", factors, "damped")],
    }  # fmt: skip
    train, query = (by_sink(factors, grads[kind]) for kind in ("sum/train", "sum/query"))
    for case, used, inversion in cases[name]:
        solved = kronecker.apply(used, query, inversion)
        for module in factors.info["modules"]:
            expected_OI = hessians[f"ihvp/{case}/{module['name']}"]
            assert relative(solved[module["sink"]][module["layer"], 0], expected_OI) < 1e-4
        found = sum(
            np.einsum("LNOI,LQOI->NQ", np.asarray(train[s], np.float64), solved[s]) for s in train
        )
        assert relative(found, scores[case]) < 1e-4


def positions(tiny, lengths, length=None, first=0):
    ids_BT, labels_BT = tiny.batch(lengths, length=length)
    numbers = np.arange(first, first + len(lengths), dtype=np.int32)
    return Positions(*map(jnp.asarray, (ids_BT, labels_BT, np.array(lengths, np.int32), numbers)))


def only(batch, chosen):
    """Some of a batch's rows, and empty ones instead of the others."""
    kept = [*chosen, *[0] * (len(batch.rows_B) - len(chosen))]
    ids_BT, labels_BT, lengths_B, rows_B = (np.array(x)[kept] for x in batch)
    empty = slice(len(chosen), None)
    ids_BT[empty], labels_BT[empty], lengths_B[empty], rows_B[empty] = 7, -100, 0, -1
    return Positions(*map(jnp.asarray, (ids_BT, labels_BT, lengths_B, rows_B)))


def start(config, spec, rule):
    return jax.tree.map(lambda x: x.astype("float64"), moments.zeros(config, spec, rule))


@pytest.fixture(scope="module")
def orthogonal(tiny):
    """Some basis of every site, bias included, float64."""

    def basis(random, size) -> Any:
        return np.linalg.qr(random.normal(size=(tiny.config.layers, size, size)))[0]

    random = np.random.default_rng(3)
    found: dict[str, Any] = {}
    for site in targets.sites(tiny.config):
        sizes = (site.inputs + 1, site.outputs)
        found[f"{site.path}/weight"] = Moments(*(basis(random, size) for size in sizes))
    return found


@pytest.fixture(scope="module")
def statistics(tiny, quick, orthogonal):
    """What the pass emits of a batch, in float64, with the bias."""

    def run(rule, batch, seed=None, sums=None, spec=BIAS):
        with jax.enable_x64(True):
            params = tiny.params(dtype="float64")
            bases = jax.tree.map(jnp.asarray, orthogonal) if rule == "corrections" else None
            return quick(
                tiny.config, Execution("float64", "scan"), spec, rule, {"params": params}, bases,
                start(tiny.config, spec, rule) if sums is None else sums, batch,
                None if seed is None else jnp.uint32(seed),
            )  # fmt: skip

    return run


def test_statistics_are_sums_over_documents(tiny, relative, statistics, orthogonal, x64):
    """By their definitions, from each document's gradient taken the plain way."""
    batch = positions(tiny, LENGTHS)
    plain = tiny.plain_gradients(
        tiny.config, tiny.params(dtype="float64"), batch.ids_BT, batch.labels_BT, bias=True
    )
    kfac, tkfac, shampoo, corrections = (statistics(rule, batch) for rule in moments.RULES)
    alone = [statistics("kfac", only(batch, [b])) for b in range(4)]
    for site in targets.sites(tiny.config):
        sink, g_BLOI = f"{site.path}/weight", plain[site.path]
        a_LII = np.einsum("BLOI,BLOJ->LIJ", g_BLOI, g_BLOI)
        s_LOO = np.einsum("BLOI,BLPI->LOP", g_BLOI, g_BLOI)
        assert relative(full(shampoo[sink].inputs_II), a_LII) < 1e-12
        assert relative(full(shampoo[sink].outputs_OO), s_LOO) < 1e-12
        turned = np.einsum("LOP,BLOI,LIJ->BLPJ", orthogonal[sink][1], g_BLOI, orthogonal[sink][0])
        assert relative(corrections[sink], np.square(turned).sum(0)) < 1e-12
        each = [jax.tree.map(full, one[sink]) for one in alone]
        traces = [[np.trace(x, axis1=1, axis2=2)[:, None, None] for x in one] for one in each]
        a_LII = sum(one[0] * trace[1] for one, trace in zip(each, traces, strict=True))
        s_LOO = sum(one[1] * trace[0] for one, trace in zip(each, traces, strict=True))
        assert relative(full(tkfac[sink].inputs_II), a_LII) < 1e-12
        assert relative(full(tkfac[sink].outputs_OO), s_LOO) < 1e-12
        assert relative(full(kfac[sink].inputs_II), sum(one[0] for one in each)) < 1e-12
        # x is one where the bias is, so the corner counts the positions that predict a token.
        assert np.all(full(kfac[sink].inputs_II)[:, -1, -1] == sum(LENGTHS) - len(LENGTHS))


@pytest.mark.parametrize("rule", ["kfac", "tkfac", "shampoo", "corrections"])
def test_batching_and_padding_change_nothing(tiny, close, relative, statistics, rule, x64):
    """With labels of the model's own, which must then be the same ones."""
    whole = positions(tiny, LENGTHS, 19)
    together = statistics(rule, whole, seed=5)
    sums = None
    for chosen in ([3], [2, 0], [1]):
        sums = statistics(rule, only(whole, chosen), seed=5, sums=sums)
    close(sums, together, "float64")
    if rule == "kfac":
        others = statistics(rule, whole, seed=6), statistics(rule, whole)
        for sink, (a_LII, s_LOO) in together.items():
            for other in others:
                assert relative(other[sink].inputs_II, a_LII) < 1e-12
                assert not np.allclose(other[sink].outputs_OO, s_LOO, rtol=0.01)


def test_mean_loss_has_its_own_hessian(tiny, relative, statistics, x64):
    """A document's outer product is divided by its number of labels, not by the square."""
    batch = only(positions(tiny, LENGTHS), [0])
    summed, mean = (
        statistics("kfac", batch, spec=spec) for spec in (BIAS, BIAS._replace(loss="mean"))
    )
    for sink in summed:
        assert relative((LENGTHS[0] - 1) * mean[sink][1], summed[sink][1]) < 1e-12
        assert relative(mean[sink][0], summed[sink][0]) < 1e-12


def test_parts_of_a_large_batch_add_up(tiny, close, orthogonal, monkeypatch, x64):
    """When the examples' gradients do not fit, they are made some at a time."""
    random = np.random.default_rng(0)
    x_BTI, g_BTO = (jnp.asarray(random.normal(size=(6, 5, n))) for n in (4, 3))
    basis = Moments(*(jnp.asarray(np.linalg.qr(random.normal(size=(n, n)))[0]) for n in (5, 3)))
    cases: list[Any] = [(moments.Shampoo(True), None), (moments.Correction(True), basis)]
    for rule, aux in cases:
        whole = rule.emit(x_BTI, aux, g_BTO)
        monkeypatch.setattr(moments, "LARGEST", 2 * 12)
        close(rule.emit(x_BTI, aux, g_BTO), whole, "float64")
        monkeypatch.undo()


def test_upper_triangle_by_panels(relative, monkeypatch, x64):
    x_NI = jnp.asarray(np.random.default_rng(0).normal(size=(9, 11)))
    for panel in (2, 4, 11, 256):
        monkeypatch.setattr(moments, "PANEL", panel)
        assert relative(full(moments.gram(x_NI)), x_NI.T @ x_NI) < 1e-12


def test_factors_of_an_adapter(tiny, relative, quick, x64):
    """Each factor is a site: with the unit basis, corrections are sums of squared gradients."""
    config = tiny.config
    spec = PLAIN._replace(adapter=LoraSpec(2, 4.0, ("c_attn", "c_fc"), layers=(0, 2)))
    assert spec.adapter is not None
    factors = adapters.init(spec.adapter, config, seed=0)
    random = np.random.default_rng(0)  # B would start at zero
    factors = jax.tree.map(lambda x: random.normal(size=x.shape), factors)
    lora = adapters.collection(spec.adapter, config, factors)
    lora = jax.tree.map(lambda x: x.astype("float64"), lora)
    variables = {"params": tiny.params(dtype="float64"), "lora": lora}
    batch, execution = positions(tiny, LENGTHS), Execution("float64", "scan")
    units = {
        target.sink: Moments(*(
            jnp.stack([jnp.eye(n)] * config.layers)
            for n in (target.site.inputs, target.site.outputs)
        ))
        for target in moments.sites(config, spec)
    }  # fmt: skip
    found = quick(config, execution, spec, "corrections", variables, units,
                  start(config, spec, "corrections"), batch, None)  # fmt: skip
    features = tiny.jit(functools.partial(gradients.example_gradients, config, execution, spec))
    features_BD = features(variables, {}, batch.ids_BT, batch.labels_BT)[0]
    expected = targets.unflatten(config, spec, features_BD)
    for module in kronecker.modules(config, spec):
        squares_OI = np.square(expected[module.sink][module.layer]).sum(0)
        assert relative(found[module.sink][module.layer], squares_OI) < 1e-12
    assert len(kronecker.modules(config, spec)) == 2 * 2 * 2


# Labels


def test_draw_is_the_inverse_of_the_cumulated_mass(tiny):
    random, draw = np.random.default_rng(0), tiny.jit(fisher.draw)
    for v in (1, 2, 61, 1000):
        mass_CV = random.exponential(size=(50, v)).astype(np.float32) ** 3
        mass_CV[:, 1 : v - 1] *= random.random((50, max(v - 2, 0))) < 0.5
        uniform_C = random.integers(0, 2**24, 50) * np.float32(2**-24)
        uniform_C[:2] = 0, 1 - 2**-24
        found_C = np.asarray(draw(mass_CV[None], uniform_C[None])[0])
        assert (np.take_along_axis(mass_CV, found_C[:, None], 1) > 0).all()
        ends_CV = np.cumsum(mass_CV.astype(np.float64), 1)
        at_C, ends_CV = uniform_C.astype(np.float64), ends_CV / ends_CV[:, -1:]
        before_C = np.where(found_C > 0, ends_CV[np.arange(50), found_C - 1], 0)
        assert (before_C <= at_C + 1e-6).all()
        assert (at_C <= ends_CV[np.arange(50), found_C] + 1e-6).all()


def test_frequencies_are_the_models(relative):
    """Within five standard deviations of the softmax, over 64,000 seeded draws."""
    logits_V = jnp.asarray(np.random.default_rng(1).normal(0, 1.5, 11).astype(np.float32))
    mass_BCV = jnp.broadcast_to(jnp.exp(logits_V), (640, 100, 11))
    uniform_BC = fisher.uniforms(jnp.uint32(7), jnp.arange(640), 100)
    assert uniform_BC.dtype == jnp.float32 and 0 <= uniform_BC.min() < uniform_BC.max() < 1
    counts_V = np.bincount(np.asarray(fisher.draw(mass_BCV, uniform_BC)).ravel(), minlength=11)
    p_V = np.asarray(jax.nn.softmax(logits_V), np.float64)
    assert (np.abs(counts_V / 64_000 - p_V) < 5 * np.sqrt(p_V * (1 - p_V) / 64_000)).all()


def test_numbers_belong_to_seed_row_and_position():
    whole_BT = fisher.uniforms(jnp.uint32(3), jnp.array([4, 0, 9]), 20)
    np.testing.assert_array_equal(
        fisher.uniforms(jnp.uint32(3), jnp.array([9, -1, 4]), 12)[::2], whole_BT[::-2, :12]
    )
    other_BT = fisher.uniforms(jnp.uint32(4), jnp.array([4, 0, 9]), 20)
    assert len(np.unique([whole_BT, other_BT])) > 110


@pytest.mark.parametrize("chunk", [1000, 9])
def test_sampled_derivative_is_that_of_the_drawn_labels(tiny, relative, chunk, x64):
    random = np.random.default_rng(2)
    h_BTD, head_VD = (jnp.asarray(random.normal(size=s)) for s in ((3, 7, 5), (13, 5)))
    weights_BT = jnp.asarray(random.random((3, 7)) * (random.random((3, 7)) < 0.7))
    uniform_BT = fisher.uniforms(jnp.uint32(0), jnp.arange(3), 7)
    labels_BT = fisher.draw(jnp.exp(model.head_logits(h_BTD, head_VD)), uniform_BT)
    sampled, empirical = (
        tiny.jit(function, static_argnames="chunk")
        for function in (fisher.sampled, fisher.empirical)
    )
    found_BTD = sampled(h_BTD, head_VD, uniform_BT, weights_BT, chunk=chunk)
    expected_BTD = empirical(h_BTD, head_VD, labels_BT, weights_BT, chunk=chunk)
    assert relative(found_BTD, expected_BTD) < 1e-12


# Inverses


def make_factors(layers=2, inputs=3, outputs=4, corrected=False) -> Factors:
    random = np.random.default_rng(8)
    makers: list[Any] = [
        lambda n: np.linalg.qr(random.normal(size=(layers, n, n)))[0].astype(np.float32),
        lambda n: random.exponential(size=(layers, n)),
    ]
    vectors, spectra = (Moments(*(make(n) for n in (inputs, outputs))) for make in makers)
    values_LOI = np.einsum("LO,LI->LOI", spectra.outputs_OO, spectra.inputs_II)
    if corrected:
        values_LOI = random.exponential(size=values_LOI.shape)
    return Factors({}, {"s": vectors}, {"s": spectra}, {"s": values_LOI})


@pytest.mark.parametrize("inversion", ["damped", "absolute", "factored"])
def test_inverse_is_that_of_the_dense_matrix(relative, inversion):
    factors, random = make_factors(), np.random.default_rng(9)
    g_LQOI = random.normal(size=(2, 5, 4, 3)).astype(np.float32)
    found = kronecker.apply(factors, {"s": jnp.asarray(g_LQOI)}, inversion, 0.2)["s"]
    for layer in range(2):
        a_II, s_OO = (
            q[layer].astype(np.float64) * values[layer] @ q[layer].T
            for q, values in zip(factors.vectors["s"], factors.spectra["s"], strict=True)
        )
        d = 0.2 * np.kron(s_OO, a_II).trace() / 12
        h = np.kron(s_OO, a_II) + (0.2 if inversion == "absolute" else d) * np.eye(12)
        if inversion == "factored":
            pi = np.sqrt(a_II.trace() / 3 / (s_OO.trace() / 4))
            h = np.kron(s_OO + np.sqrt(d) / pi * np.eye(4), a_II + pi * np.sqrt(d) * np.eye(3))
        expected = np.linalg.solve(h, g_LQOI[layer].reshape(5, 12).T).T
        assert relative(found[layer], expected.reshape(5, 4, 3)) < 1e-5


@pytest.mark.parametrize("inversion", ["damped", "absolute", "pseudo", "tikhonov", "factored"])
def test_half_an_inverse_twice_is_a_whole(close, inversion):
    factors = make_factors(corrected=True)
    g = {"s": jnp.asarray(np.random.default_rng(9).normal(size=(2, 5, 4, 3)), jnp.float32)}
    half = kronecker.apply(factors, g, inversion, 0.3, 0.5)
    close(kronecker.apply(factors, half, inversion, 0.3, 0.5),
          kronecker.apply(factors, g, inversion, 0.3))  # fmt: skip


def test_site_without_gradient_gets_zero():
    factors = make_factors()
    factors.values["s"][1] = 0
    g = {"s": jnp.ones((2, 5, 4, 3))}
    for inversion in ("damped", "pseudo", "factored"):
        found = kronecker.apply(factors, g, inversion, 0.3)["s"]
        assert found[0].any() and not found[1].any()


# The fit as a folder


def fit(tiny, folder, pool, settings=Settings(seed=3), spec=PLAIN, seed=0, tokens=32):  # noqa: B008
    return kronecker.fit(folder, tiny.loaded(seed=seed), pool, spec, SCAN, tokens, settings)


def test_killed_fit_goes_on_bit_identical(tiny, monkeypatch, tmp_path):
    """Killed in both passes and between the modules, it ends as if it had never been."""
    pool = tiny.rows(tmp_path / "rows", LENGTHS)
    undisturbed = fit(tiny, tmp_path / "whole", pool)
    clock = iter(range(0, 10**6, 100))  # every batch is a minute after the one before
    monkeypatch.setattr(kronecker.time, "monotonic", lambda: next(clock))
    life = deaths = 0

    class Killed(Exception):
        pass

    def mortal(function):
        def call(*args):
            nonlocal life
            life -= 1
            if life < 0:
                raise Killed
            return function(*args)

        return call

    monkeypatch.setattr(kronecker, "accumulate", mortal(kronecker.accumulate))
    monkeypatch.setattr(np.linalg, "eigh", mortal(np.linalg.eigh))
    factors = None
    while factors is None:
        try:
            life = 4 + deaths % 2  # a module takes two
            factors = fit(tiny, tmp_path / "cut", pool)
        except Killed:
            deaths += 1
            with pytest.raises(InputError, match="no finished curvature factors"):
                kronecker.load_factors(tmp_path / "cut")
    assert 4 < deaths < 10
    for file in (tmp_path / "whole").rglob("*"):
        other = tmp_path / "cut" / file.relative_to(tmp_path / "whole")
        assert file.is_dir() or file.read_bytes() == other.read_bytes(), file
    for a, b in zip(jax.tree.leaves(factors[1:]), jax.tree.leaves(undisturbed[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_finished_fit_is_read_and_another_refused(tiny, monkeypatch, tmp_path):
    pool = tiny.rows(tmp_path / "rows", LENGTHS)
    factors = fit(tiny, tmp_path / "fit", pool)
    monkeypatch.setattr(kronecker, "accumulate", None)
    assert fit(tiny, tmp_path / "fit", pool).info == factors.info
    others: list[Any] = [
        {"settings": Settings(seed=4)},
        {"spec": BIAS},
        {"seed": 1},
        {"tokens": 64},
    ]
    for other in others:
        with pytest.raises(InputError, match="fit of something else"):
            fit(tiny, tmp_path / "fit", pool, **other)
    factors.check(PLAIN._replace(projection=Projection(4)), tiny.loaded().fingerprint)
    with pytest.raises(InputError, match="another model"):
        factors.check(PLAIN, tiny.loaded(seed=1).fingerprint)
    with pytest.raises(InputError, match="same options"):
        factors.check(BIAS, tiny.loaded().fingerprint)


def test_only_some_modules(tiny, tmp_path, relative):
    """What is left out has neither files nor values; the rest is as it was."""
    pool, some = tiny.rows(tmp_path / "rows", LENGTHS), PLAIN._replace(exclude=("h.1.*", "*attn*"))
    factors = fit(tiny, tmp_path / "some", pool, spec=some)
    names = sorted(file.stem for file in (tmp_path / "some" / "eigen").iterdir())
    assert names == [f"h.{layer}.mlp.{part}" for layer in (0, 2) for part in ("c_fc", "c_proj")]
    whole = fit(tiny, tmp_path / "whole", pool)
    for sink, values_LOI in factors.values.items():
        assert not values_LOI[1].any()
        assert relative(values_LOI[::2], whole.values[sink][::2]) < 1e-3


def test_what_has_no_factors_is_refused(tiny, tmp_path):
    pool = tiny.rows(tmp_path / "rows", LENGTHS)
    with pytest.raises(InputError, match="wte has no Kronecker factors.*--exclude"):
        fit(tiny, tmp_path / "fit", pool, spec=PLAIN._replace(modules=("*",)))
    with pytest.raises(InputError, match="leave --loss log-odds"):
        objective = model.loss.Objective("log-odds")
        fit(tiny, tmp_path / "fit", pool, spec=PLAIN._replace(objective=objective))
    assert not (tmp_path / "fit").exists()
    broken = tiny.loaded()
    broken.params["blocks"]["mlp_c_fc"]["w"] = broken.params["blocks"]["mlp_c_fc"]["w"] * np.nan
    with pytest.raises(InputError, match="not finite"):
        kronecker.fit(tmp_path / "nan", broken, pool, PLAIN, SCAN, 32,
                      Settings(seed=3))  # fmt: skip
