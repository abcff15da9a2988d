"""What the file system refuses, door by door: one line with the reason and what to do, never "damaged" or "missing"."""

import ast
import builtins
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from samer.compare.indexes import read_metrics
from samer.config import InputError, MergeConfig
from samer.data.pictures import find_pictures
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index import write as index_write
from samer.index.read import Index
from samer.index.sync import update_images
from samer.index.verify import verify
from samer.index.write import build_index
from samer.report.evaluate import evaluate_index
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.identity import fingerprint
from samer.retrievers.projectors import load_projector, read_projector, save_projector
from samer.runtime import commands, files, shards
from samer.search.models import Models
from samer.search.open_index import SearchIndex
from samer.settings import load_yaml
from samer.tokens import QueryTokens
from samer.training import checkpoints
from samer.world.write import write_world

ROOT = Path(__file__).resolve().parents[1]
MERGE = MergeConfig(num_regions=4)
# what a person can do, by what the file system says; written apart from the code's own table
REMEDY = {
    errno.EACCES: "allow this user",
    errno.EPERM: "allow this user",
    errno.ENAMETOOLONG: "shorter name",
    errno.ELOOP: "links lead in a circle",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
    errno.EHOSTDOWN: "check the connection",
    errno.ETIMEDOUT: "check the connection",
    errno.EIO: "the disk or its connection fails",
    errno.EMFILE: "ulimit -n",
    errno.ENOMEM: "close what is not needed",
}
FULL = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "read-only", errno.EFBIG: "ulimit -f"}
names = pytest.mark.parametrize("number", REMEDY, ids=errno.errorcode.get)
to_write = pytest.mark.parametrize("number", {**REMEDY, **FULL}, ids=errno.errorcode.get)
# what must not be said of a file that merely can't be read
WRONG = re.compile(
    r"damaged|anew|remove|again to|build|no finished|no such|contents differ|not a readable|another model"
)


@pytest.fixture(scope="module")
def made(base, world, tmp_path_factory):
    """One of everything that is read: an index, a feature store, a projector, a run's checkpoint, a model."""
    folder, retriever = tmp_path_factory.mktemp("made"), Retriever.load(str(base))
    build_index(folder / "index", world, ["test"], retriever, MERGE, dtype="int8", assignments=True)
    build_index(folder / "bits", world, ["test"], retriever, MERGE, dtype="binary")
    write_features(folder / "features", world, ["test"], retriever, dtype="float32")
    save_projector(folder / "projector", retriever.base_projector, retriever, MERGE)
    state = checkpoints.State(1, 1.0, 2, 0, 1, 1, 4)
    tensors = {"random": torch.get_rng_state()}
    checkpoints.write(folder / "run", state, tensors, retriever.base_projector, retriever, MERGE)
    shutil.copytree(base, folder / "model")
    shards.write_shard(folder / "measured.safetensors", {"a": torch.ones(2)}, {"version": 1}, {})
    (folder / "metrics.json").write_text("{}")
    (folder / "config.yaml").write_text("merge: {num_regions: 4}\n")
    return folder


@contextmanager
def refusing(number, *places):
    """Within the block the file system answers so for these paths and what is below them."""
    roots = [str(place) for place in places]

    def guarded(function, kind=None):
        def call(path, *given, **more):
            try:
                text = os.fsdecode(path)
            except TypeError:  # an open file's number
                text = ""
            if any(text == root or text.startswith(root + "/") for root in roots):
                if kind:  # safetensors says so of whatever it can't open
                    raise kind(f"No such file or directory: {text}")
                raise OSError(number, os.strerror(number), text)
            return function(path, *given, **more)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("stat", "lstat", "open", "scandir", "listdir", "mkdir", "unlink", "replace", "access"):
            patch.setattr(os, name, guarded(getattr(os, name)))
        for module in (builtins, io):
            patch.setattr(module, "open", guarded(module.open))
        patch.setattr(shards, "safe_open", guarded(shards.safe_open, FileNotFoundError))
        yield


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def query(width=16):
    tokens = torch.nn.functional.normalize(torch.ones(1, 3, width), dim=-1)
    return QueryTokens(tokens, torch.ones(1, 3, dtype=torch.bool))


def opened_before(read):
    """A door whose index was open, and nothing of it mapped, when the trouble began."""
    return lambda place: (lambda index: lambda: read(index))(Index(place))


def at_once(read):
    return lambda place: lambda: read(place)


# name -> what is refused, and what is done to it: a function of the place that is called before, and gives the door
READERS = {
    "Index": ("index", at_once(Index)),
    "manifest": ("index/manifest.json", at_once(lambda place: Index(place.parent))),
    "search": ("index", opened_before(lambda index: index.search(query(), "test", 3))),
    "re-ranking": ("bits", opened_before(lambda index: index.search(query(), "test", 3))),
    "scores": ("index", opened_before(lambda index: index.scores("test"))),
    "vectors": ("index", opened_before(lambda index: index.vectors("test", 0))),
    "queries": ("index", opened_before(lambda index: next(index.queries("test")))),
    "projector of an index": ("index", opened_before(lambda index: index.projector())),
    "projector": ("projector/projector.safetensors", at_once(read_projector)),
    "feature store": ("features", at_once(lambda place: FeatureStore(place, str(place.parent / "model")))),
    "model": ("model", at_once(lambda place: Retriever.load(str(place)))),
    "weights": ("model/model.safetensors", at_once(lambda place: Retriever.load(str(place.parent)))),
    "tokenizer": ("model/tokenizer.json", at_once(lambda place: Retriever.load(str(place.parent)))),
    "config.json": ("model/config.json", at_once(lambda place: Retriever.load(str(place.parent)))),
    "identity": ("model", at_once(lambda place: identify(str(place)))),
    "identity, weights": ("model/model.safetensors", at_once(lambda place: identify(str(place.parent)))),
    "fingerprint, tokenizer": ("model/tokenizer.json", at_once(lambda place: fingerprint(place.parent))),
    "checkpoints": ("run", at_once(checkpoints.whole)),
    "torn checkpoints": ("run/checkpoint-1", at_once(lambda place: checkpoints.torn(place.parent))),
    "state": ("run/checkpoint-1", at_once(checkpoints.read_state)),
    "state.json": ("run/checkpoint-1/state.json", at_once(lambda place: checkpoints.read_state(place.parent))),
    "tensors": ("run/checkpoint-1/state.safetensors", at_once(lambda place: checkpoints.read_tensors(place.parent))),
    "finished shard": ("measured.safetensors", at_once(lambda place: shards.finished_shard(place, {"version": 1}))),
    "json": ("metrics.json", at_once(files.read_json)),
}


def judged(caught, number, place, remedy):
    """The words of an InputError that must be one right line."""
    said = str(caught.value)
    assert f"({os.strerror(number)}); " in said, said
    assert remedy in said
    assert str(place) in said
    assert "\n" not in said
    return said


@names
@pytest.mark.parametrize("door", READERS)
def test_what_can_not_be_read_is_said_with_what_to_do(made, door, number):
    place, prepare = made / READERS[door][0], READERS[door][1]
    go = prepare(place)
    with refusing(number, place), pytest.raises(InputError) as caught:
        go()
    said = judged(caught, number, place, REMEDY[number])
    assert not WRONG.search(said.replace(str(made), "")), said


@pytest.mark.parametrize(
    "read", [Index, FeatureStore, verify, Retriever.load, load_projector], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("length", ["300 letters", "5,000 letters"])
def test_names_too_long_are_told_and_not_repeated_at_length(made, read, length):
    path = "x" * 300 if length == "300 letters" else "x/" * 2500
    words = {FeatureStore: (str(made / "model"),), load_projector: (Retriever.load(str(made / "model")),)}
    with pytest.raises(InputError, match=r"File name too long.*shorter name") as caught:
        read(path, *words.get(read, ()))
    assert len(str(caught.value)) < 600


# --- what is there is not made again, or removed ----------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EMFILE, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("file", ["images-00000.safetensors", "queries-00000.safetensors"])
def test_a_shard_that_can_not_be_read_now_is_not_written_again(made, base, world, tmp_path, file, number):
    folder, retriever = shutil.copytree(made / "index", tmp_path / "c"), Retriever.load(str(base))
    (folder / "manifest.json").unlink()  # a build that was interrupted
    before = contents(folder)
    with refusing(number, folder / "test" / file), pytest.raises(InputError) as caught:
        build_index(folder, world, ["test"], retriever, MERGE, dtype="int8", assignments=True)
    judged(caught, number, folder / "test" / file, REMEDY[number])
    assert contents(folder) == before
    (summary,) = build_index(folder, world, ["test"], retriever, MERGE, dtype="int8", assignments=True)
    assert summary.reused_shards == 2


def test_features_that_can_not_be_read_now_are_not_written_again(made, base, world, tmp_path):
    folder, retriever = shutil.copytree(made / "features", tmp_path / "f"), Retriever.load(str(base))
    (folder / "manifest.json").unlink()
    before = contents(folder)
    shard = folder / "test" / "images-00000.safetensors"
    with refusing(errno.EIO, shard), pytest.raises(InputError) as caught:
        write_features(folder, world, ["test"], retriever, dtype="float32")
    judged(caught, errno.EIO, shard, "the disk or its connection fails")
    assert {name: contents(folder)[name] for name in before} == before


def test_a_checkpoint_whose_mark_can_not_be_looked_at_is_not_torn(made, tmp_path):
    """Training removes torn checkpoints: one that a circle of links hides must not be taken for one."""
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "config.yaml").write_text("")
    mark = run / "checkpoint-1" / checkpoints.CHECKSUMS
    mark.unlink()
    assert checkpoints.torn(run) == [run / "checkpoint-1"]  # nothing there: it was cut short
    mark.symlink_to(mark.name)
    for look in (checkpoints.torn, checkpoints.whole):
        with pytest.raises(
            InputError, match=rf"{mark}: can't be read \(Too many levels of symbolic links\); its links"
        ):
            look(run)


def test_a_missing_shard_may_be_restored(made, tmp_path):
    folder = shutil.copytree(made / "index", tmp_path / "c")
    shard = folder / "test" / "images-00000.safetensors"
    kept = shard.rename(tmp_path / "kept")
    for read in (lambda: Index(folder).search(query(), "test", 1), lambda: Index(folder).scores("test")):
        with pytest.raises(InputError, match=rf"{shard}: .*no such file.*restore it, or .*again"):
            read()
    kept.rename(shard)
    assert Index(folder).search(query(), "test", 1)


# --- verify -----------------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize(
    "place", ["index/test", "index/test/images-00000.safetensors", "features", "index/manifest.json"]
)
def test_verify_lists_what_it_could_not_read(made, place, number):
    with refusing(number, made / place):
        found = verify(made)
    assert found.damages
    for line in found.damages:
        assert f"({os.strerror(number)}); " in line
        assert REMEDY[number] in line
        assert str(made / place) in line
        assert not WRONG.search(line.replace(str(made), "")), line
    assert verify(made).damages == []


# --- written ----------------------------------------------------------------------------------------------------------


def only_writer(place):
    with files.only_writer(place):
        pass


def text(place):
    with files.atomic_path(place) as temporary:
        temporary.write_text("")


WRITERS = {
    "json": ("metrics.json", lambda place: files.write_json(place, {})),
    "text": ("page.html", text),
    "trial": ("page.html", files.check_writable),
    "lock": ("", only_writer),
    "new folder": ("deep/er", only_writer),
    "scenes": ("world", lambda place: write_world(place, {"test": 1}, workers=1)),
}


@to_write
@pytest.mark.parametrize("door", WRITERS)
def test_what_can_not_be_written_is_said_with_what_to_do(tmp_path, door, number):
    name, write = WRITERS[door]
    (tmp_path / "out").mkdir()
    place = tmp_path / "out" / name if name else tmp_path / "out"
    with refusing(number, tmp_path / "out"), pytest.raises(InputError) as caught:
        write(place)
    said = str(caught.value)
    remedy = {**REMEDY, **FULL}[number]
    assert f"({os.strerror(number)}); " in said
    assert remedy in said
    assert "\n" not in said
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("letters", [236, 255])
def test_the_longest_names_can_be_written(tmp_path, letters):
    """The temporary file beside it has a name of its own, which must not be the longer one."""
    path = tmp_path / ("m" * (letters - 5) + ".json")
    files.check_writable(path)
    assert list(tmp_path.iterdir()) == []
    files.write_json(path, {"a": 1})
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_trial_leaves_nothing_and_finds_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    before = contents(tmp_path)
    for name in ("new.json", "file", "not/there/yet.json"):
        files.check_writable(tmp_path / name)
    wrong = {"folder": "it is a folder; name a file", "file/a.json": "a part of the path is a file; name another place"}
    wrong["x" * 300] = "give it a shorter name"
    for name, words in wrong.items():
        with pytest.raises(InputError, match=rf"can't be written \(.*\); {words}"):
            files.check_writable(tmp_path / name)
    assert contents(tmp_path) == before
    assert not (tmp_path / "not").exists()


def test_a_pipe_or_device_is_not_replaced_by_a_file(tmp_path):
    """As root, a metrics file named /dev/null would take the place of the device, for everybody."""
    os.mkfifo(tmp_path / "pipe")
    for write in (files.check_writable, lambda place: files.write_json(place, {}), text):
        with pytest.raises(InputError, match=r"pipe: can't be written \(No regular file\); name another place"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_checkpoint_that_can_not_be_written_leaves_the_one_before(made, tmp_path, base):
    run, retriever = shutil.copytree(made / "run", tmp_path / "run"), Retriever.load(str(base))
    state = checkpoints.State(2, 1.0, 2, 0, 1, 1, 4)
    before = contents(run)
    with refusing(errno.ENOSPC, run / "checkpoint-2"), pytest.raises(InputError) as caught:
        checkpoints.write(run, state, {"a": torch.ones(1)}, retriever.base_projector, retriever, MERGE)
    said = judged(caught, errno.ENOSPC, run / "checkpoint-2", "make room")
    assert said.endswith("and run the same command again to go on")
    assert contents(run) == before


# --- real ones: links, pipes, limits, a full disk, another user -------------------------------------------------------


@contextmanager
def no_waiting():
    """A pipe that is waited for, for ever otherwise, ends the test."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(100)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", ["circle", "pipe", "folder"])
@pytest.mark.parametrize(
    "file",
    [
        "index/test/images-00000.safetensors",
        "index/manifest.json",
        "index/projector.safetensors",
        "projector/projector.safetensors",
        "projector/config.json",
        "features/test/texts-00000.safetensors",
        "model/model.safetensors",
        "run/checkpoint-1/state.safetensors",
        "measured.safetensors",
    ],
)
def test_what_is_no_file_is_told_and_not_waited_for(made, base, tmp_path, file, kind):
    work = shutil.copytree(made, tmp_path / "work")
    path = work / file
    path.unlink()
    {"circle": lambda: path.symlink_to(path.name), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[kind]()
    readers = {
        "index": lambda: (Index(work / "index").projector(), Index(work / "index").search(query(), "test", 3)),
        "projector": lambda: load_projector(work / "projector", Retriever.load(str(base))),
        "features": lambda: FeatureStore(work / "features", str(base)),
        "model": lambda: Retriever.load(str(work / "model")),
        "run": lambda: checkpoints.read_tensors(path.parent),
        "measured.safetensors": lambda: shards.finished_shard(path, {"version": 1}),
    }
    with no_waiting(), pytest.raises(InputError) as caught:
        readers[file.partition("/")[0]]()
    said = str(caught.value)
    assert "\n" not in said
    if file.endswith("manifest.json") and kind != "circle":
        assert "no manifest.json; this is no finished index" in said
    elif file == "projector/projector.safetensors" and kind != "circle":
        assert "no projector.safetensors" in said
    else:
        words = {"circle": "links lead in a circle", "pipe": "name a plain file", "folder": "it is a folder"}[kind]
        assert str(path) in said
        assert words in said
        assert not WRONG.search(said.replace(str(tmp_path), ""))


def test_thousands_of_shards_keep_no_file_open(made, world, base, tmp_path, monkeypatch):
    """Shards stay mapped and closed: an index has as many as it likes, whatever ulimit -n says."""
    monkeypatch.setattr(index_write, "IMAGES_PER_SHARD", 1)
    monkeypatch.setattr(index_write, "QUERIES_PER_SHARD", 1)
    build_index(tmp_path / "c", world, ["test"], Retriever.load(str(base)), MERGE, dtype="binary")
    index, before = Index(tmp_path / "c"), len(os.listdir("/proc/self/fd"))
    assert len(index.search(query(), "test", 3)[0]) == 3
    index.scores("test")
    assert len(index.manifest.splits["test"].queries) >= 40  # 5 captions of 8 images
    assert len(os.listdir("/proc/self/fd")) == before


@contextmanager
def few_files(more=0):
    """Within the block only `more` files can still be opened."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = os.open(os.devnull, os.O_RDONLY)
    highest = max(held, *map(int, os.listdir("/proc/self/fd")))  # below it there may be gaps
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2 + more, limits[1]))
    hold = []
    try:
        with suppress(OSError):  # too many
            while True:
                hold.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(more):
            os.close(hold.pop())
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for each in [held, *hold]:
            os.close(each)


@pytest.mark.parametrize("more", [0, 1])
def test_too_many_open_files_are_told_as_that(made, more):
    """safetensors says of a file that it can't open for this that there is none."""
    index, path = Index(made / "index"), made / "projector" / "projector.safetensors"
    doors = {
        "projector": lambda: read_projector(path),
        "search": lambda: index.search(query(), "test", 3),
        "finished": lambda: shards.finished_shard(made / "measured.safetensors", {"version": 1}),
    }
    for name, door in doors.items():
        said = ""
        try:
            with few_files(more):
                door()
        except InputError as error:
            said = str(error)
        assert said or more, name  # one may be enough
        if said:
            assert "(Too many open files); too many files are open; allow more with ulimit -n" in said, name
            assert not WRONG.search(said.replace(str(made), "")), name


def test_a_full_disk_is_found_at_the_door(tmp_path):
    """On a real file system of 64 kB, where one may be mounted."""
    small = tmp_path / "small"
    small.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(small)]
    if os.getuid() or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        files.check_writable(small / "m.json")
        with suppress(OSError):
            (small / "filler").write_bytes(bytes(10**6))
        said = r"can't be written \(No space left on device\); the disk is full; make room, or name a place on another"
        for write in (files.check_writable, lambda place: files.write_json(place, {"a": "b" * 5000})):
            with pytest.raises(InputError, match=r"m.json: " + said):
                write(small / "m.json")
        with pytest.raises(InputError, match=said):
            write_world(small / "world", {"test": 2}, workers=1)
        assert [path.name for path in small.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", str(small)], check=True)


# what another user may do: run in a child that is nobody, as permissions mean nothing to root
AS_NOBODY = """
import json, os, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_file_system import DOORS_OF_NOBODY
from samer.config import InputError

doors = {name: DOORS_OF_NOBODY[name] for name in sys.argv[3:]}
os.chdir("/")
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
said = {}
for name, door in doors.items():
    try:
        door(sys.argv[2])
        said[name] = "done"
    except InputError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = f"defect: {type(error).__name__}: {error}"
print(json.dumps(said))
"""


def search_and_explain(folder):
    index = SearchIndex(folder + "/index", Models("cpu", folder + "/model"))
    index.explain("a car", index.search("a car", 3))


def verify_all(folder):
    if lines := verify(folder).damages:
        raise InputError(" | ".join(lines))


DOORS_OF_NOBODY = {
    "search": search_and_explain,
    "eval": lambda folder: evaluate_index(Index(folder + "/index"), "test", torch.device("cpu")),
    "verify": verify_all,
    "features": lambda folder: FeatureStore(folder + "/features", folder + "/model"),
    "projector": lambda folder: read_projector(Path(folder) / "projector" / "projector.safetensors"),
    "load": lambda folder: Retriever.load(folder + "/model"),
    "identify": lambda folder: identify(folder + "/model"),
    "open": lambda folder: Index(folder + "/index"),
    "first search": lambda folder: Index(folder + "/index").search(query(), "test", 3),
    "finished": lambda folder: shards.finished_shard(Path(folder) / "measured.safetensors", {"version": 1}),
    "checkpoints": lambda folder: checkpoints.whole(Path(folder) / "run"),
    "yaml": lambda folder: load_yaml(folder + "/config.yaml"),
    "metrics": lambda folder: read_metrics(folder + "/metrics.json", "test"),
    "write": lambda folder: files.write_json(folder + "/new.json", {}),
    "trial": lambda folder: files.check_writable(folder + "/new.json"),
    "lock": lambda folder: only_writer(folder + "/index"),
    "scenes": lambda folder: write_world(folder + "/world", {"test": 1}, workers=1),
}


@pytest.fixture
def nobodys(made, command):
    """`ask(doors, closed)`: what another user is told, door by door, of a read-only copy of `made` that is not theirs.

    Attributes:
        folder: the copy. closed: a path in it that they may not read or enter.
    """
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = shutil.copytree(made, Path(place) / "made")
        changed = [folder, *folder.rglob("*")]
        for path in changed:
            path.chmod(0o555 if path.is_dir() else 0o444)

        def ask(*doors, closed=""):
            if closed:
                (folder / closed).chmod(0)
            done = command(sys.executable, "-c", AS_NOBODY, ROOT, folder, *doors)
            assert done.returncode == 0, done.stderr
            (folder / closed).chmod(0o755)
            return json.loads(done.stdout.splitlines()[-1])

        ask.folder = folder
        yield ask
        for path in changed:
            path.chmod(0o755)


def test_another_user_reads_an_index_that_is_not_theirs(nobodys):
    """No lock, no stamp and no cache is written by what only reads."""
    doors = ("search", "eval", "verify", "features", "load", "checkpoints")
    before = contents(nobodys.folder)
    assert nobodys(*doors) == dict.fromkeys(doors, "done")
    assert contents(nobodys.folder) == before


@pytest.mark.parametrize(
    ("closed", "doors"),
    [
        ("index", ["open", "verify"]),
        ("index/test/images-00000.safetensors", ["first search", "verify"]),
        ("features/test", ["features"]),
        ("projector/projector.safetensors", ["projector"]),
        ("model", ["load", "identify"]),
        ("model/model.safetensors", ["load", "identify"]),
        ("model/tokenizer.json", ["load", "identify"]),
        ("measured.safetensors", ["finished"]),
        ("run", ["checkpoints"]),
        ("config.yaml", ["yaml"]),
        ("metrics.json", ["metrics"]),
    ],
)
def test_another_user_is_told_of_permission(nobodys, closed, doors):
    for name, said in nobodys(*doors, closed=closed).items():
        assert f"{nobodys.folder}/{closed}" in said, (name, said)
        assert "(Permission denied); allow this user to read it" in said, (name, said)
        assert not WRONG.search(said), (name, said)


def test_another_user_is_told_of_permission_to_write(nobodys):
    words = "can't be written (Permission denied); allow this user to write there, or name another place"
    for name, said in nobodys("write", "trial", "lock", "scenes").items():
        assert words in said, name


# --- the model, from the hub's cache ----------------------------------------------------------------------------------

HUB = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from samer.config import InputError
from samer.retrievers.hf import Retriever, identify
from samer.retrievers.identity import model_folder

if len(sys.argv) > 3 and os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
said = []
for ask in (Retriever.load, identify, model_folder):
    try:
        said.append("done" if ask("owner/name") else "nothing")
    except InputError as error:
        said.append(str(error))
    except Exception as error:
        said.append(f"defect: {type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.fixture
def hub(base, command):
    """A hub's cache with one model; `ask(*words)`: what loading it, offline, says, as nobody if there are words."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        repo = Path(place) / "hub" / "models--owner--name"
        snapshot = repo / "snapshots" / ("a" * 40)
        for folder in (snapshot, repo / "refs", repo / "blobs"):
            folder.mkdir(parents=True)
        (repo / "refs" / "main").write_text("a" * 40)
        for file in base.iterdir():
            shutil.copy(file, repo / "blobs" / f"blob-{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")

        def ask(*words):
            offline = {"HF_HOME": place, "HF_HUB_CACHE": f"{place}/hub", "HF_HUB_OFFLINE": "1"}
            done = command(sys.executable, "-c", HUB, ROOT, place, *words, env=offline)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout.splitlines()[-1])

        ask.repo = repo
        yield ask
        for path in (Path(place), Path(place) / "hub", repo, repo / "snapshots"):
            if path.exists():
                path.chmod(0o755)


def test_a_model_in_a_cache_that_is_not_ours_is_read(hub):
    for path in [hub.repo.parent.parent, *hub.repo.parent.parent.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)
    assert hub("nobody") == ["done", "done", "done"]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_that_was_cleaned_up_names_the_file(hub, file):
    """Blobs are pruned and their links stay; transformers makes a tokenizer of nothing, and goes on."""
    (hub.repo / "blobs" / f"blob-{file}").unlink()
    said = hub()[0]
    assert f"{'a' * 40}/{file}: its link leads nowhere (../../blobs/blob-{file}); restore that file, or fetch" in said


@pytest.mark.parametrize("closed", ["blobs/blob-model.safetensors", "blobs/blob-tokenizer.json", "snapshots", ".."])
def test_a_cache_that_may_not_be_read_says_so(hub, closed):
    (hub.repo / closed).chmod(0)
    for said in hub("nobody")[: 2 if "blob" in closed else 3]:
        assert "can't be read (Permission denied); allow this user to read it" in said
        assert str(hub.repo) in said


def test_a_model_that_is_not_in_the_cache_says_what_keeps_it_from_being_fetched(hub):
    shutil.rmtree(hub.repo)
    said, *rest = hub()
    assert "HF_HUB_OFFLINE" in said
    assert str(hub.repo.parent) in said
    assert rest == ["nothing", "nothing"]


def test_weights_in_several_files_name_the_one_that_is_missing(base, tmp_path):
    model = shutil.copytree(base, tmp_path / "model")
    tensors, parts = load_file(model / "model.safetensors"), {}
    (model / "model.safetensors").unlink()
    for number in (1, 2):
        file = f"model-0000{number}-of-00002.safetensors"
        own = {name: tensor for name, tensor in tensors.items() if (len(name) % 2) == number % 2}
        save_file(own, model / file, metadata={"format": "pt"})
        parts |= dict.fromkeys(own, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    assert Retriever.load(str(model))
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002.safetensors: no such file, .*list of weights names it"):
        Retriever.load(str(model))


# --- the commands -----------------------------------------------------------------------------------------------------


def run(capsys, module, *words):
    """Exit status and the last line on stderr of a script's main in this process."""
    with pytest.raises(SystemExit) as stopped:
        commands.run(lambda: module.main([str(word) for word in words]))
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


REPORT = ["report", "--data-root", "{w}", "--out", "{t}/r.html", "--method", "a={m}/index"]
COMPARE = ["compare", "--data-root", "{w}", "--out", "{t}/c", "--config", "{m}/config.yaml", "--sections", "untouched"]
COMMANDS = {
    "search": ("index", ["search", "a car", "--cache-dir", "{m}/index", "--model", "{m}/model"]),
    "search, model": ("model", ["search", "a car", "--cache-dir", "{m}/index", "--model", "{m}/model"]),
    "serve": ("index", ["serve", "--cache-dir", "{m}/index", "--model", "{m}/model", "--port", "0"]),
    "eval": ("index", ["eval", "--cache-dir", "{m}/index", "--output-json", "{t}/m.json"]),
    "eval, shards": ("index/test", ["eval", "--cache-dir", "{m}/index", "--output-json", "{t}/m.json"]),
    "report": ("index", REPORT),
    "report, rows": (
        "metrics.json",
        [
            "report",
            "--data-root",
            "{w}",
            "--out",
            "{t}/r.html",
            "--method",
            "a={m}/index",
            "--row",
            "b={m}/metrics.json",
        ],
    ),
    "compare": (
        "features",
        [*COMPARE, "--features", "{m}/features", "model.name={m}/model"],
    ),
    "delete": ("index", ["index", "--cache-dir", "{m}/index", "--delete", "a.jpg"]),
    "verify": ("index", ["verify", "{m}/index"]),
    "train": ("run", ["train", "--config", "{m}/config.yaml", "data.root={w}", "train.output_dir={m}/run"]),
    "config": ("config.yaml", ["train", "--config", "{m}/config.yaml", "data.root={w}", "train.output_dir={t}/r"]),
}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", COMMANDS)
def test_commands_say_one_line_and_exit_with_2(made, world, tmp_path, script, capsys, name, number):
    place, (script_name, *words) = COMMANDS[name]
    module, before = script(script_name), contents(made)
    words = [word.format(m=made, t=tmp_path, w=world) for word in words]
    with refusing(number, made / place):
        status, line = run(capsys, module, *words)
    assert status == 2
    assert line.startswith("error: ")
    assert str(made / place) in line
    assert os.strerror(number) in line
    assert not WRONG.search(line.replace(str(made), "")), line
    assert contents(made) == before
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["folder", "file/m.json", "x" * 300 + ".json"])
@pytest.mark.parametrize("of", ["eval", "report"])
def test_where_results_can_not_go_is_known_before_the_work(
    made, world, tmp_path, script, capsys, monkeypatch, of, name
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Index, "scores", lambda *_: pytest.fail("the work has begun"))
    words = {
        "eval": ["--cache-dir", made / "index", "--output-json", tmp_path / name],
        "report": ["--data-root", world, "--out", tmp_path / name, "--method", f"a={made}/index"],
    }
    status, line = run(capsys, script(of), *words[of])
    assert status == 2
    assert re.search(rf"{name}: can't be written \(.*\); ", line), line
    assert sorted(tmp_path.rglob("*")) == before


def test_the_reports_own_place_is_looked_at_too(made, tmp_path, script, capsys, monkeypatch):
    (tmp_path / "m.html").mkdir()
    monkeypatch.setattr(Index, "scores", lambda *_: pytest.fail("the work has begun"))
    words = ["--cache-dir", made / "index", "--output-json", tmp_path / "m.json"]
    status, line = run(capsys, script("eval"), *words)
    assert (status, line.startswith(f"error: {tmp_path}/m.html: can't be written (Is a directory)")) == (2, True), line


def test_metrics_are_shown_even_if_the_disk_is_full_by_then(made, tmp_path, script, capsys, monkeypatch):
    full = files.trouble("m.json", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "written")
    module = script("eval")

    def refuse(*_):
        raise full

    monkeypatch.setattr(files, "write_json", refuse)
    with pytest.raises(InputError, match="disk is full"):
        module.main(["--cache-dir", str(made / "index"), "--output-json", str(tmp_path / "m.json")])
    assert "text to image: r@1 " in capsys.readouterr().out


def test_a_missing_index_names_what_makes_one(tmp_path):
    with pytest.raises(InputError, match=r"scripts/index\.py --images FOLDER .*bash/cache\.sh"):
        Index(tmp_path)


# --- the page ---------------------------------------------------------------------------------------------------------


@names
@pytest.mark.parametrize("place", ["", "manifest.json", "images/images-00000.safetensors", "images"])
def test_the_page_says_what_its_disk_does_and_goes_on_when_it_is_back(shelf, place, number):
    """503 for what is wrong on disk, never 500 or 400; the pictures and the index are there again afterwards."""
    client, folder = shelf
    with refusing(number, folder / place if place else folder):
        answer = client.get("/api/search?q=a+car")
    assert answer.status_code == 503
    words = answer.json()["error"]
    assert f"({os.strerror(number)}); " in words
    assert REMEDY[number] in words
    assert not WRONG.search(words.replace(str(folder), "")), words
    assert client.get("/api/search?q=a+car").status_code == 200


@names
def test_a_picture_that_can_not_be_read_now_is_503_and_one_that_is_gone_404(shelf, number):
    client, folder = shelf
    root = folder.parent / "pictures"
    with refusing(number, root):
        answer = client.get("/image/0/1")
    assert (answer.status_code, answer.json()["error"]) == (503, "picture 1 can't be read now")
    assert client.get("/image/0/1").status_code == 200
    for path in root.iterdir():
        path.rename(path.with_suffix(".away"))
    assert client.get("/image/0/2").status_code == 404


def test_an_index_that_vanishes_while_it_is_served_says_so_and_comes_back(shelf):
    client, folder = shelf
    assert client.get("/api/search?q=a+car").status_code == 200
    away = folder.rename(folder.with_name("away"))
    gone = client.get("/api/search?q=a+car")
    assert gone.status_code == 503
    assert f"{folder}: no manifest.json" in gone.json()["error"]
    away.rename(folder)
    assert client.get("/api/search?q=a+car").status_code == 200


def test_a_damaged_shard_is_not_the_requests_fault(shelf):
    client, folder = shelf
    shard = folder / "images" / "images-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    answer = client.get("/api/search?q=a+car")
    assert answer.status_code == 503
    assert "remove it and build the index again" in answer.json()["error"]
    assert client.get("/api/search?q=").status_code == 400


@pytest.fixture
def shelf(base, world, tmp_path):
    """A client of the page of a folder's index of which nothing is mapped yet, and the index's folder."""
    pytest.importorskip("httpx", reason="starlette's test client needs httpx")
    client = pytest.importorskip("starlette.testclient", reason="needs starlette (the extra `serve`)")
    from samer.search.app import make_app

    shutil.copytree(world / "images" / "Images", tmp_path / "pictures")
    for path in sorted((tmp_path / "pictures").iterdir())[3:]:
        path.unlink()
    update_images(tmp_path / "index", find_pictures(tmp_path / "pictures"), Retriever.load(str(base)), MERGE)
    app = make_app([SearchIndex(tmp_path / "index", Models("cpu"))], None)
    with client.TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as open_client:
        yield open_client, tmp_path / "index"


# --- the source -------------------------------------------------------------------------------------------------------

# may ask the file system themselves: rooms below `runtime.files`, and what walks folders of pictures
THEMSELVES = {"samer/settings.py", "samer/runtime/files.py", "samer/runtime/commands.py"}
WALKERS = ("samer/data/", "samer/index/pictures.py")
QUESTIONS = {"is_file", "is_dir", "exists", "isfile", "isdir", "iterdir", "glob", "rglob", "scandir", "listdir"}


def test_the_file_system_is_asked_in_one_place():
    """`Path.is_file` and its like raise for some of what goes wrong and answer no for the rest."""
    found = []
    for path in sorted((ROOT / "samer").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name in THEMSELVES or name.startswith(WALKERS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in QUESTIONS:
                found.append(f"{name}:{node.lineno} {node.attr}")
    assert found == []
