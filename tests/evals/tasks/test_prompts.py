"""What a model is asked: expected texts are written by hand from the rules, draws drawn again."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tokenizers
from core.errors import InputError
from evals.items import tokenise
from evals.tasks.prompts import Options, questions, render_docs, shots
from evals.tasks.task import Doc, Task
from tokenizers.templates import template

CHAT = tokenizers.load(Path(__file__).parents[2] / "golden" / "chat" / "tokenizer")
BOS = "<bos>"
GEMMA, GEMMA2, CHATML = (template(CHAT, name) for name in ("gemma", "gemma2", "chatml"))

COLOURS = Task(
    name="colours",
    kind="multiple_choice",
    prompt="Q: {q}?\nA:",
    choices="{c}",
    answer="{a}",
    sampler="first",
)
SKY = {"q": "the sky", "c": ["red", "blue"], "a": 1}
GRASS = {"q": "grass", "c": ["green", "pink", "grey"], "a": "0"}
ROSES = {"q": "roses", "c": ["red", "black"], "a": 0}
GAPS = Task(
    name="gaps",
    kind="multiple_choice",
    prompt=('{s|before("_")}{x}', '{s|before("_")}{y}'),
    target='{s|after("_")|strip}',
    labels=("1", "2"),
    answer="{a}",
    sampler="first",
)
GAP = {"s": "Ann met Eve as _ was late. ", "x": "Ann", "y": "Eve", "a": "2"}
LAST = Task(name="last", kind="loglikelihood", prompt="{w}", target=" {t}", sampler="first")
SUMS = Task(name="sums", kind="generate", prompt="Q: {q}\nA:", target="{a}", sampler="first")


def docs(task: Task, *rows: dict[str, Any]) -> list[Doc]:
    return render_docs(task, rows, "rows.jsonl")


def ask(task: Task, row: dict[str, Any], *pool: dict[str, Any], **options: Any):
    """The contexts and continuations of one item after all of the pool, and the warnings."""
    made = Options(num_fewshot=len(pool), **options)
    [question], warnings = questions(task, docs(task, row), docs(task, *pool), made)
    assert question.doc == docs(task, row)[0]
    return question.contexts, question.continuations, warnings


def test_rows_become_items():
    sky, grass = docs(COLOURS, SKY, GRASS)
    assert sky == Doc(0, SKY, ("Q: the sky?\nA:",), ("red", "blue"), gold=1)
    assert (grass.index, grass.gold, grass.choices) == (1, 0, ("green", "pink", "grey"))
    [gap] = docs(GAPS, GAP)
    assert gap == Doc(0, GAP, ("Ann met Eve as Ann", "Ann met Eve as Eve"), gold=1,
                      target="was late.")  # fmt: skip


def test_fields_see_the_fields_before_them():
    task = replace(COLOURS, fields={"n": "{q|capitalize}", "m": "{n}!"}, prompt="{m}{q}")
    [doc] = docs(task, SKY)
    assert doc.prompts == ("The sky!the sky",) and doc.row == SKY


@pytest.mark.parametrize(
    "labels, answer, gold",
    [
        ("{l}", "B", 1),
        ("{l}", "A", 0),
        (("1", "2"), "2", 1),
        (("1", "2"), 2, 1),
        (None, "1", 1),
        (None, 0, 0),
    ],
)
def test_the_right_choice_is_given_by_label_or_by_index(labels, answer, gold):
    task = replace(COLOURS, labels=labels)
    [doc] = docs(task, {**SKY, "l": ["A", "B"], "a": answer})
    assert doc.gold == gold


def test_counted_words_are_those_of_their_own_text():
    task = Task(name="pages", kind="rolling", target='{p|replace(" .", ".")}', counted="{p}")
    [doc, empty] = docs(task, {"p": "So it is ."}, {"p": ""})
    assert (doc.target, doc.counted, empty.target) == ("So it is.", "So it is .", "")


@pytest.mark.parametrize(
    "task, row, message",
    [
        (COLOURS, {"q": "x", "a": 1}, "'c'.*missing"),
        (COLOURS, {**SKY, "c": []}, "no choices"),
        (COLOURS, {**SKY, "c": ["red", ""]}, "empty text"),
        (COLOURS, {**SKY, "c": "red"}, "'red' stands where texts"),
        (COLOURS, {**SKY, "c": ["red", None]}, "None.* stands where texts"),
        (COLOURS, {**SKY, "a": 2}, "answer 2 is none of 0, 1; .*published"),
        (COLOURS, {**SKY, "a": -1}, "answer -1 is none of 0, 1; .*published"),
        (COLOURS, {**SKY, "a": ""}, "answer '' is none of 0, 1; .*published"),
        (replace(COLOURS, labels=("A", "B", "C")), SKY, "2 choices and the labels A, B, C"),
        (GAPS, {**GAP, "a": "3"}, "answer '3' is none of 1, 2"),
        (GAPS, {**GAP, "s": "Ann was late."}, "'_'"),
        (GAPS, {**GAP, "s": "Ann met _"}, "empty text"),
        (SUMS, {"q": "1+1", "a": ""}, "empty text.*published"),
        (SUMS, {"q": "1+1", "a": None}, "None.* stands where texts"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(task, row, message):
    with pytest.raises(InputError, match=rf"^rows\.jsonl item 0.*{message}"):
        docs(task, row)


def test_items_are_counted_from_0():
    with pytest.raises(InputError, match=r"^rows\.jsonl item 2 has no choices; leave it out"):
        docs(COLOURS, SKY, GRASS, {**SKY, "c": []}, ROSES)


def test_without_examples_the_description_stands_before_the_prompt():
    task = replace(COLOURS, description="Name colours.\n\n")
    contexts, continuations, warnings = ask(task, SKY)
    assert contexts == ("Name colours.\n\nQ: the sky?\nA:",) * 2
    assert continuations == (" red", " blue") and warnings == []
    assert ask(replace(task, delimiter="\n"), SKY)[1] == ("\nred", "\nblue")
    assert ask(task, SKY, system="Think.")[0][0] == "Think.\n\nName colours.\n\nQ: the sky?\nA:"
    assert ask(task, SKY, system="Think. ")[0][0].startswith("Think. Name colours.\n\nQ")
    assert ask(COLOURS, SKY, system="Think.")[0][0] == "Think.Q: the sky?\nA:"


def test_examples_stand_between_description_and_prompt():
    task = replace(COLOURS, description="Name colours.\n\n")
    assert ask(task, SKY, GRASS, ROSES)[0][0] == (
        "Name colours.\n\nQ: grass?\nA: green\n\nQ: roses?\nA: red\n\nQ: the sky?\nA:"
    )
    task = replace(COLOURS, delimiter="->", shot_delimiter="\n")
    assert ask(task, SKY, GRASS)[0][0] == "Q: grass?\nA:->green\nQ: the sky?\nA:"


def test_several_prompts_share_a_continuation():
    contexts, continuations, _ = ask(GAPS, GAP, {**GAP, "s": "I saw _ run", "a": "1"})
    assert contexts == (
        "I saw Ann run\n\nAnn met Eve as Ann",
        "I saw Ann run\n\nAnn met Eve as Eve",
    )
    assert continuations == (" was late.",) * 2


def test_a_target_is_asked_for_as_it_stands():
    row, other = {"w": "So it", "t": "is"}, {"w": "Now", "t": "then"}
    # The examples' delimiter comes on top of the blank that the target has.
    assert ask(LAST, row, other) == (("Now  then\n\nSo it",), (" is",), [])
    assert ask(LAST, {"w": "", "t": "is"})[:2] == (("",), (" is",))


def test_a_generation_has_a_context_and_a_rolling_text_none():
    row, other = {"q": "1+1", "a": "so #### 2"}, {"q": "2+2", "a": "so #### 4"}
    assert ask(SUMS, row, other)[:2] == (("Q: 2+2\nA: so #### 4\n\nQ: 1+1\nA:",), ())
    pages = Task(name="pages", kind="rolling", target="{p}")
    [question], _ = questions(pages, docs(pages, {"p": "So."}), [], Options(num_fewshot=5))
    assert (question.contexts, question.continuations) == ((), ("So.",))


@pytest.mark.parametrize(
    "own, asked, used", [(None, None, 0), (None, 3, 3), (0, None, 0), (0, 3, 0), (5, None, 5),
                         (5, 3, 3), (5, 0, 0)]
)  # fmt: skip
def test_a_task_that_fixes_no_examples_keeps_to_it(own, asked, used):
    assert shots(replace(COLOURS, shots=own), Options(asked)) == used


POOL = [{"q": str(i), "c": ["no", "yes"], "a": i % 2} for i in range(12)]


def drawn(task: Task, rows: list[dict[str, Any]], pool: list[dict[str, Any]], options: Options):
    """The rows of the examples before each item, read off the contexts."""
    found, _ = questions(task, docs(task, *rows), docs(task, *pool), options)
    parts = [question.contexts[0].split("\n\n")[:-1] for question in found]
    return [[int(part.removeprefix("Q: ").split("?")[0]) for part in some] for some in parts]


@pytest.mark.parametrize("seed", [1234, 7])
def test_examples_are_drawn_by_one_generator_item_after_item(seed):
    task, rng = replace(COLOURS, sampler="random"), random.Random(seed)
    expected = [rng.sample(range(12), 3) for _ in range(8)]
    found = drawn(task, [SKY] * 8, POOL, Options(3, seed))
    assert found == expected
    assert drawn(task, [SKY] * 5, POOL, Options(3, seed)) == expected[:5]
    assert Options().seed == 1234


def test_an_item_is_not_its_own_example():
    task, rng = replace(COLOURS, sampler="random_but_self"), random.Random(1234)
    expected = [[n for n in rng.sample(range(12), 4) if n != i][:3] for i in range(12)]
    assert drawn(task, POOL, POOL, Options(3)) == expected
    rng = random.Random(1234)
    assert [rng.sample(range(12), 4)[:3] for _ in range(12)] != expected


def test_copies_of_an_item_are_replaced_by_another_draw():
    task, rng, again = replace(COLOURS, sampler="random_but_self"), random.Random(1234), 0
    pool, expected = [POOL[n] for n in (0, 0, 0, 0, 1, 2, 3)], []
    numbers = [int(row["q"]) for row in pool]
    for _ in range(20):
        few = [n for n in rng.sample(numbers, 3) if n != 0]
        if len(few) < 2:
            few, again = rng.sample([1, 2, 3], 2), again + 1
        expected.append(few[:2])
    assert drawn(task, [POOL[0]] * 20, pool, Options(2)) == expected and again > 3


def test_the_first_examples_are_the_same_for_every_item():
    assert drawn(COLOURS, [SKY, GRASS], POOL, Options(2)) == [[0, 1], [0, 1]]
    assert drawn(COLOURS, [SKY, GRASS], POOL, Options(0)) == [[], []]


@pytest.mark.parametrize("sampler, fewest", [("random", 3), ("random_but_self", 4), ("first", 3)])
def test_too_few_examples_are_refused(sampler, fewest):
    task = replace(COLOURS, sampler=sampler)
    assert len(drawn(task, [SKY], POOL[:fewest], Options(3))[0]) == 3
    with pytest.raises(InputError, match=f"task colours: 3 .* there are {fewest - 1}; ask for few"):
        drawn(task, [SKY], POOL[: fewest - 1], Options(3))
    with pytest.raises(InputError, match="all but 1 examples are item 0 itself"):
        drawn(replace(task, sampler="random_but_self"), [POOL[0]], [POOL[0]] * 3 + [POOL[1]],
              Options(2))  # fmt: skip


@pytest.mark.parametrize(
    "prompt, prefix, context",
    [
        # Whitespace that is there joins prompt and prefix, and the delimiter what has none.
        ("Q: {q}?", "It is", "Q: grass? It is green\n\nQ: the sky? It is"),
        ("Q: {q}?\n", "It is", "Q: grass?\nIt is green\n\nQ: the sky?\nIt is"),
        ("Q: {q}?", "\nIt is", "Q: grass?\nIt is green\n\nQ: the sky?\nIt is"),
        ("Q: {q}?", "It is ", "Q: grass? It is green\n\nQ: the sky? It is "),
    ],
)
def test_a_prefix_begins_every_answer(prompt, prefix, context):
    task = replace(COLOURS, prompt=prompt, prefix=prefix)
    contexts, continuations, warnings = ask(task, SKY, GRASS)
    assert contexts == (context,) * 2 and continuations == (" red", " blue")
    assert len(warnings) == (prefix == "It is ") and all("'It is '" in w for w in warnings)


def test_a_conversation_has_the_description_as_system_message_and_no_delimiter():
    task = replace(COLOURS, description="Name colours.\n\n")
    head = f"{BOS}<start_of_turn>user\nName colours.\n\n\n\n"
    tail = "Q: the sky?\nA:<end_of_turn>\n<start_of_turn>model\n"
    contexts, continuations, warnings = ask(task, SKY, template=GEMMA)
    assert contexts == (head + tail,) * 2 and continuations == ("red", "blue") and warnings == []
    assert ask(task, SKY, GRASS, template=GEMMA)[0][0] == (
        head + "Q: grass?\nA:<end_of_turn>\n<start_of_turn>model\ngreen<end_of_turn>\n"
        "<start_of_turn>user\n" + tail
    )
    one_turn = ask(task, SKY, GRASS, template=GEMMA, multiturn=False)
    assert one_turn[0][0] == head + "Q: grass?\nA: green\n\n" + tail
    assert ask(COLOURS, SKY, template=GEMMA, system="Think.")[0][0] == (
        f"{BOS}<start_of_turn>user\nThink.\n\n" + tail
    )
    assert ask(task, SKY, template=CHATML, system="Think.")[0][0] == (
        "<|im_start|>system\nThink.\n\nName colours.\n\n<|im_end|>\n"
        "<|im_start|>user\nQ: the sky?\nA:<|im_end|>\n<|im_start|>assistant\n"
    )


def test_other_kinds_in_a_conversation():
    contexts, continuations, _ = ask(GAPS, GAP, template=CHATML)
    turn = "<|im_start|>user\nAnn met Eve as {}<|im_end|>\n<|im_start|>assistant\n"
    assert contexts == (turn.format("Ann"), turn.format("Eve"))
    assert continuations == ("was late.",) * 2
    row, other = {"w": "So it", "t": "is"}, {"w": "Now", "t": "then"}
    contexts, continuations, _ = ask(LAST, row, other, template=CHATML)
    assert "<|im_start|>assistant\n then<|im_end|>" in contexts[0] and continuations == (" is",)


@pytest.mark.parametrize(
    "form, prefix, end, continuation",
    [
        (CHATML, "It is", "assistant\nIt is", " red"),
        (CHATML, "It is ", "assistant\nIt is ", "red"),
        (GEMMA, "It is", "model\nIt is", " red"),
        (GEMMA, "It is ", "model\nIt is", "red"),  # the template trims: the blank is lost
    ],
)
@pytest.mark.parametrize("multiturn", [True, False])
def test_a_prefix_continues_the_assistants_turn(form, prefix, end, continuation, multiturn):
    task = replace(COLOURS, prefix=prefix)
    contexts, continuations, warnings = ask(task, SKY, GRASS, template=form, multiturn=multiturn)
    assert contexts[0].endswith(end) and continuations[0] == continuation
    assert ("It is green\n\nQ: the sky?\nA:<" in contexts[0]) != multiturn
    assert (f"{end.rstrip()} green<" in contexts[0]) == multiturn
    assert len(warnings) == (prefix == "It is ")


def test_a_template_without_system_role_loses_the_description_loudly():
    task = replace(COLOURS, description="Name colours.\n\n")
    for options in ({}, {"system": "Think."}):
        contexts, _, [warning] = ask(task, SKY, template=GEMMA2, **options)
        assert contexts[0].startswith(f"{BOS}<start_of_turn>user\nQ: the sky?")
        assert "task colours" in warning and "gemma2 has no system role" in warning
    assert ask(COLOURS, SKY, template=GEMMA2)[2] == []


def test_a_conversation_begins_with_one_bos():
    contexts, continuations, _ = ask(COLOURS, SKY, template=GEMMA)
    for add_bos in (None, True, False):
        red, blue = tokenise(CHAT, contexts[0], continuations, add_bos)
        assert red.ids.tolist().count(CHAT.bos) == 1 and red.ids[0] == CHAT.bos
        # The newline of the assistant's header is whitespace, so it belongs to what is predicted.
        assert CHAT.decode(blue.ids[blue.start :]) == "\nblue"
