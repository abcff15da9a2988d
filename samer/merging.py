"""The operator: cluster, assign, merge (METHOD sections 2-3).

Shape letters: B images, N tokens, K regions, D embedding, L labels.

Everything is batched; the only loops run over the T clustering iterations and, for `farthest` centres, over the K
picks, each of which depends on the one before. Both distances and both means come from one product each: with
a_i = [v_i, p_i, 1] and b_k = [mu_k, 2 gamma s_k, -gamma |s_k|^2],

    d(i, k) = (1 - v_i . mu_k) + gamma |p_i - s_k|^2 = 1 + gamma |p_i|^2 - a_i . b_k,

and what does not depend on k changes neither an argmin nor a softmax over k; sums of tokens, of coordinates and counts
are the product of the assignment with a.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from samer.config import InputError, MergeConfig
from samer.objects import instance_inconsistency
from samer.settings import vectors_of
from samer.tokens import MergedTokens, check_tensor

LENGTH_ERROR = 0.05  # unit tokens may be off so much; in bfloat16 they are off by 0.004
MOST_LABELS = 2**16  # instances of an image; the prior counts each in every region

__all__ = ["MergeConfig", "check_tokens", "check_unit", "each_budget", "keep_short", "keep_tokens", "merge_tokens"]


def merge_tokens(
    tokens: Tensor,
    coords: Tensor,
    config: MergeConfig,
    *,
    mask: Tensor | None = None,
    instance_labels: Tensor | None = None,
    views: Tensor | None = None,
) -> MergedTokens:
    """Merges N unit tokens per image into at most K (METHOD sections 2-3).

    Computed in float32 whatever the dtype (float64 stays). Gradient flows through the tokens and the soft assignment;
    centres are constants. An image with at most K tokens keeps them as they are, in order.

    Args:
        tokens: (B, N, D), unit norm.
        coords: (B, N, 2) or (N, 2), (x, y) in the unit square.
        config: K and the other settings.
        mask: (B, N) bool, False at padding, whose contents (NaN too) do not matter.
        instance_labels: (B, N) long, 0 is background: adds the object prior. Training only.
        views: (B, N) bool, True at tokens of a second view of the whole picture, for `config.global_view` "apart".

    Returns:
        `MergedTokens` with K = min(config.num_regions, N), or of a share the K of N, padding counted: an image fills as
        many as its own tokens give. `assignments` are those of the last clustering iteration.

    Raises:
        InputError: anything but tensors; shapes, dtypes or devices that do not fit; an image without a valid token; a
            token or place that is not finite; labels that are no small numbers.
    """
    check_tokens(tokens, coords, mask, instance_labels)
    if views is not None:
        check_tensor("views", views, torch.bool, like=tokens)
        if views.shape != tokens.shape[:2]:
            raise InputError(f"views of shape {tuple(views.shape)} does not fit tokens of shape {tuple(tokens.shape)}")
    if not isinstance(config, MergeConfig):
        raise InputError(f"config must be a MergeConfig, such as MergeConfig(num_regions=64); it is {config!r:.80}")
    if config.compressor != "samer":
        raise InputError(f"merge_tokens is samer's; for {config.compressor!r} use samer.compressors.make_compressor")
    if isinstance(config.num_regions, str):
        coords = coords.expand(len(tokens), -1, -1)

        def merge(regions: int, rows: Tensor | slice) -> MergedTokens:
            sides = {"mask": mask, "instance_labels": instance_labels, "views": views}
            own = {name: None if value is None else value[rows] for name, value in sides.items()}
            return merge_tokens(tokens[rows], coords[rows], replace(config, num_regions=regions), **own)

        return each_budget(config.num_regions, tokens.shape[1], mask, merge)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = tokens.to(dtype)
        coords = coords.to(tokens).expand(len(tokens), -1, -1)
        if mask is not None:
            tokens = torch.where(mask[..., None], tokens, 0)
            coords = torch.where(mask[..., None], coords, 0)
        if tokens.shape[1] <= config.num_regions:
            return keep_tokens(tokens, coords, mask)
        one = torch.ones_like(coords[..., :1]) if mask is None else mask[..., None].to(dtype)
        augmented = torch.cat([tokens, coords, one], dim=-1)  # a: (B, N, D + 3), zero at padding
        start = _starts(augmented.detach(), config, mask)
        barrier = _barrier(views, start) if views is not None and config.global_view == "apart" else None
        centres, assignments = _cluster(augmented.detach(), start, config, barrier)
        logits = augmented @ centres.transpose(1, 2)  # (B, N, K): -d + const(i)
        if instance_labels is not None and config.object_penalty > 0:
            labels = instance_labels if mask is None else instance_labels.masked_fill(~mask, 0)
            hard = F.one_hot(assignments, config.num_regions).to(dtype) * one  # (B, N, K)
            penalty = instance_inconsistency(hard, labels, int(labels.max()) + 1)
            logits = logits - config.object_penalty * penalty
        if barrier is not None:
            logits = logits.masked_fill(barrier, float("-inf"))
        weights = (logits / config.assignment_temperature).softmax(dim=-1)
        if mask is not None:
            weights = weights * mask[..., None]
        sums = weights.transpose(1, 2) @ augmented  # (B, K, D + 3): sum w v, sum w p, sum w
        merged = F.normalize(sums[..., :-3], dim=-1)
        places = sums[..., -3:-1] / sums[..., -1:].clamp(min=torch.finfo(dtype).tiny)
        full = torch.ones(merged.shape[:2], dtype=torch.bool, device=merged.device)
        visible = assignments if mask is None else assignments.masked_fill(~mask, -1)
        result = MergedTokens(merged, places, full, weights, visible)
        return result if mask is None else keep_short(result, tokens, coords, mask)


def each_budget(
    share: str, count: int, mask: Tensor | None, merge: Callable[[int, Tensor | slice], MergedTokens]
) -> MergedTokens:
    """Merges the images of a batch that have the same K together, where K is a share of each image's own tokens.

    Args:
        share: of `config.Budget`.
        count: N, padding counted; the result is as wide as an image of so many tokens is, whatever the batch holds.
        mask: (B, N) bool, False at padding; None if nothing is padded.
        merge: of K and the rows of the batch that have it; its result has at most K regions.
    """
    width = vectors_of(share, count)
    if mask is None:
        return merge(width, slice(None))
    budgets = torch.tensor([vectors_of(share, length) for length in mask.sum(1).tolist()])
    rows, parts = [], []
    for regions in budgets.unique().tolist():
        rows.append((budgets == regions).nonzero()[:, 0].to(mask.device))
        found = merge(regions, rows[-1])
        more = width - found.tokens.shape[1]
        parts.append(
            (
                F.pad(found.tokens, (0, 0, 0, more)),
                F.pad(found.coords, (0, 0, 0, more)),
                F.pad(found.mask, (0, more)),
                F.pad(found.weights, (0, more)),
                found.assignments,
            )
        )
    back = torch.cat(rows).argsort()
    return MergedTokens(*(torch.cat(column)[back] for column in zip(*parts)))


def check_tokens(tokens: Tensor, coords: Tensor, mask: Tensor | None, labels: Tensor | None = None) -> None:
    """Refuses tokens, coordinates, mask and labels that do not fit each other, as `merge_tokens` describes them."""
    check_tensor("tokens", tokens)
    check_tensor("coords", coords, like=tokens)
    if tokens.dim() != 3 or 0 in tokens.shape or not tokens.is_floating_point():
        raise InputError(
            f"tokens must be floating (B, N, D) with at least one token; got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if coords.shape not in ((*tokens.shape[:2], 2), (tokens.shape[1], 2)):
        raise InputError(f"coords of shape {tuple(coords.shape)} do not fit tokens of shape {tuple(tokens.shape)}")
    if not coords.is_floating_point():
        raise InputError(f"coords are {coords.dtype}; expected floating (x, y) in the unit square")
    for name, value, dtype in (("mask", mask, torch.bool), ("instance_labels", labels, torch.int64)):
        if value is None:
            continue
        check_tensor(name, value, dtype, like=tokens)
        if value.shape != tokens.shape[:2]:
            raise InputError(f"{name} of shape {tuple(value.shape)} does not fit tokens of shape {tuple(tokens.shape)}")
    if mask is not None and not mask.any(1).all():
        raise InputError(f"image {int((~mask.any(1)).nonzero()[0])} of the batch has no valid token")
    # a sum is finite where all of it is, but for a huge one, which is none of unit tokens
    finite = tokens.detach().sum(2).isfinite() & coords.sum(-1).isfinite()  # (B, N)
    wrong = ~finite if mask is None else ~finite & mask
    if wrong.any():
        image, token = wrong.nonzero()[0].tolist()
        what = "tokens" if coords.expand(*tokens.shape[:2], 2)[image, token].isfinite().all() else "coords"
        raise InputError(f"image {image} of the batch has NaN or infinite {what}; check the retriever and its dtype")
    if labels is not None:
        held = labels if mask is None else labels.masked_fill(~mask, 0)
        if int(held.min()) < 0 or int(held.max()) >= MOST_LABELS:
            raise InputError(f"instance_labels must be >= 0 (0 is background) and below {MOST_LABELS:,}")


def check_unit(tokens: Tensor, coords: Tensor, mask: Tensor | None) -> None:
    """Refuses tokens that are not of unit length, or not in the unit square; padding may hold anything.

    `merge_tokens` itself is defined for others; of an image from a retriever they are a mistake.

    Args:
        tokens: (B, N, D), checked by `check_tokens`.
        coords: (B, N, 2) or (N, 2).
        mask: (B, N) bool, or None.
    """
    lengths = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.promote_types(tokens.dtype, torch.float32))
    off = (lengths - 1).abs() > LENGTH_ERROR  # (B, N)
    astray = ((coords - 0.5).abs() > 0.501).any(-1)  # half precision rounds; (B, N) or (N,)
    wrong = off | astray if mask is None else (off | astray) & mask
    if not wrong.any():
        return
    image, token = wrong.nonzero()[0].tolist()
    if off[image, token]:
        raise InputError(
            f"image {image} of the batch has a token of length {float(lengths[image, token]):.3g}; give unit vectors "
            "(torch.nn.functional.normalize(tokens, dim=-1))"
        )
    place = coords.expand(*tokens.shape[:2], 2)[image, token].tolist()
    raise InputError(f"image {image} of the batch has a token at {place}; give coords in the unit square")


def _bounds(sums: Tensor, spatial_weight: float) -> tuple[Tensor, Tensor]:
    """Centres b (B, K, D + 3) and counts (B, K, 1) from sums of a over clusters."""
    count = sums[..., -1:]
    place = sums[..., -3:-1] / count.clamp(min=1)
    mean = F.normalize(sums[..., :-3], dim=-1)
    offset = place.square().sum(-1, keepdim=True)
    return torch.cat([mean, 2 * spatial_weight * place, -spatial_weight * offset], dim=-1), count


@torch.no_grad()
def _starts(augmented: Tensor, config: MergeConfig, mask: Tensor | None) -> Tensor:
    """Indices (B, K) of the tokens that are the first centres."""
    return (_raster if config.center_init == "raster" else _farthest)(augmented, config, mask)


def _barrier(views: Tensor, start: Tensor) -> Tensor:
    """(B, N, K) bool, True where a token may not go: a region stays with the view that its first centre is of.

    Where no first centre is of a token's own view (a very small K), the token goes anywhere.
    """
    kinds = views.gather(1, start)  # (B, K)
    other = views[..., None] != kinds[:, None]
    return other & ~other.all(2, keepdim=True)


@torch.no_grad()
def _cluster(augmented: Tensor, start: Tensor, config: MergeConfig, barrier: Tensor | None) -> tuple[Tensor, Tensor]:
    """Final centres b (B, K, D + 3) and the last hard assignment (B, N); that of padding means nothing."""
    first = augmented.gather(1, start[..., None].expand(-1, -1, augmented.shape[2]))
    centres, _ = _bounds(first, config.spatial_weight)
    for _ in range(config.cluster_iters):
        closeness = augmented @ centres.transpose(1, 2)  # (B, N, K)
        if barrier is not None:
            closeness = closeness.masked_fill(barrier, float("-inf"))
        nearest = closeness.argmax(-1)  # (B, N)
        moved, size = _bounds(_cluster_sums(augmented, nearest, config.num_regions), config.spatial_weight)
        centres = torch.where(size > 0, moved, centres)
    return centres, nearest


def _cluster_sums(augmented: Tensor, nearest: Tensor, regions: int) -> Tensor:
    """Sums of a over clusters, (B, K, D + 3)."""
    batch, _, width = augmented.shape
    if augmented.is_cuda:  # index_add_ adds in no fixed order there; a product with the one-hot assignment does
        hard = augmented.new_zeros(*nearest.shape, regions).scatter_(2, nearest[..., None], 1.0)
        return hard.transpose(1, 2) @ augmented
    rows = nearest + regions * torch.arange(batch)[:, None]
    sums = augmented.new_zeros(batch * regions, width)  # 7 times faster than the product on a CPU
    return sums.index_add_(0, rows.flatten(), augmented.reshape(-1, width)).view(batch, regions, width)


def _raster(augmented: Tensor, config: MergeConfig, mask: Tensor | None) -> Tensor:
    """Indices (B, K) of round(linspace(0, n - 1, K)) among each image's n valid tokens."""
    batch, count, _ = augmented.shape
    steps = torch.arange(config.num_regions, dtype=torch.float64, device=augmented.device)
    lengths = torch.full((batch,), count, device=augmented.device) if mask is None else mask.sum(1)
    span = (lengths - 1).double()[:, None]
    rank = (steps * span / max(1, config.num_regions - 1)).round().long()  # (B, K)
    if mask is None:
        return rank
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # valid tokens first, in order
    return order.gather(1, rank)


def _farthest(augmented: Tensor, config: MergeConfig, mask: Tensor | None) -> Tensor:
    """Indices (B, K): the token nearest the mean direction, then always the one farthest from all chosen."""
    tokens = augmented[..., :-3]
    hidden = None if mask is None else ~mask
    similarity = (tokens @ tokens.sum(1)[..., None])[..., 0]  # the mean's length does not change the order
    first = similarity if hidden is None else similarity.masked_fill(hidden, float("-inf"))
    chosen = [first.argmax(1)]
    nearness = torch.full_like(first, float("-inf"))  # a . b of the nearest chosen centre
    reach = 1 + config.spatial_weight * augmented[..., -3:-1].square().sum(-1)  # (B, N)
    rows = torch.arange(len(augmented), device=augmented.device)
    for _ in range(config.num_regions - 1):
        centre, _ = _bounds(augmented[rows, chosen[-1]], config.spatial_weight)  # (B, D + 3)
        nearness = torch.maximum(nearness, (augmented @ centre[..., None])[..., 0])
        distance = reach - nearness
        chosen.append((distance if hidden is None else distance.masked_fill(hidden, float("-inf"))).argmax(1))
    return torch.stack(chosen, dim=1)


def keep_tokens(tokens: Tensor, coords: Tensor, mask: Tensor | None) -> MergedTokens:
    """At most K tokens, nothing to compress: valid tokens in order, each its own region."""
    batch, count, _ = tokens.shape
    valid = torch.ones(batch, count, dtype=torch.bool, device=tokens.device) if mask is None else mask
    slot = torch.where(valid, valid.long().cumsum(1) - 1, -1)  # (B, N)
    weights = F.one_hot(slot.clamp(min=0), count).to(tokens.dtype) * valid[..., None]
    kept = torch.arange(count, device=tokens.device) < valid.sum(1, keepdim=True)
    if mask is None:
        return MergedTokens(tokens, coords, kept, weights, slot)
    return MergedTokens(weights.transpose(1, 2) @ tokens, weights.transpose(1, 2) @ coords, kept, weights, slot)


def keep_short(result: MergedTokens, tokens: Tensor, coords: Tensor, mask: Tensor) -> MergedTokens:
    """`result` of K regions, but for images of a padded batch with at most K valid tokens: those keep their tokens."""
    regions = result.tokens.shape[1]
    lengths = mask.sum(1)
    short = lengths <= regions  # (B,)
    slot = torch.where(mask, mask.long().cumsum(1) - 1, -1)
    one_hot = F.one_hot(slot.clamp(0, regions - 1), regions).to(tokens.dtype) * mask[..., None]
    alone = short[:, None, None]
    return MergedTokens(
        torch.where(alone, one_hot.transpose(1, 2) @ tokens, result.tokens),
        torch.where(alone, one_hot.transpose(1, 2) @ coords, result.coords),
        torch.where(short[:, None], torch.arange(regions, device=tokens.device) < lengths[:, None], result.mask),
        torch.where(alone, one_hot, result.weights),
        torch.where(short[:, None], slot, result.assignments),
    )
