"""`attribute query`: the rows of a store whose gradients are nearest to a query's."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from core.command import (
    PATH,
    POSITIVE,
    Door,
    batch_tokens_option,
    execution,
    execution_options,
    load_model,
    model_option,
    producing,
    show,
)


@click.command("query")
@click.argument("store", type=PATH)
@model_option
@click.option("--normalizer", type=PATH, help="the one the store was built with")
@click.option("--query", type=PATH, help="rows")
@click.option("--text", "texts", multiple=True,
              help="may be repeated; without it or --query, lines of stdin")  # fmt: skip
@click.option("--top-k", type=POSITIVE, default=10, help="rows of each query")
@click.option("--cosine/--inner", default=False, help="compare directions, or products")
@click.option("--verify", is_flag=True, help="read the store's checksums first")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object a query")
@click.option("--out", type=PATH, help="folder for hits.jsonl, instead of printing")
@batch_tokens_option
@execution_options
@click.pass_obj
def query(door: Door, **opts: Any) -> None:
    """Find the rows of a STORE that matter most to a query; positive = proponent."""
    from core.errors import InputError
    from core.files import dumps, write_jsonl

    if opts["query"] and opts["texts"]:
        raise InputError("--query and --text name two queries; give one of them")
    if opts["out"] is None:
        for answer in _answers(door, opts):
            click.echo(dumps(answer) if opts["as_json"] else _table(answer))
        return
    if not opts["query"] and not opts["texts"]:
        raise InputError("--out records no lines of stdin; give --query or --text")
    with producing("attribute query", opts) as folder:
        if folder is not None:
            answers = list(_answers(door, opts))
            write_jsonl(folder / "hits.jsonl", answers)
            show(opts["out"], {"queries": len(answers)})


def _answers(door: Door, opts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was found for each query, in order; for a line of stdin when it has come."""
    from attribution import normalizer
    from attribution.query import answers, text_rows
    from attribution.store import Pass, Store
    from attribution.targets import targets
    from core.errors import InputError

    store = Store(opts["store"])
    if opts["verify"]:
        store.verify()
    loaded = load_model(opts["model"], opts["adapter"])
    store.check_model(loaded.fingerprint)
    pool = door.rows(store.rows_path, loaded)
    store.check_rows(pool)
    spec, config, moments = store.spec, loaded.config, None
    if opts["normalizer"]:
        found = targets(config, spec)
        moments = normalizer.load(opts["normalizer"], config, found, spec.include_bias)
        store.check(spec._replace(normalizer=normalizer.identity(moments)), loaded.fingerprint)
    source = Pass(loaded, pool, spec, execution(opts), opts["batch_tokens"], moments)
    rows = door.rows(opts["query"], loaded) if opts["query"] else None
    tokenizer = door.tokenizer(None, loaded) if loaded.tokenizer or rows is None else None

    def of_texts(texts: list[str]) -> list[dict[str, Any]]:
        asked = text_rows(texts, tokenizer, config.context)
        return answers(store, source, tokenizer, asked, texts, opts["top_k"], opts["cosine"])

    if rows is not None:
        numbers = list(range(len(rows)))
        yield from answers(store, source, tokenizer, rows, numbers, opts["top_k"], opts["cosine"])
    elif opts["texts"]:
        yield from of_texts(list(opts["texts"]))
    else:
        for line in sys.stdin:
            try:
                if text := line.strip():
                    yield from of_texts([text])
            except InputError as error:  # of one line; the next may be better
                click.echo(f"Error: {error}", err=True)


def _table(answer: dict[str, Any]) -> str:
    from attribution.query import ORIGIN

    number = f" {answer['query']}" if isinstance(answer["query"], int) else ""
    lines = [f"query{number}: {answer['text']}"]
    for hit in answer["hits"]:
        origin = " ".join(str(hit[name]) for name in ORIGIN if name in hit)
        where = f"row {hit['row']:<8} {origin}"
        lines.append(f"{hit['rank']:>4}  {hit['score']:>11.4g}  {where}  {hit['text']}".rstrip())
    return "\n".join(lines)
