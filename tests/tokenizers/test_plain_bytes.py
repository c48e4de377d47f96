"""The byte tokenizer: nothing is lost, ids are bytes."""

import numpy as np

from tokenizers import load


def test_ids_are_the_bytes_of_utf8():
    tokenizer = load("bytes")
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_id_decodes():
    tokenizer = load("bytes")
    assert tokenizer.vocab_size == 258
    assert tokenizer.decode_bytes(range(256)) == bytes(range(256))
    assert tokenizer.decode([256, 257]) == "<|endoftext|><|pad|>"


def test_control_tokens():
    tokenizer = load("bytes")
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (256, 256, 257)
    assert not tokenizer.add_bos
    text = "a<|endoftext|><|pad|>é"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    parsed = [ord("a"), 256, 257, *"é".encode()]
    assert tokenizer.encode(text, special=True).tolist() == parsed
    assert tokenizer.decode(parsed) == text
