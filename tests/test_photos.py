"""The whole pipeline on real photographs of every kind of file: tall, wide, grey, palette, CMYK, rotated by EXIF."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import naive_merge
from PIL import Image

from samer.config import MergeConfig
from samer.data import flickr
from samer.index.read import Index
from samer.retrievers.hf import Retriever
from samer.retrievers.projectors import load_projector

PHOTOS = Path(__file__).resolve().parent / "fixtures" / "photos"
SPLITS = {"train": ["1001", "1002", "1003", "1004"], "val": ["1005", "1006"], "test": ["1007", "1008"]}
MERGE = MergeConfig(num_regions=16)


@pytest.fixture(scope="module")
def run(script, base, tmp_path_factory):
    """Trained with boxes, indexed and evaluated through the scripts."""
    folder = tmp_path_factory.mktemp("photos")
    config = folder / "photos.yaml"
    config.write_text(
        f"model:\n  name: {base}\ndata:\n  root: {PHOTOS}\nmerge:\n  num_regions: 16\ntrain:\n"
        f"  output_dir: {folder / 'out'}\n  train_batch_size: 5\n  grad_accum_steps: 1\n  num_train_epochs: 2\n"
        "  learning_rate: 1e-3\n  bf16: false\n  dataloader_num_workers: 0\n  logging_steps: 1\n"
    )
    trained = script("train").main(["--config", str(config)])
    words = ["--data-root", PHOTOS, "--cache-dir", folder / "cache", "--adapter-path", folder / "out"]
    words += ["--splits", *SPLITS, "--cache-dtype", "float32", "--batch-size", "3"]
    script("cache").main([str(word) for word in words])
    metrics = {
        split: script("eval").main(
            ["--cache-dir", str(folder / "cache"), "--split", split, "--output-json", str(folder / f"{split}.json")]
        )
        for split in SPLITS
    }
    return {"folder": folder, "trained": trained, "metrics": metrics}


def photo(image_id):
    (path,) = (PHOTOS / "images" / "Images").glob(f"{image_id}.*")
    return path


def test_every_kind_of_file_is_there():
    kinds = {}
    for split in SPLITS.values():
        for image_id in split:
            with Image.open(photo(image_id)) as image:
                kinds[image_id] = (image.mode, image.getexif().get(0x0112, 1), np.sign(image.width - image.height))
    assert {mode for mode, _, _ in kinds.values()} == {"RGB", "L", "P", "CMYK"}
    assert {shape for _, _, shape in kinds.values()} == {-1, 0, 1}
    assert kinds["1007"][1] == 6
    assert {split: flickr.load_split(PHOTOS, split, boxes=True)[0].image_id for split in SPLITS} == {
        split: ids[0] for split, ids in SPLITS.items()
    }


def test_training_sees_the_boxes(run):
    history = json.loads((run["folder"] / "out" / "history.json").read_text())
    steps = [entry for entry in history if "loss" in entry]
    assert run["trained"].steps == len(steps) == 8  # 20 captions in batches of 5, twice
    assert all(math.isfinite(entry["loss"]) and entry["loss"] > 0 for entry in steps)
    on_own = [entry["object_mass_on_own"] for entry in steps]
    assert any(0 < share <= 1 for share in on_own)  # there are tokens inside boxes
    weights = load_projector(run["folder"] / "out", Retriever.load(str(_base_of(run))))
    assert torch.isfinite(weights.weight).all()


def _base_of(run):
    return Index(run["folder"] / "cache").manifest["base_model"]


@pytest.mark.parametrize("split", SPLITS)
def test_metrics_are_finite_and_in_range(run, split):
    result = run["metrics"][split]
    count = len(SPLITS[split])
    assert (result["images"], result["queries"], result["vectors_per_image"]) == (count, 5 * count, 16)
    for direction, candidates in (("text_to_image", count), ("image_to_text", 5 * count)):
        for name, metric in result[direction].items():
            low, high = metric["interval"]
            top = candidates if name == "median_rank" else 100
            assert 0 <= low <= metric["value"] <= high <= top, (direction, name)
    assert result["text_to_image"]["r@5"]["value"] == 100.0  # at most four images to choose from
    assert json.loads((run["folder"] / f"{split}.json").read_text()) == result
    if split == "val":
        assert run["trained"].validation["r@1"] == pytest.approx(result["text_to_image"]["r@1"]["value"], abs=1e-4)


@pytest.fixture(scope="module")
def trained(run):
    retriever = Retriever.load(_base_of(run))
    retriever.use_projector(load_projector(run["folder"] / "out", retriever))
    return retriever


def merged(retriever, image):
    visual = retriever.encode_images(retriever.image_inputs([image]))
    return naive_merge(visual.tokens[0], visual.coords[0], MERGE)[0]


def stored(run, image_id):
    for split in SPLITS:
        for ids, tokens, mask in Index(run["folder"] / "cache").images(split):
            if image_id in ids:
                assert mask.all()
                return tokens[ids.index(image_id)]
    raise AssertionError(f"{image_id} is in no split")


def as_displayed(image_id):
    """The picture as a viewer shows it, made by hand: EXIF orientation 6 is a quarter turn clockwise."""
    with Image.open(photo(image_id)) as image:
        if image.mode == "L":
            return Image.fromarray(np.repeat(np.asarray(image)[..., None], 3, axis=2))
        if image.mode == "P":
            palette = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
            return Image.fromarray(palette[np.asarray(image)])
        pixels = np.asarray(image.convert("RGB"))
        return Image.fromarray(np.rot90(pixels, k=-1) if image_id == "1007" else pixels)


@pytest.mark.parametrize("image_id", [image_id for ids in SPLITS.values() for image_id in ids])
def test_the_index_holds_the_picture_as_displayed(run, trained, image_id):
    torch.testing.assert_close(stored(run, image_id), merged(trained, as_displayed(image_id)), atol=1e-5, rtol=0)


def test_the_rotated_picture_is_not_stored_as_the_file_lies(run, trained):
    with Image.open(photo("1007")) as image:
        sideways = Image.fromarray(np.asarray(image.convert("RGB")))
    assert sideways.size == (267, 400)
    assert as_displayed("1007").size == (400, 267)
    assert (stored(run, "1007") - merged(trained, sideways)).abs().max() > 1e-3
