"""PostgreSQL with VectorChord: a table with a column of arrays, `vector(D)[]` or `halfvec(D)[]`.

The operator `@#` is minus the sum over query tokens of the best inner product. Without an index on the column it is
exact; the types are pgvector's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point, needing, telling

COLUMNS = ("id", "path", "rows", "columns", "projector", "prompts", "metadata", "vectors")


class VectorChord(Database):
    """`place` is what PostgreSQL takes for a connection, such as postgresql://user@host/base."""

    name = "vectorchord"

    def open(self) -> None:
        with needing("psycopg[binary]"):
            import psycopg
        if not re.fullmatch(r"[A-Za-z_]\w{0,62}", self.collection, re.ASCII):
            raise InputError(f"--collection {self.collection!r} is no table's name; use letters, digits and _")
        kind = "halfvec" if self.facts.dtype == "float16" else "vector"
        self._type, column = f"{kind}[]", f"{kind}({self.facts.dim})[]"
        with telling(self.place):
            self._base = psycopg.connect(self.place, autocommit=True, connect_timeout=30)
            self._base.execute(
                f'create table if not exists "{self.collection}" (id text primary key, path text, rows int, '
                f"columns int, projector text, prompts text, metadata jsonb, vectors {column})"
            )
            held = self._base.execute(
                "select format_type(atttypid, atttypmod) from pg_attribute where attrelid = %s::regclass and "
                "attname = 'vectors'",
                [f'"{self.collection}"'],
            ).fetchone()
        if held is None or held[0].rpartition(".")[2] != column:
            raise InputError(f"table {self.collection!r} has no column vectors {column}; name another --collection")

    def put(self, batch: list[Point]) -> None:
        names, kept = ", ".join(COLUMNS), ", ".join(f"{name} = excluded.{name}" for name in COLUMNS[1:])
        places = ", ".join(["%s"] * (len(COLUMNS) - 1))
        words = (
            f'insert into "{self.collection}" ({names}) values ({places}, %s::text[]::{self._type}) '
            f"on conflict (id) do update set {kept}"
        )
        rows = [(*point.texts(self.facts).values(), as_texts(point.vectors)) for point in batch]
        with telling(self.place), self._base.transaction(), self._base.cursor() as cursor:
            cursor.executemany(words, rows)

    def ids(self) -> Iterator[str]:
        with telling(self.place):
            rows = self._base.execute(f'select id from "{self.collection}"').fetchall()
        yield from (name for (name,) in rows)

    def delete(self, ids: list[str]) -> None:
        with telling(self.place):
            self._base.execute(f'delete from "{self.collection}" where id = any(%s)', [ids])

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        with telling(self.place):
            rows = self._base.execute(self._sql(top), [as_texts(query)]).fetchall()
        return [(name, -float(distance) / len(query)) for name, distance in rows]

    def _sql(self, top: int) -> str:
        far = f"vectors @# %s::text[]::{self._type}"
        return f'select id, {far} as distance from "{self.collection}" order by distance, id limit {top}'

    def query_code(self) -> str:
        return (
            f"import psycopg\nbase = psycopg.connect({self.place!r})\n"
            "texts = [str(token.tolist()) for token in query]\n"
            f"for name, distance in base.execute({self._sql(10)!r}, [texts]):\n"
            "    print(name, -distance / len(query))"
        )

    def close(self) -> None:
        self._base.close()


def as_texts(vectors: np.ndarray) -> list[str]:
    """Vectors (k, D) as pgvector reads them."""
    return [str(row) for row in vectors.astype("float64").round(9).tolist()]
