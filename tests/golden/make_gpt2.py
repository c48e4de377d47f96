"""Expected numbers for GPT-2 from transformers: logits, token losses and gradients.

Needs an environment of its own (torch==2.13.0, transformers==5.23.0, numpy; a CPU is enough) and
`-P`, because the project's `tokenizers/` would shadow the library that transformers imports:

    python -P tests/golden/make_gpt2.py               rewrites gpt2_tiny/ and gpt2_tiny_untied/ here
    python -P tests/golden/make_gpt2.py --full DIR    the same at 124M, random weights (550 MB)

Dims: B examples, T tokens, V vocabulary, O and I a linear layer's outputs and inputs. Each folder
is a Hugging Face model plus expected.npz, everything float32, eager attention, no dropout:

    ids, labels      [B, T] int32, right padding 0 / -100; entry t is the token to predict at t
    lengths          [B] tokens before the padding
    logits           [B, T, V], zero at padding
    losses           [B, T], -log p(ids[t] | ids[<t]) where labels[t] != -100 and t > 0, else 0
    grad/NAME        of the sum of all losses, by parameter name as stored in the file
    example_grad/NAME  of each example's sum, blocks only: [B, O, I] or [B, O], by module name
                     below the base model (`h.0.attn.c_attn.weight`)
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

# No two sizes of one model that could be swapped by mistake are equal.
TINY = dict(vocab_size=131, n_positions=48, n_embd=14, n_layer=3, n_head=2)
UNTIED = dict(
    vocab_size=131,
    n_positions=48,
    n_embd=15,
    n_layer=2,
    n_head=5,
    n_inner=40,
    layer_norm_epsilon=1e-3,
)
LENGTHS = (24, 17, 9)
MASKED = ((), range(0, 6), (0, 1, 5))  # a prompt, and a prompt with a gap after it


def build(seed: int, **sizes) -> GPT2LMHeadModel:
    """A model whose every parameter matters: random biases and norm weights too."""
    end = sizes["vocab_size"] - 1
    config = GPT2Config(**sizes, bos_token_id=end, eos_token_id=end, attn_implementation="eager")
    model = GPT2LMHeadModel(config).float().eval()
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = config.n_embd**-0.5 if parameter.ndim == 2 else 0.3
            parameter.normal_(0.0, std, generator=random)
            if re.search(r"ln_\w+\.weight", name):
                parameter.add_(1.0)
    return model


def examples(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    ids_BT = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    labels_BT = torch.full_like(ids_BT, -100)
    for b, (length, masked) in enumerate(zip(LENGTHS, MASKED, strict=True)):
        ids_BT[b, :length] = torch.randint(vocab_size, (length,), generator=random)
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


def gradients(model: GPT2LMHeadModel, ids_BT: torch.Tensor, labels_BT: torch.Tensor):
    """Logits, losses and {parameter name: gradient of the summed losses}."""
    model.zero_grad()
    out = model(ids_BT, labels=labels_BT)
    losses_BT = token_losses(out.logits, labels_BT)
    losses_BT.sum().backward()
    supervised = (labels_BT[:, 1:] != -100).sum()
    mean = (losses_BT.sum() / supervised).float()
    torch.testing.assert_close(out.loss.float(), mean)  # transformers' own
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    return out.logits.detach(), losses_BT.detach(), grads


def example_gradients(model: GPT2LMHeadModel, ids_BT, labels_BT, lengths) -> dict[str, np.ndarray]:
    """Every example alone and without its padding; Conv1D stores [I, O] and is turned to [O, I]."""
    per_example = [
        gradients(model, ids_BT[b : b + 1, :n], labels_BT[b : b + 1, :n])[2]
        for b, n in enumerate(lengths)
    ]
    found = {}
    for name, module in model.transformer.named_modules():
        if isinstance(module, Conv1D):
            weights = [grads[f"transformer.{name}.weight"].T for grads in per_example]
            biases = [grads[f"transformer.{name}.bias"] for grads in per_example]
            found[f"{name}.weight"] = torch.stack(weights).numpy()
            found[f"{name}.bias"] = torch.stack(biases).numpy()
    return found


def save(folder: Path, model: GPT2LMHeadModel, **arrays) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(folder.name, {p.name: p.stat().st_size for p in sorted(folder.iterdir())})


def make_tiny(folder: Path, seed: int, **sizes) -> None:
    model = build(seed, **sizes)
    ids_BT, labels_BT = examples(model.config.vocab_size)
    logits_BTV, losses_BT, grads = gradients(model, ids_BT, labels_BT)
    per_example = example_gradients(model, ids_BT, labels_BT, LENGTHS)
    for name, value in per_example.items():  # padding and batching change nothing
        total = grads[f"transformer.{name}"].numpy()
        np.testing.assert_allclose(value.sum(0).T, total, rtol=1e-4, atol=1e-5)
    exact = gradients(model.double(), ids_BT, labels_BT)
    model.float()
    error = max(float((grads[k] - v).norm() / v.norm()) for k, v in exact[2].items())
    print(
        f"float32 against float64: logits {float((logits_BTV - exact[0]).abs().max()):.1e}, ",
        end="",
    )
    print(f"gradients {error:.1e} relative; losses sum to {float(losses_BT.sum()):.4f}")
    padding_BT = torch.arange(ids_BT.shape[1]) >= torch.tensor(LENGTHS)[:, None]
    save(
        folder,
        model,
        ids=ids_BT.int().numpy(),
        labels=labels_BT.int().numpy(),
        lengths=np.array(LENGTHS, np.int32),
        logits=logits_BTV.masked_fill(padding_BT[..., None], 0.0).numpy(),
        losses=losses_BT.numpy(),
        **{f"grad/{name}": value.numpy() for name, value in grads.items()},
        **{f"example_grad/{name}": value for name, value in per_example.items()},
    )


def make_full(folder: Path) -> None:
    """One fully supervised sequence of 64 tokens; gradients of the first and last block only."""
    model = build(0, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    ids_BT = torch.randint(50257, (1, 64), generator=torch.Generator().manual_seed(7))
    logits_BTV, losses_BT, grads = gradients(model, ids_BT, ids_BT)
    kept = {
        k: v for k, v in grads.items() if k.startswith(("transformer.h.0.", "transformer.h.11."))
    }
    save(
        folder,
        model,
        ids=ids_BT.int().numpy(),
        labels=ids_BT.int().numpy(),
        lengths=np.array([64], np.int32),
        logits=logits_BTV.numpy(),
        losses=losses_BT.numpy(),
        **{f"grad/{name}": value.numpy() for name, value in kept.items()},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", type=Path, metavar="DIR")
    if full := parser.parse_args().full:
        make_full(full)
    else:
        here = Path(__file__).parent
        make_tiny(here / "gpt2_tiny", seed=0, **TINY)
        make_tiny(here / "gpt2_tiny_untied", seed=1, **UNTIED, tie_word_embeddings=False)
