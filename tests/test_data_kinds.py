"""ImageCoDe, caption files, one's own lines; whose folder is whose; all defects of a data set in one report."""

import json
import re

import data_sets
import pytest
from PIL import Image

from samer.config import DataConfig, InputError, load_config
from samer.data import READERS, guess_name, make_reader
from samer.data.records import Things
from samer.data.survey import survey
from samer.retrievers import FAMILIES
from samer.runtime.commands import DATA_KINDS

MAKERS = {
    "coco": data_sets.coco,
    "imagecode": data_sets.imagecode,
    "captions": data_sets.captions,
    "jsonl": data_sets.lines,
}


@pytest.fixture
def made(tmp_path):
    """Makes a data set of a kind, in its own folder."""
    return lambda name: MAKERS[name](tmp_path / name / "set")


def read(name, root, split, **more):
    return make_reader(name).load_split(root, split, **{"boxes": True, **more})


def refusal(name, root, split, **more):
    with pytest.raises(InputError) as caught:
        read(name, root, split, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_a_folder_s_kind_is_guessed_and_told(made, name, capsys):
    root = made(name)
    assert make_reader("", root) is READERS[name]
    assert capsys.readouterr().out == f"note: {root} is read as {name} (data.name={name})\n"
    make_reader("", root)
    make_reader(name, root)
    assert capsys.readouterr().out == ""  # told once, and only what was guessed


def test_flickr_is_guessed(world, tmp_path):
    assert guess_name(world) == "flickr"
    with pytest.raises(InputError, match=r"no data set of a known kind \(flickr: .*; jsonl: .*data\.name"):
        guess_name(tmp_path)
    with pytest.raises(InputError, match=r"none: not a folder; point DATA_ROOT"):
        guess_name(tmp_path / "none")


def test_help_lists_every_kind_of_data_and_every_retriever(script):
    listed = re.findall(r"\w+", DATA_KINDS.partition(": ")[2])
    assert set(READERS) == set(listed) - {"or", "guessed"}
    text = script("train").__doc__.lower()
    assert [name for name in READERS if not re.search(rf"\b{name}\b", text)] == []
    assert [name for name in FAMILIES if re.sub("ForRetrieval|Retriever", "", name).lower() not in text] == []


def test_the_older_word_for_the_kind_stays(tmp_path):
    assert load_config(None, ["data.reader=coco"]).data == DataConfig(name="coco")
    assert load_config(None, []).data.name == ""
    (tmp_path / "config.yaml").write_text("data: {reader: flickr}\n")  # of a run of an earlier version
    assert load_config(tmp_path / "config.yaml").data.name == "flickr"
    assert DataConfig(name="coco", reader="coco").name == "coco"
    with pytest.raises(InputError, match=r"data\.reader must be what data\.name says, 'coco', or left out"):
        DataConfig(name="coco", reader="flickr")


# --- ImageCoDe --------------------------------------------------------------------------------------------------------


def test_imagecode_counts_by_the_number_of_the_frame(made):
    root = made("imagecode")
    records = read("imagecode", root, "val")
    assert [record.image_id for record in records][:10] == [f"set-0/img{7 * k}" for k in range(1, 11)]
    told = {record.image_id: [caption.text for caption in record.captions] for record in records if record.captions}
    assert told == {
        "set-0/img21": ["The third of 0."],
        "set-0/img70": ["The last of 0."],
        "set-1/img21": ["The third of 1."],
        "set-1/img70": ["The last of 1."],
    }
    assert not READERS["imagecode"].check(root)
    assert [r.image_id for r in read("imagecode", root, "valid[10:]", limit_images=1)] == ["set-1/img7"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"set-9": {"0": "A."}}, "no folder 'set-9'"),
        ({"set-0": {"10": "A."}}, "valid_data.json: set set-0: index '10' is not 0 to 9"),
        ({"set-0": {"1": ""}}, "set set-0: index 1 has no caption"),
        ({"set-0": ["A."]}, "set set-0: expected an object of captions by index"),
        ([], "expected a JSON object"),
    ],
)
def test_imagecode_names_what_is_wrong(made, value, expected):
    root = made("imagecode")
    data_sets.write(root / "data/valid_data.json", value)
    assert expected in refusal("imagecode", root, "val")


def test_imagecode_needs_ten_pictures_and_answers(made):
    root = made("imagecode")
    (root / "data/image-sets/set-1/img14.jpg").unlink()
    assert "set-1: 9 pictures img<number>.jpg, not 10" in refusal("imagecode", root, "val")
    assert "no train_data.json" in refusal("imagecode", root, "train")
    assert "test has no published answers" in refusal("imagecode", root, "test")


# --- caption files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "dev"])
def test_caption_files_have_ids_a_caption_or_an_image(made, split):
    root = made("captions")
    records = read("captions", root, split)
    assert [record.image_id for record in records] == ["10", "11", "12"]
    assert [[c.text for c in r.captions] for r in records] == [
        [f"Caption {n} of {each}." for n in range(5)] for each in (10, 11, 12)
    ]
    assert records[0].image_path.read_bytes() == (root.parent / "coco-images/val2014/10.jpg").read_bytes()


def test_long_captions_are_a_split_of_their_own(made):
    root = made("captions")
    assert READERS["captions"].splits(root) == ["dev", "test", "dense_test"]
    records = read("captions", root, "dense_test")
    assert [[c.text for c in r.captions] for r in records] == [[f"A long text of {k}."] for k in (10, 11, 12)]
    rows = [{"image_id": 12, "text": "Twelve."}, {"image_id": 10, "text": "Ten."}, {"image_id": 11, "text": "x" * 2000}]
    data_sets.write(root / "coco_test.jsonl", "\n".join(map(json.dumps, rows)))
    texts = [r.captions[0].text for r in read("captions", root, "dense_test")]
    assert texts == ["Ten.", "x" * 1000, "Twelve."]
    assert "line 3: 2,000 characters" in refusal("captions", root, "dense_test", strict=True)


@pytest.mark.parametrize(
    ("name", "text", "split", "expected"),
    [
        ("test_ids.txt", "10\n11\n", "test", "test_ids.txt: 2 ids for 15 captions in test_caps.txt"),
        ("test_caps.txt", "A.\n" * 2 + "\n" + "A.\n" * 12, "test", "test_caps.txt: line 3: empty caption"),
        ("id_mapping.json", '{"10": "../x.jpg"}', "test", "id '10': '../x.jpg' is no path below"),
        ("id_mapping.json", '{"10": "val2014/10.jpg"}', "test", "id '11': 11 must be text"),
        (
            "id_mapping.json",
            '{"10": "a.jpg", "11": "val2014/11.jpg", "12": "b.jpg"}',
            "test",
            "2 of 3 images are absent",
        ),
        ("coco_test.jsonl", '{"text": "A."}\n', "dense_test", "1 lines for 3 images of the split"),
        ("coco_test.jsonl", '{"text": "A."}\nno\n{}\n', "dense_test", "coco_test.jsonl: line 2: not a JSON object"),
        ("coco_test.jsonl", '{"text": "A.", "image_id": 7}\n', "dense_test", "line 1: image_id '7' is not in test_ids"),
        ("coco_test.jsonl", '{"text": "A.", "image_id": 10}\n', "dense_test", "image '11' has no caption"),
        ("other_test.jsonl", "", "dense_test", "2 files *_test.jsonl"),
    ],
)
def test_caption_files_name_what_is_wrong(made, name, text, split, expected):
    root = made("captions")
    (root / name).write_text(text)
    assert expected in refusal("captions", root, split)


# --- one's own --------------------------------------------------------------------------------------------------------


def test_own_lines(made):
    root = made("jsonl")
    first, second, third = read("jsonl", root, "train")
    assert first.things == (Things("1", ((0.25, 0, 0.75, 1),)), Things("2", ((0, 0, 1, 0.5),)))
    assert (first.image_id, [c.text for c in first.captions]) == ("a/1.png", ["A dog.", "A red dog."])
    assert ([c.text for c in second.captions], third.captions) == (["A cat."], ())
    assert READERS["jsonl"].check(root)
    assert read("jsonl", root, "train", boxes=False)[0].things == ()
    assert READERS["jsonl"].find(root, "train", "a/1.png") == first


def test_own_boxes_may_be_of_another_size(made):
    root = made("jsonl")
    row = {"image": "b.png", "captions": ["A."], "boxes": [[100, 0, 300, 200]], "width": 400, "height": 200}
    data_sets.lines(root, rows=[row])
    assert read("jsonl", root, "train")[0].things == (Things("1", ((0.25, 0, 0.75, 1),)),)
    data_sets.lines(root, rows=[{**row, "height": 300}])
    assert read("jsonl", root, "train")[0].things == ()
    assert "line 1: a picture of 400 x 300 was annotated, and b.png is displayed as 40 x 20" in refusal(
        "jsonl", root, "train", strict=True
    )


OWN = {
    "no JSON": ('{"image": ', "line 1: not a JSON object"),
    "a list": ('["image"]', "line 1: not a JSON object"),
    "a large box": (
        f'{{"image": "3.png", "captions": [], "boxes": [[0, 0, 1, {10**309}]]}}',
        "line 1: box 1: number must be",
    ),
    "no captions": ('{"image": "3.png"}', "line 1: captions must be a list"),
    "no text": ('{"image": "3.png", "captions": ["A.", 3]}', "line 1: caption 2 is no text"),
    "outside": ('{"image": "../3.png", "captions": []}', "line 1: '../3.png' is no path below"),
    "absent": ('{"image": "9.png", "captions": []}', "1 of 1 images are absent, the first is 9.png (line 1)"),
    "box": ('{"image": "3.png", "captions": [], "boxes": [[1, 2, 3]]}', "line 1: box 1 must be x1, y1, x2, y2"),
    "words": (
        '{"image": "3.png", "captions": [], "boxes": [[1, 2, 3, "4"]]}',
        "line 1: box 1: number must be",
    ),
    "size": ('{"image": "3.png", "captions": [], "boxes": [[0, 0, 1, 1]], "width": 4}', "line 1: height must be a"),
    "twice, dotted": (
        '{"image": "3.png", "captions": []}\n{"image": "./3.png", "captions": []}',
        "line 2: '3.png' stands in line 1",
    ),
    "twice, by folder": (
        '{"image": "3.png", "captions": []}\n{"image": "images/3.png", "captions": []}',
        "line 2: 'images/3.png' is the picture of line 1",
    ),
    "twice": ('{"image": "3.png", "captions": []}\n\n{"image": "3.png", "captions": []}', "line 3: '3.png' stands in"),
}


@pytest.mark.parametrize("case", OWN)
def test_own_lines_name_what_is_wrong(made, case):
    root, (text, expected) = made("jsonl"), OWN[case]
    (root / "train.jsonl").write_text(text + "\n")
    assert refusal("jsonl", root, "train").startswith(f"{root / 'train.jsonl'}: ")
    assert expected in refusal("jsonl", root, "train")


# --- all defects in one report ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("coco", {"val2017": (4, 20, 6)}),
        ("imagecode", {"valid": (20, 4, 0)}),
        ("captions", {"dev": (3, 15, 0), "test": (3, 15, 0), "dense_test": (3, 3, 0)}),
        ("jsonl", {"train": (3, 3, 2)}),
    ],
)
def test_a_sound_data_set_has_no_defects(made, script, capsys, name, counts):
    root = made(name)
    found = survey(root)
    assert (found.name, found.splits, found.defects) == (name, counts, [])
    script("verify").main(["--data", str(root)])
    assert f"a data set of kind {name}\n" in (told := capsys.readouterr().out)
    assert told.endswith("0 defects\n")


def test_all_defects_are_in_one_report(made, script, capsys):
    """One of each, in several files: none hides another."""
    root = made("coco")
    path = root / "annotations/captions_val2017.json"
    value = json.loads(path.read_text())
    value["images"][0].pop("file_name")
    value["annotations"][2].update(caption=" ")
    value["annotations"][7].update(image_id=None)
    path.write_text(json.dumps(value))
    boxes = root / "annotations/instances_val2017.json"
    value = json.loads(boxes.read_text())
    value["annotations"][1].update(bbox=[39, 0, 20, 20])
    value["annotations"][2].update(category_id=99)
    boxes.write_text(json.dumps(value))
    (root / "val2017/000000000004.jpg").unlink()
    picture = root / "val2017/000000000003.jpg"
    picture.write_bytes(picture.read_bytes()[:-200])
    wanted = [
        "captions_val2017.json: image 1: file_name must be text",
        "captions_val2017.json: annotation 8: image_id must be a whole number",
        "captions_val2017.json: image 2: caption 1 is empty",
        "captions_val2017.json: a caption is of image 1, which is not in images",
        "no picture 000000000004.jpg; restore it",
        "instances_val2017.json: annotation 3: category 99 is not in categories",
        "000000000003.jpg: ",
        "bbox (39, 0, 20, 20) is empty or outside",
    ]
    found = survey(root).defects
    assert [sum(each in line for line in found) for each in wanted] == [1] * len(wanted)
    assert len(found) == len(wanted)
    with pytest.raises(SystemExit) as left:
        script("verify").main(["--data", str(root), "--name", "coco"])
    assert left.value.code == 1
    assert "8 defects:\n" in (told := capsys.readouterr().out)
    assert all(line in told for line in found)


def test_twenty_defects_are_shown_and_all_counted(made, script, capsys):
    root = made("jsonl")
    rows = [{"image": f"{k}.png", "captions": [5]} for k in range(31)]
    data_sets.lines(root, rows=rows)
    with pytest.raises(SystemExit):
        script("verify").main(["--data", str(root)])
    told = capsys.readouterr().out.splitlines()
    assert told[2] == "31 defects, the first 20:"
    assert [line.split(": ")[1] for line in told[3:]] == [f"line {k}" for k in range(1, 21)]


def test_what_does_no_harm_is_a_note(made, script, capsys):
    """Boxes of a copy that was stretched to a square are usable; of one that has other proportions they are not."""
    root = made("jsonl")
    row = {"image": "b.png", "captions": ["A."], "boxes": [[0, 0, 50, 50]], "width": 100, "height": 100}
    data_sets.lines(root, rows=[row, {**row, "image": "c.png"}])
    found = survey(root)
    assert (found.splits, found.defects) == ({"train": (2, 2, 2)}, [])
    (line,) = found.notes
    assert line.startswith("2 pictures, or what was annotated, were stretched to a square")
    script("verify").main(["--data", str(root)])
    assert capsys.readouterr().out.splitlines()[-2:] == [f"  note: {line}", "0 defects"]
    data_sets.lines(root, rows=[row, {**row, "image": "c.png", "width": 90}])
    found = survey(root)
    assert (len(found.defects), len(found.notes)) == (1, 1)
    assert "line 2: a picture of 90 x 100 was annotated" in found.defects[0]


def test_flickr_s_defects_are_collected(world, tmp_path):
    import shutil

    root = tmp_path / "world"
    shutil.copytree(world, root)
    notes, images = root / "annotations", root / "images/Images"
    ids = (notes / "train.txt").read_text().split()
    assert survey(root).defects == []
    (images / f"{ids[0]}.jpg").unlink()
    (images / f"{ids[1]}.jpg").unlink()
    (notes / "Annotations" / f"{ids[2]}.xml").write_text("<annotation>")
    sentences = notes / "Sentences" / f"{ids[3]}.txt"
    sentences.write_text("A man [\n" * 2 + "A man .\n" * 3)
    (notes / "train.txt").write_text("\n".join([*ids, ids[4], "../x"]) + "\n")
    Image.new("RGB", (4, 4)).save(images / f"{ids[5]}.jpg", "BMP")
    (images / f"{ids[6]}.jpg").write_bytes(b"no picture")
    found = survey(root)
    wanted = [
        f"{ids[0]}.jpg",
        f"{ids[1]}.jpg",
        f"{ids[2]}.xml: malformed XML",
        "line 1: malformed",
        "line 2: malformed",
    ]
    wanted += [f"{ids[4]!r} is also on line 5", "'../x' is not an image id", f"{ids[6]}.jpg: not a readable image"]
    wanted += ["3 captions, expected exactly 5"]
    assert [sum(each in line for line in found.defects) for each in wanted] == [1] * len(wanted)
    assert found.splits["val"] == survey(world).splits["val"]


def test_verify_takes_paths_or_a_data_set(script, made, capsys):
    for words in ([], ["x", "--data", "y"], ["--name", "coco"], ["x", "--name", "coco"]):
        with pytest.raises(SystemExit):
            script("verify").main(words)
    assert "name paths, or a data set with --data" in capsys.readouterr().err


def test_own_lines_are_known_by_their_first_line(made):
    root = made("jsonl")
    (root / "train.jsonl").write_text(json.dumps({"captions": ["long " * 2000], "image": "3.png"}) + "\n")
    assert guess_name(root) == "jsonl"
    (root / "train.jsonl").write_text('\n{"image": "3.png", "captions": []}\n')
    assert [r.image_id for r in read("jsonl", root, "train")] == ["3.png"]


def test_split_files_beside_own_lines_are_no_flickr(made):
    root = made("jsonl")
    (root / "train.txt").write_text("3\n")
    assert guess_name(root) == "jsonl"
    (root / "annotations").mkdir()  # beside images
    assert guess_name(root) == "flickr"
    (root / "annotations").rmdir()
    (root / "Sentences").mkdir()
    assert guess_name(root) == "flickr"
