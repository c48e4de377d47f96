"""Expected numbers of sparse autoencoders from SAELens: features, reconstructions, training.

    python -P tests/golden/make_sae.py     rewrites sae/

Dims: N rows, D width, F features, O width out (D, or D + 3 where a transcoder's differs), L layers.
SAELens computes all in float64, with random parameters; what is stored is float32. Where float32
would choose other features, the script fails: such numbers decide nothing.

sae/inference.json   by case: the fields of SAELens's cfg.json that matter, `x` (which input),
                     `params` (which parameters)
sae/inference.npz    x/NAME [N, D], [2, 3, D] or, by heads, [2, 3, 4, D / 4]
                     params/SET/NAME    in SAELens's names and orientation; W_skip is [O, D]
                     CASE/acts, CASE/recon   of the case's input
                     fold/CASE/NAME     parameters after SAELens folded the decoder's norms
                     crosscoder/NAME    W_enc [L, D, F], b_enc, threshold [L, F], W_dec
                     [L, F, L, D], b_dec [L, D], W_skip [L, D, D] (x @ W_skip), x, acts, recon,
                     recon_skip [N, L, D]: of one transcoder of SAELens for each pair of layers,
                     summed over those that read
sae/train/CASE.json  arch, coefficients, cfg: SAELens's training class and its settings
sae/train/CASE.npz   one step on x [N, D] with dead_mask [F]: total_loss, loss.NAME, sae_out [N, D],
                     hidden_pre, acts [N, F], param.NAME before it, grad.NAME; with a batch's top k
                     also after.topk_threshold and export.NAME, the JumpReLU that is then saved
"""

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainStepInput

HERE = Path(__file__).parent / "sae"
N, D, F, K, L = 7, 12, 48, 5, 3
TOPK_THRESHOLD = 0.7  # before the step
random = np.random.default_rng(7)


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Decoder rows of different norms, thresholds among the preactivations."""
    if name == "threshold":
        value = random.uniform(0.1, 1.2, shape)
    elif name == "W_dec":
        value = random.normal(size=shape) / shape[-1] ** 0.5 * random.uniform(0.5, 1.5, (F, 1))
    else:
        value = random.normal(size=shape) * (D**-0.5 if name.startswith("W_") else 0.3)
    return value.astype(np.float32)


def parameters(*names: str, out: int = D) -> dict[str, np.ndarray]:
    sizes = {"W_enc": (D, F), "W_dec": (F, out), "b_dec": (out,), "W_skip": (out, D)}
    return {name: draw(name, sizes.get(name, (F,))) for name in names}


PLAIN = parameters("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_gate", "b_mag", "r_mag")
UNIT = PLAIN["W_dec"] / np.linalg.norm(PLAIN["W_dec"], axis=1, keepdims=True)
# A feature at its threshold, above it, under a negative one; then none that can be active.
TIES = {name: np.zeros_like(PLAIN[name]) for name in ("W_enc", "b_enc", "threshold")}
TIES |= {name: PLAIN[name] for name in ("W_dec", "b_dec")}
TIES["W_enc"][0, :4] = 1
TIES["threshold"][:4], TIES["threshold"][4:], TIES["b_enc"][4:] = [1, 0.5, -1, 2], -2, -1
WIDE = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
PARAMS = {
    "plain": PLAIN,
    "skip": PLAIN | parameters("W_skip"),
    "wide": parameters(*WIDE, out=D + 3),
    "unit": PLAIN | {"W_dec": UNIT},
    "ties": TIES,
    "few": PLAIN | {"b_enc": np.where(np.arange(F) == 3, 50, -50).astype(np.float32)},
}
X = {
    "rows": (random.normal(size=(N, D)) * 2 + 0.5).astype(np.float32),
    "axes": (random.normal(size=(2, 3, D)) * 2 + 0.5).astype(np.float32),
    "ties": np.eye(1, D, dtype=np.float32) * np.float32([[1], [0.5], [-0.5], [2]]),
}
X["small"] = X["rows"] * np.float32(1e-4)  # as the epsilon of layer_norm
X["heads"] = X["axes"].reshape(2, 3, 4, D // 4)


def build(kind: str, cfg: dict, params: dict, dtype: str, training: bool = False):
    cls, config = (get_sae_training_class if training else get_sae_class)(kind)
    sae = cls(config(d_in=D, d_sae=F, dtype=dtype, device="cpu", **cfg))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.tensor(params[name]))
    return sae


def infer(kind: str, cfg: dict, params: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = {}
    for dtype in ("float32", "float64"):
        sae = build(kind, cfg, params, dtype)
        with torch.no_grad():
            x_ND = torch.tensor(x, dtype=getattr(torch, dtype))
            found[dtype] = sae.encode(x_ND).to_dense().numpy(), sae(x_ND).numpy()
    assert np.array_equal(found["float32"][0] != 0, found["float64"][0] != 0), (kind, cfg)
    return tuple(a.astype(np.float32) for a in found["float64"])


def cases():
    """Name, SAELens's architecture, settings, and which parameters and input."""
    kinds = {
        "standard": ("standard", {}),
        "gated": ("gated", {}),
        "jumprelu": ("jumprelu", {}),
        "topk": ("topk", {"k": K}),
        "topk_rescale": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "abstopk": ("abstopk", {"k": K}),
        "abstopk_rescale": ("abstopk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    }
    pursuit = {"residual_threshold": 1e-2, "max_iterations": 8}
    for b_dec in (True, False):
        for name, (kind, cfg) in kinds.items():
            for norm in ("none", "layer_norm", "constant_norm_rescale"):
                settings = cfg | {"normalize_activations": norm, "apply_b_dec_to_input": b_dec}
                x = "axes" if norm == "none" else "rows"
                yield f"{name}-{norm}-b_dec{b_dec:d}", kind, settings, "plain", x
        for norm in ("none", "layer_norm"):
            settings = pursuit | {"normalize_activations": norm, "apply_b_dec_to_input": b_dec}
            yield f"pursuit-{norm}-b_dec{b_dec:d}", "matching_pursuit", settings, "unit", "rows"
    # To the width: a loop that ends by itself, by what is left or by what it takes again.
    for name, threshold, stop in (("left", 1.0, False), ("again", 0.0, True)):
        cfg = {"residual_threshold": threshold, "stop_on_duplicate_support": stop}
        yield f"pursuit-{name}", "matching_pursuit", cfg, "unit", "axes"
    for kind in ("transcoder", "jumprelu_transcoder", "skip_transcoder"):
        for norm in ("none", "layer_norm"):
            cfg = {"d_out": D, "normalize_activations": norm, "apply_b_dec_to_input": False}
            yield f"{kind}-{norm}", kind, cfg, "skip", "rows"
    for kind in ("transcoder", "jumprelu_skip_transcoder"):
        cfg = {"d_out": D + 3, "apply_b_dec_to_input": False}
        yield f"{kind}-wide", kind, cfg, "wide", "rows"
    heads = {"reshape_activations": "hook_z", "apply_b_dec_to_input": True}
    yield "jumprelu-heads", "jumprelu", heads, "plain", "heads"
    yield "standard-small", "standard", {"normalize_activations": "layer_norm"}, "plain", "small"
    yield "jumprelu-ties", "jumprelu", {"apply_b_dec_to_input": False}, "ties", "ties"
    yield "topk-few", "topk", {"k": K, "apply_b_dec_to_input": False}, "few", "rows"


def inference() -> tuple[dict, dict]:
    about, arrays = {}, {f"x/{name}": x for name, x in X.items()}
    for which, params in PARAMS.items():
        arrays |= {f"params/{which}/{name}": value for name, value in params.items()}
    for name, kind, cfg, which, x in cases():
        hook = {"metadata": SAEMetadata(hook_name="blocks.0.attn.hook_z")} if x == "heads" else {}
        acts, recon = infer(kind, cfg | hook, PARAMS[which], X[x])
        arrays |= {f"{name}/acts": acts, f"{name}/recon": recon}
        about[name] = {"architecture": kind, "d_in": D, "d_sae": F, **cfg, "x": x, "params": which}
        if name.endswith("-none-b_dec1") and kind in ("standard", "gated", "jumprelu"):
            sae = build(kind, cfg, PLAIN, "float64")
            sae.fold_W_dec_norm()
            for tensor, value in sae.state_dict().items():
                arrays[f"fold/{name}/{tensor}"] = value.numpy().astype(np.float32)
    return about, arrays | {f"crosscoder/{name}": value for name, value in crosscoder().items()}


def crosscoder() -> dict[str, np.ndarray]:
    draws = [parameters("W_enc", "b_enc", "threshold", "b_dec", "W_skip") for _ in range(L)]
    p = {name: np.stack([layer[name] for layer in draws]) for name in draws[0]}
    p["W_dec"] = np.stack(
        [np.stack([draw("W_dec", (F, D)) for _ in range(L)], 1) for _ in range(L)]
    )
    for reads in range(L):
        p["W_dec"][reads, :, :reads] = 0
    x = (random.normal(size=(4, L, D)) * 1.5).astype(np.float32)
    acts, recon = np.zeros((4, L, F), np.float32), np.zeros((4, L, D))
    skip = np.zeros((4, L, D))
    cfg = {"d_out": D, "apply_b_dec_to_input": False}
    for writes in range(L):
        for reads in range(L):
            one = {name: p[name][reads] for name in ("W_enc", "b_enc", "threshold")}
            one["W_dec"] = p["W_dec"][reads, :, writes]
            one["b_dec"] = p["b_dec"][writes] * (reads == writes)
            acts[:, reads], part = infer("jumprelu_transcoder", cfg, one, x[:, reads])
            recon[:, writes] += part
            if reads == writes:
                one["W_skip"] = p["W_skip"][writes].T
                _, part = infer("jumprelu_skip_transcoder", cfg, one, x[:, reads])
            skip[:, writes] += part
    found = {"x": x, "acts": acts, "recon": recon, "recon_skip": skip}
    return p | {name: value.astype(np.float32) for name, value in found.items()}


def train_cases():
    """Name, SAELens's architecture, coefficients, settings, and the share of dead features."""
    yield "standard_l1", "standard", {"l1": 0.7}, {}, 0.3
    yield "standard_lp05", "standard", {"l1": 0.7}, {"lp_norm": 0.5}, 0.3
    yield "gated", "gated", {"l1": 0.7}, {}, 0.3
    rescale = "rescale_acts_by_decoder_norm"
    yield "topk_auxk", "topk", {}, {"k": K, rescale: True}, 0.3
    yield "topk_auxk_norescale", "topk", {}, {"k": K, rescale: False}, 0.3
    yield "topk_few_dead", "topk", {}, {"k": K, rescale: True}, 0.06
    yield "topk_none_dead", "topk", {}, {"k": K, rescale: True}, 0.0
    yield "abstopk_auxk", "abstopk", {}, {"k": K}, 0.3
    for mode, more in (
        ("step", {}),
        ("tanh", {"pre_act_loss_coefficient": 3e-2}),
        ("quadratic", {"target_l0": 10.0}),
    ):
        for ste in (False, True):
            cfg = {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": ste}
            cfg |= {"jumprelu_bandwidth": 0.4} | more
            yield f"jumprelu_{mode}_ste{ste:d}", "jumprelu", {"l0": 0.3}, cfg, 0.3
    yield "batchtopk", "batchtopk", {}, {"k": 4.5}, 0.3
    widths = {"k": 4.5, "matryoshka_widths": [8, 24, F]}
    yield "matryoshka", "matryoshka_batchtopk", {}, widths, 0.3
    auxiliary = widths | {"use_matryoshka_aux_loss": True}
    yield "matryoshka_aux", "matryoshka_batchtopk", {}, auxiliary, 0.3


def train(kind: str, coefficients: dict, cfg: dict, dead: float) -> dict[str, np.ndarray]:
    params = {name: draw(name, value.shape) for name, value in PLAIN.items()}
    dead_F = random.random(F) < dead
    x = (random.normal(size=(16, D)) * 1.5 + 0.3).astype(np.float32)
    found = {}
    for dtype in ("float32", "float64"):
        sae = build(kind, cfg, params, dtype, training=True)
        if hasattr(sae, "topk_threshold"):
            sae.topk_threshold = torch.tensor(TOPK_THRESHOLD, dtype=torch.double)
        step = TrainStepInput(
            sae_in=torch.tensor(x, dtype=getattr(torch, dtype)),
            coefficients=coefficients,
            dead_neuron_mask=torch.tensor(dead_F),
            n_training_steps=10,
            is_logging_step=False,
        )
        out = sae.train().training_forward_pass(step)
        out.loss.backward()
        found[dtype] = out.feature_acts.detach().to_dense().numpy()
    assert np.array_equal(found["float32"] != 0, found["float64"] != 0), (kind, cfg)
    arrays = {"x": x, "dead_mask": dead_F, "acts": found["float64"]}
    arrays |= {"hidden_pre": out.hidden_pre.detach().numpy()}
    arrays |= {"sae_out": out.sae_out.detach().numpy()}
    for name, parameter in sae.named_parameters():
        arrays[f"param.{name}"] = params[name]
        arrays[f"grad.{name}"] = parameter.grad.numpy()
    arrays = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in arrays.items()}
    losses = {"total_loss": out.loss} | {f"loss.{name}": v for name, v in out.losses.items()}
    if hasattr(sae, "topk_threshold"):
        losses["after.topk_threshold"] = sae.topk_threshold
        arrays["param.topk_threshold"] = np.float64(TOPK_THRESHOLD)
        state = sae.state_dict()
        sae.process_state_dict_for_saving_inference(state)
        arrays |= {f"export.{n}": v.numpy().astype(np.float32) for n, v in state.items()}
    return arrays | {name: np.float64(value.item()) for name, value in losses.items()}


def main():
    torch.set_num_threads(1)
    (HERE / "train").mkdir(parents=True, exist_ok=True)
    about, arrays = inference()
    (HERE / "inference.json").write_text(json.dumps(about, indent=1) + "\n")
    np.savez_compressed(HERE / "inference.npz", **arrays)
    for name, kind, coefficients, cfg, dead in train_cases():
        path = HERE / "train" / name
        about = {"arch": kind, "coefficients": coefficients, "cfg": cfg}
        path.with_suffix(".json").write_text(json.dumps(about) + "\n")
        np.savez_compressed(path.with_suffix(".npz"), **train(kind, coefficients, cfg, dead))


if __name__ == "__main__":
    main()
