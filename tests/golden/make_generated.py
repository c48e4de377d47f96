"""Expected greedy continuations from transformers' `generate`, with its key-value cache.

    python -P tests/golden/make_generated.py     rewrites generated.npz in every family's folder

Reads the models that make_families.py wrote. Dims: B prompts, P their padded length, N new tokens.

    prompts          [B, P] int32, right padding 0
    lengths          [B] tokens before the padding
    tokens           [B, N], generated one prompt at a time; no token ends the text

The prompts are drawn anew until no choice is close: at every step the best logit leads the second
by more than MARGIN of the largest |logit|, with the cache and without. Random models like to repeat
themselves, so prompts whose continuation holds fewer than DIFFERENT tokens are drawn anew, too.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
LENGTHS = (3, 11, 6)  # with 24 more: far beyond the windows of the Gemma models
NEW = 24
MARGIN = 5e-3
DIFFERENT = 6


def continuation(model, prompt: torch.Tensor) -> torch.Tensor | None:
    """The NEW tokens after `prompt`, or None if a choice is close or they repeat too much."""
    ids = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt)[None],
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
    )[0]
    found = ids[len(prompt) :]
    logits_TV = model(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    best_T2 = logits_TV.topk(2).values
    lead_T = (best_T2[:, 0] - best_T2[:, 1]) / logits_TV.abs().amax(-1)
    same = bool((logits_TV.argmax(-1) == found).all())
    assert same or lead_T.min() < 1e-4, "the cache of transformers changes what it generates"
    clear = same and float(lead_T.min()) > MARGIN
    return found if clear and len(set(found.tolist())) >= DIFFERENT else None


@torch.no_grad()
def make(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(11)
    prompts = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    tokens = np.zeros((len(LENGTHS), NEW), np.int32)
    for b, length in enumerate(LENGTHS):
        found = None
        while found is None:
            prompt = torch.randint(1, model.config.vocab_size, (length,), generator=random)
            found = continuation(model, prompt)
        prompts[b, :length], tokens[b] = prompt.numpy(), found.numpy()
    np.savez_compressed(
        folder / "generated.npz",
        prompts=prompts,
        lengths=np.array(LENGTHS, np.int32),
        tokens=tokens,
    )
    print(folder.name, [len(set(row)) for row in tokens.tolist()], f"different tokens of {NEW}")


if __name__ == "__main__":
    for path in sorted(HERE.glob("*/bfloat16.json")):  # the folders of make_families.py
        make(path.parent)
