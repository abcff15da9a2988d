"""Indexes of parts, joined, are the index of the whole; what does not belong together is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from oracle import same_answers

from samer.config import InputError, MergeConfig
from samer.data import flickr
from samer.data.records import plain_caption
from samer.index import merge, parts, write
from samer.index.columns import read_columns, write_columns
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.verify import verify

MERGE = MergeConfig(num_regions=6)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(write, "IMAGES_PER_SHARD", 2)
    monkeypatch.setattr(write, "QUERIES_PER_SHARD", 10)  # so that every part has the batches that the whole has
    monkeypatch.setattr(merge, "QUERIES_PER_SHARD", 10)


def built(folder, world, retriever, splits=("val", "test"), **settings):
    write.build_index(folder, world, splits, retriever, MERGE, batch_size=2, **settings)
    return folder


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "stamps.json"
    }


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "binary"])
def test_parts_joined_are_the_index_of_one_job(world, retriever, tmp_path, dtype, monkeypatch):
    whole = built(tmp_path / "whole", world, retriever, dtype=dtype, assignments=True)
    monkeypatch.setattr(write, "QUERIES_PER_SHARD", 6)  # captions are written anew in shards of the usual size
    sources = [
        built(tmp_path / f"part-{k}", world, retriever, dtype=dtype, assignments=True, part=(k, 3)) for k in (1, 2, 3)
    ]
    before = [files(source) for source in sources]
    summaries = merge.merge_indexes(tmp_path / "all", sources)
    assert [(each.split, each.images, each.queries) for each in summaries] == [("val", 6, 30), ("test", 8, 40)]
    assert files(tmp_path / "all") == files(whole)
    assert [files(source) for source in sources] == before
    shutil.rmtree(sources[0])  # it stands alone
    assert verify(tmp_path / "all").damages == []


def test_file_systems_without_links_and_runs_that_were_interrupted(world, retriever, tmp_path, monkeypatch):
    whole = built(tmp_path / "whole", world, retriever, ["val"])
    sources = [built(tmp_path / f"{k}", world, retriever, ["val"], part=(k, 2)) for k in (1, 2)]

    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge.os, "link", refused)
    with monkeypatch.context() as patch:
        patch.setattr(merge, "_write_queries", killed)
        with pytest.raises(KeyboardInterrupt):
            merge.merge_indexes(tmp_path / "all", sources)
    assert not (tmp_path / "all/manifest.json").exists()
    torn = tmp_path / "all/val/images-00001.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    kept = (tmp_path / "all/val/images-00000.safetensors").stat().st_mtime_ns
    merge.merge_indexes(tmp_path / "all", sources)
    assert files(tmp_path / "all") == files(whole)
    assert (tmp_path / "all/val/images-00000.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="holds an index already; name a new folder"):
        merge.merge_indexes(tmp_path / "all", sources)


def test_what_was_deleted_stays_deleted_and_metadata_is_joined(world, retriever, tmp_path):
    sources = [built(tmp_path / f"{k}", world, retriever, ["val"], part=(k, 2)) for k in (1, 2)]
    names = [list(Index(source).numbers("val")) for source in sources]
    for number, (source, own) in enumerate(zip(sources, names)):
        write_columns(source, "val", {name: {"part": number} for name in own[:2]})
    delete_images(sources[1], "val", names[1][:1])
    merge.merge_indexes(tmp_path / "all", sources)
    assert list(Index(tmp_path / "all").numbers("val").items()) == [
        (name, row) for row, name in enumerate([*names[0], *names[1]]) if name != names[1][0]
    ]
    told = {name: {"part": number} for number, own in enumerate(names) for name in own[:2]}
    del told[names[1][0]]
    assert read_columns(tmp_path / "all", "val") == told


def test_splits_that_only_some_hold(world, retriever, tmp_path):
    sources = [built(tmp_path / split, world, retriever, [split]) for split in ("val", "test")]
    merge.merge_indexes(tmp_path / "all", sources)
    assert {name for name in files(tmp_path / "all") if "/" in name} == {
        f"{source.name}/{path.name}" for source in sources for path in (source / source.name).glob("*.safetensors")
    }


def test_what_can_not_be_joined(world, retriever, tmp_path):
    first = built(tmp_path / "first", world, retriever, ["val"])
    other = tmp_path / "other"
    write.build_index(other, world, ["val"], retriever, MergeConfig(num_regions=5), batch_size=2)
    with pytest.raises(InputError, match=r"made with merge=.*'num_regions': 5.*only indexes that were made alike"):
        merge.merge_indexes(tmp_path / "all", [first, other])
    twice = Index(first).image_id("val", 0)
    with pytest.raises(InputError, match=f"^{first}: image '{twice}' is in {first} as well"):
        merge.merge_indexes(tmp_path / "all", [first, first])
    assert not (tmp_path / "all").exists()
    with pytest.raises(InputError, match=r"no manifest.json"):
        merge.merge_indexes(tmp_path / "all", [first, tmp_path])


def test_codes_that_each_part_would_learn(world, retriever, tmp_path):
    settings = MergeConfig(num_regions=6, compressor="hpc")
    with pytest.raises(InputError, match=r"^hpc learns from a whole corpus"):
        write.build_index(tmp_path / "a", world, ["val"], retriever, settings, part=(1, 2))
    write.build_index(tmp_path / "b", world, ["val"], retriever, settings)
    with pytest.raises(InputError, match=r"^hpc learns from a whole corpus"):
        merge.merge_indexes(tmp_path / "all", [tmp_path / "b"])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("jobs", [0, 1, 49, 50, 51])
def test_shares_are_all_jobs_in_order(jobs, count):
    shares = [parts.share_of(range(jobs), (k, count)) for k in range(1, count + 1)]
    assert [job for share in shares for job in share] == list(range(jobs))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "1/0", "-1/3", "1/2/3", ""])
def test_a_part_that_is_none(text):
    with pytest.raises(InputError, match="give K/N, the Kth of N parts"):
        parts.part_named(text)
    assert parts.part_named("3/100") == (3, 100)


def test_parts_without_images_and_with_graded_queries(world):
    records = flickr.load_split(world, "val", boxes=False)
    with pytest.raises(InputError, match="val: part 1/4 is empty; its 3 shards allow as many parts"):
        parts.own_part("val", records, (1, 4), 2)
    far = replace(plain_caption("x"), grades=((records[0].image_id, 1), (records[5].image_id, 2)))
    near = replace(far, grades=((records[0].image_id, 1), ("of another split", 2)))
    graded = [replace(records[0], captions=(near,)), *records[1:]]
    assert parts.own_part("val", graded, (1, 3), 2) == graded[:2]
    graded = [replace(records[0], captions=(far,)), *records[1:]]
    with pytest.raises(InputError, match="images of several parts answer its queries"):
        parts.own_part("val", graded, (1, 3), 2)


def test_ids_are_unique_by_more_than_their_hash(monkeypatch):
    places = [("a", ["1", "2"]), ("b", ["3"])]
    monkeypatch.setattr(merge, "_short", lambda name: 7)  # all seem to come twice
    merge.check_unique(lambda: iter(places))
    with pytest.raises(InputError, match=r"^b: image '1' is in a as well"):
        merge.check_unique(lambda: iter([*places, ("b", ["1"])]))


def test_the_scripts(world, base, script, tmp_path, capsys):
    words = ["--data-root", str(world), "--splits", "val", "--batch-size", "2", f"model.name={base}"]
    for k in (1, 2):
        script("cache").main([*words, "--cache-dir", str(tmp_path / f"part-{k}"), "--part", f"{k}/2"])
    script("cache").main([*words, "--cache-dir", str(tmp_path / "whole")])
    capsys.readouterr()
    sources = [str(tmp_path / f"part-{k}") for k in (1, 2)]
    script("index").main(["--cache-dir", str(tmp_path / "all"), "--merge-indexes", *sources])
    said = capsys.readouterr().out
    assert said.startswith("val: 6 images x at most 64 vectors (2,112 bytes per image), 30 queries -> ")
    assert files(tmp_path / "all") == files(tmp_path / "whole")
    with pytest.raises(SystemExit):
        script("index").main(["--cache-dir", str(tmp_path / "all"), "--merge-indexes", *sources, "--compact"])


def test_a_search_of_the_joined_index_is_that_of_the_whole(world, retriever, tmp_path):
    whole = Index(built(tmp_path / "whole", world, retriever, ["test"], dtype="float32"))
    sources = [built(tmp_path / f"{k}", world, retriever, ["test"], dtype="float32", part=(k, 4)) for k in (4, 2, 1, 3)]
    merge.merge_indexes(tmp_path / "all", sources)  # in another order
    queries = retriever.encode_queries(retriever.query_inputs(["a red car", "two dogs"]))
    joined = Index(tmp_path / "all")
    assert same_answers(joined.search(queries, "test", 8), whole.search(queries, "test", 8))
    (ours, ours_of), (theirs, theirs_of) = joined.scores("test"), whole.scores("test")
    name = [joined.image_id("test", number) for number in range(8)]
    columns = [name.index(whole.image_id("test", number)) for number in range(8)]
    rows = sorted(range(40), key=lambda row: columns.index(int(ours_of[row])))
    assert [columns.index(int(k)) for k in ours_of[rows]] == theirs_of.tolist()
    assert torch.equal(ours[rows][:, columns], theirs)
