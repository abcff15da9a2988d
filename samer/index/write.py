"""The compressed index on disk, format 4: shards of image tokens and query tokens, and a manifest written last.

    DIR/manifest.json                       what was built and from what; splits appear here when they are complete
    DIR/projector.safetensors               weight (D, H) and, if it has one, bias (D,), float32: what queries
                                            must be projected with
    DIR/bank.safetensors                    only with compressor "querybank", or where vectors are `kept`: the bank of
                                            queries that says what images keep, as `samer.retrievers.banks` says
    DIR/codes.safetensors                   only with codes: the tables that they are looked up in, as
                                            `samer.index.codes` and `samer.codes` say
    DIR/<split>/images-00000.safetensors    n images, of which image i is row i of each tensor:
        tokens       (n, K, D) float32, bfloat16, float16 or int8; or (n, K, D / 8) uint8, the signs of D components,
                     lowest bit first, 1 for positive; or (n, K, G) uint8 codes, G = D / 8 for 1bit, D / 4, D / 2
        scales       (n,) float32, of int8: value = int8 * scale; of codes that of the bases
        bases        (n, D) int8, of codes only: what an image's vectors have in common. A vector is base * scale + r Q'
                     with r, its entries in the tables, times their scale, and Q, the tables' `queries`
        mask         (n, K) bool, False where the image has fewer vectors than K; tokens are 0 there. Of codes it is
                     left out where all are True
        tokens_B, scales_B, mask_B    for each B of the manifest's `budgets`: the image's vectors at a smaller budget,
                     min(B, K) of them; scales_B with int8 only (codes share `scales` and `bases`), mask_B only where
                     one is False
        grids        (n, 2) int32, rows and columns of the image's patches
        assignments  (n, P) uint8, the vector of every patch in row-major order, 255: none, as past an image's own
                     patches; only if the manifest's `assignments` is true. Where all tokens are kept (compressor
                     "none") it is always there, int32, with -1 for none
    DIR/<split>/images-00000.exact.safetensors   only with 1-bit tokens: tokens (n, K, D) bfloat16, to re-rank with
    DIR/<split>/queries-00000.safetensors        q queries, valid tokens only:
        tokens       (sum of lengths, D), one query after the other, in the dtype of the images' or bfloat16
        lengths      (q,) int64
        image        (q,) int64, the number of the image that it describes, counted over the split's image shards

A shard is a safetensors file with one metadata key, "samer", whose value is JSON:
    checksum    SHA-256 over the bytes of its tensors in the order of their names
    entry       its `count`, and for images `regions` (K) and `bytes` (of tokens, bases, scales and masks)
    stamp       what it was made from: the manifest's keys `model` to `kept`; `ids` of the n images, unique in
                the file, or of the image of each query; `texts` of the queries, and `grades` where relevance is graded:
                per query [number of an image, 1 to 100] of all that answer it; `contents`, per image null or the hash
                of its file when it was read, BLAKE2b of 16 bytes in hexadecimal; `corpus`, a hash of the ids that a
                compressor with a codebook was fitted on, and `corpus_contents`, one of their files. Earlier shards
                have no `contents`; those of a folder of pictures then have `files`, per image null or [bytes, time of
                change in ns] of its file when it was read

The manifest is JSON:
    format, format_version          "samer_cache", 4
    model                           the retriever: architecture, weights, processor, base_projector; "" is not known
    projector                       SHA-256 of the projector: for weight, then bias, its shape as Python writes a tuple
                                    and its bytes
    merge                           the compressor and its settings, `samer.config.MergeConfig`
    dtype, embedding_dim            float32, bfloat16, float16, int8, binary (signs), or codes: 1bit, 2bit, 4bit; D
    hidden_states                   the dtypes that they were computed and stored in
    also_computed_in                only where its owner allowed other dtypes to compute in: a list of those
    assignments                     true or false
    bank                            only with bank.safetensors: the checksum in its header
    codes                           only with codes.safetensors: likewise
    budgets                         only where there are some: falling
    kept                            only where the bank says which of the compressor's vectors are stored: how many
    base_model, revision, transformers, bank_source    where the retriever is, what computed the first images, and
                                    what the bank was made of; not compared
    processing                      what the processor does, in words: picture sizes, prompts, padding; not compared
    splits                          by name: `images`, a list of {file, count, regions, bytes, sha256, version} and
                                    `exact` {file, bytes, sha256}; `queries`, of {file, count, sha256}; for a folder of
                                    pictures `root`, under which ids are paths; `deleted`, the deleted rows by file
    checksum                        SHA-256 of the rest as json.dumps(rest, sort_keys=True) gives it

Of format 3, which is still read and may be added to, a shard's `version` is 3 and its `scale` that of all its int8
images. Its shards have no grids, and `assignments` are those of all N tokens; rows of them that are compacted keep
that, and have the grid (0, 0).

DIR/<split>/metadata.jsonl may lie beside the shards, too: columns of the images to filter a search by, as
`samer.index.columns` says. It may be written at any time.

DIR/<split>/stamps.json may lie beside the shards: a JSON object of `files`, by id [bytes, time of change, time of its
inode's change (both in ns), hash] of a file when it was read, and `checksum`, as of the manifest. It is vouched for by
nothing and only saves reading a file whose size and times are still those; without it all are read once more.

Appending writes new shards, deleting notes rows in the manifest, compacting writes what is left into new shards, and
the manifest is replaced in one step, so a reader sees the index before or after, never a mixture (a split of a data set
that is built again from other data is replaced shard by shard; open it when that has ended). What is stored of an image
depends on that image only, not on what came before it. No pickle anywhere; a reader maps the files. Bytes depend on the
input, where its hidden states come from, the projector and the batch size only, not on the number of processes, nor on
when it was made.

Shape letters: I images, K regions, N tokens before compression, P patches, D embedding, Q queries, M tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.data import make_reader
from samer.data.contents import Contents
from samer.data.records import ImageRecord
from samer.evaluation import caption_grades, fit_records, fitted_compressor
from samer.index.banks import bank_of_captions, held_bank, keep_bank
from samer.index.codes import FILE as CODES
from samer.index.codes import held_codes, refuse_new_codes
from samer.index.manifest import (
    DTYPES,
    FLOATS,
    FORMAT_VERSION,
    STORED,
    ExactFile,
    IndexManifest,
    IndexSummary,
    Making,
    QueryShard,
    Shard,
    Split,
    check_regions,
    making_from_stamp,
    read_index_manifest,
    stamp_of,
    summarise,
    write_index_manifest,
)
from samer.index.parts import PartOfMany, check_parts, own_part
from samer.index.tensors import Part, image_tensors, kept_part
from samer.retrievers.banks import FILE as BANK
from samer.retrievers.banks import Bank
from samer.retrievers.base import Encoder
from samer.retrievers.projectors import read_projector, write_projector
from samer.retrievers.stream import read_images
from samer.runtime.files import FileTrouble, exists, is_dir, is_file, listing, lookup, only_writer
from samer.runtime.processes import from_first, gather_objects, print0, rank
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import finished_shard, in_order, load_header, shared_out, write_shard
from samer.runtime.signals import stop_here, stoppable

IMAGES_PER_SHARD = 1024
QUERIES_PER_SHARD = 2048


def build_index(
    folder: str | Path,
    data_root: str | Path,
    splits: Sequence[str],
    retriever: Encoder,
    merge: MergeConfig,
    *,
    batch_size: int = 32,
    dtype: str = "bfloat16",
    limit_images: int | None = None,
    reader: str = "",
    assignments: bool = False,
    strict: bool = False,
    bank: Bank | None = None,
    bank_split: str = "train",
    part: PartOfMany | None = None,
) -> list[IndexSummary]:
    """Encodes and compresses splits without boxes and writes them; finished shards of an earlier try are kept.

    A shard of which a picture was replaced since, or a caption changed, is made anew.

    Args:
        folder: the index; made if missing.
        data_root: of the data set; its boxes are never read.
        splits: e.g. ["val", "test"].
        retriever: with the projector to use.
        merge: compressor, K and the other settings; the object prior plays no part here. A compressor that learns
            from a corpus is fitted on each split.
        batch_size: images, and captions, per forward pass.
        dtype: of the stored image tokens: float32, bfloat16, float16, int8 (a scale per image) or binary
            (signs, and bfloat16 beside them to re-rank with). Queries are stored alike, in bfloat16 for the last two.
        limit_images: the first so many images of each split.
        reader: of the data set, a name in `samer.data.READERS`; empty: guessed.
        assignments: keep the region of every patch, a byte each.
        strict: refuse what a reader otherwise leaves out of the data and tells.
        part: (k, n), only the kth of n parts of each split, for `samer.index.merge`.

    Raises:
        InputError: bad data, or a folder that holds an index of another projector, model or setting, or is written to
            by another process.
    """
    folder = Path(folder)
    check_settings(retriever, merge, batch_size, dtype, assignments)
    kind = make_reader(reader, data_root)
    records = {
        split: kind.load_split(data_root, split, boxes=False, limit_images=limit_images, strict=strict)
        for split in splits
    }
    if part:
        check_parts(merge)
        records = {split: own_part(split, rows, part, IMAGES_PER_SHARD) for split, rows in records.items()}
    retriever.check_records([record for rows in records.values() for record in rows])
    if make_compressor(merge).needs_queries and bank is None:
        if bank_split in splits:
            print0(
                f"note: the query bank is made of captions of {bank_split}, which are this index's queries; recall "
                "on it tests nothing"
            )
        bank = held_bank(folder) or bank_of_captions(data_root, bank_split, reader, retriever, merge, batch_size)
    with writing(folder, retriever, merge, batch_size, dtype, assignments, bank) as writer:
        summaries = []
        for name, rows in records.items():
            held = writer.manifest.splits.get(name)
            if held and any(held.deleted.values()):
                raise InputError(f"{folder}: images of {name} were deleted; build it in another folder")
            writer.begin(name, rows)
            compressor = fitted_compressor(retriever, rows, merge, batch_size, bank=bank)
            shards, reused = writer.write_images(name, rows, compressor)
            queries, kept = writer.write_queries(name, rows)
            split = Split(shards, queries)
            writer.commit(name, split)
            writer.contents.remember()
            summaries.append(summarise(name, split, reused + kept))
    return summaries


def check_settings(retriever: Encoder, merge: MergeConfig, batch_size: int, dtype: str, assignments: bool) -> None:
    if dtype not in STORED:
        raise InputError(f"index dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    make_compressor(merge)  # an unknown name is refused before any work
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1; it is {batch_size}")
    if dtype == "binary" and retriever.embedding_dim % 8:
        raise InputError(f"index dtype binary needs a width divisible by 8; it is {retriever.embedding_dim}")
    if assignments and merge.compressor == "none":
        raise InputError("all tokens are kept, each is its own region: leave --assignments out")
    if assignments and isinstance(merge.num_regions, int):
        check_regions(merge.num_regions)


def write_image_shard(path: Path, tensors: dict[str, Tensor], half: dict[str, Tensor], stamp: dict) -> Shard:
    """Writes a shard of images, with 1-bit tokens the exact ones beside it, and returns its manifest entry."""
    read = ("tokens", "scales", "mask", "bases")  # in a search
    size = sum(tensor.nbytes for name, tensor in tensors.items() if name.partition("_")[0] in read)
    facts = {"count": len(tensors["tokens"]), "regions": tensors["tokens"].shape[1], "bytes": size}
    exact = None
    if half:  # first, so that a shard with a manifest entry always has its exact file
        side = path.with_suffix(".exact.safetensors")
        exact = ExactFile(**write_shard(side, half, stamp, {"bytes": half["tokens"].nbytes}))
    return Shard(**write_shard(path, tensors, stamp, facts), exact=exact)


@contextmanager
def writing(
    folder: Path,
    retriever: Encoder,
    merge: MergeConfig,
    batch_size: int,
    dtype: str,
    assignments: bool,
    bank: Bank | None = None,
):
    check_folder(folder)
    refuse_new_codes(folder, dtype)
    with only_writer(folder), stoppable():
        making = making_of(retriever, merge, dtype, assignments, bank)
        if is_file(folder / "manifest.json"):  # neither is chosen by who adds to an index
            held = read_index_manifest(folder / "manifest.json")
            making = replace(making, codes=held.codes, budgets=held.budgets, kept=held.kept)
            if held.kept and bank is None:
                making, bank = replace(making, bank=held.bank), held_bank(folder)
        yield _Writer(folder, retriever, making, batch_size, bank)


def making_of(retriever: Encoder, merge: MergeConfig, dtype: str, assignments: bool, bank: Bank | None) -> Making:
    """How an index is made by these."""
    return Making(
        model=retriever.identity,
        projector=retriever.current_projector().hash,
        merge=replace(merge, bank_size=bank.origin.size) if bank else merge,
        dtype=dtype,
        embedding_dim=retriever.embedding_dim,
        hidden_states=retriever.origin,
        assignments=assignments,
        bank=bank.hash if bank else "",
        reduce=retriever.reduction,
    )


def check_folder(folder: Path) -> None:
    """Refuses a folder that holds something else than an index, or one that was never finished."""
    ours = ("projector.safetensors", BANK, CODES)
    known = lambda entry: is_dir(entry) or entry.name in ours or entry.name.startswith(".")
    folder = lookup(folder)
    if is_file(folder / "manifest.json") or not exists(folder):
        return
    if not is_dir(folder) or not all(map(known, listing(folder))):  # a killed write leaves .*.samer-tmp
        raise InputError(f"{folder} is, or holds, files that are no SaMer index; name another folder")


class _Writer:
    """An index open for writing: its settings, its manifest, and shards that are kept when they are finished."""

    def __init__(self, folder: Path, retriever: Encoder, making: Making, batch_size: int, bank: Bank | None) -> None:
        self.folder, self.retriever, self.batch_size = folder, retriever, batch_size
        self.contents = Contents(folder, retriever.contents)  # of a split that was begun
        self.corpus: list[str] = []  # ids that a compressor with a codebook was fitted on
        self.learned = ""  # a hash of the files that it was fitted on; "": not known
        self.projector, self.bank = retriever.current_projector(), bank
        self.making, path = making, folder / "manifest.json"
        self.codebook = held_codes(folder, making)
        if not is_file(path):
            own = {each.name: getattr(making, each.name) for each in fields(making)}
            source = {"base_model": retriever.name, "revision": retriever.revision}
            source |= {"bank_source": bank.describe()} if bank else {}
            source["processing"] = dict(retriever.processing)
            self.manifest = IndexManifest(**own, **source, transformers=version("transformers"))
            return
        held = read_index_manifest(path)
        if found := held.difference(making):
            key, before, now = found
            shown = f"{key}={before!r}, now {now!r}"
            remedy = "name another index folder, or remove it to build anew"
            raise InputError(f"{folder} holds an index with {shown}; {remedy}")
        known = {key: value or getattr(making.model, key) for key, value in asdict(held.model).items()}
        place = {"base_model": retriever.name, "revision": retriever.revision}  # where it was found last
        self.manifest = replace(held, model=replace(held.model, **known), **place)  # format 3 knew less of its model
        if (held.base_model, held.revision) != (retriever.name, retriever.revision) and rank() == 0:
            write_index_manifest(path, self.manifest)  # now, as there may be nothing to add

    def _stamp(self, ids: Sequence[str], **more: Sequence | str) -> dict:
        """What a shard was made from; a shard with another stamp is made anew."""
        if self.corpus:
            more["corpus"] = hashlib.sha256(repr(self.corpus).encode()).hexdigest()
        return {**stamp_of(self.making), "ids": list(ids), "texts": [], **more}

    def begin(self, name: str, records: Sequence[ImageRecord]) -> None:
        """Looks at what a data set's split is made of, before any of its pictures is read to be encoded."""
        self.contents = Contents(self.folder / name, self.retriever.contents)
        self.corpus, self.learned = [], ""
        if make_compressor(self.making.merge).needs_corpus:
            self.corpus = [record.image_id for record in records]
            found = from_first(lambda: self.contents.of(fit_records(records)))
            self.learned = "" if None in found else hashlib.sha256(repr(found).encode()).hexdigest()

    def commit(self, name: str, split: Split) -> None:
        """Makes a split, or its new state, visible to readers."""
        self.manifest = replace(self.manifest, splits={**self.manifest.splits, name: split})
        if rank() == 0:
            self._write_projector(self.folder / "projector.safetensors")
            keep_bank(self.folder, self.bank)
            write_index_manifest(self.folder / "manifest.json", self.manifest)
        gather_objects(None)  # no process goes on before the manifest is written

    def _write_projector(self, path: Path) -> None:
        """Writes the projector if it is not there, or damaged."""
        try:
            if read_projector(path).hash == self.projector.hash:
                return
        except FileTrouble:
            raise
        except InputError:
            pass
        write_projector(path, self.projector)

    def write_images(
        self, split: str, records: Sequence[ImageRecord], compressor: Compressor
    ) -> tuple[tuple[Shard, ...], int]:
        """Writes the shards of a data set's images that are not there; the entries of all, and how many were there."""
        shards = dict(shared_out(list(batched(records, IMAGES_PER_SHARD))))
        many = len(records) > 2 * IMAGES_PER_SHARD
        own = {}
        for number, shard in Progress(shards.items(), f"comparing {split}", unit="shards") if many else shards.items():
            stop_here()
            own[number] = self.finished(split, number, shard)
        self.contents.tell("they were indexed")
        reused = {number for number, entry in own.items() if entry is not None}
        jobs = {number: list(batched(shards[number], self.batch_size)) for number in shards if number not in reused}
        # one row of batches over all shards: reading ahead does not start anew with each
        batches = [batch for rows in jobs.values() for batch in rows]

        def encoded(results: Iterator) -> Iterator[tuple[int, list[Part], list[str | None]]]:
            with Progress(desc=f"{split} images", total=len(batches), unit="batches") as bar:
                for number, ours in jobs.items():
                    stop_here()
                    parts, contents = [], []
                    for part, hashes in itertools.islice(results, len(ours)):
                        parts.append(part)
                        contents += hashes
                        bar.update()
                    yield number, parts, contents

        # a shard is written in a thread while the next is encoded
        def write(job: tuple[int, list[Part], list[str | None]]) -> Shard:
            number, parts, contents = job
            return self.write_shard(split, number, shards[number], parts, contents=contents)

        with closing(self._compressed(batches, compressor)) as results:
            for (number, *_), entry in prefetched(write, encoded(results)):
                own[number] = entry
        return _collect([(number, entry, number in reused) for number, entry in own.items()])

    @torch.no_grad()
    def _compressed(
        self, batches: Sequence[Sequence[ImageRecord]], compressor: Compressor
    ) -> Iterator[tuple[Part, list[str | None]]]:
        """What shards keep of batches, and what is in the files; the next batches are read meanwhile."""
        with closing(read_images(self.retriever, batches, self.contents)) as stream:
            for _, (contents, inputs) in stream:
                visual = self.retriever.encode_images(inputs, compressor.needs)
                yield kept_part(self.making, visual, compressor(visual)), contents

    def finished(self, split: str, number: int, records: Sequence[ImageRecord]) -> Shard | None:
        """The manifest entry of a shard that is there, whole, made of these records."""
        stamp = self._stamp([record.image_id for record in records])
        path = self.folder / split / f"images-{number:05d}.safetensors"
        entry = finished_shard(path, stamp, lambda found, wanted: self._as_now(found, wanted, records))
        if entry is None:
            return None
        found = load_header(path)["stamp"]
        if found["format_version"] != FORMAT_VERSION:
            entry |= {"version": found["format_version"], "scale": found["scale"]}
        if self.making.dtype != "binary":
            return Shard(**entry)
        exact = finished_shard(path.with_suffix(".exact.safetensors"), found, self._same_stamp)
        return exact and Shard(**entry, exact=ExactFile(**exact))

    def _same_stamp(self, found: dict, stamp: dict) -> bool:
        """Whether a shard was made from what another would be now; one of an older format is as good."""
        making = {"format", "format_version", "base_projector", "scale", *(each.name for each in fields(Making))}
        rest, wanted = ({key: own[key] for key in own.keys() - making} for own in (found, stamp))
        return rest == wanted and self.manifest.difference(making_from_stamp(found)) is None

    def _as_now(self, found: dict, stamp: dict, records: Sequence[ImageRecord]) -> bool:
        """Whether a shard's stamp says what one of these records would now, and their pictures are still the same."""
        rest = {key: value for key, value in found.items() if key not in ("contents", "corpus_contents")}
        if not self._same_stamp(rest, stamp):
            return False
        learned = found.get("corpus_contents", "")
        same = not (learned and self.learned) or learned == self.learned
        return self.contents.same(found.get("contents"), records, same)

    def write_shard(
        self,
        split: str,
        number: int,
        records: Sequence[ImageRecord],
        parts: Sequence[Part],
        contents: Sequence[str | None] | None = None,
    ) -> Shard:
        """Writes one shard of compressed images and returns its manifest entry; `contents` are their files' hashes."""
        tensors, half = image_tensors(self.making, parts, self.codebook, self.bank)
        more = {"contents": contents and list(contents), "corpus_contents": self.learned or None}
        more = {key: value for key, value in more.items() if value is not None}
        stamp = self._stamp([record.image_id for record in records], **more)
        return write_image_shard(self.folder / split / f"images-{number:05d}.safetensors", tensors, half, stamp)

    def write_queries(self, split: str, records: Sequence[ImageRecord]) -> tuple[tuple[QueryShard, ...], int]:
        """As `write_images`, of the captions."""
        own = [(k, caption.text) for k, record in enumerate(records) for caption in record.captions]
        rows = [(*row, grades) for row, grades in zip(own, caption_grades(records))]
        kind = FLOATS.get(self.making.dtype, torch.bfloat16)
        shards = dict(shared_out(list(batched(rows, QUERIES_PER_SHARD))))

        def place(number: int) -> tuple[Path, dict]:
            ids, texts, grades = zip(*((records[k].image_id, text, graded) for k, text, graded in shards[number]))
            more = {"grades": list(grades)} if any(grades) else {}
            path = self.folder / split / f"queries-{number:05d}.safetensors"
            return path, self._stamp(ids, texts=list(texts), **more)

        own = {number: finished_shard(*place(number), self._same_stamp) for number in shards}
        reused = {number for number, entry in own.items() if entry is not None}

        def encoded() -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
            texts = {k: [text for _, text, _ in shards[k]] for k in shards if k not in reused}
            jobs = {k: list(batched(rows, self.batch_size)) for k, rows in texts.items()}
            inputs = prefetched(self.retriever.query_inputs, [batch for ours in jobs.values() for batch in ours])
            for number, ours in Progress(jobs.items(), f"{split} queries", unit="shards"):
                stop_here()
                flat, lengths = [], []
                for _, batch in itertools.islice(inputs, len(ours)):
                    with torch.no_grad():
                        query = self.retriever.encode_queries(batch)
                    flat.append(query.tokens[query.mask].to(kind).cpu())
                    lengths.append(query.mask.sum(1).cpu())
                yield number, flat, lengths

        def write(job: tuple[int, list[Tensor], list[Tensor]]) -> dict:
            number, flat, lengths = job
            image = torch.tensor([k for k, *_ in shards[number]])
            tensors = {"tokens": torch.cat(flat), "lengths": torch.cat(lengths), "image": image}
            path, stamp = place(number)
            return write_shard(path, tensors, stamp, {"count": len(image)})

        for (number, *_), entry in prefetched(write, encoded()):
            own[number] = entry
        rows = [(number, QueryShard(**entry), number in reused) for number, entry in own.items()]
        return _collect(rows)


def _collect(own: list[tuple]) -> tuple[tuple, int]:
    """Entries of all processes' shards in order, and how many of them were there before."""
    rows = in_order(own)
    return tuple(entry for _, entry, _ in rows), sum(reused for _, _, reused in rows)
