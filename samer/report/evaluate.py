"""The figures of one index: every caption of a split against every image, as metrics and as a report.

Shape letters: Q queries (captions), I images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from samer.compressors import settings_written
from samer.config import InputError
from samer.data import make_reader
from samer.evaluation import both_directions, recall_sum
from samer.index.manifest import vector_bytes
from samer.index.read import Index
from samer.index.settings import encoder_of
from samer.reducers import settings_used
from samer.report.gallery import Gallery, Shown, check_images, make_gallery, noting_replaced
from samer.report.page import headline, metrics_table, write_report
from samer.runtime.files import check_writable
from samer.scoring import StoredImages


def check_place(path: str | Path, indexes: Sequence[str | Path] = (), inputs: Sequence[str | Path] = ()) -> Path:
    """A file to write to, looked at before the work that it is to hold the result of.

    Args:
        path: of the file.
        indexes: folders of indexes, no file of which may be replaced.
        inputs: files that are read.

    Raises:
        InputError: as `check_writable`; an input, or a file of an index.
    """
    check_writable(path)
    real = Path(os.path.realpath(path))
    if any(real == Path(os.path.realpath(each)) for each in inputs):
        raise InputError(f"{path}: can't be written (it is read as well); name another file")
    if any(_is_part(real, Path(os.path.realpath(each))) for each in indexes):
        raise InputError(f"{path}: can't be written (it is a part of the index); name another file")
    return Path(path)


def metric_places(output: str | Path, index: str | Path) -> tuple[Path, Path]:
    """Where the metrics of an index go, and the report beside them.

    Raises:
        InputError: as `check_place`, or one file for both.
    """
    metrics = check_place(output, [index])
    report = check_place(metrics.with_suffix(".html"), [index])
    if report == metrics:
        raise InputError(
            f"{metrics}: the report is written to that name; name the metrics with another suffix, as .json"
        )
    return metrics, report


def _is_part(path: Path, index: Path) -> bool:
    """Whether a path is one of an index's own: metrics may lie beside its manifest."""
    if path.parent == index:
        return path.name in ("manifest.json", "projector.safetensors", "bank.safetensors", "codes.safetensors")
    return index in path.parents and path.suffix == ".safetensors"


def evaluate_index(index: Index, split: str, device: torch.device, budget: int = 0) -> tuple[dict, Tensor]:
    """Metrics of a split as scripts/eval.py writes them, and the scores (Q, I) that they were made from.

    `budget`: of the smaller ones that the index holds; 0: all vectors.

    Raises:
        InputError: no such budget, or as `Index.scores`.
    """
    images, queries, regions, size = index.size(split)
    if budget:
        regions, size = min(budget, regions), scanned_bytes(index, split, budget)
    scores, image_of = index.scores(split, device, budget)
    grades = index.grades(split)
    directions = both_directions(scores, image_of, grades=grades)
    made = index.manifest
    about = {
        "base_model": made.base_model,
        "projector": made.projector,
        "merge": settings_written(made.merge),
        "dtype": made.dtype,
    }
    if made.reduce.method != "none":
        about["reduce"] = settings_used(made.reduce)
    result = {
        "split": split,
        "images": images,
        "queries": queries,
        "vectors_per_image": regions,
        "bytes_per_image": size,
        **means_and_totals(index, split, budget),
        **directions,
        "cache": about,
    }
    if grades is None:  # no field prints a sum for graded relevance
        result["rsum"] = recall_sum(directions)
    return result, scores


def scanned_bytes(index: Index, split: str, budget: int = 0) -> float:
    """Bytes per image that a search reads of an index at a budget (0: all its vectors)."""
    size = count = 0
    for ids, images in index.stored(split, budget=budget):
        read = (images.tokens, images.scale, images.mask, images.bases)
        size, count = size + sum(each.nbytes for each in read if isinstance(each, Tensor)), count + len(ids)
    return size / count


def means_and_totals(index: Index, split: str, budget: int = 0) -> dict:
    """Size and cost of a split whose images differ in their vectors, padding left out; empty where they are all alike.

    Returns:
        `sizes`: `vectors` {mean, fewest, most, total}; `bytes` {mean, total} of the stored vectors; `operations` of
        MaxSim, 2 D sum(M) sum(vectors), {mean, total}, whose mean is per query and image.
    """
    counts = torch.cat([_counts(images) for _, images in index.stored(split, budget=budget)])  # (I,)
    fewest, most, total = int(counts.min()), int(counts.max()), int(counts.sum())
    if fewest == most:
        return {}
    blocks = [query.mask for query, _, _ in index.queries(split)]
    pairs = len(counts) * sum(map(len, blocks))
    operations = 2 * index.manifest.embedding_dim * sum(int(mask.sum()) for mask in blocks) * total
    size = vector_bytes(index.manifest) * total
    vectors = {"mean": total / len(counts), "fewest": fewest, "most": most, "total": total}
    sizes = {"bytes": {"mean": size / len(counts), "total": size}}
    return {"sizes": {"vectors": vectors, **sizes, "operations": {"mean": operations / pairs, "total": operations}}}


def _counts(images: StoredImages) -> Tensor:
    """How many vectors each live image of a shard has, (n,) long; tokens are not read for it."""
    count, most = images.tokens.shape[:2]
    counts = torch.full((count,), most) if images.mask is None else images.mask.sum(1)
    return counts if images.live is None else counts[images.live]


def size_line(sizes: dict) -> str:
    """`means_and_totals` in words."""
    vectors, size, operations = sizes["vectors"], sizes["bytes"], sizes["operations"]
    return (
        f"vectors {vectors['fewest']} to {vectors['most']} (mean {vectors['mean']:,.1f}), {vectors['total']:,} in all; "
        f"their bytes {size['mean']:,.0f} per image, {size['total']:,} in all; MaxSim operations "
        f"{operations['mean']:,.0f} per query and image, {operations['total']:.4g} in all"
    )


def metric_lines(result: dict) -> list[str]:
    """A line per direction, each metric with its interval, the sizes where they differ, and rSum."""
    lines = [size_line(result["sizes"])] if "sizes" in result else []
    for direction in ("text_to_image", "image_to_text"):
        shown = [
            f"{name} {metric['value']:.1f} [{metric['interval'][0]:.1f}, {metric['interval'][1]:.1f}]"
            for name, metric in result[direction].items()
        ]
        lines.append(f"{direction.replace('_', ' ')}: " + ", ".join(shown))
    return [*lines, f"rSum {result['rsum']:.1f}"] if "rsum" in result else lines


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
    dtype: torch.dtype | None = None,
) -> Gallery:
    """Failures by rule, and what winning vectors stand on; the captions shown are encoded again.

    Args:
        index: holds the images of `split`, or the first so many of them.
        split: of the data set.
        scores: (Q, I), of `evaluate_index`.
        data_root: the data set's folder, with boxes.
        reader: its kind, a name in `samer.data.READERS`; empty: guessed.
        features: a feature store to read instead of the images; empty: none.
        device: to encode on.
        model: where it is, if not where the index says.
        dtype: that it computes in; None: as `open_encoder` chooses.

    Raises:
        InputError: data or a model that are not those of the index.
    """
    records = make_reader(reader, data_root).load_split(data_root, split, boxes=True, limit_images=index.size(split)[0])
    check_images(index, split, records, data_root)
    made = index.manifest
    encoder = encoder_of(index, device, model=model, features=features, dtype=dtype)
    shown = [Shown(made.merge.compressor, made.merge, index.projector(), scores, index.bank())]
    return noting_replaced(make_gallery(encoder, records, shown), encoder, split, [index])


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
            *([("size and cost", size_line(result["sizes"]))] if "sizes" in result else []),
        ],
        tiles=headline(row, row),
        tables=[metrics_table([row])],
        gallery=gallery,
        note="" if gallery else "scripts/eval.py --data-root FOLDER shows pictures here, with what was found and why.",
    )
