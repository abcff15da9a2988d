"""Copies of an index's shards on a GPU: what successive openings share, and within how many bytes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from samer.config import InputError

FREE_SHARE = 0.8  # of a GPU's free memory when the first shard comes, where nobody sets a budget


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a tensor there."""
    return tensor.to(device)


class Uploads:
    """Shards of images on a device, by their checksums, for the indexes that use them now.

    An index that is opened again finds what has not changed; what no opening uses any more is dropped before anything
    new comes. Where all shards together pass the budget, as many as fit beside two stay, and the others are copied for
    a scan and freed behind it: a scan holds the shard that it scores while it fetches the next. Those that are there
    already stay first, so that a commit does not move them.

    Openings are held weakly: they end when nobody has them. For any number of threads, of which one scans at a time.
    """

    def __init__(self, budget: int | None = None, copy: Callable[[Tensor, torch.device], Tensor] | None = None) -> None:
        """Nothing is copied for the CPU, which reads mapped files.

        Args:
            budget: bytes on each device, of what an index stores; None: `FREE_SHARE` of what is free on a CUDA device,
                no bound on others.
            copy: what brings a tensor to a device, a CPU too then; None: `to_device`, for others than CPUs.
        """
        self.budget, self._copies_all = budget, copy is not None
        self._copy = copy or to_device
        self._users: weakref.WeakKeyDictionary[object, dict[str, int]] = weakref.WeakKeyDictionary()
        self._held: dict[tuple[torch.device, str], dict[str, Tensor]] = {}
        self._lock = threading.Lock()

    def use(self, user: object, sizes: Mapping[str, int]) -> None:
        """Says that an opening scans these shards from now on: their bytes, by checksum."""
        with self._lock:
            self._users[user] = {**self._users.get(user, {}), **sizes}

    def on(self, device: torch.device | str, checksum: str, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A shard's tensors on a device, copied there unless they are there.

        Args:
            device: to score on.
            checksum: of a shard that was named to `use`.
            parts: its tensors as they are mapped.

        Raises:
            InputError: a budget that two shards do not fit into, where not all do.
        """
        device = torch.device(device)
        if device.type == "cpu" and not self._copies_all:
            return parts
        key = device, checksum
        with self._lock:
            if self.budget is None and device.type == "cuda":
                self.budget = int(FREE_SHARE * torch.cuda.mem_get_info(device)[0])
            stay = self._staying(device)
            for each in [each for each in self._held if each[0] == device and each[1] not in stay]:
                del self._held[each]
            if key in self._held:
                return self._held[key]
            found = {name: self._copy(tensor, device) for name, tensor in parts.items()}
            if checksum in stay:
                self._held[key] = found
            return found

    def _staying(self, device: torch.device) -> set[str]:
        """Checksums of the shards that are kept on a device."""
        sizes = {name: size for own in list(self._users.values()) for name, size in own.items()}
        if self.budget is None or sum(sizes.values()) <= self.budget:
            return set(sizes)
        room = self.budget - 2 * max(sizes.values())
        if room < 0:
            raise InputError(
                f"two shards of this index take {2 * max(sizes.values()) / 1e9:.3g} GB on {device}, and "
                f"{self.budget / 1e9:.3g} GB are to be used; raise --gpu-memory, or search with --device cpu"
            )
        stay = set()
        for name in sorted(sizes, key=lambda name: (device, name) not in self._held):  # stable: those held come first
            if sizes[name] <= room:
                room -= sizes[name]
                stay.add(name)
        return stay
