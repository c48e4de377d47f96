#!/usr/bin/env python3
"""How true MAGIC's scores are: retraining without 1 % of the rows, over many ways to train.

    python docs/magic_study.py TEXT GPT2 OUT

TEXT: WikiText-2's validation text. GPT2: a folder with GPT-2's vocab.bpe and encoder.json, whose
first tokens are the vocabulary. A small GPT-2 learns the first half of the articles, and then
paragraphs of twelve of the others, in the ways of SETTINGS; each query is how a held-out paragraph
of one of the twelve begins. Other methods score the same rows and meet the same retrains.

All work is done by public commands, shown as they run; a study that was stopped goes on.
OUT/study.json and OUT/study.md are the result. An LDS is the mean over the queries of each one's
own Spearman correlation, with a 95 % interval by bootstrap over queries.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VOCABULARY = 1024  # tokens: the 256 bytes, GPT-2's first merges, end of text
ARTICLES, PARAGRAPHS, HELD_OUT = 12, 11, 5  # paragraphs of an article, and which one is the query
QUERY_WORDS = 24
MODEL = {"vocab_size": VOCABULARY, "context": 64, "width": 64, "layers": 2, "heads": 4}
PRETRAIN = "--steps 50 --batch 32 --lr 3e-3 --warmup 10"
TRAIN = (
    "--optimizer adamw --lr 1.5e-3 --eps-root 1e-8 --batch 16 --steps 37 --warmup 8 "
    "--schedule linear --end 0 --clip 0"
)
COMPARED = ("base", "eps_root 1e-6")  # with other methods, by twice the retrains
RETRAINS = 50
SETTINGS = {  # what is changed in TRAIN
    "base": "",
    "eps_root 1e-6": "--eps-root 1e-6",
    "eps_root 0": "--eps-root 0",
    "eps_root 1e-17": "--eps-root 1e-17",
    "eps_root 1e-10": "--eps-root 1e-10",
    "batch 8": "--batch 8 --steps 74 --warmup 16",
    "batch 32": "--batch 32 --steps 18 --warmup 4",
    "lr 5e-4": "--lr 5e-4",
    "lr 3e-3": "--lr 3e-3",
    "lr 6e-3": "--lr 6e-3",
    "lr 3e-3, eps_root 1e-6": "--lr 3e-3 --eps-root 1e-6",
    "no warm-up": "--warmup 0",
    "sgd, lr 0.03": "--optimizer sgd --lr 0.03",
    "sgd, lr 0.1": "--optimizer sgd --lr 0.1",
    "sgd, lr 0.4": "--optimizer sgd --lr 0.4",
    "sgd, momentum 0.9, lr 0.06": "--optimizer sgd --momentum 0.9 --lr 0.06",
    "muon, lr 2e-3": "--optimizer muon --lr 2e-3",
    "muon, lr 6e-3": "--optimizer muon --lr 6e-3",
    "muon, lr 2e-2": "--optimizer muon --lr 2e-2",
    "muon, lr 2e-3, eps_root 0": "--optimizer muon --lr 2e-3 --eps-root 0",
}
METHODS = {  # at the trained model, of all matrices where a method can
    "EK-FAC": "ekfac",
    "TrackStar": "trackstar --modules '*'",
    "gradient cosine": "score --unit-norm --modules '*'",
    "gradient product, exact": "score --exact --modules '*'",
}
CONTROLS = ("bm25", "embedding", "length", "random")


def write_corpus(text: str, gpt2: Path, out: Path) -> None:
    """The tokenizer, the model's description, and base.jsonl, pool.jsonl, query.jsonl."""
    articles: list[tuple[str, list[str]]] = []
    for line in map(str.strip, text.splitlines()):
        if re.fullmatch("= [^=].* =", line):
            articles.append((line.strip("= "), []))
        elif articles and len(line.split()) >= 20:  # neither a heading nor blank
            articles[-1][1].append(line)
    half = len(articles) // 2
    later = [a for a in articles[half:] if len(a[1]) > PARAGRAPHS][:ARTICLES]
    base = [{"text": text} for _, found in articles[:half] for text in found]
    documents: dict[str, list[dict[str, str]]] = {"base": base, "pool": [], "query": []}
    for title, found in later:
        for i, text in enumerate(found[:PARAGRAPHS]):
            name = "query" if i == HELD_OUT else "pool"
            text = " ".join(text.split()[:QUERY_WORDS]) if name == "query" else text
            documents[name].append({"text": text, "source": title})
    merges = (gpt2 / "vocab.bpe").read_text("utf-8").splitlines()  # after a line with the version
    ids = json.loads((gpt2 / "encoder.json").read_text("utf-8"))
    ids = {token: i for token, i in ids.items() if i < VOCABULARY - 1}
    files = {
        "tokenizer/vocab.bpe": "\n".join(merges[: VOCABULARY - 256]) + "\n",
        "tokenizer/encoder.json": json.dumps(ids | {"<|endoftext|>": VOCABULARY - 1}),
        "model.json": json.dumps(MODEL),
    }
    for name, content in documents.items():
        files[f"{name}.jsonl"] = "".join(json.dumps(one) + "\n" for one in content)
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content, "utf-8")


def command(line: str, out: Path) -> str | None:
    """Run `cli.py LINE --out OUT`; why it was refused, or None."""
    line = f"{line} --out {shlex.quote(str(out))}"
    print(f"python cli.py {line}", flush=True)
    ran = subprocess.run(
        [sys.executable, ROOT / "cli.py", *shlex.split(line)], stderr=subprocess.PIPE, text=True
    )
    if ran.returncode not in (0, 2):
        sys.exit(f"{ran.stderr}\nstopped; the same command goes on from here")
    return ran.stderr.strip().splitlines()[-1] if ran.returncode else None


def plain(name: str) -> str:
    """As a folder's name."""
    return re.sub("[^a-z0-9.-]+", "-", name.lower())


def lds(folder: Path) -> dict[str, dict[str, Any]]:
    """What a validation found, by method; `values` are the queries' own."""
    found = json.loads((folder / "validation.json").read_text())
    return {
        line["method"]: {
            "estimate": round(line["estimate"], 4),
            "interval": [round(end, 4) for end in line["interval"]],
            "values": [round(value, 4) for value in line["values"]],
        }
        for line in found["table"]
    }


def study(text: Path, gpt2: Path, out: Path) -> dict[str, Any]:
    quoted = shlex.quote(str(out))
    rows, base = f"{quoted}/rows", f"{quoted}/pretrained"
    if not (out / "query.jsonl").exists():
        write_corpus(text.read_text("utf-8"), gpt2, out)
    for name in ("base", "pool", "query"):
        command(
            f"data text {quoted}/{name}.jsonl --tokenizer {quoted}/tokenizer --pack document "
            f"--length {MODEL['context']}",
            out / "rows" / name,
        )
    command(
        f"train lm --config {quoted}/model.json --tokenizer {quoted}/tokenizer "
        f"--rows {rows}/base {PRETRAIN}",
        out / "pretrained",
    )
    result: dict[str, Any] = {"model": MODEL, "pretrain": PRETRAIN, "train": TRAIN, "settings": {}}

    def validated(scores: Path, count: int, how: str = "") -> str | None:
        return command(
            f"attribute validate {shlex.quote(str(scores))} --model {base} --rows {rows}/pool "
            f"--query {rows}/query --count {count} --bank {quoted}/bank {how}",
            scores / "lds",
        )

    for name, change in SETTINGS.items():
        scores, count = out / plain(name), RETRAINS * (1 + (name in COMPARED))
        refused = command(
            f"attribute magic --model {base} --rows {rows}/pool --query {rows}/query "
            f"--query-mode each --query-batch {ARTICLES} {TRAIN} {change}",
            scores,
        )
        refused = refused or validated(scores, count)
        found: dict[str, Any] = {"change": change, "refused": refused}
        if (scores / "info.json").exists():
            info = json.loads((scores / "info.json").read_text())
            found |= {
                "steps": info["steps"],
                "loss_drop": info["loss_drop"],
                "displacement": info["displacement"]["relative"],
                "smoothness": info["metasmoothness"]["smoothness"],
                "trust": info["trust"],
            }
        found["lds"] = {} if refused else lds(scores / "lds")
        result["settings"][name] = found
        if name in COMPARED:
            for method, how in METHODS.items():
                other = scores / "others" / plain(method)
                command(
                    f"attribute {how} --model {shlex.quote(str(scores))}/model --pool {rows}/pool "
                    f"--query {rows}/query --mode each",
                    other,
                )
                validated(other, count, f"--no-controls {TRAIN} {change}")
                found["lds"][method] = lds(other / "lds")["scores"]
    return result


def cell(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['estimate']:.3f} [{low:.3f}, {high:.3f}]"


def table(result: dict[str, Any]) -> str:
    """Both tables, in markdown."""
    compared = [result["settings"][name]["lds"] for name in COMPARED]
    lines = [f"| method | {' | '.join(f'LDS, {name}' for name in COMPARED)} |", "|---|---|---|"]
    for name in ("scores", *METHODS, *CONTROLS):
        cells = (cell(found[name]) for found in compared)
        lines.append(f"| {'MAGIC' if name == 'scores' else name} | {' | '.join(cells)} |")
    lines += ["", "| setting | steps | loss drop | displacement | smoothness | LDS | verdict |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, found in result["settings"].items():
        if "steps" not in found:
            lines.append(f"| {name} | | | | | | {found['refused']} |")
            continue
        smooth = found["smoothness"]
        numbers = (
            str(found["steps"]),
            f"{found['loss_drop']:.2f}",
            f"{found['displacement']:.3f}",
            "-" if smooth is None else f"{smooth:.3f}",
            cell(found["lds"]["scores"]) if found["lds"] else "-",
        )
        lines.append(f"| {name} | {' | '.join(numbers)} | {found['trust']['verdict']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    text, gpt2, out = (Path(word).resolve() for word in sys.argv[1:])
    result = study(text, gpt2, out)
    (out / "study.json").write_text(json.dumps(result) + "\n")
    (out / "study.md").write_text(table(result))
    print(table(result))
