"""Compare Taproot's tokenizer of a folder with the library whose file it is, on hard texts.

Both sides are called `tokenizers`, so each has its own environment and process. Run this with the
Python that has tokenizers==0.23.3 and sentencepiece==0.2.3, and name Taproot's:

    python -P tests/golden/tokenizers/check_tokenizers.py FOLDER COUNT --ours PYTHON [--seed S]

FOLDER: a folder or file with tokenizer.json (reference: Hugging Face's tokenizers), tokenizer.model
(sentencepiece), or GPT-2's two files. COUNT texts are compared as text, with control tokens parsed
where the library can, and decoded. Lone surrogates, which neither library takes, are replaced for
it as Taproot promises. Prints the mismatches and ends with 1 if there are any.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE))  # behind the libraries; -P leaves it out

from hard_strings import hard_strings  # noqa: E402

Encode = Callable[[list[str]], list[list[int]]]


def repaired(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def reference(path: Path) -> tuple[dict[str, Encode], Callable, Sequence[str], Sequence[str]]:
    """{"plain" and perhaps "special": encode}, decode, and tokens: ordinary and literal ones."""
    folder, names = (path, None) if path.is_dir() else (path.parent, [path.name])
    here = names or [p.name for p in folder.iterdir()]
    if "tokenizer.json" not in here and "tokenizer.model" in here:
        import sentencepiece

        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        ids = range(model.get_piece_size())
        literal = [model.id_to_piece(i) for i in ids if model.is_control(i)]
        pieces = [model.id_to_piece(i).replace("\u2581", " ") for i in ids]
        found = [p for i, p in zip(ids, pieces, strict=True) if model.get_score(i) == 0]
        return {"plain": model.encode}, model.decode, pieces, literal + found

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if "tokenizer.json" in here:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    else:
        first, second = (
            ("encoder.json", "vocab.bpe") if "vocab.bpe" in here else ("vocab.json", "merges.txt")
        )
        bpe = models.BPE.from_file(str(folder / first), str(folder / second))
        tokenizer = Tokenizer(bpe)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|endoftext|>"])

    def encode(special: bool) -> Encode:
        def rows(texts: list[str]) -> list[list[int]]:
            tokenizer.encode_special_tokens = not special
            return [e.ids for e in tokenizer.encode_batch(texts, add_special_tokens=False)]

        return rows

    def decode(rows: list[list[int]]) -> list[str]:
        return tokenizer.decode_batch(rows, skip_special_tokens=False)

    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False))
    literal = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    pieces = [p.replace("\u2581", " ").replace("\u0120", " ") for p in vocab]
    return {"plain": encode(False), "special": encode(True)}, decode, pieces, literal


def compare(path: Path, expected_file: Path) -> int:
    """Run by Taproot's Python in Taproot's folder."""
    from tokenizers import load

    tokenizer, wrong, compared = load(path), 0, 0
    for line in expected_file.read_text().splitlines():
        text, plain, special, decoded = json.loads(line)
        cases = [(tokenizer.encode(text).tolist(), plain, "as text")]
        if special is not None:
            cases.append((tokenizer.encode(text, special=True).tolist(), special, "parsed"))
        cases.append((tokenizer.decode(cases[-1][1]), decoded, "decoded"))
        compared += 1
        for ours, theirs, what in cases:
            if ours != theirs:
                wrong += 1
                if wrong <= 20:
                    print(f"{what}: {ascii(text)}\n  ours   {ours!r}\n  theirs {theirs!r}")
    print(f"{path}: {wrong} mismatches in {compared} texts")
    return int(wrong > 0)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--ours", help="the Python of Taproot's environment")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.path.resolve()
    if options.compare:
        return compare(path, options.compare)

    encoders, decode, pieces, literal = reference(path)
    texts = hard_strings(options.count, options.seed, pieces, literal)
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        while batch := list(itertools.islice(texts, 2000)):
            whole = [repaired(text) for text in batch]
            plain = encoders["plain"](whole)
            special = encoders["special"](whole) if "special" in encoders else [None] * len(whole)
            decoded = decode([a if b is None else b for a, b in zip(plain, special, strict=True)])
            for row in zip(batch, plain, special, decoded, strict=True):
                file.write(json.dumps(row) + "\n")
        file.flush()
        command = [options.ours, __file__, str(path), "0", "--compare", file.name]
        return subprocess.run(
            command, cwd=HERE.parents[2], env=os.environ | {"PYTHONPATH": "."}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
