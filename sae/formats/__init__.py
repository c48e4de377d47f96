"""Sparse autoencoders from other people's files, and ours in SAELens's format.

    load("google/gemma-scope-2-270m-pt", "resid_post/layer_12_width_16k_l0_medium")
    load("google/gemma-scope-2-270m-pt/resid_post/layer_12_width_16k_l0_medium@main")
    load("runs/sae")

Which format a folder has is seen from its files. Names on the Hugging Face Hub are fetched without
anything but weights and configs; folders here come first. Nothing is unpickled, and a file is whole
and finite or refused. What a file says besides is in `about.extra`, in SAELens's words.
"""

import os
import re
from pathlib import Path

from core.errors import InputError
from core.hf import hub
from sae.coder import Sae
from sae.formats import dictionary_learning, gemma_scope, saelens, sparsify
from sae.formats.gemma_scope import CrossSae

# A format's file of weights and its reader, in the order in which they are looked for.
READERS = {
    saelens.WEIGHTS: saelens.read,
    sparsify.WEIGHTS: sparsify.read,
    gemma_scope.TWO: gemma_scope.read,
    gemma_scope.SHARDS: gemma_scope.read_layers,
    gemma_scope.ONE: gemma_scope.read_first,
    dictionary_learning.WEIGHTS: dictionary_learning.read,
    dictionary_learning.PICKLE: dictionary_learning.read,  # refused there
}
FETCHED = ("config.json", "cfg.json", *(READERS.keys() - {dictionary_learning.PICKLE}))


def load(place: str | os.PathLike[str], id: str | None = None) -> Sae | CrossSae:
    """The SAE, transcoder or crosscoder of a folder, or of `organisation/name/folder[@revision]`.

    id: folder in `place`. A folder that holds no SAE but one in a folder below stands for that one,
    as the run that trained it. Parameters are float32. Raises InputError naming what is wrong.
    """
    folder, origin = _locate(os.fspath(place), id)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; name the folder of an SAE")
    for file, read in READERS.items():
        if any(folder.glob(file)):
            return read(folder, origin)
    if len(inner := _below(folder)) == 1:
        return load(folder / inner[0])
    raise InputError(f"{folder} holds no SAE: none of {', '.join(READERS)}; {_hint(folder)}")


def load_one(place: str | os.PathLike[str], id: str | None = None) -> Sae:
    """`load` for what works on one activation; InputError for a crosscoder."""
    sae = load(place, id)
    if isinstance(sae, CrossSae):
        raise InputError(f"{sae.about.origin} reads {sae.coder.layers} layers at once; choose an "
                         "SAE or transcoder of one layer")  # fmt: skip
    return sae


def save(folder: str | os.PathLike[str], sae: Sae) -> None:
    """Write `folder` in SAELens's format, whole or not at all; see `saelens.save`."""
    saelens.save(Path(folder), sae)


def _locate(place: str, id: str | None) -> tuple[Path, str]:
    """The folder, fetched if need be, and where it comes from."""
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)((?:/[\w.-]+)*)(@[\w./-]+)?", place)
    if Path(place).exists() or not named:
        folder = Path(place, id or "")
        return folder, str(folder.resolve())
    name, inner, revision = named.groups("")
    inner = "/".join(part for part in (inner.strip("/"), (id or "").strip("/")) if part)
    folder = hub.locate(name + revision, FETCHED, inner)
    return folder, f"{name}/{inner}".rstrip("/") + revision


def _below(folder: Path) -> list[str]:
    """The folders inside that hold SAEs."""
    found = (path.parent for file in READERS for path in folder.rglob(file))
    return sorted({str(path.relative_to(folder)) for path in found})


def _hint(folder: Path) -> str:
    """What to give instead, if folders below hold some."""
    inner = _below(folder)
    if not inner:
        return "give the folder that holds them, of a repository with --sae-id"
    more = f" (and {len(inner) - 3} more)" if len(inner) > 3 else ""
    return f"choose one of those in it with --sae-id: {', '.join(inner[:3])}{more}"
