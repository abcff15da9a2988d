"""Data sets in the documented forms of ViDoRe v1, v2 and v3, written as parquet files of small pages.

A page of number k is a picture of its own size and shade (`page`), so that a test can tell which one it got.
"""

import io

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def page(number):
    """The picture of a page: 40 + number pixels wide, 60 high, a bar at its own height on grey."""
    picture = Image.new("RGB", (40 + number, 60), (16 * number % 256, 90, 200))
    picture.paste((255, 255, 0), (5, 5 * number % 50, 30, 5 * number % 50 + 6))
    return picture


def stored(picture, kind="PNG", path=None):
    """A picture as the hub's image columns hold it."""
    with io.BytesIO() as buffer:
        picture.save(buffer, kind)
        return {"bytes": buffer.getvalue(), "path": path}


def table(path, columns, rows, types=None):
    """Writes rows (dicts) as a table with these columns, two rows in a row group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"image": IMAGE, **(types or {})}
    arrays = [pa.array([row[name] for row in rows], types.get(name)) for name in columns]
    pq.write_table(pa.Table.from_arrays(arrays, names=list(columns)), path, row_group_size=2)


QUESTIONS = ["questionId", "query", "question_types", "image", "docId", "image_filename", "page", "answer"]  # docvqa's
QUESTIONS += ["data_split", "source"]


def question_form(root, rows, split="test", shards=1):
    """v1's question form; rows are (query or None, number of a page)."""
    whole = [
        {
            "questionId": str(500 + k),
            "query": query,
            "question_types": ["layout"],
            "image": stored(page(number)),
            "docId": 7,
            "image_filename": f"images/doc_{number}.png",
            "page": str(number),
            "answer": "42",
            "data_split": "val",
            "source": "docvqa",
        }
        for k, (query, number) in enumerate(rows)
    ]
    each = -(-len(whole) // shards)
    for shard in range(shards):
        name = f"{split}-{shard:05d}-of-{shards:05d}.parquet"
        table(root / "data" / name, QUESTIONS, whole[shard * each : (shard + 1) * each])
    return root


def beir_form(root, version, pages, queries, qrels, split="test"):
    """The BEIR form of v1, v2 or v3.

    Args:
        root: the data set's folder.
        version: "v1", "v2" (hyphens; integers as ids) or "v3" (underscores, boxes).
        pages: numbers of pages, their ids.
        queries: (id, text, language).
        qrels: (query id, page id, score, boxes in pixels); boxes for v3 only.
    """
    mark = "_" if version == "v3" else "-"
    corpus, query = f"corpus{mark}id", f"query{mark}id"
    rows = [{corpus: k, "image": stored(page(k), "JPEG"), "doc_id": "report", "markdown": f"# {k}"} for k in pages]
    rows = [{**row, "doc-id": "report", "page_number_in_doc": k} for k, row in enumerate(rows)]
    more = {"v1": [], "v2": ["doc-id"], "v3": ["doc_id", "markdown", "page_number_in_doc"]}[version]
    name = f"{split}-00000-of-00001.parquet"
    table(root / "corpus" / name, [corpus, "image", *more], rows)
    rows = [{query: k, "query": text, "language": language, "query_types": ["open"]} for k, text, language in queries]
    more = {"v1": [], "v2": ["language"], "v3": ["language", "query_types"]}[version]
    table(root / "queries" / name, [query, "query", *more], rows)
    rows = [
        {query: q, corpus: c, "score": score, "content_type": "Table", "bounding_boxes": boxes}
        for q, c, score, boxes in qrels
    ]
    kind = pa.list_(pa.struct([("annotator", pa.int64()), *((side, pa.int64()) for side in ("x1", "x2", "y1", "y2"))]))
    more = ["content_type", "bounding_boxes"] if version == "v3" else []
    table(root / "qrels" / name, [query, corpus, "score", *more], rows, {"bounding_boxes": kind})
    if version == "v2":
        table(root / "docs" / name, ["doc-id"], [{"doc-id": "report"}])
    return root


def box(x1, y1, x2, y2, annotator=1):
    return {"annotator": annotator, "x1": x1, "x2": x2, "y1": y1, "y2": y2}
