"""Checkpoints of a run: tensors as safetensors, the rest as JSON, nothing pickled; whole or not taken for one.

checkpoint-N/
    state.safetensors                      projection, AdamW's moments and counts, torch's random state
    projector.safetensors, config.json     what the other scripts load
    state.json                             `State` and a checksum of itself; written again once step N is validated
    checksums.json                         written last: SHA-256 of the others but state.json
"""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from samer.config import InputError, MergeConfig
from samer.retrievers.base import Encoder, Projector
from samer.retrievers.projectors import save_projector
from samer.runtime.files import (
    DiskError,
    FileTrouble,
    atomic_path,
    exists,
    file_hash,
    is_dir,
    is_file,
    listing,
    read_json,
    trouble,
    write_json,
)
from samer.runtime.shards import bare_name, mapped, read_manifest, unreadable, write_manifest

FORMAT = "samer_checkpoint"
FORMAT_VERSION = 1
TENSORS, STATE, CHECKSUMS = "state.safetensors", "state.json", "checksums.json"
GUARDED = (TENSORS, "projector.safetensors", "config.json")
OF_TRAINER = "trainer_state.json"  # in the checkpoints of SaMer before it had a training loop of its own
KEPT = 2
_NAME = re.compile(r"checkpoint-\d+")


@dataclass
class State:
    """Where a run stands after `step` updates."""

    step: int
    epoch: float
    max_steps: int
    seed: int
    world_size: int  # processes
    accumulation: int  # batches of each process in a step
    captions_per_step: int  # of all processes; the last step of an epoch may have fewer
    loss_sums: list[float] = field(default_factory=list)  # of each process, since the last log
    logged_at: int = 0  # step of the last log
    validates: bool = False  # whether this step is one to validate after: the last of an epoch, or of the run
    history: list[dict] = field(default_factory=list)  # what was logged

    def validated(self) -> bool:
        """Whether the metrics after this step are known."""
        return any("eval_r@1" in entry and entry["step"] == self.step for entry in self.history)


def write(
    output: Path, state: State, tensors: dict[str, Tensor], projector: Projector, retriever: Encoder, merge: MergeConfig
) -> None:
    """Writes checkpoint-N and removes all but the last two.

    Raises:
        InputError: it can't be written, as on a full disk.
    """
    folder = output / f"checkpoint-{state.step}"
    with _told(output):
        if exists(folder):
            remove(folder)
        with atomic_path(folder / TENSORS) as temporary:
            temporary.write_bytes(save(tensors))
        save_projector(folder, projector, retriever, merge)
        _write_state(folder, state)
        write_json(folder / CHECKSUMS, {name: file_hash(folder / name) for name in GUARDED})
        for old in whole(output)[:-KEPT]:
            remove(old)


def rewrite_state(output: Path, state: State) -> None:
    """Brings a checkpoint that is there up to what was logged since."""
    with _told(output):
        _write_state(output / f"checkpoint-{state.step}", state)


def _write_state(folder: Path, state: State) -> None:
    write_manifest(folder / STATE, {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(state)})


@contextmanager
def _told(output: Path):
    """Says of a checkpoint that can't be written what to do, and that nothing before it is lost."""
    try:
        yield
    except FileTrouble as error:
        raise FileTrouble(f"{error}, and run the same command again to go on") from None
    except OSError as error:
        said = trouble(error.filename or output, error, "written")
        raise FileTrouble(f"{said}, and run the same command again to go on") from None


def read_state(checkpoint: Path) -> State:
    """A checkpoint's state, if every file of it is as it was written.

    Raises:
        InputError: names the file that is damaged.
    """
    remedy = f"remove {checkpoint.name} to go on from the one before"
    for name, checksum in read_json(checkpoint / CHECKSUMS).items():
        try:
            if not bare_name(name) or file_hash(checkpoint / name) != checksum:
                raise InputError(f"{checkpoint / name}: contents differ from {CHECKSUMS}; {remedy}")
        except FileNotFoundError:
            raise DiskError(f"{checkpoint / name}: not readable (there is no such file); {remedy}") from None
        except OSError as error:
            raise trouble(checkpoint / name, error) from None
    try:
        content = read_manifest(checkpoint / STATE, FORMAT, FORMAT_VERSION)
        del content["format"], content["format_version"]
        state = State(**content)
        if checkpoint.name != f"checkpoint-{state.step}":
            raise InputError(f"{checkpoint / STATE}: it is of step {state.step}")
    except FileTrouble:
        raise
    except (InputError, TypeError) as error:
        raise DiskError(f"{checkpoint / STATE}: damaged, or of another checkpoint ({error}); {remedy}") from None
    return state


def read_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors, on the CPU; `read_state` has vouched for them."""
    try:
        with mapped(checkpoint / TENSORS) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise unreadable(checkpoint / TENSORS, error, "go on from the checkpoint before") from None


def numbered(output: Path) -> list[Path]:
    """Folders named as checkpoints are, in order of their steps."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in listing(output) if _NAME.fullmatch(path.name)]
    return [folder for number, folder in sorted((int(n), f) for n, f in found if is_dir(f))]


def whole(output: Path) -> list[Path]:
    """Checkpoints that were written whole and are not being removed, oldest first."""
    return [folder for folder in numbered(output) if is_file(folder / CHECKSUMS)]


def torn(output: Path) -> list[Path]:
    """Checkpoints of this run that were cut short while they were written or removed.

    Raises:
        InputError: a folder of that name that something else wrote, or a SaMer that trained with transformers' Trainer.
    """
    for folder in numbered(output):
        if is_file(folder / OF_TRAINER):
            raise InputError(
                f"{folder}: an earlier SaMer wrote this ({OF_TRAINER}), and this one can't go on from it; name another "
                f"train.output_dir, or remove {output}/checkpoint-* to start anew"
            )
        names = {entry.name for entry in listing(folder) if not entry.name.startswith(".")}
        if names - {*GUARDED, STATE, CHECKSUMS} or not is_file(output / "config.yaml"):
            raise InputError(f"{folder} is no checkpoint of this run; name another train.output_dir, or remove it")
    return [folder for folder in numbered(output) if not is_file(folder / CHECKSUMS)]


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; what a kill meanwhile leaves is not taken for whole."""
    (checkpoint / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
