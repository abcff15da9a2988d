"""Embeddings in LanceDB: `FOLDER/TABLE.lance`, as LanceDB names a table's folder. Needs lancedb.

Columns as in parquet, vectors as lists of fixed length, which LanceDB searches by MaxSim.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.pictures import one_line
from samer.runtime.files import check_writable, exists
from samer.vectors.parts import Parts
from samer.vectors.rows import EMBEDDING
from samer.vectors.stores import Plan
from samer.vectors.tables import IDS, ROWS, TableStore, arrow, batch_of, schema_of


class LanceStore(TableStore):
    """A table."""

    form = "FOLDER/TABLE.lance"
    dtypes = ("float32", "float16")  # it searches no others by MaxSim

    @classmethod
    def takes(cls, place: str) -> bool:
        return place.rstrip("/").lower().endswith(".lance")

    @property
    def path(self) -> Path:
        """The table's folder."""
        return Path(self.place.rstrip("/"))

    def _database(self) -> Any:
        arrow(self.place)
        try:
            import lancedb
        except ModuleNotFoundError:
            raise InputError(f"{self.place}: needs lancedb; pip install lancedb, or 'samer[export]'") from None
        return lancedb.connect(str(self.path.parent))

    def _table(self) -> Any:
        if not exists(self.path):
            raise InputError(f"{self.place}: no such table; name a LanceDB table's folder")
        try:
            return self._database().open_table(self.path.stem)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError(f"{self.place}: LanceDB says: {one_line(error)[:200]}; restore the table") from None

    def _batches(self, ids_only: bool) -> Iterator[tuple[str, Any]]:
        table = self._table()
        query = table.search().select(self._names(self.place, table.schema, ids_only))
        for batch in query.to_batches(IDS if ids_only else ROWS):
            yield self.place, batch

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        self._database()
        check_writable(self.path.parent / "trial")

    def write(self, parts: Parts) -> None:
        """As one version of the table: readers see the old one or the new one."""
        schema = schema_of(self.place, parts, fixed=True)
        database, mode = self._database(), "create"
        if exists(self.path):
            mode = "overwrite"
            held = self._table().schema
            if EMBEDDING not in held.names or held.field(EMBEDDING).type != schema.field(EMBEDDING).type:
                shown = held.field(EMBEDDING).type if EMBEDDING in held.names else "no embedding"
                raise InputError(
                    f"{self.place}: a table with {shown} is there, not with {schema.field(EMBEDDING).type}; "
                    "name another, or remove it"
                )
        batches = (batch_of(self.place, schema, rows) for rows in parts)
        reader = arrow(self.place).RecordBatchReader.from_batches(schema, batches)
        try:
            database.create_table(self.path.stem, data=reader, schema=schema, mode=mode)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.place}: LanceDB says: {one_line(error)[:200]}; run the command again") from None
