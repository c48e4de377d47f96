"""The chat templates, as data, and which of them a tokenizer's own template is.

A turn is a header, the content and an end; between turns and after the last stands a newline. The
templates differ in these strings, in what becomes of a system message, and in whether contents lose
the blanks around them.

A folder's own template (chat_template.jinja, else `chat_template` in tokenizer_config.json) is
never executed. It is recognised by the sha256 of its normal form: the text without comments and
without what the trim marks strip, its tags without blanks outside string literals and with one kind
of quote. Two templates of one normal form render alike; any other template is unknown.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tokenizers.base import Tokenizer
from tokenizers.files import TokenizerError, parse_object, parse_text


@dataclass(frozen=True)
class Template:
    """How a conversation is written. `headers` and `ends` are by role; an end has no newline.

    bos stands before the first turn. system: a turn of its own, a part of the first user turn
    (followed by an empty line), or refused. tokens: what must be one token each.
    """

    name: str
    headers: dict[str, str]
    ends: dict[str, str]
    system: Literal["turn", "folded", "refused"]
    tokens: tuple[str, ...] = ()
    bos: str = ""
    trim: bool = False  # the contents of user and assistant
    last_newline: bool = True  # after an assistant's turn that ends the conversation


BOS, EOS = "{bos}", "{eos}"  # the tokenizer's own

_GEMMA = Template(
    name="gemma",
    headers={"user": "<start_of_turn>user\n", "assistant": "<start_of_turn>model\n"},
    ends=dict.fromkeys(("user", "assistant"), "<end_of_turn>"),
    system="folded",
    tokens=("<start_of_turn>", "<end_of_turn>"),
    bos=BOS,
    trim=True,
)
_ROLES = ("system", "user", "assistant")
TEMPLATES = {
    t.name: t
    for t in (
        _GEMMA,
        replace(_GEMMA, name="gemma2", system="refused"),
        Template(
            name="tulu",
            headers={role: f"<|{role}|>\n" for role in _ROLES},
            ends={"system": "", "user": "", "assistant": EOS},
            system="turn",
            last_newline=False,
        ),
        Template(
            name="chatml",
            headers={role: f"<|im_start|>{role}\n" for role in _ROLES},
            ends=dict.fromkeys(_ROLES, "<|im_end|>"),
            system="turn",
            tokens=("<|im_start|>", "<|im_end|>"),
        ),
    )
}
# sha256 of a normal form -> name
KNOWN = {
    # Gemma 3; the same without images; as TRL trains it
    "68c7cec5642253d477aed6f45d01157740d7457fc6dcdfdd9781c38bc25b5139": "gemma",
    "11cc130bb09ac1082b05cc7148bfae9c71a15dfaefbb16f8278b47698f7a4182": "gemma",
    "f75fa632e69e491fc780a66e8fedb458b1d33891e288fafef2fdd15223561de1": "gemma",
    # Gemma and Gemma 2; as TRL trains it
    "f99801403d8de24e0704fe19970d39d23f0deddc1f1d51c60958c9f0e55b0fc7": "gemma2",
    "4808d5dc3b712c3ff7f0091c1c4f3471e4ac970af7b3a586a8e772ac873ca497": "gemma2",
    # Open Instruct
    "ab2611219a712231a2bad4370e304289095b159b032b7a225a977d4797eb2260": "tulu",
    # with and without a generation prompt, and with a default for it
    "0a15250a823f2b10d19fc03b579e1b6f8f2c476b76e39347cc2e1d72b137fcc1": "chatml",
    "fbc881e7715cb5cd4b456f6b5cadff6782271d4a4131fd8ee26aa0f77207ec19": "chatml",
    "cc8da7d049bd72dec0556e2fae92f2f222ce1ad151de1d1007b666473bd45905": "chatml",
}


def template(tokenizer: Tokenizer, name: str | None = None) -> Template:
    """The template of that name, or the one that the tokenizer's files hold, for this tokenizer.

    Raises TokenizerError where there is none of that name, the files hold none or an unknown one,
    or the tokenizer lacks a token that the template needs.
    """
    chosen = TEMPLATES.get(name or recognise(tokenizer))
    if chosen is None:
        raise TokenizerError(
            f"there is no chat template {name!r}: name one of {', '.join(TEMPLATES)}"
        )
    for token in chosen.tokens:
        if len(tokenizer.encode(token, special=True)) != 1:
            raise TokenizerError(
                f"chat template {chosen.name} needs the token {token}, which tokenizer"
                f" {tokenizer.name} lacks: name another template or the tokenizer of a chat model"
            )
    for role, needed, i in (
        ("BOS", chosen.bos, tokenizer.bos),
        ("EOS", EOS in chosen.ends.values(), tokenizer.eos),
    ):
        if needed and i is None:
            raise TokenizerError(
                f"chat template {chosen.name} needs a token for {role}, and tokenizer"
                f" {tokenizer.name} declares none: name another template or tokenizer"
            )
    bos = tokenizer.bos if chosen.bos or tokenizer.add_bos else None
    eos = "" if tokenizer.eos is None else tokenizer.decode([tokenizer.eos])
    return replace(
        chosen,
        ends={role: end.replace(EOS, eos) for role, end in chosen.ends.items()},
        bos="" if bos is None else tokenizer.decode([bos]),
    )


def recognise(tokenizer: Tokenizer) -> str:
    """The name of the template in the tokenizer's files; TokenizerError if none or unknown."""
    source = own_template(tokenizer)
    names = ", ".join(TEMPLATES)
    if source is None:
        raise TokenizerError(
            f"tokenizer {tokenizer.name} has no chat template: name one of {names} (--template,"
            " --chat or --apply-chat-template NAME)"
        )
    mark = hashlib.sha256(normal_form(source).encode()).hexdigest()
    if mark not in KNOWN:
        raise TokenizerError(
            f"the chat template of tokenizer {tokenizer.name} is none of {names}: name the one that"
            " it amounts to (--template, --chat or --apply-chat-template NAME)"
        )
    return KNOWN[mark]


def own_template(tokenizer: Tokenizer) -> str | None:
    """The jinja text among the tokenizer's files, the default one if there are several."""
    files = tokenizer.files
    if "chat_template.jinja" in files:
        return parse_text(Path("chat_template.jinja"), files["chat_template.jinja"])
    name = "tokenizer_config.json"
    found = parse_object(Path(name), files.get(name, b"{}")).get("chat_template")
    if isinstance(found, list):  # several by name
        named = (t for t in found if isinstance(t, dict) and t.get("name") == "default")
        found = next(named, {}).get("template")
    return found if isinstance(found, str) else None


def normal_form(source: str) -> str:
    """The text of a jinja template up to spelling that never shows in what it renders."""
    source = re.sub(r"\s*(\{[{%#])-", r"\1", source)
    source = re.sub(r"-([}%#]\})\s*", r"\1", source)
    source = re.sub(r"\{#.*?#\}", "", source, flags=re.S).removesuffix("\n")
    return re.sub(r"\{[{%].*?[}%]\}", lambda tag: _squeeze(tag[0]), source, flags=re.S)


def _squeeze(tag: str) -> str:
    def spelt(part: re.Match[str]) -> str:
        literal = part[0][1:-1].replace("\\n", "\n")
        return "" if part[0].isspace() else f"'{literal}'"

    return re.sub(r"'[^']*'|\"[^\"]*\"|\s+", spelt, tag)
