"""Rows in Arrow's tables, which parquet files, DuckDB and LanceDB all speak. Needs pyarrow.

Columns: `id` (text or whole numbers), `embedding` (a list of lists of numbers, all of one length), and where they are
there `scale` (of int8), `grid` ([rows, columns]), `coords` (a list of [x, y], one a vector). Others of texts, numbers,
truth values and dates (as texts) are metadata.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from samer.config import InputError
from samer.data.parquet import is_plain, plain, values_of
from samer.vectors.parts import Parts
from samer.vectors.rows import COORDS, EMBEDDING, GRID, ID, OWN, SCALE, Merged, Row, pair, places_of
from samer.vectors.stores import Store

ROWS, IDS = 64, 4096  # read at once; 64 rows of ColPali's vectors are 34 MB
REMEDY = "install it: pip install pyarrow, or pip install 'samer[parquet]'"


class TableStore(Store):
    """A store of Arrow's tables: kinds differ in where batches come from, and in how they are written."""

    def _batches(self, ids_only: bool) -> Iterator[tuple[str, Any]]:
        """Record batches in order, `IDS` ids or `ROWS` rows at once, each with what messages call its table."""
        raise NotImplementedError

    def _names(self, where: str, schema: Any, ids_only: bool) -> list[str]:
        """The columns to read; notes which are not carried along.

        Raises:
            InputError: as `columns_wanted`.
        """
        wanted, self.left_out = columns_wanted(where, schema), columns_left_out(schema)
        return [ID] if ids_only else wanted

    def ids(self) -> Iterator[str]:
        for _, batch in self._batches(ids_only=True):
            yield from ids_of(batch.column(ID))

    def rows(self) -> Iterator[Row]:
        before = Counter()  # rows of each table
        for where, batch in self._batches(ids_only=False):
            yield from rows_of(where, batch, before[where])
            before[where] += batch.num_rows


def arrow(place: str) -> Any:
    """pyarrow.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow
    except ModuleNotFoundError:
        raise InputError(f"{place}: needs pyarrow; {REMEDY}") from None
    return pyarrow


def columns_wanted(place: str, schema: Any) -> list[str]:
    """The columns to read, of an Arrow schema.

    Raises:
        InputError: no id or no embedding among them, or one of another type.
    """
    types = arrow(place).types
    for name in (ID, EMBEDDING):
        if name not in schema.names:
            raise InputError(
                f"{place}: no column {name!r} (it has {', '.join(schema.names)}); rename the one that is it"
            )
    kind = schema.field(ID).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
        raise InputError(f"{place}: column id is of {kind}; it must be text")
    outer = schema.field(EMBEDDING).type
    inner = outer.value_type if _is_list(types, outer) else outer
    number = inner.value_type if _is_list(types, inner) else None
    if number is not None and number == arrow(place).uint8():
        raise InputError(
            f"{place}: column embedding holds 1-bit vectors (uint8); name the vectors that they are made of"
        )
    right = number is not None and (types.is_floating(number) or number == arrow(place).int8())
    if not right:
        raise InputError(f"{place}: column embedding is of {outer}; expected a list of lists of floating numbers")
    if number == arrow(place).int8() and SCALE not in schema.names:
        raise InputError(f"{place}: int8 vectors without a column {SCALE!r}, by which they are multiplied; add it")
    return [*(name for name in OWN if name in schema.names), *(f.name for f in schema if _carried(f))]


def _carried(field: Any) -> bool:
    return field.name not in OWN and is_plain(field.type)


def columns_left_out(schema: Any) -> tuple[str, ...]:
    """The columns that are not read, of an Arrow schema: lists, bytes and the like."""
    return tuple(field.name for field in schema if field.name not in OWN and not _carried(field))


def _is_list(types: Any, kind: Any) -> bool:
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def rows_of(place: str, batch: Any, first: int) -> Iterator[Row]:
    """The rows of a record batch; `first` is the number of its first row."""
    embedding = batch.column(EMBEDDING)
    if embedding.null_count:
        number = first + int(np.flatnonzero(embedding.is_null().to_numpy(zero_copy_only=False))[0])
        raise InputError(f"{place}: row {number} has no embedding; take it out")
    lengths = embedding.value_lengths().to_numpy(zero_copy_only=False)
    vectors = embedding.flatten()
    owners = np.repeat(np.arange(len(lengths)), lengths)
    if vectors.null_count:
        row = owners[np.flatnonzero(vectors.is_null().to_numpy(zero_copy_only=False))[0]]
        raise InputError(f"{place}: row {first + row} has a vector that is null; take it out")
    widths = vectors.value_lengths().to_numpy(zero_copy_only=False)
    numbers = vectors.flatten()
    starts = np.concatenate([[0], np.cumsum(widths)])
    if numbers.null_count:
        at = int(np.flatnonzero(numbers.is_null().to_numpy(zero_copy_only=False))[0])
        row = owners[int(np.searchsorted(starts, at, side="right")) - 1]
        raise InputError(f"{place}: row {first + row} has a number that is null; take it out")
    flat = numbers.to_numpy(zero_copy_only=False)
    skipped = (EMBEDDING,) if flat.dtype == np.int8 else (EMBEDDING, SCALE)  # a scale is of int8 only
    others = {name: values_of(batch.column(name)) for name in batch.schema.names if name not in skipped}
    ends = np.cumsum(lengths)
    for number, (start, end) in enumerate(zip(ends - lengths, ends)):
        where = f"{place}: row {first + number}"
        own = widths[start:end]
        if len(set(own.tolist())) > 1:
            raise InputError(f"{where}: its vectors have {own.min()} to {own.max()} numbers; all must have as many")
        values = torch.from_numpy(flat[starts[start] : starts[end]].astype(np.float32))
        values = values.view(len(own), -1) if len(own) else values.view(0, 0)
        rest = {name: column[number] for name, column in others.items()}
        yield make_row(where, values, rest)


def make_row(where: str, values: torch.Tensor, rest: dict[str, Any]) -> Row:
    """A row of its vectors (N, D) float32 and its other columns by name, `id` among them.

    Raises:
        InputError: no id, or a scale, a grid or coordinates that can't be.
    """
    name = rest.get(ID)
    if name is None or name == "":
        raise InputError(f"{where}: no id; give it one")
    scale = rest.get(SCALE)
    if scale is not None:
        values = values * float(scale)
    columns = {key: plain(value) for key, value in rest.items() if key not in OWN}
    places = places_of(where, rest.get(COORDS), len(values))
    return Row(str(name), values, pair(where, GRID, rest.get(GRID)), places, None, columns)


def ids_of(column: Any) -> list[str]:
    """The ids of a column as texts; "" where there is none."""
    return ["" if value is None else str(value) for value in column.to_pylist()]


def number_type(pyarrow: Any, dtype: str) -> Any:
    """Arrow's type of the numbers of a dtype."""
    return {
        "float32": pyarrow.float32(),
        "float16": pyarrow.float16(),
        "int8": pyarrow.int8(),
        "binary": pyarrow.uint8(),
    }[dtype]


def schema_of(place: str, parts: Parts, fixed: bool = False) -> Any:
    """The schema of what is written; `fixed`: vectors as lists of fixed length."""
    pyarrow = arrow(place)
    number = number_type(pyarrow, parts.dtype)
    vector = pyarrow.list_(number, parts.stored_width) if fixed else pyarrow.list_(number)
    fields = [pyarrow.field(ID, pyarrow.string()), pyarrow.field(EMBEDDING, pyarrow.list_(vector))]
    if parts.dtype == "int8":
        fields.append(pyarrow.field(SCALE, pyarrow.float32()))
    kinds = {"text": pyarrow.string(), "truth": pyarrow.bool_(), "whole": pyarrow.int64(), "number": pyarrow.float64()}
    return pyarrow.schema([*fields, *(pyarrow.field(name, kinds[kind]) for name, kind in parts.columns.items())])


def batch_of(place: str, schema: Any, rows: Sequence[Merged]) -> Any:
    """Rows as a record batch of a schema."""
    pyarrow = arrow(place)
    outer = schema.field(EMBEDDING).type
    flat = np.concatenate([row.values.reshape(-1) for row in rows])
    numbers = pyarrow.array(flat, type=outer.value_type.value_type)
    width = rows[0].values.shape[1]
    counts = np.concatenate([[0], np.cumsum([len(row.values) for row in rows])]).astype(np.int32)
    if pyarrow.types.is_fixed_size_list(outer.value_type):
        vectors = pyarrow.FixedSizeListArray.from_arrays(numbers, width)
    else:
        offsets = np.arange(0, counts[-1] * width + 1, width, dtype=np.int32)
        vectors = pyarrow.ListArray.from_arrays(offsets, numbers)
    embedding = pyarrow.ListArray.from_arrays(counts, vectors).cast(outer)
    columns = {ID: pyarrow.array([row.id for row in rows], pyarrow.string()), EMBEDDING: embedding}
    if SCALE in schema.names:
        columns[SCALE] = pyarrow.array([row.scale for row in rows], pyarrow.float32())
    for name in schema.names:
        if name not in columns:
            columns[name] = pyarrow.array([row.columns.get(name) for row in rows], schema.field(name).type)
    return pyarrow.RecordBatch.from_arrays([columns[name] for name in schema.names], schema=schema)
