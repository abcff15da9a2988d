"""How long the evidence on photographs will take, said before any of it is done: a few probes here, and counts.

Shape letters: B images, N patches, W the vision tower's width, M query tokens, H hidden, D embedding."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from samer.retrievers.towers import TowerRetriever
from samer.scoring import maxsim

QUERY_TOKENS = 16  # of a caption, about
OVERHEAD = 1.5  # of a step over its probe: reading, merging and the optimizer; measured on two cores


@dataclass(frozen=True)
class Work:
    """What there is to do at one size of pictures.

    Attributes:
        pictures: that the towers look at.
        aligned: pictures that alignment sees, all epochs together.
        trainings: projectors to train.
        steps: of one training.
        captions: of one step.
        patches: of a picture that a step of the alignment looks at; 0: all.
    """

    pictures: int
    aligned: int
    trainings: int
    steps: int
    captions: int
    patches: int = 0


def forecast(model: TowerRetriever, work: Work, device: torch.device) -> dict[str, float]:
    """Seconds that the towers, the alignment and the trainings take here, each within a factor of two or so.

    Args:
        model: its towers, adapters and projection are those that will work; it is moved to the device.
        work: what there is to do.
        device: on which.

    Returns:
        By what is done: `towers`, `aligning`, `training`.
    """
    model, size = model.to(device), model.config.image_size
    pictures = torch.randn(4, 3, size, size, device=device)
    with torch.inference_mode():
        tower = _seconds(lambda: model.vision_states(pictures), device) / len(pictures)
        patches, width = model.vision_states(pictures).shape[1:]
    states = torch.randn(8, min(work.patches or patches, patches), width, device=device)
    adapter = _seconds(lambda: model.vision_adapter(states).sum().backward(), device) / len(states)
    hidden = torch.randn(work.captions, patches, model.config.hidden_size, device=device)
    asked = torch.randn(work.captions, QUERY_TOKENS, model.config.embedding_dim, device=device)

    def step() -> None:
        images = torch.nn.functional.normalize(model.projection(hidden), dim=-1)
        maxsim(asked, images).sum().backward()

    training = _seconds(step, device)
    return {
        "towers": work.pictures * tower,
        "aligning": OVERHEAD * work.aligned * adapter,
        "training": OVERHEAD * work.trainings * work.steps * training,
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median of three runs after one to warm up."""
    found = []
    for _ in range(4):
        began = time.monotonic()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.monotonic() - began)
    return sorted(found[1:])[1]
