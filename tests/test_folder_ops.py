"""A folder that is edited at random between runs of `index.py --sync`: each time the index equals one built anew.

500 operations, in runs of five between two runs of the index. SAMER_FOLDER_OPS: so many between two runs (1: each).
Permissions mean nothing to root, so the work is done in a child process, as nobody if this is root. Run as a script,
this file is that child.
"""

import collections
import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPERATIONS = 500
AT_A_TIME = int(os.environ.get("SAMER_FOLDER_OPS") or 5)
SEED = 14
ANCHOR = "anchor.png"  # stays, so that there is always a picture
NOBODY = 65534
KINDS = (
    *("add", "copy", "replace", "replace unseen", "spoil", "touch", "swap", "delete", "delete folder", "move"),
    *("rename", "rename folder", "case", "chmod", "chmod folder", "link file", "link folder", "dangle", "loop"),
)


class Folder:
    """A folder of small pictures, and the operations that people do to one."""

    def __init__(self, root, rng):
        self.root, self.rng, self.made = root, rng, 0
        self.counts = collections.Counter()
        root.mkdir()
        (root / "sub" / "deep").mkdir(parents=True)
        self.paint(root / ANCHOR)
        for place in (root, root / "sub", root / "sub" / "deep"):
            for number in range(3):
                self.paint(place / f"first{number}.bmp")

    def paint(self, path):
        """A picture of 16 to 32 points a side; a BMP's bytes go by its size alone."""
        from PIL import Image

        self.made += 1
        size = (16, 16) if path.suffix == ".bmp" else (self.rng.randrange(16, 33), self.rng.randrange(16, 33))
        rng = random.Random(self.made)
        picture = Image.frombytes("RGB", (2, 2), rng.randbytes(12)).resize(size, Image.Resampling.BICUBIC)
        picture.save(path)

    def entries(self):
        """(files, folders, links) that can be reached; no link is followed, and the anchor is nobody's."""
        files, folders, links = [], [], []
        for place, inner, names in os.walk(self.root):
            inner.sort()
            paths = [Path(place, name) for name in sorted([*inner, *names]) if name != ANCHOR]
            links += [path for path in paths if os.path.islink(path)]
            folders += [path for path in paths if not os.path.islink(path) and os.path.isdir(path)]
            files += [path for path in paths if not os.path.islink(path) and os.path.isfile(path)]
        return files, folders, links

    def step(self):
        """One operation that comes off; what the file system refuses is no operation."""
        while True:
            kind = self.rng.choice(KINDS)
            files, folders, links = self.entries()
            if len(files) > 40 and kind in ("add", "copy"):
                kind = "delete"
            try:
                if self.do(kind, files, folders, links):
                    self.counts[kind] += 1
                    return
            except OSError:
                pass

    def fresh(self, places, suffix=".png"):
        self.made += 1
        return self.rng.choice(places) / f"n{self.made}{suffix}"

    def do(self, kind, files, folders, links):
        """Does it; whether there was anything to do it to."""
        pick, places = self.rng.choice, [self.root, *folders]
        if kind == "add":
            if len(folders) < 5:
                places = [self.fresh(places, "")]
                places[0].mkdir()
            self.paint(self.fresh(places, pick([".png", ".bmp"])))
        elif kind == "copy":
            shutil.copy2(pick([*files, self.root / ANCHOR]), self.fresh(places))
        elif kind == "loop":
            self.fresh(places, "").symlink_to(pick(places), target_is_directory=True)
        elif kind == "dangle":
            self.fresh(places).symlink_to("nowhere.png")
        elif kind == "link file":
            self.fresh(places).symlink_to(pick([*files, self.root / ANCHOR]))
        elif kind == "move" and files:
            path = pick(files)
            target = pick(places) / path.name
            if target.exists():
                return False
            path.rename(target)
        elif kind in ("rename folder", "delete folder", "chmod folder", "link folder"):
            return bool(folders) and self.to_folder(kind, pick(folders), places)
        elif kind == "delete" and links and pick([True, False]):
            pick(links).unlink()
        else:
            return bool(files) and self.to_file(kind, pick(files), files)
        return True

    def to_folder(self, kind, path, places):
        if kind == "link folder":
            self.fresh(places, "").symlink_to(path, target_is_directory=True)
        elif kind == "chmod folder":
            path.chmod(0o755 if path.stat().st_mode & 0o777 != 0o755 else self.rng.choice([0o000, 0o444, 0o311]))
        elif kind == "rename folder":
            target = self.fresh([place for place in places if path not in (place, *place.parents)], "")
            path.rename(target)
        else:
            shutil.rmtree(path)
        return True

    def to_file(self, kind, path, files):
        about = path.stat()
        if kind == "rename":
            path.rename(path.with_name(f"r{self.made}é{path.suffix}"))
            self.made += 1
        elif kind == "case":
            path.rename(path.with_name(path.name.swapcase()))
        elif kind == "swap":
            other = self.rng.choice(files)
            if other.suffix != path.suffix or other == path:
                return False
            spare = path.with_name("spare")
            path.rename(spare)
            other.rename(path)
            spare.rename(other)
        elif kind == "delete":
            path.unlink()
        elif kind == "chmod":
            path.chmod(0o644 if not about.st_mode & 0o400 else 0)
        elif kind == "touch":
            os.utime(path, (self.made, self.made))
            self.made += 1
        elif kind == "spoil":
            path.write_bytes(path.read_bytes()[:40])
        else:
            self.paint(path)
            if kind == "replace unseen":  # the time that it had, and of a BMP the size
                os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
        return True

    def restore(self):
        """Lets everybody in, so that it can be removed."""
        for place, inner, _ in os.walk(self.root):
            for name in inner:
                if not os.path.islink(os.path.join(place, name)):
                    os.chmod(os.path.join(place, name), 0o777)


def contents_of(root):
    """Hashes of all pictures that can be read, whatever their names: what an index of the folder must know."""
    from PIL import Image

    found, seen = set(), {os.path.realpath(root)}
    for place, inner, names in os.walk(root, followlinks=True):
        inner[:] = [name for name in inner if os.path.realpath(os.path.join(place, name)) not in seen]
        seen |= {os.path.realpath(os.path.join(place, name)) for name in inner}
        for name in names:
            try:
                data = Path(place, name).read_bytes()
                Image.open(Path(place, name)).load()
            except (OSError, SyntaxError):
                continue
            found.add(hashlib.blake2b(data, digest_size=16).hexdigest())
    return found


class Indexes:
    """The index that is kept up to date, and those that are built anew beside it."""

    def __init__(self, place, base):
        from samer.index import settings
        from samer.index.read import Index
        from samer.retrievers.hf import Retriever
        from scripts import index

        self.place, self.base, self.open, self.main = place, base, Index, index.main
        retriever = Retriever.load(base)
        self.queries = retriever.encode_queries(retriever.query_inputs(["a red car", "two dogs", "snow"]))
        settings.open_encoder = functools.cache(settings.open_encoder)  # it takes longer than all the rest

    def sync(self, name, root=None):
        """Runs the script, on a folder at first; returns what it says of changes."""
        words = ["--cache-dir", str(self.place / name), "--sync", "--batch-size", "1"]  # one at a time: bytes compare
        words += ["--images", str(root), f"model.name={self.base}", "merge.num_regions=6"] if root else []
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.main(words)
        return said.getvalue()

    def state(self, name):
        """All that an index knows of its pictures, by id, and what it answers."""
        index = self.open(self.place / name)
        known, rows = index.contents("images"), {}
        names = [image for ids, *_ in index.images("images") for image in ids]
        assert len(names) == len(set(names)), names
        for image, number in index.numbers("images").items():
            each = index.vectors("images", number)
            tensors = [each.tokens, each.mask, each.regions]
            rows[image] = [known[image], each.grid, *(tensor.numpy().tobytes() for tensor in tensors)]
        return rows, index.search(self.queries, "images", 2 * len(rows))

    def check(self, root):
        """Holds the index against one built anew and against the folder; returns the pictures."""
        self.sync("anew", root)
        ours, theirs = self.state("kept"), self.state("anew")
        shutil.rmtree(self.place / "anew")
        assert ours[0].keys() == theirs[0].keys(), ours[0].keys() ^ theirs[0].keys()
        differ = [name for name in ours[0] if ours[0][name] != theirs[0][name]]
        assert not differ, differ
        assert ours[1] == theirs[1]
        for name, (content, *_) in ours[0].items():
            assert hashlib.blake2b((root / name).read_bytes(), digest_size=16).hexdigest() == content, name
        assert {row[0] for row in ours[0].values()} == contents_of(root)
        return len(ours[0])


class Cut(BaseException):
    """What a run is interrupted by."""


def cut_short(indexes, rng):
    """A run that is interrupted at a picture, if it comes to that."""
    from samer.index import sync

    original, left = sync.read_picture, rng.randrange(1, 8)

    def reading(*words, **named):
        nonlocal left
        left -= 1
        if not left:
            raise Cut
        return original(*words, **named)

    sync.read_picture = reading
    try:
        indexes.sync("kept")
    except Cut:
        return 1
    finally:
        sync.read_picture = original
    return 0


def child(place, base, at_a_time):
    """All of it; prints what was done as JSON."""
    sys.path.insert(0, str(ROOT))
    from samer.data import stamps
    from samer.index import pictures

    place, rng = Path(place), random.Random(SEED)
    pictures.PICTURES_PER_SHARD = 4
    stamps._RACY = 0  # so that remembered times are put to use; a run takes longer than a clock's step
    indexes = Indexes(place, base)
    warm = Folder(place / "warm", random.Random(0))
    for root in (warm.root, None):  # all modules are imported by now, also those that only root may read
        indexes.sync("warm index", root)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    folder, totals, done = Folder(place / "root", rng), collections.Counter(), 0
    indexes.sync("kept", folder.root)
    while done < OPERATIONS:
        for _ in range(min(at_a_time, OPERATIONS - done)):
            folder.step()
            done += 1
        if rng.random() < 0.1:
            totals["cut"] += cut_short(indexes, rng)
        said = indexes.sync("kept")
        totals.update({what: int(number) for number, what in re.findall(r"(\d+) (\w+)[,\n]", said)}, runs=1)
        if "--compact" in said:
            indexes.main(["--cache-dir", str(place / "kept"), "--compact"])
            totals["compacted"] += 1
        totals["pictures"] += indexes.check(folder.root)
    folder.restore()
    print(json.dumps({"operations": folder.counts, "totals": totals}))


def test_after_any_history_the_index_is_the_one_built_anew(base, command):
    place = Path(tempfile.mkdtemp())
    try:
        place.chmod(0o777)
        shutil.copytree(base, place / "retriever", copy_function=shutil.copyfile)
        done = command(sys.executable, __file__, place, place / "retriever", AT_A_TIME)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert sum(found["operations"].values()) == OPERATIONS
        assert set(found["operations"]) == set(KINDS)  # each came off
        totals = found["totals"]
        assert totals["runs"] == -(-OPERATIONS // AT_A_TIME)
        happened = ("new", "changed", "gone", "unchanged", "moved", "skipped", "compacted", "cut")
        assert all(totals[name] > 0 for name in happened), totals
    finally:
        shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
