"""Tensors of all processes of a job, with gradients.

Shape letters: B rows of this process, W processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all processes; in the backward pass each process sums what all of them have for its own rows."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor)
        ctx.count = len(tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.count
        return gradient[start : start + ctx.count]


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Rows of all processes in rank order, (W * B, ...); gradient flows back to the process each row came from.

    Every process must hold the same shape. Without processes the tensor itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor.contiguous())


def gather_ragged(tensor: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `gather_with_grad`, of rows (B, K, D) with their mask (B, K), whose K may differ between processes.

    Where it does, what is missing is 0, and False in the mask.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor, mask
    width = torch.tensor(mask.shape[1], device=mask.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    missing = int(width) - mask.shape[1]
    tensor, mask = F.pad(tensor, (0, 0, 0, missing)), F.pad(mask, (0, missing))
    return gather_with_grad(tensor), gather_with_grad(mask.to(torch.uint8)).bool()
