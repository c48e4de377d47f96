"""Folders that are named by their place on the Hugging Face Hub, such as `google/gemma-3-270m`.

A name is fetched once and found in the Hub's own cache from then on, also without a network. Only
what is read here is fetched: safetensors, JSON and tokenizer files; never code, never pickles.
"""

import os
import re
from pathlib import Path

from core.errors import InputError

# Names from the Hub's early days, without an organisation before them.
LEGACY = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "encoder.json", "chat_template.*", "config.json", "generation_config.json",
)  # fmt: skip
EVERYTHING = (*TOKENIZER_FILES, "*.safetensors", "*.safetensors.index.json", "adapter_config.json")


def is_name(text: str) -> bool:
    """Whether `text` is a name on the Hub (`organisation/name`, or `...@revision`), and no path."""
    if Path(text).exists():
        return False
    return text in LEGACY or bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", text))


def locate(
    name: str | os.PathLike[str], patterns: tuple[str, ...] = EVERYTHING, inner: str = ""
) -> Path:
    """The folder of a name on the Hub, fetched if need be; any other path as it is.

    patterns: files to fetch, from the top of the repository, or from its folder `inner`, which is
    then the folder returned. InputError if it cannot be had.
    """
    if not isinstance(name, str) or not is_name(name):
        return Path(name, inner)
    within = f"{inner}/" if inner else ""
    from huggingface_hub import errors, snapshot_download

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[within + pattern for pattern in patterns],
            ignore_patterns=[f"{within}*/*"],
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name} asks for its licence to be accepted on huggingface.co by an account whose "
            "token is set up here (`hf auth login`)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(f"{name} is neither a folder here nor known to the Hugging Face Hub; "
                         "check the name") from error  # fmt: skip
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError,
            errors.HFValidationError, OSError) as error:  # fmt: skip
        reason = str(error).splitlines()[0]
        raise InputError(f"{name} is no folder here and cannot be fetched ({reason}); download it "
                         "elsewhere and give its folder") from error  # fmt: skip
    return Path(folder, inner)
