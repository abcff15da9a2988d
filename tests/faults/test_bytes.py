"""Every file that the tool reads, spoiled in every way: refused by a message that names it, or read rightly.

How many cases: harness.py.
"""

import hashlib
import io
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import (
    VALUES,
    Spoiled,
    bounded,
    byte_faults,
    examples,
    header_faults,
    json_faults,
    read_header,
    resealed,
    survey,
    write_header,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from stores import (
    DIM,
    Drawn,
    boxes_say,
    cache_says,
    make_cache,
    make_projectors,
    projector_says,
    questions,
    small_data,
    tensors_of,
)

from samer.config import InputError, load_config
from samer.data import flickr
from samer.data.flickr import load_split
from samer.data.pictures import load_image
from samer.features.read import FeatureStore
from samer.features.write import write_features
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.verify import verify
from samer.retrievers.identity import fingerprint
from samer.retrievers.projectors import load_projector
from samer.runtime import commands as runtime_commands

ROOT = Path(__file__).resolve().parents[2]
# What a survey passes over (error, frame, detail; regular expressions), and why.
KNOWN = {
    "manifest": {
        "why": "a manifest forged with a checksum that fits is believed until its shards are opened",
        "passes": [r"wrong \w+: files that contradict"],
    },
}


def known(*names):
    return [pattern for name in names for pattern in KNOWN[name]["passes"] if name in KNOWN]


def same(left, right, tolerance=0.0):
    """Whether two results are equal, tensors and arrays by value; scores within a tolerance."""
    if isinstance(left, torch.Tensor) and left.dtype == torch.bfloat16:
        left = left.float()
    if isinstance(left, (torch.Tensor, np.ndarray)):
        left, right = np.asarray(left), np.asarray(right)
        if left.shape != right.shape:
            return False
        if left.dtype.kind == right.dtype.kind == "b":  # a spoiled byte may be neither 0 nor 1, and is true
            left, right = (np.ascontiguousarray(each).view(np.uint8) != 0 for each in (left, right))
        if left.dtype.kind == "f" or right.dtype.kind == "f":
            return bool(np.allclose(left, right, atol=tolerance, rtol=1e-6, equal_nan=True))
        return bool((left == right).all())
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b, tolerance) for a, b in zip(left, right))
    if isinstance(left, float) and isinstance(right, (int, float)):
        return left == right or abs(left - right) <= tolerance + 1e-6 * abs(right) or (left != left and right != right)
    return left == right


# --- the index --------------------------------------------------------------------------------------------------------

TOP = 2


def queries_of(cache):
    rows = []
    for query, image, texts in cache.queries("test"):
        for tokens, mask, owner, text in zip(query.tokens, query.mask, image.tolist(), texts):
            rows.append((tokens[mask].float(), owner, text))
    return rows


def vectors_of(cache):
    rows = [cache.vectors("test", number) for number in cache.numbers("test").values()]
    return [(row.tokens, row.mask) for row in rows]


CACHE_READERS = {
    "projector": lambda folder: Index(folder).projector().hash,
    "size": lambda folder: Index(folder).size("test"),
    "images": lambda folder: list(Index(folder).images("test")),
    "queries": lambda folder: queries_of(Index(folder)),
    "scores": lambda folder: Index(folder).scores("test")[0],
    "search": lambda folder: Index(folder).search(questions(), "test", TOP),
    "numbers": lambda folder: Index(folder).numbers("test"),
    "vectors": lambda folder: vectors_of(Index(folder)),
    "assignments": lambda folder: list(Index(folder).assignments("test")),
    "image_id": lambda folder: {name: n for n in range(4) if (name := Index(folder).image_id("test", n)) is not None},
    "delete": lambda folder: deleted(folder),
}


def deleted(folder):
    """Deletes one image; what is left."""
    ids = list(Index(folder).numbers("test"))
    left = delete_images(folder, "test", ids[:1])
    now = Index(folder).numbers("test")
    return {"left": left == len(now) == len(ids) - 1, "gone": ids[0] not in now}


@pytest.fixture(scope="session")
def data(world, tmp_path_factory):
    return small_data(world, tmp_path_factory.mktemp("faults") / "data")


def seal(spoiled, name):
    """Makes the manifest's checksum agree with a changed shard."""
    path = spoiled.path("manifest.json")
    manifest = json.loads(path.read_text())
    digest = hashlib.sha256(spoiled.path(name).read_bytes()).hexdigest()

    def walk(value):
        if isinstance(value, dict):
            if value.get("file") == name.rpartition("/")[2]:
                value["sha256"] = digest
            for inner in value.values():
                walk(inner)
        elif isinstance(value, list):
            for inner in value:
                walk(inner)

    walk(manifest)
    spoiled.write("manifest.json", resealed(manifest))


@pytest.fixture(scope="session")
def caches(data, tmp_path_factory):
    """Working copies of an index of each kind, and what its readers give."""
    result = {}
    for dtype in ("float32", "int8", "binary", "float16"):
        place = tmp_path_factory.mktemp("cache")
        clean = make_cache(place / "clean", data, dtype)
        work = Spoiled(clean, place / "work", seal)
        lacks = {"assignments"} if dtype != "float32" else set()
        lacks |= {"scores"} if dtype == "float16" else set()  # with an image deleted it is refused
        readers = {name: read for name, read in CACHE_READERS.items() if name not in lacks}
        right = {}
        for name, read in readers.items():
            right[name] = read(work.folder)
            work.restore()
        result[dtype] = work, readers, right
    return result


CHECKED = ("images", "queries", "scores", "assignments")  # their files' checksums stand in the manifest


def judge_cache(found, caches, dtype, reader, fault):
    work, readers, right = caches[dtype]
    reader = reader if reader in readers else "search"
    names = work.spoil(fault)
    if (fault[0] == "header" and fault[-1]) or "manifest.json" in fault:
        names = [*names, str(work.folder)]

    def is_right(value):
        if same(value, right[reader], 1e-5):
            return True
        told = fault[0] in ("json", "header") and fault[-1]  # else the manifest's checksum or the shard's is wrong
        if reader in ("projector", "delete") or (not told and (reader in CHECKED or fault[0] == "json")):
            return f"{reader}, which has a checksum"
        try:
            says = cache_says(work.folder, questions(), TOP)
        except Exception as error:
            return f"{reader}: files that contradict each other ({type(error).__name__})"
        wanted = says["numbers" if reader == "image_id" else reader]
        if reader in ("scores", "search"):
            flat = [s for row in wanted for s in (row if reader == "scores" else [p[1] for p in row])]
            bound = (
                0.02 * max([abs(s) for s in flat], default=0)
                if dtype == "int8"
                else 1e-4 * (1 + max(map(abs, flat), default=0))
            )
            if reader == "search":
                value, wanted = ([[s for _, s in row] for row in part] for part in (value, wanted))
            return True if same(value, wanted, bound) else reader
        return True if same(value, wanted, 1e-5) else reader

    case = f"{dtype} {reader}: {fault}"
    try:
        found.judge(case, lambda: readers[reader](work.folder), is_right, names)
    finally:
        work.restore()


CACHE_NAMES = ["manifest.json", "projector.safetensors", *(f"test/images-0000{k}.safetensors" for k in (0, 1))]
CACHE_NAMES += [f"test/queries-0000{k}.safetensors" for k in (0, 1, 2)]
EXACT = ["test/images-00000.exact.safetensors", "test/images-00001.exact.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary", "float16"])
def test_a_spoiled_index(caches, dtype):
    files = [*CACHE_NAMES, *(EXACT if dtype == "binary" else ())]
    with survey(f"index {dtype}: bytes", []) as found:

        @examples(0.05)
        @given(st.sampled_from(sorted(CACHE_READERS)), byte_faults(files))
        def run(reader, fault):
            judge_cache(found, caches, dtype, reader, fault)

        run()


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary", "float16"])
def test_an_index_whose_manifest_says_something_else(caches, dtype):
    with survey(f"index {dtype}: manifest", known("manifest")) as found:

        @examples(0.06)
        @given(st.sampled_from(sorted(CACHE_READERS)), json_faults(["manifest.json"]))
        def run(reader, fault):
            judge_cache(found, caches, dtype, reader, fault)

        run()


@pytest.mark.parametrize("dtype", ["float32", "int8", "binary", "float16"])
def test_an_index_whose_headers_lie(caches, dtype):
    files = [
        name for name in [*CACHE_NAMES, *(EXACT if dtype == "binary" else ())] if "images" in name or "quer" in name
    ]
    with survey(f"index {dtype}: headers", []) as found:

        @examples(0.05)
        @given(st.sampled_from(sorted(CACHE_READERS)), header_faults(files))
        def run(reader, fault):
            judge_cache(found, caches, dtype, reader, fault)

        run()


CHANGED = [("flip", -1, 0), ("flip", -100, 6), ("cut", -2), ("zeros",), ("insert", -9, b"x"), ("flip", 2, 1)]


@pytest.mark.parametrize("change", CHANGED, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "int8", "binary"])
def test_what_has_a_checksum_is_never_read_changed(caches, dtype, change):
    """A change of any file is noticed by the readers that check it, wherever it is."""
    work, readers, _ = caches[dtype]
    files = {"projector.safetensors": ["projector"]}
    files |= {name: ["scores"] + (["images"] if name not in EXACT else []) for name in work.names if "/images" in name}
    files |= {name: ["queries", "scores"] for name in work.names if "/queries" in name}
    for name, checked in files.items():
        for reader in checked:
            work.spoil((change[0], name, *change[1:]))
            refusal(lambda folder, reader=reader: readers[reader](folder), work.folder)
            work.restore()


@pytest.mark.parametrize("change", CHANGED, ids=str)
def test_a_changed_projector_or_feature_file_is_refused(projectors, stores, base, change):
    work, encoder, _ = projectors
    work.spoil((change[0], "ours/projector.safetensors", *change[1:]))
    refusal(lambda path: load_projector(path, encoder), work.path("ours"))
    work.restore()
    work = stores["int8"]
    for name in [name for name in work.names if name.endswith(".safetensors")]:
        work.spoil((change[0], name, *change[1:]))
        refusal(verified, work.folder)
        work.restore()


@pytest.mark.parametrize("value", ["1.0e30", "9223372036854775808", "-1.0e300", ".inf", "1.5", "true", "[1]"])
def test_whole_numbers_out_of_range(tmp_path, value):
    (tmp_path / "a.yaml").write_text(f"train:\n  seed: {value}\n")
    refusal(load_config, tmp_path / "a.yaml")


# --- writers over spoiled stores, and a spoiled model -----------------------------------------------------------------


def as_clean(work):
    """Whether a store's files are those of an undamaged one."""
    other = [
        name for name in work.names if not work.path(name).is_file() or work.path(name).read_bytes() != work.clean[name]
    ]
    return True if not other else f"files {other} stay spoiled"


@pytest.mark.parametrize("dtype", ["float32", "binary"])
def test_an_index_built_over_a_spoiled_one(caches, data, dtype):
    """What is whole is kept, what is not is made anew, and a manifest that is not is refused."""
    work, _, _ = caches[dtype]
    with survey(f"build over index {dtype}: bytes", []) as found:

        @examples(0.02)
        @given(byte_faults(work.names))
        def run(fault):
            names = [*work.spoil(fault), str(work.folder)]
            try:
                found.judge(fault, lambda: make_cache(work.folder, data, dtype), lambda _: as_clean(work), names)
            finally:
                work.restore()

        run()


def test_features_written_over_spoiled_ones(stores, data, base, monkeypatch):
    from samer.features import write as features_write
    from samer.retrievers.hf import Retriever

    monkeypatch.setattr(features_write, "IMAGES_PER_SHARD", 2)
    monkeypatch.setattr(features_write, "TEXTS_PER_SHARD", 8)
    retriever, work = Retriever.load(str(base)), stores["int8"]
    with survey("build over features: bytes", []) as found:

        @examples(0.01)
        @given(byte_faults(work.names))
        def run(fault):
            names = [*work.spoil(fault), str(work.folder)]
            write = lambda: write_features(work.folder, data, ["test"], retriever, dtype="int8")
            try:
                found.judge(fault, write, lambda _: as_clean(work), names)
            finally:
                work.restore()

        run()


@pytest.mark.filterwarnings("ignore")
def test_a_spoiled_model(base, tmp_path):
    """The model's folder is transformers' to read: what it can't read is refused by name."""
    from samer.retrievers.hf import Retriever

    work = Spoiled(base, tmp_path / "model")
    with survey("model: bytes", []) as found:

        @examples(0.02)
        @given(byte_faults(work.names))
        def run(fault):
            work.spoil(fault)
            try:
                found.judge(fault, lambda: Retriever.load(str(work.folder)), lambda _: True, [str(work.folder)])
            finally:
                work.restore()

        run()


# --- projectors -------------------------------------------------------------------------------------------------------

PROJECTOR_FILES = {
    "ours": ["config.json", "projector.safetensors"],
    "lora": ["adapter_config.json", "adapter_model.safetensors"],
    "whole": ["adapter_config.json", "adapter_model.safetensors"],
    "legacy": ["projector.pt"],
}


@pytest.fixture(scope="session")
def projectors(tmp_path_factory):
    place = tmp_path_factory.mktemp("projectors")
    clean = make_projectors(place / "clean")
    encoder = Drawn()
    right = {kind: load_projector(clean / kind, encoder) for kind in PROJECTOR_FILES}
    return Spoiled(clean, place / "work"), encoder, right


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PROJECTOR_FILES)
def test_a_spoiled_projector(projectors, kind):
    work, encoder, right = projectors
    files = [f"{kind}/{name}" for name in PROJECTOR_FILES[kind]]
    texts = [name for name in files if name.endswith(".json")]
    tensors = [name for name in files if name.endswith(".safetensors")]
    faults = [byte_faults(files)]
    faults += [json_faults(texts)] if texts else []
    faults += [header_faults(tensors)] if tensors else []

    def is_right(projector):
        if projector.weight.dtype != torch.float32 or projector.weight.shape != (DIM, DIM):
            return "dtype or shape"
        if same(projector.weight, right[kind].weight, 1e-5) and same(projector.bias, right[kind].bias, 1e-5):
            return True
        if kind == "legacy":  # the format has no checksum; what is read differs by no more than what was spoiled
            changed = (projector.weight != right[kind].weight).sum() + (projector.bias != right[kind].bias).sum()
            return True if changed <= 80 else "legacy"
        try:
            weight, bias = projector_says(work.folder, kind)
        except Exception as error:
            return f"files that contradict each other ({type(error).__name__})"
        if not np.abs(projector.weight - np.asarray(weight)).max() < 1e6:  # float32 sums of such numbers say nothing
            return True
        good = same(projector.weight, weight, 1e-4) and same(projector.bias, bias, 1e-6)
        return True if good else "not what the files say"

    with survey(f"projector {kind}") as found:

        @examples(0.05)
        @given(st.one_of(*faults))
        def run(fault):
            names = [*work.spoil(fault), str(work.folder / kind)]
            try:
                found.judge(str(fault), lambda: load_projector(work.folder / kind, encoder), is_right, names)
            finally:
                work.restore()

        run()


# --- the feature store ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def stores(data, base, tmp_path_factory):
    from samer.features import write as features_write
    from samer.retrievers.hf import Retriever

    retriever, result = Retriever.load(str(base)), {}
    before = features_write.IMAGES_PER_SHARD, features_write.TEXTS_PER_SHARD
    features_write.IMAGES_PER_SHARD, features_write.TEXTS_PER_SHARD = 2, 8
    try:
        for dtype in ("float32", "int8"):
            place = tmp_path_factory.mktemp("features")
            write_features(place / "clean", data, ["test"], retriever, dtype=dtype)
            result[dtype] = Spoiled(place / "clean", place / "work", seal)
    finally:
        features_write.IMAGES_PER_SHARD, features_write.TEXTS_PER_SHARD = before
    return result


BASE = "base.safetensors"


def verified(folder):
    """Bytes that scripts/verify.py reads of a store; a damage is raised as a reader would raise it."""
    found = verify(folder)
    if found.damages:
        raise InputError("\n".join(found.damages))
    return found.bytes


def features_say(folder, kind, names):
    """Rows of a store by name, read by other code."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = {}
    for entry in manifest["splits"]["test"][kind]:
        tensors, own = tensors_of((folder / "test" / entry["file"]).read_bytes())
        ends = np.cumsum(tensors["lengths"])
        assert len(own["stamp"]["names"]) == len(ends) == entry["count"]
        assert (tensors["lengths"] > 0).all()
        keys = [key for key in ("hidden", "scales", "coords", "patches", "attention", "offsets") if key in tensors]
        assert all(len(tensors[key]) == ends[-1] for key in keys)
        for row, name in enumerate(own["stamp"]["names"]):
            span = slice(ends[row] - tensors["lengths"][row], ends[row])
            rows.setdefault(name, {key: tensors[key][span] for key in keys})
    return [rows[name] for name in names]


def rows_of(batch):
    """A padded batch as a list of rows without padding."""
    lengths = batch["attention_mask"].sum(1).tolist()
    keys = [key for key in ("hidden", "scales", "coords", "patches", "attention", "offsets") if key in batch]
    return [{key: batch[key][row, :count] for key in keys} for row, count in enumerate(lengths)]


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_spoiled_feature_store(stores, data, base, dtype):
    work = stores[dtype]
    records = load_split(data, "test", boxes=False)
    texts = [caption.text for record in records for caption in record.captions]
    readers = {
        "verify": lambda: verified(work.folder),
        "images": lambda: rows_of(FeatureStore(work.folder, str(base)).record_inputs(records)),
        "texts": lambda: rows_of(FeatureStore(work.folder, str(base)).query_inputs(texts)),
        "encode": lambda: [
            (store := FeatureStore(work.folder, str(base))).encode_images(store.record_inputs(records)).coords,
            store.base_projector.hash,
            store.encode_queries(store.query_inputs(texts)).mask,
        ],
    }
    right = {name: read() for name, read in readers.items()}
    shards = [name for name in work.names if name.startswith("test/") and name.endswith(".safetensors")]
    faults = st.one_of(byte_faults(work.names), json_faults(["manifest.json"]), header_faults(shards))

    def is_right(reader, value, kind, seals):
        if reader == "verify" and not seals and any(work.path(n).read_bytes() != work.clean[n] for n in shards):
            return "verify of changed shards"
        if same(value, right[reader]):
            return True
        if not seals and kind == "json":
            return f"{reader} of a changed manifest"
        if reader == "verify":  # a sealed file of another length
            return True if value == sum(work.path(name).stat().st_size for name in [*shards, BASE]) else reader
        if reader == "encode":
            return reader
        try:
            says = features_say(work.folder, reader, [r.image_id for r in records] if reader == "images" else texts)
        except Exception as error:
            return f"{reader}: files that contradict each other ({type(error).__name__})"
        return True if same(value, says) else reader

    with survey(f"features {dtype}", known("manifest")) as found:

        @examples(0.08)
        @given(st.sampled_from(sorted(readers)), faults)
        def run(reader, fault):
            names = work.spoil(fault)
            seals = fault[0] in ("json", "header") and fault[-1]
            names.append(str(work.folder))  # a text that changed in a shard's header is missed by the store
            right_here = lambda value: is_right(reader, value, fault[0], seals)
            try:
                found.judge(f"{reader}: {fault}", readers[reader], right_here, names)
            finally:
                work.restore()

        run()


# --- the data set -----------------------------------------------------------------------------------------------------

_MARK = re.compile(r"\[/EN#([0-9]+)(?:/[^/\[\]\s]+)+\s+([^\[\]]*)\]")


def data_says(folder, *, strict):
    """Ids, captions and boxes of the test split as the files are now, read by other code."""
    notes = folder / "annotations"
    ids = [line.strip() for line in (notes / "test.txt").read_bytes().decode("utf-8-sig").split("\n") if line.strip()]
    rows = []
    for name in ids:
        picture = None if strict else folder / "images" / "Images" / f"{name}.jpg"
        chains = boxes_say(notes / "Annotations" / f"{name}.xml", picture)
        lines = (notes / "Sentences" / f"{name}.txt").read_bytes().decode("utf-8-sig").split("\n")
        while not lines[-1].strip():
            lines.pop()
        captions = []
        for line in lines:
            phrases = [(chain, " ".join(words.split()), chains.get(chain, [])) for chain, words in _MARK.findall(line)]
            captions.append((" ".join(_MARK.sub(r"\2", line).split()), phrases))
        rows.append((name, captions))
    return rows


def records_as_rows(records):
    hidden = lambda phrase: phrase.chain_id == "0" or "notvisual" in phrase.types
    for record in records:
        for caption in record.captions:
            assert all(caption.text[p.start : p.end] == p.text for p in caption.phrases)
            assert not any(hidden(p) and p.boxes for p in caption.phrases)
    return [
        (
            record.image_id,
            [
                (c.text, [(p.chain_id, p.text, None if hidden(p) else list(p.boxes)) for p in c.phrases])
                for c in record.captions
            ],
        )
        for record in records
    ]


@pytest.mark.parametrize("strict", [False, True])
def test_spoiled_annotations(data, tmp_path, strict):
    work = Spoiled(data, tmp_path / "work")
    text = [name for name in work.names if not name.endswith(".jpg")]
    clean = load_split(data, "test", boxes=True)

    def is_right(records):
        try:
            says = data_says(work.folder, strict=strict)
        except Exception as error:
            return f"accepted what another reader does not ({type(error).__name__})"
        ours = records_as_rows(records)
        for (name, captions), (other, theirs) in zip(ours, says, strict=True):
            for (one, phrases), (two, marks) in zip(captions, theirs, strict=True):
                shown = [
                    (c, t, b if b is not None else wanted[2]) for (c, t, b), wanted in zip(phrases, marks, strict=True)
                ]
                if name != other or one != two or not same(shown, marks, 1e-9):
                    return "another meaning"
        return True

    assert is_right(clean) is True
    with survey(f"annotations{', strict' if strict else ''}") as found:

        @examples(0.1)
        @given(byte_faults(text))
        def run(fault):
            names = work.spoil(fault)
            if any("test.txt" in str(word) for word in fault):  # another id: what is absent is named instead
                names += [str(work.folder)]
            try:
                read = lambda: load_split(work.folder, "test", boxes=True, strict=strict)
                found.judge(str(fault), read, is_right, names)
            finally:
                work.restore()

        run()


LINES = st.sampled_from(
    [
        b"../../etc/passwd",
        b"",
        b"\0",
        b"a\0b",
        b"/etc/passwd",
        b"..",
        b".",
        b"a" * 5000,
        b"\xff\xfe",
        b"\xe2\x80\xa8",
        b"-rf",
    ]
) | st.binary(max_size=12)


def test_split_files_of_any_lines(data, tmp_path):
    work = Spoiled(data, tmp_path / "work")
    ids = work.clean["annotations/test.txt"].split()
    with survey("split ids") as found:

        @examples(0.04)
        @given(st.lists(LINES | st.sampled_from(ids), max_size=5))
        def run(lines):
            work.write("annotations/test.txt", b"\n".join(lines))
            words = [line.strip() for line in b"\n".join(lines).split(b"\n")]
            right = [word.decode() for word in words if word in ids]
            read = lambda: [record.image_id for record in load_split(work.folder, "test", boxes=True)]
            good = lambda value: value == right and all(word in ids or not word.decode().strip() for word in words)
            found.judge(repr(lines), read, good, [str(work.folder)])
            work.restore()

        run()


# --- pictures ---------------------------------------------------------------------------------------------------------


def pictures():
    """A small picture in each format and kind of pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels[6:18] = 90
    image = Image.fromarray(pixels)
    clear = image.convert("RGBA")
    clear.putalpha(128)
    kinds = {"a.jpg": (image, {}), "b.png": (image, {}), "c.gif": (image.convert("P"), {}), "d.webp": (image, {})}
    kinds |= {"e.png": (clear, {}), "f.jpg": (image, {"progressive": True}), "g.png": (image.convert("I;16"), {})}
    kinds |= {
        "h.webp": (clear, {"lossless": True}),
        "i.tif": (image, {"compression": "tiff_lzw"}),
        "j.bmp": (image, {}),
    }
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds["k.jpg"] = image, {"exif": exif}
    result = {}
    for name, (picture, rest) in kinds.items():
        held = io.BytesIO()
        picture.save(held, {"jpg": "JPEG", "tif": "TIFF"}.get(name[2:], name[2:].upper()), **rest)
        result[name] = held.getvalue()
    return result


@pytest.mark.filterwarnings("ignore")
def test_spoiled_pictures(tmp_path):
    (tmp_path / "clean").mkdir()
    for name, content in pictures().items():
        (tmp_path / "clean" / name).write_bytes(content)
    work = Spoiled(tmp_path / "clean", tmp_path / "work")
    clean = {name: load_image(work.path(name)) for name in work.names}

    def is_right(fault, image):
        name = fault[1]
        if image.mode != "RGB" or 0 in image.size:
            return "mode or size"
        if fault[0] in ("cut", "linked", "copy", "swap"):  # what was cut away may not be missing from the pixels
            wanted = clean[fault[2] if fault[0] in ("copy", "swap") else name]
            if fault[0] == "cut" and name.endswith((".tif", ".gif")):
                return True  # neither has an end to miss; Pillow fills what is lost
            return True if np.array_equal(np.asarray(image), np.asarray(wanted)) else f"{fault[0]} {name[2:]}"
        with Image.open(work.path(name)) as other:
            plain = not other.has_transparency_data and other.mode in ("RGB", "L") and not other.getexif()
            if plain and not np.array_equal(np.asarray(image), np.asarray(other.convert("RGB"))):
                return "other pixels"
        return True

    with survey("pictures") as found:

        @examples(0.1)
        @given(byte_faults(work.names))
        def run(fault):
            names = work.spoil(fault)
            try:
                found.judge(str(fault), lambda: load_image(work.path(fault[1])), lambda v: is_right(fault, v), names)
            finally:
                work.restore()

        run()


# --- settings ---------------------------------------------------------------------------------------------------------

SETTINGS = {
    "merge": ["num_regions", "cluster_iters", "spatial_weight", "center_init", "compressor"],
    "train": ["seed", "learning_rate", "run_name", "bf16", "budgets", "early_stop_patience", "num_train_epochs"],
    "data": ["root", "limit_eval_images", "train_split"],
    "model": ["name", "local_files_only"],
    "objects": ["min_area", "max_phrases"],
}


def settings_right(path, config):
    """Whether a config holds what PyYAML's own safe loader finds in the file, defaults elsewhere."""
    values = yaml.safe_load(path.read_text()) or {}
    default = load_config(None)
    for section, keys in SETTINGS.items():
        for key in keys:
            given_ = (values.get(section) or {}).get(key, getattr(getattr(default, section), key))
            ours = getattr(getattr(config, section), key)
            if key == "num_regions" and isinstance(given_, list):
                given_ = max(given_)
            if key == "budgets" and isinstance((values.get("merge") or {}).get("num_regions"), list):
                given_ = values["merge"]["num_regions"]
            if isinstance(ours, tuple):
                good = list(ours) == list(given_)
            elif isinstance(ours, float) and isinstance(given_, str):
                good = ours == float(given_)
            else:
                good = ours == given_ or str(given_) == ours
            if not good:
                return f"{section}.{key}"
    return True


@pytest.fixture(scope="module")
def config_texts():
    return {path.name: path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))}


def test_spoiled_configs(config_texts, tmp_path):
    (tmp_path / "clean").mkdir()
    for name, text in config_texts.items():
        (tmp_path / "clean" / name).write_bytes(text)
    work = Spoiled(tmp_path / "clean", tmp_path / "work")
    with survey("configs: bytes") as found:

        @examples(0.05)
        @given(byte_faults(work.names))
        def run(fault):
            names = work.spoil(fault)
            path = work.path(fault[1])
            found.judge(str(fault), lambda: load_config(path), lambda v: settings_right(path, v), names)
            work.restore()

        run()


def test_configs_of_any_values(tmp_path):
    path = tmp_path / "a.yaml"
    key = st.sampled_from([(section, key) for section, keys in SETTINGS.items() for key in keys])
    with survey("configs: values", []) as found:

        @examples(0.05)
        @given(st.lists(st.tuples(key, VALUES), max_size=3, unique_by=lambda row: row[0]))
        def run(rows):
            values = {}
            for (section, name), value in rows:
                values.setdefault(section, {})[name] = value
            path.write_text(yaml.safe_dump(values))
            found.judge(repr(rows), lambda: load_config(path), lambda v: settings_right(path, v), [str(path)])

        run()


# --- absurd sizes, and files that are none ----------------------------------------------------------------------------


def png(width, height, *, kind=2, depth=8, raw=b"", **chunks):
    """A PNG of any claimed size."""
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    extra = b"".join(chunk(name.encode(), body) for name, body in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")


def yaml_bomb(place, count=9):
    """Ten aliases of ten aliases of ...: 10^9 elements in 500 bytes."""
    lines = [f"{place}:", f"    - &b0 [{','.join('x' * 10)}]"]
    lines += [f"    - &b{k} [{','.join([f'*b{k - 1}'] * 10)}]" for k in range(1, count)]
    return "\n".join(lines) + "\n"


XML = "<annotation><size><width>9</width><height>9</height></size>{}</annotation>"
ENTITIES = "<!DOCTYPE a [<!ENTITY a0 'ha'>" + "".join(f"<!ENTITY a{k} '{f'&a{k - 1};' * 10}'>" for k in range(1, 8))
HEX = "0x" + "f" * 5000
EQUAL = "a0: &a0 [x, x]\nb0: &b0 [x, x]\n" + "".join(
    f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\nb{k}: &b{k} [*b{k - 1}, *b{k - 1}]\n" for k in range(1, 30)
)  # two keys that take 2^30 comparisons to tell apart
EQUAL += "c: {? *a29 : 1, ? *b29 : 2}\n"

FILES = [
    ("a.png", png(100_000, 100_000, raw=b"\0" * 100)),
    ("a.png", png(0, 5)),
    ("a.png", png(2**31 - 1, 1, raw=b"\0")),
    (
        "a.gif",
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
    ),
    ("a.webp", b"RIFF" + struct.pack("<I", 26) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xff" * 6),
    ("a.bmp", b"BM" + struct.pack("<IIIIiiHHIIIIII", 54, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0, 0, 0, 0, 0)),
    ("a.jpg", b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65535, 65535, 3) + b"\1\x11\0\2\x11\0\3\x11\0"),
    ("a.png", png(4, 4, raw=bytes(52), iCCP=b"a\0\0" + zlib.compress(bytes(10**8), 9))),
    ("a.xml", ENTITIES + "]><annotation>&a7;</annotation>"),
    ("a.xml", "<!DOCTYPE a SYSTEM 'file:///etc/passwd'><a/>"),
    ("a.xml", "<a>" * 10**5),
    ("a.xml", XML.replace("9<", "9" * 10**5 + "<", 1).format("")),
    ("a.xml", XML.replace("9<", "NaN<", 1).format("")),
    ("a.xml", XML.replace("9<", "-9<", 1).format("")),
    ("a.xml", XML.format("<object><name>1</name><bndbox/></object>")),
    ("a.xml", b"<?xml version='1.0' encoding='no-such'?><a/>"),
    ("a.yaml", "[" * 10**5),
    ("a.yaml", "train:\n  seed: " + "[" * 150 + "]" * 150),
    ("a.yaml", "train:\n  learning_rate: " + "1" * 10**5 + ".5\n"),
    ("a.yaml", "train:\n  seed: " + "9" * 10**4),
    ("a.yaml", b"train:\n  run_name: \xff\n"),
    ("a.yaml", "train:\n  run_name: \0\n"),
    *(
        ("a.yaml", text)
        for text in (
            f"train:\n  seed: {HEX}\n",
            f"train:\n  learning_rate: {HEX}\n",
            f"train:\n  run_name: {HEX}\n",
            f"merge:\n  num_regions: [{HEX}]\n",
            "train:\n  seed: " + "1:" * 20_000 + "1\n",
            "train:\n  learning_rate: " + "1:" * 10_000 + "1.5\n",
        )
    ),
]
READ = {".xml": flickr.parse_annotation, ".yaml": load_config, ".txt": flickr.read_lines}


def refusal(read, path, memory=2**30):
    """The message that refuses `path`; anything else that comes of reading it fails the test, without its traceback."""
    words = None
    try:
        with bounded(memory=memory):
            read(path)
    except InputError as error:
        words = str(error)
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {str(error)[:200]}", pytrace=False)
    if words is None or str(path) not in words or "allocate" in words:
        pytest.fail(f"not refused by name: {words and words[:200]}", pytrace=False)
    return words


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "content"), FILES, ids=range(len(FILES)))
def test_absurd_files_are_refused_soon_and_within_bounds(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(READ.get(path.suffix, load_image), path)


ALIASES = [
    "train: &a\n  seed: *a\n",
    "data: &a {root: [*a]}\n",
    *(yaml_bomb(place) for place in ("train:\n  seed", "merge:\n  num_regions", "data", "train:\n  run_name", "x")),
    "a: &a " + yaml_bomb("x").partition("\n")[2].strip() + "\nmerge: *a\n",
    EQUAL,
]


@pytest.mark.parametrize("text", ALIASES, ids=range(len(ALIASES)))
def test_yaml_aliases_that_stand_for_gigabytes_neither_hang_nor_fill_memory(tmp_path, text):
    """None of them makes sense as settings; a message about one is short all the same."""
    (tmp_path / "a.yaml").write_text(text)
    assert len(refusal(load_config, tmp_path / "a.yaml")) < 2000


@pytest.mark.parametrize(
    ("text", "same"), [("train:\n  <<: {seed: 7}\n", ["train.seed=7"]), ("train: &a\n  <<: *a\n", [])]
)
def test_yaml_that_joins_mappings_is_read_as_yaml_says_or_refused(tmp_path, text, same):
    (tmp_path / "a.yaml").write_text(text)
    with bounded():
        found = outcome(lambda: load_config(tmp_path / "a.yaml"))
    assert "a.yaml" in str(found) if isinstance(found, InputError) else found == load_config(None, same)


def test_a_small_file_of_many_pixels_is_refused(tmp_path):
    side = 16_500  # 272 million pixels
    content = png(side, side, kind=3, raw=bytes((side + 1) * side), PLTE=bytes(6), tRNS=b"\x80")
    assert len(content) < 10**6
    (tmp_path / "a.png").write_bytes(content)
    refusal(load_image, tmp_path / "a.png")
    refusal(lambda path: load_image(path, (448, 448)), tmp_path / "a.png")


@pytest.mark.parametrize(
    "content",
    [XML.format("<a>" * 10**5 + "</a>" * 10**5), XML.format(f"<!-- {'x' * 10**6} -->"), XML.format("<object/>" * 0)],
)
def test_large_but_good_annotations_are_read(tmp_path, content):
    (tmp_path / "a.xml").write_text(content)
    with bounded():
        assert flickr.parse_annotation(tmp_path / "a.xml") == {}


@pytest.mark.parametrize("name", ["a.jpg", "a.xml", "a.yaml", "a.txt"])
def test_a_pipe_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / name)
    refusal(READ.get(Path(name).suffix, load_image), tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", "a.xml", "a.yaml", "a.txt"])
def test_a_device_is_refused(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    refusal(READ.get(Path(name).suffix, load_image), tmp_path / name, 2**27)


def outcome(read):
    """What a reading gives: its value or its refusal."""
    try:
        return read()
    except InputError as error:
        return error


OPENERS = {
    "picture": load_image,
    "config": load_config,
    "data": lambda path: load_split(path, "val", boxes=False),
    "projector": lambda path: load_projector(path, Drawn()),
    "index": Index,
    "features": lambda path: FeatureStore(path, "/no/model"),
}


@pytest.mark.parametrize("name", ["\0", "a/../\0", "", "/dev/null/x", "~x"])
@pytest.mark.parametrize("opener", OPENERS)
def test_names_that_are_no_names(tmp_path, monkeypatch, opener, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError), bounded():
        OPENERS[opener](name)


@pytest.mark.parametrize("opener", OPENERS)
def test_names_too_long(tmp_path, monkeypatch, opener):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="aaaa"), bounded():
        OPENERS[opener]("a" * 300)


@pytest.mark.parametrize(
    "weights",
    [
        {"a": "../../etc/passwd"},
        {"a": "\0"},
        {},
        *([], 5, None, {"a": 5}, {"a": ["x"]}, {"a": "b" * 300}),
    ],
)
def test_a_models_index_of_weights(tmp_path, weights):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with bounded():
        found = outcome(lambda: fingerprint(tmp_path))
    if isinstance(found, InputError):
        assert "model.safetensors.index.json" in str(found)
    else:
        assert re.fullmatch("[0-9a-f]{64}", found.processor)
        # files that are not there make unknown weights, not a hash of what is left
        assert re.fullmatch("[0-9a-f]{64}", found.weights) if not weights else found.weights == ""


# --- adapters, whose settings are read by PEFT ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        {"r": 0},
        {"r": "2"},
        {"r": 10**6},
        {"lora_alpha": "4"},
        {"lora_alpha": None},
        {"peft_type": "LOHA"},
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": 5},
        {"use_dora": True},
        {"bias": "all"},
        {"target_modules": "([a-z_]+)+X"},
        {"layer_replication": [[0, 1]]},
        *(
            bad
            for bad in (
                {"r": 10**8},
                {"rank_pattern": {".*": 10**8}},
                {"rank_pattern": {"(": 4}},
                {"target_modules": "((("},
                {"target_modules": "(((([a-z_]+)+)+)+)+X"},
                {"init_lora_weights": "pissa_niter_1000000000"},
            )
        ),
    ],
    ids=lambda change: ",".join(f"{k}={v}" for k, v in change.items())[:40],
)
def test_settings_of_an_adapter_that_cannot_be(projectors, tmp_path, change):
    work, encoder, _ = projectors
    work.restore()
    folder = shutil.copytree(work.folder / "lora", tmp_path / "lora")
    content = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**content, **change}))
    refusal(lambda path: load_projector(path, encoder), folder)


# --- the index: one repetition of each defect that the surveys pass over ----------------------------------------------


def put(value, *way):
    """A change of a manifest: the value at a place."""

    def change(manifest):
        inner = manifest
        for step in way[:-1]:
            inner = inner[step]
        inner[way[-1]] = value

    return change


TEST = ("splits", "test")
FIRST = (*TEST, "images", 0)
MANIFESTS = {
    "10^12 images": (put(10**12, *FIRST, "count"), "size"),
    "10^12 images, some deleted": (put(10**12, *FIRST, "count"), "images"),
    "-5 images": (put(-5, *FIRST, "count"), "size"),
    "images of no bytes": (put("many", *FIRST, "bytes"), "size"),
    "no shard": (put([], *TEST, "images"), "size"),
    "shards in a dict": (put({}, *TEST, "images"), "search"),
    "a shard that is a word": (put("x", *FIRST), "search"),
    "a file that is a number": (put(5, *FIRST, "file"), "search"),
    "splits in a list": (put([], "splits"), "size"),
    "no splits": (lambda manifest: manifest.pop("splits") and None, "none"),
    "deleted in a list": (put([1], *TEST, "deleted"), "numbers"),
    "deleted rows that are not there": (put({"images-00000.safetensors": [99]}, *TEST, "deleted"), "numbers"),
    "deleted rows of no shard": (put({"no": [-1]}, *TEST, "deleted"), "size"),
    "no queries": (lambda manifest: manifest["splits"]["test"].pop("queries") and None, "queries"),
    "no checksum": (lambda manifest: manifest["splits"]["test"]["images"][0].pop("sha256") and None, "images"),
    "a file outside": (put("/etc/passwd", *FIRST, "file"), "images"),
    "a file above": (put("../../outside/images-00000.safetensors", *FIRST, "file"), "search"),
    "the same shard twice": (lambda manifest: manifest["splits"]["test"]["images"].append(dig(manifest)), "search"),
}


def dig(manifest):
    return dict(manifest["splits"]["test"]["images"][0])


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be_true(caches, name):
    change, reader = MANIFESTS[name]
    work = caches["float16"][0]
    outside = work.folder.parent / "outside"
    try:
        shutil.copytree(work.folder / "test", outside)
        manifest = json.loads(work.clean["manifest.json"])
        change(manifest)
        work.write("manifest.json", resealed(manifest))
        reader = CACHE_READERS.get(reader, lambda folder: Index(folder).numbers("test"))
        message = refusal(lambda folder: reader(folder), work.folder)
        assert "remove it" not in message or "/etc/passwd:" not in message
    finally:
        work.restore()
        shutil.rmtree(outside)


def reseal(work, name, change):
    """A shard whose header was changed, with checksums that hold."""
    header, body = read_header(work.clean[name])
    own = json.loads(header["__metadata__"]["samer"])
    change(header, own)
    header["__metadata__"] = {"samer": json.dumps(own)}
    work.write(name, write_header(header, body))
    seal(work, name)


SHARD, ASKED = "test/images-00000.safetensors", "test/queries-00000.safetensors"
LIES = {
    "an id too few": (SHARD, lambda header, own: own["stamp"]["ids"].pop(), "search"),
    "an id too many": (SHARD, lambda header, own: own["stamp"]["ids"].append("more"), "numbers"),
    "an id twice": (SHARD, lambda header, own: own["stamp"].update(ids=["a", "a"]), "search"),
    "an id that is a number": (SHARD, lambda header, own: own["stamp"].update(ids=[1, 2]), "search"),
    "ids in a dict": (SHARD, lambda header, own: own["stamp"].update(ids={}), "search"),
    "no mask": (SHARD, lambda header, own: header.update(masque=header.pop("mask")), "search"),
    "another count": (SHARD, lambda header, own: own["entry"].update(count=10**12), "search"),
    "tokens of another shape": (SHARD, lambda header, own: header["tokens"].update(shape=[4, 3, 16]), "vectors"),
    "tokens of another type": (SHARD, lambda header, own: header["tokens"].update(dtype="I32"), "search"),
    "a stamp that is a list": (SHARD, lambda header, own: own.update(stamp=[]), "search"),
    "a text too many": (ASKED, lambda header, own: own["stamp"]["texts"].append("more"), "queries"),
    "no texts": (ASKED, lambda header, own: own["stamp"].pop("texts"), "queries"),
    "no lengths": (ASKED, lambda header, own: header.update(more=header.pop("lengths")), "queries"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_shard_whose_header_lies(caches, name):
    file, change, reader = LIES[name]
    work, readers, _ = caches["float32"]
    try:
        reseal(work, file, change)
        with pytest.raises(InputError) as caught, bounded():
            readers[reader](work.folder)
        assert Path(file).name in str(caught.value)
    finally:
        work.restore()


@pytest.mark.parametrize(
    ("one", "other", "dtype", "reader"),
    [
        (SHARD, "test/images-00001.safetensors", "int8", "queries"),
        *(
            (SHARD, other, dtype, reader)
            for other, dtype, reader in (
                (ASKED, "float32", "search"),
                (ASKED, "float32", "vectors"),
                (EXACT[0], "binary", "vectors"),
                ("test/images-00001.safetensors", "float32", "numbers"),
            )
        ),
        (EXACT[0], EXACT[1], "binary", "search"),
    ],
)
def test_shards_in_each_others_place(caches, one, other, dtype, reader):
    work, readers, right = caches[dtype]
    try:
        work.spoil(("swap", one, other))
        with bounded():
            value = outcome(lambda: readers[reader](work.folder))
        if isinstance(value, InputError):
            assert re.search(f"{Path(one).name}|{Path(other).name}", str(value))
        else:
            assert same(value, right[reader], 1e-5)
    finally:
        work.restore()


def test_what_does_not_matter_is_no_defect(caches):
    """What a search does not read may be anything of its kind."""
    work, readers, right = caches["int8"]
    manifest = {**json.loads(work.clean["manifest.json"]), "base_model": "somewhere", "transformers": "0"}
    work.write("manifest.json", resealed(manifest))
    assert same(readers["search"](work.folder), right["search"])
    work.restore()


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf"), -0.0])
def test_a_scale_that_is_none(caches, value):
    work, readers, _ = caches["int8"]
    try:
        header, body = read_header(work.clean[SHARD])
        start = header["scales"]["data_offsets"][0]
        body = body[:start] + struct.pack("<f", value) + body[start + 4 :]
        work.write(SHARD, write_header(header, body))
        seal(work, SHARD)
        refusal(readers["search"], work.folder)
    finally:
        work.restore()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (("cut", "manifest.json", 100), "manifest.json: not readable as JSON"),
        (("flip", SHARD, -3, 2), "images-00000.safetensors: contents differ"),
        (("gone", "test/queries-00001.safetensors"), "queries-00001.safetensors: not readable"),
        (("loop", SHARD), "images-00000.safetensors: can't be read"),
        (("folder", ASKED), "queries-00000.safetensors: can't be read"),
    ],
    ids=str,
)
def test_eval_exits_with_2(caches, script, capsys, tmp_path, fault, words):
    work = caches["int8"][0]
    try:
        work.spoil(fault)
        arguments = ["--cache-dir", str(work.folder), "--split", "test", "--output-json", str(tmp_path / "m.json")]
        with pytest.raises(SystemExit) as stopped:
            runtime_commands.run(lambda: script("eval").main(arguments))
        assert stopped.value.code == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "m.json").exists()
    finally:
        work.restore()


# --- the feature store, and budgets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (("copy", BASE, "test/images-00000.safetensors"), "base.safetensors"),
        (("copy", "test/images-00000.safetensors", BASE), "images-00000"),
        (("swap", "test/images-00000.safetensors", "test/texts-00000.safetensors"), "-00000"),
        (("cut", "test/images-00000.safetensors", 900), "images-00000"),
    ],
    ids=str,
)
def test_a_feature_file_that_is_another_is_named(stores, data, base, fault, words):
    work = stores["float32"]
    records = load_split(data, "test", boxes=False)
    try:
        work.spoil(fault)
        with pytest.raises(InputError, match=words):
            FeatureStore(work.folder, str(base)).record_inputs(records)
    finally:
        work.restore()


@pytest.mark.parametrize("key", ["file", "sha256"])
def test_a_store_whose_checksums_are_gone(stores, base, key):
    work = stores["float32"]
    manifest = json.loads(work.clean["manifest.json"])
    for entry in manifest["splits"]["test"]["images"]:
        entry.pop(key)
    try:
        work.write("manifest.json", resealed(manifest))
        refusal(lambda folder: FeatureStore(folder, str(base)), work.folder)
        assert any("manifest.json" in line for line in verify(work.folder).damages)
    finally:
        work.restore()


@pytest.mark.parametrize("text", ["[]", "[a]", "[1.5]"])
def test_bad_budgets_name_the_file(tmp_path, text):
    (tmp_path / "a.yaml").write_text(f"merge:\n  num_regions: {text}\n")
    refusal(load_config, tmp_path / "a.yaml")
