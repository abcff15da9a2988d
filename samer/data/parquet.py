"""Tables in parquet files, by pyarrow: which there are, their rows, and the pictures in them as files.

Rows are counted from 0, as pyarrow and pandas count them. A split is `<split>.parquet` or
`<split>-00000-of-00002.parquet` and so on, as the hub stores data sets.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.pictures import one_line
from samer.data.reader import Defects
from samer.runtime.files import about, atomic_path, file_hash, is_dir, is_file, listing, read_json, trouble, write_json
from samer.runtime.processes import print0

REMEDY = "install it to read parquet: pip install pyarrow, or pip install 'samer[parquet]'"
_NAME = re.compile(r"(?P<split>.+?)(-(?P<number>\d{5})-of-(?P<count>\d{5}))?\.parquet")
_ROWS = 64  # read at once; pages of documents take about a megabyte each
_BUFFER = 2**20
_MAGIC = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"RIFF": ".webp",
}  # others: .img


def table_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split of a folder, in order, whether or not all are there; empty where there are none."""
    found: dict[str, dict[int, Path]] = {}
    for path in listing(folder):
        match = _NAME.fullmatch(path.name)
        if match and is_file(path):
            found.setdefault(match["split"], {})[int(match["number"] or 0)] = path
    return {split: [parts[k] for k in sorted(parts)] for split, parts in sorted(found.items())}


def whole(files: list[Path]) -> list[Path]:
    """The files of a split as they are.

    Raises:
        InputError: a part of it is missing.
    """
    matches = [_NAME.fullmatch(path.name) for path in files]
    split, count = matches[-1]["split"], int(matches[-1]["count"] or 1)
    missing = sorted(set(range(count)) - {int(match["number"] or 0) for match in matches})
    if missing:
        place = files[0].parent / f"{split}-{missing[0]:05d}-of-{count:05d}.parquet"
        raise InputError(f"{place}: missing, as are {len(missing) - 1} others of {split}; restore them")
    return files


@contextmanager
def opened_table(path: Path) -> Iterator[Any]:
    """A parquet file, open; what goes wrong within is told with its name."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError(f"{path}: can't be read without pyarrow; {REMEDY}") from None
    try:
        with open(path, "rb") as handle:
            # else a row group's columns are taken up whole, and most files are one row group
            yield pyarrow.parquet.ParquetFile(handle, buffer_size=_BUFFER, pre_buffer=False)
    except OSError as error:
        if error.errno is None:  # pyarrow's own, of what the file holds
            raise _damaged(path, error) from None
        raise trouble(path, error) from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path}: no whole parquet file ({one_line(error)[:160]}); restore the file")


def columns_of(path: Path) -> list[str]:
    """The names of a file's columns.

    Raises:
        InputError: it can't be read.
    """
    with opened_table(path) as file:
        return list(file.schema_arrow.names)


def plain_columns_of(path: Path) -> list[str]:
    """The names of a file's columns of texts, numbers, truth values and dates; raises as `columns_of`."""
    with opened_table(path) as file:
        return [each.name for each in file.schema_arrow if is_plain(each.type)]


def is_plain(kind: Any) -> bool:
    """Whether values of one of Arrow's types are texts, numbers, truth values or dates."""
    from pyarrow import types

    if types.is_dictionary(kind):  # pandas' categories
        kind = kind.value_type
    kinds = (types.is_string, types.is_large_string, types.is_integer, types.is_floating, types.is_boolean)
    return any(each(kind) for each in (*kinds, types.is_date, types.is_timestamp))


def values_of(column: Any) -> list:
    """The values of an Arrow column; of times what is finer than a microsecond goes, as Python's have none."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_timestamp(kind) and kind.unit == "ns":
        column = column.cast(pyarrow.timestamp("us", kind.tz), safe=False)
    return column.to_pylist()


def plain(value: Any) -> Any:
    """A value of such a column; dates as ISO 8601 writes them, None for NaN."""
    if isinstance(value, date):  # a time of a day, too
        return value.isoformat()
    return None if isinstance(value, float) and value != value else value


def column_named(path: Path, names: Sequence[str]) -> str:
    """The first of some names that a file has a column of.

    Raises:
        InputError: none; says which there are.
    """
    held = columns_of(path)
    found = next((name for name in names if name in held), None)
    if found is None:
        raise InputError(f"{path}: no column {' or '.join(names)} (it has {', '.join(held)}); restore the file")
    return found


def table_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, tuple]]:
    """Numbers of rows, and their values in some columns; other columns are not read."""
    number = 0
    with opened_table(path) as file:
        for batch in file.iter_batches(batch_size=4096, columns=list(dict.fromkeys(columns))):
            values = {name: values_of(batch.column(name)) for name in columns}
            for row in zip(*(values[name] for name in columns)):
                yield number, row
                number += 1


def unpack(path: Path, column: str, rows: Collection[int], folder: Path, defects: Defects) -> dict[int, Path]:
    """The pictures of some rows as files, written where they are not there yet; they are made anew when `path` changed.

    Args:
        path: the parquet file.
        column: of pictures: bytes, or bytes and a path as the hub stores them.
        rows: their numbers.
        folder: where the pictures of such files go; each file's in a folder of its own within.
        defects: where rows without a picture go, if they are collected.

    Returns:
        Row number -> file, of rows with a picture.

    Raises:
        InputError: a row without a picture, a damaged file, or a folder that can't be written to.
    """
    try:
        folder, held = _place(path, folder)
    except OSError as error:
        raise trouble(path, error) from None
    missing = set(rows) - held.keys()
    if missing:
        print0(f"{path}: {len(missing):,} pictures are unpacked to {folder}")
        with opened_table(path) as file:
            first = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                for number in sorted(missing & set(range(first, first + batch.num_rows))):
                    value = batch.column(column)[number - first].as_py()
                    with defects.spared():
                        held[number] = _write(path, column, number, value, folder)
                first += batch.num_rows
                if first > max(missing):
                    break
    return {number: held[number] for number in rows if number in held}


def _place(path: Path, folder: Path) -> tuple[Path, dict[int, Path]]:
    """Where the pictures of a file's content go, and those that are there by row; those of earlier contents go."""
    place = folder / f"{path.stem}-{_content(path, folder)}"
    if is_dir(place):
        named = {each: re.fullmatch(r"(\d{7})\.\w+", each.name) for each in listing(place)}
        return place, {int(match[1]): each for each, match in named.items() if match and each.stat().st_size}
    if is_dir(folder):
        state = re.compile(re.escape(path.stem) + "-[0-9a-f]{16}")
        for older in listing(folder):
            if older != place and state.fullmatch(older.name):  # another process may just have begun on ours
                shutil.rmtree(older, ignore_errors=True)
    return place, {}


def _content(path: Path, folder: Path) -> str:
    """A file's checksum, read anew only where its size or time is not what was recorded with it."""
    record, found = folder / f"{path.stem}.json", about(path)
    now = {"size": found.st_size, "time": found.st_mtime_ns}
    with suppress(InputError):  # none, or a damaged one
        held = read_json(record)
        checksum = held.pop("checksum", None)
        if held == now and isinstance(checksum, str):
            return checksum
    checksum = file_hash(path)[:16]
    with suppress(InputError):  # a folder that can't be written to
        write_json(record, {**now, "checksum": checksum})
    return checksum


def _write(path: Path, column: str, number: int, value: object, folder: Path) -> Path:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes) or not content:
        raise InputError(f"{path}: row {number}: {column} holds no picture; restore the file")
    suffix = next((suffix for magic, suffix in _MAGIC.items() if content.startswith(magic)), ".img")
    place = folder / f"{number:07d}{suffix}"
    with atomic_path(place) as temporary:
        Path(temporary).write_bytes(content)
    return place
