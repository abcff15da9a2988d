"""Weaviate 1.29 and later by its REST interface, queries by GraphQL.

A named multi-vector under the inner product; a distance is minus the sum over query tokens of the best. Vectors are
float32 there. Requests as the documentation describes them; never sent to a running Weaviate here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point
from samer.export.http import ask, check_url
from samer.index.names import point_id

VECTOR = "samer"  # the name of the vector
# id is Weaviate's own word
PROPERTIES = {
    **dict.fromkeys(("image", "path", "projector", "prompts", "metadata"), "text"),
    **dict.fromkeys(("rows", "columns"), "int"),
}


class Weaviate(Database):
    """`place` is the server's URL; the collection is the class, with a capital."""

    name = "weaviate"
    in_json = True

    def open(self) -> None:
        self._url = check_url(self.place)
        self.collection = self.collection[:1].upper() + self.collection[1:]
        classes = ask("GET", f"{self._url}/v1/schema").get("classes", [])
        held = next((each for each in classes if each["class"] == self.collection), None)
        if held is None:
            ask("POST", f"{self._url}/v1/schema", self._schema())
        elif VECTOR not in held.get("vectorConfig", {}) or self._width() not in (None, self.facts.dim):
            raise InputError(
                f"{self.place}: class {self.collection} holds vectors of another size or name; "
                "name another --collection"
            )

    def _schema(self) -> dict:
        index = {"distance": "dot", "multivector": {"enabled": True, "aggregation": "maxSim"}}
        vector = {"vectorizer": {"none": {}}, "vectorIndexType": "hnsw", "vectorIndexConfig": index}
        properties = [{"name": name, "dataType": [kind]} for name, kind in PROPERTIES.items()]
        return {"class": self.collection, "vectorConfig": {VECTOR: vector}, "properties": properties}

    def _width(self) -> int | None:
        """D of the first object; None: there is none."""
        objects = ask("GET", f"{self._url}/v1/objects?class={self.collection}&limit=1&include=vector")["objects"]
        return len(objects[0]["vectors"][VECTOR][0]) if objects else None

    def put(self, batch: list[Point]) -> None:
        objects = []
        for point in batch:
            kept = point.texts(self.facts)
            properties = {"image": kept.pop("id"), **kept}
            vectors = {VECTOR: point.vectors.astype("float32").tolist()}
            one = {"class": self.collection, "id": point.uuid, "properties": properties, "vectors": vectors}
            objects.append(one)
        for each in ask("POST", f"{self._url}/v1/batch/objects", {"objects": objects}):
            if errors := each.get("result", {}).get("errors"):
                raise InputError(f"{self.place}: refuses {each['properties']['image']}: {json.dumps(errors)[:160]}")

    def ids(self) -> Iterator[str]:
        after = ""
        while True:
            url = f"{self._url}/v1/objects?class={self.collection}&limit=500&after={after}"
            objects = ask("GET", url).get("objects", [])
            yield from (each["properties"]["image"] for each in objects)
            if not objects:
                return
            after = objects[-1]["id"]

    def delete(self, ids: list[str]) -> None:
        for name in ids:
            ask("DELETE", f"{self._url}/v1/objects/{self.collection}/{point_id(name)}")

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        near = json.dumps(query.tolist())
        words = self._words(top).replace("QUERY", near)
        found = ask("POST", f"{self._url}/v1/graphql", {"query": words})
        if found.get("errors"):
            raise InputError(f"{self.place}: refuses the query: {json.dumps(found['errors'])[:160]}")
        rows = found["data"]["Get"][self.collection]
        return [(row["image"], -row["_additional"]["distance"] / len(query)) for row in rows]

    def _words(self, top: int) -> str:
        near = f'nearVector: {{targetVectors: ["{VECTOR}"], vectorPerTarget: {{{VECTOR}: QUERY}}}}'
        return f"{{Get {{{self.collection}(limit: {top}, {near}) {{image _additional {{distance}}}}}}}}"

    def query_code(self) -> str:
        return (
            "import json, urllib.request\n"
            f"words = {self._words(10)!r}.replace('QUERY', json.dumps(query.tolist()))\n"
            f"request = urllib.request.Request({self._url + '/v1/graphql'!r}, json.dumps({{'query': words}}).encode(), "
            "{'Content-Type': 'application/json'})\n"
            f"rows = json.load(urllib.request.urlopen(request))['data']['Get'][{self.collection!r}]\n"
            "print([(row['image'], -row['_additional']['distance'] / len(query)) for row in rows])"
        )
