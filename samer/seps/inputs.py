"""Pictures and texts as the towers take them, in training altered as the released code does; or what they gave, stored.

Shape letters: B pictures or texts, N patches, M text tokens, S pixels, W a tower's width."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from samer.config import InputError
from samer.data.pictures import load_image
from samer.data.records import ImageRecord
from samer.features.manifest import read_store_manifest
from samer.features.read import FeatureStore
from samer.runtime.files import is_file

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for every tower, as released
AREA, SHAPE = (0.6, 1.0), (3 / 4, 4 / 3)  # of a crop: share of the picture, width to height
TRIES = 10  # for a crop that fits
MASKED, REPLACED = 0.5, 0.6  # of altered words half become [MASK], a tenth others; the rest is deleted

Lots = Sequence[random.Random] | None  # what decides, one for each; None: nothing is altered


def crop_box(size: tuple[int, int], lot: random.Random) -> tuple[int, int, int, int]:
    """A random part of a picture of (width, height), as a box; the greatest centred one that has a right shape if no
    try fits."""
    width, height = size
    for _ in range(TRIES):
        area = lot.uniform(*AREA) * width * height
        shape = math.exp(lot.uniform(math.log(SHAPE[0]), math.log(SHAPE[1])))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            x, y = lot.randint(0, width - w), lot.randint(0, height - h)
            return x, y, x + w, y + h
    w = min(width, round(height * SHAPE[1]))
    h = min(height, max(1, round(w / SHAPE[0])))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def pixels(image: Image.Image, side: int, lot: random.Random | None) -> Tensor:
    """A picture stretched to (3, S, S) float32; with a lot, a random part of it, flipped or not."""
    box = None if lot is None else crop_box(image.size, lot)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    if lot is not None and lot.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return ((values - torch.tensor(MEAN)) / torch.tensor(SPREAD)).permute(2, 0, 1)


def altered(
    ids: Sequence[int], words: Sequence[int | None], lot: random.Random, share: float, mask: int, others: int
) -> list[int]:
    """A text's token ids with a share of its words altered: of these half masked, a tenth replaced, the rest deleted.

    Args:
        ids: of its tokens.
        words: which word each belongs to; None: a special token, which stays.
        lot: decides.
        share: of words.
        mask: the id of [MASK].
        others: how many ids there are to replace one by.
    """
    found: list[int] = []
    fate: dict[int, float | None] = {}
    for token, word in zip(ids, words):
        if word is not None and word not in fate:
            fate[word] = lot.random() if lot.random() < share else None
        chance = None if word is None else fate[word]
        if chance is None:
            found.append(token)
        elif chance < MASKED:
            found.append(mask)
        elif chance < REPLACED:
            found.append(lot.randrange(others))
    return found


class LiveInputs:
    """Reads pictures and cuts texts into tokens for towers that are there."""

    def __init__(self, tokenizer: Any, image_size: int, longest: int, augment: float, workers: int) -> None:
        """`longest`: tokens that the text tower has positions for."""
        self.tokenizer, self.side = tokenizer, image_size
        self.longest = min(longest, tokenizer.model_max_length)
        self.augment = augment
        self.mask = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
        self.pool = ThreadPoolExecutor(workers)

    def pictures(
        self, records: Sequence[ImageRecord], lots: Sequence[random.Random] | None = None
    ) -> dict[str, Tensor]:
        """`pixel_values` (B, 3, S, S).

        Raises:
            InputError: a picture can't be read.
        """
        needs = (self.side, self.side) if lots is None else (2 * self.side, 2 * self.side)
        read = lambda record, lot: pixels(load_image(record.image_path, needs), self.side, lot)
        return {"pixel_values": torch.stack(list(self.pool.map(read, records, lots or [None] * len(records))))}

    def texts(self, texts: Sequence[str], lots: Lots = None) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, M)."""
        inputs = self.tokenizer(list(texts), truncation=True, max_length=self.longest)
        rows = inputs["input_ids"]
        if lots is not None and self.augment and self.mask is not None:
            rows = [
                altered(row, inputs.word_ids(k), lot, self.augment, self.mask, len(self.tokenizer))
                for k, (row, lot) in enumerate(zip(rows, lots))
            ]
        padding = self.tokenizer.pad_token_id or 0
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


class StoredInputs:
    """What the towers gave, from a feature store: nothing is altered, and there is no [CLS] of a picture."""

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        """Opens a store of whatever model.

        Raises:
            InputError: no store.
        """
        path = Path(folder) / "manifest.json"
        if not is_file(path):
            raise InputError(
                f"{folder}: no feature store; make one with scripts/features.py, or leave data.features out"
            )
        self.store = FeatureStore(folder, read_store_manifest(path).base_model, device)
        self.width = self.store.manifest.hidden_size

    @property
    def weights(self) -> str:
        """Hash of the weights that made it."""
        return self.store.manifest.identity.weights

    def pictures(
        self, records: Sequence[ImageRecord], lots: Sequence[random.Random] | None = None
    ) -> dict[str, Tensor]:
        """`hidden` (B, N, W).

        Raises:
            InputError: pictures of different numbers of tokens.
        """
        inputs = self.store.record_inputs(records)
        if not bool(inputs["attention_mask"].all()):
            raise InputError(f"{self.store.folder}: pictures have different numbers of tokens; SEPS needs one for all")
        return {"hidden": self.store.hidden_states(inputs).float()}

    def texts(self, texts: Sequence[str], lots: Lots = None) -> dict[str, Tensor]:
        """`hidden` and `attention_mask` (B, M)."""
        inputs = self.store.query_inputs(texts)
        return {"hidden": self.store.hidden_states(inputs).float(), "attention_mask": inputs["attention_mask"]}
