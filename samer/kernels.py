"""MaxSim over stored images on a CUDA GPU in one pass: a Triton kernel keeps products and maxima on the chip.

What torch computes in `samer.scoring` is the reference, and what takes its place where there is no Triton. Each program
holds the vectors of a few images and goes over all queries, so that an index is read once whatever the number of
queries, and what is written is a score each.

Shape letters: I images, K vectors, D embedding, Q queries, M tokens of the longest query, n tokens of all, G bytes of a
vector that is looked up, W components that a byte stands for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_VECTORS = 128  # of images in one program
_MOST_TOKENS = 64  # of a query that are multiplied at once


@triton.jit
def _block(
    stored, words, mask, row, here,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Vectors (N, D) of these rows, float32 or int8, 0 where there is none; and which are there."""
    if MASKED:
        here = here & (tl.load(mask + row, mask=here, other=0) != 0)
    if GROUPS == 0:
        place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        block = tl.load(stored + place, mask=here[:, None], other=0)
        if FLOAT:
            block = block.to(tl.float32)
    else:
        group = tl.arange(0, GROUPS)[None, :]
        byte = tl.load(stored + row[:, None] * GROUPS + group, mask=here[:, None], other=0).to(tl.int32)
        word = tl.load(words + group * STRIDE + byte)
        shift = (8 * tl.arange(0, WIDTH // GROUPS)).to(word.dtype)
        block = tl.reshape(word[:, :, None] >> shift[None, None, :], [row.shape[0], WIDTH]).to(tl.int8)
    return block, here


@triton.jit
def _maxima(
    block, here, right,
    PER: tl.constexpr, REGIONS: tl.constexpr, TOKENS: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Best product (PER, TOKENS) of each token (D, TOKENS) with the vectors (PER * REGIONS, D) of each image."""
    if FLOAT:
        products = tl.dot(block, right, input_precision="tf32x3")
        products = tl.where(here[:, None], products, float("-inf"))
    else:
        products = tl.dot(block, right, out_dtype=tl.int32).to(tl.float32)
        products = tl.where(here[:, None], products, -2147483648.0)
    return tl.max(tl.reshape(products, [PER, REGIONS, TOKENS]), axis=1)


@triton.jit
def _scan(
    asked, weights, stored, words, mask, found, images, regions, queries, length,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, FLOAT: tl.constexpr,
    PER: tl.constexpr, REGIONS: tl.constexpr, TOKENS: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """Weighted sums of maxima, (Q, I), of `PER` images and every query."""
    first = tl.program_id(0).to(tl.int64) * PER
    number = tl.arange(0, PER * REGIONS)
    image, vector = first + number // REGIONS, number % REGIONS
    row = image * regions + vector
    inside = image < images
    if ONCE:
        block, here = _block(
            stored, words, mask, row, inside & (vector < regions), WIDTH, GROUPS, STRIDE, MASKED, FLOAT
        )
    own = first + tl.arange(0, PER)
    for query in range(queries):
        total = tl.zeros([PER], tl.float32)
        for start in range(0, length, TOKENS):
            token = query * length + start + tl.arange(0, TOKENS)
            right = tl.trans(tl.load(asked + token[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]))
            if ONCE:
                best = _maxima(block, here, right, PER, REGIONS, TOKENS, FLOAT)
            else:
                best = tl.full([PER, TOKENS], float("-inf"), tl.float32)
                for begin in range(0, regions, REGIONS):
                    left = inside & (begin + vector < regions)
                    block, here = _block(stored, words, mask, row + begin, left, WIDTH, GROUPS, STRIDE, MASKED, FLOAT)
                    best = tl.maximum(best, _maxima(block, here, right, PER, REGIONS, TOKENS, FLOAT))
                    if FLOAT:  # NaN where a vector is not finite, which a maximum may hide
                        total += tl.sum(tl.reshape(tl.sum(block, 1), [PER, REGIONS]), 1) * 0
            total += tl.sum(best * tl.load(weights + token)[None, :], 1)
        if FLOAT and ONCE:
            total += tl.sum(tl.reshape(tl.sum(block, 1), [PER, REGIONS]), 1) * 0
        tl.store(found + tl.cast(query, tl.int64) * images + own, total, mask=own < images)


def fits(width: int, code_bytes: int) -> bool:
    """Whether the kernel takes vectors of D components, and G bytes of each if they are looked up, else 0."""
    whole = lambda number: number & (number - 1) == 0
    return 32 <= width <= 256 and whole(width) and whole(code_bytes) and (not code_bytes or width // code_bytes <= 8)


def scan(
    tokens: Tensor,
    weights: Tensor,
    lengths: Tensor,
    stored: Tensor,
    mask: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """Every query against every image: the sum over its tokens of weight times best product with an image's vector.

    Args:
        tokens: (n, D), the tokens of one query after another: int8, or float32 for images that are stored as floats.
        weights: (n,) float32.
        lengths: (Q,) long on any device, tokens of each query.
        stored: (I, K, D) int8 or floats, which are multiplied in three parts of TF32 each: as in float32, nearly; or
            (I, K, G) uint8 that `words` are looked up by.
        mask: (I, K) bool, False where a vector is missing.
        words: (G * 256,) or, one table for all bytes of a vector, (256,): W int8 as one integer, lowest byte first.

    Returns:
        (Q, I) float32; of floats NaN for an image with a vector that is not finite.

    `fits` says which widths it takes.
    """
    images, regions, last = stored.shape
    width, count = tokens.shape[1], len(lengths)
    longest = int(lengths.max())
    per_step = min(_MOST_TOKENS, max(16, triton.next_power_of_2(longest)))
    padded = -(-longest // per_step) * per_step
    here = torch.arange(padded) < lengths.cpu()[:, None]
    place = here.flatten().nonzero()[:, 0].to(tokens.device)
    asked = tokens.new_zeros(count * padded, width).index_copy_(0, place, tokens)
    weighed = weights.new_zeros(count * padded).index_copy_(0, place, weights)
    found = torch.empty(count, images, device=stored.device)
    size = min(_VECTORS, triton.next_power_of_2(regions))
    per = _VECTORS // size
    _scan[(-(-images // per),)](
        asked, weighed, stored.contiguous(), stored if words is None else words,
        stored if mask is None else mask.contiguous().view(torch.uint8), found, images, regions, count, padded,
        WIDTH=width, GROUPS=0 if words is None else last, STRIDE=0 if words is None or len(words) == 256 else 256,
        MASKED=mask is not None, FLOAT=stored.is_floating_point(), PER=per, REGIONS=size, TOKENS=per_step,
        ONCE=regions <= size, num_warps=8 if stored.is_floating_point() else 4,
    )  # fmt: skip
    return found
