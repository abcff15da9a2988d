"""SaMer in MTEB, an extra: a search over our streaming index, and tasks of data that lies on this machine.

    search = samer.mteb.SamerSearch(retriever, MergeConfig(num_regions=64), "outputs/mteb")
    rows = samer.mteb.evaluate(search, [samer.mteb.LocalTask("/data/vidore/docvqa", "test")], "outputs/mteb/results")

Images are encoded, compressed and written shard by shard, and searched exactly from the mapped shards: no corpus is
ever held as vectors in memory, and an interrupted run goes on. Beside MTEB's scores results hold `vectors_per_page`,
`bytes_per_page`, `index_seconds` and `search_seconds`, so that compressors can be compared there.
"""

from __future__ import annotations

import hashlib
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from samer.compressors import make_compressor, settings_written
from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.data.decoding import RefusedError, decode
from samer.data.pictures import digest_of, load_image
from samer.data.records import ImageRecord
from samer.data.stamps import Stamps
from samer.evaluation import encode_texts, fitted_compressor
from samer.index.manifest import Split
from samer.index.read import Index
from samer.index.write import check_settings, writing
from samer.retrievers.banks import Bank
from samer.retrievers.base import image_seeds
from samer.retrievers.family import RefusedPicture
from samer.retrievers.hf import Retriever
from samer.runtime.files import about, is_file, read_json, write_json
from samer.runtime.hub import is_hub_id
from samer.runtime.progress import batched
from samer.tokens import QueryTokens

try:
    import datasets
    import mteb
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta, ScoringFunction
except ImportError as error:
    raise ImportError(f"samer.mteb needs mteb 2.26 or newer: pip install samer[mteb] ({error})") from None

_SCORES = ("ndcg", "map", "recall", "precision", "mrr", "hit_rate")
QUERIES_AT_ONCE = 256  # searched in one pass over the index


class _Corpus:
    """A retriever whose pictures are rows of a corpus: what an index writer asks of one, by image id.

    Whatever is not of pictures is the retriever's own.
    """

    def __init__(self, retriever: Retriever, corpus: Any) -> None:
        """Looks at the corpus' columns; no picture is read.

        Args:
            retriever: with the projector in use.
            corpus: a `datasets.Dataset` with `id` and `image`.

        Raises:
            InputError: a corpus without pictures, without rows, or an id twice.
        """
        self._retriever = retriever
        if "image" not in corpus.column_names or not len(corpus):
            held = ", ".join(corpus.column_names) or "nothing"
            raise InputError(
                f"the corpus has {len(corpus):,} rows of {held}; SaMer searches pictures, an `image` column"
            )
        ids = [str(each) for each in corpus["id"]]
        self._rows = {name: row for row, name in enumerate(ids)}
        if len(self._rows) < len(ids):
            twice = next(name for row, name in enumerate(ids) if self._rows[name] != row)
            raise InputError(f"the corpus has the id {twice!r} twice; every page needs its own")
        self._pictures = corpus.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
        self.records = [ImageRecord(name, Path(name), ()) for name in ids]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._retriever, name)

    def _source(self, record: ImageRecord) -> tuple[bytes | None, str | None]:
        """The bytes of a picture's file, or else its path."""
        held = self._pictures[self._rows[record.image_id]]["image"] or {}
        return held.get("bytes"), held.get("path")

    def picture(self, record: ImageRecord) -> Image.Image:
        """The page, decoded no larger than the processor asks for."""
        inside, path = self._source(record)
        if inside is None and path is None:
            raise InputError(
                f"page {record.image_id!r} of the corpus has no picture; restore it, or leave the page out"
            )
        if inside is None:
            return load_image(path, self._retriever.picture_size)
        try:
            return decode(io.BytesIO(inside), self._retriever.picture_size)
        except RefusedError as error:
            raise InputError(f"page {record.image_id!r} of the corpus: {error}") from None

    def record_inputs(
        self, records: Sequence[ImageRecord], pictures: Sequence[Image.Image] | None = None
    ) -> dict[str, torch.Tensor]:
        """As `Retriever.record_inputs`, of the corpus' pictures."""
        try:
            inputs = self._retriever.image_inputs(pictures or [self.picture(record) for record in records])
        except RefusedPicture as error:
            raise InputError(f"page {records[error.number].image_id!r} of the corpus {error.reason}") from None
        return {**inputs, "seeds": image_seeds(records)}

    def contents(self, records: Sequence[ImageRecord], stamps: Stamps) -> list[str | None]:
        """As `Encoder.contents`: the hash of each picture's file as it is now."""
        found: list[str | None] = []
        for record in records:
            inside, path = self._source(record)
            if inside is not None:
                found.append(digest_of(io.BytesIO(inside)))
            else:
                found.append(stamps.content(record.image_id, path) if path else None)
        return found


class SamerSearch:
    """MTEB's `SearchProtocol` on our index: texts as queries, pictures as documents.

    Attributes:
        measured: by (task, split, subset) what MTEB does not measure: `pages`, `vectors_per_page`, `bytes_per_page`
            (padding counted), with 1-bit vectors `exact_bytes_per_page` beside them, `index_seconds` of the last run
            (little where shards were there already), `queries`, `search_seconds`.
    """

    def __init__(
        self,
        retriever: Retriever,
        merge: MergeConfig,
        folder: str | Path,
        *,
        dtype: str = "bfloat16",
        batch_size: int = 8,
        bank: Bank | None = None,
    ) -> None:
        """Nothing is written yet.

        Args:
            retriever: with the projector to use.
            merge: compressor, K and the other settings.
            folder: where a folder per task holds its index; one that is there is gone on with.
            dtype: of the stored vectors.
            batch_size: images, and queries, per forward pass.
            bank: for a compressor that needs queries.

        Raises:
            InputError: as `build_index`; a compressor that needs queries, without a bank.
        """
        check_settings(retriever, merge, batch_size, dtype, False)
        if make_compressor(merge).needs_queries and bank is None:
            raise InputError(f"compressor {merge.compressor!r} needs a query bank; make one with scripts/bank.py")
        self.retriever, self.merge, self.folder = retriever, merge, Path(folder)
        self.dtype, self.batch_size, self.bank = dtype, batch_size, bank
        self.measured: dict[tuple[str, str, str], dict[str, float]] = {}
        self._index: Index | None = None

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """Of this retriever at this budget; two that differ in anything stored have different results folders."""
        budget = str(self.merge.num_regions).replace("/", "_of_")
        own = "" if self.merge.compressor == "none" else f"-k{budget}"
        base = Path(self.retriever.name).name
        bank = {"bank": self.bank.hash[:12]} if self.bank else {}
        return ModelMeta.create_empty(
            overwrites={
                "name": f"samer/{base}-{self.merge.compressor}{own}-{self.dtype}",
                "revision": _weights(self.retriever),
                "adapted_from": self.retriever.name if is_hub_id(self.retriever.name) else None,
                "embed_dim": self.retriever.embedding_dim,
                "n_parameters": sum(weight.numel() for weight in self.retriever.model.parameters()),
                "similarity_fn_name": ScoringFunction.MAX_SIM,
                "modalities": ["image", "text"],
                "model_type": ["late-interaction"],
                "framework": ["PyTorch", "Transformers"],
                "use_instructions": False,
                "experiment_kwargs": {**settings_written(self.merge), "dtype": self.dtype, **bank},
            }
        )

    def index(self, corpus: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, **_: Any) -> None:
        """Writes the index of a corpus, or goes on with it; pages that are there as they are now are not read again.

        The subsets of a task share a folder: where they differ in their queries only, as by language, the second finds
        all of its pages.

        Raises:
            InputError: a corpus without pictures, a picture that can't be read, an index made otherwise.
        """
        started = time.perf_counter()
        encoder, folder = _Corpus(self.retriever, corpus), self.folder / _plain(task_metadata.name)
        records, split = encoder.records, _plain(hf_split)
        with writing(folder, encoder, self.merge, self.batch_size, self.dtype, False, self.bank) as writer:
            writer.begin(split, records)
            compressor = fitted_compressor(encoder, records, self.merge, self.batch_size, bank=self.bank)
            shards, _ = writer.write_images(split, records, compressor)
            writer.commit(split, Split(shards, ()))
            writer.contents.remember()
        self._index = Index(folder)
        took = time.perf_counter() - started
        self.measured[task_metadata.name, hf_split, hf_subset] = {**_sizes(self._index, split), "index_seconds": took}

    @torch.no_grad()
    def search(
        self,
        queries: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        top_ranked: dict[str, list[str]] | None = None,
        **_: Any,
    ) -> dict[str, dict[str, float]]:
        """The best `top_k` pages of each query by exact MaxSim, a mean over the query's tokens: {query: {page: score}}.

        Where `top_ranked` names pages for a query, those alone.

        Raises:
            InputError: no index, or queries that are no texts.
        """
        measured = self.measured.get((task_metadata.name, hf_split, hf_subset))
        if self._index is None or measured is None:
            raise InputError(f"{task_metadata.name}: index the corpus before searching it")
        if "text" not in queries.column_names:
            held = ", ".join(queries.column_names)
            raise InputError(f"{task_metadata.name}: its queries hold {held}; SaMer searches pictures by texts")
        started = time.perf_counter()
        names, split = [str(each) for each in queries["id"]], _plain(hf_split)
        most = int(measured["pages"]) if top_ranked else min(top_k, int(measured["pages"]))
        hits: list[list[tuple[str, float]]] = []
        for block in self._encoded(queries["text"]):
            hits += self._index.search(block, split, most, self.retriever.device)
        found = {}
        for name, pairs in zip(names, hits, strict=True):
            if top_ranked:
                wanted = set(top_ranked.get(name, ()))
                pairs = [pair for pair in pairs if pair[0] in wanted][:top_k]
            found[name] = dict(pairs)
        measured["queries"], measured["search_seconds"] = len(names), time.perf_counter() - started
        return found

    def _encoded(self, texts: Sequence[str]) -> Iterator[QueryTokens]:
        """Queries in blocks to be searched together."""
        for block in batched(list(texts), QUERIES_AT_ONCE):
            yield _joined(list(encode_texts(self.retriever, block, self.batch_size)))


def _joined(parts: Sequence[QueryTokens]) -> QueryTokens:
    rows = [tokens[mask] for part in parts for tokens, mask in zip(part.tokens, part.mask)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
    return QueryTokens(tokens, torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None])


def _weights(retriever: Retriever) -> str:
    """What tells a model with its projector from others of its name."""
    return hashlib.sha256((retriever.identity.weights + retriever.current_projector().hash).encode()).hexdigest()[:12]


def _plain(name: str) -> str:
    """A name that is one folder's everywhere."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_"


def _sizes(index: Index, split: str) -> dict[str, float]:
    """What an index needs per page."""
    pages, _, _, size = index.size(split)
    vectors = sum(int(mask.sum()) for _, _, mask in index.images(split))
    found = {"pages": pages, "vectors_per_page": vectors / pages, "bytes_per_page": size}
    exact = sum(shard.exact.bytes for shard in index.manifest.splits[split].images if shard.exact)
    return {**found, "exact_bytes_per_page": exact / pages} if exact else found


class LocalTask(AbsTaskRetrieval):
    """Text to image retrieval on a data set that one of our readers knows, such as ViDoRe, Flickr30k, COCO; no network.

    Queries are captions, under the data set's own ids or `image#number`; what is relevant is what the data set grades,
    else a caption's own image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "test",
        *,
        name: str = "",
        reader: str = "",
        main_score: str = "ndcg_at_10",
        limit_images: int | None = None,
    ) -> None:
        """Reads ids and captions; no picture.

        Args:
            root: the data set's folder.
            split: of it, such as "test", or "test@english" of a ViDoRe in several languages.
            name: of the task in results; empty: the folder's name and the split's.
            reader: its kind, a name in `samer.data.READERS`; empty: guessed.
            main_score: MTEB's name of the score to report; ViDoRe 1 and 2 report ndcg_at_5.
            limit_images: the first so many.

        Raises:
            InputError: bad data, a split without captions, or a score that is none of MTEB's.
        """
        kind, _, depth = main_score.rpartition("_at_")
        depths = [str(k) for k in AbsTaskRetrieval.k_values]
        if kind not in _SCORES or depth not in depths:
            raise InputError(
                f"main score {main_score!r}: give {', '.join(_SCORES)} with _at_ and {', '.join(depths)}, as ndcg_at_10"
            )
        rows = make_reader(reader, root).load_split(root, split, boxes=False, limit_images=limit_images)
        texts, relevant = _queries(rows)
        if not texts:
            raise InputError(f"{root}: none of {len(rows):,} images of {split} has a caption, so nothing can be asked")
        pictures = {row.image_id: str(row.image_path) for row in rows}
        found = map(about, pictures.values())
        sizes = [each and each.st_size for each in found]  # a picture that was replaced seldom has its size
        said = repr((list(pictures), sizes, texts, relevant)).encode()
        self.metadata = TaskMetadata(
            name=_plain(name or f"{Path(root).resolve().name}-{split}"),
            description=f"Text to image retrieval, {split} of a local data set.",
            dataset={"path": Path(root).resolve().name, "revision": hashlib.sha256(said).hexdigest()[:16]},
            type="Any2AnyRetrieval",
            category="t2i",
            modalities=["text", "image"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score=main_score,
        )
        super().__init__()
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        columns = {"id": list(pictures), "image": list(pictures.values())}  # paths, until a picture is read
        held = {
            "corpus": datasets.Dataset.from_dict(columns, features=features),
            "queries": datasets.Dataset.from_dict({"id": list(texts), "text": list(texts.values())}),
            "relevant_docs": relevant,
            "top_ranked": None,
        }
        # loaded from the start: MTEB takes everything, `metadata` too, from a task whose data it has loaded itself
        self.dataset, self.data_loaded = {"default": {"test": held}}, True


def _queries(records: Sequence[ImageRecord]) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """Texts and grades by query id."""
    here = {record.image_id for record in records}
    texts: dict[str, str] = {}
    relevant: dict[str, dict[str, int]] = {}
    for record in records:
        for number, caption in enumerate(record.captions):
            name = caption.query_id or f"{record.image_id}#{number}"
            texts[name] = caption.text
            grades = {image: grade for image, grade in caption.grades if image in here}
            relevant[name] = grades or {record.image_id: 1}
    return texts, relevant


class _Beside:
    """A task's own extra scores, and what was measured beside them."""

    def __init__(self, task: AbsTaskRetrieval, search: SamerSearch) -> None:
        self._before: Callable[..., dict[str, float]] = task.task_specific_scores
        self._name, self._search = task.metadata.name, search

    def __call__(self, *arguments: Any, hf_split: str, hf_subset: str) -> dict[str, float]:
        own = self._before(*arguments, hf_split=hf_split, hf_subset=hf_subset)
        return {**own, **self._search.measured[self._name, hf_split, hf_subset]}


def evaluate(search: SamerSearch, tasks: Sequence[AbsTaskRetrieval], folder: str | Path) -> list[dict[str, Any]]:
    """Runs tasks as `mteb.evaluate` does, with what was measured among each task's scores.

    Results that are there of the same model, settings and data are kept.

    Args:
        search: the model.
        tasks: MTEB's own, or `LocalTask`s.
        folder: for MTEB's result files, and `results.json`, which gathers the rows of all runs.

    Returns:
        A row per task, split and subset: `model`, `task`, `split`, `subset`, `main_score` (its name), `score`,
        `ndcg_at_5`, `ndcg_at_10`, `recall_at_1`, and what `SamerSearch.measured` holds.

    Raises:
        InputError: a task that is none of retrieval; as `SamerSearch.index` and `SamerSearch.search`.
    """
    folder, rows = Path(folder), []
    cache, meta = mteb.ResultCache(folder), search.mteb_model_meta
    for task in tasks:
        if not isinstance(task, AbsTaskRetrieval):
            raise InputError(f"{task.metadata.name} is no retrieval task; SaMer searches pictures by texts")
        held = cache.load_task_result(task.metadata.name, meta)
        fresh = held is None or held.dataset_revision == task.metadata.revision  # MTEB does not compare
        more = {"encode_kwargs": {"batch_size": search.batch_size}, "co2_tracker": False, "show_progress_bar": False}
        more["overwrite_strategy"] = "only-missing" if fresh else "always"
        task.task_specific_scores = _Beside(task, search)
        try:
            result = mteb.evaluate(search, task, cache=cache, **more)
        finally:
            del task.task_specific_scores
        for done in result.task_results:
            for split, subsets in done.scores.items():
                own = [_row(done.task_name, split, task.metadata.main_score, scores) for scores in subsets]
                rows += [{"model": meta.name, **row} for row in own]
        _gather(folder / "results.json", rows)  # what is finished stands there whatever becomes of the next
    return rows


def _gather(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Puts rows among those that are in a file, in place of those of the same model, task, split and subset."""
    name = lambda row: tuple(row.get(key) for key in ("model", "task", "split", "subset"))
    new = set(map(name, rows))
    old = read_json(path).get("rows", []) if is_file(path) else []
    write_json(path, {"rows": [*(row for row in old if name(row) not in new), *rows]})


def named_tasks(names: Sequence[str]) -> list[AbsTaskRetrieval]:
    """MTEB's own tasks by name; their data is read when they run.

    Raises:
        InputError: there is none of that name.
    """
    found = []
    for name in names:
        try:
            found.append(mteb.get_task(name))
        except KeyError as error:
            said = " ".join(str(error).split())[:200]
            raise InputError(f"MTEB has no task {name!r} ({said}); mteb available-tasks lists them") from None
    return found


def told(row: dict[str, Any]) -> str:
    """A row of `evaluate` in a line."""
    place = row["task"] if row["subset"] == "default" else f"{row['task']} ({row['subset']})"
    score = f"{place}: {row['main_score']} {row['score']:.4f}"
    if "pages" not in row:  # results of a run without SaMer's columns
        return score
    size = (
        f"{row['pages']:,.0f} pages x {row['vectors_per_page']:,.1f} vectors, {row['bytes_per_page']:,.0f} bytes a page"
    )
    asked = f"{row['queries']:,.0f} queries in {row['search_seconds']:,.1f} s"
    return f"{score}; {size}; indexed in {row['index_seconds']:,.1f} s, {asked}"


_SHOWN = ("ndcg_at_5", "ndcg_at_10", "recall_at_1")
_MEASURED = ("pages", "queries", "vectors_per_page", "bytes_per_page", "exact_bytes_per_page")
_SECONDS = ("index_seconds", "search_seconds")


def _row(task: str, split: str, main: str, scores: dict[str, Any]) -> dict[str, Any]:
    about = {"task": task, "split": split, "subset": scores["hf_subset"], "main_score": main, "score": scores[main]}
    return about | {key: scores[key] for key in (*_SHOWN, *_MEASURED, *_SECONDS) if key in scores}
