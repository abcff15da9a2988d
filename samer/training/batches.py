"""Records -> batches: one row per caption, each image prepared once per batch; which process gets which.

Shape letters: B captions, U distinct images, N tokens per image, M query tokens, W processes.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from samer.config import InputError, ObjectsConfig
from samer.data.records import Caption, ImageRecord
from samer.objects import instance_labels
from samer.retrievers.base import Encoder
from samer.runtime.processes import rank, world_size


@dataclass(frozen=True)
class Row:
    """One training example: a caption, its image (by number in the record list) and the image's record.

    `answers` are the numbers of all images that answer the caption, where the data set says so; they are no negatives.
    A row that is not `real` fills up the last batch of a process and counts for nothing.
    """

    image: int
    record: ImageRecord
    caption: Caption
    real: bool = True
    answers: tuple[int, ...] = ()


class CaptionDataset(Dataset):
    """One row per caption that describes its image (METHOD section 4); UNRELATED_CAPTIONS are left out."""

    def __init__(self, records: Sequence[ImageRecord]) -> None:
        place = {record.image_id: number for number, record in enumerate(records)}
        self.rows = [
            Row(number, record, caption, answers=tuple(place[name] for name, _ in caption.grades if name in place))
            for number, record in enumerate(records)
            for caption in record.captions
            if caption.related
        ]
        if not self.rows:
            raise InputError("no caption to train on: every caption of the split is listed in UNRELATED_CAPTIONS")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """The row of that number; counted from the end (-1 - number), a copy of it that only fills up."""
        return self.rows[index] if index >= 0 else replace(self.rows[-1 - index], real=False)

    def boxless(self) -> int:
        """How many captions have no box, neither of a phrase nor of their image; they train with background only."""
        return sum(not any(each.boxes for each in (*row.caption.phrases, *row.record.things)) for row in self.rows)


class Collator:
    """Rows to tensors, in the data loader's workers.

    Returns a dict:
        `image_inputs`: the processor's tensors of the U distinct images; `query_inputs`: of the B captions;
        `image_of`: (B,) long, each caption's row among the distinct images;
        `image_numbers`: (B,) long, the same image has the same number in every batch and process;
        `labels`: (B, N) long, instance labels of METHOD section 3, 0 is background;
        `real`: (B,) bool, False where a row only fills up the batch;
        `answers`: (B, A) long, only where relevance is graded: the images that answer each caption, by their numbers,
        its own may be among them; -1 at padding.
    """

    def __init__(self, retriever: Encoder, objects: ObjectsConfig) -> None:
        self.retriever = retriever
        self.objects = objects

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor | dict[str, Tensor]]:
        distinct = {row.image: row.record for row in rows}
        place = {number: k for k, number in enumerate(distinct)}
        image_inputs = self.retriever.record_inputs(list(distinct.values()))
        coords = self.retriever.image_layout(image_inputs).coords
        image_of = torch.tensor([place[row.image] for row in rows])
        boxes, owners = zip(*(label_boxes(row.record, row.caption) for row in rows))
        labels = instance_labels(
            coords[image_of],
            boxes,
            phrases=owners,
            min_area=self.objects.min_area,
            max_area=self.objects.max_area,
            max_phrases=self.objects.max_phrases,
        )
        graded = {}
        if any(row.answers for row in rows):
            answers = [torch.tensor(row.answers, dtype=torch.long) for row in rows]
            graded["answers"] = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=-1)
        return {
            **graded,
            "image_inputs": image_inputs,
            "query_inputs": self.retriever.query_inputs([row.caption.text for row in rows]),
            "image_of": image_of,
            "image_numbers": torch.tensor([row.image for row in rows]),
            "labels": labels,
            "real": torch.tensor([row.real for row in rows]),
        }


def label_boxes(record: ImageRecord, caption: Caption) -> tuple[Tensor, Tensor]:
    """The boxes that become a caption's labels, as `caption_boxes`; those of the image's things where it has none.

    Things of one kind count as one phrase.
    """
    boxes, owners = caption_boxes(caption)
    if len(boxes) or not record.things:
        return boxes, owners
    found = [(box, number) for number, things in enumerate(record.things) for box in things.boxes]
    return torch.tensor([box for box, _ in found]), torch.tensor([number for _, number in found])


def caption_boxes(caption: Caption) -> tuple[Tensor, Tensor]:
    """All boxes of a caption's phrases, (n, 4) as shares of the image, and the phrase number of each, (n,).

    A chain that the caption names twice counts once: a box is one instance however often it is named.
    """
    boxes: list[tuple[float, float, float, float]] = []
    owners: list[int] = []
    seen: set[str] = set()
    for number, phrase in enumerate(caption.phrases):
        if phrase.chain_id in seen:
            continue
        seen.add(phrase.chain_id)
        boxes += phrase.boxes
        owners += [number] * len(phrase.boxes)
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(owners, dtype=torch.long)


WINDOW_IMAGES = 4096  # 17 GB of ColPali features: the page cache holds what one window needs


class WindowSampler(Sampler[int]):
    """Shuffles captions so that an image's are near each other: each image is read from disk once per epoch.

    Images are shuffled, cut into windows of `WINDOW_IMAGES`, and the captions of a window shuffled: with fewer images
    that is a plain shuffle. The order depends on the seed and the epoch only.

    Args:
        step: rows of a batch over all processes; the last is filled up with rows that count for nothing (-1 - index),
            as every process must have as many. One process needs none.
    """

    def __init__(self, dataset: CaptionDataset, seed: int, step: int = 1) -> None:
        self.seed, self.epoch, self.count = seed, 0, len(dataset)
        self.missing = -len(dataset) % step
        self.captions: dict[int, list[int]] = {}
        for index, row in enumerate(dataset.rows):
            self.captions.setdefault(row.image, []).append(index)

    def set_epoch(self, epoch: int) -> None:
        """Called before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count + self.missing

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        images = rng.permutation(list(self.captions))
        for start in range(0, len(images), WINDOW_IMAGES):
            window = [index for image in images[start : start + WINDOW_IMAGES] for index in self.captions[int(image)]]
            yield from (window[int(k)] for k in rng.permutation(len(window)))
        if self.missing:
            yield from [-1 - window[0]] * self.missing  # one image: the least to read


class StepBatches(Sampler[list[int]]):
    """Deals one shuffled order out: batch i of process r is the order's batch W i + r.

    So the captions of W batches in a row do not depend on W, and a step of W processes that accumulate A batches sees
    those of a step of one process that accumulates W A.
    """

    def __init__(self, dataset: CaptionDataset, seed: int, size: int) -> None:
        self.size, self.together = size, size * world_size()
        self.sampler = WindowSampler(dataset, seed, self.together if world_size() > 1 else 1)
        self.first = 0

    def begin(self, epoch: int, first: int) -> None:
        """What comes next is `epoch` from its batch `first` on."""
        self.sampler.set_epoch(epoch)
        self.first = first

    def rows(self, number: int) -> int:
        """How many captions all processes have in their batch of that number; the last may be smaller."""
        return min(self.together, self.sampler.count - number * self.together)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.sampler) // self.together)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for number in range(self.first, len(self)):
            start = number * self.together + rank() * self.size
            yield order[start : start + self.size]


def make_loader(dataset: CaptionDataset, batches: StepBatches, collate: Collator, workers: int, ahead: int | None):
    """The data loader of a run; its workers live through all epochs and have `ahead` batches ready each."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        # the collator holds the retriever: a forked worker shares its memory, another kind would get a copy of it
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=ahead if workers else None,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # workers' seeds leave the state that checkpoints keep alone
    )


def _start_worker(number: int) -> None:
    """A worker that takes SIGTERM from its trainer only, not from who stops the whole process group."""
    trainer = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def end_workers(loader: DataLoader) -> None:
    """Ends a loader's workers; left to the garbage collector, each is waited for 5 seconds."""
    iterator = getattr(loader, "_iterator", None)
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()
