"""samer/data/sources.py: what is read at a place, whatever holds it, and what is said of what can't be."""

import io
import json
import tarfile

import pytest
from PIL import Image

from samer.config import InputError
from samer.data import sources
from samer.data.pictures import PictureError

pa = pytest.importorskip("pyarrow", reason="parquet and object storage need pyarrow")


def picture(number, suffix=".png"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 10, 20)).save(buffer, {".png": "PNG", ".jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def write_parquet(path, columns):
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), path)
    return path


def write_tar(path, members):
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def read(source):
    return [row for job in source.jobs for row in sources.rows_of(source.kind, job)]


PLACES = {"local": "{0}", "address": "file://{0}"}


@pytest.mark.parametrize("where", PLACES)
def test_pictures_of_a_folder(tmp_path, where):
    names = ["a.png", "b/c.jpg", "b/d.png", "e.PNG"]
    (tmp_path / "b").mkdir()
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(number, "." + name.lower().partition(".")[2]))
    (tmp_path / "notes.txt").write_text("none")
    source = sources.find_source(PLACES[where].format(tmp_path), 3)
    assert (source.kind, [job.names for job in source.jobs]) == ("pictures", [tuple(names[:3]), tuple(names[3:])])
    assert source.root == (str(tmp_path) if where == "local" else None)
    assert [job.count for job in source.jobs] == [3, 1]
    assert read(source) == [(name, (tmp_path / name).read_bytes()) for name in names]
    (tmp_path / "e.PNG").write_bytes(picture(99) + b"0")
    again = sources.find_source(PLACES[where].format(tmp_path), 3)
    assert [a.state == b.state for a, b in zip(source.jobs, again.jobs)] == [True, False]
    (tmp_path / "e.PNG").unlink()
    ((name, error),) = sources.rows_of("pictures", source.jobs[1])
    assert name == "e.PNG"
    assert isinstance(error, PictureError)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("ids", ["id", "_id", "corpus-id", None])
def test_parquet_files(tmp_path, where, ids):
    rows = [picture(k) for k in range(150)]  # more than are read at once
    plain = {"image": rows[:70]} | ({ids: list(range(70))} if ids else {})
    nested = {"image": [{"bytes": row, "path": "x"} for row in rows[70:]]}
    nested |= {ids: [f"n{k}" for k in range(80)]} if ids else {}
    write_parquet(tmp_path / "t-0.parquet", plain)
    write_parquet(tmp_path / "t-1.parquet", nested)
    source = sources.find_source(PLACES[where].format(tmp_path), 3)
    assert (source.kind, source.root, [job.count for job in source.jobs]) == ("parquet", None, [70, 80])
    names = [str(k) for k in range(70)] + [f"n{k}" for k in range(80)]
    if not ids:
        names = [f"t-0/{k}" for k in range(70)] + [f"t-1/{k}" for k in range(80)]
    assert read(source) == list(zip(names, rows))
    assert [name for job in source.jobs for name in sources.table_names(job)] == names
    (job,) = sources.find_source(PLACES[where].format(tmp_path / "t-1.parquet"), 3).jobs
    assert [content for _, content in sources.rows_of("parquet", job)] == rows[70:]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_tar_files(tmp_path, where, suffix):
    a, b, c = picture(1), picture(2, ".jpg"), picture(3)
    one = [("000.png", a), ("000.txt", b"a word"), ("./x/001.jpg", b), ("001.json", json.dumps({}).encode())]
    write_tar(tmp_path / f"s-0{suffix}", one)
    write_tar(tmp_path / f"s-1{suffix}", [("000.png", c), ("000.jpg", b), ("empty.png", b"")])
    source = sources.find_source(PLACES[where].format(tmp_path), 3)
    assert (source.kind, source.root, [job.count for job in source.jobs]) == ("tar", None, [0, 0])
    rows = read(source)
    assert rows[:3] == [("s-0/000", a), ("s-0/x/001", b), ("s-1/000", c)]
    assert [(name, error.reason) for name, error in rows[3:]] == [
        ("s-1/000", "id comes twice"),
        ("s-1/empty", "no picture"),
    ]


def test_rows_without_a_picture_or_an_id(tmp_path):
    table = write_parquet(tmp_path / "t.parquet", {"id": ["a", "a", "b"], "image": [picture(1), picture(2), None]})
    rows = read(sources.find_source(str(table), 3))
    assert [getattr(content, "reason", "") for _, content in rows] == ["", "id comes twice", "no picture"]
    table = write_parquet(tmp_path / "u.parquet", {"id": ["a", None], "image": [picture(1), picture(2)]})
    with pytest.raises(InputError, match=r"u\.parquet: a row has no id; fill it in"):
        read(sources.find_source(str(table), 3))


@pytest.mark.parametrize("where", PLACES)
def test_what_can_not_be_read(tmp_path, where):
    place = PLACES[where].format(tmp_path)
    with pytest.raises(InputError, match=r"no such folder|nothing is there"):
        sources.find_source(place + "/none", 3)
    write_parquet(tmp_path / "t.parquet", {"text": ["a"]})
    with pytest.raises(InputError, match=r"no column image or jpg \(it has text\); rename"):
        sources.find_source(place, 3)
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match=r"t\.parquet: can't be read \(.*\)"):
        sources.find_source(place, 3)
    (tmp_path / "s.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(InputError, match=r"holds parquet and tar files; name a folder that holds one kind"):
        sources.find_source(place, 3)
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(InputError, match=r"s\.tar: can't be read"):
        read(sources.find_source(place, 3))


def test_addresses_of_no_file_system():
    with pytest.raises(InputError, match=r"^nothing://here: can't be read"):
        sources.find_source("nothing://here", 3)


def test_which_places_are_fixed_sets(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture(1))
    (tmp_path / "tables").mkdir()
    write_parquet(tmp_path / "tables/t.parquet", {"image": [picture(1)]})
    places = [tmp_path / "pictures", tmp_path / "tables", tmp_path / "tables/t.parquet", tmp_path / "none"]
    assert [sources.is_bulk(str(place)) for place in places] == [False, True, True, False]
    assert sources.is_bulk("s3://bucket/pictures")
    write_tar(tmp_path / "pictures/backup.tar", [])  # beside pictures it is none of them, as ever
    assert not sources.is_bulk(str(tmp_path / "pictures"))
    assert [job.names for job in sources.find_source(str(tmp_path / "pictures"), 3).jobs] == [("a.png",)]
