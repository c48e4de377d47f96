"""NFC as Hugging Face's library has it, whatever Unicode Python has."""

import json
import random
import unicodedata
from pathlib import Path

from tokenizers.nfc import nfc

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"


def test_composition_is_that_of_unicode_9():
    cases = json.loads((GOLDEN / "nfc_expected.json").read_text())
    assert len(cases) > 200 and any(text != composed for text, composed in cases)
    for text, composed in cases:
        assert nfc(text) == composed, ascii(text)


def test_composition_is_plain_nfc_of_what_unicode_9_knows():
    rng = random.Random(1)
    marks = [c for c in map(chr, range(0x300, 0x370))] + [*"aeoAEO\u1100\u1161\u11a8\u212b "]
    for _ in range(2000):
        text = "".join(rng.choices(marks, k=8))
        assert nfc(text) == unicodedata.normalize("NFC", text)
