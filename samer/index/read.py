"""An index open for reading: shards are mapped, checked against the manifest, scored and searched.

Shape letters: I images, n images of a shard, K regions, N tokens before compression, P patches, D embedding, Q queries,
M tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.codes import Codebook
from samer.config import InputError
from samer.data.contents import check_contents
from samer.evaluation import grade_matrix
from samer.index.checks import check_grades, check_images, is_stamp
from samer.index.codes import floats_of, held_codes
from samer.index.filters import only
from samer.index.manifest import (
    COMMON,
    NO_REGION,
    QueryShard,
    Shard,
    Split,
    level_name,
    making_from_stamp,
    most_scanned,
    read_index_manifest,
    summarise,
)
from samer.index.stages import exact_scores, search_coarse, search_signs
from samer.index.uploads import Uploads
from samer.retrievers.banks import FILE as BANK
from samer.retrievers.banks import Bank, read_bank
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.projectors import read_projector
from samer.runtime.files import DiskError, is_file, lookup
from samer.runtime.progress import batched
from samer.runtime.shards import load_shard, unreadable, verify_shard
from samer.scoring import StoredImages, score_stored, search
from samer.tokens import QueryTokens


@dataclass(frozen=True)
class StoredVectors:
    """One image as an index stores it: what its score is made of, and what its vectors stand for.

    Attributes:
        tokens: (K, D) float32: int8 times its scale, codes looked up; with signs those of the exact file.
        mask: (K,) bool, False where the image has fewer vectors.
        regions: (P,) long, the vector of every patch in row-major order, -1 for none; None where the index holds none.
            Without a `grid`, (N,): of every token, patches first.
        grid: rows and columns of the patches; None in files of format 3, whose images all have the retriever's grid.
    """

    tokens: Tensor
    mask: Tensor
    regions: Tensor | None
    grid: tuple[int, int] | None


class Index:
    """A finished index, opened for reading as it is now; shards are mapped, not loaded."""

    def __init__(self, folder: str | Path, uploads: Uploads | None = None) -> None:
        """Opens `folder`.

        Args:
            folder: of the index.
            uploads: what it shares with other openings where it is scanned on a GPU; None: its own.

        Raises:
            InputError: no manifest, another format or version.
        """
        self.folder = lookup(folder)
        path = self.folder / "manifest.json"
        if not is_file(path):
            raise DiskError(
                f"{self.folder}: no manifest.json; this is no finished index. Build it with scripts/index.py --images "
                "FOLDER (your pictures) or bash/cache.sh (a data set); run it again if it was interrupted: it goes on"
            )
        self.manifest = read_index_manifest(path)
        self._mapped: dict[tuple[str, str], tuple[dict[str, Tensor], dict]] = {}
        self._uploads = Uploads() if uploads is None else uploads
        self._tables: dict[str, Codebook] = {}  # of codes, by device
        self._checked: set[tuple[str, str]] = set()
        self._numbered: dict[str, dict[str, int]] = {}

    def projector(self) -> Projector:
        """What queries must be projected with.

        Raises:
            InputError: missing, damaged, or not the one that the index was made with.
        """
        path = self.folder / "projector.safetensors"
        projector = read_projector(path)
        if projector.hash != self.manifest.projector:
            raise DiskError(
                f"{path}: not the projector that this index was made with; remove the index and build it anew"
            )
        return projector

    def bank(self) -> Bank | None:
        """The query bank that says what images keep; None: their compressor has none, and all vectors are stored.

        Raises:
            InputError: missing, damaged, or not the one that the index was made with.
        """
        if not self.manifest.bank:
            return None
        path = self.folder / BANK
        bank = read_bank(path)
        if bank.hash != self.manifest.bank:
            raise DiskError(f"{path}: not the query bank that this index was made with; restore it, or build it anew")
        return bank

    @cached_property
    def codes(self) -> Codebook | None:
        """The tables that vectors are looked up in; None: they are stored as numbers.

        Raises:
            InputError: as `held_codes`.
        """
        return held_codes(self.folder, self.manifest)

    def _codes_on(self, device: torch.device | str) -> Codebook | None:
        """The tables on a device, which keeps them."""
        if self.codes is not None and str(device) not in self._tables:
            self._tables[str(device)] = self.codes.to(device)
        return self._tables.get(str(device))

    def check_budget(self, budget: int) -> None:
        """Refuses a smaller budget that the index does not hold; 0, all its vectors, is always there.

        Raises:
            InputError: it holds no such.
        """
        if budget and budget not in self.manifest.budgets:
            held = ", ".join(map(str, self.manifest.budgets)) or "none beside its own"
            raise InputError(
                f"{self.folder}: no budget of {budget} vectors in this index; it holds: {held} "
                "(scripts/recode.py --budgets makes one that has some)"
            )

    def model_place(self, model: str | None = None) -> tuple[str, str]:
        """Name and revision of the model to open: as the index says, or `model`, whose revisions are its own."""
        return (model, "main") if model else (self.manifest.base_model, self.manifest.revision)

    def check_model(self, encoder: Encoder) -> None:
        """Refuses an encoder of another model than the index was made with.

        Raises:
            InputError: says what differs: its kind, its weights, its processor or its untouched projection.
        """
        differs = self.manifest.model.difference(encoder.identity)
        if differs:
            raise InputError(f"{encoder.name} is not the model that {self.folder} was made with: its {differs} differs")

    def _split(self, split: str) -> Split:
        splits = self.manifest.splits
        if split not in splits:
            held = ", ".join(sorted(splits)) or "none"
            raise InputError(f"{self.folder}: no split {split!r} in this index; it holds: {held}")
        return splits[split]

    def _map(self, split: str, shard: Shard | QueryShard, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """A shard's tensors, mapped, and its header; each file is opened, and held against the manifest, once.

        Args:
            split: of the index.
            shard: the manifest's, of images or queries.
            exact: the file beside it, with the exact vectors of 1-bit ones.
        """
        file = shard.exact.file if exact else shard.file
        path = self.folder / split / file
        if (split, file) not in self._mapped:
            try:
                tensors, header = load_shard(path)
                self._check_header(shard, header)
                if isinstance(shard, QueryShard):
                    self._check_queries(split, shard, tensors)
                else:
                    check_images(self.manifest, shard, tensors, exact)
                self._mapped[split, file] = tensors, header
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                if self.manifest != read_index_manifest(self.folder / "manifest.json"):
                    raise DiskError(f"{self.folder}: rewritten since it was opened; open it again") from None
                raise unreadable(path, error, "build the index again") from None
        return self._mapped[split, file]

    def _check_header(self, shard: Shard | QueryShard, header: dict) -> None:
        """Raises ValueError or KeyError for a header that is not what the manifest says."""
        stamp, own = header.get("stamp"), header.get("entry", {})
        if not isinstance(stamp, dict):
            raise ValueError("no header of an index's shard")
        if found := self.manifest.difference(making_from_stamp(stamp)):
            raise ValueError(f"made with another {found[0]}")
        images = isinstance(shard, Shard)
        if images and (stamp.get("format_version"), stamp.get("scale")) != (shard.version, shard.scale):
            raise ValueError("made in another format, or with another scale")
        if not isinstance(own, dict) or own.get("count", shard.count) != shard.count:
            raise ValueError("made with another count")
        names = stamp["ids" if images else "texts"]
        right = isinstance(names, list) and len(names) == shard.count and all(isinstance(n, str) for n in names)
        right = right and (not images or len(set(names)) == shard.count)
        files = stamp.get("files", [])
        right = right and isinstance(files, list) and len(files) in (0, shard.count) and all(map(is_stamp, files))
        if not right:
            raise ValueError("its names are not what the manifest says")
        if "contents" in stamp:
            check_contents(stamp["contents"], shard.count)
        if "grades" in stamp:
            check_grades(stamp["grades"], shard.count)

    def _check_queries(self, split: str, shard: QueryShard, tensors: dict[str, Tensor]) -> None:
        """Raises ValueError or KeyError for tensors that are not what the manifest says."""
        tokens, lengths, image = tensors["tokens"], tensors["lengths"], tensors["image"]
        right = tokens.ndim == 2 and tokens.shape[1] == self.manifest.embedding_dim and tokens.is_floating_point()
        right &= all(t.dtype == torch.int64 and t.shape == (shard.count,) for t in (lengths, image))
        right = right and int(lengths.min()) >= 1 and int(lengths.sum()) == len(tokens)
        images = sum(entry.count for entry in self._split(split).images)
        if not (right and int(image.min()) >= 0 and int(image.max()) < images):
            raise ValueError("its tensors are not what the manifest says")

    def _header(self, split: str, shard: Shard) -> dict:
        return self._map(split, shard)[1]

    def _read(self, split: str, shard: Shard | QueryShard, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """As `_map`, of a shard whose checksum holds: all of it is read, once; its stamp instead of its header."""
        own = shard.exact if exact else shard
        path = self.folder / split / own.file
        if (split, own.file) not in self._checked:
            verify_shard(path, own.sha256)
        tensors, header = self._map(split, shard, exact)
        self._checked.add((split, own.file))
        return tensors, header["stamp"]

    def _live(self, split: str, shard: Shard) -> Tensor | None:
        """(n,) bool, False at deleted rows; None if there are none."""
        rows = self._split(split).deleted.get(shard.file)
        if not rows:
            return None
        live = torch.ones(shard.count, dtype=torch.bool)
        live[list(rows)] = False
        return live

    def _named(self, split: str) -> Iterator[tuple[Shard, dict, Tensor]]:
        """Shards of images in order, mapped: entry, stamp and (n,) bool, False at deleted rows."""
        for shard in self._split(split).images:
            live = self._live(split, shard)
            here = torch.ones(shard.count, dtype=torch.bool) if live is None else live
            yield shard, self._header(split, shard)["stamp"], here

    def images(self, split: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Shards of a split in order, checked: ids, tokens (n, K, D) as stored, mask (n, K) bool; no deleted image."""
        for shard in self._split(split).images:
            tensors, stamp = self._read(split, shard)
            live = self._live(split, shard)
            if live is None:
                yield stamp["ids"], tensors["tokens"], tensors["mask"]
            elif live.any():
                ids = [name for name, here in zip(stamp["ids"], live.tolist()) if here]
                yield ids, tensors["tokens"][live], tensors["mask"][live]

    def stored(
        self, split: str, device: torch.device | str = "cpu", budget: int = 0
    ) -> Iterator[tuple[list[str], StoredImages]]:
        """Shards of a split in order, mapped and unchecked, for scanning; deleted images are marked, not taken out.

        `budget`: of the smaller ones that the index holds; 0: all vectors.

        Raises:
            InputError: no such budget.
        """
        self.check_budget(budget)
        shards = self._split(split).images
        sizes = {shard.sha256: most_scanned(self.manifest, shard, budget) for shard in shards}
        self._uploads.use(self, {level_name(name, budget): size for name, size in sizes.items()})
        for shard in shards:
            tensors, header = self._map(split, shard)
            own = _level(tensors, budget)
            if header.setdefault(level_name("full", budget), bool(own["mask"].all())):  # asked once
                del own["mask"]
            live = self._live(split, shard)
            there = self._uploads.on(device, level_name(shard.sha256, budget), own)
            found = [there.get(name) for name in ("tokens", "scales", "mask")]
            live = None if live is None else live.to(device)
            yield header["stamp"]["ids"], StoredImages(*found, live, there.get("bases"), self._codes_on(device))

    def assignments(self, split: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Shards of a split in order, checked, without deleted images: what every patch went to.

        Yields:
            Ids; (n, P) uint8, the vector of every patch in row-major order, 255 where it has none (int32 and -1 where
            all tokens are kept); (n, 2) int32, rows and columns of each image, 0 where only format 3 knew the image:
            then its assignments are those of its tokens, patches first.

        Raises:
            InputError: an index built without them.
        """
        if not self.manifest.has_regions:
            raise InputError(f"{self.folder}: built without assignments; build it with --assignments")
        for shard, stamp, here in self._named(split):
            tensors, _ = self._read(split, shard)
            ids = [name for name, live in zip(stamp["ids"], here.tolist()) if live]
            yield ids, tensors["assignments"][here], tensors["grids"][here]

    def contents(self, split: str) -> dict[str, str | tuple[int, int] | None]:
        """Per image what is known of its file when it was read, by id; deleted images are left out.

        Its content hash; of folders that earlier versions indexed (bytes, time of change in ns); None where nobody
        noted it.
        """
        found: dict[str, str | tuple[int, int] | None] = {}
        for shard, stamp, here in self._named(split):
            none = [None] * shard.count
            rows = zip(stamp["ids"], stamp.get("contents") or none, stamp.get("files") or none, here.tolist())
            found |= {name: content or (file and tuple(file)) for name, content, file, live in rows if live}
        return found

    def numbers(self, split: str) -> dict[str, int]:
        """Number of every image by id: its row in the index, counted over all shards; deleted ones are left out.

        Adding and deleting images leave the numbers of the others as they are.
        """
        if split not in self._numbered:
            found, start = {}, 0
            for shard, stamp, here in self._named(split):
                rows = enumerate(zip(stamp["ids"], here.tolist()), start)
                found |= {name: number for number, (name, live) in rows if live}
                start += shard.count
            self._numbered[split] = found
        return self._numbered[split]

    def _place(self, split: str, number: int) -> tuple[Shard, int]:
        """The shard and the row of an image by its number."""
        for shard in self._split(split).images:
            if number < shard.count:
                return shard, number
            number -= shard.count
        raise IndexError(number)

    def image_id(self, split: str, number: int) -> str | None:
        """Id of an image by its number; None where there is none, or it was deleted."""
        if number < 0 or number >= sum(shard.count for shard in self._split(split).images):
            return None
        shard, row = self._place(split, number)
        live = self._live(split, shard)
        return self._header(split, shard)["stamp"]["ids"][row] if live is None or live[row] else None

    def vectors(self, split: str, number: int) -> StoredVectors:
        """One image by its number from `numbers`."""
        shard, row = self._place(split, number)
        tensors, _ = self._map(split, shard)
        exact = self._map(split, shard, exact=True)[0] if shard.exact else tensors
        tokens = floats_of(exact, [row], self.codes)[0]
        grid = tuple(tensors["grids"][row].tolist())
        regions = tensors["assignments"][row].long() if self.manifest.has_regions else None
        if regions is not None:
            regions = regions.masked_fill(regions == NO_REGION, -1) if self.manifest.assignments else regions
            regions = regions[: grid[0] * grid[1]] if all(grid) else regions
        return StoredVectors(tokens, tensors["mask"][row], regions, grid if all(grid) else None)

    def queries(self, split: str, block: int = 1024) -> Iterator[tuple[QueryTokens, Tensor, list[str]]]:
        """Blocks of queries in order: padded `QueryTokens`, the image each describes (q,), and their texts."""
        for shard in self._split(split).queries:
            tensors, stamp = self._read(split, shard)
            parts = tensors["tokens"].split(tensors["lengths"].tolist())
            for rows in batched(range(len(parts)), block):
                padded = torch.nn.utils.rnn.pad_sequence([parts[k] for k in rows], batch_first=True)
                lengths = tensors["lengths"][rows.start : rows.stop]
                mask = torch.arange(padded.shape[1]) < lengths[:, None]
                texts = stamp["texts"][rows.start : rows.stop]
                yield QueryTokens(padded, mask), tensors["image"][rows.start : rows.stop], texts

    def grades(self, split: str) -> Tensor | None:
        """How well every image answers every query, (Q, I) uint8, 0: not at all; None: only its own image is known.

        Raises:
            InputError: a damaged shard.
        """
        held, rows = self._split(split), []
        for shard in held.queries:
            rows += self._read(split, shard)[1].get("grades", [])
        images = sum(shard.count for shard in held.images)
        if any(number >= images for row in rows for number, _ in row):
            raise DiskError(f"{self.folder}: grades of {split} name images that are not there; build the index again")
        return grade_matrix(rows, images)

    def check_captions(self, split: str) -> None:
        """Refuses a split that can't be evaluated: one without captions, or whose captions may describe nothing.

        Raises:
            InputError: says why.
        """
        held = self._split(split)
        if any(held.deleted.values()):
            raise InputError(f"{self.folder}: images of {split} were deleted; its captions can't be evaluated any more")
        if not held.queries:
            raise InputError(
                f"{self.folder}: {split} holds no captions, so there is nothing to evaluate; "
                "scripts/cache.py makes an index of a data set with captions"
            )

    def size(self, split: str) -> tuple[int, int, int, float]:
        """(images, queries, regions, bytes per image) of a split."""
        summary = summarise(split, self._split(split))
        return summary.images, summary.queries, summary.regions, summary.bytes_per_image

    def scores(self, split: str, device: torch.device | str = "cpu", budget: int = 0) -> tuple[Tensor, Tensor]:
        """Every query against every image: scores (Q, I) float32 and the image that each query describes (Q,).

        With signs each query's best candidates are scored exactly and rank above the others. `budget`: as of `stored`.

        Raises:
            InputError: a damaged shard, or as `check_captions`.
        """
        held = self._split(split)
        self.check_captions(split)
        blocks = [(QueryTokens(q.tokens.to(device), q.mask.to(device)), image) for q, image, _ in self.queries(split)]
        columns = []
        for shard, (_, images) in zip(held.images, self.stored(split, device, budget)):
            self._read(split, shard)  # an evaluation checks what it reads
            if shard.exact:
                self._read(split, shard, exact=True)
            columns.append(torch.cat([score_stored(query, images).cpu() for query, _ in blocks]))
        scores = torch.cat(columns, dim=1)
        if self.manifest.dtype == "binary":
            masks = [self._map(split, shard)[0]["mask"] for shard in held.images]
            queries = [(tokens, mask) for query, _ in blocks for tokens, mask in zip(query.tokens, query.mask)]
            scores = exact_scores(scores, queries, [each.tokens for each in self._exact(split)], masks, device)
        return scores, torch.cat([image for _, image in blocks])

    def _exact(self, split: str, device: torch.device | str = "cpu") -> list[StoredImages]:
        """The exact vectors of signs, shard by shard, mapped."""
        shards = self._split(split).images
        rows = [(self._map(split, each, exact=True)[0]["tokens"], self._map(split, each)[0]["mask"]) for each in shards]
        return [StoredImages(tokens, None, mask) for tokens, mask in rows]

    def search(
        self,
        queries: QueryTokens,
        split: str,
        top: int,
        device: torch.device | str = "cpu",
        keep: Tensor | None = None,
        *,
        budget: int = 0,
        coarse: int = 0,
    ) -> list[list[tuple[str, float]]]:
        """The best images of each query: at most `top` pairs (id, score), best first, ties by id.

        One pass over the mapped shards; with signs, or with `coarse`, the best candidates are then ranked by more of
        their bytes, as `samer.index.stages` says.

        Args:
            queries: (Q, M, D).
            split: of the index.
            top: how many images per query.
            device: to score on.
            keep: (rows,) bool, those that may be found, as `samer.index.filters`; None: all.
            budget: of the smaller ones that the index holds: score by so many vectors; 0: by all.
            coarse: likewise: choose candidates by so many vectors, and rank them by all; 0: rank all.

        Raises:
            InputError: no such budget.
        """
        shards = self.stored(split, device, coarse or budget)
        shards = shards if keep is None else only(shards, keep)
        if self.manifest.dtype == "binary":
            return search_signs(queries, shards, top, self.numbers(split), self._exact(split))
        if coarse:
            whole = [images for _, images in self.stored(split)]
            return search_coarse(queries, shards, top, self.numbers(split), whole)
        return search(queries, shards, top)


def _level(tensors: dict[str, Tensor], budget: int) -> dict[str, Tensor]:
    """What of a shard is scored at a budget (0: all vectors): tokens, mask, and scales and bases where it has some."""
    own = {name: tensors.get(level_name(name, budget)) for name in ("tokens", "scales", "mask")}
    own |= {name: tensors[name] for name in COMMON} if "bases" in tensors else {}
    return {name: tensor for name, tensor in own.items() if tensor is not None}
