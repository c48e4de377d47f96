"""Expected numbers of the model families from transformers: logits, losses and gradients.

Needs an environment of its own (see README.md) and `-P`, because the project's `tokenizers/` would
shadow the library that transformers imports:

    python -P tests/golden/make_families.py [NAME...]    rewrites the folders beside it, or some
    python -P tests/golden/make_families.py --full DIR   published sizes, random weights (3.6 GB)

Dims: B examples, T tokens, V vocabulary, O and I a linear layer's outputs and inputs. Each folder
is a Hugging Face model plus expected.npz, everything float32, eager attention, no dropout:

    ids, labels      [B, T] int32, right padding 0 / -100; entry t is the token to predict at t
    lengths          [B] tokens before the padding
    logits           [B, T, V], zero at padding
    losses           [B, T], -log p(ids[t] | ids[<t]) where labels[t] != -100 and t > 0, else 0
    grad/NAME        of the sum of all losses, by parameter name as stored in the file
    example_grad/NAME  of each example's sum, blocks only: [B, O, I] or [B, O], by module name
                     below the base model (`h.0.attn.c_attn.weight`)

bfloat16.json is transformers' own mean |bfloat16 - float32| of those logits and losses,
transformers4/NAME.json the same config as transformers 4 spelled it, and rotary.npz the rotary
frequencies of published models, [K/2] float32 by "theta/K". Gemma's examples hold no id 0: torch
withholds the input side of `padding_idx`'s gradient, which says nothing about the model.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.pytorch_utils import Conv1D

Config = GPT2Config | Gemma3TextConfig | GPTNeoXConfig
MASKED = ((), range(0, 6), (0, 1, 5))  # a prompt, and a prompt with a gap after it


class Tiny(NamedTuple):
    """No two sizes of one model that could be swapped by mistake are equal."""

    config: Config
    seed: int
    lengths: tuple[int, int, int]


def gpt2(**sizes) -> GPT2Config:
    end = sizes["vocab_size"] - 1
    return GPT2Config(**sizes, bos_token_id=end, eos_token_id=end)


def gemma3(local_theta: float, global_theta: float, **sizes) -> Gemma3TextConfig:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
        "full_attention": {"rope_type": "default", "rope_theta": global_theta},
    }
    return Gemma3TextConfig(**sizes, rope_parameters=rope)


def neox(theta: float, rotary: float, **sizes) -> GPTNeoXConfig:
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": rotary}
    return GPTNeoXConfig(**sizes, rope_parameters=rope, eos_token_id=0)


LOCAL, GLOBAL = "sliding_attention", "full_attention"
TINY = {
    "gpt2_tiny": Tiny(
        gpt2(vocab_size=131, n_positions=48, n_embd=14, n_layer=3, n_head=2), 0, (24, 17, 9)
    ),
    "gpt2_tiny_untied": Tiny(
        gpt2(
            vocab_size=131,
            n_positions=48,
            n_embd=15,
            n_layer=2,
            n_head=5,
            n_inner=40,
            layer_norm_epsilon=1e-3,
            tie_word_embeddings=False,
        ),
        1,
        (24, 17, 9),
    ),
    # Grouped queries; the last period of the layer pattern is incomplete.
    "gemma3_tiny": Tiny(
        gemma3(
            local_theta=20.0,
            global_theta=900.0,
            vocab_size=127,
            max_position_embeddings=56,
            hidden_size=20,
            intermediate_size=30,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            query_pre_attn_scalar=9,
            sliding_window=7,
            layer_types=[LOCAL, LOCAL, GLOBAL, LOCAL],
            rms_norm_eps=1e-3,
        ),
        5,
        (31, 18, 9),
    ),
    # One head of keys and values; untied; a layer order that no period gives.
    "gemma3_tiny_mqa": Tiny(
        gemma3(
            local_theta=30.0,
            global_theta=500.0,
            vocab_size=113,
            max_position_embeddings=56,
            hidden_size=18,
            intermediate_size=28,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=8,
            query_pre_attn_scalar=5,
            sliding_window=4,
            layer_types=[GLOBAL, LOCAL, LOCAL],
            rms_norm_eps=1e-3,
            tie_word_embeddings=False,
        ),
        9,
        (31, 18, 9),
    ),
    # A quarter of 17 is not whole: 4 rotate.
    "neox_tiny": Tiny(
        neox(
            theta=300.0,
            rotary=0.25,
            vocab_size=109,
            max_position_embeddings=56,
            hidden_size=34,
            intermediate_size=26,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
        2,
        (25, 18, 9),
    ),
    "neox_tiny_sequential": Tiny(
        neox(
            theta=40.0,
            rotary=0.7,
            vocab_size=103,
            max_position_embeddings=56,
            hidden_size=27,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=3,
            layer_norm_eps=1e-3,
            use_parallel_residual=False,
        ),
        3,
        (25, 18, 9),
    ),
}


def build(config: Config, seed: int):
    """A model whose every parameter matters: random biases and norm weights too."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    around_one = {
        f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)
    }
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = config.hidden_size**-0.5 if parameter.ndim == 2 else 0.3
            parameter.normal_(0.0, std, generator=random)
            if name in around_one:
                parameter.add_(1.0)
    return model


def examples(config: Config, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    lowest = 1 if isinstance(config, Gemma3TextConfig) else 0
    ids_BT = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, -100)
    for b, (length, masked) in enumerate(zip(lengths, MASKED, strict=True)):
        ids_BT[b, :length] = torch.randint(lowest, config.vocab_size, (length,), generator=random)
        ids_BT[b, length - 2] = ids_BT[b, 1]  # a repeated token: embedding rows must accumulate
        labels_BT[b, :length] = ids_BT[b, :length]
        labels_BT[b, list(masked)] = -100
    return ids_BT, labels_BT


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    losses_BT = torch.zeros_like(logits_BTV[..., 0])
    losses_BT[:, 1:] = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].mT, labels_BT[:, 1:], ignore_index=-100, reduction="none"
    )
    return losses_BT


def gradients(model, ids_BT: torch.Tensor, labels_BT: torch.Tensor):
    """Logits, losses and {parameter name in the file: gradient of the summed losses}."""
    model.zero_grad()
    out = model(ids_BT, labels=labels_BT)
    losses_BT = token_losses(out.logits, labels_BT)
    losses_BT.sum().backward()
    supervised = (labels_BT[:, 1:] != -100).sum()
    mean = (losses_BT.sum() / supervised).float()
    torch.testing.assert_close(out.loss.float(), mean)  # transformers' own
    grads = {stored(model, name): p.grad.clone() for name, p in model.named_parameters()}
    return out.logits.detach(), losses_BT.detach(), grads


def stored(model, name: str) -> str:
    """transformers 5 renames NeoX's head in memory, not in the file."""
    renamed = isinstance(model.config, GPTNeoXConfig) and name == "lm_head.weight"
    return "embed_out.weight" if renamed else name


def example_gradients(model, ids_BT, labels_BT, lengths) -> dict[str, np.ndarray]:
    """Every example alone and without its padding; Conv1D stores [I, O] and is turned to [O, I]."""
    per_example = [
        gradients(model, ids_BT[b : b + 1, :n], labels_BT[b : b + 1, :n])[2]
        for b, n in enumerate(lengths)
    ]
    found, prefix = {}, model.base_model_prefix
    for name, module in model.base_model.named_modules():
        if isinstance(module, Conv1D | torch.nn.Linear):
            weights = torch.stack([grads[f"{prefix}.{name}.weight"] for grads in per_example])
            weights = weights.mT if isinstance(module, Conv1D) else weights
            found[f"{name}.weight"] = weights.contiguous().numpy()
            if module.bias is not None:
                biases = [grads[f"{prefix}.{name}.bias"] for grads in per_example]
                found[f"{name}.bias"] = torch.stack(biases).numpy()
    return found


def save(folder: Path, model, compress: bool = True, **arrays) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with safe_open(folder / "model.safetensors", "numpy") as file:
        assert {k.removeprefix("grad/") for k in arrays if k.startswith("grad/")} <= {*file.keys()}
    (np.savez_compressed if compress else np.savez)(folder / "expected.npz", **arrays)


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def make_tiny(folder: Path, tiny: Tiny) -> None:
    model = build(tiny.config, tiny.seed)
    ids_BT, labels_BT = examples(tiny.config, tiny.lengths)
    logits_BTV, losses_BT, grads = gradients(model, ids_BT, labels_BT)
    per_example = example_gradients(model, ids_BT, labels_BT, tiny.lengths)
    for name, value in per_example.items():  # padding and batching change nothing
        total = grads[f"{model.base_model_prefix}.{name}"].numpy()
        total = total.T if isinstance(tiny.config, GPT2Config) else total
        np.testing.assert_allclose(value.sum(0), total, rtol=1e-4, atol=1e-5)
    padding_BT = torch.arange(ids_BT.shape[1]) >= torch.tensor(tiny.lengths)[:, None]
    save(
        folder,
        model,
        ids=ids_BT.int().numpy(),
        labels=labels_BT.int().numpy(),
        lengths=np.array(tiny.lengths, np.int32),
        logits=logits_BTV.masked_fill(padding_BT[..., None], 0.0).numpy(),
        losses=losses_BT.numpy(),
        **{f"grad/{name}": value.numpy() for name, value in grads.items()},
        **{f"example_grad/{name}": value for name, value in per_example.items()},
    )
    if not isinstance(tiny.config, GPT2Config):  # spelled alike in both
        write_json(folder.parent / "transformers4" / f"{folder.name}.json", spelled_4(tiny.config))
    # Loaded, not cast: `.to` would round the rotary frequencies too, which no user does.
    half = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager"
    )
    rough = half(ids_BT).logits.detach().float()
    supervised_BT = losses_BT != 0
    errors = {
        "logits": float((rough - logits_BTV).abs()[~padding_BT].mean()),
        "losses": float((token_losses(rough, labels_BT) - losses_BT).abs()[supervised_BT].mean()),
    }
    write_json(folder / "bfloat16.json", errors)
    exact = gradients(model.double(), ids_BT, labels_BT)
    worst = max(float((grads[k] - v).abs().max() / v.abs().max()) for k, v in exact[2].items())
    error = float((logits_BTV - exact[0]).abs().max() / exact[0].abs().max())
    print(folder.name, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})
    print(f"  float32 against float64: logits {error:.1e}, worst gradient {worst:.1e};", end=" ")
    print(f"bfloat16 {errors}; losses sum to {float(losses_BT.sum()):.4f}")


def spelled_4(config: Gemma3TextConfig | GPTNeoXConfig) -> dict:
    """`config` as transformers 4 wrote it, with the keys of published files; read back and checked.

    Where the layers follow a period, Gemma's pattern is a number; else a list, as in 4.53 and on.
    """
    content = json.loads(config.to_json_string()) | {"transformers_version": "4.51.3"}
    content["torch_dtype"] = content.pop("dtype")
    rope, content["rope_scaling"] = content.pop("rope_parameters"), None
    if isinstance(config, Gemma3TextConfig):
        content["rope_theta"] = rope[GLOBAL]["rope_theta"]
        content["rope_local_base_freq"] = rope[LOCAL]["rope_theta"]
        content["cache_implementation"] = "hybrid"
        kinds = content["layer_types"]
        period = kinds.index(GLOBAL) + 1
        if kinds == [LOCAL if i % period else GLOBAL for i in range(1, len(kinds) + 1)]:
            del content["layer_types"], content["_sliding_window_pattern"]
            content["sliding_window_pattern"] = period
    else:
        content["rotary_pct"] = rope["partial_rotary_factor"]
        content["rotary_emb_base"] = rope["rope_theta"]
    again = type(config)(**content).to_dict()
    differing = {key for key, value in config.to_dict().items() if again[key] != value}
    assert differing <= {"transformers_version", "_sliding_window_pattern"}, differing
    return content


FULL = {
    "gemma3_270m": (
        gemma3(
            local_theta=1e4,
            global_theta=1e6,
            vocab_size=262144,
            max_position_embeddings=32768,
            hidden_size=640,
            intermediate_size=2048,
            num_hidden_layers=18,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
        ),
        640,
    ),
    "gpt2_124m": (
        gpt2(vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12),
        256,
    ),
    "pythia_70m": (
        neox(
            theta=1e4,
            rotary=0.25,
            vocab_size=50304,
            max_position_embeddings=2048,
            hidden_size=512,
            intermediate_size=2048,
            num_hidden_layers=6,
            num_attention_heads=8,
        ),
        256,
    ),
}


def make_rotary(path: Path) -> None:
    gemma, pythia = FULL["gemma3_270m"][0], FULL["pythia_70m"][0]
    frequencies = Gemma3RotaryEmbedding.compute_default_rope_parameters
    found = {
        "10000/256": frequencies(gemma, layer_type=LOCAL)[0],
        "1000000/256": frequencies(gemma, layer_type=GLOBAL)[0],
        "10000/16": GPTNeoXRotaryEmbedding.compute_default_rope_parameters(pythia)[0],
    }
    np.savez_compressed(path, **{name: value.numpy() for name, value in found.items()})


def make_full(folder: Path, config: Config, length: int) -> None:
    """One supervised sequence; gradients of the first and last block and outside the blocks."""
    model = build(config, 0)
    random = torch.Generator().manual_seed(7)
    ids_BT = torch.randint(1, config.vocab_size, (1, length), generator=random)
    logits_BTV, losses_BT, grads = gradients(model, ids_BT, ids_BT)
    between = tuple(f".{layer}." for layer in range(1, config.num_hidden_layers - 1))
    kept = {k: v for k, v in grads.items() if not any(layer in k for layer in between)}
    save(
        folder,
        model,
        compress=False,
        ids=ids_BT.int().numpy(),
        labels=ids_BT.int().numpy(),
        lengths=np.array([length], np.int32),
        logits=logits_BTV.numpy(),
        losses=losses_BT.numpy(),
        **{f"grad/{name}": value.numpy() for name, value in kept.items()},
    )
    print(f"{folder.name}: {model.num_parameters():,} parameters, {length} tokens")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", default=[], help=f"of {', '.join(TINY | FULL)}")
    parser.add_argument("--full", type=Path, metavar="DIR")
    arguments = parser.parse_args()
    if arguments.full:
        for name in arguments.names or FULL:
            make_full(arguments.full / name, *FULL[name])
    else:
        for name in arguments.names or TINY:
            make_tiny(Path(__file__).parent / name, TINY[name])
        make_rotary(Path(__file__).parent / "rotary.npz")
