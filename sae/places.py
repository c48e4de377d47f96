"""Where an SAE belongs in a model: which activation it reads, and which it stands for."""

from typing import NamedTuple

from core import taps
from core.config import ModelConfig
from core.errors import InputError
from core.taps import Tap
from sae.coder import Sae, check_input


class Places(NamedTuple):
    """Of an SAE one activation, of a transcoder two."""

    reads: Tap
    writes: Tap


def places_of(sae: Sae, site: str | None, config: ModelConfig) -> Places:
    """What the SAE's file says, or where it says nothing `site`, by its name.

    Raises InputError when neither says, they differ, or the widths are not the model's.
    """
    where = sae.about.origin
    if site is None and sae.about.tap_in is None:
        raise InputError(f"{where} does not say which activation it reads; give --site")
    reads = taps.parse(site or str(sae.about.tap_in), config)
    check_input(sae, taps.width(config, reads), str(reads), f"--site {reads}")
    writes = taps.parse(sae.about.tap_out, config) if sae.about.tap_out else reads
    if sae.coder.d_out != taps.width(config, writes):
        raise InputError(f"{where} writes {sae.coder.d_out} features, {writes} has "
                         f"{taps.width(config, writes)}; is it a transcoder of another place?"
                         )  # fmt: skip
    return Places(reads, writes)
