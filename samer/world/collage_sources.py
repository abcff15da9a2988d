"""What collages are made of, found in folders: named cut-outs, photographs as backgrounds, and their licences."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from samer.config import InputError
from samer.data.pictures import PictureError, digest_of, displayed_size, find_pictures, load_image, one_line
from samer.runtime.files import is_dir, is_file, listing, opened, trouble
from samer.runtime.progress import Progress
from samer.world.collage_names import Name, parse_name

SOLID = 128  # alpha from which a pixel belongs to a thing
ENLARGED = 2.0  # how far a cut-out may be enlarged, by its sides
KEPT = 2.25  # a background's shorter side, at most, in sides of a scene
_LEAST_SOLID, _MOST_SOLID = 0.04, 0.97  # shares of the box around a cut-out
_MOST_FAINT = 0.5  # share of what is seen at all that may be half transparent
_MOST_FLAT = 0.35  # share of pixels like both neighbours from which a cut-out is a drawing
_SAME = 0.985  # correlation of two backgrounds that are one picture
_THUMB = 16
_VERSION = re.compile(r"[ _-]*\d{3,5}x\d{3,5}$")  # of one picture in several sizes: hills_1920x1080.jpg
_LICENCE = re.compile(
    r"(licen[cs]e|copying|copyright|authors|credits)s?([._-].*)?|metadata\.(json|desktop)", re.IGNORECASE
)
_TYPES = {"people": "people", "clothes": "clothing", "clothing": "clothing", "animals": "animals"}
_TYPES |= {"vehicles": "vehicles", "instruments": "instruments", "music": "instruments"}


@dataclass(frozen=True)
class Source:
    """A file within one of the folders given: the folder's number, and the path under it."""

    folder: int
    path: str


@dataclass(frozen=True)
class Cutout:
    """A thing that can be put into a scene.

    Attributes:
        source: where it is from.
        name: what it shows.
        kind: its type in Flickr30k-Entities, by its folders' names.
        image: its file, cut to what is seen and no larger than a scene.
        reach: the largest share of a scene that it can fill.
    """

    source: Source
    name: Name
    kind: str
    image: str
    reach: float


@dataclass(frozen=True)
class Background:
    """A photograph that scenes are cropped from; `image` is its file, reduced."""

    source: Source
    image: str


@dataclass(frozen=True)
class LeftOut:
    """A file that was not taken, and why: in a few words by which such files are counted, and in a line."""

    source: Source
    reason: str
    detail: str


@dataclass(frozen=True)
class Files:
    """The pictures of some folders, in order, their content's digest, and what was no picture to begin with."""

    folders: tuple[str, ...]
    found: tuple[Source, ...]
    digests: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    def path(self, source: Source) -> Path:
        """Where a file lies."""
        return Path(self.folders[source.folder]) / source.path


def find_files(folders: Iterable[str | Path], skip: Iterable[str] = ()) -> Files:
    """The pictures in some folders and below, apart from those that `skip` names.

    It holds patterns ("cartoon", "grave-*") of folders' names and of files' without their suffix, in any case. A file
    that has the content of one before it is left out.

    Raises:
        InputError: a folder that is missing or can't be read.
    """
    folders = tuple(str(folder) for folder in folders)
    skip = [word.casefold() for word in skip]
    found, digests, left_out = [], {}, []
    for number, folder in enumerate(folders):
        listed = find_pictures(folder)
        left_out += [LeftOut(Source(number, each.path), each.reason, each.detail) for each in listed.skipped]
        for path in listed.paths:
            source = Source(number, path)
            *parts, name = path.casefold().split("/")
            if any(fnmatchcase(part, word) for word in skip for part in (*parts, os.path.splitext(name)[0])):
                left_out.append(LeftOut(source, "skipped as asked", f"{path}: a part of its path is in --skip"))
                continue
            try:
                with opened(listed.root / path) as handle:
                    digest = digest_of(handle)
            except OSError as error:
                left_out.append(LeftOut(source, "can't be read", str(trouble(listed.root / path, error))))
                continue
            if digest in digests:
                left_out.append(LeftOut(source, "the same file again", f"{path}: as {digests[digest]}"))
                continue
            digests[digest] = path
            found.append(source)
    return Files(folders, tuple(found), tuple(digests), tuple(left_out))


def take_cutouts(files: Files, place: Path, size: int, pool: Executor) -> tuple[list[Cutout], list[LeftOut]]:
    """The pictures that can be put into scenes of `size` x `size` pixels, reduced and stored in a folder, in order."""
    return _taken(files, partial(_cutout, files, place, size), pool, "cut-outs")


def take_backgrounds(files: Files, place: Path, size: int, pool: Executor) -> tuple[list[Background], list[LeftOut]]:
    """The pictures that scenes of `size` x `size` pixels can be cropped from, reduced and stored in a folder, in order.

    Of one picture in several sizes, by their names or by what they show, only the largest is taken.
    """
    largest: dict[tuple, tuple[int, Source]] = {}
    left_out = []
    for source in files.found:
        try:
            width, height = displayed_size(files.path(source))
        except PictureError as error:
            left_out.append(LeftOut(source, error.reason, str(error)))
            continue
        if min(width, height) < size:
            text = f"{files.path(source)}: {width} x {height} pixels; a scene has {size} x {size}"
            left_out.append(LeftOut(source, "smaller than a scene", text))
            continue
        folder, _, name = source.path.rpartition("/")
        key = source.folder, folder, _VERSION.sub("", os.path.splitext(name)[0])
        if key in largest and width * height <= largest[key][0]:
            left_out.append(_again(source, largest[key][1]))
            continue
        if key in largest:
            left_out.append(_again(largest[key][1], source))
        largest[key] = width * height, source
    chosen = {source for _, source in largest.values()}
    kept = replace(files, found=tuple(source for source in files.found if source in chosen))
    taken, more = _taken(kept, partial(_background, kept, place, size), pool, "backgrounds")
    unlike: list[tuple[Background, np.ndarray]] = []
    for background, thumb in taken:
        like = next((other for other, seen in unlike if float((seen * thumb).mean()) > _SAME), None)
        if like is not None:
            more.append(_again(background.source, like.source))
        else:
            unlike.append((background, thumb))
    return [background for background, _ in unlike], [*left_out, *more]


def _again(source: Source, other: Source) -> LeftOut:
    return LeftOut(source, "the same picture again", f"{source.path}: as {other.path}")


def _taken(files: Files, look: Callable, pool: Executor, what: str) -> tuple[list, list[LeftOut]]:
    """What a function makes of each file, apart from those that it leaves out."""
    found = list(Progress(pool.map(look, range(len(files.found)), chunksize=4), what, len(files.found), unit="read"))
    return [each for each in found if not isinstance(each, LeftOut)], [e for e in found if isinstance(e, LeftOut)]


def _cutout(files: Files, place: Path, size: int, number: int) -> Cutout | LeftOut:
    source = files.found[number]
    path = files.path(source)
    try:
        name = _name_of(path)
        image = _with_alpha(path)
        alpha = np.asarray(image.getchannel("A"))
        _check_seen(path, image, alpha)
    except PictureError as error:
        return LeftOut(source, error.reason, str(error))
    if ((alpha > 8) & (alpha < 247)).sum() < 0.2 * _edge(alpha):  # cut with scissors: its rim shows what was around it
        image.putalpha(image.getchannel("A").filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(0.8)))
        alpha = np.asarray(image.getchannel("A"))
    image = image.crop(Image.fromarray(alpha > 8).getbbox())
    solid = int((alpha >= SOLID).sum())
    # enlarged so far at most, and no longer than a scene, with room to be turned
    factor = min(ENLARGED, 0.9 * size / max(image.size))
    image.thumbnail((size, size), Image.Resampling.BICUBIC)
    file = place / f"cutout{number:06d}.png"
    image.save(file, compress_level=1)
    folders = source.path.casefold().split("/")[:-1]
    kind = next((_TYPES[folder] for folder in folders if folder in _TYPES), "other")
    return Cutout(source, name, kind, str(file), factor**2 * solid / size**2)


def _edge(alpha: np.ndarray) -> int:
    """How many pixels of a thing have one beside them that is none of it."""
    solid = np.pad(alpha >= SOLID, 1)
    inner = solid[:-2, 1:-1] & solid[2:, 1:-1] & solid[1:-1, :-2] & solid[1:-1, 2:]
    return int((solid[1:-1, 1:-1] & ~inner).sum())


def _name_of(path: Path) -> Name:
    beside = path.with_suffix(".txt")
    if not is_file(beside):
        raise PictureError(f"{path}: no {beside.name} beside it; write what it shows on its first line", "no name")
    try:
        with opened(beside) as handle:
            line = handle.readline(10_000).removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        raise PictureError(str(trouble(beside, error)), "name can't be read") from None
    except UnicodeDecodeError:
        raise PictureError(f"{beside}: not UTF-8; save it as UTF-8", "name can't be read") from None
    name = parse_name(line)
    if name is None:
        text = f"{beside}: {one_line(line)[:80]!r} begins with no short name; write one, such as 'a red bus'"
        raise PictureError(text, "no name")
    return name


def _with_alpha(path: Path) -> Image.Image:
    displayed_size(path)  # says what is wrong with a file that is no picture
    try:
        with Image.open(path) as opened_:
            if not opened_.has_transparency_data:
                raise PictureError(f"{path}: no transparency; cut the thing out", "no transparency")
            return opened_.convert("RGBA")
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: not a readable image ({one_line(error)[:160]})", "damaged") from None


def _check_seen(path: Path, image: Image.Image, alpha: np.ndarray) -> None:
    """Raises PictureError for what is no cut-out of a photograph, by what is solid and how it is painted."""
    seen = alpha > 25
    box = Image.fromarray(seen).getbbox()
    solid = alpha >= SOLID
    share = solid.sum() / max(1, (box[2] - box[0]) * (box[3] - box[1])) if box else 0.0
    if share < _LEAST_SOLID or solid.sum() < 200:
        raise PictureError(f"{path}: hardly anything in it is solid", "hardly solid")
    if share > _MOST_SOLID:
        raise PictureError(f"{path}: a full rectangle; cut the thing out", "no transparency")
    if (seen & (alpha < 230)).sum() > _MOST_FAINT * seen.sum():
        raise PictureError(f"{path}: most of it is half transparent", "hardly solid")
    pixels = np.asarray(image)[..., :3]
    like, inner = np.ones(solid[1:, 1:].shape, bool), solid[1:, 1:].copy()
    for other in (np.s_[:-1, 1:], np.s_[1:, :-1]):
        like &= (pixels[1:, 1:] == pixels[other]).all(-1)
        inner &= solid[other]
    if (like & inner).sum() > _MOST_FLAT * inner.sum():
        raise PictureError(f"{path}: of flat colours, thus a drawing and no photograph", "a drawing")


def _background(files: Files, place: Path, size: int, number: int) -> tuple[Background, np.ndarray] | LeftOut:
    source = files.found[number]
    side = int(KEPT * size)
    try:
        image = load_image(files.path(source), (side, side))
    except PictureError as error:
        return LeftOut(source, error.reason, str(error))
    factor = side / min(image.size)
    if factor < 1:
        wide, high = (max(side, round(length * factor)) for length in image.size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC)
    thumb = np.asarray(image.convert("L").resize((_THUMB, _THUMB), Image.Resampling.BOX), dtype=np.float64)
    if thumb.std() < 2:
        return LeftOut(source, "of one colour", f"{files.path(source)}: of one colour, thus no photograph")
    file = place / f"background{number:06d}.png"
    image.save(file, compress_level=1)
    return Background(source, str(file)), (thumb - thumb.mean()) / thumb.std()


def find_licences(folder: str | Path) -> list[Path]:
    """Files that tell of licences: LICENSE, COPYING or copyright in a folder or below it, and a Debian package's own.

    The latter lies in usr/share/doc, where the folder is in that package's usr/share.
    """
    root = Path(folder).resolve()
    found = [Path(at) / name for at, _, names in os.walk(root) for name in names if _LICENCE.fullmatch(name)]
    for top in root.parents:
        if top.name == "usr" and root.is_relative_to(top / "share"):
            # where several packages are installed, those that list the folder
            known = top.parent / "var/lib/dpkg/info"
            lists = [path for path in (listing(known) if is_dir(known) else ()) if path.suffix == ".list"]
            line = f"/{root.relative_to(top.parent)}"
            owners = [path.stem.split(":")[0] for path in lists if line in path.read_text(errors="replace").split("\n")]
            documents = top / "share/doc"
            found += [
                path / "copyright"
                for path in (listing(documents) if is_dir(documents) else ())
                if not owners or path.name in owners
            ]
    return sorted({path for path in found if is_file(path)})


def check_folders(cutouts: Files, backgrounds: Files) -> None:
    """Raises InputError where there are no pictures to look at."""
    for files, what in ((cutouts, "cut-outs"), (backgrounds, "backgrounds")):
        if not files.found:
            raise InputError(
                f"{', '.join(files.folders)}: no pictures that could be {what} ({counted(files.left_out)}); "
                "name folders that hold some"
            )


def counted(left_out: Iterable[LeftOut], names: int = 0) -> str:
    """Left-out files by reason, the first `names` of each named; "nothing else there" where there are none."""
    reasons: dict[str, list[str]] = {}
    for each in left_out:
        reasons.setdefault(each.reason, []).append(each.source.path)
    told = []
    for reason, paths in sorted(reasons.items(), key=lambda item: -len(item[1])):
        more = ", ..." if len(paths) > names else ""
        told.append(f"{len(paths):,} {reason}" + (f" ({', '.join(paths[:names])}{more})" if names else ""))
    return "; ".join(told) or "nothing else there"
