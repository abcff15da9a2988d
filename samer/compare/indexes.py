"""Several indexes of one split beside each other: a table, a gallery, regions, and what a sweep of budgets measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from samer.compare.run import sweep
from samer.compressors import settings_written
from samer.config import InputError
from samer.data import make_reader
from samer.evaluation import both_directions
from samer.index.read import Index
from samer.index.settings import encoder_of
from samer.reducers import settings_used
from samer.report.evaluate import check_place, means_and_totals
from samer.report.gallery import Shown, check_images, make_gallery, noting_replaced
from samer.report.page import headline, metrics_table, write_report
from samer.runtime.files import read_json

Named = Sequence[tuple[str, str]]  # (name, place) pairs


@dataclass(frozen=True)
class Request:
    """What a report of indexes is made of.

    Attributes:
        methods: (name, index folder), in gallery and table: the baseline first, the one in question last.
        rows: (name, JSON file of scripts/eval.py), in the table only.
        regions: (name, index folder) whose regions are drawn.
        curves: names of `methods` whose recall is measured at all budgets, with grounding of every method; None:
            nothing is measured again.
        data_root, reader, split: the data set, with boxes.
        features: a feature store to read instead of the images; empty: none.
        model: where the model is, if not where the first index says.
        title: heading of the page; empty: made from the data's name.
        batch_size: images and captions per forward pass.
        dtype: that the model computes in; None: as `open_encoder` chooses.
    """

    methods: Named
    data_root: str
    rows: Named = ()
    regions: Named = ()
    curves: Sequence[str] | None = None
    reader: str = ""
    split: str = "test"
    features: str = ""
    model: str = ""
    title: str = ""
    batch_size: int = 32
    dtype: torch.dtype | None = None


def report_indexes(out: str | Path, request: Request, device: torch.device) -> list[Path]:
    """Writes the report of several indexes; their images are encoded again for the captions shown.

    Returns:
        The files written, the HTML first.

    Raises:
        InputError: a missing or unfit index, other images or another model than the first's, an unknown name.
    """
    split, root = request.split, request.data_root
    others = [{"name": name, **read_metrics(place, split)} for name, place in request.rows]
    unknown = set(request.curves or ()) - {name for name, _ in request.methods}
    if unknown:
        raise InputError(f"--sweep {sorted(unknown)[0]!r}: name a method of --method")
    indexes = {place: Index(place) for _, place in [*request.methods, *request.regions]}
    check_place(out, list(indexes), [place for _, place in request.rows])
    for _, place in request.methods:
        indexes[place].check_captions(split)
    limit = max(index.size(split)[0] for index in indexes.values())
    reader = make_reader(request.reader, root)
    records = reader.load_split(root, split, boxes=True, limit_images=limit)
    for index in indexes.values():
        check_images(index, split, records, root)
    first = indexes[request.methods[0][1]]
    encoder = encoder_of(first, device, model=request.model, features=request.features, dtype=request.dtype)
    for place, index in indexes.items():
        index.check_model(encoder)
        if settings_used(index.manifest.reduce) != settings_used(first.manifest.reduce):
            raise InputError(
                f"{place}: its vision tower was reduced otherwise than that of {first.folder}; a report shows what one "
                "tower gave, so make one of each"
            )
    methods, measured = [], []
    for name, place in request.methods:
        scores, image_of = indexes[place].scores(split, device)
        methods.append(_shown(name, indexes[place], scores))
        _, _, vectors, size = indexes[place].size(split)
        figures = both_directions(scores, image_of, grades=indexes[place].grades(split))
        figures |= means_and_totals(indexes[place], split)
        measured.append({"name": name, "vectors_per_image": vectors, "bytes_per_image": size, **figures})
    # a row of the table only that is compressed as the baseline is: what training alone does
    controls = [row for row in others if row["cache"]["merge"] == settings_written(first.manifest.merge)]
    results = None
    if request.curves is not None:
        about = Path(root).name, request.batch_size, reader.undescribed
        results = sweep(encoder, records, methods, request.curves, *about)
    regions = [_shown(name, indexes[place]) for name, place in request.regions]
    gallery = make_gallery(encoder, records, methods, regions, batch_size=request.batch_size)
    gallery = noting_replaced(gallery, encoder, split, list(indexes.values()))
    captions = sum(len(record.captions) for record in records)
    return write_report(
        out,
        title=request.title or f"SaMer on {split} of {Path(root).name}",
        about=[
            ("data", f"{split} of {root}: {len(records):,} images, {captions:,} captions"),
            ("retriever", encoder.name),
            *request.methods,
            *request.rows,
        ],
        tiles=headline(measured[0], measured[-1], controls),
        tables=[metrics_table([*measured, *others])],
        results=results,
        gallery=gallery,
    )


def _shown(name: str, index: Index, scores: Tensor | None = None) -> Shown:
    return Shown(name, index.manifest.merge, index.projector(), scores, index.bank())


def read_metrics(path: str, split: str) -> dict:
    """What scripts/eval.py wrote of a split.

    Raises:
        InputError: another file, or of another split.
    """
    row = read_json(path)
    wanted = {"split", "text_to_image", "image_to_text", "vectors_per_image", "bytes_per_image", "cache"}
    if not wanted <= set(row) or not isinstance(row["cache"], dict) or "merge" not in row["cache"]:
        raise InputError(f"{path}: no metrics of scripts/eval.py; make them anew")
    if row["split"] != split:
        raise InputError(f"{path}: metrics of {row['split']}, not of {split}")
    return row
