"""Picture files: found in a folder, and read as RGB images as they are displayed, or an error that names the file.

What is read, and how, stands in `samer.data.decoding`. Found is what is named like a picture, in subfolders and linked
folders too. Whatever else is a picture by its name, or may hold some, is listed with the reason why it was not taken:
pictures of kinds that are not read here, folders and files that can't be reached, links that lead nowhere or to what
was taken already, thumbnails and trash that systems keep beside pictures, unfinished copies. Hidden files and folders
are taken like others, but for these.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from samer.config import InputError
from samer.data.decoding import FORMATS as FORMATS
from samer.data.decoding import HEIC_REMEDY, NO_HEIC, RefusedError, decode, displayed, heic_is_read
from samer.data.decoding import limit_pixels as limit_pixels
from samer.runtime.files import TRANSIENT, trouble


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SUFFIXES = _words(".avif .bmp .gif .jfif .jpe .jpeg .jpg .png .tif .tiff .webp")
HEIC_SUFFIXES = _words(".heic .heif .hif")
# pictures, too, but of kinds that are not read here: of cameras, of drawing programs, of other standards
OTHER_SUFFIXES = _words(
    ".3fr .arw .cr2 .cr3 .crw .dcr .dng .erf .fff .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl "
    ".sr2 .srf .srw .x3f .ai .cdr .djvu .emf .eps .kra .pdf .ps .psb .psd .svg .svgz .wmf .xcf .dcm .dds .exr .fits "
    ".hdr .icns .ico .j2k .jp2 .jpf .jpx .jxl .jxr .pbm .pcx .pgm .pnm .ppm .qoi .tga .wdp"
)
_PICTURES = SUFFIXES | HEIC_SUFFIXES | OTHER_SUFFIXES
_UNFINISHED = _words(".crdownload .download .filepart .opdownload .part .partial .tmp")  # behind a picture's suffix
# folders that systems and programs make beside pictures, in small letters
_SYSTEM_FOLDERS = _words(
    "__macosx @eadir .@__thumb .thumbnails .thumb .thumbs $recycle.bin #recycle .trash .trashes .dtrash "
    ".picasaoriginals .spotlight-v100 .documentrevisions-v100 .fseventsd .temporaryitems"
)


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was not taken, and why.

    Attributes:
        path: under the folder of pictures, as it would be an id; names that are no UTF-8 hold lone surrogates.
        reason: its kind in a few words, by which such files are counted, such as "no permission".
        detail: one line that says what is wrong with this one and what to do.
        transient: it may be well again by itself (a drive that does not answer); an index keeps what it has of it, and
            where it is a folder, of everything below it.
    """

    path: str
    reason: str
    detail: str
    transient: bool = False


@dataclass(frozen=True)
class Found:
    """The pictures of a folder: its real path, ids (paths under it, "/" between, in order), and what was not taken."""

    root: Path
    paths: list[str]
    skipped: list[Skipped]


class PictureError(InputError):
    """A picture that can't be read; `reason` and `transient` as in `Skipped`.

    Made of its message alone by torch, which brings it out of a data loader's worker.
    """

    def __init__(self, message: str, reason: str = "can't be read", transient: bool = False) -> None:
        super().__init__(message)
        self.reason, self.transient = reason, transient

    def skipped(self, path: str) -> Skipped:
        """As it is listed; `path`: the picture's id."""
        return Skipped(path, self.reason, str(self), self.transient)


@dataclass(frozen=True)
class Picture:
    """A picture as read: RGB, the content hash of the file it was decoded from, and that file's stat before it."""

    image: Image.Image
    content: str
    about: os.stat_result


def load_image(path: str | Path, needs: tuple[int, int] | None = None, *, inside: bool = False) -> Image.Image:
    """Opens an image as it is displayed, as 8-bit RGB: EXIF rotation applied, transparency over white, 16 bits scaled.

    Args:
        path: the file.
        needs: (width, height) that it will be scaled to; a larger one may come reduced, each side by itself and to no
            less than twice that. None: as it is.
        inside: it will be scaled to fit inside `needs` instead, and is reduced in its own shape.

    Raises:
        PictureError: missing, no image, damaged, of floating-point pixels, or of too many.
    """
    with _opened(path) as handle:
        return decode(handle, needs, inside=inside)


def displayed_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as `load_image` shows it, by its headers alone.

    Raises:
        PictureError: as `load_image`, as far as headers tell.
    """
    with _opened(path) as handle:
        return displayed(handle)


def read_picture(path: str | Path, needs: tuple[int, int] | None = None) -> Picture:
    """As `load_image`, with the content hash of the very bytes that were decoded.

    A file that changes meanwhile is read once more.

    Raises:
        PictureError: as `load_image`; a file that goes on changing.
    """
    for _ in range(2):
        with _opened(path) as handle:
            about, failed = os.fstat(handle.fileno()), None
            content = digest_of(handle)
            try:
                image = decode(handle, needs)
            except RefusedError as error:  # of a file that is half written, perhaps
                failed = error
            if state_of(os.fstat(handle.fileno())) == state_of(about):
                if failed:
                    raise failed
                return Picture(image, content, about)
    raise PictureError(f"{path}: it is being written; run again when it is complete", "being written", transient=True)


def file_bytes(path: str | Path) -> bytes:
    """What a picture's file holds; raises as `load_image`, but for what is in it."""
    with _opened(path) as handle:
        return handle.read()


def picture_of(name: str, content: bytes, needs: tuple[int, int] | None = None) -> tuple[Image.Image, str]:
    """As `read_picture`, of a file's bytes: the image and their content hash; `name` is for messages.

    Raises:
        PictureError: as `load_image`.
    """
    handle = io.BytesIO(content)
    try:
        return decode(handle, needs), digest_of(handle)
    except RefusedError as error:
        raise PictureError(f"{_shown(name)}: {error}", error.reason) from error


def digest_of(handle: BinaryIO) -> str:
    """The content hash of an open file from its start on: BLAKE2b of 16 bytes, 32 hexadecimal digits."""
    handle.seek(0)
    return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def state_of(about: os.stat_result) -> list[int]:
    """By what a file that was touched is told: bytes, time of change and time of its inode's change, both in ns."""
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]


@contextmanager
def _opened(path: str | Path) -> Iterator[BinaryIO]:
    """The file, open; whatever goes wrong with it names it."""
    try:
        regular_file(path)
        with open(path, "rb") as handle:
            yield handle
    except RefusedError as error:
        raise PictureError(f"{_shown(path)}: {error}", error.reason) from error
    except OSError as error:
        raise _refused(path, error) from error
    except ValueError as error:  # a zero in the name
        if isinstance(error, InputError):
            raise
        raise PictureError(f"{_shown(path)}: no name of a file; rename it", "no name of a file") from None


def _refused(path: str | Path, error: OSError) -> PictureError:
    """What the file system said of a picture, or of a folder of them."""
    number = error.errno
    if number in (errno.ENOENT, errno.ENOTDIR):
        return PictureError(f"{_shown(path)}: no such image; restore it", "gone")
    if number in TRANSIENT:
        return PictureError(str(trouble(_shown(path), error)), "drive does not answer", transient=True)
    reasons = {
        errno.EACCES: "no permission",
        errno.EPERM: "no permission",
        errno.EINVAL: "not a regular file",
        errno.ELOOP: "links lead in a circle",
        errno.ENAMETOOLONG: "name too long",
    }
    return PictureError(str(trouble(_shown(path), error)), reasons.get(number, "can't be read"))


def find_pictures(folder: str | Path) -> Found:
    """All that is named like a picture under a folder, in subfolders and linked folders too; nothing is opened.

    A folder that several ways lead to is taken once: where it really lies, if that is within, so that a new link
    changes no id; else by the first link in order.

    Raises:
        InputError: no such folder, no folder, one that can't be listed, or whose name is not UTF-8.
    """
    try:
        root = Path(folder).resolve(strict=True)
        entries = _listed(root)
    except (FileNotFoundError, ValueError):
        raise InputError(f"{_shown(folder)}: no such folder; name one that holds pictures") from None
    except NotADirectoryError:
        raise InputError(f"{_shown(folder)}: it is no folder; name one that holds pictures") from None
    except (OSError, RuntimeError) as error:  # Python 3.11 and 3.12 say RuntimeError of links in a circle
        known = error if isinstance(error, OSError) else OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        raise trouble(_shown(folder), known) from None
    if not _is_utf8(str(root)):
        raise InputError(f"{_shown(root)}: its name is not UTF-8, which an index can't note; rename it")
    walk = _Walk()
    walk.folder("", str(root), entries)
    return Found(root, sorted(walk.paths), sorted(walk.skipped, key=lambda each: each.path))


class _Walk:
    """What was found so far."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.skipped: list[Skipped] = []
        self.taken: dict[tuple[int, int], str] = {}  # folders by device and inode, and the id each was taken by
        self.links: list[tuple[str, os.DirEntry]] = []  # to folders, which come after all that is really there

    def folder(self, name: str, path: str, entries: list[os.DirEntry]) -> None:
        """Takes a folder and all below it, in order, then what its links lead to."""
        about = os.stat(path)
        self.taken[about.st_dev, about.st_ino] = name
        self._below(name, entries)
        while self.links:
            links, self.links = sorted(self.links, key=lambda link: link[0]), []
            for own, entry in links:
                inner = self._inner(own, entry)
                if inner is not None:
                    self._below(own, inner)

    def _below(self, name: str, entries: list[os.DirEntry]) -> None:
        """Takes what a folder holds; without recursion, as folders may lie deeper than Python calls."""
        stack = [(name, iter(entries))]
        while stack:
            name, rest = stack[-1]
            for entry in rest:
                own = f"{name}/{entry.name}" if name else entry.name
                inner = self._entry(own, entry)
                if inner is not None:
                    stack.append((own, iter(inner)))
                    break
            else:
                stack.pop()

    def _skip(self, name: str, path: str, reason: str, text: str) -> None:
        self.skipped.append(Skipped(name, reason, f"{_shown(path)}: {text}"))

    def _entry(self, name: str, entry: os.DirEntry) -> list[os.DirEntry] | None:
        """Notes what a folder holds; returns the entries of a folder that is to be taken."""
        kind, regular = _picture_suffix(entry.name), True
        try:
            if entry.is_dir() and entry.is_symlink():
                self.links.append((name, entry))
                return None
            if entry.is_dir():
                return self._inner(name, entry)
            if kind or entry.is_symlink():
                regular = entry.is_file()
                if not regular and entry.is_symlink():
                    os.stat(entry.path)  # says why
        except OSError as error:
            failed = _refused(entry.path, error)
            if not kind and _looks_like_file(entry.name):
                pass
            elif failed.reason == "gone":
                self._skip(name, entry.path, "link leads nowhere", "restore what it names, or remove it")
            else:
                self.skipped.append(failed.skipped(name))
            return None
        if kind:
            self._file(name, entry.path, kind, regular)
        return None

    def _inner(self, name: str, entry: os.DirEntry) -> list[os.DirEntry] | None:
        if entry.name.lower() in _SYSTEM_FOLDERS or entry.name.lower().startswith(".trash-"):
            text = "thumbnails, trash or notes of a system or program; move pictures out of it to have them read"
            self._skip(name, entry.path, "folder of a system's own", text)
            return None
        try:
            about = os.stat(entry.path)
            before = self.taken.get((about.st_dev, about.st_ino))
            if before is not None:
                where = before or "the folder itself"
                self._skip(name, entry.path, "folder taken already", f"it leads to what was taken as {_shown(where)}")
                return None
            entries = _listed(entry.path)
        except OSError as error:
            self.skipped.append(_refused(entry.path, error).skipped(name))
            return None
        self.taken[about.st_dev, about.st_ino] = name
        return entries

    def _file(self, name: str, path: str, suffix: str, regular: bool) -> None:
        """Takes a file that is named like a picture, or says why not."""
        base = os.path.basename(path).lower()
        if not _is_utf8(name):
            self._skip(name, path, "name is not UTF-8", "an index can't note it; rename it")
        elif base.startswith("._"):
            self._skip(name, path, "companion file of macOS", "it holds no picture, the file without ._ does")
        elif base.startswith((".trashed-", ".pending-")):
            self._skip(name, path, "trash or unfinished on a telephone", "rename it to have it read")
        elif suffix in _UNFINISHED:
            self._skip(name, path, "unfinished copy", "let the download or copy end")
        elif suffix == ".icloud":
            self._skip(name, path, "in the cloud only", "download it")
        elif suffix in OTHER_SUFFIXES:
            self._skip(name, path, f"{suffix} is not read", "turn it into JPEG or PNG to have it read")
        elif suffix in HEIC_SUFFIXES and not heic_is_read():
            self._skip(name, path, NO_HEIC, HEIC_REMEDY)
        elif not regular:
            self._skip(name, path, "not a regular file", "a pipe, a device or a socket")
        else:
            self.paths.append(name)


def _picture_suffix(name: str) -> str:
    """The suffix in small letters of a file that is named like a picture of any kind; else nothing.

    Of unfinished copies and of what lies in a cloud, the suffix behind the picture's.
    """
    base, suffix = os.path.splitext(name.lower())
    if suffix in _UNFINISHED or suffix == ".icloud":
        return suffix if os.path.splitext(base)[1] in _PICTURES else ""
    return suffix if suffix in _PICTURES else ""


def _looks_like_file(name: str) -> bool:
    """Whether a link that leads nowhere is of a file, by its suffix; without one it may be a folder's."""
    suffix = os.path.splitext(name)[1]
    return 1 < len(suffix) <= 6 and suffix[1].isalpha() and suffix[1:].isalnum()


def _listed(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(path: str | Path) -> str:
    """A path that can be printed on one line: bytes that are no UTF-8, and control characters, are escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def regular_file(path: str | Path) -> None:
    """Refuses what would be waited for or read without end: a pipe, a device, a socket; says so by OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def one_line(value: object) -> str:
    return " ".join(str(value).split())
