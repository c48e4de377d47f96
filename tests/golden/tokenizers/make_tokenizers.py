"""Expected ids and texts for byte-level BPE from Hugging Face's tokenizers library.

Needs an environment of its own with tokenizers==0.23.3, and `-P`, because the project's
`tokenizers/` would shadow that library:

    python -P tests/golden/tokenizers/make_tokenizers.py

Trains two small tokenizers on the text below and writes, beside this file,

    gpt2/   vocab.json, merges.txt   512 tokens, <|endoftext|> first
    neox/   tokenizer.json           GPT-NeoX's: NFC, two control tokens, 243 byte tokens, merges,
                                     then runs of 24 to 2 spaces as added tokens
    expected.json   {"strings": [...], "gpt2" and "neox": {"plain": ids of each string,
                    "special": the same with control tokens parsed, null where that changes
                    nothing, "decoded": the text of each row of ids, parsed}}
"""

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as words

HERE = Path(__file__).parent

CORPUS = """
The river that feeds the town rises in the hills above it, and it's been there longer than it.
They're told that the mill wheel wasn't the first; we've seen older stones, and I'll show you where.
In 1851 there were 12 mills, in 1902 there were 7, and in 2024 there was 1, at 51.4778 north.
"What's that?" she'd asked. He'd said: "That's the weir -- where the river's turned, isn't it?"
Der Fluß fließt über die Wiesen, und die Mühle mahlt größere Körner für die Bäcker der Städte.
L'été, la rivière s'élève à peine ; où l'eau coulait, il n'y a plus que des pierres désséchées.
Река течёт через город и поле, а мельница стоит у реки. Город у реки, мельница у города.
川は町を流れて、水車は川のそばにある。町の水は川の水です。河流穿过城市，水车在河边。
강은 마을을 지나 흐르고, 물레방아는 강가에 있다. नदी शहर से होकर बहती है। 🌊🌊 🏞️ 👩‍👩‍👧

def flow(river, mills):
    total = 0
    for mill in mills:
        if mill.open and not mill.closed:
            total += mill.rate * river.depth
            for stone in mill.stones:
                if stone.worn:
                    raise ValueError("the stone is worn")
    return total


class River(object):
\tdef __init__(self, depth, length=None):
\t\tself.depth = depth
\t\tself.length = length if length is not None else 0.0

    return self.depth != other.depth and self.length <= other.length   # the river's own length
"""

STRINGS = [
    "",
    " ",
    "The mill isn't the river's; they're where we've been, and I'll say I'd go.",
    "THE MILL ISN'T THE RIVER'S; THEY'RE 'S'T''LL're've",
    "in 1851, 12,345.678 mills ²³ ½ Ⅷ ٣٤",
    "def f(x):\n    if x:\n        return [x,  x]   # two\n\n\n\treturn None\r\n  \t \n",
    "trailing blanks   ",
    "\n\n\n",
    " \u00a0\u2003\u3000\u1680x\u2028\u2029y\u0085z\x0b\x0c\x1c\x1d\x1e\x1f\u180e\u200b\ufeff.",
    "e\u0301 \u00e9 \u1e69 s\u0323\u0307 \u212b \u2126 \u1100\u1161\u11a8 \uf900 \ufb01",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇰🇷 \U000e0041 \U0010ffff \ufffd \x00\x01\x7f\x80",
    "川は町を流れて Река течёт नदी मिल العربية ไทย",
    "<|endoftext|>",
    "a<|endoftext|> b<|endoftext|><|padding|>c <|endoftext|",
    "  <|endoftext|>  \n<|endoftext|>\u0338 e<|padding|>\u0301",
    *(f"x{' ' * n}y{' ' * n}\n{' ' * n}" for n in (1, 2, 3, 23, 24, 25, 26, 47, 48, 49, 73)),
]
PIECES = [*" \n\t'!3_", "  ", "   ", "\r\n", "\u00a0", "\u3000", "'s", "'LL", "the", " the", "12"]
PIECES += ["é", "e\u0301", "水", " город", "\u0338", "🌊", "\u200d", "<|endoftext|>", "<|", "|>"]


def byte_tokens() -> list[str]:
    """GPT-NeoX has no token for the 13 bytes that UTF-8 never uses."""
    printable = [b for b in range(256) if chr(b).isprintable() and b != 32]
    others = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(others)}
    return [letters[b] for b in range(256) if b not in (0xC0, 0xC1, *range(0xF5, 0x100))]


def trained(size: int, special: list[str], alphabet: list[str], normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = words.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def main() -> None:
    for name in ("gpt2", "neox"):
        (HERE / name).mkdir(exist_ok=True)
    gpt2 = trained(512, ["<|endoftext|>"], words.ByteLevel.alphabet())
    gpt2.model.save(str(HERE / "gpt2"))
    neox = trained(560, ["<|endoftext|>", "<|padding|>"], byte_tokens(), normalizers.NFC())
    neox.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    neox.save(str(HERE / "neox" / "tokenizer.json"), pretty=False)

    random.seed(1)
    mixed = ["".join(random.choices(PIECES, k=random.randint(2, 14))) for _ in range(80)]
    strings = STRINGS + mixed
    expected: dict = {"strings": strings}
    for name, tokenizer in (("gpt2", gpt2), ("neox", neox)):
        tokenizer.encode_special_tokens = True  # as text
        plain = [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]
        tokenizer.encode_special_tokens = False
        parsed = [e.ids for e in tokenizer.encode_batch(strings, add_special_tokens=False)]
        expected[name] = {
            "plain": plain,
            "special": [None if a == b else b for a, b in zip(plain, parsed, strict=True)],
            "decoded": [tokenizer.decode(ids, skip_special_tokens=False) for ids in parsed],
        }
    text = json.dumps(expected, ensure_ascii=False, separators=(",", ":"))
    (HERE / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
