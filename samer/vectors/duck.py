"""Embeddings in a DuckDB database: `FILE.duckdb`, or `FILE.duckdb#TABLE` (the table is `embeddings` if not named).

Columns as in parquet: id VARCHAR, embedding FLOAT[][], and whatever else. Rows come in the order of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from samer.config import InputError
from samer.data.pictures import one_line
from samer.runtime.files import check_writable, exists
from samer.vectors.parts import Parts
from samer.vectors.stores import Plan, split_table
from samer.vectors.tables import IDS, ROWS, TableStore, arrow, batch_of, schema_of

TABLE = "embeddings"
# how its columns are declared, by the names that Arrow gives the types
_TYPES = {"string": "VARCHAR", "bool": "BOOLEAN", "int64": "BIGINT", "double": "DOUBLE", "float": "FLOAT"}
_NUMBERS = {"float32": "FLOAT", "int8": "TINYINT", "binary": "UTINYINT"}


class DuckStore(TableStore):
    """A table."""

    form = "FILE.duckdb or FILE.duckdb#TABLE"
    dtypes = ("float32", "int8", "binary")  # it has no float16

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.file, self.table = split_table(place, TABLE)

    @classmethod
    def takes(cls, place: str) -> bool:
        return place.partition("#")[0].lower().endswith(".duckdb")

    @contextmanager
    def _opened(self, writing: bool = False) -> Iterator[Any]:
        """A connection; what goes wrong within is told in one line."""
        arrow(self.place)
        try:
            import duckdb
        except ModuleNotFoundError:
            raise InputError(f"{self.place}: needs duckdb; install it: pip install duckdb") from None
        if not writing and not exists(self.file):
            raise InputError(f"{self.file}: no such file; name a DuckDB database")
        connection = None
        try:
            connection = duckdb.connect(self.file, read_only=not writing)
            yield connection
        except duckdb.Error as error:
            raise InputError(f"{self.place}: DuckDB says: {one_line(error)[:200]}; look at it") from None
        finally:
            if connection is not None:
                connection.close()

    @property
    def _name(self) -> str:
        return quoted(self.table)

    def _batches(self, ids_only: bool) -> Iterator[tuple[str, Any]]:
        with self._opened() as connection:
            held = connection.sql(f"SELECT * FROM {self._name} LIMIT 0").to_arrow_table().schema
            names = self._names(self.place, held, ids_only)
            query = f"SELECT {', '.join(map(quoted, names))} FROM {self._name}"
            for batch in connection.sql(query).to_arrow_reader(IDS if ids_only else ROWS):
                yield self.place, batch

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        if exists(self.file):
            with self._opened():
                return
        check_writable(self.file)

    def write(self, parts: Parts) -> None:
        """In one transaction: the table is replaced whole or stays."""
        schema = schema_of(self.place, parts)
        kinds = {"embedding": f"{_NUMBERS[parts.dtype]}[][]"}
        columns = ", ".join(f"{quoted(f.name)} {kinds.get(f.name) or _TYPES[str(f.type)]}" for f in schema)
        with self._opened(writing=True) as connection:
            connection.execute("BEGIN TRANSACTION")
            connection.execute(f"CREATE OR REPLACE TABLE {self._name} ({columns})")
            for rows in parts:
                table = arrow(self.place).Table.from_batches([batch_of(self.place, schema, rows)])
                connection.register("samer_rows", table)
                connection.execute(f"INSERT INTO {self._name} SELECT * FROM samer_rows")
                connection.unregister("samer_rows")
            connection.execute("COMMIT")


def quoted(name: str) -> str:
    """A name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'
