"""Every text of a split against every picture: a pair's score needs both, so there is no index, only blocks of pairs.

Shape letters: Q texts, P pictures, b pictures of a block, M text tokens, d embedding."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samer.config import InputError
from samer.evaluation import both_directions, check_described, recall_sum
from samer.runtime.files import file_hash, only_writer, read_json, write_json
from samer.runtime.processes import gather_objects, rank, world_size
from samer.runtime.progress import Progress, batched
from samer.runtime.shards import finished_shard, read_finished, write_shard
from samer.runtime.signals import stop_here, stoppable
from samer.seps.data import SplitData, read_split
from samer.seps.head import Images, Texts
from samer.seps.inputs import LiveInputs, StoredInputs
from samer.seps.model import Seps, load_model
from samer.seps.selection import pooled
from samer.seps.settings import SepsConfig

TEXTS_AT_ONCE = 512
RECALLS = ("r@1", "r@5", "r@10")


@dataclass(frozen=True)
class Encoded:
    """Texts on the CPU, each (M, d) float32, and the dense ones of the images that they belong to."""

    texts: list[Tensor]
    image_of: Tensor
    dense: list[Tensor]

    def some(self, rows: range, device: torch.device, *, query: bool) -> Texts:
        """Consecutive texts as a batch, with their images' dense texts where they bring these along."""
        found = _padded([self.texts[row] for row in rows], device)
        if not query:
            return found
        owners, place = self.image_of[rows.start : rows.stop].unique(return_inverse=True)
        return replace(found, dense=_padded([self.dense[k] for k in owners], device), dense_of=place.to(device))


def _padded(rows: Sequence[Tensor], device: torch.device) -> Texts:
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(list(rows), batch_first=True)
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Texts(tokens.to(device), mask.to(device))


@torch.no_grad()
def encode_texts(model: Seps, inputs: LiveInputs | StoredInputs, texts: Sequence[str], batch_size: int) -> list[Tensor]:
    """Token vectors of texts, the first `towers.max_words` of each, (M, d) on the CPU."""
    most, found = model.config.towers.max_words or None, []
    for batch in Progress(list(batched(texts, batch_size)), desc="encoding texts", unit="batches"):
        stop_here()
        encoded = model.encode_texts(inputs.texts(batch))
        found += [tokens[mask][:most].cpu() for tokens, mask in zip(encoded.tokens, encoded.mask)]
    return found


def encode_split(model: Seps, inputs: LiveInputs | StoredInputs, data: SplitData, batch_size: int) -> Encoded:
    """Captions of a split, and its dense texts in the modes that have them."""
    image_of = torch.tensor([k for k, record in enumerate(data.records) for _ in record.captions])
    captions = [caption.text for record in data.records for caption in record.captions]
    dense = [] if model.config.seps.dense == "none" else [data.dense[record.image_id] for record in data.records]
    return Encoded(
        encode_texts(model, inputs, captions, batch_size), image_of, encode_texts(model, inputs, dense, batch_size)
    )


@torch.no_grad()
def score_block(
    model: Seps, inputs: LiveInputs | StoredInputs, data: SplitData, numbers: range, encoded: Encoded, batch_size: int
) -> Tensor:
    """Scores (Q, b) of all texts against the pictures of these numbers, on the CPU."""
    records = data.records[numbers.start : numbers.stop]
    parts = [model.encode_images(inputs.pictures(batch)) for batch in batched(records, batch_size)]
    cls = None if parts[0].cls is None else torch.cat([part.cls for part in parts])
    guide = None
    if model.config.seps.dense == "image":
        own = _padded([encoded.dense[k] for k in numbers], model.device)
        guide = pooled(own.tokens, own.mask)
    images = Images(torch.cat([part.tokens for part in parts]), cls, guide)
    columns = []
    for start in range(0, len(encoded.texts), TEXTS_AT_ONCE):
        stop_here()
        rows = range(start, min(start + TEXTS_AT_ONCE, len(encoded.texts)))
        texts = encoded.some(rows, model.device, query=model.config.seps.dense == "query")
        columns.append(model.head(images, texts)[0].cpu())
    return torch.cat(columns)


def score_split(
    model: Seps,
    inputs: LiveInputs | StoredInputs,
    data: SplitData,
    *,
    batch_size: int,
    block: int,
    folder: Path | None = None,
    stamp: dict | None = None,
) -> tuple[Tensor, float]:
    """Scores (Q, P) of a split; the blocks are shared out over the processes, all of which return the same scores.

    Args:
        model, inputs, data: what is scored.
        batch_size: pictures, or texts, per forward pass of the towers.
        block: pictures that are scored at once.
        folder: keeps each block as it is done, so that a run that was stopped goes on; None: nothing is kept.
        stamp: what the blocks depend on.

    Returns:
        The scores, and the seconds that this process took for a pair; NaN where it took all blocks from the folder.
    """
    check_described(data.records)
    blocks = [range(k, min(k + block, len(data.records))) for k in range(0, len(data.records), block)]
    own, pairs, seconds = dict(_kept(blocks, folder, stamp)), 0, 0.0
    if len(own) < len(range(rank(), len(blocks), world_size())):
        encoded = encode_split(model, inputs, data, batch_size)
        todo = [number for number in range(rank(), len(blocks), world_size()) if number not in own]
        for number in Progress(todo, desc="scoring pairs", unit=f"blocks of {block} pictures"):
            began = time.monotonic()
            own[number] = score_block(model, inputs, data, blocks[number], encoded, batch_size)
            pairs, seconds = pairs + own[number].numel(), seconds + time.monotonic() - began
            if folder is not None:
                write_shard(_file(folder, number), {"scores": own[number]}, stamp, {"block": number})
    scores = torch.empty(sum(len(record.captions) for record in data.records), len(data.records))
    for part in gather_objects(own):
        for number, columns in part.items():
            scores[:, blocks[number].start : blocks[number].stop] = columns
    return scores, seconds / pairs if pairs else float("nan")


def _file(folder: Path, number: int) -> Path:
    return folder / f"scores-{number:05d}.safetensors"


def _kept(blocks: Sequence[range], folder: Path | None, stamp: dict | None) -> Iterator[tuple[int, Tensor]]:
    """This process's blocks that lie in the folder, whole and of the same stamp."""
    for number in range(rank(), len(blocks), world_size()) if folder is not None else ():
        if finished_shard(_file(folder, number), stamp):
            yield number, read_finished(_file(folder, number))["scores"]


def split_metrics(scores: Tensor, image_of: Tensor, folds: int = 1) -> dict:
    """Metrics of both directions with their intervals, and rSum; of several folds the means, and each fold's.

    Args:
        scores: (Q, P).
        image_of: (Q,), the image of each text.
        folds: parts of equally many consecutive images, each asked among itself: five of COCO's 5,000 make "COCO 1K".

    Raises:
        InputError: folds that don't divide the images.
    """
    images, parts = scores.shape[1], []
    _check_folds(images, folds)
    for first in range(0, images, images // folds):
        rows = (image_of >= first) & (image_of < first + images // folds)
        columns = scores[rows][:, first : first + images // folds]
        directions = both_directions(columns, image_of[rows] - first)
        parts.append({**directions, "rsum": recall_sum(directions)})
    if folds == 1:
        return parts[0]
    mean = lambda values: round(sum(values) / folds, 6)
    found: dict = {
        name: {metric: {"value": mean([part[name][metric]["value"] for part in parts])} for metric in parts[0][name]}
        for name in ("text_to_image", "image_to_text")
    }
    return {**found, "rsum": mean([part["rsum"] for part in parts]), "folds": parts}


def _check_folds(images: int, folds: int) -> None:
    if folds < 1 or images % folds:
        raise InputError(f"{images:,} images can't be cut into {folds} folds of one size; give another number")


def recalls(metrics: dict) -> dict[str, float]:
    """R@1, R@5 and R@10 of both directions and rSum, flat."""
    short = {"text_to_image": "t2i", "image_to_text": "i2t"}
    found = {f"{short[name]}_{k}": metrics[name][k]["value"] for name in short for k in RECALLS}
    return {**found, "rsum": metrics["rsum"]}


def evaluate_folder(
    model: str | Path, config: SepsConfig, split: str, folds: int, output: Path, device: torch.device
) -> dict:
    """Measures a trained model on a split and writes OUTPUT/metrics.json; blocks of scores lie beside it.

    Args:
        model: the folder that scripts/seps_train.py wrote.
        config: whose data settings count, and the sizes of batches and blocks.
        split, folds: what is asked.
        output: a folder; a run that was stopped goes on there.
        device: to compute on.

    Returns:
        What metrics.json holds: metrics of both directions, and what a pair costs.

    Raises:
        InputError: bad data, no model, or one of other towers.
    """
    with only_writer(output), stoppable():
        content = read_json(Path(model) / "config.json")
        mode = content.get("seps", {}).get("dense", "none")
        data = read_split(config.data, split, config.data.limit_eval_images, dense=mode != "none")
        _check_folds(len(data.records), folds)
        seps, inputs = load_model(model, config, device, data.records)
        blocks = {"batch_size": config.train.eval_batch_size, "block": config.train.eval_block}
        texts = [[record.image_id, *(caption.text for caption in record.captions)] for record in data.records]
        asked = hashlib.sha256(json.dumps([texts, data.dense], sort_keys=True).encode()).hexdigest()
        weights = file_hash(Path(model) / "model.safetensors"), file_hash(Path(model) / "config.json")
        stamp = {"model": list(weights), "split": split, "asked": asked, "block": blocks["block"]}
        scores, pace = score_split(seps, inputs, data, **blocks, folder=output, stamp=stamp)
        image_of = torch.tensor([k for k, record in enumerate(data.records) for _ in record.captions])
        found = {
            "model": str(model),
            "split": split,
            "images": len(data.records),
            "captions": len(scores),
            "variant": seps.config.seps.variant,
            "dense": mode,
            "leak": mode == "query",
            **split_metrics(scores, image_of, folds),
            "cost": cost(seps, pace),
        }
        if rank() == 0:
            write_json(output / "metrics.json", found)
        gather_objects(None)
        return found


def cost(model: Seps, pace: float) -> dict:
    """What one pair takes, and a million pictures.

    Args:
        model: of it.
        pace: seconds for a pair, NaN if unknown.
    """
    head = model.head
    held = head.tokens + (model.specials > 0) + (head.settings.dense == "image")
    known = None if math.isnan(pace) else pace
    return {
        "vectors_per_image": held,
        "bytes_per_image": held * model.config.towers.embed_size * 2,  # halves; all patches, as each text chooses anew
        "merged_vectors": head.count,
        "seconds_per_pair": known,
        "seconds_per_query_1m": None if known is None else known * 1e6,
    }
