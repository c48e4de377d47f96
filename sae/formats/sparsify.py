"""The format of sparsify (github.com/EleutherAI/sparsify): top-k and groupmax, also transcoders.

    f = activation(relu((x - b_dec) E^T + b)), no b_dec subtracted if `transcode`
    y = f W_dec + b_dec (+ x W_skip^T)

A folder is named by the module, `layers.10.mlp`, and holds `cfg.json` and `sae.safetensors`; the
folder around it is the run's, whose `config.json` names the model. E is `encoder.weight` [F,D].
"""

from pathlib import Path

from core import safetensors
from core.errors import InputError
from sae.coder import About, Coder, Sae
from sae.formats import names, tensors

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def read(folder: Path, origin: str) -> Sae:
    """The SAE or transcoder of a folder; its site is the folder's name."""
    where, path = folder / CONFIG, folder / WEIGHTS
    config = tensors.read_config(where)
    activation, width = config.get("activation", "topk"), tensors.size(config, "d_in", where)
    if activation not in ("topk", "groupmax") or config.get("signed"):
        signed = "signed " if config.get("signed") else ""
        raise InputError(f"{where}: activation '{signed}{activation}' is unknown; known: topk, "
                         "groupmax")  # fmt: skip
    features = config.get("num_latents") or width * tensors.size(config, "expansion_factor", where)
    transcoder, skip = config.get("transcode", False), config.get("skip_connection", False)
    params = tensors.taken(
        safetensors.read(path), NAMES | ({"W_skip": "W_skip"} if skip else {}), path
    )
    if skip:
        params["W_skip"] = params["W_skip"].T
    coder = Coder(activation, width, features, width, k=tensors.size(config, "k", where),
                  centred=not transcoder, transcoder=transcoder)  # fmt: skip
    run, module = folder.resolve().parent / "config.json", folder.resolve().name
    model = tensors.read_config(run).get("model") if run.is_file() else None
    tap_out = names.tap(module, model)
    tap_in = names.tap(f"{module}.input") if transcoder else tap_out
    extra = {"hookpoint": module, **{k: v for k, v in config.items() if k != "d_in"}}
    return tensors.made(
        coder, params, About(tap_in, tap_out, model, origin, "sparsify", extra), path
    )
