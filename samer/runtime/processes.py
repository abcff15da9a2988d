"""Ranks of a job of several processes, and what they say to each other.

Importing it imports no torch: commands read their arguments first."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from samer.config import InputError
from samer.runtime.signals import asked, stop_here

# what gloo, NCCL and torch's store say when a process at the other end is no more; NCCL's plain system error names a
# remote peer as one of many guesses and is not meant
_PEER_LEFT = re.compile(
    "connection (was )?(closed|reset) by (remote )?peer|timed out waiting .* for (send|recv)|remote process exited"
    "|ncclRemoteError|socket (was )?closed|broken pipe|pair closure|failed to recv, got 0 bytes",
    re.IGNORECASE,
)


def _joined() -> Any:
    """torch.distributed if this process has joined others by it, else None; it is not imported for that."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_initialized() else None


def rank() -> int:
    """This process's number among the launched ones; 0 without torchrun."""
    dist = _joined()
    return dist.get_rank() if dist else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes were launched; 1 without torchrun."""
    dist = _joined()
    return dist.get_world_size() if dist else int(os.environ.get("WORLD_SIZE", 1))


_threads: dict[str, int] = {}  # "asked": how many the user allows


def use_threads(count: int) -> None:
    """Has this process compute, and decode pictures, with so many threads."""
    import torch

    torch.set_num_threads(count)
    _threads["asked"] = count


def threads() -> int:
    """Threads for what runs beside the model, such as decoding: as asked, else this process's share of the cores."""
    if "asked" in _threads:
        return _threads["asked"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def print0(*words: object) -> None:
    """Prints on the first process only, at once."""
    if rank() == 0:
        print(*words, flush=True)


def check_joined(place: object) -> None:
    """Several processes may write to `place` only after they have joined: each would take itself for the only one.

    Raises:
        InputError: they have not.
    """
    if world_size() > 1 and not _joined():
        raise InputError(
            f"{place}: WORLD_SIZE is {world_size()}, but these processes have not joined each other; start one "
            "process (unset WORLD_SIZE), or join them with samer.runtime.processes.process_group"
        )


@contextmanager
def process_group():
    """Joins the processes that torchrun launched (nccl with CUDA, else gloo); nothing to do for one process.

    Raises:
        InputError: more processes than GPUs, processes that can't reach each other, or one of them has ended. Other
            errors come out as they are.
    """
    import torch
    import torch.distributed as dist

    started, clean = world_size() > 1 and not dist.is_initialized(), False
    try:
        if started:
            _join()
        yield
        if started:
            dist.barrier()  # a process that leaves while another still takes leave aborts it
        clean = True
    except RuntimeError as error:
        ended = _PEER_LEFT.search(str(error))
        if not started or not (ended or isinstance(error, dist.DistError)):
            raise
        stop_here()  # all were asked to stop, this one came last
        place, words = f"process {rank()} of {world_size()}", " ".join(str(error).split())
        if ended:
            raise InputError(
                f"{place}: another process of this job has ended, its own message says why (here: {words[:200]}); "
                "run the same command again to go on"
            ) from None
        raise InputError(
            f"{place}: the processes can't work together: {_cause(error)}; NCCL_DEBUG=INFO and "
            "TORCH_DISTRIBUTED_DEBUG=DETAIL in the environment say more"
        ) from error
    finally:
        # with NCCL, leaving may wait for processes that wait for this one; the end of this process ends its part, too
        if started and dist.is_initialized() and (clean or not torch.cuda.is_available()):
            # gloo's thread frees the tensors of the last exchange, for which it needs the interpreter; a group that is
            # destroyed meanwhile waits for that thread with the interpreter in its hands, for ever
            time.sleep(0.1)
            dist.destroy_process_group()


def _join() -> None:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        count, gpus = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size()), torch.cuda.device_count()
        if count > gpus:
            raise InputError(
                f"{count} processes on this machine (LOCAL_WORLD_SIZE, else WORLD_SIZE) for its {gpus} GPUs; start at "
                f"most {gpus}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to compute on the CPU"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _cause(error: RuntimeError) -> str:
    """The first lines of an error of torch.distributed, without the stack in C++ below them."""
    lines = str(error).partition("Exception raised from")[0].splitlines()
    return " ".join(" ".join([line for line in lines if line.strip()][:4]).split())[:500]


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process in rank order; small Python values only."""
    dist = _joined()
    if not dist or dist.get_world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, the same bytes in all of them; the others wait and don't compute it.

    For small values whose tensors are on the CPU. Without processes simply `make()`.
    """
    dist = _joined()
    if not dist or dist.get_world_size() == 1:
        return make()
    held = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def stop_asked() -> bool:
    """Whether SIGTERM asked some process of this job to stop; all of them must ask, and get the same answer."""
    return any(gather_objects(asked()))
