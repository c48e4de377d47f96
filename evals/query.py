"""Benchmark items as rows: what attribution asks the training data about.

A row is the context, unsupervised, and the right choice, supervised: its loss is the choice's
negative log-probability, the quantity that the scorer reports.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from core.errors import InputError
from core.files import PathLike
from core.rows import IGNORED, save_rows
from evals.items import Item, keep_last, tokenise
from tokenizers import Tokenizer


def build_query(
    items: Sequence[Item],
    tokenizer: Tokenizer,
    length: int,
    out: PathLike,
    add_eos: bool = False,
) -> dict[str, Any]:
    """Write one row an item into the rows folder `out`; returns its `rows.json`.

    length: most tokens of a row; longer contexts are cut on the left, and an answer that does not
    fit raises InputError. add_eos: the answer must also end. Columns: id, and source if any item
    has one.
    """
    if add_eos and tokenizer.eos is None:
        raise InputError(f"tokenizer {tokenizer.name} has no EOS to add")
    end = np.array([tokenizer.eos] if add_eos else [], np.int32)
    input_ids, labels, truncated, alone = [], [], 0, 0
    for item in items:
        [prompt] = tokenise(tokenizer, item.context, [item.answer])
        prompt = prompt._replace(ids=np.concatenate([prompt.ids, end]))
        kept = keep_last(prompt, length, item)
        truncated += len(kept.ids) < len(prompt.ids)
        alone += prompt.alone
        input_ids.append(kept.ids)
        labels.append(np.where(np.arange(len(kept.ids)) < kept.start, IGNORED, kept.ids))
    columns: dict[str, list[Any]] = {"id": [item.id for item in items]}
    sources = [item.extra.get("source") for item in items]
    if any(source is not None for source in sources):
        columns["source"] = [None if source is None else str(source) for source in sources]
    info = {"kind": "query", "length": length, "add_bos": tokenizer.add_bos, "add_eos": add_eos,
            "truncated_items": truncated, "alone_choices": alone}  # fmt: skip
    return save_rows(out, input_ids, labels, columns, tokenizer.fingerprint, info)
