"""Features and reconstructions of activations from a file, in blocks, into one `.npz`.

The activations are those of any site: [M,D], also with more axes in front, with heads as
[M,heads,width], or [M,L,D] for the layers of a crosscoder.

Dims: N rows of a block, D width in, F features, O width out.
"""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from core import files, memmap
from core.errors import InputError
from core.inference import overlapped
from core.progress import Progress
from sae import coder as coders
from sae import crosscoder
from sae.coder import Sae
from sae.formats import CrossSae

BLOCK = 2**27  # bytes of features that are computed at once
FEATURES, RECONSTRUCTION = "activations", "reconstruction"

_encode_layers = jax.jit(crosscoder.encode)
_decode_layers = jax.jit(crosscoder.decode)
_reconstruct = jax.jit(coders.reconstruct, static_argnums=0)


def encode(sae: Sae | CrossSae, activations: files.PathLike, out: files.PathLike) -> dict[str, Any]:
    """Write float32 `activations` [...,F] and `reconstruction` [...,O] of a `.npy` file to `out`.

    The file may be float16, bfloat16 or float32, and larger than memory; a reconstruction has the
    shape of its input except a transcoder's. Returns how many vectors there were and how many
    features fired in one on average. Raises InputError for a width or a site that is not the SAE's,
    numbers that are not finite, and a disk too small for the result.
    """
    out = Path(out)
    x = memmap.open_array(activations)
    x = x.view(ml_dtypes.bfloat16) if x.dtype == "V2" else x  # numpy's name for what it knows not
    if x.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
        raise InputError(f"{activations} holds {x.dtype}; save the activations as float32")
    axes = _axes(sae, x.shape, str(activations))
    rows, x_MD = math.prod(axes.lead), x.reshape(-1, *axes.vector)
    out.parent.mkdir(parents=True, exist_ok=True)
    # The reconstruction is written twice: an archive takes one array after the other.
    width = math.prod(axes.features)
    files.require_space(out.parent, 4 * rows * (width + 2 * math.prod(axes.result)))
    step = max(1, min(rows, BLOCK // (4 * width)))
    compute, fired = _compute(sae), 0
    with (
        files.atomic(out) as file,
        zipfile.ZipFile(file, "w") as archive,
        tempfile.TemporaryFile(dir=out.parent) as second,
        Progress(rows, "encode", "vectors") as progress,
    ):
        with archive.open(f"{FEATURES}.npy", "w", force_zip64=True) as first:
            _header(first, (*axes.lead, *axes.features))
            for (count, _), (f_NF, y_NO) in overlapped(
                _blocks(x_MD, step, str(activations)), lambda block: compute(block[1])
            ):
                first.write(np.ascontiguousarray(f_NF[:count]).data)
                second.write(np.ascontiguousarray(y_NO[:count]).data)
                fired += int(np.count_nonzero(f_NF[:count]))
                progress.update(count)
        second.seek(0)
        with archive.open(f"{RECONSTRUCTION}.npy", "w", force_zip64=True) as last:
            _header(last, (*axes.lead, *axes.result))
            shutil.copyfileobj(second, last, 2**24)
    return {"vectors": rows, "features": width, "l0": fired / max(rows, 1)}


class Axes(NamedTuple):
    """Sizes of the axes before a vector, of a vector, its features, and its reconstruction."""

    lead: tuple[int, ...]
    vector: tuple[int, ...]
    features: tuple[int, ...]
    result: tuple[int, ...]


def _axes(sae: Sae | CrossSae, shape: tuple[int, ...], where: str) -> Axes:
    if isinstance(sae, CrossSae):
        layers, width, features = sae.coder
        if shape[-2:] != (layers, width):
            raise InputError(
                f"{where} has activations of shape {list(shape)}, but {sae.about.origin} reads "
                f"[..., {layers} layers, {width}] of {', '.join(map(str, sae.taps_in))}; stack "
                "these layers in this order"
            )
        return Axes(shape[:-2], shape[-2:], (layers, features), shape[-2:])
    count = next((n for n in (1, 2) if math.prod(shape[-n:]) == sae.coder.d_in), 1)  # 2: heads
    vector = shape[-count:]
    coders.check_input(sae, math.prod(vector), None, where)
    result = (sae.coder.d_out,) if sae.coder.transcoder else vector
    return Axes(shape[: len(shape) - count], vector, (sae.coder.d_sae,), result)


def _compute(sae: Sae | CrossSae) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
    params = {name: jax.numpy.asarray(value) for name, value in sae.params.items()}
    if isinstance(sae, CrossSae):

        def layers(x_NLD: np.ndarray) -> tuple[jax.Array, jax.Array]:
            f_NLF = _encode_layers(params, x_NLD)
            return f_NLF, _decode_layers(params, f_NLF, x_NLD)

        return layers
    coder = sae.coder
    return lambda x_ND: _reconstruct(coder, params, x_ND)


def _blocks(x_MD: np.ndarray, step: int, where: str) -> Iterator[tuple[int, np.ndarray]]:
    """How many rows are in a block, and the block in float32, filled up to the same size."""
    for start in range(0, len(x_MD), step):
        part = np.asarray(x_MD[start : start + step], np.float32)
        finite_N = np.isfinite(part).reshape(len(part), -1).all(-1)
        if not finite_N.all():
            raise InputError(f"{where}: vector {start + int(finite_N.argmin())} holds NaN or "
                             "infinity; take the activations again in float32")  # fmt: skip
        block = np.ones((step, *x_MD.shape[1:]), np.float32)
        block[: len(part)] = part
        yield len(part), block


def _header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    array = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, array)
