"""Caption files of the cross-modal line (VSE++, LAPS, SEPS) -> records.

`<split>_caps.txt`: a caption a line. `<split>_ids.txt`: an id a line, of each caption's image, or of one image each for
`CAPTIONS` captions in a row. `id_mapping.json`: {id: picture}, a path below the folder of pictures. Where long captions
lie beside them, `*_<split>.jsonl` with {"text": ...} for each image in the order of the ids (or with "image_id"), the
split `dense_<split>` has them instead. There are no boxes.
"""

from __future__ import annotations

from pathlib import Path

from samer.config import InputError
from samer.data.annotated import LONG_CAPTIONS
from samer.data.dense import dense_file, dense_rows
from samer.data.parts import split_part, take_part
from samer.data.pictures import one_line
from samer.data.reader import Defects, RowReader
from samer.data.records import LONGEST_CAPTION, ImageRecord, plain_caption
from samer.data.texts import field, folder_of, inside, read_lines, read_object
from samer.runtime.files import is_file, listing

CAPTIONS = 5  # of an image that stands in the ids once
DENSE = "dense_"
_FOLDERS = ("images", "flickr30k-images", "coco-images", "")  # of pictures; in the data set's, or beside it


def _ids(path: Path) -> list[tuple[str, str]]:
    """(id, where it stands) of every line."""
    return [(line.strip(), f"{path}: line {k}") for k, line in enumerate(read_lines(path), start=1)]


def _plain(root: Path, split: str) -> dict[str, list[tuple[str, str]]]:
    """Image id -> its captions, each with where it stands, in the order of the ids."""
    ids, texts = _ids(root / f"{split}_ids.txt"), _ids(root / f"{split}_caps.txt")
    if len(ids) * CAPTIONS == len(texts):
        ids = [each for each in ids for _ in range(CAPTIONS)]
    elif len(ids) != len(texts):
        raise InputError(
            f"{root / f'{split}_ids.txt'}: {len(ids):,} ids for {len(texts):,} captions in {split}_caps.txt; "
            f"there must be one for each caption, or one for {CAPTIONS}; restore both files"
        )
    found: dict[str, list[tuple[str, str]]] = {}
    for (image_id, _), text in zip(ids, texts):
        found.setdefault(image_id, []).append(text)
    return found


def _dense(root: Path, split: str, defects: Defects) -> dict[str, list[tuple[str, str]]]:
    """As `_plain`, with the one long caption of each image."""
    ids = list(dict.fromkeys(image_id for image_id, _ in _ids(root / f"{split}_ids.txt")))
    found: dict[str, list[tuple[str, str]]] = {image_id: [] for image_id in ids}
    for image_id, where, row in dense_rows(dense_file(root, split), ids):
        with defects.spared():
            if image_id not in found:
                raise InputError(f"{where}: image_id {image_id[:40]!r} is not in {split}_ids.txt; correct it")
            found[image_id].append((field(where, row, "text", str), where))
    return found


class CaptionFiles(RowReader):
    """Caption files; an image's id is that of the files."""

    signs = "test_caps.txt, test_ids.txt and the like, id_mapping.json"

    def holds(self, root: Path) -> bool:
        return any(path.name.endswith("_caps.txt") for path in listing(root))

    def check(self, root: str | Path) -> bool:
        folder_of(root, "folder of caption files")
        return False

    def splits(self, root: str | Path) -> list[str]:
        names = [path.name for path in listing(folder_of(root, "folder of caption files"))]
        plain = [name.removesuffix("_caps.txt") for name in names if name.endswith("_caps.txt")]
        return [*plain, *(DENSE + split for split in plain if any(name.endswith(f"_{split}.jsonl") for name in names))]

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        name, part = split_part(split)
        root = folder_of(root, "folder of caption files")
        if name not in (known := self.splits(root)):
            raise InputError(f"{root}: no split {name!r}; use one of {', '.join(known)}")
        dense = name.startswith(DENSE) and not is_file(root / f"{name}_caps.txt")
        texts = _dense(root, name.removeprefix(DENSE), defects) if dense else _plain(root, name)
        mapping = read_object(root / "id_mapping.json")
        image_ids = take_part(list(texts), part, split)[:limit_images]
        paths = {}
        for image_id in image_ids:
            with defects.spared():
                where = f"{root / 'id_mapping.json'}: id {one_line(image_id)[:40]!r}"
                paths[image_id] = _picture(root, field(where, mapping, image_id, str), where)
        lacking = [one_line(mapping[image_id])[:80] for image_id, path in paths.items() if path is None]
        defects.absent(root, lacking, len(image_ids), f"restore it in {_FOLDERS[0]}, here or beside this folder")
        records = []
        for image_id in image_ids:
            captions = []
            if not texts[image_id]:
                with defects.spared():
                    where = f"{root}: {name}: image {one_line(image_id)[:40]!r}"
                    raise InputError(f"{where} has no caption; write one, or take its id out")
            for text, where in texts[image_id]:
                with defects.spared():
                    if not text.strip():
                        raise InputError(f"{where}: empty caption; write one")
                    if len(text) > LONGEST_CAPTION:
                        length = f"{len(text):,} characters; {LONGEST_CAPTION:,} are the most"
                        defects.add(LONG_CAPTIONS, where, length)
                    captions.append(plain_caption(text))
            if paths.get(image_id) is not None:
                records.append(ImageRecord(image_id, paths[image_id], tuple(captions)))
        return records


def _picture(root: Path, name: str, where: str) -> Path | None:
    """Where an image's picture lies, if it is there."""
    places = (inside(base / folder, name, where) for base in (root, root.parent) for folder in _FOLDERS)
    return next(filter(is_file, places), None)
