"""What is looked at before the model is loaded: trackers, the output folder, where to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from samer.config import Config, InputError, TrainConfig, load_config
from samer.runtime.files import is_file
from samer.runtime.processes import print0, world_size
from samer.training import checkpoints
from samer.training.checkpoints import State

FREE = (
    "output_dir",
    "report_to",
    "run_name",
    "dataloader_num_workers",
    "eval_batch_size",
    "strict",
)  # change no result


@dataclass(frozen=True)
class Start:
    """Where a run begins: the checkpoint to go on from with its state, and how many batches a step accumulates."""

    checkpoint: Path | None
    state: State | None
    accumulation: int


def check_trackers(report_to: str) -> list[str]:
    """Names of the trackers that `train.report_to` lists.

    Raises:
        InputError: one that accelerate does not know, or that is not installed.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    known = [str(name) for name in LoggerType.list() if str(name) != "all"]
    installed = [str(name) for name in get_available_trackers()]
    for name in names:
        if name not in known:
            raise InputError(f"train.report_to: {name!r} is not supported; name some of none, {', '.join(known)}")
        if name not in installed:
            raise InputError(f"train.report_to: {name} is not installed; pip install it, or use train.report_to=none")
    return names


def check_output(output: Path, config: Config) -> None:
    """Refuses a folder that holds a run with other settings; where training goes on must not change unseen.

    Accumulation may change with the number of processes, as long as a step has as many captions as before.
    """
    previous = output / "config.yaml"
    if not is_file(previous):
        return
    old, settings = load_config(previous), config.train
    if not settings.resume:
        raise InputError(f"{output} holds a run and train.resume is false; name another train.output_dir or remove it")
    for section in ("model", "data", "merge", "objects", "train"):
        before, now = vars(getattr(old, section)), vars(getattr(config, section))
        for key, value in now.items():
            if before[key] == value or key in FREE:
                continue
            if (section, key) == ("data", "name") and "" in (before[key], value):
                continue  # one of them is guessed from the same folder
            if key == "grad_accum_steps" and _captions(settings) in {s.captions_per_step for s in _last(output)}:
                continue
            raise InputError(
                f"{output} holds a run with {section}.{key}={before[key]!r}, now {value!r}; "
                "name another train.output_dir, or remove it to start anew"
            )


def find_start(output: Path, settings: TrainConfig) -> Start:
    """Where to begin: at the last whole checkpoint, with as many captions a step as the run has had so far.

    Raises:
        InputError: a damaged checkpoint or one of something else, or a number of processes that can't make such steps.
    """
    checkpoints.torn(output)
    if not settings.resume or not (states := _last(output)):
        return Start(None, None, settings.grad_accum_steps)
    checkpoint, state = checkpoints.whole(output)[-1], states[0]
    now = settings.train_batch_size * world_size()
    before = f"{state.world_size} processes x {settings.train_batch_size} captions x {state.accumulation} accumulated"
    if state.captions_per_step % now:
        units = state.captions_per_step // settings.train_batch_size
        raise InputError(
            f"{checkpoint}: each step has {state.captions_per_step} captions ({before}), and {world_size()} processes "
            f"take a multiple of {now}; use {_divisors(units)} processes, or name another train.output_dir"
        )
    accumulation = state.captions_per_step // now
    if world_size() != state.world_size:
        fewer = "; each loss now sees the images of other batches as negatives" if settings.gather_negatives else ""
        print0(
            f"{before} so far, {world_size()} x {settings.train_batch_size} x {accumulation} from here on: "
            f"{state.captions_per_step} captions a step as before{fewer}"
        )
    return Start(checkpoint, state, accumulation)


def _last(output: Path) -> list[State]:
    """The state of the newest checkpoint, if there is one."""
    return [checkpoints.read_state(checkpoint) for checkpoint in checkpoints.whole(output)[-1:]]


def _captions(settings: TrainConfig) -> int:
    return settings.train_batch_size * settings.grad_accum_steps * world_size()


def _divisors(number: int) -> str:
    return " or ".join(str(k) for k in range(1, number + 1) if number % k == 0)
