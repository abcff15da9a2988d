"""An index open for searching by words, and what each word of a query looked at.

Shape letters: K vectors, N tokens of an image, M query tokens, D embedding, P patches, W words."""

from __future__ import annotations

import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from samer.config import InputError
from samer.data.flickr import IMAGE_SUFFIXES, find_layout, parse_annotation, parse_sentence
from samer.data.records import Box
from samer.features.read import open_encoder
from samer.grounding import box_coverage
from samer.index.manifest import NO_REGION
from samer.index.read import Index
from samer.retrievers.base import Encoder, Projector
from samer.tokens import QueryTokens

LONGEST_QUERY = 1000  # characters


class _Latest:
    """The values of the latest keys, for any thread; two threads may compute one value at the same time."""

    def __init__(self, count: int) -> None:
        self.count, self.values, self.lock = count, OrderedDict(), threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of `key`, made if it is not there."""
        with self.lock:
            if key in self.values:
                self.values.move_to_end(key)
                return self.values[key]
        value = make()
        with self.lock:
            self.values[key] = value
            while len(self.values) > self.count:
                self.values.popitem(last=False)
        return value


def check_query(text: str) -> None:
    """Refuses what no model should be asked.

    Raises:
        InputError: an empty query, one of more than 1,000 characters, one with NUL or lone surrogates.
    """
    if not text.strip():
        raise InputError("the query is empty; write what to look for")
    if len(text) > LONGEST_QUERY:
        raise InputError(f"the query has {len(text):,} characters; {LONGEST_QUERY:,} are the most")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError("the query holds characters that are no text (NUL or half of a pair); remove them")


class Models:
    """The models that indexes need, each loaded once, and the hidden states of the latest texts.

    What precedes the projection is the same for all indexes of a model, so a text that is asked of another index is
    projected anew but not encoded anew. One thread at a time.
    """

    def __init__(self, device: torch.device | str, name: str | None = None) -> None:
        """`name` says where the model is, if not where an index says."""
        self.device, self.name = torch.device(device), name
        self._encoders: dict[str, Encoder] = {}
        self._states = _Latest(32)  # 1,000 letters of ColPali take 8 MB, a usual query 0.2 MB

    def load(self, cache: Index) -> Encoder:
        """The model of an index, as its untouched projection tells.

        Raises:
            InputError: it can't be loaded, or it is another one.
        """
        wanted = cache.manifest.model.base_projector
        if wanted not in self._encoders:
            encoder = open_encoder(self.name or cache.manifest.base_model, self.device)
            cache.check_model(encoder)
            self._encoders[wanted] = encoder
        return self._encoders[wanted]

    @torch.no_grad()
    def query(self, encoder: Encoder, projector: Projector, text: str) -> tuple[QueryTokens, float]:
        """Unit tokens (1, M, D) of a text through a projector, with offsets if the encoder gives them.

        Returns:
            The tokens, and milliseconds: of the projection now, and of the model when it last read the text.
        """

        def states() -> tuple[Tensor, Tensor, Tensor | None, float]:
            started = time.perf_counter()
            inputs = encoder.query_inputs([text])
            hidden = encoder.hidden_states(inputs)
            took = 1000 * (time.perf_counter() - started)
            return hidden, inputs["attention_mask"].bool().to(encoder.device), inputs.get("offsets"), took

        hidden, mask, offsets, took = self._states.get((encoder.base_projector.hash, text), states)
        started = time.perf_counter()
        encoder.use_projector(projector)
        tokens = encoder.project(hidden)
        return QueryTokens(tokens, mask, offsets), took + 1000 * (time.perf_counter() - started)


@dataclass(frozen=True)
class Found:
    """Answer to a query: pairs (id, score), best first, the query's tokens (1, M, D), and milliseconds."""

    hits: list[tuple[str, float]]
    query: QueryTokens
    encode_ms: float
    search_ms: float


@dataclass(frozen=True)
class Word:
    """A word of a query: its characters `start:end`, and its places among the valid query tokens."""

    text: str
    start: int
    end: int
    tokens: tuple[int, ...]


def query_words(text: str, offsets: Tensor) -> list[Word]:
    """The words of a text, parted by white space, and the tokens that lie in them.

    Args:
        text: the query.
        offsets: (M, 2) of its valid tokens, first and last + 1 character, -1 for tokens that are not of the text.
    """
    spans = offsets.tolist()
    words = []
    for match in re.finditer(r"\S+", text):
        start, end = match.span()
        inside = (k for k, (first, last) in enumerate(spans) if first < end and last > start)  # -1, -1 never is
        words.append(Word(match.group(), start, end, tuple(inside)))
    return words


class SearchIndex:
    """An index as it is on disk now, its model and projector, and where its pictures and boxes lie.

    Searching is for one thread at a time, as `Models` is; `picture` is for any.
    """

    def __init__(
        self, folder: str | Path, models: Models, split: str | None = None, data_root: str | Path | None = None
    ) -> None:
        """Opens an index.

        Args:
            folder: made by scripts/index.py or scripts/cache.py.
            models: shared with other indexes.
            split: None: the only one.
            data_root: Flickr30k-Entities copy, where the pictures lie that an index of a data set does not know of, and
                boxes; an index that knows its own folder of pictures has no use for it.

        Raises:
            InputError: no index, no such split, several and none named, another model, a damaged projector, no data.
        """
        self._arguments = (folder, models, split, data_root)
        self.folder, self.models = Path(folder), models
        self.stamp = _stamp(self.folder)  # before it is read: what is written in between is seen next time
        self.cache = Index(folder)
        splits = list(self.cache.manifest.splits)
        if split is None and len(splits) != 1:
            raise InputError(f"{folder} holds {', '.join(splits) or 'nothing'}; name one with --split")
        self.split = split or splits[0]
        self.images, _, self.regions, self.bytes_per_image = self.cache.size(self.split)
        own = self.cache.manifest.splits[self.split].root
        self.root = Path(own) if own else None
        self.layout = find_layout(data_root) if data_root and not own else None
        self.encoder = models.load(self.cache)
        self.projector = self.cache.projector()
        self._boxes = _Latest(2000)

    def now(self) -> SearchIndex:
        """The index as it is on disk now: itself, or opened again if its manifest was replaced."""
        return self if _stamp(self.folder) == self.stamp else SearchIndex(*self._arguments)

    @property
    def grid(self) -> int:
        return self.encoder.grid

    @property
    def has_evidence(self) -> bool:
        """Whether it is known which patches each vector stands for."""
        return self.cache.manifest.has_regions

    @property
    def has_boxes(self) -> bool:
        return self.layout is not None and self.layout.annotations is not None

    @cached_property
    def exact_bytes(self) -> float:
        """Bytes per image on disk beside those that a search scans: the exact vectors that 1-bit ones need."""
        shards = self.cache.manifest.splits[self.split].images
        return sum(shard.exact.bytes for shard in shards if shard.exact) / sum(shard.count for shard in shards)

    def facts(self) -> dict:
        """What the page says of the index."""
        merge = self.cache.manifest.merge
        name = merge.compressor
        return {
            "name": self.folder.resolve().name,
            "split": self.split,
            "compressor": f"{name}, {merge.center_init}" if name == "samer" else name,
            "regions": self.regions,
            "dtype": self.cache.manifest.dtype,
            "images": self.images,
            "bytes_per_image": self.bytes_per_image,
            "exact_bytes_per_image": self.exact_bytes,
            "total_bytes": round(self.images * self.bytes_per_image),
            "evidence": self.has_evidence,
            "boxes": self.has_boxes,
            "pictures": self.root is not None or self.layout is not None,
        }

    def search(self, text: str, top: int) -> Found:
        """The best images for a text, as `Index.search` finds them.

        Raises:
            InputError: as `check_query`; a text that the model refuses.
        """
        check_query(text)
        query, encode_ms = self.models.query(self.encoder, self.projector, text)
        started = time.perf_counter()
        hits = self.cache.search(query, self.split, top, self.models.device)[0]
        return Found(hits, query, encode_ms, 1000 * (time.perf_counter() - started))

    def explain(self, text: str, found: Found) -> tuple[list[Word], list[dict]]:
        """The words of a query, and for each hit what each word looked at.

        A word's tokens each select their best stored vector (argmax of the dot product); its evidence is spread evenly
        over the patches whose region that vector is. A vector without patches (of prompt tokens only) has none.

        Returns:
            The words, and a row per hit: `number`; `regions` (P,), the vector of each patch, -1 for none, or None where
            the index does not know; `words`, per word a dict: `vectors`, those that its tokens select, in order;
            `boxes` (n, 4), shares of the image, of this image's phrases with the word, and `box_mass`, the share of the
            evidence inside them, mean over the word's tokens; both None where there are no such boxes.

        Raises:
            InputError: an annotation that is malformed.

        Source: METHOD section 6, with even weights, as an index holds no others.
        """
        valid = found.query.mask[0]
        tokens = found.query.tokens[0][valid].float().cpu()  # (M, D)
        offsets = found.query.offsets
        words = query_words(text, offsets[0][valid.cpu()].cpu()) if offsets is not None else []
        numbers = self.cache.numbers(self.split)
        rows = []
        for name, _ in found.hits:
            vectors, mask, assignments = self.cache.vectors(self.split, numbers[name])
            products = tokens @ vectors.t()  # (M, K)
            winners = products.masked_fill(~mask, float("-inf")).argmax(1).tolist()
            regions = self._regions(assignments)
            told = []
            for word in words:
                chosen = [winners[k] for k in word.tokens]
                boxes = self._boxes_of(name, word.text)
                known = boxes and chosen and regions is not None
                mass = _box_mass(chosen, regions, boxes, self.grid) if known else None
                told.append({"vectors": chosen, "boxes": boxes, "box_mass": mass})
            rows.append(
                {"number": numbers[name], "regions": None if regions is None else regions.tolist(), "words": told}
            )
        return words, rows

    def _regions(self, assignments: Tensor | None) -> Tensor | None:
        """(P,) long, the vector of each patch, -1 where it has none; patches come first among the tokens."""
        patches = self.grid * self.grid
        if self.cache.manifest.merge.compressor == "none":
            return torch.arange(patches)  # every token is a vector of its own
        if assignments is None:
            return None
        regions = assignments[:patches].long()
        return regions.masked_fill(regions == NO_REGION, -1)

    def _boxes_of(self, name: str, word: str) -> list[Box] | None:
        """Boxes of the image's phrases that contain a word, whole and whatever its case; None where there are none."""
        key = re.sub(r"^\W+|\W+$", "", word).casefold()
        if not key or not self.has_boxes:
            return None
        whole = re.compile(rf"(?<!\w){re.escape(key)}(?!\w)")
        phrases = self._boxes.get(name, lambda: self._read_boxes(name))
        boxes = dict.fromkeys(box for phrase, of in phrases if whole.search(phrase.casefold()) for box in of)
        return list(boxes) or None

    def _read_boxes(self, name: str) -> list[tuple[str, tuple[Box, ...]]]:
        """Phrases with boxes of one image; none where its files are missing."""
        annotation = _inside(self.layout.annotations, f"{name}.xml")
        sentences = _inside(self.layout.sentences, f"{name}.txt")
        if not (annotation and sentences and annotation.is_file() and sentences.is_file()):
            return []
        chains = parse_annotation(annotation)
        try:
            lines = sentences.read_text(encoding="utf-8-sig").split("\n")
            phrases = [phrase for line in lines if line.strip() for phrase in parse_sentence(line, chains)[1]]
        except (OSError, ValueError) as error:  # InputError is a ValueError
            raise InputError(f"{sentences}: {error}") from None
        return [(phrase.text, phrase.boxes) for phrase in phrases if phrase.boxes]

    def picture(self, number: int) -> Path | None:
        """The file of an image by its number; None where there is none, or where its id leads out of the pictures."""
        name = self.cache.image_id(self.split, number)
        if name is None:
            return None
        if self.root is not None:
            path = _inside(self.root, name)
            return path if path and path.is_file() else None
        if self.layout is not None:
            paths = (_inside(self.layout.images, name + suffix) for suffix in IMAGE_SUFFIXES)
            return next((path for path in paths if path and path.is_file()), None)
        return None


def _stamp(folder: Path) -> tuple[int, ...] | None:
    """What changes when the manifest of an index is replaced."""
    try:
        stat = os.stat(folder / "manifest.json")
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _inside(root: Path, name: str) -> Path | None:
    """A path below a folder; None for an absolute name or one that climbs out of it."""
    base = os.path.normpath(os.path.abspath(root))
    path = os.path.normpath(os.path.join(base, name))
    if os.path.isabs(name) or "\0" in name or not path.startswith(os.path.join(base, "")):
        return None
    return Path(path)


def _box_mass(chosen: Sequence[int], regions: Tensor, boxes: Sequence[Box], grid: int) -> float:
    """Share of the evidence inside the union of boxes, mean over the selected vectors; one without patches counts 0."""
    covered = torch.from_numpy(box_coverage(boxes, grid, grid))  # (P,)
    shares = [float(covered[regions == vector].mean()) if (regions == vector).any() else 0.0 for vector in chosen]
    return sum(shares) / len(shares)
