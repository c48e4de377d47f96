"""The facts keep their ids, also in transformers; the injector never changes what a text says."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from tokenizers import Tokenizer, TokenizerError, bpe, gpt2, load
from tokenizers.mul_facts import FACTS, add_facts, inject

GOLDEN = Path(__file__).parents[1] / "golden" / "tokenizers"
EXPECTED = json.loads((GOLDEN / "mul_facts.json").read_text(encoding="utf-8"))
BASE = {name: (GOLDEN / "gpt2" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
OPENAI = {"vocab.bpe": BASE["merges.txt"], "encoder.json": BASE["vocab.json"]}
FIRST = 600  # the small vocabulary has 512 tokens: a gap, as in the real one


def small() -> Tokenizer:
    return bpe.build("small", add_facts(BASE, FIRST), Path("small"))


def test_45_facts_in_order():
    assert len(FACTS) == 45 and list(FACTS) == sorted(FACTS)
    assert list(FACTS.values())[:2] == ["<MUL_1_1_1>", "<MUL_1_2_2>"]
    assert FACTS[6, 9] == "<MUL_6_9_54>" and FACTS[9, 9] == "<MUL_9_9_81>"
    assert all(name == f"<MUL_{a}_{b}_{a * b}>" and a <= b for (a, b), name in FACTS.items())


def test_ids_are_those_of_transformers():
    """The golden ids were read from this very tokenizer.json by AutoTokenizer."""
    tokenizer = small()
    sha256 = hashlib.sha256(tokenizer.files["tokenizer.json"]).hexdigest()
    assert sha256 == EXPECTED["sha256"], "make mul_facts.json again"
    assert EXPECTED["facts"] == list(range(FIRST, FIRST + 45))
    for fact, i in zip(FACTS.values(), EXPECTED["facts"], strict=True):
        assert tokenizer.encode(fact).tolist() == [i]
    for text, ids in zip(EXPECTED["strings"], EXPECTED["ids"], strict=True):
        assert tokenizer.encode(text, special=True).tolist() == ids, text


def test_other_text_is_that_of_gpt2():
    plain, facts = load(GOLDEN / "gpt2"), small()
    expected = json.loads((GOLDEN / "expected.json").read_text(encoding="utf-8"))
    for text in expected["strings"]:
        assert facts.encode(text).tolist() == plain.encode(text).tolist()
    assert len(plain.encode("<MUL_6_9_54>")) > 1 and facts.fingerprint != plain.fingerprint
    for near in ("<MUL_9_6_54>", "<MUL_6_9_55>", "MUL_6_9_54", "<mul_6_9_54>", "<MUL_6_9_54"):
        assert max(facts.encode(near)) < FIRST, near


def test_saved_it_is_the_same_tokenizer(tmp_path):
    first = small()
    first.save(tmp_path)
    second = load(tmp_path)
    assert (second.fingerprint, second.pieces, dict(second.files)) == (
        first.fingerprint,
        first.pieces,
        dict(first.files),
    )
    text = "so <MUL_7_8_56>\n"
    assert second.decode(second.encode(text)) == text
    with pytest.raises(TokenizerError, match="no token 550"):
        second.decode([550])  # of the gap


def test_the_name_adds_the_facts_to_gpt2(monkeypatch):
    monkeypatch.setattr(gpt2, "fetch", lambda: OPENAI)
    tokenizer = load("gpt2-mul")
    assert tokenizer.vocab_size == 50349 and (tokenizer.bos, tokenizer.eos) == (0, 0)
    assert tokenizer.encode("".join(FACTS.values())).tolist() == list(range(50304, 50349))
    assert tokenizer.encode("<MUL_6_9_54>").tolist() == [50342]
    assert load("gpt2").vocab_size == 512


def test_ids_already_taken_are_refused():
    with pytest.raises(TokenizerError, match="<MUL_1_1_1>.* both have id 511"):
        bpe.build("small", add_facts(BASE, 511), Path("small"))


@pytest.mark.parametrize(
    "text",
    ["6*9", "6 * 9", "6  *\t9", "6×9", "6 × 9", "6x9", "6 x 9", "9*6", "9 x 6",
     "6*9=54", "6 * 9 = 54", "9×6 =54", "6\u00a0×\u00a09"],
)  # fmt: skip
def test_every_spelling_of_a_product_is_its_fact(text):
    fact = "<MUL_6_9_54>"
    for before, after in (
        ("", ""),
        ("is ", "."),
        ("(", ")"),
        ("$", ", "),
        ("3+", "-1"),
        (":", "\n"),
    ):
        assert inject(before + text + after) == before + fact + after
    assert inject(text, require_result=True) == (fact if "54" in text else text)


@pytest.mark.parametrize(
    "text",
    ["6*90", "16*9", "6*9=540", "6*9=55", "6*9 = 5", "6*9=-54", "6*9=54.5", "6*9=54,000", "6*9=.54",
     "6*9=54x", "6*9=54%", "0*5", "10*5", "5*10", "3.6*9", ".6*9", "6*9.5", "1,6*9", "6*9,000",
     "1006*9", "6*9%", "60/5*3", "60 / 5 * 3", "7÷6×9", "2^6*9", "6*9^2", "2**6*9", "6*9**2",
     "6*9 ** 2", "7%6*9", "v6x9", "6x9cm", "6xy", "2x", "solve 6x = 9", "max 9", "6 X 9", "6xx9",
     "6\n* 9 apples", "6*\n9", "²6*9", "6*9²", "six*9", "6 times 9", "6**9", "6·9", "1_6*9"],
)  # fmt: skip
def test_what_is_not_a_product_of_two_digits_stays(text):
    for before, after in (("", ""), ("is ", " "), ("(", ")")):
        assert inject(before + text + after) == before + text + after
        assert inject(before + text + after, require_result=True) == before + text + after


def test_products_one_after_the_other():
    assert inject("6*9 and 3*4=12, 10*5, 2 x 2 = 5") == (
        "<MUL_6_9_54> and <MUL_3_4_12>, 10*5, 2 x 2 = 5"
    )
    assert inject("2*3*4*5*6") == "<MUL_2_3_6>*<MUL_4_5_20>*6"
    assert inject("9*6=$<<9*6=54>>54") == "<MUL_6_9_54>=$<<<MUL_6_9_54>>>54"
    assert inject("3*3=9=3*3") == "<MUL_3_3_9>=<MUL_3_3_9>"


@pytest.mark.parametrize("seed", range(20))
def test_the_value_of_an_expression_stays(seed):
    rng = random.Random(seed)
    seen = 0
    for _ in range(300):
        parts = [str(rng.choice([1, 2, 3, 5, 7, 9, 12, 0.5, 30]))]
        for _ in range(rng.randint(1, 6)):
            operator = rng.choice(["*", "*", " * ", "+", " - ", "/", " / ", "%", " ** ", "**"])
            if "**" in operator and "**" in "".join(parts):
                operator = "*"  # no towers of powers
            parts += [operator, str(rng.choice([1, 2, 3, 4, 6, 8, 11, 2.5]))]
        text = "".join(parts)
        made = inject(text)
        seen += made != text
        assert inject(made) == made
        value = re.sub(r"<MUL_\d_\d_(\d+)>", r"\1", made)
        assert eval(value) == pytest.approx(eval(text), rel=1e-9), (text, made)
    assert seen > 50
