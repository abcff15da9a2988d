"""MaxSim late-interaction scores: exact, masked, and blocked so that no intermediate outgrows its budget.

`maxsim` scores tensors in float32 and is differentiable. `score_stored` and `search` scan what an index stores: floats,
int8 with scales, signs, or codes; their products run in the fastest kernel that this machine computes rightly.

Q queries, M query tokens, I images, K image tokens, D embedding width; b images and q queries of one block.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from samer.codes import Codebook
from samer.config import InputError
from samer.products import (
    Int8Queries,
    ReusedProduct,
    fused_scan_works,
    half_product,
    half_product_works,
    quantise_rows,
    sign_lookup,
    sign_table,
)
from samer.settings import whole_number
from samer.tokens import QueryTokens, check_tensor

# One block's token products. On a CPU they should stay in cache between the matrix product and the maximum
# (4 MB of float32: measured within 1.2x of the bare product); on a GPU the block must amortise kernel launches.
_CPU_BLOCK_ELEMENTS = 2**20
_GPU_BLOCK_ELEMENTS = 2**25
_CPU_LOOKUP_ELEMENTS = 2**22  # of codes as int8: fewer keep threads waiting for each other, more leave the cache
_BASES = 2**16  # bases of images that are multiplied at once, as float32
# Columns of one block's matrix product: enough to run it at full speed, few enough to leave room for many images.
_BLOCK_QUERY_TOKENS = 1024


def maxsim(
    queries: Tensor,
    images: Tensor,
    query_mask: Tensor | None = None,
    image_mask: Tensor | None = None,
    *,
    block_elements: int | None = None,
) -> Tensor:
    """Score every query against every image: the mean over query tokens of the best dot product with an image token.

    Computed in float32 whatever the input dtype and autocast say (float64 stays float64). Differentiable in both
    token sets; where image tokens tie for the maximum, the gradient goes to the first of them.

    Args:
        queries: (Q, M, D) query tokens.
        images: (I, K, D) image tokens.
        query_mask: (Q, M) bool, True at tokens that count; None: all. What padded positions hold never matters.
        image_mask: (I, K) bool, likewise.
        block_elements: upper bound on the token products held at once, never below one query-image pair (M * K);
            None: a value measured to be fast on the device.

    Returns:
        (Q, I) scores; for unit tokens they lie in [-1, 1].

    Raises:
        InputError: shapes, devices or mask dtypes do not fit; a set is empty; a query or an image has no valid token;
            a valid token or a score is not finite.

    Source: METHOD section 4 (SaMer, arXiv 2607.04605, the retrieval score S(q, I)).
    """
    _check_tokens("queries", queries, query_mask)
    _check_tokens("images", images, image_mask)
    if queries.shape[2] != images.shape[2] or queries.device != images.device:
        raise InputError(
            f"queries {tuple(queries.shape)} on {queries.device} and images {tuple(images.shape)} on {images.device} "
            "must agree in width (last dimension) and device"
        )
    if block_elements is None:
        block_elements = _CPU_BLOCK_ELEMENTS if images.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    _check_block(block_elements)
    tokens_per_image = images.shape[1]
    query_mask = _drop_full_mask("queries", query_mask)
    image_mask = _drop_full_mask("images", image_mask)
    trains = queries.requires_grad or images.requires_grad
    with torch.autocast(queries.device.type, enabled=False):  # it would run the product in half precision
        dtype, product = _working_product(queries, images)
        clean = _clean(queries, query_mask, dtype)
        _check_finite("queries", [_finite_rows(clean)])
        most = min(_BLOCK_QUERY_TOKENS, block_elements // tokens_per_image)
        if query_mask is not None and not (trains or queries.is_cuda):
            rows = _ValidTokens(clean, query_mask, most)  # padding is left out of the products, not only of the mean
        else:
            rows = _WholeQueries(clean, query_mask, most)
        images_per_block = max(1, block_elements // (rows.columns * tokens_per_image))
        image_blocks = images.split(images_per_block)
        image_masks = _split(image_mask, images_per_block, len(image_blocks))
        columns, sums = [], []
        for block, block_mask in zip(image_blocks, image_masks):
            block = _clean(block, block_mask, dtype)  # (b, K, D)
            sums.append(block.detach().sum(dtype=torch.promote_types(dtype, torch.float32)))
            columns.append(rows.score(block, block_mask, product))
        if not torch.stack(sums).isfinite().all():  # rare, so rows are looked at only now; a huge sum may be innocent
            blocks = zip(image_blocks, image_masks)
            _check_finite("images", [_finite_rows(_clean(block, mask, dtype)) for block, mask in blocks])
        scores = torch.cat(columns, dim=1)  # (Q, I)
    if not scores.detach().isfinite().all():
        raise InputError(f"the scores overflow {dtype}; MaxSim expects tokens of about unit length")
    return scores


def _working_product(queries: Tensor, images: Tensor) -> tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]:
    """What the tokens are multiplied in, and the product: float32 or float64, or halves where a GPU adds in float32."""
    if queries.requires_grad or images.requires_grad:
        product = torch.mm
    elif queries.dtype == images.dtype and half_product_works(images.device, images.dtype):
        return images.dtype, half_product
    else:
        product = ReusedProduct(torch.mm)
    return torch.promote_types(torch.promote_types(queries.dtype, images.dtype), torch.float32), product


class _WholeQueries:
    """A query batch in blocks of whole queries, padding and all; differentiable."""

    def __init__(self, queries: Tensor, mask: Tensor | None, columns: int) -> None:
        """(Q, M, D) clean tokens and their (Q, M) mask; at most `columns` tokens, or one query, go into one product."""
        count, length, _ = queries.shape
        per_block = max(1, min(count, columns // length))
        self.columns = per_block * length
        self.blocks = queries.split(per_block)  # each (q, M, D)
        self.masks = _split(mask, per_block, len(self.blocks))

    def score(self, images: Tensor, image_mask: Tensor | None, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(Q, b) scores against one block of clean image tokens (b, K, D)."""
        rows = zip(self.blocks, self.masks)
        return torch.cat([_score_block(block, images, mask, image_mask, product) for block, mask in rows])


class _ValidTokens:
    """The valid tokens of a ragged query batch side by side; on a CPU only, where sums by index keep their order."""

    def __init__(self, queries: Tensor, mask: Tensor, columns: int) -> None:
        """(Q, M, D) clean tokens and their (Q, M) mask; at most `columns` tokens go into one product."""
        self.lengths = mask.sum(1)  # (Q,)
        flat = queries[mask]  # (n, D)
        self.columns = max(1, min(columns, len(flat)))
        self.blocks = flat.split(self.columns)
        owners = torch.arange(len(mask), device=mask.device).repeat_interleave(self.lengths)
        self.owners = owners.split(self.columns)

    def score(self, images: Tensor, image_mask: Tensor | None, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """(Q, b) scores against one block of clean image tokens (b, K, D)."""
        totals = images.new_zeros(
            len(self.lengths), len(images), dtype=torch.promote_types(images.dtype, torch.float32)
        )
        for tokens, owner in zip(self.blocks, self.owners):
            products = product(images.flatten(0, 1), tokens.t())  # (b*K, c)
            products = products.view(images.shape[0], images.shape[1], -1)
            if image_mask is not None:
                products.masked_fill_(~image_mask[..., None], torch.finfo(products.dtype).min)
            totals.index_add_(0, owner, products.amax(dim=1).t())
        return totals / self.lengths[:, None]


def _score_block(
    queries: Tensor,
    images: Tensor,
    query_mask: Tensor | None,
    image_mask: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = torch.mm,
) -> Tensor:
    """Return (q, b) scores of one block of clean tokens, (q, M, D) against (b, K, D)."""
    # Image tokens down, query tokens across: the maximum then runs over whole rows, which vectorises.
    products = product(images.flatten(0, 1), queries.flatten(0, 1).t())  # (b*K, q*M)
    products = products.view(images.shape[0], images.shape[1], -1)  # (b, K, q*M)
    if image_mask is not None:
        # Not a product with 0: a padded token would win against negative similarities.
        products.masked_fill_(~image_mask[..., None], torch.finfo(products.dtype).min)
    if products.requires_grad:
        # max(dim) keeps only the winners' indices for the backward pass; amax would keep every product.
        best = products.max(dim=1).values
    else:
        best = products.amax(dim=1)  # (b, q*M)
    best = best.view(images.shape[0], *queries.shape[:2])  # (b, q, M)
    if query_mask is None:
        return best.mean(dim=2).t()
    total = best.masked_fill(~query_mask, 0.0).sum(dim=2)  # (b, q)
    return (total / query_mask.sum(dim=1)).t()


def _check_block(block_elements: int) -> None:
    """Refuse a bound of a block that is no whole number, or below 1."""
    if whole_number("block_elements", block_elements) < 1:
        raise InputError(f"block_elements is {block_elements}; it must be at least 1")


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None) -> None:
    """Refuse tokens that are not a non-empty 3-D batch, and a mask that is not a bool of its first two dimensions."""
    check_tensor(name, tokens)
    if tokens.ndim != 3 or tokens.numel() == 0:
        raise InputError(f"{name} have shape {tuple(tokens.shape)}; expected three dimensions, none of them 0")
    if mask is None:
        return
    check_tensor(f"the mask of {name}", mask)
    if mask.shape != tokens.shape[:2]:
        raise InputError(f"the mask of {name} has shape {tuple(mask.shape)}, the tokens {tuple(tokens.shape)}")
    if mask.dtype != torch.bool or mask.device != tokens.device:
        raise InputError(f"the mask of {name} is {mask.dtype} on {mask.device}; expected bool on {tokens.device}")


def _drop_full_mask(name: str, mask: Tensor | None) -> Tensor | None:
    """Return None for a mask that hides nothing; refuse a row that hides everything."""
    if mask is None or mask.all():
        return None
    empty = ~mask.any(dim=1)
    if empty.any():
        raise InputError(f"{name}: row {int(empty.nonzero()[0])} has no valid token ({int(empty.sum())} such rows)")
    return mask


def _clean(tokens: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the tokens in the working dtype, with 0 where padded, so that garbage there reaches neither pass."""
    tokens = tokens.to(dtype)
    return tokens if mask is None else tokens.masked_fill(~mask[..., None], 0.0)


def _finite_rows(tokens: Tensor) -> Tensor:
    """Return per row whether all its values are finite."""
    values = tokens.detach().flatten(1)  # its extremes tell, as NaN wins both, at a tenth of what isfinite costs
    return values.amax(dim=1).isfinite() & values.amin(dim=1).isfinite()


def _check_finite(name: str, finite: list[Tensor]) -> None:
    """Refuse the first row that was found not finite; checked here, not in the scores, where a maximum hides -inf."""
    rows = torch.cat(finite)
    if not rows.all():
        raise InputError(
            f"{name}: row {int((~rows).nonzero()[0])} holds NaN or infinity ({int((~rows).sum())} such rows)"
        )


def _split(mask: Tensor | None, rows: int, blocks: int) -> list[Tensor | None] | tuple[Tensor, ...]:
    """Split an optional mask like its tokens."""
    return [None] * blocks if mask is None else mask.split(rows)


@dataclass(frozen=True)
class StoredImages:
    """Image tokens as an index stores them.

    Attributes:
        tokens: (I, K, D) float32, bfloat16 or float16; int8, value = int8 * scale; or (I, K, D / 8) uint8, the signs of
            D components, lowest bit first, 1 for positive; or (I, K, G) uint8 codes.
        scale: of int8, (I,) float32, one per image, or one number for all. An image's maximum does not see its scale,
            so scales are applied after it and cost nothing. Of codes that of the bases.
        mask: (I, K) bool, False where an image has fewer vectors; None: all are there.
        live: (I,) bool, False for a deleted image; None: all live.
        bases: of codes, (I, D) int8: what all vectors of an image have in common, value = int8 * scale.
        codebook: of codes.
    """

    tokens: Tensor
    scale: Tensor | float | None = None
    mask: Tensor | None = None
    live: Tensor | None = None
    bases: Tensor | None = None
    codebook: Codebook | None = None

    def part(self, rows: slice) -> StoredImages:
        """Some of them that follow each other; their memory is shared."""
        parts = {name: getattr(self, name) for name in ("tokens", "scale", "mask", "live", "bases")}
        return replace(self, **{name: each[rows] for name, each in parts.items() if isinstance(each, Tensor)})

    def lookup(self) -> Callable[[Tensor], Tensor]:
        """What makes int8 (b, K, D) of stored vectors (b, K, .), valid until its next call."""
        if self.codebook is not None:
            return self.codebook.lookup()
        return sign_lookup(self.tokens) if self.tokens.dtype == torch.uint8 else lambda block: block


def quantise_images(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K, D) float tokens as int8 and a scale per image, (n,) float32, by which its largest component is 127.

    Nothing is clipped, and an image's values depend on that image alone.
    """
    scale = (tokens.float().abs().amax((1, 2)) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return (tokens.float() / scale[:, None, None]).round().to(torch.int8), scale


def pack_signs(tokens: Tensor) -> Tensor:
    """Signs of (..., D) as bits, (..., D / 8) uint8, lowest bit first; D is a multiple of 8."""
    if tokens.shape[-1] % 8:
        raise InputError(f"1-bit storage needs a width divisible by 8; it is {tokens.shape[-1]}")
    bits = (tokens > 0).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=tokens.device)).sum(-1, dtype=torch.uint8)


def score_stored(queries: QueryTokens, images: StoredImages, *, block_elements: int | None = None) -> Tensor:
    """Scores every query against every stored image.

    Floats are scored in float32. int8, signs and codes are scored against queries in int8 (a scale per query token)
    with int32 products, so that only rounding differs from the exact score of what is stored; where this machine has no
    working int8 product the same numbers are multiplied in float32, with the same result. On a CUDA GPU `samer.kernels`
    does it all in one pass, where Triton is there.

    Args:
        queries: (Q, M, D).
        images: of one index; deleted ones are scored like the others.
        block_elements: as in `maxsim`.

    Returns:
        (Q, I) float32, the mean over valid query tokens of the best similarity. For signs the similarity is
        q . sign(v) / sqrt(D), an approximation that `search` and an index's `scores` re-rank.

    Raises:
        InputError: shapes or dtypes that do not fit, non-finite queries.
    """
    if not isinstance(queries, QueryTokens) or not isinstance(images, StoredImages):
        raise InputError(
            f"QueryTokens are scored against StoredImages, not {type(queries).__name__} against {type(images).__name__}"
        )
    tokens = images.tokens
    if block_elements is not None:
        _check_block(block_elements)
    _check_tokens("images", tokens, images.mask)
    check_tensor("queries", queries.tokens)
    if not tokens.is_floating_point():
        _check_scale(images)
    if tokens.is_cuda and (found := _in_one_pass(queries, images)) is not None:
        return found
    if tokens.is_floating_point():
        return maxsim(queries.tokens, tokens, queries.mask, images.mask, block_elements=block_elements)
    width = queries.tokens.shape[-1]
    if _width(images) != width or tokens.device != queries.tokens.device:
        raise InputError(f"queries of width {width} do not fit stored {tuple(tokens.shape)} on {tokens.device}")
    _check_tokens("queries", queries.tokens, queries.mask)
    flat, spans = _valid_rows(queries)  # (n, D) float32
    asked = Int8Queries(flat if images.codebook is None else flat @ images.codebook.queries, _BLOCK_QUERY_TOKENS)
    if block_elements is None:
        block_elements = _CPU_BLOCK_ELEMENTS if tokens.device.type == "cpu" else _GPU_BLOCK_ELEMENTS
    per_block = max(1, block_elements // (asked.wide * tokens.shape[1]))
    if tokens.dtype == torch.uint8 and not tokens.is_cuda:  # what is looked up should stay in cache, too
        per_block = max(1, min(per_block, _CPU_LOOKUP_ELEMENTS // (tokens.shape[1] * width)))
    units = _units(images, width).split(per_block)
    lengths = queries.mask.sum(1)
    owners = torch.arange(len(lengths), device=tokens.device).repeat_interleave(lengths)
    parts, whole = [], images.lookup()
    blocks = -(-len(tokens) // per_block)
    masks = _split(_drop_full_mask("images", images.mask), per_block, blocks)
    for block, mask, unit in zip(tokens.split(per_block), masks, units):
        similar = asked.best(whole(block), mask) * asked.scales  # (b, n)
        if tokens.is_cuda:  # sums by index have no fixed order there
            sums = torch.stack([similar[:, span].sum(1) for span in spans], dim=1)
        else:
            sums = similar.new_zeros(len(block), len(spans)).index_add_(1, owners, similar)
        parts.append((sums * unit[:, None] / lengths).t())
    return _with_bases(torch.cat(parts, dim=1), images, flat, spans)


def _with_bases(scores: Tensor, images: StoredImages, flat: Tensor, spans: list[slice]) -> Tensor:
    """Scores (Q, I) of codes, and what is stored without them: a base adds as much to each of its image's vectors.

    So what it adds to a score is its product with the mean of a query's tokens, of `flat` (n, D), each in its span.
    """
    if images.bases is None:
        return scores
    lengths = torch.tensor([span.stop - span.start for span in spans], device=flat.device)
    means = torch.segment_reduce(flat, "mean", lengths=lengths, axis=0).to(scores.device)
    for start in range(0, len(images.bases), _BASES):
        own = slice(start, start + _BASES)
        scores[:, own] += means @ images.bases[own].float().t() * images.scale[own]
    return scores


def _in_one_pass(queries: QueryTokens, images: StoredImages) -> Tensor | None:
    """Scores (Q, I) by `samer.kernels`; None where it does not take these tensors, or floats are not finite."""
    tokens, width, codebook = images.tokens, queries.tokens.shape[-1], images.codebook
    code = tokens.shape[-1] if tokens.dtype == torch.uint8 else 0
    fits = _width(images) == width and tokens.device == queries.tokens.device
    fits = fits and not (tokens.requires_grad or queries.tokens.requires_grad)
    if not fits or not fused_scan_works(tokens.device, tokens.dtype, width, code, tokens.shape[1]):
        return None
    from samer.kernels import Refused, scan

    _check_tokens("queries", queries.tokens, queries.mask)
    mask = _drop_full_mask("images", images.mask)
    # queries are little: prepared on the CPU, they are rounded as there, and no step waits for the GPU
    flat, spans = _valid_rows(QueryTokens(queries.tokens.cpu(), queries.mask.cpu()))
    lengths = torch.tensor([span.stop - span.start for span in spans])
    share, words = (1 / lengths).repeat_interleave(lengths), sign_table(tokens.device) if code else None
    rows, weights = flat, share
    if not tokens.is_floating_point():
        rows, scales = quantise_rows(flat if codebook is None else flat @ codebook.queries.cpu())
        weights = scales * share
    try:
        found = scan(rows, weights, lengths, tokens, mask, words if codebook is None else codebook.words)
    except Refused:
        return None
    if tokens.is_floating_point():
        return found if found.isfinite().all() else None
    return _with_bases(found * _units(images, width), images, flat, spans)


def _width(images: StoredImages) -> int:
    """D of what is stored."""
    if images.codebook is not None:
        return images.codebook.width
    return images.tokens.shape[-1] * (8 if images.tokens.dtype == torch.uint8 else 1)


def _check_scale(images: StoredImages) -> None:
    """Refuses int8 without a scale per image, codes without bases, and anything else with either."""
    tokens, scale = images.tokens, images.scale
    kind = f"of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else scale
    if images.codebook is not None or images.bases is not None:
        wanted = images.codebook and (len(tokens), *tokens.shape[1:2], images.codebook.code_bytes)
        right = isinstance(scale, Tensor) and isinstance(images.bases, Tensor) and tokens.dtype == torch.uint8
        right = right and tokens.shape == wanted and scale.shape == tokens.shape[:1]
        if not (right and images.bases.shape == (len(tokens), images.codebook.width)):
            raise InputError(f"codes {tuple(tokens.shape)} need the tables they were made with, bases and a scale each")
        return
    if tokens.dtype not in (torch.int8, torch.uint8) or (tokens.dtype == torch.int8) != (scale is not None):
        raise InputError(f"stored tokens are {tokens.dtype} with scale {kind}; expected floats, int8 or signs")
    if isinstance(scale, Tensor) and (scale.shape != tokens.shape[:1] or scale.device != tokens.device):
        raise InputError(f"the scale {kind} on {scale.device} does not fit stored {tuple(tokens.shape)}")


def _units(images: StoredImages, width: int) -> Tensor:
    """What the products of each image's values are worth, (I,) float32: its scale, that of codes, or 1 / sqrt(D)."""
    unit = width**-0.5 if images.scale is None else images.scale
    if images.codebook is not None:
        unit = images.codebook.scale
    return torch.as_tensor(unit, dtype=torch.float32, device=images.tokens.device).expand(len(images.tokens))


def _valid_rows(queries: QueryTokens) -> tuple[Tensor, list[slice]]:
    """Valid query tokens (n, D) in float32, and where each query's are."""
    if not queries.mask.any(1).all():
        raise InputError(f"queries: row {int((~queries.mask.any(1)).nonzero()[0])} has no valid token")
    flat = queries.tokens[queries.mask].float()
    if not flat.isfinite().all():
        raise InputError("queries: a valid token holds NaN or infinity")
    ends = queries.mask.sum(1).cumsum(0).tolist()
    return flat, [slice(start, end) for start, end in zip([0, *ends], ends)]


def search(
    queries: QueryTokens,
    shards: Iterable[tuple[list[str], StoredImages]],
    top: int,
    *,
    block_elements: int | None = None,
) -> list[list[tuple[str, float]]]:
    """The best images of each query, found in one pass over an index without holding all scores.

    Memory: one shard's scores at a time, (Q, images of a shard), and `top` results per query. Equal scores are ordered
    by id, so that the answer depends neither on shards nor on blocks.

    Args:
        queries: (Q, M, D).
        shards: ids and stored images, as an index yields them.
        top: how many images per query.
        block_elements: as in `maxsim`.

    Returns:
        Per query, at most `top` pairs (id, score), best first.

    Raises:
        InputError: as `score_stored`; `top` below 1.
    """
    top = whole_number("top", top)
    if top < 1:
        raise InputError(f"top is {top}; it must be at least 1")
    if not isinstance(queries, QueryTokens):
        raise InputError(f"queries must be QueryTokens; they are of type {type(queries).__name__}")
    best: list[list[tuple[float, str]]] = [[] for _ in range(len(queries.tokens))]
    for ids, images in shards:
        scores = score_stored(queries, images, block_elements=block_elements)
        if images.live is not None:
            scores = scores.masked_fill(~images.live, float("-inf"))
        # every image that ties with the last of the top is looked at: the id decides among them
        cut = scores.topk(min(top, scores.shape[1]), dim=1).values[:, -1:]
        for query, row in enumerate((scores >= cut) & scores.isfinite()):
            found = row.nonzero()[:, 0]
            pairs = [(-score, ids[place]) for place, score in zip(found.tolist(), scores[query, found].tolist())]
            best[query] = heapq.nsmallest(top, best[query] + pairs)
    return [[(name, -negative) for negative, name in row] for row in best]
