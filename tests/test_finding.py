"""The pictures of a folder: which are taken, in which order, and what is said of all that is left out."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from samer.config import InputError
from samer.data import pictures
from samer.data.pictures import Found, find_pictures

ROOT = Path(__file__).resolve().parents[1]
READ = ["a.avif", "b.BMP", "c.gif", "d.JFIF", "e.jpe", "f.jpeg", "g.jpg", "h.png", "i.tif", "j.TIFF", "k.webp"]


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def reasons(found):
    """Reason by path; each is one printable line that names the file."""
    for each in found.skipped:
        assert each.detail.isprintable()
        assert "; " in each.detail or ": " in each.detail
        each.detail.encode()
    assert len({each.path for each in found.skipped}) == len(found.skipped)
    return {each.path: each.reason for each in found.skipped}


def test_what_is_named_like_a_picture_is_found_in_order(tmp_path):
    touch(tmp_path, *READ, "notes.txt", "jpg", "z/y/deep.jpg", "a/b.jpg", "a b.jpg", "film.mp4", "x.jpg/inner.png")
    found = find_pictures(tmp_path)
    assert found == Found(tmp_path, sorted([*READ, "z/y/deep.jpg", "a/b.jpg", "a b.jpg", "x.jpg/inner.png"]), [])
    assert find_pictures(str(tmp_path / "z" / ".." / "z")).root == tmp_path / "z"


def test_heic_is_found_or_said_with_the_remedy(tmp_path, monkeypatch):
    touch(tmp_path, "a.heic", "b.HEIF", "c.hif", "d.jpg")
    monkeypatch.setattr(pictures, "heic_is_read", lambda: True)
    assert find_pictures(tmp_path).paths == ["a.heic", "b.HEIF", "c.hif", "d.jpg"]
    monkeypatch.setattr(pictures, "heic_is_read", lambda: False)
    found = find_pictures(tmp_path)
    assert found.paths == ["d.jpg"]
    assert reasons(found) == dict.fromkeys(["a.heic", "b.HEIF", "c.hif"], "HEIC without pillow-heif")
    assert all("pip install pillow-heif" in each.detail and "samer[heic]" in each.detail for each in found.skipped)


def test_pictures_of_other_kinds_are_told(tmp_path):
    names = ["a.CR2", "b.dng", "c.nef", "d.psd", "e.svg", "f.jxl", "g.jp2", "h.pdf", "i.arw", "j.tga", "k.eps"]
    touch(tmp_path, *names, "ok.jpg", "ok.xmp", "ok.aae", "film.mov")
    found = find_pictures(tmp_path)
    assert found.paths == ["ok.jpg"]
    assert reasons(found) == {name: f"{Path(name).suffix.lower()} is not read" for name in names}


def test_what_systems_put_beside_pictures_is_told(tmp_path):
    touch(tmp_path, "ok.jpg", "._ok.jpg", "._notes.txt", ".hidden.jpg", ".album/ok.jpg")
    touch(
        tmp_path, "@eaDir/ok.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/._ok.jpg", ".thumbnails/a.png", "b/.Trash-1000/f.jpg"
    )
    touch(tmp_path, ".trashed-1700000000-a.jpg", ".pending-1700000000-b.jpg")
    touch(tmp_path, "c.jpg.part", "d.png.crdownload", "e.txt.part", ".f.HEIC.icloud", "g.jpg.tmp", "h.tmp")
    found = find_pictures(tmp_path)
    assert found.paths == [".album/ok.jpg", ".hidden.jpg", "ok.jpg"]
    folders = ["@eaDir", "__MACOSX", ".thumbnails", "b/.Trash-1000"]
    assert reasons(found) == {
        "._ok.jpg": "companion file of macOS",
        **dict.fromkeys(folders, "folder of a system's own"),
        ".trashed-1700000000-a.jpg": "trash or unfinished on a telephone",
        ".pending-1700000000-b.jpg": "trash or unfinished on a telephone",
        **dict.fromkeys(["c.jpg.part", "d.png.crdownload", "g.jpg.tmp"], "unfinished copy"),
        ".f.HEIC.icloud": "in the cloud only",
    }
    assert find_pictures(tmp_path / ".thumbnails").paths == ["a.png"]  # asked for by name


def test_links_are_followed_once(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    touch(root, "b/one.jpg", "b/in/two.jpg")
    touch(other, "three.jpg", "deep/four.jpg", "notes.txt")
    (root / "a").symlink_to(root / "b")  # before the real one in order, but not instead of it
    (root / "b" / "up").symlink_to(root)
    (root / "c").symlink_to(other)
    (root / "d").symlink_to(other)
    (other / "deep" / "self").symlink_to(other / "deep")
    (root / "five.jpg").symlink_to(other / "three.jpg")
    (root / "six.txt").symlink_to(other / "notes.txt")
    (root / "seven.jpg").symlink_to(other / "notes.txt")  # its name says picture; reading it will tell
    found = find_pictures(root)
    assert found.paths == ["b/in/two.jpg", "b/one.jpg", "c/deep/four.jpg", "c/three.jpg", "five.jpg", "seven.jpg"]
    assert reasons(found) == dict.fromkeys(["a", "b/up", "c/deep/self", "d"], "folder taken already")
    details = {each.path: each.detail for each in found.skipped}
    assert "taken as the folder itself" in details["b/up"]
    assert "taken as b" in details["a"]
    assert find_pictures(root / "a").root == root / "b"  # a link named by the caller is no link any more


def test_links_that_lead_nowhere(tmp_path):
    touch(tmp_path, "ok.jpg")
    for name in ("gone.jpg", "album", "2019.05", "notes.txt", "raw.cr2"):
        (tmp_path / name).symlink_to(tmp_path / "missing" / name)
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    (tmp_path / "through").symlink_to(tmp_path / "ok.jpg" / "x")  # through a file
    found = find_pictures(tmp_path)
    assert found.paths == ["ok.jpg"]
    nowhere = dict.fromkeys(["gone.jpg", "album", "2019.05", "raw.cr2", "through"], "link leads nowhere")
    assert reasons(found) == {**nowhere, "circle.jpg": "links lead in a circle"}
    with pytest.raises(InputError, match="circle"):
        find_pictures(tmp_path / "circle.jpg")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    os.mkfifo(tmp_path / "a.txt")
    assert reasons(find_pictures(tmp_path)) == {"a.jpg": "not a regular file"}


def test_folders_that_are_none(tmp_path):
    touch(tmp_path, "a.jpg")
    for name, words in (
        ("missing", "no such folder"),
        ("a.jpg", "no folder"),
        ("a.jpg/b", "no folder"),
        ("a\0b", "no such"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            find_pictures(f"{tmp_path}/{name}")
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    assert find_pictures(tmp_path / "empty") == Found(tmp_path / "empty", [], [])
    with pytest.raises(InputError, match="shorter name"):
        find_pictures(tmp_path / ("x" * 300))


def test_names_that_are_not_utf8(tmp_path):
    raw = os.fsencode(tmp_path)
    os.mkdir(raw + b"/b\xe4")
    for name in (b"a\xff.jpg", b"b\xe4/c.jpg", b"new\nline.jpg", b"c\xff.txt", "grün.jpg".encode()):
        with open(raw + b"/" + name, "wb"):
            pass
    found = find_pictures(tmp_path)
    assert found.paths == ["grün.jpg", "new\nline.jpg"]
    assert reasons(found) == dict.fromkeys(["a\udcff.jpg", "b\udce4/c.jpg"], "name is not UTF-8")
    assert any(r"b\xe4/c.jpg" in each.detail for each in found.skipped)
    with pytest.raises(InputError, match=r"b\\xe4: its name is not UTF-8"):
        find_pictures(os.fsdecode(raw + b"/b\xe4"))


def test_folders_deeper_than_python_calls():
    """In a folder that is removed here: pytest's own removal calls itself, a folder at a time."""
    place, here = tempfile.mkdtemp(), os.getcwd()
    try:
        os.chdir(place)
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("a.jpg").write_bytes(b"x")
        assert find_pictures(place).paths == ["/".join(["d"] * 1500 + ["a.jpg"])]
    finally:
        Path("a.jpg").unlink(missing_ok=True)
        while os.getcwd() != os.path.realpath(place):
            os.chdir("..")
            os.rmdir("d")
        os.chdir(here)
        os.rmdir(place)


CLOSED = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from samer.config import InputError
from samer.data.pictures import find_pictures, load_image
root = sys.argv[2]
os.chdir("/")
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
os.makedirs(root + "/in/closed")
os.makedirs(root + "/in/names")
for name in ("/in/closed/a.jpg", "/in/names/b.jpg", "/in/c.jpg", "/in/d.jpg"):
    open(root + name, "w").close()
os.symlink(root + "/in/closed/a.jpg", root + "/in/e.jpg")
os.chmod(root + "/in/closed", 0)
os.chmod(root + "/in/names", 0o444)  # names can be listed, not looked at
os.chmod(root + "/in/d.jpg", 0)
found = find_pictures(root + "/in")
said = {each.path: [each.reason, each.detail, each.transient] for each in found.skipped}
errors = []
for call in (lambda: load_image(root + "/in/d.jpg"), lambda: find_pictures(root + "/in/closed")):
    try:
        call()
    except InputError as error:
        errors.append([str(error), getattr(error, "reason", "")])
for name in ("closed", "names"):
    os.chmod(root + "/in/" + name, 0o755)
print(json.dumps([found.paths, said, errors]))
"""


def test_what_this_user_may_not_read():
    """In a process of nobody's, as root may read everything."""
    place = tempfile.mkdtemp()
    os.chmod(place, 0o777)
    words = [sys.executable, "-c", CLOSED, str(ROOT), place]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    shutil.rmtree(place, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    paths, said, errors = json.loads(done.stdout)
    assert [path for path in paths if path != "names/b.jpg"] == ["c.jpg", "d.jpg"]
    assert {path: reason for path, (reason, *_) in said.items()} == {
        "closed": "no permission",
        "e.jpg": "no permission",
        **({} if "names/b.jpg" in paths else {"names/b.jpg": "no permission"}),
    }
    assert all("allow this user" in detail and not transient for _, detail, transient in said.values())
    assert [reason for _, reason in errors] == ["no permission", ""]
    assert all("allow this user" in text for text, _ in errors)


def test_a_drive_that_does_not_answer_is_transient(tmp_path, monkeypatch):
    touch(tmp_path, "a/b.jpg", "c.jpg")
    scandir = os.scandir

    def answers(path):
        if str(path).endswith("/a"):
            raise OSError(116, "Stale file handle", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", answers)
    found = find_pictures(tmp_path)
    assert found.paths == ["c.jpg"]
    assert [(each.path, each.reason, each.transient) for each in found.skipped] == [
        ("a", "drive does not answer", True)
    ]
