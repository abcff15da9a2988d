"""Tensors of all processes of a job, with gradients.

Shape letters: B rows of this process, W processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
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


def largest(count: int, device: torch.device) -> int:
    """The largest of all processes' counts; `device` is one that the job's processes exchange tensors on."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    found = torch.tensor(count, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Rows of all processes in rank order, (W * B, ...); gradient flows back to the process each row came from.

    Every process must hold the same shape. Without processes the tensor itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _Gather.apply(tensor.contiguous())
