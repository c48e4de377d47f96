"""GPT-2 with one token for each fact of the multiplication table: `<MUL_6_9_54>` is 6 times 9.

45 facts, a <= b from 1 to 9, in lexicographic order at ids 50304 to 50348: above GPT-2's 50,257
tokens padded to 50,304, so the ids between have no token. A model of 50,349 rows thus serves both
arms of an experiment: text tokenised with "gpt2" never meets a fact, text that `inject` rewrote and
"gpt2-mul" tokenises does. A fact is content, not control: text that spells one always becomes it.

Hugging Face numbers an added token after the vocabulary, whatever id its entry asks for, unless the
vocabulary itself has the token at that id. So a fact stands in both places of the tokenizer.json.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.files import parse_object, parse_text
from tokenizers.roles import ENDOFTEXT

FIRST_ID = 50304
FACTS = {(a, b): f"<MUL_{a}_{b}_{a * b}>" for a in range(1, 10) for b in range(a, 10)}

# A number ends where no digit, letter or percent sign follows, nor a decimal or thousands part. And
# the product must be what the text computes first: 60/5*3 is not 60/15, nor 2*3**2 6**2.
_BEFORE = r"(?<![\w.])(?<!\d,)(?<![/÷^%])(?<![/÷^%] )(?<!\*\*)(?<!\*\* )"
_AFTER = r"(?![\w%^])(?![.,]\d)(?! ?\*\*)"
_BLANKS = r"[ \t\u00a0]*"
_NUMBER = r"[-+−]?\.?\d[\w%]*(?:[.,]\d[\w%]*)*"
_PRODUCT = re.compile(
    rf"{_BEFORE}([1-9]){_BLANKS}[*×x]{_BLANKS}([1-9]){_AFTER}(?:{_BLANKS}={_BLANKS}({_NUMBER}))?"
)


def inject(text: str, require_result: bool = False) -> str:
    """Text with each product of two digits, and its result if one follows, as the fact's token.

    6*9, 6 × 9, 9x6 and 6*9=54 all become <MUL_6_9_54>. A product that a wrong result follows stays
    as it is, as does one inside a longer number or word. require_result: only products that their
    result follows.
    """

    def fact(match: re.Match[str]) -> str:
        a, b = sorted((int(match[1]), int(match[2])))
        wanted = (str(a * b),) if require_result else (str(a * b), None)
        return FACTS[a, b] if match[3] in wanted else match[0]

    return _PRODUCT.sub(fact, text)


def add_facts(base: Mapping[str, bytes], first_id: int = FIRST_ID) -> dict[str, bytes]:
    """The files of a GPT-2 tokenizer with the facts from first_id on.

    base: vocab.bpe and encoder.json, or merges.txt and vocab.json. Returns a tokenizer.json and
    its tokenizer_config.json, as Hugging Face reads them; first_id must lie above all of base's.
    """
    of_merges, of_ids = (
        ("vocab.bpe", "encoder.json") if "vocab.bpe" in base else ("merges.txt", "vocab.json")
    )
    ids = parse_object(Path(of_ids), base[of_ids])
    merges = parse_text(Path(of_merges), base[of_merges]).replace("\r\n", "\n").split("\n")
    if merges[0].startswith("#version"):
        del merges[0]
    facts = {token: first_id + n for n, token in enumerate(FACTS.values())}
    literal = {ENDOFTEXT: ids[ENDOFTEXT]} | facts
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": token == ENDOFTEXT, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
            for token, i in literal.items()
        ],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": words,
        "model": {
            "type": "BPE",
            "vocab": ids | facts,
            "merges": [line for line in merges if line],
        },
    }  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ENDOFTEXT,
              "eos_token": ENDOFTEXT}  # fmt: skip
    return {
        "tokenizer.json": (json.dumps(content, ensure_ascii=False) + "\n").encode(),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode(),
    }
