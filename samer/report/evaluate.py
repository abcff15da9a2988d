"""The figures of one index: every caption of a split against every image, as metrics and as a report.

Shape letters: Q queries (captions), I images.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from samer.data import make_reader
from samer.evaluation import both_directions
from samer.features.read import open_encoder
from samer.index.read import Index
from samer.report.gallery import Gallery, Shown, check_images, make_gallery
from samer.report.page import headline, metrics_table, write_report


def evaluate_index(index: Index, split: str, device: torch.device) -> tuple[dict, Tensor]:
    """Metrics of a split as scripts/eval.py writes them, and the scores (Q, I) that they were made from."""
    images, queries, regions, size = index.size(split)
    scores, image_of = index.scores(split, device)
    made = index.manifest
    about = {
        "base_model": made.base_model,
        "projector": made.projector,
        "merge": asdict(made.merge),
        "dtype": made.dtype,
    }
    result = {
        "split": split,
        "images": images,
        "queries": queries,
        "vectors_per_image": regions,
        "bytes_per_image": size,
        **both_directions(scores, image_of),
        "cache": about,
    }
    return result, scores


def metric_lines(result: dict) -> list[str]:
    """A line per direction, each metric with its interval."""
    lines = []
    for direction in ("text_to_image", "image_to_text"):
        shown = [
            f"{name} {metric['value']:.1f} [{metric['interval'][0]:.1f}, {metric['interval'][1]:.1f}]"
            for name, metric in result[direction].items()
        ]
        lines.append(f"{direction.replace('_', ' ')}: " + ", ".join(shown))
    return lines


def index_gallery(
    index: Index,
    split: str,
    scores: Tensor,
    data_root: str,
    *,
    reader: str,
    features: str,
    device: torch.device,
    model: str | None = None,
) -> Gallery:
    """Failures by rule, and what winning vectors stand on; the captions shown are encoded again.

    Args:
        index: holds the images of `split`, or the first so many of them.
        split: of the data set.
        scores: (Q, I), of `evaluate_index`.
        data_root: the data set's folder, with boxes.
        reader: its kind, a name in `samer.data.READERS`.
        features: a feature store to read instead of the images; empty: none.
        device: to encode on.
        model: where it is, if not where the index says.

    Raises:
        InputError: data or a model that are not those of the index.
    """
    records = make_reader(reader).load_split(data_root, split, boxes=True, limit_images=index.size(split)[0])
    check_images(index, split, records, data_root)
    made = index.manifest
    name, revision = index.model_place(model)
    encoder = open_encoder(name, device, features=features, revision=revision)
    index.check_model(encoder)
    return make_gallery(encoder, records, [Shown(made.merge.compressor, made.merge, index.projector(), scores)])


def write_index_report(path: str | Path, folder: str, result: dict, gallery: Gallery | None) -> None:
    """The HTML page of one index.

    Args:
        path: of the page.
        folder: of the index, as the user gave it.
        result: of `evaluate_index`.
        gallery: None: the page says how to get pictures.
    """
    about = result["cache"]
    row = {"name": about["merge"]["compressor"], **result}
    write_report(
        path,
        title=f"{Path(folder).name}: retrieval on {result['split']}",
        about=[
            ("index", folder),
            ("split", f"{result['split']}: {result['images']:,} images, {result['queries']:,} captions"),
            ("retriever", about["base_model"]),
            ("merge", ", ".join(f"{key} {value}" for key, value in about["merge"].items())),
            ("stored as", about["dtype"]),
        ],
        tiles=headline(row, row),
        tables=[metrics_table([row])],
        gallery=gallery,
        note="" if gallery else "scripts/eval.py --data-root FOLDER shows pictures here, with what was found and why.",
    )
