"""Random texts on which tokenizers go wrong; the same for the same seed and pieces."""

import random
from collections.abc import Iterator, Sequence

PROSE = """
The river that feeds the town rises in the hills; they're told it's older than the mill (c. 1851).
Der Fluß fließt über die Wiesen, und die Mühle mahlt größere Körner für die Bäcker der Städte.
L'été, la rivière s'élève à peine ; où l'eau coulait, il n'y a plus que des pierres désséchées.
Река течёт через город и поле, а мельница стоит у реки. Το ποτάμι περνά από την πόλη.
川は町を流れて、水車は川のそばにある。町の水は川の水です。河流穿过城市，水车在河边。
강은 마을을 지나 흐르고, 물레방아는 강가에 있다. नदी शहर से होकर बहती है। แม่น้ำไหลผ่านเมือง
يجري النهر عبر المدينة، والطاحونة على ضفته. הנהר זורם דרך העיר. Sông chảy qua thành phố.
""".strip().split("\n")
CODE = [
    "def flow(river, mills):\n    return sum(m.rate * river.depth for m in mills if m.open)\n\n\n",
    'for (int i = 0; i < n; ++i) { if (a[i] >= b[i]) { printf("%d\\n", a[i]); } }\r\n',
    '<table><tr><td class="a">1</td></tr></table><br/><!-- x --> &amp; [link](http://a.b/c?d=e#f)',
    '{"key": [1, 2.50, -3e-7, null, true], "other": {"deep": "\\u00e9\\n"}}\n',
    "SELECT a.id, COUNT(*) FROM mills AS a WHERE a.name LIKE 'x%' GROUP BY 1;\t\t-- \t tabs\n",
]
BLOCKS = [
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x100), (0x100, 0x250), (0x300, 0x370), (0x370, 0x400),
    (0x400, 0x530), (0x590, 0x600), (0x600, 0x700), (0x700, 0x860), (0x890, 0x900), (0x900, 0xD80),
    (0xE00, 0x1000), (0x1000, 0x1100), (0x1100, 0x1200), (0x1200, 0x1A00), (0x1AB0, 0x1B00),
    (0x1D00, 0x1E00), (0x1E00, 0x2000), (0x2000, 0x2070), (0x2070, 0x2580), (0x2580, 0x25A0),
    (0x2600, 0x2E00), (0x2E80, 0x3100), (0x3100, 0x4E00), (0x4E00, 0x5200), (0xA000, 0xABFF),
    (0xAC00, 0xB000), (0xE000, 0xE080), (0xF900, 0xFB00), (0xFB00, 0xFE00), (0xFE00, 0xFE30),
    (0xFF00, 0x10000), (0x10000, 0x10400), (0x10A00, 0x11000), (0x11000, 0x12000),
    (0x16100, 0x16E00), (0x1B000, 0x1B100), (0x1D100, 0x1D800), (0x1E000, 0x1E900),
    (0x1F000, 0x1FB00), (0x20000, 0x20100), (0xE0000, 0xE0080), (0x10FF80, 0x110000),
]  # fmt: skip
ODD = [
    *"\u2581\u2581\u2581 \u00a0\u200b\u200d\ufeff\u3000\r\x00\x7f\ufffd\u0301\u0338\ufe0f",
    "\r\n", " \u2581", "\u2581 ", "\u2581\u2581", "<0x0A>", "<0x", "'s", "e\u0301", "\u212b",
    "\u1100\u1161\u11a8", "\U0001f469\u200d\U0001f467", "\U0001f1f0\U0001f1f7",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
]  # fmt: skip


def hard_strings(
    count: int, seed: int, pieces: Sequence[str], literal: Sequence[str], longest_run: int = 600
) -> Iterator[str]:
    """pieces: tokens as text; literal: control and added tokens. Some have lone surrogates."""
    rng = random.Random(seed)
    literal = [*literal, "<bos>", "<|endoftext|>", "<start_of_turn>user\n", "</td>", "<unused9>"]
    control = [token for token in literal if len(set(token)) > 1] or literal

    def run(longest: int) -> str:
        return rng.choice(" \n\t \n\u2581") * rng.randint(1, longest)

    def half(token: str) -> str:
        at = rng.randint(0, len(token))
        return token[:at] if rng.random() < 0.5 else token[at:]

    def characters(n: int) -> str:
        block = rng.choices(BLOCKS, k=3)
        return "".join(chr(rng.randrange(*rng.choice(block))) for _ in range(n))

    def part() -> str:
        kind = rng.randrange(12)
        if kind < 2:
            words = rng.choice(PROSE).split(" ")
            at = rng.randrange(len(words))
            return " ".join(words[at : at + rng.randint(1, 8)]) + " "
        if kind == 2:
            line = rng.choice(CODE)
            at = rng.randrange(len(line))
            return line[at : at + rng.randint(1, 40)]
        if kind == 3:
            return characters(rng.randint(1, 12))
        if kind == 4:
            return run(rng.choice([2, 5, 35, 70]))
        if kind == 5:
            return rng.choice(control)
        if kind == 6:
            return half(rng.choice(control)) + half(rng.choice(literal))
        if kind == 7:
            return rng.choice(ODD)
        if kind < 10:
            return "".join(rng.choices(pieces, k=rng.randint(1, 4)))
        if kind == 10:
            return "".join(map(half, rng.choices(pieces, k=rng.randint(1, 3))))
        return "".join(chr(rng.randint(32, 126)) for _ in range(rng.randint(1, 12)))

    for n in range(count):
        text = "".join(part() for _ in range(rng.choice([1, 1, 2, 3, 4, 6, 9, 14])))
        if n % 50 == 0:
            text += run(longest_run) + part()
        if n % 100 == 1:
            at = rng.randint(0, len(text))
            text = text[:at] + chr(rng.randint(0xD800, 0xDFFF)) + text[at:]
        if n % 500 == 2:  # long enough for tiktoken's other way of merging
            text = "".join(rng.choices(text.replace(" ", "") or "a", k=rng.randint(100, 900)))
        yield text
