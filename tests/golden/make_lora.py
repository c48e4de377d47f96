"""Expected numbers of LoRA adapters from peft: adapter folders, logits, losses and gradients.

    python -P tests/golden/make_lora.py     rewrites gpt2_tiny_lora/, gemma3_tiny_lora/, ...

Reads the models and examples that make_families.py wrote. Dims: B examples, T tokens, V
vocabulary, R rank, I and O a layer's inputs and outputs. Each folder is a PEFT adapter with random
factors of both kinds (a fresh B is zero) plus expected.npz, float32, eager attention, no dropout:

    logits, merged   [B, T, V], zero at padding: with the adapter, and of the merged model
    losses           [B, T], as in the base model's folder
    grad/NAME        of the sum of all losses, by name in adapter_model.safetensors: [R, I], [O, R]
    example_grad/NAME  of each example's sum, with a leading B
"""

import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
# `mlp.c_proj` matches by suffix; a bare `c_proj` would be the attention's, too.
TARGETS = {
    "gpt2_tiny": ["c_attn", "mlp.c_proj"],
    "gemma3_tiny": ["q_proj", "v_proj", "down_proj"],
    "neox_tiny": ["query_key_value", "dense_4h_to_h"],
}


def adapted(name: str, seed: int) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(HERE / name, attn_implementation="eager")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=3,
        lora_alpha=5,
        target_modules=TARGETS[name],
        fan_in_fan_out=name.startswith("gpt2"),
    )
    model = get_peft_model(base, config).eval()
    model.peft_config["default"].base_model_name_or_path = name
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in factors(model).values():
            parameter.normal_(0.0, 0.3, generator=random)
    return model


def factors(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """By name in the file, which leaves out the adapter's own name."""
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def run(model, ids_BT: torch.Tensor, labels_BT: torch.Tensor):
    """Logits, losses, {factor: gradient of the summed losses}."""
    model.zero_grad()
    logits_BTV = model(input_ids=ids_BT).logits
    losses_BT = torch.zeros_like(logits_BTV[..., 0])
    losses_BT[:, 1:] = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].mT, labels_BT[:, 1:], ignore_index=-100, reduction="none"
    )
    losses_BT.sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in factors(model).items()}
    return logits_BTV.detach(), losses_BT.detach(), grads


def make(name: str, seed: int) -> None:
    folder = HERE / f"{name}_lora"
    with np.load(HERE / name / "expected.npz") as expected:
        ids_BT, labels_BT, lengths = (
            torch.from_numpy(expected[key]).long() for key in ("ids", "labels", "lengths")
        )
        base_BTV = torch.from_numpy(expected["logits"])
    model = adapted(name, seed)
    logits_BTV, losses_BT, grads = run(model, ids_BT, labels_BT)
    alone = [
        run(model, ids_BT[b : b + 1, :n], labels_BT[b : b + 1, :n])[2]
        for b, n in enumerate(lengths)
    ]
    per_example = {key: torch.stack([grads[key] for grads in alone]) for key in grads}
    for key, value in per_example.items():
        torch.testing.assert_close(value.sum(0), grads[key], rtol=1e-4, atol=1e-5)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].sort()  # a set in peft
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        assert {*file.keys()} == {*grads}
    with torch.no_grad():
        merged_BTV = model.merge_and_unload()(input_ids=ids_BT).logits
    padding_BT1 = (torch.arange(ids_BT.shape[1]) >= lengths[:, None])[..., None]
    logits_BTV, merged_BTV = (x.masked_fill(padding_BT1, 0.0) for x in (logits_BTV, merged_BTV))
    np.savez_compressed(
        folder / "expected.npz",
        logits=logits_BTV.numpy(),
        merged=merged_BTV.numpy(),
        losses=losses_BT.numpy(),
        **{f"grad/{key}": value.numpy() for key, value in grads.items()},
        **{f"example_grad/{key}": value.numpy() for key, value in per_example.items()},
    )
    print(folder.name, {path.name: path.stat().st_size for path in sorted(folder.iterdir())})
    largest = logits_BTV.abs().max()
    merging, adapting = (
        float((x - logits_BTV).abs().max() / largest) for x in (merged_BTV, base_BTV)
    )
    print(f"  of the largest logit: the merged model differs by {merging:.1e}", end=", ")
    print(f"the base by {adapting:.1e}")


if __name__ == "__main__":
    for seed, name in enumerate(TARGETS):
        make(name, seed)
