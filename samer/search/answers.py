"""Answers to queries, printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator

from samer.config import InputError
from samer.runtime.streams import heard, printable
from samer.search.open_index import Found, SearchIndex, Wanted
from samer.search.queries import Asked

MARKS = {None: "", "gone": " (gone)", "changed": " (changed since it was indexed)"}


def answers(index: SearchIndex, asked: Iterable[Asked], wanted: int | Wanted, as_json: bool) -> Iterator[dict]:
    """Answers queries one after the other, as long as somebody reads what is printed; none is kept.

    A query that can't be answered is told on standard error, and those after it are answered all the same.

    Raises:
        InputError: at the end, if queries of a file or of arguments were refused; on a terminal they were seen.
    """
    refused = 0
    for query in asked:
        try:
            if query.problem:
                raise InputError(query.problem)
            yield answer(index, query.text, wanted, as_json)
        except InputError as error:
            print("error:", f"{query.place}: {error}" if query.place else error, file=sys.stderr, flush=True)
            refused += bool(query.place)
        if not heard():
            return
    if refused:
        raise InputError(f"{refused} of the queries could not be answered, see above; mend those and ask them again")


def answer(index: SearchIndex, text: str, wanted: int | Wanted, as_json: bool) -> dict:
    """Searches, prints what was found, and returns it.

    Raises:
        InputError: a query that can't be encoded.
    """
    found = index.search(text, wanted)
    rows = [{**_page(index, name, score), "state": state} for (name, score), state in zip(found.hits, found.states)]
    if found.documents is not None:
        rows = _documents(index, found, rows)
    took = {"encode_ms": round(found.encode_ms, 2), "search_ms": round(found.search_ms, 2)}
    result = {"query": text, "results": rows, **took}
    if as_json:
        print(as_line(result), flush=True)
        return result
    lines = [f"{printable(text)}   ({took['encode_ms']:.0f} ms to encode, {took['search_ms']:.1f} ms to search)"]
    lines += [f"{place:3}  {row['score']:.4f}  {_shown(row)}{MARKS[row['state']]}" for place, row in enumerate(rows, 1)]
    print("\n".join(lines), flush=True)
    return result


def _page(index: SearchIndex, name: str, score: float) -> dict:
    """An image as it is printed, with its metadata where it has some."""
    row = {"id": name, "path": str(index.root / name if index.root else name), "score": round(score, 6)}
    return row | ({"metadata": index.columns[name]} if name in index.columns else {})


def _documents(index: SearchIndex, found: Found, rows: list[dict]) -> list[dict]:
    """Documents as they are printed: their best page's row, with the pages that count."""
    told = []
    for document, row in zip(found.documents, rows):
        pages = [_page(index, name, score) for name, score in document.pages]
        told.append({**row, "document": document.name, "score": round(document.score, 6), "pages": pages})
    return told


def _shown(row: dict) -> str:
    """What a line says of an image, or of a document and its best pages."""
    if "document" not in row:
        return printable(row["path"])
    pages = ", ".join(printable(page["path"]) for page in row["pages"])
    return f"{printable(row['document'])}: {pages}"


def as_line(value: dict) -> str:
    """JSON in one line: letters as they are where standard output has them, else all of it in ASCII."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value)
    return text
