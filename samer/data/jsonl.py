"""A data set of one's own: `<split>.jsonl`, an image a line.

    {"image": "beach/1.jpg", "captions": ["Two dogs run.", "Dogs on a beach."], "boxes": [[12, 40, 180, 200]]}

`image`: a path below the folder of the file, or below its images/; it is the image's id, too. `captions`: texts, or
one; none (`[]`) where an image is only there to be found. `boxes`, where there are any: x1, y1, x2, y2 in pixels of the
picture as it is displayed, or of `width` x `height` where the line has these. No caption has them: they are the image's
`things`, each by itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.annotated import BAD_BOXES, LONG_CAPTIONS, box_shares, boxes_fit
from samer.data.parts import split_part, take_part
from samer.data.pictures import displayed_size, one_line
from samer.data.reader import Defects, RowReader
from samer.data.records import LONGEST_CAPTION, Caption, ImageRecord, Things, plain_caption
from samer.data.texts import field, folder_of, inside, rows_of
from samer.runtime.files import is_dir, is_file, listing

_LONGEST_LINE = 1 << 20  # bytes, of a first line that is looked at


def _files(root: Path) -> list[Path]:
    """The files whose first line is one of this kind."""
    return [path for path in listing(root) if path.suffix == ".jsonl" and is_file(path) and _like(path)]


def _like(path: Path) -> bool:
    with open(path, "rb") as lines:
        line = lines.readline(_LONGEST_LINE)
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    return "image" in value if isinstance(value, dict) else b'"image"' in line  # a damaged line is refused when read


def _captions(where: str, row: Any, defects: Defects) -> tuple[Caption, ...]:
    texts = row.get("captions") if isinstance(row, dict) else None
    captions = []
    for number, text in enumerate([texts] if isinstance(texts, str) else field(where, row, "captions", list), start=1):
        with defects.spared():
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"{where}: caption {number} is no text; write one, or take it out")
            if len(text) > LONGEST_CAPTION:
                length = f"caption {number}: {len(text):,} characters; {LONGEST_CAPTION:,} are the most"
                defects.add(LONG_CAPTIONS, where, length)
            captions.append(plain_caption(text))
    return tuple(captions)


def _things(where: str, row: dict, picture: Path, defects: Defects) -> tuple[Things, ...]:
    boxes = field(where, row, "boxes", list)
    if not boxes:
        return ()
    if "width" in row or "height" in row:
        size = (field(where, row, "width", (int, float)), field(where, row, "height", (int, float)))
        if min(size) < 1:
            raise InputError(f"{where}: width and height are {size[0]:g} and {size[1]:g}; correct them")
        if not boxes_fit(where, picture, size, defects):
            return ()
    else:
        size = displayed_size(picture)
    things = []
    for number, box in enumerate(boxes, start=1):
        with defects.spared():
            if not isinstance(box, list) or len(box) != 4:
                raise InputError(
                    f"{where}: box {number} must be x1, y1, x2, y2; it is {one_line(box)[:60]}; correct it"
                )
            values = [field(f"{where}: box {number}", {"number": each}, "number", (int, float)) for each in box]
            share = box_shares(values, size)
            if share is None:
                shown = ", ".join(f"{value:g}" for value in values)
                why = (
                    f"box {number} ({shown}) is empty, inverted or outside {size[0]:g} x {size[1]:g} pixels; correct it"
                )
                defects.add(BAD_BOXES, where, why)
                continue
            things.append(Things(str(number), (share,)))
    return tuple(things)


class JsonLines(RowReader):
    """One's own data."""

    undescribed = True
    signs = '<split>.jsonl with lines {"image": ..., "captions": [...]}'

    def holds(self, root: Path) -> bool:
        return bool(_files(root))

    def check(self, root: str | Path) -> bool:
        """Whether any line has boxes."""
        root = folder_of(root, "folder of <split>.jsonl")
        return any(isinstance(row, dict) and row.get("boxes") for path in _files(root) for _, row in rows_of(path))

    def splits(self, root: str | Path) -> list[str]:
        return [path.stem for path in _files(folder_of(root, "folder of <split>.jsonl"))]

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        name, part = split_part(split)
        root = folder_of(root, "folder of <split>.jsonl")
        if not is_file(root / f"{name}.jsonl"):
            known = self.splits(root)
            raise InputError(f"{root}: no {name}.jsonl; the splits here are {', '.join(known) or 'none'}")
        rows = take_part(list(rows_of(root / f"{name}.jsonl")), part, split)[:limit_images]
        base = [folder for folder in (root, root / "images") if is_dir(folder)]
        records, seen, files = [], {}, {}
        lacking: list[str] = []
        for where, row in rows:
            with defects.spared():
                image_id = str(Path(field(where, row, "image", str)))  # ./a.jpg is a.jpg
                if image_id in seen:
                    raise InputError(f"{where}: {image_id[:80]!r} stands in {seen[image_id]}, too; join the lines")
                seen[image_id] = where.rpartition(": ")[2]
                captions = _captions(where, row, defects)
                picture = next(filter(is_file, [inside(folder, image_id, where) for folder in base]), None)
                if picture is None:
                    lacking.append(f"{one_line(image_id)[:80]} ({seen[image_id]})")
                    continue
                if picture in files:
                    raise InputError(f"{where}: {image_id[:80]!r} is the picture of {files[picture]}; join the lines")
                files[picture] = seen[image_id]
                things = _things(where, row, picture, defects) if boxes and "boxes" in row else ()
                records.append(ImageRecord(image_id, picture, captions, things))
        defects.absent(root / f"{name}.jsonl", lacking, len(rows), "restore it, or take the line out")
        return records
