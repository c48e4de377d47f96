"""Per-example gradients of an adapter's factors: PEFT's, and the plain way."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attribution import gradients, targets
from attribution.projection import Projection, matrix
from attribution.store import Pass, Store, build
from attribution.targets import Spec
from core import adapter, families, model, schema
from core.adapter import Adapter, LoraSpec
from core.checkpoint import load_model
from core.config import Execution
from core.errors import InputError
from core.rundir import open_run

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = [17, 9, 26]
# The mlp's first matrix in the last layer only; dropout must not reach a gradient pass.
LORA = LoraSpec(3, 5.0, r".*\.attn\.c_proj|.*\.2\.mlp\.c_fc", dropout=0.5)
FULL, PROJECTED = Spec(Projection(0), adapter=LORA), Spec(Projection(4), adapter=LORA)


def run(tiny, config, variables, spec, ids_BT, labels_BT):
    """(features [B,D], losses [B]) as numpy arrays."""
    dtype = str(variables["params"]["embed"]["wte"].dtype)
    aux = gradients.projections(config, spec)
    variables, *batch = jax.tree.map(jnp.asarray, (variables, ids_BT, labels_BT))
    compiled = tiny.jit(gradients.example_gradients, static_argnums=(0, 1, 2))
    out = compiled(config, Execution(dtype), spec, variables, aux, *batch)
    return tuple(np.asarray(x) for x in out)


@pytest.mark.parametrize("name", ["gpt2_tiny", "gemma3_tiny", "neox_tiny"])
def test_features_are_those_of_peft(tiny, relative, name):
    loaded = load_model(GOLDEN / name, GOLDEN / f"{name}_lora")
    assert loaded.adapter is not None
    config, spec = loaded.config, Spec(Projection(0), adapter=loaded.adapter.spec)
    with np.load(GOLDEN / name / "expected.npz") as file:
        ids_BT, labels_BT = file["ids"], file["labels"]
    features_BD, losses_B = run(tiny, config, loaded.variables, spec, ids_BT, labels_BT)
    layout, prefix = targets.features(config, spec), families.of(config).PREFIX
    with np.load(GOLDEN / f"{name}_lora" / "expected.npz") as expected:
        assert relative(losses_B, expected["losses"].sum(1)) < 1e-5
        names = [f"example_grad/base_model.model.{prefix}{f.name}.weight" for f in layout]
        assert {*names} == {key for key in expected if key.startswith("example_grad/")}
        for feature, key in zip(layout, names, strict=True):
            end = feature.offset + feature.shape[0] * feature.shape[1]
            ours_BD = features_BD[:, feature.offset : end]
            assert relative(ours_BD.reshape(-1, *feature.shape), expected[key]) < 1e-5
    assert features_BD.shape[1] == targets.width(config, spec) == end
    assert targets.width(config, spec) == adapter.size(loaded.adapter.spec, config)


def factors(tiny, dtype="float64"):
    made, rng = adapter.init(LORA, tiny.config, 0), np.random.default_rng(0)
    for row, layer in adapter.slots(LORA, tiny.config).values():
        leaf = schema.get(made, row.path).astype(dtype)
        schema.put(made, row.path, leaf.at[layer].set(rng.normal(0, 0.3, row.shape).astype(dtype)))
    return made


def plain(tiny, params, ids_BT, labels_BT):
    """{name: [B,O,I]} of each factor by vmap(grad)."""

    def loss(factors, ids_T, labels_T):
        lora = adapter.collection(LORA, tiny.config, factors)
        variables, execution = {"params": params, "lora": lora}, Execution("float64")
        nll_BT = model.token_losses(tiny.config, execution, variables, ids_T[None], labels_T[None])
        return nll_BT.sum()

    grads = tiny.jit(jax.vmap(jax.grad(loss), (None, 0, 0)))(factors(tiny), ids_BT, labels_BT)
    found = {}
    for name, (row, layer) in adapter.slots(LORA, tiny.config).items():
        short = name.removeprefix("base_model.model.transformer.").removesuffix(".weight")
        found[short] = np.swapaxes(schema.get(grads, row.path)[:, layer], -1, -2)
    return found


def test_features_are_vmap_grad_and_projected_like_any_site(tiny, relative, x64):
    params, (ids_BT, labels_BT) = tiny.params(dtype="float64"), tiny.batch(LENGTHS)
    variables = {"params": params, "lora": adapter.collection(LORA, tiny.config, factors(tiny))}
    expected = plain(tiny, params, ids_BT, labels_BT)
    names = [f.name for f in targets.features(tiny.config, FULL)]
    assert names == [
        "h.0.attn.c_proj.lora_A", "h.0.attn.c_proj.lora_B", "h.1.attn.c_proj.lora_A",
        "h.1.attn.c_proj.lora_B", "h.2.attn.c_proj.lora_A", "h.2.attn.c_proj.lora_B",
        "h.2.mlp.c_fc.lora_A", "h.2.mlp.c_fc.lora_B",
    ]  # fmt: skip
    for spec in (FULL, PROJECTED):
        features_BD, _ = run(tiny, tiny.config, variables, spec, ids_BT, labels_BT)
        assert features_BD.shape[1] == targets.width(tiny.config, spec)
        for f in targets.features(tiny.config, spec):
            g_BOI = expected[f.name]
            if spec is PROJECTED:
                left_OP = np.float64(matrix(spec.projection, f"{f.name}/left", g_BOI.shape[1]))
                right_IP = np.float64(matrix(spec.projection, f"{f.name}/right", g_BOI.shape[2]))
                g_BOI = left_OP.T @ g_BOI @ right_IP
            end = f.offset + f.shape[0] * f.shape[1]
            found_BOI = features_BD[:, f.offset : end].reshape(-1, *f.shape)
            assert relative(found_BOI, g_BOI) < 1e-12, f.name


def test_weights_beneath_an_adapter_have_the_merged_models_gradients(tiny, relative, x64):
    """dL/dW is the same whether the update is added to W or beside it."""
    params, batch = tiny.params(dtype="float64"), tiny.batch(LENGTHS)
    made = Adapter(LORA, factors(tiny))
    lora, merged = adapter.collection(LORA, tiny.config, made.factors), params
    for site, layers in adapter.hits(LORA, tiny.config):
        a_LIR, b_LRO = (schema.get(made.factors, f"{site.path}/{n}") for n in "ab")
        update_LIO = LORA.scale * np.array(layers, np.float64)[:, None, None] * (a_LIR @ b_LRO)
        name = site.path.removeprefix("blocks/")
        block = {**merged["blocks"][name], "w": merged["blocks"][name]["w"] + update_LIO}
        merged = {**merged, "blocks": {**merged["blocks"], name: block}}
    spec = Spec(Projection(0))
    found, _ = run(tiny, tiny.config, {"params": params, "lora": lora}, spec, *batch)
    expected, _ = run(tiny, tiny.config, {"params": merged}, spec, *batch)
    assert relative(found, expected) < 1e-12


def test_a_store_is_of_one_adapter(tiny, tmp_path):
    loaded = load_model(GOLDEN / "gpt2_tiny", GOLDEN / "gpt2_tiny_lora")
    assert loaded.adapter is not None
    spec = Spec(Projection(4), adapter=loaded.adapter.spec)
    rows = tiny.rows(tmp_path / "rows", LENGTHS)
    with open_run(tmp_path / "store", "attribute build", {}) as folder:
        info = build(folder, Pass(loaded, rows, spec, Execution(), 96))
    store = Store(tmp_path / "store")
    store.check(spec, loaded.fingerprint)
    assert info["model"] == loaded.fingerprint != load_model(GOLDEN / "gpt2_tiny").fingerprint
    assert info["coverage"] == targets.coverage(loaded.config, spec)
    for other in (spec._replace(adapter=None), spec._replace(adapter=LORA)):
        with pytest.raises(InputError, match="use the same options"):
            store.check(other, loaded.fingerprint)


def test_coverage_counts_the_factors(tiny):
    share, c = targets.coverage(tiny.config, FULL), tiny.config
    size = adapter.size(LORA, c)
    assert size == 3 * (3 * (12 + 12) + (12 + 20))
    total = sum(x.size for x in jax.tree.leaves(tiny.params()))
    assert share["parameters"] == size / (total + size)
    blocks = c.layers * (4 * c.width**2 + 2 * c.width * c.mlp_width)
    assert share["matmul_flops"] == size / (blocks + c.vocab_size * c.width + size)
