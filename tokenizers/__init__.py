"""Text to token ids and back: `tokenizers.load(path_or_name) -> Tokenizer`.

This folder shares its name with a PyPI package that Taproot does not use; Taproot runs in place.
"""

from pathlib import Path

from tokenizers.base import Tokenizer
from tokenizers.files import BYTES_MARKER, TokenizerError, read_files

__all__ = ["Tokenizer", "TokenizerError", "load"]


def load(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of that name, or the one whose files lie at that path.

    Names: "bytes" (one id a byte), "gpt2" (from tiktoken's cache, else downloaded) and "gpt2-mul"
    (GPT-2 with `mul_facts`). Anything else is a folder (`Tokenizer.save`'s or Hugging Face's) or
    one of the files `files.LAYOUTS` lists; a file of any other name is read as a tokenizer.json.
    Write "./gpt2" for a folder.

    Raises TokenizerError if a file is missing, malformed or of a kind that is not supported.
    """
    from tokenizers import bpe, gemma, gpt2, mul_facts, plain_bytes

    if path_or_name == "bytes":
        return plain_bytes.build()
    if path_or_name == "gpt2":
        return bpe.build("gpt2", gpt2.fetch(), Path("gpt2"))
    if path_or_name == "gpt2-mul":
        return bpe.build("gpt2-mul", mul_facts.add_facts(gpt2.fetch()), Path("gpt2-mul"))
    folder, files = read_files(Path(path_or_name))
    if BYTES_MARKER in files:
        return plain_bytes.build()
    build = gemma.build if gemma.recognises(files) else bpe.build
    return build(folder.resolve().name, files, folder)
