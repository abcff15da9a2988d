"""COCO in both forms: which captions count, boxes by hand and against loops over the files, folds, refusals."""

import json
from collections import Counter
from pathlib import Path

import data_sets
import pytest
import torch

from samer.config import InputError
from samer.coords import visual_coords
from samer.data import make_reader
from samer.data.coco import Coco
from samer.data.records import Things
from samer.objects import instance_labels
from samer.training.batches import CaptionDataset, label_boxes


@pytest.fixture
def root(tmp_path):
    return data_sets.coco(tmp_path / "coco")


def change(path, edit):
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


def test_a_number_beyond_what_floats_hold_is_refused(root):
    change(root / "annotations/instances_val2017.json", lambda v: v["annotations"][0]["bbox"].__setitem__(2, 10**309))
    assert "annotation 1: bbox: number must be" in refusal(root)


def refusal(root, split="val", boxes=True, **more):
    with pytest.raises(InputError) as caught:
        Coco().load_split(root, split, boxes=boxes, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_first_five_captions_of_an_image_count(root, capsys):
    records = Coco().load_split(root, "val2017", boxes=False)
    assert [record.image_id for record in records] == ["1", "2", "3", "4"]  # the order of `images`
    assert [caption.text for caption in records[2].captions] == [f"A dog {n} of 3 ." for n in range(5)]
    assert all(len(record.captions) == 5 and record.things == () for record in records)
    assert "6 captions beyond the first 5" in capsys.readouterr().out  # 5 + 6 + 7 + 8 are 26 - 20
    assert records[0].image_path == root / "val2017/000000000001.jpg"


def test_boxes_are_things_of_the_image_by_category(root):
    records = Coco().load_split(root, "val", boxes=True)  # the only one that begins so
    assert records[1].things == (
        Things("dog", ((0, 0, 0.5, 1), (0.5, 0, 30.5 / 40, 0.25))),
        Things("cat", ((0.75, 0.5, 1, 1),)),
    )
    assert records[0].things == (Things("dog", ((0, 0, 0.5, 1),)),)
    assert Coco().find(root, "val2017", "2") == records[1]
    assert Coco().find(root, "val2017", "../2") is None


def test_things_become_the_labels_of_every_caption(root):
    """Categories count as phrases, each box is an instance; the patches under it are counted by hand."""
    dataset = CaptionDataset(Coco().load_split(root, "val", boxes=True))
    assert dataset.boxless() == 0
    (row,) = [row for row in dataset.rows if row.caption.text == "A dog 1 of 2 ."]
    boxes, owners = label_boxes(row.record, row.caption)
    assert owners.tolist() == [0, 0, 1]
    labels = instance_labels(visual_coords(4, 4), [boxes], phrases=[owners])[0].reshape(4, 4)
    assert labels.tolist() == [[1, 1, 2, 0], [1, 1, 0, 0], [1, 1, 0, 3], [1, 1, 0, 3]]
    kept = instance_labels(visual_coords(4, 4), [boxes], phrases=[owners], max_phrases=1)[0]
    assert set(kept.tolist()) == {0, 1, 2}  # dogs are the larger kind


def test_without_instances_there_are_no_boxes(root):
    (root / "annotations/instances_val2017.json").unlink()
    assert not Coco().check(root)
    dataset = CaptionDataset(Coco().load_split(root, "val", boxes=True))
    assert dataset.boxless() == len(dataset) == 20
    assert torch.equal(label_boxes(dataset.rows[0].record, dataset.rows[0].caption)[0], torch.empty(0, 4))


def test_boxes_are_read_only_where_they_are_asked_for(root):
    (root / "annotations/instances_val2017.json").write_text("{")
    assert len(Coco().load_split(root, "val", boxes=False)) == 4
    assert "instances_val2017.json: malformed JSON" in refusal(root)


def test_karpathy_splits(tmp_path):
    five = [f"Text {n}." for n in range(5)]
    rows = [
        (9, "test", five),
        (1, "train", five),
        (2, "restval", [*five, "More."]),
        (3, "val", five),
        (8, "test", five),
    ]
    root = data_sets.karpathy(tmp_path, rows)
    ids = lambda split: [record.image_id for record in Coco().load_split(root, split, boxes=False)]
    assert [ids(split) for split in ("train", "restval", "val", "test")] == [["1", "2"], ["2"], ["3"], ["9", "8"]]
    assert ids("test[1:2]") == ["8"]  # a fold
    assert Coco().splits(root) == ["train", "val", "test"]
    assert "no split 'dev'; use one of restval, test, train, val" in refusal(root, "dev")
    records = Coco().load_split(root, "train", boxes=True)
    assert [len(record.captions) for record in records] == [5, 5]
    assert records[1].image_path == root / "train2014/COCO_train2014_000000000002.jpg"


def test_boxes_and_pictures_of_the_other_year_serve(tmp_path, capsys):
    root = data_sets.karpathy(tmp_path, [(2, "test", ["A."]), (70, "test", ["B."])])
    data_sets.coco(root)
    (root / "val2014/COCO_val2014_000000000002.jpg").unlink()
    (root / "annotations/captions_val2017.json").unlink()
    two, seventy = Coco().load_split(root, "test", boxes=True)
    assert two.image_path == root / "val2017/000000000002.jpg"
    assert [things.name for things in two.things] == ["dog", "cat"]
    assert seventy.things == ()
    assert "1 images are in no instances file" in capsys.readouterr().out


def test_a_karpathy_file_of_other_pictures(tmp_path):
    data_sets.picture(tmp_path / "images/12.jpg")
    row = {"filename": "12.jpg", "imgid": 0, "split": "test", "sentences": [{"raw": "A dog."}]}
    data_sets.write(tmp_path / "dataset_flickr30k.json", {"images": [row]})
    (record,) = make_reader("", tmp_path).load_split(tmp_path, "test", boxes=True)
    assert (record.image_id, record.captions[0].text) == ("12", "A dog.")


WRONG = {
    "no list": (lambda v: v.pop("images"), "captions", "no list 'images'"),
    "id": (lambda v: v["images"][1].update(id="2"), "captions", "image 2: id must be a whole number; it is '2'"),
    "no name": (lambda v: v["images"][1].pop("file_name"), "captions", "image 2: file_name must be text"),
    "no object": (lambda v: v["images"].__setitem__(0, None), "captions", "image 1: not a JSON object; correct it"),
    "twice": (lambda v: v["images"][1].update(id=1), "captions", "image 2: 1 is also image 1; remove one"),
    "no text": (lambda v: v["annotations"][3].update(caption=4), "captions", "annotation 4: caption must be text"),
    "blank": (lambda v: v["annotations"][0].update(caption=" "), "captions", "image 4: caption 1 is empty"),
    "stray": (lambda v: v["annotations"][0].update(image_id=77), "captions", "of image 77, which is not in images"),
    "bbox": (lambda v: v["annotations"][0].update(bbox=[1, 2]), "instances", "annotation 1: bbox must be x, y"),
    "NaN": (lambda v: v["annotations"][0]["bbox"].__setitem__(0, float("nan")), "instances", "annotation 1: bbox"),
    "category": (lambda v: v["categories"].pop(2), "instances", "annotation 1: category 18 is not in categories"),
    "width": (lambda v: v["images"][0].update(width=0), "instances", "image 1: its size is 0 x 20"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named(root, case):
    edit, kind, expected = WRONG[case]
    path = root / f"annotations/{kind}_val2017.json"
    change(path, edit)
    assert refusal(root).startswith(f"{path}: ")
    assert expected in refusal(root)


def test_missing_pictures_are_counted(root):
    (root / "val2017/000000000003.jpg").unlink()
    assert "1 of 4 images are absent, the first is 000000000003.jpg; restore it" in refusal(root)
    assert "no split 'train'; use one of val2017" in refusal(root, "train")
    assert "limit_images is 0" in refusal(root, limit_images=0)
    assert "not a folder" in refusal(root / "none")


def test_boxes_outside_and_of_other_pictures_are_left_out_and_told(root, capsys):
    path = root / "annotations/instances_val2017.json"
    change(path, lambda v: v["annotations"][0].update(bbox=[30, 0, 12, 20]))
    data_sets.picture(root / "val2017/000000000003.jpg", 20, 40)
    records = Coco().load_split(root, "val", boxes=True)
    assert [bool(record.things) for record in records] == [False, True, False, True]
    told = capsys.readouterr().out
    assert "1 boxes of 1 images are empty, inverted or outside" in told
    assert "1 pictures have another shape" in told
    assert "annotation 1: bbox (30, 0, 12, 20) is empty or outside" in refusal(root, strict=True)


def test_against_loops_over_the_files(root):
    """Counts and every box, by the plainest reading of both files."""
    instances = json.loads((root / "annotations/instances_val2017.json").read_text())
    expected = Counter()
    for row in instances["annotations"]:
        if not row["iscrowd"]:
            x, y, w, h = row["bbox"]
            expected[str(row["image_id"]), x / 40, y / 20, (x + w) / 40, (y + h) / 20] += 1
    records = Coco().load_split(root, "val", boxes=True)
    found = Counter((r.image_id, *box) for r in records for things in r.things for box in things.boxes)
    assert found == expected
    assert len(found) == 6
    assert isinstance(records[0].image_path, Path)
