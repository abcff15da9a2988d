"""MaxSim over stored images on a CUDA GPU in one pass: a Triton kernel keeps products and maxima on the chip.

What torch computes in `samer.scoring` is the reference, and what takes its place where there is no Triton. Each program
holds the vectors of a few images and goes over all queries, so that an index is read once whatever the number of
queries, and what is written is a score each.

Tensor cores multiply int8 exactly. Floats are multiplied as sums of two float16, a query's high and low bits by an
image's (of float32 also the image's low bits by the query's high ones), which keeps 21 bits of a product.

Shape letters: I images, K vectors, D embedding, Q queries, n tokens of all queries, G bytes of a vector that is looked
up, W components that a byte stands for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

Refused = TritonError  # a GPU that a kernel can't be made for, or that has too little room for it

VECTORS = 128  # of images in one program
ROWS = 64  # query tokens that are multiplied at once
_SCALE = tl.constexpr(256.0)  # of images' floats, so that small ones keep their bits: float16 ends at 65,504 and 6e-8


@triton.jit
def _block(
    stored, words, mask, row, here,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Vectors (N, D) of these rows as they are stored, or looked up, 0 where there is none; and which are there."""
    if MASKED:
        here = here & (tl.load(mask + row, mask=here, other=0) != 0)
    if GROUPS == 0:
        place = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        block = tl.load(stored + place, mask=here[:, None], other=0)
        if block.dtype != tl.int8:
            block = block.to(tl.float32) * _SCALE
        if stored.dtype.element_ty != tl.float32 and block.dtype != tl.int8:
            block = block.to(tl.float16)
    else:
        group = tl.arange(0, GROUPS)[None, :]
        byte = tl.load(stored + row[:, None] * GROUPS + group, mask=here[:, None], other=0).to(tl.int32)
        word = tl.load(words + group * STRIDE + byte)
        shift = (8 * tl.arange(0, WIDTH // GROUPS)).to(word.dtype)
        block = tl.reshape(word[:, :, None] >> shift[None, None, :], [row.shape[0], WIDTH]).to(tl.int8)
    return block, here


@triton.jit
def _maxima(
    block, here, high, low, place, ROWS: tl.constexpr, PER: tl.constexpr, REGIONS: tl.constexpr, ALL: tl.constexpr
):
    """Best product (ROWS, PER) of each of these tokens with the vectors (PER * REGIONS, D) of each image."""
    left = tl.load(high + place)
    if block.dtype == tl.int8:
        products = tl.dot(left, tl.trans(block), out_dtype=tl.int32)
        if not ALL:
            products = tl.where(here[None, :], products, -2147483648)
    else:
        if block.dtype == tl.float32:
            upper = block.to(tl.float16)
            products = tl.dot(left, tl.trans((block - upper.to(tl.float32)).to(tl.float16)))
            products = tl.dot(tl.load(low + place), tl.trans(upper), products)
            products = tl.dot(left, tl.trans(upper), products)
        else:
            products = tl.dot(tl.load(low + place), tl.trans(block))
            products = tl.dot(left, tl.trans(block), products)
        if not ALL:
            products = tl.where(here[None, :], products, float("-inf"))
    return tl.max(tl.reshape(products, [ROWS, PER, REGIONS]), axis=2).to(tl.float32)


@triton.jit
def _unsound(block, PER: tl.constexpr, REGIONS: tl.constexpr):
    """0 for each image, (PER,), or NaN where a float is not finite, which a maximum may hide."""
    sums = tl.sum(tl.reshape(tl.sum(block.to(tl.float32), 1), [PER, REGIONS]), 1)
    return sums * 0


@triton.jit
def _scan(
    high, low, weights, stored, words, mask, found, images, regions, queries, groups, span,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, STRIDE: tl.constexpr, MASKED: tl.constexpr, FLOAT: tl.constexpr,
    PER: tl.constexpr, REGIONS: tl.constexpr, ROWS: tl.constexpr, SIDE: tl.constexpr, ONCE: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """Weighted sums of maxima, (Q, I), of `PER` images and every query, `SIDE` queries at a time."""
    first = tl.program_id(0).to(tl.int64) * PER
    number = tl.arange(0, PER * REGIONS)
    image, vector = first + number // REGIONS, number % REGIONS
    row = image * regions + vector
    inside = image < images
    own = first + tl.arange(0, PER)
    if ONCE:
        here = inside & (vector < regions)
        block, here = _block(stored, words, mask, row, here, WIDTH, GROUPS, STRIDE, MASKED)
    for group in range(groups):
        total = tl.zeros([SIDE, PER], tl.float32)
        for start in range(0, span, ROWS):
            token = group * span + start + tl.arange(0, ROWS)
            place = token[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
            if ONCE:
                best = _maxima(block, here, high, low, place, ROWS, PER, REGIONS, ALL)
            else:
                best = tl.full([ROWS, PER], float("-inf"), tl.float32)
                for begin in range(0, regions, REGIONS):
                    left = inside & (begin + vector < regions)
                    block, here = _block(stored, words, mask, row + begin, left, WIDTH, GROUPS, STRIDE, MASKED)
                    best = tl.maximum(best, _maxima(block, here, high, low, place, ROWS, PER, REGIONS, False))
                    if FLOAT:
                        total += _unsound(block, PER, REGIONS)[None, :]
            weighed = best * tl.load(weights + token)[:, None]
            total += tl.sum(tl.reshape(weighed, [SIDE, ROWS // SIDE, PER]), 1)
        if ONCE and FLOAT:
            total += _unsound(block, PER, REGIONS)[None, :]
        query = group * SIDE + tl.arange(0, SIDE)
        cell = query[:, None].to(tl.int64) * images + own[None, :]
        tl.store(found + cell, total, mask=(query[:, None] < queries) & (own[None, :] < images))


def fits(width: int, code_bytes: int) -> bool:
    """Whether the kernel takes vectors of D components, and G bytes of each if they are looked up, else 0."""
    halved = width in (32, 64, 128, 256)  # Triton's blocks are powers of two
    return halved and code_bytes in (0, width // 8, width // 4, width // 2)


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
        tokens: (n, D), the tokens of one query after another, on the CPU: int8, or float32 for images stored as floats.
        weights: (n,) float32, on the CPU.
        lengths: (Q,) long, on the CPU: tokens of each query.
        stored: (I, K, D) int8, float32, bfloat16 or float16; or (I, K, G) uint8 that `words` are looked up by.
        mask: (I, K) bool, False where a vector is missing.
        words: (G * 256,) or, one table for all bytes of a vector, (256,): W int8 as one integer, lowest byte first.

    Returns:
        (Q, I) float32; of floats NaN for an image with a vector that is not finite, or has a component beyond 255.

    `fits` says which widths it takes.

    Raises:
        Refused: by Triton.

    Source: METHOD section 4, as `samer.scoring.maxsim`; the kernel is ours.
    """
    images, regions, last = stored.shape
    count, longest, floats = len(lengths), int(lengths.max()), stored.is_floating_point()
    # queries side by side, each as long as the longest: several in one product, or one in several
    length = max(16, triton.next_power_of_2(longest)) if longest <= ROWS else -(-longest // ROWS) * ROWS
    side = max(1, min(ROWS // length, triton.next_power_of_2(count)))
    groups = -(-count // side)
    here = (torch.arange(length) < lengths[:, None]).flatten()
    high = low = tokens.new_zeros(groups * side * length, tokens.shape[1])
    weighed = weights.new_zeros(len(high))
    high[: len(here)][here], weighed[: len(here)][here] = tokens, weights
    if floats:
        largest = high.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
        whole, weighed = high / largest[:, None], weighed * largest / _SCALE.value
        high = whole.half()
        low = (whole - high.float()).half()
    high, low, weighed = (each.to(stored.device) for each in (high, low, weighed))
    found = torch.empty(count, images, device=stored.device)
    size = min(VECTORS, triton.next_power_of_2(regions))
    per = VECTORS // size
    _scan[(-(-images // per),)](
        high, low, weighed, stored.contiguous(), stored if words is None else words,
        stored if mask is None else mask.contiguous().view(torch.uint8), found, images, regions, count, groups,
        side * length, WIDTH=tokens.shape[1], GROUPS=0 if words is None else last,
        STRIDE=0 if words is None or len(words) == 256 else 256, MASKED=mask is not None, FLOAT=floats, PER=per,
        REGIONS=size, ROWS=min(ROWS, side * length), SIDE=side, ONCE=regions <= size,
        ALL=mask is None and regions == size and images % per == 0, num_warps=4, num_stages=2,
    )  # fmt: skip
    return found
