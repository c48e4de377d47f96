r"""The texts of a benchmark, as templates over an item's columns: "Question: {question}\nAnswer:".

    {column}  {choices.text}  {choices.0}    a column, a key of it, an entry of it
    {sentence|before("_")|strip}             filters, from left to right; arguments are JSON
    {{  }}                                   braces themselves

A template that is one placeholder and nothing else gives the value as it is (a list, an integer);
any other gives text. A filter of texts does the same to each text of a list. Templates are parsed,
never run. The filters named after a benchmark are that benchmark's own cleaning of its texts, as in
lm-evaluation-harness 0.4.13.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from string import ascii_uppercase
from typing import Any, NamedTuple

from core.errors import InputError
from tokenizers.mul_facts import inject

# WikiText sets words and signs apart; these join them again, one after the other.
_WIKITEXT = [
    ("s '", "s'"),
    ("/' [0-9]/", "/'[0-9]/"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (r" @\.@ ", "."),
    (" : ", ": "),
    (" ; ", "; "),
    (r" \. ", ". "),
    (" ! ", "! "),
    (r" \? ", "? "),
    (" , ", ", "),
    (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]


def _wikitext(text: str) -> str:
    for pattern, joined in _WIKITEXT:
        text = re.sub(pattern, joined, text)
    return text


def _hellaswag(text: str) -> str:
    # Titles of WikiHow sections and other bracketed tags are no part of the sentence.
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise InputError(f"there is no {mark!r} in {text!r}")
    return before, after


def _before(text: str, mark: str) -> str:
    return _cut(text, mark)[0]


def _after(text: str, mark: str) -> str:
    return _cut(text, mark)[1]


def _before_last(text: str, mark: str) -> str:
    return mark.join(text.split(mark)[:-1])


def _after_last(text: str, mark: str) -> str:
    return text.split(mark)[-1]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _letters(choices: list[str]) -> list[str]:
    if len(choices) > len(ascii_uppercase):
        raise InputError(f"{len(choices)} choices are more than there are letters")
    return list(ascii_uppercase[: len(choices)])


def _lettered(choices: list[str]) -> str:
    pairs = zip(_letters(choices), choices, strict=True)
    return "\n".join(f"{letter}. {choice}" for letter, choice in pairs)


# What each filter does, and how many arguments it takes besides.
_TEXT: dict[str, tuple[Callable[..., str], int]] = {
    "strip": (str.strip, 0),
    "capitalize": (str.capitalize, 0),
    "words": (_words, 0),
    "replace": (str.replace, 2),
    "before": (_before, 1),
    "after": (_after, 1),
    "before_last": (_before_last, 1),
    "after_last": (_after_last, 1),
    "hellaswag": (_hellaswag, 0),
    "wikitext": (_wikitext, 0),
    "facts": (inject, 0),
}
_LIST: dict[str, tuple[Callable[..., Any], int]] = {
    "letters": (_letters, 0),
    "lettered": (_lettered, 0),
}

_STRING = r'"(?:[^"\\]|\\.)*"'
_FILTER = re.compile(rf"\s*\|\s*(\w+)(?:\(\s*({_STRING}(?:\s*,\s*{_STRING})*)\s*\))?")
_PART = re.compile(
    rf"(?P<brace>\{{\{{|\}}\}})|(?P<text>[^{{}}]+)|"
    rf"\{{\s*(?P<path>\w+(?:\.\w+)*)(?P<filters>(?:{_FILTER.pattern})*)\s*\}}"
)


class Place(NamedTuple):
    """A placeholder: where its value lies, the filters it goes through, and its source."""

    path: tuple[str, ...]
    filters: tuple[tuple[str, tuple[str, ...]], ...]
    source: str


@cache
def parse(template: str) -> tuple[str | Place, ...]:
    """The texts and placeholders of a template; InputError names what it does not understand."""
    parts: list[str | Place] = []
    at = 0
    while at < len(template):
        part = _PART.match(template, at)
        if part is None:
            raise InputError(
                f"template {template!r} cannot be read from {template[at : at + 30]!r} on; write "
                '{column}, {column.key}, {column|filter("text")}, and {{ or }} for a brace'
            )
        at = part.end()
        if part["path"] is None:
            parts.append(part["text"] or part["brace"][0])
        else:
            calls = _FILTER.findall(part["filters"])
            filters = tuple((name, _arguments(name, written, template)) for name, written in calls)
            parts.append(Place(tuple(part["path"].split(".")), filters, part[0]))
    return tuple(parts)


def _arguments(name: str, written: str, template: str) -> tuple[str, ...]:
    known = _TEXT | _LIST
    if name not in known:
        raise InputError(f"template {template!r} has a filter {name!r}; there are only "
                         f"{', '.join(known)}")  # fmt: skip
    try:
        arguments = tuple(json.loads(f"[{written}]", strict=False))
    except ValueError as error:
        raise InputError(f"template {template!r}: {written} is not JSON ({error})") from None
    if len(arguments) != known[name][1] or arguments[:1] == ("",):
        raise InputError(f"template {template!r}: the filter {name!r} takes {known[name][1]} "
                         f"arguments, the first not empty; got {list(arguments)}")  # fmt: skip
    return arguments


def render(template: str, fields: Mapping[str, Any], where: str) -> Any:
    """The text of the template, its placeholders filled from `fields`; of a lone one the value.

    where: names the item in messages. InputError for a column that is missing or of another type
    than its place asks for.
    """
    try:
        parts = parse(template)
        if len(parts) == 1 and isinstance(parts[0], Place):
            return _value(parts[0], fields)
        return "".join(p if isinstance(p, str) else _text(p, fields) for p in parts)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def fill(template: str, fields: Mapping[str, str], where: str) -> str:
    """The template with the placeholders of `fields` filled and all others left as they stand."""
    try:
        parts = parse(template)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    filled = ""
    for part in parts:
        if isinstance(part, Place) and part.path[0] not in fields:
            filled += part.source
        else:
            text = part if isinstance(part, str) else _text(part, fields)
            filled += text.replace("{", "{{").replace("}", "}}")
    return filled


def _text(place: Place, fields: Mapping[str, Any]) -> str:
    value = _value(place, fields)
    if isinstance(value, str | int | float):
        return str(value)
    raise InputError(f"{place.source} is {value!r}, where only a text or a number can stand")


def _value(place: Place, fields: Mapping[str, Any]) -> Any:
    value: Any = fields
    for step in place.path:
        if isinstance(value, Mapping) and step in value:
            value = value[step]
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            raise InputError(f"{place.source} needs {step!r}, which is missing; {_there(value)}")
    for name, arguments in place.filters:
        value = _filtered(name, arguments, value, place)
    return value


def _there(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"there are the columns {', '.join(map(str, value))}"
    return f"there are {len(value)} entries" if isinstance(value, list) else f"there is {value!r}"


def _filtered(name: str, arguments: tuple[str, ...], value: Any, place: Place) -> Any:
    if name in _LIST and isinstance(value, list):
        return _LIST[name][0](value, *arguments)
    if name in _TEXT and isinstance(value, list):
        return [_filtered(name, arguments, entry, place) for entry in value]
    if name in _TEXT and isinstance(value, str):
        return _TEXT[name][0](value, *arguments)
    wanted = "a list" if name in _LIST else "a text or a list of texts"
    raise InputError(f"{place.source}: the filter {name!r} works on {wanted}, got {value!r}")
