"""Vespa: documents by /document/v1, queries by /search/. The schema is deployed by hand: `schema()` is its file.

Requests as the documentation describes them; never sent to a running Vespa here.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import numpy as np

from samer.config import InputError
from samer.export.base import Database, Point
from samer.export.http import ask, check_url
from samer.index.names import point_id

SCHEMA = """schema {name} {{
    document {name} {{
        field id type string {{ indexing: summary | attribute }}
        field path type string {{ indexing: summary | attribute }}
        field rows type int {{ indexing: summary | attribute }}
        field columns type int {{ indexing: summary | attribute }}
        field projector type string {{ indexing: summary | attribute }}
        field prompts type string {{ indexing: summary | attribute }}
        field metadata type string {{ indexing: summary | attribute }}
        field vectors type tensor<{cell}>(dt{{}}, x[{dim}]) {{ indexing: attribute }}
{coarse_field}    }}
    rank-profile samer {{
        inputs {{ query(q) tensor<float>(qt{{}}, x[{dim}]) }}
        {first}-phase {{ expression: sum(reduce(sum(query(q) * attribute(vectors), x), max, dt), qt) }}
{coarse_phase}    }}
    document-summary short {{ summary id {{ }} }}
}}
"""


class Vespa(Database):
    """`place` is the URL of a container node; the collection is the document type."""

    name = "vespa"
    has_coarse = True
    in_json = True

    def open(self) -> None:
        self._url = check_url(self.place)
        if not self.collection.isidentifier():
            raise InputError(f"--collection {self.collection!r} is no document type; use letters, digits and _")
        ask("GET", f"{self._documents()}?wantedDocumentCount=1")  # says whether the type is deployed

    def schema(self) -> str:
        """The file schemas/COLLECTION.sd of the application, to be deployed before the export."""
        cell = "float" if self.facts.dtype == "float32" else "bfloat16"
        few = f"        field coarse type tensor<float>(dt{{}}, x[{self.facts.dim}]) {{ indexing: attribute }}\n"
        sum_of = "sum(reduce(sum(query(q) * attribute(coarse), x), max, dt), qt)"
        first = f"        first-phase {{ expression: {sum_of} }}\n"
        return SCHEMA.format(
            name=self.collection,
            cell=cell,
            dim=self.facts.dim,
            coarse_field=few if self.facts.coarse else "",
            coarse_phase=first if self.facts.coarse else "",
            first="second" if self.facts.coarse else "first",
        )

    def _documents(self) -> str:
        return f"{self._url}/document/v1/{self.collection}/{self.collection}/docid"

    def put(self, batch: list[Point]) -> None:
        for point in batch:
            fields = {**point.texts(self.facts), "vectors": _blocks(point.vectors)}
            if point.coarse is not None:
                fields["coarse"] = _blocks(point.coarse)
            ask("POST", f"{self._documents()}/{point.uuid}", {"fields": fields})

    def ids(self) -> Iterator[str]:
        further = ""
        while True:
            found = ask("GET", f"{self._documents()}?wantedDocumentCount=500&fieldSet={self.collection}:id{further}")
            yield from (each["fields"]["id"] for each in found.get("documents", []))
            if not found.get("continuation"):
                return
            further = f"&continuation={quote(found['continuation'])}"

    def delete(self, ids: list[str]) -> None:
        for name in ids:
            ask("DELETE", f"{self._documents()}/{point_id(name)}")

    def search(self, query: np.ndarray, top: int) -> list[tuple[str, float]]:
        found = ask("POST", f"{self._url}/search/", self._question(top) | {"input.query(q)": _blocks(query)})
        hits = found["root"].get("children", [])
        return [(hit["fields"]["id"], hit["relevance"] / len(query)) for hit in hits]

    def _question(self, top: int) -> dict:
        return {"yql": f"select id from {self.collection} where true", "ranking.profile": "samer", "hits": top}

    def query_code(self) -> str:
        return (
            "import json, urllib.request\n"
            "tokens = {str(row): token.tolist() for row, token in enumerate(query)}\n"
            f"body = json.dumps({self._question(10)!r} | {{'input.query(q)': tokens}}).encode()\n"
            f"request = urllib.request.Request({self._url + '/search/'!r}, body, "
            "{'Content-Type': 'application/json'})\n"
            "hits = json.load(urllib.request.urlopen(request))['root'].get('children', [])\n"
            "print([(hit['fields']['id'], hit['relevance'] / len(query)) for hit in hits])"
        )


def _blocks(vectors: np.ndarray) -> dict[str, list[float]]:
    """A mixed tensor as JSON: a dense block per vector."""
    return {str(row): vector for row, vector in enumerate(vectors.astype("float32").tolist())}
