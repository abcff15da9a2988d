"""What a retriever keeps when its vision tower runs on fewer tokens, alone and with its index merged.

Every method at every share of FLOPs saved: how like the plain tower's its features are, what they say of an image's
kind, and what is found, with all of an image's tokens and with K. A cell that is measured is kept, and not measured
again.

Shape letters: I images, Q captions, P patches, W width, N tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samer.compressors import make_compressor
from samer.config import InputError, MergeConfig, ReduceConfig
from samer.data.records import ImageRecord
from samer.evaluation import encode_texts, join_queries
from samer.metrics import query_metrics
from samer.reducers.calibration import calibrate
from samer.reducers.cost import TIERS, Meter, tiers
from samer.reducers.running import Reduced
from samer.retrievers.hf import Retriever
from samer.runtime.files import is_file, read_json, write_json
from samer.runtime.processes import print0
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.shards import finished_shard, read_finished, write_shard
from samer.runtime.signals import stop_here
from samer.scoring import maxsim
from samer.settings import build_dataclass
from samer.tokens import QueryTokens

METHODS = {
    "tome": ReduceConfig("tome"),
    "adamerge": ReduceConfig("adamerge"),
    "adamerge, inverse": ReduceConfig("adamerge", order="inverse"),
    "adamerge, shared": ReduceConfig("adamerge", batch="shared"),
    "adamerge, proportional": ReduceConfig("adamerge", proportional=True),
    "cubist": ReduceConfig("cubist"),
}
# what is behind the tower sees every patch; of ColPali, whose language model else gets fewer placeholders
METHODS |= {f"{name}, unmerged": replace(METHODS[name], unmerge=True) for name in ("tome", "adamerge", "cubist")}
USUAL = tuple(name for name in METHODS if not METHODS[name].unmerge)
PLAIN = "none"
WHOLE = (PLAIN, *(name for name in USUAL if "," not in name))  # without variants: what is trained
NEIGHBOURS = 10
LEAST_OF_A_KIND = 20  # images, for a kind to be one


@dataclass(frozen=True)
class Cell:
    """A method at a share of FLOPs saved; `asked` 0 is the plain tower."""

    method: str
    asked: float
    saved: float
    settings: ReduceConfig

    @property
    def key(self) -> str:
        """Its file's name."""
        return f"{self.method.replace(', ', '-')}-{round(1000 * self.asked):03d}"


def choose_cells(
    retriever: Retriever,
    records: Sequence[ImageRecord],
    folder: Path,
    methods: Sequence[str],
    asked: Sequence[float] = TIERS,
    batch_size: int = 8,
) -> list[Cell]:
    """The settings of every method and tier, found once and kept in `folder`.

    Args:
        retriever: whose tower it is.
        records: what AdaMerge is calibrated on, and, of the first of them, FLOPs are counted on.
        folder: of `cells.json`.
        methods: names in `METHODS`.
        asked: shares of FLOPs.
        batch_size: images per forward pass.

    Raises:
        InputError: a method that is unknown, or a folder with cells of another model.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise InputError(f"methods {', '.join(unknown)}: use some of {', '.join(METHODS)}")
    path, model = folder / "cells.json", retriever.identity.weights
    held = read_json(path) if is_file(path) else {"model": model, "methods": {}}
    if held["model"] != model:
        raise InputError(f"{path}: cells of another model; name another folder")
    batches, meter = list(batched(records, batch_size)), None
    for name in methods:
        if {f"{share:g}" for share in asked} <= held["methods"].get(name, {}).keys():
            continue
        meter = meter or Meter(retriever.tower, [_seen(retriever, record) for record in records[:4]])

        def calibrated(settings: ReduceConfig) -> ReduceConfig:
            if settings.method != "adamerge":
                return settings
            stop_here()
            found = calibrate(retriever.tower, retriever.name, settings, batches, retriever.see)
            return replace(settings, mean=found.mean, deviation=found.deviation)

        found = tiers(meter, METHODS[name], calibrated, asked)
        entries = {f"{tier.asked:g}": {"saved": tier.saved, "settings": asdict(tier.settings)} for tier in found}
        held["methods"][name] = {**held["methods"].get(name, {}), **entries}
        write_json(path, held)
        print0(f"{name}: " + ", ".join(f"{tier.saved:.1%} at r {tier.settings.r:g}" for tier in found))
    return [Cell(PLAIN, 0.0, 0.0, ReduceConfig()), *(_cell(held, path, name, s) for name in methods for s in asked)]


def _seen(retriever: Retriever, record: ImageRecord) -> Callable[[], Tensor]:
    """A picture's pass through the tower, its pixels read once."""
    inputs = retriever.record_inputs([record])
    return lambda: retriever.family.see(inputs)


def _cell(held: dict, path: Path, name: str, share: float) -> Cell:
    entry = held["methods"][name][f"{share:g}"]
    return Cell(name, share, entry["saved"], build_dataclass(ReduceConfig, entry["settings"], str(path)))


def measure_cells(
    retriever: Retriever,
    records: Sequence[ImageRecord],
    cells: Sequence[Cell],
    regions: Sequence[int],
    folder: Path,
    batch_size: int = 8,
) -> dict[str, dict[str, np.ndarray]]:
    """Measures the cells that are not there yet, the plain tower first.

    Args:
        retriever: its reduction is replaced.
        records: of the split, with captions.
        cells: of `choose_cells`.
        regions: K of the index, beside all tokens.
        folder: a file of arrays a cell; of the plain tower its features as well.
        batch_size: images per forward pass.

    Returns:
        By `Cell.key`: `cls` (I, W), `cls_cosine`, `patch_cosine` (I,), `layer_tokens` (I, L), and for every K ("all",
        "16") `r@1 K`, `r@5 K`, `ndcg@10 K` (Q,), `vectors K` (I,).
    """
    texts = [caption.text for record in records for caption in record.captions]
    stamp = {"images": [record.image_id for record in records]}
    queries: QueryTokens | None = None
    found = {}
    for number, cell in enumerate(cells, 1):
        path = folder / f"{cell.key}.safetensors"
        if finished_shard(path, stamp):
            values = {key: value.numpy() for key, value in read_finished(path).items()}
            if all(f"r@1 {k}" in values for k in ("all", *regions)):
                found[cell.key] = values
                continue
        queries = queries or join_queries(list(encode_texts(retriever, texts, 64)))
        print0(f"[{number}/{len(cells)}] {cell.method}, {cell.saved:.1%} of FLOPs saved")
        values = _measure(retriever, records, cell, regions, folder, batch_size, queries)
        write_shard(path, {key: torch.from_numpy(value) for key, value in values.items()}, stamp, {})
        found[cell.key] = values
    return found


@torch.no_grad()
def _measure(
    retriever: Retriever,
    records: Sequence[ImageRecord],
    cell: Cell,
    regions: Sequence[int],
    folder: Path,
    batch_size: int,
    queries: QueryTokens,
) -> dict[str, np.ndarray]:
    """One cell's values, as `measure_cells` returns them."""
    retriever.use_reduction(cell.settings)
    seen: list[Tensor] = []  # what the tower gives, special tokens too
    hook = retriever.tower.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    compressors = {"all": make_compressor(MergeConfig(compressor="none"))}
    compressors |= {str(k): make_compressor(MergeConfig(num_regions=k, center_init="farthest")) for k in regions}
    first = Reduced(retriever.tower, ReduceConfig()).specials
    rows: dict[str, list[Tensor]] = {}
    scores: dict[str, list[Tensor]] = {name: [] for name in compressors}
    reference = _Reference(folder / "plain", len(records))
    try:
        batches = list(batched(records, batch_size))
        for number, (batch, inputs) in enumerate(
            prefetched(retriever.record_inputs, Progress(batches, cell.key, unit="batches"))
        ):
            stop_here()
            seen.clear()
            visual = retriever.encode_images(inputs)
            states, source = seen[-1], visual.source
            place = (visual.patches.cumsum(1) - 1).gather(1, source)  # of each patch's token, prompts not counted
            patches = states[:, first:].gather(1, place[..., None].expand(-1, -1, states.shape[2]))
            cls = states[:, 0] if first else patches.mean(1)
            own = slice(number * batch_size, number * batch_size + len(batch))
            plain_cls, plain = reference.of(own, cls, patches, keep=cell.method == PLAIN)
            values = {"cls": cls, "cls_cosine": F.cosine_similarity(cls, plain_cls, dim=-1)}
            values["patch_cosine"] = F.cosine_similarity(patches, plain, dim=-1).mean(1)
            counts = visual.layer_tokens
            values["layer_tokens"] = torch.full((len(batch), 1), source.shape[1]) if counts is None else counts
            for name, compressor in compressors.items():
                merged = compressor(visual)
                scores[name].append(maxsim(queries.tokens, merged.tokens, queries.mask, merged.mask).cpu())
                values[f"vectors {name}"] = merged.mask.sum(1)
            for key, value in values.items():
                rows.setdefault(key, []).append(value.cpu())
    finally:
        hook.remove()
        retriever.use_reduction(ReduceConfig())
    found = {key: torch.cat(parts).numpy() for key, parts in rows.items()}
    owner = torch.tensor([image for image, record in enumerate(records) for _ in record.captions])
    positives = owner[:, None] == torch.arange(len(records))
    for name, parts in scores.items():
        metrics = query_metrics(torch.cat(parts, dim=1), positives)
        found |= {f"{metric} {name}": metrics[metric] for metric in ("r@1", "r@5", "ndcg@10")}
    return found


class _Reference:
    """The plain tower's features on disk, in float16: written while the plain cell is measured, read by the others."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, rows: slice, cls: Tensor, patches: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Those of some images, (b, W) and (b, P, W)."""
        found = []
        for name, value in (("cls", cls), ("patches", patches)):
            path = self.folder / f"{name}.npy"
            if keep:
                mode = "r+" if is_file(path) and rows.start else "w+"
                shape = (self.images, *value.shape[1:])
                held = np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape)
                held[rows] = value.half().cpu().numpy()
            else:
                held = np.lib.format.open_memmap(path, mode="r")
            found.append(torch.from_numpy(np.array(held[rows], dtype=np.float32)).to(value.device))
        return found[0], found[1]


def kinds_of(records: Sequence[ImageRecord]) -> np.ndarray:
    """A kind for each image, (I,): the last word of the phrase with the largest box, most often in its captions.

    Words of fewer than `LEAST_OF_A_KIND` images are no kinds, -1.
    """
    words = []
    for record in records:
        found: Counter[str] = Counter()
        for caption in record.captions:
            boxed = [phrase for phrase in caption.phrases if phrase.boxes and phrase.typed.split()]
            if boxed:
                largest = max(boxed, key=lambda each: max((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in each.boxes))
                found[largest.typed.split()[-1]] += 1
        words.append(found.most_common(1)[0][0] if found else "")
    often = [word for word, count in Counter(words).most_common() if word and count >= LEAST_OF_A_KIND]
    return np.array([often.index(word) if word in often else -1 for word in words])


def neighbours_right(cls: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """Whether most of each image's nearest neighbours, itself left out, are of its kind, in percent, (I with a kind,).

    The nearest count for as much as they are near.
    """
    own = kinds >= 0
    unit = F.normalize(torch.from_numpy(cls[own]).float(), dim=-1)
    similar = unit @ unit.T
    similar.fill_diagonal_(-torch.inf)
    near, places = similar.topk(min(NEIGHBOURS, len(unit) - 1), dim=1)
    known = torch.from_numpy(kinds[own])
    votes = torch.zeros(len(unit), int(known.max()) + 1).scatter_add_(1, known[places], near)
    return 100.0 * (votes.argmax(1) == known).double().numpy()
