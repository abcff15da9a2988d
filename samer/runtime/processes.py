"""Ranks of a job of several processes, and what they say to each other.

Shape letters: B rows of this process, W processes."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from samer.config import InputError
from samer.runtime.signals import asked, stop_here


def rank() -> int:
    """This process's number among the launched ones; 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes were launched; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def print0(*words: object) -> None:
    """Prints on the first process only, at once."""
    if rank() == 0:
        print(*words, flush=True)


@contextmanager
def process_group():
    """Joins the processes that torchrun launched (nccl with CUDA, else gloo); nothing to do for one process."""
    started = world_size() > 1 and not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
        if started:
            dist.barrier()  # a process that leaves while another still takes leave aborts it
    except RuntimeError as error:
        if not started or not any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")):
            raise
        stop_here()  # all were asked to stop, this one came last
        raise InputError(
            f"process {rank()} of {world_size()}: another process of this job has ended, its own message says why "
            f"(here: {' '.join(str(error).split())[:200]}); run the same command again to go on"
        ) from None
    finally:
        if started and dist.is_initialized():
            dist.destroy_process_group()


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


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process in rank order; small Python values only."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def stop_asked() -> bool:
    """Whether SIGTERM asked some process of this job to stop; all of them must ask, and get the same answer."""
    return any(gather_objects(asked()))
