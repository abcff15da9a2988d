"""Metadata of an index's images: what documents they are pages of, languages, dates, whatever a search may ask for.

    DIR/<split>/metadata.jsonl    first line {"format": "samer_metadata", "format_version": 1, "sha256": of the rest};
                                  then an object a line: `id` of an image, and its columns: texts, numbers, truth
                                  values, null. Images that have none have no line

It lies beside an index's shards and is no part of how the index was made, so it may be written at any time; a line of
an image that the index does not hold is passed over.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data import parquet
from samer.index.manifest import read_index_manifest
from samer.runtime.files import DiskError, atomic_path, is_file, opened, trouble
from samer.runtime.shards import load_header

FILE = "metadata.jsonl"
FORMAT, FORMAT_VERSION = "samer_metadata", 1
IDS = ("id", "_id", "corpus-id", "corpus_id")  # what the column is called; the last three in sets of documents
PLAIN = (str, int, float, bool, type(None))
_NUMBER = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
Columns = Mapping[str, Mapping[str, Any]]  # columns by name, by id


def write_columns(folder: str | Path, split: str, columns: Columns) -> None:
    """Replaces the metadata of a split in one step; without any the file goes."""
    path = Path(folder) / split / FILE
    kept = {name: own for name, own in columns.items() if own}
    if not kept:
        path.unlink(missing_ok=True)
        return
    body = io.StringIO()
    for name, own in kept.items():
        body.write(json.dumps({"id": name, **own}, ensure_ascii=False) + "\n")
    content = body.getvalue().encode()
    head = {"format": FORMAT, "format_version": FORMAT_VERSION, "sha256": hashlib.sha256(content).hexdigest()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(json.dumps(head).encode() + b"\n" + content)


def read_columns(folder: str | Path, split: str) -> dict[str, dict[str, Any]]:
    """The metadata of a split by id; empty where there is none.

    Raises:
        InputError: a file that is damaged or can't be read.
    """
    path = Path(folder) / split / FILE
    if not is_file(path):
        return {}
    try:
        with opened(path) as handle:
            head, _, content = handle.read().partition(b"\n")
    except OSError as error:
        raise trouble(path, error) from None
    try:
        about = json.loads(head)
        right = isinstance(about, dict) and (about["format"], about["format_version"]) == (FORMAT, FORMAT_VERSION)
        right = right and about["sha256"] == hashlib.sha256(content).hexdigest()
        rows = [json.loads(line) for line in content.splitlines()] if right else []
        found = {row.pop("id"): row for row in rows}
    except (ValueError, KeyError, AttributeError):
        right = False
    if not right:
        raise DiskError(f"{path}: contents differ from their own checksum; give the metadata again with --metadata")
    return found


def rename_columns(folder: str | Path, split: str, names: Mapping[str, str]) -> None:
    """Gives images that moved the metadata that they had; `names`: old id -> new one."""
    columns = read_columns(folder, split) if names else {}
    found = {names[name]: columns.pop(name) for name in list(columns) if name in names}
    if found:
        write_columns(folder, split, {**columns, **found})


def columns_in_file(file: str | Path) -> dict[str, dict[str, Any]]:
    """Metadata as people have it: `.jsonl`, `.csv` or `.parquet`, a row an image, with a column `id`.

    Numbers of a csv file are read as numbers.

    Raises:
        InputError: another kind of file, a row without an id or with one that came before; names the row.
    """
    path = Path(file)
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: metadata is read from .jsonl, .csv or .parquet; write one of these")
    found: dict[str, dict[str, Any]] = {}
    for where, row in readers[path.suffix.lower()](path):
        key = next((each for each in IDS if each in row), None) if isinstance(row, dict) else None
        name = None if key is None else row.pop(key)
        if name in (None, ""):
            raise InputError(f"{where}: no id; each row names its image so, as the index does")
        if str(name) in found:
            raise InputError(f"{where}: the id {str(name)[:80]!r} came before; join the rows")
        found[str(name)] = {key: parquet.plain(value) for key, value in row.items()}
        bad = next((key for key, value in found[str(name)].items() if not _keeps(value)), None)
        if bad is not None:
            raise InputError(f"{where}: {bad[:40]!r} is no text, number or truth value; take it out")
    return found


def _keeps(value: Any) -> bool:
    return isinstance(value, PLAIN) and value not in (float("inf"), float("-inf"))


def _text(path: Path) -> str:
    try:
        with opened(path) as handle:
            return handle.read().decode("utf-8-sig")
    except OSError as error:
        raise trouble(path, error) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; save it so") from None


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            try:
                yield f"{path}: line {number}", json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}: line {number} is no JSON ({str(error)[:80]}); correct it") from None


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(csv.DictReader(io.StringIO(_text(path))), 1):
        if None in row or None in row.values():
            raise InputError(f"{path}: row {number} has more or fewer fields than the first line; correct it")
        yield f"{path}: row {number}", {key: value if key in IDS else as_number(value) for key, value in row.items()}


def as_number(text: str) -> int | float | str | None:
    """A number where a text is one, None where it is empty, else the text; 007 and 2020_01 are names, no numbers."""
    if not _NUMBER.fullmatch(text):
        return text or None
    found = float(text)
    if abs(found) == float("inf"):
        return text
    return int(text) if text.lstrip("+-").isdecimal() else found


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    names = parquet.plain_columns_of(path)
    for number, row in parquet.table_rows(path, names):
        yield f"{path}: row {number}", dict(zip(names, row))


def give_columns(folder: str | Path, file: str | Path) -> tuple[str, int, int]:
    """Replaces the metadata of an index by that of a file.

    Returns:
        The split, how many of its images have metadata now, and how many rows of the file name none of its images.

    Raises:
        InputError: as `columns_in_file`; an index of several splits, or none of whose images is named.
    """
    manifest = read_index_manifest(Path(folder) / "manifest.json")
    if len(manifest.splits) != 1:
        raise InputError(
            f"{folder}: holds {', '.join(manifest.splits) or 'nothing'}; metadata is for an index of one split"
        )
    (split,) = manifest.splits
    found = columns_in_file(file)
    ids = {
        name
        for shard in manifest.splits[split].images
        for name in load_header(Path(folder) / split / shard.file)["stamp"]["ids"]
    }
    known = {name: own for name, own in found.items() if name in ids}
    if not known:
        shown = ", ".join(repr(name[:40]) for name in sorted(ids)[:2])
        raise InputError(
            f"{file}: none of its {len(found):,} ids is an image of {folder}, whose ids are such as {shown}"
        )
    write_columns(folder, split, known)
    return split, len(known), len(found) - len(known)
