"""An index written out into the store that somebody runs, and held against our exact search there."""

STORES = {
    "qdrant": ("qdrant", "Qdrant"),
    "lancedb": ("lance", "Lance"),
    "parquet": ("parquet", "Parquet"),
    "vectorchord": ("vectorchord", "VectorChord"),
    "milvus": ("milvus", "Milvus"),
    "vespa": ("vespa", "Vespa"),
    "weaviate": ("weaviate", "Weaviate"),
}
