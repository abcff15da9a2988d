"""What fewer and smaller vectors cost on one's own data: a table of K and dtype, and the smallest that keeps 99 %.

Kept is what all vectors find: with relevant images known, the share of their nDCG@10; else the nDCG@10 against the ten
best by all vectors, of which the first counts 10, the second 9, and so on. Overlap@10 is the share of these ten that is
found. Intervals: 95 %, bootstrap over queries.

Shape letters: Q queries, I images, n images of a batch, K merged vectors, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from samer.compressors import Compressor, make_compressor
from samer.config import InputError, MergeConfig
from samer.metrics import bootstrap_intervals, graded_metrics, query_metrics
from samer.report.cells import budget_words, markdown_table
from samer.report.plots import COLOURS, MARKERS, plot
from samer.runtime.files import atomic_path, write_json
from samer.runtime.progress import Progress
from samer.scoring import StoredImages, maxsim, pack_signs, quantise_images, score_stored
from samer.settings import Budget
from samer.tokens import QueryTokens
from samer.vectors.merge import Grid, checked_rows, compressor_for, merge_rows, stored_bytes
from samer.vectors.queries import Queries, held_out, own_queries, pseudo_queries, read_queries
from samer.vectors.rows import Row, check_ids
from samer.vectors.stores import Store

BUDGETS = (4, 8, 16, 32, 64, 128, 256)
KEPT = 99.0  # percent
TOP = 10
MOST_QUERIES = 1000
TOGETHER = 32
WORDS = {"float16": "float16", "int8": "int8", "binary": "1 bit"}
ALL = "all"  # in place of K


@dataclass(frozen=True)
class Cost:
    """What one budget costs.

    Attributes:
        regions: K or a share; "all": nothing is merged.
        dtype: of the stored vectors; binary is scored by its signs alone.
        bytes_per_image: of vectors and scales.
        overlap, kept: percent, each with a 95 % interval.
        ndcg, recall: nDCG@10 and R@1 in percent; R@1 only where relevant images are known.
    """

    regions: Budget
    dtype: str
    bytes_per_image: float
    overlap: float
    overlap_interval: tuple[float, float]
    kept: float
    kept_interval: tuple[float, float]
    ndcg: float
    recall: float | None


@dataclass(frozen=True)
class Advice:
    """The table, the smallest row that keeps 99 %, and the smallest whose interval lies above that."""

    source: str
    queries: str
    images: int
    compressor: str
    places: bool
    reference: dict[str, float | None]
    rows: list[Cost]
    recommended: Cost | None
    sure: Cost | None

    def to_json(self) -> dict:
        """As JSON holds it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people: what was asked, the table, the recommendation."""
        cell = lambda value, ends: f"{value:.1f} ({ends[0]:.1f}-{ends[1]:.1f})"
        head = ["K", "dtype", "bytes per image", f"overlap@{TOP} %", f"nDCG@{TOP} kept %"]
        table = [
            [
                "all" if row.regions == ALL else budget_words(row.regions),
                WORDS[row.dtype],
                f"{row.bytes_per_image:,.0f}",
                cell(row.overlap, row.overlap_interval),
                cell(row.kept, row.kept_interval),
            ]
            for row in self.rows
        ]
        places = "" if self.places else ", where vectors stand is not known"
        told = [f"{self.source}: {self.images:,} images, {self.compressor}{places}; {self.queries}", ""]
        told += [*markdown_table(head, table), ""]
        if self.recommended is None:
            return [*told, f"nothing here keeps {KEPT:g} %; keep all vectors in float16"]
        told.append(f"the smallest that keeps {KEPT:g} % on this data: {_named(self.recommended)}")
        if self.sure and self.sure != self.recommended:
            told.append(f"the smallest whose interval lies above {KEPT:g} %: {_named(self.sure)}")
        return told


def _named(row: Cost) -> str:
    words = "all vectors" if row.regions == ALL else f"--num-regions {row.regions}"
    return f"{words} --dtype {row.dtype}, {row.bytes_per_image:,.0f} bytes per image ({row.kept:.1f} % kept)"


def advice(
    source: Store,
    merge: MergeConfig,
    *,
    budgets: Sequence[Budget] = (),
    queries: str | None = None,
    grid: Grid | None = None,
    normalise: bool = False,
    sample: int = 2000,
) -> Advice:
    """Merges a sample in all budgets and compares what is found with what all vectors find.

    Args:
        source: of the embeddings.
        merge: the compressor and its settings but K.
        budgets: each K; empty: powers of two below the vectors of an image.
        queries: a place of queries; None: the source's own, or images in their place.
        grid, normalise: as in `compress_vectors`.
        sample: how many images, evenly spaced; those that answer a query come beside them, at most as many.

    Raises:
        InputError: bad rows, no queries that could be answered.
    """
    if sample < 1:
        raise InputError(f"--sample is {sample}; it must be at least 1")
    ids = list(source.ids())
    check_ids(source.place, ids)
    asked = read_queries(queries, normalise) if queries else own_queries(source)
    chosen, asked, waiting = _sample(source.place, ids, asked, sample)

    def rows(names: frozenset[str]) -> Iterator[Row]:
        return (row for row in checked_rows(source, grid, normalise) if row.id in names)

    asked = asked or pseudo_queries(rows(waiting))
    bank = None
    if make_compressor(merge).needs_queries:  # what it learns from is not asked
        bank, asked = torch.cat(asked.tokens[::2]), asked.every_other()
    table = _Scores(merge, budgets, asked, bank)
    with Progress(desc="comparing", total=len(chosen), unit="images") as bar:
        for batch in _in_batches(rows(frozenset(chosen))):
            table.add(batch)
            bar.update(len(batch))
    return table.advice(source.place)


def _sample(
    place: str, ids: Sequence[str], asked: Queries | None, size: int
) -> tuple[list[str], Queries | None, frozenset[str]]:
    """The ids to look at, the queries that they can answer, and the ids that stand for queries if there are none."""
    size = min(size, len(ids))
    spread = [ids[number * len(ids) // size] for number in range(size)]
    if asked is None:
        out = held_out(spread)
        return [name for name in spread if name not in out], None, out
    if asked.relevant is None:
        some = asked.tokens[:: -(-len(asked.tokens) // MOST_QUERIES)]
        words = asked.words if len(some) == len(asked.tokens) else f"{len(some):,} of {asked.words}"
        return spread, replace(asked, tokens=some, words=words), frozenset()
    known = frozenset(ids)
    right = [number for number, names in enumerate(asked.relevant) if names & known]
    if not right:
        raise InputError(f"{place}: no query names a relevant image that is here; correct the column relevant")
    most = MOST_QUERIES if size == len(ids) else min(MOST_QUERIES, size)  # what answers them is looked at, too
    right = right[:: -(-len(right) // most)]
    words = asked.words if len(right) == len(asked.tokens) else f"{len(right):,} of {asked.words}"
    tokens, relevant = [asked.tokens[k] for k in right], [asked.relevant[k] & known for k in right]
    chosen = set().union(spread, *relevant)
    asked = replace(asked, tokens=tokens, relevant=relevant, words=words)
    return [name for name in ids if name in chosen], asked, frozenset()


def _in_batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch


class _Scores:
    """Scores of all queries against the images seen so far, for every budget and dtype."""

    def __init__(self, merge: MergeConfig, budgets: Sequence[Budget], asked: Queries, bank: Tensor | None) -> None:
        self.merge, self.asked, self.bank = merge, asked, bank
        self.compressors: dict[Budget, Compressor] = {}
        self.query: QueryTokens = asked.padded()
        self.budgets = list(budgets)
        self.ids: list[str] = []
        self.all: list[Tensor] = []
        self.found: dict[tuple[Budget, str], list[Tensor]] = {}
        self.vectors: dict[Budget, int] = {}
        self.places = False
        self.width = self.query.tokens.shape[2]

    def add(self, batch: Sequence[Row]) -> None:
        """Scores a batch of images, as they are and merged."""
        if not self.ids:
            self.places = batch[0].coords is not None
            most = max(len(row.vectors) for row in batch)
            self.budgets = self.budgets or [k for k in BUDGETS if k < most]
            own = {regions: replace(self.merge, num_regions=regions) for regions in self.budgets}
            self.compressors = {k: compressor_for(each, self.places, self.bank) for k, each in own.items()}
            if batch[0].vectors.shape[1] != self.width:
                raise InputError(
                    f"queries have {self.width} numbers a vector, images {batch[0].vectors.shape[1]}; give queries of "
                    "the same model"
                )
        self.ids += [row.id for row in batch]
        whole = [row.vectors for row in batch]
        self.all.append(self._float(*_padded(whole)))
        self._score(ALL, whole)
        for regions, compressor in self.compressors.items():
            self._score(regions, [vectors for vectors, _ in merge_rows(compressor, batch)])

    def _float(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return maxsim(self.query.tokens, tokens, self.query.mask, mask)  # (Q, n)

    def _score(self, regions: Budget, images: Sequence[Tensor]) -> None:
        tokens, mask = _padded(images)
        self.vectors[regions] = self.vectors.get(regions, 0) + int(mask.sum())
        whole, scales = quantise_images(tokens)
        scores = {"float16": self._float(tokens.half(), mask)}
        scores["int8"] = score_stored(self.query, StoredImages(whole, scales, mask))
        if self.width % 8 == 0:
            scores["binary"] = score_stored(self.query, StoredImages(pack_signs(tokens), None, mask))
        for dtype, values in scores.items():
            self.found.setdefault((regions, dtype), []).append(values)

    def advice(self, place: str) -> Advice:
        """The table of all that was scored."""
        if len(self.ids) < 2:
            raise InputError(f"{place}: holds too few images to compare what is found; at least 2")
        reference = torch.cat(self.all, dim=1)
        truth = self._truth(reference)
        base = _values(reference, truth)
        rows = [self._row(key, torch.cat(parts, dim=1), reference, truth, base) for key, parts in self.found.items()]
        rows.sort(key=lambda row: (row.bytes_per_image, row.dtype))
        keeps = [row for row in rows if row.kept >= KEPT]
        sure = [row for row in rows if row.kept_interval[0] >= KEPT]
        known = self.asked.relevant is not None
        about = {"ndcg": float(base["ndcg@10"].mean()), "recall": float(base["r@1"].mean()) if known else None}
        compressor = self.merge.compressor
        if compressor == "samer":
            compressor = f"samer, {self.merge.center_init}"
        first = (each[0] if each else None for each in (keeps, sure))
        return Advice(place, self.asked.words, len(self.ids), compressor, self.places, about, rows, *first)

    def _truth(self, reference: Tensor) -> Tensor:
        """How well each image answers each query, (Q, I) long."""
        grades = torch.zeros(reference.shape, dtype=torch.long)
        if self.asked.relevant is None:
            best = reference.topk(min(TOP, reference.shape[1]), dim=1).indices
            return grades.scatter_(1, best, torch.arange(TOP, 0, -1)[: best.shape[1]].expand(len(best), -1))
        place = {name: number for number, name in enumerate(self.ids)}
        for row, names in enumerate(self.asked.relevant):
            grades[row, [place[name] for name in names]] = 1
        return grades

    def _row(
        self, key: tuple[Budget, str], scores: Tensor, reference: Tensor, truth: Tensor, base: dict[str, np.ndarray]
    ) -> Cost:
        regions, dtype = key
        top = min(TOP, scores.shape[1])
        ours, theirs = (each.topk(top, dim=1).indices for each in (scores, reference))
        overlap = 100 * (ours[:, :, None] == theirs[:, None]).any(2).double().mean(1).numpy()  # (Q,)
        own = _values(scores, truth)
        ratio = own["ndcg@10"].mean() / base["ndcg@10"].mean() if base["ndcg@10"].mean() else 0.0
        # per query what its part moves the ratio of the means by, so that their mean is the ratio
        kept = 100 * (ratio + (own["ndcg@10"] - ratio * base["ndcg@10"]) / max(base["ndcg@10"].mean(), 1e-9))
        ends = bootstrap_intervals({"overlap": overlap, "kept": kept})
        size = stored_bytes(self.vectors[regions], len(self.ids), self.width, dtype) / len(self.ids)
        recall = float(own["r@1"].mean()) if self.asked.relevant is not None else None
        found = float(overlap.mean()), ends["overlap"], float(kept.mean()), ends["kept"]
        return Cost(regions, dtype, size, *found, float(own["ndcg@10"].mean()), recall)


def _values(scores: Tensor, truth: Tensor) -> dict[str, np.ndarray]:
    """Per-query metrics; graded where grades differ."""
    return graded_metrics(scores, truth) if int(truth.max()) > 1 else query_metrics(scores, truth > 0)


def _padded(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (n, K, D) and mask (n, K) of images with a number of vectors each."""
    lengths = torch.tensor([len(each) for each in images])
    tokens = torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True)
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def write_advice(folder: str | Path, found: Advice) -> None:
    """Writes `advice.json`, `advice.md` and the plot `advice.svg` to a folder."""
    folder = Path(folder)
    write_json(folder / "advice.json", found.to_json())
    for name, content in (("md", "\n".join(found.lines()).encode() + b"\n"), ("svg", plot(_draw, found, "svg"))):
        with atomic_path(folder / f"advice.{name}") as temporary:
            temporary.write_bytes(content)


def _draw(axes: Any, found: Advice) -> bool:
    for number, dtype in enumerate(WORDS):
        rows = [row for row in found.rows if row.dtype == dtype]
        if not rows:
            continue
        ends = [[row.kept - row.kept_interval[0], row.kept_interval[1] - row.kept] for row in rows]
        axes.errorbar(
            [row.bytes_per_image for row in rows],
            [row.kept for row in rows],
            yerr=np.abs(ends).T,
            color=COLOURS[number],
            marker=MARKERS[number],
            capsize=2,
            label=WORDS[dtype],
        )
        for row in rows:
            words = "all" if row.regions == ALL else budget_words(row.regions)
            axes.annotate(words, (row.bytes_per_image, row.kept), textcoords="offset points", xytext=(0, 6), fontsize=8)
    axes.axhline(KEPT, color="#7F7F7F", linestyle=":", linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("bytes per image (numbers: K)")
    axes.set_ylabel(f"nDCG@{TOP} kept (%)")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title(f"{found.images:,} images, {found.compressor}")
    return True
