"""MS-COCO on disk -> records: captions of Karpathy's split file or of COCO's own files, boxes of instances.

Two forms. `dataset_coco.json`: splits train (with restval, 113,287 images), val and test (5,000 each; the five folds of
1,000 are test[:1000], test[1000:2000], ...); `dataset_flickr30k.json` and its like are read, too. Or COCO's own
`captions_<split>.json`: splits by their names, such as val2017. Of each image the first `CAPTIONS` captions count, in
the file's order, so that test has the 25,000 that everybody reports on; duplicates stay. Boxes are those of
`instances_*.json`, joined by image id, of either year (both years share their ids): no phrase has them, so they are the
image's `things`, a category each. Crowds (`iscrowd`) are left out.

Where an image is, its file name says; 2014's pictures serve the files of 2017 and the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samer.config import InputError
from samer.data.annotated import BAD_BOXES, LONG_CAPTIONS, box_shares, boxes_fit
from samer.data.parts import split_part, take_part
from samer.data.pictures import one_line
from samer.data.reader import Defects, RowReader, tell_once
from samer.data.records import LONGEST_CAPTION, Caption, ImageRecord, Things, plain_caption
from samer.data.texts import field, folder_of, pictures_in, read_object, table
from samer.runtime.files import is_dir, listing

CAPTIONS = 5  # of an image; some have six or seven
_YEARS = ("train2014", "val2014", "train2017", "val2017")
_FOLDERS = ("", *_YEARS, "flickr30k-images", "flickr30k_images", "Images")  # in the data set's, or in its images/
_FILE = re.compile(r"(captions|instances)_(.+)\.json|(dataset)_(.+)\.json")


@dataclass(frozen=True)
class _Layout:
    """The files of one copy: Karpathy's, and COCO's own by what their names say behind `captions_`, `instances_`."""

    root: Path
    karpathy: Path | None
    captions: dict[str, Path]
    instances: dict[str, Path]


@dataclass(frozen=True)
class _Image:
    """An image as the files of captions list it; `names`: of its picture, the first that is there is taken."""

    image_id: str
    names: tuple[str, ...]
    captions: tuple[str, ...]
    where: str


def _layout(root: Path) -> _Layout:
    found: dict[str, dict[str, Path]] = {"captions": {}, "instances": {}, "dataset": {}}
    for folder in (root / "annotations", root):
        for path in listing(folder) if is_dir(folder) else ():
            if match := _FILE.fullmatch(path.name):
                found[match[1] or match[3]].setdefault(match[2] or match[4], path)
    karpathy = found["dataset"].get("coco") or next(iter(found["dataset"].values()), None)
    return _Layout(root, karpathy, found["captions"], found["instances"])


def _checked(root: str | Path) -> _Layout:
    layout = _layout(folder_of(root, "COCO copy"))
    if layout.karpathy is None and not layout.captions:
        raise InputError(f"{root}: neither dataset_coco.json nor captions_*.json, here or in annotations; restore one")
    return layout


def _karpathy(path: Path, split: str, defects: Defects) -> list[_Image]:
    """The images of a split in the file's order."""
    wanted = ("train", "restval") if split == "train" else (split,)
    images, seen, splits = [], {}, set()
    for number, row in enumerate(table(path, read_object(path), "images"), start=1):
        with defects.spared():
            where = f"{path}: image {number}"
            splits.add(field(where, row, "split", str))
            if row["split"] not in wanted:
                continue
            name = field(where, row, "filename", str)
            coco = field(where, row, "cocoid", int) if "cocoid" in row else None
            sentences = field(where, row, "sentences", list)
            texts = tuple(
                field(f"{where}: sentence {k}", each, "raw", str) for k, each in enumerate(sentences, start=1)
            )
            image_id = str(coco) if coco is not None else Path(name).stem
            _once(seen, image_id, number, where)
            images.append(_Image(image_id, (name, *_names(coco)), texts, where))
    if not images:
        raise InputError(f"{path}: no split {split!r}; use one of {', '.join(sorted(splits))}")
    return images


def _own(path: Path, defects: Defects) -> list[_Image]:
    """The images of one of COCO's own files of captions, in the order of its `images`."""
    value = read_object(path)
    texts: dict[int, list[str]] = {}
    for number, row in enumerate(table(path, value, "annotations"), start=1):
        with defects.spared():
            where = f"{path}: annotation {number}"
            texts.setdefault(field(where, row, "image_id", int), []).append(field(where, row, "caption", str))
    images, seen = [], {}
    for number, row in enumerate(table(path, value, "images"), start=1):
        with defects.spared():
            where = f"{path}: image {number}"
            coco, name = field(where, row, "id", int), field(where, row, "file_name", str)
            _once(seen, str(coco), number, where)
            images.append(_Image(str(coco), (name, *_names(coco)), tuple(texts.pop(coco, ())), where))
    for coco in texts:
        with defects.spared():
            raise InputError(f"{path}: a caption is of image {coco}, which is not in images; restore the file")
    return images


def _once(seen: dict[str, int], image_id: str, number: int, where: str) -> None:
    if image_id in seen:
        raise InputError(f"{where}: {image_id} is also image {seen[image_id]}; remove one")
    seen[image_id] = number


def _names(coco: int | None) -> tuple[str, ...]:
    """How an image's picture may be called, by its id."""
    if coco is None:
        return ()
    return f"{coco:012d}.jpg", f"COCO_val2014_{coco:012d}.jpg", f"COCO_train2014_{coco:012d}.jpg"


def _captions(image: _Image, defects: Defects) -> tuple[Caption, ...]:
    """The captions that count."""
    captions = []
    for number, text in enumerate(image.captions[:CAPTIONS], start=1):
        with defects.spared():
            caption = plain_caption(text)
            if not caption.text:
                raise InputError(f"{image.where}: caption {number} is empty; write a caption")
            if len(text) > LONGEST_CAPTION:
                length = f"{len(text):,} characters; {LONGEST_CAPTION:,} are the most"
                defects.add(LONG_CAPTIONS, image.where, f"caption {number}: {length}")
            captions.append(caption)
    if not image.captions:
        with defects.spared():
            raise InputError(f"{image.where}: no caption; write one, or take the image out")
    return tuple(captions)


class _Instances:
    """Boxes of images, from one file after the other until all are known."""

    def __init__(self, files: Sequence[Path], wanted: set[int], defects: Defects) -> None:
        self.things: dict[int, list[tuple[str, tuple[float, ...], str]]] = {}
        self.sizes: dict[int, tuple[float, float]] = {}
        for path in files:
            if wanted <= self.sizes.keys():
                break
            with defects.spared():
                self._read(path, wanted - self.sizes.keys(), defects)

    def _read(self, path: Path, wanted: set[int], defects: Defects) -> None:
        value = read_object(path, without="segmentation")
        for number, row in enumerate(table(path, value, "images"), start=1):
            with defects.spared():
                where = f"{path}: image {number}"
                if (coco := field(where, row, "id", int)) in wanted:
                    size = (field(where, row, "width", (int, float)), field(where, row, "height", (int, float)))
                    if min(size) < 1:
                        raise InputError(f"{where}: its size is {size[0]:g} x {size[1]:g}; restore the file")
                    self.sizes[coco] = size
        names: dict[Any, str] = {}
        for number, row in enumerate(table(path, value, "categories"), start=1):
            with defects.spared():
                where = f"{path}: category {number}"
                names[field(where, row, "id", int)] = field(where, row, "name", str)
        for number, row in enumerate(table(path, value, "annotations"), start=1):
            with defects.spared():
                self._take(f"{path}: annotation {number}", row, wanted, names)

    def _take(self, where: str, row: Any, wanted: set[int], names: dict[Any, str]) -> None:
        coco = field(where, row, "image_id", int)
        if coco not in wanted or row.get("iscrowd"):
            return
        category, box = field(where, row, "category_id", int), field(where, row, "bbox", list)
        if category not in names:
            raise InputError(f"{where}: category {category} is not in categories; restore the file")
        if coco not in self.sizes:
            raise InputError(f"{where}: image {coco} is not in images; restore the file")
        numbers = tuple(field(f"{where}: bbox", {"number": each}, "number", (int, float)) for each in box)
        if len(numbers) != 4:
            raise InputError(f"{where}: bbox must be x, y, width, height; it is {one_line(box)[:60]}; restore the file")
        self.things.setdefault(coco, []).append((names[category], numbers, where))

    def of(self, coco: int, picture: Path, defects: Defects) -> tuple[Things, ...]:
        """What an image holds, categories in the order of their first box."""
        rows = self.things.get(coco, [])
        if not rows or not boxes_fit(picture, picture, self.sizes[coco], defects):
            return ()
        found: dict[str, list] = {}
        for name, (x, y, width, height), where in rows:
            box = box_shares((x, y, x + width, y + height), self.sizes[coco])
            if box is None:
                shown = ", ".join(f"{value:g}" for value in (x, y, width, height))
                place = where.rpartition("/")[2]
                message = f"{place}: bbox ({shown}) is empty or outside the image; correct it"
                defects.add(BAD_BOXES, picture, message)
                continue
            found.setdefault(name, []).append(box)
        return tuple(Things(name, tuple(boxes)) for name, boxes in found.items())


class Coco(RowReader):
    """MS-COCO; an image's id is COCO's number, or the picture's name where a Karpathy file of others has none."""

    signs = "dataset_coco.json, or annotations/captions_*.json"

    def holds(self, root: Path) -> bool:
        layout = _layout(root)
        return layout.karpathy is not None or bool(layout.captions)

    def check(self, root: str | Path) -> bool:
        return bool(_checked(root).instances)

    def splits(self, root: str | Path) -> list[str]:
        layout = _checked(root)
        return [*(("train", "val", "test") if layout.karpathy else ()), *layout.captions]

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        name, part = split_part(split)
        layout = _checked(root)
        images = take_part(self._images(layout, name, defects), part, split)[:limit_images]
        there = pictures_in([base / folder for base in (layout.root, layout.root / "images") for folder in _FOLDERS])
        paths = {}
        for image in images:
            if found := next((there[each] for each in image.names if each in there), None):
                paths[image.image_id] = found
        lacking = [one_line(image.names[0])[:80] for image in images if image.image_id not in paths]
        defects.absent(layout.root, lacking, len(images), "restore it, in the folder or in images, val2017 and so on")
        instances = None
        if boxes and layout.instances:
            wanted = {int(image.image_id) for image in images if image.image_id.isdecimal()}
            instances = _Instances(list(layout.instances.values()), wanted, defects)
            if unknown := len(images) - len(instances.sizes.keys() & wanted):
                tell_once(f"note: {split} of {root}: {unknown:,} images are in no instances file and have no boxes")
        records, more = [], 0
        for image in images:
            captions, path = _captions(image, defects), paths.get(image.image_id)
            more += max(0, len(image.captions) - CAPTIONS)
            if path is not None:
                known = instances is not None and image.image_id.isdecimal()
                things = instances.of(int(image.image_id), path, defects) if known else ()
                records.append(ImageRecord(image.image_id, path, captions, things))
        if more:
            tell_once(f"note: {split} of {root}: {more:,} captions beyond the first {CAPTIONS} of an image don't count")
        return records

    def _images(self, layout: _Layout, split: str, defects: Defects) -> list[_Image]:
        if split in layout.captions:
            return _own(layout.captions[split], defects)
        if layout.karpathy is not None:
            return _karpathy(layout.karpathy, split, defects)
        alike = [name for name in layout.captions if name.startswith(split)]  # val: val2017
        if len(alike) != 1:
            raise InputError(f"{layout.root}: no split {split!r}; use one of {', '.join(layout.captions)}")
        return _own(layout.captions[alike[0]], defects)
