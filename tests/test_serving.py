"""The search page's interface: results, what each word looked at, boxes, refusals, clients at the same time.

On the generated world and the small ColPali, 8 x 8 patches and 6 prompt tokens.
"""

import io
import json
import re
import shutil
import socket
import sys
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from samer.config import InputError, MergeConfig
from samer.data import READERS, make_reader
from samer.data.pictures import Found
from samer.data.reader import Reader
from samer.data.records import Caption, ImageRecord, Phrase
from samer.grounding import box_coverage
from samer.index import pictures as index_pictures
from samer.index import settings as index_settings
from samer.index.pictures import delete_images
from samer.index.read import Index
from samer.index.recode import recode
from samer.index.sync import update_images
from samer.index.write import build_index
from samer.retrievers.base import Projector
from samer.retrievers.hf import Retriever
from samer.scoring import pack_signs
from samer.search.models import Models
from samer.search.open_index import SearchIndex, Wanted
from samer.search.server import loopback_names
from samer.search.words import check_query, query_words

pytest.importorskip("starlette", reason="needs starlette (the extra `serve`)")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")
from starlette.testclient import TestClient

from samer.search.app import HEADERS, make_app

QUERY = "a small red car beside a dog"
INDEXES = {  # compressor, dtype, regions kept
    "samer": ("samer", "bfloat16", True),
    "hpool": ("hpool", "int8", True),
    "signs": ("samer", "binary", True),
    "whole": ("none", "float16", False),
    "bare": ("samer", "float32", False),
    "pruned": ("random", "float32", True),  # most tokens belong to no vector
}
PLACES = {name: place for place, name in enumerate(INDEXES)}


@pytest.fixture(scope="module")
def caches(world, base, tmp_path_factory):
    """A folder of indexes of the test split, the second with a projector of its own."""
    folder, retriever = tmp_path_factory.mktemp("caches"), Retriever.load(str(base))
    layer = retriever.base_projector
    step = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    for name, (compressor, dtype, kept) in INDEXES.items():
        retriever.use_projector(Projector(layer.weight + 0.05 * step * (name == "hpool"), layer.bias))
        merge = MergeConfig(num_regions=6, compressor=compressor)
        build_index(folder / name, world, ["test"], retriever, merge, dtype=dtype, assignments=kept)
    return folder


@pytest.fixture(scope="module")
def titled(world, tmp_path_factory):
    """The world with phrases in Title Case."""
    folder = tmp_path_factory.mktemp("titled") / "world"
    shutil.copytree(world, folder)
    for path in (folder / "annotations" / "Sentences").iterdir():
        text = re.sub(r"(\[/EN#\S+ )([^\]]+)", lambda found: found[1] + found[2].title(), path.read_text())
        path.write_text(text)
    return folder


@pytest.fixture(scope="module")
def indexes(caches, titled):
    models = Models("cpu")
    return [SearchIndex(caches / name, models, data_root=titled) for name in INDEXES]


def client_of(indexes, **rest):
    return TestClient(make_app(indexes, loopback_names("127.0.0.1")), base_url="http://127.0.0.1", **rest)


@pytest.fixture(scope="module")
def client(indexes):
    with client_of(indexes) as client:
        yield client


def asked(client, name="samer", text=QUERY, top=8):
    response = client.get("/api/search", params={"index": PLACES[name], "q": text, "top": top})
    assert response.status_code == 200, response.text
    return response.json()


def encoded(caches, base, name, text):
    retriever = Retriever.load(str(base))
    retriever.use_projector(Index(caches / name).projector())
    return retriever.encode_queries(retriever.query_inputs([text]))


def stored(folder):
    """Vectors as float32, masks and regions of a split of one shard, read without the library."""
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = load_file(folder / "test" / "images-00000.safetensors")
    tokens = tensors["tokens"]
    if manifest["dtype"] == "binary":
        tokens = load_file(folder / "test" / "images-00000.exact.safetensors")["tokens"]
    tokens = tokens.float().numpy()
    if manifest["dtype"] == "int8":
        tokens = tokens * tensors["scales"].numpy()[:, None, None]
    regions = tensors.get("assignments")
    return tokens, tensors["mask"].numpy(), None if regions is None else regions.numpy()


# --- results and evidence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEXES)
def test_results_are_those_of_the_index(client, caches, base, name):
    answer = asked(client, name, top=5)
    expected = Index(caches / name).search(encoded(caches, base, name, QUERY), "test", 5)[0]
    assert [(row["id"], row["score"]) for row in answer["results"]] == expected
    ids = [each for ids, *_ in Index(caches / name).images("test") for each in ids]
    assert [ids[row["number"]] for row in answer["results"]] == [row["id"] for row in answer["results"]]
    assert answer["encode_ms"] > 0
    assert answer["search_ms"] > 0
    facts = answer["index"]
    images, _, regions, size = Index(caches / name).size("test")
    assert (facts["images"], facts["regions"], facts["bytes_per_image"]) == (images, regions, size)
    assert facts["total_bytes"] == images * size
    assert client.get("/api/indexes").json()["indexes"][PLACES[name]] == facts


@pytest.mark.parametrize("name", INDEXES)
def test_winners_are_those_of_plain_products(client, caches, base, name):
    answer = asked(client, name)
    query = encoded(caches, base, name, QUERY)
    tokens, spans = query.tokens[0][query.mask[0]].numpy(), query.offsets[0][query.mask[0]].tolist()
    vectors, masks, regions = stored(caches / name)
    assert [word["text"] for word in answer["words"]] == QUERY.split()
    for row in answer["results"]:
        for word, told in zip(answer["words"], row["words"]):
            expected = []
            for token, (first, last) in zip(tokens, spans):
                if any(word["start"] <= letter < word["end"] for letter in range(max(first, 0), last)):
                    products = [
                        float(token @ vector) if real else -9
                        for vector, real in zip(vectors[row["number"]], masks[row["number"]])
                    ]
                    expected.append(int(np.argmax(products)))
            assert expected
            assert told["vectors"] == expected
        assert row["grid"] == (None if name == "bare" else [8, 8])
        if name == "whole":
            assert row["regions"] == list(range(64))
        elif name == "bare":
            assert row["regions"] is None
        else:
            assert row["regions"] == [-1 if k == 255 else k for k in regions[row["number"]][:64].tolist()]
    assert answer["index"]["evidence"] == (name != "bare")


def boxes_of(world, image, word):
    """Boxes of an image's phrases with a word, and the picture's size, read without the library."""
    tree = ET.parse(world / "annotations" / "Annotations" / f"{image}.xml")
    width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
    text = (world / "annotations" / "Sentences" / f"{image}.txt").read_text()
    phrases = re.findall(r"\[/EN#(\d+)/\S+ ([^\]]+)\]", text)
    chains = {chain for chain, phrase in phrases if word.lower() in phrase.lower().split()}
    found = set()
    for thing in tree.findall("object"):
        if chains & {name.text for name in thing.findall("name")}:
            for box in thing.findall("bndbox"):
                found.add(tuple(int(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")))
    return found, width, height


@pytest.mark.parametrize("name", ["samer", "hpool", "whole"])
def test_box_mass_is_what_counting_fine_pixels_gives(client, world, name):
    image = (world / "annotations" / "test.txt").read_text().split()[0]
    text = (world / "annotations" / "Sentences" / f"{image}.txt").read_text().split("\n")[0]
    text = re.sub(r"\[/EN#\S+ |\]", "", text)
    answer = asked(client, name, text.upper())  # case does not matter
    told = 0
    for row in answer["results"]:
        for word, said in zip(answer["words"], row["words"]):
            boxes, width, height = boxes_of(world, row["id"], word["text"])
            if not boxes:
                assert said["boxes"] is said["box_mass"] is None
                continue
            assert len(said["boxes"]) == len(boxes)
            # every edge of a box and of a patch is an edge of these pixels
            inside = np.zeros((height, width), dtype=bool)
            for x1, y1, x2, y2 in boxes:
                inside[y1 - 1 : y2, x1 - 1 : x2] = True
            inside = inside.repeat(8, 0).repeat(8, 1).reshape(8, height, 8, width).mean((1, 3)).ravel()
            shares = []
            for vector in said["vectors"]:
                patches = [patch for patch, region in enumerate(row["regions"]) if region == vector]
                shares.append(np.mean([inside[patch] for patch in patches]) if patches else 0)
            assert said["box_mass"] == pytest.approx(np.mean(shares), abs=1e-6)
            told += 1
    assert told > 20


def test_a_place_without_a_vector_is_no_winner(indexes, monkeypatch):
    index, vectors = indexes[0], Index.vectors
    found = index.search(QUERY, 1)
    (before,) = {told["vectors"][0] for told in index.explain(QUERY, found)[1][0]["words"][:1]}

    def without(self, split, number):
        stored = vectors(self, split, number)
        return replace(stored, mask=stored.mask & (torch.arange(len(stored.mask)) != before))

    monkeypatch.setattr(Index, "vectors", without)
    assert before not in [vector for told in index.explain(QUERY, found)[1][0]["words"] for vector in told["vectors"]]


def test_each_image_has_a_grid_of_its_own(indexes, monkeypatch):
    """Of a retriever whose images differ in rows and columns, with patches that belong to no vector."""
    index, vectors = indexes[0], Index.vectors
    grids = {}

    def uneven(self, split, number):
        stored = vectors(self, split, number)
        grids[number] = (4, 5) if number % 2 else (3, 2)
        count = grids[number][0] * grids[number][1]
        regions = stored.regions[:count].clone()
        regions[0] = -1
        return replace(stored, regions=regions, grid=grids[number])

    monkeypatch.setattr(Index, "vectors", uneven)
    with client_of([index]) as client:
        answer = client.get(f"/api/search?q={QUERY}&top=8").json()
    assert {tuple(row["grid"]) for row in answer["results"]} == {(4, 5), (3, 2)}
    told = 0
    for row in answer["results"]:
        rows, columns = row["grid"]
        assert (rows, columns) == grids[row["number"]]
        assert len(row["regions"]) == rows * columns
        assert row["regions"][0] == -1
        for word in row["words"]:
            if word["boxes"]:
                covered = box_coverage(word["boxes"], rows, columns)
                shares = [
                    np.mean([covered[k] for k in range(rows * columns) if row["regions"][k] == vector] or [0])
                    for vector in word["vectors"]
                ]
                assert word["box_mass"] == pytest.approx(np.mean(shares), abs=1e-6)
                told += word["box_mass"] > 0
    assert told > 5


def test_without_data_there_are_no_boxes_and_no_pictures(caches):
    with client_of([SearchIndex(caches / "samer", Models("cpu"))]) as client:
        answer = asked(client)
        assert (answer["index"]["boxes"], answer["index"]["pictures"]) == (False, False)
        assert all(word["boxes"] is word["box_mass"] is None for row in answer["results"] for word in row["words"])
        assert answer["results"][0]["regions"]
        assert client.get(answer["results"][0]["image"]).status_code == 404


def test_words_and_their_tokens():
    offsets = torch.tensor([(-1, -1), (0, 1), (1, 4), (4, 7), (7, 9), (9, 10), (-1, -1)])
    words = query_words("a red  car", offsets)
    assert [(word.text, word.start, word.end, word.tokens) for word in words] == [
        ("a", 0, 1, (1,)),
        ("red", 2, 5, (2, 3)),
        ("car", 7, 10, (4, 5)),
    ]


def test_a_model_is_loaded_once_and_reads_a_text_once(caches, world, monkeypatch):
    loaded, read = [], []
    load, states = index_settings.open_encoder, Retriever.hidden_states
    monkeypatch.setattr(
        index_settings, "open_encoder", lambda *words, **rest: loaded.append(words) or load(*words, **rest)
    )
    monkeypatch.setattr(Retriever, "hidden_states", lambda self, inputs: read.append(1) or states(self, inputs))
    models = Models("cpu")
    indexes = [SearchIndex(caches / name, models) for name in ("samer", "hpool")]
    assert len(loaded) == 1
    alone = [SearchIndex(index.folder, Models("cpu")).search(QUERY, 3).hits for index in indexes]
    read.clear()
    assert [index.search(QUERY, 3).hits for index in (*indexes, *indexes)] == [*alone, *alone]
    assert len(read) == 1
    assert indexes[0].encoder is indexes[1].encoder


def test_models_with_the_same_projection_are_told_apart(caches, world, base, tmp_path):
    """Two backbones in one server: each index is asked with its own, also for a text that the other has read."""
    other = Retriever.load(str(base))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in other.model.vlm.language_model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    other = Retriever.load(str(tmp_path / "other"))
    assert other.base_projector.hash == Retriever.load(str(base)).base_projector.hash
    build_index(tmp_path / "c", world, ["test"], other, MergeConfig(num_regions=6))
    models = Models("cpu")
    indexes = [SearchIndex(folder, models) for folder in (caches / "samer", tmp_path / "c")]
    expected = Index(tmp_path / "c").search(other.encode_queries(other.query_inputs([QUERY])), "test", 5)[0]
    mine, theirs = (index.search(QUERY, 5).hits for index in indexes)
    assert theirs == expected
    assert mine != theirs
    assert indexes[0].search(QUERY, 5).hits == mine


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "binary"])
def test_an_image_is_found_by_its_number(world, base, tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(index_pictures, "PICTURES_PER_SHARD", 3)
    root = world / "images" / "Images"
    names = sorted(path.name for path in root.iterdir())[:8]
    merge = MergeConfig(num_regions=6)
    update_images(tmp_path / "c", Found(root, names, []), Retriever.load(str(base)), merge, dtype=dtype)
    delete_images(tmp_path / "c", "images", [names[1], names[3]])
    cache = Index(tmp_path / "c")
    assert cache.numbers("images") == {name: k for k, name in enumerate(names) if k not in (1, 3)}
    assert [cache.image_id("images", k) for k in range(-1, 9)] == [
        None,
        *(None if k in (1, 3) else name for k, name in enumerate(names)),
        None,
    ]
    held = {name: row for ids, *rows in cache.images("images") for name, row in zip(ids, zip(*rows))}
    regions = {name: row for ids, rows, _ in cache.assignments("images") for name, row in zip(ids, rows)}
    scales = {
        name: scale
        for ids, images in cache.stored("images")
        for name, scale in zip(ids, [1] * len(ids) if images.scale is None else images.scale)
    }
    assert list(held) == list(regions) == list(cache.numbers("images"))
    for name, number in cache.numbers("images").items():
        found = cache.vectors("images", number)
        stored, stored_mask = held[name]
        if dtype == "binary":
            assert torch.equal(pack_signs(found.tokens), stored)
        else:
            assert torch.equal(found.tokens, stored.float() * scales[name])
        assert torch.equal(found.mask, stored_mask)
        own = regions[name].long()
        assert torch.equal(found.regions, own.masked_fill(own == 255, -1))
        assert found.grid == (8, 8)


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["naïve 🐶 über", "漢字 の 犬", "\u202eright to left", "a\tb\nc", "e\u0301", "x" * 1000]
)
def test_any_text_can_be_asked(client, text):
    answer = asked(client, text=text)
    assert answer["query"] == text
    assert [word["text"] for word in answer["words"]] == text.split()
    assert len(answer["results"]) == 8


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "the query is empty"),
        ("q=", "the query is empty"),
        ("q=%20%09%E3%80%80", "the query is empty"),
        ("q=" + "x" * 1001, "1,001 characters"),
        ("q=a%00b", "no text"),
        ("q=%ED%A0%80", "can't be read"),
        ("q=%FF", "can't be read"),
        ("q=%3Cimage%3E", "stands for an image"),
        ("q=a&index=6", "index is '6'; it must be a number from 0 to 5"),
        ("q=a&index=-1", "index is '-1'"),
        ("q=a&index=", "index is ''"),
        ("q=a&index=" + "9" * 5000, "index is '99999999999999999999'"),
        ("q=a&top=0", "top is '0'; it must be a number from 1 to 100"),
        ("q=a&top=101", "top is '101'"),
        ("q=a&top=1.5", "top is '1.5'"),
        ("q=a&top=%D9%A3", "top is"),
        ("&".join(["q=a"] * 30), "can't be read"),
    ],
)
def test_a_wrong_request_is_refused_in_words(client, query, words):
    response = client.get(f"/api/search?{query}")
    assert response.status_code == 400
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]


def test_a_lone_surrogate_is_no_query():
    with pytest.raises(InputError, match="no text"):
        check_query("a\ud800b")


@pytest.mark.parametrize(
    "path",
    [
        "/nothing",
        "/image/0",
        "/image/0/8",
        "/image/9/0",
        "/image/0/-1",
        "/image/0/x",
        "/image/0/..%2f..%2fmanifest.json",
        "/image/0/99999999999999",
        "/page/page.js",
        "/..%2fserving.py",
    ],
)
def test_what_is_not_there_is_404(client, path):
    response = client.get(path)
    assert response.status_code == 404
    assert set(response.json()) == {"error"}


def test_the_page_and_its_guards(client):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        response = client.get(path)
        assert response.headers["content-type"] == f"{kind}; charset=utf-8"
        assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")
        assert "https://" not in response.text
    for response in (client.get("/"), client.get("/no"), client.get("/api/search"), client.post("/")):
        assert {name: response.headers[name] for name in HEADERS} == HEADERS
    assert client.post("/").status_code == 405
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    assert client.get("/", headers={"host": "localhost:8000"}).status_code == 200
    assert client.get("/", headers={"host": "[::1]:8000"}).status_code == 200
    assert loopback_names("0.0.0.0") is None
    assert loopback_names("192.168.0.7") is None
    assert "127.0.0.2" in loopback_names("127.0.0.2")


def test_a_failure_tells_nothing(indexes, monkeypatch):
    monkeypatch.setattr(SearchIndex, "search", lambda *words: 1 / 0)
    with client_of(indexes, raise_server_exceptions=False) as client:
        response = client.get("/api/search?q=a")
    assert response.status_code == 500
    assert response.json() == {"error": "something failed on the server; its terminal says what"}
    assert response.headers["x-content-type-options"] == "nosniff"


def test_fifty_clients_get_the_answers_of_one(client, monkeypatch):
    inside, most, query_of = [], [], Models.query

    def watched(*words):
        inside.append(1)
        most.append(len(inside))
        result = query_of(*words)
        inside.pop()
        return result

    monkeypatch.setattr(Models, "query", watched)
    queries = [(name, f"{QUERY} number {k % 7}") for k in range(25) for name in ("samer", "hpool")]
    timeless = lambda answer: {key: value for key, value in answer.items() if not key.endswith("_ms")}
    alone = [timeless(asked(client, *query)) for query in queries]

    def ask(query):
        answer = timeless(asked(client, *query))
        picture = client.get(answer["results"][0]["image"])
        return answer, picture.status_code, picture.content[:2]

    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(ask, queries))
    assert max(most) == 1  # the projector of one index is not another's
    assert together == [(answer, 200, b"\xff\xd8") for answer in alone]


# --- pictures -------------------------------------------------------------------------------------------------------


@pytest.fixture
def album(world, base, tmp_path):
    """A folder of pictures and its index; outside of the folder lies one that the index names, too."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    names = sorted(path.name for path in (world / "images" / "Images").iterdir())[:4]
    for name in names:
        shutil.copy(world / "images" / "Images" / name, root / "sub")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn
    Image.new("RGB", (1600, 800), "red").save(root / "turned.jpg", exif=rotated)
    Image.new("RGB", (32, 32), "white").save(tmp_path / "secret.png")
    retriever, merge = Retriever.load(str(base)), MergeConfig(num_regions=6)
    shutil.copy(root / "turned.jpg", root / "secret.jpg")
    outside = ["../secret.png", str(tmp_path / "secret.png"), "sub/../../secret.png", str(root / "secret.jpg")]
    ids = ["turned.jpg", *outside, *(f"sub/{name}" for name in names[:3])]
    add = lambda paths: update_images(tmp_path / "c", Found(root, paths, []), retriever, merge)
    add(ids)
    return tmp_path, names, add


def test_a_picture_outside_its_folder_is_not_given_away(album):
    folder = album[0]
    with client_of([SearchIndex(folder / "c", Models("cpu"))]) as client:
        rows = {row["id"]: row for row in asked(client)["results"]}
        assert len(rows) == 8
        codes = {name: client.get(row["image"]).status_code for name, row in rows.items()}
        assert {name for name, code in codes.items() if code == 404} == {name for name in rows if "secret" in name}
        assert set(codes.values()) == {200, 404}
        picture = client.get(rows["turned.jpg"]["image"])
        assert picture.headers["content-type"] == "image/jpeg"
        assert Image.open(io.BytesIO(picture.content)).size == (640, 1280)
        (folder / "root" / "turned.jpg").unlink()
        assert client.get(rows["turned.jpg"]["image"]).status_code == 200  # still at hand
        other = next(name for name in rows if name.startswith("sub/0"))
        (folder / "root" / other).write_text("none")
    with client_of([SearchIndex(folder / "c", Models("cpu"))]) as client:
        assert client.get(rows["turned.jpg"]["image"]).json() == {"error": "there is no picture 0"}
        refused = client.get(rows[other]["image"])
        assert refused.status_code == 404
        assert refused.json() == {"error": f"picture {rows[other]['number']} can't be read"}


@pytest.mark.parametrize(
    "name",
    ["../Images/{}", "./{}", "{}/", "x/../{}", "/{}", "..", ".", "", "{}\0", "{}.jpg", "..\\Images\\{}", "{folder}/{}"],
)
def test_an_id_that_is_no_bare_name_has_no_files_in_a_data_set(indexes, world, monkeypatch, name):
    image = (world / "annotations" / "test.txt").read_text().split()[0]
    wrong = name.format(image, folder=world / "images" / "Images")
    reader = make_reader("flickr")
    assert reader.find(world, "test", image).image_path == world / "images" / "Images" / f"{image}.jpg"
    assert reader.find(world, "test", wrong) is None
    index = replace_data(indexes[0], world)
    assert index.picture(0) is not None
    monkeypatch.setattr(Index, "image_id", lambda self, split, number: wrong)
    assert index.picture(0) is None


def replace_data(index, world):
    """An index of the same folder whose pictures lie in another copy."""
    return SearchIndex(index.folder, index.models, index.split, world)


class Shelf(Reader):
    """A data set of another kind: one JSON file per split, pictures anywhere below the root."""

    def load_split(self, root, split, *, boxes, limit_images=None, strict=False):
        root = Path(root)
        rows = json.loads((root / f"{split}.json").read_text())[:limit_images]
        records = []
        for name, file, text, box in rows:
            phrase = Phrase(text, "1", ("other",), 0, len(text), (tuple(box),) if boxes else ())
            records.append(ImageRecord(name, root / file, (Caption(text, (phrase,), True),)))
        return records


def test_a_data_set_of_another_kind_is_searched(world, base, tmp_path, monkeypatch):
    monkeypatch.setitem(READERS, "shelf", Shelf())
    files = sorted((world / "images" / "Images").iterdir())[:5]
    root = tmp_path / "shelf"
    rows = []
    for number, file in enumerate(files):
        place = root / f"box {number}" / file.name
        place.parent.mkdir(parents=True)
        shutil.copy(file, place)
        rows.append((f"../{number}", str(place.relative_to(root)), f"red thing {number}", (0.0, 0.0, 0.5, 1.0)))
    (root / "all.json").write_text(json.dumps(rows))
    merge = MergeConfig(num_regions=6)
    build_index(tmp_path / "c", root, ["all"], Retriever.load(str(base)), merge, assignments=True, reader="shelf")
    with client_of([SearchIndex(tmp_path / "c", Models("cpu"), None, root, "shelf")]) as client:
        answer = client.get("/api/search?q=red+thing").json()
        assert (answer["index"]["pictures"], answer["index"]["boxes"]) == (True, True)
        assert {row["id"] for row in answer["results"]} == {f"../{k}" for k in range(5)}  # ids are the reader's affair
        for row in answer["results"]:
            assert row["words"][0]["boxes"] == [[0.0, 0.0, 0.5, 1.0]]
            left = [k for k in range(64) if k % 8 < 4]
            shares = []
            for vector in row["words"][0]["vectors"]:
                stands = [k for k, region in enumerate(row["regions"]) if region == vector]
                shares.append(np.mean([k in left for k in stands]) if stands else 0)
            assert row["words"][0]["box_mass"] == pytest.approx(np.mean(shares), abs=1e-6)
            picture = client.get(row["image"])
            assert picture.status_code == 200
            own = Image.open(files[int(row["id"][3:])])
            assert Image.open(io.BytesIO(picture.content)).size == own.size
    with pytest.raises(InputError, match=r"data\.name 'other' is unknown"):
        SearchIndex(tmp_path / "c", Models("cpu"), None, root, "other")


def test_an_index_that_changes_is_opened_again(album):
    folder, names, add = album
    with client_of([SearchIndex(folder / "c", Models("cpu"))]) as client:
        before = asked(client, top=20)
        assert client.get("/image/0/0").status_code == 200
        assert before["index"]["images"] == 8
        add([f"sub/{names[3]}"])
        grown = asked(client, top=20)
        assert grown["index"]["images"] == 9
        assert {row["id"] for row in grown["results"]} - {row["id"] for row in before["results"]} == {f"sub/{names[3]}"}
        numbers = {row["id"]: row["number"] for row in before["results"]}
        assert numbers.items() <= {row["id"]: row["number"] for row in grown["results"]}.items()
        assert {row["state"] for row in grown["results"]} == {None}
        (folder / "root" / "sub" / names[3]).unlink()
        states = {row["id"]: row["state"] for row in asked(client, top=20)["results"]}
        assert states == {**dict.fromkeys(states), f"sub/{names[3]}": "gone"}
        delete_images(folder / "c", "images", ["turned.jpg"])
        assert "turned.jpg" not in {row["id"] for row in asked(client, top=20)["results"]}
        assert client.get("/image/0/0").status_code == 404
        assert client.get("/image/0/5").status_code == 200
        (folder / "c" / "manifest.json").write_text("{")
        broken = client.get("/api/search?q=a")
        assert broken.status_code == 503
        assert "manifest.json: not readable" in broken.json()["error"]


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_candidates_by_a_smaller_budget(caches, tmp_path, monkeypatch, dtype):
    recode(caches / "samer", tmp_path / "c", dtype, [2, 3])
    whole = SearchIndex(tmp_path / "c", Models("cpu"))
    everything = whole.search(QUERY, 20).hits
    assert [name for name, _ in whole.search(QUERY, Wanted(20, coarse=2)).hits] == [name for name, _ in everything]
    few = {name for name, _ in whole.search(QUERY, Wanted(3, budget=2)).hits}
    assert few != {name for name, _ in everything[:3]}  # else the candidates would not be seen
    monkeypatch.setattr("samer.index.stages.COARSE", 1)
    monkeypatch.setattr("samer.index.stages.COARSE_LEAST", 1)
    with TestClient(make_app([whole], None, 2)) as client:
        found = asked(client, top=3)["results"]
        assert [row["id"] for row in found] == [name for name, _ in everything if name in few]
        shutil.rmtree(tmp_path / "c")
        shutil.copytree(caches / "samer", tmp_path / "c")
        lost = client.get("/api/search?q=a")
        assert (lost.status_code, "no budget of 2 vectors" in lost.json()["error"]) == (503, True)


# --- the script ----------------------------------------------------------------------------------------------------


def test_the_script_refuses_what_is_wrong(caches, world, script, tmp_path, monkeypatch):
    main = script("serve").main
    good = ["--cache-dir", str(caches / "samer")]
    with pytest.raises(InputError, match=r"no manifest.json"):
        main(["--cache-dir", str(tmp_path)])
    with pytest.raises(InputError, match="no split 'val'"):
        main([*good, "--split", "val"])
    with pytest.raises(InputError, match="no budget of 8 vectors in this index"):
        main([*good, "--coarse", "8"])
    with pytest.raises(SystemExit):
        main([*good, "--coarse", "-1"])
    with pytest.raises(InputError, match="not a folder; point DATA_ROOT"):
        main([*good, "--data-root", str(tmp_path / "no")])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"127.0.0.1:{port}: can't listen there \(Address already in use\); name"):
            main([*good, "--port", str(port)])
    for port in ("70000", "-1"):
        with pytest.raises(InputError, match="can't listen there"):
            main([*good, "--port", port])
    for missing in ("uvicorn", "starlette.applications"):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "samer.search.app")
            patch.setitem(sys.modules, missing, None)
            words = rf"the search page needs {missing}: pip install -e '\.\[serve\]'"
            with pytest.raises(InputError, match=words):
                main(good)
