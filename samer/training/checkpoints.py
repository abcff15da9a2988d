"""Checkpoints of a training run: safetensors and JSON, written whole, checked before they are believed.

checkpoint-<step>/state.safetensors    the projection, AdamW's moments, torch's random state
checkpoint-<step>/state.json           `RunState`
checkpoint-<step>/projector.safetensors, config.json    what the other commands load
checkpoint-<step>/checksums.json       SHA-256 of the others but state.json, which validation changes; written last
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from samer.config import InputError
from samer.runtime.files import atomic_path, file_hash, read_json, write_json
from samer.runtime.shards import bare_name

STATE = "state.json"
TENSORS = "state.safetensors"
CHECKSUMS = "checksums.json"
KEPT = 2
_OF_TRAINER = "trainer_state.json"  # what SaMer 0.1's checkpoints had, which were transformers.Trainer's


@dataclass
class RunState:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        max_steps: of the whole run.
        epoch: how many passes over the captions, with the part of the one at work.
        captions_per_step: over all processes and the accumulation.
        world_size: processes of the run that wrote it.
        seed: of the order of captions; with step and epoch it is all that the rest of a run draws from.
        validates: whether this step is one to validate after.
        loss_sums: since the last log, of each process.
        logged_at: the step of the last log.
        history: log entries, each with "step" and "epoch".
    """

    step: int = 0
    max_steps: int = 0
    epoch: float = 0.0
    captions_per_step: int = 0
    world_size: int = 1
    seed: int = 0
    validates: bool = False
    loss_sums: list[float] = field(default_factory=lambda: [0.0])
    logged_at: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def validated(self) -> bool:
        """Whether the history has the validation of this step."""
        return any("eval_r@1" in entry and entry["step"] == self.step for entry in self.history)


def place_of(output: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return output / f"checkpoint-{step}"


def write_state(folder: Path, state: RunState) -> None:
    """Writes a checkpoint's state.json; of a finished checkpoint only the history is new."""
    write_json(folder / STATE, asdict(state))


def write_tensors(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes what training goes on with: parameters, AdamW's moments and steps, torch's random state."""
    tensors = {"rng": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        tensors[name] = parameter.detach()
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    content = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    with atomic_path(folder / TENSORS) as temporary:
        temporary.write_bytes(content)


def read_tensors(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Takes up what `write_tensors` left.

    Raises:
        InputError: not readable, or of another model.
    """
    try:
        tensors = load((folder / TENSORS).read_bytes())
        torch.set_rng_state(tensors["rng"])
        for name, parameter in model.named_parameters():
            with torch.no_grad():
                parameter.copy_(tensors[name])
            moments = {key.partition("/")[0]: value for key, value in tensors.items() if key.endswith(f"/{name}")}
            device: dict[str, Tensor] = {
                key: value.to(parameter.device) if key != "step" or optimizer.defaults.get("fused") else value
                for key, value in moments.items()
            }
            if device:
                optimizer.state[parameter] = device
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise InputError(f"{folder / TENSORS}: not readable ({str(error)[:120]}); {_remedy(folder)}") from None


def finish(folder: Path) -> None:
    """Makes a written checkpoint count, and removes those that it takes the place of."""
    files = sorted(file for file in folder.iterdir() if file.name not in (STATE, CHECKSUMS))
    write_json(folder / CHECKSUMS, {file.name: file_hash(file) for file in files})
    for old in whole(folder.parent)[:-KEPT]:
        remove(old)


def whole(output: Path) -> list[Path]:
    """Checkpoints that were written whole and are not being removed, oldest first."""
    return [folder for folder in _numbered(output) if (folder / CHECKSUMS).is_file()]


def torn(output: Path) -> list[Path]:
    """Checkpoints of this run that were cut short while they were written or removed.

    Raises:
        InputError: ones that something else wrote, an older SaMer too.
    """
    for folder in _numbered(output):
        if (folder / _OF_TRAINER).exists():
            raise InputError(
                f"{folder} was written by an older SaMer, whose checkpoints this one can't go on from; "
                "name another train.output_dir, or remove the checkpoint folders to start anew"
            )
    found = [folder for folder in _numbered(output) if not (folder / CHECKSUMS).is_file()]
    for folder in found:
        strange = {file.name for file in folder.iterdir()} - {STATE, TENSORS, "projector.safetensors", "config.json"}
        strange = {name for name in strange if not name.startswith(".")}
        if strange or not (output / "config.yaml").is_file():
            raise InputError(f"{folder} is no checkpoint of this run; name another train.output_dir, or remove it")
    return found


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; what a kill meanwhile leaves is not taken for whole, nor for something else's."""
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def read_state(folder: Path) -> RunState:
    """A checkpoint's state, if all of the checkpoint is as it was written.

    Raises:
        InputError: names the file that is damaged.
    """
    for name, checksum in read_json(folder / CHECKSUMS).items():
        try:
            if not bare_name(name) or file_hash(folder / name) != checksum:
                raise InputError(f"{folder / name}: contents differ from {CHECKSUMS}; {_remedy(folder)}")
        except OSError as error:
            raise InputError(f"{folder / name}: not readable ({error.strerror}); {_remedy(folder)}") from None
    try:
        state = RunState(**read_json(folder / STATE))
        right = f"checkpoint-{state.step}" == folder.name and 1 <= state.step <= state.max_steps
        right = right and all(isinstance(entry["step"], int) for entry in state.history)
        right = right and state.captions_per_step >= 1 and len(state.loss_sums) == state.world_size >= 1
        right = right and all(isinstance(value, float) for value in state.loss_sums)
    except (TypeError, KeyError, InputError):
        right = False
    if not right:
        raise InputError(f"{folder / STATE}: not what training wrote; {_remedy(folder)}")
    return state


def _numbered(output: Path) -> list[Path]:
    """Folders named as checkpoints are, in order of their steps."""
    named = [folder for folder in output.glob("checkpoint-*") if folder.is_dir()]
    found = [folder for folder in named if folder.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def _remedy(folder: Path) -> str:
    return f"remove {folder.name} to go on from the one before"
