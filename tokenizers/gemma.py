"""Gemma's tokenizer, from Hugging Face's `tokenizer.json` or SentencePiece's `tokenizer.model`.

Dims: M merges, V tokens of the vocabulary.

The two disagree on some texts: what a json calls added tokens Hugging Face cuts out of the text as
it stands, so that U+2581 U+2581 spelt out is such a token and two spaces are a merge, while both
are one piece to SentencePiece. Each file is followed as its own library follows it. What is made of
a file (`table`) is cached under the file's hash, because 262,144 pieces take seconds.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tokenizers import base, cache, merges, sentencepiece, table
from tokenizers.base import Tokenizer, fingerprint
from tokenizers.files import TokenizerError, check_ids, is_text, parse_object
from tokenizers.roles import Roles, read_roles, roles_config
from tokenizers.table import SPACE, Pieces, Table, TextEncoder, Vocabulary

# Only a key of the model is spelt so: inside a string its quotes would be escaped.
BYTE_FALLBACK = re.compile(rb'"byte_fallback"\s*:\s*true')
CODE = [Path(module.__file__ or "") for module in (base, cache, merges, sentencepiece, table)]
TO_SPACE = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
FROM_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
DECODERS = [TO_SPACE, {"type": "ByteFallback"}, {"type": "Fuse"}]


def recognises(files: Mapping[str, bytes]) -> bool:
    """Whether files are a tokenizer of this kind, supported or not."""
    content = files.get("tokenizer.json")
    return "tokenizer.model" in files if content is None else bool(BYTE_FALLBACK.search(content))


def build(name: str, files: Mapping[str, bytes], folder: Path) -> Tokenizer:
    """The tokenizer in files {name: content}; folder only names them in errors.

    files: tokenizer.json or tokenizer.model, and what `files.BESIDE` lists. Where none of these
    says whether bos comes first, it does after a model, and if the template of a json has it.
    Raises TokenizerError on anything that could change an id unnoticed.
    """
    source = next(n for n in ("tokenizer.json", "tokenizer.model") if n in files)
    key = cache.key(files[source], *CODE, Path(__file__))
    arrays = cache.read(key)
    if arrays is None:
        arrays = _compiled(folder / source, files[source])
        cache.write(key, arrays)
    plain = json.loads(arrays["plain"].tobytes())
    pieces = Pieces(arrays["ids_V"], arrays["pieces"].tobytes(), arrays["ends_V"])
    extra = {}
    if source == "tokenizer.model":  # a json has them all itself
        path = folder / "added_tokens.json"
        extra = parse_object(path, files.get(path.name, b"{}"))
        check_ids(path, extra)
        if taken := [t for t, i in extra.items() if pieces.get(i, t.encode()) != t.encode()]:
            raise TokenizerError(
                f"{path}: the id of {taken[0]!r} is another token's: fetch it again"
            )
    control = plain["control"] | extra
    known = control | plain["always"]
    roles = read_roles(folder, files, known, control, Roles(*plain["roles"]))
    named = [token for token in roles[:3] if token is not None]
    control |= {token: known[token] for token in named if token not in plain["always"]}
    kept = {n: files[n] for n in files if n not in ("config.json", "special_tokens_map.json")}
    return Tokenizer(
        name=name,
        fingerprint=fingerprint(plain["digest"], sorted(control.items())),
        bos=None if roles.bos is None else known[roles.bos],
        eos=None if roles.eos is None else known[roles.eos],
        pad=None if roles.pad is None else known[roles.pad],
        add_bos=roles.add_bos,
        control=control,
        pieces=pieces | {i: t.encode() for t, i in extra.items()} if extra else pieces,
        encode_text=TextEncoder(
            Table(
                plain["pattern"],
                arrays["tokens"].tobytes(),
                arrays["ends_R"],
                arrays["ids_R"],
                arrays["fallback_K4"],
                plain["frozen"],
            )
        ),
        files=kept | {"tokenizer_config.json": roles_config(folder, files, roles)},
        added=plain["added"],
    )


def _compiled(source: Path, content: bytes) -> dict[str, np.ndarray]:
    """Arrays for the cache; `plain` is JSON."""
    if source.name == "tokenizer.model":
        vocabulary = sentencepiece.read(source, content)
    else:
        vocabulary = _from_tokenizer_json(source, content)
    compiled, added = table.build(vocabulary, unsure=source.name == "tokenizer.model")
    pieces = [vocabulary.pieces[i] for i in sorted(vocabulary.pieces)]
    arrays = {
        "ids_V": np.array(sorted(vocabulary.pieces), np.int32),
        "ends_V": table.ends_of(pieces),
        "pieces": np.frombuffer(b"".join(pieces), np.uint8),
    }
    merged = np.array([i for _, i in vocabulary.merged], np.int32)
    digest = fingerprint(
        "BPE with byte fallback",
        *(hashlib.sha256(a.tobytes()).hexdigest() for a in (*arrays.values(), merged)),
        vocabulary.byte_ids,
        *(sorted(m.items()) for m in (vocabulary.characters, vocabulary.frozen, vocabulary.added)),
    )
    plain = {
        "digest": digest,
        "pattern": compiled.pattern,
        "frozen": compiled.frozen,
        "added": added,
        "always": {t.replace(" ", SPACE): i for t, i in vocabulary.frozen.items()}
        | vocabulary.added,
        "control": vocabulary.control,
        "roles": vocabulary.roles,
    }
    return arrays | {
        "tokens": np.frombuffer(compiled.tokens, np.uint8),
        "ends_R": compiled.ends_R,
        "ids_R": compiled.ids_R,
        "fallback_K4": compiled.fallback_K4,
        "plain": np.frombuffer(json.dumps(plain).encode(), np.uint8),
    }


def _from_tokenizer_json(source: Path, content: bytes) -> Vocabulary:
    data = parse_object(source, content)
    try:
        return _from_components(source, data)
    except (KeyError, TypeError, AttributeError, UnicodeEncodeError) as error:
        raise TokenizerError(
            f"{source} is not laid out as a tokenizer.json ({type(error).__name__}: {error}): fetch"
            " it again, or pass another file"
        ) from None


def _from_components(source: Path, data: dict[str, Any]) -> Vocabulary:
    def require(supported: bool, what: str, value: Any) -> None:
        if not supported:
            raise TokenizerError(
                f"{source}: {what} {json.dumps(value)[:80]} is not supported: of tokenizers with"
                " byte_fallback only BPE as in Gemma is"
            )

    model, normalizer, words = data["model"], data.get("normalizer"), data.get("pre_tokenizer")
    require(model.get("type", "BPE") == "BPE", "model type", model.get("type"))
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        require(not model.get(option), f"model option {option}", model.get(option))
    steps = normalizer.get("normalizers") if normalizer and len(normalizer) == 2 else [normalizer]
    require(steps == [FROM_SPACE], "normalizer", normalizer)
    if words is not None:  # it splits at spaces, of which the normalizer leaves none
        at_spaces = words["type"] == "Split" and words["pattern"] == {"String": " "}
        require(at_spaces and words["invert"] is False, "pre_tokenizer", words)
    decoder = data.get("decoder")
    require(decoder is None or decoder.get("decoders") == DECODERS, "decoder", decoder)

    always: dict[bool, dict[str, int]] = {False: {}, True: {}}  # cut before or after normalising
    control: dict[str, int] = {}
    for token in data.get("added_tokens") or ():
        text, special = token["content"], token["special"]
        for option in ("single_word", "lstrip", "rstrip"):
            require(not token.get(option), f"added token with {option}", token)
        normalized = token.get("normalized", not special)
        plain = is_text(text) and bool(text)
        require(plain and not (special and normalized), "added token", token)
        (control if special else always[normalized])[text] = token["id"]
    literal = always[True] | always[False] | control
    vocab = dict(model["vocab"].items())
    for token, i in literal.items():
        if vocab.get(token, i) != i:
            raise TokenizerError(
                f"{source}: token {token!r} has id {vocab.get(token)} in the vocabulary but {i}"
                " among the added tokens: fetch it again"
            )
    known = vocab | literal
    check_ids(source, known)

    after = data.get("post_processor")
    bos = None
    if after is not None:
        single = after["single"] if after["type"] == "TemplateProcessing" else [after]
        first = single[0].get("SpecialToken", {}).get("id")
        require([*single[-1]] == ["Sequence"] and len(single) == 1 + (first is not None),
                "post_processor", after.get("single", after))  # fmt: skip
        require(first is None or first in control, "post_processor with", first)
        bos = first
    roles = [t if t in control else None for t in ("<bos>", "<eos>", "<pad>")]

    byte_ids = []
    for b in range(256):
        if f"<0x{b:02X}>" not in vocab:
            raise TokenizerError(f"{source} has no token <0x{b:02X}>: fetch it again")
        byte_ids.append(vocab[f"<0x{b:02X}>"])
    pieces = {i: token.replace(SPACE, " ").encode() for token, i in known.items()}
    pieces |= {i: bytes([b]) for b, i in enumerate(byte_ids)}
    # Text has no real spaces once it is normalised, so a token with one is never made.
    letters = {t: i for t, i in vocab.items() if len(t) == 1 and t != " "}
    return Vocabulary(
        pieces=pieces,
        byte_ids=byte_ids,
        characters={t.replace(SPACE, " "): i for t, i in letters.items()},
        merged=_merged(source, vocab, model["merges"]),
        frozen={t.replace(SPACE, " "): i for t, i in always[True].items()},
        added=always[False],
        control=control,
        roles=Roles(bos or roles[0], roles[1], roles[2], add_bos=bos is not None),
    )


def _merged(source: Path, vocab: dict[str, int], pairs: list[Any]) -> list[tuple[str, int]]:
    """The tokens that merges make, in the order of the merges that make them, with their ids."""
    tokens = list(vocab)
    index = {token: n for n, token in enumerate(tokens)}
    try:
        if pairs and isinstance(pairs[0], str):
            pairs = [pair.split(" ") for pair in pairs]
        left_M = np.array([index[a] for a, _ in pairs], np.int64)
        right_M = np.array([index[b] for _, b in pairs], np.int64)
        made_M = np.array([index[a + b] for a, b in pairs], np.int64)
    except (KeyError, ValueError, TypeError, AttributeError):
        wrong = next(p for p in pairs if not _is_merge(p, vocab))
        raise TokenizerError(
            f"{source}: merge {wrong!r} is not two tokens of the vocabulary that make a third: do"
            " the merges belong to another vocabulary?"
        ) from None
    keys = np.sort(left_M * len(tokens) + right_M)
    twice = (keys[1:] == keys[:-1]).any()
    byte_tokens = [index[f"<0x{b:02X}>"] for b in range(256)]
    if twice or np.isin(byte_tokens, [left_M, right_M]).any():
        what = "twice" if twice else "of a token that stands for a byte"
        raise TokenizerError(f"{source} lists a merge {what}: that is not supported")
    last_V = merges.last_merges(
        left_M,
        right_M,
        made_M,
        np.array([len(token) for token in tokens]),
        lambda n: [index[character] for character in tokens[n]],
    )
    made = made_M[np.sort(last_V[last_V >= 0])].tolist()
    return [(tokens[n].replace(SPACE, " "), vocab[tokens[n]]) for n in made if " " not in tokens[n]]


def _is_merge(pair: Any, vocab: Mapping[str, int]) -> bool:
    two = isinstance(pair, list) and [type(part) for part in pair] == [str, str]
    return two and all(token in vocab for token in (*pair, "".join(pair)))
