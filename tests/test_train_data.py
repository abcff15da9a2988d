"""Records to batches: what every row of a batch belongs to, and which boxes label it."""

from pathlib import Path

import pytest
import torch
from oracle import naive_labels
from PIL import Image

from samer.config import InputError, ObjectsConfig
from samer.data import flickr, pictures
from samer.data.records import Caption, ImageRecord, Phrase
from samer.retrievers import hf
from samer.runtime.progress import batched
from samer.training import batches
from samer.training.batches import CaptionDataset, Collator, Row, StepBatches, caption_boxes

LEFT, RIGHT, WHOLE = (0.0, 0.0, 0.45, 1.0), (0.55, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)
CORNER, SPECK = (0.0, 0.0, 0.2, 0.2), (0.1, 0.1, 0.15, 0.15)


@pytest.fixture(scope="module")
def collator(base):
    from samer.retrievers.hf import Retriever

    return Collator(Retriever.load(str(base)), ObjectsConfig())


@pytest.fixture(scope="module")
def records(world):
    return flickr.load_split(world, "train", boxes=True)


def phrase(chain, *boxes):
    return Phrase(f"thing {chain}", str(chain), ("other",), 0, 5, boxes)


def picture(folder, name, *captions):
    """A record with one caption per tuple of phrases, and its image file."""
    path = Path(folder) / f"{name}.png"
    Image.effect_noise((60, 40), 80).convert("RGB").save(path)
    return ImageRecord(name, path, tuple(Caption(f"{name} caption {k}", p, True) for k, p in enumerate(captions)))


def columns(label_of_column):
    """Labels of a token grid whose columns have one label each; the prompt tokens stand in the middle."""
    return label_of_column * 8


def test_labels_by_hand(collator, tmp_path):
    record = picture(
        tmp_path,
        "image",
        (phrase(1, LEFT),),
        (phrase(2, RIGHT),),
        (phrase(1, LEFT), phrase(2, RIGHT)),
        (phrase(3),),
        (),
        (phrase(4, SPECK),),  # area 0.0025: too small
        (phrase(5, WHOLE), phrase(6, CORNER)),
    )
    batch = collator(CaptionDataset([record]).rows)
    left, right = [1] * 4 + [0] * 4, [0] * 4 + [1] * 4
    both = [1] * 4 + [2] * 4
    corner = [[2, 2] + [1] * 6] * 2 + [[1] * 8] * 6
    expected = [
        columns(left) + [0] * 6,  # a box of a phrase that only other captions name labels nothing
        columns(right) + [0] * 6,
        columns(both) + [0] * 6,
        [0] * 70,
        [0] * 70,
        [0] * 70,
        [label for row in corner for label in row]
        + [1] * 6,  # prompt tokens stand at (0.5, 0.5), inside the whole image
    ]
    assert batch["labels"].dtype == torch.long
    assert batch["labels"].tolist() == expected


@pytest.mark.parametrize("objects", [ObjectsConfig(), ObjectsConfig(0.05, 0.6, 1), ObjectsConfig(max_phrases=2)])
def test_labels_of_generated_captions_equal_a_loop(collator, records, objects):
    rows = CaptionDataset(records).rows
    batch = Collator(collator.retriever, objects)(rows)
    expected = [naive_labels(row.caption, objects) for row in rows]
    assert batch["labels"].tolist() == expected
    assert {label for row in expected for label in row} >= {0, 1}
    by_image = {}
    for row, labels in zip(rows, expected):
        by_image.setdefault(row.image, set()).add(tuple(labels))
    assert any(len(different) > 1 for different in by_image.values())  # captions of one image do differ


def test_a_chain_named_twice_counts_once():
    boxes, owners = caption_boxes(Caption("", (phrase(1, LEFT, CORNER), phrase(2), phrase(1, LEFT, CORNER)), True))
    assert torch.equal(boxes, torch.tensor([LEFT, CORNER]))
    assert owners.tolist() == [0, 0]
    boxes, owners = caption_boxes(Caption("", (), True))
    assert boxes.shape == (0, 4)
    assert owners.shape == (0,)


def test_an_image_is_prepared_once_however_many_captions_it_has(collator, records, monkeypatch):
    opened = []
    load = pictures.load_image
    monkeypatch.setattr(hf, "load_image", lambda path, needs=None: opened.append(path) or load(path, needs))
    pick = [(3, 0), (1, 2), (3, 4), (0, 1), (1, 0), (3, 1)]
    rows = [Row(image, records[image], records[image].captions[caption]) for image, caption in pick]
    batch = collator(rows)
    assert sorted(opened) == sorted(records[image].image_path for image in (0, 1, 3))
    assert batch["image_inputs"]["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["image_numbers"].tolist() == [image for image, _ in pick]
    for row, (image, caption) in enumerate(pick):
        picture = load(records[image].image_path, collator.retriever.picture_size)
        alone = collator.retriever.image_inputs([picture])["pixel_values"][0]
        assert torch.equal(batch["image_inputs"]["pixel_values"][batch["image_of"][row]], alone)
        ids = collator.retriever.query_inputs([records[image].captions[caption].text])["input_ids"][0]
        valid = batch["query_inputs"]["attention_mask"][row].bool()
        assert torch.equal(batch["query_inputs"]["input_ids"][row][valid], ids)


def test_image_numbers_are_the_same_in_every_batch(collator, records):
    rows = CaptionDataset(records).rows
    for size in (7, 60):
        numbers = [n for batch in batched(rows, size) for n in collator(batch)["image_numbers"].tolist()]
        assert numbers == [image for image in range(len(records)) for _ in range(5)]


def test_unrelated_captions_are_left_out(records, tmp_path):
    record = picture(tmp_path, "image", (phrase(1, LEFT),), (), (phrase(2),))
    marked = [Caption(c.text, c.phrases, related=k != 1) for k, c in enumerate(record.captions)]
    other = ImageRecord("other", record.image_path, (Caption("off", (), False),))
    last = ImageRecord("last", record.image_path, (Caption("on", (phrase(3, LEFT),), True),))
    dataset = CaptionDataset([ImageRecord("image", record.image_path, tuple(marked)), other, last])
    assert [(dataset[k].image, dataset[k].caption.text) for k in range(len(dataset))] == [
        (0, "image caption 0"),
        (0, "image caption 2"),
        (2, "on"),  # an image keeps its number in the record list
    ]
    assert dataset.boxless() == 1
    with pytest.raises(InputError, match="UNRELATED_CAPTIONS"):
        CaptionDataset([other])


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 3), (3, 2), (6, 1)])
def test_a_step_has_the_same_captions_however_many_processes_share_it(records, monkeypatch, processes, accumulate):
    def steps(processes, accumulate):
        """Sorted captions of each step of an epoch; rows that only fill up are left out."""
        found = {}
        for rank in range(processes):
            monkeypatch.setattr(batches, "world_size", lambda: processes)
            monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
            own = StepBatches(CaptionDataset(records), seed=3, size=4)
            own.begin(2, 0)
            assert len(own) == len(list(own))
            for number, batch in enumerate(own):
                found.setdefault(number // accumulate, []).extend(row for row in batch if row >= 0)
        total = sum(own.rows(number) for number in range(len(own)))
        assert total == len(records) * 5
        own.begin(2, accumulate)
        assert len(list(own)) == len(own) - accumulate  # those of the first step are left out
        return [sorted(found[number]) for number in sorted(found)]

    alone = steps(1, 6)
    assert [len(captions) for captions in alone] == [24, 24, 12]
    assert sorted(row for captions in alone for row in captions) == list(range(60))
    assert steps(processes, accumulate) == alone


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_give_the_same_batches(collator, records):
    rows = CaptionDataset(records)
    loaders = [torch.utils.data.DataLoader(rows, 16, collate_fn=collator, num_workers=workers) for workers in (0, 2)]
    here, there = (list(loader) for loader in loaders)
    assert len(here) == len(there) == 4
    for one, other in zip(here, there):
        for name in ("image_of", "image_numbers", "labels"):
            assert torch.equal(one[name], other[name])
        for name in ("image_inputs", "query_inputs"):
            assert list(one[name]) == list(other[name])
            assert all(torch.equal(one[name][key], other[name][key]) for key in one[name])


def test_batched_cuts_in_order():
    assert [list(part) for part in batched(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []
