"""MaxSim late-interaction scores: exact, masked, and blocked so that no intermediate outgrows its budget.

Q queries, M query tokens, I images, K image tokens, D embedding width; b images and q queries of one block.
"""

import torch
from torch import Tensor

from samer.config import InputError

# One block's token products. On a CPU they should stay in cache between the matrix product and the maximum
# (4 MB of float32: measured within 1.2x of the bare product); on a GPU the block must amortise kernel launches.
_CPU_BLOCK_ELEMENTS = 2**20
_GPU_BLOCK_ELEMENTS = 2**25
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
    if block_elements < 1:
        raise InputError(f"block_elements is {block_elements}; it must be at least 1")

    query_count, tokens_per_query, _ = queries.shape
    tokens_per_image = images.shape[1]
    dtype = torch.promote_types(torch.promote_types(queries.dtype, images.dtype), torch.float32)
    query_mask = _drop_full_mask("queries", query_mask)
    image_mask = _drop_full_mask("images", image_mask)

    pair_elements = tokens_per_query * tokens_per_image
    queries_per_block = max(
        1, min(query_count, _BLOCK_QUERY_TOKENS // tokens_per_query, block_elements // pair_elements)
    )
    images_per_block = max(1, block_elements // (queries_per_block * pair_elements))

    with torch.autocast(queries.device.type, enabled=False):  # it would run the product in half precision
        clean_queries = _clean(queries, query_mask, dtype)
        _check_finite("queries", [_finite_rows(clean_queries)])
        ragged = query_mask is not None and not (queries.requires_grad or images.requires_grad or queries.is_cuda)
        if ragged:  # padding is left out of the products, not only out of the mean
            valid = _ValidTokens(
                clean_queries, query_mask, min(_BLOCK_QUERY_TOKENS, block_elements // tokens_per_image)
            )
            images_per_block = max(1, block_elements // (valid.columns * tokens_per_image))
        else:
            query_blocks = clean_queries.split(queries_per_block)  # each (q, M, D)
            query_masks = _split(query_mask, queries_per_block, len(query_blocks))

        image_blocks = images.split(images_per_block)
        image_masks = _split(image_mask, images_per_block, len(image_blocks))
        columns, finite = [], []
        for block, block_mask in zip(image_blocks, image_masks):
            block = _clean(block, block_mask, dtype)  # (b, K, D)
            finite.append(_finite_rows(block))
            if ragged:
                columns.append(valid.score(block, block_mask))
            else:
                rows = zip(query_blocks, query_masks)
                columns.append(torch.cat([_score_block(q, block, q_mask, block_mask) for q, q_mask in rows]))
        _check_finite("images", finite)
        scores = torch.cat(columns, dim=1)  # (Q, I)
    if not scores.detach().isfinite().all():
        raise InputError(f"the scores overflow {dtype}; MaxSim expects tokens of about unit length")
    return scores


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

    def score(self, images: Tensor, image_mask: Tensor | None) -> Tensor:
        """(Q, b) scores against one block of clean image tokens (b, K, D)."""
        totals = images.new_zeros(len(self.lengths), len(images))
        for tokens, owner in zip(self.blocks, self.owners):
            products = (images.flatten(0, 1) @ tokens.t()).view(images.shape[0], images.shape[1], -1)  # (b, K, c)
            if image_mask is not None:
                products.masked_fill_(~image_mask[..., None], torch.finfo(products.dtype).min)
            totals.index_add_(0, owner, products.amax(dim=1).t())
        return totals / self.lengths[:, None]


def _score_block(queries: Tensor, images: Tensor, query_mask: Tensor | None, image_mask: Tensor | None) -> Tensor:
    """Return (q, b) scores of one block of clean tokens, (q, M, D) against (b, K, D)."""
    # Image tokens down, query tokens across: the maximum then runs over whole rows, which vectorises.
    products = images.flatten(0, 1) @ queries.flatten(0, 1).t()  # (b*K, q*M)
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


def _check_tokens(name: str, tokens: Tensor, mask: Tensor | None) -> None:
    """Refuse tokens that are not a non-empty 3-D batch, and a mask that is not a bool of its first two dimensions."""
    if tokens.ndim != 3 or tokens.numel() == 0:
        raise InputError(f"{name} have shape {tuple(tokens.shape)}; expected three dimensions, none of them 0")
    if mask is None:
        return
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
