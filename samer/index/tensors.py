"""What a shard of images holds, from batches of merged tokens: tokens as they are stored, masks, grids, regions.

Shape letters: n images, K regions, P patches, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samer.budgets import smaller_budgets
from samer.codes import Codebook
from samer.compressors.querybank import keep_best
from samer.index.manifest import COMMON, FLOATS, NO_REGION, Making, check_regions, level_name
from samer.retrievers.banks import Bank
from samer.runtime.shards import joined
from samer.scoring import pack_signs, quantise_images
from samer.tokens import MergedTokens, VisualTokens, regions_of_patches


@dataclass(frozen=True)
class Part:
    """What a shard keeps of a batch, on the CPU: tokens (n, K, D), mask (n, K), grids (n, 2), regions (n, P) or (n, 0).

    N x K weights of a whole shard would take gigabytes.
    """

    tokens: Tensor
    mask: Tensor
    grids: Tensor
    regions: Tensor


def kept_part(making: Making, visual: VisualTokens, merged: MergedTokens) -> Part:
    """What a shard needs of a batch.

    Raises:
        InputError: more regions than a byte tells apart, where the region of each patch is kept.
    """
    regions = torch.empty(len(merged.tokens), 0, dtype=torch.long)
    if making.assignments:  # of a share known by the images only
        check_regions(merged.tokens.shape[1])
    if making.has_regions:
        regions = regions_of_patches(merged.assignments, visual.source)
    values = (merged.tokens.float(), merged.mask, visual.grid.to(torch.int32), regions)
    return Part(*(value.cpu().clone() for value in values))


def image_tensors(
    making: Making, parts: Sequence[Part], codebook: Codebook | None = None, bank: Bank | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a shard, and those of the exact file beside one of 1-bit tokens, else none.

    Args:
        making: of the index.
        parts: of the shard.
        codebook: of an index of codes.
        bank: of an index that keeps some of the compressor's vectors.
    """
    tokens, mask = joined([part.tokens for part in parts]), joined([part.mask for part in parts])
    regions = joined([part.regions for part in parts], -1) if making.has_regions else None
    if making.kept:
        tokens, mask, regions = kept_vectors(tokens, mask, regions, bank, making.kept)
    tensors = stored_tensors(making, tokens, mask, regions, codebook)
    tensors["grids"] = torch.cat([part.grids for part in parts])
    if regions is not None:
        tensors["assignments"] = stored_regions(making, regions)
    return tensors, {"tokens": tokens.to(torch.bfloat16)} if making.dtype == "binary" else {}


def stored_regions(making: Making, regions: Tensor) -> Tensor:
    """(n, P) as it is stored: of all tokens int32, as a byte would not tell that many vectors apart."""
    whole = making.merge.compressor == "none"
    return regions.to(torch.int32) if whole else regions.remainder(NO_REGION + 1).byte()


def kept_vectors(
    tokens: Tensor, mask: Tensor, regions: Tensor | None, bank: Bank, count: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The vectors that a bank would miss most, in the order of picks; a patch whose vector is left out has none.

    Args:
        tokens: (n, K, D).
        mask: (n, K).
        regions: (n, P) long, -1 for none.
        bank: of query tokens.
        count: how many to keep.

    Returns:
        Tokens (n, min(count, K), D), mask and regions of those.

    Source: METHOD section 2b (ours), its picks alone: `keep_best`.
    """
    picks = keep_best(tokens, mask, bank.vectors, bank.weights, count)
    there = picks >= 0
    tokens = tokens.gather(1, picks.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[2])) * there[..., None]
    if regions is not None:
        places = torch.full((len(mask), mask.shape[1] + 1), -1)  # of old vectors among the new; the last is of none
        numbers = torch.arange(picks.shape[1]).expand_as(picks)
        places.scatter_(1, torch.where(there, picks, mask.shape[1]), torch.where(there, numbers, -1))
        regions = places.gather(1, torch.where(regions < 0, mask.shape[1], regions))
    return tokens, there, regions


def stored_tensors(
    making: Making, tokens: Tensor, mask: Tensor, regions: Tensor | None, codebook: Codebook | None
) -> dict[str, Tensor]:
    """What is stored of images' vectors, and of those of smaller budgets.

    Args:
        making: of the index.
        tokens: (n, K, D), 0 where `mask` (n, K) is False.
        mask: likewise.
        regions: (n, P) long, the vector of every patch, -1 for none; None: not known.
        codebook: of an index of codes.
    """
    found = {**_stored(making.dtype, tokens, mask, codebook), "mask": mask}
    if making.budgets:
        mass = None if regions is None else masses(regions, mask)
        for budget, (few, there) in zip(making.budgets, smaller_budgets(tokens, mask, mass, making.budgets)):
            bases = (found["bases"], found["scales"]) if codebook else None
            own = {**_stored(making.dtype, few, there, codebook, bases), "mask": there}
            found |= {level_name(name, budget): own[name] for name in own if not (codebook and name in COMMON)}
    return without_full_masks(making, found)


def masses(regions: Tensor, mask: Tensor) -> Tensor:
    """(n, K), how many patches each vector stands for; at least 1.

    Args:
        regions: (n, P) long, the vector of every patch, -1 for none.
        mask: (n, K).
    """
    count = torch.zeros(len(mask), mask.shape[1] + 1).scatter_add_(1, regions + 1, torch.ones(regions.shape))
    return count[:, 1:].clamp(min=1)


def without_full_masks(making: Making, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without the masks that need not be stored: of codes and smaller budgets where every vector is there."""
    spare = ["mask"] if making.codes else []
    spare = [name for name in [*spare, *(level_name("mask", each) for each in making.budgets)] if tensors[name].all()]
    return {name: tensor for name, tensor in tensors.items() if name not in spare}


def _stored(
    dtype: str, tokens: Tensor, mask: Tensor, codebook: Codebook | None, bases: tuple[Tensor, Tensor] | None = None
) -> dict[str, Tensor]:
    """Tokens (n, K, D) as they are stored, with their scales where they have some.

    `bases`: of codes, where the images have some already.
    """
    if codebook:
        codes = codebook.encode(tokens, mask, bases)
        return {"tokens": codes.codes, "bases": codes.bases, "scales": codes.scales}
    if dtype == "int8":
        whole, scales = quantise_images(tokens)
        return {"tokens": whole, "scales": scales}
    if dtype == "binary":
        return {"tokens": pack_signs(tokens)}
    return {"tokens": tokens.to(FLOATS[dtype])}
