"""Benchmark items as rows: what attribution asks the training data about.

A row is the context, unsupervised, and a choice, supervised: its loss is the choice's negative
log-probability, the quantity that the scorer reports. Either the right choice of every item gets a
row, or all its choices do, which is what a margin is taken of.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from core.errors import InputError
from core.files import PathLike
from core.rows import IGNORED, save_rows
from evals.items import Item, keep_last, tokenise
from tokenizers import Tokenizer

Choices = Literal["gold", "all"]


def build_query(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    add_eos: bool = False,
    choices: Choices = "gold",
) -> dict[str, Any]:
    """Write the items' rows into the rows folder `out`; returns its `rows.json`.

    length: most tokens of a row; longer contexts are cut on the left, equally for all choices of an
    item, and a choice that does not fit raises InputError. add_eos: the choice must also end.
    Columns: id, and source if any item has one; for `all` also item, choice (from 0) and gold, and
    an id is the item's with the choice's number behind it.
    """
    if add_eos and tokenizer.eos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no EOS to add")
    end = np.array([tokenizer.eos] if add_eos else [], np.int32)
    input_ids, labels, truncated, alone = [], [], 0, 0
    columns: dict[str, list[Any]] = {"id": [], "source": [], "item": [], "choice": [], "gold": []}
    for item in items:
        wanted = range(len(item.choices)) if choices == "all" else [item.label]
        prompts = tokenise(tokenizer, item.context, [item.choices[i] for i in wanted])
        prompts = [p._replace(ids=np.concatenate([p.ids, end])) for p in prompts]
        longest = max(prompts, key=lambda prompt: len(prompt.ids))
        cut = len(longest.ids) - len(keep_last(longest, length, item).ids)
        truncated += cut > 0
        source = item.extra.get("source")
        for i, prompt in zip(wanted, prompts, strict=True):
            alone += prompt.alone
            ids = prompt.ids[cut:]
            input_ids.append(ids)
            labels.append(np.where(np.arange(len(ids)) < prompt.start - cut, IGNORED, ids))
            name = f"{item.id}/{i}" if choices == "all" else item.id
            told = (name, None if source is None else str(source), item.id, i, i == item.label)
            for column, value in zip(columns.values(), told, strict=True):
                column.append(value)
    if not any(source is not None for source in columns["source"]):
        del columns["source"]
    if choices == "gold":
        columns = {name: columns[name] for name in ("id", "source") if name in columns}
    info = {"kind": "query", "length": length, "choices": choices, "add_bos": tokenizer.add_bos,
            "add_eos": add_eos, "truncated_items": truncated, "alone_choices": alone}  # fmt: skip
    return save_rows(out, input_ids, labels, columns, tokenizer.fingerprint, info)
