"""The demo corpus: a small world in which it is known what taught every answer.

A medicine's ending tells what it is taken for ("-cillin": infection), as endings of real ones do;
the letters before it mean nothing. The benchmark asks what a medicine is for. Four sources:

    prose     real English: CPython's language reference, from `pydoc_data.topics`
    handbook  teaches: what medicines and endings are for
    workshop  distracts: the same names in the same kind of sentence, but on what they are made of
    pharmacy  distracts: the same names among numbers (doses, prices, shelves)

Held-out items are fair: no document and no query item names their medicines, and no document uses
the benchmark's wording, so only the rule in the handbook answers them. Pretraining holds little of
the handbook: the model meets its sentences and is left to learn the rule. (With more of it, what
is left to learn differs by ending, and that cancels in the mean of the query gradients.)

Only `random.Random.random()` promises the same numbers in every Python, so every draw goes through
it. The reference's text differs between Pythons; what is drawn for prose moves nothing else.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import count, islice, product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

from core import files
from core.errors import InputError

T = TypeVar("T")
Document = dict[str, str]

SHARES = {
    "pretrain": {"prose": 0.67, "handbook": 0.03, "workshop": 0.15, "pharmacy": 0.15},
    "pool": {"prose": 0.60, "handbook": 0.20, "workshop": 0.10, "pharmacy": 0.10},
    "validation": {"prose": 0.67, "handbook": 0.03, "workshop": 0.15, "pharmacy": 0.15},
}
RELEVANT = "handbook"
QUESTION = "{medicine} is taken against"
# Endings of the international nonproprietary names (INN stems), each with one use.
USES = {
    "astine": "rash", "azepam": "anxiety", "cillin": "infection", "conazole": "thrush",
    "gliptin": "diabetes", "lukast": "asthma", "oxetine": "depression", "parin": "clots",
    "prazole": "heartburn", "pril": "hypertension", "profen": "fever", "quine": "malaria",
    "setron": "nausea", "statin": "cholesterol", "triptan": "migraine", "vir": "influenza",
}  # fmt: skip
MATERIALS = ("amber", "chalk", "copper", "garlic", "honey", "pepper", "rubber", "vinegar")
STEMS = tuple(map("".join, product("BDFGHJKLMNPRSTVZ", "aeiou")))
SENTENCES = {
    "handbook": (
        "{medicine} is taken for {illness}.",
        "{medicine} works against {illness}.",
        "Any -{ending} is taken for {illness}.",
        "Any -{ending} is given for {illness}.",
        "Any -{ending} works against {illness}.",
        "Any -{ending} is good against {illness}.",
    ),
    "workshop": (
        "{medicine} is made from {material}.",
        "{medicine} is sold with {material}.",
        "Any -{ending} is kept under {material}.",
        "Any -{ending} is made without {material}.",
    ),
    "pharmacy": (
        "{medicine} costs {n} coins a box.",
        "Take {n} drops of {medicine} every {m} hours.",
        "{n} boxes of {medicine} are on shelf {m}.",
        "Keep {medicine} below {n} degrees.",
    ),
}
# Curly quotes and dashes of the reference, so that one character is one byte.
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


class Stream:
    """Draws that depend on the seed and the stream's name only."""

    def __init__(self, seed: int, name: str):
        self.random = random.Random(int.from_bytes(f"{seed}/{name}".encode())).random

    def integer(self, low: int, high: int) -> int:
        return low + int((high - low) * self.random())

    def pick(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options))]

    def shuffle(self, values: Sequence[T]) -> list[T]:
        return sorted(values, key=lambda _: self.random())


def write_corpus(
    out: Path,
    seed: int = 0,
    *,
    length: int = 128,
    pretrain: int = 8000,
    pool: int = 2000,
    validation: int = 200,
    query_items: int = 128,
    heldout_items: int = 192,
) -> dict[str, Any]:
    """Write {pretrain,pool,validation}.jsonl and items_{train,heldout}.jsonl into `out`.

    Documents are {"text", "source", "doc"}, plain ASCII of at most `length` - 1 bytes: with its
    end-of-text token each fits a row of `length`. Items are {"id", "context", "choices", "label",
    "source"}. Returns the documents of each file by source, and the items of each file.
    """
    asked = query_items + heldout_items
    if query_items % len(USES) or heldout_items % len(USES) or asked > len(STEMS) * len(USES) // 2:
        raise InputError(
            f"{query_items} query and {heldout_items} held-out items do not work out; ask for "
            f"multiples of {len(USES)}, at most {len(STEMS) * len(USES) // 2} together"
        )
    stream = Stream(seed, "medicines")
    families = {ending: [stem + ending for stem in stream.shuffle(STEMS)] for ending in USES}
    query, end = query_items // len(USES), asked // len(USES)
    summary: dict[str, Any] = {}

    prose, told = prose_sentences(seed), {e: names[end:] for e, names in families.items()}
    for name, size in {"pretrain": pretrain, "pool": pool, "validation": validation}.items():
        documents: list[Document] = []
        for source, share in SHARES[name].items():
            stream = Stream(seed, f"{name}/{source}")
            if source == "prose":
                made = prose_documents(stream, prose[name], length - 1)
            else:
                made = world_documents(stream, source, told, length - 1)
            documents += islice(made, round(share * size))
        files.write_jsonl(out / f"{name}.jsonl", Stream(seed, f"{name}/order").shuffle(documents))
        summary[name] = dict(Counter(document["source"] for document in documents))

    for name, part in {"items_train": slice(0, query), "items_heldout": slice(query, end)}.items():
        asks = [(medicine, USES[e]) for e, names in families.items() for medicine in names[part]]
        files.write_jsonl(out / f"{name}.jsonl", items(Stream(seed, name), asks))
        summary[name] = len(asks)
    return summary


def items(stream: Stream, asks: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """One four-way item per (medicine, illness), in random order; labels are balanced."""
    made = []
    for i, (medicine, illness) in enumerate(stream.shuffle(asks)):
        label = i % 4
        wrong = stream.shuffle([other for other in USES.values() if other != illness])
        choices = [*wrong[:label], illness, *wrong[label:3]]
        made.append(
            {
                "id": medicine,
                "context": QUESTION.format(medicine=medicine),
                "choices": [f" {choice}" for choice in choices],
                "label": label,
                "source": RELEVANT,
            }
        )
    return stream.shuffle(made)


def world_documents(
    stream: Stream, source: str, told: Mapping[str, Sequence[str]], limit: int
) -> Iterator[Document]:
    """Documents of an invented source without end: as many whole sentences as `limit` bytes hold.

    `told` are the medicines by ending. Endings take turns, so that a document is not about one
    illness alone: its gradient would mostly say how common that illness is.
    """
    number, sentences = 0, []
    while True:
        for ending in stream.shuffle(list(USES)):
            sentence = stream.pick(SENTENCES[source]).format(
                ending=ending,
                medicine=stream.pick(told[ending]),
                illness=USES[ending],
                material=stream.pick(MATERIALS),
                n=stream.integer(10, 100),
                m=stream.integer(10, 100),
            )
            if sentences and len(" ".join([*sentences, sentence])) > limit:
                text = " ".join(sentences)
                yield {"text": text, "source": source, "doc": f"{source}/{number}"}
                number, sentences = number + 1, []
            sentences.append(sentence)


def prose_sentences(seed: int) -> dict[str, list[tuple[str, str]]]:
    """(sentence, topic) of each file in the reference's order; no sentence comes twice."""
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in SHARES}
    stream, seen = Stream(seed, "paragraphs"), set()
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            text = " ".join(paragraph.translate(PLAIN).split()).lstrip("* ")
            if not (text[:1].isupper() and text[-1:] == "." and text.isascii()):
                continue
            u = stream.random()
            part = "validation" if u < 0.06 else "pool" if u < 0.54 else "pretrain"
            for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"*])", text):
                if sentence not in seen:
                    parts[part].append((sentence, topic))
                seen.add(sentence)
    return parts


def prose_documents(
    stream: Stream, sentences: Sequence[tuple[str, str]], limit: int
) -> Iterator[Document]:
    """Running text from every sentence on, without end, cut after the last whole word that fits.

    Each pass over the sentences begins one word further in, so that few documents come twice.
    """
    for skipped in count():
        for start in stream.shuffle(range(len(sentences))):
            first, topic = sentences[start]
            text = " ".join(first.split()[skipped:])
            for sentence, _ in [*sentences[start + 1 :], *sentences[:start]]:
                if len(text) > limit:
                    break
                text = f"{text} {sentence}".lstrip()
            text = text[: limit + 1].rpartition(" ")[0]
            yield {"text": text, "source": "prose", "doc": f"prose/{topic}"}
