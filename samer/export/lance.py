"""LanceDB: a folder or a place in object storage; multi-vectors under the cosine, exact without an index.

A distance is the sum over query tokens of one minus the best cosine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point, needing, telling


class Lance(Database):
    """`place` is what lancedb.connect takes."""

    name = "lancedb"

    def open(self) -> None:
        with needing("lancedb"):
            import lancedb
        schema = self._schema()
        with telling(self.place):
            self._base = lancedb.connect(self.place)
            try:
                self._table = self._base.open_table(self.collection)
            except ValueError:  # not there
                self._table = self._base.create_table(self.collection, schema=schema)
        if self._table.schema != schema:
            raise InputError(
                f"{self.place}: table {self.collection!r} holds other columns, or vectors of another size or dtype; "
                "name another --collection"
            )

    def _schema(self):
        import pyarrow as pa

        number = pa.float16() if self.facts.dtype == "float16" else pa.float32()
        texts = [(name, pa.string()) for name in ("id", "path", "projector", "prompts", "metadata")]
        numbers = [("rows", pa.int32()), ("columns", pa.int32())]
        return pa.schema([*texts, *numbers, ("vectors", pa.list_(pa.list_(number, self.facts.dim)))])

    def put(self, batch: list[Point]) -> None:
        import pyarrow as pa

        schema = self._schema()
        payloads = [point.texts(self.facts) for point in batch]
        arrays = [pa.array([each[name] for each in payloads], schema.field(name).type) for name in schema.names[:-1]]
        flat = np.concatenate([point.vectors for point in batch]).reshape(-1)
        rows = pa.FixedSizeListArray.from_arrays(pa.array(flat), self.facts.dim)
        offsets = np.cumsum([0, *(len(point.vectors) for point in batch)], dtype=np.int32)
        table = pa.Table.from_arrays([*arrays, pa.ListArray.from_arrays(offsets, rows)], schema=schema)
        with telling(self.place):
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)

    def ids(self) -> Iterator[str]:
        with telling(self.place):
            count = self._table.count_rows()
            batches = self._table.search().select(["id"]).limit(count).to_batches() if count else ()
            names = [name for batch in batches for name in batch.column("id").to_pylist()]
        yield from names

    def delete(self, ids: list[str]) -> None:
        words = ", ".join("'" + name.replace("'", "''") + "'" for name in ids)
        with telling(self.place):
            self._table.delete(f"id in ({words})")

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        found = self._table.search(query, vector_column_name="vectors").distance_type("cosine").limit(top)
        with telling(self.place):
            rows = found.select(["id", "_distance"]).to_list()
        return [(row["id"], 1 - row["_distance"] / len(query)) for row in rows]

    def query_code(self) -> str:
        return (
            f"import lancedb\ntable = lancedb.connect({self.place!r}).open_table({self.collection!r})\n"
            "found = table.search(query, vector_column_name='vectors').distance_type('cosine').limit(10).to_list()\n"
            "print([(row['id'], 1 - row['_distance'] / len(query)) for row in found])"
        )
