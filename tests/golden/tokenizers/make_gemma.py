"""Expected ids and texts for Gemma's kind of tokenizer from its two reference libraries.

Needs Python 3.11 and an environment of its own with tokenizers==0.23.3, sentencepiece==0.2.3 and
unicodedata2, and `-P`, because the project's `tokenizers/` would shadow that library:

    python -P tests/golden/tokenizers/make_gemma.py

Trains a small SentencePiece BPE model as Gemma's was (byte fallback, split digits, no
normalisation, control tokens first, then user-defined ones) on Python's own help texts and a few
lines in other languages, and writes, beside this file,

    gemma/tokenizer.model   that model
    gemma/tokenizer.json    the same for Hugging Face, with the merges that Gemma's has: every way
                            to put a piece together from two others, best piece first
    gemma_expected.json     {"strings": [...], "model": {"plain": ids, "decoded": texts},
                            "json": {"plain", "special", "decoded"} as in expected.json}
    nfc_expected.json       [text, what Hugging Face's NFC makes of it] around characters that
                            Unicode 10 and later versions gave a combining class or a composition
"""

import json
import random
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import sentencepiece
import unicodedata2
from tokenizers.models import BPE

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # behind the libraries; -P leaves it out

from check_tokenizers import repaired  # noqa: E402
from hard_strings import CODE, PROSE, hard_strings  # noqa: E402

SPACE = "\u2581"
SIZE = 1500
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TAGS = ["table", "tr", "td", "h1", "b", "i", "code", "ul", "li", "br"]
ADDED = [
    "<mask>", "[multimodal]", *(f"<unused{n}>" for n in range(12)),
    "<start_of_turn>", "<end_of_turn>",
    *("\n" * n for n in range(1, 32)), *(SPACE * n for n in range(2, 32)),
    *(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS), "<start_of_image>",
]  # fmt: skip


def train(folder: Path) -> None:
    text = "\n".join(topics[name] for name in sorted(topics)) + "\n".join(PROSE * 20 + CODE * 5)
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "corpus.txt"
        corpus.write_text(text, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=f"{temporary}/made", model_type="bpe", vocab_size=SIZE,
            user_defined_symbols=ADDED, pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>",
            eos_piece="<eos>", bos_piece="<bos>", byte_fallback=True, add_dummy_prefix=False,
            remove_extra_whitespaces=False, normalization_rule_name="identity", split_digits=True,
            allow_whitespace_only_pieces=True, character_coverage=0.9995, num_threads=1,
            minloglevel=2,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes((Path(temporary) / "made.model").read_bytes())


def convert(folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocab = {model.id_to_piece(i): i for i in range(SIZE)}
    merges = [
        (i, len(piece[:at]), len(piece[at:]), piece[:at], piece[at:])
        for piece, i in vocab.items()
        for at in range(1, len(piece))
        if piece[:at] in vocab and piece[at:] in vocab
    ]
    pairs = [(left, right) for *_, left, right in sorted(merges)]
    tokenizer = Tokenizer(BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = [*CONTROL, "<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False, special=t in special) for t in CONTROL + ADDED]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def expected(folder: Path) -> dict:
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces = [model.id_to_piece(i).replace(SPACE, " ") for i in range(SIZE)]
    strings = list(hard_strings(270, 5, pieces, CONTROL + ADDED, longest_run=90))
    strings += [f"x{c * n}y" for c in " \n\t" for n in (1, 2, 30, 31, 32, 33, 62, 63, 64, 70)]
    whole = [repaired(text) for text in strings]
    plain = model.encode(whole)
    result: dict = {
        "strings": strings,
        "model": {"plain": plain, "decoded": model.decode(plain)},
    }
    tokenizer.encode_special_tokens = True  # as text
    plain = [e.ids for e in tokenizer.encode_batch(whole, add_special_tokens=False)]
    tokenizer.encode_special_tokens = False
    parsed = [e.ids for e in tokenizer.encode_batch(whole, add_special_tokens=False)]
    result["json"] = {
        "plain": plain,
        "special": [None if a == b else b for a, b in zip(plain, parsed, strict=True)],
        "decoded": tokenizer.decode_batch(parsed, skip_special_tokens=False),
    }
    return result


def later_characters() -> list[int]:
    """Those whose canonical (de)composition or order the library does not know, but Unicode has."""
    compose, decompose = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
    later = set()
    for code in range(0x110000):
        c = chr(code)
        if 0xD800 <= code < 0xE000:
            continue
        own_class = unicodedata2.combining(c)
        if own_class:
            text = f"a{c}\u0334" if own_class > 1 else f"a\u0345{c}"  # classes 1 and 240
            later |= {code} if compose(text) == text else set()
        parts = unicodedata2.decomposition(c).split()
        if parts and not parts[0].startswith("<"):
            text = "".join(chr(int(part, 16)) for part in parts)
            if decompose(c) == c:
                later |= {code}
            if unicodedata2.normalize("NFC", text) != compose(text):  # its first part must be new
                later |= {code, ord(text[0])}
    return sorted(later)


def normalised() -> list[tuple[str, str]]:
    compose, rng = normalizers.NFC().normalize_str, random.Random(7)
    near = "ae\u00e9\u0301\u0323\u0334\u0345\u0307\u1100\u1161\u212b x"
    texts = []
    for code in later_characters():
        parts = [rng.choice(near) for _ in range(6)]
        parts[rng.randrange(6)] = parts[rng.randrange(6)] = chr(code)
        texts.append("".join(parts))
    return [(text, compose(text)) for text in texts]


def write(name: str, value: object) -> None:
    text = json.dumps(value, separators=(",", ":"))  # ASCII: some strings have lone surrogates
    (HERE / name).write_text(text + "\n", encoding="utf-8")


def main() -> None:
    folder = HERE / "gemma"
    folder.mkdir(exist_ok=True)
    train(folder)
    convert(folder)
    write("gemma_expected.json", expected(folder))
    write("nfc_expected.json", normalised())


if __name__ == "__main__":
    main()
