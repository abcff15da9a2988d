"""Training losses: pure functions of tensors.

Q queries, I images.
"""

import math

import torch
from torch import Tensor

from samer.config import InputError
from samer.tokens import check_tensor


def multi_positive_t2i_loss(scores: Tensor, positive_mask: Tensor, temperature: float = 0.07) -> Tensor:
    """Contrast each query's positive images with all images of the batch, text to image.

    Computed in float32 whatever the input dtype (float64 stays float64):
    mean over queries of logsumexp(scores / temperature) - logsumexp(positive scores / temperature).

    Args:
        scores: (Q, I) MaxSim scores.
        positive_mask: (Q, I) bool, True where the image belongs to the query; several per query are allowed.
        temperature: the divisor tau of the scores, above 0.

    Returns:
        The loss, a scalar >= 0 in nats.

    Raises:
        InputError: anything but tensors on one device, shapes differ, the batch is empty, the mask is not bool, the
            temperature is not a positive number, a score is not finite, or a query has no positive.

    Source: METHOD section 4 (SaMer, arXiv 2607.04605, the contrastive objective L).
    """
    check_tensor("scores", scores)
    check_tensor("positive_mask", positive_mask, torch.bool, like=scores)
    if scores.ndim != 2 or scores.shape != positive_mask.shape or scores.numel() == 0:
        raise InputError(
            f"scores {tuple(scores.shape)} and positive_mask {tuple(positive_mask.shape)} "
            "must share one shape (queries, images) without a 0"
        )
    if not isinstance(temperature, (int, float, Tensor)) or not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature!r:.80}; it must be a positive number")
    finite = scores.detach().isfinite().all(dim=1)  # (Q,)
    if not finite.all():
        raise InputError(f"scores: query {int((~finite).nonzero()[0])} has a score that is NaN or infinite")
    has_positive = positive_mask.any(dim=1)  # (Q,)
    if not has_positive.all():
        raise InputError(f"positive_mask: query {int((~has_positive).nonzero()[0])} has no positive image")

    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature  # (Q, I)
    positives = logits.masked_fill(~positive_mask, -math.inf).logsumexp(dim=1)  # (Q,)
    return (logits.logsumexp(dim=1) - positives).mean()
