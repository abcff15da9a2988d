"""Flickr30k-Entities on disk -> records: captions with phrases, boxes and image paths (METHOD section 8).

Everything read here comes from outside. What can't be read or understood is an `InputError` that names the file; what
is understood and wrong, such as a box outside its picture, is left out, counted and told (`samer.data.reader.Defects`).
"""

from __future__ import annotations

import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from samer.config import InputError
from samer.data.annotated import BAD_BOXES, LONG_CAPTIONS, boxes_fit
from samer.data.parts import split_part, take_part
from samer.data.pictures import one_line
from samer.data.reader import Defects, RowReader
from samer.data.records import LONGEST_CAPTION, Box, Caption, ImageRecord, Phrase
from samer.data.relevant import read_relevant
from samer.data.texts import read_bytes, read_lines
from samer.runtime.files import exists, lookup, trouble
from samer.runtime.progress import Progress

SPLITS = ("train", "val", "test")
IMAGE_FOLDERS = ("images/Images", "images", "Images", "flickr30k-images", "flickr30k_images")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")
CAPTIONS_PER_IMAGE = 5
UNRELATED = "UNRELATED_CAPTIONS"
_INVISIBLE = "\ufeff\u200b\u2060"  # left over by editors and joined files: a byte order mark, spaces of no width
_REMOVED = dict.fromkeys(map(ord, _INVISIBLE))
_OPENING = re.compile(r"\[/EN#([0-9]+)((?:/[^/\[\]]+)+)")  # `[/EN#283585/people/other`


# what is left out or doubted, as it is told at the end of a load
OTHER_NAME = "{files} annotations name another picture"
TWO_PICTURES = "{files} images are there with several suffixes, and the first of them is taken"


@dataclass(frozen=True, slots=True)
class FlickrLayout:
    """The folders of one copy of the data set; `annotations` and `unrelated` are None where the copy has none."""

    splits: Path
    sentences: Path
    images: Path
    annotations: Path | None
    unrelated: Path | None


def find_layout(root: str | Path) -> FlickrLayout:
    """Finds the folders of a Flickr30k-Entities copy under `root` (METHOD section 8).

    A leading `~` is the home folder: shells leave it alone within data.root=~/flickr.

    Raises InputError if `root` is no folder or a required one (splits, Sentences, images) is nowhere under it.
    """
    try:
        return _find_layout(lookup(os.path.expanduser(root)))
    except OSError as error:
        raise trouble(error.filename or root, error) from None


def _find_layout(root: Path) -> FlickrLayout:
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; point DATA_ROOT at the Flickr30k-Entities copy")

    bases = (root / "annotations", root)

    def first(paths, holds, what: str) -> Path:
        paths = list(paths)
        if found := next(filter(holds, paths), None):
            return found
        looked = ", ".join(str(path.relative_to(root)) for path in paths)
        raise InputError(f"{root}: no {what} (looked for: {looked}); point DATA_ROOT at the Flickr30k-Entities copy")

    def holds_images(folder: Path) -> bool:
        if not folder.is_dir():
            return False
        with os.scandir(folder) as entries:  # stops at the first image
            return any(entry.name.endswith(IMAGE_SUFFIXES) for entry in entries)

    split_file = first((base / f"{s}.txt" for base in bases for s in SPLITS), Path.is_file, "split file")
    return FlickrLayout(
        splits=split_file.parent,
        sentences=first((base / "Sentences" for base in bases), Path.is_dir, "Sentences folder"),
        images=first((root / name for name in IMAGE_FOLDERS), holds_images, "folder holding images"),
        annotations=next(filter(Path.is_dir, (base / "Annotations" for base in bases)), None),
        unrelated=next(filter(Path.is_file, (base / UNRELATED for base in bases)), None),
    )


def parse_sentence(line: str, boxes: Mapping[str, tuple[Box, ...]] | None = None) -> tuple[str, tuple[Phrase, ...]]:
    """Splits a marked sentence into its plain text and its phrases (METHOD section 8).

    `boxes` maps chain ids to boxes; phrases of chain 0 or type `notvisual` get none. Words are joined by single
    spaces. Raises InputError for an empty sentence and for malformed markup.
    """
    words: list[str] = []
    phrases: list[Phrase] = []
    length = 0  # of " ".join(words)
    opened = None  # chain id, types, index of the first word and its offset, inside a phrase
    for word in line.translate(_REMOVED).split():
        begin = length + 1 if words else 0
        if word.startswith("["):
            match = _OPENING.fullmatch(word)
            if opened or not match:
                why = "a phrase opens inside another" if opened else "expected [/EN#<number>/<type> <words>]"
                raise InputError(f"malformed markup at {word!r}: {why}; repair the sentence")
            opened = (match[1], tuple(match[2][1:].split("/")), len(words), begin)
            continue
        closes = word.endswith("]")
        plain = word[:-1] if closes else word
        if "[" in plain or "]" in plain or (closes and not opened):
            raise InputError(f"malformed markup at {word!r}: unbalanced bracket; repair the sentence")
        if plain:
            words.append(plain)
            length = begin + len(plain)
        if closes:
            chain_id, types, index, start = opened
            if index == len(words):
                raise InputError(f"malformed markup: phrase {chain_id} holds no words; repair the sentence")
            found = () if boxes is None or chain_id == "0" or "notvisual" in types else boxes.get(chain_id, ())
            phrases.append(Phrase(" ".join(words[index:]), chain_id, types, start, length, found))
            opened = None
    if opened:
        raise InputError(f"malformed markup: phrase {opened[0]} never closes (unbalanced bracket); repair the sentence")
    if not words:
        raise InputError("empty sentence; write a caption")
    return " ".join(words), tuple(phrases)


class _PlainTree(ET.TreeBuilder):
    """Refuses a DOCTYPE before its entities are read: annotation files never need one, attacks do."""

    def doctype(self, name, pubid, system) -> None:
        raise ET.ParseError("a DOCTYPE is not accepted")


def parse_annotation(
    path: str | Path, picture: Path | None = None, defects: Defects | None = None
) -> dict[str, tuple[Box, ...]]:
    """Reads one PASCAL VOC style file: chain id -> its boxes, normalised to [0, 1] (METHOD section 8).

    Pixels are 1-based and inclusive, so x1 = (xmin - 1) / width and x2 = xmax / width; a coordinate one pixel outside
    is clamped. A box with xmax < xmin is left out like an empty one: which of its four numbers is wrong isn't known.

    Args:
        path: of the file.
        picture: where it lies, to see whether it has the shape and the name of what was annotated; None: not looked at.
        defects: gets the boxes that are empty, inverted or outside the image; None: they are refused.

    Raises InputError for a missing or malformed file: how much of it is missing is not known.
    """
    defects = Defects(strict=True) if defects is None else defects
    tree = _read_xml(path)
    size = tree.find("size")
    if size is None:
        raise InputError(f"{path}: no size element; restore the file")
    width, height = _number(path, size, "width", "size"), _number(path, size, "height", "size")
    if width < 1 or height < 1:
        raise InputError(f"{path}: image size is {width:g} x {height:g}; restore the file")

    chains: dict[str, list[Box]] = {}
    for index, obj in enumerate(tree.iterfind("object"), start=1):
        names = [(name.text or "").strip() for name in obj.iterfind("name")]
        where = f"object {index} (chain {'/'.join(map(one_line, names))})"
        if not names or "" in names:
            raise InputError(f"{path}: {where} has no name; restore the file")
        bounds = obj.findall("bndbox")
        if not bounds and obj.find("scene") is None and obj.find("nobndbox") is None:
            raise InputError(f"{path}: {where} has neither bndbox nor scene or nobndbox; restore the file")
        for bound in bounds:
            box = xmin, ymin, xmax, ymax = [
                _number(path, bound, tag, where) for tag in ("xmin", "ymin", "xmax", "ymax")
            ]
            x1, y1, x2, y2 = max(xmin, 1), max(ymin, 1), min(xmax, width), min(ymax, height)
            outside = min(xmin, ymin) < 0 or xmax > width + 1 or ymax > height + 1
            if outside or x2 < x1 or y2 < y1:
                shown = ", ".join(f"{value:g}" for value in box)
                why = "outside" if outside else "empty or inverted in"
                message = f"{where}: box ({shown}) is {why} the image of {width:g} x {height:g} pixels; correct it"
                defects.add(BAD_BOXES, path, message)
                continue
            normalised = ((x1 - 1) / width, (y1 - 1) / height, x2 / width, y2 / height)
            for name in names:
                chains.setdefault(name, []).append(normalised)
    if chains and picture is not None and not _fits(path, tree, picture, (width, height), defects):
        return {}
    return {name: tuple(boxes) for name, boxes in chains.items()}


def _read_xml(path: str | Path) -> ET.Element:
    content = read_bytes(path)
    if not content.strip():
        raise InputError(f"{path}: malformed XML (the file is empty); restore the file")
    try:
        return ET.XML(content, ET.XMLParser(target=_PlainTree()))
    except (ET.ParseError, LookupError, ValueError) as error:
        raise InputError(f"{path}: malformed XML ({one_line(error)}); restore the file") from error


def _number(path: str | Path, parent: ET.Element, tag: str, where: str) -> float:
    text = parent.findtext(tag, "").strip()
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise InputError(f"{path}: {where}: {tag} is {text!r}, not a number; restore the file")
    return value


def _fits(path: str | Path, tree: ET.Element, picture: Path, annotated: tuple[float, float], defects: Defects) -> bool:
    """Whether boxes can be used on a picture; what speaks against it goes to `defects`.

    The size must be that of the picture as it is displayed, since that is how it is decoded: an annotation of the
    stored pixels of a picture that EXIF turns by 90 degrees has another shape. A copy scaled or rounded by two pixels
    has the same. A name that differs is told only: boxes belong to phrases by the numbers of chains, which no two
    pictures share.
    """
    named = tree.findtext("filename", "").strip().replace("\\", "/").rpartition("/")[2]
    if named and Path(named).stem != picture.stem and named != picture.stem:
        message = f"it names the picture {one_line(named)}, not {picture.name}; restore the file"
        defects.add(OTHER_NAME, path, message)
    return boxes_fit(path, picture, annotated, defects)


def load_split(
    root: str | Path, split: str, *, boxes: bool, limit_images: int | None = None, strict: bool = False
) -> list[ImageRecord]:
    """Reads the records of a split, or a part of it, in the order of its file, the first `limit_images` if given.

    Source: METHOD section 8; parts as `samer.data.parts` reads them.

    With `boxes=False` the Annotations folder is neither opened nor required. What is left out or doubted is told at the
    end, a line per kind, or, if `strict`, refused.

    Raises InputError for anything missing or malformed, naming the file.
    """
    return Flickr().load_split(root, split, boxes=boxes, limit_images=limit_images, strict=strict)


def _read(root: str | Path, split: str, boxes: bool, limit_images: int | None, defects: Defects) -> list[ImageRecord]:
    name, part = split_part(split)
    layout = find_layout(root)
    if boxes and layout.annotations is None:
        raise InputError(
            f"{root}: no Annotations folder (looked for: annotations/Annotations, Annotations); restore it"
        )
    try:
        names = set(os.listdir(layout.images))  # listed once: 30,000 stats are slow on a network disk
    except OSError as error:
        raise trouble(layout.images, error) from None
    image_ids = take_part(_read_ids(layout.splits, name, names, defects), part, split)[:limit_images]
    image_paths = _match_images(image_ids, layout.images, names, defects)
    unrelated = _read_unrelated(layout.unrelated, defects) if layout.unrelated else frozenset()

    records = []
    for image_id in Progress(image_ids, f"reading {split}") if len(image_ids) > 2000 else image_ids:
        picture, chains, captions = image_paths.get(image_id), None, []  # None only where defects are collected
        if boxes:
            with defects.spared():
                chains = parse_annotation(layout.annotations / f"{image_id}.xml", picture, defects)
        with defects.spared():
            captions = _read_captions(layout.sentences / f"{image_id}.txt", chains, defects)
            if len(captions) != CAPTIONS_PER_IMAGE:
                raise InputError(
                    f"{layout.sentences / f'{image_id}.txt'}: {len(captions)} captions, expected exactly "
                    f"{CAPTIONS_PER_IMAGE}; restore the file"
                )
        related = [(image_id, number) not in unrelated for number in range(1, len(captions) + 1)]
        captions = tuple(replace(caption, related=each) for caption, each in zip(captions, related))
        if picture is not None:
            records.append(ImageRecord(image_id, picture, captions))
    return records


def _read_captions(path: Path, chains: Mapping[str, tuple[Box, ...]] | None, defects: Defects) -> list[Caption]:
    """The captions of one image, all taken as related; `chains` as in `parse_sentence`."""
    captions = []
    for number, line in enumerate(read_lines(path), start=1):
        with defects.spared():
            try:
                caption = Caption(*parse_sentence(line, chains), related=True)
            except InputError as error:
                raise InputError(f"{path}: line {number}: {error}") from error
            if len(caption.text) > LONGEST_CAPTION:
                length = f"a caption of {len(caption.text):,} characters; {LONGEST_CAPTION:,} are the most"
                defects.add(LONG_CAPTIONS, path, f"line {number}: {length}")
            captions.append(caption.within(LONGEST_CAPTION))
    return captions


def _read_ids(folder: Path, split: str, names: Set[str], defects: Defects) -> list[str]:
    """The ids of a split; those written with the suffix of a picture that is there (`names`) are read without."""
    splits = {path.stem for path in folder.glob("*.txt")}
    if split not in splits:
        raise InputError(f"{folder}: no split {split!r}; use one of {', '.join(sorted(splits))}")
    path = folder / f"{split}.txt"
    seen: dict[str, int] = {}
    for number, line in enumerate(read_lines(path), start=1):
        image_id = line.strip().strip(_INVISIBLE).strip()
        if not image_id:
            continue
        with defects.spared():
            if not _bare(image_id):
                raise InputError(f"{path}: line {number}: {image_id!r} is not an image id; write one bare id per line")
            if image_id.lower().endswith(IMAGE_SUFFIXES) and not _pictures(image_id, names):
                image_id = image_id.rpartition(".")[0]
            if image_id in seen:
                raise InputError(f"{path}: line {number}: {image_id!r} is also on line {seen[image_id]}; remove one")
            seen[image_id] = number
    if not seen:
        raise InputError(f"{path}: zero images; write one id per line")
    return list(seen)


def _bare(image_id: str) -> bool:
    """Whether an id names files of the data set's folders, and of no others."""
    return not (image_id.startswith(".") or ".." in image_id or any(letter in image_id for letter in "/\\\0"))


def _pictures(image_id: str, names: Set[str]) -> list[str]:
    """The files of an image among `names`."""
    return [image_id + suffix for suffix in IMAGE_SUFFIXES if image_id + suffix in names]


def _match_images(image_ids: list[str], folder: Path, names: Set[str], defects: Defects) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    absent: list[str] = []
    for image_id in image_ids:
        found = _pictures(image_id, names)
        if not found:
            absent.append(image_id)
            continue
        paths[image_id] = folder / found[0]
        if len(found) > 1:
            defects.add(TWO_PICTURES, paths[image_id], f"{', '.join(found[1:])} is there, too; remove one")
    remedy = "restore it or take the id out of the split"
    if defects.collect:
        defects.absent(folder, [f"{one_line(image_id)}.jpg" for image_id in absent], len(image_ids), remedy)
    elif absent:
        like = [name for name in names if Path(name).stem.casefold() == absent[0].casefold()]
        hint = f" (there is {one_line(min(like))})" if like else ""
        raise InputError(
            f"{folder}: {len(absent)} of {len(image_ids)} images are absent, the first is {one_line(absent[0])}.jpg"
            f"{hint}; restore them or take the ids out of the split"
        )
    return paths


def _read_unrelated(path: Path, defects: Defects) -> frozenset[tuple[str, int]]:
    """Pairs (image id, sentence number from 1); a file that holds a 0 counts from 0."""
    pairs: list[tuple[str, int]] = []
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if not fields or (number == 1 and not fields[-1].isdecimal()):  # blank, or a heading
            continue
        with defects.spared():
            if len(fields) != 2 or not re.fullmatch("[0-5]", fields[1]):
                raise InputError(f"{path}: line {number}: expected <id> <sentence number>, not {line!r}; correct it")
            pairs.append((fields[0], int(fields[1])))
    numbers = {sentence for _, sentence in pairs}
    if {0, 5} <= numbers:
        raise InputError(f"{path}: sentence numbers run from 0 to 5 for five captions; count from 0 or from 1")
    shift = 1 if 0 in numbers else 0
    return frozenset((image_id, sentence + shift) for image_id, sentence in pairs)


class Flickr(RowReader):
    """Flickr30k-Entities (METHOD section 8)."""

    signs = "annotations/{train,val,test}.txt, annotations/Sentences"

    def holds(self, root: Path) -> bool:
        bases = (root / "annotations", root)
        if any(exists(base / name) for base in bases for name in ("Sentences", "Annotations", UNRELATED)):
            return True
        both = exists(root / "images") and exists(root / "annotations")
        names = [base / split for base in bases for split in SPLITS]
        return any(exists(f"{name}.txt") and (both or not exists(f"{name}.jsonl")) for name in names)

    def splits(self, root: str | Path) -> list[str]:
        found = {path.stem for path in find_layout(root).splits.glob("*.txt")}
        return [split for split in SPLITS if split in found]

    def read(
        self, root: str | Path, split: str, *, boxes: bool, limit_images: int | None, defects: Defects
    ) -> list[ImageRecord]:
        return _read(root, split, boxes, limit_images, defects)

    def check(self, root: str | Path) -> bool:
        return find_layout(root).annotations is not None

    def relevant(self, root: str | Path) -> dict[str, list[list[str]]]:
        """From `relevant.json` beside the split files; Flickr30k-Entities has none, generated data may."""
        return read_relevant(find_layout(root).splits / "relevant.json")

    def find(self, root: str | Path, split: str, image_id: str) -> ImageRecord | None:
        """As `Reader.find`, from the image's own files; where one is missing, what it would say is left out.

        An id comes from an index, thus from outside: one that is no bare name has no files here.
        """
        if not _bare(image_id):
            return None
        layout = find_layout(root)
        paths = (layout.images / f"{image_id}{suffix}" for suffix in IMAGE_SUFFIXES)
        path = next(filter(os.path.isfile, paths), None)  # False, where Path.is_file raises, for a name too long
        if path is None:
            return None
        chains, untold = None, Defects()  # whoever asks for one picture has no use for the lines of a load
        if layout.annotations and os.path.isfile(annotation := layout.annotations / f"{image_id}.xml"):
            chains = parse_annotation(annotation, path, untold)
        sentences = layout.sentences / f"{image_id}.txt"
        captions = _read_captions(sentences, chains, untold) if os.path.isfile(sentences) else []
        return ImageRecord(image_id, path, tuple(captions))
