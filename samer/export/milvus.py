"""Milvus 2.6.4 and later: an array of structs with a vector each, MAX_SIM under the inner product.

A server by its URL; never run against one here: Milvus Lite 3.2 has no arrays of structs, and refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point, needing, telling
from samer.index.names import point_id, store_key

MOST_VECTORS = 4096  # of an image; Milvus wants a bound
FIELD, PART = "parts", "vector"


class Milvus(Database):
    """`place` is http://host:19530."""

    name = "milvus"

    def open(self) -> None:
        with needing("pymilvus"):
            import pymilvus as library
        with telling(self.place):
            self._client = library.MilvusClient(self.place, token=store_key() or "")
            if not self._client.has_collection(self.collection):
                self._create(library)
            held = self._client.describe_collection(self.collection)
            self._client.load_collection(self.collection)
        if f"'dim': {self.facts.dim}" not in str(held).replace('"', "'") or self._kind(library).name not in str(held):
            raise InputError(
                f"{self.place}: collection {self.collection!r} holds vectors of another size or dtype; "
                "name another --collection"
            )

    def _kind(self, library):
        types = library.DataType
        return types.FLOAT16_VECTOR if self.facts.dtype == "float16" else types.FLOAT_VECTOR

    def _create(self, library) -> None:
        types = library.DataType
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", types.VARCHAR, is_primary=True, max_length=36)
        for name in ("id", "path", "projector", "prompts"):
            schema.add_field(name, types.VARCHAR, max_length=4096)
        for name in ("rows", "columns"):
            schema.add_field(name, types.INT64)
        schema.add_field("metadata", types.JSON)
        struct = self._client.create_struct_field_schema()
        struct.add_field(PART, self._kind(library), dim=self.facts.dim)
        schema.add_field(FIELD, types.ARRAY, element_type=types.STRUCT, struct_schema=struct, max_capacity=MOST_VECTORS)
        index = self._client.prepare_index_params()
        index.add_index(f"{FIELD}[{PART}]", index_type="FLAT", metric_type="MAX_SIM_IP")
        self._client.create_collection(self.collection, schema=schema, index_params=index)

    def put(self, batch: list[Point]) -> None:
        rows = [
            {**point.payload(self.facts), "key": point.uuid, FIELD: [{PART: row} for row in self._rows(point.vectors)]}
            for point in batch
        ]
        with telling(self.place):
            self._client.upsert(self.collection, rows)

    def _rows(self, vectors: np.ndarray) -> list:
        """Float16 goes over as arrays, float32 as lists."""
        return list(vectors) if vectors.dtype == np.float16 else vectors.tolist()

    def ids(self) -> Iterator[str]:
        with telling(self.place):
            cursor = self._client.query_iterator(self.collection, batch_size=1000, filter="", output_fields=["id"])
            names = [row["id"] for rows in iter(cursor.next, []) for row in rows]
            cursor.close()
        yield from names

    def delete(self, ids: list[str]) -> None:
        with telling(self.place):
            self._client.delete(self.collection, ids=[point_id(name) for name in ids])

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        from pymilvus.client.embedding_list import EmbeddingList

        tokens = EmbeddingList()
        for token in query.astype(self.facts.dtype):
            tokens.add(token)
        asked = {"data": [tokens], "anns_field": f"{FIELD}[{PART}]", "limit": top, "output_fields": ["id"]}
        with telling(self.place):
            (found,) = self._client.search(self.collection, **asked)
        return [(hit["entity"]["id"], hit["distance"] / len(query)) for hit in found]

    def query_code(self) -> str:
        return (
            "from pymilvus import MilvusClient\nfrom pymilvus.client.embedding_list import EmbeddingList\n"
            f"client = MilvusClient({self.place!r})\n"
            f"tokens = EmbeddingList()\nfor token in query.astype({self.facts.dtype!r}):\n    tokens.add(token)\n"
            f"(found,) = client.search({self.collection!r}, data=[tokens], anns_field='{FIELD}[{PART}]', limit=10, "
            "output_fields=['id'])\n"
            "print([(hit['entity']['id'], hit['distance'] / len(query)) for hit in found])"
        )

    def close(self) -> None:
        self._client.close()
