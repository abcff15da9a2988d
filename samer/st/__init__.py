"""SaMer in sentence-transformers, an extra: a token pooling, pipelines of its stock modules, maps after pooling.

    samer.st.save("pipeline", retriever, MergeConfig(num_regions=64))  # the projector in use becomes a Dense
    model = samer.st.load("pipeline")  # the same with the pooling behind it
    scores = model.similarity(model.encode_query(texts), model.encode_document(images))  # ours

`MultiVectorEncoder("pipeline")` gives the trained projection without the pooling, and needs no code of ours. `repair`
gives a ColQwen2 of transformers that is used without a pooling the positions that it loses.
"""

try:
    import sentence_transformers.multi_vector_encoder  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"samer.st needs sentence-transformers 6.2 or newer: pip install samer[sentence-transformers] ({error})"
    ) from None

from samer.st.families import repair
from samer.st.pipelines import attach, dense, load, save
from samer.st.pooling import SamerPooling, similarity_map

__all__ = ["SamerPooling", "attach", "dense", "load", "repair", "save", "similarity_map"]
