"""One id a byte: needs no file, loses nothing, and keeps small models' embeddings small.

Ids 0 to 255 are the bytes of the text's UTF-8; <|endoftext|> (256) ends a document and may begin
one, <|pad|> (257) fills batches.
"""

from tokenizers.base import Tokenizer, fingerprint
from tokenizers.files import BYTES_MARKER

CONTROL = {"<|endoftext|>": 256, "<|pad|>": 257}


def build() -> Tokenizer:
    """The byte tokenizer: 258 ids."""
    return Tokenizer(
        name="bytes",
        fingerprint=fingerprint("bytes", sorted(CONTROL.items())),
        bos=CONTROL["<|endoftext|>"],
        eos=CONTROL["<|endoftext|>"],
        pad=CONTROL["<|pad|>"],
        add_bos=False,
        control=CONTROL,
        pieces={i: bytes([i]) for i in range(256)} | {i: t.encode() for t, i in CONTROL.items()},
        encode_text=str.encode,
        files={BYTES_MARKER: b'{"tokenizer": "bytes"}\n'},
    )
