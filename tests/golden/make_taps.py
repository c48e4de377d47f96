"""Activations that transformers' own hooks see, and its logits when a hook replaces one of them.

    python -P tests/golden/make_taps.py     rewrites taps.npz in every family's folder

Reads the models that make_families.py wrote, and the first two texts of their expected.npz. Dims: B
texts, T tokens, D features of the place, V vocabulary, L layers.

    embed, resid_post.L, mlp_out.L, attn_out.L, mlp_in.L     [B, T, D]
    last_hidden_state                                        [B, T, width], after the final norm
    spliced.NAME     [B, V] logits of the last position when that activation is its own mirror
                     image in D; of one layer, the middle one, of each kind

transformers' `hidden_states` are resid_post of all layers but the last: there they are the last
hidden state, which the script asserts.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = ("gemma3_tiny", "gpt2_tiny", "neox_tiny", "neox_tiny_sequential")


def first(output):
    return output[0] if isinstance(output, tuple) else output


def places(model) -> dict[str, tuple[torch.nn.Module, bool]]:
    """By name: the module to hook, and whether its input (or else its output) is meant."""
    kind, base = model.config.model_type, model.base_model
    layers = base.h if kind == "gpt2" else base.layers
    embedding = {"gpt2": "drop", "gpt_neox": "embed_in", "gemma3_text": "embed_tokens"}[kind]
    found = {"embed": (getattr(base, embedding), False)}
    for number, layer in enumerate(layers):
        if kind == "gemma3_text":
            before, after = layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm
            own = {"mlp_in": (before, False), "mlp_out": (after, False)}
            own["attn_out"] = (layer.self_attn.o_proj, True)
        else:
            attention = layer.attn.c_proj if kind == "gpt2" else layer.attention.dense
            own = {"mlp_in": (layer.mlp, True), "mlp_out": (layer.mlp, False)}
            own["attn_out"] = (attention, True)
        own["resid_post"] = (layer, False)
        found |= {f"{name}.{number}": place for name, place in own.items()}
    return found


def watch(module, is_input, seen, name):
    if is_input:
        return module.register_forward_pre_hook(lambda _, x: seen.__setitem__(name, x[0].clone()))
    return module.register_forward_hook(lambda _, x, y: seen.__setitem__(name, first(y).clone()))


def mirror(module, is_input):
    def turned(x):
        return (x[0].flip(-1), *x[1:]) if isinstance(x, tuple) else x.flip(-1)

    if is_input:
        return module.register_forward_pre_hook(lambda _, x: turned(x))
    return module.register_forward_hook(lambda _, x, y: turned(y))


def main() -> None:
    torch.set_grad_enabled(False)
    for folder in (HERE / name for name in MODELS):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        ids = torch.tensor(np.load(folder / "expected.npz")["ids"][:2]).long()
        seen: dict[str, torch.Tensor] = {}
        hooks = [watch(*place, seen, name) for name, place in places(model).items()]
        output = model(ids, output_hidden_states=True)
        for hook in hooks:
            hook.remove()
        layers = model.config.num_hidden_layers
        for number in range(layers - 1):
            assert torch.equal(seen[f"resid_post.{number}"], output.hidden_states[number + 1])
        arrays = {"last_hidden_state": output.hidden_states[-1], **seen}
        middle = layers // 2
        for name, (module, is_input) in places(model).items():
            if name == "embed" or name.endswith(f".{middle}"):
                hook = mirror(module, is_input)
                arrays[f"spliced.{name}"] = model(ids).logits[:, -1]
                hook.remove()
        np.savez_compressed(folder / "taps.npz", **{n: x.numpy() for n, x in arrays.items()})
        print(folder.name, len(arrays), (folder / "taps.npz").stat().st_size)


if __name__ == "__main__":
    main()
