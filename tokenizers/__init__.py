"""Text to token ids and back: `tokenizers.load(path_or_name) -> Tokenizer`.

This folder shares its name with a PyPI package that Taproot does not use; Taproot runs in place.
"""

from pathlib import Path

from tokenizers.base import Tokenizer
from tokenizers.files import BYTES_MARKER, TokenizerError, read_files

__all__ = ["Tokenizer", "TokenizerError", "load"]


def load(path_or_name: str | Path) -> Tokenizer:
    """The tokenizer of that name, or the one whose files lie at that path.

    Names: "bytes" (one id a byte) and "gpt2" (from tiktoken's cache, else downloaded). Anything
    else is a folder (`Tokenizer.save`'s or Hugging Face's) or one of the files `files.LAYOUTS`
    lists; a file of any other name is read as a tokenizer.json. Write "./gpt2" for a folder.

    Raises TokenizerError if a file is missing, malformed or of a kind that is not supported.
    """
    from tokenizers import bpe, gpt2, plain_bytes

    if path_or_name == "bytes":
        return plain_bytes.build()
    if path_or_name == "gpt2":
        return bpe.build("gpt2", gpt2.fetch(), Path("gpt2"))
    folder, files = read_files(Path(path_or_name))
    if BYTES_MARKER in files:
        return plain_bytes.build()
    return bpe.build(folder.resolve().name, files, folder)
