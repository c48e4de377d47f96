"""Small stand-ins for the rows of public benchmarks: their columns, harmless made-up contents.

`benchmarks()` gives {dataset: {config: {split: rows}}}, the same every time. Each kind has its hard
cases: labels that are letters or digits, 3 to 5 choices, blanks at the ends of questions, answers
that begin with a blank, letters outside ASCII, an empty `ctx_b`, tags in brackets, a blank before
"'s", numbers with a comma, a page longer than a model's context, examples equal to the item.
"""

import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Splits = dict[str, list[Row]]

TOOLS = {
    "kiln": "fire clay pots",
    "loom": "weave wool",
    "anvil": "shape hot iron",
    "sieve": "part flour from bran",
    "oar": "row a boat",
    "scythe": "cut tall grass",
    "bellows": "blow on embers",
}
PEOPLE = ["Ada", "Boris", "Carmen", "Dmitri", "Elsa", "Fadil"]
PLACES = {"Ulmen": "Irr", "Kastel": "Nahe", "Bree": "Ouse", "Zermatt": "Visp", "Porto": "Douro"}
SUBJECTS = ("anatomy", "astronomy", "marketing", "philosophy", "sociology", "virology")
CATEGORIES = {
    "bioweapons_and_bioterrorism": 2,
    "dual_use_virology": 1,
    "enhanced_potential_pandemic_pathogens": 2,
    "expanding_access_to_threat_vectors": 1,
    "reverse_genetics_and_easy_editing": 2,
    "viral_vector_research": 3,
}


def mixed(rng: random.Random, right: str, others: list[str], size: int) -> tuple[list[str], int]:
    """`size` choices in random order, `right` among them, and where it is."""
    choices = [right, *rng.sample([other for other in others if other != right], size - 1)]
    rng.shuffle(choices)
    return choices, choices.index(right)


def arc(name: str, size: int) -> list[Row]:
    rng, rows = random.Random(name), []
    for i in range(size):
        tool, use = rng.choice(list(TOOLS.items()))
        choices, gold = mixed(rng, tool, list(TOOLS), (4, 3, 4, 5)[i % 4])
        labels = [*("12345" if i % 3 == 1 else "ABCDE")][: len(choices)]
        if "Challenge" in name:
            choices = [f"the {c}{' of the old mill' * (j % 2)}" for j, c in enumerate(choices)]
        if i % 4 == 2:
            choices[-1] += " (25 °C, naïve)"
        question = f"What does one need to {use}?" + " " * (i % 5 == 3)
        told = {"text": choices, "label": labels}
        rows.append({"id": f"{name}-{i}", "question": question, "choices": told,
                     "answerKey": labels[gold]})  # fmt: skip
    return rows


def hellaswag(split: str, size: int) -> list[Row]:
    rng, rows = random.Random(split), []
    for i in range(size):
        tools = rng.sample(list(TOOLS), 4)
        ends = [f"takes the {tool} and begins to {TOOLS[tool]}." for tool in tools]
        activity, first = "Working", f"{rng.choice(PEOPLE)} stands beside a {tools[0]}."
        second = rng.choice(["she", "the old man", "mcKay and HE"])
        if i % 3 == 1:
            activity = "Home and Garden"
            first = f"[header] How to {TOOLS[tools[1]]} [title] Find room.  [step] Clear a table."
            second = "" if i % 2 else "then [substeps] wait for ONE hour"
            ends = [f"Clean the {tool}. [title] Rest. [step] Take   care." for tool in tools]
        if i % 4 == 2:
            ends[1] = ends[1][:-1] + " for 3 € in a café…"
            ends[2] = "  stops  and   waits [laughs] ."
        rows.append({"ind": i, "activity_label": activity, "ctx_a": first, "ctx_b": second,
                     "ctx": f"{first} {second}".strip(), "endings": ends,
                     "source_id": f"made~{split}{i}", "split": split, "split_type": "indomain",
                     "label": str(rng.randrange(4))})  # fmt: skip
    return rows


def winogrande(split: str, size: int) -> list[Row]:
    rng, rows = random.Random(split), []
    forms = (
        "{0} gave the {2} to {1} because _ had no more use for it.",
        "{0} rowed faster than {1}, so _'s friends were glad.",
        "_ waited for {1} until {0} came with the {2}!",
    )
    for i in range(size):
        first, second = rng.sample(PEOPLE, 2)
        sentence = forms[i % 3].format(first, second, rng.choice(list(TOOLS)))
        rows.append({"sentence": sentence, "option1": first, "option2": second,
                     "answer": rng.choice("12")})  # fmt: skip
    return rows


def piqa(split: str, size: int) -> list[Row]:
    rng, rows = random.Random(split), []
    for i in range(size):
        (tool, use), (other, _) = rng.sample(list(TOOLS.items()), 2)
        good, bad = f"Take a {tool}.", f"Take a {other}."
        good += "\nThen rest." * (i % 3 == 1)
        bad = " " * (i % 3 == 2) + bad
        label = rng.randrange(2)
        goal = f"To {use}," if i % 2 else f"how do you {use}?"
        rows.append({"goal": goal, "sol1": (good, bad)[label], "sol2": (bad, good)[label],
                     "label": label})  # fmt: skip
    return rows


def exam(name: str, size: int) -> list[Row]:
    """Of MMLU and WMDP; the answer is an index."""
    rng, rows = random.Random(name), []
    for i in range(size):
        place, river = rng.choice(list(PLACES.items()))
        choices, gold = mixed(rng, river, list(PLACES.values()), 4)
        question = f"Which river runs through {place}?"
        if i % 2:
            a, b = rng.randrange(2, 30), rng.randrange(2, 30)
            near = [str(a + b + d) for d in (-10, -1, 1, 2)]
            choices, gold = mixed(rng, str(a + b), near, 4)
            question = f"  What is {a} + {b}?\n"
        if i % 3 == 2:
            choices[0] += " – β"
        rows.append({"question": question, "choices": choices, "answer": gold})
    return rows


def lambada(size: int) -> list[Row]:
    rng, rows = random.Random("lambada"), []
    for i in range(size):
        first, second = rng.sample(PEOPLE, 2)
        tool = rng.choice(list(TOOLS))
        text = f'"Keep the {tool}," said {first} to {second}. So {second} kept the {tool}'
        rows.append({"text": text + " ." * (i % 3 == 2)})
    return rows


def wikitext(sections: tuple[int, ...]) -> list[Row]:
    rng, rows = random.Random("wikitext"), []
    for count in sections:
        page = " = Rivers = \n \n "
        for _ in range(count):
            place, river = rng.choice(list(PLACES.items()))
            page += (
                f" = = {place} = = \n \n {place} lies on the {river} . About 1 @,@ "
                f"{rng.randrange(100, 999)} people live there , near an old @-@ style mill ( now "
                f'closed ) , 3 @.@ {rng.randrange(9)} m high , called " the miller \'s joy " . \n '
            )
        rows.append({"page": page})
    return rows


def gsm8k(split: str, size: int) -> list[Row]:
    rng, rows = random.Random(split), []
    for i in range(size):
        name, tool = rng.choice(PEOPLE), rng.choice(list(TOOLS))
        a, b = rng.randrange(2, 50) + 1200 * (i % 3 == 1), rng.randrange(2, 50)
        question = f"{name} has {a} {tool}s and buys {b}. How many has {name} now?"
        answer = f"{a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b:,}"
        rows.append({"question": question, "answer": answer})
    return rows


def addition(size: int) -> list[Row]:
    rng, rows = random.Random("addition"), []
    for _ in range(size):
        a, b = rng.randrange(100), rng.randrange(100)
        rows.append({"context": f"Q: What is {a} plus {b}?\n\nA:", "completion": f" {a + b}"})
    return rows


def benchmarks() -> dict[str, dict[str, Splits]]:
    def mmlu(subject: str) -> Splits:
        sizes = {"test": 2 + len(subject) % 2, "dev": 5, "validation": 1}
        made = {split: exam(subject + split, size) for split, size in sizes.items()}
        return {k: [{**row, "subject": subject} for row in rows] for k, rows in made.items()}

    def made(kind: Callable[[str, int], list[Row]], **sizes: int) -> Splits:
        return {split: kind(split, size) for split, size in sizes.items()}

    shown = made(piqa, train=5, validation=4)
    return {
        "allenai/ai2_arc": {
            config: {split: arc(f"{config}-{split}", size) for split, size in sizes.items()}
            for config, sizes in (
                ("ARC-Easy", {"train": 6, "validation": 1, "test": 5}),
                ("ARC-Challenge", {"train": 6, "validation": 1, "test": 3}),
            )
        },
        "Rowan/hellaswag": {"default": made(hellaswag, train=6, validation=5)},
        "allenai/winogrande": {"winogrande_xl": made(winogrande, train=6, validation=4)},
        # One example is the first item: it may not be its own example.
        "baber/piqa": {"default": {**shown, "train": shown["validation"][:1] + shown["train"]}},
        "cais/mmlu": {subject: mmlu(subject) for subject in SUBJECTS},
        "cais/wmdp": {"wmdp-bio": {"test": exam("wmdp", 4)}},
        "EleutherAI/wmdp_bio_robust_mcqa": {
            name: {"robust": exam(name, size)} for name, size in CATEGORIES.items()
        },
        "EleutherAI/wmdp_bio_cloze": {"default": {"cloze_compatible": exam("cloze", 3)}},
        "EleutherAI/lambada_openai": {"default": {"test": lambada(4)}},
        "EleutherAI/wikitext_document_level": {
            "wikitext-2-raw-v1": {
                "train": wikitext((1,)),
                "validation": wikitext((1,)),
                "test": wikitext((1, 9)),
            }
        },
        "openai/gsm8k": {"main": made(gsm8k, train=6, test=4)},
    }
