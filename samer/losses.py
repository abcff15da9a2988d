"""Training losses, midpoint mixup, and what is measured of a training: pure functions of tensors.

Q queries, I images, K tokens of an image, D embedding width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError
from samer.tokens import check_tensor

_MATCH_ELEMENTS = 2**25  # similarities that a mixup holds at once: 128 MB


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


def midpoint_share(progress: float) -> float:
    """The share lambda of an image's own features in a mixed one: 1 at the start of a training, 1/2 at its end.

    Half a cosine, lambda = 3/4 + cos(pi progress) / 4: OURS. Of asymptotic midpoint mixup (arXiv 2401.14696) only the
    abstract is known to us: features move gradually towards the midpoint. Another decay, 1/2 + exp(-beta accuracy) / 2,
    is told of it without its beta.

    Args:
        progress: share of the training's steps that are done, 0 to 1.

    Raises:
        InputError: another number.
    """
    if not 0 <= progress <= 1:
        raise InputError(f"progress is {progress}; it must be in [0, 1]")
    return 0.75 + 0.25 * math.cos(math.pi * progress)


def mixup_partners(numbers: Tensor) -> Tensor:
    """A row of another image for every row of a batch, (I,) long: of the image with the next larger number.

    The largest number goes on with the smallest, so two images are never each other's partner where there are three,
    and midpoints of different pairs differ. Which images meet depends on the batch alone, whatever the order of its
    rows and the number of processes. Of an image's rows the first is taken. One image alone is its own partner.
    How pairs are drawn is UNVERIFIED in arXiv 2401.14696 and OURS here; batches are shuffled already.

    Args:
        numbers: (I,) whole numbers, the image of every row.
    """
    place = numbers.unique(return_inverse=True)[1]  # in order
    first = first_rows(numbers)
    return first[(place + 1) % len(first)]


def first_rows(numbers: Tensor) -> Tensor:
    """The first row of every distinct number of a batch (I,), in the order of the numbers."""
    distinct, place = numbers.unique(return_inverse=True)
    rows = torch.arange(len(numbers), device=numbers.device)
    return rows.new_full((len(distinct),), len(numbers)).scatter_reduce(0, place, rows, "amin")


def midpoint_mixup(features: Tensor, partners: Tensor, share: float, mask: Tensor | None = None) -> Tensor:
    """Features between those of an image and of its partner, which keep the image's own label.

    normalise(share * own + (1 - share) * partner's). With share >= 1/2 the own image is the nearer one, and its label
    is the hard, one-sided one of a mixed feature (METHOD section 4c). Of token sets, each token is mixed with the
    partner's most similar one, as MaxSim knows no order among them: which that is has no gradient, both features have.
    The pairing of tokens is OURS; arXiv 2401.14696 mixes single feature vectors.

    Args:
        features: (I, D) pooled, or (I, K, D) tokens.
        partners: (I,) long, each row's partner (`mixup_partners`).
        share: of a row's own features, 1/2 to 1 (`midpoint_share`).
        mask: (I, K) bool, tokens that count; None: all. Others stay as they are, and nothing is mixed with them.

    Returns:
        Unit features of the shape given.

    Raises:
        InputError: another shape, or a share outside its range.
    """
    check_tensor("features", features)
    fits = features.ndim == 3 or (features.ndim == 2 and mask is None)
    if not fits or partners.shape != features.shape[:1]:
        raise InputError(
            f"features {tuple(features.shape)} and partners {tuple(partners.shape)}: expected (I, D), or (I, K, D) "
            "with or without a mask, and (I,)"
        )
    if not 0.5 <= share <= 1:
        raise InputError(f"share is {share}; it must be in [1/2, 1]")
    if features.ndim == 2:
        return F.normalize(share * features + (1 - share) * features[partners], dim=-1)
    with torch.no_grad():
        rows = max(1, _MATCH_ELEMENTS // features.shape[1] ** 2)
        masks = [None] * len(features) if mask is None else mask[partners].split(rows)
        blocks = zip(features.split(rows), features[partners].split(rows), masks)
        nearest = torch.cat([_nearest(*block) for block in blocks])  # (I, K)
    other = features[partners].gather(1, nearest[..., None].expand_as(features))
    mixed = F.normalize(share * features + (1 - share) * other, dim=-1)
    return mixed if mask is None else torch.where(mask[..., None], mixed, features)


def _nearest(own: Tensor, others: Tensor, mask: Tensor | None) -> Tensor:
    """The number of the most similar token of others (b, K, D), where their mask (b, K) holds, for each own, (b, K)."""
    similar = own @ others.transpose(1, 2)  # (b, K, K)
    if mask is not None:
        similar = similar.masked_fill(~mask[:, None], -math.inf)
    return similar.argmax(-1)


def pooled(tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Unit means (I, D) of the tokens (I, K, D) that count, for `alignment` and `uniformity`."""
    weights = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask.to(tokens.dtype)
    return F.normalize((tokens * weights[..., None]).sum(1), dim=-1)


def alignment(queries: Tensor, images: Tensor, positive_mask: Tensor) -> Tensor:
    """Mean squared distance of queries (Q, D) and their images (I, D), unit vectors; 0 is best.

    Source: Wang and Isola, Understanding Contrastive Representation Learning through Alignment and Uniformity on the
    Hypersphere (2020), with alpha = 2.
    """
    distances = 2 - 2 * queries @ images.T  # (Q, I)
    return distances[positive_mask].mean()


def uniformity(features: Tensor) -> Tensor:
    """log of the mean of exp(-2 |x - y|^2) over pairs of different rows (I, D) of unit vectors; lower is more uniform.

    Source: as `alignment`, with t = 2. 0 for a single row.
    """
    if len(features) < 2:
        return features.new_zeros(())
    return (-2 * torch.pdist(features).square()).exp().mean().log()
