"""What a shard of images holds, from batches of merged tokens: tokens as they are stored, masks, grids, regions.

Shape letters: n images, K regions, P patches, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samer.index.manifest import FLOATS, NO_REGION, Making, check_regions
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


def image_tensors(making: Making, parts: Sequence[Part]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a shard, and those of the exact file beside one of 1-bit tokens, else none."""
    tokens = joined([part.tokens for part in parts])
    tensors = {**_stored(making.dtype, tokens), "mask": joined([part.mask for part in parts])}
    tensors["grids"] = torch.cat([part.grids for part in parts])
    if making.has_regions:
        regions = joined([part.regions for part in parts], -1)
        whole = making.merge.compressor == "none"  # a byte would not tell that many vectors apart
        tensors["assignments"] = regions.to(torch.int32) if whole else regions.remainder(NO_REGION + 1).byte()
    return tensors, {"tokens": tokens.to(torch.bfloat16)} if making.dtype == "binary" else {}


def _stored(dtype: str, tokens: Tensor) -> dict[str, Tensor]:
    """Tokens (n, K, D) as they are stored, with their scales where they have some."""
    if dtype == "int8":
        whole, scales = quantise_images(tokens)
        return {"tokens": whole, "scales": scales}
    if dtype == "binary":
        return {"tokens": pack_signs(tokens)}
    return {"tokens": tokens.to(FLOATS[dtype])}
