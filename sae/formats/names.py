"""Other people's names of the places in a model that activations are taken from, and ours.

Hugging Face: a module and whether its input or output is meant, `model.layers.12.output`; nnsight
and sparsify leave the `.output` away, sparsify also the first word. TransformerLens: hook points,
`blocks.12.hook_resid_post`. Some of its names look like ours and mean another activation, and have
no tap: `hook_attn_out` is behind the output projection, `hook_mlp_in` before the norm,
`ln2.hook_normalized` before the norm's weight, `hook_embed` without GPT-2's positions.
"""

import re

# Modules by family and kind of tap; the activation is the module's output where not said.
HUGGING_FACE = {
    "gpt2": {
        "resid_post": "transformer.h.{}",
        "mlp_out": "transformer.h.{}.mlp",
        "mlp_in": "transformer.h.{}.ln_2",
        "attn_out": "transformer.h.{}.attn.c_proj.input",
    },
    "gemma3": {
        "embed": "model.embed_tokens",
        "resid_post": "model.layers.{}",
        "mlp_out": "model.layers.{}.post_feedforward_layernorm",
        "mlp_in": "model.layers.{}.pre_feedforward_layernorm",
        "attn_out": "model.layers.{}.self_attn.o_proj.input",
    },
    "gpt_neox": {
        "embed": "gpt_neox.embed_in",
        "resid_post": "gpt_neox.layers.{}",
        "mlp_out": "gpt_neox.layers.{}.mlp",
        "mlp_in": "gpt_neox.layers.{}.post_attention_layernorm",
        "attn_out": "gpt_neox.layers.{}.attention.dense.input",
    },
}
TRANSFORMER_LENS = {
    "embed": "blocks.0.hook_resid_pre",
    "resid_post": "blocks.{}.hook_resid_post",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "attn_out": "blocks.{}.attn.hook_z",
}
# Without the first word; what a layer's mlp puts out is added to the residual stream as it is,
# except in Gemma, where a norm is between.
BARE = {
    "embed": "embed_(?:tokens|in)",
    "resid_post": "(?:layers|h).{}",
    "mlp_out": "(?:layers|h).{}.mlp",
    "mlp_in": "(?:layers|h).{}.mlp.input",
}
# The residual stream before a layer: what the one before it, or the embedding, puts out.
BEFORE = "(?:blocks.{}.hook_resid_pre|(?:layers|h).{}.input)"


def tap(name: str | None, model: str | None = None) -> str | None:
    """Our name of an activation; None where it is none of our taps, or may be another.

    model: its name, because Gemma's `layers.3.mlp` is not what Llama's is.
    """
    if not name:
        return None
    name = name.removesuffix(".output")
    if found := _layer(BEFORE, name):
        return f"resid_post.{int(found) - 1}" if int(found) else "embed"
    for table in (*HUGGING_FACE.values(), TRANSFORMER_LENS, BARE):
        for kind, template in table.items():
            if (found := _layer(template, name)) is None:
                continue
            if table is BARE and kind == "mlp_out" and "gemma" in (model or "").lower():
                return None
            return f"{kind}.{int(found)}" if found else kind
    return None


def transformer_lens(tap: str) -> str:
    """The hook point's name of a tap."""
    kind, _, layer = tap.partition(".")
    return TRANSFORMER_LENS[kind].format(layer)


def hugging_face(tap: str, family: str) -> str | None:
    """A tap's name in transformers' models of a family; None for GPT-2's embedding, a sum."""
    kind, _, layer = tap.partition(".")
    template = HUGGING_FACE[family].get(kind)
    if template is None:
        return None
    return template.format(layer) + ("" if template.endswith(".input") else ".output")


def _layer(template: str, name: str) -> str | None:
    """The layer's number in a name of this form, "" where the form has none; None: another form."""
    pattern = template.replace(".", r"\.").replace("{}", r"(\d+)")
    found = re.fullmatch(pattern, name)
    return None if found is None else "".join(group or "" for group in found.groups())
