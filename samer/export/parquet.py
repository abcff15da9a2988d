"""A folder of parquet files, one a shard of the index, that DuckDB, pandas, Spark and the like read.

Columns: id, path (strings), rows, columns (int32), projector, prompts, metadata (strings; the last two JSON), embedding
(a list of lists of float16 or float32). The schema's metadata says what made the vectors. Memory: one batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from samer.config import InputError
from samer.export.base import Point, Store, needing
from samer.runtime.files import atomic_path, listing


class Parquet(Store):
    """`place` is the folder; `collection` begins the files' names."""

    name = "parquet"

    def open(self) -> None:
        with needing("pyarrow"):
            import pyarrow  # noqa: F401
        if not re.fullmatch(r"\w+", self.collection):  # with - it could begin as another's files do
            raise InputError(f"--collection {self.collection!r} begins no files' names; use letters, digits and _")
        for part in self._files():
            held = _schema_words(part)
            if held.get("projector") != self.facts.projector or held.get("dtype") != self.facts.dtype:
                raise InputError(f"{part}: vectors of another projector or dtype; name another --collection")

    def _file(self, part: str) -> Path:
        return Path(self.place) / f"{self.collection}-{part}.parquet"

    def _files(self) -> list[Path]:
        start = f"{self.collection}-"
        return [each for each in listing(self.place) if each.name.startswith(start) and each.suffix == ".parquet"]

    def write(self, part: str, batches: Iterable[list[Point]]) -> None:
        import pyarrow.parquet as pq

        with atomic_path(self._file(part)) as temporary:
            schema = self._schema()
            # vectors hardly compress, a dictionary of them would double the memory, and nobody asks for their least
            how = {"compression": "NONE", "use_dictionary": False, "write_statistics": False}
            with pq.ParquetWriter(temporary, schema, **how) as writer:
                for batch in batches:
                    writer.write_table(self._table(batch, schema))

    def _schema(self):
        import pyarrow as pa

        number = pa.float16() if self.facts.dtype == "float16" else pa.float32()
        texts = [(name, pa.string()) for name in ("id", "path", "projector", "prompts", "metadata")]
        numbers = [("rows", pa.int32()), ("columns", pa.int32())]
        return pa.schema([*texts, *numbers, ("embedding", pa.list_(pa.list_(number)))], metadata=self.facts.words())

    def _table(self, batch: list[Point], schema):
        import pyarrow as pa

        flat = np.concatenate([point.vectors for point in batch])
        rows = np.arange(len(flat) + 1, dtype=np.int32) * self.facts.dim
        images = np.cumsum([0, *(len(point.vectors) for point in batch)], dtype=np.int32)
        inner = pa.ListArray.from_arrays(rows, pa.array(flat.reshape(-1)))
        rows_of = [point.texts(self.facts) for point in batch]
        arrays = [pa.array([row[name] for row in rows_of], schema.field(name).type) for name in schema.names[:-1]]
        return pa.Table.from_arrays([*arrays, pa.ListArray.from_arrays(images, inner)], schema=schema)

    def has_others(self, parts: set[str], live: set[str]) -> bool:
        return bool(set(self._files()) - {self._file(part) for part in parts})

    def settle(self, parts: set[str], live: set[str]) -> int:
        import pyarrow.parquet as pq

        wanted, held = {self._file(part) for part in parts}, 0
        for path in self._files():
            if path in wanted:
                held += pq.read_metadata(path).num_rows
            else:
                path.unlink()
        return held

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        sql = self._sql(top)
        with needing("duckdb"):
            import duckdb
        rows = duckdb.execute(sql, [query.tolist(), str(self._file("*"))]).fetchall()
        return [(name, score) for name, score in rows]

    def _sql(self, top: int) -> str:
        """DuckDB's words for the mean over query tokens of the best product: $1 the query, $2 the files."""
        best = "list_max([list_inner_product(q, v::FLOAT[]) for v in embedding])"
        score = f"list_avg([{best} for q in $1::FLOAT[][]])"
        return f"select id, {score} as score from read_parquet($2) order by score desc, id limit {top}"

    def query_code(self) -> str:
        files = str(self._file("*"))
        return (
            f'import duckdb\nsql = """{self._sql(10)}"""\nprint(duckdb.execute(sql, [query.tolist(), {files!r}]).df())'
        )


def _schema_words(path: Path) -> dict[str, str]:
    """What a file's schema says of its vectors.

    Raises:
        InputError: it is no parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"{path}: no parquet file ({reason}); remove it, or name another --collection") from None
    return {key.decode(): value.decode() for key, value in found.items()}
