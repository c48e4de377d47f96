"""What an SAE is worth: how well it tells activations, and how well the model runs on its word.

The model reads each batch three more times than the SAE: as it is, with the SAE's output in the
place of the activation, and with zeros there.

    score = (CE_zero - CE_sae) / (CE_zero - CE_clean),    and the same of KL(clean || other)

1 where nothing is lost, 0 where the SAE is worth no more than nothing (SAEBench's loss recovered).
Tokens that no SAE is trained on, a BOS that begins a row, keep their activation under the SAE.

Dims: B rows, T tokens, D width in, O width out.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core import loss, model, sharding, taps
from core.checkpoint import Loaded
from core.config import Execution, ModelConfig
from core.errors import InputError
from core.files import atomic, read_npz, write_json, write_npy
from core.inference import overlapped
from core.model import Variables
from core.progress import Progress
from core.rows import Batch, Plan, Rows, read_ahead
from core.rundir import Run
from sae.activations import counted
from sae.coder import Coder, Params, Sae
from sae.metrics import Figures, Totals, figures
from sae.places import Places

SAVE_EVERY = 50  # batches
LOSSES = ("ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero")


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
@model.full_precision
def measure(
    config: ModelConfig,
    execution: Execution,
    coder: Coder,
    places: Places,
    variables: Variables,
    params: Params,
    ids_BT: jax.Array,
    labels_BT: jax.Array,
    counts_BT: jax.Array,
) -> tuple[Figures, tuple[jax.Array, ...]]:
    """The figures of all tokens of a batch, without y, and [B,T] losses in the order of `LOSSES`.

    Losses are those of predicting the next token, 0 where it is unsupervised.
    """
    h_BTD, (x_BTD, t_BTO) = taps.run(config, execution, variables, ids_BT, places)
    found = figures(
        coder, params, x_BTD.reshape(-1, x_BTD.shape[-1]), t_BTO.reshape(-1, t_BTO.shape[-1]),
        counts_BT.reshape(-1),
    )  # fmt: skip
    told_BTO = found.y_NO.reshape(t_BTO.shape).astype(t_BTO.dtype)
    told_BTO = jnp.where(counts_BT[..., None], told_BTO, t_BTO)

    def instead(value_BTO: jax.Array) -> jax.Array:
        other = taps.spliced(config, variables, places.writes, value_BTO)
        return model.hidden(config, execution, other, ids_BT)

    hidden_SBTD = jnp.stack([h_BTD, instead(told_BTO), instead(jnp.zeros_like(told_BTO))])
    head_VD, targets_BT = model.head(config, variables["params"]), model.targets(labels_BT)
    chunk = execution.tokens_per_chunk(config.vocab_size)
    nll_SBT, kl_SBT = loss.compared(hidden_SBTD, head_VD, targets_BT, chunk)
    return found._replace(y_NO=jnp.zeros(0)), (*nll_SBT, *kl_SBT[1:])


def evaluate(
    run: Run,
    loaded: Loaded,
    rows: Rows,
    sae: Sae,
    places: Places,
    execution: Execution,
    batch_tokens: int,
) -> dict[str, Any]:
    """Write `results.json` and `density.npy` [F]; returns the results. Goes on where it was killed.

    Raises InputError when activations or losses are not finite.
    """
    config, where = loaded.config, sharding.local_mesh()
    everywhere, over_rows = sharding.replicated(where), sharding.over_rows(where)
    variables = jax.device_put(loaded.variables, everywhere)
    params = jax.device_put(dict(sae.params), everywhere)
    plan = Plan(rows, batch_tokens, jax.local_device_count())
    done, totals, losses = _resumed(run.path / "sums.npz", sae.coder)

    def compute(batch: Batch) -> Any:
        arrays = (batch.ids_BT, batch.labels_BT, _counts(batch, rows, config))
        placed = (sharding.place(array, over_rows) for array in arrays)
        return measure(config, execution, sae.coder, places, variables, params, *placed)

    total = int(rows.lengths.sum())
    at = sum(_tokens(plan, k) for k in range(done))
    with Progress(total, "sae eval", "token", at) as bar:
        batches = overlapped(read_ahead(plan, done), compute)
        for k, (batch, (found, of_tokens)) in enumerate(batches, done):
            totals.add(found, _counts(batch, rows, config).reshape(-1))
            losses += [np.asarray(x_BT, np.float64).sum() for x_BT in of_tokens]
            if not np.isfinite(totals.arrays["scalars"]).all() or not np.isfinite(losses).all():
                raise InputError(f"{rows.path}: an activation or loss of row {batch.rows_B[0]}, or "
                                 "of others in its batch, is not finite; compute in float32, or "
                                 "look at the model")  # fmt: skip
            if (k + 1) % SAVE_EVERY == 0:
                _save(run.path / "sums.npz", k + 1, totals, losses)
            bar.update(_tokens(plan, k))
    results = {**totals.results(), **_recovered(losses, int(rows.trained.sum()))}
    results |= {"sae": sae.fingerprint, "model": loaded.fingerprint, "rows": rows.sha,
                "reads": str(places.reads), "writes": str(places.writes)}  # fmt: skip
    write_npy(run.path / "density.npy", totals.density_F.astype(np.float32))
    write_json(run.path / "results.json", results)
    return results


def _counts(batch: Batch, rows: Rows, config: ModelConfig) -> np.ndarray:
    lengths_B = np.where(batch.rows_B < 0, 0, rows.lengths[batch.rows_B])
    return counted(batch.ids_BT, lengths_B, config.bos)


def _tokens(plan: Plan, k: int) -> int:
    chosen_B = plan.batches[k][0]
    return int(plan.rows.lengths[chosen_B[chosen_B >= 0]].sum())


def _resumed(file: Path, coder: Coder) -> tuple[int, Totals, np.ndarray]:
    """(batches that are in the sums, the sums, sums of the losses)."""
    if not file.exists():
        return 0, Totals(coder.d_sae, coder.d_out), np.zeros(len(LOSSES))
    held = read_npz(file)
    done, losses = int(held.pop("batches")), held.pop("losses")
    return done, Totals(coder.d_sae, coder.d_out, held), losses


def _save(file: Path, batches: int, totals: Totals, losses: np.ndarray) -> None:
    arrays = {"batches": np.array(batches), "losses": losses, **totals.arrays}
    with atomic(file) as opened:
        np.savez(opened, **arrays)  # pyright: ignore[reportArgumentType]


def _recovered(sums: np.ndarray, tokens: int) -> dict[str, float | None]:
    """Mean losses in nats a token, and what share of the harm of zeros the SAE spares."""
    if not tokens:
        return {}
    mean = dict(zip(LOSSES, (sums / tokens).tolist(), strict=True))
    harm, kl = mean["ce_zero"] - mean["ce_clean"], mean["kl_zero"]
    return {
        **mean,
        "ce_score": (mean["ce_zero"] - mean["ce_sae"]) / harm if harm else None,
        "kl_score": (kl - mean["kl_sae"]) / kl if kl else None,
    }
