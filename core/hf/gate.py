"""Whether a Hugging Face folder is the model we take it for; no export appears without it.

Dims: B sequences, T tokens, N = B*T, D width, V vocabulary, C rows of one chunk of it.

The files are read back and compared bit for bit with what was exported; then the logits that our
own modules compute from them, on random, special and text ids, are compared with those of
`core.hf.reference`, the losses and greedily chosen tokens too, and the ids of its tokenizer with
those of the one that was exported. One layer and one chunk of the vocabulary are in memory at once.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from core import families, files, model, safetensors
from core.config import ModelConfig
from core.errors import InputError
from core.hf import convert, reference
from core.hf.convert import Source
from core.schema import Params, check, put

TOKENS = 256  # of each sequence, and more where a window must be passed
MAX_TOKENS = 1024
GREEDY = 4
CHUNK = 2**22  # bytes of the output matrix at a time
# Relative to the largest logit; float32 implementations differ by about 1e-6.
TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-4  # nats
TIE = 1e-5
TEXTS = (
    "The quick brown fox jumps over the lazy dog. It wasn't the dog's fault!",
    "In 1905, E = mc^2; 3.14159 and 1,000,000 are numbers, and so is 0x7f.",
    "def f(x):\n\tif x:\n        return [x, *f(x - 1)]\n\n\n    return []  # done\r\n",
    "café, cafe\u0301, naïve, Ångström, straße, İstanbul",
    "你好，世界。Привет مرحبا हिन्दी 한국어",
    "👨\u200d👩\u200d👧 🇫🇷 \u2028\u00a0\u3000\ufeff\x00\x7f",
    "  leading, trailing   and" + " " * 30 + "long runs \n \n\n  ",
)  # fmt: skip


class Agreement(NamedTuple):
    """Ours against the reference's over `tokens` places.

    logits_error: max |difference| / max |logit|. loss: the reference's, mean, in nats of the next
    token. loss_error: of the mean. greedy: tokens chosen alike.
    """

    logits_error: float
    loss: float
    loss_error: float
    greedy: int
    tokens: int


class Tokenizer(Protocol):
    """What the gate asks of a tokenizer; `core` knows no other."""

    @property
    def control(self) -> Mapping[str, int]: ...
    @property
    def pieces(self) -> Mapping[int, bytes]: ...
    def encode(self, text: str, special: bool = False) -> np.ndarray: ...


def export_hf(
    config: ModelConfig,
    params: Params,
    out: Path,
    tokenizer_dir: Path | None = None,
    dtype: str = "float32",
    shard_bytes: float = convert.SHARD_BYTES,
    load_tokenizer: Callable[[Path], Tokenizer] | None = None,
) -> Agreement:
    """Write a Hugging Face folder that holds `params` cast to `dtype` and the tokenizer's files.

    `out` comes to be only if the gate passes. load_tokenizer: reads a tokenizer's folder; without
    it the copied files are not looked into. Raises InputError for parameters that do not fit the
    config, an `out` that holds something, and a failed gate, after which nothing is left behind.
    """
    out = Path(out)
    convert.check_dtype(dtype)
    check(families.rows(config), config.layers, params, "the model")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists; name another folder for the export or remove it")
    with files.atomic_folder(out) as folder:
        convert.write_hf(folder, config, params, dtype, shard_bytes)
        if tokenizer_dir is not None:
            convert.copy_tokenizer(Path(tokenizer_dir), folder)
        try:
            check_weights(folder, config, params, dtype)
            tokenizer = None
            if tokenizer_dir is not None and load_tokenizer is not None:
                tokenizer = load_tokenizer(folder)
                check_same_tokenizer(tokenizer, load_tokenizer(Path(tokenizer_dir)), folder)
            return check_hf(folder, tokenizer)
        except InputError as error:
            message = str(error).replace(str(folder), str(out))
            raise InputError(f"the export failed its check and was deleted: {message}") from error


def check_hf(
    folder: Path, tokenizer: Tokenizer | None = None, tokens: int | None = None
) -> Agreement:
    """Whether our modules and the reference compute the same from a folder; InputError if not.

    tokenizer: of the folder; its ids must fit the vocabulary, and texts are tried too.
    tokens: length of each sequence tried; default: up to the context, TOKENS, or past the window.
    """
    source = convert.open_hf(folder)
    for name, tensor in source.tensors.items():
        for _, block in safetensors.blocks(tensor):
            convert.cast(folder, name, block, "float32")
    config = source.config
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, source.folder)
    windowed = min(config.window + GREEDY + 64 if any(config.sliding) else 0, MAX_TOKENS)
    length = min(config.context, max(tokens or max(TOKENS, windowed), 2))
    steps = min(GREEDY, length - 1)
    ids_BT = _gate_ids(config, tokenizer, length)
    for place in range(length - steps, length):  # causal, so what follows does not matter
        h_BTD = _hidden(source, ids_BT)
        ids_BT[:, place] = _best(source, h_BTD[:, place - 1])
    return _compare(source, _hidden(source, ids_BT), ids_BT, steps)


def check_weights(folder: Path, config: ModelConfig, params: Params, dtype: str) -> None:
    """Whether the files in `folder` are `config` and `params`, bit for bit."""
    source = convert.open_hf(folder)
    ours, theirs = (dataclasses.asdict(_explicit(c)) for c in (config, source.config))
    for field, value in ours.items():
        if theirs[field] != value:
            raise InputError(
                f"{folder / 'config.json'}: {field} is {theirs[field]!r}, not {value!r}"
            )
    wanted = convert.slots(config)
    # Import forgives other names and a second copy of the head; other readers may not.
    if odd := sorted(safetensors.read_folder(folder).keys() ^ wanted.keys()):
        raise InputError(f"{folder}: tensor {odd[0]!r} is missing or should not be there")
    for name, slot in wanted.items():
        view = slot.view(params)
        for part, block in safetensors.blocks(source.tensors[name]):
            expected = np.ascontiguousarray(np.asarray(view[part]).astype(dtype))
            if block.dtype != expected.dtype or block.tobytes() != expected.tobytes():
                raise InputError(f"{folder}: tensor {name!r} is not the model's {slot.row.path!r}")


def check_same_tokenizer(found: Tokenizer, expected: Tokenizer, folder: Path) -> None:
    """Whether both give every text of a fixed set, control tokens included, the same ids."""
    if dict(found.control) != dict(expected.control):
        raise InputError(f"{folder}: the tokenizer's control tokens are not the model's")
    for text in (*TEXTS, "".join(f"{TEXTS[0]}{token}" for token in expected.control)):
        for special in (False, True):
            ids, wanted = (t.encode(text, special=special) for t in (found, expected))
            if not np.array_equal(ids, wanted):
                raise InputError(f"{folder}: the tokenizer encodes {text[:40]!r} otherwise")


def check_vocabulary(tokenizer: Tokenizer, config: ModelConfig, where: Path | str) -> None:
    """Every ordinary token needs a row of the embedding.

    Control tokens may lie beyond it: Gemma's text models come with the id of an image token.
    """
    largest = max(tokenizer.pieces.keys() - {*tokenizer.control.values()}, default=0)
    if largest >= config.vocab_size:
        raise InputError(
            f"{where}: the tokenizer has token {largest}, the model a vocabulary of "
            f"{config.vocab_size}; take both from one model"
        )


def _explicit(c: ModelConfig) -> ModelConfig:
    """With the values that None and other defaults stand for, as files spell them out."""
    return dataclasses.replace(
        c,
        kv_heads=c.groups,
        rotary_dim=c.rotary_dim or c.head_dim,
        query_scale=float(np.float32(c.scale)),  # the file holds its square's inverse
        sliding=c.sliding or (False,) * c.layers,
        window=c.window if any(c.sliding) else 0,
    )


def _gate_ids(config: ModelConfig, tokenizer: Tokenizer | None, length: int) -> np.ndarray:
    """[B,T]: special ids, then random ones; with a tokenizer also control tokens, then texts."""
    vocab, random = config.vocab_size, np.random.default_rng(0)
    special = (config.bos, config.eos, *config.stops, 0, vocab - 1)
    rows = [[i for i in special if i is not None and i < vocab]]
    if tokenizer is not None:
        control = [i for i in tokenizer.control.values() if i < vocab][: length // 4]
        rows.append([*control, *(i for text in TEXTS for i in tokenizer.encode(text))])
    ids_BT = random.integers(vocab, size=(len(rows), length), dtype=np.int32)
    for ids_T, row in zip(ids_BT, rows, strict=True):
        ids_T[: len(row)] = row[:length]
    return ids_BT


def _hidden(source: Source, ids_BT: Any) -> jax.Array:
    """Final hidden states [B,T,D], float32, of our modules, which see one layer at a time."""
    config, family, dtype = source.config, families.of(source.config), jnp.dtype("float32")
    # The embedding's other rows change nothing: a vocabulary of the ids at hand is enough.
    used, small_ids = np.unique(ids_BT, return_inverse=True)
    small = dataclasses.replace(config, vocab_size=len(used))
    wte_VD = safetensors.gathered(_tensor(source, "embed/wte"), used, np.float32)
    embed = _weights(source, "embed") | {"wte": wte_VD}
    positions_BT = jnp.arange(ids_BT.shape[1])[None]
    ids_BT = jnp.asarray(small_ids.reshape(ids_BT.shape))
    with jax.default_matmul_precision("highest"):
        x_BTD: Any = family.Embed(small, dtype).apply({"params": embed}, ids_BT, positions_BT)
        places, kinds = family.places(config, positions_BT, dtype), family.kinds(config)
        for layer in range(config.layers):
            kind = jax.tree.map(lambda kinds_L, layer=layer: kinds_L[layer], kinds)
            weights = {"params": _weights(source, "blocks", layer)}
            # Waited for, or the weights of many layers would pile up before their turn.
            x_BTD = _block(config)(weights, x_BTD, places, kind).block_until_ready()
        norm = family.FinalNorm(config.norm_eps)
        return norm.apply({"params": _weights(source, "final_norm")}, x_BTD)


def _tensor(source: Source, path: str) -> np.ndarray:
    """The file's tensor of an unstacked parameter."""
    slots = convert.slots(source.config)
    return source.tensors[next(name for name, slot in slots.items() if slot.row.path == path)]


def _weights(source: Source, folder: str, layer: int | None = None) -> Params:
    """One folder of our tree, float32, at one layer; without the embedding, which is large."""
    tree: Params = {}
    for name, slot in convert.slots(source.config).items():
        inside = slot.row.path.startswith(f"{folder}/") and slot.layer == layer
        if inside and slot.row.path != "embed/wte":
            array = safetensors.copied(source.tensors[name], np.float32)
            put(tree, slot.row.path, array.T if slot.row.transpose else array)
    return tree.get(folder, {})


@functools.lru_cache(maxsize=1)
def _block(config: ModelConfig) -> Callable[..., jax.Array]:
    """One compilation for all layers."""
    return jax.jit(families.of(config).Block(config).apply)


@jax.jit
def _logits(h_BTD: jax.Array, head_CD: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):
        return model.head_logits(h_BTD, head_CD)


def _head(source: Source) -> Iterator[tuple[slice, np.ndarray]]:
    """The output matrix, float32, in chunks of rows."""
    head_VD = _tensor(source, "embed/wte" if source.config.tied else "head")
    for rows, head_CD in safetensors.blocks(head_VD, CHUNK):
        yield rows, head_CD.astype(np.float32)


def _best(source: Source, h_BD: jax.Array) -> np.ndarray:
    """The most likely ids [B]."""
    best_B, ids_B = np.full(len(h_BD), -np.inf), np.zeros(len(h_BD), np.int32)
    for rows, head_CD in _head(source):
        logits_BC = np.asarray(_logits(h_BD[:, None], head_CD))[:, 0]
        better_B = logits_BC.max(-1) > best_B
        ids_B[better_B] = logits_BC.argmax(-1)[better_B] + rows.start
        best_B = np.maximum(best_B, logits_BC.max(-1))
    return ids_B


class _Seen(NamedTuple):
    """What the chunks of logits [N,V] seen so far come to."""

    top_N: np.ndarray
    low_N: np.ndarray
    log_N: np.ndarray  # of the sum of exponentials
    target_N: np.ndarray  # the logit of the next token

    def and_also(self, start: int, logits_NC: np.ndarray, targets_N: np.ndarray) -> "_Seen":
        peak_N = logits_NC.max(-1)
        log_N = peak_N + np.log(np.exp(logits_NC - peak_N[:, None]).sum(-1, dtype=np.float64))
        column_N = np.clip(targets_N - start, 0, logits_NC.shape[1] - 1)
        here_N = column_N == targets_N - start
        logit_N = logits_NC[np.arange(len(column_N)), column_N]
        return _Seen(
            np.maximum(self.top_N, peak_N),
            np.minimum(self.low_N, logits_NC.min(-1)),
            np.logaddexp(self.log_N, log_N),
            np.where(here_N, logit_N, self.target_N),
        )


def _compare(source: Source, h_BTD: jax.Array, ids_BT: np.ndarray, steps: int) -> Agreement:
    """Our logits of these hidden states against the reference's; the last `steps` ids are ours."""
    folder, size = source.folder, ids_BT.size
    outputs = reference.forward(folder, ids_BT)
    targets_N = np.roll(ids_BT, -1, axis=1).reshape(-1)
    low_N = np.full(size, -np.inf)
    ours = theirs = _Seen(low_N, -low_N, low_N, np.zeros(size))
    at_N = np.zeros(size)  # the reference's logit of our most likely token
    difference = 0.0
    for rows, head_CD in _head(source):
        ours_NC = np.asarray(_logits(h_BTD, head_CD)).reshape(size, -1)
        theirs_NC = outputs.logits(rows).reshape(size, -1)
        difference = max(difference, float(np.abs(ours_NC - theirs_NC).max()))
        best_N = theirs_NC[np.arange(size), ours_NC.argmax(-1)]
        at_N = np.where(ours_NC.max(-1) > ours.top_N, best_N, at_N)
        ours = ours.and_also(rows.start, ours_NC, targets_N)
        theirs = theirs.and_also(rows.start, theirs_NC, targets_N)
    scale = float(max(theirs.top_N.max(), -theirs.low_N.min()))
    if not (theirs.top_N - theirs.low_N).max() > TIE * scale:
        raise InputError(
            f"{folder}: every token is equally likely (loss ln V); weights are missing"
        )
    error = difference / scale
    if not error <= TOLERANCE:
        raise InputError(
            f"{folder}: logits differ from the reference's by {error:.1e} of the largest "
            f"(limit {TOLERANCE:.0e})"
        )
    # How far our best token is from the reference's best: zero, or a tie that rounding decides.
    # The ids at the end were chosen by us, so this says the same of greedy decoding.
    if not (theirs.top_N - at_N).max() <= TIE * scale:
        raise InputError(f"{folder}: the most likely token differs from the reference's")
    nll_BT = ((seen.log_N - seen.target_N).reshape(ids_BT.shape) for seen in (ours, theirs))
    loss, expected = (float(side_BT[:, :-1].mean()) for side_BT in nll_BT)
    if not abs(loss - expected) <= LOSS_TOLERANCE:
        raise InputError(f"{folder}: the loss is {loss:.5f}, the reference's {expected:.5f}")
    return Agreement(error, expected, abs(loss - expected), steps, size)
