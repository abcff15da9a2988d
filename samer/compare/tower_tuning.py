"""One epoch that teaches a tower to run on fewer tokens: it is to give each patch what it gave without.

OURS: the papers fine-tune on their classification task, for which there are no labels here; the plain tower is the
teacher instead. AdamW with AdaMerge's learning rate, 5e-6, cosine to 0. Statistics stay those of the tower before.

Shape letters: B images, S special tokens, P patches, W width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from samer.config import ReduceConfig
from samer.data.records import ImageRecord
from samer.reducers.running import reduced
from samer.retrievers.hf import Retriever
from samer.runtime.progress import Progress, batched, prefetched
from samer.runtime.signals import stop_here

LEARNING_RATE = 5e-6


def tune_tower(
    retriever: Retriever, settings: ReduceConfig, records: Sequence[ImageRecord], batch_size: int = 8, seed: int = 0
) -> list[float]:
    """Trains the retriever's tower in place, for one epoch over images.

    Args:
        retriever: without a reduction of its own.
        settings: how the tower is reduced.
        records: images, in any order.
        batch_size: images a step.
        seed: of their order.

    Returns:
        The loss of every step: 1 - the cosine to the plain tower's tokens, mean over all of them.
    """
    tower = retriever.tower
    teacher = copy.deepcopy(tower)
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = list(batched([records[number] for number in order], batch_size))
    weights = list(tower.parameters())
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    losses = []
    tower.requires_grad_(True)
    try:
        for _, inputs in prefetched(retriever.record_inputs, Progress(batches, "tower", unit="steps")):
            stop_here()
            pixels = inputs["pixel_values"].to(retriever.device, retriever.model.dtype)
            with torch.no_grad():
                wanted = teacher(pixel_values=pixels).last_hidden_state  # (B, S + P, W)
            with reduced(tower, replace(settings, unmerge=True)):
                found = tower(pixel_values=pixels).last_hidden_state
            loss = (1 - F.cosine_similarity(found.float(), wanted.float(), dim=-1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
    finally:
        tower.requires_grad_(False)
    return losses
