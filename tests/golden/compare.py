"""Our numbers against a folder of `make_families.py`, for sizes that no test can afford.

    python -m tests.golden.compare DIR/gemma3_270m ...     in Taproot's own environment

Prints, relative to the largest entry of each array: the worst logit, the worst token loss (in nats,
too) and the worst gradient. Exit status 1 if one of them exceeds 1e-5.
"""

import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from core import model
from core.config import Execution
from core.hf import convert

TOLERANCE = 1e-5


def relative(found, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def compare(folder: Path, execution: Execution) -> bool:
    began = time.monotonic()
    config, params = convert.import_hf(folder)
    params = jax.tree.map(jnp.asarray, params)
    errors = {}
    with np.load(folder / "expected.npz", allow_pickle=False) as expected:
        ids_BT, labels_BT = jnp.asarray(expected["ids"]), jnp.asarray(expected["labels"])
        forward = jax.jit(functools.partial(model.logits, config, execution))
        found_BTV, wanted_BTV = np.asarray(forward({"params": params}, ids_BT)), expected["logits"]
        errors["logits"] = relative(found_BTV, wanted_BTV)
        agree = float((found_BTV.argmax(-1) == wanted_BTV.argmax(-1)).mean())
        largest = float(np.abs(wanted_BTV).max())
        del found_BTV, wanted_BTV

        def loss(params, ids_BT, labels_BT):
            ones_BT = jnp.ones(ids_BT.shape)
            variables = {"params": params}
            return model.weighted_loss(config, execution, variables, ids_BT, labels_BT, ones_BT)

        derive = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (_, losses_BT), gradients = derive(params, ids_BT, labels_BT)
        errors["losses"] = relative(losses_BT, expected["losses"])
        nats = float(np.abs(np.asarray(losses_BT) - expected["losses"]).max())
        mean = float(expected["losses"].sum() / (expected["losses"] != 0).sum())
        for name, slot in convert.slots(config).items():
            if f"grad/{name}" in expected:
                errors[name] = relative(slot.view(gradients), expected[f"grad/{name}"])
    print(
        f"{folder.name}, {ids_BT.shape[1]} tokens, {time.monotonic() - began:.0f} s: "
        f"logits {errors['logits']:.1e} of {largest:.2f}, argmax equal {agree:.2%}; "
        f"losses {errors['losses']:.1e} or {nats:.1e} nats (mean loss {mean:.2f});"
    )
    names = [name for name in errors if name not in ("logits", "losses")]
    worst = sorted(names, key=errors.__getitem__)[-3:]
    print(f"  {len(names)} gradients, worst:", {name: f"{errors[name]:.1e}" for name in worst})
    return max(errors.values()) <= TOLERANCE


if __name__ == "__main__":
    results = [compare(Path(name), Execution(layers="scan", remat=True)) for name in sys.argv[1:]]
    sys.exit(not all(results))
