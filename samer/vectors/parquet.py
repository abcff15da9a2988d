"""Embeddings in parquet files: `X.parquet`, or a folder of such files, which are read in the order of their names.

Memory to read: 64 rows, however long the file's row groups are; what is written has a group a part.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.parquet import opened_table
from samer.runtime.files import atomic_path, check_writable, exists, is_dir, listing
from samer.vectors.parts import Parts
from samer.vectors.stores import Plan
from samer.vectors.tables import IDS, ROWS, TableStore, arrow, batch_of, schema_of


class ParquetStore(TableStore):
    """A file, or a folder of files."""

    form = "FILE.parquet, or a folder of such files"

    @classmethod
    def takes(cls, place: str) -> bool:
        return place.lower().endswith(".parquet") or (is_dir(place) and bool(_files(place)))

    def _batches(self, ids_only: bool) -> Iterator[tuple[str, Any]]:
        if not _files(self.place):
            raise InputError(f"{self.place}: no such file; name a parquet file with --in")
        arrow(self.place)
        for path in _files(self.place):
            with opened_table(path) as file:
                names = self._names(str(path), file.schema_arrow, ids_only)
                for batch in file.iter_batches(IDS if ids_only else ROWS, columns=names):
                    yield str(path), batch

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        if not self.place.lower().endswith(".parquet"):
            raise InputError(f"{self.place}: name one file, such as {self.place.rstrip('/')}.parquet, with --out")
        check_writable(self.place)

    def write(self, parts: Parts) -> None:
        schema = schema_of(self.place, parts)
        from pyarrow.parquet import ParquetWriter

        with atomic_path(self.place) as temporary, ParquetWriter(temporary, schema) as writer:
            for rows in parts:
                writer.write_batch(batch_of(self.place, schema, rows))


def _files(place: str) -> list[Path]:
    """The file, or those of a folder; none where there is nothing."""
    if is_dir(place):
        return [path for path in listing(place) if path.suffix == ".parquet"]
    return [Path(place)] if exists(place) else []
