"""Expected ids of a GPT-2 tokenizer with multiplication facts, as transformers reads its files.

Needs an environment of its own with transformers==5.23.0, and `-P`, because the project's
`tokenizers/` would shadow a library that transformers imports:

    python -P tests/golden/tokenizers/make_mul_facts.py FOLDER

FOLDER is what `small()` in tests/tokenizers/test_mul_facts.py saves: gpt2/ beside this file, with
the facts from id 600 on. Loading and saving it in transformers must not move them. Writes
mul_facts.json: {"sha256" of the tokenizer.json, "facts": their ids, "strings", "ids" of each}.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

HERE = Path(__file__).parent
FACTS = [f"<MUL_{a}_{b}_{a * b}>" for a in range(1, 10) for b in range(a, 10)]
STRINGS = [
    "The mill turns <MUL_6_9_54> times.",
    "<MUL_1_1_1><MUL_9_9_81>  <MUL_2_3_6>\n<MUL_2_3_6",
    "<<<MUL_6_8_48>>>48 and <MUL_9_6_54>, <MUL_6_9_55>",
    "é<MUL_7_8_56>水 <|endoftext|><MUL_7_8_56>'s",
    "a<MUL_3_3_9>b <mul_3_3_9> MUL_3_3_9",
]


def main(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text) for text in STRINGS]
    facts = tokenizer.convert_tokens_to_ids(FACTS)
    with tempfile.TemporaryDirectory() as copy:
        tokenizer.save_pretrained(copy)
        again = AutoTokenizer.from_pretrained(copy)
        assert again.convert_tokens_to_ids(FACTS) == facts
        assert [again.encode(text) for text in STRINGS] == ids
    sha256 = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    expected = {"sha256": sha256, "facts": facts, "strings": STRINGS, "ids": ids}
    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    (HERE / "mul_facts.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
