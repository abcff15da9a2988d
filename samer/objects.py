"""Boxes -> instance labels -> inconsistency penalty, and diagnostics of the object prior.

Shape letters: B images (or captions), N tokens, K regions, L labels (0 is background), n boxes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError
from samer.settings import whole_number
from samer.tokens import MergedTokens, check_tensor

EPS = 1e-6


def instance_labels(
    coords: Tensor,
    boxes: Tensor | Sequence,
    *,
    phrases: Sequence | None = None,
    min_area: float = 0.005,
    max_area: float = 1.0,
    max_phrases: int = 4,
) -> Tensor:
    """Labels every token with the box instance it lies in (METHOD section 3).

    Boxes whose area is outside [min_area, max_area] are dropped, then all but the `max_phrases` phrases with the
    largest boxes. Every remaining box is an instance with its own label, numbered from 1 in the given order; a token
    inside several boxes (borders included) takes the smallest, a token inside none is background, 0.

    Args:
        coords: (N, 2) or (B, N, 2), (x, y) in the unit square.
        boxes: (n, 4) for one caption, or a sequence of B of them: x1, y1, x2, y2 as shares of the image. Tensors,
            numpy arrays or numbers.
        phrases: which phrase each box belongs to: (n,) ints, or a sequence of B of them; None: each box is its own.
        min_area, max_area: as shares of the image.
        max_phrases: at least 1.

    Returns:
        (N,) long for one caption, (B, N) for a sequence.

    Raises:
        InputError: boxes not of shape (n, 4), outside the image or turned around; counts that differ; coordinates that
            are no tensor of (x, y); a limit that is no number.
    """
    check_tensor("coords", coords)
    if coords.dim() not in (2, 3) or coords.shape[-1] != 2 or not coords.is_floating_point():
        raise InputError(f"coords must be floating (N, 2) or (B, N, 2); they are {coords.dtype} {tuple(coords.shape)}")
    for name, value in (("min_area", min_area), ("max_area", max_area)):
        if not isinstance(value, (int, float)):
            raise InputError(f"{name} must be a number, a share of the image; it is {value!r:.80}")
    if whole_number("max_phrases", max_phrases) < 1:
        raise InputError(f"max_phrases must be at least 1; it is {max_phrases}")
    single = _is_single(boxes)
    rows = [boxes] if single else list(boxes)
    owners = [None] * len(rows) if phrases is None else ([phrases] if single else list(phrases))
    if len(owners) != len(rows):
        raise InputError(f"{len(rows)} box lists but {len(owners)} phrase lists")
    if not rows or (coords.dim() == 3 and len(coords) != len(rows)):
        raise InputError(f"boxes for {len(rows)} captions, but coords of shape {tuple(coords.shape)}")
    box, owner, real = _padded_boxes(rows, owners, coords.device)
    if box.shape[1] == 0:
        labels = torch.zeros(len(rows), coords.shape[-2], dtype=torch.long, device=coords.device)
        return labels[0] if single else labels
    sides = box[..., 2:] - box[..., :2]
    wrong = real & ~((sides >= 0).all(-1) & (box >= -EPS).all(-1) & (box <= 1 + EPS).all(-1))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise InputError(
            f"box {box[row, column].tolist()} of caption {row} is not x1 <= x2, y1 <= y2 within [0, 1]; "
            "give boxes as shares of the image"
        )
    area = sides.clamp(max=1).prod(-1)  # (B, n); a box that rounding puts EPS past the border is not too large
    kept = real & (area >= min_area) & (area <= max_area)
    kept &= _phrase_ranks(area, owner, kept) < max_phrases
    number = kept.long().cumsum(1)  # (B, n): labels 1.. in the given order
    points = coords.expand(len(rows), -1, -1) if coords.dim() == 2 else coords  # (B, N, 2)
    inside = (points[:, :, None] >= box[:, None, :, :2]) & (points[:, :, None] <= box[:, None, :, 2:])
    inside = inside.all(-1) & kept[:, None]  # (B, N, n)
    size = area[:, None].masked_fill(~inside, float("inf"))  # (B, N, n)
    smallest = size.argmin(-1)  # the first among equals
    labels = number.gather(1, smallest).masked_fill(~inside.any(-1), 0)  # (B, N)
    return labels[0] if single else labels


def _is_single(boxes: Tensor | Sequence) -> bool:
    """Whether boxes are those of one caption: a row of numbers is a box, an empty row is a caption without boxes.

    Raises:
        InputError: neither rows of numbers nor rows of boxes.
    """
    if isinstance(boxes, (Tensor, np.ndarray)):
        return boxes.ndim < 3
    if not isinstance(boxes, Sequence) or isinstance(boxes, str):
        raise InputError(f"boxes must be (n, 4) numbers or a sequence of such; they are {boxes!r:.80}")
    rows = (Sequence, Tensor, np.ndarray)
    for row, box in enumerate(boxes):
        if not isinstance(box, rows) or isinstance(box, str):
            raise InputError(f"row {row} of boxes must be a box or a caption's boxes; it is {box!r:.80}")
    return all(not isinstance(box, Tensor) and len(box) and not isinstance(box[0], rows) for box in boxes)


def _numbers(name: str, row: int, value: Tensor | Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        found = torch.as_tensor(value)
        if dtype == torch.long and found.is_floating_point() and found.numel():
            raise ValueError(found.dtype)  # 0.5 and 0.7 would be one phrase
        return found.to(device, dtype)
    except (TypeError, ValueError, RuntimeError):  # text, None, rows of unequal length
        raise InputError(f"{name} of caption {row} are no table of numbers: {value!r:.80}") from None


def _padded_boxes(
    rows: Sequence[Tensor | Sequence], owners: Sequence[Sequence | None], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (B, n, 4), the phrase of each (B, n), and which are no padding (B, n); n may be 0."""
    tensors = [_numbers("boxes", number, row, torch.float32, device) for number, row in enumerate(rows)]
    tensors = [row.reshape(len(row), -1) if len(row) else row.new_zeros(0, 4) for row in tensors]
    ids = []
    for row, (box, owner) in enumerate(zip(tensors, owners)):
        if len(box) and box.shape[1] != 4:
            raise InputError(f"boxes of caption {row} have shape {tuple(box.shape)}; expected (n, 4)")
        owner = torch.arange(len(box)) if owner is None else _numbers("phrases", row, owner, torch.long, device)
        if len(owner) != len(box):
            raise InputError(f"caption {row} has {len(box)} boxes but {len(owner)} phrase numbers")
        ids.append(owner.to(device))
    lengths = torch.tensor([len(box) for box in tensors], device=device)
    boxes = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    owners = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    return boxes, owners, torch.arange(boxes.shape[1], device=device) < lengths[:, None]


def _phrase_ranks(area: Tensor, owner: Tensor, kept: Tensor) -> Tensor:
    """How many phrases have a larger box than the phrase of each box; (B, n), what it says of boxes not kept is 0.

    A phrase counts by its largest kept box, the first among equals.

    Args:
        area: (B, n) of boxes.
        owner: (B, n) long, their phrases.
        kept: (B, n) bool.
    """
    candidate = area.masked_fill(~kept, -1.0)
    before = torch.arange(area.shape[1], device=area.device)
    first = before[:, None] < before[None, :]  # (n, n): column comes after row
    larger = (candidate[:, :, None] > candidate[:, None, :]) | (
        (candidate[:, :, None] == candidate[:, None, :]) & first
    )  # (B, n, n): row box beats column box
    same = owner[:, :, None] == owner[:, None, :]
    stands = kept & ~(larger & same).any(1)  # (B, n): one box stands for each phrase
    rank = ((larger & stands[:, :, None]).int().sum(1)).masked_fill(~stands, 0)  # phrases with a larger box
    return (same & stands[:, :, None]).int().mul(rank[:, :, None]).sum(1)


def instance_inconsistency(hard: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """P_inst(i, k) = 1 - the share of cluster k that carries token i's label (METHOD section 3).

    Args:
        hard: (B, N, K) float, one-hot clusters; rows of padding are zero.
        labels: (B, N) long in [0, num_labels).
        num_labels: L.

    Returns:
        (B, N, K) in [0, 1]; an empty cluster costs 1.
    """
    one_hot = F.one_hot(labels, num_labels).to(hard.dtype)  # (B, N, L)
    counts = hard.transpose(1, 2) @ one_hot  # (B, K, L)
    share = counts / (hard.sum(1)[..., None] + EPS)
    return 1 - one_hot @ share.transpose(1, 2)


@torch.no_grad()
def object_diagnostics(
    merged: MergedTokens, labels: Tensor, *, mask: Tensor | None = None, box_free: MergedTokens | None = None
) -> dict[str, Tensor]:
    """What the object prior does to an assignment (METHOD section 3), one value per image.

    Args:
        merged: the assignment to describe.
        labels: (B, N) long, 0 is background.
        mask: (B, N) bool, False at padding; None takes it from the assignments, which are -1 there.
        box_free: the same tokens merged without labels, for the divergence.

    Returns:
        A dict of (B,) float tensors, NaN where an image has nothing to measure:
        `entropy` (nats, mean over tokens), `kl_to_box_free` (nats; only with `box_free`), `object_mass_on_own`
        (object tokens' weight on clusters whose majority is their own instance), `purity` (majority share, mean over
        tokens), `mixed_clusters` (share of non-empty clusters that hold two or more instances),
        `argmax_agreement` (argmax of the weights equals the hard cluster), `empty_clusters` (share of K).
    """
    weights, hard_index = merged.weights.double(), merged.assignments
    valid = hard_index >= 0 if mask is None else mask
    count = valid.sum(1).clamp(min=1)
    regions = weights.shape[2]
    hard = F.one_hot(hard_index.clamp(min=0), regions).double() * valid[..., None]  # (B, N, K)
    labels = labels.masked_fill(~valid, 0)
    num_labels = int(labels.max()) + 1
    one_hot = F.one_hot(labels, num_labels).double()
    counts = hard.transpose(1, 2) @ one_hot  # (B, K, L)
    size = counts.sum(-1)  # (B, K)
    real = merged.mask
    log_weights = weights.clamp(min=1e-30).log()
    majority = counts.argmax(-1)  # (B, K)
    own = (labels[..., None] == majority[:, None]) & (size > 0)[:, None]  # (B, N, K)
    on_object = (labels > 0) & valid
    nan = torch.full((), float("nan"), dtype=weights.dtype, device=weights.device)
    own_mass = ((weights * own).sum(-1) * on_object).sum(1) / on_object.sum(1).clamp(min=1)
    filled = (size > 0).sum(1).clamp(min=1)
    result = {
        "entropy": (-(weights * log_weights).sum(-1) * valid).sum(1) / count,
        "object_mass_on_own": torch.where(on_object.any(1), own_mass, nan),
        "purity": counts.amax(-1).sum(1) / count,
        "mixed_clusters": ((counts[..., 1:] > 0).sum(-1) >= 2).sum(1) / filled.double(),
        "argmax_agreement": ((weights.argmax(-1) == hard_index) & valid).double().sum(1) / count,
        "empty_clusters": ((size == 0) & real).sum(1) / real.sum(1).clamp(min=1).double(),
    }
    if box_free is not None:
        log_free = box_free.weights.double().clamp(min=1e-30).log()
        divergence = (weights * (log_weights - log_free)).sum(-1)  # (B, N)
        result["kl_to_box_free"] = (divergence * valid).sum(1) / count
    return result
