"""An index open for searching by words, and what each word of a query looked at.

Shape letters: K vectors of an image, M query tokens, D embedding, P patches of an image.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from samer.config import InputError
from samer.data import make_reader
from samer.data.records import Box, ImageRecord
from samer.grounding import box_coverage
from samer.index.columns import read_columns
from samer.index.filters import parse_condition, rows_that_meet
from samer.index.read import Index, StoredVectors
from samer.runtime.files import about, is_file
from samer.search.documents import Document, find_documents
from samer.search.latest import Latest
from samer.search.marks import Marks
from samer.search.models import Models
from samer.search.words import Word, check_query, query_words
from samer.tokens import QueryTokens


@dataclass(frozen=True)
class Found:
    """Answer to a query.

    Attributes:
        hits: pairs (id, score), best first.
        states: of each hit, what became of its file since it was indexed: "gone", "changed", or None where nothing is
            known of that.
        query: its tokens (1, M, D).
        encode_ms, search_ms: milliseconds.
        documents: where these were asked for; the hits are their best pages then, in their order.
    """

    hits: list[tuple[str, float]]
    states: list[str | None]
    query: QueryTokens
    encode_ms: float
    search_ms: float
    documents: list[Document] | None = None


@dataclass(frozen=True)
class Wanted:
    """What of an index a search may find, and as what.

    Attributes:
        top: how many images, or documents.
        conditions: on the images' metadata, as `samer.index.filters` writes them; all must be met.
        documents: the column that names the document of a page; empty: images are found.
        pages: how many of a document's best pages count.
        budget, coarse: of the smaller budgets that an index may hold, as `Index.search`.
    """

    top: int = 10
    conditions: tuple[str, ...] = ()
    documents: str = ""
    pages: int = 1
    budget: int = 0
    coarse: int = 0


class SearchIndex:
    """An index as it is on disk now, its model and projector, and where its pictures and boxes lie.

    Searching is for one thread at a time, as `Models` is; `picture` is for any.
    """

    def __init__(
        self,
        folder: str | Path,
        models: Models,
        split: str | None = None,
        data_root: str | Path | None = None,
        reader: str = "",
    ) -> None:
        """Opens an index.

        Args:
            folder: made by scripts/index.py or scripts/cache.py.
            models: shared with other indexes.
            split: None: the only one.
            data_root: copy of a data set, where the pictures lie that an index of a data set does not know of, and
                boxes; an index that knows its own folder of pictures has no use for it.
            reader: of the data set, a name in `samer.data.READERS`; empty: guessed.

        Raises:
            InputError: no index, no such split, several and none named, another model, a damaged projector, no data.
        """
        self._arguments = (folder, models, split, data_root, reader)
        self.folder, self.models = Path(folder), models
        self.stamp = _stamp(self.folder)  # before it is read: what is written in between is seen next time
        self.index = Index(folder, models.uploads)
        splits = list(self.index.manifest.splits)
        if split is None and len(splits) != 1:
            raise InputError(f"{folder} holds {', '.join(splits) or 'nothing'}; name one with --split")
        self.split = split or splits[0]
        self.images, _, self.regions, self.bytes_per_image = self.index.size(self.split)
        own = self.index.manifest.splits[self.split].root
        self.root = Path(own) if own else None
        self.data_root = data_root if data_root and not own else None
        self.reader = make_reader(reader, self.data_root) if reader or self.data_root else None
        self.has_boxes = self.data_root is not None and self.reader.check(self.data_root)
        self.encoder = models.load(self.index)
        self.projector = self.index.projector()
        self._records = Latest(2000)
        self._marks = Marks(self.index, self.split)

    def now(self) -> SearchIndex:
        """The index as it is on disk now: itself, or opened again if its manifest was replaced."""
        return self if _stamp(self.folder) == self.stamp else SearchIndex(*self._arguments)

    @property
    def has_evidence(self) -> bool:
        """Whether it is known which patches each vector stands for."""
        return self.index.manifest.assignments or self.index.manifest.merge.compressor == "none"

    @cached_property
    def exact_bytes(self) -> float:
        """Bytes per image on disk beside those that a search scans: the exact vectors that 1-bit ones need."""
        shards = self.index.manifest.splits[self.split].images
        total = sum(shard.exact.bytes for shard in shards if shard.exact)
        return total / sum(shard.count for shard in shards)

    def facts(self) -> dict:
        """What the page says of the index."""
        merge = self.index.manifest.merge
        return {
            "name": self.folder.resolve().name,
            "split": self.split,
            "compressor": f"samer, {merge.center_init}" if merge.compressor == "samer" else merge.compressor,
            "regions": self.regions,
            "dtype": self.index.manifest.dtype,
            "images": self.images,
            "bytes_per_image": self.bytes_per_image,
            "exact_bytes_per_image": self.exact_bytes,
            "total_bytes": round(self.images * self.bytes_per_image),
            "evidence": self.has_evidence,
            "boxes": self.has_boxes,
            "pictures": self.root is not None or self.data_root is not None,
        }

    @cached_property
    def columns(self) -> dict[str, dict]:
        """The images' metadata by id; empty where there is none."""
        return read_columns(self.folder, self.split)

    def search(self, text: str, wanted: int | Wanted) -> Found:
        """The best images for a text, as `Index.search` finds them, or so many documents.

        Raises:
            InputError: as `check_query`; a text that the model refuses; a condition that is none.
        """
        wanted = Wanted(wanted) if isinstance(wanted, int) else wanted
        check_query(text)
        keep = self._kept(wanted.conditions)
        names = self._document_names(wanted.documents) if wanted.documents else {}
        query, encode_ms = self.models.query(self.encoder, self.projector, text)
        started = time.perf_counter()
        documents = None
        if wanted.documents:
            how = {"pages": wanted.pages, "keep": keep, "device": self.models.device, "budget": wanted.budget}
            documents = find_documents(self.index, self.split, query, names, wanted.top, **how)
            hits = [document.pages[0] for document in documents]
        else:
            how = {"budget": wanted.budget, "coarse": wanted.coarse}
            hits = self.index.search(query, self.split, wanted.top, self.models.device, keep, **how)[0]
        took = 1000 * (time.perf_counter() - started)
        return Found(hits, [self._state(name) for name, _ in hits], query, encode_ms, took, documents)

    def _kept(self, conditions: Sequence[str]) -> Tensor | None:
        """(rows,) bool, True for what may be found; None: all may."""
        if not conditions:
            return None
        rows = sum(shard.count for shard in self.index.manifest.splits[self.split].images)
        parsed = [parse_condition(each) for each in conditions]
        return rows_that_meet(parsed, self.columns, self.index.numbers(self.split), rows)

    def _document_names(self, column: str) -> dict[str, str]:
        """The document of every page by id.

        Raises:
            InputError: no image has the column.
        """
        found = {name: own[column] for name, own in self.columns.items() if own.get(column) is not None}
        if not found:
            held = ", ".join(sorted({key for own in self.columns.values() for key in own})) or "none"
            raise InputError(
                f"{self.folder}: no image has a column {column[:40]!r} that names documents (it has {held})"
            )
        return {name: str(value) for name, value in found.items()}

    def _state(self, name: str) -> str | None:
        """What became of an image's file, as `Marks.state` says; None where it is not known which file that is."""
        try:
            path = self._file(name)
        except InputError:  # an annotation; whoever needs it says so
            return None
        return self._marks.state(name, path) if path else None

    def explain(self, text: str, found: Found) -> tuple[list[Word], list[dict]]:
        """The words of a query, and for each hit what each word looked at.

        A word's tokens each select their best stored vector (argmax of the dot product); its evidence is spread evenly
        over the patches whose region that vector is. A vector without patches (of prompt tokens only) has none.

        Returns:
            The words, and a row per hit: `number`; `state`, as in `Found`; `grid`, rows and columns of its patches, and
            `regions` (P,), the vector of each patch, -1 for none, both None where the index does not know; `words`, per
            word a dict: `vectors`, those that its tokens select, in order; `boxes` (n, 4), shares of the image, of this
            image's phrases with the word, and `box_mass`, the share of the evidence inside them, mean over the word's
            tokens; both None where there are no such boxes.

        Raises:
            InputError: an annotation that is malformed.

        Source: METHOD section 6, with even weights, as an index holds no others.
        """
        valid = found.query.mask[0]
        tokens = found.query.tokens[0][valid].float().cpu()  # (M, D)
        offsets = found.query.offsets
        words = query_words(text, offsets[0][valid.cpu()].cpu()) if offsets is not None else []
        numbers = self.index.numbers(self.split)
        rows = []
        for (name, _), state in zip(found.hits, found.states):
            stored = self.index.vectors(self.split, numbers[name])
            products = tokens @ stored.tokens.t()  # (M, K)
            winners = products.masked_fill(~stored.mask, float("-inf")).argmax(1).tolist()
            regions = self._regions(stored)
            told = []
            for word in words:
                chosen = [winners[k] for k in word.tokens]
                boxes = self._boxes_of(name, word.text)
                known = boxes and chosen and regions is not None
                told.append(
                    {
                        "vectors": chosen,
                        "boxes": boxes,
                        "box_mass": _box_mass(chosen, regions, boxes) if known else None,
                    }
                )
            rows.append(
                {
                    "number": numbers[name],
                    "state": state,
                    "grid": None if regions is None else list(regions.shape),
                    "regions": None if regions is None else regions.flatten().tolist(),
                    "words": told,
                }
            )
        return words, rows

    def _regions(self, stored: StoredVectors) -> Tensor | None:
        """The vector of each patch of an image, (rows, columns) long, -1 for none; None where the index holds none."""
        grid = stored.grid or self.encoder.grid  # an index of format 3 keeps no grid; its images have the model's
        if stored.regions is None or grid is None:
            return None
        return stored.regions[: grid[0] * grid[1]].view(*grid)  # format 3: patches first, then prompt tokens

    def _boxes_of(self, name: str, word: str) -> list[Box] | None:
        """Boxes of the image's phrases that contain a word, whole and whatever its case; None where there are none."""
        key = re.sub(r"^\W+|\W+$", "", word).casefold()
        record = self._record(name) if key and self.has_boxes else None
        if record is None:
            return None
        whole = re.compile(rf"(?<!\w){re.escape(key)}(?!\w)")
        phrases = (phrase for caption in record.captions for phrase in caption.phrases)
        boxes = dict.fromkeys(box for phrase in phrases if whole.search(phrase.text.casefold()) for box in phrase.boxes)
        return list(boxes) or None

    def _record(self, name: str) -> ImageRecord | None:
        """What the data set knows of an image; None where it has none of that name."""
        return self._records.get(name, lambda: self.reader.find(self.data_root, self.split, name))

    def picture(self, number: int) -> Path | None:
        """The file of an image by its number; None where there is none, or where its id leads out of the pictures.

        Raises:
            InputError: a file of the data set that is malformed.
        """
        name = self.index.image_id(self.split, number)
        path = None if name is None else self._file(name)
        return path if path and is_file(path) else None

    def _file(self, name: str) -> Path | None:
        """Where the file of an image lies, there or not; None where that is not known, or out of the pictures."""
        if self.root is not None:
            return _inside(self.root, name)
        record = self._record(name) if self.data_root is not None else None
        return record.image_path if record else None


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """What changes when the manifest of an index is replaced; None: there is none.

    Raises:
        InputError: the file system can't say.
    """
    found = about(folder / "manifest.json")
    return found and (found.st_mtime_ns, found.st_ino, found.st_size)


def _inside(root: Path, name: str) -> Path | None:
    """A path below a folder; None for an absolute name or one that climbs out of it."""
    base = os.path.normpath(os.path.abspath(root))
    path = os.path.normpath(os.path.join(base, name))
    if os.path.isabs(name) or "\0" in name or not path.startswith(os.path.join(base, "")):
        return None
    return Path(path)


def _box_mass(chosen: Sequence[int], regions: Tensor, boxes: Sequence[Box]) -> float:
    """Share of the evidence inside the union of boxes, mean over the selected vectors; one without patches counts 0.

    Args:
        chosen: the vectors.
        regions: (rows, columns) long, the vector of each patch.
        boxes: shares of the image.
    """
    covered = torch.from_numpy(box_coverage(boxes, *regions.shape)).view(regions.shape)
    shares = [float(covered[regions == vector].mean()) if (regions == vector).any() else 0.0 for vector in chosen]
    return sum(shares) / len(shares)
