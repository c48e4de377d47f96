"""Templates: placeholders, every filter against strings worked out by hand, what is refused."""

import pytest

from core.errors import InputError
from evals.tasks.template import fill, parse, render

ROW = {
    "question": " Why? ",
    "n": 7,
    "choices": {"text": ["a", "b"], "label": ["1", "2"]},
    "list": ["x_y", "z"],
    "none": None,
}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Question: {question}\nAnswer:", "Question:  Why? \nAnswer:"),
        ("{question|strip}{n}", "Why?7"),
        ("{n}", 7),
        ("{choices.text}", ["a", "b"]),
        ("{ choices.text.1 }", "b"),
        ("{list|words}", ["x y", "z"]),
        ("{{n}} {{{n}}}", "{n} {7}"),
        ("no placeholder", "no placeholder"),
        ("", ""),
        (r'{list.0|replace("_", "}\n\"")}', 'x}\n"y'),
        ('{list.0 | before("_") | capitalize}.', "X."),
    ],
)
def test_render(template, expected):
    value = render(template, ROW, "row 1")
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("filters", "text", "expected"),
    [
        ("strip", " \ta b\n", "a b"),
        ("capitalize", "mcDonald and HE", "Mcdonald and he"),
        ("capitalize", "", ""),
        ("words", "high_school_biology", "high school biology"),
        ('replace("\\n\\n", "\\n")', "a\n\n\nb", "a\n\nb"),
        ('before("_")', "the _ of _.", "the "),
        ('after("_")', "the _ of _.", " of _."),
        ('before_last(" ")', "a b  c", "a b "),
        ('after_last(" ")', "a b  c", "c"),
        ('before_last(" ")', "word", ""),
        ('after_last(" ")', "word", "word"),
        ('after_last(" ")', "ends in a blank ", ""),
        ("hellaswag", " Cut: [header] How to [title] Cook [step] it ", "Cut: How to. Cook it"),
        ("hellaswag", "a   b [x]", "a  b "),
        ("facts", "9*6= and 12*3", "<MUL_6_9_54>= and 12*3"),
    ],
)
def test_filters(filters, text, expected):
    assert render(f"{{t|{filters}}}", {"t": text}, "row 1") == expected
    assert render(f"{{t|{filters}}}", {"t": [text, text]}, "row 1") == [expected] * 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the boys ' dogs", "the boys' dogs"),
        ("a 1 @-@ 2 @,@ 000 @.@ 5 b", "a 1-2,000.5 b"),
        (
            "one : two ; three . Four ! Five ? six , end .",
            "one: two; three. Four! Five? six, end .",
        ),
        ("x ( a b ) [ c ] { d } \" e f \" ' g ' y", "x (a b) [c] {d} \"e f\" 'g' y"),
        (" = = = Title = = = \n text", " === Title ===\ntext"),
        (" = = = = Deep = = = = \n", " ==== Deep ====\n"),
        ("5 ° C at N 3", "5°C at 1 3"),
        ("the town 's", "the town's"),
        ("/' 7/", "/'[0-9]/"),
    ],
)
def test_wikitext(text, expected):
    assert render("{t|wikitext}", {"t": text}, "page") == expected


def test_letters():
    row = {"c": ["iron", "gold", "tin"]}
    assert render("{c|letters}", row, "row") == ["A", "B", "C"]
    assert render("{c|lettered}\nAnswer:", row, "row") == "A. iron\nB. gold\nC. tin\nAnswer:"
    with pytest.raises(InputError, match="27 choices are more than there are letters"):
        render("{c|letters}", {"c": ["x"] * 27}, "row")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{missing}", r"row 3: .*'missing'.* columns question, n, choices, list, none"),
        ("{choices.texts}", "'texts', which is missing; there are the columns text, label"),
        ("{choices.text.2}", "'2', which is missing; there are 2 entries"),
        ("{n.x}", "'x', which is missing; there is 7"),
        ("{n|strip}", "'strip' works on a text or a list of texts, got 7"),
        ("{n|letters}", "'letters' works on a list, got 7"),
        ("a {list}", "only a text or a number"),
        ("a {none}", "only a text or a number"),
        ('{question|before("_")}', r"row 3: there is no '_' in ' Why\? '"),
        ('{question|after("_")}', r"row 3: there is no '_' in ' Why\? '"),
        ("{question|stirp}", "row 3: .*filter 'stirp'; there are only strip, "),
        ("{question|before}", "takes 1 arguments"),
        ('{question|strip("x")}', "takes 0 arguments"),
        ('{question|before("")}', "the first not empty"),
        (r'{question|before("\q")}', "is not JSON"),
        ("{question", r"row 3: .* cannot be read from '\{question' on"),
        ("lone } brace", "cannot be read from '} brace' on"),
        ("{two words}", "cannot be read"),
        ("{question.__class__()}", "cannot be read"),
    ],
)
def test_refused(template, message):
    with pytest.raises(InputError, match=message):
        render(template, ROW, "row 3")


def test_attributes_are_out_of_reach():
    with pytest.raises(InputError, match="'__class__', which is missing"):
        render("{question.__class__}", ROW, "row")


def test_fill_leaves_the_columns():
    filled = fill("About {member|words}: {{x}} {question|strip}", {"member": "a_b"}, "file")
    assert filled == "About a b: {{x}} {question|strip}"
    assert parse(fill("{member}", {"member": "{n}"}, "file")) == ("{", "n", "}")
    with pytest.raises(InputError, match="file: template"):
        fill("{", {"member": "a"}, "file")
