"""Qdrant: a server by its URL, or the client's local mode in a folder (exact; made for small collections).

The distance is the inner product, as ours is: no rows are normalised, and a score is the sum over query tokens. The
vectors are searched without an HNSW graph, exactly; with coarse ones, `coarse` chooses and `vectors` decides.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point, needing, telling
from samer.index.names import point_id, store_key


class Qdrant(Database):
    """`place` is http://host:6333, or a folder."""

    name = "qdrant"
    has_coarse = True
    in_json = True

    def open(self) -> None:
        with needing("qdrant-client"):
            import qdrant_client as client
            from qdrant_client import models

        remote = self.place.startswith(("http://", "https://"))
        self._models = models
        with telling(self.place):
            where = {"url": self.place, "timeout": 60, "api_key": store_key()} if remote else {"path": self.place}
            self._client = client.QdrantClient(**where)
            if not self._client.collection_exists(self.collection):
                self._client.create_collection(self.collection, vectors_config=self._config())
            held = self._client.get_collection(self.collection).config.params.vectors
        self._check(held)

    def _config(self) -> dict:
        models = self._models
        one = models.VectorParams(
            size=self.facts.dim,
            distance=models.Distance.DOT,
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0),
            datatype=models.Datatype(self.facts.dtype),
        )
        return {"vectors": one, **({"coarse": one} if self.facts.coarse else {})}

    def _check(self, held: object) -> None:
        wanted = self._config()
        right = isinstance(held, dict) and held.keys() == wanted.keys()
        for name in wanted if right else ():
            same = (held[name].size, held[name].distance, held[name].datatype or self._models.Datatype.FLOAT32)
            right = right and same == (wanted[name].size, wanted[name].distance, wanted[name].datatype)
            right = right and held[name].multivector_config is not None
        if not right:
            raise InputError(
                f"{self.place}: collection {self.collection!r} holds vectors of another size, dtype or distance; "
                "name another --collection"
            )

    def put(self, batch: list[Point]) -> None:
        points = []
        for point in batch:
            vectors = {"vectors": point.vectors.tolist()}
            if point.coarse is not None:
                vectors["coarse"] = point.coarse.tolist()
            points.append(self._models.PointStruct(id=point.uuid, vector=vectors, payload=point.payload(self.facts)))
        with telling(self.place):
            self._client.upsert(self.collection, points, wait=True)

    def ids(self) -> Iterator[str]:
        offset = None
        while True:
            with telling(self.place):
                points, offset = self._client.scroll(self.collection, limit=1000, offset=offset, with_payload=["id"])
            yield from (point.payload.get("id", "") for point in points)
            if offset is None:
                return

    def delete(self, ids: list[str]) -> None:
        points = self._models.PointIdsList(points=[point_id(name) for name in ids])
        with telling(self.place):
            self._client.delete(self.collection, points, wait=True)

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        asked = {"query": query.tolist(), "using": "vectors", "limit": top, "with_payload": ["id"]}
        with telling(self.place):
            found = self._client.query_points(self.collection, **asked)
        return [(point.payload["id"], point.score / len(query)) for point in found.points]

    def query_code(self) -> str:
        where = f"url={self.place!r}" if self.place.startswith("http") else f"path={self.place!r}"
        coarse = "prefetch=Prefetch(query=query.tolist(), using='coarse', limit=200), " if self.facts.coarse else ""
        return (
            "from qdrant_client import QdrantClient\nfrom qdrant_client.models import Prefetch\n"
            f"client = QdrantClient({where})\n"
            f"found = client.query_points({self.collection!r}, {coarse}query=query.tolist(), using='vectors', "
            "limit=10)\n"
            "print([(point.payload['id'], point.score / len(query)) for point in found.points])\n"
            "client.close()"
        )

    def close(self) -> None:
        self._client.close()
