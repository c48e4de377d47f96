"""Expected texts, ids and trained tokens of conversations, from transformers' chat templates.

Needs an environment of its own with transformers==5.23.0, and `-P`, because the project's
`tokenizers/` would shadow a library that transformers imports:

    python -P tests/golden/chat/make_chat.py [gemma=PUBLISHED.jinja tulu=...]

The templates here are written with `{% generation %}` around what is trained, so that transformers
itself says which tokens are: up to the end of turn, or with the newline after it, as in TRL's
training templates. Published templates, if given, must render the same texts.
Writes, beside this file,

    tokenizer/   tests/golden/tokenizers/neox with the control tokens of all templates
    expected.json   {"conversations": {name: messages}, "cases": {"tokenizer/template": {name: {
                    "text", "prompted" (with a generation prompt), "ids", "trained",
                    "trained_newline" (a digit a token), "cut" ({length: [ids, trained]})}}},
                    "refused": {template: [names]}}
"""

import json
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tokenizers import Tokenizer, decoders, models
from tokenizers import pre_tokenizers as words

HERE = Path(__file__).parent
NEOX = HERE.parent / "tokenizers" / "neox" / "tokenizer.json"
GPT2 = HERE.parent / "tokenizers" / "gpt2"
CONTROL = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
OPEN, CLOSE = "{% generation %}", "{% endgeneration %}"
CHECK = (
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('order') }}{% endif %}{% endfor %}"
)


def gemma(newline: bool, system: bool = True) -> str:
    after = "\n" + CLOSE if newline else CLOSE + "{{ '\n' }}"
    first = (
        "{% set first = messages[0].content + '\n\n' %}"
        if system
        else "{{ raise_exception('system') }}"
    )
    return (
        "{% set first = '' %}{% set turns = messages %}{{ bos_token }}"
        "{% if messages[0].role == 'system' %}" + first
        + "{% set turns = messages[1:] %}{% endif %}" + CHECK
        + "{% for m in turns %}{% if m.role == 'user' %}{{ '<start_of_turn>user\n' }}"
        "{% if loop.first %}{{ first }}{% endif %}{{ m.content | trim }}{{ '<end_of_turn>\n' }}"
        "{% else %}{{ '<start_of_turn>model\n' }}" + OPEN + "{{ m.content | trim }}<end_of_turn>"
        + after + "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )  # fmt: skip


def tulu(newline: bool) -> str:
    line = "{% if not loop.last %}{{ '\n' }}{% endif %}"
    after = line + CLOSE if newline else CLOSE + line
    return (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% if m.role == 'assistant' %}"
        + OPEN + "{{ m.content + eos_token }}" + after
        + "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )  # fmt: skip


def chatml(newline: bool) -> str:
    after = "{{ '\n' }}" + CLOSE if newline else CLOSE + "{{ '\n' }}"
    return (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        + OPEN + "{{ m.content }}<|im_end|>" + after
        + "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )  # fmt: skip


TEMPLATES = {
    "gemma": gemma,
    "gemma2": lambda newline: gemma(newline, system=False),
    "tulu": tulu,
    "chatml": chatml,
}


def talk(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system is not None else turns


CONVERSATIONS = {
    "one turn": talk("Where does the river rise?", "In the hills above the town."),
    "system": talk("Who are you?", "The mill's wheel.", system="You answer as the mill."),
    "system with blanks": talk(" hi ", " ho ", system="  Be brief.\n"),
    "many turns": talk(
        "How many mills in 1851?",
        "12",
        "And in 1902?",
        "7, I'd say.",
        "Now?",
        "One\n\nand that's it.",
    ),
    "ends with the user": talk("Is it deep?", "At the weir.", "And here?"),
    "no answer": talk("Say nothing."),
    "empty answer": talk("Say nothing.", "", "Again.", "Nothing."),
    "empty question": talk("", "You said nothing."),
    "unicode": talk(
        "川は町を流れて、水車は？ 🌊",
        "Ja, größere Körner 👩‍👩‍👧 für die Städte: 河流 Река 🏞️",
        "नदी?",
        "नदी शहर से।",
    ),
    "combining": talk(
        "e\u0301te\u0301 o\u0301",
        "e\u0301 et \u0301a, \u212b = A\u030a, s\u0323\u0307",
        "\u0301?",
        "\u0338 in\u0338\u0301 front \u1100\u1161\u11a8",
    ),
    "blanks around": talk(
        "\n\n  Where?\t\n", "  \n There.  \n\n", "\u00a0and\u3000", "\x0b\u2028x\u2029 "
    ),
    "blanks within": talk(
        "a\n\n\n  b", "    four\n\ttab  \r\n  end", "x" + " " * 40 + "y", " " * 30
    ),
    "control in the question": talk(
        "Say <end_of_turn> or <|im_end|> and <|endoftext|>.<start_of_turn>model\n",
        "No.",
        "<bos>?",
        "No <bos>.",
    ),
    "control in the answer": talk(
        "?", "One<end_of_turn>\n<start_of_turn>user\n|<|im_end|> two<|endoftext|>\u0338"
    ),
    "markup": talk(
        "<|user|>\n<|assistant|>", "{{ bos_token }} {% raw %} \\n <0x0A> </s>", system="<|system|>"
    ),
    "long": talk(
        "Tell.",
        " ".join(
            f"In {y} the mill stood, and the river's mills turned." for y in range(1850, 1880)
        ),
    ),
}
REFUSED = {
    "two users": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    "assistant first": [{"role": "assistant", "content": "a"}],
    "system in the middle": [*talk("a", "b"), {"role": "system", "content": "c"}],
}
CUT = ("one turn", "many turns", "unicode", "long")


def neox() -> PreTrainedTokenizerFast:
    data = json.loads(NEOX.read_bytes())
    last = max(token["id"] for token in data["added_tokens"])
    same = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for n, token in enumerate(CONTROL, 1):
        data["added_tokens"].append({"id": last + n, "content": token, "special": True, **same})
    folder = HERE / "tokenizer"
    folder.mkdir(exist_ok=True)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    roles = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles) + "\n")
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **roles)


def gpt2() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE.from_file(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt")))
    made.pre_tokenizer = words.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, bos_token=end)


def digits(mask: list[int]) -> str:
    return "".join(map(str, mask))


def case(tokenizer: PreTrainedTokenizerFast, name: str, messages: list) -> dict:
    def apply(newline: bool, **options):
        return tokenizer.apply_chat_template(
            messages, chat_template=TEMPLATES[name](newline), return_dict=True,
            return_assistant_tokens_mask=True, **options,
        )  # fmt: skip

    def text(**options) -> str:
        made = TEMPLATES[name](False)
        return tokenizer.apply_chat_template(
            messages, chat_template=made, tokenize=False, **options
        )

    whole, newline = apply(False), apply(True)
    assert whole["input_ids"] == newline["input_ids"]
    assert whole["input_ids"] == tokenizer(text(), add_special_tokens=False)["input_ids"]
    found = {
        "text": text(),
        "prompted": text(add_generation_prompt=True),
        "ids": whole["input_ids"],
        "trained": digits(whole["assistant_masks"]),
        "trained_newline": digits(newline["assistant_masks"]),
        "cut": {},
    }
    return found


def main(published: dict[str, str]) -> None:
    expected: dict = {"conversations": CONVERSATIONS | REFUSED, "cases": {}, "refused": {}}
    for which, tokenizer in (("neox", neox()), ("gpt2", gpt2())):
        for name in TEMPLATES if which == "neox" else ("tulu",):
            cases, refused = {}, []
            for title, messages in (CONVERSATIONS | REFUSED).items():
                try:
                    cases[title] = case(tokenizer, name, messages)
                except Exception as error:  # jinja's, through raise_exception
                    assert "order" in str(error) or "system" in str(error), error
                    refused.append(title)
                    continue
                if title in CUT:
                    for length in (3, 9, 17, 40):
                        made = tokenizer.apply_chat_template(
                            messages, chat_template=TEMPLATES[name](False), return_dict=True,
                            return_assistant_tokens_mask=True, truncation=True, max_length=length,
                        )  # fmt: skip
                        ids, mask = made["input_ids"], digits(made["assistant_masks"])
                        cases[title]["cut"][length] = [len(ids), mask]
                        assert ids == cases[title]["ids"][:length]
                if name in published:
                    for prompt, text in ((False, "text"), (True, "prompted")):
                        theirs = tokenizer.apply_chat_template(
                            messages, chat_template=published[name], tokenize=False,
                            add_generation_prompt=prompt,
                        )  # fmt: skip
                        assert theirs == cases[title][text], (name, title)
            expected["cases"][f"{which}/{name}"] = cases
            expected["refused"][name] = refused
    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main({name: Path(file).read_text(encoding="utf-8") for name, file in given.items()})
