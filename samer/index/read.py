"""An index open for reading: shards are mapped, checked against the manifest, scored and searched.

Shape letters: I images, K regions, N tokens before compression, D embedding, Q queries, M tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from samer.config import InputError
from samer.index.manifest import FLOATS, FORMAT, FORMAT_VERSION, _summary, check_manifest
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.projectors import read_projector
from samer.runtime.files import lookup
from samer.runtime.progress import batched
from samer.runtime.shards import load_shard, read_manifest, verify_shard
from samer.scoring import StoredImages, maxsim, score_stored, search
from samer.tokens import QueryTokens

CANDIDATES = 10  # 1-bit scores choose so many times the results asked for, at least 100, for exact re-ranking


@dataclass(frozen=True)
class StoredVectors:
    tokens: Tensor
    mask: Tensor
    regions: Tensor | None
    grid: tuple[int, int] | None


class _Shim(dict):
    def __getattr__(self, name):
        from types import SimpleNamespace

        from samer.config import MergeConfig

        if name == "merge":
            return MergeConfig(**self["merge"])
        if name == "model":
            return SimpleNamespace(base_projector=self["base_projector"])
        if name == "revision":
            return "main"
        if name == "splits":
            return {
                key: SimpleNamespace(
                    images=tuple(
                        SimpleNamespace(
                            **{"exact": None, **e, **({"exact": SimpleNamespace(**e["exact"])} if "exact" in e else {})}
                        )
                        for e in split["images"]
                    ),
                    root=split.get("root"),
                    deleted=split.get("deleted", {}),
                )
                for key, split in self["splits"].items()
            }
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Index:
    """A finished cache, opened for reading as it is now; shards are mapped, not loaded."""

    def __init__(self, folder: str | Path) -> None:
        """Opens `folder`.

        Raises:
            InputError: no manifest, another format or version.
        """
        self.folder = lookup(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            raise InputError(
                f"{self.folder}: no manifest.json; this is no finished cache. Build it with bash/cache.sh "
                "(run it again if it was interrupted: it goes on)"
            )
        self.manifest = read_manifest(path, FORMAT, FORMAT_VERSION)
        check_manifest(path, self.manifest)
        self.manifest = _Shim(self.manifest)
        self._mapped: dict[tuple[str, str], tuple[dict[str, Tensor], dict]] = {}
        self._uploaded: dict[tuple[str, str, str], Tensor] = {}  # tokens on a device, once they were asked for there
        self._checked: set[tuple[str, str]] = set()
        self._numbered: dict[str, dict[str, int]] = {}

    def projector(self) -> Projector:
        """What queries must be projected with.

        Raises:
            InputError: missing, damaged, or not the one that the index was made with.
        """
        path = self.folder / "projector.safetensors"
        projector = read_projector(path)
        if projector.hash != self.manifest["projector"]:
            raise InputError(
                f"{path}: not the projector that this cache was made with; remove the cache and build it anew"
            )
        return projector

    def check_model(self, encoder: Encoder) -> None:
        """Refuses an encoder of another model than the index was made with, as its untouched projection tells."""
        if encoder.base_projector.hash != self.manifest["base_projector"]:
            raise InputError(f"{encoder.name} is not the model that {self.folder} was made with")

    def _split(self, split: str) -> dict:
        splits = self.manifest.get("splits", {})
        if split not in splits:
            held = ", ".join(sorted(splits)) or "none"
            raise InputError(f"{self.folder}: no split {split!r} in this cache; it holds: {held}")
        return splits[split]

    def _map(self, split: str, entry: dict, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """A shard's tensors, mapped, and its header; each file is opened, and held against the manifest, once.

        Args:
            split: of the index.
            entry: the manifest's, of images or queries.
            exact: the shard beside it, with the exact vectors of 1-bit ones.
        """
        file = entry["exact"]["file"] if exact else entry["file"]
        path = self.folder / split / file
        if (split, file) not in self._mapped:
            try:
                tensors, header = load_shard(path)
                self._check_shard(split, entry, tensors, header, exact)
                self._mapped[split, file] = tensors, header
            except (OSError, SafetensorError, KeyError, ValueError) as error:
                if self.manifest != read_manifest(self.folder / "manifest.json", FORMAT, FORMAT_VERSION):
                    raise InputError(f"{self.folder}: rewritten since it was opened; open it again") from None
                raise InputError(
                    f"{path}: not readable ({str(error)[:120]}); remove it and build the cache again"
                ) from None
        return self._mapped[split, file]

    def _check_shard(self, split: str, entry: dict, tensors: dict[str, Tensor], header: dict, exact: bool) -> None:
        """Raises ValueError or KeyError for a shard that is not what the manifest says."""
        stamp = header.get("stamp") if isinstance(header, dict) else None
        if not isinstance(stamp, dict):
            raise ValueError("no header of a cache's shard")
        if stamp["projector"] != self.manifest["projector"]:
            raise ValueError("made with another projector")
        for key in ("dtype", "scale", "merge", "assignments"):
            if key in stamp and stamp[key] != self.manifest.get(key):
                raise ValueError(f"made with another {key}")
        count, width = entry["count"], self.manifest["embedding_dim"]
        own = header.get("entry", {})
        if not isinstance(own, dict) or own.get("count", count) != count:
            raise ValueError("made with another count")
        tokens, names = tensors["tokens"], stamp["texts" if "regions" not in entry else "ids"]
        if "regions" not in entry:  # queries
            lengths, image = tensors["lengths"], tensors["image"]
            right = tokens.ndim == 2 and tokens.shape[1] == width and tokens.is_floating_point()
            right &= all(t.dtype == torch.int64 and t.shape == (count,) for t in (lengths, image))
            right = right and int(lengths.min()) >= 1 and int(lengths.sum()) == len(tokens)
            images = sum(shard["count"] for shard in self._split(split)["images"])
            right = right and int(image.min()) >= 0 and int(image.max()) < images
        else:
            kind = FLOATS.get(self.manifest["dtype"], torch.int8 if self.manifest["dtype"] == "int8" else torch.uint8)
            stored = width // 8 if kind == torch.uint8 else width
            kind, stored = (torch.bfloat16, width) if exact else (kind, stored)
            right = tokens.dtype == kind and tokens.shape == (count, entry["regions"], stored)
            if not exact:
                mask = tensors["mask"]
                right &= mask.dtype == torch.bool and mask.shape == (count, entry["regions"])
            if self.manifest.get("assignments") and not exact:
                regions = tensors["assignments"]
                right &= regions.dtype == torch.uint8 and regions.ndim == 2 and len(regions) == count
            right = right and isinstance(names, list) and len(set(map(str, names))) == count
        right = right and isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names)
        if not right:
            raise ValueError("its tensors or names are not what the manifest says")

    def _header(self, split: str, entry: dict) -> dict:
        return self._map(split, entry)[1]

    def _read(self, split: str, entry: dict, exact: bool = False) -> tuple[dict[str, Tensor], dict]:
        """As `_map`, of a shard whose checksum holds: all of it is read, once."""
        own = entry["exact"] if exact else entry
        path = self.folder / split / own["file"]
        if (split, own["file"]) not in self._checked:
            verify_shard(path, own["sha256"])
        tensors, header = self._map(split, entry, exact)
        self._checked.add((split, own["file"]))
        return tensors, header["stamp"]

    def _live(self, split: str, entry: dict) -> Tensor | None:
        """(n,) bool, False at deleted rows; None if there are none."""
        rows = self._split(split).get("deleted", {}).get(entry["file"])
        if not rows:
            return None
        live = torch.ones(entry["count"], dtype=torch.bool)
        live[rows] = False
        return live

    def images(self, split: str) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Shards of a split in order, checked: ids, tokens (n, K, D) as stored, mask (n, K) bool; no deleted image."""
        for entry in self._split(split)["images"]:
            tensors, stamp = self._read(split, entry)
            live = self._live(split, entry)
            if live is None:
                yield stamp["ids"], tensors["tokens"], tensors["mask"]
            elif live.any():
                ids = [name for name, here in zip(stamp["ids"], live.tolist()) if here]
                yield ids, tensors["tokens"][live], tensors["mask"][live]

    def stored(self, split: str, device: torch.device | str = "cpu") -> Iterator[tuple[list[str], StoredImages]]:
        """Shards of a split in order, mapped and unchecked, for scanning; deleted images are marked, not taken out."""
        for entry in self._split(split)["images"]:
            tensors, header = self._map(split, entry)
            mask, live = tensors["mask"], self._live(split, entry)
            full = header.setdefault("full", bool(mask.all()))  # asked once
            yield (
                header["stamp"]["ids"],
                StoredImages(
                    self._tokens_on(device, split, entry["file"], tensors["tokens"]),
                    self.manifest.get("scale"),
                    None if full else mask.to(device),
                    None if live is None else live.to(device),
                ),
            )

    def _tokens_on(self, device: torch.device | str, split: str, file: str, tokens: Tensor) -> Tensor:
        """Mapped tokens, or their copy on a device, which holds the index from its first search there on."""
        if torch.device(device).type == "cpu":
            return tokens
        key = (str(device), split, file)
        if key not in self._uploaded:
            self._uploaded[key] = tokens.to(device)
        return self._uploaded[key]

    def assignments(self, split: str) -> Iterator[tuple[list[str], Tensor]]:
        """Ids and (n, N) uint8, the region of every token, 255 where it has none.

        Raises:
            InputError: a cache built without them.
        """
        if not self.manifest["assignments"]:
            raise InputError(f"{self.folder}: built without assignments; build it with --assignments")
        for entry in self._split(split)["images"]:
            tensors, stamp = self._read(split, entry)
            live = self._live(split, entry)
            rows = torch.ones(entry["count"], dtype=torch.bool) if live is None else live
            yield [name for name, here in zip(stamp["ids"], rows.tolist()) if here], tensors["assignments"][rows]

    def numbers(self, split: str) -> dict[str, int]:
        """Number of every image by id: its row in the index, counted over all shards; deleted ones are left out.

        Adding and deleting images leave the numbers of the others as they are.
        """
        if split not in self._numbered:
            found, start = {}, 0
            for entry in self._split(split)["images"]:
                live = self._live(split, entry)
                ids = self._header(split, entry)["stamp"]["ids"]
                found |= {name: start + row for row, name in enumerate(ids) if live is None or live[row]}
                start += entry["count"]
            self._numbered[split] = found
        return self._numbered[split]

    def _place(self, split: str, number: int) -> tuple[dict, int]:
        """The manifest entry and the row of an image by its number."""
        for entry in self._split(split)["images"]:
            if number < entry["count"]:
                return entry, number
            number -= entry["count"]
        raise IndexError(number)

    def image_id(self, split: str, number: int) -> str | None:
        """Id of an image by its number; None where there is none, or it was deleted."""
        if number < 0 or number >= sum(entry["count"] for entry in self._split(split)["images"]):
            return None
        entry, row = self._place(split, number)
        live = self._live(split, entry)
        return self._header(split, entry)["stamp"]["ids"][row] if live is None or live[row] else None

    def vectors(self, split: str, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One image as the index stores it: what its score is made of, and what its vectors stand for.

        Args:
            split: of the index.
            number: from `numbers`.

        Returns:
            tokens (K, D) float32 (int8 times its scale; with 1-bit tokens those of the exact file), mask (K,) bool,
            assignments (N,) uint8 or None where the index holds none.
        """
        entry, row = self._place(split, number)
        tensors, _ = self._map(split, entry)
        exact = self._map(split, entry, exact=True)[0] if "exact" in entry else tensors
        tokens = exact["tokens"][row].float()
        if exact["tokens"].dtype == torch.int8:
            tokens = tokens * self.manifest["scale"]
        regions = tensors["assignments"][row].long() if "assignments" in tensors else None
        if regions is not None:
            regions = regions.masked_fill(regions == 255, -1)
        if self.manifest["merge"]["compressor"] == "none":
            regions = torch.arange(len(tensors["mask"][row]))
        return StoredVectors(tokens, tensors["mask"][row], regions, None)

    def queries(self, split: str, block: int = 1024) -> Iterator[tuple[QueryTokens, Tensor, list[str]]]:
        """Blocks of queries in order: padded `QueryTokens`, the image each describes (q,), and their texts."""
        for entry in self._split(split)["queries"]:
            tensors, stamp = self._read(split, entry)
            parts = tensors["tokens"].split(tensors["lengths"].tolist())
            for rows in batched(range(len(parts)), block):
                padded = torch.nn.utils.rnn.pad_sequence([parts[k] for k in rows], batch_first=True)
                lengths = tensors["lengths"][rows.start : rows.stop]
                mask = torch.arange(padded.shape[1]) < lengths[:, None]
                texts = stamp["texts"][rows.start : rows.stop]
                yield QueryTokens(padded, mask), tensors["image"][rows.start : rows.stop], texts

    def size(self, split: str) -> tuple[int, int, int, float]:
        """(images, queries, regions, bytes per image) of a split."""
        summary = _summary(split, self._split(split), 0)
        return summary.images, summary.queries, summary.regions, summary.bytes_per_image

    def scores(self, split: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Every query against every image: scores (Q, I) float32 and the image that each query describes (Q,).

        With 1-bit tokens each query's best candidates are scored exactly and rank above the others.

        Raises:
            InputError: a damaged shard, or a split with deletions, whose queries may describe nothing.
        """
        if any(self._split(split).get("deleted", {}).values()):
            raise InputError(f"{self.folder}: images of {split} were deleted; its captions can't be evaluated any more")
        blocks = [(QueryTokens(q.tokens.to(device), q.mask.to(device)), image) for q, image, _ in self.queries(split)]
        columns = []
        for entry, (_, images) in zip(self._split(split)["images"], self.stored(split, device)):
            self._read(split, entry)  # an evaluation checks what it reads
            if "exact" in entry:
                self._read(split, entry, exact=True)
            columns.append(torch.cat([score_stored(query, images).cpu() for query, _ in blocks]))
        scores = torch.cat(columns, dim=1)
        if self.manifest["dtype"] == "binary":
            tokens = torch.cat([self._map(split, e, exact=True)[0]["tokens"] for e in self._split(split)["images"]])
            masks = torch.cat([self._map(split, e)[0]["mask"] for e in self._split(split)["images"]])
            queries = [(tokens, mask) for query, _ in blocks for tokens, mask in zip(query.tokens, query.mask)]
            count = min(CANDIDATES * 10, scores.shape[1])
            chosen = scores.topk(count, dim=1).indices  # (Q, candidates)
            scores -= 4  # below any exact score of unit tokens
            for row, (query, query_mask) in enumerate(queries):
                exact = maxsim(
                    query[query_mask][None], tokens[chosen[row]].to(device), None, masks[chosen[row]].to(device)
                )
                scores[row, chosen[row]] = exact[0].cpu()
        return scores, torch.cat([image for _, image in blocks])

    def search(
        self, queries: QueryTokens, split: str, top: int, device: torch.device | str = "cpu"
    ) -> list[list[tuple[str, float]]]:
        """The best images of each query: at most `top` pairs (id, score), best first, ties by id.

        One pass over the mapped shards; with 1-bit tokens the `CANDIDATES` * top best, at least 100, are then scored
        exactly from the second file.
        """
        if self.manifest["dtype"] != "binary":
            return search(queries, self.stored(split, device), top)
        found = search(queries, self.stored(split, device), max(100, CANDIDATES * top))
        numbers = self.numbers(split)
        result = []
        for number, candidates in enumerate(found):
            query = queries.tokens[number][queries.mask[number]][None]
            names = [name for name, _ in candidates]
            if not names:  # every image was deleted
                result.append([])
                continue
            found_rows = [self.vectors(split, numbers[name]) for name in names]
            tokens, masks = [row.tokens for row in found_rows], [row.mask for row in found_rows]
            pad = torch.nn.utils.rnn.pad_sequence
            mask = pad(masks, batch_first=True).to(device)
            exact = maxsim(query, pad(tokens, batch_first=True).to(device), None, mask)[0].tolist()
            result.append(sorted(zip(names, exact), key=lambda pair: (-pair[1], pair[0]))[:top])
        return result
