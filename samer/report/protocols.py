"""Protocols of single benchmarks, from the scores of a whole split: COCO's folds, ImageCoDe's sets.

Shape letters: Q queries, I images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from samer.config import InputError
from samer.index.read import Index
from samer.metrics import bootstrap_intervals, query_metrics, retrieval_metrics


def fold_means(scores: Tensor, image_of: Tensor, count: int) -> dict:
    """Metrics of consecutive folds of the images, each with its own captions alone, and their means over the folds.

    COCO 1K is five folds of the 5,000 of test. Folds of numbers that don't divide differ by one image.

    Args:
        scores: (Q, I).
        image_of: (Q,) the image that each query describes.
        count: of folds.

    Returns:
        `{"count": n, "images": [of each fold], "text_to_image": {metric: mean}, "image_to_text": {metric: mean}}`.

    Raises:
        InputError: fewer images than folds, or a fold without a query.
    """
    found: dict[str, list[dict[str, float]]] = {"text_to_image": [], "image_to_text": []}
    folds = _folds(scores.shape[1], image_of, count)
    for images, asked in folds:
        own = scores[asked][:, images[0] : images[-1] + 1]
        positives = image_of[asked][:, None] == image_of.new_tensor(images)
        described = positives.any(0)
        found["text_to_image"].append(retrieval_metrics(own, positives))
        found["image_to_text"].append(retrieval_metrics(own.T[described], positives.T[described]))
    means = {
        direction: {name: round(float(np.mean([fold[name] for fold in rows])), 6) for name in rows[0]}
        for direction, rows in found.items()
    }
    return {"count": count, "images": [len(images) for images, _ in folds], **means}


def _folds(count_images: int, image_of: Tensor, count: int) -> list[tuple[np.ndarray, Tensor]]:
    """Images of each fold, and which queries ask for them, (Q,) bool."""
    if not 1 <= count <= count_images:
        raise InputError(f"{count} folds of {count_images:,} images; give at least 1 fold and an image for each")
    folds = []
    for number, images in enumerate(np.array_split(np.arange(count_images), count), start=1):
        asked = (image_of >= int(images[0])) & (image_of <= int(images[-1]))
        if not asked.any():
            raise InputError(f"fold {number} of {count} has no query; give fewer folds")
        folds.append((images, asked))
    return folds


def within_sets(scores: Tensor, image_of: Tensor, ids: Sequence[str]) -> dict:
    """Accuracy among the images of a query's own set: how often its image has the best score of them, a tie is none.

    Args:
        scores: (Q, I).
        image_of: (Q,) the image that each query describes.
        ids: of the images; a set is those that share what stands before the last slash.

    Returns:
        `{"sets": with a query, "images_per_set": mean, "accuracy": {"value": percent, "interval": [low, high]}}`;
        queries of one set are resampled together.

    Raises:
        InputError: an image of no set.
    """
    sets = _sets(ids)
    hits, owners, sizes = np.zeros(len(image_of)), np.zeros(len(image_of), dtype=int), []
    for number, images in enumerate(sets.values()):
        members = image_of.new_tensor(images)
        positives = image_of[:, None] == members
        asked = positives.any(1)
        if asked.any():
            sizes.append(len(images))
            hits[asked.numpy()] = query_metrics(scores[asked][:, images], positives[asked])["r@1"]
            owners[asked.numpy()] = number
    low, high = bootstrap_intervals({"accuracy": hits}, groups=owners)["accuracy"]
    accuracy = {"value": round(float(hits.mean()), 6), "interval": [round(float(low), 6), round(float(high), 6)]}
    return {"sets": len(sizes), "images_per_set": round(float(np.mean(sizes)), 6), "accuracy": accuracy}


def _sets(ids: Sequence[str]) -> dict[str, list[int]]:
    """Numbers of the images of each set."""
    sets: dict[str, list[int]] = {}
    for number, name in enumerate(ids):
        group, slash, _ = name.rpartition("/")
        if not slash:
            raise InputError(f"image {name[:80]!r} is of no set (no folder in its id); leave --sets out")
        sets.setdefault(group, []).append(number)
    return sets


def check_protocols(index: Index, split: str, folds: int | None, sets: bool) -> None:
    """Refuses protocols that the split can't be measured by, before it is scored.

    Args:
        index: with captions.
        split: of it.
        folds: how many; None: not asked for.
        sets: whether accuracy within sets is asked for.

    Raises:
        InputError: as `fold_means` and `within_sets`; relevance is graded, and more than its own image may answer a
            query.
    """
    if folds is None and not sets:
        return
    if index.grades(split) is not None:
        raise InputError(
            f"{index.folder}: relevance of {split} is graded; folds and sets are of data whose queries "
            "describe one image each: leave --folds and --sets out"
        )
    ids = list(index.numbers(split))
    if folds is not None:
        _folds(len(ids), _image_of(index, split), folds)
    if sets:
        _sets(ids)


def protocols_asked(index: Index, split: str, scores: Tensor, folds: int | None, sets: bool) -> dict:
    """`folds` and `within_sets` of an index's split, where they are asked for; arguments as `check_protocols` takes.

    Args:
        scores: (Q, I) of the whole split.
    """
    found: dict = {}
    if folds is not None:
        found["folds"] = fold_means(scores, _image_of(index, split), folds)
    if sets:
        found["within_sets"] = within_sets(scores, _image_of(index, split), list(index.numbers(split)))
    return found


def _image_of(index: Index, split: str) -> Tensor:
    """The image that each query describes, (Q,)."""
    return torch.cat([images for _, images, _ in index.queries(split)])


def protocol_lines(result: dict) -> list[str]:
    """A line per protocol that was asked for."""
    lines = []
    if folds := result.get("folds"):
        for direction in ("text_to_image", "image_to_text"):
            shown = ", ".join(f"{name} {value:.1f}" for name, value in folds[direction].items())
            lines.append(f"mean of {folds['count']} folds, {direction.replace('_', ' ')}: {shown}")
    if sets := result.get("within_sets"):
        value, (low, high) = sets["accuracy"]["value"], sets["accuracy"]["interval"]
        lines.append(
            f"within {sets['sets']:,} sets of {sets['images_per_set']:g}: accuracy {value:.1f} [{low:.1f}, {high:.1f}]"
        )
    return lines
