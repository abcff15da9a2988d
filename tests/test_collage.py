"""Photographic collages: boxes, sizes, twins and captions are what the manifest and the pixels say, to the byte."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from samer.config import InputError
from samer.data.flickr import load_split
from samer.world import collage, collage_sources, collage_write
from samer.world.collage import SMALLEST, VISIBLE, Group, Studio, draw_sizes, make_group, make_layer
from samer.world.collage_captions import colour_shares
from samer.world.collage_names import Name, covers, parse_name, related
from samer.world.collage_write import Order, write_collages

COUNTS = {"train": 10, "val": 3, "test": 8}
SIZE = 128
COLOURS = {"red": (205, 25, 25), "green": (30, 170, 50), "blue": (40, 60, 220)}
NOUNS = ["bus", "drum", "owl", "cup", "tree", "lamp", "boat", "chair", "hat", "ball", "key", "fish", "clock", "bell"]
NOUNS += ["shoe", "apple", "kite", "spoon", "plate", "brush"]
FIRST = "left", "top", "right", "bottom"


def noisy(rng, width, height, base, spread):
    """An RGB picture of some noise about a colour, as a photograph has it."""
    pixels = np.asarray(base) + rng.normal(0, spread, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw_cutout(folder, stem, line, colour, rng, side=150):
    """An ellipse or a triangle of one colour with a name beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    width, height = side, int(side * rng.uniform(0.6, 1.5))
    image = noisy(rng, width, height, colour, 6)
    mask = Image.new("L", image.size)
    box = (4, 4, width - 5, height - 5)
    if rng.random() < 0.5:
        ImageDraw.Draw(mask).ellipse(box, fill=255)
    else:
        ImageDraw.Draw(mask).polygon([(4, height - 5), (width - 5, height - 5), (width // 2, 4)], fill=255)
    image.putalpha(mask)
    image.save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(f"{line}\nxx.utf8=whatever\n", encoding="utf-8")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Cut-outs of 20 names in 3 colours, as folders say; 6 grey backgrounds."""
    root = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for k, noun in enumerate(NOUNS):
        for colour in list(COLOURS)[: 1 + k % 3]:
            line = f"{'An' if noun[0] in 'aeiou' else 'A'} {noun}."
            draw_cutout(root / "cutouts" / colour / "vehicles", noun, line, COLOURS[colour], rng)
    (root / "cutouts" / "LICENSE").write_text("do as you like\n")
    (root / "grounds").mkdir()
    for k in range(6):
        shade = np.linspace(60, 200, 300)[:: 1 if k % 2 else -1, None] + rng.normal(0, 3, (300, 400)) - 10 * k
        waves = 25 * np.sin(np.arange(400) / (9 + 7 * k))[None]
        grey = Image.fromarray(np.clip(shade + waves, 0, 255).astype(np.uint8))
        grey.convert("RGB").save(root / "grounds" / f"ground{k}.png")
    return root


def order(sources, **changes):
    plain = Order((str(sources / "cutouts"),), (str(sources / "grounds"),), COUNTS, size=SIZE, seed=3)
    return replace(plain, **changes)


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    root = tmp_path_factory.mktemp("made") / "collage"
    assert write_collages(root, order(sources), workers=1) is True
    return root


@pytest.fixture(scope="module")
def manifest(made):
    return json.loads((made / "scenes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def studio(sources, tmp_path_factory):
    place = tmp_path_factory.mktemp("studio")
    with ThreadPoolExecutor(1) as pool:
        cutouts, _ = collage_sources.take_cutouts(collage_sources.find_files([sources / "cutouts"]), place, SIZE, pool)
        grounds, _ = collage_sources.take_backgrounds(
            collage_sources.find_files([sources / "grounds"]), place, SIZE, pool
        )
    return Studio(tuple(cutouts), tuple(grounds), SIZE, 5)


@pytest.fixture(scope="module")
def pairs(studio):
    return [make_group(studio, Group(k, k % 6, tuple(range(len(studio.cutouts))))) for k in range(12)]


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "phrase"),
    [
        ("An owl.", "an owl"),
        ("red bus", "a red bus"),
        ("orange", "an orange"),
        ("old boots", "old boots"),
        ("Two wild boars.", "two wild boars"),
        ("Confetti.", "confetti"),
        ("Santa Claus.", "Santa Claus"),
        ("Our moon.", "the moon"),
        ("Another tombstone.", "a tombstone"),
        ("A \u201cFuji\u201d apple.", "a Fuji apple"),
        ("A plumber\u2019s wrench.", "a plumber's wrench"),
        ("An albino peahen (a female peafowl, or peacock).", "an albino peahen"),
        ("A spiny lobster, from the Hawaiian islands.", "a spiny lobster"),
        ("A ripe, red tomato!", "a ripe red tomato"),
        ("A mince pie is a traditional Christmas food. It is good.", "a mince pie"),
        ("A hoverfly resembles a honeybee drone.", "a hoverfly"),
        ("A walnut in its shell.", "a walnut in its shell"),
        ("A football used in Australia.", "a football"),
        ("Mars\u2014the red planet. It\u2019s just beyond earth.", "mars"),
        ("A pair of pants.", "a pair of pants"),
        ("Eat your broccoli!", None),
        ("Boom!!!", None),
        ("\u201cHospital\u201d.", None),
        ("It's a cep, or they are two ceps?", None),
        ("With a fast car you can surprise them.", None),
        ("Police car emblems to put on the sedan.", None),
        ("A very large old dark green wooden house.", None),
        ("", None),
        (" . ", None),
    ],
)
def test_a_line_begins_with_a_name_or_with_none(line, phrase):
    name = parse_name(line)
    assert (name and name.phrase()) == phrase


def test_articles_go_with_what_follows():
    assert Name("an", "owl").phrase("small", "grey") == "a small grey owl"
    assert Name("a", "bus").phrase("", "orange") == "an orange bus"
    assert Name("two", "boars").phrase("huge") == "two huge boars"
    assert Name("", "Santa Claus").phrase("tiny") == "tiny Santa Claus"
    assert [parse_name(line).determiner for line in ("unicorn", "hour hand", "FM radio", "UK flag")] == [
        "a",
        "an",
        "an",
        "a",
    ]


def test_general_names_cover_special_ones():
    assert covers("apple", "green apple")
    assert not covers("green apple", "apple")
    assert not covers("apple", "pineapple")
    assert not covers("lion", "sea lion")
    assert not covers("gnu", "baby of a gnu")
    assert covers("flower", "yellow daffodil")
    assert parse_name("A [box].") is None
    assert related("green apple", "apple")
    assert not related("green apple", "red apple")


# --- what is on disk --------------------------------------------------------------------------------------------------


def test_the_reader_reads_every_split_with_the_boxes_of_the_manifest(made, manifest):
    seen = set()
    for split, count in COUNTS.items():
        records = load_split(made, split, boxes=True, strict=True)
        assert len(records) == count
        for record in records:
            scene = manifest["scenes"][record.image_id]
            assert scene["split"] == split
            with Image.open(record.image_path) as image:
                assert (image.size, image.mode, image.format) == ((SIZE, SIZE), "RGB", "JPEG")
            boxes = {str(thing["chain"]): thing["box"] for thing in scene["things"]}
            for caption, told in zip(record.captions, scene["captions"], strict=True):
                assert caption.text == told["text"]
                assert len(caption.phrases) == len(told["mentions"])
                for phrase, mention in zip(caption.phrases, told["mentions"], strict=True):
                    assert phrase.types == ("vehicles",)  # a folder's name
                    assert int(phrase.chain_id) == scene["things"][mention["thing"]]["chain"]
                    expected = [value / SIZE for value in boxes[phrase.chain_id]]
                    assert phrase.boxes == (tuple(expected),)
        ids = {record.image_id for record in records}
        assert not ids & seen
        seen |= ids
    assert seen == manifest["scenes"].keys()
    chains = [thing["chain"] for scene in manifest["scenes"].values() for thing in scene["things"]]
    assert len(set(chains)) == len(chains)  # no two pictures share any


def test_boxes_enclose_what_is_painted(made, manifest):
    """On grey ground, by the pixels of the JPEG alone: all colour is in boxes, and each box is full to its sides."""
    for image_id, scene in manifest["scenes"].items():
        with Image.open(made / "images" / "Images" / f"{image_id}.jpg") as image:
            pixels = np.asarray(image, dtype=int)
        coloured = pixels.max(-1) - pixels.min(-1) > 45
        inside = np.zeros_like(coloured)
        for thing in scene["things"]:
            left, top, right, bottom = thing["box"]
            inside[max(0, top - 3) : bottom + 3, max(0, left - 3) : right + 3] = True
            part = coloured[top:bottom, left:right]
            assert part[:4].any(), FIRST[1]
            assert part[-4:].any(), FIRST[3]
            assert part[:, :4].any(), FIRST[0]
            assert part[:, -4:].any(), FIRST[2]
        assert not (coloured & ~inside).any()


def test_splits_share_no_background_and_twins_do(manifest):
    used = {split: set() for split in COUNTS}
    for image_id, scene in manifest["scenes"].items():
        used[scene["split"]].add(scene["background"])
        if scene["twin"]:
            twin = manifest["scenes"][scene["twin"]]
            assert twin["twin"] == image_id
            same = ("split", "changed", "background", "crop", "shadows")
            assert [twin[key] for key in same] == [scene[key] for key in same]
    assert not used["train"] & used["val"]
    assert not (used["train"] | used["val"]) & used["test"]
    assert len(set().union(*used.values())) == 6
    assert sum(scene["twin"] is None for scene in manifest["scenes"].values()) == 1  # of the three of val
    named = {
        split: {t["name"] for s in manifest["scenes"].values() if s["split"] == split for t in s["things"]}
        for split in COUNTS
    }
    assert named["train"] & named["test"]


def test_separate_cutouts_share_no_last_word(tmp_path, sources):
    folder = tmp_path / "cutouts"
    rng = np.random.default_rng(1)
    for k in range(60):
        draw_cutout(
            folder, f"t{k}", f"A {'round ' * (k % 2)}thing{chr(97 + k // 26)}{chr(97 + k % 26)}.", (200, 30, 30), rng
        )
    asked = order(sources, cutouts=(str(folder),), separate=True, counts={"train": 4, "val": 4, "test": 4})
    write_collages(tmp_path / "out", asked, workers=1)
    scenes = json.loads((tmp_path / "out" / "scenes.json").read_text())["scenes"].values()
    heads = {
        split: {t["name"].split()[-1] for s in scenes if s["split"] == split for t in s["things"]} for split in COUNTS
    }
    assert all(not heads[a] & heads[b] for a, b in itertools.combinations(heads, 2))


# --- scenes -----------------------------------------------------------------------------------------------------------


def test_what_is_seen_is_what_the_masks_leave(pairs):
    """Boxes, areas and what hides what, pixel by pixel."""
    hiding = 0
    for made_ in itertools.chain(*pairs[:5]):
        count = [0] * len(made_.layers)
        sides = [[SIZE, SIZE, 0, 0] for _ in made_.layers]
        hidden = {}
        for y in range(SIZE):
            for x in range(SIZE):
                solid = []
                for k, layer in enumerate(made_.layers):
                    row, column = y - layer.top, x - layer.left
                    within = 0 <= row < layer.alpha.shape[0] and 0 <= column < layer.alpha.shape[1]
                    if within and layer.alpha[row, column] * 255 >= 128:
                        solid.append(k)
                if solid:
                    top = solid[-1]
                    count[top] += 1
                    box = sides[top]
                    sides[top] = [min(box[0], x), min(box[1], y), max(box[2], x + 1), max(box[3], y + 1)]
                    for k in solid[:-1]:
                        hidden[top, k] = hidden.get((top, k), 0) + 1
        for k, thing in enumerate(made_.things):
            whole = int((made_.layers[k].alpha * 255 >= 128).sum())
            assert thing.box == tuple(sides[k])
            assert thing.area == pytest.approx(count[k] / SIZE**2, abs=1e-5)
            assert thing.hides == {
                j: pytest.approx(pixels / int((made_.layers[j].alpha * 255 >= 128).sum()), abs=1e-4)
                for (i, j), pixels in hidden.items()
                if i == k
            }
            assert count[k] >= VISIBLE * whole
            assert made_.layers[k].size == pytest.approx(whole / SIZE**2, abs=1e-6)
            hiding += len(thing.hides)
    assert hiding > 3


def test_sizes_are_log_uniform():
    rng = np.random.default_rng(0)
    scenes = [draw_sizes(rng, 0.3) for _ in range(4000)]
    sizes = np.sort(np.concatenate(scenes))
    assert sizes[0] >= SMALLEST
    assert sizes[-1] <= 0.3
    expected = np.log(sizes / 0.005) / np.log(60)
    assert np.abs(expected - np.arange(len(sizes)) / len(sizes)).max() < 0.02  # Kolmogorov and Smirnov
    assert {len(scene) for scene in scenes} == {4, 5, 6, 7, 8}


def test_things_get_the_size_they_were_drawn_in(studio):
    # at 128 pixels, 0.5 % are 82
    for size, tolerance in ((0.005, 0.15), (0.02, 0.06), (0.1, 0.03), (0.3, 0.03)):
        for number in range(0, len(studio.cutouts), 5):
            layer = make_layer(studio, number, size, True, 9.0, 30.0)
            if layer is not None:
                assert layer.size == pytest.approx(size, rel=tolerance)


def test_twins_differ_in_one_small_thing(pairs):
    for one, two in pairs:
        assert one.changed == two.changed
        assert one.layers[one.changed].cutout != two.layers[one.changed].cutout
        names = [one.things[one.changed].name.key, two.things[one.changed].name.key]
        assert not related(*names)
        rest = [k for k in range(len(one.things)) if k != one.changed]
        assert [one.things[k] for k in rest] == [two.things[k] for k in rest]
        assert all(one.layers[k] is two.layers[k] for k in rest)
        same = (np.asarray(one.scene.image) == np.asarray(two.scene.image)).all(-1)
        left, top, right, bottom = (
            pick(a, b) for pick, a, b in zip((min, min, max, max), *(t.things[one.changed].box for t in (one, two)))
        )
        side = (one.layers[one.changed].size) ** 0.5 * SIZE
        pad = int(0.25 * side) + 12  # a soft edge and a shadow
        rows, columns = np.nonzero(~same)
        assert len(rows)
        assert rows.min() >= top - pad
        assert rows.max() < bottom + pad
        assert columns.min() >= left - pad
        assert columns.max() < right + pad
        for twin in (one, two):
            assert all(one.changed in {m.thing for m in told.mentions} for told in twin.told[:3])
            assert not any(related(a.name.key, b.name.key) for a, b in itertools.combinations(twin.things, 2))
    assert np.mean([one.layers[one.changed].size <= 0.05 for one, _ in pairs]) > 0.8


def test_a_group_depends_on_studio_and_number_only(studio, pairs):
    group = Group(3, 3, tuple(range(len(studio.cutouts))))
    again = make_group(studio, group)
    for one, two in zip(pairs[3], again):
        assert one.told == two.told
        assert one.scene.image.tobytes() == two.scene.image.tobytes()
    other = make_group(replace(studio, seed=6), group)
    assert other[0].scene.image.tobytes() != again[0].scene.image.tobytes()


def test_things_take_the_light_and_the_sharpness_of_their_ground(studio, tmp_path):
    dark = np.full((SIZE, SIZE, 3), 20, np.float32)
    bright = np.full((SIZE, SIZE, 3), 235, np.float32)
    layer = make_layer(studio, 0, 0.1, False, 0.0, 30.0)
    means = [float(collage.lit(layer, ground)[layer.solid].mean()) for ground in (dark, bright)]
    own = float(layer.pixels[layer.solid].mean())
    assert means[0] < own - 5
    assert means[1] > own + 5
    warm = np.full((SIZE, SIZE, 3), (200, 120, 60), np.float32)
    cold = warm[..., ::-1]
    red, _, blue = np.moveaxis(collage.lit(layer, warm) - collage.lit(layer, cold), -1, 0)
    assert red[layer.solid].mean() > 0 > blue[layer.solid].mean()
    rng = np.random.default_rng(0)
    rough = noisy(rng, SIZE, SIZE, (128, 128, 128), 40)
    soft = rough.filter(ImageFilter.GaussianBlur(4))
    sharp = [collage.sharpness(np.asarray(i, dtype=np.float32), np.ones((SIZE, SIZE), bool)) for i in (rough, soft)]
    assert sharp[0] > 3 * sharp[1]
    rough = noisy(rng, 150, 150, (128, 128, 128), 60)
    rough.putalpha(255)
    rough.save(tmp_path / "rough.png")
    strong = replace(studio, cutouts=(replace(studio.cutouts[0], image=str(tmp_path / "rough.png")),))
    blurs = [make_layer(strong, 0, 0.15, False, 0.0, value).blur for value in (1000.0, 0.0)]
    assert blurs[0] == 0
    assert blurs[1] > 0


# --- captions ---------------------------------------------------------------------------------------------------------

X, Y = 0, 1
SAID_SIZE = {
    "tiny": lambda a: a <= 0.01,
    "small": lambda a: a <= 0.025,
    "large": lambda a: a >= 0.1,
    "huge": lambda a: a >= 0.2,
}
LOOSE_SIZE = {
    "tiny": lambda a: a <= 0.016,
    "small": lambda a: a <= 0.04,
    "large": lambda a: a >= 0.07,
    "huge": lambda a: a >= 0.15,
}


def centre(thing):
    left, top, right, bottom = thing["box"]
    return (left + right) / 2 / SIZE, (top + bottom) / 2 / SIZE


def placed(place, thing, edge, inner):
    """Whether a thing is where a caption says: nearer than `edge` to a side, or within `inner` of the middle."""
    x, y = centre(thing)
    if place == "in the middle":
        return abs(x - 0.5) <= inner + 1e-9 and abs(y - 0.5) <= inner + 1e-9
    words = place.split()
    return (
        ("left" not in words or x <= edge)
        and ("right" not in words or x >= 1 - edge)
        and ("top" not in words or y <= edge)
        and ("bottom" not in words or y >= 1 - edge)
    )


def stands(relation, one, other, things, apart, hides):
    (x, y), (x2, y2) = centre(one), centre(other)
    number = {id(thing): str(k) for k, thing in enumerate(things)}
    return {
        "": lambda: True,
        "to the left of": lambda: x2 - x >= apart,
        "to the right of": lambda: x - x2 >= apart,
        "above": lambda: y2 - y >= apart,
        "below": lambda: y - y2 >= apart,
        "in front of": lambda: one["hides"].get(number[id(other)], 0) >= hides,
        "behind": lambda: other["hides"].get(number[id(one)], 0) >= hides,
    }[relation]()


def test_captions_are_true_of_their_scene(manifest):
    said = set()
    for scene in manifest["scenes"].values():
        for told in scene["captions"]:
            chosen = [scene["things"][mention["thing"]] for mention in told["mentions"]]
            assert 1 <= len(chosen) <= 3
            assert len({thing["chain"] for thing in chosen}) == len(chosen)
            relation = told.get("relation", "")
            if relation:
                assert stands(relation, *chosen[:2], scene["things"], 0.15, 0.08)
            text = told["text"].casefold()
            for thing, mention in zip(chosen, told["mentions"]):
                size, colour, place = (mention.get(key, "") for key in ("size", "colour", "place"))
                words = " ".join(filter(None, (size, colour, thing["name"])))
                article = "an" if words[0] in "aeiou" else "a"
                assert f" {article} {words} {place}".rstrip() in f" {text}"
                if size:
                    assert SAID_SIZE[size](thing["area"])
                if colour:  # what was drawn, whatever light fell on it
                    assert manifest["cutouts"][thing["cutout"]]["path"].split("/")[0] == colour
                if place:
                    assert placed(place, thing, 0.33, 0.1)
                said |= {size, colour, place, relation}
            if not relation:  # else the place would be read as that of all that were named before
                placed_at = [bool(mention.get("place")) for mention in told["mentions"]]
                assert placed_at == sorted(placed_at, reverse=True)
            if relation:
                first, second = (thing["name"] for thing in chosen[:2])
                assert f"{first} {relation} a" in text
                assert second in text.split(relation)[1]
    assert {"tiny", "small", "large", *COLOURS, "on the left", "on the right", "at the top", "above", "below"} <= said


def test_relevant_images_are_those_that_a_caption_is_true_of(made, manifest):
    """Against a search through all scenes and all ways to assign things, written from the rules."""
    relevant = json.loads((made / "annotations" / "relevant.json").read_text())
    assert relevant.keys() == manifest["scenes"].keys()
    found = 0
    for image_id, scene in manifest["scenes"].items():
        for number, told in enumerate(scene["captions"]):
            expected = []
            for other_id, other in manifest["scenes"].items():
                if other_id == image_id or other["split"] != scene["split"]:
                    continue
                things = other["things"]
                for chosen in itertools.permutations(things, len(told["mentions"])):
                    if all(
                        thing["name"] == scene["things"][mention["thing"]]["name"]
                        and LOOSE_SIZE.get(mention.get("size"), bool)(thing["area"])
                        and ("colour" not in mention or thing["colours"].get(mention["colour"], 0) >= 0.45)
                        and ("place" not in mention or placed(mention["place"], thing, 0.45, 0.2))
                        for thing, mention in zip(chosen, told["mentions"])
                    ) and (len(chosen) < 2 or stands(told.get("relation", ""), *chosen[:2], things, 0.05, 0.03)):
                        expected.append(other_id)
                        break
            assert relevant[image_id][number] == sorted(expected)
            found += len(expected)
            if scene["twin"] and number < 3:
                assert scene["twin"] not in expected  # these captions tell twins apart
    assert found > 20


def test_a_general_name_is_true_of_a_special_thing(made, manifest):
    scenes = {each: dict(scene) for each, scene in manifest["scenes"].items() if scene["split"] == "train"}
    one, _, two, *_ = scenes
    scenes = {one: scenes[one], two: scenes[two]}
    thing = dict(scenes[one]["things"][0])
    scenes[one] |= {"things": [thing], "captions": [{"mentions": [{"thing": 0}]}]}
    scenes[two] |= {"things": [thing | {"name": f"blue {thing['name']}"}], "captions": [{"mentions": [{"thing": 0}]}]}
    assert collage_write.relevant_images(scenes, SIZE) == {one: [[two]], two: [[]]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("red", (200, 20, 25)),
        ("orange", (250, 140, 20)),
        ("brown", (110, 65, 30)),
        ("yellow", (240, 220, 40)),
        ("green", (40, 150, 60)),
        ("blue", (40, 80, 210)),
        ("purple", (130, 50, 180)),
        ("pink", (245, 140, 190)),
        ("black", (20, 20, 22)),
        ("grey", (128, 128, 126)),
        ("white", (245, 244, 240)),
    ],
)
def test_colours_have_their_names(name, value):
    pixels = np.array([value] * 9 + [(20, 200, 20) if name != "green" else (200, 20, 20)], dtype=np.uint8)
    shares = colour_shares(pixels)
    assert list(shares.values()) == [0.9, 0.1]
    assert next(iter(shares)) == name


# --- to the byte ------------------------------------------------------------------------------------------------------


def test_a_seed_fixes_every_byte_whatever_the_workers(made, sources, tmp_path):
    assert write_collages(tmp_path / "two", order(sources), workers=2)
    assert files(tmp_path / "two") == files(made)
    assert write_collages(tmp_path / "other", order(sources, seed=4), workers=2)
    other = files(tmp_path / "other")
    pictures = {name: data for name, data in files(made).items() if name.endswith(".jpg")}
    assert len(set(pictures.values())) == len(pictures) == sum(COUNTS.values())
    assert not set(pictures.values()) & set(other.values())


def test_the_same_order_is_kept_and_another_refused(made, sources, tmp_path):
    root = shutil.copytree(made, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert write_collages(root, order(sources), workers=1) is False
    for changes in ({"seed": 4}, {"counts": {**COUNTS, "val": 4}}, {"size": 130}, {"skip": ("red",)}):
        with pytest.raises(InputError, match="exists and holds something else; name another folder or remove it"):
            write_collages(root, order(sources, **changes), workers=1)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    for place in (tmp_path / "mine", tmp_path / "mine" / "note.txt"):
        with pytest.raises(InputError, match="exists and holds something else"):
            write_collages(place, order(sources), workers=1)
    assert files(tmp_path / "mine") == {"note.txt": b"mine"}


def test_changed_pictures_are_another_order(made, sources, tmp_path):
    root = shutil.copytree(made, tmp_path / "copy")
    moved = shutil.copytree(sources, tmp_path / "moved")
    same = order(sources, cutouts=(str(moved / "cutouts"),), backgrounds=(str(moved / "grounds"),))
    assert write_collages(root, same, workers=1) is False  # wherever they lie
    (moved / "cutouts" / "red" / "vehicles" / "owl.txt").write_text("A barn owl.\n")
    with pytest.raises(InputError, match="exists and holds something else"):
        write_collages(root, same, workers=1)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_ended_run_goes_on_where_it_was(made, sources, tmp_path, monkeypatch, failure):
    root = tmp_path / "collage"
    original = collage_write._write_scene

    def failing(place, group, twin, made_):
        if (group.number, twin) == (4, 1):
            raise failure
        original(place, group, twin, made_)

    with monkeypatch.context() as patch:
        patch.setattr(collage_write, "ProcessPoolExecutor", ThreadPoolExecutor)  # so that the patch reaches the workers
        patch.setattr(collage_write, "_write_scene", failing)
        with pytest.raises(type(failure)):
            write_collages(root, order(sources), workers=1)
    kept = {path: path.stat().st_ino for path in (root / "images" / "Images").glob("*.jpg")}
    assert 3 < len(kept) < sum(COUNTS.values())
    assert not (root / "annotations" / "train.txt").exists()  # nobody takes a part for the whole
    (root / "images" / "Images" / ".00000001.jpg.1234abcd.samer-tmp").write_bytes(b"half")  # of a kill
    assert write_collages(root, order(sources), workers=1) is True
    assert files(root) == files(made)
    whole = [path for path in kept if int(path.stem) % 2 == 0]  # of pairs that were done
    assert whole
    assert all(path.stat().st_ino == kept[path] for path in whole)


def test_one_run_at_a_time(sources, tmp_path, monkeypatch):
    """A second run of the same order is refused while the first writes."""
    original = collage_write._write_all

    def twice(root, *rest):
        with pytest.raises(InputError, match="another process is writing"), collage_write.only_writer(root):
            pass
        original(root, *rest)

    monkeypatch.setattr(collage_write, "_write_all", twice)
    assert write_collages(tmp_path / "out", order(sources, counts={"test": 2}), workers=1)
    assert not (tmp_path / "out" / ".lock").exists()


# --- sources ----------------------------------------------------------------------------------------------------------


def test_sources_and_licences_are_recorded(made, sources):
    text = (made / "SOURCES").read_text()
    first, licence, second, none = text.splitlines()
    assert first == f"cut-outs from {sources / 'cutouts'}"
    copy = licence.rpartition("see ")[2]
    assert str(sources / "cutouts" / "LICENSE") in licence
    assert (made / copy).read_text() == "do as you like\n"
    assert second == f"backgrounds from {sources / 'grounds'}"
    assert "no LICENSE, COPYING or copyright file was found" in none


def test_a_debian_package_brings_its_copyright(tmp_path):
    share = tmp_path / "pkg" / "usr" / "share"
    for place in (share / "stamps" / "animals", share / "doc" / "stamps-default", share / "doc" / "other"):
        place.mkdir(parents=True)
    for package in ("stamps-default", "other"):
        (share / "doc" / package / "copyright").write_text(package)
    both = [share / "doc" / package / "copyright" for package in ("other", "stamps-default")]
    assert collage_sources.find_licences(share / "stamps" / "animals") == both
    lists = tmp_path / "pkg" / "var" / "lib" / "dpkg" / "info"
    lists.mkdir(parents=True)
    (lists / "stamps-default:all.list").write_text("/usr\n/usr/share/stamps\n/usr/share/stamps/animals\n")
    (lists / "other.list").write_text("/usr\n/usr/share/doc/other\n")
    assert collage_sources.find_licences(share / "stamps" / "animals") == both[1:]


def reasons(left_out):
    return {each.source.path: each.reason for each in left_out}


def test_what_is_no_cutout_is_left_out_and_said(tmp_path):
    folder = tmp_path / "cutouts"
    rng = np.random.default_rng(0)
    draw_cutout(folder, "good", "A good thing.", (200, 30, 30), rng)
    draw_cutout(folder, "Zombie", "A zombie.", (200, 30, 30), rng)
    draw_cutout(folder, "zambie", "A zambie.", (200, 30, 30), rng)
    draw_cutout(folder / "Cartoon", "pretty", "A pretty thing.", (200, 30, 30), rng)
    for stem in ("nameless", "odd", "foreign"):
        draw_cutout(folder, stem, "A thing.", (200, 30, 30), rng)
    (folder / "nameless.txt").unlink()
    (folder / "odd.txt").write_text("Eat this!\n")
    (folder / "foreign.txt").write_bytes("Ein K\u00e4fer.".encode("latin-1"))
    opaque = noisy(rng, 60, 60, (90, 90, 90), 9)
    opaque.save(folder / "opaque.png")
    opaque.putalpha(255)
    opaque.save(folder / "rectangle.png")
    opaque.putalpha(90)
    opaque.save(folder / "ghost.png")
    drawing = Image.new("RGBA", (80, 80))
    ImageDraw.Draw(drawing).ellipse((5, 5, 70, 70), fill=(200, 30, 30, 255))
    drawing.save(folder / "drawing.png")
    for stem in ("opaque", "rectangle", "ghost", "drawing", "broken", "text"):
        (folder / f"{stem}.txt").write_text("A thing.\n")
    (folder / "broken.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    (folder / "text.png").write_text("no picture")
    shutil.copy(folder / "good.png", folder / "zcopy.png")
    found = collage_sources.find_files([folder], ["cartoon", "z[a-c]mbie"])
    (tmp_path / "place").mkdir()
    with ThreadPoolExecutor(1) as pool:
        taken, left = collage_sources.take_cutouts(found, tmp_path / "place", SIZE, pool)
    assert [each.name.phrase() for each in taken] == ["a zombie", "a good thing"]
    assert reasons([*found.left_out, *left]) == {
        "Cartoon/pretty.png": "skipped as asked",
        "zambie.png": "skipped as asked",
        "zcopy.png": "the same file again",
        "nameless.png": "no name",
        "odd.png": "no name",
        "foreign.png": "name can't be read",
        "opaque.png": "no transparency",
        "rectangle.png": "no transparency",
        "ghost.png": "hardly solid",
        "drawing.png": "a drawing",
        "broken.png": "damaged",
        "text.png": "not a picture",
    }
    assert "2 no name (nameless.png, ...)" in collage_sources.counted(left, names=1)


def test_one_picture_in_several_sizes_is_one_background(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "grounds"
    (folder / "hills").mkdir(parents=True)
    small = [rng.uniform(0, 255, (9, 12, 3)).astype(np.uint8) for _ in range(3)]
    big = [Image.fromarray(each).resize((400, 300), Image.Resampling.BICUBIC) for each in small]
    big[0].save(folder / "hills" / "400x300.png")
    big[0].resize((200, 150)).save(folder / "hills" / "200x150.png")
    big[1].save(folder / "lake.png")
    big[1].resize((320, 240)).save(folder / "other-name.jpg")
    big[2].save(folder / "sea_400x300.png")
    big[2].rotate(90).resize((150, 300)).save(folder / "sea_150x300.png")
    big[2].resize((100, 75)).save(folder / "thumb.png")
    Image.new("RGB", (200, 200), "grey").save(folder / "plain.png")
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (tmp_path / "place").mkdir()
    with ThreadPoolExecutor(1) as pool:
        taken, left = collage_sources.take_backgrounds(
            collage_sources.find_files([folder]), tmp_path / "place", SIZE, pool
        )
    assert [each.source.path for each in taken] == ["hills/400x300.png", "lake.png", "sea_400x300.png"]
    found = reasons(left)
    assert found.pop("torn.jpg") in ("damaged", "not a picture", "cut short")
    assert found == {
        "hills/200x150.png": "the same picture again",
        "other-name.jpg": "the same picture again",
        "sea_150x300.png": "the same picture again",
        "thumb.png": "smaller than a scene",
        "plain.png": "of one colour",
    }
    for each in taken:
        with Image.open(each.image) as image:
            assert min(image.size) == int(collage_sources.KEPT * SIZE)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": {"train": 4, "val": 0}}, "val asks for 0 scenes; ask for at least 1"),
        ({"size": 40}, "a size of 40 pixels; give at least"),
        ({"seed": -1}, "the seed is -1"),
        ({"cutouts": ("nowhere",)}, "nowhere: no such folder"),
        ({"cutouts": ("{empty}",)}, r"empty: no pictures that could be cut-outs \(nothing else there\)"),
        ({"skip": ("red", "green", "blue")}, "no pictures that could be cut-outs .*skipped as asked"),
        (
            {"cutouts": ("{grounds}",)},
            r"grounds: no cut-outs that can be used: 6 no name \(.*\); what is needed: each is a PNG with transparency",
        ),
        (
            {"skip": ("green", "blue", "b*", "c*", "k*")},
            "cutouts: cut-outs of 10 names for train, 16 are needed; give more",
        ),
        ({"skip": ("ground[0-3]",)}, "grounds: 2 backgrounds for 3 splits, which share none; give more"),
        ({"backgrounds": ("{empty}",)}, "empty: no pictures that could be backgrounds"),
        (
            {"backgrounds": ("{cutouts}/red",), "size": 260},
            "red: no backgrounds that can be used: 20 smaller than a scene .*; what is needed: at least 260 pixels",
        ),
        ({"separate": True}, "names for .*, 16 are needed"),
    ],
)
def test_bad_orders_are_refused_with_the_remedy(sources, tmp_path, changes, words):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty", "grounds": sources / "grounds", "cutouts": sources / "cutouts"}
    changes = {
        key: tuple(word.format(**places) for word in value) if isinstance(value, tuple) else value
        for key, value in changes.items()
    }
    with pytest.raises(InputError, match=words) as caught:
        write_collages(tmp_path / "out", order(sources, **changes), workers=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "scenes.json").exists()


def test_the_script_says_what_it_writes(sources, tmp_path, script, capsys):
    words = ["--cutouts", str(sources / "cutouts"), "--backgrounds", str(sources / "grounds"), "--size", "128"]
    words += ["--out", str(tmp_path / "c"), "--train", "2", "--val", "1", "--test", "2", "--skip", "blue"]
    script("collage").main(words)
    out = capsys.readouterr().out
    assert "cut-outs taken; left out: " in out
    assert "skipped as asked (blue/vehicles/" in out
    assert f"writing 5 scenes of 128 x 128 pixels to {tmp_path / 'c'}: things of 20 names, sizes 0.5 % to 30 %" in out
    assert f"5 scenes with 25 captions written to {tmp_path / 'c'} in " in out
    script("collage").main(words)
    assert capsys.readouterr().out == f"5 scenes with 25 captions already in {tmp_path / 'c'}\n"
    assert Path(tmp_path / "c" / "annotations" / "relevant.json").is_file()
