"""Embeddings in a Qdrant collection: `qdrant:http://HOST:6333#COLLECTION`, or `qdrant:FOLDER#COLLECTION` for its local
mode. Needs qdrant-client.

Read is the collection's only multivector, or the one that `#COLLECTION/NAME` names; written is an unnamed one, compared
by MaxSim of cosines. The id of an image is `id` in a point's payload, the point's own id its UUID of version 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from samer.config import InputError
from samer.data.pictures import one_line
from samer.index.names import point_id, store_key
from samer.runtime.files import check_writable, exists, read_json, write_json
from samer.runtime.progress import Progress
from samer.runtime.signals import stop_here
from samer.vectors.parts import Parts
from samer.vectors.rows import ID, OWN, Row, plain_columns
from samer.vectors.stores import Plan, Store, split_table
from samer.vectors.tables import make_row

PREFIX = "qdrant:"
COLLECTION = "embeddings"
ROWS = 64
REQUEST_BYTES = 8 * 2**20  # of an upsert as JSON: a fourth of what a server takes at most
NUMBER_BYTES = 12  # of a float in JSON, about


class QdrantStore(Store):
    """A collection."""

    form = "qdrant:http://HOST:6333#COLLECTION[/VECTOR] or qdrant:FOLDER#COLLECTION[/VECTOR]"
    dtypes = ("float32", "float16")  # its uint8 is not our int8, and its quantisation is its own affair

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.server, named = split_table(place.removeprefix(PREFIX), COLLECTION)
        self.collection, _, self.vector = named.partition("/")  # Qdrant has no such sign in names

    @classmethod
    def takes(cls, place: str) -> bool:
        return place.startswith(PREFIX)

    @property
    def _local(self) -> bool:
        return "://" not in self.server

    @contextmanager
    def _client(self) -> Iterator[Any]:
        """A client; what a server or the local mode refuses within is told in one line."""
        try:
            import qdrant_client
        except ModuleNotFoundError:
            raise InputError(f"{self.place}: needs qdrant-client; pip install 'samer[export]'") from None
        from qdrant_client.http.exceptions import ApiException

        client = None
        try:
            where = (
                {"path": self.server} if self._local else {"url": self.server, "timeout": 60, "api_key": store_key()}
            )
            client = qdrant_client.QdrantClient(**where, check_compatibility=False)
            yield client
        except InputError:
            raise
        except (ApiException, OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{self.place}: Qdrant says: {one_line(error)[:200]}; see that it runs and holds the collection, then "
                "run the same command again: it goes on"
            ) from None
        finally:
            if client is not None:
                client.close()

    def _scroll(self, ids_only: bool) -> Iterator[Any]:
        if self._local and not exists(self.server):
            raise InputError(f"{self.server}: no such folder; name one of Qdrant's local mode, or http://HOST:6333")
        with self._client() as client:
            offset = None
            what = {"with_payload": [ID] if ids_only else True, "with_vectors": not ids_only}
            while True:
                points, offset = client.scroll(self.collection, limit=1024 if ids_only else ROWS, offset=offset, **what)
                yield from points
                if offset is None:
                    return

    def ids(self) -> Iterator[str]:
        for point in self._scroll(ids_only=True):
            yield str((point.payload or {}).get(ID, point.id))

    def rows(self) -> Iterator[Row]:
        """In the order of the points' ids."""
        for number, point in enumerate(self._scroll(ids_only=False)):
            where = f"{self.place}: point {point.id} ({number})"
            values = np.asarray(self._multivector(where, point.vector), dtype=np.float32)
            payload = dict(point.payload or {})
            own = {name: payload[name] for name in OWN if name in payload and name != "scale"}
            rest = {ID: str(point.id), **plain_columns(payload), **own}
            yield make_row(where, torch.from_numpy(values), rest)

    def _multivector(self, where: str, held: Any) -> list[list[float]]:
        """A point's vectors, one of several by name."""
        found = {"": held} if isinstance(held, list) else dict(held or {})
        multi = {name: value for name, value in found.items() if isinstance(value, list) and isinstance(value[0], list)}
        if self.vector or len(multi) != 1:
            if self.vector not in multi:
                names = ", ".join(multi) or "none"
                raise InputError(
                    f"{where}: which multivector is meant (it has {names})? name one as #{self.collection}/NAME"
                )
            return multi[self.vector]
        return next(iter(multi.values()))

    def check_target(self, plan: Plan) -> None:
        super().check_target(plan)
        if self.vector:
            raise InputError(f"{self.place}: an unnamed multivector is written; leave /{self.vector} out")
        if self._local:
            check_writable(Path(self.server) / "trial")
            if not exists(self.server):  # a client would make it
                return
        with self._client() as client:
            client.collection_exists(self.collection)

    def write(self, parts: Parts) -> None:
        """In requests of a bounded size; `sent.json` beside the parts says how far it came."""
        from qdrant_client import models

        cursor = parts.files[0].parent / "sent.json"
        sent = read_json(cursor).get("rows", 0) if exists(cursor) else 0
        batch = max(1, REQUEST_BYTES // (NUMBER_BYTES * parts.width * -(-parts.vectors // parts.count)))
        with self._client() as client, Progress(desc="sending", total=parts.count, unit="images") as bar:
            if not self._collection_fits(client, models, parts):
                sent = 0
            done = 0
            for rows in parts:
                for start in range(0, len(rows), batch):
                    own = rows[start : start + batch]
                    if done >= sent:
                        stop_here()
                        points = [
                            models.PointStruct(
                                id=point_id(row.id),
                                vector=row.values.astype(np.float32).tolist(),
                                payload={**row.columns, ID: row.id},
                            )
                            for row in own
                        ]
                        client.upsert(self.collection, points, wait=True)
                        write_json(cursor, {"rows": done + len(own)})
                    done += len(own)
                    bar.update(len(own))

    def _collection_fits(self, client: Any, models: Any, parts: Parts) -> bool:
        """Whether the collection was there; it is made if not.

        Raises:
            InputError: one of that name holds vectors of another kind.
        """
        if client.collection_exists(self.collection):
            found = client.get_collection(self.collection).config.params.vectors
            size, multi = getattr(found, "size", None), getattr(found, "multivector_config", None)
            if size != parts.width or multi is None:
                kind = f"{size} numbers{'' if multi else ', one vector a point'}" if size else "named vectors"
                raise InputError(
                    f"{self.place}: a collection with {kind} is there, not with multivectors of {parts.width}; name "
                    "another, or remove it"
                )
            return True
        vectors = models.VectorParams(
            size=parts.width,
            distance=models.Distance.COSINE,
            datatype=models.Datatype(parts.dtype),
            multivector_config=models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM),
            hnsw_config=models.HnswConfigDiff(m=0),
        )
        client.create_collection(self.collection, vectors_config=vectors)
        return False
