"""ViDoRe v1, v2 and v3, and any retrieval data set in their two forms of parquet files -> records.

The question form (v1) is one table, `data/<split>-*.parquet`: query, image, image_filename. Its pages are the distinct
image_filename, in the order of their first row. A row without a query adds a page only. The same question asked of
several rows is one query, which all of their pages answer.

The BEIR form (v1's `_beir`, v2, v3) has three folders, `corpus`, `queries` and `qrels`, each with `<split>-*.parquet`,
in the data set's folder or in `data`. Columns are written with hyphens (v1, v2) or underscores (v3). A score of qrels
is a grade; 0 is not relevant. v3's `bounding_boxes` are pixels of the page, of one or more annotators; the boxes of all
of them are the evidence of the query on that page.

A query is the caption of its page of the highest grade, of equals the first of the corpus; `Caption.grades` names all
pages. Where queries have a language, `test@english` are those of one. Pages are unpacked once into the folder `pages`
beside the tables, since everything else reads picture files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from samer.config import InputError
from samer.data.parquet import column_named, columns_of, table_files, table_rows, unpack, whole
from samer.data.parts import split_part, take_part
from samer.data.pictures import PictureError, displayed_size, one_line
from samer.data.reader import Defects, RowReader
from samer.data.records import LONGEST_CAPTION, MOST_GRADE, Box, Caption, ImageRecord, Phrase
from samer.runtime.files import is_dir, listing, lookup

FOLDERS = ("corpus", "queries", "qrels")
PAGES = "pages"  # where pictures are unpacked
PAGE_ID = ("corpus-id", "corpus_id", "_id", "id")
QUERY_ID = ("query-id", "query_id", "_id", "id")
TEXT = ("query", "text")
BOXES = "bounding_boxes"

# what is left out, as it is told at the end of a load
NO_PAGE = "{count} judgements of {files} files name a page that is not in the corpus, and are left out"
NO_QUERY = "{count} judgements of {files} files name a query that is not there, and are left out"
UNANSWERED = "{count} queries of {files} files have no relevant page, and are left out"
LONG_QUERIES = f"{{count}} queries of {{files}} files are cut to {LONGEST_CAPTION:,} characters"
BAD_BOXES = "{count} boxes of {files} files are empty, inverted or outside the page, and left out"

_Where = tuple[Path, int]  # a row of a file


@dataclass
class _Tables:
    """What the tables of a split say.

    Attributes:
        image: the column of pictures.
        pages: id -> its row, in the order of the corpus.
        queries: id -> its text and row.
        grades: query id -> page id -> grade, above 0.
        boxes: (query id, page id) -> boxes as they are written, each with its row; v3 only.
    """

    image: str = "image"
    pages: dict[str, _Where] = field(default_factory=dict)
    queries: dict[str, tuple[str, _Where]] = field(default_factory=dict)
    grades: dict[str, dict[str, int]] = field(default_factory=dict)
    boxes: dict[tuple[str, str], list[tuple[object, _Where]]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Layout:
    """The files of a copy by split: `corpus`, `queries` and `qrels`, or `data` alone."""

    root: Path
    tables: dict[str, dict[str, list[Path]]]

    def of(self, table: str, split: str) -> list[Path]:
        """The files of a split; a corpus that has one split only serves all of them."""
        held = self.tables[table]
        if split not in held and table == "corpus" and len(held) == 1:
            return whole(next(iter(held.values())))
        if split not in held:
            raise InputError(f"{self.root}: {table} has no split {split!r}; use one of {', '.join(held)}")
        return whole(held[split])


def find_tables(root: str | Path) -> _Layout:
    """The tables of a copy in one of the two forms.

    Raises:
        InputError: `root` is no folder, or holds neither form.
    """
    root = lookup(os.path.expanduser(root))
    if not is_dir(root):
        raise InputError(f"{root}: not a folder; point data.root at the data set's copy")
    for base in (root, root / "data"):
        there = [name for name in FOLDERS if is_dir(base / name)]
        if len(there) == len(FOLDERS):
            tables = {name: table_files(base / name) for name in FOLDERS}
            if bare := next((name for name, files in tables.items() if not files), None):
                raise InputError(f"{base / bare}: no parquet file, as test-00000-of-00001.parquet; restore it")
            return _Layout(root, tables)
        if there:
            missing = next(name for name in FOLDERS if name not in there)
            raise InputError(f"{base}: {there[0]} is there, but no folder {missing}; restore it")
    for base in (root / "data", root):
        if is_dir(base) and (files := table_files(base)):
            return _Layout(root, {"data": files})
    raise InputError(
        f"{root}: no parquet tables (looked for: corpus/, queries/ and qrels/, or data/<split>-*.parquet); "
        "download the data set there"
    )


def _words(value: object, where: _Where, column: str) -> str:
    """An id, a text or a language of a row; empty for null."""
    if value is None:
        return ""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise InputError(f"{where[0]}: row {where[1]}: {column} is {value!r:.60}, no text; correct it")
    return one_line(value)


def _identity(value: object, where: _Where, column: str) -> str:
    found = _words(value, where, column)
    if not found:
        raise InputError(f"{where[0]}: row {where[1]}: {column} is empty; every row needs one")
    return found


def _in_language(files: Sequence[Path], language: str) -> tuple[str, ...]:
    """The column to read for a language, if one is asked for; () for all languages.

    Raises:
        InputError: no such column, or no query of that language; names those that there are.
    """
    if not language:
        return ()
    column = column_named(files[0], ("language",))
    held = {str(value) for path in files for _, (value,) in table_rows(path, (column,))}
    if language not in held:
        raise InputError(f"{files[0]}: no query in {language!r}; there are {', '.join(sorted(held))}")
    return (column,)


def _read_questions(files: Sequence[Path], language: str, defects: Defects) -> _Tables:
    tables, numbers = _Tables(), {}
    wanted = _in_language(files, language)
    for path in files:
        column, page_column = column_named(path, TEXT), column_named(path, ("image_filename",))
        column_named(path, (tables.image,))
        for row, (page, query, *spoken) in table_rows(path, (page_column, column, *wanted)):
            where = path, row
            with defects.spared():
                page = _identity(page, where, page_column)
                tables.pages.setdefault(page, where)
                text = _words(query, where, column)
                if text and (not spoken or spoken[0] == language):
                    number = numbers.setdefault(text, str(len(numbers)))
                    tables.queries.setdefault(number, (text, where))
                    tables.grades.setdefault(number, {})[page] = 1
    return tables


def _read_beir(layout: _Layout, split: str, language: str, boxes: bool, defects: Defects) -> _Tables:
    tables = _Tables()
    for path in layout.of("corpus", split):
        column = column_named(path, PAGE_ID)
        column_named(path, (tables.image,))
        for row, (value,) in table_rows(path, (column,)):
            with defects.spared():
                page = _identity(value, (path, row), column)
                if page in tables.pages:
                    raise InputError(f"{path}: row {row}: {column} {page!r} is there twice; remove one")
                tables.pages[page] = path, row
    files = layout.of("queries", split)
    wanted, others = _in_language(files, language), set()
    for path in files:
        column, text_column = column_named(path, QUERY_ID), column_named(path, TEXT)
        for row, (value, text, *spoken) in table_rows(path, (column, text_column, *wanted)):
            with defects.spared():
                query = _identity(value, (path, row), column)
                if query in tables.queries or query in others:
                    raise InputError(f"{path}: row {row}: {column} {query!r} is there twice; remove one")
                if spoken and spoken[0] != language:
                    others.add(query)
                else:
                    tables.queries[query] = _identity(text, (path, row), text_column), (path, row)
    for path in layout.of("qrels", split):
        _read_judgements(path, tables, others, boxes, defects)
    return tables


def _read_judgements(path: Path, tables: _Tables, others: set[str], boxes: bool, defects: Defects) -> None:
    """Adds what a file of qrels says to the tables; `others` are queries of other languages."""
    names = column_named(path, QUERY_ID[:2]), column_named(path, PAGE_ID[:2]), column_named(path, ("score",))
    more = (BOXES,) if boxes and BOXES in columns_of(path) else ()
    for row, (query, page, score, *found) in table_rows(path, (*names, *more)):
        where = path, row
        with defects.spared():
            query, page = _identity(query, where, names[0]), _identity(page, where, names[1])
            score = _grade(score, where)
            if query in others:
                continue
            if query not in tables.queries:
                defects.add(NO_QUERY, path, f"row {row}: there is no query {query!r}; restore it or remove the row")
            elif page not in tables.pages:
                defects.add(NO_PAGE, path, f"row {row}: there is no page {page!r}; restore it or remove the row")
            elif score > 0:
                grades = tables.grades.setdefault(query, {})
                grades[page] = max(score, grades.get(page, 0))
                if found and found[0]:
                    tables.boxes.setdefault((query, page), []).extend((box, where) for box in found[0])


def _grade(score: object, where: _Where) -> int:
    whole = isinstance(score, (int, float)) and not isinstance(score, bool) and score == score // 1
    if not whole or not 0 <= score <= MOST_GRADE:
        message = f"score is {score!r:.40}; a grade is a whole number from 0 to {MOST_GRADE}"
        raise InputError(f"{where[0]}: row {where[1]}: {message}")
    return int(score)


def _shares(boxes: list[tuple[object, _Where]], picture: Path, defects: Defects) -> tuple[Box, ...]:
    """Boxes in pixels as shares of a page; up to a pixel outside is clamped, what is worse goes to `defects`."""
    try:
        width, height = displayed_size(picture)
    except PictureError:  # what is wrong with it is said by whoever decodes it
        return ()
    shares = []
    for box, (path, row) in boxes:
        values = [box.get(key) for key in ("x1", "y1", "x2", "y2")] if isinstance(box, dict) else [None]
        if not all(isinstance(value, (int, float)) and isfinite(value) for value in values):
            with defects.spared():
                raise InputError(f"{path}: row {row}: {BOXES} holds {box!r:.80}, not x1, y1, x2, y2; correct it")
            continue
        x1, y1, x2, y2 = max(values[0], 0), max(values[1], 0), min(values[2], width), min(values[3], height)
        outside = min(values) < -1 or values[2] > width + 1 or values[3] > height + 1
        if outside or x2 <= x1 or y2 <= y1:
            shown = ", ".join(f"{value:g}" for value in values)
            why = "outside" if outside else "empty or inverted in"
            message = f"row {row}: box ({shown}) is {why} the page of {width} x {height} pixels; correct it"
            defects.add(BAD_BOXES, path, message)
            continue
        shares.append((x1 / width, y1 / height, x2 / width, y2 / height))
    return tuple(dict.fromkeys(shares))


def _captions(
    tables: _Tables, pictures: dict[str, Path], first: dict[str, int], defects: Defects
) -> dict[str, list[Caption]]:
    """The queries of each page, by page id; those of other pages are left out.

    `first` is a page's place in the corpus.
    """
    found: dict[str, list[Caption]] = {page: [] for page in pictures}
    for query, (text, (path, row)) in tables.queries.items():
        grades = sorted(tables.grades.get(query, {}).items(), key=lambda pair: first[pair[0]])
        if not grades:
            defects.add(UNANSWERED, path, f"row {row}: query {query!r} has no relevant page; add one or remove it")
            continue
        page = max(grades, key=lambda pair: pair[1])[0]  # of equals the first
        if page not in found:
            continue
        if len(text) > LONGEST_CAPTION:
            message = f"row {row}: a query of {len(text):,} characters; {LONGEST_CAPTION:,} are the most"
            defects.add(LONG_QUERIES, path, message)
        caption = Caption(text, (), True, query, tuple(grades)).within(LONGEST_CAPTION)
        boxes = _shares(tables.boxes.get((query, page), []), pictures[page], defects)
        if boxes:
            phrase = Phrase(caption.text, f"query {query}", ("evidence",), 0, len(caption.text), boxes)
            caption = Caption(caption.text, (phrase,), True, query, tuple(grades))
        found[page].append(caption)
    return found


def _unpacked(root: Path, tables: _Tables, chosen: Sequence[str], defects: Defects) -> dict[str, Path]:
    """The picture files of pages, by id, in their order."""
    rows: dict[Path, dict[int, str]] = {}
    for page in chosen:
        path, row = tables.pages[page]
        rows.setdefault(path, {})[row] = page
    files: dict[str, Path] = {}
    for path, own in rows.items():
        found = unpack(path, tables.image, own.keys(), root / PAGES, defects)
        files |= {own[row]: picture for row, picture in found.items()}
    return {page: files[page] for page in chosen if page in files}


class Vidore(RowReader):
    """ViDoRe v1, v2, v3 in parquet, in the question form or the BEIR form."""

    undescribed = True
    signs = "corpus/, queries/ and qrels/ of parquet files, or data/<split>-*.parquet"

    def holds(self, root: Path) -> bool:
        places = (root, root / "data")
        beir = any(all(is_dir(base / name) for name in FOLDERS) for base in places)
        return beir or any(path.suffix == ".parquet" for base in places if is_dir(base) for path in listing(base))

    def check(self, root: str | Path) -> bool:
        """Whether the judgements have boxes, as v3's."""
        tables = find_tables(root).tables
        return any(BOXES in columns_of(path) for files in tables.get("qrels", {}).values() for path in files)

    def splits(self, root: str | Path) -> list[str]:
        tables = find_tables(root).tables
        return list(tables.get("qrels") or tables["data"])

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        """The pages in the order of the corpus, with the queries whose best page each is; see the head of this file."""
        name, part = split_part(split)
        name, _, language = name.partition("@")
        layout = find_tables(root)
        if "data" in layout.tables:
            tables = _read_questions(layout.of("data", name), language, defects)
        else:
            tables = _read_beir(layout, name, language, boxes, defects)
        if not tables.pages:
            raise InputError(f"{root}: zero pages in {name}; restore its parquet files")
        first = {page: number for number, page in enumerate(tables.pages)}
        chosen = take_part(list(tables.pages), part, split)[:limit_images]
        pictures = _unpacked(layout.root, tables, chosen, defects)
        captions = _captions(tables, pictures, first, defects)
        return [ImageRecord(page, picture, tuple(captions[page])) for page, picture in pictures.items()]
